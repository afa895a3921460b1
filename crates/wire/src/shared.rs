//! Memory that a wrapped process shares with its broker, so that a call which was judged before
//! costs no round trip and is on record all the same.
//!
//! | memory | who writes | who reads | one per |
//! |---|---|---|---|
//! | [`StatePage`] | broker | every process, read-only | broker |
//! | [`VerdictTable`] | broker | its process, read-only (sealed) | process image and credentials |
//! | [`Ring`] | its process | broker, as claims | process |
//!
//! The table answers with the verdict for a *region* (prefix and port range), as Open vSwitch's
//! megaflows do, so a new destination in a known region is a hit. Only permits on lane plain that
//! depend on nothing but policy, process and destination are in it: never refusals, related
//! channels, protected flows, or destinations on this host.
//!
//! A hit is good while all hold: the broker lives ([`StatePage::alive`]), its lease has not run
//! out, the table's generation is the state page's, and the seqlock did not move.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::Addr;

/// Bit that the kernel sets in a robust futex when its owner dies (`FUTEX_OWNER_DIED`, linux/futex.h).
pub const OWNER_DIED: u32 = 0x4000_0000;

/// What a broker tells all processes at once. One page.
#[repr(C, align(64))]
pub struct StatePage {
    /// [`crate::frame::MAGIC`].
    pub magic: AtomicU32,
    /// [`crate::frame::VERSION`].
    pub version: AtomicU32,
    /// First word of a robust, process-shared pthread mutex that the broker's main thread holds
    /// all its life: its thread id, and [`OWNER_DIED`] once the kernel has buried it. 0: not up.
    pub alive: AtomicU32,
    /// Rest of that mutex (`pthread_mutex_t` is 40 bytes on x86_64); `alive` is its first word.
    pub mutex_rest: [AtomicU32; 9],
    /// Zero.
    pub reserved: [AtomicU32; 4],
    /// Generation in force.
    pub generation: AtomicU64,
    /// `CLOCK_MONOTONIC` in nanoseconds until which cached verdicts may be used without asking.
    pub lease: AtomicU64,
}

impl StatePage {
    /// Whether cached verdicts of `generation` are good at `now` (`CLOCK_MONOTONIC`, nanoseconds).
    #[must_use]
    pub fn vouches(&self, generation: u64, now: u64) -> bool {
        let alive = self.alive.load(Ordering::Acquire);
        alive != 0
            && alive & OWNER_DIED == 0
            && now < self.lease.load(Ordering::Relaxed)
            && self.generation.load(Ordering::Acquire) == generation
    }
}

/// Slots of a [`VerdictTable`]; a power of two.
pub const SLOTS: usize = 1024;
/// Most distinct shapes (call, protocol, prefix length) in one table.
pub const SHAPES: usize = 16;
/// Longest probe for one shape.
pub const PROBES: usize = 8;

/// One kind of region in the table: all with the same call, protocol and prefix length.
/// Packed as `call << 16 | protocol << 8 | prefix length`; 0 is unused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shape {
    /// `portcullis_types::Op` number, not 0.
    pub call: u8,
    /// IANA protocol number.
    pub protocol: u8,
    /// Prefix length over [`Addr::key`], 0 to 128 (v4 prefixes count from 96).
    pub prefix: u8,
}

impl Shape {
    const fn pack(self) -> u32 {
        (self.call as u32) << 16 | (self.protocol as u32) << 8 | self.prefix as u32
    }
    const fn unpack(word: u32) -> Option<Self> {
        if word >> 16 == 0 {
            return None;
        }
        let [prefix, protocol, call, _] = word.to_le_bytes();
        Some(Self { call, protocol, prefix })
    }
    const fn mask(self) -> u128 {
        match self.prefix {
            0 => 0,
            n if n >= 128 => u128::MAX,
            n => u128::MAX << (128 - n as u32),
        }
    }
}

/// One region with its verdict. 32 bytes; `shape` 0 is an empty slot.
#[repr(C, align(32))]
pub struct Slot {
    shape: AtomicU32,
    /// `low << 16 | high`, both inclusive, host byte order.
    ports: AtomicU32,
    addr_high: AtomicU64,
    addr_low: AtomicU64,
    rule: AtomicU32,
    /// Assurance number in the low byte, in the next one 1 if the kernel puts the call on record.
    how: AtomicU32,
}

