//! What the kernel lets through and what not, from real processes that use neither shim nor guard.
//! Needs root and a cgroup v2 hierarchy. Every refusal stands beside its permitted twin.
#![expect(unsafe_code, reason = "raw socket calls")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "what cannot be set up is a failed test"
)]

mod support;

use std::net::SocketAddr;

use portcullis_backstop::{Cause, Region};
use portcullis_types::{Op, Protocol, RuleId};
use support::*;

fn host(op: Op, protocol: Protocol, to: SocketAddr) -> Region {
    Region { rule: Some(RuleId(7)), ..Region::host(op, protocol, key(to.ip()), &(to.port()..=to.port())) }
}

#[test]
fn a_connect_passes_if_it_was_granted_and_is_on_record_either_way() {
    let mut cage = Cage::new();
    for at in ["127.0.0.1:0", "[::1]:0"] {
        let (_listener, to) = listener(at);
        assert_eq!(cage.refused(|| tcp(to)), EPERM, "{to}");
        assert_eq!(cage.granted(&[host(Op::Connect, Protocol::TCP, to)], || tcp(to)), 0, "{to}");
        let events = cage.events();
        let [refused, permitted] = events.as_slice() else { panic!("{events:?}") };
        assert_eq!((refused.permitted, refused.cause, refused.rule), (false, Cause::Unknown, None));
        assert_eq!(
            (permitted.permitted, permitted.cause, permitted.rule),
            (true, Cause::Granted, Some(RuleId(7)))
        );
        for event in [refused, permitted] {
            assert_eq!((event.op, event.protocol), (Op::Connect, Protocol::TCP));
            assert_eq!((event.addr, event.port, event.v6), (key(to.ip()), to.port(), to.is_ipv6()));
            assert!(event.cookie != 0 && event.tid == event.holder.tgid && event.holder.uid == 0);
        }
    }
}

#[test]
fn a_grant_is_for_its_prefix_its_ports_its_call_and_its_protocol() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let right = host(Op::Connect, Protocol::TCP, to);
    let prefix = Region { prefix: 96 + 8, ..right };
    let ports = Region { low: to.port() - 1, high: to.port() + 1, ..right };
    for (region, expected) in [
        (right, 0),
        (prefix, 0),
        (ports, 0),
        (Region { addr: right.addr + 1, ..right }, EPERM),
        (Region { addr: right.addr ^ 1 << 40, prefix: 96 + 8, ..right }, EPERM),
        (Region { low: to.port() + 1, high: u16::MAX, ..right }, EPERM),
        (Region { op: Op::Send, ..right }, EPERM),
        (Region { protocol: Protocol::UDP, ..right }, EPERM),
    ] {
        assert_eq!(cage.granted(&[region], || tcp(to)), expected, "{region:?}");
    }
}

#[test]
fn a_mapped_address_is_the_v4_address() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let (_r, udp) = receiver("127.0.0.1:0");
    let send = |to: SocketAddr| {
        move || sendto(socket(libc::AF_INET6, libc::SOCK_DGRAM, 0), 0, &Sockaddr::new(mapped(to)))
    };
    assert_eq!(cage.refused(|| tcp(mapped(to))), EPERM);
    assert_eq!(cage.granted(&[host(Op::Connect, Protocol::TCP, to)], || tcp(mapped(to))), 0);
    assert_eq!(cage.refused(send(udp)), EPERM);
    assert_eq!(cage.granted(&[host(Op::Send, Protocol::UDP, udp)], send(udp)), 0);
    // A v4 address given to a v6 socket.
    let plain =
        |to: SocketAddr| move || connect(socket(libc::AF_INET6, libc::SOCK_DGRAM, 0), &Sockaddr::new(to));
    assert_eq!(cage.refused(plain(udp)), EPERM);
    assert_eq!(cage.granted(&[host(Op::Connect, Protocol::UDP, udp)], plain(udp)), 0);
}

