//! Flows that go on: what became of them when they end, and who is to be asked again after a reload.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use portcullis_types::{Assurance, Lane, Op, Protocol};
use portcullis_wire::Request;

use super::{Broker, RuleText};
use crate::{
    audit::{Line, More, of},
    process::{Context, ProcessKey},
    sys::{diag::Ended, realtime},
};

/// Most flows that are remembered; more are judged and on record, but their end is not.
const MOST: usize = 1 << 18;
/// Most endings that wait for the record of their beginning.
const MOST_LATE: usize = 1 << 14;

/// Most flows that ended before their far end was judged, and how long they are remembered.
const MOST_CLOSED: usize = 1024;
const REMEMBERED: Duration = Duration::from_secs(5);

/// One flow of a wrapped process.
#[derive(Clone, Debug)]
pub(super) struct Flow {
    pub(super) context: Rc<Context>,
    pub(super) op: Op,
    /// Its descriptor when it was judged.
    pub(super) number: i32,
    pub(super) protocol: Protocol,
    pub(super) local: Option<SocketAddr>,
    pub(super) remote: Option<SocketAddr>,
    pub(super) rule: Option<RuleText>,
    /// The control association it is related to.
    pub(super) session: Option<u64>,
    pub(super) lane: Lane,
    pub(super) assurance: Assurance,
    pub(super) generation: u64,
    /// Nanoseconds since the epoch.
    pub(super) since: u64,
    /// Number of its record.
    pub(super) seq: u64,
    /// Its far end, on this host, was judged too.
    pub(super) met: bool,
}

/// Flows by `SO_COOKIE`.
#[derive(Debug, Default)]
pub(super) struct Flows {
    open: HashMap<u64, Flow>,
    /// From the number of its record.
    by_seq: HashMap<u64, u64>,
    late: HashMap<u64, Ended>,
    late_order: VecDeque<u64>,
    /// Flows that ended before their far end on this host was judged: when, own end, far end, who.
    closed: VecDeque<(Instant, SocketAddr, SocketAddr, Rc<Context>)>,
}

impl Flows {
    pub(super) fn open(&mut self, cookie: u64, flow: Flow) {
        if self.open.len() < MOST || self.open.contains_key(&cookie) {
            self.by_seq.insert(flow.seq, cookie);
            if let Some(earlier) = self.open.insert(cookie, flow) {
                self.by_seq.remove(&earlier.seq);
            }
        }
    }

    /// Whether an open flow more would not be remembered.
    pub(super) fn is_full(&self) -> bool {
        self.open.len() >= MOST
    }

    pub(super) fn get(&self, cookie: u64) -> Option<&Flow> {
        self.open.get(&cookie)
    }

    pub(super) fn get_mut(&mut self, cookie: u64) -> Option<&mut Flow> {
        self.open.get_mut(&cookie)
    }

    pub(super) fn forget(&mut self, cookie: u64) -> Option<Flow> {
        let flow = self.open.remove(&cookie)?;
        self.by_seq.remove(&flow.seq);
        Some(flow)
    }

    /// Forgets what began before `before` (nanoseconds since the epoch) and is not among `alive`.
    pub(super) fn sweep(&mut self, before: u64, alive: impl Fn(u64) -> bool) {
        self.open.retain(|cookie, flow| flow.since >= before || alive(*cookie));
        let open = &self.open;
        self.by_seq.retain(|_, cookie| open.contains_key(cookie));
    }

    pub(super) fn cookies(&self) -> Vec<u64> {
        self.open.keys().copied().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Flow)> {
        self.open.iter().map(|(c, f)| (*c, f))
    }

    /// Who opened the flow from `local` to `remote` and has closed it since. Told once.
    pub(super) fn take_closed(&mut self, local: SocketAddr, remote: SocketAddr) -> Option<Rc<Context>> {
        let (at, _) = self.closed.iter().enumerate().find(|(_, (since, near, far, _))| {
            since.elapsed() < REMEMBERED && (*near, *far) == (local, remote)
        })?;
        self.closed.remove(at).map(|(.., context)| context)
    }

    fn keep_closed(&mut self, local: SocketAddr, remote: SocketAddr, context: Rc<Context>) {
        while self.closed.len() >= MOST_CLOSED
            || self.closed.front().is_some_and(|c| c.0.elapsed() >= REMEMBERED)
        {
            self.closed.pop_front();
        }
        self.closed.push_back((Instant::now(), local, remote, context));
    }

