//! Reads a held caller's memory and asks which process a thread belongs to.

use std::{fs, io};

use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev},
    unistd::Pid,
};

use super::calls::{ADDRESS, HEADER, Header, Span, header, parts};

/// Most bytes of one message that is sent by proxy: what UDP can carry (RFC 768), and fast open's first piece.
pub const MOST_BYTES: usize = 1 << 16;
/// Most parts of one message (`UIO_MAXIOV`).
const MOST_PARTS: usize = 1024;

/// Copies memory of a thread's process; shorter where the rest cannot be read.
///
/// # Errors
/// `EFAULT`: nothing there can be read. `ESRCH`: it has ended.
pub fn read(tid: i32, at: u64, into: &mut [u8]) -> io::Result<usize> {
    let base = usize::try_from(at).map_err(io::Error::other)?;
    let from = [RemoteIoVec { base, len: into.len() }];
    Ok(process_vm_readv(Pid::from_raw(tid), &mut [io::IoSliceMut::new(into)], &from)?)
}

/// Writes to memory of a thread's process; `false` if it is not all writable.
#[must_use]
pub fn write(tid: i32, at: u64, bytes: &[u8]) -> bool {
    let Ok(base) = usize::try_from(at) else { return false };
    let to = [RemoteIoVec { base, len: bytes.len() }];
    process_vm_writev(Pid::from_raw(tid), &[io::IoSlice::new(bytes)], &to) == Ok(bytes.len())
}

/// Copies a `struct msghdr`.
#[must_use]
pub fn read_header(tid: i32, at: u64) -> Option<Header> {
    let mut bytes = [0; HEADER];
    matches!(read(tid, at, &mut bytes), Ok(HEADER)).then(|| header(&bytes))
}

/// Copies what a message consists of, its parts joined.
///
/// # Errors
/// The errno that the kernel would give: `EFAULT`, `EMSGSIZE`.
pub fn read_parts(tid: i32, span: Span) -> Result<Vec<u8>, i32> {
    let count = usize::try_from(span.length).ok().filter(|n| *n <= MOST_PARTS).ok_or(libc::EMSGSIZE)?;
    let mut all = Vec::new();
    for part in parts(&read_span(tid, Span { at: span.at, length: 16 * count as u64 })?) {
        let bytes = read_span(tid, part)?;
        if all.len() + bytes.len() > MOST_BYTES {
            return Err(libc::EMSGSIZE);
        }
        all.extend(bytes);
    }
    Ok(all)
}

/// Copies all of a span.
///
/// # Errors
/// As [`read_parts`].
pub fn read_span(tid: i32, span: Span) -> Result<Vec<u8>, i32> {
    let length = usize::try_from(span.length).ok().filter(|n| *n <= MOST_BYTES).ok_or(libc::EMSGSIZE)?;
    let mut bytes = vec![0; length];
    if length > 0 && !matches!(read(tid, span.at, &mut bytes), Ok(n) if n == length) {
        return Err(libc::EFAULT);
    }
    Ok(bytes)
}

/// Copies an address.
///
/// # Errors
/// The errno that the kernel gives for such a length, or such memory.
pub fn read_address(tid: i32, span: Span) -> Result<Vec<u8>, i32> {
    if span.length > ADDRESS as u64 { Err(libc::EINVAL) } else { read_span(tid, span) }
}

/// The process that a thread belongs to, with its real user and group. `None`: it has ended.
#[must_use]
pub fn process_of(tid: i32) -> Option<(i32, u32, u32)> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u32>().ok()
    };
    Some((i32::try_from(field("Tgid:")?).ok()?, field("Uid:")?, field("Gid:")?))
}

/// Whether two processes have one memory (kcmp(2), `KCMP_VM`), as after vfork(2).
#[must_use]
pub fn share_memory(one: i32, other: i32) -> bool {
    const KCMP_VM: i32 = 1; // linux/kcmp.h
    // SAFETY: numbers.
    #[expect(unsafe_code, reason = "no wrapper in nix")]
    let differ = unsafe { nix::libc::syscall(nix::libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) };
    differ == 0
}

/// Whether descriptor `number` of a thread is the socket with this inode. Threads share their descriptors as a
/// rule, but need not (unshare(2), `CLONE_FILES`).
#[must_use]
pub fn holds(tid: i32, number: i32, inode: u64) -> bool {
    fs::read_link(format!("/proc/{tid}/fd/{number}"))
        .is_ok_and(|link| link.as_os_str() == format!("socket:[{inode}]").as_str())
}

/// Whether an instruction is one of the C library's own.
#[must_use]
pub fn is_in_libc(tid: i32, instruction: u64) -> bool {
    let maps = fs::read_to_string(format!("/proc/{tid}/maps")).unwrap_or_default();
    maps.lines().any(|line| {
        let within =
            line.split_once(' ').and_then(|(range, _)| range.split_once('-')).is_some_and(|(low, high)| {
                let bound = |text| u64::from_str_radix(text, 16).unwrap_or(0);
                (bound(low)..bound(high)).contains(&instruction)
            });
        within && line.ends_with("/libc.so.6")
    })
}

/// The process behind descriptor `number` of a process, if that is a pidfd.
#[must_use]
pub fn behind_pidfd(tid: i32, number: i32) -> Option<i32> {
    let info = fs::read_to_string(format!("/proc/{tid}/fdinfo/{number}")).ok()?;
    info.lines().find_map(|l| l.strip_prefix("Pid:"))?.trim().parse().ok().filter(|pid| *pid > 0)
}

/// Whether a process is in the network namespace of this one.
#[must_use]
pub fn same_network(pid: i32) -> bool {
    let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/net")).ok();
    of("self").is_some_and(|own| of(&pid.to_string()) == Some(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_once_and_what_is_not_there_is_the_kernels_error() {
        let me = std::process::id().cast_signed();
        let text = *b"portcullis";
        let span = Span { at: text.as_ptr() as u64, length: 10 };
        assert_eq!(read_address(me, span).unwrap(), text);
        for (at, length, errno) in [
            (8, 16, libc::EFAULT),
            (0, 16, libc::EFAULT),
            (span.at, 129, libc::EINVAL),
            (8, u64::MAX, libc::EINVAL),
        ] {
            assert_eq!(read_address(me, Span { at, length }), Err(errno), "{length} at {at}");
        }
        assert_eq!(read_address(me, Span { at: 8, length: 0 }), Ok(Vec::new()));
        let mut text = *b"portcullis";
        assert!(write(me, text.as_mut_ptr() as u64, b"PORT") && text == *b"PORTcullis");
        assert!(!write(me, 8, b"x"));
        assert_eq!(read_span(me, Span { at: 8, length: 1 }), Err(libc::EFAULT));
        assert_eq!(read_span(me, Span { at: 8, length: 1 << 40 }), Err(libc::EMSGSIZE));
        let vector = [text.as_ptr() as u64, 4, text.as_ptr() as u64 + 4, 6];
        let parts = read_parts(me, Span { at: vector.as_ptr() as u64, length: 2 });
        assert_eq!(parts.unwrap(), text);
        let (tgid, uid, _) = process_of(nix::unistd::gettid().as_raw()).unwrap();
        assert_eq!((tgid, uid), (me, nix::unistd::getuid().as_raw()));
    }
}