/// Verdicts that a process need not ask for again.
#[repr(C, align(64))]
pub struct VerdictTable {
    /// Odd while the broker writes.
    seq: AtomicU32,
    reserved: AtomicU32,
    /// Generation of all entries.
    generation: AtomicU64,
    shapes: [AtomicU32; SHAPES],
    slots: [Slot; SLOTS],
}

/// A permit found in the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hit {
    /// The rule that permits; `u32::MAX` if it is not a rule's doing.
    pub rule: u32,
    /// Its generation.
    pub generation: u64,
    /// A `portcullis_types::Assurance` number.
    pub assurance: u8,
    /// The kernel puts the call on record, so the program need not.
    pub noted: bool,
}

/// A region to put into the table.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Call, protocol and prefix length.
    pub shape: Shape,
    /// Any address in the region ([`Addr::key`]).
    pub addr: u128,
    /// Lowest port, host byte order. For calls that open a flow the remote port, else the local.
    pub port_low: u16,
    /// Highest port.
    pub port_high: u16,
    /// Rule that permits.
    pub rule: u32,
    /// A `portcullis_types::Assurance` number.
    pub assurance: u8,
    /// See [`Hit`].
    pub noted: bool,
}

fn spread(masked: u128, shape: u32) -> usize {
    // Fibonacci hashing; the table is per process, so a poor spread harms only its owner.
    #[expect(clippy::cast_possible_truncation, reason = "folding 128 bits to 64 is the point")]
    let folded = (masked >> 64) as u64 ^ masked as u64 ^ u64::from(shape).rotate_left(40);
    let hash = folded.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (hash >> 32) as usize
}

#[expect(clippy::cast_possible_truncation, reason = "the halves of a 128-bit number")]
const fn halves(key: u128) -> (u64, u64) {
    ((key >> 64) as u64, key as u64)
}

impl VerdictTable {
    /// Looks one call up, as the wrapped process. `None`: ask the broker.
    ///
    /// Wait-free: a table that changes meanwhile is a miss.
    #[must_use]
    pub fn look_up(&self, call: u8, protocol: u8, far: &Addr, port: u16) -> Option<Hit> {
        let before = self.seq.load(Ordering::Acquire);
        if before & 1 != 0 {
            return None;
        }
        let found = self.search(call, protocol, far.key(), port);
        fence(Ordering::Acquire);
        (self.seq.load(Ordering::Relaxed) == before).then_some(found)?
    }

    fn search(&self, call: u8, protocol: u8, key: u128, port: u16) -> Option<Hit> {
        for word in &self.shapes {
            let word = word.load(Ordering::Relaxed);
            let shape = Shape::unpack(word)?; // shapes are filled from the front
            if shape.call != call || shape.protocol != protocol {
                continue;
            }
            let masked = key & shape.mask();
            let (high, low) = halves(masked);
            for i in 0..PROBES {
                let slot = self.slots.get((spread(masked, word) + i) & (SLOTS - 1))?;
                let there = slot.shape.load(Ordering::Relaxed);
                if there == 0 {
                    break;
                }
                let ports = slot.ports.load(Ordering::Relaxed);
                if there == word
                    && slot.addr_high.load(Ordering::Relaxed) == high
                    && slot.addr_low.load(Ordering::Relaxed) == low
                    && (ports >> 16..=ports & 0xffff).contains(&u32::from(port))
                {
                    let [assurance, noted, ..] = slot.how.load(Ordering::Relaxed).to_le_bytes();
                    return Some(Hit {
                        rule: slot.rule.load(Ordering::Relaxed),
                        generation: self.generation.load(Ordering::Relaxed),
                        assurance,
                        noted: noted != 0,
                    });
                }
            }
        }
        None
    }

    /// Empties the table and names the generation of what comes next. Broker only.
    pub fn clear(&self, generation: u64) {
        self.write(|| {
            for word in &self.shapes {
                word.store(0, Ordering::Relaxed);
            }
            for slot in &self.slots {
                slot.shape.store(0, Ordering::Relaxed);
            }
            self.generation.store(generation, Ordering::Relaxed);
        });
    }

