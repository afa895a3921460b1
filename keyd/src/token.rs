//! Tokens: loopback addresses that stand for the far side of protected flows.
//!
//! A program that opens a protected flow connects to a token. A listener that answers nobody leaves its
//! SYN unanswered, a raw socket tells where it came from, and when the far side has proved itself the key
//! daemon connects *from the token to the program*: a simultaneous open (RFC 9293, 3.5, figure 8), so the
//! program's own descriptor becomes connected. On failure the program gets RST or ICMP, and so the errno
//! that a native connection would have had.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use libc::sock_filter;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, bind, connect,
        listen, recv, sendto, setsockopt, socket, sockopt,
    },
};
use ring::rand::{SecureRandom, SystemRandom};

use crate::{bpf::load_filter, sock};

/// Tokens are 127.64.0.0/10.
const NET: u32 = 0x7f40_0000;
const MASK: u32 = 0xffc0_0000;
/// Port of tokens that stand for a far side. Above the ephemeral ports (ip(7), ip_local_port_range).
pub const FAR_PORT: u16 = 61000;
/// Port of tokens that stand for a listener's own address.
pub const NEAR_PORT: u16 = 61001;
/// A held SYN.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Syn {
    /// The program's own address.
    pub from: SocketAddrV4,
    /// The token.
    pub token: Ipv4Addr,
    /// Its sequence number.
    sequence: u32,
    /// IP header and the first 8 bytes of TCP, which ICMP repeats.
    head: Vec<u8>,
}

/// Sockets that need CAP_NET_RAW, made before it is given up.
pub struct Raw {
    /// Sees SYNs to tokens.
    sniff: OwnedFd,
    /// Sends whole packets.
    send: OwnedFd,
}

impl Raw {
    /// Makes them, in this network namespace.
    pub fn new() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let sniff = socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Tcp)?;
        sock::attach_classic(sniff.as_fd(), &mut syns())?;
        // What arrived before the filter was there is not ours.
        while recv(sniff.as_raw_fd(), &mut [0; 64], MsgFlags::MSG_DONTWAIT).is_ok() {}
        let send = socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Raw)?;
        Ok(Self { sniff, send })
    }
}

const fn op(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Classic BPF: SYNs without ACK, over loopback, to a token's port [`FAR_PORT`]; of each the first 64 bytes.
fn syns() -> [sock_filter; 13] {
    [
        op(0x20, 0, 0, 16),              // ld [16]: destination
        op(0x54, 0, 0, MASK),            // and
        op(0x15, 0, 8, NET),             // jeq
        op(0x28, 0, 0, 6),               // ldh [6]: fragment
        op(0x45, 6, 0, 0x1fff),          // jset: not the first
        op(0xb1, 0, 0, 0),               // ldxb 4*([0]&0xf)
        op(0x48, 0, 0, 2),               // ldh [x+2]: port
        op(0x15, 0, 3, FAR_PORT as u32), // jeq
        op(0x50, 0, 0, 13),              // ldb [x+13]: flags
        op(0x54, 0, 0, 0x12),            // and SYN|ACK
        op(0x15, 1, 0, 0x02),            // jeq SYN
        op(0x06, 0, 0, 0),               // drop
        op(0x06, 0, 0, 64),              // pass
    ]
}

/// Classic BPF for a listener on a token: a SYN needs the mark of the key daemon; what follows passes.
fn marked(mark: u32) -> [sock_filter; 7] {
    const MARK: u32 = 0xffff_f000_u32.wrapping_add(20); // linux/filter.h, SKF_AD_OFF + SKF_AD_MARK
    [
        op(0x30, 0, 0, 13),       // ldb [13]: flags of the TCP header, which is at 0
        op(0x54, 0, 0, 0x12),     // and SYN|ACK
        op(0x15, 0, 2, 0x02),     // jeq SYN, else pass
        op(0x20, 0, 0, MARK),     // ld mark
        op(0x15, 0, 1, mark),     // jeq, else drop
        op(0x06, 0, 0, u32::MAX), // pass
        op(0x06, 0, 0, 0),        // drop
    ]
}

/// The tokens of one network namespace.
pub struct Tokens {
    raw: Raw,
    /// Listens on [`FAR_PORT`] of all tokens and answers nobody.
    _hold: OwnedFd,
    /// On every packet of ours to a program's token.
    mark: u32,
}

fn stream() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Inet, SockType::Stream, flags, SockProtocol::Tcp)
}

