//! The few bpf(2) commands that aya does not have in the form needed here.
//!
//! Programs are attached by `BPF_PROG_ATTACH`, not by a link: such an attachment belongs to the cgroup
//! and lives until the cgroup is removed, whatever becomes of us, without a file system to pin it in.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Read},
    ops::Deref,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr::{NonNull, null_mut},
    slice,
};

use aya_obj::generated::bpf_insn;

// enum bpf_cmd, linux/bpf.h
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const PROG_QUERY: libc::c_int = 16;
const LINK_CREATE: libc::c_int = 28;
const ITER_CREATE: libc::c_int = 33;

/// `BPF_F_ALLOW_MULTI`: programs of this cgroup and of those above all run, and all must agree.
const ALLOW_MULTI: u32 = 1 << 1;
/// `BPF_TRACE_ITER`
const TRACE_ITER: u32 = 28;

/// `union bpf_attr` as 32-bit words, the widest part used here being 64 bytes.
type Attr = [u32; 32];

fn bpf(command: libc::c_int, attr: &mut Attr) -> io::Result<libc::c_long> {
    // SAFETY: bpf(2) reads and writes at most the given size of `attr`, which is live and as long.
    // Pointers inside are made by the callers below from live buffers of the length they state.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of::<Attr>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn word(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn attr(words: &[u32]) -> Attr {
    let mut attr = [0; 32];
    for (to, from) in attr.iter_mut().zip(words) {
        *to = *from;
    }
    attr
}

#[expect(clippy::cast_possible_truncation, reason = "the halves of an address, in memory order")]
fn pointer<T>(to: *const T) -> [u32; 2] {
    let address = to as u64;
    [address as u32, (address >> 32) as u32]
}

fn set(attr: &mut Attr, from: usize, words: &[u32]) {
    for (to, word) in attr.iter_mut().skip(from).zip(words) {
        *to = *word;
    }
}

/// A name as `BPF_OBJ_NAME_LEN` has room for it, with its NUL.
fn letters(name: &str) -> [u32; 4] {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(15)) {
        // The kernel takes no other sign.
        *to = if from.is_ascii_alphanumeric() || from == b'_' || from == b'.' { from } else { b'_' };
    }
    let (words, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|at| words.get(at).map_or(0, |w| u32::from_ne_bytes(*w)))
}

/// Makes a map: its type, length of a key, length of a value, most entries, flags.
pub(crate) fn create(name: &str, shape: [u32; 5]) -> io::Result<OwnedFd> {
    let mut asked = attr(&shape);
    set(&mut asked, 7, &letters(name));
    owned(bpf(MAP_CREATE, &mut asked)?)
}

/// Where a program will run.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// On a cgroup, by its `enum bpf_attach_type`.
    OnCgroup(u32),
    /// As an iterator over tasks, by the kernel's number of its function.
    TaskIterator(u32),
}

impl Kind {
    /// `enum bpf_prog_type`, `enum bpf_attach_type`, and the function.
    const fn words(self) -> [u32; 3] {
        match self {
            Self::OnCgroup(packets @ 0..=1) => [8, packets, 0],
            Self::OnCgroup(sock_create @ 2) => [9, sock_create, 0],
            Self::OnCgroup(with_address) => [18, with_address, 0],
            Self::TaskIterator(function) => [26, TRACE_ITER, function],
        }
    }
}

/// Loads one program. An error has the verifier's last words.
pub(crate) fn load(kind: Kind, name: &str, code: &[bpf_insn], license: &CStr) -> io::Result<OwnedFd> {
    let [program, hook, function] = kind.words();
    let count = u32::try_from(code.len()).map_err(io::Error::other)?;
    let [code_low, code_high] = pointer(code.as_ptr());
    let [license_low, license_high] = pointer(license.as_ptr());
    let mut asked = attr(&[program, count, code_low, code_high, license_low, license_high]);
    set(&mut asked, 12, &letters(name));
    set(&mut asked, 17, &[hook]);
    set(&mut asked, 27, &[function]);
    let error = match bpf(PROG_LOAD, &mut asked.clone()) {
        Ok(fd) => return owned(fd),
        Err(error) => error,
    };
    let mut words = vec![0u8; 1 << 20];
    let [low, high] = pointer(words.as_mut_ptr());
    set(&mut asked, 6, &[1, 1 << 20, low, high]);
    if let Ok(fd) = bpf(PROG_LOAD, &mut asked) {
        return owned(fd);
    }
    let said = CStr::from_bytes_until_nul(&words).map(CStr::to_string_lossy).unwrap_or_default();
    let last = said.trim_end().lines().rev().take(3).collect::<Vec<_>>().join("; ");
    Err(io::Error::new(error.kind(), format!("{error} ({last})")))
}

/// Whether the kernel takes a routing header (RFC 8200, 4.4) for what a socket sends. Only its own word that it does not
/// counts: whatever else fails says nothing of that.
pub(crate) fn takes_ipv6_route(header: &[u8]) -> bool {
    const IPV6_RTHDR: libc::c_int = 57; // linux/in6.h
    // SAFETY: numbers.
    let made = unsafe { libc::socket(libc::AF_INET6, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    let fails_with = |errno| io::Error::last_os_error().raw_os_error() == Some(errno);
    if made < 0 {
        return !fails_with(libc::EAFNOSUPPORT);
    }
    let Ok(socket) = owned(made.into()) else { return true };
    let length = libc::socklen_t::try_from(header.len()).unwrap_or(0);
    let level = libc::IPPROTO_IPV6;
    // SAFETY: setsockopt(2) reads `length` bytes of `header`, which has as many.
    let set =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, IPV6_RTHDR, header.as_ptr().cast(), length) };
    set == 0 || !fails_with(libc::EINVAL)
}

