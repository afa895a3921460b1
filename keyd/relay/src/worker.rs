//! One thread of the engine: an epoll, the associations it drives, their deadlines.
//!
//! Associations under way go first, each one batch at a time; handshakes, whose steps cost much more, share
//! a slice of every round and take turns by peer.

mod streams;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    net::TcpStream,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::{
    Ending, Event, Failure, How, Id, Limits, Role,
    admit::{Peer, Turns, Waits},
    event::Queue,
    flow::{BATCH, Flow, Next, Scratch, Side, Signs},
    opening::{Opening, Step, Waiting},
    record::Alert,
    socket::{adopt, keep_urgent_inline, reset_on_close},
    spread::Threads,
};

/// What the engine's handle asks of a thread.
pub(crate) enum Command {
    Handshake {
        id: Id,
        outer: OwnedFd,
        role: Role,
    },
    Splice {
        id: Id,
        inner: OwnedFd,
    },
    Refuse {
        id: Id,
        how: How,
    },
    Cut {
        id: Id,
        how: How,
    },
    Report {
        id: Id,
    },
    /// A stream, from the thread where it began.
    Take {
        id: Id,
        association: Box<Association>,
    },
    /// One that was given to another thread has ended.
    Gone {
        id: Id,
    },
    /// A handshake must go for one that another thread has taken.
    Displace {
        id: Id,
    },
    Stop,
}

/// Marks the command queue among epoll's events; ids stay below 2^63.
const BELL: u64 = u64::MAX;
/// Events taken at once.
const EVENTS: usize = 256;
/// Share of a round that handshakes may take while associations wait.
const SHAKING_SLICE: Duration = Duration::from_millis(1);
/// Above so many associations with work to do, batches are smaller, so that each has its turn soon.
const BUSY: usize = 32;
const BUSY_BATCH: usize = 4;
/// So many handshakes that wait for their peers are as much as one that has something to do.
const WAITING: usize = 16;
/// A peer that was told why it is refused has so long, and may still send so much, before the RST.
const DRAIN_TIME: Duration = Duration::from_secs(1);
const DRAIN_BYTES: usize = 256 << 10;

enum Phase {
    /// From the first packet to keys.
    Opening(Box<Opening>),
    /// `Ready` was told; the verdict is awaited.
    Judging(Box<Waiting>),
    Relaying(Box<Flow>),
    /// Refused with an alert; so many bytes may still come.
    Draining(usize),
}

pub(crate) struct Association {
    outer: TcpStream,
    phase: Phase,
    peer: Peer,
    /// Counts as a handshake of its peer.
    admitted: bool,
    /// Stands in the run queue.
    queued: bool,
    /// Is one of this thread's streams.
    stream: bool,
    deadline: Option<Instant>,
    began: Instant,
}

pub(crate) struct Worker {
    pub(crate) epoll: Epoll,
    index: usize,
    threads: Arc<Threads>,
    /// Streams that began here, and which thread has them.
    moved: HashMap<Id, usize>,
    events: Arc<Queue<Event>>,
    limits: Limits,
    associations: HashMap<Id, Association>,
    deadlines: BTreeSet<(Instant, Id)>,
    /// Handshakes of peers that are under way here.
    shaking: usize,
    turns: Turns,
    run: VecDeque<Id>,
    scratch: Scratch,
}

/// Runs what hostile bytes reach; a panic there costs its own association and no other.
fn survive<T>(turn: impl FnOnce() -> T) -> Option<T> {
    // The association is dropped then, and buffers are overwritten before they are read again.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(turn)).ok()
}

