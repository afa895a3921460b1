//! Sockets.

use std::ffi::{c_int, c_uint, c_void};

use libc::{mmsghdr, msghdr, size_t, sockaddr, socklen_t, ssize_t, timespec};
use portcullis_shim::{
    dgram, receive,
    stream::{self, Accept},
};

use crate::hook::{cancellable, hooks};

hooks! {
    socket => on_socket: fn(domain: c_int, kind: c_int, protocol: c_int) -> c_int, or -1, {
        stream::socket(domain, kind, protocol)
    }
    bind => on_bind: fn(fd: c_int, addr: *const sockaddr, len: socklen_t) -> c_int, or -1, {
        // SAFETY: bind(2)'s contract is the caller's.
        unsafe { stream::bind(fd, addr, len) }
    }
    listen => on_listen: fn(fd: c_int, backlog: c_int) -> c_int, or -1, {
        stream::listen(fd, backlog)
    }
    getsockname => on_getsockname: fn(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> c_int, or -1, {
        // SAFETY: getsockname(2)'s contract is the caller's.
        unsafe {
            stream::true_name(fd, addr, len, false)
                .unwrap_or_else(|| redhook::real!(getsockname)(fd, addr, len))
        }
    }
    getpeername => on_getpeername: fn(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> c_int, or -1, {
        // SAFETY: getpeername(2)'s contract is the caller's.
        unsafe {
            stream::true_name(fd, addr, len, true)
                .unwrap_or_else(|| redhook::real!(getpeername)(fd, addr, len))
        }
    }
}

cancellable! {
    /// connect(2).
    connect(fd: c_int, addr: *const sockaddr, len: socklen_t) -> c_int {
        // SAFETY: connect(2)'s contract is the caller's.
        unsafe { stream::connect(fd, addr, len) }
    }
    /// connect(2), as other libraries of glibc's call it.
    __connect(fd: c_int, addr: *const sockaddr, len: socklen_t) -> c_int {
        // SAFETY: as above.
        unsafe { stream::connect(fd, addr, len) }
    }
    /// accept(2).
    accept(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> c_int {
        // SAFETY: accept(2)'s contract is the caller's.
        unsafe { stream::accept(fd, addr, len, Accept::Plain) }
    }
    /// accept4(2).
    accept4(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t, flags: c_int) -> c_int {
        // SAFETY: as above.
        unsafe { stream::accept(fd, addr, len, Accept::Flags(flags)) }
    }
    /// sendto(2).
    sendto(fd: c_int, buffer: *const c_void, size: size_t, flags: c_int, addr: *const sockaddr,
           len: socklen_t) -> ssize_t {
        // SAFETY: sendto(2)'s contract is the caller's.
        unsafe { dgram::sendto(fd, buffer, size, flags, addr, len) }
    }
    /// sendmsg(2).
    sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> ssize_t {
        // SAFETY: sendmsg(2)'s contract is the caller's.
        unsafe { dgram::sendmsg(fd, message, flags) }
    }
    /// sendmmsg(2).
    sendmmsg(fd: c_int, vector: *mut mmsghdr, count: c_uint, flags: c_int) -> c_int {
        // SAFETY: sendmmsg(2)'s contract is the caller's.
        unsafe { dgram::sendmmsg(fd, vector, count, flags) }
    }
    /// recv(2).
    recv(fd: c_int, buffer: *mut c_void, size: size_t, flags: c_int) -> ssize_t {
        let none = std::ptr::null_mut();
        // SAFETY: recv(2)'s contract is the caller's.
        unsafe { receive::recvfrom(fd, buffer, size, flags, none, std::ptr::null_mut()) }
    }
    /// recv(2) under _FORTIFY_SOURCE: the compiler knows how much room there is.
    __recv_chk(fd: c_int, buffer: *mut c_void, size: size_t, room: size_t, flags: c_int) -> ssize_t {
        // SAFETY: as above, and glibc's end for programs that would overflow.
        unsafe {
            if size > room {
                __chk_fail();
            }
            recv(fd, buffer, size, flags)
        }
    }
    /// recvfrom(2).
    recvfrom(fd: c_int, buffer: *mut c_void, size: size_t, flags: c_int, addr: *mut sockaddr,
             len: *mut socklen_t) -> ssize_t {
        // SAFETY: recvfrom(2)'s contract is the caller's.
        unsafe { receive::recvfrom(fd, buffer, size, flags, addr, len) }
    }
    /// recvfrom(2) under _FORTIFY_SOURCE.
    __recvfrom_chk(fd: c_int, buffer: *mut c_void, size: size_t, room: size_t, flags: c_int,
                   addr: *mut sockaddr, len: *mut socklen_t) -> ssize_t {
        // SAFETY: as above.
        unsafe {
            if size > room {
                __chk_fail();
            }
            receive::recvfrom(fd, buffer, size, flags, addr, len)
        }
    }
    /// recvmsg(2).
    recvmsg(fd: c_int, message: *mut msghdr, flags: c_int) -> ssize_t {
        // SAFETY: recvmsg(2)'s contract is the caller's.
        unsafe { receive::recvmsg(fd, message, flags) }
    }
    /// recvmmsg(2).
    recvmmsg(fd: c_int, vector: *mut mmsghdr, count: c_uint, flags: c_int, timeout: *mut timespec) -> c_int {
        // SAFETY: recvmmsg(2)'s contract is the caller's.
        unsafe { receive::recvmmsg(fd, vector, count, flags, timeout) }
    }
    /// pthread_cancel(3): from now on a thread may be unwound through the gate page.
    pthread_cancel(thread: libc::pthread_t) -> c_int {
        portcullis_shim::gate::describe();
        let real = PTHREAD_CANCEL.get();
        if real.is_null() {
            return libc::ENOSYS;
        }
        // SAFETY: libc's function of this name and type.
        unsafe {
            let real: unsafe extern "C-unwind" fn(libc::pthread_t) -> c_int = std::mem::transmute(real);
            real(thread)
        }
    }
}

static PTHREAD_CANCEL: crate::hook::Original = crate::hook::Original::new(c"pthread_cancel");

extern "C" {
    /// Ends a program that would overflow a buffer (LSB 5.0 Core, __chk_fail).
    fn __chk_fail() -> !;
}
