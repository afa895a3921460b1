//! sock_diag(7): who has which socket, and word of each TCP socket that ends.
//!
//! Layouts are those of linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h and linux/tcp.h.

use std::{
    collections::HashMap,
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv,
    recvmmsg, send, setsockopt, socket, sockopt,
};
use portcullis_types::Protocol;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const INET_DIAG_INFO: u16 = 2;
/// `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY` as bits.
const TCP_DESTROY_GROUPS: u32 = 1 | 1 << 2;
/// Header, request and answer lengths.
const HEADER: usize = 16;
const ANSWER: usize = 72;
/// Offsets of `tcpi_bytes_received`, `tcpi_bytes_sent` and `tcpi_bytes_retrans` in `struct tcp_info`.
const BYTES_RECEIVED: usize = 128;
const BYTES_SENT: usize = 200;
const BYTES_SENT_AGAIN: usize = 208;

/// State of a TCP socket (net/tcp_states.h), as far as it matters here.
pub mod state {
    /// `TCP_ESTABLISHED`; also a connected datagram socket.
    pub const ESTABLISHED: u8 = 1;
    /// `TCP_SYN_SENT`.
    pub const SYN_SENT: u8 = 2;
    /// `TCP_CLOSE`.
    pub const CLOSE: u8 = 7;
    /// `TCP_LISTEN`.
    pub const LISTEN: u8 = 10;
}

/// A socket as the kernel tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Found {
    /// See [`state`].
    pub state: u8,
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Inode in sockfs; 0 if no descriptor holds it any more.
    pub inode: u64,
    /// User who made it.
    pub uid: u32,
    /// Local end; v4-mapped as IPv4.
    pub local: SocketAddr,
    /// Far end; port 0 if none.
    pub remote: SocketAddr,
    /// The socket is `AF_INET6`, whatever its addresses.
    pub v6: bool,
}

/// A TCP socket that ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ended {
    /// Which.
    pub socket: Found,
    /// Bytes received from the far side; the kernel counts its FIN as one, if it came.
    pub bytes_in: u64,
    /// Bytes sent, each once.
    pub bytes_out: u64,
}

/// Asks the kernel about sockets in this process's network namespace.
#[derive(Debug)]
pub struct Diag {
    netlink: OwnedFd,
    buffer: Vec<u8>,
}

fn open(flags: SockFlag) -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | flags,
        SockProtocol::NetlinkSockDiag,
    )?)
}

impl Diag {
    /// # Errors
    /// The kernel has no sock_diag.
    pub fn open() -> io::Result<Self> {
        Ok(Self { netlink: open(SockFlag::empty())?, buffer: vec![0; 64 * 1024] })
    }

    /// The socket with these two ends: a connected one, else the listener that would take a
    /// connection from `remote` to `local`.
    pub fn find(&mut self, protocol: Protocol, local: SocketAddr, remote: SocketAddr) -> Option<Found> {
        // For datagrams the kernel reads the two ends as a packet's: source first (udp_dump_one).
        let (src, dst) = if protocol == Protocol::TCP { (local, remote) } else { (remote, local) };
        let mut found = None;
        let v6 = src.is_ipv6() || dst.is_ipv6();
        self.ask(&request(protocol, v6, u32::MAX, Some((src, dst)), 0), |body| found = parse(body)).ok()?;
        found
    }