/// A thread that panics elsewhere takes the process with it: half an engine would lose associations in silence, while
/// the end of the process resets them all.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Worker {
    pub(crate) fn new(
        index: usize,
        threads: Arc<Threads>,
        events: Arc<Queue<Event>>,
        limits: &Limits,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        if let Some(commands) = threads.commands(index) {
            epoll.add(commands.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, BELL))?;
        }
        Ok(Self {
            epoll,
            index,
            threads,
            moved: HashMap::new(),
            events,
            limits: Limits { held_bytes: limits.held_bytes.div_ceil(limits.threads.max(1)), ..*limits },
            associations: HashMap::new(),
            deadlines: BTreeSet::new(),
            shaking: 0,
            turns: Turns::default(),
            run: VecDeque::new(),
            scratch: Scratch::new(),
        })
    }

    /// Works until told to stop.
    pub(crate) fn run(mut self) {
        let _guard = AbortOnPanic;
        while self.hear(self.timeout()) {
            self.work();
        }
    }

    /// Takes what sockets say, and others; waits for it as long as `timeout` says. `false`: it was told to stop.
    pub(crate) fn hear(&mut self, timeout: EpollTimeout) -> bool {
        let mut events = [EpollEvent::empty(); EVENTS];
        // Interrupted by a signal, or nothing: the queues are looked at either way.
        let count = self.epoll.wait(&mut events, timeout).unwrap_or(0);
        for event in events.iter().take(count) {
            if event.data() != BELL {
                self.sign(event.data(), event.events());
            } else if !self.obey_all() {
                return false;
            }
        }
        true
    }

    /// Does what there is to do, each association's part once.
    pub(crate) fn work(&mut self) {
        self.expire();
        for _ in 0..self.run.len() {
            if let Some(id) = self.run.pop_front() {
                self.relay(id);
            }
        }
        if !self.turns.is_empty() {
            let began = Instant::now();
            while let Some(id) = self.turns.pop() {
                self.open(id);
                if began.elapsed() > SHAKING_SLICE {
                    break;
                }
            }
        }
        let busy = self.run.len() + self.turns.len() + self.shaking / WAITING;
        self.threads.note_busy(self.index, busy);
    }

    /// Does what this thread is told. `false`: it is to stop.
    pub(crate) fn obey_all(&mut self) -> bool {
        let commands = self.threads.commands(self.index).map(Queue::take);
        for command in commands.unwrap_or_default() {
            if matches!(command, Command::Stop) {
                return false;
            }
            self.obey(command);
        }
        true
    }

    /// Whether [`Self::work`] has something to do now.
    pub(crate) fn has_work(&self) -> bool {
        !self.run.is_empty() || !self.turns.is_empty()
    }

    /// When something is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(first, _)| *first)
    }

    /// Whether this thread was told something that it has not done.
    pub(crate) fn is_told(&self) -> bool {
        self.threads.commands(self.index).is_some_and(|commands| !commands.is_empty())
    }

    fn timeout(&self) -> EpollTimeout {
        if self.has_work() {
            return EpollTimeout::ZERO;
        }
        let Some(first) = self.deadline() else { return EpollTimeout::NONE };
        // Rounded up, so that a deadline has passed when its time-out has.
        let wait = first.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        EpollTimeout::try_from(wait).unwrap_or(EpollTimeout::MAX)
    }

    /// Tells the owner, who need not be woken in his own thread.
    fn tell_owner(&self, event: Event) {
        if self.threads.is_driven(self.index) {
            self.events.push_in_silence(event);
        } else {
            self.events.push(event);
        }
    }

    fn watch(&self, socket: &TcpStream, id: Id, side: Side) -> io::Result<()> {
        let flags = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLPRI
            | EpollFlags::EPOLLET;
        let data = id.0 << 1 | u64::from(side == Side::Inner);
        Ok(self.epoll.add(socket, EpollEvent::new(flags, data))?)
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Handshake { id, outer, role } => self.begin(id, outer, role),
            Command::Splice { id, inner } => self.splice(id, inner),
            Command::Refuse { id, how } => self.refuse(id, how),
            Command::Cut { id, .. } | Command::Report { id } if self.moved.contains_key(&id) => {
                let to = self.moved.get(&id).copied();
                self.threads.tell(to.unwrap_or(self.index), command);
            }
            Command::Cut { id, how } => self.cut(id, how),
            Command::Take { id, association } => self.take(id, *association),
            Command::Gone { id } => drop(self.moved.remove(&id)),
            Command::Displace { id } => self.displace(id),
            Command::Report { id } => {
                if let Some(Association { phase: Phase::Relaying(flow), .. }) = self.associations.get(&id) {
                    let (bytes_in, bytes_out, duration) = flow.traffic();
                    self.tell_owner(Event::Traffic { id, bytes_in, bytes_out, duration });
                }
            }
            Command::Stop => {}
        }
    }

    fn begin(&mut self, id: Id, outer: OwnedFd, role: Role) {
        let accepting = matches!(role, Role::Server { .. });
        let began = Instant::now();
        let opened = adopt(outer).map_err(Failure::from_connect).and_then(|outer| {
            let (opening, time) = Opening::new(role, &self.limits)?;
            self.watch(&outer, id, Side::Outer).map_err(Failure::from_connect)?;
            Ok((outer, opening, time))
        });
        let (outer, opening, time) = match opened {
            Ok(opened) => opened,
            Err(failure) => return self.tell_owner(Event::Failed { id, failure, shown: Vec::new() }),
        };
        let address = outer.peer_addr().ok();
        let peer = Peer::new(address.map_or(std::net::Ipv4Addr::UNSPECIFIED.into(), |it| it.ip()));
        // What is still connecting has the kernel's own time for that.
        let deadline = address.and_then(|_| began.checked_add(time));
        let association = Association {
            outer,
            phase: Phase::Opening(Box::new(opening)),
            peer,
            admitted: accepting,
            queued: false,
            stream: false,
            deadline: None,
            began,
        };
        self.associations.insert(id, association);
        self.set_deadline(id, deadline);
        self.turns.push(peer, id);
        if accepting {
            self.shaking += 1;
            let displaced = self.threads.admission().enter(peer, id);
            if let Some(displaced) = displaced {
                self.displace(displaced);
            }
        }
    }

    fn set_deadline(&mut self, id: Id, deadline: Option<Instant>) {
        let Some(association) = self.associations.get_mut(&id) else { return };
        if let Some(old) = association.deadline.take() {
            self.deadlines.remove(&(old, id));
        }
        if let Some(new) = deadline {
            self.deadlines.insert((new, id));
        }
        association.deadline = deadline;
    }

    /// One event of epoll.
    fn sign(&mut self, data: u64, flags: EpollFlags) {
        let id = Id(data >> 1);
        let side = if data & 1 == 1 { Side::Inner } else { Side::Outer };
        let signs = Signs {
            readable: flags.contains(EpollFlags::EPOLLIN),
            odd: flags.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP | EpollFlags::EPOLLPRI),
            failed: flags.contains(EpollFlags::EPOLLERR),
        };
        let Some(association) = self.associations.get_mut(&id) else { return };
        match &mut association.phase {
            Phase::Relaying(flow) => {
                flow.note(side, signs);
                self.wake(id);
            }
            Phase::Judging(_) if signs.failed => self.fail(id, Failure::Reset),
            Phase::Judging(_) => {}
            Phase::Opening(_) => {
                self.turns.push(association.peer, id);
                if association.admitted {
                    self.threads.admission().waits(id, Waits::Turn);
                }
            }
            Phase::Draining(_) => self.drain(id),
        }
    }

    fn wake(&mut self, id: Id) {
        if let Some(association) = self.associations.get_mut(&id)
            && !std::mem::replace(&mut association.queued, true)
        {
            self.run.push_back(id);
        }
    }

    /// Takes an association out of every list; its sockets are closed when the result is dropped.
    fn forget(&mut self, id: Id) -> Option<Association> {
        self.set_deadline(id, None);
        let mut association = self.associations.remove(&id)?;
        if association.admitted {
            self.leave(id);
        }
        if let Phase::Relaying(flow) = &mut association.phase {
            flow.release(&mut self.scratch);
        }
        if association.stream {
            self.threads.end_stream(self.index);
            if self.threads.origin(id) != self.index {
                self.threads.tell(self.threads.origin(id), Command::Gone { id });
            }
        }
        Some(association)
    }

    /// It counts as a handshake no more.
    fn leave(&mut self, id: Id) {
        self.shaking = self.shaking.saturating_sub(1);
        self.threads.admission().leave(id);
    }

    /// A handshake has to go for another one. What is done meanwhile stays.
    fn displace(&mut self, id: Id) {
        if self.threads.origin(id) != self.index {
            return self.threads.tell(self.threads.origin(id), Command::Displace { id });
        }
        if self.associations.get(&id).is_some_and(|association| association.admitted) {
            self.fail(id, Failure::Displaced);
        }
    }

    fn fail(&mut self, id: Id, failure: Failure) {
        let told = matches!(
            self.associations.get(&id),
            Some(Association { phase: Phase::Draining(_) | Phase::Relaying(_), .. })
        );
        if self.forget(id).is_some() && !told {
            self.tell_owner(Event::Failed { id, failure, shown: Vec::new() });
        }
    }

    fn expire(&mut self) {
        if self.deadlines.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            self.set_deadline(id, None);
            let Some(association) = self.associations.get_mut(&id) else { continue };
            match &mut association.phase {
                Phase::Opening(opening) if opening.is_sniffing() => {
                    opening.assume_plain();
                    self.turns.push(association.peer, id);
                }
                Phase::Judging(_) => self.fail(id, Failure::NoVerdict),
                _ => self.fail(id, Failure::TooSlow),
            }
        }
    }

    /// One turn of a handshake.
    fn open(&mut self, id: Id) {
        let Some(association) = self.associations.get_mut(&id) else { return };
        let Phase::Opening(opening) = &mut association.phase else { return };
        let turn = survive(|| opening.turn(&association.outer, &mut self.scratch));
        match turn.unwrap_or_else(|| Failure::Fault.into()) {
            Step::Wait => {
                // Once connected, the peer's time runs.
                let waits = if opening.has_heard() { Waits::Peer } else { Waits::Hello };
                let admitted = association.admitted;
                if association.deadline.is_none() && association.outer.peer_addr().is_ok() {
                    self.set_deadline(id, Instant::now().checked_add(self.limits.handshake_time));
                }
                if admitted {
                    self.threads.admission().waits(id, waits);
                }
            }
            Step::Tls => {
                let deadline = association.began.checked_add(self.limits.handshake_time);
                self.set_deadline(id, deadline);
                self.open(id);
            }
            Step::Ready(waiting, tls) => {
                association.phase = Phase::Judging(waiting);
                if std::mem::take(&mut association.admitted) {
                    self.leave(id);
                }
                self.set_deadline(id, Instant::now().checked_add(self.limits.verdict_time));
                self.tell_owner(Event::Ready { id, tls });
            }
            Step::Failed { failure, shown, alerted } => {
                self.tell_owner(Event::Failed { id, failure, shown });
                if alerted {
                    self.begin_drain(id);
                } else {
                    self.forget(id);
                }
            }
        }
    }

    fn splice(&mut self, id: Id, inner: OwnedFd) {
        // Reset on every way out but the last.
        let Ok(inner) = adopt(inner) else { return self.fail(id, Failure::Inner(0)) };
        if !matches!(self.associations.get(&id), Some(Association { phase: Phase::Judging(_), .. })) {
            return;
        }
        let ready = keep_urgent_inline(&inner).and_then(|()| self.watch(&inner, id, Side::Inner));
        if let Err(error) = ready {
            return self.fail(id, Failure::Inner(error.raw_os_error().unwrap_or_default()));
        }
        self.set_deadline(id, None);
        let Some(association) = self.associations.get_mut(&id) else { return };
        let phase = std::mem::replace(&mut association.phase, Phase::Draining(0));
        let Phase::Judging(waiting) = phase else { return };
        let Waiting { records, rest, greet } = *waiting;
        match Flow::new(inner, records, rest, greet, association.began) {
            Ok(flow) => {
                association.phase = Phase::Relaying(Box::new(flow));
                self.wake(id);
            }
            Err(bad) => self.fail(id, Failure::Tls(rustls::Error::General(format!("{bad:?}")))),
        }
    }

    /// One turn of an association under way.
    fn relay(&mut self, id: Id) {
        let most = if self.scratch.held > self.limits.held_bytes {
            1
        } else if self.run.len() > BUSY {
            BUSY_BATCH
        } else {
            BATCH
        };
        let Some(association) = self.associations.get_mut(&id) else { return };
        association.queued = false;
        let Phase::Relaying(flow) = &mut association.phase else { return };
        let turn = survive(|| flow.turn(&association.outer, &mut self.scratch, most));
        let next = turn.unwrap_or(Next::Over(Ending::Fault));
        let is_new = !association.stream && flow.is_stream();
        match next {
            Next::Wait | Next::Again => {
                if next == Next::Again {
                    self.wake(id);
                }
                if is_new {
                    self.spread(id);
                }
            }
            Next::Over(Ending::Complete) => {
                // What the kernel still holds arrives, then FIN. A socket that is gone needs neither.
                let _gone = reset_on_close(flow.inner(), false);
                let _gone = reset_on_close(&association.outer, false);
                self.close(id, Ending::Complete);
            }
            Next::Over(Ending::BadRecord(alert)) => self.close_with_alert(id, Ending::BadRecord(alert)),
            Next::Over(ending) => self.close(id, ending),
        }
    }

    /// Reports the end and closes both sockets.
    fn close(&mut self, id: Id, ending: Ending) {
        let Some(association) = self.associations.get(&id) else { return };
        let (bytes_in, bytes_out, duration) = match &association.phase {
            Phase::Relaying(flow) => flow.traffic(),
            _ => (0, 0, association.began.elapsed()),
        };
        self.forget(id);
        self.tell_owner(Event::Closed { id, ending, bytes_in, bytes_out, duration });
    }

    /// As [`Self::close`], but the peer is told first: the inner socket is reset, the outer one drains.
    fn close_with_alert(&mut self, id: Id, ending: Ending) {
        let Some(association) = self.associations.get_mut(&id) else { return };
        let Phase::Relaying(flow) = &mut association.phase else { return };
        let alert = match ending {
            Ending::BadRecord(code) => Alert::of(code),
            _ => Alert::AccessDenied,
        };
        flow.last_words(&association.outer, alert);
        flow.release(&mut self.scratch);
        let (bytes_in, bytes_out, duration) = flow.traffic();
        self.tell_owner(Event::Closed { id, ending, bytes_in, bytes_out, duration });
        self.begin_drain(id);
    }

    fn refuse(&mut self, id: Id, how: How) {
        let Some(association) = self.associations.get_mut(&id) else { return };
        match (&mut association.phase, how) {
            (Phase::Relaying(_) | Phase::Draining(_), _) => {}
            (Phase::Judging(waiting), How::Denied) => {
                waiting.last_words(&association.outer, Alert::AccessDenied);
                self.begin_drain(id);
            }
            _ => drop(self.forget(id)),
        }
    }

    fn cut(&mut self, id: Id, how: How) {
        match (self.associations.get(&id).map(|association| &association.phase), how) {
            (None | Some(Phase::Draining(_)), _) => {}
            (Some(Phase::Relaying(_)), How::Denied) => self.close_with_alert(id, Ending::Cut),
            (Some(_), _) => self.close(id, Ending::Cut),
        }
    }

    /// Lets the peer read what it was told: FIN now, RST only when it does not stop.
    fn begin_drain(&mut self, id: Id) {
        let Some(association) = self.associations.get_mut(&id) else { return };
        association.phase = Phase::Draining(DRAIN_BYTES);
        if association.admitted {
            // It only holds its place, until it has read that.
            self.threads.admission().waits(id, Waits::Hello);
        }
        let quiet = reset_on_close(&association.outer, false)
            .and_then(|()| association.outer.shutdown(std::net::Shutdown::Write));
        if quiet.is_err() {
            self.forget(id);
            return;
        }
        self.set_deadline(id, Instant::now().checked_add(DRAIN_TIME));
        self.drain(id);
    }

    fn drain(&mut self, id: Id) {
        use std::io::Read;
        let Some(association) = self.associations.get_mut(&id) else { return };
        let Phase::Draining(left) = &mut association.phase else { return };
        loop {
            match association.outer.read(self.scratch.room()) {
                Ok(count) if count > 0 && count <= *left => *left -= count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Its end, a failure, or too much.
                _ => break,
            }
        }
        self.forget(id);
    }
}
