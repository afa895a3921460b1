//! The kernel's eBPF by bpf(2): maps, programs, the ring of reports. The only file that calls it.
#![expect(unsafe_code, reason = "bpf(2) takes pointers; the ring is memory shared with the kernel")]

use std::{
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

// linux/bpf.h, bpf_cmd
const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP: libc::c_int = 1;
const MAP_UPDATE: libc::c_int = 2;
const MAP_DELETE: libc::c_int = 3;
const MAP_NEXT_KEY: libc::c_int = 4;
const PROG_LOAD: libc::c_int = 5;
const INFO_BY_FD: libc::c_int = 15;
const LINK_CREATE: libc::c_int = 28;

/// Commands of bpf(2) that this file uses once the daemon serves; the sandbox lets no other through.
pub const COMMANDS: [libc::c_int; 7] =
    [MAP_CREATE, MAP_LOOKUP, MAP_UPDATE, MAP_DELETE, MAP_NEXT_KEY, PROG_LOAD, INFO_BY_FD];

const PROG_TYPE_SOCKET_FILTER: u32 = 1;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
/// `BPF_SK_LOOKUP` of `bpf_attach_type`.
const ATTACH_SK_LOOKUP: u32 = 36;
const FLAG_NO_PREALLOC: u32 = 1;

/// What a map is (linux/bpf.h, bpf_map_type), with sizes in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Shape {
    kind: u32,
    key: u32,
    value: u32,
    entries: u32,
    flags: u32,
}

impl Shape {
    /// An array of one value.
    pub const fn single(value: u32) -> Self {
        Self { kind: 2, key: 4, value, entries: 1, flags: 0 }
    }
    /// A hash table that forgets the least recently used.
    pub const fn lru(key: u32, value: u32, entries: u32) -> Self {
        Self { kind: 9, key, value, entries, flags: 0 }
    }
    /// Longest prefix match; the key begins with 32 bits of prefix length.
    pub const fn prefixes(key: u32, value: u32, entries: u32) -> Self {
        Self { kind: 11, key, value, entries, flags: FLAG_NO_PREALLOC }
    }
    /// Sockets, by a key of any kind; a value is a descriptor, 64 bits wide.
    pub const fn sockets(key: u32, entries: u32) -> Self {
        Self { kind: 18, key, value: 8, entries, flags: 0 }
    }
    /// Maps, by a key of any kind; a value is a descriptor, 32 bits wide.
    const fn maps(key: u32, entries: u32) -> Self {
        Self { kind: 13, key, value: 4, entries, flags: 0 }
    }
    /// A ring of `bytes`, a power of two and multiple of the page size.
    pub const fn ring(bytes: u32) -> Self {
        Self { kind: 27, key: 0, value: 0, entries: bytes, flags: 0 }
    }
}

/// Calls bpf(2) and returns its result if that is not negative.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: bpf(2) reads (and for INFO_BY_FD writes) at most `size` bytes of the attributes, which
    // are all ours; every pointer in them is to memory that its maker below keeps alive and sized.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: bpf(2) has just returned this descriptor, so it is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// A map in the kernel, with keys and values of fixed size.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    shape: Shape,
}

