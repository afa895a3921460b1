//! System calls that are made for a wrapped program, on a copy of its descriptor.
//!
//! A copy shares its open file with the program's, blocking mode included. Nothing here blocks: where the
//! program's socket would, that mode is off for the length of one call. All judged calls of a program come
//! here one after the other, so none of them meets the other's mode.

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{getsockopt, sockopt},
};

/// Longest `struct sockaddr` (socket(7)).
const LONGEST: usize = 128;

/// Whether calls on the socket wait.
#[must_use]
pub fn blocks(socket: BorrowedFd<'_>) -> bool {
    mode(socket).is_ok_and(|mode| !mode.contains(OFlag::O_NONBLOCK))
}

fn mode(socket: BorrowedFd<'_>) -> io::Result<OFlag> {
    Ok(OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?))
}

/// How long the program lets a call on this socket wait (`SO_SNDTIMEO`, `SO_RCVTIMEO`). `None`: for ever.
#[must_use]
pub fn patience(socket: BorrowedFd<'_>, sending: bool) -> Option<Duration> {
    let time = if sending {
        getsockopt(&socket, sockopt::SendTimeout)
    } else {
        getsockopt(&socket, sockopt::ReceiveTimeout)
    };
    let time = time.ok()?;
    let (seconds, micros) = (u64::try_from(time.tv_sec()).ok()?, u64::try_from(time.tv_usec()).ok()?);
    Some(Duration::from_micros(seconds.saturating_mul(1_000_000).saturating_add(micros)))
        .filter(|t| !t.is_zero())
}

/// Whether an attempt to connect goes on.
#[must_use]
pub fn is_under_way(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINPROGRESS | libc::EALREADY))
}

/// connect(2) without waiting, and whether a program's own would wait on this socket. If so, and it is not over at
/// once: `EALREADY`.
///
/// # Errors
/// As connect(2).
pub fn connect(socket: BorrowedFd<'_>, address: &[u8]) -> (io::Result<()>, bool) {
    let mode = match mode(socket) {
        Ok(mode) => mode,
        Err(error) => return (Err(error), false),
    };
    if mode.contains(OFlag::O_NONBLOCK) {
        return (try_connect(socket, address), false);
    }
    let done = in_other_mode(socket, mode, || match try_connect(socket, address) {
        // What is near has answered by now.
        Err(error) if is_under_way(&error) => try_connect(socket, address),
        done => done,
    });
    (done, true)
}

fn try_connect(socket: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(address.len()).unwrap_or(0);
    // SAFETY: `address` is readable for its length.
    #[expect(unsafe_code, reason = "nix takes no raw address")]
    check(unsafe { libc::connect(socket.as_raw_fd(), address.as_ptr().cast(), length) } as isize).map(drop)
}

/// listen(2).
///
/// # Errors
/// As listen(2).
pub fn listen(socket: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    // SAFETY: numbers.
    #[expect(unsafe_code, reason = "nix takes no raw backlog")]
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog) } as isize).map(drop)
}

/// accept4(2) without waiting, and the peer's address as the kernel writes it.
///
/// # Errors
/// As accept4(2).
pub fn accept(socket: BorrowedFd<'_>, flags: i32) -> io::Result<(OwnedFd, Vec<u8>)> {
    let mut name = vec![0u8; LONGEST];
    let mut length = libc::socklen_t::try_from(LONGEST).unwrap_or(0);
    let number = without_waiting(socket, || {
        let flags = flags | libc::SOCK_CLOEXEC;
        // SAFETY: `name` is writable for `length` bytes.
        #[expect(unsafe_code, reason = "nix gives no raw address")]
        check(unsafe { libc::accept4(socket.as_raw_fd(), name.as_mut_ptr().cast(), &raw mut length, flags) }
            as isize)
    })?;
    // SAFETY: accept4(2) has just returned it; nobody else has it.
    #[expect(unsafe_code, reason = "takes ownership of a number")]
    let taken = unsafe { OwnedFd::from_raw_fd(i32::try_from(number).map_err(io::Error::other)?) };
    name.truncate(usize::try_from(length).unwrap_or(0));
    Ok((taken, name))
}

/// One message.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Message {
    /// Whom to; empty if it is connected.
    pub name: Vec<u8>,
    /// What.
    pub data: Vec<u8>,
    /// Control messages.
    pub control: Vec<u8>,
}