/// The kernel gives what such a socket sends to the address that it is connected to, as if the program had named it.
#[test]
fn what_an_ipv6_socket_is_connected_to_needs_no_second_grant() {
    let mut cage = Cage::new();
    let [(socket_in, to), (_other_in, other)] = [(); 2].map(|()| receiver("127.0.0.1:0"));
    let connected = move || {
        let fd = socket(libc::AF_INET6, libc::SOCK_DGRAM, 0);
        assert_eq!(connect(fd, &Sockaddr::new(mapped(to))), 0);
        fd
    };
    let send = move || {
        // SAFETY: sends one byte of a literal.
        outcome(unsafe { libc::send(connected(), b"x".as_ptr().cast(), 1, 0) } as i64)
    };
    let connect_only = [host(Op::Connect, Protocol::UDP, to)];
    assert_eq!(cage.granted(&connect_only, send), 0);
    assert_eq!(socket_in.recv(&mut [0]).unwrap(), 1);
    assert_eq!(cage.granted(&connect_only, || sendto(connected(), 0, &Sockaddr::new(mapped(other)))), EPERM);
    let unconnected = || {
        let fd = connected();
        assert_eq!(connect(fd, &Sockaddr::new(to).family(libc::AF_UNSPEC)), 0);
        sendto(fd, 0, &Sockaddr::new(mapped(to)))
    };
    assert_eq!(cage.granted(&connect_only, unconnected), EPERM);
}

#[test]
fn datagrams_are_judged_by_their_address_connected_or_not() {
    let mut cage = Cage::new();
    for at in ["127.0.0.1:0", "[::1]:0"] {
        let (socket_in, to) = receiver(at);
        let (_other_in, other) = receiver(at);
        let fresh = move || socket(domain(to), libc::SOCK_DGRAM, 0);
        let mut byte = [0];
        assert_eq!(cage.refused(|| sendto(fresh(), 0, &Sockaddr::new(to))), EPERM);
        assert_eq!(cage.refused(|| connect(fresh(), &Sockaddr::new(to))), EPERM);
        assert_ne!(cage.refused(|| sendto(fresh(), 0, &Sockaddr::new(to).family(libc::AF_UNSPEC))), 0);
        assert!(socket_in.recv(&mut byte).is_err(), "nothing arrived");
        assert_eq!(
            cage.granted(&[host(Op::Send, Protocol::UDP, to)], || sendto(fresh(), 0, &Sockaddr::new(to))),
            0
        );
        socket_in.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        assert_eq!(socket_in.recv(&mut byte).unwrap(), 1);
        // Connected to what was granted, then aimed elsewhere.
        let aim = || {
            let fd = fresh();
            assert_eq!(connect(fd, &Sockaddr::new(to)), 0);
            sendto(fd, 0, &Sockaddr::new(other))
        };
        let connect_only = host(Op::Connect, Protocol::UDP, to);
        assert_eq!(cage.granted(&[connect_only], aim), EPERM);
        assert_eq!(cage.granted(&[connect_only, host(Op::Send, Protocol::UDP, other)], aim), 0);
    }
}

/// Sends one byte with one control message of level `IPPROTO_IP` or `IPPROTO_IPV6`.
fn send_with(fd: i32, level: i32, kind: i32, value: &[u8], to: Option<&Sockaddr>) -> i32 {
    let mut control = [0u64; 8];
    let mut part = libc::iovec { iov_base: b"x".as_ptr().cast_mut().cast(), iov_len: 1 };
    // SAFETY: an all-zero header is valid; the control message has room for header and value (asserted); all of it
    // lives during the call, which only reads it.
    outcome(unsafe {
        assert!(libc::CMSG_SPACE(value.len() as u32) as usize <= size_of_val(&control));
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        if let Some(to) = to {
            (message.msg_name, message.msg_namelen) = (to.ptr().cast_mut().cast(), to.len);
        }
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(value.len() as u32) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_len = libc::CMSG_LEN(value.len() as u32) as usize;
        ((*header).cmsg_level, (*header).cmsg_type) = (level, kind);
        std::ptr::copy_nonoverlapping(value.as_ptr(), libc::CMSG_DATA(header), value.len());
        libc::sendmsg(fd, &raw const message, 0) as i64
    })
}

