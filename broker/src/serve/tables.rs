//! Verdict tables and record rings: what processes may do without asking, and what they say they did.

use std::{collections::HashMap, io, os::fd::OwnedFd, rc::Rc};

use portcullis_backstop::cgroup_name;
use portcullis_types::{Assurance, Lane, Op, Protocol};
use portcullis_wire::shared::{Entry, RECORDS, Record, Ring, Shape, VerdictTable};

use super::{Broker, Process, RuleText, flows::Flow};
use crate::{
    audit::{Line, More},
    process::ProcessKey,
    sys::{memory::Shared, monotonic, realtime},
};

/// After how long without a record a ring is no longer looked at, in nanoseconds.
const QUIET: u64 = 100_000_000;
/// How often it is looked whether the kernel still records for a process, in nanoseconds.
const NOTED: u64 = 1_000_000_000;
/// How far a claimed time may be from now, in nanoseconds.
const PLAUSIBLE: u64 = 60_000_000_000;

/// A region that was put into a table.
#[derive(Clone, Debug)]
pub(super) struct Region {
    pub(super) entry: Entry,
    pub(super) rule: Option<RuleText>,
}

/// Regions of one generation, by shape and masked address.
#[derive(Debug, Default)]
struct Regions {
    generation: u64,
    shapes: Vec<Shape>,
    by_place: HashMap<(u8, u8, u8, u128), Vec<Region>>,
}

/// What a process shares with the broker.
#[derive(Debug)]
pub(super) struct Memory {
    table: Shared<VerdictTable>,
    ring: Shared<Ring>,
    taken: u32,
    now: Regions,
    /// Of the generation before: a record may have been on its way.
    before: Regions,
    /// When the ring was last looked at (monotonic).
    looked: u64,
    /// When the last record came (monotonic).
    heard: u64,
    /// When a full table was last emptied for this reason (monotonic).
    emptied: u64,
    /// The kernel puts on record what some of its regions permit.
    noted: bool,
}

fn mask(prefix: u8) -> u128 {
    match prefix {
        0 => 0,
        n => u128::MAX << (128 - u32::from(n.min(128))),
    }
}

impl Regions {
    fn insert(&mut self, region: Region) {
        let Entry { shape, addr, .. } = region.entry;
        if !self.shapes.contains(&shape) {
            self.shapes.push(shape);
        }
        let place = (shape.call, shape.protocol, shape.prefix, addr & mask(shape.prefix));
        self.by_place.entry(place).or_default().push(region);
    }

    fn find(&self, record: &Record, port: u16) -> Option<&Region> {
        let key = record.remote.key();
        self.shapes.iter().filter(|s| (s.call, s.protocol) == (record.call, record.protocol)).find_map(|s| {
            let place = (s.call, s.protocol, s.prefix, key & mask(s.prefix));
            self.by_place.get(&place)?.iter().find(|r| {
                (r.entry.port_low..=r.entry.port_high).contains(&port) && r.entry.rule == record.rule
            })
        })
    }
}

impl Memory {
    fn new(generation: u64) -> io::Result<Self> {
        let (table, ring) = (Shared::<VerdictTable>::new()?, Shared::<Ring>::new()?);
        ring.init();
        table.clear(generation);
        let now = Regions { generation, ..Regions::default() };
        let before = Regions::default();
        Ok(Self { table, ring, taken: 0, now, before, looked: 0, heard: 0, emptied: 0, noted: false })
    }

    /// Empties the table; what comes next is of `generation`. The ring must have been drained.
    pub(super) fn clear(&mut self, generation: u64) {
        self.table.clear(generation);
        let fresh = Regions { generation, ..Regions::default() };
        self.before = std::mem::replace(&mut self.now, fresh);
        self.noted = false;
    }

    /// Puts a region in. `false`: no room, and it was full only just now.
    fn insert(&mut self, region: Region) -> bool {
        let mut done = self.table.insert(&region.entry);
        let now = monotonic();
        if !done && now.saturating_sub(self.emptied) >= 1_000_000_000 {
            self.emptied = now;
            self.clear(self.now.generation);
            done = self.table.insert(&region.entry);
        }
        if done {
            self.noted |= region.entry.noted;
            self.now.insert(region);
        }
        done
    }

    fn claim(&self, record: &Record) -> Option<&Region> {
        let outbound = Op::try_from(record.call).is_ok_and(Op::is_outbound);
        let port = if outbound { record.remote.port } else { record.local.port };
        [&self.now, &self.before]
            .into_iter()
            .filter(|r| r.generation == record.generation)
            .find_map(|r| r.find(record, port))
            // The table may have been emptied within one generation.
            .or_else(|| {
                self.before.find(record, port).filter(|_| self.before.generation == record.generation)
            })
    }
}

