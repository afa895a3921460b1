//! What a process image remembers.
//!
//! One anonymous mapping, made by the constructor. Its first part is wiped by the kernel in a forked
//! child (`MADV_WIPEONFORK`, madvise(2)), whichever way it forks: so the child has no channel, no verdict
//! table and no peers, and nobody had to hook fork. The hints behind it stay, as descriptors do.
//!
//! A child of vfork(2) shares this memory with its parent and must not change it: see [`borrowed`].
#![expect(unsafe_code, reason = "hands out references into the mapping and shared memory")]

use core::{
    arch::{asm, global_asm},
    ptr::null_mut,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering},
};

use libc::c_int;
use portcullis_wire::shared::{Ring, StatePage, VerdictTable};

use crate::{hints, sys};

/// Channels that wait for use by the next call.
pub const CHANNELS: usize = 4;
/// Channels that are opened before a sandbox closes, for those that have none of their own in it.
pub const SPARES: usize = 4;
/// Datagram peers that are remembered.
pub const PEERS: usize = 1024;

/// Wiped in a forked child.
#[repr(C, align(4096))]
pub struct Own {
    /// Idle channels, see [`crate::channel`].
    pub channels: [AtomicU64; CHANNELS],
    state: AtomicPtr<StatePage>,
    table: AtomicPtr<VerdictTable>,
    ring: AtomicPtr<Ring>,
    /// Number of the last request.
    pub seq: AtomicU32,
    /// Counts what makes remembered peers void: changed credentials.
    pub epoch: AtomicU32,
    /// Peers of datagram sockets that were judged, see [`crate::dgram`].
    pub peers: [[AtomicU64; 4]; PEERS],
}

#[repr(C)]
struct Memory {
    own: Own,
    hints: [AtomicU64; hints::MOST],
}

static MEMORY: AtomicPtr<Memory> = AtomicPtr::new(null_mut());

/// See [`spares`].
static SPARE: AtomicPtr<[AtomicU64; SPARES]> = AtomicPtr::new(null_mut());

/// Set once the program enters a sandbox; for good, and in its children too.
static SANDBOXED: AtomicBool = AtomicBool::new(false);

/// Makes the mapping. Without it every call asks, over a channel of its own.
pub fn install() {
    let length = size_of::<Memory>();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let Some(at) = sys::map(0, length, libc::PROT_READ | libc::PROT_WRITE, flags, -1) else { return };
    // SAFETY: a mapping made just now; wiping takes nothing from this process.
    let wiped = unsafe { sys::over(libc::SYS_madvise, at.addr(), size_of::<Own>(), libc::MADV_WIPEONFORK) };
    if wiped {
        MEMORY.store(at.cast(), Ordering::Release);
    } else {
        // SAFETY: nobody has seen it. Before Linux 4.14; a child must not inherit verdicts.
        unsafe { sys::over(libc::SYS_munmap, at.addr(), length, 0) };
    }
}

fn memory() -> Option<&'static Memory> {
    // SAFETY: null, or a mapping of this size that is never unmapped; all its content is atomic,
    // for which any bytes are valid.
    unsafe { MEMORY.load(Ordering::Acquire).as_ref() }
}

/// What is wiped at fork.
pub fn own() -> Option<&'static Own> {
    Some(&memory()?.own)
}

/// What is not.
pub fn hints() -> Option<&'static [AtomicU64]> {
    Some(&memory()?.hints)
}

/// Channels for threads and children of a process in a sandbox: in memory that all of them share, so that each is
/// taken once.
pub fn spares() -> &'static [AtomicU64] {
    // SAFETY: null, or a mapping of at least this size that is never unmapped; its content is atomic.
    unsafe { SPARE.load(Ordering::Acquire).as_ref() }.map_or(&[], |all| all.as_slice())
}

