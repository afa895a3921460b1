//! System calls that need `unsafe`, each behind a function that does not.
#![expect(unsafe_code, reason = "this is where the command's own unsafe code is kept")]

use std::{
    ffi::{c_int, c_uint, c_ulong},
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    errno::Errno,
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

/// Takes the numbers of standard descriptors that are closed until the next exec, so that nothing of ours gets
/// them and the next image finds them closed as they were.
///
/// # Errors
/// As open(2).
pub fn hold_standard_descriptors() -> io::Result<()> {
    for fd in 0..3 {
        // SAFETY: F_GETFD takes no pointer.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            // The lowest free number is this one; std opens close-on-exec.
            std::mem::forget(std::fs::File::open("/dev/null")?);
        }
    }
    Ok(())
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

/// Lets the kernel send us SIGTERM when the last writer of a pipe is gone, that is, when whoever started us
/// and holds its other end has died. Unlike `PR_SET_PDEATHSIG`, this survives a change of credentials.
///
/// # Errors
/// As fcntl(2); `EPIPE` if it is gone already.
pub fn end_with_writer(pipe: &OwnedFd) -> io::Result<()> {
    let fd = pipe.as_raw_fd();
    let checked = |result: c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: these commands of fcntl(2) take numbers.
    unsafe {
        checked(libc::fcntl(fd, F_SETSIG, libc::SIGTERM))?;
        checked(libc::fcntl(fd, libc::F_SETOWN, libc::getpid()))?;
        checked(libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK))?;
    }
    // It may have gone before the kernel was told to watch; a pipe without writer is at its end.
    match nix::unistd::read(pipe, &mut [0; 1]) {
        Err(Errno::EAGAIN) => Ok(()),
        Err(errno) => Err(errno.into()),
        Ok(_) => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

/// From linux/fcntl.h (fcntl(2), "Managing signals").
const F_SETSIG: c_int = 10;

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

/// Copies descriptor `number` out of another process.
///
/// # Errors
/// As pidfd_getfd(2).
pub fn pidfd_getfd(process: &OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    adopt(RawFd::try_from(fd).map_err(io::Error::other)?)
}

/// Whether a number is a TCP socket that listens or has begun to connect (tcp(7), `TCP_INFO`): getpeername(2) names no far
/// side before that has answered.
pub fn has_begun(fd: RawFd) -> bool {
    // net/tcp_states.h
    const CLOSE: u8 = 7;
    let mut state = 0_u8;
    let mut length: libc::socklen_t = 1;
    // SAFETY: the kernel writes at most `length` bytes, of which the state is the first; the number need not be open.
    let done = unsafe {
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut state).cast(), &raw mut length)
    };
    done == 0 && state != CLOSE
}

/// Leaves a traced process in its group stop, from which SIGCONT takes it (ptrace(2), `PTRACE_LISTEN`).
///
/// # Errors
/// As ptrace(2).
pub fn stay_stopped(pid: Pid) -> nix::Result<()> {
    let nothing = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: this request reads neither address nor data.
    Errno::result(unsafe { libc::ptrace(libc::PTRACE_LISTEN, pid.as_raw(), nothing, nothing) }).map(drop)
}

/// Brings the loopback interface of this network namespace up.
///
/// # Errors
/// As ioctl(2) (netdevice(7)).
pub fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(0);
    // SAFETY: the request reads one ifreq.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives up whatever nice(2) value was inherited, if that is more than none and the kernel lets us.
pub fn be_as_nice_as_others() {
    // SAFETY: no pointers. An error of getpriority(2) reads as -1, which is left alone.
    unsafe {
        if libc::getpriority(libc::PRIO_PROCESS, 0) > 0 {
            let _as_it_was = libc::setpriority(libc::PRIO_PROCESS, 0, 0);
        }
    }
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
