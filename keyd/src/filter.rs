//! Who reaches a socket: a locked socket filter in the kernel whose list can be changed later.
//!
//! A listener limited to addresses gets an eBPF program that looks the source up in a map of its own
//! (longest prefix) and drops what it does not find, before the kernel answers the SYN. The filter
//! is locked, so that neither the program nor root takes it off; what changes is the map's content.
//! The program carries the socket with it wherever the socket goes: no network namespace, address or
//! port is named anywhere here. It reports whom it drops through one ring for all filters, so a
//! host without filtered listeners pays nothing, and others pay when somebody is dropped.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use portcullis_wire::Addr;
use portcullis_wire::keyd::{MOST_NETS, Net, Stranger};

use crate::{
    asm::JumpError,
    bpf::{Map, Ring, Shape, load_filter},
    program::{EVENT_SIZE, Maps, program},
};

/// Ring of reports: room for 910 of them.
const RING: u32 = 64 * 1024;
/// Prefix length (family included), family, address.
type Key = [u8; 24];
pub const KEY: Shape = Shape::prefixes(24, 16, MAX_ENTRIES);
/// Four ranges of source ports, each `low << 16 | high`.
type Ranges = [u32; 4];
pub const NO_RANGE: u32 = 1 << 16;
const MAX_ENTRIES: u32 = 1 << 20;
const _: () = assert!(MAX_ENTRIES as usize == MOST_NETS);

/// Why a list of nets or a socket cannot be filtered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilterError {
    /// Family, prefix length or zero field of a net is none.
    #[error("net {0} of the list is malformed")]
    Net(usize),
    /// One prefix stands more than four times.
    #[error("net {0} of the list is the fifth with the same prefix")]
    TooManyRanges(usize),
    /// Neither TCP nor UDP.
    #[error("a socket of protocol {0} has no filter by source")]
    Protocol(i32),
    /// The socket has a locked filter already.
    #[error("the socket's filter is locked already")]
    Locked,
    /// Somebody took the filter off in the instant before it was locked.
    #[error("the filter did not stay on the socket")]
    Removed,
    /// The program is ours and wrong.
    #[error(transparent)]
    Program(#[from] JumpError),
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] io::Error),
}

impl FilterError {
    /// The errno that tells the broker.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Net(_) | Self::TooManyRanges(_) | Self::Program(_) => libc::EINVAL,
            Self::Protocol(_) => libc::EPROTONOSUPPORT,
            Self::Locked => libc::EALREADY,
            Self::Removed => libc::EBUSY,
            Self::Kernel(e) => e.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// What all filters share: where they report.
pub struct Watch {
    ring: Ring,
    /// When this second began, reports in it, attempts that were not reported.
    rate: Map,
    /// Attempts of late, and when.
    seen: Map,
    missed: u64,
}

const RATE: Shape = Shape::single(24);
const SEEN: Shape = Shape::lru(48, 8, 8192);

impl Watch {
    /// A new ring and its counters.
    pub fn new() -> io::Result<Self> {
        let (ring, rate, seen) = (Map::new(Shape::ring(RING))?, Map::new(RATE)?, Map::new(SEEN)?);
        Ok(Self { ring: Ring::new(ring, RING)?, rate, seen, missed: 0 })
    }

    /// What an earlier key daemon left with the broker, in the order of [`Self::keep`].
    pub fn adopt([ring, rate, seen]: [OwnedFd; 3]) -> io::Result<Self> {
        let ring = Ring::new(Map::adopt(ring, Shape::ring(RING))?, RING)?;
        let mut it = Self { ring, rate: Map::adopt(rate, RATE)?, seen: Map::adopt(seen, SEEN)?, missed: 0 };
        it.missed = it.all_missed()?;
        Ok(it)
    }

    /// What the broker keeps for the next key daemon.
    #[must_use]
    pub fn keep(&self) -> [BorrowedFd<'_>; 3] {
        [self.ring.as_fd(), self.rate.as_fd(), self.seen.as_fd()]
    }

    fn all_missed(&self) -> io::Result<u64> {
        let mut value = [0; 24];
        self.rate.get(&[0; 4], &mut value)?;
        let [.., a, b, c, d, e, f, g, h] = value;
        Ok(u64::from_ne_bytes([a, b, c, d, e, f, g, h]))
    }

    /// How many attempts were dropped without a report since this was last asked.
    pub fn missed(&mut self) -> u64 {
        let all = self.all_missed().unwrap_or(self.missed);
        all.saturating_sub(std::mem::replace(&mut self.missed, all))
    }

