//! What a held system call asks for. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use portcullis_guard::listener::Notification;
use portcullis_types::Protocol;
use portcullis_wire::{Addr, addr::Family};

/// Longest address that the kernel takes (`sizeof(struct sockaddr_storage)`, socket(7)).
pub const ADDRESS: usize = 128;
/// Most messages of one sendmmsg(2) (`UIO_MAXIOV`).
pub const MESSAGES: u64 = 1024;

/// Memory of the caller.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Span {
    /// Where.
    pub at: u64,
    /// How long, as the caller says.
    pub length: u64,
}

/// What is asked, with arguments as the kernel reads them: `int` is the low half of a register.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Asked {
    /// socket(2).
    Socket { domain: i32, kind: i32, protocol: i32 },
    /// connect(2).
    Connect { fd: i32, address: Span },
    /// bind(2).
    Bind { fd: i32, address: Span },
    /// listen(2).
    Listen { fd: i32, backlog: i32 },
    /// accept(2), accept4(2); `name` is where the peer's address goes, `length` its length.
    Accept { fd: i32, name: u64, length: u64, flags: i32 },
    /// sendto(2).
    SendTo { fd: i32, flags: i32, data: Span, address: Span },
    /// sendmsg(2); `at` is a `struct msghdr`.
    SendMessage { fd: i32, flags: i32, at: u64 },
    /// sendmmsg(2); `at` are `count` of `struct mmsghdr`.
    SendMessages { fd: i32, flags: i32, at: u64, count: u64 },
    /// ptrace(2).
    Trace { request: i64, pid: i32 },
    /// process_vm_readv(2), process_vm_writev(2).
    Memory { pid: i32 },
    /// pidfd_getfd(2).
    TakeDescriptor { pidfd: i32, number: i32 },
    /// A signal that ends or stops.
    Signal(To),
    /// prlimit(2).
    Limit { pid: i32 },
    /// landlock_create_ruleset(2).
    Landlock { attributes: Span, flags: u64 },
    /// A call that the filter's table does not have.
    Unknown,
}

/// Whom a signal is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum To {
    /// A process, by it or one of its threads.
    Process(i32),
    /// A process group; none is the sender's own.
    Group(Option<i32>),
    /// All that the sender may send to.
    All,
    /// Whom a descriptor stands for.
    Pidfd(i32),
    /// The process group whose leader a descriptor stands for.
    PidfdsGroup(i32),
    /// Who owns a descriptor when something happens to it (fcntl(2), `F_SETSIG`).
    Owner,
}

/// `PIDFD_SIGNAL_PROCESS_GROUP` (linux/pidfd.h).
const PROCESS_GROUP: u64 = 1 << 2;

