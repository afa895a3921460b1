//! Serves the guard: system calls that the kernel holds until the broker has judged them.
//!
//! A held call is judged on a copy of its arguments, by the same path as the shim's questions. If it may go on
//! it does so in the kernel, which reads its arguments again, so it is let through to the backstop for
//! exactly the socket and address that were judged: whatever another thread has put there meanwhile,
//! the backstop judges the kernel's own copy. So nothing is done on a program's behalf, no credentials
//! are lent, and no call blocks here.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use portcullis_guard::listener::{self, Answer, Notification};
use portcullis_types::{Op, Protocol};
use portcullis_wire::{Flags, OpCode, Reply, Request};

use super::{Broker, Source, judge::Call};
use crate::{
    Mode,
    audit::Line,
    guard::{
        calls::{self, Asked, Named, Span, asked},
        target,
    },
    process::ProcessKey,
    sys::{has_ended, message::Writer, pidfd_getfd, realtime, socket::Facts},
};

/// How many held calls of one tree are answered in a row, so that none starves the others.
const IN_A_ROW: usize = 16;
/// Port of the domain name system, whose sockets are connected in order to send.
const DNS: u16 = 53;

/// One tree's listener.
#[derive(Debug)]
pub(super) struct Guard {
    listener: OwnedFd,
    source: u64,
}

impl Broker {
    pub(super) fn add_guard(&mut self, listener: OwnedFd) {
        let _ = listener::wake_synchronously(listener.as_fd());
        let id = self.watch.id();
        match self.watch.add(&listener, Source::Guard(id)) {
            Ok(source) => {
                self.guards.insert(id, Guard { listener, source });
            }
            Err(error) => self.note("broker", &format!("a program's calls cannot be served: {error}"), &[]),
        }
    }

    /// Answers held calls of one tree.
    pub(super) fn take_held(&mut self, id: u64) {
        for _ in 0..IN_A_ROW {
            let Some(guard) = self.guards.get(&id) else { return };
            let mut one = [PollFd::new(guard.listener.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut one, PollTimeout::ZERO);
            let events = one.first().and_then(PollFd::revents).unwrap_or(PollFlags::empty());
            if ready.is_err() || !events.contains(PollFlags::POLLIN) {
                if events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)
                    && let Some(guard) = self.guards.remove(&id)
                {
                    self.watch.remove(&guard.listener, guard.source);
                }
                return;
            }
            // ENOENT: the caller was killed or interrupted meanwhile.
            let Ok(call) = listener::receive(guard.listener.as_fd()) else { continue };
            let answer = self.answer_held(id, &call);
            let Some(guard) = self.guards.get(&id) else { return };
            let _gone = match answer {
                Held::Answer(answer) => listener::answer(guard.listener.as_fd(), call.id, answer),
                Held::Descriptor(fd) => {
                    listener::answer_with_descriptor(guard.listener.as_fd(), call.id, fd.as_fd(), true)
                        .map(drop)
                }
            };
        }
    }

    /// Whether what was read of the caller was read of that caller.
    fn still_held(&self, id: u64, call: &Notification) -> bool {
        self.guards.get(&id).is_some_and(|g| listener::is_waiting(g.listener.as_fd(), call.id))
    }

    fn answer_held(&mut self, id: u64, call: &Notification) -> Held {
        const REFUSED: Held = Held::Answer(Answer::Fail(libc::EACCES));
        let tid = call.pid.cast_signed();
        if tid <= 0 {
            return REFUSED; // of a process namespace that this one cannot see
        }
        self.begin_asking(tid);
        // A process that is known and lives has its number to itself: then the thread is its first.
        let known = self.by_pid.get(&tid).and_then(|key| self.processes.get(key));
        let asker = match known {
            Some(process) if !has_ended(process.pidfd.as_fd()) => Some((tid, process.counted, 0)),
            _ => target::process_of(tid),
        };
        let Some((pid, uid, gid)) = asker else { return REFUSED };
        let what = asked(call);
        match what {
            Asked::Trace { request, pid } => return self.judge_trace(id, call, request, pid),
            Asked::Memory { pid } => return self.judge_reach(id, call, pid),
            Asked::TakeDescriptor { pidfd, number } => return self.take_for(id, call, pid, pidfd, number),
            Asked::Unknown => return REFUSED,
            _ => {}
        }
        let Some(key) = self.identify(Writer { pid, uid, gid }, None) else { return REFUSED };
        if !self.still_held(id, call) {
            return REFUSED;
        }
        match what {
            Asked::Socket { domain, kind, protocol } => {
                let protocol = calls::protocol_of(domain, kind, protocol);
                let call = held_call(Op::Socket, protocol, -1);
                self.judge_held(key, &call)
            }
            Asked::Connect { fd, address } => self
                .judge_probe(key, call, fd, address)
                .unwrap_or_else(|| self.judge_named(key, tid, fd, address, Op::Connect)),
            Asked::Bind { fd, address } => self.judge_named(key, tid, fd, address, Op::Bind),
            Asked::Listen { fd } => {
                let Some(socket) = self.internet_socket(key, fd) else { return CONTINUE };
                let local = socket.1.local.filter(|a| a.port() != 0);
                self.judge_held(key, &Call { local, ..with_socket(Op::Listen, socket, fd) })
            }
            // Who arrives was filtered by the kernel on behalf of the listener.
            Asked::Accept { .. } => CONTINUE,
            Asked::SendTo { fd, flags, address } => self.judge_send(key, tid, fd, flags, &[address]),
            Asked::SendMessage { fd, flags, at } => {
                let name = read_name(tid, at);
                self.judge_send(key, tid, fd, flags, &[name])
            }
            Asked::SendMessages { fd, flags, at, count } => {
                let names: Vec<Span> =
                    (0..count).map(|n| read_name(tid, at.saturating_add(n.saturating_mul(64)))).collect();
                self.judge_send(key, tid, fd, flags, &names)
            }
            _ => REFUSED,
        }
    }

