//! New images, vfork(2), and syscall(2).

use std::{
    arch::naked_asm,
    ffi::{c_char, c_int, c_long, c_ulong, c_void},
};

use portcullis_shim::{
    creds, dgram, exec, own,
    shield::{fail, returned, returned_int},
    stream::{self, Accept},
    sys, Errno,
};

use crate::{
    hook::{cancellable, hooks, Original},
    identity,
};

type Strings = *const *const c_char;

extern "C" {
    static environ: Strings;
}

/// The environment of exec variants that name none.
fn current() -> Strings {
    // SAFETY: a pointer-sized variable (environ(7)); programs that change it beside an exec race with libc too.
    unsafe { environ }
}

// SAFETY of all bodies: the contract of libc's function is the caller's; the environment that
// `with_environment` hands in is an array of C strings that outlives the call.
hooks! {
    execve => on_execve: fn(path: *const c_char, argv: Strings, env: Strings) -> c_int, or -1, {
        // SAFETY: see above.
        unsafe { exec::with_environment(env, &|env| redhook::real!(execve)(path, argv, env)) }
    }
    execv => on_execv: fn(path: *const c_char, argv: Strings) -> c_int, or -1, {
        // SAFETY: see above.
        unsafe { on_execve(path, argv, current()) }
    }
    execvpe => on_execvpe: fn(file: *const c_char, argv: Strings, env: Strings) -> c_int, or -1, {
        // SAFETY: see above.
        unsafe { exec::with_environment(env, &|env| redhook::real!(execvpe)(file, argv, env)) }
    }
    execvp => on_execvp: fn(file: *const c_char, argv: Strings) -> c_int, or -1, {
        // SAFETY: see above.
        unsafe { on_execvpe(file, argv, current()) }
    }
    fexecve => on_fexecve: fn(fd: c_int, argv: Strings, env: Strings) -> c_int, or -1, {
        // SAFETY: see above.
        unsafe { exec::with_environment(env, &|env| redhook::real!(fexecve)(fd, argv, env)) }
    }
    execveat => on_execveat: fn(dir: c_int, path: *const c_char, argv: Strings, env: Strings, flags: c_int) -> c_int, or -1, {
        // SAFETY: see above.
        unsafe { exec::with_environment(env, &|env| redhook::real!(execveat)(dir, path, argv, env, flags)) }
    }
    posix_spawn => on_posix_spawn: fn(pid: *mut c_int, path: *const c_char, actions: *const c_void, attributes: *const c_void, argv: Strings, env: Strings) -> c_int, or libc::EAGAIN, {
        // SAFETY: see above. Its failures are errnos, not -1.
        let result = unsafe {
            exec::with_environment(env, &|env| redhook::real!(posix_spawn)(pid, path, actions, attributes, argv, env))
        };
        if result < 0 { libc::E2BIG } else { result }
    }
    posix_spawnp => on_posix_spawnp: fn(pid: *mut c_int, file: *const c_char, actions: *const c_void, attributes: *const c_void, argv: Strings, env: Strings) -> c_int, or libc::EAGAIN, {
        // SAFETY: see above.
        let result = unsafe {
            exec::with_environment(env, &|env| redhook::real!(posix_spawnp)(pid, file, actions, attributes, argv, env))
        };
        if result < 0 { libc::E2BIG } else { result }
    }
}

static SYSTEM: Original = Original::new(c"system");
static POPEN: Original = Original::new(c"popen");

cancellable! {
    /// system(3): libc starts the shell without our hooks.
    system(line: *const c_char) -> c_int {
        let real = SYSTEM.get();
        if real.is_null() {
            return fail(Errno(libc::ENOSYS));
        }
        let door = exec::leave_door_open();
        // SAFETY: libc's function of this name and type; its contract is the caller's.
        let status = unsafe {
            let real: unsafe extern "C-unwind" fn(*const c_char) -> c_int = std::mem::transmute(real);
            real(line)
        };
        door.close_again();
        status
    }
    /// popen(3), as above.
    popen(line: *const c_char, mode: *const c_char) -> *mut c_void {
        let real = POPEN.get();
        if real.is_null() {
            fail(Errno(libc::ENOSYS));
            return std::ptr::null_mut();
        }
        let door = exec::leave_door_open();
        // SAFETY: as above.
        let stream = unsafe {
            let real: unsafe extern "C-unwind" fn(*const c_char, *const c_char) -> *mut c_void =
                std::mem::transmute(real);
            real(line, mode)
        };
        door.close_again();
        stream
    }
}

