//! accept(2) for programs that do not pass through the shim: who arrives is judged, on record, and may be a session.
//!
//! One connection at a time is taken from the queue, by proxy, and handed to the caller that has waited longest.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

use nix::sys::{
    epoll::EpollFlags,
    socket::{setsockopt, sockopt::Linger},
};
use portcullis_guard::{book::Line, listener::Answer};
use portcullis_types::{Op, Protocol};
use portcullis_wire::Addr;

use super::{CONTINUE, Held, Outcome, deadline, fail, judging::canonical};
use crate::{
    guard::{
        calls::{self, Named},
        target,
    },
    process::ProcessKey,
    serve::{Broker, Source, judge::Call},
    sys::{proxy, socket::Facts},
};

/// How many connections are taken in a row, so that a flood of strangers stalls nobody.
const IN_A_ROW: usize = 16;
/// Most callers that wait at one listener.
const MOST: usize = 4096;

/// What a caller gave.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) fd: i32,
    pub(super) name: u64,
    pub(super) length: u64,
    pub(super) flags: i32,
}

/// One that waits.
#[derive(Debug)]
struct Caller {
    held: Held,
    wanted: Wanted,
    line: Option<Line>,
    deadline: Option<Instant>,
}

/// A connection that was taken from the queue, permitted, for somebody who was interrupted then.
#[derive(Debug)]
struct Kept {
    owner: ProcessKey,
    socket: OwnedFd,
    name: Vec<u8>,
}

/// A listener at which somebody waits, or was interrupted.
#[derive(Debug, Default)]
pub(super) struct Accepting {
    /// A copy of the listener, and its event source, while somebody waits.
    at: Option<(OwnedFd, u64)>,
    callers: VecDeque<Caller>,
    kept: VecDeque<Kept>,
}

impl Accepting {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.callers.iter().filter_map(|c| c.deadline).min()
    }
}

impl Broker {
    pub(super) fn serve_accept(&mut self, held: &Held, line: Option<Line>, wanted: Wanted) -> Outcome {
        let (socket, facts) = match self.found(held, wanted.fd) {
            Ok(found) if found.1.listening && found.1.protocol == Protocol::TCP => found,
            Ok(_) => return CONTINUE,
            Err(outcome) => return outcome,
        };
        let cookie = facts.cookie;
        if let Some(outcome) = self.accept_one(held, &wanted, &socket, cookie) {
            return outcome;
        }
        if !proxy::blocks(socket.as_fd()) {
            return fail(libc::EAGAIN);
        }
        let accepting = self.guards.accepting.entry(cookie).or_default();
        if accepting.callers.len() >= MOST {
            return fail(libc::ENOBUFS);
        }
        let deadline = deadline(proxy::patience(socket.as_fd(), false));
        if accepting.at.is_none() {
            match self.watch.add_for(&socket, EpollFlags::EPOLLIN, Source::Accepting(cookie)) {
                Ok(source) => accepting.at = Some((socket, source)),
                Err(_) => return fail(libc::ENOBUFS),
            }
        }
        accepting.callers.push_back(Caller { held: *held, wanted, line, deadline });
        Outcome::Later
    }

    /// Takes one connection for a caller. `None`: there is none.
    fn accept_one(
        &mut self,
        held: &Held,
        wanted: &Wanted,
        listener: &OwnedFd,
        cookie: u64,
    ) -> Option<Outcome> {
        for _ in 0..IN_A_ROW {
            let kept = self.guards.accepting.get_mut(&cookie).and_then(|a| a.kept.pop_front());
            let (socket, name) = match kept {
                Some(kept) => (kept.socket, kept.name),
                None => match proxy::accept(listener.as_fd(), wanted.flags) {
                    Ok((socket, name)) => match self.judge_arrival(held, socket, &name) {
                        Ok((socket, instead)) => (socket, instead.map_or(name, |at| calls::bytes_of(&at))),
                        Err(Answer::Fail(libc::ECONNABORTED)) => return Some(fail(libc::ECONNABORTED)), // nobody else will come
                        Err(_) => continue,
                    },
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return None,
                    Err(error) => return Some(fail(error.raw_os_error().unwrap_or(libc::ECONNABORTED))),
                },
            };
            if let Err(errno) = give_name(held.tid(), wanted, &name) {
                return Some(fail(errno)); // as in the kernel, the connection is lost
            }
            let close_on_exec = wanted.flags & libc::SOCK_CLOEXEC != 0;
            if let Err(error) = self.hand_out(held.tree, held.call.id, &socket, close_on_exec) {
                let accepting = self.guards.accepting.entry(cookie).or_default();
                accepting.kept.push_back(Kept { owner: held.key, socket, name });
                if error.raw_os_error() != Some(libc::ENOENT) {
                    return Some(fail(error.raw_os_error().unwrap_or(libc::EMFILE)));
                }
            }
            return Some(Outcome::Told);
        }
        // More strangers than one turn takes: the rest when the others had theirs.
        None
    }