/// Reads a notification.
#[must_use]
pub fn asked(call: &Notification) -> Asked {
    let [a, b, c, d, e, f] = call.args;
    let int = |word: u64| {
        let [w, x, y, z, ..] = word.to_le_bytes();
        i32::from_le_bytes([w, x, y, z])
    };
    // The kernel takes lengths as int too; what is negative there is as wrong as what is too long.
    let span = |at: u64, length: u64| Span { at, length: u64::from(int(length).cast_unsigned()) };
    match i64::from(call.nr) {
        libc::SYS_socket => Asked::Socket { domain: int(a), kind: int(b), protocol: int(c) },
        libc::SYS_connect => Asked::Connect { fd: int(a), address: span(b, c) },
        libc::SYS_bind => Asked::Bind { fd: int(a), address: span(b, c) },
        libc::SYS_listen => Asked::Listen { fd: int(a), backlog: int(b) },
        libc::SYS_accept => Asked::Accept { fd: int(a), name: b, length: c, flags: 0 },
        libc::SYS_accept4 => Asked::Accept { fd: int(a), name: b, length: c, flags: int(d) },
        libc::SYS_sendto => {
            let data = Span { at: b, length: c };
            // sendmsg(2), which sends it, knows one flag more (MSG_CMSG_COMPAT, linux/socket.h), as an error.
            let flags = int(d) & i32::MAX;
            Asked::SendTo { fd: int(a), flags, data, address: span(e, f) }
        }
        libc::SYS_sendmsg => Asked::SendMessage { fd: int(a), flags: int(c), at: b },
        libc::SYS_sendmmsg => Asked::SendMessages {
            fd: int(a),
            flags: int(d),
            at: b,
            count: u64::from(int(c).cast_unsigned()).min(MESSAGES),
        },
        libc::SYS_ptrace => Asked::Trace { request: a.cast_signed(), pid: int(b) },
        libc::SYS_process_vm_readv | libc::SYS_process_vm_writev => Asked::Memory { pid: int(a) },
        libc::SYS_pidfd_getfd => Asked::TakeDescriptor { pidfd: int(a), number: int(b) },
        libc::SYS_kill => Asked::Signal(match int(a) {
            -1 => To::All,
            0 => To::Group(None),
            group @ ..0 => To::Group(Some(group.wrapping_neg())),
            pid => To::Process(pid),
        }),
        libc::SYS_tkill | libc::SYS_rt_sigqueueinfo => Asked::Signal(To::Process(int(a))),
        libc::SYS_tgkill | libc::SYS_rt_tgsigqueueinfo => Asked::Signal(To::Process(int(b))),
        libc::SYS_pidfd_send_signal if d & PROCESS_GROUP == 0 => Asked::Signal(To::Pidfd(int(a))),
        libc::SYS_pidfd_send_signal => Asked::Signal(To::PidfdsGroup(int(a))),
        libc::SYS_fcntl => Asked::Signal(To::Owner),
        libc::SYS_prlimit64 => Asked::Limit { pid: int(a) },
        libc::SYS_landlock_create_ruleset => {
            Asked::Landlock { attributes: Span { at: a, length: b }, flags: c }
        }
        _ => Asked::Unknown,
    }
}

/// What an address means for an internet socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Named {
    /// This; v4-mapped as it was given.
    Address(SocketAddr),
    /// `AF_UNSPEC`: disconnect, or, for some calls, `AF_INET` (see [`unspecified_as_v4`]).
    Unspecified,
    /// Something that an internet socket does not take: the kernel will say so itself.
    Nothing,
}

/// Reads a `struct sockaddr`.
#[must_use]
pub fn address(bytes: &[u8]) -> Named {
    let Some((family, rest)) = bytes.split_first_chunk() else { return Named::Nothing };
    match i32::from(u16::from_ne_bytes(*family)) {
        libc::AF_INET => v4(rest).map_or(Named::Nothing, Named::Address),
        libc::AF_INET6 => v6(rest).map_or(Named::Nothing, Named::Address),
        libc::AF_UNSPEC => Named::Unspecified,
        _ => Named::Nothing,
    }
}

/// sendto(2) on an `AF_INET` socket and bind(2) take `AF_UNSPEC` for `AF_INET` (net/ipv4/udp.c,
/// `udp_sendmsg`; net/ipv4/af_inet.c, `__inet_bind`).
#[must_use]
pub fn unspecified_as_v4(bytes: &[u8]) -> Option<SocketAddr> {
    bytes.get(2..).and_then(v4)
}

fn v4(rest: &[u8]) -> Option<SocketAddr> {
    let (port, rest) = rest.split_first_chunk()?;
    let (ip, _) = rest.split_first_chunk::<4>()?;
    Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(*ip)), u16::from_be_bytes(*port)))
}

fn v6(rest: &[u8]) -> Option<SocketAddr> {
    let (port, rest) = rest.split_first_chunk()?;
    let (flow, rest) = rest.split_first_chunk()?;
    let (ip, rest) = rest.split_first_chunk::<16>()?;
    // RFC 2133 addresses end before the scope (`SIN6_LEN_RFC2133`).
    let scope = rest.first_chunk().map_or(0, |scope| u32::from_ne_bytes(*scope));
    let (ip, port) = (Ipv6Addr::from(*ip), u16::from_be_bytes(*port));
    Some(SocketAddr::V6(SocketAddrV6::new(ip, port, u32::from_be_bytes(*flow), scope)))
}

