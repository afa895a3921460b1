//! Ends flows: through the kernel's SOCK_DESTROY, else through the flow's own descriptor.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, Shutdown, SockFlag, SockProtocol, SockType, SockaddrStorage, bind,
    getpeername, getsockname, recv, send, shutdown, socket,
};
use portcullis_wire::Addr;
use portcullis_wire::keyd::{CutBy, Flow};

use crate::sock;

/// A netlink socket to the kernel's sock_diag(7), in the network namespace where it was made.
pub struct Cutter {
    diag: OwnedFd,
    seq: u32,
    /// Number of that namespace; `None` before Linux 5.14.
    netns: Option<u64>,
}

// linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
const NLMSG_ERROR: u16 = 2;
const SOCK_DESTROY: u16 = 21;
const REQUEST_ACK: u16 = 1 | 4;
const REQUEST: usize = 16 + 56;

impl Cutter {
    /// Opens the socket.
    pub fn new() -> io::Result<Self> {
        let kind = (SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag);
        let diag = socket(AddressFamily::Netlink, kind.0, kind.1, kind.2)?;
        bind(diag.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        let netns = sock::netns_cookie(diag.as_fd()).ok();
        Ok(Self { diag, seq: 0, netns })
    }

    /// Ends one flow. With its socket, `flow` may be zeroes.
    ///
    /// # Errors
    /// `EPERM` without the privilege and without the socket, `EINVAL` for addresses of no flow.
    pub fn cut(&mut self, flow: &Flow, socket: Option<BorrowedFd<'_>>) -> io::Result<CutBy> {
        let Some(socket) = socket else {
            return self.destroy(flow, 0);
        };
        if getpeername::<SockaddrStorage>(socket.as_raw_fd()).is_err() {
            return Ok(CutBy::Gone);
        }
        let is_here =
            self.netns.is_none_or(|here| sock::netns_cookie(socket).is_ok_and(|there| here == there));
        if is_here {
            let destroyed = of(socket).and_then(|flow| {
                let interface = sock::bound_interface(socket).unwrap_or(0);
                self.destroy(&flow, interface)
            });
            if let Ok(CutBy::Destroy) = destroyed {
                return destroyed;
            }
        }
        if sock::protocol(socket)? == libc::IPPROTO_TCP && sock::disconnect(socket).is_ok() {
            return Ok(CutBy::Disconnect);
        }
        match shutdown(socket.as_raw_fd(), Shutdown::Both) {
            Ok(()) => Ok(CutBy::Shutdown),
            Err(nix::Error::ENOTCONN) => Ok(CutBy::Gone),
            Err(e) => Err(e.into()),
        }
    }

    fn destroy(&mut self, flow: &Flow, interface: u32) -> io::Result<CutBy> {
        self.seq = self.seq.wrapping_add(1);
        let request = request(flow, interface, self.seq).ok_or(io::ErrorKind::InvalidInput)?;
        send(self.diag.as_raw_fd(), &request, MsgFlags::empty())?;
        // The kernel has answered when send(2) returns (net/netlink/af_netlink.c, netlink_rcv_skb).
        let mut answer = [0; 256];
        loop {
            let length = recv(self.diag.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
            match answer.get(..length).and_then(|bytes| outcome(bytes, self.seq)) {
                None => {}
                Some(0) => return Ok(CutBy::Destroy),
                Some(libc::ENOENT) => return Ok(CutBy::Gone),
                Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

/// What the kernel knows of a connected socket.
fn of(socket: BorrowedFd<'_>) -> io::Result<Flow> {
    let local: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    let remote: SockaddrStorage = getpeername(socket.as_raw_fd())?;
    let protocol = u8::try_from(sock::protocol(socket)?).map_err(|_| io::ErrorKind::InvalidInput)?;
    let addr = |from: SockaddrStorage| {
        let v4 = from.as_sockaddr_in().map(|a| Addr::v4(a.ip(), a.port()));
        v4.or_else(|| from.as_sockaddr_in6().map(|a| Addr::v6(a.ip(), a.port(), a.scope_id())))
    };
    let (Some(local), Some(remote)) = (addr(local), addr(remote)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    Ok(Flow { cookie: sock::cookie(socket)?, protocol, reserved: [0; 7], local, remote })
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`. `None` if the addresses are of no one family.
fn request(flow: &Flow, interface: u32, seq: u32) -> Option<[u8; REQUEST]> {
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
        .chain(SOCK_DESTROY.to_ne_bytes())
        .chain(REQUEST_ACK.to_ne_bytes())
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

/// The errno in the kernel's answer to `seq`; `None` if this is another message.
fn outcome(bytes: &[u8], seq: u32) -> Option<i32> {
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok();
    let kind = bytes.get(4..6)?.try_into().ok().map(u16::from_ne_bytes)?;
    if kind != NLMSG_ERROR || word(8).map(u32::from_ne_bytes)? != seq {
        return None;
    }
    word(16).map(i32::from_ne_bytes)?.checked_neg()
}
