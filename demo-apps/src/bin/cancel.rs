//! cancel: cancels threads that wait in accept(2), recvfrom(2), recvmsg(2) and connect(2), as programs in C do,
//! and says how each ended. No arguments.
#![expect(unsafe_code, reason = "thread cancellation is C's")]

use std::{ffi::c_void, mem, process::ExitCode, ptr::null_mut, time::Duration};

use libc::{c_int, pthread_t, sockaddr_in};
use portcullis_demo_apps::{main_of, say};

// "C-unwind": the C library unwinds a cancelled thread through these.
unsafe extern "C-unwind" {
    fn accept(fd: c_int, address: *mut c_void, length: *mut u32) -> c_int;
    fn connect(fd: c_int, address: *const sockaddr_in, length: u32) -> c_int;
    fn recv(fd: c_int, buffer: *mut c_void, size: usize, flags: c_int) -> isize;
    fn recvmsg(fd: c_int, message: *mut libc::msghdr, flags: c_int) -> isize;
    fn pthread_create(
        thread: *mut pthread_t,
        attributes: *const c_void,
        start: extern "C-unwind" fn(*mut c_void) -> *mut c_void,
        argument: *mut c_void,
    ) -> c_int;
    fn pthread_cancel(thread: pthread_t) -> c_int;
    fn pthread_join(thread: pthread_t, result: *mut *mut c_void) -> c_int;
}

/// `PTHREAD_CANCELED` (pthread.h).
const CANCELED: usize = usize::MAX;

fn bound(kind: c_int) -> (c_int, sockaddr_in) {
    // SAFETY: all zero is a valid `sockaddr_in`, and it lives over the calls, with its size.
    unsafe {
        let fd = libc::socket(libc::AF_INET, kind, 0);
        let mut at: sockaddr_in = mem::zeroed();
        let mut size = 16;
        at.sin_family = 2; // AF_INET
        at.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
        libc::bind(fd, (&raw const at).cast(), size);
        libc::getsockname(fd, (&raw mut at).cast(), &raw mut size);
        (fd, at)
    }
}

extern "C-unwind" fn accepts(_: *mut c_void) -> *mut c_void {
    let (fd, _) = bound(libc::SOCK_STREAM);
    // SAFETY: no address is asked for. Nothing in this function has a destructor.
    unsafe {
        libc::listen(fd, 1);
        accept(fd, null_mut(), null_mut());
    }
    null_mut()
}

extern "C-unwind" fn receives(_: *mut c_void) -> *mut c_void {
    let (fd, _) = bound(libc::SOCK_DGRAM);
    let mut byte = 0u8;
    // SAFETY: one byte of room. Nothing in this function has a destructor.
    unsafe { recv(fd, (&raw mut byte).cast(), 1, 0) };
    null_mut()
}

extern "C-unwind" fn receives_messages(_: *mut c_void) -> *mut c_void {
    let (fd, _) = bound(libc::SOCK_DGRAM);
    // SAFETY: a message without room is one. Nothing in this function has a destructor.
    unsafe {
        let mut message: libc::msghdr = mem::zeroed();
        recvmsg(fd, &raw mut message, 0);
    }
    null_mut()
}

/// To a listener whose backlog is full, so that the second or third connect waits.
extern "C-unwind" fn connects(_: *mut c_void) -> *mut c_void {
    let (listener, at) = bound(libc::SOCK_STREAM);
    // SAFETY: a live address with its size. Nothing in this function has a destructor.
    unsafe {
        libc::listen(listener, 0);
        for _ in 0..5 {
            connect(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0), &raw const at, 16);
        }
    }
    null_mut()
}

type Body = extern "C-unwind" fn(*mut c_void) -> *mut c_void;

fn main() -> ExitCode {
    main_of(|_| {
        let bodies: [(&str, Body); 4] =
            [("accept", accepts), ("recv", receives), ("recvmsg", receives_messages), ("connect", connects)];
        for (name, body) in bodies {
            let mut thread = 0;
            let mut result = null_mut();
            // SAFETY: a live thread that is joined once.
            unsafe {
                pthread_create(&raw mut thread, std::ptr::null(), body, null_mut());
                std::thread::sleep(Duration::from_millis(150));
                pthread_cancel(thread);
                pthread_join(thread, &raw mut result);
            }
            say(&format!("{name}: {}", if result.addr() == CANCELED { "cancelled" } else { "returned" }));
        }
        Ok(())
    })
}
