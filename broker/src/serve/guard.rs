//! Serves the guard: system calls that the kernel holds until the broker has judged them.
//!
//! A held call is judged on a copy of its arguments, by the same path as the shim's questions. What happens then
//! depends on what holds its tree beside the guard:
//!
//! - the backstop: the call goes on in the kernel, which reads its arguments again, so it is let through to the
//!   backstop for exactly the socket and address that were judged. Whatever another thread has put there meanwhile,
//!   the backstop judges the kernel's own copy. Nothing is done on a program's behalf.
//! - nothing: the call is made *by proxy*, on the copy that was judged and on a copy of the descriptor.
//!
//! accept(2) is made by proxy in both, since who arrived is known only afterwards.

mod accept;
mod judging;
mod known;
mod proxy;
mod reach;
mod signals;
mod waiting;

pub(super) use self::known::Learned;

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

use nix::sys::epoll::EpollFlags;
use portcullis_guard::{
    book::{Book, Line},
    listener::{self, Answer, Notification},
};
use portcullis_types::{Lack, Op};

use super::{Broker, Source, judge::Call};
use crate::{
    guard::{
        calls::{self, Asked, asked},
        target,
    },
    process::ProcessKey,
    sys::message::Writer,
};

/// One tree's listener.
#[derive(Debug)]
struct Tree {
    listener: OwnedFd,
    source: u64,
    /// Its calls are made by proxy.
    by_proxy: bool,
    /// The tag of its run, if that is narrowed.
    run: Option<u64>,
}

/// All that is kept of held calls.
#[derive(Debug, Default)]
pub(super) struct Guards {
    trees: HashMap<u64, Tree>,
    book: Option<Book>,
    /// What an earlier broker has left waiting, by its tree; in the book again, as this one may be killed before it is
    /// served.
    left: Vec<(u64, Notification, Line)>,
    waiting: HashMap<u64, waiting::Waiting>,
    accepting: HashMap<u64, accept::Accepting>,
    /// Questions of the shim whose calls are still to come, with the generation that judged them.
    asked: HashSet<judging::Ticket>,
    /// Threads beside their process's first.
    threads: HashMap<i32, ProcessKey>,
    /// Answers that came too late, by thread.
    unheard: HashMap<i32, judging::Unheard>,
    /// The addresses that the call in hand named.
    named: Vec<u8>,
}

impl Guards {
    pub(super) fn is_empty(&self) -> bool {
        self.trees.is_empty()
    }

    fn has_ticket_of(&self, key: ProcessKey) -> bool {
        self.asked.iter().any(|ticket| ticket.key == key)
    }

    /// Whether some tree is held by the guard alone.
    pub(super) fn by_proxy(&self) -> bool {
        self.trees.values().any(|tree| tree.by_proxy)
    }
}

/// One held call, of a process that is known.
#[derive(Clone, Copy, Debug)]
struct Held {
    tree: u64,
    call: Notification,
    key: ProcessKey,
    by_proxy: bool,
}

impl Held {
    /// The thread.
    const fn tid(&self) -> i32 {
        self.call.pid.cast_signed()
    }
}

/// What becomes of a held call.
#[derive(Debug)]
enum Outcome {
    Answer(Answer),
    /// This descriptor is its result, close-on-exec or not.
    Descriptor(OwnedFd, bool),
    /// It was told already.
    Told,
    /// It is told later.
    Later,
}

const CONTINUE: Outcome = Outcome::Answer(Answer::Continue);

const fn fail(errno: i32) -> Outcome {
    Outcome::Answer(Answer::Fail(errno))
}

impl Broker {
    pub(super) fn add_guard(&mut self, listener: OwnedFd, by_proxy: bool, run: u64) {
        let wakes = !self.without.has(Lack::WakeUp) && listener::wake_synchronously(listener.as_fd());
        self.slow_to_wake |= !wakes;
        let id = self.watch.id();
        match self.watch.add(&listener, Source::Guard(id)) {
            Ok(source) => {
                self.guards
                    .trees
                    .insert(id, Tree { listener, source, by_proxy, run: Some(run).filter(|tag| *tag != 0) });
            }
            Err(error) => self.note("broker", &format!("a program's calls cannot be served: {error}"), &[]),
        }
    }