    /// The socket behind a descriptor, if it is an internet one. All else is not judged here, and
    /// should it be exchanged for an internet socket meanwhile, the backstop has no grant for that.
    fn internet_socket(&self, key: ProcessKey, fd: i32) -> Option<(OwnedFd, Facts)> {
        let process = self.processes.get(&key)?;
        let socket = pidfd_getfd(process.pidfd.as_fd(), fd).ok()?;
        let facts = Facts::of(socket.as_fd()).ok()?;
        [libc::AF_INET, libc::AF_INET6].contains(&facts.domain).then_some((socket, facts))
    }

    fn judge_named(&mut self, key: ProcessKey, tid: i32, fd: i32, address: Span, op: Op) -> Held {
        let Some(socket) = self.internet_socket(key, fd) else { return CONTINUE };
        let bytes = target::read_address(tid, address);
        let named = match calls::address(&bytes) {
            Named::Address(named) => named,
            Named::Unspecified if op == Op::Bind => match calls::unspecified_as_v4(&bytes) {
                Some(named) => named,
                None => return CONTINUE,
            },
            // Disconnecting, or an error that the kernel tells itself.
            Named::Unspecified | Named::Nothing => return CONTINUE,
        };
        let named = canonical(named);
        let bound = socket.1.local.filter(|a| a.port() != 0 || !a.ip().is_unspecified());
        let (local, remote) = if op == Op::Bind { (Some(named), None) } else { (bound, Some(named)) };
        self.judge_held(key, &Call { local, remote, ..with_socket(op, socket, fd) })
    }

    /// getaddrinfo(3) connects datagram sockets to each address it found, to learn which of ours would be used,
    /// and sends nothing (RFC 6724; glibc does so without its own exported connect). That is judged, and not
    /// counted as a flow that somebody wanted. `None`: it is no such call.
    fn judge_probe(&mut self, key: ProcessKey, held: &Notification, fd: i32, address: Span) -> Option<Held> {
        let tid = held.pid.cast_signed();
        let Named::Address(named) = calls::address(&target::read_address(tid, address)) else { return None };
        if named.port() == DNS || !self.shimmed.contains(&key) {
            return None;
        }
        let socket = self.internet_socket(key, fd)?;
        let fresh = socket.1.local.is_none_or(|a| a.port() == 0) || socket.1.remote.is_none();
        if !fresh || socket.1.protocol != Protocol::UDP || !target::is_in_libc(tid, held.instruction_pointer)
        {
            return None;
        }
        let call = Call { remote: Some(canonical(named)), ..with_socket(Op::Connect, socket, fd) };
        if !self.refresh(key, false) || !self.is_the_asker(key) {
            return None;
        }
        let context = self.context_of(key)?;
        let permitted = self.consider(&context, &call).judgement.permitted;
        self.log.push(&Line {
            process: Some(&context),
            protocol: Some(call.protocol),
            remote: call.remote,
            reason: Some("the resolver asks which address it would use; nothing is sent"),
            generation: Some(self.generation_in_force()),
            ..Line::bare(realtime(), "probe", "guard")
        });
        if !permitted && self.mode == Mode::Enforce {
            return Some(Held::Answer(Answer::Fail(libc::EACCES)));
        }
        self.grant_call(&call, false);
        Some(CONTINUE)
    }

