//! Protected flows that the last records begin and do not end, because their broker was killed.

use std::{borrow::Cow, collections::BTreeMap, net::SocketAddr};

use serde::Deserialize;

/// One record, as far as it is needed.
#[derive(Deserialize)]
struct Record<'a> {
    seq: u64,
    #[serde(borrow)]
    session: Option<Cow<'a, str>>,
    #[serde(borrow)]
    op: Cow<'a, str>,
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
    peer: Option<String>,
    #[serde(borrow)]
    verdict: Option<Cow<'a, str>>,
    rule: Option<String>,
    #[serde(borrow)]
    association: Option<Cow<'a, str>>,
    generation: Option<u64>,
    of: Option<u64>,
}

/// A flow without an end.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Left {
    /// Number of the record with which it begins.
    pub seq: u64,
    /// Its socket's cookie.
    pub cookie: Option<u64>,
    /// Whether it arrived.
    pub inbound: bool,
    /// Whether its far side has proved itself.
    pub up: bool,
    /// The control association that it belongs to.
    pub session: Option<u64>,
    /// Local end.
    pub local: Option<SocketAddr>,
    /// Far end.
    pub remote: Option<SocketAddr>,
    /// The far process.
    pub peer: Option<String>,
    /// The rule's text.
    pub rule: Option<String>,
    /// Of the policy that decided.
    pub generation: Option<u64>,
    /// Its process, as that record has it.
    pub process: String,
}

/// See the module.
#[derive(Debug, Default)]
pub struct LeftOpen(BTreeMap<u64, Left>);

impl LeftOpen {
    /// Reads records, oldest first.
    #[must_use]
    pub fn read<'a>(lines: impl Iterator<Item = &'a str>) -> Self {
        let mut open = Self::default();
        // All that concerns such a flow names its lane; within a string of JSON there is no bare quotation mark.
        for line in lines.filter(|line| line.contains("\"lane\":\"tls\"")) {
            if let Ok(record) = serde_json::from_str(line) {
                open.take_in(record, line);
            }
        }
        open
    }

    fn take_in(&mut self, record: Record<'_>, line: &str) {
        let number = |text: Option<Cow<'_, str>>| u64::from_str_radix(&text?, 16).ok();
        let begins = match (&*record.op, record.verdict.as_deref()) {
            ("connect", Some("protect")) => Some(false),
            ("accept", Some("permit")) => Some(true),
            _ => None,
        };
        match (record.of, begins) {
            (None, Some(inbound)) => {
                let process =
                    line.split_once("\"pid\":").and_then(|(_, rest)| rest.split_once(",\"session\":"));
                let left = Left {
                    seq: record.seq,
                    cookie: number(record.association),
                    inbound,
                    up: inbound,
                    session: number(record.session),
                    local: record.local,
                    remote: record.remote,
                    peer: record.peer,
                    rule: record.rule,
                    generation: record.generation,
                    process: process.map(|(told, _)| format!("\"pid\":{told}")).unwrap_or_default(),
                };
                self.0.insert(record.seq, left);
            }
            (Some(of), _) if record.op == "admit" => {
                if let Some(left) = self.0.get_mut(&of) {
                    (left.up, left.local, left.peer) = (true, record.local, record.peer);
                }
            }
            (Some(of), _) => drop(self.0.remove(&of)),
            (None, None) => {}
        }
    }

    /// Takes out the flow of this socket.
    pub fn of_cookie(&mut self, cookie: u64) -> Option<Left> {
        self.take(|left| left.cookie == Some(cookie))
    }

    /// Takes out one that has arrived between these addresses.
    pub fn between(&mut self, local: Option<SocketAddr>, remote: Option<SocketAddr>) -> Option<Left> {
        self.take(|left| left.inbound && (left.local, left.remote) == (local, remote))
    }

    fn take(&mut self, is_it: impl Fn(&Left) -> bool) -> Option<Left> {
        let seq = *self.0.iter().find(|(_, left)| is_it(left))?.0;
        self.0.remove(&seq)
    }

    /// Takes out all.
    pub fn drain(&mut self) -> impl Iterator<Item = Left> + use<> {
        std::mem::take(&mut self.0).into_values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn line(n: u64) -> &'static str {
        match n {
            1 => {
                r#"{"seq":1,"time":"t","host":"h","pid":7,"exe":"\",\"session\":","session":null,"op":"connect","local":null,"remote":"192.0.2.1:21","verdict":"protect","lane":"tls","association":"ff","generation":3}"#
            }
            2 => {
                r#"{"seq":2,"time":"t","host":"h","pid":7,"session":null,"op":"admit","local":"192.0.2.9:5","remote":"192.0.2.1:21","peer":"p","verdict":"permit","lane":"tls","association":"ff","of":1}"#
            }
            3 => {
                r#"{"seq":3,"time":"t","host":"h","pid":8,"session":"a","op":"accept","local":"192.0.2.9:6","remote":"192.0.2.1:4","verdict":"permit","lane":"tls","association":"fe"}"#
            }
            4 => {
                r#"{"seq":4,"time":"t","host":"h","pid":8,"session":null,"op":"close","verdict":"permit","lane":"tls","association":"fe","of":3}"#
            }
            _ => {
                r#"{"seq":5,"time":"t","host":"h","pid":9,"session":null,"op":"connect","verdict":"permit","lane":"plain","association":"fd"}"#
            }
        }
    }

    #[test]
    fn what_has_begun_and_not_ended_is_left() {
        let mut open = LeftOpen::read([1, 2, 3, 5].map(line).into_iter());
        let first = open.of_cookie(0xff).unwrap();
        assert_eq!((first.seq, first.up, first.inbound, first.generation), (1, true, false, Some(3)));
        assert_eq!(first.process, r#""pid":7,"exe":"\",\"session\":""#);
        assert_eq!(first.local, Some("192.0.2.9:5".parse().unwrap()));
        assert_eq!(open.of_cookie(0xff), None);
        let [local, remote] = ["192.0.2.9:6", "192.0.2.1:4"].map(|at| at.parse().ok());
        assert_eq!(open.between(remote, local), None);
        assert_eq!(open.between(local, remote).unwrap().session, Some(10));
        assert_eq!(
            LeftOpen::read([1, 3, 4].map(line).into_iter()).drain().map(|left| left.seq).collect::<Vec<_>>(),
            [1]
        );
    }
}
