//! Doors and channels: who writes, and how much of the broker one user may have.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use nix::sys::socket::{Shutdown, SockFlag, accept4, getsockopt, shutdown, sockopt};
use portcullis_backstop::Holder;
use portcullis_policy::Policy;
use portcullis_types::Lack;
use portcullis_wire::{Flags, OpCode, Reply, Request};
use zerocopy::IntoBytes;

use super::{Broker, Process, Source};
use crate::{
    audit::{Line, More},
    process::{Context, Inspector, ProcessKey},
    sys::{
        has_ended,
        message::{self, Message, Writer, name_writers},
        pidfd_open,
        proc::ProcDir,
        realtime,
    },
};

/// What one user has of the broker.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Share {
    channels: usize,
    processes: usize,
    /// Refused newcomers since the last record about it.
    turned_away: u64,
}

/// What a run is called.
#[derive(Clone, Debug)]
pub(super) struct Named {
    pub(super) label: Rc<str>,
    /// Inode of its door, the processes' end.
    pub(super) door: u64,
}

/// One connection to a wrapped process.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    is_door: bool,
    /// Of a door that the supervisor has made for a run with a name: whoever holds its other end is of that run.
    pub(super) run: Option<Named>,
    /// User it is counted for.
    counted: u32,
    /// Event source.
    source: u64,
    /// Who wrote last.
    writer: Option<ProcessKey>,
}

/// How many messages of one channel are taken in a row, so that none starves the others.
const IN_A_ROW: usize = 2;

impl Broker {
    /// Takes new doors.
    pub(super) fn take_doors(&mut self) {
        use std::os::fd::AsRawFd;
        for _ in 0..64 {
            match accept4(self.doors.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Ok(number) => {
                    let socket = own(number);
                    let uid = getsockopt(&socket, sockopt::PeerCredentials).map_or(u32::MAX, |c| c.uid());
                    let _ = name_writers(socket.as_fd());
                    self.add_channel(socket, true, uid);
                }
                Err(nix::Error::EMFILE | nix::Error::ENFILE) => {
                    // Better cut off at once than left waiting: the shim refuses with a reason then.
                    let doors = self.doors.as_raw_fd();
                    self.spare.spend(|| {
                        if let Ok(number) = accept4(doors, SockFlag::SOCK_CLOEXEC) {
                            drop(own(number));
                        }
                    });
                    self.turned_away += 1;
                    if self.turned_away.is_power_of_two() {
                        let times = [("times", More::Number(self.turned_away))];
                        self.note("broker", "out of descriptors: a program was turned away", &times);
                    }
                    return;
                }
                Err(_) => return,
            }
        }
    }

    pub(super) fn add_channel(&mut self, socket: OwnedFd, is_door: bool, uid: u32) -> Option<u64> {
        let most = self.settings.limits.channels_per_user;
        let share = self.users.entry(uid).or_default();
        // The supervisor's doors are one for each run.
        if share.channels >= most && !(is_door && uid == self.owner) {
            share.turned_away += 1;
            // One record per power of two, so that a flood does not fill the log.
            if share.turned_away.is_power_of_two() {
                let count = share.turned_away;
                let reason = format!("user {uid} has {most} channels already; turned away");
                self.note("protocol", &reason, &[("times", More::Number(count))]);
            }
            return None;
        }
        let channel = self.watch.id();
        let source = self.watch.add(&socket, Source::Channel(channel)).ok()?;
        share.channels += 1;
        self.channels
            .insert(channel, Channel { socket, is_door, run: None, counted: uid, source, writer: None });
        Some(channel)
    }

    pub(super) fn close_channel(&mut self, id: u64) {
        if let Some(channel) = self.channels.remove(&id) {
            self.watch.remove(&channel.socket, channel.source);
            if let Some(writer) = channel.writer {
                self.drain(writer);
            }
            if let Some(share) = self.users.get_mut(&channel.counted) {
                share.channels = share.channels.saturating_sub(1);
            }
        }
    }

    /// Whose channel an event is about.
    pub(super) fn user_of(&self, source: u64) -> Option<u32> {
        match self.watch.sources.get(&source)? {
            Source::Channel(id) => self.channels.get(id).map(|c| c.counted),
            _ => None,
        }
    }

    /// Takes what is on a channel or door.
    pub(super) fn take_message(&mut self, id: u64) {
        for _ in 0..IN_A_ROW {
            let Some(channel) = self.channels.get(&id) else { return };
            match message::receive(channel.socket.as_fd()) {
                Ok(Some(message)) => self.hear(id, message),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(None) | Err(_) => return self.close_channel(id),
            }
        }
    }

