//! Granting and taking back.

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use aya::maps::{Array, HashMap as KernelHash, LpmTrie, Map, MapData, MapError, PerCpuArray, lpm_trie::Key};
use portcullis_types::{Generation, Op, Protocol, RuleId};

use crate::{
    error::BackstopError,
    events::Events,
    layout::{Control, Filter, Grant, PLACE_BITS, PlaceData, RANGES, Range, Single, Uses, Who},
    model::{Entry, Holder, Region, entries},
    programs::{Parts, in_map},
    sys,
};

/// Most seccomp filters of a thread that are looked at; of a thread that has more, one more is told.
const FILTERS: usize = 32;
/// What a mark begins with (`portcullis_guard::listener::mark`), as the kernel translates it: `r7 = r0` and `r0 = r7`
/// (linux/filter.h). No other filter moves its two registers to and fro.
const MARK: [u64; 8] = {
    const TAX: u64 = 0x07bf;
    const TXA: u64 = 0x70bf;
    [TAX, TXA, TXA, TAX, TXA, TAX, TAX, TXA]
};

/// One call that is granted for one destination, a number of times.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Once {
    /// `SO_COOKIE` of the only socket it is good for; `None`: any of the process.
    pub cookie: Option<u64>,
    /// As in [`Region`].
    pub op: Op,
    /// As in [`Region`].
    pub protocol: Protocol,
    /// v4 as v4-mapped.
    pub addr: u128,
    /// Host byte order.
    pub port: u16,
    /// How many calls.
    pub calls: u16,
    /// The rule that permits.
    pub rule: Option<RuleId>,
    /// For how long.
    pub within: Duration,
}

/// How often what happened.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Stats {
    /// Calls that a grant covered.
    pub granted: u64,
    /// Calls (and arriving segments) that were refused, or in audit mode would have been, and are
    /// on record.
    pub refused: u64,
    /// Calls refused because no broker was there; they are not on record.
    pub without_broker: u64,
    /// Calls refused while the ring of records was full (for refusals: three quarters full); they are
    /// not on record.
    pub unrecorded: u64,
}

struct Held {
    number: u32,
    regions: Vec<Region>,
    /// Entries that are in the kernel's map.
    placed: HashSet<(u32, PlaceData)>,
}

/// The broker's end: what it grants is let through, and while it lives.
///
/// Dropping it, or the death of the process that holds it, refuses everything new at once.
pub struct Backstop {
    /// What the programs put on record.
    pub events: Events,
    control: Array<MapData, Control>,
    stats: PerCpuArray<MapData, u64>,
    processes: KernelHash<MapData, Who, u32>,
    grants: LpmTrie<MapData, PlaceData, Grant>,
    singles: KernelHash<MapData, Single, Uses>,
    listeners: KernelHash<MapData, u64, u32>,
    identify: OwnedFd,
    /// Their being open is what lets anything through.
    _gates: Vec<OwnedFd>,
    now: Control,
    held: HashMap<Who, Held>,
    by_process: HashMap<u32, Vec<Who>>,
    once: HashMap<Single, u64>,
    last_number: u32,
}

impl std::fmt::Debug for Backstop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backstop")
            .field("now", &self.now)
            .field("processes", &self.held.len())
            .finish_non_exhaustive()
    }
}

