//! Tokens: loopback addresses that stand for the far side of protected flows.
//!
//! A program that opens a protected flow connects to a token. A listener that answers nobody leaves its
//! SYN unanswered, its filter tells where it came from, and when the far side has proved itself the key
//! daemon connects *from the token to the program*: a simultaneous open (RFC 9293, 3.5, figure 8), so the
//! program's own descriptor becomes connected. On failure the program gets RST or ICMP, and so the errno
//! that a native connection would have had.
//!
//! Tokens are of IPv4, which a socket of IPv6 reaches by v4-mapped addresses. One that the program has bound
//! to IPv6 cannot: its token is a port of `::1`.

use std::{
    collections::HashSet,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect,
        getsockname, listen, sendto, setsockopt, socket, sockopt,
    },
};
use ring::rand::{SecureRandom, SystemRandom};

use crate::{
    bpf::{Map, Ring, Shape, load_filter},
    packet::{self, FAR_PORT, FIRST_SIX, Syn, Unreachable},
    sock,
};

/// Ring of SYNs: room for 1170 of them; what does not fit is sent again.
const RING: u32 = 1 << 16;
/// Most programs' sockets whose filter is known as ours.
const GUARDED: usize = 1 << 16;

/// Sockets that need CAP_NET_RAW, made before raw sockets are out of reach: they send whole packets, and get none.
pub struct Raw {
    send: OwnedFd,
    /// For IPv6, where the host has it.
    six: Option<OwnedFd>,
}

impl Raw {
    /// Makes them, in this network namespace.
    pub fn new() -> io::Result<Self> {
        let raw = |family| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            socket(family, SockType::Raw, flags, SockProtocol::Raw)
        };
        Ok(Self { send: raw(AddressFamily::Inet)?, six: raw(AddressFamily::Inet6).ok() })
    }
}

/// A token that stands for a far side. SYNs to it are held as long as this lives.
pub struct Token {
    /// Where the program connects.
    pub at: SocketAddr,
    /// What listens there and answers nobody, if that is for this one alone.
    _hold: Option<OwnedFd>,
}

/// The tokens of one network namespace.
pub struct Tokens {
    raw: Raw,
    /// A filter that lets nothing through, and tells of SYNs.
    held: OwnedFd,
    /// Where it tells.
    ring: Ring,
    /// One for programs' sockets ([`packet::only_ours`]).
    only_ours: OwnedFd,
    /// Cookies of those that have it.
    guarded: HashSet<u64>,
    /// Listens on [`FAR_PORT`] of all tokens of IPv4 and answers nobody.
    _hold: OwnedFd,
    /// On every packet of ours to a program's listener.
    mark: u32,
}

fn stream(family: AddressFamily) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(family, SockType::Stream, flags, SockProtocol::Tcp)
}

