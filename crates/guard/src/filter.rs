//! Which system calls the kernel asks about, as one table, and its classic BPF form.
//!
//! The program sees `struct seccomp_data` (linux/seccomp.h): number, architecture, instruction pointer
//! and six arguments by value. It cannot see behind pointers, so `sendmsg` is judged by where it comes
//! from, and addresses are judged by the broker.

use libc::{c_long, sock_filter};

/// What the filter does with one system call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rule {
    /// Ask the broker, unless the call is made from the shim's gate page.
    Gate,
    /// As [`Rule::Gate`], but only when the fifth argument (an address) is not null or the fourth
    /// (flags) has `MSG_FASTOPEN`: sendto(2) on a connected socket is nobody's business.
    GateIfAddressed,
    /// Ask the broker, unless the arguments (domain, type, protocol) make a socket that cannot carry traffic
    /// before another judged call: unix, netlink, and TCP or UDP.
    Domain,
    /// Always ask.
    Ask,
    /// Ask if this argument is one of [`ENDING`].
    AskIfEnding(u32),
    /// fcntl(2): ask if it makes one of [`ENDING`] the signal of a descriptor's owner, whoever that is by then.
    AskIfOwnersEnding,
    /// prlimit(2): ask if it sets a limit of a process that is named.
    AskIfLimiting,
    /// Ask, but only where nobody is trusted: calls are then made by proxy, and a program's own Landlock
    /// rules for the network would not hold whoever makes them.
    AskIfNobody,
    /// setsockopt(2): fail if it sets a source route. Packets then go to another host than the one that was judged,
    /// with all that is in them.
    FailIfRouting,
    /// Fail with this errno, as a kernel without the call would.
    Fail(u16),
}

/// The table. Calls that are not in it go on.
///
/// io_uring could open flows without any call the filter sees, so it is absent for wrapped programs;
/// those that use it fall back, as they must on older kernels.
pub const TABLE: &[(c_long, Rule)] = &[
    (libc::SYS_connect, Rule::Gate),
    (libc::SYS_bind, Rule::Gate),
    (libc::SYS_listen, Rule::Gate),
    (libc::SYS_accept, Rule::Gate),
    (libc::SYS_accept4, Rule::Gate),
    (libc::SYS_sendto, Rule::GateIfAddressed),
    (libc::SYS_sendmsg, Rule::Gate),
    (libc::SYS_sendmmsg, Rule::Gate),
    (libc::SYS_socket, Rule::Domain),
    (libc::SYS_io_uring_setup, Rule::Fail(ENOSYS)),
    (libc::SYS_io_uring_enter, Rule::Fail(ENOSYS)),
    (libc::SYS_io_uring_register, Rule::Fail(ENOSYS)),
    (libc::SYS_ptrace, Rule::Ask),
    (libc::SYS_process_vm_readv, Rule::Ask),
    (libc::SYS_process_vm_writev, Rule::Ask),
    (libc::SYS_pidfd_getfd, Rule::Ask),
    (libc::SYS_kill, Rule::AskIfEnding(1)),
    (libc::SYS_tkill, Rule::AskIfEnding(1)),
    (libc::SYS_tgkill, Rule::AskIfEnding(2)),
    (libc::SYS_rt_sigqueueinfo, Rule::AskIfEnding(1)),
    (libc::SYS_rt_tgsigqueueinfo, Rule::AskIfEnding(2)),
    (libc::SYS_pidfd_send_signal, Rule::AskIfEnding(1)),
    (libc::SYS_fcntl, Rule::AskIfOwnersEnding),
    (libc::SYS_prlimit64, Rule::AskIfLimiting),
    (libc::SYS_landlock_create_ruleset, Rule::AskIfNobody),
    (libc::SYS_setsockopt, Rule::FailIfRouting),
];

/// Signals that end or stop the supervisor, the broker and the key daemon, which block those that they can.
pub const ENDING: [i32; 4] = [libc::SIGKILL, libc::SIGSTOP, libc::SIGTERM, libc::SIGINT];