    /// Datagrams, each by its address; and fast open, which is a connect.
    fn judge_send(&mut self, key: ProcessKey, tid: i32, fd: i32, flags: i32, names: &[Span]) -> Held {
        let mut judged: Vec<SocketAddr> = Vec::new();
        for name in names {
            if name.at == 0 || name.length == 0 {
                continue;
            }
            let Some(socket) = self.internet_socket(key, fd) else { return CONTINUE };
            let stream = socket.1.protocol == Protocol::TCP;
            if stream && flags & libc::MSG_FASTOPEN == 0 {
                continue; // the address is ignored
            }
            if socket.1.protocol == Protocol::RAW {
                continue; // judged when it was made
            }
            let bytes = target::read_address(tid, *name);
            let named = match calls::address(&bytes) {
                Named::Address(named) => named,
                Named::Unspecified if !stream && socket.1.domain == libc::AF_INET => {
                    match calls::unspecified_as_v4(&bytes) {
                        Some(named) => named,
                        None => continue,
                    }
                }
                Named::Unspecified | Named::Nothing => continue,
            };
            let named = canonical(named);
            if judged.contains(&named) {
                continue;
            }
            let op = if stream { Op::Connect } else { Op::Send };
            let local = socket.1.local.filter(|a| a.port() != 0 || !a.ip().is_unspecified());
            let call = Call { local, remote: Some(named), ..with_socket(op, socket, fd) };
            let held = self.judge_held(key, &call);
            if !matches!(held, Held::Answer(Answer::Continue)) {
                // What stands before the refused one is sent, as by the kernel itself.
                return if judged.is_empty() { held } else { CONTINUE };
            }
            judged.push(named);
        }
        CONTINUE
    }

    fn judge_held(&mut self, key: ProcessKey, call: &Call) -> Held {
        let mut reply = Reply::to(&Request::new(OpCode::Judge, 1));
        self.judge(key, call, &mut reply);
        if reply.errno != 0 {
            return Held::Answer(Answer::Fail(reply.errno));
        }
        if Flags(reply.flags).has(Flags::REWRITE) {
            // A protected flow needs another address than the program gave, and the kernel reads it again.
            return Held::Answer(Answer::Fail(libc::ECONNREFUSED));
        }
        CONTINUE
    }

    /// Whether a process is in a wrapped tree: it runs under this filter, so its own calls came here, or a
    /// parent's did.
    fn is_wrapped(&mut self, pid: i32) -> bool {
        let Some((pid, ..)) = target::process_of(pid) else { return false };
        self.enclosed(pid)
    }

    fn judge_trace(&mut self, id: u64, call: &Notification, request: i64, pid: i32) -> Held {
        // PTRACE_TRACEME: the parent, who could trace anyway, is told of it.
        if request == i64::from(libc::PTRACE_TRACEME) {
            return CONTINUE;
        }
        self.judge_reach(id, call, pid)
    }

    /// Into processes of the tree only: another's sockets are outside the boundary.
    fn judge_reach(&mut self, id: u64, call: &Notification, pid: i32) -> Held {
        let inside = self.is_wrapped(pid);
        if inside && self.still_held(id, call) { CONTINUE } else { Held::Answer(Answer::Fail(libc::EPERM)) }
    }

    /// pidfd_getfd(2), on a copy of the pidfd, so that it cannot be exchanged meanwhile.
    fn take_for(&mut self, id: u64, call: &Notification, pid: i32, pidfd: i32, number: i32) -> Held {
        let refused = Held::Answer(Answer::Fail(libc::EPERM));
        let taken = (|| {
            let caller = crate::sys::pidfd_open(pid).ok()?;
            let copy = pidfd_getfd(caller.as_fd(), pidfd).ok()?;
            let whose = {
                use std::os::fd::AsRawFd;
                target::behind_pidfd(std::process::id().cast_signed(), copy.as_raw_fd())?
            };
            // We may look into every process; the caller only into those of its own user.
            let (_, theirs, _) = target::process_of(whose)?;
            let (_, its, _) = target::process_of(pid)?;
            if !self.is_wrapped(whose) || (its != 0 && its != theirs) {
                return None;
            }
            Some(pidfd_getfd(copy.as_fd(), number))
        })();
        if !self.still_held(id, call) {
            return refused;
        }
        match taken {
            Some(Ok(fd)) => Held::Descriptor(fd),
            Some(Err(error)) => Held::Answer(Answer::Fail(error.raw_os_error().unwrap_or(libc::EPERM))),
            None => refused,
        }
    }
}

/// What becomes of a held call.
enum Held {
    Answer(Answer),
    /// This descriptor is its result.
    Descriptor(OwnedFd),
}

const CONTINUE: Held = Held::Answer(Answer::Continue);

fn read_name(tid: i32, at: u64) -> Span {
    let mut header = [0; 16];
    match target::read(tid, at, &mut header) {
        Ok(16) => calls::message_name(&header).unwrap_or(Span { at: 0, length: 0 }),
        _ => Span { at: 0, length: 0 },
    }
}

fn held_call(op: Op, protocol: Protocol, number: i32) -> Call {
    Call { op, protocol, local: None, remote: None, socket: None, number, via: "guard" }
}

fn with_socket(op: Op, socket: (OwnedFd, Facts), number: i32) -> Call {
    let protocol = socket.1.protocol;
    Call { socket: Some(socket), ..held_call(op, protocol, number) }
}

fn canonical(a: SocketAddr) -> SocketAddr {
    match a.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), a.port()),
        IpAddr::V6(_) => a,
    }
}