#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Map {
    /// Makes an empty map.
    pub fn new(shape: Shape) -> io::Result<Self> {
        let mut attributes = shape;
        Ok(Self { fd: owned(bpf(MAP_CREATE, &mut attributes)?)?, shape })
    }

    /// Makes an empty map of maps that are like `inner`.
    pub fn of_maps(key: u32, entries: u32, inner: &Self) -> io::Result<Self> {
        #[repr(C)]
        struct Attributes {
            shape: Shape,
            inner: u32,
        }
        let shape = Shape::maps(key, entries);
        let mut attributes = Attributes { shape, inner: number(inner.as_fd()) };
        Ok(Self { fd: owned(bpf(MAP_CREATE, &mut attributes)?)?, shape })
    }

    /// Takes a map that came as a descriptor; anything but a map of this shape is `EINVAL`.
    pub fn adopt(fd: OwnedFd, shape: Shape) -> io::Result<Self> {
        /// `struct bpf_map_info`, as far as it is needed.
        #[repr(C)]
        #[derive(Default)]
        struct Info {
            kind: u32,
            id: u32,
            key: u32,
            value: u32,
            entries: u32,
            flags: u32,
        }
        #[repr(C)]
        struct Attributes {
            fd: u32,
            length: u32,
            info: u64,
        }
        let mut info = Info::default();
        let mut attributes = Attributes {
            fd: number(fd.as_fd()),
            length: u32::try_from(size_of::<Info>()).unwrap_or(0),
            info: (&raw mut info).addr() as u64,
        };
        bpf(INFO_BY_FD, &mut attributes)?;
        let Info { kind, key, value, entries, flags, .. } = info;
        if (Shape { kind, key, value, entries, flags }) != shape {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(Self { fd, shape })
    }

    fn element(&self, key: &[u8], value: Option<&mut [u8]>) -> io::Result<Element> {
        let fits = |size: u32, bytes: &[u8]| usize::try_from(size) == Ok(bytes.len());
        if !fits(self.shape.key, key) || value.as_ref().is_some_and(|v| !fits(self.shape.value, v)) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(Element {
            map: number(self.fd.as_fd()),
            pad: 0,
            key: key.as_ptr().addr() as u64,
            value: value.map_or(0, |v| v.as_mut_ptr().addr() as u64),
            flags: 0,
        })
    }

    /// Inserts or overwrites.
    pub fn insert(&self, key: &[u8], value: &mut [u8]) -> io::Result<()> {
        bpf(MAP_UPDATE, &mut self.element(key, Some(value))?).map(drop)
    }

    /// Removes a key; `ENOENT` if there is none.
    pub fn remove(&self, key: &[u8]) -> io::Result<()> {
        bpf(MAP_DELETE, &mut self.element(key, None)?).map(drop)
    }

    /// Reads the value at `key` into `value`.
    pub fn get(&self, key: &[u8], value: &mut [u8]) -> io::Result<()> {
        bpf(MAP_LOOKUP, &mut self.element(key, Some(value))?).map(drop)
    }

    /// All keys, each of `N` bytes; `EINVAL` if keys of this map have another size.
    pub fn keys<const N: usize>(&self) -> io::Result<Vec<[u8; N]>> {
        let mut keys: Vec<[u8; N]> = Vec::new();
        loop {
            let mut next = [0; N];
            let mut element = self.element(keys.last().unwrap_or(&next), None)?;
            if keys.is_empty() {
                element.key = 0; // null: the first
            }
            element.value = next.as_mut_ptr().addr() as u64;
            match bpf(MAP_NEXT_KEY, &mut element) {
                Ok(_) => keys.push(next),
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
                Err(e) => return Err(e),
            }
        }
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Map> for OwnedFd {
    fn from(map: Map) -> Self {
        map.fd
    }
}

/// Loads a socket filter; the kernel verifies it.
pub fn load_filter(code: &[[u8; 8]]) -> io::Result<OwnedFd> {
    load(PROG_TYPE_SOCKET_FILTER, 0, code)
}

/// Has a program choose the listener of every TCP connection that comes to a network namespace (bpf-helpers(7),
/// `bpf_sk_assign`), for as long as what is returned stays open. Needs CAP_NET_ADMIN and CAP_BPF.
pub fn choose_listeners(code: &[[u8; 8]], namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        kind: u32,
        flags: u32,
    }
    let program = load(PROG_TYPE_SK_LOOKUP, ATTACH_SK_LOOKUP, code)?;
    let (program, target) = (number(program.as_fd()), number(namespace));
    let mut attributes = Attributes { program, target, kind: ATTACH_SK_LOOKUP, flags: 0 };
    owned(bpf(LINK_CREATE, &mut attributes)?)
}

fn load(kind: u32, attach: u32, code: &[[u8; 8]]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        count: u32,
        code: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach: u32,
    }
    let mut attributes = Attributes {
        kind,
        count: u32::try_from(code.len()).unwrap_or(u32::MAX),
        code: code.as_ptr().addr() as u64,
        license: c"MIT".as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel: 0,
        flags: 0,
        name: *b"portcullis\0\0\0\0\0\0",
        interface: 0,
        attach,
    };
    owned(bpf(PROG_LOAD, &mut attributes)?)
}

