//! One call: from the frame to the verdict, the record, and what follows from both.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    ops::RangeInclusive,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
};

use portcullis_policy::{Policy, Region, Side};
use portcullis_types::{Assurance, Op, Protocol, RuleId, Verdict};
use portcullis_wire::{Flags, Reply, Request};

use super::{
    Broker, RuleText,
    far::{FarEnd, SHOWN, loopback_for},
    flows::Flow,
    lanes::Opened,
    layers::{Ruling, rule_of},
    listeners::Scope,
    now_seconds,
    sessions::Control,
};
use crate::{
    Mode,
    decide::{self, Far, Judgement, Papers, Question, errno},
    process::{Context, ProcessKey},
    sys::{diag::state, pidfd_getfd, realtime, socket::Facts},
};

/// One call to judge, however it came here.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) op: Op,
    pub(super) protocol: Protocol,
    pub(super) local: Option<SocketAddr>,
    pub(super) remote: Option<SocketAddr>,
    /// The socket and what the kernel says of it.
    pub(super) socket: Option<(OwnedFd, Facts)>,
    /// Its descriptor in the process.
    pub(super) number: i32,
    /// What brought it here, for the record.
    pub(super) via: &'static str,
    /// The protected flow that it is about, once there is one.
    pub(super) association: Option<u64>,
}

/// What was found out about one call.
#[derive(Debug)]
pub(super) struct Finding {
    /// An earlier verdict covers it.
    pub(super) known: bool,
    /// The rule as that one's record shows it.
    pub(super) told: Option<RuleText>,
    pub(super) judgement: Judgement,
    pub(super) far: Option<FarEnd>,
    pub(super) session: Option<Control>,
    /// How many sessions the process was in at once, if more than one.
    pub(super) shared: Option<usize>,
    /// For listen.
    pub(super) scope: Option<Scope>,
    /// The smallest rule that would permit it.
    pub(super) allow: Option<String>,
    /// Its protection has begun.
    pub(super) opened: Option<Opened>,
    /// It is permitted, and fails as it would natively.
    pub(super) errno: Option<i32>,
    /// What a policy says that is only watched, and would refuse it.
    pub(super) would: Option<Box<Would>>,
    /// The rules by which it opens related channels, one of each policy that has one.
    pub(super) related_by: Vec<RuleId>,
}

/// A refusal that is only put on record.
#[derive(Debug)]
pub(super) struct Would {
    pub(super) judgement: Judgement,
    pub(super) allow: Option<String>,
}

impl Finding {
    pub(super) fn of(judgement: Judgement) -> Self {
        let (far, session, shared, scope, allow) = (None, None, None, None, None);
        let (opened, errno, would, known, told, related_by) = (None, None, None, false, None, Vec::new());
        Self { judgement, far, session, shared, scope, allow, opened, errno, known, told, would, related_by }
    }

    /// What one policy says, as one of several.
    fn of_layer(mut self, layer: u8) -> Self {
        let judgement = &mut self.judgement;
        judgement.layer = layer;
        judgement.rule = judgement.rule.map(|rule| rule_of(layer, rule));
        judgement.observed = judgement.observed.map(|rule| rule_of(layer, rule));
        self.related_by = judgement.rule.filter(|_| judgement.related).into_iter().collect();
        self
    }

    /// What two policies say that both permit it.
    fn and(mut self, other: Self) -> Self {
        let region = match (self.judgement.region.take(), other.judgement.region.clone()) {
            (Some(one), Some(two)) => common(&one, &two),
            _ => None,
        };
        let related = self.judgement.related || other.judgement.related;
        let observed = self.judgement.observed.or(other.judgement.observed);
        // What must be protected for one of them is, and the proof is there for both.
        if self.judgement.verdict != Verdict::Protect && other.judgement.verdict == Verdict::Protect {
            self.judgement = other.judgement;
        } else if self.judgement.assurance < other.judgement.assurance {
            self.judgement.assurance = other.judgement.assurance;
        }
        self.judgement = Judgement { region, related, observed, ..self.judgement };
        self.related_by.extend(other.related_by);
        self.session = self.session.or(other.session);
        self.shared = self.shared.or(other.shared);
        self.far = self.far.or(other.far);
        self.allow = self.allow.or(other.allow);
        self
    }
}

