//! Giving up what is not needed.

use std::{io, os::fd::OwnedFd};

use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};
use portcullis_types::account;

/// Who the broker is where the system has no user for it (ARCHITECTURE.md, section 2).
const DEFAULT_UID: u32 = 61990;
/// `CAP_DAC_READ_SEARCH` and `CAP_SYS_PTRACE` (linux/capability.h).
const KEPT: u32 = 1 << 2 | 1 << 19;
/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// Highest capability that may exist.
const LAST_CAP: u64 = 63;

/// Whom the broker becomes if root starts it.
#[must_use]
pub fn broker_user() -> (Uid, Gid) {
    let passwd = std::fs::read("/etc/passwd").unwrap_or_default();
    let (uid, gid) = account(&passwd, "portcullis-broker").unwrap_or((DEFAULT_UID, DEFAULT_UID));
    (Uid::from_raw(uid), Gid::from_raw(gid))
}

/// Becomes the broker's user and keeps two capabilities: to look at other processes
/// (`CAP_SYS_PTRACE`) and at files that only their owner may read (`CAP_DAC_READ_SEARCH`).
///
/// # Errors
/// As the calls; the caller must not go on then.
pub fn drop_to(uid: Uid, gid: Gid) -> io::Result<()> {
    let prctl = |option: i32, value: u64| {
        // SAFETY: these options of prctl(2) take numbers only.
        #[expect(unsafe_code, reason = "nix has no capabilities")]
        match unsafe { libc::prctl(option, value, 0, 0, 0) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    for capability in 0..=LAST_CAP {
        let keep = capability < 32 && KEPT >> capability & 1 == 1;
        if !keep && prctl(libc::PR_CAPBSET_DROP, capability).is_err() {
            break; // past the last that this kernel has
        }
    }
    prctl(libc::PR_SET_KEEPCAPS, 1)?;
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    prctl(libc::PR_SET_KEEPCAPS, 0)?;
    // effective, permitted, inheritable, low words first (capset(2))
    let header: [u32; 2] = [CAPABILITY_VERSION, 0];
    let sets: [u32; 6] = [KEPT, KEPT, 0, 0, 0, 0];
    // SAFETY: capset(2) reads a header of two words and, for version 3, six words.
    #[expect(unsafe_code, reason = "nix has no capabilities")]
    match unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Raises the limit of descriptors as far as it may go.
pub fn raise_descriptor_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft }
}

/// One descriptor kept back, so that a full table can still be dealt with: given up to take a
/// newcomer and close it at once.
#[derive(Debug)]
pub struct Spare(Option<OwnedFd>);

impl Spare {
    /// # Errors
    /// None is left even now.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Some(std::fs::File::open("/dev/null")?.into())))
    }

    /// Gives the descriptor up while `deal` runs.
    pub fn spend(&mut self, deal: impl FnOnce()) {
        self.0 = None;
        deal();
        self.0 = std::fs::File::open("/dev/null").ok().map(Into::into);
    }
}
