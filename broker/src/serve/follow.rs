//! What follows from a judgement: the record, the filter, the flow to remember, the cached region.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    rc::Rc,
};

use ipnet::IpNet;
use portcullis_policy::Side;
use portcullis_types::{Op, Protocol, Verdict};
use portcullis_wire::{
    Addr, Flags, Reply,
    shared::{Entry, Shape},
};

use super::{
    Broker, RuleText,
    far::{FarEnd, loopback_for},
    flows::Flow,
    judge::{Call, Finding},
    layers::{Ruling, layer_of},
    sessions::{Control, ticks},
    word,
};
use crate::{
    Mode,
    audit::{Line, More},
    decide::{self, Far, around},
    process::{Context, ProcessKey},
    sys::{boottime, realtime, socket::Facts},
};

impl Broker {
    /// Writes the record of one call into the log's buffer.
    pub(super) fn record(
        &mut self,
        context: &Context,
        call: &Call,
        finding: &Finding,
        rule: Option<&RuleText>,
    ) -> u64 {
        let judgement = &finding.judgement;
        let observed = self.rule_text(judgement.observed);
        let watched = (!judgement.permitted && self.mode_for(context) == Mode::Audit) || observed.is_some();
        // What a policy says that is only watched is told, where nothing else has to be.
        let remark = finding.would.as_deref().filter(|_| judgement.permitted && observed.is_none());
        let would = watched || remark.is_some();
        let verdict = if would {
            "would-refuse"
        } else if judgement.permitted && call.association.is_none() {
            word(judgement.verdict)
        } else if judgement.permitted {
            word(Verdict::Permit)
        } else {
            // What asks for protection that this host cannot give is a refusal.
            word(Verdict::Refuse)
        };
        let peer = call.association.and_then(|id| self.lanes.peer(id));
        let certificate = peer.as_ref().map(|peer| peer.certificate());
        let shown = match &peer {
            Some(peer) => Some(peer.told.id.clone()),
            None => finding.far.as_ref().and_then(FarEnd::shown),
        };
        let shared = finding.shared.map(|n| format!("the process is in {n} sessions at once"));
        let remarked = remark.and_then(|it| self.rule_text(it.judgement.rule));
        let rule = if remark.is_some() { remarked.as_ref() } else { observed.as_ref().or(rule) };
        let by = match (remark, judgement.observed) {
            (Some(remark), _) => remark.judgement.layer,
            (None, Some(observed)) => layer_of(observed),
            (None, None) => judgement.layer,
        };
        let policy = self.layer_file(by).filter(|_| would || !judgement.permitted);
        let observed_why = observed.as_ref().map(|_| "a rule under audit would refuse it");
        let parents;
        let mut more = Vec::with_capacity(8);
        if let Some(rule) = rule {
            more.push(("rule_at", More::Text(&rule.at)));
            if let Some(name) = &rule.name {
                more.push(("rule_name", More::Text(name)));
            }
        }
        if let Some(policy) = &policy {
            more.push(("policy", More::Text(policy)));
        }
        if let Some(shared) = &shared {
            more.push(("shared", More::Text(shared)));
        }
        if let (Some(peer), Some(certificate)) = (&peer, &certificate) {
            more.push(("peer_cert", More::Text(certificate)));
            more.push(("cipher", More::Text(&peer.told.cipher)));
            more.push(("kex", More::Text(&peer.told.kex)));
        }
        if !matches!(verdict, "permit" | "protect") {
            more.push(("cmdline", More::Text(&context.facts.cmdline)));
            parents = context
                .ancestors
                .iter()
                .map(|a| a.exe.as_deref().unwrap_or("?"))
                .collect::<Vec<_>>()
                .join(" < ");
            more.push(("parents", More::Text(&parents)));
            if let Some(allow) = remark.map_or(&finding.allow, |it| &it.allow) {
                more.push(("allow", More::Text(allow)));
            }
        }
        self.log.push(&Line {
            process: Some(context),
            session: finding.session.as_ref().map(|c| c.cookie),
            protocol: Some(call.protocol),
            local: call.local,
            remote: call.remote,
            peer: shown.as_deref(),
            assurance: Some(judgement.assurance),
            verdict: Some(verdict),
            rule: rule.map(|r| &*r.text),
            reason: match remark {
                Some(remark) => remark.judgement.reason.as_deref(),
                None => observed_why.or(judgement.reason.as_deref()),
            },
            lane: Some(judgement.lane),
            association: call.flow_cookie(),
            generation: self.in_force.as_ref().map(|f| f.generation),
            more: &more,
            op: &call.op.to_string(),
            ..Line::bare(realtime(), "", call.via)
        })
    }

