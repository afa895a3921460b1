//! What the programs put on record.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use aya::maps::{Array, MapData};
use portcullis_types::{Generation, Op, Protocol, RuleId};

use crate::{
    error::BackstopError,
    layout::{RawEvent, Who},
    model::Holder,
    programs::in_map,
    ring::Ring,
};

/// Size of the ring, `RING` in `bpf/backstop.bpf.c`.
const RING: usize = 4 << 20;

/// Why a call was judged as it was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// A grant covers it.
    Granted,
    /// Nothing was ever granted to this image of this process with these credentials.
    Unknown,
    /// No grant of the process covers it.
    NotGranted,
    /// The grant is of another generation, or has run out.
    Stale,
    /// The broker did not renew its lease.
    NoLease,
    /// It arrived at a listener that nobody granted.
    NotAListener,
    /// A source route leads it to another host than the one that is judged.
    Routed,
}

impl Cause {
    /// What the audit log says of it.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Granted => "granted",
            Self::Unknown => "the broker was not asked by this program",
            Self::NotGranted => "the broker granted other things, and not this",
            Self::Stale => "what was granted is no longer in force",
            Self::NoLease => "the broker does not answer",
            Self::NotAListener => "the broker did not grant this listener",
            Self::Routed => "a source route leads it by way of another host",
        }
    }

    const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            0 => Self::Granted,
            1 => Self::Unknown,
            2 => Self::NotGranted,
            3 => Self::Stale,
            4 => Self::NoLease,
            5 => Self::NotAListener,
            6 => Self::Routed,
            _ => return None,
        })
    }
}

/// One call that the kernel judged. No program can suppress or forge it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Event {
    /// `CLOCK_MONOTONIC` nanoseconds.
    pub time: u64,
    /// Who called; all zero for [`Cause::NotAListener`].
    pub holder: Holder,
    /// Thread that called.
    pub tid: u32,
    /// Cookie of the socket (`SO_COOKIE`).
    pub cookie: u64,
    /// What was called; [`Op::Listen`] for [`Cause::NotAListener`].
    pub op: Op,
    /// Protocol of the socket.
    pub protocol: Protocol,
    /// Whether the socket is an `AF_INET6` one.
    pub v6: bool,
    /// Address as the kernel itself used it, v4 as v4-mapped: far for connect and send, local for
    /// bind, the stranger's for [`Cause::NotAListener`].
    pub addr: u128,
    /// Port, host byte order; for [`Cause::NotAListener`] the local one.
    pub port: u16,
    /// Whether the call went on.
    pub permitted: bool,
    /// Why.
    pub cause: Cause,
    /// The rule of the grant.
    pub rule: Option<RuleId>,
    /// Generation in force at the time; `None` before the first.
    pub generation: Option<Generation>,
    /// Like events before this one that were not put on record, [`Cause::NotAListener`] only: there
    /// is one record per listener and second.
    pub suppressed: u32,
}

impl Event {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let raw = read(bytes)?;
        Some(Self {
            time: raw.time,
            holder: Holder::from_who(Who {
                tgid: raw.tgid,
                uid: raw.uid,
                start: raw.start,
                exec: raw.exec,
                netns: raw.netns,
            }),
            tid: raw.tid,
            cookie: raw.cookie,
            op: Op::try_from(raw.op).ok()?,
            protocol: Protocol(raw.protocol),
            v6: i32::from(raw.family) == libc::AF_INET6,
            addr: u128::from_be_bytes(raw.addr),
            port: raw.port,
            permitted: raw.permitted != 0,
            cause: Cause::from_raw(raw.cause)?,
            rule: (raw.rule != u32::MAX).then_some(RuleId(raw.rule)),
            generation: Generation::try_from(raw.generation).ok(),
            suppressed: raw.suppressed,
        })
    }
}