/// A `struct sockaddr` of an address.
#[must_use]
pub fn bytes_of(addr: &Addr) -> Vec<u8> {
    let six = addr.family == Family::V6 as u8;
    let family = u16::try_from(if six { libc::AF_INET6 } else { libc::AF_INET }).unwrap_or(0);
    let mut bytes = family.to_ne_bytes().to_vec();
    bytes.extend(addr.port.to_be_bytes());
    if six {
        bytes.extend(addr.flow.to_ne_bytes());
        bytes.extend(addr.ip);
        bytes.extend(addr.scope.to_ne_bytes());
    } else {
        bytes.extend(addr.ip.iter().take(4));
        bytes.extend([0; 8]);
    }
    bytes
}

/// Length of a `struct msghdr` on 64-bit hosts; one of sendmmsg(2)'s has eight bytes more.
pub const HEADER: usize = 56;

/// A `struct msghdr`, as far as sending goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Header {
    /// Whom to.
    pub name: Span,
    /// Its parts; `length` is their number.
    pub parts: Span,
    /// Control messages.
    pub control: Span,
}

/// Reads a `struct msghdr`.
#[must_use]
pub fn header(bytes: &[u8; HEADER]) -> Header {
    let [name, length, parts, count, control, controls, _] = words(bytes);
    let [w, x, y, z, ..] = length.to_le_bytes(); // an int, and padding
    // What is longer than an address is cut; what is negative is an error, as it is there.
    let length = match i32::from_le_bytes([w, x, y, z]) {
        _ if name == 0 => 0,
        negative @ ..0 => u64::from(negative.cast_unsigned()),
        length => u64::from(length.cast_unsigned()).min(ADDRESS as u64),
    };
    Header {
        name: Span { at: name, length },
        parts: Span { at: parts, length: count },
        control: Span { at: control, length: controls },
    }
}

/// Reads as many `struct iovec` as there are.
#[must_use]
pub fn parts(bytes: &[u8]) -> Vec<Span> {
    let word = |half: &[u8]| half.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    let span =
        |one: &[u8]| one.split_at_checked(8).map(|(at, length)| Span { at: word(at), length: word(length) });
    bytes.chunks_exact(16).filter_map(span).collect()
}

/// Whether control messages set a source route: the datagram then goes to another host than the one that it names.
#[must_use]
pub fn has_source_route(mut control: &[u8]) -> bool {
    const ROUTES: [(i32, i32); 3] = [
        (libc::IPPROTO_IP, libc::IP_RETOPTS),
        (libc::IPPROTO_IPV6, 57), // IPV6_RTHDR, linux/in6.h
        (libc::IPPROTO_IPV6, 5),  // IPV6_2292RTHDR
    ];
    while let Some((length, rest)) = control.split_first_chunk()
        && let Some((level, rest)) = rest.split_first_chunk()
        && let Some((kind, _)) = rest.split_first_chunk()
    {
        if ROUTES.contains(&(i32::from_le_bytes(*level), i32::from_le_bytes(*kind))) {
            return true;
        }
        // A length that is none ends it, as it does for the kernel.
        let length = usize::try_from(u64::from_le_bytes(*length)).ok().filter(|length| *length >= 16);
        let next = length.and_then(|length| length.checked_next_multiple_of(8));
        control = next.and_then(|next| control.get(next..)).unwrap_or_default();
    }
    false
}

fn words(bytes: &[u8; HEADER]) -> [u64; 7] {
    let mut words = [0; 7];
    for (to, from) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *to = from.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    }
    words
}

/// The protocol as a policy sees it, of a socket that is about to be made.
#[must_use]
pub fn protocol_of(domain: i32, kind: i32, protocol: i32) -> Protocol {
    let internet = domain == libc::AF_INET || domain == libc::AF_INET6;
    match (kind & 0xf, protocol) {
        (libc::SOCK_STREAM, 0 | libc::IPPROTO_TCP | 262) if internet => Protocol::TCP,
        (libc::SOCK_DGRAM, 0 | libc::IPPROTO_UDP) if internet => Protocol::UDP,
        (libc::SOCK_RAW, _) => Protocol::RAW,
        (_, n) if internet => u8::try_from(n).map_or(Protocol::RAW, Protocol),
        _ => Protocol::RAW,
    }
}

