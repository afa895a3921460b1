//! What may be granted, and how overlapping grants become entries of a longest-prefix map. Pure.

use std::{collections::BTreeMap, ops::RangeInclusive};

use portcullis_types::{Op, Protocol, RuleId};

use crate::{
    error::BackstopError,
    layout::{RANGES, Range, Who},
};

/// One thread's process as the kernel names it: what a grant is given to.
///
/// An exec, a reused process id, a change of user or of network namespace make another, so no grant
/// outlives what it was judged for.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Holder {
    /// Process (thread group) id in the initial pid namespace.
    pub tgid: u32,
    /// When the process began, `CLOCK_BOOTTIME` nanoseconds.
    pub start: u64,
    /// How many images it and its ancestors have run; grows with each exec.
    pub exec: u64,
    /// Effective user id of the thread, in the initial user namespace.
    pub uid: u32,
    /// Network namespace of its *sockets*, as `SO_NETNS_COOKIE` tells it.
    pub netns: u64,
}

impl Holder {
    pub(crate) fn who(self) -> Who {
        let Self { tgid, start, exec, uid, netns } = self;
        Who { tgid, uid, start, exec, netns }
    }

    pub(crate) fn from_who(who: Who) -> Self {
        let Who { tgid, uid, start, exec, netns } = who;
        Self { tgid, start, exec, uid, netns }
    }

    /// The same process, using sockets of another network namespace (`SO_NETNS_COOKIE`).
    #[must_use]
    pub const fn in_netns(self, netns: u64) -> Self {
        Self { netns, ..self }
    }
}

/// Destinations (or local addresses, for bind) that are granted alike.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Region {
    /// `Connect`, `Bind`, `Send` or `Socket`.
    pub op: Op,
    /// The socket's protocol. For `Socket`, [`Protocol::RAW`] stands for `SOCK_RAW`.
    pub protocol: Protocol,
    /// Any address in the region, v4 as v4-mapped; 0 for `Socket`.
    pub addr: u128,
    /// Prefix length over `addr`: 0 to 128, v4 prefixes count from 96.
    pub prefix: u8,
    /// Lowest port, host byte order; 0 where there is none. `bind` to any free port asks for port 0.
    pub low: u16,
    /// Highest port.
    pub high: u16,
    /// The rule that permits, for the record.
    pub rule: Option<RuleId>,
    /// Whether each call is put on record. `false` where the broker wrote the record itself.
    pub record: bool,
}

impl Region {
    /// Every address and port for one call and protocol, on record.
    #[must_use]
    pub const fn everything(op: Op, protocol: Protocol) -> Self {
        Self { op, protocol, addr: 0, prefix: 0, low: 0, high: u16::MAX, rule: None, record: true }
    }

    /// One address, v4 as v4-mapped, and a range of ports.
    #[must_use]
    pub const fn host(op: Op, protocol: Protocol, addr: u128, ports: &RangeInclusive<u16>) -> Self {
        let (low, high) = (*ports.start(), *ports.end());
        Self { op, protocol, addr, prefix: 128, low, high, rule: None, record: true }
    }

    /// The same without records.
    #[must_use]
    pub const fn silent(self) -> Self {
        Self { record: false, ..self }
    }

    const fn covers(&self, op: Op, protocol: Protocol, addr: u128, prefix: u8) -> bool {
        self.op as u8 == op as u8
            && self.protocol.0 == protocol.0
            && self.prefix <= prefix
            && masked(addr, self.prefix) == masked(self.addr, self.prefix)
    }
}

/// `addr` with all but its first `prefix` bits zero.
pub(crate) const fn masked(addr: u128, prefix: u8) -> u128 {
    match prefix {
        0 => 0,
        n if n >= 128 => addr,
        n => addr & (u128::MAX << (128 - n as u32)),
    }
}

/// One entry of the map: a prefix with all the ports that any region grants there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Entry {
    pub op: Op,
    pub protocol: Protocol,
    pub addr: u128,
    pub prefix: u8,
    pub ranges: Vec<Range>,
    /// Bit n: range n is not put on record.
    pub silent: u32,
}

