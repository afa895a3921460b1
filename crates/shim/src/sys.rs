//! Raw system calls for our own traffic: libc's functions would meet our own hooks, set `errno`, and
//! be cancellation points.
//!
//! All results are the kernel's: negative values are errnos.
#![expect(unsafe_code, reason = "the one place of raw system calls, apart from the gate page")]

use core::{
    arch::asm,
    mem::{MaybeUninit, size_of},
    ptr::{from_mut, from_ref, null_mut},
};

use libc::{c_int, c_long, c_void, iovec, msghdr};

use crate::gate;

/// One system call.
///
/// # Safety
/// As for the call: pointers among the arguments must be good for what the kernel does with them.
#[inline]
pub unsafe fn call(nr: c_long, args: [usize; 6]) -> isize {
    let [a, b, c, d, e, f] = args;
    let result: c_long;
    // SAFETY: the x86_64 ABI of system calls (syscall(2)): rcx and r11 are lost, memory may change.
    unsafe {
        asm!("syscall", inlateout("rax") nr => result, in("rdi") a, in("rsi") b, in("rdx") c,
             in("r10") d, in("r8") e, in("r9") f, lateout("rcx") _, lateout("r11") _,
             options(nostack));
    }
    isize::try_from(result).unwrap_or(-1)
}

/// A descriptor as the kernel takes it.
#[must_use]
pub const fn arg(n: c_int) -> usize {
    n as isize as usize
}

fn int(result: isize) -> c_int {
    c_int::try_from(result).unwrap_or(-libc::EINVAL)
}

/// close(2).
pub fn close(fd: c_int) {
    // SAFETY: no pointers. The descriptor is ours by the callers' contract.
    unsafe { call(libc::SYS_close, [arg(fd), 0, 0, 0, 0, 0]) };
}

/// fcntl(2) with a number.
pub fn fcntl(fd: c_int, command: c_int, value: c_int) -> c_int {
    // SAFETY: only called with commands that take a number.
    int(unsafe { call(libc::SYS_fcntl, [arg(fd), arg(command), arg(value), 0, 0, 0]) })
}

/// The calling process's id, which a vfork(2) child does not share with its parent.
pub fn getpid() -> c_int {
    // SAFETY: no arguments.
    int(unsafe { call(libc::SYS_getpid, [0; 6]) })
}

/// Reads an integer option; `None` if the descriptor is no socket or has no such option.
pub fn getsockopt(fd: c_int, option: c_int) -> Option<c_int> {
    option_as(fd, option, 0)
}

/// Who made the other end of a unix socket (`SO_PEERCRED`, unix(7)).
pub fn peer_credentials(fd: c_int) -> Option<libc::ucred> {
    option_as(fd, libc::SO_PEERCRED, libc::ucred { pid: 0, uid: 0, gid: 0 })
}

/// How long a call waits for something to arrive, in milliseconds as poll(2) takes them: -1 for ever.
pub fn patience(fd: c_int, flags: c_int) -> c_int {
    if flags & libc::MSG_DONTWAIT != 0 || fcntl(fd, libc::F_GETFL, 0) & libc::O_NONBLOCK != 0 {
        return 0;
    }
    let time = option_as(fd, libc::SO_RCVTIMEO, libc::timeval { tv_sec: 0, tv_usec: 0 });
    match time.map(|t| t.tv_sec.saturating_mul(1000).saturating_add((t.tv_usec + 999) / 1000)) {
        None | Some(0) => -1,
        Some(time) => c_int::try_from(time).unwrap_or(c_int::MAX),
    }
}

/// Reads an option of whose type every value is valid.
fn option_as<T>(fd: c_int, option: c_int, mut value: T) -> Option<T> {
    let mut length = u32::try_from(size_of::<T>()).ok()?;
    // SAFETY: `value` and `length` are writable for what getsockopt(2) writes.
    let result = unsafe {
        call(
            libc::SYS_getsockopt,
            [
                arg(fd),
                arg(libc::SOL_SOCKET),
                arg(option),
                from_mut(&mut value).addr_exposed(),
                from_mut(&mut length).addr_exposed(),
                0,
            ],
        )
    };
    (result == 0).then_some(value)
}

/// Sets a socket option to the bytes of `value`.
pub fn setsockopt<T>(fd: c_int, option: c_int, value: &T) -> bool {
    // SAFETY: `value` is readable for its size.
    let result = unsafe {
        call(
            libc::SYS_setsockopt,
            [arg(fd), arg(libc::SOL_SOCKET), arg(option), from_ref(value).addr_exposed(), size_of::<T>(), 0],
        )
    };
    result == 0
}