    /// All sockets of a protocol, of both families, in the states whose bits are in `states`.
    ///
    /// # Errors
    /// As netlink.
    pub fn all(&mut self, protocol: Protocol, states: u32) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for v6 in [false, true] {
            self.ask(&request(protocol, v6, states, None, 0), |body| found.extend(parse(body)))?;
        }
        Ok(found)
    }

    /// What every TCP socket that is connected has received and sent so far, by `SO_COOKIE`.
    ///
    /// # Errors
    /// As netlink.
    pub fn carried(&mut self) -> io::Result<HashMap<u64, (u64, u64)>> {
        let mut carried = HashMap::new();
        for v6 in [false, true] {
            let wants = request(Protocol::TCP, v6, 1 << state::ESTABLISHED, None, 1 << (INET_DIAG_INFO - 1));
            self.ask(&wants, |body| {
                carried.extend(parse(body).map(|it| (it.cookie, bytes(body))));
            })?;
        }
        Ok(carried)
    }

    fn ask(&mut self, request: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let is_dump = u16_at(request, 6).is_some_and(|flags| flags & NLM_F_DUMP != 0);
        send(self.netlink.as_raw_fd(), request, MsgFlags::empty())?;
        loop {
            let got = recv(self.netlink.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            let mut more = is_dump;
            for (kind, body) in messages(self.buffer.get(..got).unwrap_or_default()) {
                match kind {
                    SOCK_DIAG_BY_FAMILY => each(body),
                    NLMSG_DONE => more = false,
                    NLMSG_ERROR => {
                        let code = i32_at(body, 0).unwrap_or(0);
                        return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    _ => {}
                }
            }
            if !more {
                return Ok(());
            }
        }
    }
}

/// Word of each TCP socket in this network namespace that ends.
#[derive(Debug)]
pub struct Endings {
    netlink: OwnedFd,
    buffers: Vec<[u8; LONGEST]>,
    /// One ending is one message: so many are taken with one system call.
    headers: MultiHeaders<()>,
}

/// Room for one ending, and how many are taken at once.
const LONGEST: usize = 2048;
const AT_ONCE: usize = 32;

impl Endings {
    /// Subscribes. `buffer` is in bytes; what does not fit is lost, and said so.
    ///
    /// # Errors
    /// The kernel has no such groups.
    pub fn open(buffer: usize) -> io::Result<Self> {
        let netlink = open(SockFlag::SOCK_NONBLOCK)?;
        // Above rmem_max only with CAP_NET_ADMIN; otherwise as much as is allowed.
        if setsockopt(&netlink, sockopt::RcvBufForce, &buffer).is_err() {
            setsockopt(&netlink, sockopt::RcvBuf, &buffer)?;
        }
        bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, TCP_DESTROY_GROUPS))?;
        Ok(Self {
            netlink,
            buffers: vec![[0; LONGEST]; AT_ONCE],
            headers: MultiHeaders::preallocate(AT_ONCE, None),
        })
    }

    /// Takes what has come. `Ok(false)`: something was lost before this.
    ///
    /// # Errors
    /// As recv(2).
    pub fn take(&mut self, mut each: impl FnMut(Ended)) -> io::Result<bool> {
        let mut complete = true;
        loop {
            let mut parts: Vec<_> = self.buffers.iter_mut().map(|it| [IoSliceMut::new(it)]).collect();
            let netlink = self.netlink.as_raw_fd();
            let got = recvmmsg(netlink, &mut self.headers, &mut parts, MsgFlags::MSG_DONTWAIT, None);
            let lengths: Vec<usize> = match got {
                Ok(got) => got.map(|message| message.bytes).collect(),
                Err(nix::Error::EAGAIN) => return Ok(complete),
                Err(nix::Error::ENOBUFS) => {
                    complete = false;
                    continue;
                }
                Err(nix::Error::EINTR) => continue,
                Err(other) => return Err(other.into()),
            };
            for (buffer, length) in self.buffers.iter().zip(&lengths) {
                let all = messages(buffer.get(..*length).unwrap_or_default());
                all.filter(|(kind, _)| *kind == SOCK_DIAG_BY_FAMILY)
                    .filter_map(|(_, body)| parse_ended(body))
                    .for_each(&mut each);
            }
            // There was no more when this was asked.
            if lengths.len() < AT_ONCE {
                return Ok(complete);
            }
        }
    }
}

impl AsFd for Endings {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.netlink.as_fd()
    }
}

/// Asks about the socket with two ends, or about all. `more` are bits of attributes.
fn request(
    protocol: Protocol,
    v6: bool,
    states: u32,
    ends: Option<(SocketAddr, SocketAddr)>,
    more: u8,
) -> Vec<u8> {
    let flags = NLM_F_REQUEST | if ends.is_none() { NLM_F_DUMP } else { 0 };
    let mut out = Vec::with_capacity(HEADER + 56);
    out.extend_from_slice(&72u32.to_ne_bytes());
    out.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&[0; 8]); // seq, port id
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    out.extend_from_slice(&[u8::try_from(family).unwrap_or(0), protocol.0, more, 0]);
    out.extend_from_slice(&states.to_ne_bytes());
    let any =
        SocketAddr::new(if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }, 0);
    let (src, dst) = ends.unwrap_or((any, any));
    out.extend_from_slice(&src.port().to_be_bytes());
    out.extend_from_slice(&dst.port().to_be_bytes());
    for end in [src, dst] {
        match end.ip() {
            IpAddr::V4(ip) if v6 => out.extend_from_slice(&ip.to_ipv6_mapped().octets()),
            IpAddr::V4(ip) => {
                out.extend_from_slice(&ip.octets());
                out.extend_from_slice(&[0; 12]);
            }
            IpAddr::V6(ip) => out.extend_from_slice(&ip.octets()),
        }
    }
    let scope = |end: SocketAddr| if let SocketAddr::V6(a) = end { a.scope_id() } else { 0 };
    out.extend_from_slice(&scope(src).max(scope(dst)).to_ne_bytes());
    out.extend_from_slice(&[0xff; 8]); // INET_DIAG_NOCOOKIE
    out
}

/// Splits a datagram into netlink messages: type and body.
fn messages(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(rest, 0)?).ok()?;
        let kind = u16_at(rest, 4)?;
        let body = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

