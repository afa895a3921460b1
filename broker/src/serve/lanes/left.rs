//! Protected flows that an earlier broker had begun: their ends are put on record, whoever saw them.

use portcullis_types::{Assurance, Lane, Protocol, Verdict};

use super::records::{End, facts};
use crate::{
    audit::{Left, Line, More},
    serve::{Broker, word},
    sys::realtime,
};

impl Broker {
    /// What an earlier broker has begun and the key daemon does not have any more has ended, however that was.
    pub(in crate::serve) fn end_all_left(&mut self) {
        for left in self.lanes.left.drain() {
            self.end_left(&left, None);
        }
    }

    /// Puts the end of a flow on record that an earlier broker had begun.
    pub(super) fn end_left(&mut self, left: &Left, end: Option<&End>) {
        let mut more = facts(None, end.and_then(|end| end.shown.as_deref()));
        if let Some(end) = end.filter(|_| left.up) {
            more.push(("bytes_in", More::Number(end.received)));
            more.push(("bytes_out", More::Number(end.sent)));
        }
        more.push(("of", More::Number(left.seq)));
        let (op, verdict) = match end {
            _ if left.up => ("close", Some(word(Verdict::Permit))),
            Some(end) if !end.is_native() => ("connect", Some(word(Verdict::Refuse))),
            _ => ("outcome", None),
        };
        let reason = match end {
            Some(end) => (end.errno != 0).then_some(end.why.as_str()),
            None => Some("its broker and its key daemon were killed: nobody saw how it ended"),
        };
        self.log.push(&Line {
            told: Some(&left.process).filter(|told| !told.is_empty()).map(String::as_str),
            session: left.session,
            protocol: Some(Protocol::TCP),
            local: left.local,
            remote: left.remote,
            peer: left.peer.as_deref(),
            assurance: Some(if left.up { Assurance::Certificate } else { Assurance::None }),
            verdict,
            rule: left.rule.as_deref(),
            reason,
            lane: Some(Lane::Tls),
            association: left.cookie,
            generation: left.generation,
            more: &more,
            ..Line::bare(realtime(), op, "keyd")
        });
    }
}
