//! Packets to and from tokens: which SYNs are seen, and the answers that end them. Pure.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use libc::sock_filter;
use portcullis_wire::Family;

use crate::asm::{Assembly, If, JumpError, Label, R, Width};

/// Tokens of IPv4 are in 127.64.0.0/10.
pub const NET: u32 = 0x7f40_0000;
/// Its mask.
pub const MASK: u32 = 0xffc0_0000;
/// Port of IPv4 tokens that stand for a far side: one that IANA gives to nobody, and below those that any user may
/// bind (ip(7), ip_unprivileged_port_start). Nobody keeps it from us, or answers there once we are dead.
pub const FAR_PORT: u16 = 1023;
/// IPv6 has one loopback address, so its tokens differ by port: this one and those above.
pub const FIRST_SIX: u16 = 61002;

/// A held SYN.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Syn {
    /// The program's own address.
    pub from: SocketAddr,
    /// The token.
    pub token: SocketAddr,
    /// Its sequence number.
    sequence: u32,
    /// IP header and the first 8 bytes of TCP, which ICMP repeats.
    head: Vec<u8>,
}

const TCP: u8 = 6;

const fn op(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Length of what [`held`] reports: family, ports and sequence number as they were in the packet, nothing, addresses.
pub const REPORT: usize = 48;

/// For what listens at tokens: nobody is answered, and each SYN without ACK is reported to a ring. The TCP header is at 0.
pub fn held(ring: i32) -> Result<Vec<[u8; 8]>, JumpError> {
    use Width::{B, D, W};
    // Helpers (linux/bpf.h, bpf_func_id).
    const OUTPUT: i32 = 130;
    const SYN: i32 = 0x02;
    const SYN_ACK: i32 = 0x12;
    // The stack, downward from r10.
    const EVENT: i16 = -48;
    const FLAGS: i16 = EVENT - 8;
    let [r0, r1, r2, r3, r4, r6, fp] = [0, 1, 2, 3, 4, 6, 10].map(R);
    let mut asm = Assembly::default();
    let [v6, report, drop]: [Label; 3] = std::array::from_fn(|_| asm.label());
    asm.copy(r6, r1);
    for word in 0..6 {
        asm.store_imm(D, fp, EVENT + 8 * word, 0);
    }
    load_bytes(&mut asm, Header::Transport, 13, FLAGS, 1, drop);
    asm.load(B, r1, fp, FLAGS);
    asm.and(r1, SYN_ACK);
    asm.jump_if(If::Unequal, r1, SYN, drop);
    load_bytes(&mut asm, Header::Transport, 0, EVENT + 4, 8, drop);
    asm.load(W, r1, r6, PROTOCOL);
    asm.jump_if(If::Unequal, r1, IPV4, v6);
    asm.store_imm(W, fp, EVENT, Family::V4 as i32);
    load_bytes(&mut asm, Header::Network, 12, EVENT + 16, 4, drop);
    load_bytes(&mut asm, Header::Network, 16, EVENT + 32, 4, drop);
    // Other addresses of this host are no tokens, and other hosts reach them.
    asm.load(W, r1, fp, EVENT + 32);
    asm.and(r1, MASK.to_be().cast_signed());
    asm.jump_if(If::Unequal, r1, NET.to_be().cast_signed(), drop);
    asm.jump(report);
    asm.here(v6);
    asm.store_imm(W, fp, EVENT, Family::V6 as i32);
    load_bytes(&mut asm, Header::Network, 8, EVENT + 16, 16, drop);
    load_bytes(&mut asm, Header::Network, 24, EVENT + 32, 16, drop);
    asm.here(report);
    asm.map(r1, ring);
    asm.copy(r2, fp);
    asm.add(r2, EVENT.into());
    asm.set(r3, -i32::from(EVENT));
    asm.set(r4, 0);
    asm.call(OUTPUT);
    asm.here(drop);
    asm.set(r0, 0);
    asm.exit();
    asm.finish()
}

/// Of `struct __sk_buff`.
const MARK_OF: i16 = 8;
const PROTOCOL: i16 = 16;
/// As PROTOCOL has it, in network byte order.
const IPV4: i32 = 0x0800_u16.to_be() as i32;

/// What an offset counts from.
enum Header {
    Transport,
    Network,
}

/// Copies bytes of a packet, whose context is in r6, to the stack; r0 to r5 are lost.
fn load_bytes(asm: &mut Assembly, from: Header, offset: i32, to: i16, length: i32, or: Label) {
    // Helpers (linux/bpf.h, bpf_func_id).
    const LOAD: i32 = 26;
    const LOAD_RELATIVE: i32 = 68;
    const FROM_IP_HEADER: i32 = 1; // BPF_HDR_START_NET
    let [r0, r1, r2, r3, r4, r5, r6, fp] = [0, 1, 2, 3, 4, 5, 6, 10].map(R);
    asm.copy(r1, r6);
    asm.set(r2, offset);
    asm.copy(r3, fp);
    asm.add(r3, to.into());
    asm.set(r4, length);
    asm.set(r5, FROM_IP_HEADER);
    asm.call(match from {
        Header::Transport => LOAD,
        Header::Network => LOAD_RELATIVE,
    });
    asm.jump_if(If::Unequal, r0, 0, or);
}

/// For programs' own sockets: of what comes from a token, only the key daemon may begin a connection (its packets carry
/// `mark`, which takes CAP_NET_ADMIN). All else passes, an RST too. One program serves them all, since each socket hears
/// nobody but the token that it went to. The TCP header is at 0.
pub fn only_ours(mark: u32) -> Result<Vec<[u8; 8]>, JumpError> {
    use Width::{B, D, H, W};
    const SYN: i32 = 0x02;
    // The stack, downward from r10.
    const SOURCE: i16 = -16;
    const FLAGS: i16 = -24;
    const PORT: i16 = -32;
    let [r0, r1, r2, r6, fp] = [0, 1, 2, 6, 10].map(R);
    let mut asm = Assembly::default();
    let [v6, drop, pass]: [Label; 3] = std::array::from_fn(|_| asm.label());
    asm.copy(r6, r1);
    asm.load(W, r1, r6, MARK_OF);
    asm.set64(r2, mark.into());
    asm.sub(r1, r2);
    asm.jump_if(If::Equal, r1, 0, pass);
    load_bytes(&mut asm, Header::Transport, 13, FLAGS, 1, drop);
    asm.load(B, r1, fp, FLAGS);
    asm.and(r1, SYN);
    asm.jump_if(If::Equal, r1, 0, pass);
    load_bytes(&mut asm, Header::Transport, 0, PORT, 2, drop);
    asm.load(W, r1, r6, PROTOCOL);
    asm.jump_if(If::Unequal, r1, IPV4, v6);
    load_bytes(&mut asm, Header::Network, 12, SOURCE, 4, drop);
    asm.load(W, r1, fp, SOURCE);
    asm.and(r1, MASK.to_be().cast_signed());
    asm.jump_if(If::Unequal, r1, NET.to_be().cast_signed(), pass);
    asm.load(H, r1, fp, PORT);
    asm.jump_if(If::Equal, r1, FAR_PORT.to_be().into(), drop);
    asm.jump(pass);

    asm.here(v6);
    load_bytes(&mut asm, Header::Network, 8, SOURCE, 16, drop);
    asm.load(D, r1, fp, SOURCE);
    asm.jump_if(If::Unequal, r1, 0, pass);
    asm.load(D, r1, fp, SOURCE + 8);
    asm.set64(r2, 1_u64.to_be());
    asm.sub(r1, r2);
    asm.jump_if(If::Unequal, r1, 0, pass);
    asm.load(H, r1, fp, PORT);
    asm.host_order16(r1);
    asm.set(r2, FIRST_SIX.into());
    asm.jump_if_above(r2, r1, pass);
    asm.here(drop);
    asm.set(r0, 0);
    asm.exit();
    asm.here(pass);
    asm.set(r0, -1);
    asm.exit();
    asm.finish()
}

/// Classic BPF over sock_diag(7)'s news of a socket's end (`struct nlmsghdr`, then `struct inet_diag_msg`): listeners,
/// which have no far port, and sockets that went to a token. All others of the host would wake us for nothing.
pub fn deaths() -> [sock_filter; 7] {
    [
        op(0x28, 0, 0, 16 + 6),          // ldh id.idiag_dport
        op(0x15, 3, 0, 0),               // jeq
        op(0x15, 2, 0, FAR_PORT as u32), // jeq
        op(0x20, 0, 0, 16 + 36),         // ld id.idiag_dst[3], 1 in ::1; IPv4 has nothing there
        op(0x15, 0, 1, 1),               // jeq
        op(0x06, 0, 0, u32::MAX),        // pass
        op(0x06, 0, 0, 0),               // drop
    ]
}

/// Reads a report of [`held`].
pub fn read_held(report: &[u8; REPORT]) -> Option<Syn> {
    let ports_and_sequence: [u8; 8] = report.get(4..)?.first_chunk().copied()?;
    let [s0, s1, d0, d1, sequence @ ..] = ports_and_sequence;
    let address = |at: usize| -> Option<IpAddr> {
        let bytes: [u8; 16] = report.get(at..)?.first_chunk().copied()?;
        let [a, b, c, d, ..] = bytes;
        Some(if report.first() == Some(&(Family::V4 as u8)) {
            IpAddr::from([a, b, c, d])
        } else {
            IpAddr::from(bytes)
        })
    };
    let from = SocketAddr::new(address(16)?, u16::from_be_bytes([s0, s1]));
    let token = SocketAddr::new(address(32)?, u16::from_be_bytes([d0, d1]));
    let mut head = match (from.ip(), token.ip()) {
        (IpAddr::V6(from), IpAddr::V6(token)) => header_six(from.into(), token.into(), TCP, 20),
        (from, token) => header_four(from, token, TCP),
    };
    head.extend(ports_and_sequence);
    Some(Syn { from, token, sequence: u32::from_be_bytes(sequence), head })
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

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// An IPv4 header (RFC 791, 3.1); length, identification and checksum are the kernel's (raw(7)).
fn header_four(from: IpAddr, to: IpAddr, protocol: u8) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
    header.extend(octets(from));
    header.extend(octets(to));
    header
}

/// An IPv6 header (RFC 8200, 3).
fn header_six(from: IpAddr, to: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let [high, low] = u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
    let mut header = vec![0x60, 0, 0, 0, high, low, protocol, 64];
    header.extend(octets(from));
    header.extend(octets(to));
    header
}

/// A packet from the token to the program; the checksum, over a pseudo header too where the protocol has one, is
/// at `sum` of the payload.
fn answer(syn: &Syn, protocol: u8, mut payload: Vec<u8>, sum: usize, pseudo: bool) -> Vec<u8> {
    let (from, to) = (syn.token.ip(), syn.from.ip());
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    // RFC 9293, 3.1 and RFC 8200, 8.1: the two forms add up alike.
    let pseudo =
        if pseudo { [octets(from), octets(to), length.to_vec(), vec![0, protocol]].concat() } else { vec![] };
    let value = checksum(&[&pseudo, &payload]);
    if let Some(place) = payload.get_mut(sum..sum + 2) {
        place.copy_from_slice(&value);
    }
    let mut packet = match from {
        IpAddr::V4(_) => header_four(from, to, protocol),
        IpAddr::V6(_) => header_six(from, to, protocol, payload.len()),
    };
    packet.append(&mut payload);
    packet
}

/// RST with ACK of the SYN (RFC 9293, 3.10.7.1).
pub fn reset(syn: &Syn) -> Vec<u8> {
    let mut tcp = syn.token.port().to_be_bytes().to_vec();
    tcp.extend(syn.from.port().to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend(syn.sequence.wrapping_add(1).to_be_bytes());
    tcp.extend([0x50, 0x14, 0, 0]); // 20 bytes, RST and ACK, no window
    tcp.extend([0; 4]);
    answer(syn, TCP, tcp, 16, true)
}

/// What the network says is out of reach.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Unreachable {
    Net,
    Host,
}

/// Destination unreachable (RFC 792; RFC 4443, 3.1).
pub fn unreachable(syn: &Syn, what: Unreachable) -> Vec<u8> {
    const ICMP: u8 = 1;
    const ICMP_SIX: u8 = 58;
    let six = syn.token.is_ipv6();
    let (protocol, kind, code) = match (six, what) {
        (false, Unreachable::Net) => (ICMP, 3, 0),
        (false, Unreachable::Host) => (ICMP, 3, 1),
        (true, Unreachable::Net) => (ICMP_SIX, 1, 0), // no route
        (true, Unreachable::Host) => (ICMP_SIX, 1, 3),
    };
    let message = [&[kind, code, 0, 0, 0, 0, 0, 0], &syn.head[..]].concat();
    answer(syn, protocol, message, 2, six)
}

/// The IPv4 token of a number.
pub fn token(random: u32) -> Option<Ipv4Addr> {
    let token = Ipv4Addr::from(NET | random & !MASK);
    (!matches!(token.octets(), [.., 0 | 255])).then_some(token)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

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

    fn report(family: Family, from: &[u8], token: &[u8]) -> [u8; REPORT] {
        let mut report = [0; REPORT];
        report[0] = family as u8;
        report[4..12].copy_from_slice(&[0x9c, 0x40, 0xee, 0x48, 0, 0, 0, 7]);
        report[16..16 + from.len()].copy_from_slice(from);
        report[32..32 + token.len()].copy_from_slice(token);
        report
    }

    #[test]
    fn a_syn_is_read_and_answered() {
        let syn = read_held(&report(Family::V4, &[10, 0, 0, 1], &[127, 64, 1, 2])).unwrap();
        let (from, token) = (syn.from.to_string(), syn.token.to_string());
        assert_eq!((from.as_str(), token.as_str()), ("10.0.0.1:40000", "127.64.1.2:61000"));
        assert_eq!((syn.sequence, syn.head.len()), (7, 28));
        let answer = reset(&syn);
        assert_eq!(answer.len(), 40);
        assert_eq!(&answer[28..32], &8_u32.to_be_bytes(), "acknowledges the SYN");
        assert_eq!(unreachable(&syn, Unreachable::Host).len(), 20 + 8 + 28);
    }

    #[test]
    fn a_syn_of_ipv6_is_read_and_answered_with_sums_that_add_up() {
        let from: Ipv6Addr = "2001:db8::5".parse().unwrap();
        let syn = read_held(&report(Family::V6, &from.octets(), &Ipv6Addr::LOCALHOST.octets())).unwrap();
        assert_eq!((syn.token.to_string().as_str(), syn.head.len()), ("[::1]:61000", 48));
        for (packet, protocol) in [(reset(&syn), TCP), (unreachable(&syn, Unreachable::Net), 58)] {
            let length = u32::try_from(packet.len() - 40).unwrap().to_be_bytes();
            let sum = checksum(&[&packet[8..40], &length, &[0, 0, 0, protocol], &packet[40..]]);
            assert_eq!(sum, [0, 0], "the receiver's check of {protocol}");
        }
    }
}
