//! Flows: by libc in all its ways, and by the kernel directly.
#![expect(unsafe_code, reason = "calls of libc's that libc's Rust wrappers do not have")]

use std::io::Write;

use libc::{c_long, sockaddr_in};

use super::{
    Aim,
    raw::{LENGTH, address, at, call, connect_by, message, number, say, socket, tcp, udp},
};

pub(super) fn through_libc(aim: &Aim) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", aim.port)).and_then(|mut s| s.write_all(b"x")).is_ok()
}

/// A connect that no hook sees; also what a new image comes to.
pub fn raw_connect(aim: &Aim) -> bool {
    tcp().is_some_and(|fd| connect_by(fd, aim.port))
}

pub(super) fn through_syscall(aim: &Aim) -> bool {
    let to = address(aim.port);
    let Some(fd) = tcp() else { return false };
    // SAFETY: a live address and its length.
    unsafe { libc::syscall(libc::SYS_connect, fd, at(&to), LENGTH) == 0 && say(fd) }
}

pub(super) fn through_dlsym(aim: &Aim) -> bool {
    type Connect = unsafe extern "C" fn(i32, *const sockaddr_in, u32) -> i32;
    let to = address(aim.port);
    let Some(fd) = tcp().and_then(|fd| i32::try_from(fd).ok()) else { return false };
    // SAFETY: C strings; `connect` of libc has this type; a live address and its length.
    unsafe {
        let libc = libc::dlopen(c"libc.so.6".as_ptr(), libc::RTLD_NOW);
        let found = libc::dlsym(libc, c"connect".as_ptr());
        if found.is_null() {
            return false;
        }
        let connect: Connect = std::mem::transmute::<*mut libc::c_void, Connect>(found);
        connect(fd, &raw const to, 16) == 0 && say(number(fd))
    }
}

pub(super) fn through_sendmmsg(aim: &Aim) -> bool {
    let to = address(aim.port);
    let part: [u64; 2] = [b"x".as_ptr() as u64, 1];
    let mut message = message(&to, &part);
    let Some(fd) = socket(libc::AF_INET, libc::SOCK_DGRAM, 0).and_then(|fd| i32::try_from(fd).ok()) else {
        return false;
    };
    // SAFETY: one struct mmsghdr, which is eight words, of live parts.
    unsafe { libc::sendmmsg(fd, message.as_mut_ptr().cast(), 1, 0) == 1 }
}

pub(super) fn fast_open(aim: &Aim) -> bool {
    let to = address(aim.port);
    let Some(fd) = tcp() else { return false };
    let x = b"x".as_ptr() as u64;
    call(libc::SYS_sendto, [fd, x, 1, number(libc::MSG_FASTOPEN), at(&to), LENGTH]) == 1
}

pub(super) fn fast_open_message(aim: &Aim, nr: c_long) -> bool {
    let to = address(aim.port);
    let part: [u64; 2] = [b"x".as_ptr() as u64, 1];
    let message = message(&to, &part);
    let Some(fd) = tcp() else { return false };
    let fast = number(libc::MSG_FASTOPEN);
    // sendmsg(fd, message, flags), sendmmsg(fd, messages, 1, flags)
    let (third, fourth) = if nr == libc::SYS_sendmsg { (fast, 0) } else { (1, fast) };
    call(nr, [fd, message.as_ptr() as u64, third, fourth, 0, 0]) == 1
}

/// connect(2) does nothing yet (tcp(7), `TCP_FASTOPEN_CONNECT`), the first write connects.
pub(super) fn fast_open_connect(aim: &Aim) -> bool {
    const TCP_FASTOPEN_CONNECT: i32 = 30; // linux/tcp.h
    let Some(fd) = tcp() else { return false };
    let on = 1i32;
    let option = [fd, number(libc::IPPROTO_TCP), number(TCP_FASTOPEN_CONNECT), at(&on), 4, 0];
    call(libc::SYS_setsockopt, option) == 0 && connect_by(fd, aim.port)
}

pub(super) fn mapped(aim: &Aim) -> bool {
    let Some(fd) = socket(libc::AF_INET6, libc::SOCK_STREAM, 0) else { return false };
    let mut to = [0u8; 28];
    let [high, low] = aim.port.to_be_bytes();
    let parts: [(usize, &[u8]); 3] = [(0, &[10, 0, high, low]), (18, &[0xff, 0xff]), (20, &[127, 0, 0, 1])];
    for (at, what) in parts {
        for (to, from) in to.iter_mut().skip(at).zip(what) {
            *to = *from;
        }
    }
    call(libc::SYS_connect, [fd, to.as_ptr() as u64, 28, 0, 0, 0]) == 0 && say(fd)
}

