//! Socket options that nix does not have.
#![expect(unsafe_code, reason = "getsockopt(2), setsockopt(2) and connect(2) take pointers")]

use std::{
    io,
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::sys::socket::{ControlMessageOwned, SockaddrStorage};
use portcullis_wire::Addr;

use crate::filter::FilterError;

/// Reads an option whose value is a `T`, of which any bits are a value.
fn get<T: Default>(socket: BorrowedFd<'_>, name: libc::c_int) -> io::Result<T> {
    get_at(socket, libc::SOL_SOCKET, name)
}

fn get_at<T: Default>(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<T> {
    let mut value = T::default();
    let mut length = libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0);
    // SAFETY: getsockopt(2) writes at most `length` bytes to `value`, which has that many; T is only
    // ever an integer (private function, calls below), so all bytes are good.
    let done = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length)
    };
    if done == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

fn set(socket: BorrowedFd<'_>, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    set_any(socket, libc::SOL_SOCKET, name, &value)
}

/// IANA protocol number of a socket.
pub fn protocol(socket: BorrowedFd<'_>) -> io::Result<i32> {
    get(socket, libc::SO_PROTOCOL)
}

/// `AF_*` of a socket.
pub fn domain(socket: BorrowedFd<'_>) -> io::Result<i32> {
    get(socket, libc::SO_DOMAIN)
}

/// An address in its own family: a v4-mapped one stays v6.
pub fn as_given(addr: &Addr) -> Option<SockaddrStorage> {
    let [a, b, c, d, ..] = addr.ip;
    Some(match addr.family {
        4 => SocketAddr::V4(SocketAddrV4::new([a, b, c, d].into(), addr.port)).into(),
        6 => SocketAddr::V6(SocketAddrV6::new(addr.ip.into(), addr.port, addr.flow, addr.scope)).into(),
        _ => return None,
    })
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

const SO_BINDTOIFINDEX: libc::c_int = 62; // asm-generic/socket.h

/// Interface that the socket is bound to; 0 if none.
pub fn bound_interface(socket: BorrowedFd<'_>) -> io::Result<u32> {
    get::<i32>(socket, SO_BINDTOIFINDEX).map(i32::cast_unsigned)
}

/// Binds to an interface; 0 is none. A socket that is bound to one leaves it only with CAP_NET_RAW.
pub fn bind_interface(socket: BorrowedFd<'_>, interface: u32) -> io::Result<()> {
    set(socket, SO_BINDTOIFINDEX, interface.cast_signed())
}

/// Gives a socket of ours, which will be on the wire, what a program has asked of its own: how it is sent, and
/// how patiently. What the two families do not share, or the kernel does not know, stays as it is.
pub fn take_after(wire: BorrowedFd<'_>, program: BorrowedFd<'_>) {
    const SO_BUF_LOCK: libc::c_int = 72; // asm-generic/socket.h; Linux 5.14
    const COPIED: [(libc::c_int, libc::c_int); 11] = [
        (libc::SOL_SOCKET, libc::SO_MARK),
        (libc::SOL_SOCKET, libc::SO_PRIORITY),
        (libc::IPPROTO_IP, libc::IP_TOS),
        (libc::IPPROTO_IP, libc::IP_TTL),
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
        (libc::IPPROTO_TCP, libc::TCP_SYNCNT),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    ];
    for (level, name) in COPIED {
        if let (Ok(wanted), Ok(there)) =
            (get_at::<i32>(program, level, name), get_at::<i32>(wire, level, name))
            && wanted != there
        {
            let _stays = set_any(wire, level, name, &wanted);
        }
    }
    // A size that the program has chosen ends the kernel's own choice, so it is copied only then. The kernel
    // doubles what it is given (socket(7)).
    let chosen = get::<i32>(program, SO_BUF_LOCK).unwrap_or(0);
    for (bit, size, force) in
        [(1, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE), (2, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE)]
    {
        if chosen & bit != 0
            && let Ok(size) = get::<i32>(program, size)
        {
            let _stays = set(wire, force, size / 2);
        }
    }
    // Whether the program asks for this later cannot be seen, and what it would ask is answered on loopback.
    let _stays = set(wire, libc::SO_KEEPALIVE, 1);
}

fn set_any<T>(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(value)).unwrap_or(0);
    // SAFETY: setsockopt(2) reads `length` bytes from `value`, which has that many.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), length)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Subscribes a netlink socket to a group.
pub fn join_group(socket: BorrowedFd<'_>, group: i32) -> io::Result<()> {
    set_any(socket, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, &group)
}

/// Attaches a classic filter (linux/filter.h).
pub fn attach_classic(socket: BorrowedFd<'_>, code: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(code.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: code.as_ptr().cast_mut() };
    set_any(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// How many instructions of classic BPF filter a socket; 0: it has no filter.
///
/// # Errors
/// `EACCES`: it has one of eBPF.
pub fn filter_length(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut instructions: libc::socklen_t = 0;
    // SAFETY: with no room getsockopt(2) writes nothing and tells how many instructions there are
    // (net/core/filter.c, sk_get_filter).
    let done = unsafe {
        let (level, name) = (libc::SOL_SOCKET, libc::SO_GET_FILTER);
        libc::getsockopt(socket.as_raw_fd(), level, name, std::ptr::null_mut(), &raw mut instructions)
    };
    if done == 0 { Ok(instructions) } else { Err(io::Error::last_os_error()) }
}

/// Locks the filter that a socket has.
pub fn lock_filter(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SO_LOCK_FILTER, 1)
}

/// Lets a v6 socket that is not bound yet talk to v4-mapped addresses.
pub fn dual_stack(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_any(socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &0_i32)
}

/// Attaches a loaded filter, replacing one that is not locked.
pub fn attach(socket: BorrowedFd<'_>, filter: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SO_ATTACH_BPF, filter.as_raw_fd())
}

/// Attaches a loaded filter, replacing one that is not locked, and locks it.
pub fn attach_and_lock(socket: BorrowedFd<'_>, filter: BorrowedFd<'_>) -> Result<(), FilterError> {
    if get::<i32>(socket, libc::SO_LOCK_FILTER)? != 0 {
        return Err(FilterError::Locked);
    }
    attach(socket, filter).map_err(|e| match e.raw_os_error() {
        Some(libc::EPERM) => FilterError::Locked,
        _ => FilterError::Kernel(e),
    })?;
    lock_filter(socket)?;
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

/// Makes closing send RST.
pub fn reset_on_close(socket: BorrowedFd<'_>) {
    let now = libc::linger { l_onoff: 1, l_linger: 0 };
    // It fails only for what is no socket.
    let _ = set_any(socket, libc::SOL_SOCKET, libc::SO_LINGER, &now);
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