#[test]
fn a_source_route_in_a_control_message_leads_nowhere() {
    let mut cage = Cage::new();
    // Loose source route by way of 127.0.0.1 (RFC 791), and a record of the route.
    let (loose, record) = ([131, 7, 4, 127, 0, 0, 1, 0], [7, 7, 4, 0, 0, 0, 0, 0]);
    let (socket_in, to) = receiver("127.0.0.1:0");
    socket_in.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let named = || if family == libc::AF_INET { to } else { mapped(to) };
        for connected in [false, true] {
            let send = |level: i32, kind: i32, value: &[u8]| {
                let fd = socket(family, libc::SOCK_DGRAM, 0);
                let named = Sockaddr::new(named());
                if connected {
                    assert_eq!(connect(fd, &named), 0);
                }
                // The first is a flow that is known then.
                assert_eq!(send_with(fd, level, kind, value, Some(&named).filter(|_| !connected)), 0);
                send_with(fd, libc::IPPROTO_IP, libc::IP_RETOPTS, &loose, Some(&named).filter(|_| !connected))
            };
            let permitted = [host(Op::Send, Protocol::UDP, to), host(Op::Connect, Protocol::UDP, to)];
            for (kind, value) in [(libc::IP_TTL, &7_i32.to_ne_bytes()[..]), (libc::IP_RETOPTS, &record)] {
                assert_eq!(cage.granted(&permitted, || send(libc::IPPROTO_IP, kind, value)), EPERM);
                assert_eq!(socket_in.recv(&mut [0]).unwrap(), 1);
                let routed = cage.events().into_iter().filter(|e| e.cause == Cause::Routed);
                assert_eq!(routed.map(|e| (e.op, e.permitted)).collect::<Vec<_>>(), [(Op::Send, false)]);
            }
        }
    }
    socket_in.set_nonblocking(true).unwrap();
    assert!(socket_in.recv(&mut [0]).is_err(), "nothing else arrived");
}

/// Where the kernel knows it (RFC 6275); a raw socket sends it anywhere.
#[test]
fn no_ipv6_packet_leaves_with_a_source_route() {
    let mut cage = Cage::new();
    cage.attacher.attach_all(&cage.cgroup).unwrap();
    let send = |kind: u8, before: bool| {
        move || {
            let mut packet = vec![0; 40];
            (packet[0], packet[5], packet[6], packet[7]) = (0x60, 32, 43, 9);
            (packet[23], packet[39]) = (1, 1); // from ::1 to ::1
            if before {
                packet[5] = 40;
                packet[6] = 60;
                packet.extend([43, 0, 1, 4, 0, 0, 0, 0]); // destination options: padding
            }
            packet.extend([17, 2, kind, 1, 0, 0, 0, 0]);
            packet.extend([0; 15]);
            packet.extend([1, 0, 9, 0, 9, 0, 8, 0, 0]); // through ::1; then a UDP header
            let fd = socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_RAW);
            let to = Sockaddr::new("[::1]:0".parse().unwrap());
            // SAFETY: packet and address are live and as long as said.
            outcome(unsafe {
                libc::sendto(fd, packet.as_ptr().cast(), packet.len(), 0, to.ptr(), to.len) as i64
            })
        }
    };
    for before in [false, true] {
        let granted = [Region::everything(Op::Socket, Protocol::RAW)];
        assert_eq!(cage.granted(&granted, send(0, before)), 0);
        assert_eq!(cage.granted(&granted, send(2, before)), EPERM);
        let routed: Vec<_> = cage.events().into_iter().filter(|e| e.cause == Cause::Routed).collect();
        assert_eq!(
            routed.iter().map(|e| (e.op, e.addr, e.permitted)).collect::<Vec<_>>(),
            [(Op::Send, 1, false)]
        );
    }
}

#[test]
fn fast_open_is_a_connect() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let fast = || {
        let fd = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        sendto(fd, libc::MSG_FASTOPEN, &Sockaddr::new(to))
    };
    let deferred = || {
        let fd = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        let on = 1;
        // SAFETY: four bytes of a live variable.
        let set = unsafe {
            libc::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, (&raw const on).cast(), 4)
        };
        if set != 0 { 99 } else { connect(fd, &Sockaddr::new(to)) }
    };
    let region = host(Op::Connect, Protocol::TCP, to);
    for (name, way) in [("MSG_FASTOPEN", &fast as &dyn Fn() -> i32), ("TCP_FASTOPEN_CONNECT", &deferred)] {
        assert_eq!(cage.refused(way), EPERM, "{name}");
        assert_eq!(cage.granted(&[region], way), 0, "{name}");
    }
}

#[test]
fn multipath_tcp_is_tcp() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let multipath = || {
        let fd = socket(libc::AF_INET, libc::SOCK_STREAM, 262);
        if fd < 0 { 99 } else { connect(fd, &Sockaddr::new(to)) }
    };
    assert_eq!(cage.refused(multipath), EPERM);
    assert_eq!(cage.granted(&[host(Op::Connect, Protocol::TCP, to)], multipath), 0);
}