impl Backstop {
    /// Makes it out of what [`crate::load_for_another`] made, in the process that it was handed to.
    ///
    /// # Errors
    /// [`BackstopError::HandedOver`], [`BackstopError::Map`], [`BackstopError::ForeignPids`].
    pub fn from_descriptors(fds: Vec<OwnedFd>) -> Result<Self, BackstopError> {
        let Parts { maps, events, gates, identify } = Parts::new(fds)?;
        let open = |fd: OwnedFd, name| MapData::from_fd(fd).map_err(in_map(name));
        let [control, asleep, stats, processes, grants, singles, listeners] = maps;
        let mut it = Self {
            events: Events::new(events, open(asleep, "asleep")?)?,
            control: Array::try_from(Map::Array(open(control, "control")?)).map_err(in_map("control"))?,
            stats: PerCpuArray::try_from(Map::PerCpuArray(open(stats, "stats")?)).map_err(in_map("stats"))?,
            processes: hash(open(processes, "processes")?, "processes")?,
            grants: LpmTrie::try_from(Map::LpmTrie(open(grants, "grants")?)).map_err(in_map("grants"))?,
            singles: hash(open(singles, "singles")?, "singles")?,
            listeners: hash(open(listeners, "listeners")?, "listeners")?,
            identify,
            _gates: gates,
            now: Control { generation: Generation::FIRST.get(), lease: u64::MAX, audit: 0, wanted: 0 },
            held: HashMap::new(),
            by_process: HashMap::new(),
            once: HashMap::new(),
            last_number: 0,
        };
        it.write_control()?;
        it.events.sleep()?;
        match it.identify(std::process::id())? {
            Some(me) if me.tgid == std::process::id() => Ok(it),
            _ => Err(BackstopError::ForeignPids),
        }
    }

    fn write_control(&mut self) -> Result<(), BackstopError> {
        self.control.set(0, self.now, 0).map_err(in_map("control"))
    }

    /// Who a thread is, as the kernel says; `None` if it has ended.
    ///
    /// Ask this *before* reading anything else about the process: an exec or a change of user in
    /// between then makes the grant void, instead of giving it to the wrong image. `netns` is the
    /// thread's own; its sockets may be of another ([`Holder::in_netns`]).
    ///
    /// # Errors
    /// [`BackstopError::Identify`], [`BackstopError::Map`].
    pub fn identify(&mut self, tid: u32) -> Result<Option<Holder>, BackstopError> {
        let mut out = [0u8; size_of::<Who>()];
        let told = self.ask_for(tid, &mut out)?;
        Ok(told.first_chunk().and_then(parse_who).map(Holder::from_who))
    }

    /// The marks that a thread is under, the newest first: seccomp filters that log (`SECCOMP_FILTER_FLAG_LOG`) and
    /// begin as ours do, as numbers that stand for them as long as a task has them. A task inherits them and cannot
    /// take one off. `None` if it has ended, or has so many filters that not all were looked at.
    ///
    /// # Errors
    /// As [`Self::identify`].
    pub fn marks(&mut self, tid: u32) -> Result<Option<Vec<u64>>, BackstopError> {
        let mut out = [0u8; size_of::<Who>() + (FILTERS + 1) * size_of::<Filter>()];
        let told = self.ask_for(tid, &mut out)?;
        Ok(told.get(size_of::<Who>()..).and_then(parse_marks))
    }

