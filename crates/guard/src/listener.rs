//! The listener's system calls: install the filter, receive notifications, answer them.
//!
//! The one place that speaks seccomp(2) and seccomp_unotify(2).
#![expect(unsafe_code, reason = "seccomp(2) and its ioctls have no safe wrapper")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use crate::filter;
use libc::{c_int, seccomp_notif, seccomp_notif_addfd, seccomp_notif_resp, sock_filter, sock_fprog};

/// Whether a program may still gain privileges by exec (setuid, file capabilities).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Privileges {
    /// It may; installing then needs `CAP_SYS_ADMIN`.
    Kept,
    /// `PR_SET_NO_NEW_PRIVS` is set: what an unprivileged caller must accept.
    NoNew,
}

/// Sets `PR_SET_NO_NEW_PRIVS`.
///
/// # Errors
/// As prctl(2).
pub fn give_up_privileges() -> io::Result<()> {
    // SAFETY: prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) reads no memory.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into()).map(drop)
}

/// Puts the filter under the calling thread and all that it will start; the kernel asks at the
/// descriptor that is returned (close-on-exec).
///
/// # Errors
/// `EBUSY`: a listener is under this task already (a nested run joins the outer guard). `EACCES`:
/// [`Privileges::Kept`] without `CAP_SYS_ADMIN`. `EINVAL`, `ENOSYS`: no user notification here.
pub fn install(filter: &[sock_filter], privileges: Privileges) -> io::Result<OwnedFd> {
    let fd = set(filter, privileges, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
    let fd = RawFd::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts a mark under the calling thread and all that it will start: a filter that permits all and would log what it
/// did not. Nobody can take it off, and the backstop can tell who is under it, by what it begins with
/// (`backstop.bpf.c`): it moves its two registers to and fro, which no filter of a program's does.
///
/// # Errors
/// `EACCES`: [`Privileges::Kept`] without `CAP_SYS_ADMIN`.
pub fn mark(privileges: Privileges) -> io::Result<()> {
    const TAX: u16 = 0x07; // BPF_MISC | BPF_TAX
    const TXA: u16 = 0x87; // BPF_MISC | BPF_TXA
    const RET: u16 = 0x06; // BPF_RET | BPF_K
    let line =
        |code| sock_filter { code, jt: 0, jf: 0, k: if code == RET { libc::SECCOMP_RET_ALLOW } else { 0 } };
    let all = [TAX, TXA, TXA, TAX, TXA, TAX, TAX, TXA, RET].map(line);
    set(&all, privileges, libc::SECCOMP_FILTER_FLAG_LOG).map(drop)
}

fn set(filter: &[sock_filter], privileges: Privileges, flags: libc::c_ulong) -> io::Result<i64> {
    let len = u16::try_from(filter.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    if privileges == Privileges::NoNew {
        give_up_privileges()?;
    }
    // SAFETY: `program` and the instructions it points to outlive the call, which only reads them.
    check(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    })
}

/// One call that a task is held in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Notification {
    /// Names this stop of this task to [`answer`] and [`is_waiting`].
    pub id: u64,
    /// Thread id of the task in our pid namespace; 0 if it is not visible there.
    pub pid: u32,
    /// System call number, x86_64 ([`filter::number`]).
    pub nr: i32,
    /// Where the call was made.
    pub instruction_pointer: u64,
    /// Its arguments by value.
    pub args: [u64; 6],
}

/// Takes the next notification; the descriptor must be readable, or this waits.
///
/// # Errors
/// `ENOENT`: the task was killed or interrupted meanwhile; there may be others. `EINTR`.
pub fn receive(listener: BorrowedFd<'_>) -> io::Result<Notification> {
    // SAFETY: an all-zero seccomp_notif is valid, and what the kernel insists on being given.
    let mut got: seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the request writes one seccomp_notif, which `got` is.
    let done = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut got) };
    check(done.into())?;
    Ok(Notification {
        id: got.id,
        pid: got.pid,
        nr: filter::number(got.data.arch, got.data.nr),
        instruction_pointer: got.data.instruction_pointer,
        args: got.data.args,
    })
}

/// What the held call does next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// Runs in the kernel as asked. The kernel reads its arguments *again*: safe only where nothing
    /// depends on memory or on what a descriptor number means, or where something else checks.
    Continue,
    /// Returns this value.
    Return(i64),
    /// Fails with this positive errno.
    Fail(i32),
}

/// Lets the held call go on.
///
/// # Errors
/// `ENOENT`: the task no longer waits (killed, or interrupted by a signal).
pub fn answer(listener: BorrowedFd<'_>, id: u64, answer: Answer) -> io::Result<()> {
    let mut reply = seccomp_notif_resp { id, val: 0, error: 0, flags: 0 };
    match answer {
        Answer::Continue => reply.flags = FLAG_CONTINUE,
        Answer::Return(value) => reply.val = value,
        Answer::Fail(errno) => reply.error = -errno,
    }
    // SAFETY: the request reads one seccomp_notif_resp, which `reply` is.
    let done = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut reply) };
    check(done.into()).map(drop)
}

/// Whether the task still waits in this very call; what was read from its memory or `/proc` before
/// a `true` was read from that task.
#[must_use]
pub fn is_waiting(listener: BorrowedFd<'_>, id: u64) -> bool {
    let mut id = id;
    // SAFETY: the request reads one u64.
    unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_ID_VALID, &raw mut id) == 0 }
}