/// Shares the port with the holding listener.
fn shared(socket: &OwnedFd) -> nix::Result<()> {
    setsockopt(socket, sockopt::ReuseAddr, &true)?;
    setsockopt(socket, sockopt::ReusePort, &true)
}

fn at(ip: Ipv4Addr, port: u16) -> SockaddrIn {
    SocketAddrV4::new(ip, port).into()
}

impl Tokens {
    /// Begins to hold. Must run as the user that later opens: a shared port belongs to one user.
    pub fn new(raw: Raw) -> io::Result<Self> {
        let hold = stream()?;
        shared(&hold)?;
        // `r0 = 0; exit`
        let nothing = load_filter(&[[0xb7, 0, 0, 0, 0, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]])?;
        sock::attach_and_lock(hold.as_fd(), nothing.as_fd()).map_err(io::Error::other)?;
        bind(hold.as_raw_fd(), &at(Ipv4Addr::UNSPECIFIED, FAR_PORT))?;
        listen(&hold, Backlog::new(1)?)?;
        let mark = loop {
            match random()? {
                0 => {}
                mark => break mark,
            }
        };
        Ok(Self { raw, _hold: hold, mark })
    }

    /// A token that stands for nothing yet; random, so that none is used again soon (TIME_WAIT).
    pub fn new_token(&self) -> io::Result<Ipv4Addr> {
        loop {
            let token = Ipv4Addr::from(NET | random()? & !MASK);
            if !matches!(token.octets(), [.., 0 | 255]) {
                return Ok(token);
            }
        }
    }

    /// SYNs that arrived; readable when [`Self::as_fd`] is.
    pub fn held(&self) -> Vec<Syn> {
        let mut found = Vec::new();
        let mut packet = [0; 128];
        while let Ok(length) = recv(self.raw.sniff.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) {
            found.extend(packet.get(..length).and_then(read_syn));
        }
        found
    }

    /// Begins to connect from the token to the program whose SYN is held. The caller waits until the socket
    /// is writable, and makes sure that it is the right program before a byte passes.
    pub fn open(&self, syn: &Syn) -> io::Result<OwnedFd> {
        let near = stream()?;
        shared(&near)?;
        bind(near.as_raw_fd(), &at(syn.token, FAR_PORT))?;
        begin(&near, syn.from)?;
        Ok(near)
    }

    /// Lets only the key daemon connect to a program's socket, for good.
    pub fn lock(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        sock::attach_classic(socket, &mut marked(self.mark))?;
        sock::lock_filter(socket)
    }

    /// Begins to connect to a program's listener on a token, from another token, whose address is returned
    /// too. A full backlog delays it.
    pub fn deliver(&self, to: Ipv4Addr) -> io::Result<(OwnedFd, SocketAddrV4)> {
        let near = stream()?;
        setsockopt(&near, sockopt::Mark, &self.mark)?;
        bind(near.as_raw_fd(), &at(self.new_token()?, 0))?;
        begin(&near, SocketAddrV4::new(to, NEAR_PORT))?;
        let from: SockaddrIn = nix::sys::socket::getsockname(near.as_raw_fd())?;
        Ok((near, from.into()))
    }

    /// Fails a held connection with the errno of a native one, as far as packets can say it.
    pub fn fail(&self, syn: &Syn, errno: i32) -> io::Result<()> {
        const NET_UNREACHABLE: u8 = 0; // RFC 792
        const HOST_UNREACHABLE: u8 = 1;
        let packet = match errno {
            libc::ENETUNREACH => unreachable(syn, NET_UNREACHABLE),
            libc::EHOSTUNREACH | libc::ETIMEDOUT => unreachable(syn, HOST_UNREACHABLE),
            _ => reset(syn),
        };
        let to = at(*syn.from.ip(), 0);
        sendto(self.raw.send.as_raw_fd(), &packet, &to, MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }
}

impl AsFd for Tokens {
    /// Readable when a SYN is held.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.raw.sniff.as_fd()
    }
}

