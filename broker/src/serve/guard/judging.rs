//! Judges held calls, and lets each go on in the way that fits its tree.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use portcullis_guard::{
    book::Line as Booked,
    listener::{Answer, Notification},
};
use portcullis_types::{Op, Protocol};
use portcullis_wire::{Addr, Flags, OpCode, Reply, Request};

use super::{CONTINUE, Held, Outcome, fail};
use crate::{
    Mode,
    audit::Line,
    guard::{
        calls::{self, Named, Span},
        target,
    },
    process::ProcessKey,
    serve::{Broker, judge::Call},
    sys::{
        pidfd_getfd, pidfd_open_thread,
        proxy::{self, Message},
        realtime,
        socket::Facts,
    },
};

/// Port of the domain name system, whose sockets are connected in order to send.
const DNS: u16 = 53;
/// Most questions of the shim, and most answers that came too late, that are remembered.
const MOST: usize = 4096;
/// How long an answer that came too late is good for.
const FRESH: Duration = Duration::from_secs(2);

/// A question of the shim that was answered with a permit: the call itself is still to come.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct Ticket {
    pub(super) key: ProcessKey,
    op: Op,
    cookie: u64,
    at: Option<SocketAddr>,
    generation: u64,
}

/// What came of a call whose thread was interrupted by a signal before it heard.
#[derive(Debug)]
pub(super) struct Unheard {
    pub(super) key: ProcessKey,
    call: Notification,
    named: Vec<u8>,
    answer: Answer,
    since: Instant,
}

/// The call may go on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Permit {
    /// Number of its record; 0: it was on record before.
    pub(super) seq: u64,
    /// The address to connect to instead, or of who has come.
    pub(super) instead: Option<Addr>,
}

/// What a call wants to send.
#[derive(Clone, Copy, Debug)]
pub(super) enum Letters {
    /// sendto(2).
    One { data: Span, address: Span },
    /// sendmsg(2).
    Message { at: u64 },
    /// sendmmsg(2).
    Messages { at: u64, count: u64 },
}

/// Bytes of a `struct mmsghdr`.
const EACH: u64 = 64;

impl Letters {
    const fn count(&self) -> u64 {
        match self {
            Self::One { .. } | Self::Message { .. } => 1,
            Self::Messages { count, .. } => *count,
        }
    }

    /// Where one's name is, and where its header.
    fn name(&self, tid: i32, n: u64) -> (Span, u64) {
        let header = match *self {
            Self::One { address, .. } => return (address, 0),
            Self::Message { at } => at,
            Self::Messages { at, .. } => at.saturating_add(n.saturating_mul(EACH)),
        };
        let name = target::read_header(tid, header).map_or(Span { at: 0, length: 0 }, |h| h.name);
        (name, header)
    }

    /// A copy of one, whole.
    fn copy(&self, tid: i32, n: u64) -> Result<Message, i32> {
        let header = match *self {
            Self::One { data, address } => {
                // A longer piece than fits is for a stream, which takes what it is given.
                let data = Span { length: data.length.min(target::MOST_BYTES as u64), ..data };
                if address.at != 0 && address.length == 0 {
                    return Err(libc::EINVAL); // sendmsg(2), which sends it, takes that for no address
                }
                let name = if address.at == 0 { Vec::new() } else { target::read_address(tid, address)? };
                return Ok(Message { name, data: target::read_span(tid, data)?, control: Vec::new() });
            }
            Self::Message { at } => at,
            Self::Messages { at, .. } => at.saturating_add(n.saturating_mul(EACH)),
        };
        let header = target::read_header(tid, header).ok_or(libc::EFAULT)?;
        let name = target::read_address(tid, header.name)?;
        let control = target::read_span(tid, header.control).map_err(|errno| match errno {
            libc::EMSGSIZE => libc::ENOBUFS,
            errno => errno,
        })?;
        if calls::has_source_route(&control) {
            return Err(libc::EPERM);
        }
        Ok(Message { name, data: target::read_parts(tid, header.parts)?, control })
    }