    fn hear(&mut self, id: u64, mut message: Message) {
        let Some(channel) = self.channels.get(&id) else { return };
        let (is_door, counted) = (channel.is_door, channel.counted);
        let decoded = if message.truncated || message.attached.len() > 1 {
            Err("frame too long, or with too many descriptors".to_owned())
        } else {
            Request::decode(message.bytes()).map_err(|error| error.to_string())
        };
        let (opcode, request) = match decoded {
            Ok(decoded) => decoded,
            Err(reason) => return self.malformed(id, message.writer, &reason),
        };
        if is_door != (opcode == OpCode::Open) {
            let place = if is_door { "door" } else { "channel" };
            return self.malformed(id, message.writer, &format!("request {opcode:?} on a {place}"));
        }
        if opcode == OpCode::Open {
            let Some(end) = message.attached.pop() else {
                return self.malformed(id, message.writer, "request Open without a channel");
            };
            return self.open_channel(&request, end, message.writer.map_or(counted, |w| w.uid));
        }
        let Some(writer) = message.writer else {
            // Sent before the kernel was told to name writers: the shim did not wait for the first reply.
            return self.malformed(id, None, "the kernel does not name the writer");
        };
        let pidfd = message.pidfd.take().filter(|_| !self.without.has(Lack::PidfdOfWriter));
        let is_nameless = pidfd.is_none();
        let Some(key) = self.identify(writer, pidfd) else {
            // It has ended since, or may not be looked at.
            let mut reply = Reply::to(&request);
            reply.errno = libc::EACCES;
            return self.send(id, &reply, &[]);
        };
        // The kernel gives none of a process that has gone either.
        self.nameless |= is_nameless;
        if let Some(channel) = self.channels.get_mut(&id) {
            channel.writer = Some(key);
        }
        self.answer(id, key, opcode, &request, message.attached.pop());
    }

    fn open_channel(&mut self, request: &Request, end: OwnedFd, uid: u32) {
        use nix::sys::socket::{AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname};
        use std::os::fd::AsRawFd;
        let unix = getsockname::<SockaddrStorage>(end.as_raw_fd())
            .is_ok_and(|a| a.family() == Some(AddressFamily::Unix));
        let packets = getsockopt(&end, sockopt::SockType).is_ok_and(|t| t == SockType::SeqPacket);
        if !unix || !packets || name_writers(end.as_fd()).is_err() {
            return;
        }
        if let Some(id) = self.add_channel(end, false, uid) {
            let mut reply = Reply::to(request);
            reply.seq = 0;
            self.send(id, &reply, &[]);
        }
    }

    fn answer(
        &mut self,
        id: u64,
        key: ProcessKey,
        opcode: OpCode,
        request: &Request,
        attached: Option<OwnedFd>,
    ) {
        let mut reply = Reply::to(request);
        reply.generation = self.generation_in_force();
        match opcode {
            OpCode::Judge => {
                self.begin_asking_by_shim(key);
                self.judge_frame(key, request, attached, &mut reply);
                // A sender of datagrams needs the state page: it remembers its peers for one generation.
                let sends = request.call == portcullis_types::Op::Send as u8 && reply.errno == 0;
                // So does one that asks again how its protected connect went.
                let waits = Flags(reply.flags).has(Flags::REWRITE) && reply.errno == 0;
                if Flags(request.flags).has(Flags::WANT_MEMORY)
                    && (Flags(reply.flags).has(Flags::CACHED) || sends || waits)
                    && let Some([state, table, ring]) = self.memory_of(key)
                {
                    reply.flags |= Flags::MEMORY;
                    return self.send(id, &reply, &[state.as_fd(), table.as_fd(), ring.as_fd()]);
                }
                self.send(id, &reply, &[]);
            }
            OpCode::Flush => {
                self.drain(key);
                self.flush_log();
                reply.audit_seq = self.log.seq();
                self.send(id, &reply, &[]);
            }
            OpCode::Changed => {
                self.refresh(key, true);
                self.send(id, &reply, &[]);
            }
            OpCode::Name => {
                self.name_frame(key, request, attached, &mut reply);
                self.send(id, &reply, &[]);
            }
            OpCode::Doorbell => {
                self.drain(key);
                self.busy.insert(key);
            }
            OpCode::Outcome => self.record_outcome(key, request, "shim"),
            OpCode::Open => {}
        }
    }

