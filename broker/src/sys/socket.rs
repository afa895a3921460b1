//! What a socket that a program attached to its question really is, and what is put under it.

use std::{
    io, mem,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::sys::{
    socket::{AddressFamily, SockaddrLike, SockaddrStorage, getpeername, getsockname},
    stat::fstat,
};
use portcullis_types::Protocol;

use super::diag::state;

/// `SO_COOKIE` and `SO_NETNS_COOKIE` (asm-generic/socket.h; the second from Linux 5.14).
const SO_COOKIE: i32 = 57;
const SO_NETNS_COOKIE: i32 = 71;
/// `IPPROTO_MPTCP` (linux/in.h).
const MPTCP: i32 = 262;

/// A socket, as the kernel tells.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Facts {
    /// `AF_INET` and so on.
    pub domain: i32,
    /// `SOCK_STREAM` and so on.
    pub kind: i32,
    /// Its protocol; Multipath TCP counts as TCP, raw and packet sockets are [`Protocol::RAW`].
    pub protocol: Protocol,
    /// Multipath TCP: its subflows are sockets of their own in the kernel.
    pub multipath: bool,
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Inode in sockfs.
    pub inode: u64,
    /// Cookie of its network namespace; 0 where the kernel cannot tell.
    pub namespace: u64,
    /// What it is bound to; v4-mapped as IPv4.
    pub local: Option<SocketAddr>,
    /// What it is connected to; v4-mapped as IPv4.
    pub remote: Option<SocketAddr>,
    /// It listens.
    pub listening: bool,
}

/// What tells one TCP socket from all others.
#[derive(Clone, Copy, Debug)]
pub struct StreamCookies {
    /// `SO_COOKIE`.
    pub socket: u64,
    /// Its network namespace's; 0 where the kernel cannot tell.
    pub namespace: u64,
}

impl StreamCookies {
    /// Asks the kernel.
    ///
    /// # Errors
    /// `ENOTSOCK`; `EPROTOTYPE` for another kind of socket.
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        if option::<i32>(socket, libc::SO_PROTOCOL)? != libc::IPPROTO_TCP {
            return Err(io::Error::from_raw_os_error(libc::EPROTOTYPE));
        }
        let namespace = option(socket, SO_NETNS_COOKIE).unwrap_or(0);
        Ok(Self { socket: option(socket, SO_COOKIE)?, namespace })
    }
}

impl Facts {
    /// Asks the kernel.
    ///
    /// # Errors
    /// `ENOTSOCK`, for one.
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let domain: i32 = option(socket, libc::SO_DOMAIN)?;
        let kind: i32 = option(socket, libc::SO_TYPE)?;
        let number: i32 = option(socket, libc::SO_PROTOCOL)?;
        let protocol = match (domain, kind, number) {
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_RAW, _) => Protocol::RAW,
            (libc::AF_INET | libc::AF_INET6, _, MPTCP) => Protocol::TCP,
            (libc::AF_INET | libc::AF_INET6, _, n) => u8::try_from(n).map_or(Protocol::RAW, Protocol),
            _ => Protocol::RAW,
        };
        let multipath = number == MPTCP;
        let number = socket.as_raw_fd();
        Ok(Self {
            domain,
            kind,
            protocol,
            multipath,
            cookie: option(socket, SO_COOKIE)?,
            inode: fstat(socket)?.st_ino,
            namespace: option(socket, SO_NETNS_COOKIE).unwrap_or(0),
            local: getsockname::<SockaddrStorage>(number).ok().and_then(|a| inet(&a)),
            remote: getpeername::<SockaddrStorage>(number).ok().and_then(|a| inet(&a)),
            listening: option::<i32>(socket, libc::SO_ACCEPTCONN)? != 0,
        })
    }

    /// As [`Self::of`], as far as a new TCP connection needs it.
    ///
    /// # Errors
    /// `EPROTOTYPE` for a socket of another family.
    pub fn of_stream(socket: BorrowedFd<'_>, cookies: &StreamCookies) -> io::Result<Self> {
        let name = getsockname::<SockaddrStorage>(socket.as_raw_fd())?;
        let domain = match name.family() {
            Some(AddressFamily::Inet) => libc::AF_INET,
            Some(AddressFamily::Inet6) => libc::AF_INET6,
            _ => return Err(io::Error::from_raw_os_error(libc::EPROTOTYPE)),
        };
        Ok(Self {
            domain,
            kind: libc::SOCK_STREAM,
            protocol: Protocol::TCP,
            multipath: false,
            cookie: cookies.socket,
            inode: 0,
            namespace: cookies.namespace,
            local: inet(&name),
            remote: None,
            listening: false,
        })
    }

    /// Whether it carries datagrams.
    #[must_use]
    pub fn is_datagram(&self) -> bool {
        self.kind == libc::SOCK_DGRAM
    }
}

