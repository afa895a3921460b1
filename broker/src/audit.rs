//! What a line of the audit log says, and how lines get to disk.
//!
//! `STATE/audit/*.jsonl`, one JSON object per line, fields in this order, `null` where unknown:
//!
//! | field | is |
//! |---|---|
//! | `seq` | number of the record; no number is missing, over rotations and restarts |
//! | `time` | RFC 3339, UTC, nanoseconds |
//! | `host` | this host's name: the one in its certificates, if it has any |
//! | `pid` `start` `exe` `sha256` `uid` `user` `unit` | the process, see [`crate::process::Context`] |
//! | `session` | the control association of a related channel |
//! | `op` | a `portcullis_types::Op`, or `admit` (whose far side has proved itself), `outcome`, `close`, `cut`, `signal`, `socket` (what a held call is about), `policy`, `members`, `broker`, `lost`, `protocol`, `probe` (of getaddrinfo(3), no flow) |
//! | `proto` `local` `remote` | `tcp`, `address:port` |
//! | `peer` | the far process, if it is on this host |
//! | `assurance` | what proves the far side |
//! | `verdict` | `permit`, `refuse`, `protect`, `would-refuse` |
//! | `rule` | text of the rule that decided |
//! | `reason` | plain words |
//! | `lane` | how it travels |
//! | `association` | names the flow: a later `close` has the same |
//! | `generation` | of the policy that decided |
//! | `via` | what brought it here: `shim`, `table` (a cached verdict), `filter`, `broker`, `guard`, `backstop`, `keyd` |
//!
//! Then, where they apply: `rule_at` (`file:line`), `rule_name`, `cmdline`, `parents`, `allow` (the
//! smallest rule that would permit it), `claim` (why a record that a process wrote is not believed),
//! `bytes_in` `bytes_out` `duration` (of a closed flow), `peer_cert` `cipher` `kex` (of lane tls), `of` (the record that
//! this one belongs to), `shared` (the process is in several sessions), `delay_ms`, `lost`.

pub(crate) mod left;
mod log;
mod unsaid;

use std::{fmt::Write, net::SocketAddr};

use portcullis_types::{Assurance, Lane, Protocol};

use crate::{escape::json_string, process::Context};

pub use left::{Left, LeftOpen};
pub use log::{ENDS, Log};
pub use unsaid::Unsaid;

/// A value of an additional field.
#[derive(Clone, Copy, Debug)]
pub enum More<'a> {
    /// A string.
    Text(&'a str),
    /// An integer.
    Number(u64),
    /// Nanoseconds, written as seconds.
    Seconds(u64),
    /// Nanoseconds, written as milliseconds.
    Milliseconds(u64),
}

/// The field of a record that belongs to an earlier one. `None`: that one is not known.
#[must_use]
pub fn of(seq: u64) -> Option<(&'static str, More<'static>)> {
    (seq != 0).then_some(("of", More::Number(seq)))
}

/// One line without its number.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// Nanoseconds since the epoch.
    pub time: u64,
    /// Who.
    pub process: Option<&'a Context>,
    /// Who, as an earlier record has it, where only that is known.
    pub told: Option<&'a str>,
    /// The control association that a related channel belongs to.
    pub session: Option<u64>,
    /// What.
    pub op: &'a str,
    /// The protocol.
    pub protocol: Option<Protocol>,
    /// Local end.
    pub local: Option<SocketAddr>,
    /// Far end.
    pub remote: Option<SocketAddr>,
    /// The far process.
    pub peer: Option<&'a str>,
    /// What proves the far side.
    pub assurance: Option<Assurance>,
    /// The verdict's word.
    pub verdict: Option<&'a str>,
    /// The rule's text.
    pub rule: Option<&'a str>,
    /// Why, in plain words.
    pub reason: Option<&'a str>,
    /// How it travels.
    pub lane: Option<Lane>,
    /// The flow.
    pub association: Option<u64>,
    /// The policy's generation.
    pub generation: Option<u64>,
    /// What brought it here.
    pub via: &'a str,
    /// Further fields.
    pub more: &'a [(&'a str, More<'a>)],
}

