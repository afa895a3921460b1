//! Socket options that nix does not have.
#![expect(unsafe_code, reason = "getsockopt(2), setsockopt(2) and connect(2) take pointers")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::sys::socket::ControlMessageOwned;

use crate::filter::FilterError;

/// Reads an option whose value is a `T`, of which any bits are a value.
fn get<T: Default>(socket: BorrowedFd<'_>, name: libc::c_int) -> io::Result<T> {
    let mut value = T::default();
    let mut length = libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0);
    // SAFETY: getsockopt(2) writes at most `length` bytes to `value`, which has that many; T is only
    // ever an integer (private function, calls below), so all bytes are good.
    let done = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut length)
    };
    if done == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

fn set(socket: BorrowedFd<'_>, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).unwrap_or(0);
    // SAFETY: setsockopt(2) reads `length` bytes from `value`, which has that many.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, (&raw const value).cast(), length)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// IANA protocol number of a socket.
pub fn protocol(socket: BorrowedFd<'_>) -> io::Result<i32> {
    get(socket, libc::SO_PROTOCOL)
}

/// The kernel's number for this socket, never used again while it runs.
pub fn cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    get(socket, libc::SO_COOKIE)
}

/// The kernel's number for the network namespace of this socket (5.14).
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71; // asm-generic/socket.h
    get(socket, SO_NETNS_COOKIE)
}

/// Interface that the socket is bound to; 0 if none.
pub fn bound_interface(socket: BorrowedFd<'_>) -> io::Result<u32> {
    const SO_BINDTOIFINDEX: libc::c_int = 62; // asm-generic/socket.h
    get::<i32>(socket, SO_BINDTOIFINDEX).map(i32::cast_unsigned)
}

/// Attaches a loaded filter, replacing one that is not locked, and locks it.
pub fn attach_and_lock(socket: BorrowedFd<'_>, filter: BorrowedFd<'_>) -> Result<(), FilterError> {
    if get::<i32>(socket, libc::SO_LOCK_FILTER)? != 0 {
        return Err(FilterError::Locked);
    }
    set(socket, libc::SO_ATTACH_BPF, filter.as_raw_fd()).map_err(|e| match e.raw_os_error() {
        Some(libc::EPERM) => FilterError::Locked,
        _ => FilterError::Kernel(e),
    })?;
    set(socket, libc::SO_LOCK_FILTER, 1)?;
    // The program owns the socket and may detach at any moment before the lock. An eBPF filter cannot
    // be read back, which the kernel says by EACCES (net/core/filter.c, sk_get_filter).
    match get::<u32>(socket, libc::SO_GET_FILTER) {
        Err(e) if e.raw_os_error() == Some(libc::EACCES) => Ok(()),
        _ => Err(FilterError::Removed),
    }
}

/// Dissolves a TCP association: RST to the far side, `ECONNRESET` to the program, and the socket has
/// no peer any more (tcp(7) calls connect(2) with AF_UNSPEC; net/ipv4/tcp.c, tcp_disconnect).
pub fn disconnect(socket: BorrowedFd<'_>) -> io::Result<()> {
    let nowhere = libc::sockaddr { sa_family: 0, sa_data: [0; 14] };
    let length = libc::socklen_t::try_from(size_of_val(&nowhere)).unwrap_or(0);
    // SAFETY: connect(2) reads `length` bytes from `nowhere`, which has that many.
    let done = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, length) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes the descriptors out of a control message.
pub fn received(message: ControlMessageOwned) -> Vec<OwnedFd> {
    let ControlMessageOwned::ScmRights(numbers) = message else {
        return Vec::new();
    };
    // SAFETY: the kernel has installed these descriptors for this very message, which is consumed
    // here, so they are open and nobody else's.
    numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect()
}
