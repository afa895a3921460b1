//! Descriptors.

use std::ffi::{c_int, c_uint, c_ulong, c_void};

use portcullis_shim::{door, fds, gate, hints, shield::fail, shield::returned_int, sys::arg, Errno};

use crate::hook::{cancellable, hooks, Original};

/// After dup(2) and its kin.
fn duplicated(from: c_int, to: c_int) -> c_int {
    if to >= 0 {
        hints::duplicate(from, to);
    }
    to
}

/// What the program may do with a descriptor of ours: nothing, it is not there.
fn absent(fd: c_int) -> bool {
    door::hides(fd)
}

hooks! {
    dup => on_dup: fn(fd: c_int) -> c_int, or -1, {
        if absent(fd) {
            return fail(Errno(libc::EBADF));
        }
        // SAFETY: no pointers.
        duplicated(fd, unsafe { redhook::real!(dup)(fd) })
    }
    dup2 => on_dup2: fn(from: c_int, to: c_int) -> c_int, or -1, {
        if absent(from) {
            return fail(Errno(libc::EBADF));
        }
        fds::make_way(to);
        // SAFETY: no pointers.
        duplicated(from, unsafe { redhook::real!(dup2)(from, to) })
    }
    __dup2 => on_dup2_alias: fn(from: c_int, to: c_int) -> c_int, or -1, {
        // SAFETY: no pointers.
        unsafe { on_dup2(from, to) }
    }
    dup3 => on_dup3: fn(from: c_int, to: c_int, flags: c_int) -> c_int, or -1, {
        if absent(from) {
            return fail(Errno(libc::EBADF));
        }
        fds::make_way(to);
        // SAFETY: no pointers.
        duplicated(from, unsafe { redhook::real!(dup3)(from, to, flags) })
    }
    close_range => on_close_range: fn(low: c_uint, high: c_uint, flags: c_int) -> c_int, or -1, {
        const CLOEXEC: c_int = 4; // CLOSE_RANGE_CLOEXEC, linux/close_range.h
        if low > high {
            // SAFETY: no pointers; for the kernel to refuse.
            return unsafe { redhook::real!(close_range)(low, high, flags) };
        }
        if flags & CLOEXEC == 0 {
            hints::forget_range(low, high);
        }
        // SAFETY: no pointers.
        fds::close_stretches(low, high, |a, b| unsafe { redhook::real!(close_range)(a, b, flags) })
    }
    fstat => on_fstat: fn(fd: c_int, to: *mut c_void) -> c_int, or -1, {
        if absent(fd) {
            return fail(Errno(libc::EBADF));
        }
        // SAFETY: fstat(2)'s contract is the caller's.
        unsafe { redhook::real!(fstat)(fd, to) }
    }
    fstat64 => on_fstat64: fn(fd: c_int, to: *mut c_void) -> c_int, or -1, {
        if absent(fd) {
            return fail(Errno(libc::EBADF));
        }
        // SAFETY: fstat(2)'s contract is the caller's.
        unsafe { redhook::real!(fstat64)(fd, to) }
    }
    __fxstat => on_fxstat: fn(version: c_int, fd: c_int, to: *mut c_void) -> c_int, or -1, {
        if absent(fd) {
            return fail(Errno(libc::EBADF));
        }
        // SAFETY: fstat(2)'s contract is the caller's.
        unsafe { redhook::real!(__fxstat)(version, fd, to) }
    }
    __fxstat64 => on_fxstat64: fn(version: c_int, fd: c_int, to: *mut c_void) -> c_int, or -1, {
        if absent(fd) {
            return fail(Errno(libc::EBADF));
        }
        // SAFETY: fstat(2)'s contract is the caller's.
        unsafe { redhook::real!(__fxstat64)(version, fd, to) }
    }
    closefrom => on_closefrom: fn(low: c_int) -> (), or (), {
        let low = c_uint::try_from(low).unwrap_or(0);
        hints::forget_range(low, c_uint::MAX);
        fds::close_stretches(low, c_uint::MAX, |a, b| {
            // SAFETY: no pointers.
            unsafe { redhook::real!(close_range)(a, b, 0) }
        });
    }
}

static FCNTL: Original = Original::new(c"fcntl64");

/// fcntl(2) is variadic; a fixed third argument of register width is the same call on x86_64.
unsafe fn any_fcntl(fd: c_int, command: c_int, value: c_ulong) -> c_int {
    if absent(fd) {
        return fail(Errno(libc::EBADF));
    }
    let real = FCNTL.get();
    if real.is_null() {
        return fail(Errno(libc::ENOSYS));
    }
    // SAFETY: libc's function, which reads one argument behind the first two.
    let real: unsafe extern "C-unwind" fn(c_int, c_int, c_ulong) -> c_int =
        unsafe { std::mem::transmute(real) };
    // SAFETY: fcntl(2)'s contract is the caller's.
    let result = unsafe { real(fd, command, value) };
    match command {
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => duplicated(fd, result),
        _ => result,
    }
}

cancellable! {
    /// close(2).
    close(fd: c_int) -> c_int {
        if !fds::may_close(fd) {
            return fail(Errno(libc::EBADF));
        }
        // SAFETY: no pointers; nothing here has a destructor.
        returned_int(unsafe { gate::call_cancellable(libc::SYS_close, &[arg(fd), 0, 0, 0, 0, 0]) })
    }
    /// close(2), as other libraries of glibc's call it.
    __close(fd: c_int) -> c_int {
        // SAFETY: no pointers.
        unsafe { close(fd) }
    }
    /// fcntl(2).
    fcntl(fd: c_int, command: c_int, value: c_ulong) -> c_int {
        // SAFETY: fcntl(2)'s contract is the caller's.
        unsafe { any_fcntl(fd, command, value) }
    }
    /// fcntl(2) with 64-bit locks, which all are on x86_64.
    fcntl64(fd: c_int, command: c_int, value: c_ulong) -> c_int {
        // SAFETY: as above.
        unsafe { any_fcntl(fd, command, value) }
    }
}
