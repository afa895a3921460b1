//! Records that are not on disk yet, in memory that outlives a broker which is killed: the next one writes them.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::{BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicUsize, Ordering},
};

use nix::{
    sys::{
        memfd::{MFdFlags, memfd_create},
        mman::{MapFlags, ProtFlags, mmap, munmap},
    },
    unistd::ftruncate,
};

/// How much waits at most: many times what a broker puts on record between two writes. A page is taken when it is used.
const ROOM: usize = 4 << 20;
/// Before it stands how much there is.
const HEAD: usize = size_of::<AtomicUsize>();
const BYTES: NonZeroUsize = NonZeroUsize::MIN.saturating_add(HEAD + ROOM - 1);

/// See the module.
#[derive(Debug)]
pub struct Unsaid {
    at: NonNull<AtomicUsize>,
    /// There was no room: what comes after would leave a gap.
    full: bool,
}

impl Unsaid {
    /// Makes the memory, with nothing in it.
    ///
    /// # Errors
    /// As memfd_create(2).
    pub fn make() -> io::Result<OwnedFd> {
        let memory = memfd_create(c"portcullis-unsaid", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&memory, i64::try_from(BYTES.get()).map_err(io::Error::other)?)?;
        Ok(memory)
    }

    /// Opens it, and tells what an earlier broker has left: there it stays, as this one may be killed too, until
    /// [`Self::clear`].
    ///
    /// # Errors
    /// As mmap(2).
    pub fn open(memory: BorrowedFd<'_>) -> io::Result<(Self, Vec<u8>)> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        #[expect(unsafe_code, reason = "mapping memory")]
        // SAFETY: a fresh shared mapping at an address of the kernel's choice, of a file of this very size: made by
        // `make`, and given to nobody but brokers.
        let at = unsafe { mmap(None, BYTES, protection, MapFlags::MAP_SHARED, memory, 0)? };
        let opened = Self { at: at.cast(), full: false };
        let left = opened.bytes(opened.length().load(Ordering::Acquire)).to_vec();
        Ok((opened, left))
    }

    #[expect(unsafe_code, reason = "reading a mapping")]
    fn length(&self) -> &AtomicUsize {
        // SAFETY: the mapping begins with this word, and lives as long as this; any bits are a number.
        unsafe { self.at.as_ref() }
    }

    #[expect(unsafe_code, reason = "reading a mapping")]
    fn bytes(&self, length: usize) -> &[u8] {
        // SAFETY: so much is mapped behind the first word, and who wrote it has ended.
        unsafe { std::slice::from_raw_parts(self.at.add(1).cast().as_ptr(), length.min(ROOM)) }
    }

    /// Adds to it.
    pub fn add(&mut self, text: &str) {
        let before = self.length().load(Ordering::Relaxed);
        self.full |= before.saturating_add(text.len()) > ROOM;
        if self.full {
            return;
        }
        #[expect(unsafe_code, reason = "writing to a mapping")]
        // SAFETY: the text ends within what is mapped behind the first word, as was just seen, and nobody else uses it.
        unsafe {
            let to = self.at.add(1).cast::<u8>().add(before);
            std::ptr::copy_nonoverlapping(text.as_ptr(), to.as_ptr(), text.len());
        }
        self.length().store(before + text.len(), Ordering::Release);
    }

    /// All of it is on disk, or is counted as lost.
    pub fn clear(&mut self) {
        self.full = false;
        self.length().store(0, Ordering::Release);
    }
}

impl Drop for Unsaid {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "unmapping what was mapped")]
        // SAFETY: the mapping that `open` made; no reference outlives `self`.
        let _ = unsafe { munmap(self.at.cast(), BYTES.get()) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_one_leaves_the_next_finds() {
        let memory = Unsaid::make().unwrap();
        let (mut first, left) = Unsaid::open(memory.as_fd()).unwrap();
        assert!(left.is_empty());
        first.add("said");
        first.clear();
        first.add("one ");
        first.add("two");
        for _killed_before_it_was_on_disk in 0..2 {
            assert_eq!(Unsaid::open(memory.as_fd()).unwrap().1, b"one two");
        }
        let (mut second, _) = Unsaid::open(memory.as_fd()).unwrap();
        second.clear();
        second.add(&"x".repeat(ROOM));
        second.add("too much");
        let (mut third, left) = Unsaid::open(memory.as_fd()).unwrap();
        assert_eq!(left.len(), ROOM);
        third.clear();
        third.add(&"x".repeat(ROOM - 1));
        third.add("too much");
        third.add("y");
        assert_eq!(Unsaid::open(memory.as_fd()).unwrap().1.len(), ROOM - 1, "no gap");
    }
}