    /// What follows from a call that may go on.
    #[expect(clippy::too_many_arguments, reason = "one place where all of it meets")]
    pub(super) fn follow(
        &mut self,
        key: ProcessKey,
        context: &Rc<Context>,
        call: &Call,
        finding: &Finding,
        rule: Option<RuleText>,
        seq: u64,
        reply: &mut Reply,
    ) {
        let judgement = &finding.judgement;
        if judgement.permitted
            && judgement.observed.is_none()
            && finding.would.is_none()
            && let Some(entry) = self.cacheable(key, call, finding)
        {
            // Whoever asks by the guard has no table to look into.
            if call.via == "guard" {
                self.learn(key, entry, rule.clone());
            } else if self.cache(key, entry, rule.clone()) {
                reply.flags |= Flags::CACHED;
            }
        }
        let Some((socket, facts)) = &call.socket else { return };
        if call.protocol == Protocol::TCP {
            match (call.op, &finding.scope) {
                (Op::Listen, Some(scope)) if self.mode_for(context) == Mode::Enforce => {
                    let local = call.local.unwrap_or_else(|| SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 0));
                    match self.add_listener(key, call.number, facts, local, scope.clone(), socket.as_fd()) {
                        Ok(true) => reply.flags |= Flags::FILTERED,
                        Ok(false) => {}
                        Err(why) => {
                            reply.errno = decide::errno(Op::Listen);
                            self.record_unprotected(context, local, facts.cookie, &why);
                        }
                    }
                }
                (Op::Connect | Op::Accept, _) => {
                    self.add_flow(context, call, facts, finding, rule, seq);
                }
                _ => {}
            }
            return;
        }
        let peer = call.remote.filter(|_| call.op.is_outbound());
        if facts.is_datagram() && matches!(call.op, Op::Bind | Op::Send | Op::Connect) {
            let filtered = self.fit_datagram(key, call.number, facts, call.local, peer, socket.as_fd());
            if filtered {
                reply.flags |= Flags::FILTERED;
            }
        }
    }

    fn add_flow(
        &mut self,
        context: &Rc<Context>,
        call: &Call,
        facts: &Facts,
        finding: &Finding,
        rule: Option<RuleText>,
        seq: u64,
    ) {
        if facts.listening {
            return; // accept was asked with the listener: the flow's own socket is not known
        }
        let judgement = &finding.judgement;
        if let Some(id) = call.association {
            self.taken(id, context, facts, finding, seq);
        }
        if judgement.permitted
            && judgement.related
            // What a certificate must prove first becomes a control when it has.
            && finding.opened.is_none()
            && let Some(remote) = call.remote
        {
            let outbound = call.op == Op::Connect;
            self.add_session(Control {
                cookie: facts.cookie,
                inode: facts.inode,
                local: call.local.filter(|l| l.port() != 0 && !outbound),
                remote: loopback_for(remote),
                since: ticks(boottime()),
                maker: (context.key, call.number),
                rules: finding.related_by.clone(),
                lane: judgement.lane,
                association: call.association,
            });
        }
        if self.flows.is_full() {
            self.sweep();
        }
        self.flows.open(
            facts.cookie,
            Flow {
                context: Rc::clone(context),
                op: call.op,
                number: call.number,
                protocol: call.protocol,
                local: match &finding.opened {
                    Some(opened) => opened.places.local.socket_addr(),
                    None => call.local,
                },
                remote: call.remote,
                rule,
                session: finding.session.as_ref().map(|c| c.cookie),
                lane: judgement.lane,
                assurance: judgement.assurance,
                generation: self.generation_in_force(),
                since: realtime(),
                seq,
                met: false,
            },
        );
    }

    /// How far around a permit holds, if it depends on nothing that a table cannot tell.
    fn cacheable(&self, key: ProcessKey, call: &Call, finding: &Finding) -> Option<Entry> {
        let (Some(remote), Some(facts)) = (call.remote, call.facts()) else { return None };
        // A process elsewhere may see other hosts under the same addresses.
        let here = facts.namespace == self.namespace && self.namespace != 0;
        let cacheable = match call.op {
            Op::Connect | Op::Accept => call.protocol == Protocol::TCP,
            // Sending makes a peer one that may answer, which the broker must see.
            Op::Receive => true,
            _ => false,
        };
        let mut region = finding.judgement.region.clone().filter(|_| here && cacheable)?;
        let outbound = call.op.is_outbound();
        let context = self.context_of(key)?;
        let rulings = self.rulings(&context).ok()?;
        let near = if outbound { Side::From } else { Side::To };
        if rulings.iter().any(|it| it.policy.uses_addresses_of(near)) {
            let [Ruling { policy, .. }] = rulings.as_slice() else { return None };
            let papers = self.papers(&context, call);
            // The same must hold from (or at) whichever own address the next flow has.
            let same_family = |ip: &IpAddr| ip.is_ipv4() == remote.is_ipv4();
            let own: Vec<IpAddr> = self.own.iter().filter(same_family).collect();
            if own.is_empty() || own.len() > 32 {
                return None;
            }
            for near in own {
                let mut question =
                    self.question(policy, &context, call, outbound, Far::Remote, papers.lend());
                question.near = Some(near);
                let there = decide::judge(policy, &question);
                let (true, true, Some(other)) =
                    (there.permitted, there.rule == finding.judgement.rule, there.region)
                else {
                    return None;
                };
                if other.prefix.prefix_len() > region.prefix.prefix_len() {
                    region.prefix = other.prefix;
                }
                let low = *region.ports.start().max(other.ports.start());
                let high = *region.ports.end().min(other.ports.end());
                region.ports = low..=high;
            }
        }
        let prefix = around(&region, remote.ip(), self.holes())?;
        Some(Entry {
            shape: Shape { call: call.op as u8, protocol: call.protocol.0, prefix },
            addr: Addr::from(remote).key(),
            port_low: *region.ports.start(),
            port_high: *region.ports.end(),
            rule: finding.judgement.rule.map_or(u32::MAX, |r| r.0),
            assurance: finding.judgement.assurance as u8,
            noted: call.op == Op::Connect && self.kernel_records(key),
        })
    }

    /// What no cached region may contain: this host, where both ends are known, and members, who are protected.
    fn holes(&self) -> Vec<IpNet> {
        let mut holes: Vec<IpNet> =
            self.own.iter().chain(self.lanes.members.addresses()).map(IpNet::from).collect();
        for always in ["127.0.0.0/8", "0.0.0.0/8", "::/127"] {
            holes.extend(always.parse::<IpNet>());
        }
        holes
    }
}