    fn ask_for<'a>(&mut self, tid: u32, out: &'a mut [u8]) -> Result<&'a [u8], BackstopError> {
        self.now.wanted = tid;
        self.write_control()?;
        let got = sys::iterate(self.identify.as_fd(), tid, out).map_err(BackstopError::Identify)?;
        Ok(out.get(..got).unwrap_or_default())
    }

    /// Adds regions to what a process holds.
    ///
    /// # Errors
    /// [`BackstopError::Full`], [`BackstopError::TooManyRanges`]: what it held before is unchanged.
    /// [`BackstopError::Map`].
    pub fn grant(&mut self, holder: Holder, regions: &[Region]) -> Result<(), BackstopError> {
        let who = holder.who();
        self.known(who)?;
        let Some(held) = self.held.get(&who) else { return Ok(()) };
        let mut all = held.regions.clone();
        all.extend(regions.iter().filter(|new| !held.regions.contains(new)));
        self.place(who, all)
    }

    /// Replaces what a process holds.
    ///
    /// # Errors
    /// As [`Self::grant`].
    pub fn regrant(&mut self, holder: Holder, regions: &[Region]) -> Result<(), BackstopError> {
        let who = holder.who();
        self.known(who)?;
        self.place(who, regions.to_vec())
    }

    /// Gives a holder its number, and takes back what earlier images of the process held.
    fn known(&mut self, who: Who) -> Result<u32, BackstopError> {
        if let Some(held) = self.held.get(&who) {
            return Ok(held.number);
        }
        let older: Vec<Who> = self
            .by_process
            .get(&who.tgid)
            .into_iter()
            .flatten()
            .filter(|other| (other.start, other.exec) != (who.start, who.exec))
            .copied()
            .collect();
        for other in older {
            self.forget(other)?;
        }
        let number = self.last_number.checked_add(1).ok_or(BackstopError::Full("processes"))?;
        self.processes.insert(who, number, 0).map_err(full_or("processes"))?;
        self.last_number = number;
        self.held.insert(who, Held { number, regions: Vec::new(), placed: HashSet::new() });
        self.by_process.entry(who.tgid).or_default().push(who);
        Ok(number)
    }

    fn place(&mut self, who: Who, regions: Vec<Region>) -> Result<(), BackstopError> {
        let Some(held) = self.held.get_mut(&who) else { return Ok(()) };
        let mut placed = HashSet::new();
        for entry in entries(&regions)? {
            let (bits, place, grant) = lay_out(held.number, &entry, self.now.generation);
            self.grants.insert(&Key::new(bits, place), grant, 0).map_err(full_or("grants"))?;
            held.placed.insert((bits, place));
            placed.insert((bits, place));
        }
        let gone: Vec<_> = held.placed.difference(&placed).copied().collect();
        for (bits, place) in gone {
            absent_is_fine(self.grants.remove(&Key::new(bits, place)), "grants")?;
        }
        held.placed = placed;
        held.regions = regions;
        Ok(())
    }

    /// Grants one destination for a number of calls, off record: the broker has written its own.
    ///
    /// # Errors
    /// [`BackstopError::Full`], [`BackstopError::Map`].
    pub fn grant_once(&mut self, holder: Holder, once: &Once) -> Result<(), BackstopError> {
        let process = self.known(holder.who())?;
        let now = monotonic();
        let Once { cookie, op, protocol, addr, port, calls, rule, within } = *once;
        let single = Single {
            cookie: cookie.unwrap_or(0),
            process,
            op: op as u8,
            protocol: protocol.0,
            port,
            addr: addr.to_be_bytes(),
        };
        let until = now.saturating_add(u64::try_from(within.as_nanos()).unwrap_or(u64::MAX));
        // What an earlier one has left is good too: both were judged.
        let left = match self.singles.get(&single, 0) {
            Ok(old) if old.generation == self.now.generation && old.until > now => old.left.max(0),
            _ => 0,
        };
        let rule = rule.map_or(u32::MAX, |id| id.0);
        let left = left.saturating_add(i32::from(calls));
        let uses = Uses { generation: self.now.generation, until, left, rule };
        if self.once.len() >= 4096 {
            self.sweep(now);
        }
        self.singles.insert(single, uses, 0).map_err(full_or("singles"))?;
        self.once.insert(single, until);
        Ok(())
    }

    /// Drops single grants that have run out.
    fn sweep(&mut self, now: u64) {
        let singles = &mut self.singles;
        self.once.retain(|single, until| {
            let keep = *until > now;
            if !keep {
                let _ = singles.remove(single);
            }
            keep
        });
    }

    /// Takes back everything from a process, whatever images and users it had.
    ///
    /// # Errors
    /// [`BackstopError::Map`].
    pub fn revoke(&mut self, tgid: u32) -> Result<(), BackstopError> {
        for who in self.by_process.get(&tgid).cloned().unwrap_or_default() {
            self.forget(who)?;
        }
        Ok(())
    }

    fn forget(&mut self, who: Who) -> Result<(), BackstopError> {
        // First the name: from here on its grants are nobody's, and numbers are never used again.
        absent_is_fine(self.processes.remove(&who), "processes")?;
        let Some(held) = self.held.remove(&who) else { return Ok(()) };
        if let Some(all) = self.by_process.get_mut(&who.tgid) {
            all.retain(|other| *other != who);
            if all.is_empty() {
                self.by_process.remove(&who.tgid);
            }
        }
        for (bits, place) in held.placed {
            absent_is_fine(self.grants.remove(&Key::new(bits, place)), "grants")?;
        }
        Ok(())
    }

    /// Processes that hold something, by id; for dropping those that have ended.
    pub fn processes(&self) -> impl Iterator<Item = u32> + '_ {
        self.by_process.keys().copied()
    }

    /// Lets segments reach a TCP listener, by the cookie of its socket.
    ///
    /// # Errors
    /// [`BackstopError::Full`], [`BackstopError::Map`].
    pub fn grant_listener(&mut self, cookie: u64) -> Result<(), BackstopError> {
        self.listeners.insert(cookie, 1, 0).map_err(full_or("listeners"))
    }

    /// Takes [`Self::grant_listener`] back.
    ///
    /// # Errors
    /// [`BackstopError::Map`].
    pub fn revoke_listener(&mut self, cookie: u64) -> Result<(), BackstopError> {
        absent_is_fine(self.listeners.remove(&cookie), "listeners")
    }

    /// Cookies of the listeners that are granted.
    pub fn listeners(&self) -> impl Iterator<Item = u64> + '_ {
        self.listeners.keys().filter_map(Result::ok)
    }

    /// Puts another generation in force: whatever was granted under the one before is void at once.
    ///
    /// Listeners stay granted; the broker judges each again.
    ///
    /// # Errors
    /// [`BackstopError::Map`].
    pub fn set_generation(&mut self, generation: Generation) -> Result<(), BackstopError> {
        self.now.generation = generation.get();
        self.write_control()?;
        self.clear()
    }

    /// Takes all regions back from all processes.
    ///
    /// # Errors
    /// [`BackstopError::Map`].
    pub fn clear(&mut self) -> Result<(), BackstopError> {
        let all: Vec<Who> = self.held.keys().copied().collect();
        for who in all {
            self.place(who, Vec::new())?;
        }
        Ok(())
    }

    /// Whether what is not granted goes on (and is on record).
    ///
    /// # Errors
    /// [`BackstopError::Map`].
    pub fn set_audit(&mut self, audit: bool) -> Result<(), BackstopError> {
        self.now.audit = u32::from(audit);
        self.write_control()
    }

    /// Says that grants are good until then (`CLOCK_MONOTONIC` nanoseconds): a broker that hangs is
    /// noticed by not renewing this. At first they are good for as long as it lives.
    ///
    /// # Errors
    /// [`BackstopError::Map`].
    pub fn lease_until(&mut self, until: u64) -> Result<(), BackstopError> {
        self.now.lease = until;
        self.write_control()
    }

    /// How often what happened since loading.
    ///
    /// # Errors
    /// [`BackstopError::Map`].
    pub fn stats(&self) -> Result<Stats, BackstopError> {
        let read = |cause: u32| -> Result<u64, BackstopError> {
            Ok(self.stats.get(&cause, 0).map_err(in_map("stats"))?.iter().sum())
        };
        let mut stats =
            Stats { granted: read(0)?, refused: 0, without_broker: read(7)?, unrecorded: read(8)? };
        for cause in 1..=6 {
            stats.refused += read(cause)?;
        }
        Ok(stats)
    }
}