    /// Where the kernel would write how much of each was sent.
    pub(super) const fn lengths(&self) -> Option<u64> {
        match *self {
            Self::Messages { at, .. } => Some(at.saturating_add(calls::HEADER as u64)),
            _ => None,
        }
    }
}

impl Broker {
    /// The internet socket behind a descriptor of the caller's; else what becomes of the call: what is not judged
    /// here goes on, and what cannot be told fails.
    pub(super) fn found(&mut self, held: &Held, fd: i32) -> Result<(OwnedFd, Facts), Outcome> {
        let Some(process) = self.processes.get(&held.key) else { return Err(fail(libc::EACCES)) };
        // A thread may have descriptors of its own (unshare(2), `CLONE_FILES`).
        let thread = if held.is_first() { None } else { pidfd_open_thread(held.tid()).ok() };
        let sure = held.is_first() || thread.is_some();
        let whose = thread.as_ref().map_or(process.pidfd.as_fd(), AsFd::as_fd);
        let taken = pidfd_getfd(whose, fd).map_err(|e| e.raw_os_error().unwrap_or(libc::EBADF));
        let found = match taken {
            Ok(socket) => match Facts::of(socket.as_fd()) {
                Ok(facts) if [libc::AF_INET, libc::AF_INET6].contains(&facts.domain) => Ok((socket, facts)),
                Ok(facts) if held.by_proxy && !sure => {
                    let same = target::holds(held.tid(), fd, facts.inode);
                    return Err(if same { CONTINUE } else { fail(libc::EACCES) });
                }
                _ => Err(CONTINUE),
            },
            // With the backstop the kernel may look itself.
            Err(_) if !held.by_proxy => Err(CONTINUE),
            Err(libc::EBADF) => Err(fail(libc::EBADF)),
            Err(_) => {
                let context = self.context_of(held.key);
                self.log.push(&Line {
                    process: context.as_deref(),
                    verdict: Some("refuse"),
                    reason: Some("this program does not let its user look into it, so nobody can act for it"),
                    generation: Some(self.generation_in_force()),
                    ..Line::bare(realtime(), "socket", "guard")
                });
                Err(fail(libc::EACCES))
            }
        };
        match found {
            // Before Linux 6.9 it is seen whether the number is the same for this thread.
            Ok((_, facts)) if held.by_proxy && !sure && !target::holds(held.tid(), fd, facts.inode) => {
                Err(fail(libc::EACCES))
            }
            found => found,
        }
    }

    /// connect(2).
    pub(super) fn serve_connect(
        &mut self,
        held: &Held,
        fd: i32,
        address: Span,
        line: Option<Booked>,
    ) -> Outcome {
        let (socket, facts) = match self.found(held, fd) {
            Ok(found) => found,
            Err(outcome) => return outcome,
        };
        let bytes = match target::read_address(held.tid(), address) {
            Ok(bytes) => bytes,
            Err(errno) => return if held.by_proxy { fail(errno) } else { CONTINUE },
        };
        if let Some(answer) = self.heard_late(held, &bytes) {
            return Outcome::Answer(answer);
        }
        let mut seq = 0;
        let mut socket = socket;
        if let Named::Address(named) = calls::address(&bytes) {
            let call =
                Call { remote: Some(canonical(named)), ..with_socket(Op::Connect, (socket, facts), fd) };
            let judged = if let Some(probed) = self.judge_probe(held, &call) {
                probed.map(|()| Permit::default())
            } else {
                self.judge_held(held, &call)
            };
            let permit = match judged {
                Ok(permit) => permit,
                Err(answer) => return Outcome::Answer(answer),
            };
            let Some((taken, facts)) = call.socket else { return fail(libc::EACCES) };
            if let Some(token) = permit.instead {
                // Another address than the program gave: nobody but the broker can say it.
                self.grant_ourselves(&facts, &token);
                // How it goes is on record as the key daemon tells it.
                return self.connect_for(held, taken, calls::bytes_of(&token), 0, line);
            }
            (seq, socket) = (permit.seq, taken);
        }
        // Without an address: disconnecting, or an error that the kernel tells itself.
        if held.by_proxy { self.connect_for(held, socket, bytes, seq, line) } else { CONTINUE }
    }

