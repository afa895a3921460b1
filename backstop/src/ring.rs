//! The reading end of a ring map (kernel, Documentation/bpf/ringbuf.rst) whose reader says itself what is done with:
//! what was read and not yet released is there for the next reader.
#![expect(unsafe_code, reason = "memory that the kernel writes")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::{NonNull, null_mut},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

/// linux/bpf.h: the record is being written; it was given up.
const BUSY: u32 = 1 << 31;
const DISCARD: u32 = 1 << 30;
const HEADER: usize = 8;

/// See the module.
pub(crate) struct Ring {
    map: OwnedFd,
    /// The reader's position, on a page of its own.
    reader: NonNull<AtomicU64>,
    /// The writers' position, on a page of its own; behind it the data, mapped twice in a row.
    writers: NonNull<AtomicU64>,
    size: usize,
    page: usize,
    /// How far it was read here.
    at: u64,
}

// SAFETY: the pointers are to shared memory that lives as long as the value and is not tied to a thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps a ring of `size` bytes, a power of two.
    pub(crate) fn new(map: OwnedFd, size: usize) -> io::Result<Self> {
        // SAFETY: sysconf(3) has no preconditions.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(page).map_err(io::Error::other)?;
        let area = |length, protection, offset| {
            // SAFETY: a fresh mapping at an address of the kernel's choice; it replaces nothing.
            let at = unsafe {
                libc::mmap(null_mut(), length, protection, libc::MAP_SHARED, map.as_raw_fd(), offset)
            };
            if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.cast::<AtomicU64>()) }
        };
        let broken = || io::Error::from(io::ErrorKind::InvalidData);
        let reader = NonNull::new(area(page, libc::PROT_READ | libc::PROT_WRITE, 0)?).ok_or_else(broken)?;
        let writers = area(page + 2 * size, libc::PROT_READ, offset).inspect_err(|_| {
            // SAFETY: mapped above with this length, and nothing refers to it.
            unsafe { libc::munmap(reader.as_ptr().cast(), page) };
        })?;
        let writers = NonNull::new(writers).ok_or_else(broken)?;
        // SAFETY: the start of a live page that the kernel uses as this counter.
        let at = unsafe { reader.as_ref() }.load(Ordering::Acquire);
        Ok(Self { map, reader, writers, size, page, at })
    }

    /// The next record, until it is released. `None`: there is none yet.
    pub(crate) fn next(&mut self) -> Option<&[u8]> {
        loop {
            // SAFETY: the start of a live page that the kernel uses as this counter.
            if self.at >= unsafe { self.writers.as_ref() }.load(Ordering::Acquire) {
                return None;
            }
            let start = usize::try_from(self.at).ok()? & (self.size - 1);
            // SAFETY: within the doubly mapped data, since `start` is below `size`, and a multiple of 8 as all
            // records are, so aligned.
            let (header, data) = unsafe {
                let record = self.writers.cast::<u8>().add(self.page + start);
                (record.cast::<AtomicU32>().as_ref(), record.add(HEADER))
            };
            let word = header.load(Ordering::Acquire);
            if word & BUSY != 0 {
                return None;
            }
            let length = usize::try_from(word & !DISCARD).ok()?.min(self.size - HEADER);
            self.at += (HEADER + length).next_multiple_of(8) as u64;
            if word & DISCARD == 0 {
                // SAFETY: `start` + HEADER + `length` is at most twice `size`, all mapped; the kernel does not write
                // there before the reader's position has passed, which takes `&mut self`.
                return Some(unsafe { std::slice::from_raw_parts(data.as_ptr(), length) });
            }
        }
    }

    /// Gives back the room of all that was read.
    pub(crate) fn release(&mut self) {
        // SAFETY: the start of a live page that the kernel uses as this counter.
        unsafe { self.reader.as_ref() }.store(self.at, Ordering::Release);
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: both were mapped in `new` with these lengths; what refers to them ends with `self`.
        unsafe {
            libc::munmap(self.reader.as_ptr().cast(), self.page);
            libc::munmap(self.writers.as_ptr().cast(), self.page + 2 * self.size);
        }
    }
}
