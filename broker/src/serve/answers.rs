//! The control socket: one JSON object in, one out, see [`crate::control`].

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    rc::Rc,
    time::Duration,
};

use jiff::Timestamp;
use nix::sys::{
    epoll::{EpollEvent, EpollFlags},
    socket::{MsgFlags, SockFlag, accept4, getsockopt, recv, send, sockopt},
};

use super::{Broker, Source, coverage::summary, flows::Flow, lanes::Peer};
use crate::{
    control::{Answer, AssociationRow, ListenerRow, ProcessRow, Request, Response, Status},
    escape::sentence,
    process::{Context, ProcessKey},
    sys::{proc::ProcDir, realtime},
};

/// Longest request, in bytes.
const LONGEST: usize = 64 * 1024;
/// Most clients at once.
const MOST: usize = 64;

/// One command that asks.
#[derive(Debug)]
pub(super) struct Client {
    socket: OwnedFd,
    source: u64,
    heard: Vec<u8>,
    to_say: Vec<u8>,
}

impl Broker {
    pub(super) fn take_clients(&mut self) {
        while let Ok(number) =
            accept4(self.control.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)
        {
            // SAFETY: accept4(2) has just returned it; nobody else has it.
            #[expect(unsafe_code, reason = "nix returns a number")]
            let socket = unsafe { OwnedFd::from_raw_fd(number) };
            let uid = getsockopt(&socket, sockopt::PeerCredentials).map_or(u32::MAX, |c| c.uid());
            if self.clients.len() >= MOST || (uid != 0 && uid != self.owner) {
                continue;
            }
            let id = self.watch.id();
            let Ok(source) = self.watch.add(&socket, Source::Client(id)) else { continue };
            self.clients.insert(id, Client { socket, source, heard: Vec::new(), to_say: Vec::new() });
        }
    }

    pub(super) fn take_client(&mut self, id: u64, events: EpollFlags) {
        let mut lines = Vec::new();
        let mut alive = !events.intersects(EpollFlags::EPOLLERR);
        if let Some(client) = self.clients.get_mut(&id)
            && events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP)
        {
            alive &= client.listen(&mut lines);
        }
        for line in lines {
            let response = match serde_json::from_slice::<Request>(&line) {
                Ok(request) => self.answer_command(&request),
                Err(error) => Response::Error(format!("not a request: {error}")),
            };
            if let Some(client) = self.clients.get_mut(&id) {
                let text = serde_json::to_vec(&response)
                    .unwrap_or_else(|_| b"{\"error\":\"the answer cannot be written\"}".to_vec());
                client.to_say.extend(text);
                client.to_say.push(b'\n');
            }
        }
        let Some(client) = self.clients.get_mut(&id) else { return };
        let more = client.speak();
        let waits = matches!(more, Ok(true));
        if more.is_err() || (!alive && !waits) {
            if let Some(client) = self.clients.remove(&id) {
                self.watch.remove(&client.socket, client.source);
            }
            return;
        }
        let mut wanted = if alive { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
        if waits {
            wanted |= EpollFlags::EPOLLOUT;
        }
        let _ = self.watch.epoll.modify(client.socket.as_fd(), &mut EpollEvent::new(wanted, client.source));
    }

    fn answer_command(&mut self, request: &Request) -> Response {
        match request {
            Request::Flush => {
                self.drain_all();
                self.flush_log();
                Response::Ok(Answer::Flush(self.log.seq()))
            }
            Request::Ps => Response::Ok(Answer::Ps(self.rows())),
            Request::Status => Response::Ok(Answer::Status(Box::new(self.status()))),
            Request::Reload => match self.reload() {
                Ok(generation) => Response::Ok(Answer::Reload(generation)),
                Err(diagnostic) => Response::Error(diagnostic),
            },
            Request::Shutdown => {
                self.finish_lanes();
                self.drain_all();
                self.flush_log();
                self.stop = true;
                Response::Ok(Answer::Shutdown(self.log.seq()))
            }
        }
    }

    pub(super) fn drain_all(&mut self) {
        self.drain_backstop();
        self.take_endings();
        let keys: Vec<_> = self.processes.keys().copied().collect();
        for key in keys {
            self.drain(key);
        }
    }

