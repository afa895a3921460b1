//! Puts the guard under a run.
//!
//! Whoever holds the guard's listener learns from the kernel when no task uses the filter any more
//! (`POLLHUP`, Linux 5.9): the one sign of a tree's end that daemonising, static programs and closed
//! descriptors cannot hide. Under the backstop it asks about every call that did not come through the shim;
//! without it, about every judged call.

use std::{io, os::fd::OwnedFd};

use nix::errno::Errno;
use portcullis_guard::{
    filter::{Trust, assemble},
    landlock,
    listener::{self, Privileges},
};
use portcullis_wire::gate;

use crate::link::Hold;

/// What holds the tree, after [`install`].
#[derive(Debug)]
pub enum Guard {
    /// The listener, to be handed to the supervisor.
    Listener(OwnedFd),
    /// Somebody else's listener was there before; only the first process of the tree can be watched.
    Taken,
}

/// Puts the guard under the calling process and all its descendants. Unless `hold` is nothing, a broker will answer.
///
/// no_new_privs is set only if the kernel asks for it, so that setuid programs go on working under root.
///
/// # Errors
/// As seccomp(2).
pub fn install(hold: Hold) -> io::Result<Guard> {
    let code = u16::try_from(libc::BPF_RET | libc::BPF_K).map_err(io::Error::other)?;
    let open = [libc::sock_filter { code, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW }];
    let filter = match hold {
        // What leaves from the shim's page is checked by the backstop.
        Hold::Backstop => assemble(Trust::Page(gate::PAGE)),
        Hold::Proxy { .. } => assemble(Trust::Nobody),
        Hold::Nothing => open.to_vec(),
    };
    // First, since the guard asks about Landlock too.
    if hold == (Hold::Proxy { locked: true }) {
        lock_connect()?;
    }
    let mut outcome = listener::install(&filter, Privileges::Kept);
    if is(&outcome, Errno::EACCES) {
        outcome = listener::install(&filter, Privileges::NoNew);
    }
    if is(&outcome, Errno::EBUSY) {
        return Ok(Guard::Taken);
    }
    outcome.map(Guard::Listener)
}

/// Puts a mark under the calling process and all its descendants: that they are narrowed.
///
/// # Errors
/// As seccomp(2).
pub fn mark() -> io::Result<()> {
    match listener::mark(Privileges::Kept) {
        Err(error) if error.raw_os_error() == Some(Errno::EACCES as i32) => listener::mark(Privileges::NoNew),
        done => done,
    }
}

/// Takes connect(2) of TCP from the tree, where the kernel can; it is made by proxy.
fn lock_connect() -> io::Result<()> {
    match landlock::forbid_connect() {
        Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => {
            listener::give_up_privileges()?;
            landlock::forbid_connect().map(drop)
        }
        done => done.map(drop),
    }
}

fn is(outcome: &io::Result<OwnedFd>, errno: Errno) -> bool {
    outcome.as_ref().is_err_and(|e| e.raw_os_error() == Some(errno as i32))
}