impl Broker {
    /// Puts a permit into a process's table. `false`: it has to ask each time.
    pub(super) fn cache(&mut self, key: ProcessKey, entry: Entry, rule: Option<RuleText>) -> bool {
        let generation = self.generation_in_force();
        let Some(process) = self.processes.get_mut(&key) else { return false };
        if process.memory.is_none() {
            process.memory = Memory::new(generation).ok();
        }
        let connects = entry.shape.call == Op::Connect as u8;
        if connects && !entry.noted && process.memory.as_ref().is_some_and(|m| m.noted) {
            self.distrust(key);
        }
        let memory = self.processes.get_mut(&key).and_then(|p| p.memory.as_mut());
        memory.is_some_and(|m| m.insert(Region { entry, rule })) && self.grant_region(&entry)
    }

    /// Looks, once in a second of work, whether the kernel still records what it is trusted to: a process that was
    /// moved to another cgroup asks again. A broker without work grants no longer than its lease.
    pub(super) fn tend_noted(&mut self) {
        let now = monotonic();
        if now.saturating_sub(self.cgroups_looked_at) < NOTED {
            return;
        }
        self.cgroups_looked_at = now;
        let noted = |p: &Process| p.memory.as_ref().is_some_and(|memory| memory.noted);
        // One that has ended, and its cgroup with it, has left nothing.
        let own = format!("{} (deleted)", cgroup_name(&self.state));
        let is_over = |at: String| at.split('/').next_back() == Some(&own);
        let is_elsewhere = |p: &Process| p.at.cgroup().is_ok_and(|at| !at.is_some_and(is_over));
        let has_left =
            |key: &ProcessKey, p: &Process| noted(p) && !self.kernel_records(*key) && is_elsewhere(p);
        let gone: Vec<_> =
            self.processes.iter().filter(|(key, p)| has_left(key, p)).map(|(key, _)| *key).collect();
        gone.into_iter().for_each(|key| self.distrust(key));
    }

    /// Empties the table of a process that has left the cgroup in which the kernel put its calls on record.
    fn distrust(&mut self, key: ProcessKey) {
        self.drain(key);
        let generation = self.generation_in_force();
        let memory = self.processes.get_mut(&key).and_then(|p| p.memory.as_mut());
        if let Some(memory) = memory {
            memory.clear(generation);
        }
        let why = "a process left its control group: what it connected to since then may not be on record";
        self.note("lost", why, &[("by_pid", More::Number(u64::from(key.pid.unsigned_abs())))]);
    }

    /// Descriptors of state page, table and ring of a process, made if it has none yet.
    pub(super) fn memory_of(&mut self, key: ProcessKey) -> Option<[OwnedFd; 3]> {
        let generation = self.generation_in_force();
        let process = self.processes.get_mut(&key)?;
        if process.memory.is_none() {
            process.memory = Memory::new(generation).ok();
        }
        let memory = process.memory.as_ref()?;
        let dup = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().ok();
        Some([dup(self.page.descriptor())?, dup(memory.table.descriptor())?, dup(memory.ring.descriptor())?])
    }

    /// Empties all tables, after what was done by them is on record.
    pub(super) fn clear_tables(&mut self) {
        let generation = self.generation_in_force();
        let keys: Vec<_> = self.processes.keys().copied().collect();
        for key in keys {
            self.drain(key);
            let Some(process) = self.processes.get_mut(&key) else { continue };
            process.learned = None;
            if let Some(memory) = &mut process.memory {
                memory.clear(generation);
            }
        }
        self.clear_grants();
    }

    /// Takes what is in a process's ring into the log. While the log cannot be written it stays there.
    pub(super) fn drain(&mut self, key: ProcessKey) {
        if self.refuses_for_log() {
            return;
        }
        // More than one fill: a process that writes all the while cannot hold the broker here.
        for _ in 0..2 * RECORDS {
            let Some(memory) = self.processes.get_mut(&key).and_then(|p| p.memory.as_mut()) else { return };
            let Some(record) = memory.ring.pop(&mut memory.taken) else { return };
            memory.heard = monotonic();
            let claim = memory.claim(&record).cloned();
            if claim.as_ref().is_some_and(|region| region.entry.noted) {
                continue; // the kernel's own record of it comes, which no program can forge
            }
            self.record_claim(key, &record, claim.as_ref());
        }
    }