/// Makes room for them.
pub fn make_spares() {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    if SPARE.load(Ordering::Acquire).is_null()
        && let Some(at) = sys::map(0, 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
    {
        SPARE.store(at.cast(), Ordering::Release);
    }
}

/// Whether system calls other than the program's own may kill it.
pub fn sandboxed() -> bool {
    SANDBOXED.load(Ordering::Relaxed)
}

/// Says that the program enters a sandbox (or, if that failed, did not).
pub fn set_sandboxed(is: bool) {
    SANDBOXED.store(is, Ordering::Relaxed);
}

// portcullis_borrowed: a thread's flag, set by `vfork` in the child and cleared in the parent, which
// share it. Its own section, addressed as initial-exec: the shim is always loaded with the program.
//
// portcullis_vfork: vfork(2) as glibc has it (sysdeps/unix/sysv/linux/x86_64/vfork.S): the return
// address is kept in a register, as the child will have used the stack.
global_asm!(
    ".pushsection .tbss.portcullis_borrowed,\"awT\",@nobits",
    ".hidden portcullis_borrowed",
    ".globl portcullis_borrowed",
    ".type portcullis_borrowed,@object",
    ".size portcullis_borrowed, 4",
    ".p2align 2",
    "portcullis_borrowed: .zero 4",
    ".popsection",
    ".pushsection .text.portcullis_vfork,\"ax\",@progbits",
    ".globl portcullis_vfork",
    ".hidden portcullis_vfork",
    ".type portcullis_vfork,@function",
    "portcullis_vfork:",
    ".cfi_startproc",
    "pop rdi",
    ".cfi_adjust_cfa_offset -8",
    ".cfi_register rip, rdi",
    "mov eax, 58", // SYS_vfork
    "syscall",
    "push rdi",
    ".cfi_adjust_cfa_offset 8",
    ".cfi_rel_offset rip, 0",
    "xor edx, edx",
    "test rax, rax",
    "sete dl",
    "mov rcx, qword ptr [rip + portcullis_borrowed@GOTTPOFF]",
    "mov dword ptr fs:[rcx], edx",
    "js 2f",
    "ret",
    "2:",
    "mov rdi, rax",
    "jmp {failed}",
    ".cfi_endproc",
    ".size portcullis_vfork, .-portcullis_vfork",
    ".popsection",
    failed = sym vfork_failed,
);

extern "C" fn vfork_failed(result: isize) -> c_int {
    crate::shield::returned_int(result)
}

unsafe extern "C" {
    /// vfork(2), noticed; returns twice.
    pub fn portcullis_vfork() -> c_int;
}

/// Whether this is the child of a vfork(2), in its parent's memory, before its exec.
#[inline]
#[must_use]
pub fn borrowed() -> bool {
    let flag: u64;
    // SAFETY: reads this thread's copy of the variable defined above.
    unsafe {
        asm!("mov {r}, qword ptr [rip + portcullis_borrowed@GOTTPOFF]", "mov {r:e}, dword ptr fs:[{r}]",
             r = out(reg) flag, options(nostack, readonly, preserves_flags));
    }
    flag != 0
}

/// What the broker shares with this process.
#[derive(Clone, Copy)]
pub struct Shared {
    /// What it tells all.
    pub state: &'static StatePage,
    /// Verdicts.
    pub table: &'static VerdictTable,
    /// Records of calls that were not asked about.
    pub ring: &'static Ring,
}

/// The shared memory of this process, if it has got any.
pub fn shared() -> Option<Shared> {
    if borrowed() {
        return None;
    }
    let own = own()?;
    // SAFETY: each is null or a mapping of at least this size (checked in `adopt`) that is never
    // unmapped; the content is atomic. `table` is published last, so the others are there.
    unsafe {
        let table = own.table.load(Ordering::Acquire).as_ref()?;
        let state = own.state.load(Ordering::Relaxed).as_ref()?;
        let ring = own.ring.load(Ordering::Relaxed).as_ref()?;
        Some(Shared { state, table, ring })
    }
}

/// Stops using what the broker shared: credentials changed, or it was another broker's. The mappings
/// stay, because another thread may be reading them.
pub fn forsake() {
    if let Some(own) = own() {
        own.table.store(null_mut(), Ordering::Release);
        own.epoch.fetch_add(1, Ordering::Relaxed);
    }
}

/// As [`forsake`], until the broker has emptied the table: gives what [`resume`] takes.
pub fn suspend() -> *mut VerdictTable {
    let Some(own) = own() else { return null_mut() };
    own.epoch.fetch_add(1, Ordering::Relaxed);
    own.table.swap(null_mut(), Ordering::AcqRel)
}

/// Uses a table again; unless another came in its place meanwhile.
pub fn resume(table: *mut VerdictTable) {
    if let Some(own) = own() {
        let _ = own.table.compare_exchange(null_mut(), table, Ordering::AcqRel, Ordering::Relaxed);
    }
}

/// Takes over the three descriptors of a reply with memory, and closes them.
pub fn adopt(fds: [c_int; 3]) {
    let [state, table, ring] = fds;
    let read = libc::PROT_READ;
    let state_at = map::<StatePage>(state, read);
    let table_at = map::<VerdictTable>(table, read);
    let ring_at = map::<Ring>(ring, read | libc::PROT_WRITE);
    for fd in fds {
        sys::close(fd);
    }
    match (own(), state_at, table_at, ring_at) {
        (Some(own), Some(state), Some(table), Some(ring)) => {
            own.table.store(null_mut(), Ordering::Release);
            own.state.store(state, Ordering::Relaxed);
            own.ring.store(ring, Ordering::Relaxed);
            own.table.store(table, Ordering::Release);
        }
        (_, a, b, c) => {
            unmap(a);
            unmap(b);
            unmap(c);
        }
    }
}

fn map<T>(fd: c_int, protection: c_int) -> Option<*mut T> {
    if sys::file_size(fd)? < size_of::<T>() {
        return None;
    }
    let at = sys::map(0, size_of::<T>(), protection, libc::MAP_SHARED, fd)?;
    // A child has neither this memory nor its address.
    // SAFETY: a mapping made just now.
    unsafe { sys::over(libc::SYS_madvise, at.addr(), size_of::<T>(), libc::MADV_DONTFORK) };
    Some(at.cast())
}

fn unmap<T>(at: Option<*mut T>) {
    if let Some(at) = at {
        // SAFETY: a mapping that nobody was told of.
        unsafe { sys::over(libc::SYS_munmap, at.addr(), size_of::<T>(), 0) };
    }
}

/// The ring, even of verdicts that are no longer used: what is in it has happened.
pub fn ring() -> Option<&'static Ring> {
    if borrowed() {
        return None;
    }
    // SAFETY: as in `shared`.
    unsafe { own()?.ring.load(Ordering::Acquire).as_ref() }
}
