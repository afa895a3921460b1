//! What the engine tells its owner.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use rustls::pki_types::CertificateDer;

use crate::{Ending, Established, Id};

/// Why an association did not come about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The outer socket failed before TLS began; the kernel's error number, for the program's `connect`.
    #[error("no connection: {}", io::Error::from_raw_os_error(*.0))]
    Connect(i32),
    /// TLS failed at this end, or the peer sent an alert: then [`rustls::Error::AlertReceived`].
    #[error(transparent)]
    Tls(rustls::Error),
    /// The peer reset its socket in the handshake, or before the verdict.
    #[error("the peer reset the connection")]
    Reset,
    /// The peer closed its socket in the handshake.
    #[error("the peer left in the handshake")]
    Left,
    /// The handshake took longer than it may.
    #[error("no complete handshake in time")]
    TooSlow,
    /// The peer sent more than a handshake may hold.
    #[error("handshake larger than permitted")]
    TooMuch,
    /// Too many handshakes are under way, and this was kept waiting the longest.
    #[error("displaced by other handshakes")]
    Displaced,
    /// `splice` or `refuse` did not come in time.
    #[error("no verdict in time")]
    NoVerdict,
    /// The inner socket could not be used.
    #[error("inner socket: {}", io::Error::from_raw_os_error(*.0))]
    Inner(i32),
    /// A fault in this program, met by what this peer sent.
    #[error("internal fault")]
    Fault,
}

/// One thing that happened. Of each id there is at most one `Ready`, and after all else exactly one of
/// `Failed` and `Closed`, unless the owner itself refused it.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// The peer is who it says: `splice` or `refuse` is next. `None`: on a mixed port, it speaks plain.
    Ready {
        /// Which.
        id: Id,
        /// What was agreed on.
        tls: Option<Established>,
    },
    /// No association; the outer socket is closed.
    Failed {
        /// Which.
        id: Id,
        /// Why.
        failure: Failure,
        /// The chain that was refused, leaf first; empty when none was shown.
        shown: Vec<CertificateDer<'static>>,
    },
    /// An association ended; both sockets are closed.
    Closed {
        /// Which.
        id: Id,
        /// How.
        ending: Ending,
        /// Bytes from the peer to the program.
        bytes_in: u64,
        /// Bytes from the program to the peer.
        bytes_out: u64,
        /// Since the outer socket was handed over.
        duration: Duration,
    },
    /// The answer to [`crate::Engine::report`].
    Traffic {
        /// Which.
        id: Id,
        /// Bytes from the peer to the program so far.
        bytes_in: u64,
        /// Bytes from the program to the peer so far.
        bytes_out: u64,
        /// Since the outer socket was handed over.
        duration: Duration,
    },
}

/// A queue with a descriptor that is readable while something is in it that was not put there in silence.
pub(crate) struct Queue<T> {
    items: Mutex<Items<T>>,
    bell: EventFd,
}

struct Items<T> {
    all: VecDeque<T>,
    rung: bool,
}

impl<T> Queue<T> {
    pub(crate) fn new() -> io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { items: Mutex::new(Items { all: VecDeque::new(), rung: false }), bell })
    }

    fn items(&self) -> MutexGuard<'_, Items<T>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, item: T) {
        let mut items = self.items();
        items.all.push_back(item);
        if !std::mem::replace(&mut items.rung, true) {
            // A full counter is readable as well.
            let _rung = self.bell.write(1);
        }
    }

    /// The same from the thread that will look by itself.
    pub(crate) fn push_in_silence(&self, item: T) {
        self.items().all.push_back(item);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items().all.is_empty()
    }

    pub(crate) fn pop(&self) -> Option<T> {
        let mut items = self.items();
        let item = items.all.pop_front();
        if items.all.is_empty() {
            self.quieten(&mut items);
        }
        item
    }

    /// Everything at once.
    pub(crate) fn take(&self) -> VecDeque<T> {
        let mut items = self.items();
        self.quieten(&mut items);
        std::mem::take(&mut items.all)
    }

    fn quieten(&self, items: &mut Items<T>) {
        if std::mem::take(&mut items.rung) {
            let _quiet = self.bell.read();
        }
    }
}

impl<T> AsFd for Queue<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