    /// Puts one region in; `false` if it does not fit (the caller may [`Self::clear`]). Broker only.
    #[must_use]
    pub fn insert(&self, entry: &Entry) -> bool {
        let word = entry.shape.pack();
        let masked = entry.addr & entry.shape.mask();
        let (high, low) = halves(masked);
        let shape_at = self.shapes.iter().position(|s| {
            let there = s.load(Ordering::Relaxed);
            there == 0 || there == word
        });
        let free = (0..PROBES)
            .filter_map(|i| self.slots.get((spread(masked, word) + i) & (SLOTS - 1)))
            .find(|slot| slot.shape.load(Ordering::Relaxed) == 0);
        let (Some(shape_at), Some(slot)) = (shape_at.and_then(|i| self.shapes.get(i)), free) else {
            return false;
        };
        self.write(|| {
            slot.ports.store(u32::from(entry.port_low) << 16 | u32::from(entry.port_high), Ordering::Relaxed);
            slot.addr_high.store(high, Ordering::Relaxed);
            slot.addr_low.store(low, Ordering::Relaxed);
            slot.rule.store(entry.rule, Ordering::Relaxed);
            let how = u32::from_le_bytes([entry.assurance, entry.noted.into(), 0, 0]);
            slot.how.store(how, Ordering::Relaxed);
            slot.shape.store(word, Ordering::Relaxed);
            shape_at.store(word, Ordering::Relaxed);
        });
        true
    }

    fn write(&self, change: impl FnOnce()) {
        let seq = self.seq.load(Ordering::Relaxed);
        self.seq.store(seq.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        change();
        self.seq.store(seq.wrapping_add(2), Ordering::Release);
    }
}

/// Records in a [`Ring`]; a power of two.
pub const RECORDS: usize = 2048;

/// One call that was permitted from the table: a claim, until the broker has checked it against
/// what it put into that table and numbered it. 96 bytes with its stamp.
#[repr(C, align(32))]
pub struct RecordCell {
    /// Vyukov's bounded queue: equals the position when free, position + 1 when filled.
    stamp: AtomicU32,
    words: [AtomicU32; 23],
}

/// A record as plain data. Times are `CLOCK_REALTIME` nanoseconds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Record {
    /// `portcullis_types::Op` number.
    pub call: u8,
    /// IANA protocol number.
    pub protocol: u8,
    /// The table entry's assurance.
    pub assurance: u8,
    /// Descriptor in the process.
    pub fd: i32,
    /// Rule named by the table entry.
    pub rule: u32,
    /// Generation of the table entry.
    pub generation: u64,
    /// When, in nanoseconds since the epoch.
    pub time: u64,
    /// `SO_COOKIE`, or 0.
    pub cookie: u64,
    /// Local address as far as known.
    pub local: Addr,
    /// Remote address.
    pub remote: Addr,
}

/// Bounded queue of records, many writers (threads of one process), one reader (the broker).
#[repr(C, align(64))]
pub struct Ring {
    head: AtomicU32,
    pad: [AtomicU32; 15],
    tail: AtomicU32,
    /// Not 0: the broker sleeps, and the next writer sends [`crate::OpCode::Doorbell`].
    asleep: AtomicU32,
    pad2: [AtomicU32; 14],
    cells: [RecordCell; RECORDS],
}

/// What became of a [`Ring::push`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pushed {
    /// Written; the reader is awake or will look.
    Quietly,
    /// Written; the caller must ring the doorbell.
    RingTheBell,
    /// No room: ask the broker instead, which drains the ring first.
    Full,
}

impl Ring {
    /// Makes a zeroed mapping a ring. Broker only, before it is shared.
    pub fn init(&self) {
        for (i, cell) in (0u32..).zip(&self.cells) {
            cell.stamp.store(i, Ordering::Relaxed);
        }
        self.asleep.store(1, Ordering::Release);
    }

