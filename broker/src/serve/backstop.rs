//! What was judged is granted to the kernel's backstop, and what the backstop says is put on record.

use std::{
    collections::{HashSet, VecDeque},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    rc::Rc,
};

use portcullis_backstop::{Backstop, Cause, Event, Holder, Once, Region};
use portcullis_types::{Assurance, Generation, Lane, Op, Protocol, RuleId};
use portcullis_wire::{Addr, shared::Entry};

use super::{Broker, Source, flows::Flow, judge::Call, word};
use crate::{
    Mode,
    audit::{Line, More},
    process::{Context, ProcessKey},
    sys::{monotonic, realtime, socket::Facts},
};

/// How long a call that was judged may take to be made. A stopped program asks again.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);
/// Most calls that are remembered as on record already.
const MOST_RECORDED: usize = 1 << 16;
/// How often the ring is looked at while records come, in nanoseconds.
const LOOK: u64 = 5_000_000;
/// After how long without a record the ring is no longer looked at, in nanoseconds.
const QUIET: u64 = 100_000_000;

/// The kernel's end.
pub(super) struct Kernel {
    backstop: Backstop,
    /// Whom the call being judged will be granted to: asked before anything else was.
    asking: Option<Holder>,
    awake: bool,
    /// When the last record came, and when it was looked for (monotonic).
    heard: u64,
    looked: u64,
    /// Refusals that were known to be missing in the log.
    unrecorded: u64,
    /// Calls that the broker put on record and the kernel will: cookie, address, port.
    recorded: Recorded,
}

/// Calls that are on record already, the latest of them.
#[derive(Default)]
struct Recorded {
    all: HashSet<(u64, u128, u16)>,
    order: VecDeque<(u64, u128, u16)>,
}

impl Recorded {
    fn insert(&mut self, call: (u64, u128, u16)) {
        if self.all.insert(call) {
            self.order.push_back(call);
        }
        while self.order.len() > MOST_RECORDED {
            if let Some(oldest) = self.order.pop_front() {
                self.all.remove(&oldest);
            }
        }
    }

    fn take(&mut self, call: &(u64, u128, u16)) -> bool {
        self.all.remove(call)
    }
}

impl Kernel {
    pub(super) const fn is_awake(&self) -> bool {
        self.awake
    }

    /// The marks that a process is under. `None`: it cannot be told.
    pub(super) fn marks(&mut self, pid: i32) -> Option<Vec<u64>> {
        self.backstop.marks(pid.cast_unsigned()).ok().flatten()
    }
}

