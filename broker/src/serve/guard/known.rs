//! Connects that need no new verdict: the region of an earlier one covers them.
//!
//! What the verdict was given to must be what calls now. The process's memory is kept open from before its context was
//! last seen to be true: memory goes with execve(2), so that it can still be read says that the image is the same, but
//! where another process has a share in it, which is looked at; the user is asked for. Under the backstop the kernel
//! checks all of this again, and puts the call on record itself.

use std::{
    fs::File,
    net::SocketAddr,
    os::{fd::AsFd, unix::fs::FileExt},
};

use portcullis_guard::{book::Line, listener::Notification};
use portcullis_policy::Policy;
use portcullis_types::{Assurance, Op, Protocol, RuleId, Verdict};
use portcullis_wire::{Addr, Flags, OpCode, Reply, Request, shared::Entry};

use super::{CONTINUE, Held, Outcome, judging::canonical};
use crate::{
    decide::Judgement,
    guard::{
        calls::{self, Asked, Named, Span},
        target,
    },
    process::{Inspector, ProcessKey},
    serve::{
        Broker, RuleText,
        judge::{Call, Finding},
    },
    sys::{
        has_ended, pidfd_getfd,
        socket::{Facts, StreamCookies},
    },
};

/// Most regions of one process.
const MOST: usize = 64;
/// Most threads that are known to be of a process, beside its first.
const THREADS: usize = 1 << 16;

/// What a process need not ask for again.
#[derive(Debug)]
pub(in crate::serve) struct Learned {
    memory: File,
    generation: u64,
    /// With the rule that each was permitted by.
    regions: Vec<(Entry, Option<RuleText>)>,
}

impl Broker {
    /// Notes the region of a verdict.
    pub(in crate::serve) fn learn(&mut self, key: ProcessKey, entry: Entry, rule: Option<RuleText>) {
        let generation = self.generation_in_force();
        let Some(process) = self.processes.get_mut(&key) else { return };
        let current =
            process.learned.as_ref().is_some_and(|l| l.generation == generation && l.regions.len() < MOST);
        if !current {
            // First the memory, then the look at who has it.
            let Ok(memory) = process.at.memory() else { return };
            let parent = process.context.ancestors.first().map_or(0, |a| a.key.pid);
            let own = !target::share_memory(key.pid, parent);
            if !own || !Inspector::is_current(&process.context, &process.at) {
                return;
            }
            process.learned = Some(Learned { memory, generation, regions: Vec::new() });
        }
        if self.grant_region(&entry)
            && let Some(learned) = self.processes.get_mut(&key).and_then(|p| p.learned.as_mut())
        {
            learned.regions.push((entry, rule));
        }
    }

    /// The process that a thread belongs to, if it is known to.
    pub(super) fn thread_of(&self, tid: i32) -> Option<ProcessKey> {
        let first = self.by_pid.get(&tid);
        let key = *first.or_else(|| self.guards.threads.get(&tid))?;
        let process = self.processes.get(&key)?;
        let lives = !has_ended(process.pidfd.as_fd()) && (first.is_some() || process.at.has_thread(tid));
        lives.then_some(key)
    }

    /// Remembers a thread.
    pub(super) fn know_thread(&mut self, tid: i32, key: ProcessKey) {
        if tid != key.pid {
            if self.guards.threads.len() >= THREADS {
                self.guards.threads.clear();
            }
            self.guards.threads.insert(tid, key);
        }
    }