    /// bind(2), which is always permitted: what follows from it is judged. So it goes on in the kernel.
    pub(super) fn serve_bind(&mut self, held: &Held, fd: i32, address: Span) -> Outcome {
        let (socket, facts) = match self.found(held, fd) {
            Ok(found) => found,
            Err(outcome) => return outcome,
        };
        // What cannot be read, or has no such length, is the kernel's to answer.
        let Ok(bytes) = target::read_address(held.tid(), address) else { return CONTINUE };
        if let Some(answer) = self.heard_late(held, &bytes) {
            return Outcome::Answer(answer);
        }
        let named = match calls::address(&bytes) {
            Named::Address(named) => Some(named),
            Named::Unspecified => calls::unspecified_as_v4(&bytes),
            Named::Nothing => None,
        };
        let Some(named) = named else { return CONTINUE };
        let call = Call { local: Some(canonical(named)), ..with_socket(Op::Bind, (socket, facts), fd) };
        self.judge_held(held, &call).map_or_else(Outcome::Answer, |_| CONTINUE)
    }

    /// listen(2).
    pub(super) fn serve_listen(&mut self, held: &Held, fd: i32, backlog: i32) -> Outcome {
        let (socket, facts) = match self.found(held, fd) {
            Ok(found) => found,
            Err(outcome) => return outcome,
        };
        if let Some(answer) = self.heard_late(held, &[]) {
            return Outcome::Answer(answer);
        }
        let local = facts.local.filter(|a| a.port() != 0);
        let call = Call { local, ..with_socket(Op::Listen, (socket, facts), fd) };
        if let Err(answer) = self.judge_held(held, &call) {
            return Outcome::Answer(answer);
        }
        match &call.socket {
            Some((socket, facts)) if held.by_proxy => {
                let listens = proxy::listen(socket.as_fd(), backlog);
                if call.local.is_none()
                    && listens.is_ok()
                    && let Some(at) = Facts::of(socket.as_fd()).ok().and_then(|now| now.local)
                {
                    // It had no port before.
                    self.fence_listener(facts.cookie, at.port());
                }
                Outcome::Answer(answered(listens.map(|()| 0)))
            }
            _ => CONTINUE,
        }
    }