/// Puts a value into a map. Both are as long as the map was made for.
pub(crate) fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let [key_low, key_high] = pointer(key.as_ptr());
    let [value_low, value_high] = pointer(value.as_ptr());
    bpf(MAP_UPDATE_ELEM, &mut attr(&[word(map), 0, key_low, key_high, value_low, value_high])).map(drop)
}

/// Attaches a program to a cgroup for as long as the cgroup exists.
pub(crate) fn attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, hook: u32) -> io::Result<()> {
    bpf(PROG_ATTACH, &mut attr(&[word(cgroup), word(program), hook, ALLOW_MULTI])).map(drop)
}

/// Takes one program off a cgroup.
pub(crate) fn detach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, hook: u32) -> io::Result<()> {
    bpf(PROG_DETACH, &mut attr(&[word(cgroup), word(program), hook])).map(drop)
}

/// Ids of the programs that are attached to this very cgroup.
pub(crate) fn attached(cgroup: BorrowedFd<'_>, hook: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0u32; 64]; // BPF_CGROUP_MAX_PROGS, linux/bpf-cgroup.h
    let [low, high] = pointer(ids.as_mut_ptr());
    let mut asked = attr(&[word(cgroup), hook, 0, 0, low, high, 64]);
    bpf(PROG_QUERY, &mut asked)?;
    let count = asked.get(6).map_or(0, |n| *n as usize);
    Ok(ids.into_iter().take(count).collect())
}

/// A program by its id.
pub(crate) fn program(id: u32) -> io::Result<OwnedFd> {
    owned(bpf(PROG_GET_FD_BY_ID, &mut attr(&[id]))?)
}

/// Mounts a file system without a name (fsopen(2), fsmount(2); Linux 5.2). It goes with the descriptor.
pub(crate) fn mount_unnamed(kind: &CStr) -> io::Result<OwnedFd> {
    const CREATE: libc::c_uint = 6; // FSCONFIG_CMD_CREATE, linux/mount.h
    const CLOSE_ON_EXEC: libc::c_uint = 1; // FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
    let checked = |done: libc::c_long| if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) };
    // SAFETY: a C string; the results are descriptors that nobody else knows. fsconfig's command takes
    // neither key nor value.
    unsafe {
        let open = owned(checked(libc::syscall(libc::SYS_fsopen, kind.as_ptr(), CLOSE_ON_EXEC))?)?;
        let none = std::ptr::null::<libc::c_char>();
        checked(libc::syscall(libc::SYS_fsconfig, open.as_raw_fd(), CREATE, none, none, 0))?;
        owned(checked(libc::syscall(libc::SYS_fsmount, open.as_raw_fd(), CLOSE_ON_EXEC, 0))?)
    }
}

/// Runs an iterator over tasks, over the one thread `tid` where the kernel can (6.1), else over all,
/// and returns what the program wrote.
pub(crate) fn iterate(program: BorrowedFd<'_>, tid: u32, out: &mut [u8]) -> io::Result<usize> {
    let info = [tid, 0u32, 0]; // union bpf_iter_link_info: task { tid, pid, pid_fd }
    let [low, high] = pointer(info.as_ptr());
    let one = attr(&[word(program), 0, TRACE_ITER, 0, low, high, 12]);
    let link = match bpf(LINK_CREATE, &mut one.clone()) {
        Ok(link) => owned(link)?,
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(0),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::E2BIG)) => {
            owned(bpf(LINK_CREATE, &mut attr(&[word(program), 0, TRACE_ITER]))?)?
        }
        Err(e) => return Err(e),
    };
    let mut file = File::from(owned(bpf(ITER_CREATE, &mut attr(&[word(std::os::fd::AsFd::as_fd(&link))]))?)?);
    let mut got = 0;
    loop {
        let Some(room) = out.get_mut(got..).filter(|room| !room.is_empty()) else { return Ok(got) };
        match file.read(room) {
            Ok(0) => return Ok(got),
            Ok(n) => got += n,
            // EAGAIN: the kernel paused after a million tasks
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => return Err(e),
        }
    }
}

/// What stands in a file of the kernel's that never changes.
pub(crate) enum Contents {
    /// In the kernel's own memory.
    Mapped(NonNull<u8>, usize),
    /// As a copy.
    Read(Vec<u8>),
}

impl Contents {
    /// Maps the file, or reads it where it cannot be mapped (type information can from Linux 6.16).
    pub(crate) fn of(path: &str) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        // SAFETY: a new mapping, for reading, where the kernel finds room.
        let at = unsafe {
            libc::mmap(null_mut(), length, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
        };
        if at != libc::MAP_FAILED
            && let Some(at) = NonNull::new(at.cast())
        {
            return Ok(Self::Mapped(at, length));
        }
        let mut copy = Vec::with_capacity(length);
        file.read_to_end(&mut copy)?;
        Ok(Self::Read(copy))
    }
}

impl Deref for Contents {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            // SAFETY: mapped for as long as `self` lives, and written by nobody.
            Self::Mapped(at, length) => unsafe { slice::from_raw_parts(at.as_ptr(), *length) },
            Self::Read(copy) => copy,
        }
    }
}

impl Drop for Contents {
    fn drop(&mut self) {
        if let Self::Mapped(at, length) = self {
            // SAFETY: the mapping is ours alone, and slices of it do not outlive `self`.
            let _unmapped = unsafe { libc::munmap(at.as_ptr().cast(), *length) };
        }
    }
}
