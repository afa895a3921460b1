//! The running broker: one loop over everything that can happen.
//!
//! Each module beside this one adds what the broker does about one thing; what it decides is in
//! [`crate::decide`].

mod answers;
mod backstop;
mod channels;
mod coverage;
mod datagrams;
mod far;
mod fence;
mod flows;
mod follow;
mod guard;
mod handed;
mod judge;
mod lanes;
mod layers;
mod listeners;
mod members;
mod nets;
mod outset;
mod reload;
mod sessions;
mod start;
mod tables;

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    rc::Rc,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        inotify::Inotify,
        signal::Signal,
        signalfd::SignalFd,
    },
};
use portcullis_backstop::{Event, Holder};
use portcullis_policy::Policy;
use portcullis_types::{RuleId, Verdict, Without};
use portcullis_wire::shared::StatePage;

use crate::{
    BrokerError, Mode,
    audit::{ENDS, Line, Log, More},
    guard::link::Link,
    keyd::{Keepsake, Keyd},
    process::{Context, Inspector, ProcessKey},
    settings::{Settings, WhenUnwritable},
    sys::{
        diag::{Diag, Endings},
        local::{Changes, Own},
        memory::Shared,
        monotonic,
        privileges::Spare,
        proc::ProcDir,
        realtime, watchdog,
    },
};

/// How long cached verdicts are good after the broker last did something (ARCHITECTURE.md, section 3).
const LEASE: u64 = 2_000_000_000;
/// How often rings are looked at while their processes are busy.
const POLL: Duration = Duration::from_millis(10);

/// How long records that nobody waits for may lie unwritten, in nanoseconds.
const FLUSH: u64 = 5_000_000;

/// How long one round over channels may take, beyond one of each user.
const TURN: Duration = Duration::from_millis(20);

/// What an event is about.
#[derive(Clone, Copy, Debug)]
enum Source {
    Doors,
    Control,
    Signals,
    Endings,
    Addresses,
    Files,
    Keyd,
    Handed,
    Backstop,
    Guard(u64),
    Waiting(u64),
    Accepting(u64),
    Channel(u64),
    Client(u64),
    Process(ProcessKey),
}

/// A process that asked at least once and lives.
#[derive(Debug)]
struct Process {
    pidfd: OwnedFd,
    at: ProcDir,
    context: Rc<Context>,
    memory: Option<tables::Memory>,
    /// What the guard need not judge again.
    learned: Option<guard::Learned>,
    /// Who the kernel said it was when the context was last seen to be true.
    seen: Option<Holder>,
    /// User that its descriptors and memory are counted for.
    counted: u32,
    source: u64,
    /// Nanoseconds since the epoch.
    since: u64,
    permitted: u64,
    refused: u64,
}

/// The policy in force.
#[derive(Clone, Debug)]
struct InForce {
    policy: Rc<Policy>,
    generation: u64,
    /// Nanoseconds since the epoch.
    since: u64,
    /// When the next of its rules ends, in seconds since the epoch.
    expires: Option<u64>,
}

/// What the loop waits for. Ids are never used again, so a late event finds nothing.
struct Watch {
    epoll: Epoll,
    sources: HashMap<u64, Source>,
    next: u64,
}

impl Watch {
    fn new() -> nix::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, sources: HashMap::new(), next: 1 })
    }

    /// An id that nothing has had yet.
    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    fn add(&mut self, fd: impl AsFd, source: Source) -> nix::Result<u64> {
        self.add_for(fd, EpollFlags::EPOLLIN, source)
    }

    fn add_for(&mut self, fd: impl AsFd, events: EpollFlags, source: Source) -> nix::Result<u64> {
        let id = self.id();
        self.epoll.add(fd, EpollEvent::new(events, id))?;
        self.sources.insert(id, source);
        Ok(id)
    }

    /// Waits for one event; then [`Self::once_more`] is needed.
    fn add_once(&mut self, fd: impl AsFd, source: Source) -> nix::Result<u64> {
        let id = self.add(&fd, source)?;
        self.once_more(&fd, id);
        Ok(id)
    }

    fn once_more(&self, fd: impl AsFd, id: u64) {
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, id);
        let _ = self.epoll.modify(fd, &mut event);
    }

    /// Stops waiting for something that closes by itself.
    fn forget(&mut self, source: impl Fn(&Source) -> bool) {
        self.sources.retain(|_, s| !source(s));
    }

    fn remove(&mut self, fd: impl AsFd, id: u64) {
        let _ = self.epoll.delete(fd);
        self.sources.remove(&id);
    }
}