/// What lies in two regions around the same destination.
fn common(one: &Region, two: &Region) -> Option<Region> {
    let prefix = if one.prefix.prefix_len() < two.prefix.prefix_len() { two.prefix } else { one.prefix };
    let low = *one.ports.start().max(two.ports.start());
    let high = *one.ports.end().min(two.ports.end());
    (low <= high).then_some(Region { prefix, ports: low..=high })
}

/// What all policies say that a process is under: a refusal that is carried out comes first, in their order. One that
/// is only watched is, if others are not, no more than a remark.
fn together(all: Vec<(Mode, Finding)>) -> Finding {
    let enforced = all.iter().any(|(mode, _)| *mode == Mode::Enforce);
    let mut sum: Option<Finding> = None;
    let mut would = None;
    for (mode, finding) in all {
        let watched = enforced && mode == Mode::Audit;
        if finding.judgement.permitted {
            let region = finding.judgement.region.clone();
            sum = Some(match sum {
                None => finding,
                Some(mut before) if watched => {
                    let both = before.judgement.region.take().zip(region);
                    before.judgement.region = both.and_then(|(one, two)| common(&one, &two));
                    before
                }
                Some(before) => before.and(finding),
            });
        } else if watched {
            let Finding { judgement, allow, .. } = finding;
            would.get_or_insert_with(|| Box::new(Would { judgement, allow }));
        } else {
            return finding;
        }
    }
    let mut sum = sum.unwrap_or_else(|| Finding::of(Judgement::refusal("no policy is in force")));
    if would.is_some() {
        sum.judgement.region = None; // each is to be on record
        sum.would = would;
    }
    sum
}

impl Call {
    pub(super) fn facts(&self) -> Option<&Facts> {
        self.socket.as_ref().map(|(_, facts)| facts)
    }

    fn cookie(&self) -> Option<u64> {
        self.facts().map(|f| f.cookie)
    }

    /// The flow's own cookie: not a listener's that stands for what it accepted.
    pub(super) fn flow_cookie(&self) -> Option<u64> {
        self.facts().filter(|f| !(f.listening && self.op == Op::Accept)).map(|f| f.cookie)
    }
}

impl Broker {
    /// Answers a `Judge` frame.
    pub(super) fn judge_frame(
        &mut self,
        key: ProcessKey,
        request: &Request,
        attached: Option<OwnedFd>,
        reply: &mut Reply,
    ) {
        let Ok(op) = Op::try_from(request.call) else {
            reply.errno = libc::EACCES;
            return self.note("protocol", &format!("call number {} is unknown", request.call), &[]);
        };
        let mut call = self.call_from(key, op, request, attached);
        self.see_through(&mut call);
        let inherited = Flags(request.flags).has(Flags::INHERITED);
        if inherited && self.was_judged_at_its_outset(key, &call) {
            return;
        }
        if op == Op::Accept && inherited && self.was_opened_here(&call) {
            call.op = Op::Connect;
        }
        if op == Op::Listen
            && inherited
            && (call.facts().is_some_and(|f| self.listeners.contains_key(&f.cookie))
                || self.was_turned_down(key, &call))
        {
            return; // it is whose it was
        }
        if self.is_held_alone(key) {
            reply.flags |= Flags::HELD;
            if call.op == Op::Accept && self.has_arrived(key, &call) {
                return;
            }
            // The guard holds the call itself, and knows whose it is.
            if !inherited
                && self.is_unseen(key)
                && matches!(call.op, Op::Connect | Op::Bind | Op::Listen | Op::Send)
            {
                return;
            }
        }
        self.judge(key, &call, reply);
        if reply.errno == 0 && !inherited {
            self.expect_call(key, &call);
        }
    }

    /// Whether a connection that this image found was judged when it began: for what the process is now, and not for
    /// another image of it.
    fn was_judged_at_its_outset(&mut self, key: ProcessKey, call: &Call) -> bool {
        if !self.refresh_as(key, false, self.asker(key)) {
            return false;
        }
        let flow = call.flow_cookie().and_then(|cookie| self.flows.get(cookie));
        let now = self.processes.get(&key).map(|p| &p.context);
        flow.zip(now).is_some_and(|(flow, now)| {
            flow.context.key == key
                && flow.context.file == now.file
                && flow.context.facts == now.facts
                && flow.generation == self.generation_in_force()
        })
    }

