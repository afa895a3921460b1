//! Signals that a program sends. The guard holds those that end or stop a process until it has seen whom they are for,
//! and a held call ends with `EINTR` where a handler runs meanwhile, which these calls never do natively.

use std::ffi::{c_int, c_long, c_uint, c_void};

use libc::{pid_t, pthread_t, uid_t};
use portcullis_shim::{
    shield::{fail, returned_int},
    sys::{arg, call},
    Errno,
};

use crate::hook::{cancellable, Original};

static PTHREAD_KILL: Original = Original::new(c"pthread_kill");

/// Looks the original up, which may be called in a signal handler.
pub(crate) fn resolve() {
    PTHREAD_KILL.get();
}

/// `siginfo_t` of a queued signal (sigaction(2)).
#[repr(C)]
struct Queued {
    signal: c_int,
    error: c_int,
    code: c_int,
    pad: c_int,
    sender: pid_t,
    user: uid_t,
    value: *mut c_void,
    rest: [u64; 12],
}

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
    /// raise(3).
    raise(signal: c_int) -> c_int {
        // SAFETY: no pointers, and who asks who it is always learns it.
        let [process, thread] =
            [libc::SYS_getpid, libc::SYS_gettid].map(|nr| unsafe { call(nr, [0; 6]) }.cast_unsigned());
        // SAFETY: no pointers.
        unsafe { send(libc::SYS_tgkill, [process, thread, arg(signal), 0]) }
    }
    /// pthread_kill(3).
    pthread_kill(thread: pthread_t, signal: c_int) -> c_int {
        let real = PTHREAD_KILL.get();
        if real.is_null() {
            return libc::ENOSYS;
        }
        // SAFETY: found by that name, so it has that type.
        let real: unsafe extern "C-unwind" fn(pthread_t, c_int) -> c_int = unsafe { std::mem::transmute(real) };
        loop {
            // SAFETY: the caller's contract.
            let error = unsafe { real(thread, signal) };
            if error != libc::EINTR {
                return error;
            }
        }
    }
    /// sigqueue(3).
    sigqueue(pid: pid_t, signal: c_int, value: *mut c_void) -> c_int {
        // SAFETY: these two cannot fail.
        let (sender, user) = unsafe { (libc::getpid(), libc::getuid()) };
        let queued =
            Queued { signal, error: 0, code: libc::SI_QUEUE, pad: 0, sender, user, value, rest: [0; 12] };
        let info = std::ptr::from_ref(&queued).expose_provenance();
        // SAFETY: the kernel reads one `siginfo_t`, which `queued` is.
        unsafe { send(libc::SYS_rt_sigqueueinfo, [arg(pid), arg(signal), info, 0]) }
    }
    /// pidfd_send_signal(2).
    pidfd_send_signal(process: c_int, signal: c_int, info: *mut c_void, flags: c_uint) -> c_int {
        let args = [arg(process), arg(signal), info.expose_provenance(), flags as usize];
        // SAFETY: the caller's contract.
        unsafe { send(libc::SYS_pidfd_send_signal, args) }
    }
}