/// 128-bit form in which v4 is v4-mapped.
fn key(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

impl Broker {
    /// Takes the backstop over. From now on nothing new passes in its cgroups but what is granted here.
    pub(super) fn take_backstop(&mut self, descriptors: Vec<OwnedFd>) {
        let made =
            Backstop::from_descriptors(descriptors).map_err(|e| e.to_string()).and_then(|mut backstop| {
                backstop.set_audit(self.mode == Mode::Audit).map_err(|e| e.to_string())?;
                self.watch.add(&backstop.events, Source::Backstop).map_err(|e| e.to_string())?;
                Ok(backstop)
            });
        match made {
            Ok(backstop) => {
                self.kernel = Some(Kernel {
                    backstop,
                    asking: None,
                    awake: false,
                    heard: 0,
                    looked: 0,
                    unrecorded: 0,
                    recorded: Recorded::default(),
                });
                self.clear_grants();
            }
            Err(error) => {
                self.note("broker", &format!("the backstop cannot be used: {error}"), &[]);
                self.unbacked = Some(error);
            }
        }
    }

    /// Asks the kernel who a thread is, before its call is judged: an exec or a change of user in between
    /// makes the grant void, instead of giving it to the wrong image.
    pub(super) fn begin_asking(&mut self, tid: i32) {
        if let Some(kernel) = &mut self.kernel {
            kernel.asking = kernel.backstop.identify(tid.cast_unsigned()).ok().flatten();
        }
    }

    /// Lets a call that was judged and permitted pass the backstop. `by_region`: a region that covers it
    /// has been granted. If it cannot be granted, the kernel refuses it, on record.
    pub(super) fn grant_call(&mut self, call: &Call, token: Option<SocketAddr>, by_region: bool) {
        let namespace = self.namespace;
        let Some(kernel) = &mut self.kernel else { return self.fence_call(call, token) };
        let Some(holder) = kernel.asking else { return };
        let facts = call.socket.as_ref().map(|(_, facts)| facts);
        let holder = match facts.map_or(0, |f| f.namespace) {
            0 if holder.netns == 0 => holder.in_netns(namespace),
            0 => holder,
            netns => holder.in_netns(netns),
        };
        let (op, at) = match call.op {
            Op::Connect | Op::Send => (call.op, token.or(call.remote)),
            Op::Bind => (call.op, call.local),
            Op::Socket => (call.op, Some(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0))),
            Op::Listen => {
                let _refused = facts.map(|f| kernel.backstop.grant_listener(f.cookie));
                return;
            }
            Op::Accept | Op::Receive => return,
        };
        let Some(at) = at else { return };
        if let (Op::Connect, Some(facts)) = (op, facts) {
            // A region may cover it, and then the kernel records it too; it is on record already.
            kernel.recorded.insert((facts.cookie, key(at.ip()), at.port()));
            if by_region {
                return;
            }
        }
        // The kernel sees the unspecified address as such, whichever loopback it leads to.
        let once = Once {
            cookie: facts.filter(|f| op != Op::Socket && !f.multipath).map(|f| f.cookie),
            op,
            protocol: call.protocol,
            addr: key(at.ip()),
            port: at.port(),
            calls: 1,
            rule: None,
            within: PATIENCE,
        };
        let _refused = kernel.backstop.grant_once(holder, &once);
    }

    /// Lets the broker itself connect a wrapped program's socket to a token, once.
    pub(super) fn grant_ourselves(&mut self, facts: &Facts, token: &Addr) {
        let Some(kernel) = &mut self.kernel else { return };
        let me = nix::unistd::gettid().as_raw().cast_unsigned();
        let (Ok(Some(me)), Some(at)) = (kernel.backstop.identify(me), token.socket_addr()) else { return };
        let once = Once {
            cookie: Some(facts.cookie),
            op: Op::Connect,
            protocol: facts.protocol,
            addr: key(at.ip()),
            port: at.port(),
            calls: 2, // the second one learns how it went
            rule: None,
            within: PATIENCE,
        };
        // Without it the kernel refuses, and so is the program.
        let _ = kernel.backstop.grant_once(me.in_netns(facts.namespace), &once);
    }

    /// Lets a whole region pass, of which the process has been told that it need not ask again.
    pub(super) fn grant_region(&mut self, entry: &Entry) -> bool {
        let Some(kernel) = &mut self.kernel else { return true };
        let (Some(holder), Ok(op)) = (kernel.asking, Op::try_from(entry.shape.call)) else { return false };
        if op != Op::Connect {
            return true; // what arrives is not the backstop's
        }
        let region = Region {
            op,
            protocol: Protocol(entry.shape.protocol),
            addr: entry.addr,
            prefix: entry.shape.prefix,
            low: entry.port_low,
            high: entry.port_high,
            rule: (entry.rule != u32::MAX).then_some(RuleId(entry.rule)),
            record: true,
        };
        kernel.backstop.grant(holder.in_netns(self.namespace), &[region]).is_ok()
    }

    /// Takes every region back, and puts the generation in force into the kernel.
    pub(super) fn clear_grants(&mut self) {
        self.drain_backstop();
        self.clear_fence();
        let generation = self.generation_in_force();
        let Some(kernel) = &mut self.kernel else { return };
        kernel.recorded = Recorded::default();
        let done = match Generation::try_from(generation) {
            Ok(generation) => kernel.backstop.set_generation(generation),
            Err(_) => kernel.backstop.clear(),
        };
        if let Err(error) = done {
            // Better none than an old one: without its owner the kernel refuses what is new.
            self.kernel = None;
            self.watch.forget(|s| matches!(s, Source::Backstop));
            self.note("broker", &format!("the backstop does not take the generation: {error}"), &[]);
            self.unbacked = Some(error.to_string());
        }
    }

    /// As [`Self::begin_asking`], for a process that asks through the shim.
    pub(super) fn begin_asking_by_shim(&mut self, key: ProcessKey) {
        self.shimmed.insert(key);
        self.begin_asking(key.pid);
    }

    /// Who a process is now, in the kernel's own words. `None` without a backstop.
    pub(super) fn look_at(&mut self, key: ProcessKey) -> Option<Holder> {
        self.kernel.as_mut()?.backstop.identify(key.pid.cast_unsigned()).ok().flatten()
    }

    /// As [`Self::look_at`], for the process whose call is being judged, and of which the kernel was asked.
    pub(super) fn asker(&self, key: ProcessKey) -> Option<Holder> {
        self.kernel.as_ref()?.asking.filter(|asking| asking.tgid == key.pid.cast_unsigned())
    }

    /// Whether what is known of the process holds for the thread that asks: one may have credentials of its
    /// own (setresuid(2) as a raw system call).
    pub(super) fn is_the_asker(&self, key: ProcessKey) -> bool {
        let asking = self.kernel.as_ref().and_then(|k| k.asking);
        let context = self.processes.get(&key).map(|p| &p.context);
        match (asking, context) {
            (Some(asking), Some(context)) => {
                asking.uid == context.credentials.uid && asking.tgid == key.pid.cast_unsigned()
            }
            (None, _) => true,
            (Some(_), None) => false,
        }
    }

    /// Whether the backstop's programs hold a process.
    pub(super) fn enclosed(&self, pid: i32) -> bool {
        self.kernel.is_some() && self.in_cgroup(pid)
    }

    /// Whether nothing but the guard holds a process that asks through the shim, so that all its calls are made
    /// by proxy.
    pub(super) fn is_held_alone(&self, key: ProcessKey) -> bool {
        self.guards.by_proxy() && !self.kernel_records(key)
    }

    pub(super) fn forget_grants(&mut self, key: ProcessKey) {
        self.shimmed.remove(&key);
        if let Some(kernel) = &mut self.kernel {
            let _ = kernel.backstop.revoke(key.pid.cast_unsigned());
        }
    }

    pub(super) fn forget_listener_grant(&mut self, cookie: u64) {
        self.forget_fence_listener(cookie);
        if let Some(kernel) = &mut self.kernel {
            let _ = kernel.backstop.revoke_listener(cookie);
        }
    }

    /// Whether the kernel itself puts connects that a table permits on record.
    pub(super) fn kernel_records(&self, key: ProcessKey) -> bool {
        self.enclosed(key.pid)
    }

    /// The ring has something, and its reader was asleep.
    pub(super) fn wake_backstop(&mut self) {
        if let Some(kernel) = &mut self.kernel {
            (kernel.awake, kernel.heard) = (true, monotonic());
        }
        self.drain_backstop();
    }

    /// As for the rings of processes: looks while there is something, then asks to be woken.
    pub(super) fn look_at_backstop(&mut self) {
        let now = monotonic();
        match &mut self.kernel {
            Some(kernel) if kernel.awake && now.saturating_sub(kernel.looked) >= LOOK => kernel.looked = now,
            _ => return,
        }
        if self.drain_backstop() > 0 {
            return;
        }
        let Some(kernel) = &mut self.kernel else { return };
        if let Ok(stats) = kernel.backstop.stats()
            && stats.unrecorded > kernel.unrecorded
        {
            let missing = stats.unrecorded - kernel.unrecorded;
            kernel.unrecorded = stats.unrecorded;
            let why = "calls were refused faster than they could be put on record";
            self.note("lost", why, &[("lost", More::Number(missing))]);
        }
        let Some(kernel) = &mut self.kernel else { return };
        if monotonic().saturating_sub(kernel.heard) > QUIET && kernel.backstop.events.sleep().is_ok() {
            // One more look is due after this: the descriptor tells of what came in between, or it is
            // found now.
            kernel.awake = false;
            self.drain_backstop();
        }
    }

    /// Takes in what the kernel has put on record; how much that was.
    pub(super) fn drain_backstop(&mut self) -> usize {
        if self.refuses_for_log() {
            return 0; // they stay there; once there is no room, the kernel refuses
        }
        let Some(kernel) = &mut self.kernel else { return 0 };
        let mut events = Vec::new();
        // They stay there until they are in the log, for the next broker.
        kernel.backstop.events.take(|event| events.push(event));
        if !events.is_empty() {
            kernel.heard = monotonic();
            if !kernel.awake {
                kernel.awake = true;
            }
        }
        let (now, since_boot) = (realtime(), monotonic());
        for event in &events {
            let twice = (event.cookie, event.addr, event.port);
            if event.cause == Cause::Granted && self.kernel.as_mut().is_some_and(|k| k.recorded.take(&twice))
            {
                continue;
            }
            let time = now.saturating_sub(since_boot.saturating_sub(event.time));
            self.record_event(event, time);
        }
        events.len()
    }

    /// What was taken is in the log, or counted as lost.
    pub(super) fn release_events(&mut self) {
        if let Some(kernel) = &mut self.kernel {
            kernel.backstop.events.release();
        }
    }

    /// Puts on record what the broker before had no time for, but for what it did put there.
    pub(super) fn record_left_over(&mut self) {
        let events = std::mem::take(&mut self.left_over);
        if events.is_empty() {
            return;
        }
        let there = self.log.recent_connects();
        let (now, since_boot) = (realtime(), monotonic());
        for event in &events {
            if event.cause == Cause::Granted && there.contains(&event.cookie) {
                continue;
            }
            // Who it was, if it is the same image still.
            let pid = event.holder.tgid.cast_signed();
            let context = self.look_up(pid).filter(|c| self.look_at(c.key) == Some(event.holder));
            let time = now.saturating_sub(since_boot.saturating_sub(event.time));
            self.record_event_of(context.map(Rc::new), event, time);
        }
    }

    fn record_event(&mut self, event: &Event, time: u64) {
        let known: Option<ProcessKey> = self.by_pid.get(&event.holder.tgid.cast_signed()).copied();
        let context = known.and_then(|k| self.context_of(k));
        if let Some(process) = known.and_then(|k| self.processes.get_mut(&k)) {
            if event.permitted { process.permitted += 1 } else { process.refused += 1 }
        }
        self.record_event_of(context, event, time);
    }

    fn record_event_of(&mut self, context: Option<Rc<Context>>, event: &Event, time: u64) {
        let at = SocketAddr::new(Ipv6Addr::from_bits(event.addr).to_canonical(), event.port);
        let (local, remote) = match event.op {
            Op::Bind => (Some(at), None),
            Op::Listen => (
                Some(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), event.port)),
                Some(SocketAddr::new(at.ip(), 0)),
            ),
            Op::Socket => (None, None),
            _ => (None, Some(at)),
        };
        let granted = event.cause == Cause::Granted;
        let verdict = match (granted, event.permitted) {
            (true, _) => "permit",
            (false, true) => "would-refuse",
            (false, false) => word(portcullis_types::Verdict::Refuse),
        };
        let generation = event.generation.map(Generation::get);
        let current = generation == Some(self.generation_in_force());
        let rule = self.rule_text(event.rule.filter(|_| current));
        let association = (event.cookie != 0).then_some(event.cookie);
        let mut more = Vec::with_capacity(4);
        if let Some(rule) = &rule {
            more.push(("rule_at", More::Text(&rule.at)));
        }
        if context.is_none() && event.holder.tgid != 0 {
            more.push(("by_pid", More::Number(event.holder.tgid.into())));
            more.push(("by_uid", More::Number(event.holder.uid.into())));
        }
        if event.suppressed > 0 {
            more.push(("missed", More::Number(event.suppressed.into())));
        }
        let seq = self.log.push(&Line {
            process: context.as_deref(),
            protocol: Some(event.protocol),
            local,
            remote,
            assurance: Some(if granted { Assurance::Address } else { Assurance::None }),
            verdict: Some(verdict),
            rule: rule.as_ref().map(|r| &*r.text),
            reason: (!granted).then(|| event.cause.reason()),
            lane: Some(Lane::Plain),
            association,
            generation,
            more: &more,
            op: &event.op.to_string(),
            ..Line::bare(time, "", if granted { "table" } else { "backstop" })
        });
        if let (true, Op::Connect, Protocol::TCP, Some(cookie), Some(context)) =
            (granted, event.op, event.protocol, association, context)
        {
            let flow = Flow {
                number: -1,
                context,
                op: event.op,
                protocol: event.protocol,
                local: None,
                remote,
                rule,
                session: None,
                lane: Lane::Plain,
                assurance: Assurance::Address,
                generation: generation.unwrap_or(0),
                since: time,
                seq,
                met: false,
            };
            self.flows.open(cookie, flow);
            self.settle_late(cookie);
        }
    }
}