    /// Whether this host opened a connection that a program was started with, and did not accept it: as is on
    /// record, or as nobody listens where it is and somebody does where it leads, or its port is one that the kernel chose.
    pub(super) fn was_opened_here(&mut self, call: &Call) -> bool {
        if let Some(flow) = call.flow_cookie().and_then(|cookie| self.flows.get(cookie)) {
            return flow.op == Op::Connect;
        }
        let (Some(local), Some(remote)) = (call.local, call.remote) else { return false };
        let here = call.facts().is_some_and(|f| f.namespace == self.namespace);
        let mut listens = |at: SocketAddr, far: SocketAddr| {
            let nobody = SocketAddr::new(far.ip(), 0);
            self.diag.find(call.protocol, at, nobody).is_some_and(|f| f.state == state::LISTEN)
        };
        let chosen = chosen_ports();
        here && !listens(local, remote)
            && (listens(remote, local)
                || (chosen.contains(&local.port()) && !chosen.contains(&remote.port())))
    }

    fn call_from(&self, key: ProcessKey, op: Op, request: &Request, attached: Option<OwnedFd>) -> Call {
        let attached = attached.or_else(|| {
            let process = self.processes.get(&key).filter(|_| request.fd >= 0)?;
            pidfd_getfd(process.pidfd.as_fd(), request.fd).ok()
        });
        let socket = attached.and_then(|fd| {
            let facts = Facts::of(fd.as_fd()).ok()?;
            Some((fd, facts))
        });
        let facts = socket.as_ref().map(|(_, facts)| facts);
        let protocol = facts.map_or_else(|| claimed_protocol(request), |f| f.protocol);
        let bound = |a: &SocketAddr| a.port() != 0 || !a.ip().is_unspecified();
        let told_local = request.local.socket_addr();
        let local = match op {
            Op::Bind => told_local,
            _ => facts.and_then(|f| f.local).filter(bound).or(told_local.filter(bound)),
        };
        let told_remote = request.remote.socket_addr();
        let connected = facts.and_then(|f| f.remote);
        let remote = match op {
            // Whom the kernel says it is connected to, not whom the program says.
            Op::Accept => connected.or(told_remote),
            Op::Bind | Op::Listen | Op::Socket => None,
            Op::Connect | Op::Send | Op::Receive => told_remote.or(connected),
        };
        let canonical = |a: SocketAddr| match a.ip().to_canonical() {
            IpAddr::V4(ip) => SocketAddr::new(ip.into(), a.port()),
            IpAddr::V6(_) => a,
        };
        Call {
            op,
            protocol,
            local: local.map(canonical),
            remote: remote.map(canonical),
            socket,
            number: request.fd,
            via: "shim",
            association: None,
        }
    }

    /// Judges one call, puts it on record, does what follows, and fills in the answer.
    pub(super) fn judge(&mut self, key: ProcessKey, call: &Call, reply: &mut Reply) {
        reply.generation = self.generation_in_force();
        if !self.refresh_as(key, false, self.asker(key)) || !self.is_the_asker(key) {
            reply.errno = errno(call.op);
            return;
        }
        self.drain(key);
        let Some(context) = self.context_of(key) else { return };
        let finding = self.consider(&context, call);
        self.settle(key, &context, call, finding, reply);
    }

    /// Puts what was found on record, does what follows, and fills in the answer.
    pub(super) fn settle(
        &mut self,
        key: ProcessKey,
        context: &Rc<Context>,
        call: &Call,
        mut finding: Finding,
        reply: &mut Reply,
    ) {
        if self.refuses_for_log() && !self.log.retry(realtime()) {
            let why = self.log.error().unwrap_or("unknown").to_owned();
            finding = Finding::of(Judgement::refusal(format!("the audit log cannot be written: {why}")));
        }
        self.protect(context, call, &mut finding);
        let permitted = finding.judgement.permitted || self.mode_for(context) == Mode::Audit;
        let rule = finding.told.take().or_else(|| self.rule_text(finding.judgement.rule));
        let seq = self.record(context, call, &finding, rule.as_ref());
        // What is known is written with the rest of this turn, as what a process finds in its table is.
        let written = finding.known || self.log.commit();
        self.renew_lease();
        let permitted = permitted && (written || !self.refuses_for_log());
        if let Some(process) = self.processes.get_mut(&key) {
            if permitted { process.permitted += 1 } else { process.refused += 1 }
        }
        if written {
            reply.audit_seq = seq;
        }
        reply.rule = finding.judgement.rule.map_or(u32::MAX, |r| r.0);
        reply.lane = finding.judgement.lane as u8;
        reply.assurance = finding.judgement.assurance as u8;
        if !finding.judgement.permitted && permitted {
            reply.flags |= Flags::WOULD_REFUSE;
        }
        if let Some(opened) = &finding.opened {
            self.put_on_record(opened.id, seq);
            if !permitted {
                self.end_association(opened.id);
            }
        }
        if permitted && let Some(native) = finding.errno {
            reply.errno = native;
        } else if permitted {
            self.rewrite(call, &finding, reply);
            self.follow(key, context, call, &finding, rule, seq, reply);
            let token = finding.opened.as_ref().and_then(|it| it.places.inner_remote.socket_addr());
            self.grant_call(call, token, Flags(reply.flags).has(Flags::CACHED));
        } else {
            let next = call.op == Op::Accept && self.may_others_come(context, call);
            reply.errno = if next { libc::EAGAIN } else { errno(call.op) };
        }
    }