#[test]
fn an_address_of_another_family_has_the_kernels_own_errno_and_leads_nowhere() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM] {
        for family in [libc::AF_INET6, libc::AF_UNIX, 99] {
            let odd = move || connect(socket(libc::AF_INET, kind, 0), &Sockaddr::new(to).family(family));
            assert_eq!(cage.refused(odd), libc::EAFNOSUPPORT, "connect {kind} {family}");
            let odd = move || bind(socket(libc::AF_INET, kind, 0), &Sockaddr::new(to).family(family));
            assert_eq!(cage.refused(odd), libc::EAFNOSUPPORT, "bind {kind} {family}");
            let odd = move || {
                sendto(socket(libc::AF_INET, kind, 0), libc::MSG_FASTOPEN, &Sockaddr::new(to).family(family))
            };
            assert_ne!(cage.refused(odd), 0, "sendto {kind} {family}");
        }
    }
    // bind(2) takes AF_UNSPEC for AF_INET where the address is any.
    let any: SocketAddr = "0.0.0.0:0".parse().unwrap();
    let unspecified =
        || bind(socket(libc::AF_INET, libc::SOCK_STREAM, 0), &Sockaddr::new(any).family(libc::AF_UNSPEC));
    assert_eq!(cage.refused(unspecified), EPERM);
    assert_eq!(cage.granted(&[host(Op::Bind, Protocol::TCP, any)], unspecified), 0);
}

#[test]
fn bind_is_judged_and_a_free_port_is_port_zero() {
    let mut cage = Cage::new();
    for (at, kind, protocol) in [
        ("127.0.0.1:0", libc::SOCK_STREAM, Protocol::TCP),
        ("[::1]:0", libc::SOCK_STREAM, Protocol::TCP),
        ("127.0.0.1:0", libc::SOCK_DGRAM, Protocol::UDP),
        ("[::1]:0", libc::SOCK_DGRAM, Protocol::UDP),
    ] {
        let free: SocketAddr = at.parse().unwrap();
        let fixed = SocketAddr::new(free.ip(), listener(at).1.port());
        for to in [free, fixed] {
            let way = move || bind(socket(domain(to), kind, 0), &Sockaddr::new(to));
            assert_eq!(cage.refused(way), EPERM, "{to}");
            assert_eq!(cage.granted(&[host(Op::Bind, protocol, to)], way), 0, "{to}");
        }
    }
}

#[test]
fn sockets_that_no_other_hook_sees_need_a_grant_of_their_own() {
    let mut cage = Cage::new();
    for (domain, kind, protocol, as_granted) in [
        (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP, Protocol::RAW),
        (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW, Protocol::RAW),
        (libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_UDP, Protocol::RAW),
        (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE, Protocol::UDPLITE),
    ] {
        let way = || outcome(socket(domain, kind, protocol).into());
        assert_eq!(cage.refused(way), EPERM, "{domain} {kind} {protocol}");
        assert_eq!(
            cage.granted(&[Region::everything(Op::Socket, as_granted)], way),
            0,
            "{domain} {kind} {protocol}"
        );
    }
    let unix = || outcome(socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0).into());
    assert_eq!(cage.refused(unix), 0);
    let netlink = || outcome(socket(libc::AF_NETLINK, libc::SOCK_RAW, 0).into());
    assert_eq!(cage.refused(netlink), 0);
}

#[test]
fn thirty_two_bit_calls_meet_the_same_judge() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let way = || {
        let fd = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        let from = Sockaddr::new(to);
        // SAFETY: maps a fresh page below 4 GB and copies a live address into it; `int 0x80` is
        // connect(2) of the 32-bit table with that address. rbx is saved, as the compiler wants it.
        unsafe {
            let page = libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            );
            std::ptr::copy_nonoverlapping(from.ptr().cast::<u8>(), page.cast(), from.len as usize);
            let mut result: i64 = 362; // connect
            std::arch::asm!(
                "xchg rbx, {fd}", "int 0x80", "xchg rbx, {fd}",
                fd = inout(reg) i64::from(fd) => _, inout("rax") result,
                in("rcx") page, in("rdx") u64::from(from.len),
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            );
            -(result as i32)
        }
    };
    let refused = cage.refused(way);
    if refused == libc::ENOSYS {
        return; // a kernel without 32-bit calls
    }
    assert_eq!(refused, EPERM);
    assert_eq!(cage.granted(&[host(Op::Connect, Protocol::TCP, to)], way), 0);
}

#[test]
fn io_uring_meets_the_same_judge() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    for forced_to_a_worker in [false, true] {
        let way = || {
            let fd = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
            uring_connect(fd, &Sockaddr::new(to), forced_to_a_worker)
        };
        assert_eq!(cage.refused(way), EPERM);
        assert_eq!(cage.granted(&[host(Op::Connect, Protocol::TCP, to)], way), 0);
    }
}

