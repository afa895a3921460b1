//! Makes the judged system calls, all from one page ([`portcullis_wire::gate`]), as libc would:
//! same numbers, same arguments, and open to thread cancellation (pthread_cancel(3)).
//!
//! glibc 2.36 switches a thread to asynchronous cancellation around a blocking call when the process
//! has threads. So does [`call_cancellable`]. The cancelled thread is then unwound from where it stands,
//! which is this page, through [`enter`] and the hook; so on that path no frame has anything to drop,
//! `enter` carries unwind tables, and the page gets its own by [`describe`].
#![expect(unsafe_code, reason = "enters the page by hand-written assembly")]

use core::{
    arch::global_asm,
    ffi::{CStr, c_char},
    ptr::{null_mut, with_exposed_provenance_mut},
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
};

use libc::{c_int, c_long, c_void};
use portcullis_wire::gate::{CODE, PAGE, SIZE};

use crate::sys;

// portcullis_enter(number, arguments, entry): the six arguments into their registers, then `entry`.
// portcullis_here: `syscall; ret` of our own, for when the page cannot be had; the guard asks then.
global_asm!(
    ".pushsection .text.portcullis_enter,\"ax\",@progbits",
    ".hidden portcullis_enter",
    ".globl portcullis_enter",
    ".type portcullis_enter,@function",
    "portcullis_enter:",
    ".cfi_startproc",
    "sub rsp, 8",
    ".cfi_adjust_cfa_offset 8",
    "mov rax, rdi",
    "mov rcx, rdx",
    "mov rdi, [rsi]",
    "mov rdx, [rsi + 16]",
    "mov r10, [rsi + 24]",
    "mov r8, [rsi + 32]",
    "mov r9, [rsi + 40]",
    "mov rsi, [rsi + 8]",
    "call rcx",
    "add rsp, 8",
    ".cfi_adjust_cfa_offset -8",
    "ret",
    ".cfi_endproc",
    ".size portcullis_enter, .-portcullis_enter",
    ".hidden portcullis_here",
    ".globl portcullis_here",
    ".type portcullis_here,@function",
    "portcullis_here:",
    ".cfi_startproc",
    "syscall",
    "ret",
    ".cfi_endproc",
    ".size portcullis_here, .-portcullis_here",
    ".popsection",
);

// "C-unwind": a cancelled thread leaves these by forced unwinding.
unsafe extern "C-unwind" {
    fn portcullis_enter(nr: c_long, args: *const [usize; 6], entry: usize) -> isize;
    fn portcullis_here();
    fn pthread_setcanceltype(kind: c_int, old: *mut c_int) -> c_int;
}

const PTHREAD_CANCEL_ASYNCHRONOUS: c_int = 1; // pthread.h

/// Where calls are made from: the page, or 0 for [`portcullis_here`].
static ENTRY: AtomicUsize = AtomicUsize::new(0);

/// glibc's `__libc_single_threaded`: not 0 while the process has one thread. Null: not known.
static SINGLE: AtomicPtr<c_char> = AtomicPtr::new(null_mut());

/// Maps the page. If another shim of this image already has, it is used as it is.
pub fn install() {
    // SAFETY: dlsym(3) with the name of a `char` that lives as long as libc.
    let single = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__libc_single_threaded".as_ptr()) };
    SINGLE.store(single.cast(), Ordering::Relaxed);
    let (Ok(at), flags) =
        (usize::try_from(PAGE), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE)
    else {
        return;
    };
    let Some(page) = sys::map(at, SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, -1) else { return };
    if page.addr() != at {
        // SAFETY: a mapping that was made just now; kernels before 4.17 take the address as a hint.
        unsafe { sys::over(libc::SYS_munmap, page.addr(), SIZE, 0) };
        return;
    }
    // SAFETY: the page is ours, writable, and SIZE bytes long, which CODE is not.
    unsafe {
        page.cast::<u8>().write_bytes(0xcc, SIZE);
        page.cast::<[u8; CODE.len()]>().write(CODE);
    }
    // SAFETY: nobody uses the page yet.
    if unsafe { sys::over(libc::SYS_mprotect, at, SIZE, libc::PROT_READ | libc::PROT_EXEC) } {
        ENTRY.store(at, Ordering::Release);
    } else {
        // SAFETY: nobody uses the page yet.
        unsafe { sys::over(libc::SYS_munmap, at, SIZE, 0) };
    }
}