/// Carries the listeners that an earlier broker granted over to the maps of the next, so that daemons
/// stay reachable over a restart. Both are descriptors as [`crate::load_for_another`] gives them.
///
/// # Errors
/// [`BackstopError::HandedOver`], [`BackstopError::Map`].
pub fn keep_listeners(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), BackstopError> {
    let open = |fd: BorrowedFd<'_>| {
        let fd = fd.try_clone_to_owned().map_err(BackstopError::Identify)?;
        hash::<u64, u32>(MapData::from_fd(fd).map_err(in_map("listeners"))?, "listeners")
    };
    let (old, mut new) = (open(from)?, open(to)?);
    for cookie in old.keys().filter_map(Result::ok) {
        new.insert(cookie, 1, 0).map_err(full_or("listeners"))?;
    }
    Ok(())
}

fn hash<K: aya::Pod, V: aya::Pod>(
    data: MapData,
    name: &'static str,
) -> Result<KernelHash<MapData, K, V>, BackstopError> {
    KernelHash::try_from(Map::HashMap(data)).map_err(in_map(name))
}

fn full_or(map: &'static str) -> impl FnOnce(MapError) -> BackstopError {
    move |source| match &source {
        MapError::SyscallError(e)
            if matches!(e.io_error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM)) =>
        {
            BackstopError::Full(map)
        }
        _ => BackstopError::Map { map, source },
    }
}

