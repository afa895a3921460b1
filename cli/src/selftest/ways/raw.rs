//! System calls by hand, and what they take.
#![expect(unsafe_code, reason = "the point is to make system calls by hand")]

use std::arch::asm;

use libc::{c_long, sockaddr_in};

/// A system call without libc.
pub(super) fn call(nr: c_long, args: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = args;
    let result: i64;
    // SAFETY: `syscall` clobbers rcx and r11 only; the callers pass live memory of the stated lengths.
    unsafe {
        asm!("syscall", inlateout("rax") nr => result, in("rdi") a, in("rsi") b, in("rdx") c,
             in("r10") d, in("r8") e, in("r9") f, out("rcx") _, out("r11") _);
    }
    result
}

pub(super) fn at<T>(it: &T) -> u64 {
    std::ptr::from_ref(it) as u64
}

pub(super) fn number(n: i32) -> u64 {
    u64::from(n.cast_unsigned())
}

pub(super) const LENGTH: u64 = size_of::<sockaddr_in>() as u64;

pub(super) fn address(port: u16) -> sockaddr_in {
    sockaddr_in {
        sin_family: 2, // AF_INET
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 1]) },
        sin_zero: [0; 8],
    }
}

pub(super) fn socket(domain: i32, kind: i32, protocol: i32) -> Option<u64> {
    u64::try_from(call(libc::SYS_socket, [number(domain), number(kind), number(protocol), 0, 0, 0])).ok()
}

pub(super) fn tcp() -> Option<u64> {
    socket(libc::AF_INET, libc::SOCK_STREAM, 0)
}

pub(super) fn udp() -> Option<u64> {
    socket(libc::AF_INET, libc::SOCK_DGRAM, 0)
}

pub(super) fn say(fd: u64) -> bool {
    call(libc::SYS_write, [fd, b"x".as_ptr() as u64, 1, 0, 0, 0]) == 1
}

pub(super) fn connect_by(fd: u64, port: u16) -> bool {
    let to = address(port);
    call(libc::SYS_connect, [fd, at(&to), LENGTH, 0, 0, 0]) == 0 && say(fd)
}

/// A message to 127.0.0.1, as words: struct msghdr, then the length of struct mmsghdr.
pub(super) fn message(to: &sockaddr_in, part: &[u64; 2]) -> [u64; 8] {
    [at(to), LENGTH, part.as_ptr() as u64, 1, 0, 0, 0, 0]
}

pub(super) fn ended_well(pid: i64) -> bool {
    let mut status = 0i32;
    let status_at = std::ptr::from_mut(&mut status) as u64;
    call(libc::SYS_wait4, [pid.cast_unsigned(), status_at, 0, 0, 0, 0]);
    pid > 0 && status == 0
}
