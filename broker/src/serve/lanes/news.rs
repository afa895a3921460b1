//! What the key daemon tells, and what is done about it.

use std::{
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use portcullis_types::{Op, Protocol};
use portcullis_wire::keyd::Places;
use serde::Deserialize;

use super::{Association, Peer, Told, records::End};
use crate::{
    Mode,
    audit::LeftOpen,
    decide::Judgement,
    keyd::News,
    process::Context,
    serve::{
        Broker, elapsed,
        flows::Flow,
        judge::{Call, Finding},
        sessions::Control,
    },
    sys::realtime,
};

/// How long the last flows may take to end.
const LAST: Duration = Duration::from_millis(500);

impl Broker {
    /// Takes one piece of news.
    pub(in crate::serve) fn hear_news(&mut self, news: News) {
        match news {
            News::Shown { id, front, places, peer } => {
                let plain = peer.is_none();
                let peer = peer.and_then(|json| self.lanes.told_of(json));
                match front {
                    None => self.shown_out(id, peer),
                    Some(front) => self.shown_in(id, front, &places, peer, plain),
                }
            }
            News::Arrived { id, front, places } => match self.speech_for(front, &places) {
                // If it has gone meanwhile, that is on its way.
                Some(speech) => drop(self.keyd.as_mut().map(|keyd| keyd.speak(id, speech))),
                None => self.end_association(id),
            },
            News::Live { id, front, places, what } => self.runs_on(id, front.is_some(), &places, &what),
            News::Admitted { id, places, runs: true } | News::Associated { id, places } => {
                self.associated(id, &places);
            }
            News::Admitted { id, places, runs: false } => self.remember(id, &places),
            News::Over { id, errno, why, shown, front, places, carried } => {
                let end = End { errno, why, shown, sent: carried.sent, received: carried.received };
                let left = |left: &mut LeftOpen| match front {
                    None => left.of_cookie(carried.cookie),
                    Some(_) => left.between(places.local.socket_addr(), places.remote.socket_addr()),
                };
                if errno == libc::EKEYEXPIRED {
                    self.record_expiry(id, &end.why);
                }
                match self.lanes.forget(id) {
                    Some(one) => self.over(&one, &end),
                    None if let Some(left) = left(&mut self.lanes.left) => self.end_left(&left, Some(&end)),
                    None if front.is_some() => self.failed_in(front, &places, &end),
                    // Those that this broker has given up are on record.
                    None => {}
                }
            }
        }
    }

    /// Takes on the protected flows that have outlived an earlier broker.
    pub(in crate::serve) fn take_up_lanes(&mut self) {
        let Some(keyd) = self.keyd.as_mut().filter(|keyd| keyd.who().is_some()) else { return };
        if keyd.list().is_ok() {
            self.lanes.taking_up = true;
            self.take_keyd();
            self.lanes.taking_up = false;
        }
    }

    /// A flow that runs since an earlier broker was there: found again by its socket, and judged again. One that
    /// nobody has, or that is not permitted any more, is cut.
    fn runs_on(&mut self, id: u64, inbound: bool, places: &Places, what: &str) {
        let live: Option<Live> = serde_json::from_str(what).ok();
        let ends = places.inner_local.socket_addr().zip(places.inner_remote.socket_addr());
        let found = ends.and_then(|(local, remote)| self.diag.find(Protocol::TCP, local, remote));
        let Some((live, found)) = live.zip(found.filter(|found| found.inode != 0)) else {
            return self.end_association(id);
        };
        let Some(context) = self.holders_of(found.inode, 1).pop() else { return self.end_association(id) };
        let (plain, peer) = (live.peer.is_none(), live.peer.map(|told| Rc::new(Peer::from(told))));
        let op = if inbound { Op::Accept } else { Op::Connect };
        let seq = self.lanes.left.of_cookie(found.cookie).map_or(0, |left| left.seq);
        let since = u64::try_from(live.since).unwrap_or(0).saturating_mul(1_000_000_000);
        let one = Association {
            context: Rc::clone(&context),
            op,
            local: places.local.socket_addr(),
            remote: places.remote.socket_addr(),
            cookie: Some(found.cookie),
            inner: None,
            token: None,
            peer,
            plain,
            rule: None,
            session: None,
            control: None,
            generation: self.generation_in_force(),
            since,
            seq,
            up: true,
            cut: false,
        };
        let (call, (lane, assurance)) = (call_of(id, &one), one.lane());
        self.lanes.insert(id, one);
        self.remember(id, places);
        let finding = self.consider(&context, &call);
        if !finding.judgement.permitted && self.mode_for(&context) == Mode::Enforce {
            let why = finding.judgement.reason.unwrap_or_else(|| "refused".to_owned());
            return self.cut_lane(id, &format!("no longer permitted: {why}"), Instant::now());
        }
        let rule = self.rule_text(finding.judgement.rule);
        if let Some(one) = self.lanes.all.get_mut(&id) {
            one.rule.clone_from(&rule);
        }
        if finding.judgement.related
            && let Some(remote) = call.remote
        {
            self.add_session(Control {
                cookie: found.cookie,
                inode: found.inode,
                local: Some(found.local),
                remote,
                since: context.key.start,
                maker: (context.key, -1),
                rules: finding.related_by.clone(),
                lane,
                association: Some(id),
            });
        }
        let flow = Flow {
            op,
            protocol: Protocol::TCP,
            local: call.local,
            remote: call.remote,
            rule,
            session: None,
            lane,
            assurance,
            generation: self.generation_in_force(),
            since,
            seq,
            met: false,
            number: -1,
            context,
        };
        self.flows.open(found.cookie, flow);
    }

    /// The far side of a flow that a program opens has proved itself.
    fn shown_out(&mut self, id: u64, peer: Option<Rc<Peer>>) {
        let Some(one) = self.lanes.all.get_mut(&id) else { return self.end_association(id) };
        one.peer = peer;
        let (context, for_session) = (Rc::clone(&one.context), one.session.is_some());
        self.decide_on(id, &context, for_session);
    }

    /// Somebody has proved himself at a front, or speaks plain, as he may there.
    fn shown_in(&mut self, id: u64, front: u32, places: &Places, peer: Option<Rc<Peer>>, plain: bool) {
        let behind = self.lanes.fronts.get(&front);
        let listener = behind.and_then(|all| all.iter().find_map(|cookie| self.listeners.get(cookie)));
        let Some((context, for_session)) =
            listener.map(|l| (Rc::clone(&l.context), l.scope.is_of_sessions()))
        else {
            return self.end_association(id);
        };
        let one = Association {
            context: Rc::clone(&context),
            op: Op::Accept,
            local: places.local.socket_addr(),
            remote: places.remote.socket_addr(),
            cookie: None,
            inner: None,
            token: None,
            peer,
            plain,
            rule: None,
            session: None,
            control: None,
            generation: self.generation_in_force(),
            since: realtime(),
            seq: 0,
            up: false,
            cut: false,
        };
        self.lanes.insert(id, one);
        self.decide_on(id, &context, for_session);
    }

    /// Judges a flow by what its far end has shown, and admits or refuses it.
    fn decide_on(&mut self, id: u64, context: &Rc<Context>, for_session: bool) {
        let Some(one) = self.lanes.get(id) else { return };
        let (call, known) = (call_of(id, one), one.is_known());
        let mut finding = if known {
            self.consider(context, &call)
        } else {
            Finding::of(Judgement::refusal("the peer's certificate cannot be read"))
        };
        if for_session && !finding.judgement.permitted && finding.judgement.rule.is_none() {
            let why = "its key is not that of the process at the other end of the control association";
            finding.judgement.reason = Some(why.to_owned());
        }
        if self.refuses_for_log() && !self.log.retry(realtime()) {
            finding = Finding::of(Judgement::refusal("the audit log cannot be written"));
        }
        let permitted = finding.judgement.permitted || (self.mode_for(context) == Mode::Audit && known);
        let rule = self.rule_text(finding.judgement.rule);
        if let Some(one) = self.lanes.all.get_mut(&id) {
            one.rule = rule;
            one.session = finding.session.as_ref().map(|c| c.cookie);
        }
        if !permitted {
            self.record_shown(id, &finding, "refuse");
            self.lanes.all.entry(id).and_modify(|one| one.cut = true);
            self.end_association(id);
            return;
        }
        // If it is over meanwhile, that is on its way.
        let admitted = self.keyd.as_mut().is_some_and(|keyd| keyd.admit(id).is_ok());
        if admitted && call.op == Op::Connect {
            self.record_shown(id, &finding, "permit");
        } else if admitted {
            self.lanes.undelivered.insert(id);
        }
    }

    /// Remembers by which token the program sees its peer.
    fn remember(&mut self, id: u64, places: &Places) {
        let Some(one) = self.lanes.all.get_mut(&id) else { return };
        let inner = places.inner_remote.socket_addr().filter(|at| at.port() != 0);
        if let (Op::Accept, Some(inner)) = (one.op, inner) {
            one.inner = Some(inner);
            self.lanes.by_inner.insert(inner, id);
            self.lanes.undelivered.remove(&id);
        }
    }

    fn associated(&mut self, id: u64, places: &Places) {
        self.remember(id, places);
        let Some(one) = self.lanes.all.get_mut(&id) else { return };
        one.up = true;
        let (local, cookie) = (places.local.socket_addr(), one.cookie);
        if one.op == Op::Connect {
            one.local = local.or(one.local);
        }
        if let Some(mut control) = one.control.take() {
            control.local = places.inner_local.socket_addr();
            self.add_session(control);
        }
        if let Some(flow) = cookie.and_then(|cookie| self.flows.get_mut(cookie))
            && flow.op == Op::Connect
        {
            flow.local = local.or(flow.local);
        }
    }

    /// All processes have ended: hears how their last flows did.
    pub(in crate::serve) fn finish_lanes(&mut self) {
        let end = Instant::now() + LAST;
        while !self.lanes.all.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if !self.keyd.as_mut().is_some_and(|keyd| keyd.wait(left)) {
                return self.lose_lanes("the last process has ended");
            }
            self.take_keyd();
        }
    }

    /// The key daemon goes, and with it every protected flow.
    pub(in crate::serve) fn lose_lanes(&mut self, why: &str) {
        let ids: Vec<u64> = self.lanes.all.keys().copied().collect();
        let why = why.to_owned();
        let end = End { errno: libc::ECONNRESET, why, shown: None, sent: 0, received: 0 };
        for id in ids {
            if let Some(one) = self.lanes.forget(id) {
                self.over(&one, &end);
            }
        }
        self.lanes.fronts.clear();
        for listener in self.listeners.values_mut() {
            listener.front = None;
        }
    }

    /// Judges every protected flow again, and cuts what is not permitted any more.
    pub(in crate::serve) fn judge_lanes_again(&mut self, began: Instant) {
        let shown: Vec<u64> =
            self.lanes.all.iter().filter(|(_, one)| one.is_known() && !one.cut).map(|(id, _)| *id).collect();
        for id in shown {
            let Some(one) = self.lanes.get(id) else { continue };
            let (context, call) = (Rc::clone(&one.context), call_of(id, one));
            let finding = self.consider(&context, &call);
            if finding.judgement.permitted || self.mode_for(&context) == Mode::Audit {
                let generation = self.generation_in_force();
                if let Some(one) = self.lanes.all.get_mut(&id) {
                    one.generation = generation;
                    if let Some(flow) = one.cookie.and_then(|cookie| self.flows.get_mut(cookie)) {
                        flow.generation = generation;
                    }
                }
                continue;
            }
            let why = finding.judgement.reason.unwrap_or_else(|| "refused".to_owned());
            self.cut_lane(id, &format!("no longer permitted: {why}"), began);
        }
    }

    /// Cuts flows with those whose certificates were revoked.
    pub(super) fn cut_revoked(&mut self, began: Instant) {
        let members = &self.lanes.members;
        let is_revoked = |one: &&Association| {
            let told = one.peer.as_ref().map(|peer| &peer.told);
            told.is_some_and(|told| members.revokes(&told.serial) || members.revokes(&told.issuer_serial))
        };
        let ids: Vec<u64> =
            self.lanes.all.iter().filter(|(_, one)| is_revoked(one)).map(|(id, _)| *id).collect();
        for id in ids {
            self.cut_lane(id, "the peer's certificate is revoked", began);
        }
    }

    /// The key daemon has cut a flow whose peer's certificate has ended: that is on record, and how late it was.
    fn record_expiry(&mut self, id: u64, why: &str) {
        let end = self.lanes.peer(id).map_or(0, |peer| peer.told.end);
        let past = u64::try_from(end.saturating_add(1)).unwrap_or(0).saturating_mul(1_000_000_000);
        self.record_cut_lane(id, why, realtime().saturating_sub(past));
    }

    fn cut_lane(&mut self, id: u64, why: &str, began: Instant) {
        self.end_association(id);
        let Some(one) = self.lanes.all.get_mut(&id) else { return };
        one.cut = true;
        let cookie = one.cookie;
        self.record_cut_lane(id, why, elapsed(began));
        if let Some(cookie) = cookie {
            self.session_ended(cookie);
        }
    }
}

/// What is told of a flow that runs on.
#[derive(Deserialize)]
struct Live {
    peer: Option<Told>,
    since: i64,
}

/// A flow as if it were to begin now.
fn call_of(id: u64, one: &Association) -> Call {
    let remote: Option<SocketAddr> = one.remote;
    Call {
        op: one.op,
        protocol: Protocol::TCP,
        local: one.local,
        remote,
        socket: None,
        number: -1,
        via: "keyd",
        association: Some(id),
    }
}