fn absent_is_fine(done: Result<(), MapError>, map: &'static str) -> Result<(), BackstopError> {
    match done {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map_err(in_map(map)),
    }
}

fn lay_out(process: u32, entry: &Entry, generation: u64) -> (u32, PlaceData, Grant) {
    let place = PlaceData {
        process,
        op: entry.op as u8,
        protocol: entry.protocol.0,
        zero: 0,
        addr: entry.addr.to_be_bytes(),
    };
    let mut ranges = [Range::default(); RANGES];
    let mut count = 0;
    for (to, from) in ranges.iter_mut().zip(&entry.ranges) {
        *to = *from;
        count += 1;
    }
    let grant = Grant { generation, until: u64::MAX, count, silent: entry.silent, ranges };
    (PLACE_BITS + u32::from(entry.prefix), place, grant)
}

fn parse_who(bytes: &[u8; 32]) -> Option<Who> {
    let (tgid, rest) = bytes.split_first_chunk()?;
    let (uid, rest) = rest.split_first_chunk()?;
    let (start, rest) = rest.split_first_chunk()?;
    let (exec, rest) = rest.split_first_chunk()?;
    let (netns, _) = rest.split_first_chunk()?;
    Some(Who {
        tgid: u32::from_ne_bytes(*tgid),
        uid: u32::from_ne_bytes(*uid),
        start: u64::from_ne_bytes(*start),
        exec: u64::from_ne_bytes(*exec),
        netns: u64::from_ne_bytes(*netns),
    })
}

/// The marks among a thread's filters; `None` if there are more filters than were looked at.
fn parse_marks(filters: &[u8]) -> Option<Vec<u64>> {
    let (filters, _) = filters.as_chunks();
    let mark = |bytes| parse_filter(bytes).filter(|it| it.logs != 0 && it.code == MARK).map(|it| it.at);
    (filters.len() <= FILTERS).then(|| filters.iter().filter_map(mark).collect())
}

fn parse_filter(bytes: &[u8; size_of::<Filter>()]) -> Option<Filter> {
    let (words, _) = bytes.as_chunks();
    let mut words = words.iter().map(|word| u64::from_ne_bytes(*word));
    let [at, logs] = [words.next()?, words.next()?];
    let mut code = [0; MARK.len()];
    code.iter_mut().zip(words).for_each(|(to, from)| *to = from);
    Some(Filter { at, logs, code })
}

/// `CLOCK_MONOTONIC` in nanoseconds, which is what the programs compare with.
#[must_use]
pub fn monotonic() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[expect(unsafe_code, reason = "std has no clock that tells nanoseconds since boot")]
    // SAFETY: writes one timespec, which `now` is.
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now)
    };
    let (seconds, rest) = (now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned());
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}