/// Room for any socket address (`struct sockaddr_storage`, socket(7)).
pub type AddressBytes = [u8; 128];

/// getsockname(2) or getpeername(2), by `nr`: bytes and length.
pub fn name(nr: c_long, fd: c_int) -> Option<(AddressBytes, usize)> {
    let mut bytes = [0u8; 128];
    let mut length = 128u32;
    // SAFETY: both are writable for what the call writes.
    let result = unsafe {
        call(
            nr,
            [arg(fd), from_mut(&mut bytes).addr_exposed(), from_mut(&mut length).addr_exposed(), 0, 0, 0],
        )
    };
    (result == 0).then_some((bytes, length.min(128) as usize))
}

/// A connected pair of `SOCK_SEQPACKET` sockets, close-on-exec.
pub fn pair() -> Result<[c_int; 2], c_int> {
    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: `fds` has room for two descriptors.
    let result = unsafe {
        call(
            libc::SYS_socketpair,
            [arg(libc::AF_UNIX), arg(kind), 0, from_mut(&mut fds).addr_exposed(), 0, 0],
        )
    };
    if result == 0 { Ok(fds) } else { Err(int(-result)) }
}

/// A fresh, unconnected `SOCK_SEQPACKET` socket, close-on-exec.
pub fn seqpacket() -> c_int {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers.
    int(unsafe { call(libc::SYS_socket, [arg(libc::AF_UNIX), arg(kind), 0, 0, 0, 0]) })
}

/// connect(2) of a socket of our own, from the gate page.
pub fn connect_unix(fd: c_int, address: &libc::sockaddr_un) -> bool {
    let args = [arg(fd), from_ref(address).addr_exposed(), size_of::<libc::sockaddr_un>(), 0, 0, 0];
    // SAFETY: `address` is readable for the length given.
    let result = unsafe { gate::call(libc::SYS_connect, &args) };
    result == 0
}

/// Device and inode of an open file, if it is a socket; tells whether a number is still our own.
pub fn socket_inode(fd: c_int) -> Option<u32> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `stat` has room for what fstat(2) writes.
    let result = unsafe { call(libc::SYS_fstat, [arg(fd), stat.as_mut_ptr().addr_exposed(), 0, 0, 0, 0]) };
    if result != 0 {
        return None;
    }
    // SAFETY: fstat succeeded, so the kernel has written all of it.
    let stat = unsafe { stat.assume_init() };
    if stat.st_mode & libc::S_IFMT != libc::S_IFSOCK {
        return None;
    }
    // Inodes of sockets come from a 32-bit counter (get_next_ino, fs/inode.c).
    u32::try_from(stat.st_ino & 0xffff_ffff).ok()
}

/// Size of an open file.
pub fn file_size(fd: c_int) -> Option<usize> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: as in `socket_inode`.
    let result = unsafe { call(libc::SYS_fstat, [arg(fd), stat.as_mut_ptr().addr_exposed(), 0, 0, 0, 0]) };
    // SAFETY: as in `socket_inode`.
    if result == 0 { usize::try_from(unsafe { stat.assume_init() }.st_size).ok() } else { None }
}

/// mmap(2); `None` if the kernel refuses.
pub fn map(at: usize, length: usize, protection: c_int, flags: c_int, fd: c_int) -> Option<*mut c_void> {
    let args = [at, length, arg(protection), arg(flags), arg(fd), 0];
    // SAFETY: never called with MAP_FIXED, so nothing that exists is replaced.
    let result = unsafe { call(libc::SYS_mmap, args) };
    if (-4095..0).contains(&result) {
        None
    } else {
        Some(core::ptr::with_exposed_provenance_mut(result.cast_unsigned()))
    }
}

/// mprotect(2), madvise(2) or munmap(2) over memory of our own.
///
/// # Safety
/// The range must be a mapping of the shim's, and nobody may use what it takes away.
pub unsafe fn over(nr: c_long, at: usize, length: usize, how: c_int) -> bool {
    // SAFETY: by this function's contract.
    unsafe { call(nr, [at, length, arg(how), 0, 0, 0]) == 0 }
}

/// Most descriptors that one message of ours carries.
const MOST: usize = 4;

/// `SCM_RIGHTS` as the kernel lays it out (cmsg(3)), with room for [`MOST`] descriptors.
#[repr(C, align(8))]
struct Control {
    length: usize,
    level: c_int,
    kind: c_int,
    fds: [c_int; MOST],
}

