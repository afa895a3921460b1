//! The handle that the key daemon holds, and what it may be told.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

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
    /// Threads, each with an epoll of its own.
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
        let (events, threads) = (Arc::new(Queue::new()?), Arc::new(Threads::new(&limits)?));
        let mut engine = Self { threads, handles: Vec::new(), events, next: AtomicU64::new(1) };
        for index in 0..limits.threads.max(1) {
            let worker =
                Worker::new(index, Arc::clone(&engine.threads), Arc::clone(&engine.events), &limits)?;
            let thread = thread::Builder::new().name(format!("relay-{index}"));
            engine.handles.push(thread.spawn(move || worker.run())?);
        }
        Ok(engine)
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
        self.threads.tell(self.threads.origin(id), command);
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
