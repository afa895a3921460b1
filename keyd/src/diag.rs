//! Asks the kernel about sockets, and has it destroy them: sock_diag(7). The only netlink here.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use portcullis_wire::keyd::Flow;

use crate::{packet, sock};

/// What the kernel says of a socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Subject {
    /// Its number, never used again.
    pub cookie: u64,
    /// Of a listener: connections that wait for accept(2).
    pub waiting: u32,
    /// Of a listener: its backlog; one more than this may wait (net/sock.h, sk_acceptq_is_full).
    pub backlog: u32,
    /// Its own address is the unspecified one.
    pub is_anywhere: bool,
}

/// A netlink socket, in the network namespace where it was made.
pub struct Diag {
    netlink: OwnedFd,
    seq: u32,
    /// Number of that namespace; `None` before Linux 5.14.
    netns: Option<u64>,
}

// linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
const NLMSG_ERROR: u16 = 2;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const REQUEST_ONLY: u16 = 1;
const REQUEST_ACK: u16 = 1 | 4;
const REQUEST: usize = 16 + 56;

fn open() -> io::Result<OwnedFd> {
    let kind = (SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag);
    let netlink = socket(AddressFamily::Netlink, kind.0, kind.1, kind.2)?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(netlink)
}

impl Diag {
    /// Opens the socket.
    pub fn new() -> io::Result<Self> {
        let netlink = open()?;
        let netns = sock::netns_cookie(netlink.as_fd()).ok();
        Ok(Self { netlink, seq: 0, netns })
    }

    /// Whether a socket is in this network namespace.
    pub fn is_here(&self, socket: BorrowedFd<'_>) -> bool {
        self.netns.is_none_or(|here| sock::netns_cookie(socket).is_ok_and(|there| here == there))
    }

    /// Destroys the socket with these addresses and this cookie. `false`: there is none.
    pub fn destroy(&mut self, flow: &Flow, interface: u32) -> io::Result<bool> {
        self.ask(SOCK_DESTROY, flow, interface).map(|found| found.is_some())
    }

    /// The socket with these addresses. A listener is found by its own address alone.
    pub fn look(&mut self, flow: &Flow) -> io::Result<Option<Subject>> {
        self.ask(SOCK_DIAG_BY_FAMILY, flow, 0).map(Option::flatten)
    }

