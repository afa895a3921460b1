//! The book of held calls: which notifications a broker has taken and not yet answered.
//!
//! The kernel tells of a call once. If the broker that took it dies, nobody knows its number, and the caller
//! would be held for good. So numbers are kept in memory that belongs to the supervisor, who gives it to the next
//! broker: what the last one left is answered with an error.
#![expect(unsafe_code, reason = "maps memory that outlives this process")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// How many calls can be held at once; more are refused.
pub const ROOM: usize = 1 << 14;

/// Number of the notification (0: the line is free), and of its system call.
#[repr(C)]
struct Entry {
    id: AtomicU64,
    call: AtomicU64,
}

const BYTES: usize = ROOM * size_of::<Entry>();

/// A call in the book.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Line(usize);

/// See the module.
#[derive(Debug)]
pub struct Book {
    entries: NonNull<Entry>,
    free: Vec<usize>,
}

/// Makes an empty book.
///
/// # Errors
/// As memfd_create(2).
pub fn make() -> io::Result<OwnedFd> {
    // SAFETY: a C string; the result is a descriptor that nobody else knows.
    let fd = unsafe { libc::memfd_create(c"portcullis-held".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: numbers.
    match unsafe { libc::ftruncate(fd.as_raw_fd(), libc::off_t::try_from(BYTES).unwrap_or(0)) } {
        0 => Ok(fd),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Book {
    /// Opens a book, and takes out what stands in it: numbers of notifications, with their system calls'.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn open(fd: BorrowedFd<'_>) -> io::Result<(Self, Vec<(u64, i64)>)> {
        // SAFETY: a fresh shared mapping at the kernel's choice, of a file of this very size: made by `make`,
        // and given to nobody but brokers.
        let at = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), BYTES, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        let entries = NonNull::new(at.cast::<Entry>()).filter(|_| at != libc::MAP_FAILED);
        let book =
            Self { entries: entries.ok_or_else(io::Error::last_os_error)?, free: (0..ROOM).rev().collect() };
        let left = (0..ROOM).filter_map(|n| {
            let entry = book.entry(n)?;
            let id = entry.id.swap(0, Relaxed);
            (id != 0).then(|| (id, entry.call.load(Relaxed).cast_signed()))
        });
        let left = left.collect();
        Ok((book, left))
    }

    fn entry(&self, n: usize) -> Option<&Entry> {
        // SAFETY: the mapping has ROOM entries and lives as long as this; atomics take any bits.
        (n < ROOM).then(|| unsafe { self.entries.add(n).as_ref() })
    }

    /// Notes a call that is held. `None`: there is no room.
    pub fn note(&mut self, id: u64, call: i32) -> Option<Line> {
        let n = self.free.pop()?;
        let entry = self.entry(n)?;
        entry.call.store(u64::from(call.cast_unsigned()), Relaxed);
        entry.id.store(id, Relaxed);
        Some(Line(n))
    }

    /// Strikes it out again.
    pub fn strike(&mut self, line: Line) {
        if let Some(entry) = self.entry(line.0) {
            entry.id.store(0, Relaxed);
            self.free.push(line.0);
        }
    }
}

impl Drop for Book {
    fn drop(&mut self) {
        // SAFETY: the mapping that `open` made; no reference outlives `self`.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_one_leaves_the_next_finds() {
        let fd = make().unwrap();
        let (mut first, left) = Book::open(fd.as_fd()).unwrap();
        assert_eq!(left, []);
        let line = first.note(7, 42).unwrap();
        first.note(8, 43).unwrap();
        first.strike(line);
        drop(first);
        let (mut second, left) = Book::open(fd.as_fd()).unwrap();
        assert_eq!(left, [(8, 43)]);
        for id in 1..=ROOM as u64 {
            assert!(second.note(id, 0).is_some());
        }
        assert_eq!(second.note(1, 0), None);
        second.strike(Line(5));
        assert_eq!(second.note(1, 0), Some(Line(5)));
    }
}
