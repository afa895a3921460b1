//! Signals that a program sends. The guard holds those that end or stop a process until it has seen whom they are for,
//! and a held call ends with `EINTR` where a handler runs meanwhile, which these calls never do natively.

use std::ffi::{c_int, c_long, c_uint, c_void};

use libc::pid_t;
use portcullis_shim::{
    shield::{fail, returned_int},
    sys::{arg, call},
    Errno,
};

use crate::hook::cancellable;

/// Makes a call until it is not interrupted.
///
/// # Safety
/// As for the call.
unsafe fn send(nr: c_long, args: [usize; 4]) -> c_int {
    let [a, b, c, d] = args;
    loop {
        // SAFETY: the caller's contract.
        let result = unsafe { call(nr, [a, b, c, d, 0, 0]) };
        if result != -(libc::EINTR as isize) {
            return returned_int(result);
        }
    }
}

// A handler that such a signal runs may end its thread from within, by unwinding.
cancellable! {
    /// kill(2).
    kill(pid: pid_t, signal: c_int) -> c_int {
        // SAFETY: no pointers.
        unsafe { send(libc::SYS_kill, [arg(pid), arg(signal), 0, 0]) }
    }
    /// killpg(3).
    killpg(group: pid_t, signal: c_int) -> c_int {
        if group < 0 {
            return fail(Errno(libc::EINVAL));
        }
        // SAFETY: no pointers.
        unsafe { kill(-group, signal) }
    }
    /// tgkill(2).
    tgkill(process: pid_t, thread: pid_t, signal: c_int) -> c_int {
        // SAFETY: no pointers.
        unsafe { send(libc::SYS_tgkill, [arg(process), arg(thread), arg(signal), 0]) }
    }
    /// pidfd_send_signal(2).
    pidfd_send_signal(process: c_int, signal: c_int, info: *mut c_void, flags: c_uint) -> c_int {
        let args = [arg(process), arg(signal), info.expose_provenance(), flags as usize];
        // SAFETY: the caller's contract.
        unsafe { send(libc::SYS_pidfd_send_signal, args) }
    }
}