/// Puts a descriptor into the held task and returns its number there as the call's result, in one
/// step (5.14), so that no signal can lose it.
///
/// # Errors
/// `ENOENT`: the task no longer waits. `EMFILE`: its descriptors are used up. `EINVAL`: kernel
/// before 5.14.
pub fn answer_with_descriptor(
    listener: BorrowedFd<'_>,
    id: u64,
    descriptor: BorrowedFd<'_>,
    close_on_exec: bool,
) -> io::Result<RawFd> {
    let mut request = seccomp_notif_addfd {
        id,
        flags: ADDFD_FLAG_SEND,
        srcfd: descriptor.as_raw_fd().cast_unsigned(),
        newfd: 0,
        newfd_flags: if close_on_exec { libc::O_CLOEXEC.cast_unsigned() } else { 0 },
    };
    // SAFETY: the request reads one seccomp_notif_addfd, which `request` is.
    let fd = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, &raw mut request) };
    let fd = check(fd.into())?;
    RawFd::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))
}

/// Asks the kernel to wake listener and task on the same core (6.6): a notification then costs a
/// third. Not an error where the kernel has no such thing.
#[must_use]
pub fn wake_synchronously(listener: BorrowedFd<'_>) -> bool {
    // SAFETY: this request takes its flags by value.
    unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_SET_FLAGS, USER_NOTIF_FD_SYNC_WAKE_UP) == 0 }
}

// linux/seccomp.h; libc has no names for these yet.
const FLAG_CONTINUE: u32 = 1; // SECCOMP_USER_NOTIF_FLAG_CONTINUE
const ADDFD_FLAG_SEND: u32 = 2; // SECCOMP_ADDFD_FLAG_SEND
const NOTIF_ID_VALID: libc::c_ulong = 0x4008_2102; // SECCOMP_IOW(2, __u64)
const NOTIF_SET_FLAGS: libc::c_ulong = 0x4008_2104; // SECCOMP_IOW(4, __u64)
const USER_NOTIF_FD_SYNC_WAKE_UP: libc::c_ulong = 1; // SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

const _: () = assert!(size_of::<c_int>() == 4);

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::filter::{Trust, assemble};

    /// Runs `inside` in a child under the filter, `outside` with its listener, and returns the
    /// child's exit status.
    fn guarded(inside: impl FnOnce() -> c_int, outside: impl FnOnce(BorrowedFd<'_>)) -> c_int {
        // The child's listener reaches us through pidfd_getfd, as nothing may be sent from inside.
        let filter = assemble(Trust::Nobody);
        let (mut ends, mut go) = ([0; 2], [0; 2]);
        // SAFETY: both have room for two descriptors.
        assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) + libc::pipe(go.as_mut_ptr()) }, 0);
        // SAFETY: the child calls only async-signal-safe functions before _exit, apart from
        // `install`, which does not allocate.
        match unsafe { libc::fork() } {
            0 => {
                let number = match install(&filter, Privileges::NoNew) {
                    Ok(fd) => std::os::fd::IntoRawFd::into_raw_fd(fd),
                    Err(_) => -1,
                };
                // SAFETY: writes four bytes of a live variable, reads one into another; then the child ends.
                unsafe {
                    libc::write(ends[1], (&raw const number).cast(), 4);
                    let mut one = 0u8;
                    libc::read(go[0], (&raw mut one).cast(), 1);
                    libc::_exit(if number < 0 { 99 } else { inside() })
                }
            }
            child => {
                let mut number: c_int = -1;
                // SAFETY: reads four bytes into a live variable.
                assert_eq!(unsafe { libc::read(ends[0], (&raw mut number).cast(), 4) }, 4);
                // SAFETY: both calls take numbers only; the results are checked.
                let listener = unsafe {
                    let pidfd = libc::syscall(libc::SYS_pidfd_open, child, 0);
                    let fd = libc::syscall(libc::SYS_pidfd_getfd, pidfd, number, 0);
                    assert!(fd >= 0, "{}", io::Error::last_os_error());
                    OwnedFd::from_raw_fd(RawFd::try_from(fd).unwrap())
                };
                // SAFETY: writes one byte of a literal.
                assert_eq!(unsafe { libc::write(go[1], b"x".as_ptr().cast(), 1) }, 1);
                outside(listener.as_fd());
                let mut status = 0;
                // SAFETY: `status` is a live variable, `child` our child.
                unsafe { libc::waitpid(child, &raw mut status, 0) };
                libc::WEXITSTATUS(status)
            }
        }
    }

    fn raw_socket() -> c_int {
        // SAFETY: takes numbers only.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP) };
        if fd >= 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap_or(98) }
    }

    #[test]
    fn a_call_is_held_until_answered_and_the_errno_arrives() {
        let status = guarded(raw_socket, |listener| {
            let got = receive(listener).unwrap();
            assert_eq!(i64::from(got.nr), libc::SYS_socket);
            assert!(is_waiting(listener, got.id));
            answer(listener, got.id, Answer::Fail(libc::ENETDOWN)).unwrap();
            assert!(!is_waiting(listener, got.id));
        });
        assert_eq!(status, libc::ENETDOWN);
    }

    #[test]
    fn a_descriptor_is_handed_over_as_the_result() {
        let status = guarded(raw_socket, |listener| {
            let got = receive(listener).unwrap();
            let ours = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            assert!(answer_with_descriptor(listener, got.id, ours.as_fd(), true).unwrap() > 2);
        });
        assert_eq!(status, 0);
    }

    #[test]
    fn the_listener_hangs_up_when_the_last_task_has_ended() {
        guarded(
            || 0,
            |listener| {
                let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one live pollfd.
                assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 5000) }, 1);
                assert_ne!(poll.revents & libc::POLLHUP, 0);
            },
        );
    }
}
