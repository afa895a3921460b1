//! The receive filter of a datagram socket, as a classic BPF program. Pure.
//!
//! Passed are datagrams from the peers that the socket has sent to (address and port), and from the
//! nets that rules let in. All others the kernel drops before they wake anyone.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use libc::sock_filter;

/// Most instructions of one program (`BPF_MAXINSNS`, linux/bpf_common.h).
pub const MOST: usize = 4096;
/// Most peers that are remembered for one socket.
pub const PEERS: usize = 256;

/// Where the network header begins for absolute loads (`SKF_NET_OFF`, linux/filter.h).
const NET: u32 = 0xfff0_0000;
const LD_W: u16 = 0x20;
const LD_H: u16 = 0x28;
const LD_B: u16 = 0x30;
const JEQ: u16 = 0x15;
const JGE: u16 = 0x35;
const JGT: u16 = 0x25;
const JA: u16 = 0x05;
const AND: u16 = 0x54;
const RSH: u16 = 0x74;
const RET: u16 = 0x06;

const PASS: sock_filter = sock_filter { code: RET, jt: 0, jf: 0, k: u32::MAX };
const DROP: sock_filter = sock_filter { code: RET, jt: 0, jf: 0, k: 0 };

const fn plain(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// Whom a socket hears.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Heard {
    /// Peers that were sent to. Port 0 stands for any.
    pub peers: Vec<SocketAddr>,
    /// Nets and source ports (both ends inclusive) that rules let in.
    pub nets: Vec<(IpNet, u16, u16)>,
}

/// Compiles it. `None`: it does not fit, so the shim must ask about each sender.
#[must_use]
pub fn compile(heard: &Heard) -> Option<Vec<sock_filter>> {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for peer in &heard.peers {
        let net = IpNet::from(peer.ip().to_canonical());
        let (low, high) = if peer.port() == 0 { (0, u16::MAX) } else { (peer.port(), peer.port()) };
        one(net, low, high, if net.addr().is_ipv4() { &mut v4 } else { &mut v6 })?;
    }
    for (net, low, high) in &heard.nets {
        one(*net, *low, *high, if net.addr().is_ipv4() { &mut v4 } else { &mut v6 })?;
    }
    v4.push(DROP);
    v6.push(DROP);
    let mut program = vec![
        plain(LD_B, NET), // version and header length (RFC 791, 3.1), version and class (RFC 8200, 3)
        plain(RSH, 4),
        sock_filter { code: JEQ, jt: 1, jf: 0, k: 4 },
        plain(JA, u32::try_from(v4.len()).ok()?),
    ];
    program.append(&mut v4);
    program.append(&mut v6);
    (program.len() <= MOST).then_some(program)
}