    /// Datagrams, each by its address; and fast open, which is a connect.
    pub(super) fn serve_send(
        &mut self,
        held: &Held,
        fd: i32,
        flags: i32,
        letters: &Letters,
        line: Option<Booked>,
    ) -> Outcome {
        let (socket, facts) = match self.found(held, fd) {
            Ok(found) => found,
            // Should it be exchanged for a TCP socket meanwhile, this flag would connect it.
            Err(Outcome::Answer(Answer::Continue)) if held.by_proxy && flags & libc::MSG_FASTOPEN != 0 => {
                return fail(libc::EOPNOTSUPP);
            }
            Err(outcome) => return outcome,
        };
        let stream = facts.protocol == Protocol::TCP;
        if stream && flags & libc::MSG_FASTOPEN == 0 {
            return CONTINUE; // the address is ignored
        }
        let mut copies: Vec<Message> = Vec::new();
        let mut judged: Vec<SocketAddr> = Vec::new();
        for n in 0..letters.count() {
            let name = if held.by_proxy {
                match letters.copy(held.tid(), n) {
                    Ok(copy) => {
                        copies.push(copy);
                        copies.last().map(|c| c.name.clone()).unwrap_or_default()
                    }
                    Err(errno) if copies.is_empty() => return fail(errno),
                    Err(_) => break,
                }
            } else {
                target::read_address(held.tid(), letters.name(held.tid(), n).0).unwrap_or_default()
            };
            if n == 0
                && let Some(answer) = self.heard_late(held, &name)
            {
                return Outcome::Answer(answer);
            }
            let named = match calls::address(&name) {
                Named::Address(named) => Some(named),
                Named::Unspecified if !stream && facts.domain == libc::AF_INET => {
                    calls::unspecified_as_v4(&name)
                }
                Named::Unspecified | Named::Nothing => None,
            };
            // A raw socket was judged when it was made.
            let Some(named) = named.map(canonical).filter(|_| facts.protocol != Protocol::RAW) else {
                continue;
            };
            if judged.contains(&named) {
                continue;
            }
            let op = if stream { Op::Connect } else { Op::Send };
            let Ok(copy) = socket.try_clone() else { return fail(libc::ENOBUFS) };
            let local = facts.local.filter(|a| a.port() != 0 || !a.ip().is_unspecified());
            let call = Call { local, remote: Some(named), ..with_socket(op, (copy, facts.clone()), fd) };
            if let Err(answer) = self.judge_held(held, &call) {
                if n == 0 {
                    return Outcome::Answer(answer);
                }
                // What stands before the refused one is sent, as by the kernel itself.
                copies.pop();
                break;
            }
            judged.push(named);
        }
        if held.by_proxy { self.send_for(held, socket, copies, flags, letters, line) } else { CONTINUE }
    }

    /// getaddrinfo(3) connects datagram sockets to each address it found, to learn which of ours would be used,
    /// and sends nothing (RFC 6724; glibc does so without its own exported connect). That is judged, and not
    /// counted as a flow that somebody wanted. `None`: it is no such call.
    fn judge_probe(&mut self, held: &Held, call: &Call) -> Option<Result<(), Answer>> {
        let facts = call.facts()?;
        let named = call.remote?;
        if named.port() == DNS || !self.shimmed.contains(&held.key) {
            return None;
        }
        let fresh = facts.local.is_none_or(|a| a.port() == 0) || facts.remote.is_none();
        let inside = || target::is_in_libc(held.tid(), held.call.instruction_pointer);
        if !fresh || facts.protocol != Protocol::UDP || !inside() {
            return None;
        }
        if !self.refresh(held.key, false) || !self.is_the_asker(held.key) {
            return None;
        }
        let context = self.context_of(held.key)?;
        let permitted = self.consider(&context, call).judgement.permitted;
        self.log.push(&Line {
            process: Some(&context),
            protocol: Some(call.protocol),
            remote: call.remote,
            reason: Some("the resolver asks which address it would use; nothing is sent"),
            generation: Some(self.generation_in_force()),
            ..Line::bare(realtime(), "probe", "guard")
        });
        if !permitted && self.mode_for(&context) == Mode::Enforce {
            return Some(Err(Answer::Fail(libc::EACCES)));
        }
        self.grant_call(call, None, false);
        Some(Ok(()))
    }

    /// Judges one call.
    pub(super) fn judge_held(&mut self, held: &Held, call: &Call) -> Result<Permit, Answer> {
        if self.was_judged(held, call) {
            self.grant_call(call, None, false);
            return Ok(Permit::default());
        }
        let mut reply = Reply::to(&Request::new(OpCode::Judge, 1));
        self.judge(held.key, call, &mut reply);
        if reply.errno != 0 {
            return Err(Answer::Fail(reply.errno));
        }
        let instead = Flags(reply.flags).has(Flags::REWRITE).then_some(reply.rewrite);
        Ok(Permit { seq: reply.audit_seq, instead })
    }