    /// Serves a connect by what is known. `None`: it has to be judged.
    pub(super) fn serve_known(
        &mut self,
        tree: u64,
        by_proxy: bool,
        call: &Notification,
        line: Option<Line>,
    ) -> Option<Outcome> {
        let Asked::Connect { fd, address } = calls::asked(call) else { return None };
        let tid = call.pid.cast_signed();
        // Of one that has ended there is no memory to read any more.
        let key = self.by_pid.get(&tid).copied().or_else(|| self.thread_of(tid))?;
        let held = Held { tree, call: *call, key, by_proxy };
        // A thread with descriptors of its own is looked at closely.
        if by_proxy && !held.is_first() {
            return None;
        }
        let generation = self.generation_in_force();
        self.in_force.as_ref()?;
        if self.policies().any(Policy::uses_process_groups) || self.refuses_for_log() {
            return None;
        }
        let process = self.processes.get(&key)?;
        let learned = process.learned.as_ref().filter(|l| l.generation == generation)?;
        let bytes = read(&learned.memory, address)?;
        let Named::Address(named) = calls::address(&bytes) else { return None };
        let named = canonical(named);
        let (entry, told) = learned.regions.iter().find(|(entry, _)| covers(entry, named)).cloned()?;
        if process.at.owner().ok()? != process.context.credentials.uid {
            return None;
        }
        // Memory that another process shares (clone(2), CLONE_VM) goes on when this one calls execve(2).
        let has_become_another = || {
            target::read_address(tid, address).as_ref() != Ok(&bytes)
                || !Inspector::is_current_file(&process.context, &process.at)
        };
        if by_proxy && has_become_another() {
            return None;
        }
        let socket = pidfd_getfd(process.pidfd.as_fd(), fd).ok()?;
        let cookies = StreamCookies::of(socket.as_fd()).ok()?;
        let fresh = cookies.namespace == self.namespace && self.flows.get(cookies.socket).is_none();
        if !fresh {
            return None;
        }
        self.forget_interrupted(key);
        if self.guards.unheard.contains_key(&held.tid()) || self.guards.has_ticket_of(key) {
            return None;
        }
        if !by_proxy {
            // The region was granted, and the kernel puts it on record.
            return Some(CONTINUE);
        }
        let facts = Facts::of_stream(socket.as_fd(), &cookies).ok()?;
        let context = self.context_of(key)?;
        let judgement = Judgement {
            permitted: true,
            verdict: Verdict::Permit,
            rule: (entry.rule != u32::MAX).then_some(RuleId(entry.rule)),
            assurance: Assurance::try_from(entry.assurance).unwrap_or(Assurance::Address),
            reason: None,
            ..Judgement::refusal(String::new())
        };
        let call = Call {
            op: Op::Connect,
            protocol: Protocol::TCP,
            local: facts.local.filter(|a| a.port() != 0),
            remote: Some(named),
            socket: Some((socket, facts)),
            number: fd,
            association: None,
            via: "guard",
        };
        let mut reply = Reply::to(&Request::new(OpCode::Judge, 1));
        reply.flags |= Flags::CACHED;
        self.settle(
            key,
            &context,
            &call,
            Finding { known: true, told, ..Finding::of(judgement) },
            &mut reply,
        );
        if reply.errno != 0 {
            return Some(super::fail(reply.errno));
        }
        let (socket, _) = call.socket?;
        // If a signal comes in between, the call is made again, and known by its address.
        self.guards.named.clone_from(&bytes);
        Some(self.connect_for(&held, socket, bytes, reply.audit_seq, line))
    }
}

fn read(memory: &File, address: Span) -> Option<Vec<u8>> {
    let mut bytes = [0; calls::ADDRESS];
    let room = bytes.get_mut(..usize::try_from(address.length).ok()?)?;
    let got = memory.read_at(room, address.at).ok()?;
    (got > 0 && got == room.len()).then(|| room.to_vec())
}

fn covers(entry: &Entry, named: SocketAddr) -> bool {
    let shape = entry.shape;
    let mask = u128::MAX.checked_shl(128 - u32::from(shape.prefix.min(128))).unwrap_or(0);
    shape.call == Op::Connect as u8
        && shape.protocol == Protocol::TCP.0
        && (Addr::from(named).key() ^ entry.addr) & mask == 0
        && (entry.port_low..=entry.port_high).contains(&named.port())
}

#[cfg(test)]
mod tests {
    use portcullis_wire::shared::Shape;

    use super::*;

    #[test]
    fn a_region_covers_its_prefix_and_its_ports() {
        let addr = Addr::from("192.0.2.0:0".parse::<SocketAddr>().unwrap()).key();
        let shape = Shape { call: Op::Connect as u8, protocol: Protocol::TCP.0, prefix: 96 + 24 };
        let entry = Entry { shape, addr, port_low: 80, port_high: 81, rule: 0, assurance: 0, noted: false };
        let at = |text: &str| covers(&entry, text.parse().unwrap());
        assert!(at("192.0.2.0:80") && at("192.0.2.255:81"));
        assert!(!at("192.0.3.0:80") && !at("192.0.2.1:82") && !at("[2001:db8::1]:80"));
        let all = Entry { shape: Shape { prefix: 0, ..shape }, addr: 0, ..entry };
        assert!(covers(&all, "[2001:db8::1]:80".parse().unwrap()));
        assert!(!covers(
            &Entry { shape: Shape { protocol: 17, ..shape }, ..entry },
            "192.0.2.1:80".parse().unwrap()
        ));
    }

    #[test]
    fn memory_that_went_with_an_exec_is_read_no_more() {
        let mut command = std::process::Command::new("/bin/sh");
        command.args(["-c", "read x; exec sleep 60"]).stdin(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let pid = child.id().cast_signed();
        let maps = || std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        while !maps().contains("[stack]") || !maps().contains("/sh") && !maps().contains("dash") {
            std::thread::yield_now();
        }
        let stack = maps().lines().find(|l| l.ends_with("[stack]")).unwrap().to_owned();
        let low =
            u64::from_str_radix(stack.split('-').nth(1).unwrap().split(' ').next().unwrap(), 16).unwrap();
        let at = crate::sys::proc::ProcDir::open(pid).unwrap();
        let memory = at.memory().unwrap();
        let span = Span { at: low - 64, length: 16 };
        assert!(read(&memory, span).is_some());
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"\n").unwrap();
        while !std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap().starts_with("sleep") {
            std::thread::yield_now();
        }
        assert!(read(&memory, span).is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