    fn keep_late(&mut self, ended: Ended) {
        while self.late_order.len() >= MOST_LATE {
            if let Some(oldest) = self.late_order.pop_front() {
                self.late.remove(&oldest);
            }
        }
        self.late_order.push_back(ended.socket.cookie);
        self.late.insert(ended.socket.cookie, ended);
    }
}

impl Broker {
    /// Looks for word of ended sockets while there is some, and only then waits for it again: so a
    /// host that closes thousands of sockets a second does not wake the broker for each.
    pub(super) fn tend_endings(&mut self) {
        let Some((source, last)) = self.endings_looked_at else { return };
        if last.elapsed() < super::POLL {
            return;
        }
        self.endings_looked_at = Some((source, Instant::now()));
        if self.take_endings() == 0 {
            self.endings_looked_at = None;
            if let Some(endings) = &self.endings {
                self.watch.once_more(endings, source);
            }
        }
    }

    /// Takes word of sockets that ended; how many.
    pub(super) fn take_endings(&mut self) -> usize {
        let Some(endings) = &mut self.endings else { return 0 };
        let mut all = Vec::new();
        let complete = endings.take(|ended| all.push(ended));
        let count = all.len();
        for ended in all {
            self.ended(ended);
        }
        match complete {
            Ok(true) => {}
            Ok(false) => {
                self.endings_lost += 1;
                self.sweep();
            }
            Err(_) => self.endings = None,
        }
        count
    }

    fn ended(&mut self, ended: Ended) {
        let cookie = ended.socket.cookie;
        match self.flows.forget(cookie) {
            Some(flow) => {
                if flow.lane == Lane::Tls {
                    // What it has carried is known when the key daemon says that it is over.
                    return self.session_ended(cookie);
                }
                let (local, remote) = (ended.socket.local, ended.socket.remote);
                if flow.op == Op::Connect && !flow.met && self.own.has(remote.ip()) {
                    self.flows.keep_closed(local, remote, Rc::clone(&flow.context));
                }
                self.record_close(&flow, &ended);
            }
            None => self.flows.keep_late(ended),
        }
        if let Some(listener) = self.listeners.remove(&cookie) {
            if listener.is_filtered() {
                self.forget_filter(cookie);
            }
            self.leave_front(cookie, listener.front);
            self.forget_listener_grant(cookie);
        }
        self.session_ended(cookie);
    }

    /// Closes a flow whose end was told before its beginning was on record.
    pub(super) fn settle_late(&mut self, cookie: u64) {
        if let Some(ended) = self.flows.late.remove(&cookie)
            && let Some(flow) = self.flows.forget(cookie)
        {
            self.record_close(&flow, &ended);
        }
    }

    fn record_close(&mut self, flow: &Flow, ended: &Ended) {
        let now = realtime();
        let (local, remote) = (ended.socket.local, ended.socket.remote);
        let some = |a: SocketAddr| (a.port() != 0).then_some(a);
        let mut more = vec![
            ("bytes_in", More::Number(ended.bytes_in)),
            ("bytes_out", More::Number(ended.bytes_out)),
            ("duration", More::Seconds(now.saturating_sub(flow.since))),
        ];
        more.extend(of(flow.seq));
        self.log.push(&Line {
            process: Some(&flow.context),
            session: flow.session,
            protocol: Some(flow.protocol),
            local: some(local).or(flow.local),
            remote: some(remote).or(flow.remote),
            assurance: Some(flow.assurance),
            verdict: Some("permit"),
            rule: flow.rule.as_ref().map(|r| &*r.text),
            lane: Some(flow.lane),
            association: Some(ended.socket.cookie),
            generation: Some(flow.generation),
            more: &more,
            ..Line::bare(now, "close", "broker")
        });
    }

    /// Puts on record that a permitted call failed by itself.
    pub(super) fn record_outcome(&mut self, key: ProcessKey, request: &Request, via: &'static str) {
        let known = self.flows.by_seq.get(&request.audit_seq).copied();
        let cookie = known.filter(|c| self.flows.get(*c).is_some_and(|f| f.context.key == key));
        if let Some(cookie) = cookie {
            self.flows.forget(cookie);
        }
        let Some(process) = self.processes.get(&key) else { return };
        let context = Rc::clone(&process.context);
        let name = std::io::Error::from_raw_os_error(request.errno).to_string();
        let number = u64::try_from(request.errno).unwrap_or(0);
        self.log.push(&Line {
            process: Some(&context),
            reason: Some(&name),
            association: cookie,
            more: &[("of", More::Number(request.audit_seq)), ("errno", More::Number(number))],
            ..Line::bare(realtime(), "outcome", via)
        });
    }
}
