//! System calls that need `unsafe`, each behind a function that does not.
#![expect(unsafe_code, reason = "this is where the command's own unsafe code is kept")]

use std::{
    ffi::{c_int, c_uint, c_ulong},
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    unistd::Pid,
};

/// Which of the two a [`fork_quietly`] has returned in.
#[derive(Debug)]
pub enum Forked {
    /// In the parent, with the child's id.
    Parent(Pid),
    /// In the child.
    Child,
}

/// Forks, and the child's end sends no signal: whoever we become by exec never hears of it.
/// Wait for it with `__WALL`.
///
/// # Errors
/// As clone(2).
pub fn fork_quietly() -> io::Result<Forked> {
    const NO_SIGNAL: c_ulong = 0;
    // SAFETY: clone(2) with no flags, no stack and no signal is fork(2); this program has one thread when it
    // forks (`run` and `supervise` start none), so the child's copy of every lock is free.
    match unsafe { libc::syscall(libc::SYS_clone, NO_SIGNAL, 0, 0, 0, 0) } {
        0 => Ok(Forked::Child),
        pid if pid > 0 => Ok(Forked::Parent(Pid::from_raw(c_int::try_from(pid).map_err(io::Error::other)?))),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes over descriptor `fd`, which our starter has left open for us under this number.
///
/// # Errors
/// `EBADF` if it is not open.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the descriptor is open, and by this function's contract it was passed to this process to own.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Closes every descriptor from 3 up that is not in `keep`.
///
/// Only for a process that owns no descriptor but these: right after a fork that is followed by an exec,
/// or first thing in a new image.
pub fn close_others(keep: &[RawFd]) {
    let mut keep: Vec<c_uint> =
        keep.iter().filter_map(|fd| c_uint::try_from(*fd).ok()).filter(|fd| *fd >= 3).collect();
    keep.sort_unstable();
    let mut from: c_uint = 3;
    for stay in keep.into_iter().chain([c_uint::MAX]) {
        if stay > from {
            // SAFETY: close_range(2) takes no pointer; no value that owns one of these descriptors is used
            // afterwards, by this function's contract.
            unsafe { libc::syscall(libc::SYS_close_range, from, stay.saturating_sub(1), 0) };
        }
        from = stay.saturating_add(1);
    }
}

/// Opens a process by its id.
///
/// # Errors
/// As pidfd_open(2).
pub fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    adopt(RawFd::try_from(fd).map_err(io::Error::other)?)
}

/// Marks descriptor `fd`, known by its number only, as not for the next image.
///
/// # Errors
/// `EBADF` if it is not open.
pub fn close_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_SETFD takes a number.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT, SIGTERM and SIGHUP only leave a note for [`was_interrupted`], and SIGPIPE nothing.
///
/// # Errors
/// As sigaction(2).
pub fn notice_interrupts() -> io::Result<()> {
    extern "C" fn note(_signal: c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    let of = |handler| SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &of(SigHandler::Handler(note))) }?;
    }
    // SAFETY: ignoring installs no handler.
    unsafe { sigaction(Signal::SIGPIPE, &of(SigHandler::SigIgn)) }?;
    Ok(())
}

/// Whether one of the signals of [`notice_interrupts`] has come.
pub fn was_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