    fn rows(&mut self) -> Vec<ProcessRow> {
        let mut flows: HashMap<ProcessKey, Vec<AssociationRow>> = HashMap::new();
        let (now, carried) = (realtime(), self.diag.carried().unwrap_or_default());
        for (cookie, flow) in self.flows.iter() {
            let peer = self.lanes.of_cookie(cookie).and_then(|id| self.lanes.peer(id));
            let mut row = association(cookie, flow, peer.as_deref());
            row.bytes_in = carried.get(&cookie).map(|it| it.0);
            row.bytes_out = carried.get(&cookie).map(|it| it.1);
            row.duration = Duration::from_nanos(now.saturating_sub(flow.since)).as_secs_f64();
            flows.entry(flow.context.key).or_default().push(row);
        }
        // Those who have asked, and all others of their trees.
        let asked: Vec<ProcessKey> = self.processes.keys().copied().collect();
        for key in &asked {
            // What it was when it last asked it need not be any more.
            self.refresh(*key, false);
        }
        let mut all: Vec<Rc<Context>> = asked.into_iter().filter_map(|key| self.context_of(key)).collect();
        for pid in self.members() {
            if !self.by_pid.contains_key(&pid) {
                all.extend(self.look_up(pid).map(Rc::new));
            }
        }
        all.sort_by_key(|context| context.key);
        self.coverages.keep(&all.iter().map(|context| context.key).collect());
        let named = self.channels.values().filter_map(|channel| channel.run.as_ref());
        let names: HashMap<u64, Rc<str>> = named.map(|run| (run.door, Rc::clone(&run.label))).collect();
        let row = |c: Rc<Context>| ProcessRow {
            name: name_of_run(&c, &names),
            ..self.row(&c, flows.remove(&c.key).unwrap_or_default())
        };
        all.into_iter().map(row).collect()
    }

    fn row(&mut self, context: &Context, associations: Vec<AssociationRow>) -> ProcessRow {
        let key = context.key;
        let listeners: Vec<ListenerRow> = self
            .listeners
            .values()
            .filter(|l| l.maker == key)
            .map(|l| ListenerRow {
                local: l.local.to_string(),
                scope: l.scope_word().to_owned(),
                held_by: l.held_by().to_owned(),
                unprotected: l.unprotected.clone(),
            })
            .collect();
        let coverage = self.coverage(context, &listeners);
        let process = self.processes.get(&key);
        ProcessRow {
            name: None, // is not this process's alone
            pid: key.pid,
            start: key.start,
            exe: context.exe().map(sentence),
            sha256: context.sha256(),
            uid: context.facts.uid,
            user: sentence(&context.facts.user),
            unit: context.facts.unit.as_deref().map(sentence),
            cmdline: sentence(&context.facts.cmdline),
            held_by: coverage.iter().filter(|hold| hold.holds).map(|hold| hold.by.clone()).collect(),
            coverage,
            narrowed_by: self.layer_names(context),
            since: process.map(|p| rfc3339(p.since)),
            associations,
            listeners,
            permitted: process.map_or(0, |p| p.permitted),
            refused: process.map_or(0, |p| p.refused),
        }
    }