impl Line<'_> {
    /// A line of which only this is known.
    #[must_use]
    pub const fn bare(time: u64, op: &'static str, via: &'static str) -> Self {
        Self {
            time,
            process: None,
            told: None,
            session: None,
            op,
            protocol: None,
            local: None,
            remote: None,
            peer: None,
            assurance: None,
            verdict: None,
            rule: None,
            reason: None,
            lane: None,
            association: None,
            generation: None,
            via,
            more: &[],
        }
    }

    /// Appends it as JSON with a newline. `host` is JSON already.
    pub fn write(&self, out: &mut String, seq: u64, stamp: &str, host: &str) {
        let _ = write!(out, "{{\"seq\":{seq},\"time\":\"{stamp}\",\"host\":{host},");
        match self.process.map(|process| &*process.json).or(self.told) {
            Some(process) => out.push_str(process),
            None => out.push_str(
                "\"pid\":null,\"start\":null,\"exe\":null,\"sha256\":null,\"uid\":null,\"user\":null,\"unit\":null",
            ),
        }
        optional(out, "session", self.session, |out, id| {
            let _ = write!(out, "\"{id:x}\"");
        });
        optional(out, "op", Some(self.op), json_string);
        optional(out, "proto", self.protocol, plain);
        optional(out, "local", self.local, plain);
        optional(out, "remote", self.remote, plain);
        optional(out, "peer", self.peer, json_string);
        optional(out, "assurance", self.assurance, plain);
        optional(out, "verdict", self.verdict, json_string);
        optional(out, "rule", self.rule, json_string);
        optional(out, "reason", self.reason, json_string);
        optional(out, "lane", self.lane, plain);
        optional(out, "association", self.association, |out, id| {
            let _ = write!(out, "\"{id:x}\"");
        });
        optional(out, "generation", self.generation, |out, n| {
            let _ = write!(out, "{n}");
        });
        optional(out, "via", Some(self.via), json_string);
        for (name, value) in self.more {
            let _ = write!(out, ",\"{name}\":");
            match value {
                More::Text(text) => json_string(out, text),
                More::Number(n) => {
                    let _ = write!(out, "{n}");
                }
                More::Seconds(ns) => {
                    let _ = write!(out, "{}.{:06}", ns / 1_000_000_000, ns % 1_000_000_000 / 1000);
                }
                More::Milliseconds(ns) => {
                    let _ = write!(out, "{}.{:03}", ns / 1_000_000, ns % 1_000_000 / 1000);
                }
            }
        }
        out.push_str("}\n");
    }
}

fn optional<T>(out: &mut String, name: &str, value: Option<T>, write: impl FnOnce(&mut String, T)) {
    out.push_str(",\"");
    out.push_str(name);
    out.push_str("\":");
    match value {
        Some(value) => write(out, value),
        None => out.push_str("null"),
    }
}

fn plain(out: &mut String, value: impl std::fmt::Display) {
    let _ = write!(out, "\"{value}\"");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_exactly_the_documented_fields_in_order() {
        let mut out = String::new();
        let line = Line {
            protocol: Some(Protocol::TCP),
            remote: Some("[2001:db8::1]:21".parse().unwrap()),
            assurance: Some(Assurance::Address),
            reason: Some("\u{1b}[31m\"x\""),
            association: Some(255),
            more: &[("duration", More::Seconds(1_500_000_000)), ("bytes_in", More::Number(3))],
            ..Line::bare(0, "connect", "shim")
        };
        line.write(&mut out, 7, "1970-01-01T00:00:00Z", "\"h\"");
        assert_eq!(
            out,
            "{\"seq\":7,\"time\":\"1970-01-01T00:00:00Z\",\"host\":\"h\",\"pid\":null,\"start\":null,\"exe\":null,\
             \"sha256\":null,\"uid\":null,\"user\":null,\"unit\":null,\"session\":null,\"op\":\"connect\",\
             \"proto\":\"tcp\",\"local\":null,\"remote\":\"[2001:db8::1]:21\",\"peer\":null,\
             \"assurance\":\"address\",\"verdict\":null,\"rule\":null,\"reason\":\"\\u001b[31m\\\"x\\\"\",\
             \"lane\":null,\"association\":\"ff\",\"generation\":null,\"via\":\"shim\",\"duration\":1.500000,\
             \"bytes_in\":3}\n"
        );
        serde_json::from_str::<serde_json::Value>(&out).unwrap();
    }
}