    /// Drains the rings of busy processes; those that have been quiet are told to ring again.
    pub(super) fn look_at_busy_rings(&mut self) {
        if self.busy.is_empty() {
            return;
        }
        let mut keys: Vec<_> = self.busy.iter().copied().collect();
        keys.sort_by_key(|key| self.processes.get(key).and_then(|p| p.memory.as_ref()).map(|m| m.looked));
        let began = std::time::Instant::now();
        for key in keys {
            if began.elapsed() > super::TURN {
                return; // the longest not looked at come first next time
            }
            if let Some(memory) = self.processes.get_mut(&key).and_then(|p| p.memory.as_mut()) {
                memory.looked = monotonic();
            }
            self.drain(key);
            let Some(memory) = self.processes.get(&key).and_then(|p| p.memory.as_ref()) else {
                self.busy.remove(&key);
                continue;
            };
            if monotonic().saturating_sub(memory.heard) > QUIET && memory.ring.sleep(memory.taken) {
                self.busy.remove(&key);
            } else {
                memory.ring.wake();
            }
        }
    }

    fn record_claim(&mut self, key: ProcessKey, record: &Record, region: Option<&Region>) {
        let Some(process) = self.processes.get_mut(&key) else { return };
        process.permitted += 1;
        let context = Rc::clone(&process.context);
        let now = realtime();
        let time = if now.abs_diff(record.time) < PLAUSIBLE { record.time } else { now };
        let op = Op::try_from(record.call);
        let rule = region.and_then(|r| r.rule.as_ref());
        let forged = region.is_none().then_some("no such verdict was given to this process");
        let assurance = Assurance::try_from(record.assurance).unwrap_or_default();
        let mut more = Vec::with_capacity(2);
        if let Some(rule) = rule {
            more.push(("rule_at", More::Text(&rule.at)));
        }
        if let Some(forged) = forged {
            more.push(("claim", More::Text(forged)));
        }
        let op_name = op.map_or_else(|_| "unknown".to_owned(), |op| op.to_string());
        let protocol = Protocol(record.protocol);
        let (local, remote) = (record.local.socket_addr(), record.remote.socket_addr());
        let association = (record.cookie != 0).then_some(record.cookie);
        let seq = self.log.push(&Line {
            process: Some(&context),
            protocol: Some(protocol),
            local: local.filter(|a| a.port() != 0 || !a.ip().is_unspecified()),
            remote,
            assurance: Some(assurance),
            verdict: Some(if forged.is_some() { "refuse" } else { "permit" }),
            rule: rule.map(|r| &*r.text),
            reason: forged.map(|_| "the process says that it was permitted, and it was not"),
            lane: Some(Lane::Plain),
            association,
            generation: Some(record.generation),
            more: &more,
            op: &op_name,
            ..Line::bare(time, "", "table")
        });
        if region.is_some()
            && let (Ok(op @ (Op::Connect | Op::Accept)), Some(cookie), Protocol::TCP) =
                (op, association, protocol)
        {
            self.flows.open(
                cookie,
                Flow {
                    number: -1,
                    context,
                    op,
                    protocol,
                    local,
                    remote,
                    rule: rule.cloned(),
                    session: None,
                    lane: Lane::Plain,
                    assurance,
                    generation: record.generation,
                    since: time,
                    seq,
                    met: false,
                },
            );
            self.settle_late(cookie);
        }
    }
}

#[cfg(test)]
mod tests {
    use portcullis_wire::Addr;

    use super::*;

    fn entry(prefix: u8, address: &str, rule: u32) -> Entry {
        let far: std::net::SocketAddr = address.parse().unwrap();
        Entry {
            shape: Shape { call: 1, protocol: 6, prefix },
            addr: Addr::from(far).key(),
            port_low: far.port(),
            port_high: far.port(),
            rule,
            assurance: 0,
            noted: false,
        }
    }

    fn record(address: &str, rule: u32, generation: u64) -> Record {
        let remote = Addr::from(address.parse::<std::net::SocketAddr>().unwrap());
        Record { call: 1, protocol: 6, rule, generation, remote, ..Record::default() }
    }

    #[test]
    fn a_claim_is_believed_only_if_such_a_region_was_given() {
        let mut memory = Memory::new(5).unwrap();
        assert!(memory.insert(Region { entry: entry(120, "192.0.2.1:80", 3), rule: None }));
        assert!(memory.claim(&record("192.0.2.200:80", 3, 5)).is_some());
        for forged in [
            record("192.0.3.1:80", 3, 5),
            record("192.0.2.1:81", 3, 5),
            record("192.0.2.1:80", 4, 5),
            record("192.0.2.1:80", 3, 6),
            Record { call: 4, ..record("192.0.2.1:80", 3, 5) },
            Record { protocol: 17, ..record("192.0.2.1:80", 3, 5) },
        ] {
            assert!(memory.claim(&forged).is_none(), "{forged:?}");
        }
        memory.clear(6);
        assert!(memory.claim(&record("192.0.2.9:80", 3, 5)).is_some(), "it was on its way");
        memory.clear(7);
        assert!(memory.claim(&record("192.0.2.9:80", 3, 5)).is_none());
    }
}