    /// The oldest report. `epoch` is the Unix time, in nanoseconds, at which CLOCK_MONOTONIC was 0.
    pub fn next(&mut self, epoch: u64) -> Option<Stranger> {
        let report: [u8; EVENT_SIZE] = self.ring.pop()?;
        let word = |at: usize| -> [u8; 8] {
            report.get(at..at + 8).and_then(|w| w.try_into().ok()).unwrap_or_default()
        };
        let ip = |at: usize| -> [u8; 16] {
            report.get(at..at + 16).and_then(|w| w.try_into().ok()).unwrap_or_default()
        };
        let [family, _, _, _, protocol, ..] = word(16);
        let [s0, s1, d0, d1, ..] = word(56);
        let addr = |ip, port| Addr { family, port: u16::from_be_bytes(port), ip, ..Addr::NONE };
        Some(Stranger {
            time: epoch.saturating_add(u64::from_ne_bytes(word(8))),
            missed: 0,
            protocol,
            reserved: [0; 7],
            source: addr(ip(24), [s0, s1]),
            destination: addr(ip(40), [d0, d1]),
            tag: u64::from_ne_bytes(word(0)),
        })
    }
}

impl AsFd for Watch {
    /// Readable while there are reports.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// Puts a locked filter on a TCP or UDP socket, listening already or not, in any network namespace.
/// What the key daemon itself sends, with `mark`, passes. Returns the descriptor that [`refill`] needs.
pub fn attach(
    watch: &Watch,
    socket: BorrowedFd<'_>,
    tag: u64,
    nets: &[Net],
    mark: u32,
) -> Result<OwnedFd, FilterError> {
    let entries = entries(nets)?;
    let protocol = crate::sock::protocol(socket)?;
    let is_tcp = match protocol {
        libc::IPPROTO_TCP => true,
        libc::IPPROTO_UDP => false,
        other => return Err(FilterError::Protocol(other)),
    };
    let map = Map::new(KEY)?;
    fill(&map, &entries)?;
    let [ring, rate, seen] = watch.keep().map(|fd| fd.as_raw_fd());
    let maps = Maps { nets: map.as_fd().as_raw_fd(), ring, rate, seen };
    let code = program(&maps, tag, is_tcp, if is_tcp { mark } else { 0 })?;
    let loaded = load_filter(&code)?;
    crate::sock::attach_and_lock(socket, loaded.as_fd())?;
    Ok(map.into())
}

/// Any list, for [`crate::fuzzing`].
pub(crate) fn read_any(nets: &[Net]) {
    let _either = entries(nets);
}

/// Exchanges the list of a filter. Whoever is on both lists passes throughout. If the kernel cannot
/// hold the new list, only what is on both or was added before the failure passes.
pub fn refill(map: OwnedFd, nets: &[Net]) -> Result<(), FilterError> {
    let entries = entries(nets)?;
    let map = Map::adopt(map, KEY)?;
    let old: Vec<Key> = map.keys()?;
    let filled = fill(&map, &entries);
    for key in old.iter().filter(|key| !entries.contains_key(*key)) {
        map.remove(key)?;
    }
    Ok(filled?)
}

fn fill(map: &Map, entries: &HashMap<Key, Ranges>) -> io::Result<()> {
    for (key, [a, b, c, d]) in entries {
        let (a, b, c, d) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes(), d.to_ne_bytes());
        let mut value = [0; 16];
        for (to, from) in value.iter_mut().zip(a.into_iter().chain(b).chain(c).chain(d)) {
            *to = from;
        }
        map.insert(key, &mut value)?;
    }
    Ok(())
}

/// The map's content for a list.
fn entries(nets: &[Net]) -> Result<HashMap<Key, Ranges>, FilterError> {
    let mut entries: HashMap<Key, Ranges> = HashMap::with_capacity(nets.len());
    for (at, net) in nets.iter().enumerate() {
        let longest = match net.family {
            4 => 32,
            6 => 128,
            _ => return Err(FilterError::Net(at)),
        };
        if net.bits > longest || net.reserved != 0 {
            return Err(FilterError::Net(at));
        }
        let masked =
            u128::from_be_bytes(net.ip) & u128::MAX.checked_shl(128 - u32::from(net.bits)).unwrap_or(0);
        let ranges = entries.entry(key(32 + u32::from(net.bits), net.family, masked.to_be_bytes()));
        let ranges = ranges.or_insert([NO_RANGE; 4]);
        if net.low <= net.high {
            let free = ranges.iter_mut().find(|range| **range == NO_RANGE);
            *free.ok_or(FilterError::TooManyRanges(at))? = u32::from(net.low) << 16 | u32::from(net.high);
        }
    }
    Ok(entries)
}

fn key(bits: u32, family: u8, ip: [u8; 16]) -> Key {
    let mut key = [0; 24];
    let bytes = bits.to_ne_bytes().into_iter().chain([family, 0, 0, 0]).chain(ip);
    for (to, from) in key.iter_mut().zip(bytes) {
        *to = from;
    }
    key
}