const HEADER: usize = 16;

/// Sends one frame, with one descriptor unless `attach` is negative; from the gate page, as the guard
/// asks about every other sendmsg(2). Never raises `SIGPIPE`.
pub fn send(fd: c_int, bytes: &[u8], attach: c_int, flags: c_int) -> isize {
    let mut io = iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = Control {
        length: HEADER + 4,
        level: libc::SOL_SOCKET,
        kind: libc::SCM_RIGHTS,
        fds: [attach, 0, 0, 0],
    };
    let message = msghdr {
        msg_name: null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut io,
        msg_iovlen: 1,
        msg_control: if attach < 0 { null_mut() } else { (&raw mut control).cast() },
        msg_controllen: if attach < 0 { 0 } else { HEADER + 8 },
        msg_flags: 0,
    };
    let args = [arg(fd), from_ref(&message).addr_exposed(), arg(libc::MSG_NOSIGNAL | flags), 0, 0, 0];
    loop {
        // SAFETY: `message` and all it points to outlive the call.
        let result = unsafe { gate::call(libc::SYS_sendmsg, &args) };
        if result != -(libc::EINTR as isize) {
            return result;
        }
    }
}

/// Receives one frame into `bytes`, and descriptors (close-on-exec) into `fds`; how many of each.
pub fn receive(fd: c_int, bytes: &mut [u8], fds: &mut [c_int; 3]) -> (isize, usize) {
    let mut io = iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = Control { length: 0, level: 0, kind: 0, fds: [-1; MOST] };
    let mut message = msghdr {
        msg_name: null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut io,
        msg_iovlen: 1,
        msg_control: (&raw mut control).cast(),
        msg_controllen: size_of::<Control>(),
        msg_flags: 0,
    };
    let result = loop {
        let args = [arg(fd), from_mut(&mut message).addr_exposed(), arg(libc::MSG_CMSG_CLOEXEC), 0, 0, 0];
        // SAFETY: `message` and all it points to outlive the call and are writable.
        let result = unsafe { call(libc::SYS_recvmsg, args) };
        if result != -(libc::EINTR as isize) {
            break result;
        }
        message.msg_controllen = size_of::<Control>();
    };
    let mut got = 0;
    let rights = control.level == libc::SOL_SOCKET && control.kind == libc::SCM_RIGHTS;
    if result >= 0 && message.msg_controllen >= HEADER && rights {
        let there = control.length.saturating_sub(HEADER) / 4;
        for (i, &one) in control.fds.iter().take(there).enumerate() {
            match fds.get_mut(i) {
                Some(slot) => {
                    *slot = one;
                    got = i + 1;
                }
                None => close(one),
            }
        }
    }
    (result, got)
}

/// write(2) of a whole frame, for sandboxes that let nothing else through.
pub fn write(fd: c_int, bytes: &[u8]) -> isize {
    // SAFETY: `bytes` is readable for its length.
    unsafe { call(libc::SYS_write, [arg(fd), bytes.as_ptr().addr_exposed(), bytes.len(), 0, 0, 0]) }
}

/// read(2) of one frame, for sandboxes that let nothing else through.
pub fn read(fd: c_int, bytes: &mut [u8]) -> isize {
    loop {
        let args = [arg(fd), bytes.as_mut_ptr().addr_exposed(), bytes.len(), 0, 0, 0];
        // SAFETY: `bytes` is writable for its length.
        let result = unsafe { call(libc::SYS_read, args) };
        if result != -(libc::EINTR as isize) {
            return result;
        }
    }
}

/// Whether a stretch of memory need not be asked about: nothing may be asked in a sandbox, and what lies in the
/// callers' frames, just above ours, where most addresses are, is good.
fn is_trusted(at: *const u8) -> bool {
    const FRAMES: usize = 16_384;
    let here = 0u8;
    at.addr().wrapping_sub(from_ref(&here).addr()) < FRAMES || crate::own::sandboxed()
}

/// Whether it cannot be a program's: the first page, and what is not below the last one below 2^47.
fn is_nobodys(at: *const u8) -> bool {
    !(4096..0x7fff_ffff_f000).contains(&at.addr())
}

