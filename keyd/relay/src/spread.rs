//! Which thread of an engine has which association.
//!
//! To wake a thread costs more than most of what it is woken for. So what is new begins at the first thread that has
//! little to do, and what is under way at once is done by one thread in one turn. What carries much goes to the thread
//! that has the fewest such, so that big streams have a processor each.
//!
//! The first thread may be the owner's own ([`crate::Driver`]): then what begins wakes nobody at all, and it keeps nothing
//! that carries much, since it has the owner's work to do as well.

use std::{
    io,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{Id, Limits, admit::Admission, event::Queue, worker::Command};

/// A thread with less to do takes one more.
const FEW: usize = 4;

struct Thread {
    commands: Queue<Command>,
    /// What it had to do when it last looked, and what has begun since.
    busy: AtomicUsize,
    /// Associations that carry much.
    streams: AtomicUsize,
}

/// The threads of one engine, by number, and what is counted over all of them.
pub(crate) struct Threads {
    all: Vec<Thread>,
    admission: Mutex<Admission>,
    /// The first is the owner's, who looks at its queue by himself.
    driven: bool,
}

impl Threads {
    pub(crate) fn new(limits: &Limits, driven: bool) -> io::Result<Self> {
        let thread = |_| {
            let (busy, streams) = (AtomicUsize::new(0), AtomicUsize::new(0));
            Ok(Thread { commands: Queue::new()?, busy, streams })
        };
        let all = (0..limits.threads.max(1)).map(thread).collect::<io::Result<_>>()?;
        let admission = Mutex::new(Admission::new(limits.handshakes, limits.handshakes_per_peer));
        Ok(Self { all, admission, driven })
    }

    /// Who may shake hands. Locked for a look-up or two.
    pub(crate) fn admission(&self) -> MutexGuard<'_, Admission> {
        self.admission.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The `count`th association, which begins at the thread that has time.
    pub(crate) fn name(&self, count: u64) -> Id {
        let busy = |thread: &Thread| thread.busy.load(Ordering::Relaxed);
        let with_time = self.all.iter().position(|thread| busy(thread) < FEW);
        let idlest = || (0..self.all.len()).min_by_key(|at| self.all.get(*at).map(busy));
        let at = with_time.or_else(idlest).unwrap_or_default();
        Id(count * self.all.len() as u64 + at as u64)
    }

    /// Where an association began, and where commands for it go.
    pub(crate) fn origin(&self, id: Id) -> usize {
        usize::try_from(id.0 % self.all.len() as u64).unwrap_or_default()
    }

    /// What a thread is told.
    pub(crate) fn commands(&self, at: usize) -> Option<&Queue<Command>> {
        self.all.get(at).map(|thread| &thread.commands)
    }

    pub(crate) fn tell(&self, at: usize, command: Command) {
        if let Some(thread) = self.all.get(at) {
            thread.commands.push(command);
        }
    }

    /// As [`Self::tell`], from the owner, from whom all handshakes come.
    pub(crate) fn tell_as_owner(&self, at: usize, command: Command) {
        let Some(thread) = self.all.get(at) else { return };
        if matches!(command, Command::Handshake { .. }) {
            thread.busy.fetch_add(1, Ordering::Relaxed);
        }
        if self.is_driven(at) {
            thread.commands.push_in_silence(command);
        } else {
            thread.commands.push(command);
        }
    }

    /// Whether this is the owner's own thread.
    pub(crate) const fn is_driven(&self, at: usize) -> bool {
        self.driven && at == 0
    }

    pub(crate) fn tell_all(&self, command: impl Fn() -> Command) {
        (0..self.all.len()).for_each(|at| self.tell(at, command()));
    }

    /// A thread says how much it has to do.
    pub(crate) fn note_busy(&self, at: usize, with: usize) {
        if let Some(thread) = self.all.get(at) {
            thread.busy.store(with, Ordering::Relaxed);
        }
    }

    /// Chooses the thread for an association that carries much: of those with the fewest the last, as the first have
    /// what is new.
    pub(crate) fn add_stream(&self) -> usize {
        let count = |at: &usize| self.all.get(*at).map(|thread| thread.streams.load(Ordering::Relaxed));
        let first = usize::from(self.driven && self.all.len() > 1);
        let at = (first..self.all.len()).rev().min_by_key(count).unwrap_or_default();
        if let Some(thread) = self.all.get(at) {
            thread.streams.fetch_add(1, Ordering::Relaxed);
        }
        at
    }

    /// One that [`Self::add_stream`] gave to a thread has ended.
    pub(crate) fn end_stream(&self, at: usize) {
        if let Some(thread) = self.all.get(at) {
            thread.streams.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_begins_where_there_is_time() {
        let threads = Threads::new(&Limits { threads: 2, ..Limits::default() }, false).unwrap();
        let origin = |count| threads.origin(threads.name(count));
        assert_eq!(origin(1), 0);
        threads.note_busy(0, FEW);
        assert_eq!(origin(2), 1);
        threads.note_busy(1, FEW + 2);
        assert_eq!(origin(3), 0, "the one with less");
        threads.note_busy(0, 0);
        assert_eq!(origin(4), 0);
        assert!(threads.name(5) > threads.name(4), "ids grow");
    }

    #[test]
    fn streams_are_spread() {
        let threads = Threads::new(&Limits { threads: 3, ..Limits::default() }, false).unwrap();
        let placed: Vec<_> = (0..4).map(|_| threads.add_stream()).collect();
        assert_eq!(placed, [2, 1, 0, 2]);
        threads.end_stream(1);
        assert_eq!(threads.add_stream(), 1);
        let threads = Threads::new(&Limits { threads: 3, ..Limits::default() }, true).unwrap();
        let placed: Vec<_> = (0..3).map(|_| threads.add_stream()).collect();
        assert_eq!(placed, [2, 1, 2], "the owner's has none");
    }
}