/// Gathers execl(3)'s arguments: five pushed registers, and what the caller put on the stack behind
/// the return address. `$to` gets (path, registers, rest).
macro_rules! listed {
    ($($name:ident => $to:ident)+) => {$(
        #[no_mangle]
        #[unsafe(naked)]
        pub unsafe extern "C" fn $name() {
            naked_asm!(
                ".cfi_startproc",
                "lea rax, [rsp + 8]",
                "push r9", "push r8", "push rcx", "push rdx", "push rsi",
                ".cfi_adjust_cfa_offset 40",
                "mov rsi, rsp",
                "mov rdx, rax",
                "call {to}",
                "add rsp, 40",
                ".cfi_adjust_cfa_offset -40",
                "ret",
                ".cfi_endproc",
                to = sym $to,
            )
        }
    )+};
}

listed! {
    execl => from_execl
    execlp => from_execlp
    execle => from_execle
}

type Registers = *const [*const c_char; 5];

unsafe extern "C" fn from_execl(path: *const c_char, registers: Registers, rest: Strings) -> c_int {
    // SAFETY: as `listed!` has put them; exec(3)'s contract is the caller's.
    unsafe { exec::with_arguments(registers, rest, &|argv, _| on_execve(path, argv, current())) }
}

unsafe extern "C" fn from_execlp(file: *const c_char, registers: Registers, rest: Strings) -> c_int {
    // SAFETY: as above.
    unsafe { exec::with_arguments(registers, rest, &|argv, _| on_execvpe(file, argv, current())) }
}

unsafe extern "C" fn from_execle(path: *const c_char, registers: Registers, rest: Strings) -> c_int {
    // SAFETY: as above; execle's environment follows the null.
    unsafe { exec::with_arguments(registers, rest, &|argv, env| on_execve(path, argv, env)) }
}

/// vfork(2).
#[no_mangle]
#[unsafe(naked)]
pub unsafe extern "C" fn vfork() {
    naked_asm!("jmp {to}", to = sym own::portcullis_vfork)
}

/// vfork(2), as glibc's own libraries call it.
#[no_mangle]
#[unsafe(naked)]
pub unsafe extern "C" fn __vfork() {
    naked_asm!("jmp {to}", to = sym own::portcullis_vfork)
}

/// System calls that syscall(2) hands to hooks, as bits by number.
static JUDGED: [u64; 8] = {
    let mut bits = [0u64; 8];
    let numbers = [
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_accept,
        libc::SYS_accept4,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_sendmmsg,
        libc::SYS_close,
        libc::SYS_close_range,
        libc::SYS_dup,
        libc::SYS_dup2,
        libc::SYS_dup3,
        libc::SYS_fcntl,
        libc::SYS_setuid,
        libc::SYS_setgid,
        libc::SYS_setreuid,
        libc::SYS_setregid,
        libc::SYS_setresuid,
        libc::SYS_setresgid,
        libc::SYS_setfsuid,
        libc::SYS_setfsgid,
        libc::SYS_setgroups,
        libc::SYS_capset,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_chroot,
        libc::SYS_prctl,
        libc::SYS_seccomp,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_exit_group,
    ];
    let mut i = 0;
    while i < numbers.len() {
        #[expect(
            clippy::indexing_slicing,
            clippy::cast_possible_truncation,
            reason = "evaluated by the compiler, which checks it; system calls have small numbers"
        )]
        {
            bits[numbers[i] as usize / 64] |= 1 << (numbers[i] % 64);
        }
        i += 1;
    }
    bits
};