/// Whether a socket waits for the far side to answer (TCP), which getpeername(2) does not name meanwhile.
#[must_use]
pub fn is_opening(socket: BorrowedFd<'_>) -> bool {
    let info = option_of::<i32>(socket, libc::IPPROTO_TCP, libc::TCP_INFO).ok();
    info.is_some_and(|info| info.to_ne_bytes().first() == Some(&state::SYN_SENT))
}

fn inet(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(a) = address.as_sockaddr_in() {
        return Some(SocketAddr::new(IpAddr::V4(a.ip()), a.port()));
    }
    let a = address.as_sockaddr_in6()?;
    match a.ip().to_canonical() {
        IpAddr::V4(ip) => Some(SocketAddr::new(ip.into(), a.port())),
        IpAddr::V6(_) => Some(SocketAddr::V6((*a).into())),
    }
}

/// Integers that getsockopt(2) fills in.
trait Number: Copy + Default {}
impl Number for i32 {}
impl Number for u64 {}

fn option<T: Number>(socket: BorrowedFd<'_>, name: i32) -> io::Result<T> {
    option_of(socket, libc::SOL_SOCKET, name)
}

/// What is longer than the number is cut off.
fn option_of<T: Number>(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<T> {
    let mut value = T::default();
    let mut length = libc::socklen_t::try_from(mem::size_of::<T>()).unwrap_or(0);
    // SAFETY: `value` is writable for `length` bytes, and any bits are a valid integer.
    #[expect(unsafe_code, reason = "nix has not all of these options")]
    let done = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length)
    };
    if done == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Puts a classic BPF filter under a socket; an earlier one goes (socket(7), `SO_ATTACH_FILTER`).
///
/// # Errors
/// `EPERM` if the socket's filter is locked, `EINVAL` for a program over 4096 instructions.
pub fn attach_filter(socket: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies `len` instructions from `filter`, which lives during the call, and
    // checks them before use; it does not write to them.
    #[expect(unsafe_code, reason = "no wrapper in nix")]
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            libc::socklen_t::try_from(mem::size_of_val(&program)).unwrap_or(0),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes the filter from under a socket, if it has one.
pub fn detach_filter(socket: BorrowedFd<'_>) {
    let nothing: i32 = 0;
    // SAFETY: the kernel reads nothing but the length of this option's value.
    #[expect(unsafe_code, reason = "no wrapper in nix")]
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_FILTER,
            (&raw const nothing).cast(),
            libc::socklen_t::try_from(mem::size_of_val(&nothing)).unwrap_or(0),
        );
    }
}

/// Cookie of this process's own network namespace; 0 where the kernel cannot tell.
#[must_use]
pub fn own_namespace() -> u64 {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::os::fd::AsFd;
    socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .ok()
        .and_then(|s| option(s.as_fd(), SO_NETNS_COOKIE).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
    };

    use super::*;

    #[test]
    fn a_socket_tells_what_it_is() {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let facts = Facts::of(listener.as_fd()).unwrap();
        assert!(facts.listening && facts.protocol == Protocol::TCP && facts.cookie != 0);
        assert_eq!(facts.namespace, own_namespace());
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (server, _) = listener.accept().unwrap();
        let far = Facts::of(server.as_fd()).unwrap();
        assert_eq!(far.remote, Some(client.local_addr().unwrap()));
        assert_eq!(far.local, Some(SocketAddr::from(([127, 0, 0, 1], port))));
    }

    #[test]
    fn what_is_no_socket_is_an_error() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Facts::of(file.as_fd()).is_err());
    }
}