/// For fuzzing: a notification in the first bytes, and then memory that its arguments lead to.
pub fn read_any(bytes: &[u8]) {
    let mut words =
        bytes.chunks_exact(8).map(|word| word.first_chunk().map_or(0, |w| u64::from_le_bytes(*w)));
    let mut word = || words.next().unwrap_or_default();
    let [nr, a, b, c, d, e, f] = std::array::from_fn(|_| word());
    let [low, high, ..] = nr.to_le_bytes();
    let nr = i32::from(u16::from_le_bytes([low, high]) % 512);
    let call = Notification { id: 1, pid: 1, nr, instruction_pointer: 0, args: [a, b, c, d, e, f] };
    let _understood = asked(&call);
    let memory = bytes.get(56..).unwrap_or_default();
    let named = address(memory);
    if let Named::Address(at) = named {
        // What is judged is what would be said instead.
        let again = match address(&bytes_of(&Addr::from(at))) {
            Named::Address(again) => Some((again.ip(), again.port())),
            _ => None,
        };
        assert_eq!(again, Some((at.ip(), at.port())), "{memory:?}");
    }
    let _ = unspecified_as_v4(memory);
    if let Some(first) = memory.first_chunk() {
        let _ = header(first);
    }
    assert!(parts(memory).len() <= memory.len() / 16);
    let _ = protocol_of(nr, nr, nr);
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn no_bytes_upset_the_decoder(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            read_any(&bytes);
        }

        #[test]
        fn an_address_that_is_read_is_written_as_it_was(
            six in proptest::prelude::any::<bool>(),
            rest in proptest::collection::vec(proptest::prelude::any::<u8>(), 26),
        ) {
            let mut bytes = vec![if six { 10 } else { 2 }, 0];
            bytes.extend(rest);
            let mut call = vec![0; 56];
            call.extend(&bytes);
            read_any(&call);
        }
    }

    fn notification(nr: i64, args: [u64; 6]) -> Notification {
        Notification { id: 1, pid: 1, nr: i32::try_from(nr).unwrap(), instruction_pointer: 0, args }
    }

    #[test]
    fn integers_are_the_low_halves_of_registers() {
        let high = 0xdead_beef_0000_0000;
        let call = notification(libc::SYS_connect, [high | 3, 0x7fff_0000_1000, high | 16, 0, 0, 0]);
        let address = Span { at: 0x7fff_0000_1000, length: 16 };
        assert_eq!(asked(&call), Asked::Connect { fd: 3, address });
        let negative = notification(libc::SYS_bind, [u64::MAX, 8, u64::MAX, 0, 0, 0]);
        assert_eq!(
            asked(&negative),
            Asked::Bind { fd: -1, address: Span { at: 8, length: u64::from(u32::MAX) } }
        );
        let many = notification(libc::SYS_sendmmsg, [1, 8, u64::MAX, 0, 0, 0]);
        assert_eq!(asked(&many), Asked::SendMessages { fd: 1, flags: 0, at: 8, count: MESSAGES });
        assert_eq!(asked(&notification(0, [0; 6])), Asked::Unknown);
    }

    #[test]
    fn whom_a_signal_is_for() {
        let flagged = |nr, a: i64, b: i64, d| match asked(&notification(
            nr,
            [a.cast_unsigned(), b.cast_unsigned(), 0, d, 0, 0],
        )) {
            Asked::Signal(to) => to,
            other => panic!("{other:?}"),
        };
        let sent = |nr, a, b| flagged(nr, a, b, 0);
        assert_eq!(sent(libc::SYS_kill, 7, 9), To::Process(7));
        assert_eq!(sent(libc::SYS_kill, 0, 9), To::Group(None));
        assert_eq!(sent(libc::SYS_kill, -1, 9), To::All);
        assert_eq!(sent(libc::SYS_kill, 0xffff_ffff, 9), To::All, "as the kernel reads an int");
        assert_eq!(sent(libc::SYS_kill, -7, 9), To::Group(Some(7)));
        assert_eq!(sent(libc::SYS_tgkill, 7, 8), To::Process(8));
        assert_eq!(sent(libc::SYS_pidfd_send_signal, 3, 9), To::Pidfd(3));
        assert_eq!(flagged(libc::SYS_pidfd_send_signal, 3, 9, 4), To::PidfdsGroup(3));
    }

    #[test]
    fn every_call_of_the_table_is_understood() {
        use portcullis_guard::filter::{Rule, TABLE};
        for (nr, rule) in TABLE {
            let understood = asked(&notification(*nr, [0; 6])) != Asked::Unknown;
            assert_eq!(understood, !matches!(rule, Rule::Fail(_) | Rule::FailIfRouting), "{nr}");
        }
    }

    #[test]
    fn addresses_are_read_as_the_kernel_reads_them() {
        let mut bytes = vec![2, 0, 0, 21, 192, 0, 2, 1];
        assert_eq!(address(&bytes), Named::Address("192.0.2.1:21".parse().unwrap()));
        assert_eq!(address(&bytes[..7]), Named::Nothing);
        bytes[0] = 0;
        assert_eq!(address(&bytes), Named::Unspecified);
        assert_eq!(unspecified_as_v4(&bytes), Some("192.0.2.1:21".parse().unwrap()));
        let mut six = vec![10, 0, 0, 21, 0, 0, 0, 0];
        six.extend(Ipv6Addr::LOCALHOST.octets());
        assert_eq!(address(&six), Named::Address("[::1]:21".parse().unwrap()));
        assert_eq!(address(&[1, 0, b'/']), Named::Nothing);
        assert_eq!(address(&[]), Named::Nothing);
    }

    #[test]
    fn an_address_is_written_as_it_is_read() {
        for text in ["192.0.2.1:21", "[2001:db8::1]:80"] {
            let at: SocketAddr = text.parse().unwrap();
            assert_eq!(address(&bytes_of(&Addr::from(at))), Named::Address(at));
        }
        assert_eq!(bytes_of(&Addr::from("192.0.2.1:21".parse::<SocketAddr>().unwrap())).len(), 16);
    }

    #[test]
    fn a_message_is_taken_apart() {
        let mut bytes = [0u8; HEADER];
        let nothing = Span { at: 0, length: 0 };
        assert_eq!(header(&bytes), Header { name: nothing, parts: nothing, control: nothing });
        (bytes[0], bytes[8], bytes[12]) = (8, 16, 0xff); // the padding says nothing
        (bytes[16], bytes[24], bytes[32], bytes[40]) = (9, 2, 10, 24);
        let span = |at, length| Span { at, length };
        let wanted = Header { name: span(8, 16), parts: span(9, 2), control: span(10, 24) };
        assert_eq!(header(&bytes), wanted);
        bytes[8..12].copy_from_slice(&(-1i32).to_le_bytes());
        assert_eq!(header(&bytes).name, span(8, u64::from(u32::MAX)));
        bytes[8..12].copy_from_slice(&4711i32.to_le_bytes());
        assert_eq!(header(&bytes).name, span(8, ADDRESS as u64));
        let two: Vec<u8> = [1u64, 2, 3, 4].iter().flat_map(|n| n.to_le_bytes()).collect();
        assert_eq!(parts(&two), [span(1, 2), span(3, 4)]);
        assert_eq!(parts(&two[..31]), [span(1, 2)]);
    }

    #[test]
    fn a_source_route_among_control_messages_is_seen() {
        let one = |level: i32, kind: i32, data: &[u8]| {
            let mut bytes = (16 + data.len() as u64).to_le_bytes().to_vec();
            bytes.extend(
                level.to_le_bytes().into_iter().chain(kind.to_le_bytes()).chain(data.iter().copied()),
            );
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes
        };
        let interface = one(0, libc::IP_PKTINFO, &[0; 12]);
        for (level, kind) in [(0, 7), (41, 57), (41, 5)] {
            let route = one(level, kind, &[131, 7, 4, 192, 0, 2, 1]);
            assert!(has_source_route(&route) && has_source_route(&[&interface[..], &route].concat()));
        }
        assert!(!has_source_route(&[&interface[..], &interface].concat()));
        for length in [0u64, 15, u64::MAX] {
            let mut broken = interface.clone();
            broken[..8].copy_from_slice(&length.to_le_bytes());
            assert!(!has_source_route(&broken), "{length}");
        }
        assert!(!has_source_route(&[]) && !has_source_route(&interface[..15]));
    }
}