/// linux/fcntl.h
const F_SETSIG: u32 = 10;

/// Options of IPv4 packets; linux/in.h
const IP_OPTIONS: u32 = 4;
/// Routing headers, alone and among others; linux/in6.h
const IPV6_ROUTES: [u32; 3] = [57, 5, 6]; // IPV6_RTHDR, IPV6_2292RTHDR, IPV6_2292PKTOPTIONS
/// Asks for a flow label (linux/in6.h), and how long that is (`struct in6_flowlabel_req`). Options of the packets that
/// will have it, a route too, may follow.
const IPV6_FLOWLABEL_MGR: u32 = 32;
const FLOW_LABEL: u32 = 32;

const ENOSYS: u16 = 38;
const EPERM: u16 = 1;

/// The same calls by their numbers in the 32-bit table (arch/x86/entry/syscalls/syscall_32.tbl),
/// which `int $0x80` reaches from any program. They are refused: a 32-bit program computes, but
/// does not reach the network.
const REFUSED_I386: &[u32] = &[
    102, // socketcall
    359, 361, 362, 363, 364, 369, 370,
    345, // socket bind connect listen accept4 sendto sendmsg sendmmsg
    425, 426, 427, // io_uring_*
    26, 347, 348, 438, // ptrace process_vm_* pidfd_getfd
];

/// Calls of the 32-bit table that are told by their numbers (the same file), as the 64-bit ones with the same arguments.
const ALIKE_I386: &[(u32, c_long)] = &[
    (37, libc::SYS_kill),
    (238, libc::SYS_tkill),
    (270, libc::SYS_tgkill),
    (178, libc::SYS_rt_sigqueueinfo),
    (335, libc::SYS_rt_tgsigqueueinfo),
    (424, libc::SYS_pidfd_send_signal),
    (55, libc::SYS_fcntl),
    (221, libc::SYS_fcntl), // fcntl64
    (340, libc::SYS_prlimit64),
    (366, libc::SYS_setsockopt),
];

/// The 64-bit number of a call that the filter asks about.
#[must_use]
pub fn number(arch: u32, nr: i32) -> i32 {
    let alike = ALIKE_I386.iter().find(|(theirs, _)| arch == AUDIT_ARCH_I386 && theirs.cast_signed() == nr);
    alike.and_then(|(_, ours)| i32::try_from(*ours).ok()).unwrap_or(nr)
}

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// Bit that marks an x32 call (`__X32_SYSCALL_BIT`, asm/unistd.h).
const X32_BIT: u32 = 0x4000_0000;

// Offsets in struct seccomp_data.
const NR: u32 = 0;
const ARCH: u32 = 4;
const IP_LOW: u32 = 8;
const IP_HIGH: u32 = 12;
const fn arg_low(n: u32) -> u32 {
    16 + 8 * n
}
const fn arg_high(n: u32) -> u32 {
    arg_low(n) + 4
}

/// How far the filter trusts the shim's page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Trust {
    /// Calls from the page at this address (4096 bytes, page aligned) go on unasked.
    Page(u64),
    /// Every call of the table is asked about.
    Nobody,
}

/// A jump target that is not known yet.
#[derive(Clone, Copy)]
enum To {
    Next,
    Allow,
    Ask,
    Errno(u16),
    /// Skip this many instructions.
    Skip(u8),
}

struct Line {
    code: u16,
    k: u32,
    yes: To,
    no: To,
}

// Instruction codes (linux/bpf_common.h).
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_ANY_BIT: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

fn load(offset: u32) -> Line {
    Line { code: LOAD, k: offset, yes: To::Next, no: To::Next }
}
fn and(mask: u32) -> Line {
    Line { code: AND, k: mask, yes: To::Next, no: To::Next }
}
fn equal(k: u32, yes: To, no: To) -> Line {
    Line { code: JUMP_EQUAL, k, yes, no }
}
fn any_bit(k: u32, yes: To, no: To) -> Line {
    Line { code: JUMP_ANY_BIT, k, yes, no }
}

