//! Puts the guard under a run.
//!
//! Whoever holds the guard's listener learns from the kernel when no task uses the filter any more
//! (`POLLHUP`, Linux 5.9): the one sign of a tree's end that daemonising, static programs and closed
//! descriptors cannot hide. The filter lets every call pass as yet.

use std::{io, os::fd::OwnedFd};

use nix::errno::Errno;
use portcullis_guard::listener::{self, Privileges};

/// What holds the tree, after [`install`].
#[derive(Debug)]
pub enum Guard {
    /// The listener, to be handed to the supervisor.
    Listener(OwnedFd),
    /// Somebody else's listener was there before; only the first process of the tree can be watched.
    Taken,
}

/// Puts the guard under the calling process and all its descendants.
///
/// no_new_privs is set only if the kernel asks for it, so that setuid programs go on working under root.
///
/// # Errors
/// As seccomp(2).
pub fn install() -> io::Result<Guard> {
    let code = u16::try_from(libc::BPF_RET | libc::BPF_K).map_err(io::Error::other)?;
    let filter = [libc::sock_filter { code, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW }];
    let mut outcome = listener::install(&filter, Privileges::Kept);
    if is(&outcome, Errno::EACCES) {
        outcome = listener::install(&filter, Privileges::NoNew);
    }
    if is(&outcome, Errno::EBUSY) {
        return Ok(Guard::Taken);
    }
    outcome.map(Guard::Listener)
}

fn is(outcome: &io::Result<OwnedFd>, errno: Errno) -> bool {
    outcome.as_ref().is_err_and(|e| e.raw_os_error() == Some(errno as i32))
}
