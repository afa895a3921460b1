//! What is read from and done to the kernel. One danger, one file.

pub mod diag;
pub mod image;
pub mod local;
pub mod memory;
pub mod message;
pub mod privileges;
pub mod proc;
pub mod proxy;
pub mod socket;
pub mod watchdog;

use std::{
    fs::{File, TryLockError},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

/// Locks a file, and waits so long for whoever has it.
///
/// # Errors
/// `EWOULDBLOCK` if he still has it, and as flock(2).
pub fn lock_within(file: &File, patience: Duration) -> io::Result<()> {
    let end = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
            }
            locked => return locked.map_err(Into::into),
        }
    }
}

/// Opens a process by its id (pidfd_open(2)).
///
/// # Errors
/// `ESRCH` if there is none.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes a pid and flags, touches no memory of ours, and returns a new
    // descriptor that nobody else owns, or -1.
    #[expect(unsafe_code, reason = "no wrapper in nix")]
    unsafe {
        owned(libc::syscall(libc::SYS_pidfd_open, pid, 0))
    }
}

/// Opens a thread by its id (`PIDFD_THREAD`, Linux 6.9).
///
/// # Errors
/// `EINVAL` before that.
pub fn pidfd_open_thread(tid: i32) -> io::Result<OwnedFd> {
    // SAFETY: as in `pidfd_open`.
    #[expect(unsafe_code, reason = "no wrapper in nix")]
    unsafe {
        owned(libc::syscall(libc::SYS_pidfd_open, tid, libc::O_EXCL))
    }
}

/// Copies descriptor `number` out of another process (pidfd_getfd(2)).
///
/// # Errors
/// `EPERM` without the right to trace the process, `EBADF` if it has no such descriptor.
pub fn pidfd_getfd(process: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd(2) takes numbers only and returns a new descriptor that nobody else owns.
    #[expect(unsafe_code, reason = "no wrapper in nix")]
    unsafe {
        owned(libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0))
    }
}

/// # Safety
/// `returned` is the result of a system call that makes a descriptor.
#[expect(unsafe_code, reason = "takes ownership of a number")]
unsafe fn owned(returned: i64) -> io::Result<OwnedFd> {
    match i32::try_from(returned) {
        // SAFETY: by this function's contract the number is a fresh descriptor.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the process behind a pidfd has ended (a pidfd becomes readable then, pidfd_open(2)).
#[must_use]
pub fn has_ended(process: BorrowedFd<'_>) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut one = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    !matches!(poll(&mut one, PollTimeout::ZERO), Ok(0))
}

/// Nanoseconds of a clock; 0 if it cannot be read.
fn clock(id: nix::time::ClockId) -> u64 {
    let Ok(now) = nix::time::clock_gettime(id) else { return 0 };
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec()).unwrap_or(0))
}

/// `CLOCK_MONOTONIC`, in nanoseconds.
#[must_use]
pub fn monotonic() -> u64 {
    clock(nix::time::ClockId::CLOCK_MONOTONIC)
}

/// `CLOCK_BOOTTIME`, in nanoseconds: what process start times count.
#[must_use]
pub fn boottime() -> u64 {
    clock(nix::time::ClockId::CLOCK_BOOTTIME)
}

/// `CLOCK_REALTIME`, in nanoseconds since the epoch.
#[must_use]
pub fn realtime() -> u64 {
    clock(nix::time::ClockId::CLOCK_REALTIME)
}