/// Reading end of a ring map (kernel, Documentation/bpf/ringbuf.rst): one consumer, any producers.
pub struct Ring {
    map: Map,
    /// Consumer's position, on a page of its own.
    consumer: NonNull<AtomicU64>,
    /// Producers' position, on a page of its own, and behind it the data, mapped twice in a row.
    producer: NonNull<AtomicU64>,
    data: NonNull<u8>,
    size: NonZeroUsize,
    page: NonZeroUsize,
}

// SAFETY: the pointers are to shared memory that lives as long as the value and is not tied to a thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps a ring of `size` bytes.
    pub fn new(map: Map, size: u32) -> io::Result<Self> {
        let einval = || io::Error::from_raw_os_error(libc::EINVAL);
        // SAFETY: sysconf(3) has no preconditions.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page = usize::try_from(page).ok().and_then(NonZeroUsize::new).ok_or_else(einval)?;
        let size = usize::try_from(size).ok().and_then(NonZeroUsize::new).ok_or_else(einval)?;
        let both = size.checked_mul(NonZeroUsize::MIN.saturating_add(1)).ok_or_else(einval)?;
        let behind = both.checked_add(page.get()).ok_or_else(einval)?;
        let offset = i64::try_from(page.get()).map_err(|_| einval())?;
        let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; it replaces nothing.
        let consumer = unsafe { mmap(None, page, rw, MapFlags::MAP_SHARED, &map, 0) }?;
        // SAFETY: as above.
        let producer =
            unsafe { mmap(None, behind, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &map, offset) };
        let producer = producer.inspect_err(|_| {
            // SAFETY: mapped above with this length, and nothing refers to it.
            let _ = unsafe { munmap(consumer, page.get()) };
        })?;
        // SAFETY: the mapping is a page longer than the data.
        let data = unsafe { producer.cast::<u8>().add(page.get()) };
        Ok(Self { map, consumer: consumer.cast(), producer: producer.cast(), data, size, page })
    }

    /// Takes the oldest report, copied into `into` (the rest of it zero, what is too long cut off).
    /// `None`: there is none.
    pub fn pop<const N: usize>(&mut self) -> Option<[u8; N]> {
        const BUSY: u32 = 1 << 31; // linux/bpf.h, BPF_RINGBUF_BUSY_BIT
        const DISCARD: u32 = 1 << 30;
        const HEADER: usize = 8;
        // SAFETY: both point to the start of a live page that the kernel uses as this counter.
        let (consumer, producer) = unsafe { (self.consumer.as_ref(), self.producer.as_ref()) };
        loop {
            let at = consumer.load(Ordering::Relaxed);
            if at >= producer.load(Ordering::Acquire) {
                return None;
            }
            let start = usize::try_from(at % self.size.get() as u64).ok()?;
            // SAFETY: `start` is below `size` and, as all records are, a multiple of 8, so the header
            // is aligned and within the doubly mapped data.
            let header = unsafe { self.data.add(start).cast::<AtomicU32>().as_ref() };
            let word = header.load(Ordering::Acquire);
            if word & BUSY != 0 {
                return None; // a producer still writes; it will wake us
            }
            let length = usize::try_from(word & !DISCARD).ok()?.min(self.size.get() - HEADER);
            let mut report = [0; N];
            // SAFETY: `start` + HEADER + `length` is at most twice `size`, all mapped; the kernel does
            // not write there before the consumer's position has passed, below.
            let bytes = unsafe { std::slice::from_raw_parts(self.data.add(start + HEADER).as_ptr(), length) };
            for (to, from) in report.iter_mut().zip(bytes) {
                *to = *from;
            }
            let step = (HEADER + length).next_multiple_of(8);
            consumer.store(at + step as u64, Ordering::Release);
            if word & DISCARD == 0 {
                return Some(report);
            }
        }
    }
}

impl AsFd for Ring {
    /// Readable while there are reports.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let behind = self.size.get().saturating_mul(2).saturating_add(self.page.get());
        // SAFETY: both were mapped with these lengths by `new`, and no reference outlives `self`.
        unsafe {
            let _ = munmap(self.consumer.cast(), self.page.get());
            let _ = munmap(self.producer.cast(), behind);
        }
    }
}