/// Turns regions into entries such that the longest prefix alone tells all that is granted.
///
/// # Errors
/// [`BackstopError::TooManyRanges`] where more than eight ranges of ports meet in one prefix.
pub(crate) fn entries(regions: &[Region]) -> Result<Vec<Entry>, BackstopError> {
    let mut places: BTreeMap<(u8, u8, u8, u128), (Op, Protocol)> = BTreeMap::new();
    for region in regions {
        let addr = masked(region.addr, region.prefix);
        let key = (region.op as u8, region.protocol.0, region.prefix, addr);
        places.insert(key, (region.op, region.protocol));
    }
    let mut out = Vec::with_capacity(places.len());
    for ((_, _, prefix, addr), (op, protocol)) in places {
        let mut here: Vec<(Range, bool)> = regions
            .iter()
            .filter(|r| r.covers(op, protocol, addr, prefix) && r.low <= r.high)
            .map(|r| {
                (Range { low: r.low, high: r.high, rule: r.rule.map_or(u32::MAX, |id| id.0) }, !r.record)
            })
            .collect();
        // Those on record come first, so that an overlap is on record.
        here.sort_by_key(|(range, silent)| (*silent, range.rule, range.low, range.high));
        let mut merged: Vec<(Range, bool)> = Vec::new();
        for (range, silent) in here {
            match merged.last_mut() {
                Some((last, was))
                    if *was == silent
                        && last.rule == range.rule
                        && u32::from(range.low) <= u32::from(last.high) + 1 =>
                {
                    last.high = last.high.max(range.high);
                }
                _ => merged.push((range, silent)),
            }
        }
        if merged.len() > RANGES {
            return Err(BackstopError::TooManyRanges { found: merged.len(), most: RANGES });
        }
        let silent = merged
            .iter()
            .zip(0u32..)
            .filter(|((_, silent), _)| *silent)
            .fold(0, |bits, (_, n)| bits | 1 << n);
        let ranges = merged.into_iter().map(|(range, _)| range).collect();
        out.push(Entry { op, protocol, addr, prefix, ranges, silent });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the program does with the entries.
    fn granted(entries: &[Entry], op: Op, protocol: Protocol, addr: u128, port: u16) -> bool {
        entries
            .iter()
            .filter(|e| e.op == op && e.protocol == protocol && masked(addr, e.prefix) == e.addr)
            .max_by_key(|e| e.prefix)
            .is_some_and(|e| e.ranges.iter().any(|r| (r.low..=r.high).contains(&port)))
    }

    /// What the regions say.
    fn meant(regions: &[Region], op: Op, protocol: Protocol, addr: u128, port: u16) -> bool {
        regions.iter().any(|r| r.covers(op, protocol, addr, 128) && (r.low..=r.high).contains(&port))
    }

    fn any_region() -> impl Strategy<Value = Region> {
        let op = prop::sample::select(vec![Op::Connect, Op::Send]);
        let protocol = prop::sample::select(vec![Protocol::TCP, Protocol::UDP]);
        (op, protocol, 0u128..4, 120u8..=128, 0u16..40, 0u16..10, 0u32..2, any::<bool>()).prop_map(
            |(op, protocol, addr, prefix, low, width, rule, record)| Region {
                op,
                protocol,
                addr: addr << 2 | addr,
                prefix,
                low,
                high: low + width,
                rule: Some(RuleId(rule)),
                record,
            },
        )
    }

    proptest! {
        #[test]
        fn the_longest_prefix_grants_what_all_regions_together_grant(
            regions in prop::collection::vec(any_region(), 0..6), addr in 0u128..16, port in 0u16..50,
        ) {
            let entries = entries(&regions).unwrap();
            for op in [Op::Connect, Op::Send] {
                for protocol in [Protocol::TCP, Protocol::UDP] {
                    prop_assert_eq!(
                        granted(&entries, op, protocol, addr, port),
                        meant(&regions, op, protocol, addr, port)
                    );
                }
            }
        }
    }

    #[test]
    fn a_narrow_grant_does_not_hide_a_wide_one() {
        let wide = Region { low: 80, high: 80, ..Region::everything(Op::Connect, Protocol::TCP) };
        let narrow = Region::host(Op::Connect, Protocol::TCP, 5, &(22..=22));
        let entries = entries(&[wide, narrow]).unwrap();
        assert!(granted(&entries, Op::Connect, Protocol::TCP, 5, 80));
        assert!(granted(&entries, Op::Connect, Protocol::TCP, 5, 22));
        assert!(!granted(&entries, Op::Connect, Protocol::TCP, 6, 22));
    }

    #[test]
    fn ranges_that_do_not_fit_are_an_error_and_not_a_guess() {
        let regions: Vec<_> =
            (0..9u16).map(|n| Region::host(Op::Connect, Protocol::TCP, 5, &(n * 10..=n * 10))).collect();
        assert!(matches!(entries(&regions), Err(BackstopError::TooManyRanges { found: 9, most: 8 })));
        assert_eq!(entries(&regions[..8]).unwrap()[0].ranges.len(), 8);
    }

    #[test]
    fn a_call_that_is_granted_both_ways_is_on_record() {
        let loud = Region::host(Op::Connect, Protocol::TCP, 5, &(1..=9));
        let entries = entries(&[loud.silent(), loud]).unwrap();
        assert_eq!(entries[0].silent & 1, 0, "the first range is the recorded one");
    }
}
