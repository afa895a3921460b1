//! One thread of the relay: its flows, their handshakes, and when their time is over.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
        socket::{MsgFlags, recv, send},
    },
};

use super::{
    Command, Event, Report,
    flow::{Flow, How, Ready, Scratch, reset_on_close},
    handshake::{Handshake, HandshakeError, Keys, LONGEST_FLIGHT},
};

/// Events taken from the kernel at once.
const EVENTS: usize = 256;
/// Number that stands for the eventfd.
const WAKE: u64 = u64::MAX;
const PLAIN: u64 = 1 << 63;

/// How others talk to a worker.
pub struct Inbox {
    commands: Mutex<Vec<Command>>,
    wake: EventFd,
}

impl Inbox {
    pub fn new() -> io::Result<Arc<Self>> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Arc::new(Self { commands: Mutex::new(Vec::new()), wake }))
    }

    pub fn put(&self, command: Command) {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).push(command);
        // Full (2^64 - 1 unread wake-ups) is awake too.
        let _ = self.wake.write(1);
    }

    fn take(&self) -> Vec<Command> {
        let _ = self.wake.read();
        std::mem::take(&mut *self.commands.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

enum Task {
    Shaking {
        handshake: Box<Handshake>,
        wire: OwnedFd,
        ready: Ready,
        plain: Option<OwnedFd>,
        until: Instant,
    },
    /// Waits for the program's socket.
    Shaken {
        keys: Box<Keys>,
        wire: OwnedFd,
        ready: Ready,
        until: Instant,
    },
    Running(Box<Flow>),
}

pub struct Worker {
    inbox: Arc<Inbox>,
    report: Arc<Report>,
    epoll: Epoll,
    tasks: HashMap<u64, Task>,
    /// When handshakes must be over.
    deadlines: BTreeSet<(Instant, u64)>,
    /// Flows that have more to do.
    queue: VecDeque<u64>,
    scratch: Scratch,
}

fn edges() -> EpollFlags {
    EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET
}

impl Worker {
    pub fn new(inbox: Arc<Inbox>, report: Arc<Report>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(inbox.wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        let (tasks, deadlines, queue) = (HashMap::new(), BTreeSet::new(), VecDeque::new());
        Ok(Self { inbox, report, epoll, tasks, deadlines, queue, scratch: Scratch::new() })
    }

    /// Works until it is told to stop.
    pub fn run(mut self) {
        let mut events = vec![EpollEvent::empty(); EVENTS];
        loop {
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(_) => return,
            };
            for event in events.iter().take(count) {
                if event.data() == WAKE {
                    for command in self.inbox.take() {
                        if matches!(command, Command::Stop) {
                            return;
                        }
                        self.obey(command);
                    }
                } else {
                    self.notice(event);
                }
            }
            for _ in 0..self.queue.len() {
                if let Some(id) = self.queue.pop_front() {
                    self.advance(id);
                }
            }
            self.expire();
        }
    }

    fn timeout(&self) -> EpollTimeout {
        if !self.queue.is_empty() {
            return EpollTimeout::ZERO;
        }
        let Some((at, _)) = self.deadlines.first() else {
            return EpollTimeout::NONE;
        };
        let left = at.saturating_duration_since(Instant::now()).saturating_add(Duration::from_millis(1));
        EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Start { id, wire, handshake, plain, patience } => {
                if let Err(e) = self.epoll.add(&wire, EpollEvent::new(edges(), id)) {
                    return self.failed(id, HandshakeError::Socket(e.into()));
                }
                let until = Instant::now() + patience;
                self.deadlines.insert((until, id));
                let ready = Ready { read: true, write: true, ending: false };
                self.tasks.insert(id, Task::Shaking { handshake, wire, ready, plain, until });
                self.advance(id);
            }
            Command::Join { id, plain } => {
                if let Some(Task::Shaken { keys, wire, ready, until }) = self.tasks.remove(&id) {
                    self.deadlines.remove(&(until, id));
                    self.relay(id, keys, plain, wire, ready);
                } else {
                    // It has failed meanwhile, which was reported.
                    reset_on_close(&plain);
                }
            }
            Command::Cut { id } => match self.tasks.remove(&id) {
                Some(Task::Running(flow)) => self.ended(id, *flow, How::Cut),
                Some(other) => {
                    self.tasks.insert(id, other);
                    self.forget(id);
                }
                None => {}
            },
            Command::Stop => {}
        }
    }

    fn notice(&mut self, event: &EpollEvent) {
        let (id, of_plain, flags) = (event.data() & !PLAIN, event.data() & PLAIN != 0, event.events());
        let ready = match self.tasks.get_mut(&id) {
            Some(Task::Running(flow)) if of_plain => &mut flow.plain_ready,
            Some(Task::Running(flow)) => &mut flow.wire_ready,
            Some(Task::Shaking { ready, .. } | Task::Shaken { ready, .. }) => ready,
            None => return,
        };
        let ending = flags.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        ready.ending |= ending;
        ready.read |= ending || flags.contains(EpollFlags::EPOLLIN);
        ready.write |= ending || flags.contains(EpollFlags::EPOLLOUT);
        self.advance(id);
    }

    fn advance(&mut self, id: u64) {
        match self.tasks.get_mut(&id) {
            Some(Task::Running(flow)) => match flow.pump(&mut self.scratch) {
                Ok(true) => self.queue.push_back(id),
                Ok(false) => {}
                Err(how) => {
                    if let Some(Task::Running(flow)) = self.tasks.remove(&id) {
                        self.ended(id, *flow, how);
                    }
                }
            },
            Some(Task::Shaking { handshake, wire, ready, .. }) => {
                let done = shake(handshake, wire, ready);
                match done {
                    Ok(false) => {}
                    Ok(true) => self.shaken(id),
                    Err(error) => self.give_up(id, error),
                }
            }
            Some(Task::Shaken { .. }) | None => {}
        }
    }

    fn give_up(&mut self, id: u64, error: HandshakeError) {
        self.forget(id);
        self.failed(id, error);
    }

    /// Resets what has no flow yet. The peer of a refused handshake has its alert before the FIN.
    fn forget(&mut self, id: u64) {
        let until = match self.tasks.remove(&id) {
            Some(Task::Shaking { until, plain, .. }) => {
                plain.iter().for_each(reset_on_close);
                until
            }
            Some(Task::Shaken { until, wire, .. }) => {
                reset_on_close(&wire);
                until
            }
            Some(Task::Running(_)) | None => return,
        };
        self.deadlines.remove(&(until, id));
    }

    fn shaken(&mut self, id: u64) {
        let Some(Task::Shaking { handshake, wire, ready, plain, until }) = self.tasks.remove(&id) else {
            return;
        };
        let keys = match handshake.finish() {
            Ok(keys) => Box::new(keys),
            Err(error) => {
                self.deadlines.remove(&(until, id));
                return self.failed(id, error);
            }
        };
        (self.report)(Event::Shaken { id, suite: keys.suite, exchange: keys.exchange });
        match plain {
            Some(plain) => {
                self.deadlines.remove(&(until, id));
                self.relay(id, keys, plain, wire, ready);
            }
            None => {
                self.tasks.insert(id, Task::Shaken { keys, wire, ready, until });
            }
        }
    }

    fn relay(&mut self, id: u64, keys: Box<Keys>, plain: OwnedFd, wire: OwnedFd, ready: Ready) {
        let flow = Flow::new(plain, wire, *keys, ready);
        match self.epoll.add(flow.plain(), EpollEvent::new(edges(), id | PLAIN)) {
            Ok(()) => {
                self.tasks.insert(id, Task::Running(Box::new(flow)));
                self.advance(id);
            }
            Err(e) => self.ended(id, flow, How::Program(e)),
        }
    }

    fn ended(&self, id: u64, flow: Flow, how: How) {
        let (sent, received) = (flow.sent, flow.received);
        flow.end(&how);
        (self.report)(Event::Ended { id, sent, received, how });
    }

    fn failed(&self, id: u64, error: HandshakeError) {
        (self.report)(Event::Failed { id, error });
    }

    fn expire(&mut self) {
        let now = Instant::now();
        while let Some((at, id)) = self.deadlines.first().copied().filter(|(at, _)| *at <= now) {
            if let Some(Task::Shaking { wire, .. }) = self.tasks.get(&id) {
                reset_on_close(wire);
            }
            self.forget(id);
            self.deadlines.remove(&(at, id));
            self.failed(id, HandshakeError::TimedOut);
        }
    }
}

/// Sends and receives for a handshake what can be now. `true`: it is over.
fn shake(handshake: &mut Handshake, wire: &OwnedFd, ready: &mut Ready) -> Result<bool, HandshakeError> {
    let socket = |e: Errno| HandshakeError::Socket(e.into());
    let mut over = handshake.advance();
    loop {
        while !handshake.outgoing.is_empty() {
            match send(wire.as_raw_fd(), &handshake.outgoing, MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) => drop(handshake.outgoing.drain(..sent.min(handshake.outgoing.len()))),
                Err(Errno::EAGAIN) => {
                    ready.write = false;
                    return over.and(Ok(false));
                }
                Err(Errno::EINTR) => {}
                Err(e) => return over.and(Err(socket(e))),
            }
        }
        if over? {
            return Ok(true);
        }
        if !ready.read {
            return Ok(false);
        }
        let mut bytes = [0; 4096];
        match recv(wire.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            Ok(0) => return Err(HandshakeError::Closed),
            Ok(count) => {
                handshake.incoming.extend_from_slice(bytes.get(..count).unwrap_or_default());
                over = if handshake.incoming.len() > LONGEST_FLIGHT {
                    Err(HandshakeError::TooMuch)
                } else {
                    handshake.advance()
                };
            }
            Err(Errno::EAGAIN) => {
                ready.read = false;
                return Ok(false);
            }
            Err(Errno::EINTR) => over = Ok(false),
            Err(e) => return Err(socket(e)),
        }
    }
}