/// Whether calls leave from the page.
pub fn installed() -> bool {
    ENTRY.load(Ordering::Relaxed) != 0
}

fn entry() -> usize {
    match ENTRY.load(Ordering::Relaxed) {
        0 => portcullis_here as *const () as usize,
        page => page,
    }
}

/// One system call from the page; the kernel's result.
///
/// # Safety
/// As for the system call.
#[inline]
pub unsafe fn call(nr: c_long, args: &[usize; 6]) -> isize {
    // SAFETY: the entry is `syscall; ret`; the rest is this function's contract.
    unsafe { portcullis_enter(nr, args, entry()) }
}

/// As [`call`], and a cancellation point like libc's own.
///
/// # Safety
/// As for the system call; and no frame between the program and this one may have anything to drop.
#[inline]
pub unsafe fn call_cancellable(nr: c_long, args: &[usize; 6]) -> isize {
    let single = SINGLE.load(Ordering::Relaxed);
    // SAFETY: null was excluded; libc's variable lives as long as libc, and it is read as libc does.
    if !single.is_null() && unsafe { single.read_volatile() } != 0 {
        // SAFETY: by this function's contract.
        return unsafe { call(nr, args) };
    }
    let mut was = 0;
    // SAFETY: `was` is writable; switching as glibc itself does around this very call.
    unsafe { pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &raw mut was) };
    // SAFETY: by this function's contract.
    let result = unsafe { call(nr, args) };
    // SAFETY: the type that the thread had.
    unsafe { pthread_setcanceltype(was, null_mut()) };
    result
}

/// `.eh_frame` for the page (LSB 5.0 Core, 10.6): on entry the return address is on top of the stack,
/// and it stays there. One CIE, one FDE, one terminator.
#[repr(C, packed(4))]
struct Frames {
    cie_length: u32,
    cie_id: u32,
    /// version 1, augmentation "", code alignment 1, data alignment -8, return address in 16 (rip),
    /// DW_CFA_def_cfa rsp+8, DW_CFA_offset rip at cfa-8, padding.
    cie: [u8; 12],
    fde_length: u32,
    fde_cie: u32,
    begin: u64,
    range: u64,
    end: u32,
}

static FRAMES: Frames = Frames {
    cie_length: 16,
    cie_id: 0,
    cie: [1, 0, 1, 0x78, 16, 0x0c, 7, 8, 0x90, 1, 0, 0],
    fde_length: 20,
    fde_cie: 24,
    begin: PAGE,
    range: SIZE as u64,
    end: 0,
};

const _: () = assert!(core::mem::offset_of!(Frames, begin) == 28 && size_of::<Frames>() == 48);

/// Tells the unwinder about the page. Called before a process's first pthread_cancel(3): until then
/// nobody unwinds through it, and a registered table makes every C++ exception a little slower.
pub fn describe() {
    static DONE: AtomicUsize = AtomicUsize::new(0);
    if !installed() || DONE.swap(1, Ordering::Relaxed) != 0 {
        return;
    }
    let lookup = |name: &CStr| {
        // SAFETY: both strings are C strings. pthread_cancel loads this library itself.
        unsafe {
            let library = libc::dlopen(c"libgcc_s.so.1".as_ptr(), libc::RTLD_NOW);
            if library.is_null() { null_mut() } else { libc::dlsym(library, name.as_ptr()) }
        }
    };
    let register: *mut c_void = lookup(c"__register_frame");
    if !register.is_null() {
        // SAFETY: libgcc's `void __register_frame(void *)`, which keeps a pointer into a static.
        unsafe {
            let register: unsafe extern "C" fn(*const Frames) = core::mem::transmute(register);
            register(&raw const FRAMES);
        }
    }
}

/// The page as memory, for tests.
#[must_use]
pub fn page() -> Option<*const u8> {
    installed().then(|| with_exposed_provenance_mut::<u8>(entry()).cast_const())
}