    /// Answers what an earlier broker has left: all trees were handed over before. Who waits for somebody to arrive goes
    /// on waiting ([`Self::serve_left`]).
    pub(super) fn take_book(&mut self, book: &OwnedFd) {
        match Book::open(book.as_fd()) {
            Ok((mut book, left)) => {
                for call in left {
                    let of = |(id, tree): (&u64, &Tree)| {
                        listener::is_waiting(tree.listener.as_fd(), call.id).then_some(*id)
                    };
                    let Some(tree) = self.guards.trees.iter().find_map(of) else { continue };
                    let waits = matches!(asked(&call), Asked::Accept { .. });
                    match waits.then(|| book.note(&call)).flatten() {
                        Some(line) => self.guards.left.push((tree, call, line)),
                        None => drop(self.deliver(tree, call.id, &unserved(call.nr.into()))),
                    }
                }
                self.guards.book = Some(book);
            }
            Err(error) => self.note("broker", &format!("held calls cannot be booked: {error}"), &[]),
        }
    }

    /// Takes up what an earlier broker has left waiting, now that it can be judged.
    pub(super) fn serve_left(&mut self) {
        for (tree, call, line) in std::mem::take(&mut self.guards.left) {
            self.serve_held(tree, &call, Some(line));
        }
    }

    /// Answers held calls of one tree.
    pub(super) fn take_held(&mut self, id: u64, events: EpollFlags) {
        let Some(tree) = self.guards.trees.get(&id) else { return };
        if !events.contains(EpollFlags::EPOLLIN) {
            return self.forget_tree(id);
        }
        // One a turn: no tree starves another. It does not wait, as somebody was there; ENOENT: was killed or
        // interrupted meanwhile.
        if let Ok(call) = listener::receive(tree.listener.as_fd()) {
            let line = self.guards.book.as_mut().and_then(|book| book.note(&call));
            if line.is_none() && self.guards.book.is_some() {
                // Nobody could answer it after this broker's death.
                self.deliver(id, call.id, &unserved(call.nr.into()));
                return;
            }
            self.serve_held(id, &call, line);
        }
    }

    fn forget_tree(&mut self, id: u64) {
        if let Some(tree) = self.guards.trees.remove(&id) {
            self.watch.remove(&tree.listener, tree.source);
            self.forget_waiting(|_, w| w.held.tree == id);
            self.forget_accepts(|_, held| held.tree == id);
        }
    }

    /// Serves one that stands in the book, if there is one.
    fn serve_held(&mut self, tree: u64, call: &Notification, line: Option<Line>) {
        self.guards.named.clear();
        match self.answer_held(tree, call, line) {
            Outcome::Later => return,
            Outcome::Told => {}
            Outcome::Answer(answer) => {
                if !self.deliver(tree, call.id, &answer) {
                    self.keep_unheard(call, answer);
                }
            }
            Outcome::Descriptor(fd, close_on_exec) => {
                if let Err(error) = self.hand_out(tree, call.id, &fd, close_on_exec) {
                    let errno = error.raw_os_error().unwrap_or(libc::EMFILE);
                    self.deliver(tree, call.id, &Answer::Fail(errno));
                }
            }
        }
        self.strike(line);
    }

    fn strike(&mut self, line: Option<Line>) {
        if let (Some(book), Some(line)) = (&mut self.guards.book, line) {
            book.strike(line);
        }
    }