    /// Whether a program whose peer was refused may wait for another one. Not at a data port when the session is over, or
    /// when it was the session's peer: nobody else will come, and who was told of that one by poll(2) would wait for ever.
    /// On this host an address is everybody's.
    fn may_others_come(&mut self, context: &Context, call: &Call) -> bool {
        let Some((local, remote)) = call.local.zip(call.remote) else { return true };
        if !self.listeners.values().any(|l| l.data && l.local.port() == local.port()) {
            return true;
        }
        let listening = self.scope_for(context, call.protocol, local);
        match listening.scope {
            Scope::Nobody => false,
            scope if scope.is_of_sessions() => {
                self.own.has(remote.ip())
                    || !listening.sessions.iter().any(|control| control.remote.ip() == remote.ip())
            }
            _ => true,
        }
    }

    /// What the policies, the kernel and the sessions say to one call.
    pub(super) fn consider(&mut self, context: &Context, call: &Call) -> Finding {
        let rulings = match self.rulings(context) {
            Ok(rulings) => rulings,
            Err(why) => return Finding::of(Judgement::refusal(why)),
        };
        match call.op {
            Op::Bind => Finding::of(Judgement {
                permitted: true,
                verdict: Verdict::Permit,
                reason: None,
                ..Judgement::refusal(String::new())
            }),
            Op::Listen => self.consider_listen(context, call),
            Op::Socket | Op::Connect | Op::Accept | Op::Send | Op::Receive => {
                let papers = self.papers(context, call);
                let one = |it: &Ruling| {
                    let finding = self.consider_by(it, context, call, papers.lend());
                    (it.mode, finding.of_layer(it.layer))
                };
                together(rulings.iter().map(one).collect())
            }
        }
    }

    /// What one policy says.
    fn consider_by(&mut self, by: &Ruling, context: &Context, call: &Call, papers: Papers<'_>) -> Finding {
        if call.op == Op::Socket {
            let question = self.question(&by.policy, context, call, true, Far::Remote, papers);
            return Finding::of(decide::judge(&by.policy, &question));
        }
        self.consider_flow(by, context, call, papers)
    }