/// Whether the kernel can read a stretch of memory of up to 128 bytes. A wild pointer is the kernel's to
/// answer (`EFAULT`), not ours to stumble over.
///
/// sigprocmask(2) reads the new set before it looks at how to apply it, and this is no way to.
pub fn readable(at: *const u8, length: usize) -> bool {
    const NO_WAY: c_int = 99;
    if is_nobodys(at) {
        return false;
    }
    if is_trusted(at) {
        return true;
    }
    let first = at.addr();
    // Both ends: 128 bytes touch two pages at most.
    [first, first.wrapping_add(length.clamp(SIGSET, 128)).wrapping_sub(SIGSET)].into_iter().enumerate().all(
        |(i, end)| {
            if i == 1 && end >> 12 == first >> 12 {
                return true;
            }
            // SAFETY: the kernel only reads, and checks that it can.
            let result = unsafe { call(libc::SYS_rt_sigprocmask, [arg(NO_WAY), end, 0, SIGSET, 0, 0]) };
            result != -(libc::EFAULT as isize)
        },
    )
}

/// Whether a stretch of memory of up to 128 bytes can be written. Nothing is written.
pub fn writable(at: *const u8, length: usize) -> bool {
    if is_nobodys(at) {
        return false;
    }
    if is_trusted(at) {
        return true;
    }
    let populates = |first: usize, last: usize| {
        const POPULATE_WRITE: c_int = 23; // MADV_POPULATE_WRITE, Linux 5.14
        let page = first & !0xfff;
        // SAFETY: the pages' content stays as it is.
        unsafe {
            call(libc::SYS_madvise, [page, (last | 0xfff) + 1 - page, arg(POPULATE_WRITE), 0, 0, 0]) == 0
        }
    };
    let here = from_ref(&at).addr();
    // Where the kernel cannot tell, not even of what can be, the program has to know.
    populates(at.addr(), at.addr() + length.clamp(1, 128) - 1) || !populates(here, here)
}

/// All signals blocked while it lives, so that a handler's own connect(2) finds no half-done round
/// trip beneath it, and one that longjmp(3)s away leaves none behind.
pub struct Quiet(u64);

/// Size of the kernel's `sigset_t` (`_NSIG / 8`), which is not libc's.
const SIGSET: usize = 8;

impl Quiet {
    /// Blocks.
    #[must_use]
    pub fn new() -> Self {
        let (all, mut was) = (u64::MAX, 0u64);
        let args = [
            arg(libc::SIG_SETMASK),
            from_ref(&all).addr_exposed(),
            from_mut(&mut was).addr_exposed(),
            SIGSET,
            0,
            0,
        ];
        // SAFETY: both sets are 8 bytes, as said.
        unsafe { call(libc::SYS_rt_sigprocmask, args) };
        Self(was)
    }
}

impl Default for Quiet {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        let args = [arg(libc::SIG_SETMASK), from_ref(&self.0).addr_exposed(), 0, SIGSET, 0, 0];
        // SAFETY: the set is 8 bytes, as said.
        unsafe { call(libc::SYS_rt_sigprocmask, args) };
    }
}

/// Nanoseconds of a clock; through the vDSO, so without a system call.
#[must_use]
pub fn nanoseconds(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable. clock_gettime(3) is async-signal-safe and not hooked.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec.cast_unsigned().wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec.cast_unsigned())
}

/// A pointer as a system call's argument.
trait Exposed {
    fn addr_exposed(self) -> usize;
}
impl<T> Exposed for *const T {
    fn addr_exposed(self) -> usize {
        self.expose_provenance()
    }
}
impl<T> Exposed for *mut T {
    fn addr_exposed(self) -> usize {
        self.expose_provenance()
    }
}

/// Runs `what` with the soft limit of descriptors a little higher, if the hard limit permits.
pub fn with_more_descriptors<T>(what: impl FnOnce() -> Option<T>) -> Option<T> {
    let mut was = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let prlimit = |set: *const libc::rlimit, get: *mut libc::rlimit| {
        let resource = libc::RLIMIT_NOFILE as usize;
        // SAFETY: each is null or points to a `struct rlimit`, which rlimit64 is on x86_64.
        unsafe {
            call(libc::SYS_prlimit64, [0, resource, set.expose_provenance(), get.expose_provenance(), 0, 0])
                == 0
        }
    };
    if !prlimit(core::ptr::null(), &raw mut was) || was.rlim_cur >= was.rlim_max {
        return None;
    }
    let more = libc::rlimit { rlim_cur: was.rlim_cur.saturating_add(64).min(was.rlim_max), ..was };
    if !prlimit(&raw const more, null_mut()) {
        return None;
    }
    let result = what();
    prlimit(&raw const was, null_mut());
    result
}