    /// Lets a held call go on. `false`: it is held no more.
    fn deliver(&self, tree: u64, id: u64, answer: &Answer) -> bool {
        let Some(tree) = self.guards.trees.get(&tree) else { return false };
        !matches!(
            listener::answer(tree.listener.as_fd(), id, *answer),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT)
        )
    }

    fn hand_out(&self, tree: u64, id: u64, fd: &OwnedFd, close_on_exec: bool) -> io::Result<()> {
        let tree = self.guards.trees.get(&tree).ok_or(io::ErrorKind::NotFound)?;
        listener::answer_with_descriptor(tree.listener.as_fd(), id, fd.as_fd(), close_on_exec).map(drop)
    }

    /// Whether what was read of the caller was read of that caller.
    fn still_held(&self, tree: u64, id: u64) -> bool {
        self.guards.trees.get(&tree).is_some_and(|g| listener::is_waiting(g.listener.as_fd(), id))
    }

    fn answer_held(&mut self, tree: u64, call: &Notification, line: Option<Line>) -> Outcome {
        const REFUSED: Outcome = fail(libc::EACCES);
        let tid = call.pid.cast_signed();
        if tid <= 0 {
            return REFUSED; // of a process namespace that this one cannot see
        }
        let Some(by_proxy) = self.guards.trees.get(&tree).map(|t| t.by_proxy) else { return REFUSED };
        if let Some(outcome) = self.serve_known(tree, by_proxy, call, line) {
            return outcome;
        }
        self.begin_asking(tid);
        let known = self.thread_of(tid).and_then(|key| self.processes.get(&key));
        let asker = match known {
            Some(process) => Some((process.context.key.pid, process.counted, 0)),
            _ => target::process_of(tid),
        };
        let Some((pid, uid, gid)) = asker else { return REFUSED };
        let what = asked(call);
        match what {
            Asked::Trace { request, pid } => return self.judge_trace(tree, call, request, pid),
            Asked::Memory { pid } => return self.judge_reach(tree, call, pid),
            Asked::TakeDescriptor { pidfd, number } => {
                return self.take_for(tree, call, pid, pidfd, number);
            }
            Asked::Signal(to) => return self.judge_signal(tree, call, Writer { pid, uid, gid }, to),
            Asked::Limit { pid: of } => return self.judge_limit(tree, call, Writer { pid, uid, gid }, of),
            Asked::Landlock { attributes, flags } => return reach::landlock(tid, attributes, flags),
            Asked::Unknown => return REFUSED,
            _ => {}
        }
        let Some(key) = self.identify(Writer { pid, uid, gid }, None) else { return REFUSED };
        if !self.still_held(tree, call.id) {
            return REFUSED;
        }
        self.forget_interrupted(key);
        self.know_thread(tid, key);
        let run = self.guards.trees.get(&tree).and_then(|tree| tree.run);
        self.see_tree(key, run);
        let held = Held { tree, call: *call, key, by_proxy };
        match what {
            Asked::Socket { domain, kind, protocol } => {
                let protocol = calls::protocol_of(domain, kind, protocol);
                let call = Call {
                    op: Op::Socket,
                    protocol,
                    local: None,
                    remote: None,
                    socket: None,
                    number: -1,
                    via: "guard",
                    association: None,
                };
                self.judge_held(&held, &call).map_or_else(Outcome::Answer, |_| CONTINUE)
            }
            Asked::Connect { fd, address } => self.serve_connect(&held, fd, address, line),
            Asked::Bind { fd, address } => self.serve_bind(&held, fd, address),
            Asked::Listen { fd, backlog } => self.serve_listen(&held, fd, backlog),
            Asked::Accept { fd, name, length, flags } => {
                self.serve_accept(&held, line, accept::Wanted { fd, name, length, flags })
            }
            Asked::SendTo { fd, flags, data, address } => {
                self.serve_send(&held, fd, flags, &judging::Letters::One { data, address }, line)
            }
            Asked::SendMessage { fd, flags, at } => {
                self.serve_send(&held, fd, flags, &judging::Letters::Message { at }, line)
            }
            Asked::SendMessages { fd, flags, at, count } => {
                self.serve_send(&held, fd, flags, &judging::Letters::Messages { at, count }, line)
            }
            _ => REFUSED,
        }
    }

    /// Forgets what a process was held in: it has ended.
    pub(super) fn forget_held(&mut self, key: ProcessKey) {
        self.forget_waiting(|_, w| w.held.key == key);
        self.forget_accepts(|_, held| held.key == key);
        self.forget_kept(key);
        self.guards.asked.retain(|ticket| ticket.key != key);
        self.guards.threads.retain(|_, of| *of != key);
        self.guards.unheard.retain(|_, unheard| unheard.key != key);
    }
}

/// What a call gets that nobody can serve.
fn unserved(call: i64) -> Answer {
    Answer::Fail(match call {
        libc::SYS_connect => libc::ECONNREFUSED,
        libc::SYS_accept | libc::SYS_accept4 => libc::ECONNABORTED,
        libc::SYS_kill
        | libc::SYS_tkill
        | libc::SYS_tgkill
        | libc::SYS_rt_sigqueueinfo
        | libc::SYS_rt_tgsigqueueinfo
        | libc::SYS_pidfd_send_signal => libc::EPERM,
        _ => libc::EACCES,
    })
}

/// When a wait ends that may not last for ever.
fn deadline(patience: Option<std::time::Duration>) -> Option<Instant> {
    Some(Instant::now() + patience?)
}