/// Takes a record apart, field by field in the order of [`RawEvent`].
fn read(bytes: &[u8]) -> Option<RawEvent> {
    let mut rest = bytes.get(..size_of::<RawEvent>())?;
    macro_rules! next {
        ($type:ty) => {{
            let (head, tail) = rest.split_first_chunk()?;
            rest = tail;
            <$type>::from_ne_bytes(*head)
        }};
    }
    let event = RawEvent {
        time: next!(u64),
        start: next!(u64),
        exec: next!(u64),
        netns: next!(u64),
        cookie: next!(u64),
        generation: next!(u64),
        tgid: next!(u32),
        tid: next!(u32),
        uid: next!(u32),
        process: next!(u32),
        rule: next!(u32),
        suppressed: next!(u32),
        op: next!(u8),
        protocol: next!(u8),
        cause: next!(u8),
        permitted: next!(u8),
        port: next!(u16),
        family: next!(u16),
        addr: next!(u128).to_ne_bytes(),
        zero: [0; 4],
    };
    let _ = rest;
    Some(event)
}

/// The reader's end of the ring of records.
///
/// While its owner is awake, records come quietly and it looks at intervals of its own choice (some
/// tens of milliseconds). When a look finds nothing, it calls [`Events::sleep`], and the next
/// record makes the descriptor readable. So a busy host costs some wake-ups a second, and an idle
/// one none.
pub struct Events {
    ring: Ring,
    asleep: Array<MapData, u32>,
}

impl Events {
    pub(crate) fn new(ring: OwnedFd, asleep: MapData) -> Result<Self, BackstopError> {
        let asleep = Array::try_from(aya::maps::Map::Array(asleep)).map_err(in_map("asleep"))?;
        Ok(Self { ring: open(ring)?, asleep })
    }

    /// Takes what is there, oldest first; returns how many records it was. Until [`Self::release`] they
    /// stay in the kernel as well, for [`left_over`].
    pub fn take(&mut self, each: impl FnMut(Event)) -> usize {
        take(&mut self.ring, each)
    }

    /// Says that what was taken is safe.
    pub fn release(&mut self) {
        self.ring.release();
    }

    /// Takes and releases.
    pub fn drain(&mut self, each: impl FnMut(Event)) -> usize {
        let taken = self.take(each);
        self.release();
        taken
    }

    /// Asks to be woken by the next record. Look once more after a moment: a record that was being
    /// written just now may come quietly.
    ///
    /// # Errors
    /// [`BackstopError::Map`].
    pub fn sleep(&mut self) -> Result<(), BackstopError> {
        self.asleep.set(0, 1, 0).map_err(in_map("asleep"))
    }
}

/// The records that an earlier owner of this ring (see [`crate::events_of`]) has not released. They stay there, in case
/// that their reader ends before they are safe.
///
/// # Errors
/// [`BackstopError::Map`].
pub fn left_over(ring: OwnedFd) -> Result<Vec<Event>, BackstopError> {
    let mut all = Vec::new();
    let mut ring = open(ring)?;
    take(&mut ring, |event| all.push(event));
    Ok(all)
}

fn open(ring: OwnedFd) -> Result<Ring, BackstopError> {
    Ring::new(ring, RING).map_err(|source| BackstopError::Attach { what: "read", hook: "events", source })
}

fn take(ring: &mut Ring, mut each: impl FnMut(Event)) -> usize {
    let mut taken = 0;
    while let Some(bytes) = ring.next() {
        taken += 1;
        if let Some(event) = Event::parse(bytes) {
            each(event);
        }
    }
    taken
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("ring", &self.as_raw_fd()).finish_non_exhaustive()
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_field_by_field() {
        let mut bytes = Vec::new();
        for word in [1u64, 2, 3, 4, 5, 6] {
            bytes.extend(word.to_ne_bytes());
        }
        for word in [7u32, 8, 9, 10, u32::MAX, 12] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend([1, 6, 2, 0]);
        bytes.extend(443u16.to_ne_bytes());
        bytes.extend(2u16.to_ne_bytes());
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1]);
        assert!(Event::parse(&bytes).is_none(), "too short");
        bytes.extend([0; 16]);
        let event = Event::parse(&bytes).unwrap();
        assert_eq!(event.holder, Holder { tgid: 7, start: 2, exec: 3, uid: 9, netns: 4 });
        assert_eq!((event.time, event.cookie, event.tid, event.port), (1, 5, 8, 443));
        assert_eq!(event.addr, std::net::Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped().to_bits());
        assert_eq!((event.op, event.cause, event.rule), (Op::Connect, Cause::NotGranted, None));
        bytes[74] = 99;
        assert!(Event::parse(&bytes).is_none(), "no such cause");
    }
}