/// Low and high half of a 64-bit number.
#[expect(clippy::cast_possible_truncation, reason = "the halves of a 64-bit number")]
const fn halves(n: u64) -> (u32, u32) {
    (n as u32, (n >> 32) as u32)
}

/// Ends a rule: to the broker, unless the call comes from the trusted page.
fn gate(trust: Trust, out: &mut Vec<Line>) {
    match trust {
        Trust::Nobody => out.push(always(To::Ask)),
        Trust::Page(page) => {
            let (low, high) = halves(page);
            out.push(load(IP_HIGH));
            out.push(equal(high, To::Next, To::Ask));
            out.push(load(IP_LOW));
            out.push(and(!0xfff));
            out.push(equal(low, To::Allow, To::Ask));
        }
    }
}

fn ask_if_ending(argument: u32, out: &mut Vec<Line>) {
    out.push(load(arg_low(argument)));
    out.extend(ENDING.map(|signal| equal(signal.cast_unsigned(), To::Ask, To::Next)));
    out.push(always(To::Allow));
}

fn always(to: To) -> Line {
    any_bit(0, to, to)
}

fn body(rule: Rule, trust: Trust) -> Vec<Line> {
    let mut out = Vec::new();
    match rule {
        Rule::Gate => gate(trust, &mut out),
        Rule::GateIfAddressed => {
            out.push(load(arg_low(4)));
            out.push(equal(0, To::Next, To::Skip(4)));
            out.push(load(arg_high(4)));
            out.push(equal(0, To::Next, To::Skip(2)));
            out.push(load(arg_low(3)));
            out.push(any_bit(libc::MSG_FASTOPEN.cast_unsigned(), To::Next, To::Allow));
            gate(trust, &mut out);
        }
        Rule::Domain => {
            let family = |f: i32| f.cast_unsigned();
            out.push(load(arg_low(0)));
            out.push(equal(family(libc::AF_UNIX), To::Allow, To::Next));
            out.push(equal(family(libc::AF_NETLINK), To::Allow, To::Next));
            out.push(equal(family(libc::AF_INET), To::Skip(1), To::Next));
            out.push(equal(family(libc::AF_INET6), To::Next, To::Ask));
            out.push(load(arg_low(1)));
            out.push(and(0xf)); // SOCK_TYPE_MASK, linux/net.h
            out.push(equal(libc::SOCK_STREAM.cast_unsigned(), To::Skip(1), To::Next));
            out.push(equal(libc::SOCK_DGRAM.cast_unsigned(), To::Next, To::Ask));
            // Of these, only protocols whose connect and sendto are judged: ping sockets are not.
            out.push(load(arg_low(2)));
            for protocol in [0, libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_MPTCP] {
                out.push(equal(protocol.cast_unsigned(), To::Allow, To::Next));
            }
            out.push(always(To::Ask));
        }
        Rule::Ask => out.push(always(To::Ask)),
        Rule::AskIfEnding(argument) => ask_if_ending(argument, &mut out),
        Rule::AskIfOwnersEnding => {
            out.push(load(arg_low(1)));
            out.push(equal(F_SETSIG, To::Next, To::Allow));
            ask_if_ending(2, &mut out);
        }
        Rule::AskIfLimiting => {
            out.push(load(arg_low(0)));
            out.push(equal(0, To::Allow, To::Next)); // the caller's own
            out.push(load(arg_low(2)));
            out.push(equal(0, To::Next, To::Ask));
            out.push(load(arg_high(2)));
            out.push(equal(0, To::Allow, To::Ask)); // it only asks
        }
        Rule::AskIfNobody if trust == Trust::Nobody => out.push(always(To::Ask)),
        Rule::AskIfNobody => out.push(always(To::Allow)),
        Rule::FailIfRouting => {
            let level = |level: i32| level.cast_unsigned();
            out.push(load(arg_low(4)));
            out.push(equal(0, To::Allow, To::Next)); // takes them away
            out.push(load(arg_low(1)));
            out.push(equal(level(libc::IPPROTO_IP), To::Next, To::Skip(2)));
            out.push(load(arg_low(2)));
            out.push(equal(IP_OPTIONS, To::Errno(EPERM), To::Allow));
            out.push(equal(level(libc::IPPROTO_IPV6), To::Next, To::Allow));
            out.push(load(arg_low(2)));
            out.extend(IPV6_ROUTES.map(|option| equal(option, To::Errno(EPERM), To::Next)));
            out.push(equal(IPV6_FLOWLABEL_MGR, To::Next, To::Allow));
            out.push(load(arg_low(4)));
            out.push(equal(FLOW_LABEL, To::Allow, To::Next));
            out.push(any_bit(!(FLOW_LABEL - 1), To::Errno(EPERM), To::Allow)); // longer
        }
        Rule::Fail(errno) => out.push(always(To::Errno(errno))),
    }
    out
}

