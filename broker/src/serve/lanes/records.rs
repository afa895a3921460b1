//! What becomes of protected flows, on record.

use std::rc::Rc;

use portcullis_types::{Assurance, Lane, Op, Protocol, Verdict};
use portcullis_wire::keyd::Places;

use super::{Association, Peer};
use crate::{
    audit::{Line, More, of},
    serve::{Broker, judge::Finding, now_seconds, word},
    sys::realtime,
};

/// Most peers a second whose failed handshake has a record of its own.
const MOST_A_SECOND: u32 = 100;

/// Bounds records that anybody on the network could cause.
#[derive(Debug, Default)]
pub(in crate::serve) struct Flood {
    second: u64,
    told: u32,
    missed: u64,
}

impl Flood {
    /// Whether one more may be told, and how many were not before it.
    fn admit(&mut self) -> Option<u64> {
        let now = now_seconds();
        if now != self.second {
            (self.second, self.told) = (now, 0);
        }
        if self.told >= MOST_A_SECOND {
            self.missed += 1;
            return None;
        }
        self.told += 1;
        Some(std::mem::take(&mut self.missed))
    }
}

/// How a flow ended.
pub(super) struct End {
    pub(super) errno: i32,
    pub(super) why: String,
    pub(super) shown: Option<String>,
    pub(super) sent: u64,
    pub(super) received: u64,
}

impl End {
    /// Whether it was the network, or the program itself.
    pub(super) fn is_native(&self) -> bool {
        ["no connection", "the program", "another socket"].iter().any(|native| self.why.starts_with(native))
    }
}

/// What a record says of the certificate and what was agreed on.
pub(super) fn facts<'a>(
    peer: Option<&'a Peer>,
    certificate: Option<&'a str>,
) -> Vec<(&'static str, More<'a>)> {
    let mut more = Vec::with_capacity(8);
    if let Some(peer) = peer {
        more.push(("cipher", More::Text(&peer.told.cipher)));
        more.push(("kex", More::Text(&peer.told.kex)));
    }
    if let Some(certificate) = certificate {
        more.push(("peer_cert", More::Text(certificate)));
    }
    more
}

impl Association {
    /// A record of it, but for what has happened.
    fn line(&self, op: &'static str, via: &'static str) -> Line<'_> {
        let (lane, assurance) = self.lane();
        Line {
            process: Some(&self.context),
            session: self.session,
            protocol: Some(Protocol::TCP),
            local: self.local,
            remote: self.remote,
            peer: self.peer.as_ref().map(|peer| peer.told.id.as_str()),
            assurance: Some(assurance),
            rule: self.rule.as_ref().map(|r| &*r.text),
            lane: Some(lane),
            association: self.cookie,
            generation: Some(self.generation),
            ..Line::bare(realtime(), op, via)
        }
    }
}

impl Broker {
    /// A flow is over: its end is put on record, and what hung on it ends.
    pub(super) fn over(&mut self, one: &Association, end: &End) {
        if let Some(cookie) = one.cookie {
            self.flows.forget(cookie);
            self.session_ended(cookie);
        }
        if one.cut && !one.up {
            return; // its refusal is on record
        }
        let certificate = one.peer.as_ref().map(|peer| peer.certificate()).or_else(|| end.shown.clone());
        let mut more = facts(one.peer.as_deref(), certificate.as_deref());
        let now = realtime();
        let verdict = if one.up || one.is_known() {
            more.push(("bytes_in", More::Number(end.received)));
            more.push(("bytes_out", More::Number(end.sent)));
            more.push(("duration", More::Seconds(now.saturating_sub(one.since))));
            "permit"
        } else {
            "refuse"
        };
        more.extend(of(one.seq));
        // What the network says is no refusal: nobody was there to be judged.
        let native = verdict == "refuse" && end.is_native();
        let op = if verdict == "permit" {
            "close"
        } else if native {
            "outcome"
        } else {
            "connect"
        };
        if native {
            more.push(("errno", More::Number(u64::from(end.errno.unsigned_abs()))));
        }
        let reason = (end.errno != 0).then_some(end.why.as_str());
        self.log.push(&Line {
            verdict: (!native).then_some(verdict),
            reason,
            more: &more,
            time: now,
            ..one.line(op, "keyd")
        });
    }

    /// Somebody came to a front and did not prove who he is.
    pub(super) fn failed_in(&mut self, front: Option<u32>, places: &Places, end: &End) {
        let Some(front) = front else { return };
        let Some(missed) = self.lanes.flood.admit() else { return };
        let behind = self.lanes.fronts.get(&front);
        let listener = behind.and_then(|all| all.iter().find_map(|cookie| self.listeners.get(cookie)));
        let context = listener.map(|l| Rc::clone(&l.context));
        let mut more = facts(None, end.shown.as_deref());
        if missed > 0 {
            more.push(("missed", More::Number(missed)));
        }
        self.log.push(&Line {
            process: context.as_deref(),
            protocol: Some(Protocol::TCP),
            local: places.local.socket_addr(),
            remote: places.remote.socket_addr(),
            assurance: Some(Assurance::None),
            verdict: Some(word(Verdict::Refuse)),
            reason: Some(&end.why),
            lane: Some(Lane::Tls),
            generation: Some(self.generation_in_force()),
            more: &more,
            ..Line::bare(realtime(), "accept", "keyd")
        });
    }

    /// Puts on record what became of a flow when its far end had shown who it is.
    pub(super) fn record_shown(&mut self, id: u64, finding: &Finding, verdict: &'static str) {
        let Some(one) = self.lanes.get(id) else { return };
        let certificate = one.peer.as_ref().map(|peer| peer.certificate());
        let mut more = Vec::with_capacity(8);
        more.extend(of(one.seq));
        if let (Some(peer), Some(certificate)) = (&one.peer, &certificate) {
            more.push(("peer_cert", More::Text(certificate)));
            more.push(("cipher", More::Text(&peer.told.cipher)));
            more.push(("kex", More::Text(&peer.told.kex)));
        }
        if let Some(rule) = &one.rule {
            more.push(("rule_at", More::Text(&rule.at)));
        }
        if let Some(allow) = &finding.allow {
            more.push(("allow", More::Text(allow)));
        }
        let op = match (verdict, one.op) {
            ("refuse", Op::Accept) => "accept",
            ("refuse", _) => "connect",
            _ => "admit",
        };
        self.log.push(&Line {
            verdict: Some(verdict),
            reason: finding.judgement.reason.as_deref(),
            generation: self.in_force.as_ref().map(|f| f.generation),
            more: &more,
            ..one.line(op, "keyd")
        });
    }

    /// Puts on record that a flow was cut, and how many nanoseconds after its cause.
    pub(super) fn record_cut_lane(&mut self, id: u64, why: &str, delay: u64) {
        let Some(one) = self.lanes.get(id) else { return };
        let certificate = one.peer.as_ref().map(|peer| peer.certificate());
        let mut more = vec![("delay_ms", More::Milliseconds(delay))];
        more.extend(of(one.seq));
        more.extend(certificate.as_deref().map(|shown| ("peer_cert", More::Text(shown))));
        self.log.push(&Line {
            verdict: Some(word(Verdict::Refuse)),
            reason: Some(why),
            generation: Some(self.in_force.as_ref().map_or(0, |f| f.generation)),
            more: &more,
            ..one.line("cut", "broker")
        });
    }
}