    /// `Some(None)`: done, without a message about a socket.
    fn ask(&mut self, kind: u16, flow: &Flow, interface: u32) -> io::Result<Option<Option<Subject>>> {
        self.seq = self.seq.wrapping_add(1);
        let flags = if kind == SOCK_DESTROY { REQUEST_ACK } else { REQUEST_ONLY };
        let request = request((kind, flags), flow, interface, self.seq).ok_or(io::ErrorKind::InvalidInput)?;
        send(self.netlink.as_raw_fd(), &request, MsgFlags::empty())?;
        // The kernel has answered when send(2) returns (net/netlink/af_netlink.c, netlink_rcv_skb).
        let mut answer = [0; 1024];
        let mut found = None;
        loop {
            let length = recv(self.netlink.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
            let bytes = answer.get(..length).unwrap_or_default();
            found = subject(bytes).filter(|_| answers(bytes, self.seq)).or(found);
            match outcome(bytes, self.seq) {
                // Asked for nothing else, it says what it has found, or an error.
                None if found.is_some() && flags == REQUEST_ONLY => return Ok(Some(found)),
                None => {}
                Some(0) => return Ok(Some(found)),
                Some(libc::ENOENT) => return Ok(None),
                Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

/// Hears of the end of TCP sockets in the namespace where it was made: of listeners, and of those that went to a token.
pub struct Deaths(OwnedFd);

impl Deaths {
    /// Subscribes.
    pub fn new() -> io::Result<Self> {
        const INET_TCP_DESTROY: i32 = 1; // linux/sock_diag.h, sknetlink_groups
        const INET6_TCP_DESTROY: i32 = 3;
        let netlink = open()?;
        sock::attach_classic(netlink.as_fd(), &packet::deaths())?;
        for group in [INET_TCP_DESTROY, INET6_TCP_DESTROY] {
            sock::join_group(netlink.as_fd(), group)?;
        }
        Ok(Self(netlink))
    }

    /// Cookies of sockets that have ended. After a burst some may be missing.
    pub fn take(&self) -> Vec<u64> {
        let mut dead = Vec::new();
        let mut message = [0; 1024];
        loop {
            match recv(self.0.as_raw_fd(), &mut message, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => dead.extend(message.get(..length).and_then(subject).map(|it| it.cookie)),
                Err(nix::Error::ENOBUFS | nix::Error::EINTR) => {}
                Err(_) => return dead,
            }
        }
    }
}

impl AsFd for Deaths {
    /// Readable when a socket has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`. `None` if the addresses are of no one family.
fn request((kind, flags): (u16, u16), flow: &Flow, interface: u32, seq: u32) -> Option<[u8; REQUEST]> {
    const ANY_STATE: u32 = u32::MAX;
    const ANY_COOKIE: u64 = u64::MAX; // INET_DIAG_NOCOOKIE
    let family = match (flow.local.family, flow.remote.family) {
        (4, 4) => libc::AF_INET,
        (6, 6) => libc::AF_INET6,
        _ => return None,
    };
    let length = u32::try_from(REQUEST).ok()?;
    let interface = if interface == 0 { flow.local.scope.max(flow.remote.scope) } else { interface };
    let cookie = if flow.cookie == 0 { ANY_COOKIE } else { flow.cookie };
    let mut request = [0; REQUEST];
    let header = length
        .to_ne_bytes()
        .into_iter()
        .chain(kind.to_ne_bytes())
        .chain(flags.to_ne_bytes())
        .chain(seq.to_ne_bytes())
        .chain([0; 4]);
    let body = [u8::try_from(family).ok()?, flow.protocol, 0, 0]
        .into_iter()
        .chain(ANY_STATE.to_ne_bytes())
        .chain(flow.local.port.to_be_bytes())
        .chain(flow.remote.port.to_be_bytes())
        .chain(flow.local.ip)
        .chain(flow.remote.ip)
        .chain(interface.to_ne_bytes())
        .chain(cookie.to_ne_bytes()); // low half first on x86_64 and aarch64, as the kernel's pair
    for (to, from) in request.iter_mut().zip(header.chain(body)) {
        *to = from;
    }
    Some(request)
}

/// Whether a message is about the request with this number.
fn answers(bytes: &[u8], seq: u32) -> bool {
    bytes.get(8..12) == Some(&seq.to_ne_bytes())
}

/// The errno in the kernel's answer to `seq`; `None` if this is another message.
fn outcome(bytes: &[u8], seq: u32) -> Option<i32> {
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok();
    let kind = bytes.get(4..6)?.try_into().ok().map(u16::from_ne_bytes)?;
    if kind != NLMSG_ERROR || !answers(bytes, seq) {
        return None;
    }
    word(16).map(i32::from_ne_bytes)?.checked_neg()
}

/// Reads a message about a socket: `struct inet_diag_msg` after the header.
fn subject(bytes: &[u8]) -> Option<Subject> {
    let kind = bytes.get(4..6)?.try_into().ok().map(u16::from_ne_bytes)?;
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let cookie = bytes.get(60..68)?.try_into().ok().map(u64::from_ne_bytes)?; // id.idiag_cookie
    let (waiting, backlog) = (word(72)?, word(76)?); // idiag_rqueue, idiag_wqueue
    let is_anywhere = bytes.get(24..40)?.iter().all(|byte| *byte == 0); // id.idiag_src
    (kind == SOCK_DIAG_BY_FAMILY).then_some(Subject { cookie, waiting, backlog, is_anywhere })
}