/// Assembles the filter for x86_64.
///
/// Layout: architecture, then one comparison and a body per call, then the returns. A body either
/// decides or is skipped whole, so jumps stay short; the returns are reached by unconditional jumps
/// (`BPF_JA`), which have 32 bits.
#[must_use]
pub fn assemble(trust: Trust) -> Vec<sock_filter> {
    let mut i386 = vec![equal(AUDIT_ARCH_I386, To::Next, To::Errno(EPERM)), load(NR)];
    i386.extend(REFUSED_I386.iter().map(|&nr| equal(nr, To::Errno(EPERM), To::Next)));
    let mut i386 = lower(i386);
    for &(nr, same) in ALIKE_I386 {
        let rules = TABLE.iter().filter(|(of, _)| *of == same);
        i386.extend(rules.flat_map(|(_, rule)| case(nr, *rule, trust)));
    }
    i386.push(give(RET_ALLOW));
    let mut program = vec![
        sock_filter { code: LOAD, jt: 0, jf: 0, k: ARCH },
        sock_filter { code: JUMP_EQUAL, jt: 0, jf: 1, k: AUDIT_ARCH_X86_64 },
        jump_always(i386.len()),
    ];
    program.extend(i386);
    program.extend(lower(vec![load(NR), any_bit(X32_BIT, To::Errno(ENOSYS), To::Next)]));
    for &(nr, rule) in TABLE {
        #[expect(clippy::cast_possible_truncation, reason = "system call numbers are small")]
        program.extend(case(nr as u32, rule, trust));
    }
    program.push(give(RET_ALLOW));
    program
}

/// What is done with one call, and is skipped for others.
fn case(nr: u32, rule: Rule, trust: Trust) -> Vec<sock_filter> {
    let body = lower(body(rule, trust));
    let mut all = vec![sock_filter { code: JUMP_EQUAL, jt: 1, jf: 0, k: nr }, jump_always(body.len())];
    all.extend(body);
    all
}

const RET_ALLOW: u32 = 0x7fff_0000;
const RET_NOTIFY: u32 = 0x7fc0_0000;
const RET_ERRNO: u32 = 0x0005_0000;

fn jump_always(over: usize) -> sock_filter {
    let k = u32::try_from(over).unwrap_or(u32::MAX);
    sock_filter { code: JUMP, jt: 0, jf: 0, k }
}

fn give(value: u32) -> sock_filter {
    sock_filter { code: RETURN, jt: 0, jf: 0, k: value }
}

