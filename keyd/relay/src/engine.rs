//! The handle that the key daemon holds, and what it may be told.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::epoll::EpollTimeout;
use rustls::pki_types::ServerName;

use crate::{
    ClientSide, Event, ServerSide,
    event::Queue,
    spread::Threads,
    worker::{Command, Worker},
};

/// Names one association of one engine. Ids grow and are not used again.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Id(pub(crate) u64);

impl Id {
    /// The number, for logs.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

/// Which end of TLS the engine is.
#[derive(Debug)]
pub enum Role {
    /// It opens. The outer socket may still be connecting.
    Client {
        /// Our certificate, and who judges the peer's.
        side: ClientSide,
        /// What the verifier is told to expect.
        name: ServerName<'static>,
    },
    /// It accepts.
    Server {
        /// Our certificate, and who judges the peer's.
        side: ServerSide,
        /// On a port that serves plain peers as well: how long a peer has to begin a ClientHello.
        mixed: Option<Duration>,
    },
    /// No TLS on the outer side: `Ready` comes at once.
    Plain,
}

/// How the owner ends something.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum How {
    /// RST to the peer.
    Reset,
    /// The alert `access_denied`, then FIN: the peer can tell a refusal from a fault.
    Denied,
}

/// Bounds of one engine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Threads, each with an epoll of its own; the owner's own, if that is one, is the first.
    pub threads: usize,
    /// Handshakes under way at once.
    pub handshakes: usize,
    /// Handshakes under way at once for one IPv4 address or one IPv6 network of 64 bits.
    pub handshakes_per_peer: usize,
    /// From the first packet to keys and, between engines, the far verdict.
    pub handshake_time: Duration,
    /// Bytes that a peer may send in a handshake.
    pub handshake_bytes: usize,
    /// From `Ready` to `splice` or `refuse`.
    pub verdict_time: Duration,
    /// Bytes held for sockets that do not take them; above it, batches are one record.
    pub held_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            threads: thread::available_parallelism().map_or(1, usize::from),
            handshakes: 8192,
            handshakes_per_peer: 1024,
            handshake_time: Duration::from_secs(5),
            handshake_bytes: 32 << 10,
            verdict_time: Duration::from_secs(10),
            held_bytes: 64 << 20,
        }
    }
}

/// A running engine. Dropping it resets every association and waits for its threads.
pub struct Engine {
    threads: Arc<Threads>,
    handles: Vec<JoinHandle<()>>,
    events: Arc<Queue<Event>>,
    next: AtomicU64,
}

impl Engine {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the kernel gives no thread, epoll or eventfd.
    pub fn start(limits: Limits) -> io::Result<Self> {
        let mut engine = Self::new(&limits, false)?;
        (0..limits.threads.max(1)).try_for_each(|index| engine.spawn(index, &limits))?;
        Ok(engine)
    }

    /// The same, but the first thread is the calling one, which has a [`Driver`] for it and tells the engine everything:
    /// nobody need be woken for what begins, or ends, there.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_here(limits: Limits) -> io::Result<(Self, Driver)> {
        let mut engine = Self::new(&limits, true)?;
        let driver = Driver(engine.worker(0, &limits)?);
        (1..limits.threads).try_for_each(|index| engine.spawn(index, &limits))?;
        Ok((engine, driver))
    }

    fn new(limits: &Limits, driven: bool) -> io::Result<Self> {
        let (events, threads) = (Arc::new(Queue::new()?), Arc::new(Threads::new(limits, driven)?));
        Ok(Self { threads, handles: Vec::new(), events, next: AtomicU64::new(1) })
    }

    fn worker(&self, index: usize, limits: &Limits) -> io::Result<Worker> {
        Worker::new(index, Arc::clone(&self.threads), Arc::clone(&self.events), limits)
    }

    fn spawn(&mut self, index: usize, limits: &Limits) -> io::Result<()> {
        let worker = self.worker(index, limits)?;
        let thread = thread::Builder::new().name(format!("relay-{index}"));
        self.handles.push(thread.spawn(move || worker.run())?);
        Ok(())
    }

    /// Takes a TCP socket and begins; `Ready` or `Failed` follows.
    pub fn handshake(&self, outer: OwnedFd, role: Role) -> Id {
        let id = self.name();
        self.begin(id, outer, role);
        id
    }

    /// Names an association that is to begin later, or never.
    pub fn name(&self) -> Id {
        self.threads.name(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// As [`Self::handshake`], under a name that was given by [`Self::name`] and not used yet.
    pub fn begin(&self, id: Id, outer: OwnedFd, role: Role) {
        self.tell(id, Command::Handshake { id, outer, role });
    }

    /// Joins the program's socket to an association that is `Ready`; `Closed` follows.
    ///
    /// When the association has gone meanwhile, `inner` is reset.
    pub fn splice(&self, id: Id, inner: OwnedFd) {
        self.tell(id, Command::Splice { id, inner });
    }

    /// Ends an association that is `Ready`, or not yet; no event follows.
    pub fn refuse(&self, id: Id, how: How) {
        self.tell(id, Command::Refuse { id, how });
    }

    /// Ends an association under way: RST to the program, `how` to the peer. `Closed` follows.
    pub fn cut(&self, id: Id, how: How) {
        self.tell(id, Command::Cut { id, how });
    }

    /// Asks for an [`Event::Traffic`]; none comes when the association has ended.
    pub fn report(&self, id: Id) {
        self.tell(id, Command::Report { id });
    }

    /// Takes the oldest event. The descriptor of [`AsFd`] is readable while there is one.
    pub fn next_event(&self) -> Option<Event> {
        self.events.pop()
    }

    fn tell(&self, id: Id, command: Command) {
        self.threads.tell_as_owner(self.threads.origin(id), command);
    }
}

/// The engine's first thread, where that is the owner's own ([`Engine::start_here`]).
///
/// The owner waits until its descriptor is readable or [`Self::deadline`] has come, calls [`Self::turn`], also after
/// he has told the engine something, and then takes all events. Dropping it resets what it has.
pub struct Driver(Worker);

impl Driver {
    /// Does what there is to do, without waiting. `readable`: the descriptor is.
    pub fn turn(&mut self, readable: bool) {
        // Nobody tells the owner to stop.
        let _stays = self.0.obey_all() && (!readable || self.0.hear(EpollTimeout::ZERO));
        self.0.work();
    }

    /// When [`Self::turn`] is due though nothing is readable.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let now = (self.0.has_work() || self.0.is_told()).then(Instant::now);
        now.or_else(|| self.0.deadline())
    }
}

impl AsFd for Driver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.epoll.0.as_fd()
    }
}

impl AsFd for Engine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.threads.tell_all(|| Command::Stop);
        for thread in self.handles.drain(..) {
            // A worker that panics ends the process.
            let _done = thread.join();
        }
    }
}