    fn consider_listen(&mut self, context: &Context, call: &Call) -> Finding {
        let Some(local) = call.local else {
            // listen(2) on an unbound socket takes a port of the kernel's choice.
            let any = SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 0);
            return self.listening(context, call.protocol, any);
        };
        self.listening(context, call.protocol, local)
    }

    fn listening(&mut self, context: &Context, protocol: Protocol, local: SocketAddr) -> Finding {
        let listening = self.scope_for(context, protocol, local);
        let would = listening.would.map(|(layer, reason)| {
            let allow = self.suggest_inbound(context, layer, protocol, local.port(), local.ip());
            Box::new(Would { judgement: Judgement { layer, ..Judgement::refusal(reason) }, allow })
        });
        if listening.scope == Scope::Nobody {
            let (layer, reason) = listening.reason.unwrap_or_default();
            let allow = self.suggest_inbound(context, layer, protocol, local.port(), local.ip());
            let judgement = Judgement { layer, ..Judgement::refusal(reason) };
            return Finding { allow, ..Finding::of(judgement) };
        }
        let session = listening.sessions.first().cloned();
        let by_session = session.as_ref().filter(|_| listening.scope.is_of_sessions());
        let judgement = Judgement {
            permitted: true,
            verdict: Verdict::Permit,
            rule: by_session.and_then(|c| c.rules.first().copied()),
            assurance: match by_session {
                Some(control) if control.protected().is_some() => Assurance::Certificate,
                Some(_) => Assurance::Address,
                None => Assurance::None,
            },
            reason: None,
            ..Judgement::refusal(String::new())
        };
        let shared = (listening.sessions.len() > 1).then_some(listening.sessions.len());
        Finding { session, shared, scope: Some(listening.scope), would, ..Finding::of(judgement) }
    }

    fn consider_flow(&mut self, by: &Ruling, context: &Context, call: &Call, papers: Papers<'_>) -> Finding {
        let policy = &*by.policy;
        let outbound = call.op.is_outbound();
        let Some(remote) = call.remote else {
            return Finding::of(Judgement::refusal("the far address is not known"));
        };
        if call.op == Op::Accept
            && call.association.is_none()
            && call.protocol == Protocol::TCP
            && remote.is_ipv4()
            && self.lanes.is_inner(remote)
        {
            // It waited in the program's queue; by now nobody knows whose it was.
            return Finding::of(Judgement::refusal("the protected flow that it belonged to is over"));
        }
        if call.op == Op::Receive
            && let Some(cookie) = call.cookie()
            && self.datagrams.has_asked(cookie, remote)
        {
            return Finding::of(Judgement {
                permitted: true,
                verdict: Verdict::Permit,
                assurance: Assurance::Address,
                reason: Some("an answer to what this socket sent".to_owned()),
                ..Judgement::refusal(String::new())
            });
        }
        let far = match call.association {
            Some(_) => None,
            None => self.far_end_of(policy, context, call, remote, outbound),
        };
        let mut judgement = self.ask(policy, context, call, outbound, far.as_ref(), papers);
        if !judgement.permitted
            && (judgement.verdict == Verdict::Protect || judgement.rule.is_none())
            && let Some(why) = self.keys_unusable()
        {
            let reason = judgement.reason.unwrap_or_default();
            judgement.reason = Some(format!("{reason}; rules by certificate do not hold here: {why}"));
        }
        if !outbound && papers.shown.is_none() && judgement.verdict == Verdict::Protect && judgement.permitted
        {
            judgement.permitted = false;
            judgement.reason = Some("needs certificate, and it came in plain".to_owned());
        }
        let is_datagram = call.protocol != Protocol::TCP;
        if !judgement.permitted
            && !judgement.denied
            && outbound
            && is_datagram
            && call.local.is_some_and(|l| l.port() != 0)
        {
            // A server's answer: legal if the peer's question was.
            let answer = self.ask(policy, context, call, false, far.as_ref(), papers);
            if answer.permitted {
                judgement = Judgement { region: None, ..answer };
            }
        }
        let mut finding = Finding { far, ..Finding::of(judgement) };
        if !finding.judgement.permitted
            && !finding.judgement.denied
            && call.protocol == Protocol::TCP
            && let Some(by) = self.related(by.layer, context, call, remote, finding.far.as_ref())
        {
            finding.shared = (by.of > 1).then_some(by.of);
            let protected = by.control.protected().is_some() && call.association.is_none();
            finding.judgement = Judgement {
                permitted: true,
                verdict: if protected { Verdict::Protect } else { Verdict::Permit },
                rule: by.rule,
                lane: by.control.lane,
                assurance: by.assurance,
                reason: Some("related to a control association that lives".to_owned()),
                ..Judgement::refusal(String::new())
            };
            finding.session = Some(by.control);
        }
        if !finding.judgement.permitted || finding.judgement.observed.is_some() {
            let processes = finding.far.as_ref().map(FarEnd::processes);
            let end = processes.as_deref().map_or(Far::Remote, Far::Local);
            let question = self.question(policy, context, call, outbound, end, papers);
            finding.allow = decide::suggest(policy, &question);
        }
        finding
    }

    /// The far end, if it is on this host.
    fn far_end_of(
        &mut self,
        policy: &Policy,
        context: &Context,
        call: &Call,
        remote: SocketAddr,
        outbound: bool,
    ) -> Option<FarEnd> {
        let here = call.facts().is_none_or(|f| f.namespace == self.namespace || f.namespace == 0);
        if !here {
            // Another network namespace: its loopback is another one, of which nothing is known here.
            return remote.ip().is_loopback().then(FarEnd::default);
        }
        if !self.own.has(remote.ip()) {
            return None;
        }
        // Where it makes no difference who is there, a few of them are looked up, for the log.
        let nobody = FarEnd::default();
        let nobody = self.ask(policy, context, call, outbound, Some(&nobody), Papers::NONE);
        let indifferent = nobody.permitted && nobody.observed.is_none();
        let most = if indifferent { SHOWN } else { usize::MAX };
        Some(match (outbound, call.local) {
            (true, _) | (false, None) => self.far_listener(call.protocol, remote, most),
            (false, Some(local)) => self.far_client(call.protocol, local, remote, most),
        })
    }

    fn ask(
        &self,
        policy: &Policy,
        context: &Context,
        call: &Call,
        outbound: bool,
        far: Option<&FarEnd>,
        papers: Papers<'_>,
    ) -> Judgement {
        let processes = far.map(FarEnd::processes);
        let end = processes.as_deref().map_or(Far::Remote, Far::Local);
        decide::judge(policy, &self.question(policy, context, call, outbound, end, papers))
    }

    pub(super) fn question<'a>(
        &self,
        policy: &Policy,
        context: &'a Context,
        call: &Call,
        outbound: bool,
        far: Far<'a>,
        papers: Papers<'a>,
    ) -> Question<'a> {
        let bound = call.local.map(|l| l.ip()).filter(|ip| !ip.is_unspecified());
        let near = bound.or_else(|| {
            let asked = outbound && policy.uses_addresses_of(Side::From);
            call.remote.filter(|_| asked).and_then(source_for)
        });
        let service = if outbound { call.remote } else { call.local };
        Question {
            outbound,
            protocol: call.protocol,
            port: if call.protocol.has_ports() { service.map_or(0, |a| a.port()) } else { 0 },
            now: now_seconds(),
            me: &context.facts,
            near,
            far_addr: call.remote.map(|r| loopback_for(r).ip()),
            far,
            papers,
        }
    }

    /// The rule of a policy that would let `remote` reach a listener.
    pub(super) fn suggest_inbound(
        &self,
        context: &Context,
        layer: u8,
        protocol: Protocol,
        port: u16,
        remote: IpAddr,
    ) -> Option<String> {
        let (policy, _) = self.policy_of(rule_of(layer, RuleId(0)))?;
        let question = Question {
            outbound: false,
            protocol,
            port,
            now: now_seconds(),
            me: &context.facts,
            near: None,
            far_addr: Some(remote).filter(|ip| !ip.is_unspecified()),
            far: Far::Remote,
            papers: Papers::NONE,
        };
        decide::suggest(policy, &question)
    }

    /// Judges what goes on already by the generation in force; `None` if it may.
    pub(super) fn judge_again(&mut self, context: &Context, flow: &Flow) -> Option<Judgement> {
        let judgement = self.judge_flow(context, flow).judgement;
        (!judgement.permitted).then_some(judgement)
    }

    /// Judges a flow as if it were to begin now.
    pub(super) fn judge_flow(&mut self, context: &Context, flow: &Flow) -> Finding {
        let call = Call {
            op: flow.op,
            protocol: flow.protocol,
            local: flow.local,
            remote: flow.remote,
            socket: None,
            number: -1,
            via: "broker",
            association: None,
        };
        let mut finding = self.consider(context, &call);
        let judgement = &mut finding.judgement;
        if judgement.permitted && judgement.verdict == Verdict::Protect {
            judgement.permitted = false;
            judgement.reason = Some("needs certificate, and it goes in plain".to_owned());
        }
        finding
    }
}