    fn send(&mut self, id: u64, reply: &Reply, attached: &[BorrowedFd<'_>]) {
        let Some(channel) = self.channels.get(&id) else { return };
        if message::send(channel.socket.as_fd(), reply.as_bytes(), attached).is_err() {
            self.close_channel(id);
        }
    }

    /// Puts a broken frame on record and closes its channel.
    fn malformed(&mut self, id: u64, writer: Option<Writer>, reason: &str) {
        let context = writer
            .and_then(|w| self.identify(w, None))
            .and_then(|key| self.processes.get(&key))
            .map(|p| Rc::clone(&p.context));
        self.log.push(&Line {
            process: context.as_deref(),
            verdict: Some("refuse"),
            reason: Some(reason),
            ..Line::bare(realtime(), "protocol", "shim")
        });
        // The supervisor holds this end of a door too: its programs must learn that nobody reads there.
        if let Some(door) = self.channels.get(&id).filter(|c| c.is_door) {
            let _ = shutdown(std::os::fd::AsRawFd::as_raw_fd(&door.socket), Shutdown::Both);
        }
        self.close_channel(id);
    }

    /// The process that wrote a message. `None`: it has ended, or must not be served.
    pub(super) fn identify(&mut self, writer: Writer, pidfd: Option<OwnedFd>) -> Option<ProcessKey> {
        if writer.pid <= 0 {
            return None; // of a process namespace that this one cannot see
        }
        if let Some(key) = self.by_pid.get(&writer.pid).copied() {
            // While it lives, nobody else can have its number.
            if self.processes.get(&key).is_some_and(|p| !has_ended(p.pidfd.as_fd())) {
                return Some(key);
            }
            self.bury(key);
        }
        let named = pidfd.is_some();
        let pidfd = match pidfd {
            Some(pidfd) => pidfd,
            None => pidfd_open(writer.pid).ok()?,
        };
        let at = ProcDir::open(writer.pid).ok()?;
        // Before Linux 6.5 the number alone came: whoever has it by now must at least be the same user.
        if !named && at.credentials().ok()?.real != writer.uid {
            return None;
        }
        let context = self.read_context(writer.pid, pidfd.as_fd(), &at)?;
        let key = context.key;
        let most = self.settings.limits.processes_per_user;
        let share = self.users.entry(writer.uid).or_default();
        if share.processes >= most {
            share.turned_away += 1;
            if share.turned_away.is_power_of_two() {
                let count = share.turned_away;
                let reason = format!("user {} has {most} processes here already; refused", writer.uid);
                self.note("protocol", &reason, &[("times", More::Number(count))]);
            }
            return None;
        }
        let source = self.watch.add(&pidfd, Source::Process(key)).ok()?;
        share.processes += 1;
        self.by_pid.insert(writer.pid, key);
        self.processes.insert(
            key,
            Process {
                pidfd,
                at,
                context: Rc::new(context),
                memory: None,
                learned: None,
                seen: None,
                counted: writer.uid,
                source,
                since: realtime(),
                permitted: 0,
                refused: 0,
            },
        );
        Some(key)
    }

    /// Who a process is, and under whose policies.
    pub(super) fn read_context(&mut self, pid: i32, pidfd: BorrowedFd<'_>, at: &ProcDir) -> Option<Context> {
        let context = self.inspector.read(pid, pidfd, at)?;
        Some(Context { under: self.under(context.key), ..context })
    }

    /// Takes leave of a process that has ended: what is left in its ring is written, and what the kernel says of it.
    pub(super) fn bury(&mut self, key: ProcessKey) {
        self.drain(key);
        self.drain_backstop();
        let Some(process) = self.processes.remove(&key) else { return };
        self.watch.remove(&process.pidfd, process.source);
        if self.by_pid.get(&key.pid) == Some(&key) {
            self.by_pid.remove(&key.pid);
        }
        if let Some(share) = self.users.get_mut(&process.counted) {
            share.processes = share.processes.saturating_sub(1);
        }
        self.busy.remove(&key);
        self.forget_grants(key);
        self.forget_held(key);
        self.forget_datagrams(key);
        self.forget_seen(key);
        self.turned_down.retain(|_, context| context.key != key);
    }

    /// Makes sure that what is known of a process is still so; with `anew` reads it in any case.
    /// `false`: the process is gone.
    pub(super) fn refresh(&mut self, key: ProcessKey, anew: bool) -> bool {
        let now = self.look_at(key);
        self.refresh_as(key, anew, now)
    }

    /// As [`Self::refresh`]; `now` is what the kernel said before: what changes meanwhile shows the next time.
    pub(super) fn refresh_as(&mut self, key: ProcessKey, anew: bool, now: Option<Holder>) -> bool {
        let by_groups = self.policies().any(Policy::uses_process_groups);
        let Some(process) = self.processes.get_mut(&key) else { return false };
        let same = now.is_some() && now == process.seen && !by_groups;
        let current = |process: &Process| match same {
            true => Inspector::is_current_file(&process.context, &process.at),
            false => Inspector::is_current(&process.context, &process.at),
        };
        if !anew && current(process) {
            process.seen = now.filter(|n| n.uid == process.context.credentials.uid);
            return true;
        }
        // By the old context.
        self.drain(key);
        self.drain_backstop();
        let Some(process) = self.processes.get_mut(&key) else { return false };
        let Some(mut context) = self.inspector.read(key.pid, process.pidfd.as_fd(), &process.at) else {
            return false;
        };
        context.under = self.under(key);
        let Some(process) = self.processes.get_mut(&key) else { return false };
        if (&context.facts, &context.under) != (&process.context.facts, &process.context.under)
            && let Some(memory) = &mut process.memory
        {
            memory.clear(self.in_force.as_ref().map_or(0, |f| f.generation));
        }
        process.learned = None;
        process.seen = now.filter(|n| n.uid == context.credentials.uid);
        process.context = Rc::new(context);
        true
    }
}

fn own(number: i32) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: accept4(2) has just returned it; nobody else has it.
    #[expect(unsafe_code, reason = "nix returns a number")]
    unsafe {
        OwnedFd::from_raw_fd(number)
    }
}