/// One IORING_OP_CONNECT, by hand. Layouts are linux/io_uring.h's.
fn uring_connect(fd: i32, to: &Sockaddr, forced_to_a_worker: bool) -> i32 {
    // SAFETY: the three mappings have the sizes and offsets that the kernel told in `params`; one
    // submission entry is filled before it is announced; `to` outlives the call.
    unsafe {
        let mut params = [0u32; 30]; // struct io_uring_params, 120 bytes
        let ring = libc::syscall(libc::SYS_io_uring_setup, 2, params.as_mut_ptr());
        if ring < 0 {
            return errno();
        }
        let map = |length: usize, offset: i64| {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                ring as i32,
                offset,
            )
            .cast::<u8>()
        };
        let (sq, cq, entries) = (map(8192, 0), map(8192, 0x800_0000), map(4096, 0x1000_0000));
        // sq_off: head tail mask entries flags dropped array (from word 10); cq_off from word 20.
        let (tail, array) = (params[11], params[16]);
        let (cq_tail, cqes) = (params[21], params[25]);
        entries.cast::<u8>().write(16); // IORING_OP_CONNECT
        entries.add(1).write(if forced_to_a_worker { 1 << 4 } else { 0 }); // IOSQE_ASYNC
        entries.add(4).cast::<i32>().write(fd);
        entries.add(8).cast::<u64>().write(u64::from(to.len)); // off: addrlen
        entries.add(16).cast::<u64>().write(to.ptr() as u64);
        sq.add(array as usize).cast::<u32>().write(0);
        sq.add(tail as usize).cast::<u32>().write_volatile(1);
        let entered = libc::syscall(libc::SYS_io_uring_enter, ring, 1, 1, 1u32, 0, 0);
        if entered < 0 || cq.add(cq_tail as usize).cast::<u32>().read_volatile() == 0 {
            return 98;
        }
        -cq.add(cqes as usize + 8).cast::<i32>().read_volatile()
    }
}

#[test]
fn only_the_kernels_own_copy_of_an_address_counts() {
    let mut cage = Cage::new();
    let (good_in, good) = listener("127.0.0.1:0");
    let (bad_in, bad) = listener("127.0.0.2:0");
    good_in.set_nonblocking(true).unwrap();
    bad_in.set_nonblocking(true).unwrap();
    let mixed = [Region { low: 0, high: u16::MAX, ..host(Op::Connect, Protocol::TCP, good) }];
    let way = || {
        let shared = Box::leak(Box::new((Sockaddr::new(good), Sockaddr::new(bad), Sockaddr::new(good))));
        let at = shared as *mut (Sockaddr, Sockaddr, Sockaddr);
        extern "C" fn flip(at: *mut libc::c_void) -> *mut libc::c_void {
            let at = at.cast::<(Sockaddr, Sockaddr, Sockaddr)>();
            loop {
                // SAFETY: the race is the point; the bytes are valid addresses either way.
                unsafe {
                    std::ptr::copy((&raw const (*at).1).cast::<u8>(), (&raw mut (*at).0).cast(), 16);
                    std::ptr::copy((&raw const (*at).2).cast::<u8>(), (&raw mut (*at).0).cast(), 16);
                }
            }
        }
        let mut thread = 0;
        // SAFETY: the thread runs until the process ends; `at` is leaked.
        unsafe { libc::pthread_create(&raw mut thread, std::ptr::null(), flip, at.cast()) };
        let (mut passed, mut refused) = (0, 0);
        for _ in 0..20_000 {
            let fd = socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0);
            // SAFETY: as in flip.
            match connect(fd, unsafe { &(*at).0 }) {
                EPERM => refused += 1,
                _ => passed += 1,
            }
            // SAFETY: our own descriptor.
            unsafe { libc::close(fd) };
        }
        i32::from(passed < 100) | i32::from(refused < 100) << 1
    };
    let drain = std::thread::spawn(move || {
        let mut accepted = 0;
        for _ in 0..3000 {
            while good_in.accept().is_ok() {
                accepted += 1;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
            if accepted > 1000 {
                break;
            }
        }
        accepted
    });
    assert_eq!(cage.granted(&mixed, way), 0, "both addresses were seen by the kernel");
    assert!(bad_in.accept().is_err(), "nothing reached the refused destination");
    assert!(drain.join().unwrap() > 0, "the permitted one was reached");
}