    /// Whether something is in it that the broker has not taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.head.load(Ordering::Acquire) == self.tail.load(Ordering::Acquire)
    }

    /// Appends one record, as the wrapped process. Lock-free.
    pub fn push(&self, record: &Record) -> Pushed {
        let mut at = self.head.load(Ordering::Relaxed);
        let cell = loop {
            let Some(cell) = self.cells.get(at as usize & (RECORDS - 1)) else { return Pushed::Full };
            let lag = cell.stamp.load(Ordering::Acquire).wrapping_sub(at).cast_signed();
            if lag == 0 {
                match self.head.compare_exchange_weak(
                    at,
                    at.wrapping_add(1),
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                ) {
                    Ok(_) => break cell,
                    Err(now) => at = now,
                }
            } else if lag < 0 {
                return Pushed::Full;
            } else {
                at = self.head.load(Ordering::Relaxed);
            }
        };
        for (word, value) in cell.words.iter().zip(record.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
        cell.stamp.store(at.wrapping_add(1), Ordering::Release);
        fence(Ordering::SeqCst); // pairs with the reader's in `sleep`
        if self.asleep.load(Ordering::Relaxed) != 0 && self.asleep.swap(0, Ordering::Relaxed) != 0 {
            return Pushed::RingTheBell;
        }
        Pushed::Quietly
    }

    /// Takes the oldest record. Broker only; `expected` is its own private count of records taken,
    /// so that a process which scribbles over the ring can confuse only what it says of itself.
    pub fn pop(&self, expected: &mut u32) -> Option<Record> {
        let cell = self.cells.get(*expected as usize & (RECORDS - 1))?;
        if cell.stamp.load(Ordering::Acquire) != expected.wrapping_add(1) {
            return None;
        }
        let mut words = [0; 23];
        for (to, from) in words.iter_mut().zip(&cell.words) {
            *to = from.load(Ordering::Relaxed);
        }
        #[expect(clippy::cast_possible_truncation, reason = "a small constant")]
        cell.stamp.store(expected.wrapping_add(RECORDS as u32), Ordering::Release);
        *expected = expected.wrapping_add(1);
        self.tail.store(*expected, Ordering::Release);
        Some(Record::from_words(&words))
    }

    /// Says that the reader stops looking. Broker only. `false`: records came meanwhile; look again.
    #[must_use]
    pub fn sleep(&self, expected: u32) -> bool {
        self.asleep.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst); // pairs with the writer's in `push`
        let Some(cell) = self.cells.get(expected as usize & (RECORDS - 1)) else { return true };
        cell.stamp.load(Ordering::Acquire) != expected.wrapping_add(1)
    }

    /// Says that the reader looks by itself for a while. Broker only.
    pub fn wake(&self) {
        self.asleep.store(0, Ordering::Relaxed);
    }
}