pub(super) fn multipath(aim: &Aim) -> bool {
    socket(libc::AF_INET, libc::SOCK_STREAM, 262).is_some_and(|fd| connect_by(fd, aim.port))
}

#[derive(Clone, Copy)]
pub(super) enum Send {
    To,
    Message,
    Messages,
    Unspecified,
}

pub(super) fn datagram(aim: &Aim, how: Send) -> bool {
    let mut to = address(aim.port);
    if matches!(how, Send::Unspecified) {
        to.sin_family = 0;
    }
    let Some(fd) = socket(libc::AF_INET, libc::SOCK_DGRAM, 0) else { return false };
    let x = b"x".as_ptr() as u64;
    let part: [u64; 2] = [x, 1];
    let message = message(&to, &part);
    match how {
        Send::To | Send::Unspecified => call(libc::SYS_sendto, [fd, x, 1, 0, at(&to), LENGTH]) == 1,
        Send::Message => call(libc::SYS_sendmsg, [fd, message.as_ptr() as u64, 0, 0, 0, 0]) == 1,
        Send::Messages => call(libc::SYS_sendmmsg, [fd, message.as_ptr() as u64, 1, 0, 0, 0]) == 1,
    }
}

pub(super) fn datagram_connect(aim: &Aim) -> bool {
    udp().is_some_and(|fd| connect_by(fd, aim.port))
}

/// Connected to what is permitted, dissolved (connect(2), `AF_UNSPEC`), connected to what is not.
pub(super) fn datagram_freed(aim: &Aim) -> bool {
    let Some(fd) = udp() else { return false };
    let (open, mut nowhere) = (address(aim.open), address(0));
    nowhere.sin_family = 0;
    for to in [open, nowhere] {
        call(libc::SYS_connect, [fd, at(&to), LENGTH, 0, 0, 0]);
    }
    connect_by(fd, aim.port)
}

pub(super) fn datagram_elsewhere(aim: &Aim) -> bool {
    let Some(fd) = udp() else { return false };
    let (open, to) = (address(aim.open), address(aim.port));
    call(libc::SYS_connect, [fd, at(&open), LENGTH, 0, 0, 0]);
    call(libc::SYS_sendto, [fd, b"x".as_ptr() as u64, 1, 0, at(&to), LENGTH]) == 1
}

/// UDP header and one byte; no checksum (RFC 768).
pub(super) fn udp_packet(port: u16) -> [u8; 9] {
    let [high, low] = port.to_be_bytes();
    [0x1b, 0x58, high, low, 0, 9, 0, 0, b'x']
}

pub(super) fn raw_socket(aim: &Aim) -> bool {
    let to = address(0);
    let Some(fd) = socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_UDP) else { return false };
    let packet = udp_packet(aim.port);
    call(libc::SYS_sendto, [fd, packet.as_ptr() as u64, 9, 0, at(&to), LENGTH]) == 9
}

pub(super) fn packet_socket(aim: &Aim) -> bool {
    const IPV4: u16 = 0x0800;
    let protocol = i32::from(IPV4.to_be());
    let Some(fd) = socket(libc::AF_PACKET, libc::SOCK_DGRAM, protocol) else { return false };
    // IPv4 (RFC 791): 20 + 9 bytes, TTL 64, UDP, from and to 127.0.0.1
    let mut packet = vec![0x45, 0, 0, 29, 0, 1, 0, 0, 64, 17, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1];
    let sum: u32 = packet.chunks_exact(2).fold(0, |sum, pair| match pair {
        [a, b] => sum + u32::from(u16::from_be_bytes([*a, *b])),
        _ => sum,
    });
    let folded = (sum & 0xffff) + (sum >> 16);
    let [_, _, high, low] = (!folded).to_be_bytes();
    for (to, from) in packet.iter_mut().skip(10).zip([high, low]) {
        *to = from;
    }
    packet.extend(udp_packet(aim.port));
    let to = libc::sockaddr_ll {
        sll_family: 17, // AF_PACKET
        sll_protocol: IPV4.to_be(),
        sll_ifindex: 1, // loopback is the first in every namespace
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as u64;
    call(libc::SYS_sendto, [fd, packet.as_ptr() as u64, 29, 0, at(&to), length]) == 29
}