/// See the module.
pub(crate) struct Broker {
    mode: Mode,
    state: PathBuf,
    policy_path: PathBuf,
    settings: Settings,
    watch: Watch,
    doors: OwnedFd,
    control: OwnedFd,
    signals: SignalFd,
    files: Option<Inotify>,
    spare: Spare,
    log: Log,
    page: &'static Shared<StatePage>,
    in_force: Option<InForce>,
    layers: layers::Layers,
    /// Highest generation that ever was.
    generation: u64,
    diagnostic: Option<String>,
    inspector: Inspector,
    diag: Diag,
    endings: Option<Endings>,
    endings_lost: u64,
    /// Endings are not waited for but looked at: their event source, and when it was done last.
    endings_looked_at: Option<(u64, Instant)>,
    addresses: Option<Changes>,
    own: Own,
    /// Cookie of the broker's network namespace; 0 if the kernel cannot tell.
    namespace: u64,
    processes: HashMap<ProcessKey, Process>,
    by_pid: HashMap<i32, ProcessKey>,
    users: HashMap<u32, channels::Share>,
    channels: HashMap<u64, channels::Channel>,
    clients: HashMap<u64, answers::Client>,
    /// Processes whose rings are looked at.
    busy: HashSet<ProcessKey>,
    /// When it was last looked whether processes are where the kernel records for them (monotonic).
    cgroups_looked_at: u64,
    sessions: sessions::Sessions,
    listeners: HashMap<u64, listeners::Listener>,
    /// Listeners, by cookie, that were refused to images which began with them.
    turned_down: HashMap<u64, Rc<Context>>,
    datagrams: datagrams::Datagrams,
    flows: flows::Flows,
    holders: far::Holders,
    keyd: Option<Keyd>,
    lanes: lanes::Lanes,
    keepsake: Keepsake,
    /// To the supervisor, which hands over what outlives a broker.
    handed: Option<Link>,
    /// What the kernel put on record for the broker before, until it is in the log.
    left_over: Vec<Event>,
    /// Filters of the broker before, by their listener's cookie.
    inherited: HashMap<u64, OwnedFd>,
    guards: guard::Guards,
    kernel: Option<backstop::Kernel>,
    /// Why there is no backstop.
    unbacked: Option<String>,
    /// What is done without although this kernel has it.
    without: Without,
    /// Messages of programs came without their pidfd.
    nameless: bool,
    /// Who is held by the guard is woken in turn, not at once.
    slow_to_wake: bool,
    /// The backstop's nftables form, if that is what there is.
    fence: Option<fence::Fence>,
    coverages: coverage::Coverages,
    /// Processes that asked through the shim.
    shimmed: HashSet<ProcessKey>,
    /// When the log was last written (monotonic).
    flushed: u64,
    /// Doors closed at once for want of descriptors.
    turned_away: u64,
    stop: bool,
    /// Who may use the control socket, beside root.
    owner: u32,
}

impl Broker {
    /// Serves until told to end.
    pub(crate) fn serve(&mut self) -> Result<(), BrokerError> {
        watchdog::watch().map_err(BrokerError::kernel("sigaction"))?;
        let mut events = vec![EpollEvent::empty(); 8192];
        while !self.stop {
            let wait = self.patience();
            watchdog::rest();
            let got = match self.watch.epoll.wait(&mut events, wait) {
                Ok(got) => got,
                Err(Errno::EINTR) => 0,
                Err(error) => return Err(BrokerError::kernel("epoll_wait")(error)),
            };
            watchdog::work();
            self.renew_lease();
            self.take_turns(events.get(..got).unwrap_or_default());
            self.look_at_busy_rings();
            self.tend_endings();
            self.look_at_backstop();
            self.tend_noted();
            self.tend_expiry();
            if self.keyd.as_ref().is_some_and(Keyd::has_news) {
                self.take_keyd();
            }
            self.flush_handed();
            self.tend_waiting();
            self.flush_soon();
        }
        self.end();
        Ok(())
    }

    /// Deals with what has happened: each user's first channel, then each one's second, and so on, so
    /// that a user who floods waits behind all others. What is not reached in time is told again.
    fn take_turns(&mut self, events: &[EpollEvent]) {
        if let [only] = events {
            return self.dispatch(only.data(), only.events());
        }
        let mut seen: HashMap<u32, usize> = HashMap::new();
        let mut ready: Vec<(usize, u64, EpollFlags)> = Vec::with_capacity(events.len());
        for event in events {
            let user = self.user_of(event.data());
            let rank = user.map_or(0, |user| {
                let before = seen.entry(user).or_default();
                *before += 1;
                *before - 1
            });
            ready.push((rank, event.data(), event.events()));
        }
        ready.sort_by_key(|(rank, ..)| *rank);
        let began = Instant::now();
        for (rank, id, what) in ready {
            if rank > 0 && began.elapsed() > TURN {
                break;
            }
            self.dispatch(id, what);
        }
    }