fn parse(body: &[u8]) -> Option<Found> {
    let v6 = i32::from(*body.first()?) == libc::AF_INET6;
    let ip = |at: usize| -> Option<IpAddr> {
        let raw: [u8; 16] = body.get(at..at + 16)?.try_into().ok()?;
        let [a, b, c, d, ..] = raw;
        Some(if v6 { IpAddr::V6(raw.into()).to_canonical() } else { IpAddr::V4([a, b, c, d].into()) })
    };
    let port = |at: usize| Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?));
    Some(Found {
        state: *body.get(1)?,
        local: SocketAddr::new(ip(8)?, port(4)?),
        remote: SocketAddr::new(ip(24)?, port(6)?),
        cookie: u64::from(u32_at(body, 44)?) | u64::from(u32_at(body, 48)?) << 32,
        uid: u32_at(body, 64)?,
        inode: u64::from(u32_at(body, 68)?),
        v6,
    })
}

fn parse_ended(body: &[u8]) -> Option<Ended> {
    let (socket, (bytes_in, bytes_out)) = (parse(body)?, bytes(body));
    Some(Ended { socket, bytes_in, bytes_out })
}

/// What a socket has received, and sent.
fn bytes(body: &[u8]) -> (u64, u64) {
    let mut attributes: HashMap<u16, &[u8]> = HashMap::new();
    let mut rest = body.get(ANSWER..).unwrap_or_default();
    while let (Some(length), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let length = usize::from(length);
        let Some(value) = rest.get(4..length) else { break };
        attributes.insert(kind, value);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    let info = attributes.get(&INET_DIAG_INFO).copied().unwrap_or_default();
    let long = |at: usize| info.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes);
    (long(BYTES_RECEIVED), long(BYTES_SENT).saturating_sub(long(BYTES_SENT_AGAIN)))
}

/// Reads bytes as if the kernel had sent them.
pub fn read_any(bytes: &[u8]) {
    for (_, body) in messages(bytes) {
        let _ = (parse(body), parse_ended(body));
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}
fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    u32_at(bytes, at).map(u32::cast_signed)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream, UdpSocket},
        time::Duration,
    };

    use nix::sys::stat::fstat;

    use super::*;

    #[test]
    fn both_ends_of_a_local_connection_are_found() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let mut at = listener.local_addr().unwrap();
            if at.ip().is_unspecified() {
                at.set_ip("127.0.0.1".parse().unwrap());
            }
            let mut diag = Diag::open().unwrap();
            let nobody = SocketAddr::new(at.ip(), 0);
            let waiting = diag.find(Protocol::TCP, at, nobody).unwrap();
            assert_eq!(waiting.state, state::LISTEN, "{address}");
            assert_eq!(waiting.inode, fstat(&listener).unwrap().st_ino);
            let client = TcpStream::connect(at).unwrap();
            let (server, from) = listener.accept().unwrap();
            let near = diag.find(Protocol::TCP, client.local_addr().unwrap(), at).unwrap();
            assert_eq!((near.state, near.inode), (state::ESTABLISHED, fstat(&client).unwrap().st_ino));
            assert_eq!(near.uid, nix::unistd::geteuid().as_raw());
            let from = SocketAddr::new(from.ip().to_canonical(), from.port());
            let far = diag.find(Protocol::TCP, at, from).unwrap();
            assert_eq!(far.inode, fstat(&server).unwrap().st_ino, "{address}");
        }
    }

    #[test]
    fn a_datagram_socket_is_found_by_its_address() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let at = socket.local_addr().unwrap();
        let found = Diag::open().unwrap().find(Protocol::UDP, at, "127.0.0.1:9".parse().unwrap()).unwrap();
        assert_eq!(found.inode, fstat(&socket).unwrap().st_ino);
    }

    #[test]
    fn an_ended_connection_is_reported_with_its_bytes() {
        let mut endings = Endings::open(1 << 20).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(&[1; 1000]).unwrap();
        server.write_all(&[2; 10]).unwrap();
        server.read_exact(&mut [0; 1000]).unwrap();
        client.read_exact(&mut [0; 10]).unwrap();
        let (near, far) = (client.local_addr().unwrap(), server.local_addr().unwrap());
        let mut diag = Diag::open().unwrap();
        let there = diag.find(Protocol::TCP, far, near).unwrap();
        assert_eq!(diag.carried().unwrap().get(&there.cookie), Some(&(1000, 10)), "while it lives");
        drop((client, server));
        let mut seen = Vec::new();
        for _ in 0..4000 {
            assert!(endings.take(|e| seen.push(e)).unwrap());
            std::thread::sleep(Duration::from_millis(5));
            if let Some(e) = seen.iter().find(|e| e.socket.local == far && e.socket.remote == near) {
                assert_eq!((e.bytes_in - 1, e.bytes_out), (1000, 10), "the FIN counts as one");
                return;
            }
        }
        panic!("no word of it");
    }

    #[test]
    fn garbage_from_netlink_is_nothing() {
        for length in 0..200 {
            for value in [0, 1, 16, 0xff] {
                read_any(&vec![value; length]);
            }
        }
    }
}
