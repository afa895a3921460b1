//! Credentials, namespaces, sandboxes, and the end of the process.

use std::ffi::{c_char, c_int, c_long, c_ulong, c_void};

use libc::{gid_t, size_t, uid_t};
use portcullis_shim::creds::{changed, entering_sandbox, flush};

use crate::hook::hooks;

/// Passes a result on; 0 is success, after which this process is somebody else.
fn then_changed(result: c_int) -> c_int {
    if result == 0 {
        changed();
    }
    result
}

// SAFETY of all bodies: the contract of libc's function is the caller's, and it is passed on as it is.
hooks! {
    setuid => on_setuid: fn(id: uid_t) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(setuid)(id) })
    }
    setgid => on_setgid: fn(id: gid_t) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(setgid)(id) })
    }
    seteuid => on_seteuid: fn(id: uid_t) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(seteuid)(id) })
    }
    setegid => on_setegid: fn(id: gid_t) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(setegid)(id) })
    }
    setreuid => on_setreuid: fn(real_id: uid_t, id: uid_t) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(setreuid)(real_id, id) })
    }
    setregid => on_setregid: fn(real_id: gid_t, id: gid_t) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(setregid)(real_id, id) })
    }
    setresuid => on_setresuid: fn(real_id: uid_t, id: uid_t, saved: uid_t) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(setresuid)(real_id, id, saved) })
    }
    setresgid => on_setresgid: fn(real_id: gid_t, id: gid_t, saved: gid_t) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(setresgid)(real_id, id, saved) })
    }
    setfsuid => on_setfsuid: fn(id: uid_t) -> c_int, or -1, {
        // SAFETY: see above. It returns the former id, always.
        let was = unsafe { redhook::real!(setfsuid)(id) };
        changed();
        was
    }
    setfsgid => on_setfsgid: fn(id: gid_t) -> c_int, or -1, {
        // SAFETY: see above. It returns the former id, always.
        let was = unsafe { redhook::real!(setfsgid)(id) };
        changed();
        was
    }
    setgroups => on_setgroups: fn(count: size_t, groups: *const gid_t) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(setgroups)(count, groups) })
    }
    initgroups => on_initgroups: fn(user: *const c_char, group: gid_t) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(initgroups)(user, group) })
    }
    setns => on_setns: fn(fd: c_int, kind: c_int) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(setns)(fd, kind) })
    }
    unshare => on_unshare: fn(flags: c_int) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(unshare)(flags) })
    }
    chroot => on_chroot: fn(path: *const c_char) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(chroot)(path) })
    }
    capset => on_capset: fn(header: *mut c_void, data: *const c_void) -> c_int, or -1, {
        // SAFETY: see above.
        then_changed(unsafe { redhook::real!(capset)(header, data) })
    }
    prctl => on_prctl: fn(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int, or -1, {
        // SAFETY: see above. prctl(2) is variadic; fixed arguments of register width are the same call.
        let real = || unsafe { redhook::real!(prctl)(option, a, b, c, d) };
        if option == libc::PR_SET_SECCOMP {
            return c_int::try_from(entering_sandbox(|| real().into())).unwrap_or(-1);
        }
        real()
    }
    _exit => on_exit: fn(status: c_int) -> (), or (), {
        flush();
        // SAFETY: see above.
        unsafe { redhook::real!(_exit)(status) }
    }
    _Exit => on_exit_c99: fn(status: c_int) -> (), or (), {
        flush();
        // SAFETY: see above.
        unsafe { redhook::real!(_Exit)(status) }
    }
    quick_exit => on_quick_exit: fn(status: c_int) -> (), or (), {
        flush();
        // SAFETY: see above.
        unsafe { redhook::real!(quick_exit)(status) }
    }
}

/// seccomp(2) has no wrapper in libc; this is `syscall(SYS_seccomp, …)`.
pub(crate) fn seccomp(enter: impl FnOnce() -> c_long) -> c_long {
    entering_sandbox(enter)
}