/// syscall(2). Numbers that are not judged are called right here, exactly as glibc does: this is how
/// vsftpd forks, and whatever the call does to the stack, nothing of ours is on it.
#[no_mangle]
#[unsafe(naked)]
pub unsafe extern "C" fn syscall() {
    naked_asm!(
        ".cfi_startproc",
        "cmp rdi, 511",
        "ja 2f",
        "lea rax, [rip + {judged}]",
        "bt qword ptr [rax], rdi",
        "jc {hooked}",
        "2:",
        "mov rax, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "mov rdx, rcx",
        "mov r10, r8",
        "mov r8, r9",
        "mov r9, [rsp + 8]",
        "syscall",
        "cmp rax, -4095",
        "jae 3f",
        "ret",
        "3:",
        "mov rdi, rax",
        "jmp {failed}",
        ".cfi_endproc",
        judged = sym JUDGED,
        hooked = sym hooked,
        failed = sym failed,
    )
}

extern "C" fn failed(result: isize) -> isize {
    returned(result)
}

fn int(raw: usize) -> c_int {
    #[expect(clippy::cast_possible_truncation, reason = "the kernel too takes the low half of the register")]
    let low = raw as c_int;
    low
}

fn pointer<T>(raw: usize) -> *mut T {
    std::ptr::with_exposed_provenance_mut(raw)
}

/// The hook that belongs to a number.
unsafe extern "C-unwind" fn hooked(
    nr: c_long,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> c_long {
    use crate::fds::{close, fcntl, on_close_range, on_dup, on_dup2, on_dup3};
    let raw = || {
        // SAFETY: syscall(2)'s contract is the caller's.
        returned(unsafe { sys::call(nr, [a, b, c, d, e, f]) }) as c_long
    };
    let uint = |n: usize| int(n).cast_unsigned();
    // SAFETY: of all arms: the call's contract is the caller's, with the same arguments in the same order.
    unsafe {
        match nr {
            libc::SYS_socket => stream::socket(int(a), int(b), int(c)).into(),
            libc::SYS_connect => stream::connect(int(a), pointer(b), uint(c)).into(),
            libc::SYS_bind => stream::bind(int(a), pointer(b), uint(c)).into(),
            libc::SYS_listen => stream::listen(int(a), int(b)).into(),
            libc::SYS_accept => stream::accept(int(a), pointer(b), pointer(c), Accept::Plain).into(),
            libc::SYS_accept4 => stream::accept(int(a), pointer(b), pointer(c), Accept::Flags(int(d))).into(),
            libc::SYS_sendto => {
                dgram::sendto(int(a), pointer::<c_void>(b), c, int(d), pointer(e), uint(f)) as c_long
            }
            libc::SYS_sendmsg => dgram::sendmsg(int(a), pointer(b), int(c)) as c_long,
            libc::SYS_sendmmsg => dgram::sendmmsg(int(a), pointer(b), uint(c), int(d)).into(),
            libc::SYS_close => close(int(a)).into(),
            libc::SYS_close_range => on_close_range(uint(a), uint(b), int(c)).into(),
            libc::SYS_dup => on_dup(int(a)).into(),
            libc::SYS_dup2 => on_dup2(int(a), int(b)).into(),
            libc::SYS_dup3 => on_dup3(int(a), int(b), int(c)).into(),
            libc::SYS_fcntl => fcntl(int(a), int(b), c as c_ulong).into(),
            libc::SYS_execve => exec::with_environment(pointer::<*const c_char>(c), &|env| {
                let all = [a, b, env.expose_provenance(), 0, 0, 0];
                returned_int(sys::call(nr, all))
            })
            .into(),
            libc::SYS_execveat => exec::with_environment(pointer::<*const c_char>(d), &|env| {
                let all = [a, b, c, env.expose_provenance(), e, 0];
                returned_int(sys::call(nr, all))
            })
            .into(),
            libc::SYS_seccomp => identity::seccomp(raw),
            libc::SYS_prctl if int(a) == libc::PR_SET_SECCOMP => identity::seccomp(raw),
            libc::SYS_prctl => raw(),
            libc::SYS_exit_group => {
                creds::flush();
                raw()
            }
            libc::SYS_setfsuid | libc::SYS_setfsgid => {
                let was = raw();
                creds::changed();
                was
            }
            // The rest change who this is.
            _ => {
                let result = raw();
                if result == 0 {
                    creds::changed();
                }
                result
            }
        }
    }
}