/// Ports that connect(2) takes by itself (ip(7), `ip_local_port_range`).
fn chosen_ports() -> RangeInclusive<u16> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ends = text.split_ascii_whitespace().filter_map(|end| end.parse().ok());
    ends.next().unwrap_or(32768)..=ends.next().unwrap_or(60999)
}

/// The protocol that a frame without a socket claims.
fn claimed_protocol(request: &Request) -> Protocol {
    let kind = i32::from(request.kind);
    let internet = [libc::AF_INET, libc::AF_INET6].contains(&i32::from(request.domain));
    match request.protocol {
        _ if !internet || kind == libc::SOCK_RAW => Protocol::RAW,
        262 => Protocol::TCP,
        0 if kind == libc::SOCK_STREAM => Protocol::TCP,
        0 if kind == libc::SOCK_DGRAM => Protocol::UDP,
        n => u8::try_from(n).map_or(Protocol::RAW, Protocol),
    }
}

/// Which of its addresses this host would use towards `remote`. Nothing is sent by this.
fn source_for(remote: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if remote.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    let probe = UdpSocket::bind((any, 0)).ok()?;
    // Port 0 cannot be connected to; which one it is does not matter for the route.
    probe.connect(SocketAddr::new(remote.ip(), remote.port().max(1))).ok()?;
    Some(probe.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified())
}