    /// Whether this very call has its verdict and its record: the shim has asked, or it is made again because a
    /// signal came in between, or to learn how it went.
    fn was_judged(&mut self, held: &Held, call: &Call) -> bool {
        let generation = self.generation_in_force();
        if held.by_proxy
            && let Some(ticket) = ticket(held.key, call, generation)
            && self.guards.asked.remove(&ticket)
        {
            return true;
        }
        let (Op::Connect, Protocol::TCP, Some((socket, facts))) = (call.op, call.protocol, &call.socket)
        else {
            return false;
        };
        if call.remote.is_some_and(|at| self.lanes.is_token_of(facts.cookie, at)) {
            return true; // the shim was told so
        }
        let same = |flow: &crate::serve::flows::Flow| {
            flow.context.key == held.key && flow.remote == call.remote && flow.generation == generation
        };
        let protected = self.lanes.of_cookie(facts.cookie).is_some();
        // TCP_CLOSE: a new attempt.
        (protected || self.flows.get(facts.cookie).is_some_and(same))
            && !matches!(proxy::tcp_state(socket.as_fd()), 0 | 7)
    }

    /// Whether a connection was judged when the guard took it from the queue.
    pub(in crate::serve) fn has_arrived(&self, key: ProcessKey, call: &Call) -> bool {
        let flow = call.facts().and_then(|f| self.flows.get(f.cookie));
        flow.is_some_and(|f| {
            f.op == Op::Accept && f.context.key == key && f.generation == self.generation_in_force()
        })
    }

    /// Notes that the shim was told to go on: the call comes next.
    pub(in crate::serve) fn expect_call(&mut self, key: ProcessKey, call: &Call) {
        if self.is_held_alone(key)
            && let Some(ticket) = ticket(key, call, self.generation_in_force())
        {
            if self.guards.asked.len() >= MOST {
                self.guards.asked.clear();
            }
            self.guards.asked.insert(ticket);
        }
    }

    /// Keeps an answer whose thread was interrupted: it may make the same call once more.
    pub(super) fn keep_unheard(&mut self, call: &Notification, answer: Answer) {
        let tid = call.pid.cast_signed();
        let Some(key) = self.by_pid.get(&tid).copied() else { return };
        if self.guards.unheard.len() >= MOST {
            self.guards.unheard.clear();
        }
        let named = std::mem::take(&mut self.guards.named);
        let unheard = Unheard { key, call: *call, named, answer, since: Instant::now() };
        self.guards.unheard.insert(tid, unheard);
    }

    /// The answer that this thread did not hear, if it makes the same call again.
    fn heard_late(&mut self, held: &Held, named: &[u8]) -> Option<Answer> {
        self.guards.named.clear();
        self.guards.named.extend_from_slice(named);
        let unheard = self.guards.unheard.remove(&held.tid())?;
        let same = unheard.key == held.key
            && (unheard.call.nr, unheard.call.args) == (held.call.nr, held.call.args)
            && unheard.named == named
            && unheard.since.elapsed() < FRESH;
        same.then_some(unheard.answer)
    }
}

impl Held {
    /// Whether it is the process's first thread, whose descriptors are the process's.
    pub(super) const fn is_first(&self) -> bool {
        self.tid() == self.key.pid
    }
}

fn ticket(key: ProcessKey, call: &Call, generation: u64) -> Option<Ticket> {
    let at = if call.op == Op::Bind { call.local } else { call.remote };
    Some(Ticket { key, op: call.op, cookie: call.facts()?.cookie, at, generation })
}

fn with_socket(op: Op, socket: (OwnedFd, Facts), number: i32) -> Call {
    let protocol = socket.1.protocol;
    let bound = socket.1.local.filter(|a| a.port() != 0 || !a.ip().is_unspecified());
    Call {
        op,
        protocol,
        local: bound,
        remote: None,
        socket: Some(socket),
        number,
        via: "guard",
        association: None,
    }
}

/// A result as the program gets it.
pub(super) fn answered(result: std::io::Result<i64>) -> Answer {
    match result {
        Ok(value) => Answer::Return(value),
        Err(error) => Answer::Fail(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

pub(super) fn canonical(a: SocketAddr) -> SocketAddr {
    match a.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), a.port()),
        IpAddr::V6(_) => a,
    }
}
