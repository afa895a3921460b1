//! What outlives a broker: associations that run.

use portcullis_wire::keyd::{Head, Kind};
use serde::Serialize;
use serde_json::value::RawValue;
use zerocopy::IntoBytes;

use super::{Association, Associations, Report};

/// Most reports that wait for the next broker.
pub(super) const MOST_ENDED: usize = 1 << 16;

/// An association, as the next broker is told of it.
#[derive(Serialize)]
struct Live<'a> {
    peer: Option<&'a RawValue>,
    process: Option<&'a RawValue>,
    since: i64,
}

fn raw(json: &[u8]) -> Option<&RawValue> {
    serde_json::from_slice(json).ok()
}

impl Association {
    /// That it runs, or has run.
    pub(super) fn live(&self, id: u64) -> Report {
        let told = self.told();
        let live =
            Live { peer: told.as_deref().and_then(raw), process: raw(&self.process), since: self.since };
        let head = self.name(Head { tag: id, ..Head::new(Kind::Live, 0) });
        let body = serde_json::to_vec(&live).unwrap_or_default();
        (head, [self.places.as_bytes(), &body].concat())
    }
}

impl Associations {
    /// The broker has gone: what waits for its word ends, and nothing new begins.
    pub fn bereave(&mut self) {
        self.bereaved = true;
        for id in self.waiting_if(|_| true) {
            self.stop(id, libc::ECONNREFUSED, "there is no broker");
        }
        for one in self.all.values_mut() {
            one.unknown = true;
        }
        // What was to be told of flows that do not run concerns nobody now.
        let ended = self.reports().into_iter().filter(|(head, _)| head.kind == Kind::Over as u16);
        self.ended.extend(ended);
    }

    /// A broker has come.
    pub const fn welcome(&mut self) {
        self.bereaved = false;
    }

    /// Tells of what runs, the oldest first, since what belongs to another is judged by it; and then of what has ended
    /// since an earlier broker was there.
    pub fn list(&mut self) {
        let mut running: Vec<_> = self.all.iter_mut().filter(|(_, one)| one.running).collect();
        running.sort_by_key(|(id, _)| **id);
        for (id, one) in running {
            one.unknown = false;
            self.reports.push(one.live(*id));
        }
        self.reports.append(&mut self.ended);
    }
}
