//! Memory shared with wrapped processes: made, sealed and mapped here.

use std::{
    ffi::CStr,
    fmt, io, mem,
    num::NonZeroUsize,
    ops::Deref,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::Ordering,
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        mman::{MapFlags, ProtFlags, mmap, munmap},
    },
    unistd::ftruncate,
};
use portcullis_wire::{
    frame,
    shared::{Ring, StatePage, VerdictTable},
};

/// Kinds of memory that may be shared: atomics only, for which any bits are valid.
pub trait Shareable: Sized + private::Sealed {
    /// The name in `/proc/PID/maps`.
    const NAME: &'static CStr;
    /// Whether the other side may write.
    const THEY_WRITE: bool;
}

mod private {
    pub trait Sealed {}
    impl Sealed for super::StatePage {}
    impl Sealed for super::VerdictTable {}
    impl Sealed for super::Ring {}
}

impl Shareable for StatePage {
    const NAME: &'static CStr = c"portcullis-state";
    const THEY_WRITE: bool = false;
}
impl Shareable for VerdictTable {
    const NAME: &'static CStr = c"portcullis-verdicts";
    const THEY_WRITE: bool = false;
}
impl Shareable for Ring {
    const NAME: &'static CStr = c"portcullis-records";
    const THEY_WRITE: bool = true;
}

/// One `T` in memory of its own, with the descriptor that others map it by.
pub struct Shared<T: Shareable> {
    at: NonNull<T>,
    descriptor: OwnedFd,
}

impl<T: Shareable> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("name", &T::NAME)
            .field("descriptor", &self.descriptor)
            .finish_non_exhaustive()
    }
}

impl<T: Shareable> Shared<T> {
    /// Makes zeroed memory, maps it, and seals its size; unless `T::THEY_WRITE`, also against any
    /// later writable mapping (`F_SEAL_FUTURE_WRITE`, Linux 5.1), so that it is read-only to others.
    ///
    /// # Errors
    /// Out of memory or descriptors.
    pub fn new() -> io::Result<Self> {
        let size = NonZeroUsize::new(mem::size_of::<T>()).ok_or(io::ErrorKind::InvalidInput)?;
        let descriptor = memfd_create(T::NAME, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        ftruncate(&descriptor, i64::try_from(size.get()).map_err(io::Error::other)?)?;
        // SAFETY: a fresh shared mapping of a fresh file at an address of the kernel's choice; it
        // covers nothing that exists.
        #[expect(unsafe_code, reason = "mapping memory")]
        let at = unsafe {
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            mmap(None, size, protection, MapFlags::MAP_SHARED, &descriptor, 0)?
        };
        let made = Self { at: at.cast(), descriptor };
        let mut seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        if !T::THEY_WRITE {
            seals |= SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE);
        }
        fcntl(&made.descriptor, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(made)
    }

    /// What others map it by.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl<T: Shareable> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: `at` is a live mapping of size_of::<T>() bytes, page-aligned; `Shareable` types are
        // atomics, so any bits are valid and concurrent writers are no data race.
        #[expect(unsafe_code, reason = "reading a mapping")]
        unsafe {
            self.at.as_ref()
        }
    }
}

impl<T: Shareable> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: `at` came from mmap with this size, and no reference outlives `self`.
        #[expect(unsafe_code, reason = "unmapping what was mapped")]
        let _ = unsafe { munmap(self.at.cast(), mem::size_of::<T>()) };
    }
}

/// Takes the robust mutex at `page.alive` for as long as the calling thread lives, and says so.
///
/// The page must never be unmapped after this: the kernel writes to it when the thread ends.
///
/// # Errors
/// As the pthread calls.
pub fn vow(page: &'static Shared<StatePage>) -> io::Result<()> {
    page.magic.store(frame::MAGIC, Ordering::Relaxed);
    page.version.store(u32::from(frame::VERSION), Ordering::Relaxed);
    let mutex: *mut libc::pthread_mutex_t = page.alive.as_ptr().cast();
    let check = |code: i32| if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) };
    // SAFETY: `alive` and `mutex_rest` are 40 bytes, the size of pthread_mutex_t, aligned to 4 within
    // a 64-byte aligned page at offset 8, so to 8; all others only read the first word. The memory
    // is 'static, so it outlives the lock.
    #[expect(unsafe_code, reason = "pthread_mutex_t in shared memory")]
    unsafe {
        let mut attributes: libc::pthread_mutexattr_t = mem::zeroed();
        check(libc::pthread_mutexattr_init(&raw mut attributes))?;
        check(libc::pthread_mutexattr_setpshared(&raw mut attributes, libc::PTHREAD_PROCESS_SHARED))?;
        check(libc::pthread_mutexattr_setrobust(&raw mut attributes, libc::PTHREAD_MUTEX_ROBUST))?;
        check(libc::pthread_mutex_init(mutex, &raw const attributes))?;
        check(libc::pthread_mutex_lock(mutex))?;
    }
    Ok(())
}

const _: () = assert!(mem::size_of::<libc::pthread_mutex_t>() == 40);

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_wire::shared::OWNER_DIED;

    #[test]
    fn others_can_read_a_table_but_never_write_it() {
        let table = Shared::<VerdictTable>::new().unwrap();
        table.clear(7);
        let size = NonZeroUsize::new(mem::size_of::<VerdictTable>()).unwrap();
        let map = |protection| {
            #[expect(unsafe_code, reason = "as a wrapped process would")]
            // SAFETY: a fresh mapping at the kernel's choice.
            unsafe {
                mmap(None, size, protection, MapFlags::MAP_SHARED, table.descriptor(), 0)
            }
        };
        assert!(map(ProtFlags::PROT_READ).is_ok());
        assert!(map(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).is_err());
        assert!(nix::unistd::write(table.descriptor(), b"x").is_err());
        assert!(ftruncate(table.descriptor(), 0).is_err());
    }

    #[test]
    fn the_kernel_buries_the_one_who_vowed() {
        let alive = std::thread::spawn(move || {
            let page: &'static _ = Box::leak(Box::new(Shared::<StatePage>::new().unwrap()));
            vow(page).unwrap();
            assert_ne!(page.alive.load(Ordering::Relaxed), 0);
            &page.alive
        })
        .join()
        .unwrap();
        // The thread's own exit is what the kernel sees; join may return a moment earlier.
        for _ in 0..100 {
            if alive.load(Ordering::Relaxed) & OWNER_DIED != 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("not marked");
    }
}