    fn dispatch(&mut self, id: u64, events: EpollFlags) {
        let Some(source) = self.watch.sources.get(&id).copied() else { return };
        match source {
            Source::Doors => self.take_doors(),
            Source::Control => self.take_clients(),
            Source::Signals => self.take_signals(),
            Source::Endings => {
                self.endings_looked_at = Some((id, Instant::now()));
                self.take_endings();
            }
            Source::Addresses => self.take_addresses(),
            Source::Files => self.take_file_changes(),
            Source::Keyd => self.take_keyd(),
            Source::Handed => self.take_handed(),
            Source::Backstop => self.wake_backstop(),
            Source::Guard(guard) => self.take_held(guard, events),
            Source::Waiting(call) => self.take_waiting(call),
            Source::Accepting(listener) => self.take_accepting(listener),
            Source::Channel(channel) => self.take_message(channel),
            Source::Client(client) => self.take_client(client, events),
            Source::Process(key) => self.bury(key),
        }
    }

    /// How long nothing has to be done unasked.
    fn patience(&self) -> EpollTimeout {
        let expiry = self.in_force.as_ref().and_then(|_| self.next_expiry());
        let quiet = self.busy.is_empty()
            && !self.log.is_behind()
            && self.endings_looked_at.is_none()
            && !self.kernel.as_ref().is_some_and(backstop::Kernel::is_awake);
        let expiry = [expiry, self.next_deadline()].into_iter().flatten().min();
        let soonest = if quiet { expiry } else { Some(POLL) };
        soonest.map_or(EpollTimeout::NONE, |wait| EpollTimeout::try_from(wait).unwrap_or(EpollTimeout::MAX))
    }

    /// Lets cached verdicts be used for another while; not while they could not be put on record.
    fn renew_lease(&self) {
        let until = if self.refuses_for_log() { 0 } else { monotonic().saturating_add(LEASE) };
        self.page.lease.store(until, Ordering::Relaxed);
    }

    /// Whether new flows are refused because the log cannot be written.
    fn refuses_for_log(&self) -> bool {
        self.log.error().is_some()
            && self.settings.audit.when_unwritable == WhenUnwritable::Refuse
            && self.mode == Mode::Enforce
    }

    /// Writes what the turns of some milliseconds have left, at once: a busy guard does not wait for the disk each
    /// time. What must be on record before a call goes on is written there and then.
    fn flush_soon(&mut self) {
        let now = monotonic();
        if now.saturating_sub(self.flushed) >= FLUSH {
            self.flushed = now;
            self.flush_log();
        }
    }

    fn flush_log(&mut self) {
        let before = self.log.error().is_some();
        let _ = self.log.commit();
        self.release_events();
        if self.log.error().is_some() != before {
            self.renew_lease();
        }
    }

    fn take_signals(&mut self) {
        while let Ok(Some(told)) = self.signals.read_signal() {
            match i32::try_from(told.ssi_signo).ok().and_then(|n| Signal::try_from(n).ok()) {
                Some(Signal::SIGHUP) => {
                    let _ = self.reload(); // the outcome is on record
                }
                Some(Signal::SIGTERM | Signal::SIGINT) => self.stop = true,
                _ => {}
            }
        }
    }

    fn take_addresses(&mut self) {
        if let Some(changes) = &self.addresses {
            changes.take();
        }
        let Ok(now) = Own::read() else { return };
        if now != self.own {
            self.own = now;
            self.clear_tables();
            self.refit_listeners();
        }
    }

    /// Writes what is still in the rings, the kernel's own among them.
    fn end(&mut self) {
        self.finish_lanes();
        self.drain_all();
        self.note("broker", ENDS, &[]);
        self.flush_log();
        let _ = self.log.sync();
    }

    /// Writes a record that is about the broker itself.
    fn note(&mut self, op: &'static str, reason: &str, more: &[(&str, More<'_>)]) {
        let generation = self.in_force.as_ref().map(|f| f.generation);
        self.log.push(&Line {
            reason: Some(reason),
            generation,
            more,
            ..Line::bare(realtime(), op, "broker")
        });
    }

    fn generation_in_force(&self) -> u64 {
        self.in_force.as_ref().map_or(0, |f| f.generation)
    }

    /// Text and place of a rule in force.
    fn rule_text(&self, rule: Option<RuleId>) -> Option<RuleText> {
        let (policy, rule) = self.policy_of(rule?)?;
        let found = policy.get(rule)?;
        Some(RuleText {
            text: Rc::from(&*found.text),
            at: Rc::from(format!("{}:{}", found.file, found.line)),
            name: found.name.as_deref().map(Rc::from),
        })
    }
}

/// A rule as the log shows it.
#[derive(Clone, Debug, Eq, PartialEq)]
struct RuleText {
    text: Rc<str>,
    at: Rc<str>,
    name: Option<Rc<str>>,
}

/// The word of a verdict in the log.
const fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Permit => "permit",
        Verdict::Refuse => "refuse",
        Verdict::Protect => "protect",
    }
}

/// Seconds since the epoch.
fn now_seconds() -> u64 {
    realtime() / 1_000_000_000
}

/// Since when something takes.
fn elapsed(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