/// The family of an address.
const fn family(of: SocketAddr) -> AddressFamily {
    if of.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// Shares the port with the holding listener.
fn shared(socket: &OwnedFd) -> nix::Result<()> {
    setsockopt(socket, sockopt::ReuseAddr, &true)?;
    setsockopt(socket, sockopt::ReusePort, &true)
}

/// Listens at a token's address, and answers nobody.
fn hold(at: SocketAddr, held: &OwnedFd) -> io::Result<OwnedFd> {
    let hold = stream(family(at))?;
    shared(&hold)?;
    sock::attach_and_lock(hold.as_fd(), held.as_fd()).map_err(io::Error::other)?;
    bind(hold.as_raw_fd(), &SockaddrStorage::from(at))?;
    listen(&hold, Backlog::new(1)?)?;
    Ok(hold)
}

impl Tokens {
    /// Begins to hold. Must run as the user that later opens: a shared port belongs to one user.
    pub fn new(raw: Raw, mark: u32) -> io::Result<Self> {
        let ring = Ring::new(Map::new(Shape::ring(RING))?, RING)?;
        let held = load_filter(&packet::held(ring.as_fd().as_raw_fd()).map_err(io::Error::other)?)?;
        let only_ours = load_filter(&packet::only_ours(mark).map_err(io::Error::other)?)?;
        let hold = hold(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), FAR_PORT), &held)?;
        Ok(Self { raw, held, ring, only_ours, guarded: HashSet::new(), _hold: hold, mark })
    }

    /// A token of IPv4 that stands for nothing yet; random, so that none is used again soon (TIME_WAIT).
    pub fn any(&self) -> io::Result<Ipv4Addr> {
        loop {
            if let Some(token) = packet::token(random()?) {
                return Ok(token);
            }
        }
    }

    /// A token for a far side; `six` for a socket that can only reach one of IPv6. One that `is_taken` is
    /// given to nobody.
    pub fn far(&self, six: bool, is_taken: impl Fn(&SocketAddr) -> bool) -> io::Result<Token> {
        if !six {
            return Ok(Token { at: SocketAddr::new(self.any()?.into(), FAR_PORT), _hold: None });
        }
        if self.raw.six.is_none() {
            return Err(Errno::EAFNOSUPPORT.into());
        }
        for _ in 0..64 {
            let port = u16::try_from(random()? % u32::from(u16::MAX - FIRST_SIX)).unwrap_or(0) + FIRST_SIX;
            let at = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
            if is_taken(&at) {
                continue;
            }
            match hold(at, &self.held) {
                Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE) => {}
                held => return Ok(Token { at, _hold: Some(held?) }),
            }
        }
        Err(Errno::EADDRNOTAVAIL.into())
    }

    /// Has a program's socket take nobody but this key daemon for what its token stands for, also when this one has been
    /// killed and somebody else answers there.
    ///
    /// # Errors
    /// `EBUSY` if the program has put a filter there itself: both cannot be, and it is not thrown away.
    pub fn guard(&mut self, program: BorrowedFd<'_>, cookie: u64) -> io::Result<()> {
        let is_free = match sock::filter_length(program) {
            Ok(length) => length == 0,
            // Nobody can read whose it is. A classic one could be read, but each socket would have its own, and the kernel
            // would compile it for every connection.
            Err(_) => self.guarded.contains(&cookie),
        };
        if !is_free {
            return Err(Errno::EBUSY.into());
        }
        sock::attach(program, self.only_ours.as_fd())?;
        if self.guarded.len() >= GUARDED {
            // Those that did not end where it is told, or were not told of.
            self.guarded.clear();
        }
        self.guarded.insert(cookie);
        Ok(())
    }

    /// Forgets sockets that have ended.
    pub fn forget(&mut self, dead: &[u64]) {
        for cookie in dead {
            self.guarded.remove(cookie);
        }
    }

    /// SYNs that arrived; [`AsFd`] is readable then.
    pub fn held(&mut self) -> Vec<Syn> {
        let mut found = Vec::new();
        while let Some(report) = self.ring.pop() {
            found.extend(packet::read_held(&report));
        }
        found
    }

    /// Begins to connect from the token to the program whose SYN is held. The caller waits until the socket
    /// is writable, and makes sure that it is the right program before a byte passes.
    pub fn open(&self, syn: &Syn) -> io::Result<OwnedFd> {
        let near = stream(family(syn.token))?;
        setsockopt(&near, sockopt::Mark, &self.mark)?;
        shared(&near)?;
        bind(near.as_raw_fd(), &SockaddrStorage::from(syn.token))?;
        begin(&near, syn.from)?;
        Ok(near)
    }

    /// What listeners' filters let through.
    pub const fn mark(&self) -> u32 {
        self.mark
    }

    /// Begins to connect to a program's listener, from an address that stands for the peer and is returned too.
    /// IPv6 has no tokens: there it is loopback, and a port of the kernel's choice. A full backlog delays it.
    pub fn deliver(&self, to: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
        let near = stream(family(to))?;
        setsockopt(&near, sockopt::Mark, &self.mark)?;
        let from = match to {
            SocketAddr::V4(_) => SocketAddr::from((self.any()?, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
        };
        bind(near.as_raw_fd(), &SockaddrStorage::from(from))?;
        begin(&near, to)?;
        let from: SockaddrStorage = getsockname(near.as_raw_fd())?;
        let from = crate::cut::addr(&from).and_then(|from| from.socket_addr());
        Ok((near, from.ok_or(Errno::EINVAL)?))
    }

    /// Fails a held connection with the errno of a native one, as far as packets can say it.
    pub fn fail(&self, syn: &Syn, errno: i32) -> io::Result<()> {
        let packet = match errno {
            libc::ENETUNREACH => packet::unreachable(syn, Unreachable::Net),
            libc::EHOSTUNREACH | libc::ETIMEDOUT => packet::unreachable(syn, Unreachable::Host),
            _ => packet::reset(syn),
        };
        let by = match (&self.raw.six, syn.from) {
            (Some(send), SocketAddr::V6(_)) => send,
            _ => &self.raw.send,
        };
        let to = SocketAddr::new(syn.from.ip(), 0);
        sendto(by.as_raw_fd(), &packet, &SockaddrStorage::from(to), MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }
}

impl AsFd for Tokens {
    /// Readable when a SYN is held.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

fn begin(near: &OwnedFd, to: SocketAddr) -> io::Result<()> {
    match connect(near.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn random() -> io::Result<u32> {
    let mut bytes = [0; 4];
    SystemRandom::new().fill(&mut bytes).map_err(|_| io::ErrorKind::Other)?;
    Ok(u32::from_ne_bytes(bytes))
}