/// Appends one block: falls through to what follows it unless source net and port match.
fn one(net: IpNet, low: u16, high: u16, into: &mut Vec<sock_filter>) -> Option<()> {
    // Source addresses: at 12 in IPv4 (RFC 791, 3.1), at 8 in IPv6 (RFC 8200, 3).
    let (at, words): (u32, Vec<(u32, u32)>) = match net.addr() {
        IpAddr::V4(_) => {
            let (IpAddr::V4(ip), IpAddr::V4(mask)) = (net.network(), net.netmask()) else { return None };
            (12, vec![(ip.to_bits(), mask.to_bits())])
        }
        IpAddr::V6(_) => {
            let (IpAddr::V6(ip), IpAddr::V6(mask)) = (net.network(), net.netmask()) else { return None };
            let split = |bits: u128| {
                let bytes = bits.to_be_bytes();
                let mut words = [0u32; 4];
                for (word, four) in words.iter_mut().zip(bytes.chunks_exact(4)) {
                    *word = four.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte));
                }
                words
            };
            (8, split(ip.to_bits()).into_iter().zip(split(mask.to_bits())).collect())
        }
    };
    let mut block = Vec::with_capacity(16);
    let mut tests = Vec::new();
    for (i, (word, mask)) in (0u32..).zip(words).filter(|(_, (_, mask))| *mask != 0) {
        block.push(plain(LD_W, NET + at + 4 * i));
        if mask != u32::MAX {
            block.push(plain(AND, mask));
        }
        tests.push(block.len());
        block.push(plain(JEQ, word));
    }
    if (low, high) != (0, u16::MAX) {
        block.push(plain(LD_H, 0)); // source port (RFC 768)
        if low == high {
            tests.push(block.len());
            block.push(plain(JEQ, u32::from(low)));
        } else {
            tests.push(block.len());
            block.push(plain(JGE, u32::from(low)));
            block.push(plain(JGT, u32::from(high))); // beyond: over PASS
        }
    }
    block.push(PASS);
    let end = block.len();
    for at in tests {
        if let Some(test) = block.get_mut(at) {
            test.jf = u8::try_from(end - at - 1).ok()?;
        }
    }
    if let Some(beyond) = block.iter_mut().find(|i| i.code == JGT) {
        beyond.jt = 1;
    }
    into.append(&mut block);
    Some(())
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsFd, time::Duration};

    use super::*;
    use crate::sys::socket::{attach_filter, detach_filter};

    /// Whether `at` hears a datagram from `from`, which may take a while where the machine has other things to do.
    fn hears(at: &UdpSocket, from: &UdpSocket) -> bool {
        hears_within(at, from, Duration::from_secs(20))
    }

    fn is_deaf_to(at: &UdpSocket, from: &UdpSocket) -> bool {
        !hears_within(at, from, Duration::from_millis(50))
    }

    fn hears_within(at: &UdpSocket, from: &UdpSocket, time: Duration) -> bool {
        let mut to = at.local_addr().unwrap();
        if to.ip().is_unspecified() {
            to.set_ip(from.local_addr().unwrap().ip());
        }
        from.send_to(b"x", to).unwrap();
        at.set_read_timeout(Some(time)).unwrap();
        at.recv_from(&mut [0; 8]).is_ok()
    }

    #[test]
    fn only_peers_that_were_asked_are_heard() {
        for here in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let socket = UdpSocket::bind(here).unwrap();
            let far = if here.starts_with("127") { "127.0.0.1:0" } else { "[::1]:0" };
            let (asked, other) = (UdpSocket::bind(far).unwrap(), UdpSocket::bind(far).unwrap());
            let heard = Heard { peers: vec![asked.local_addr().unwrap()], nets: vec![] };
            attach_filter(socket.as_fd(), &compile(&heard).unwrap()).unwrap();
            assert!(hears(&socket, &asked), "{here}");
            assert!(is_deaf_to(&socket, &other), "{here}");
            detach_filter(socket.as_fd());
            assert!(hears(&socket, &other), "{here}");
        }
    }

    #[test]
    fn nets_and_ports_of_rules_are_heard() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (near, far) = (UdpSocket::bind("127.1.2.3:0").unwrap(), UdpSocket::bind("127.2.2.3:0").unwrap());
        let port = near.local_addr().unwrap().port();
        let net =
            |low, high| Heard { peers: vec![], nets: vec![("127.1.0.0/16".parse().unwrap(), low, high)] };
        let put = |heard| attach_filter(socket.as_fd(), &compile(&heard).unwrap()).unwrap();
        put(net(0, u16::MAX));
        assert!(hears(&socket, &near) && is_deaf_to(&socket, &far));
        put(net(1, port - 1));
        assert!(is_deaf_to(&socket, &near));
        put(net(port - 1, port));
        assert!(hears(&socket, &near));
        put(net(port + 1, u16::MAX));
        assert!(is_deaf_to(&socket, &near));
    }

    #[test]
    fn all_remembered_peers_fit_and_too_many_nets_do_not() {
        let peer = |i: u16| SocketAddr::from(([0x20, 1, 0xd, 0xb8, 0, 0, 0, i], 53));
        let peers: Vec<_> = (0..u16::try_from(PEERS).unwrap()).map(peer).collect();
        let program = compile(&Heard { peers, nets: vec![] }).unwrap();
        let socket = UdpSocket::bind("[::1]:0").unwrap();
        attach_filter(socket.as_fd(), &program).unwrap();
        let nets = (0..2000u32).map(|i| (IpNet::from(IpAddr::V4(i.into())), 0, u16::MAX)).collect();
        assert!(compile(&Heard { peers: vec![], nets }).is_none());
    }
}
