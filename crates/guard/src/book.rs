//! The book of held calls: which notifications a broker has taken and not yet answered.
//!
//! The kernel tells of a call once. If the broker that took it dies, nobody knows its number, and the caller
//! would be held for good. So what was told is kept in memory that belongs to the supervisor, who gives it to the next
//! broker: that one takes up what the last one has left, or answers it with an error.
#![expect(unsafe_code, reason = "maps memory that outlives this process")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use crate::listener::Notification;

/// How many calls can be held at once; more are refused.
pub const ROOM: usize = 1 << 14;

/// The rest of a notification: thread and system call, the instruction, arguments.
#[repr(C)]
struct Entry {
    from: AtomicU64,
    instruction: AtomicU64,
    args: [AtomicU64; 6],
}

/// Behind each other, as all numbers are looked at when a book is opened: those of the notifications (0: the line is
/// free), and what was told.
const NUMBERS: usize = ROOM * size_of::<AtomicU64>();
const BYTES: usize = NUMBERS + ROOM * size_of::<Entry>();

/// A call in the book.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Line(usize);

/// See the module.
#[derive(Debug)]
pub struct Book {
    numbers: NonNull<AtomicU64>,
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
    /// Opens a book, and takes out what stands in it.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn open(fd: BorrowedFd<'_>) -> io::Result<(Self, Vec<Notification>)> {
        // SAFETY: a fresh shared mapping at the kernel's choice, of a file of this very size: made by `make`,
        // and given to nobody but brokers.
        let at = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), BYTES, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        let numbers = NonNull::new(at.cast::<AtomicU64>()).filter(|_| at != libc::MAP_FAILED);
        let book =
            Self { numbers: numbers.ok_or_else(io::Error::last_os_error)?, free: (0..ROOM).rev().collect() };
        let left = (0..ROOM).filter_map(|n| {
            let id = book.number(n)?.swap(0, Acquire);
            if id == 0 { None } else { book.entry(n).map(|entry| entry.read(id)) }
        });
        let left = left.collect();
        Ok((book, left))
    }

    fn number(&self, n: usize) -> Option<&AtomicU64> {
        // SAFETY: the mapping has ROOM numbers and lives as long as this; atomics take any bits.
        (n < ROOM).then(|| unsafe { self.numbers.add(n).as_ref() })
    }

    fn entry(&self, n: usize) -> Option<&Entry> {
        // SAFETY: behind the numbers are as many entries, of such words as well.
        (n < ROOM).then(|| unsafe { self.numbers.add(ROOM).cast::<Entry>().add(n).as_ref() })
    }

    /// Notes a call that is held. `None`: there is no room.
    pub fn note(&mut self, call: &Notification) -> Option<Line> {
        let n = self.free.pop()?;
        self.entry(n)?.write(call);
        self.number(n)?.store(call.id, Release);
        Some(Line(n))
    }

    /// Strikes it out again.
    pub fn strike(&mut self, line: Line) {
        if let Some(number) = self.number(line.0) {
            number.store(0, Relaxed);
            self.free.push(line.0);
        }
    }
}

impl Entry {
    fn write(&self, call: &Notification) {
        self.from.store(u64::from(call.pid) << 32 | u64::from(call.nr.cast_unsigned()), Relaxed);
        self.instruction.store(call.instruction_pointer, Relaxed);
        for (to, from) in self.args.iter().zip(call.args) {
            to.store(from, Relaxed);
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "the halves of a word")]
    fn read(&self, id: u64) -> Notification {
        let from = self.from.load(Relaxed);
        Notification {
            id,
            pid: (from >> 32) as u32,
            nr: (from as u32).cast_signed(),
            instruction_pointer: self.instruction.load(Relaxed),
            args: std::array::from_fn(|n| self.args.get(n).map_or(0, |arg| arg.load(Relaxed))),
        }
    }
}

impl Drop for Book {
    fn drop(&mut self) {
        // SAFETY: the mapping that `open` made; no reference outlives `self`.
        unsafe { libc::munmap(self.numbers.as_ptr().cast(), BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_one_leaves_the_next_finds() {
        let call = |id| Notification {
            id,
            pid: u32::MAX - 1,
            nr: 42,
            instruction_pointer: u64::MAX,
            args: [1, 2, 3, 4, 5, u64::MAX],
        };
        let fd = make().unwrap();
        let (mut first, left) = Book::open(fd.as_fd()).unwrap();
        assert_eq!(left, []);
        let line = first.note(&call(7)).unwrap();
        first.note(&call(8)).unwrap();
        first.strike(line);
        drop(first);
        let (mut second, left) = Book::open(fd.as_fd()).unwrap();
        assert_eq!(left, [call(8)]);
        for id in 1..=ROOM as u64 {
            assert!(second.note(&call(id)).is_some());
        }
        assert_eq!(second.note(&call(1)), None);
        second.strike(Line(5));
        assert_eq!(second.note(&call(1)), Some(Line(5)));
    }
}