    fn status(&mut self) -> Status {
        let rows = self.rows();
        let mut gaps = Vec::new();
        match &self.keyd {
            Some(keyd) if keyd.filters() => {}
            _ => gaps.push(
                "no kernel filters: a stranger is closed at accept, and sees that the port is open"
                    .to_owned(),
            ),
        }
        if self.endings.is_none() {
            gaps.push("the kernel does not tell when flows end: no byte counts".to_owned());
        }
        if self.namespace == 0 {
            gaps.push(
                "network namespaces cannot be told apart (Linux 5.14 can): no verdict is cached".to_owned(),
            );
        }
        if let Some(fence) = &self.fence {
            gaps.push(format!(
                "the backstop is an nftables table, as {}: judged calls are made by proxy, which costs time; what one \
                 program was granted all of this state folder may reach; other network namespaces are the guard's alone",
                fence.why()
            ));
        } else if self.kernel.is_none() && self.handed.is_some() {
            gaps.push(
                "no backstop: judged calls are made by proxy, which costs time, and a program with threads can \
                 win a race to send datagrams that nobody judged"
                    .to_owned(),
            );
        } else if self.kernel.is_none() {
            gaps.push(
                "no guard and no backstop: a program that does not pass through the shim (static, raw system \
                 calls) is not held"
                    .to_owned(),
            );
        }
        if self.guards.by_proxy() && self.fence.is_none() && !self.has_landlock() {
            gaps.push(
                "no Landlock rules for the network (Linux 6.7 has them): a program with threads can win the same race to \
                 connect by TCP"
                    .to_owned(),
            );
        }
        if self.nameless {
            gaps.push(
                "messages come without their writer's pidfd (Linux 6.5 has it): who wrote is told by number and user"
                    .to_owned(),
            );
        }
        if self.slow_to_wake {
            gaps.push(
                "who is held by the guard is not woken at once (Linux 6.6 does): such calls take twice as long"
                    .to_owned(),
            );
        }
        let asked_for: Vec<_> = self.without.words().collect();
        if !asked_for.is_empty() {
            gaps.push(format!("told to do without (PORTCULLIS_WITHOUT): {}", asked_for.join(", ")));
        }
        if let Some(why) = self.keys_unusable() {
            gaps.push(format!("lane tls is not available: {why}"));
        }
        gaps.extend(self.unprotected(&rows));
        if self.owner != 0 {
            gaps.push("without root, processes of other users cannot be looked at".to_owned());
        }
        Status {
            pid: std::process::id().cast_signed(),
            uid: nix::unistd::geteuid().as_raw(),
            mode: self.mode,
            policy: sentence(&self.policy_path.to_string_lossy()),
            generation: self.generation_in_force(),
            loaded: self.in_force.as_ref().map(|f| rfc3339(f.since)),
            diagnostic: self.diagnostic.clone(),
            layers: self.layer_rows(),
            processes: rows.len(),
            channels: self.channels.len(),
            associations: self.flows.len(),
            audit_seq: self.log.seq(),
            audit_lost: self.log.lost(),
            audit_error: self.log.error().map(str::to_owned),
            closings_lost: self.endings_lost,
            keyd: self.keyd.is_some(),
            coverage: summary(&rows),
            gaps,
        }
    }
}

impl Client {
    /// Reads lines. `false`: there will be no more.
    fn listen(&mut self, lines: &mut Vec<Vec<u8>>) -> bool {
        let mut block = [0; 4096];
        loop {
            match recv(self.socket.as_raw_fd(), &mut block, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return false,
                Ok(got) => self.heard.extend(block.get(..got).unwrap_or_default()),
                Err(nix::Error::EAGAIN) => return true,
                Err(nix::Error::EINTR) => {}
                Err(_) => return false,
            }
            while let Some(end) = self.heard.iter().position(|b| *b == b'\n') {
                let rest = self.heard.split_off(end + 1);
                lines.push(std::mem::replace(&mut self.heard, rest));
            }
            if self.heard.len() > LONGEST || lines.len() > 16 {
                return false;
            }
        }
    }

    /// Writes what is to be said. `Ok(true)`: not all of it went.
    fn speak(&mut self) -> io::Result<bool> {
        while !self.to_say.is_empty() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.socket.as_raw_fd(), &self.to_say, flags) {
                Ok(done) => {
                    self.to_say.drain(..done);
                }
                Err(nix::Error::EAGAIN) => return Ok(true),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(false)
    }
}

/// What the run is called that a process is of, among names of runs by the inodes of their doors: all its processes have
/// its door. One with very many descriptors is not looked through for a label.
fn name_of_run(context: &Context, names: &HashMap<u64, Rc<str>>) -> Option<String> {
    if names.is_empty() {
        return None;
    }
    let held = ProcDir::open(context.key.pid).and_then(|at| at.sockets()).ok()?;
    held.iter().find_map(|(_, inode)| names.get(inode)).map(|name| name.to_string())
}

fn association(cookie: u64, flow: &Flow, peer: Option<&Peer>) -> AssociationRow {
    AssociationRow {
        association: format!("{cookie:x}"),
        session: flow.session.map(|s| format!("{s:x}")),
        proto: flow.protocol.to_string(),
        local: flow.local.map(|a| a.to_string()),
        remote: flow.remote.map(|a| a.to_string()),
        rule: flow.rule.as_ref().map(|r| sentence(&r.text)),
        lane: flow.lane.to_string(),
        assurance: flow.assurance.to_string(),
        generation: flow.generation,
        since: rfc3339(flow.since),
        peer: peer.map(|peer| sentence(&peer.told.id)),
        cipher: peer.map(|peer| peer.told.cipher.clone()),
        kex: peer.map(|peer| peer.told.kex.clone()),
        ..AssociationRow::default()
    }
}

pub(super) fn rfc3339(nanoseconds: u64) -> String {
    let seconds = i64::try_from(nanoseconds / 1_000_000_000).unwrap_or(0);
    Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}