/// sendmsg(2) without waiting.
///
/// # Errors
/// As sendmsg(2); `EAGAIN` where it would wait.
pub fn send(socket: BorrowedFd<'_>, message: &Message, flags: i32) -> io::Result<usize> {
    let null = std::ptr::null_mut;
    let mut part =
        libc::iovec { iov_base: message.data.as_ptr().cast_mut().cast(), iov_len: message.data.len() };
    // SAFETY: an all-zero msghdr is valid.
    #[expect(unsafe_code, reason = "a C structure")]
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_name = if message.name.is_empty() { null() } else { message.name.as_ptr().cast_mut().cast() };
    header.msg_namelen = libc::socklen_t::try_from(message.name.len()).unwrap_or(0);
    (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
    header.msg_control =
        if message.control.is_empty() { null() } else { message.control.as_ptr().cast_mut().cast() };
    header.msg_controllen = message.control.len();
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: name, data and control live during the call, which only reads them.
    #[expect(unsafe_code, reason = "nix takes no raw addresses")]
    check(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) })
        .and_then(|n| usize::try_from(n).map_err(io::Error::other))
}

/// State of a TCP socket (`tcpi_state`, tcp(7)); 0 for another.
#[must_use]
pub fn tcp_state(socket: BorrowedFd<'_>) -> u8 {
    let (mut state, mut length) = (0u8, 1 as libc::socklen_t);
    // SAFETY: `state` is writable for its one byte; the kernel gives as much of `struct tcp_info` as fits.
    #[expect(unsafe_code, reason = "nix reads the whole structure")]
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut state).cast(),
            &raw mut length,
        )
    };
    if done == 0 { state } else { 0 }
}

fn check(result: isize) -> io::Result<isize> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn without_waiting<T>(socket: BorrowedFd<'_>, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let mode = mode(socket)?;
    if mode.contains(OFlag::O_NONBLOCK) {
        return call();
    }
    in_other_mode(socket, mode, call)
}

fn in_other_mode<T>(
    socket: BorrowedFd<'_>,
    mode: OFlag,
    call: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    fcntl(socket, FcntlArg::F_SETFL(mode | OFlag::O_NONBLOCK))?;
    let done = call();
    let _kept = fcntl(socket, FcntlArg::F_SETFL(mode));
    done
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream, UdpSocket},
        os::fd::AsFd,
    };

    use super::*;

    fn bytes_of(port: u16) -> Vec<u8> {
        let [high, low] = port.to_be_bytes();
        vec![2, 0, high, low, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    #[test]
    fn a_blocking_socket_does_not_block_and_stays_blocking() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(accept(listener.as_fd(), 0).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let client = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Inet,
            nix::sys::socket::SockType::Stream,
            nix::sys::socket::SockFlag::empty(),
            None,
        )
        .unwrap();
        let (done, waits) = connect(client.as_fd(), &bytes_of(port));
        assert!(done.is_ok() && waits, "what is on this host answers at once");
        assert_eq!(tcp_state(client.as_fd()), 1); // TCP_ESTABLISHED
        let (server, name) = accept(listener.as_fd(), 0).unwrap();
        assert_eq!(name.len(), 16);
        assert!([client.as_fd(), listener.as_fd(), server.as_fd()].into_iter().all(blocks));
        let client = TcpStream::from(client);
        client.set_write_timeout(Some(Duration::from_millis(1500))).unwrap();
        assert_eq!(patience(client.as_fd(), true), Some(Duration::from_millis(1500)));
        assert_eq!(patience(client.as_fd(), false), None);
    }

    #[test]
    fn a_message_arrives_whole() {
        let (from, to) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let name = bytes_of(to.local_addr().unwrap().port());
        let message = Message { name, data: b"hello".to_vec(), control: Vec::new() };
        assert_eq!(send(from.as_fd(), &message, 0).unwrap(), 5);
        let mut got = [0; 16];
        assert_eq!(to.recv(&mut got).unwrap(), 5);
        let nowhere = Message { name: Vec::new(), ..message };
        assert_eq!(send(from.as_fd(), &nowhere, 0).unwrap_err().raw_os_error(), Some(libc::EDESTADDRREQ));
    }
}
