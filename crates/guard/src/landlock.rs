//! Landlock (landlock(7)): a second lock on TCP where there is no backstop.
//!
//! The guard then makes connections by proxy, so a wrapped program needs none of its own: the kernel refuses
//! every connect(2) of a TCP socket that a wrapped thread makes itself, whatever was exchanged behind the
//! guard's back while a call was held. It also keeps the tree's hands off processes outside it.
#![expect(unsafe_code, reason = "Landlock's system calls have no wrapper in libc")]

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// First version of the interface with rules for the network (Linux 6.7).
pub const NETWORK: i64 = 4;

/// `LANDLOCK_CREATE_RULESET_VERSION` (linux/landlock.h).
pub const ASK_VERSION: u64 = 1;

/// `LANDLOCK_ACCESS_NET_CONNECT_TCP`.
const CONNECT_TCP: u64 = 1 << 1;

/// `struct landlock_ruleset_attr`, as of version 4.
#[repr(C)]
struct Ruleset {
    files: u64,
    network: u64,
}

/// Version of the kernel's interface; 0 if it has none.
#[must_use]
pub fn version() -> i64 {
    // SAFETY: with this flag the call takes no attributes.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0usize, 0usize, ASK_VERSION) }.max(0)
}

/// Forbids this thread and all that it will start to connect a TCP socket. `false`: the kernel cannot.
///
/// The thread has no_new_privs, or `CAP_SYS_ADMIN`.
///
/// # Errors
/// As landlock_restrict_self(2).
pub fn forbid_connect() -> io::Result<bool> {
    if version() < NETWORK {
        return Ok(false);
    }
    let none = Ruleset { files: 0, network: CONNECT_TCP };
    // SAFETY: reads `size_of::<Ruleset>()` bytes of a live value.
    let made = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const none, size_of::<Ruleset>(), 0usize)
    };
    let made = RawFd::try_from(made).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    let ruleset = unsafe { OwnedFd::from_raw_fd(made) };
    // SAFETY: takes numbers only.
    match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0usize) } {
        0 => Ok(true),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    #[test]
    fn a_thread_that_is_forbidden_connects_no_more() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let inside = std::thread::spawn(move || {
            // SAFETY: takes numbers only; this thread ends with the test.
            unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
            let held = forbid_connect().unwrap();
            let udp = UdpSocket::bind("127.0.0.1:0").and_then(|s| s.connect(at));
            (held, TcpStream::connect(at).is_err(), udp.is_ok())
        });
        let (held, refused, udp) = inside.join().unwrap();
        assert_eq!(held, version() >= NETWORK);
        assert_eq!((refused, udp), (held, true));
        assert!(TcpStream::connect(at).is_ok(), "this thread is not");
    }
}
