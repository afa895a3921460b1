//! Carries protected flows: a program's plain bytes on one side, TLS 1.3 on the other.
//!
//! Threads with an epoll each; a flow stays with its thread. Handshakes are rustls's, with all their
//! checks; after that the records are made and opened here, where they lie, with the keys that rustls
//! derives ([`record`]). An idle flow holds two keys and two descriptors, and no buffer.
//!
//! What happens to one end happens to the other: shutdown of one direction is close_notify and FIN,
//! a reset is a reset, and an end without close_notify is a reset too, since something may be missing.

mod flow;
mod handshake;
mod record;
mod worker;

use std::{
    io,
    os::fd::OwnedFd,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use rustls::{ClientConfig, ServerConfig};

pub use flow::How;
pub(crate) use flow::reset_on_close;
pub use handshake::HandshakeError;
pub use record::RecordError;

use handshake::Handshake;
use worker::{Inbox, Worker};

/// Which side of TLS we are.
#[derive(Clone, Debug)]
pub enum Role {
    /// We connected.
    Client(Arc<ClientConfig>),
    /// We accepted.
    Server(Arc<ServerConfig>),
}

/// What a relay tells its owner, from the thread where it happens.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// The peer has proved itself, and the flow runs, or waits for [`Relay::join`].
    Shaken {
        /// Whose.
        id: u64,
        /// Cipher suite, by its IANA name.
        suite: &'static str,
        /// Key exchange group, by its IANA name.
        exchange: &'static str,
    },
    /// There will be no flow.
    Failed {
        /// Whose.
        id: u64,
        /// Why.
        error: HandshakeError,
    },
    /// A flow is over.
    Ended {
        /// Whose.
        id: u64,
        /// Bytes of the program that went out.
        sent: u64,
        /// Bytes for the program that came in.
        received: u64,
        /// How.
        how: How,
    },
}

type Report = dyn Fn(Event) + Send + Sync;

enum Command {
    Start { id: u64, wire: OwnedFd, handshake: Box<Handshake>, plain: Option<OwnedFd>, patience: Duration },
    Join { id: u64, plain: OwnedFd },
    Cut { id: u64 },
    Stop,
}

/// The threads. Dropping it resets all flows.
pub struct Relay {
    workers: Vec<(Arc<Inbox>, JoinHandle<()>)>,
}

impl Relay {
    /// Starts `threads` threads, at least one.
    ///
    /// # Errors
    /// What the kernel says to a thread, an epoll or an eventfd.
    pub fn new(threads: usize, report: impl Fn(Event) + Send + Sync + 'static) -> io::Result<Self> {
        let report: Arc<Report> = Arc::new(report);
        let start = |_| {
            let inbox = Inbox::new()?;
            let worker = Worker::new(inbox.clone(), report.clone())?;
            let thread = thread::Builder::new().name("relay".to_owned()).spawn(move || worker.run())?;
            Ok((inbox, thread))
        };
        Ok(Self { workers: (0..threads.max(1)).map(start).collect::<io::Result<_>>()? })
    }

    fn put(&self, id: u64, command: Command) {
        let count = self.workers.len() as u64;
        let chosen = usize::try_from(id % count.max(1)).unwrap_or(0);
        if let Some((inbox, _)) = self.workers.get(chosen) {
            inbox.put(command);
        }
    }

    /// Begins a handshake on a connected, non-blocking socket. `id` is the owner's name for the flow, used
    /// once, below 2^63 - 1. Without `plain` the flow waits for [`Self::join`] once it is shaken.
    /// `patience` is for both together.
    ///
    /// # Errors
    /// [`HandshakeError::Tls`] if the configuration does not serve.
    pub fn start(
        &self,
        id: u64,
        wire: OwnedFd,
        role: Role,
        plain: Option<OwnedFd>,
        patience: Duration,
    ) -> Result<(), HandshakeError> {
        let handshake = Box::new(match role {
            Role::Client(config) => Handshake::client(config)?,
            Role::Server(config) => Handshake::server(config)?,
        });
        self.put(id, Command::Start { id, wire, handshake, plain, patience });
        Ok(())
    }

    /// Gives a shaken flow the program's socket, connected and non-blocking.
    pub fn join(&self, id: u64, plain: OwnedFd) {
        self.put(id, Command::Join { id, plain });
    }

    /// Ends a flow or a handshake now: both ends are reset.
    pub fn cut(&self, id: u64) {
        self.put(id, Command::Cut { id });
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for (inbox, _) in &self.workers {
            inbox.put(Command::Stop);
        }
        for (_, thread) in self.workers.drain(..) {
            let _ = thread.join();
        }
    }
}