/// Turns lines into instructions, with the returns that this run of lines uses at its end.
fn lower(lines: Vec<Line>) -> Vec<sock_filter> {
    let mut returns: Vec<u32> = Vec::new();
    let mut place = |to: To| -> Option<usize> {
        let value = match to {
            To::Next | To::Skip(_) => return None,
            To::Allow => RET_ALLOW,
            To::Ask => RET_NOTIFY,
            To::Errno(errno) => RET_ERRNO | u32::from(errno),
        };
        Some(returns.iter().position(|&r| r == value).unwrap_or_else(|| {
            returns.push(value);
            returns.len() - 1
        }))
    };
    let places: Vec<_> = lines.iter().map(|line| (place(line.yes), place(line.no))).collect();
    let falls_through = lines.last().is_none_or(|l| matches!(l.yes, To::Next) || matches!(l.no, To::Next));
    let count = lines.len() + usize::from(falls_through && !returns.is_empty());
    let mut out = Vec::new();
    for (at, (line, (yes, no))) in lines.into_iter().zip(places).enumerate() {
        let target = |to: To, place: Option<usize>| match (to, place) {
            (To::Skip(n), _) => n,
            (_, Some(place)) => u8::try_from(count + place - at - 1).unwrap_or(u8::MAX),
            _ => 0,
        };
        out.push(sock_filter {
            code: line.code,
            jt: target(line.yes, yes),
            jf: target(line.no, no),
            k: line.k,
        });
    }
    if falls_through && !returns.is_empty() {
        out.push(jump_always(returns.len()));
    }
    out.extend(returns.into_iter().map(give));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 0x5043_4c00_0000;

    /// One `struct seccomp_data` through the program, as Documentation/networking/filter.rst has it.
    fn run(program: &[sock_filter], data: &[u32; 16]) -> u32 {
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let i = program[at];
            at += 1;
            let jump = |yes: bool| if yes { i.jt } else { i.jf } as usize;
            match i.code {
                LOAD => a = data[i.k as usize / 4],
                AND => a &= i.k,
                JUMP_EQUAL => at += jump(a == i.k),
                JUMP_ANY_BIT => at += jump(a & i.k != 0),
                JUMP => at += i.k as usize,
                RETURN => return i.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn call(arch: u32, nr: u32, ip: u64, args: [u64; 6]) -> [u32; 16] {
        let mut data = [0; 16];
        (data[0], data[1]) = (nr, arch);
        (data[2], data[3]) = halves(ip);
        for (n, arg) in args.into_iter().enumerate() {
            (data[4 + 2 * n], data[5 + 2 * n]) = halves(arg);
        }
        data
    }

    fn of(trust: Trust, nr: c_long, ip: u64, args: [u64; 6]) -> u32 {
        run(&assemble(trust), &call(AUDIT_ARCH_X86_64, u32::try_from(nr).unwrap(), ip, args))
    }

    #[test]
    fn the_program_is_within_the_kernels_limit() {
        for trust in [Trust::Nobody, Trust::Page(PAGE)] {
            assert!(assemble(trust).len() < 4096);
            for &(_, rule) in TABLE {
                assert!(lower(body(rule, trust)).len() < 256);
            }
        }
    }

    #[test]
    fn a_judged_call_is_asked_about_unless_it_comes_from_the_page() {
        for nr in [libc::SYS_connect, libc::SYS_bind, libc::SYS_listen, libc::SYS_accept4, libc::SYS_sendmsg]
        {
            assert_eq!(of(Trust::Page(PAGE), nr, PAGE + 2, [0; 6]), RET_ALLOW);
            assert_eq!(of(Trust::Page(PAGE), nr, PAGE + 4096, [0; 6]), RET_NOTIFY);
            assert_eq!(of(Trust::Page(PAGE), nr, PAGE - 1, [0; 6]), RET_NOTIFY);
            assert_eq!(of(Trust::Page(PAGE), nr, PAGE | 1 << 50, [0; 6]), RET_NOTIFY);
            assert_eq!(of(Trust::Nobody, nr, PAGE + 2, [0; 6]), RET_NOTIFY);
        }
    }

    #[test]
    fn sendto_without_an_address_is_nobodys_business() {
        let fast_open = u64::from(libc::MSG_FASTOPEN.cast_unsigned());
        let ask = |args| of(Trust::Page(PAGE), libc::SYS_sendto, 0x1000, args);
        assert_eq!(ask([3, 0, 0, 0, 0, 0]), RET_ALLOW);
        assert_eq!(ask([3, 0, 0, 0, 0x7fff_0000, 16]), RET_NOTIFY);
        assert_eq!(ask([3, 0, 0, 0, 1 << 32, 16]), RET_NOTIFY);
        assert_eq!(ask([3, 0, 0, fast_open, 0, 0]), RET_NOTIFY);
        assert_eq!(of(Trust::Page(PAGE), libc::SYS_sendto, PAGE, [3, 0, 0, 0, 1 << 32, 16]), RET_ALLOW);
    }

    #[test]
    fn sockets_that_carry_traffic_by_themselves_are_asked_about() {
        let socket = |domain: i32, kind: i32| {
            let args = [u64::from(domain.cast_unsigned()), u64::from(kind.cast_unsigned()), 0, 0, 0, 0];
            of(Trust::Page(PAGE), libc::SYS_socket, 0x1000, args)
        };
        for domain in [libc::AF_INET, libc::AF_INET6] {
            assert_eq!(socket(domain, libc::SOCK_STREAM | libc::SOCK_CLOEXEC), RET_ALLOW);
            assert_eq!(socket(domain, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK), RET_ALLOW);
            assert_eq!(socket(domain, libc::SOCK_RAW), RET_NOTIFY);
            assert_eq!(socket(domain, libc::SOCK_SEQPACKET), RET_NOTIFY);
        }
        let of_protocol = |kind: i32, protocol: i32| {
            let word = |n: i32| u64::from(n.cast_unsigned());
            let args = [word(libc::AF_INET), word(kind), word(protocol), 0, 0, 0];
            of(Trust::Page(PAGE), libc::SYS_socket, 0x1000, args)
        };
        assert_eq!(of_protocol(libc::SOCK_STREAM, libc::IPPROTO_TCP), RET_ALLOW);
        assert_eq!(of_protocol(libc::SOCK_STREAM, libc::IPPROTO_MPTCP), RET_ALLOW);
        assert_eq!(of_protocol(libc::SOCK_DGRAM, libc::IPPROTO_UDP), RET_ALLOW);
        assert_eq!(of_protocol(libc::SOCK_DGRAM, libc::IPPROTO_ICMP), RET_NOTIFY);
        assert_eq!(of_protocol(libc::SOCK_STREAM, libc::IPPROTO_SCTP), RET_NOTIFY);
        assert_eq!(socket(libc::AF_UNIX, libc::SOCK_SEQPACKET), RET_ALLOW);
        assert_eq!(socket(libc::AF_NETLINK, libc::SOCK_RAW), RET_ALLOW);
        assert_eq!(socket(libc::AF_PACKET, libc::SOCK_RAW), RET_NOTIFY);
        assert_eq!(socket(libc::AF_VSOCK, libc::SOCK_STREAM), RET_NOTIFY);
    }

    #[test]
    fn no_source_route_is_set_and_one_can_be_taken_away() {
        let setting = |level: u64, option: u64, length: u64| {
            let args = [3, level, option, 0x1000, length, 0];
            let old = run(&assemble(Trust::Page(PAGE)), &call(AUDIT_ARCH_I386, 366, 0, args));
            for trust in [Trust::Page(PAGE), Trust::Nobody] {
                assert_eq!(of(trust, libc::SYS_setsockopt, PAGE, args), old);
            }
            old
        };
        let refused = RET_ERRNO | u32::from(EPERM);
        for (level, option) in [(0, 4), (41, 57), (41, 5), (41, 6)] {
            assert_eq!(setting(level, option, 24), refused);
            assert_eq!(
                setting(level | 7 << 32, option | 7 << 32, 24 | 7 << 32),
                refused,
                "the kernel sees 32 bits"
            );
            assert_eq!(setting(level, option, 0), RET_ALLOW);
        }
        // IP_TTL, IPV6_MULTICAST_HOPS's and TCP_LINGER2's neighbours, SO_BROADCAST
        for (level, option) in [(0, 2), (0, 57), (41, 4), (41, 18), (6, 4), (1, 6)] {
            assert_eq!(setting(level, option, 4), RET_ALLOW);
        }
        for (length, outcome) in [(31, RET_ALLOW), (32, RET_ALLOW), (33, refused), (72, refused)] {
            assert_eq!(setting(41, 32, length), outcome, "a flow label and what follows it: {length}");
        }
    }

    #[test]
    fn only_signals_that_end_a_process_are_asked_about() {
        let of_signal = |signal: i32, place: usize| {
            let mut args = [7; 6];
            args[place] = 0xdead_0000_0000_0000 | u64::from(signal.cast_unsigned());
            args
        };
        for (nr, rule) in TABLE {
            let Rule::AskIfEnding(place) = rule else { continue };
            for trust in [Trust::Page(PAGE), Trust::Nobody] {
                let sent = |signal| of(trust, *nr, PAGE, of_signal(signal, *place as usize));
                assert!(ENDING.iter().all(|signal| sent(*signal) == RET_NOTIFY), "{nr}");
                assert_eq!([0, libc::SIGHUP, libc::SIGURG, libc::SIGABRT].map(sent), [RET_ALLOW; 4], "{nr}");
            }
        }
        for (nr, same) in ALIKE_I386 {
            assert_eq!(i64::from(number(AUDIT_ARCH_I386, nr.cast_signed())), *same);
            assert_eq!(number(AUDIT_ARCH_X86_64, nr.cast_signed()), nr.cast_signed());
        }
        let old = |signal| {
            let args = of_signal(signal, 1);
            run(&assemble(Trust::Page(PAGE)), &call(AUDIT_ARCH_I386, 37, 0, args))
        };
        assert_eq!((old(libc::SIGKILL), old(libc::SIGHUP)), (RET_NOTIFY, RET_ALLOW));
    }

    #[test]
    fn what_ends_others_without_a_signal_call_is_asked_about() {
        let word = |n: i32| u64::from(n.cast_unsigned());
        let kernels = [(AUDIT_ARCH_X86_64, 72, 302), (AUDIT_ARCH_I386, 55, 340), (AUDIT_ARCH_I386, 221, 340)];
        for (arch, fcntl, prlimit) in kernels {
            let ask = |nr, args| run(&assemble(Trust::Page(PAGE)), &call(arch, nr, PAGE, args));
            let set = |command, signal| ask(fcntl, [3, word(command), word(signal), 0, 0, 0]);
            assert_eq!(set(10, libc::SIGKILL), RET_NOTIFY);
            assert_eq!([set(10, libc::SIGUSR1), set(10, 0), set(libc::F_SETFD, 9)], [RET_ALLOW; 3]);
            let limit = |pid, new| ask(prlimit, [pid, 0, new, 0, 0, 0]);
            assert_eq!([limit(7, 0x1000), limit(7, 0x7fff << 32)], [RET_NOTIFY; 2]);
            assert_eq!([limit(0, 0x1000), limit(7, 0)], [RET_ALLOW; 2]);
        }
    }

    #[test]
    fn other_tables_do_not_reach_the_network() {
        let at = |arch, nr| run(&assemble(Trust::Page(PAGE)), &call(arch, nr, PAGE, [0; 6]));
        assert_eq!(at(AUDIT_ARCH_I386, 102), RET_ERRNO | u32::from(EPERM));
        assert_eq!(at(AUDIT_ARCH_I386, 362), RET_ERRNO | u32::from(EPERM));
        assert_eq!(at(AUDIT_ARCH_I386, 4), RET_ALLOW, "write(2)");
        assert_eq!(at(0xdead, 4), RET_ERRNO | u32::from(EPERM));
        assert_eq!(at(AUDIT_ARCH_X86_64, X32_BIT | 42), RET_ERRNO | u32::from(ENOSYS));
        assert_eq!(at(AUDIT_ARCH_X86_64, 425), RET_ERRNO | u32::from(ENOSYS));
        assert_eq!(at(AUDIT_ARCH_X86_64, 0), RET_ALLOW, "read(2)");
    }
}