fn begin(near: &OwnedFd, to: SocketAddrV4) -> io::Result<()> {
    setsockopt(near, sockopt::TcpNoDelay, &true)?;
    match connect(near.as_raw_fd(), &SockaddrIn::from(to)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn random() -> io::Result<u32> {
    let mut bytes = [0; 4];
    SystemRandom::new().fill(&mut bytes).map_err(|_| io::ErrorKind::Other)?;
    Ok(u32::from_ne_bytes(bytes))
}

fn read_syn(packet: &[u8]) -> Option<Syn> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let ip = |from: usize| packet.get(from..from + 4)?.try_into().ok().map(|b: [u8; 4]| Ipv4Addr::from(b));
    let tcp = packet.get(header..)?;
    let from = SocketAddrV4::new(ip(12)?, u16::from_be_bytes(*tcp.first_chunk()?));
    let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
    Some(Syn { from, token: ip(16)?, sequence, head: packet.get(..header + 8)?.to_vec() })
}

/// Internet checksum (RFC 1071).
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes: Vec<u8> = parts.concat();
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| {
            u32::from(u16::from_be_bytes([
                pair.first().copied().unwrap_or(0),
                pair.get(1).copied().unwrap_or(0),
            ]))
        })
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let [.., high, low] = (!(folded + (folded >> 16))).to_be_bytes();
    [high, low]
}

/// An IPv4 header (RFC 791, 3.1); length, identification and checksum are the kernel's (raw(7)).
fn from_token(syn: &Syn, protocol: u8) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
    header.extend(syn.token.octets());
    header.extend(syn.from.ip().octets());
    header
}

/// RST with ACK of the SYN (RFC 9293, 3.10.7.1).
fn reset(syn: &Syn) -> Vec<u8> {
    const TCP: u8 = 6;
    const LENGTH: u8 = 20;
    let mut tcp = FAR_PORT.to_be_bytes().to_vec();
    tcp.extend(syn.from.port().to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend(syn.sequence.wrapping_add(1).to_be_bytes());
    tcp.extend([0x50, 0x14, 0, 0]); // 20 bytes, RST and ACK, no window
    let pseudo = [&syn.token.octets()[..], &syn.from.ip().octets(), &[0, TCP, 0, LENGTH]].concat();
    let sum = checksum(&[&pseudo, &tcp, &[0; 4]]);
    tcp.extend(sum);
    tcp.extend([0; 2]);
    [from_token(syn, TCP), tcp].concat()
}

/// Destination unreachable (RFC 792).
fn unreachable(syn: &Syn, code: u8) -> Vec<u8> {
    const ICMP: u8 = 1;
    const UNREACHABLE: u8 = 3;
    let sum = checksum(&[&[UNREACHABLE, code, 0, 0, 0, 0, 0, 0], &syn.head]);
    let icmp = [&[UNREACHABLE, code], &sum[..], &[0; 4], &syn.head].concat();
    [from_token(syn, ICMP), icmp].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_rfc() {
        // RFC 1071, 3: the sum of these is ddf2.
        assert_eq!(
            checksum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]),
            (!0xddf2_u16).to_be_bytes()
        );
        assert_eq!(checksum(&[&[0xff], &[0xff, 0xff]]), [0x00, 0xff]);
    }

    #[test]
    fn a_syn_is_read_and_what_is_cut_off_is_not() {
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 127, 64, 1, 2];
        packet.extend([0x9c, 0x40, 0xee, 0x48, 0, 0, 0, 7, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0]);
        let syn = read_syn(&packet).unwrap();
        assert_eq!(
            (syn.from.to_string().as_str(), syn.token),
            ("10.0.0.1:40000", Ipv4Addr::new(127, 64, 1, 2))
        );
        assert_eq!((syn.sequence, syn.head.len()), (7, 28));
        for cut in 0..28 {
            assert!(read_syn(&packet[..cut]).is_none());
        }
        let answer = reset(&syn);
        assert_eq!(answer.len(), 40);
        assert_eq!(&answer[28..32], &8_u32.to_be_bytes(), "acknowledges the SYN");
        assert_eq!(unreachable(&syn, 1).len(), 20 + 8 + 28);
    }
}
