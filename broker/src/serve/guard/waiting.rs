//! Calls by proxy that a native one would wait in: the broker waits for many at once, and works meanwhile.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{poll::PollFlags, sys::epoll::EpollFlags};
use portcullis_guard::{book::Line, listener::Answer};

use super::{Held, Outcome, deadline, fail, proxy::try_send};
use crate::{
    process::ProcessKey,
    serve::{Broker, Source},
    sys::proxy::{self, Message},
};

/// Most calls that wait at once.
const MOST: usize = 8192;

/// What is to be done once the socket is ready.
#[derive(Debug)]
pub(super) enum Step {
    /// Learn how it went; `seq` is the number of its record.
    Connect { address: Vec<u8>, seq: u64 },
    /// Go on sending.
    Send(Sending),
}

/// Messages under way.
#[derive(Debug)]
pub(super) struct Sending {
    pub(super) messages: Vec<Message>,
    pub(super) flags: i32,
    /// For sendmmsg(2), where the first one's length goes.
    pub(super) lengths: Option<u64>,
    pub(super) done: usize,
}

/// One call.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) held: Held,
    socket: OwnedFd,
    source: u64,
    step: Step,
    line: Option<Line>,
    deadline: Option<Instant>,
}

impl Broker {
    pub(super) fn wait_for(
        &mut self,
        held: &Held,
        socket: OwnedFd,
        what: PollFlags,
        step: Step,
        line: Option<Line>,
    ) -> Outcome {
        if self.guards.waiting.len() >= MOST {
            return fail(libc::ENOBUFS);
        }
        let id = self.watch.id();
        let events = if what == PollFlags::POLLIN { EpollFlags::EPOLLIN } else { EpollFlags::EPOLLOUT };
        let Ok(source) = self.watch.add_for(&socket, events, Source::Waiting(id)) else {
            return fail(libc::ENOBUFS);
        };
        let deadline = deadline(proxy::patience(socket.as_fd(), true));
        self.guards.waiting.insert(id, Waiting { held: *held, socket, source, step, line, deadline });
        Outcome::Later
    }

    /// A socket that a call waits for is ready.
    pub(in crate::serve) fn take_waiting(&mut self, id: u64) {
        let Some(mut waiting) = self.guards.waiting.remove(&id) else { return };
        let held = waiting.held;
        let answer = if self.still_held(held.tree, held.call.id) {
            match &mut waiting.step {
                Step::Connect { address, seq } => {
                    self.try_connect(&held, &waiting.socket, address, *seq, true)
                }
                Step::Send(sending) => try_send(&held, &waiting.socket, sending, true),
            }
        } else {
            Some(Answer::Fail(libc::EINTR)) // nobody hears it
        };
        match answer {
            None => {
                self.guards.waiting.insert(id, waiting);
            }
            Some(answer) => self.finish(waiting, answer),
        }
    }

    fn finish(&mut self, waiting: Waiting, answer: Answer) {
        let Waiting { held, socket, source, line, step, .. } = waiting;
        self.watch.remove(&socket, source);
        drop(socket); // before the program goes on: what it closes next is closed
        if !self.deliver(held.tree, held.call.id, &answer) && answer != Answer::Fail(libc::EINTR) {
            self.guards.named = match step {
                Step::Connect { address, .. } => address,
                Step::Send(sending) => {
                    sending.messages.into_iter().next().map(|m| m.name).unwrap_or_default()
                }
            };
            self.keep_unheard(&held.call, answer);
        }
        self.strike(line);
    }

    /// Lets go of sockets whose callers were interrupted. A process that makes another call may have closed them.
    pub(super) fn forget_interrupted(&mut self, key: ProcessKey) {
        let gone =
            |broker: &Self, held: &Held| held.key == key && !broker.still_held(held.tree, held.call.id);
        if !self.guards.waiting.is_empty() {
            self.forget_waiting(|broker, w| gone(broker, &w.held));
        }
        if !self.guards.accepting.is_empty() {
            self.forget_accepts(gone);
        }
    }

    pub(super) fn forget_waiting(&mut self, which: impl Fn(&Self, &Waiting) -> bool) {
        let gone: Vec<u64> =
            self.guards.waiting.iter().filter(|(_, w)| which(self, w)).map(|(id, _)| *id).collect();
        for waiting in gone.into_iter().filter_map(|id| self.guards.waiting.remove(&id)).collect::<Vec<_>>() {
            self.watch.remove(&waiting.socket, waiting.source);
            self.strike(waiting.line);
        }
    }

    /// When a wait ends by itself.
    pub(in crate::serve) fn next_deadline(&self) -> Option<Duration> {
        let waits = self.guards.waiting.values().filter_map(|w| w.deadline);
        let accepts = self.guards.accepting.values().filter_map(super::accept::Accepting::deadline);
        let next = waits.chain(accepts).min()?;
        Some(next.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }

    /// Ends waits that have lasted as long as their programs let them.
    pub(in crate::serve) fn tend_waiting(&mut self) {
        let now = Instant::now();
        let over = |deadline: Option<Instant>| deadline.is_some_and(|at| at <= now);
        let due: Vec<u64> =
            self.guards.waiting.iter().filter(|(_, w)| over(w.deadline)).map(|(id, _)| *id).collect();
        for id in due {
            let Some(waiting) = self.guards.waiting.remove(&id) else { continue };
            // As the kernel has it (socket(7), SO_SNDTIMEO).
            let answer = match &waiting.step {
                Step::Connect { .. } => Answer::Fail(libc::EINPROGRESS),
                Step::Send(sending) if sending.done > 0 => {
                    Answer::Return(i64::try_from(sending.done).unwrap_or(0))
                }
                Step::Send(_) => Answer::Fail(libc::EAGAIN),
            };
            self.finish(waiting, answer);
        }
        self.tend_accepting(now);
    }
}