impl Record {
    fn to_words(self) -> [u32; 23] {
        let split = |v: u64| {
            let [a, b, c, d, e, f, g, h] = v.to_le_bytes();
            [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
        };
        let ([g0, g1], [t0, t1], [c0, c1]) = (split(self.generation), split(self.time), split(self.cookie));
        let [l0, l1, l2, l3, l4, l5, l6]: [u32; 7] = zerocopy::transmute!(self.local);
        let [r0, r1, r2, r3, r4, r5, r6]: [u32; 7] = zerocopy::transmute!(self.remote);
        let what = u32::from_le_bytes([self.call, self.protocol, self.assurance, 0]);
        let fd = self.fd.cast_unsigned();
        [what, fd, self.rule, g0, g1, t0, t1, c0, c1, l0, l1, l2, l3, l4, l5, l6, r0, r1, r2, r3, r4, r5, r6]
    }

    fn from_words(words: &[u32; 23]) -> Self {
        let join = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let [what, fd, rule, g0, g1, t0, t1, c0, c1, l0, l1, l2, l3, l4, l5, l6, r0, r1, r2, r3, r4, r5, r6] =
            *words;
        let [call, protocol, assurance, _] = what.to_le_bytes();
        Self {
            call,
            protocol,
            assurance,
            fd: fd.cast_signed(),
            rule,
            generation: join(g0, g1),
            time: join(t0, t1),
            cookie: join(c0, c1),
            local: zerocopy::transmute!([l0, l1, l2, l3, l4, l5, l6]),
            remote: zerocopy::transmute!([r0, r1, r2, r3, r4, r5, r6]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::SocketAddr;

    fn zeroed<T>() -> Box<T> {
        // SAFETY: all three kinds of memory are atomics and arrays of atomics: zeroes are valid.
        #[expect(unsafe_code, reason = "stands for a fresh shared mapping, which is zeroed too")]
        unsafe {
            Box::<T>::new_zeroed().assume_init()
        }
    }

    fn addr(text: &str) -> Addr {
        Addr::from(text.parse::<SocketAddr>().unwrap())
    }

    #[test]
    fn a_region_answers_for_every_address_and_port_in_it_and_no_other() {
        let table = zeroed::<VerdictTable>();
        table.clear(3);
        let shape = Shape { call: 1, protocol: 6, prefix: 96 + 24 };
        let entry = Entry {
            shape,
            addr: addr("10.1.2.9:0").key(),
            port_low: 20,
            port_high: 22,
            rule: 5,
            assurance: 1,
            noted: true,
        };
        assert!(table.insert(&entry));
        let hit = Some(Hit { rule: 5, generation: 3, assurance: 1, noted: true });
        assert_eq!(table.look_up(1, 6, &addr("10.1.2.200:21"), 21), hit);
        assert_eq!(table.look_up(1, 6, &addr("[::ffff:10.1.2.1]:22"), 22), hit);
        assert_eq!(table.look_up(1, 6, &addr("10.1.3.1:21"), 21), None);
        assert_eq!(table.look_up(1, 6, &addr("10.1.2.1:23"), 23), None);
        assert_eq!(table.look_up(2, 6, &addr("10.1.2.1:21"), 21), None);
        table.clear(4);
        assert_eq!(table.look_up(1, 6, &addr("10.1.2.200:21"), 21), None);
    }

    #[test]
    fn a_full_table_says_so_and_keeps_what_it_has() {
        let table = zeroed::<VerdictTable>();
        let mut kept = Vec::new();
        for i in 0..4096u32 {
            let far = Addr::v4(i.to_be_bytes().into(), 0);
            let shape = Shape { call: 1, protocol: 6, prefix: 128 };
            let entry = Entry {
                shape,
                addr: far.key(),
                port_low: 1,
                port_high: 1,
                rule: i,
                assurance: 0,
                noted: false,
            };
            if table.insert(&entry) {
                kept.push((far, i));
            }
        }
        assert!(kept.len() > SLOTS / 2 && kept.len() <= SLOTS);
        for (far, rule) in kept {
            assert_eq!(table.look_up(1, 6, &far, 1).map(|hit| hit.rule), Some(rule));
        }
    }

    #[test]
    fn records_arrive_in_order_and_the_bell_rings_once() {
        let ring = zeroed::<Ring>();
        ring.init();
        let mut taken = 0;
        let one = |fd| Record { call: 1, fd, remote: addr("192.0.2.1:21"), ..Record::default() };
        assert_eq!(ring.push(&one(1)), Pushed::RingTheBell);
        assert_eq!(ring.push(&one(2)), Pushed::Quietly);
        assert_eq!(ring.pop(&mut taken), Some(one(1)));
        assert!(!ring.sleep(taken), "a record is left");
        assert_eq!(ring.pop(&mut taken), Some(one(2)));
        assert!(ring.sleep(taken) && ring.is_empty());
        assert_eq!(ring.push(&one(3)), Pushed::RingTheBell);
    }

    #[test]
    fn a_full_ring_refuses_and_loses_nothing() {
        let ring = zeroed::<Ring>();
        ring.init();
        let mut wrote = 0;
        while ring.push(&Record { fd: wrote, ..Record::default() }) != Pushed::Full {
            wrote += 1;
        }
        assert_eq!(wrote as usize, RECORDS);
        let mut taken = 0;
        for fd in 0..wrote {
            assert_eq!(ring.pop(&mut taken).map(|r| r.fd), Some(fd));
        }
        assert_eq!(ring.pop(&mut taken), None);
    }

    #[test]
    fn threads_lose_no_record_between_them() {
        let ring = zeroed::<Ring>();
        ring.init();
        let (threads, each) = (4, 20_000);
        let mut got = 0;
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    for _ in 0..each {
                        while ring.push(&Record::default()) == Pushed::Full {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            let mut taken = 0;
            while got < threads * each {
                match ring.pop(&mut taken) {
                    Some(_) => got += 1,
                    None => std::thread::yield_now(),
                }
            }
            assert_eq!(ring.pop(&mut taken), None);
        });
        assert_eq!(got, threads * each);
    }

    #[test]
    fn a_dead_broker_vouches_for_nothing() {
        let page = zeroed::<StatePage>();
        page.generation.store(1, Ordering::Relaxed);
        page.lease.store(100, Ordering::Relaxed);
        assert!(!page.vouches(1, 50), "no broker yet");
        page.alive.store(4242, Ordering::Relaxed);
        assert!(page.vouches(1, 50));
        assert!(!page.vouches(1, 100), "the lease ran out");
        assert!(!page.vouches(2, 50), "another generation");
        page.alive.store(OWNER_DIED, Ordering::Relaxed);
        assert!(!page.vouches(1, 50));
    }
}
