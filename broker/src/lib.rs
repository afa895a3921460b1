//! Decides: policy, process context, sessions, audit log.
//!
//! One process, one thread, one epoll loop. What is decided is in `decide`, which is pure; what is
//! read from or done to the kernel is in the modules in `sys`; [`control`] holds the words that
//! the `portcullis` command uses with a running broker, and `audit` what a line of the log says.
//!
//! The broker is started by the supervisor with its sockets inherited, see [`Config`]. It holds no
//! key, and as root drops to its own user with `CAP_SYS_PTRACE` and `CAP_DAC_READ_SEARCH` alone.

mod audit;
pub mod control;
mod decide;
mod error;
mod escape;
pub mod guard;
mod keyd;
mod process;
mod serve;

mod settings;
mod sys;
mod udp_filter;

/// Entries for fuzzing: each takes any bytes and must return.
#[doc(hidden)]
pub mod fuzzing {
    /// Bytes as a netlink socket could give them.
    pub fn netlink(bytes: &[u8]) {
        crate::sys::diag::read_any(bytes);
    }

    /// A held call, and bytes as a program could leave them where its arguments point.
    pub fn held_call(bytes: &[u8]) {
        crate::guard::calls::read_any(bytes);
    }

    /// Bytes as a command could write them to the control socket.
    pub fn control(bytes: &[u8]) {
        drop(serde_json::from_slice::<crate::control::Request>(bytes));
    }

    /// Bytes as a program, another broker or a key daemon could send them.
    ///
    /// # Panics
    /// If a frame that is taken is not the one that was sent.
    pub fn frames(bytes: &[u8]) {
        use portcullis_wire::{Addr, Reply, Request, keyd};
        use zerocopy::IntoBytes as _;
        let read = |addrs: &[Addr]| addrs.iter().all(|a| a.socket_addr().map(|at| at.ip()) == a.ip());
        if let Ok((_, it)) = Request::decode(bytes) {
            assert!(it.as_bytes() == bytes && read(&[it.local, it.remote]));
        }
        if let Ok((_, it)) = Reply::decode(bytes) {
            assert!(it.as_bytes() == bytes && read(&[it.local, it.remote, it.rewrite]));
        }
        if let Ok((_, head, rest)) = keyd::Head::decode(bytes) {
            assert_eq!([head.as_bytes(), rest].concat(), bytes);
        }
    }

    /// A log as a crash or a full disk could leave it, as the next broker reads it.
    pub fn log(bytes: &[u8]) {
        let _open = crate::audit::left::LeftOpen::read(String::from_utf8_lossy(bytes).lines());
    }
}

use std::{io::Write, os::fd::OwnedFd, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use audit::Unsaid;
pub use error::BrokerError;
pub use sys::lock_within;

/// Whether refusals are carried out.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// What the policy refuses fails.
    #[default]
    Enforce,
    /// What the policy refuses goes on, and is on record as `would-refuse`.
    Audit,
}

/// What the supervisor hands to a broker.
#[derive(Debug)]
pub struct Config {
    /// The state folder. Must exist, belong to the caller and be writable by no one else.
    pub state: PathBuf,
    /// The policy file; `None` means `STATE/policy.pol`. If it cannot be used, everything is refused
    /// until it can, and `status` says why; but see `strict`.
    pub policy: Option<PathBuf>,
    /// Enforce or audit.
    pub mode: Mode,
    /// Listening `SOCK_SEQPACKET` socket of `STATE/broker.sock`. The supervisor keeps it over restarts
    /// of the broker, so that programs which ask meanwhile wait in its backlog. It must be
    /// reachable by every wrapped user: mode 0666, and its folder searchable (0711).
    pub doors: OwnedFd,
    /// Listening `SOCK_STREAM` socket of `STATE/control.sock`, mode 0600. `None`: made here.
    pub control: Option<OwnedFd>,
    /// Connected `SOCK_SEQPACKET` socket to the key daemon, if one runs.
    pub keyd: Option<OwnedFd>,
    /// The broker's end of [`guard::link::pair`]: what the kernel asks, and what it is told.
    pub handed: Option<OwnedFd>,
    /// Gets `ready\n` once the broker serves, or one line that says why it cannot; then it is closed.
    pub ready: Option<OwnedFd>,
    /// No program has been served in this folder that could still be there.
    pub fresh: bool,
    /// It does not begin with a policy that cannot be used. Otherwise it then refuses everything.
    pub strict: bool,
    /// What is done without although this kernel has it.
    pub without: portcullis_types::Without,
}

/// Serves until told to end (SIGTERM, or `shutdown` over the control socket).
///
/// Blocks signals, raises the limit of descriptors and drops privileges of the calling process, so
/// it must have one of its own.
///
/// # Errors
/// [`BrokerError`], which is also written to `config.ready`.
pub fn run(config: Config) -> Result<(), BrokerError> {
    let ready = config.ready.as_ref().and_then(|fd| fd.try_clone().ok());
    match serve::Broker::start(config) {
        Ok(mut broker) => {
            drop(ready);
            broker.serve()
        }
        Err(error) => {
            if let Some(ready) = ready {
                let mut text = error.to_string();
                if let Some(source) = std::error::Error::source(&error) {
                    text = format!("{text}: {source}");
                }
                // Nobody may be listening; the error is returned as well.
                let _ = std::fs::File::from(ready).write_all(format!("{text}\n").as_bytes());
            }
            Err(error)
        }
    }
}