    /// Judges who has arrived, and tells the true name of one that came by a token; a stranger is reset.
    fn judge_arrival(
        &mut self,
        held: &Held,
        socket: OwnedFd,
        name: &[u8],
    ) -> Result<(OwnedFd, Option<Addr>), Answer> {
        let next = Answer::Fail(libc::EAGAIN);
        let Ok(facts) = Facts::of(socket.as_fd()) else { return Err(next) };
        // One that has gone again is told all the same, as natively; its socket does not know it any more.
        let gone = || match calls::address(name) {
            Named::Address(from) => Some(canonical(from)),
            Named::Unspecified | Named::Nothing => None,
        };
        let mut call = Call {
            op: Op::Accept,
            protocol: facts.protocol,
            local: facts.local,
            remote: facts.remote.or_else(gone),
            socket: Some((socket, facts)),
            number: -1,
            via: "guard",
            association: None,
        };
        self.see_through(&mut call);
        let judged = self.judge_held(held, &call);
        let (socket, _) = call.socket.ok_or(next)?;
        let permit = judged.inspect_err(|_| {
            let reset = libc::linger { l_onoff: 1, l_linger: 0 };
            let _gone = setsockopt(&socket, Linger, &reset);
        })?;
        Ok((socket, permit.instead))
    }

    /// Somebody has arrived at a listener.
    pub(in crate::serve) fn take_accepting(&mut self, cookie: u64) {
        for _ in 0..IN_A_ROW {
            let Some(accepting) = self.guards.accepting.get_mut(&cookie) else { return };
            let Some((listener, _)) = &accepting.at else { return };
            let Ok(listener) = listener.try_clone() else { return };
            let Some(caller) = accepting.callers.pop_front() else { break };
            if !self.still_held(caller.held.tree, caller.held.call.id) {
                self.strike(caller.line);
                continue;
            }
            self.begin_asking(caller.held.tid());
            match self.accept_one(&caller.held, &caller.wanted, &listener, cookie) {
                Some(outcome) => self.tell(&caller, outcome),
                None => {
                    if let Some(accepting) = self.guards.accepting.get_mut(&cookie) {
                        accepting.callers.push_front(caller);
                    }
                    break;
                }
            }
        }
        self.close_accepting();
    }

    fn tell(&mut self, caller: &Caller, outcome: Outcome) {
        if let Outcome::Answer(answer) = outcome {
            self.deliver(caller.held.tree, caller.held.call.id, &answer);
        }
        self.strike(caller.line);
    }

    /// Lets go of the callers of a process that `gone` says so of.
    pub(super) fn forget_accepts(&mut self, gone: impl Fn(&Self, &Held) -> bool) {
        for mut accepting in std::mem::take(&mut self.guards.accepting) {
            let (leave, stay) = accepting.1.callers.into_iter().partition(|c: &Caller| gone(self, &c.held));
            accepting.1.callers = stay;
            for caller in Vec::from(leave) {
                self.strike(caller.line);
            }
            self.guards.accepting.insert(accepting.0, accepting.1);
        }
        self.close_accepting();
    }

    /// Forgets what was kept for a process that has ended.
    pub(super) fn forget_kept(&mut self, key: ProcessKey) {
        self.guards.accepting.values_mut().for_each(|a| a.kept.retain(|k| k.owner != key));
    }

    /// Ends waits that their programs limited (socket(7), `SO_RCVTIMEO`).
    pub(super) fn tend_accepting(&mut self, now: Instant) {
        let over = |c: &Caller| c.deadline.is_some_and(|at| at <= now);
        let mut due = Vec::new();
        for accepting in self.guards.accepting.values_mut() {
            while let Some(at) = accepting.callers.iter().position(over) {
                due.extend(accepting.callers.remove(at));
            }
        }
        for caller in &due {
            self.tell(caller, fail(libc::EAGAIN));
        }
        if !due.is_empty() {
            self.close_accepting();
        }
    }

    /// Lets go of listeners at which nobody waits: while a copy is here, the program cannot close its own.
    fn close_accepting(&mut self) {
        let watch = &mut self.watch;
        self.guards.accepting.retain(|_, accepting| {
            if accepting.callers.is_empty()
                && let Some((socket, source)) = accepting.at.take()
            {
                watch.remove(&socket, source);
            }
            !accepting.callers.is_empty() || !accepting.kept.is_empty()
        });
    }
}

/// Writes the peer's address as accept(2) does.
fn give_name(tid: i32, wanted: &Wanted, name: &[u8]) -> Result<(), i32> {
    if wanted.name == 0 {
        return Ok(());
    }
    let mut room = [0; 4];
    if !matches!(target::read(tid, wanted.length, &mut room), Ok(4)) {
        return Err(libc::EFAULT);
    }
    let room = usize::try_from(i32::from_ne_bytes(room)).map_err(|_| libc::EINVAL)?;
    let length = u32::try_from(name.len()).unwrap_or(0).to_ne_bytes();
    let given = name.get(..room.min(name.len())).unwrap_or_default();
    let written = (given.is_empty() || target::write(tid, wanted.name, given))
        && target::write(tid, wanted.length, &length);
    if written { Ok(()) } else { Err(libc::EFAULT) }
}
