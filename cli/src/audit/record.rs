//! One record of the log.

use std::net::{IpAddr, SocketAddr};

use serde_json::Value;

use crate::output::{Ink, Out, escape};

/// One line of `STATE/audit/*.jsonl`, with the fields that every record has; others are kept as they are.
#[derive(Clone, Debug)]
pub struct Record {
    value: Value,
    /// As it stands in the log: the order of its fields is meant.
    text: String,
}

impl Record {
    /// Reads one line; `None` if it is not a JSON object.
    pub fn parse(line: &str) -> Option<Self> {
        let value = serde_json::from_str::<Value>(line).ok().filter(Value::is_object)?;
        Some(Self { value, text: line.to_owned() })
    }

    /// The object itself.
    pub const fn value(&self) -> &Value {
        &self.value
    }

    /// The line of the log.
    pub fn as_written(&self) -> &str {
        &self.text
    }

    /// A text field, as it was written.
    pub fn text(&self, field: &str) -> Option<&str> {
        self.value.get(field)?.as_str()
    }

    /// A text or number field, safe for a terminal.
    pub fn shown(&self, field: &str) -> Option<String> {
        match self.value.get(field)? {
            Value::String(text) => Some(escape(text)),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        }
    }

    /// Number of the record.
    pub fn seq(&self) -> Option<u64> {
        self.value.get("seq")?.as_u64()
    }

    /// When it happened.
    pub fn time(&self) -> Option<jiff::Timestamp> {
        self.text("time")?.parse().ok()
    }

    /// `permit`, `protect`, `refuse` or `would-refuse`.
    pub fn verdict(&self) -> &str {
        self.text("verdict").unwrap_or_default()
    }

    /// Whether somebody was, or would have been, refused.
    pub fn is_refusal(&self) -> bool {
        matches!(self.verdict(), "refuse" | "would-refuse")
    }

    /// The far address.
    pub fn remote(&self) -> Option<(IpAddr, Option<u16>)> {
        let text = self.text("remote")?;
        let whole = text.parse::<SocketAddr>().map(|a| (a.ip(), Some(a.port())));
        whole.or_else(|_| text.parse::<IpAddr>().map(|ip| (ip, None))).ok()
    }

    /// Name of the executable without its folders.
    pub fn program(&self) -> Option<&str> {
        self.text("exe")?.rsplit('/').next()
    }

    /// The record as one line for people.
    pub fn line(&self, out: &Out) -> String {
        let time = self.time().map_or_else(
            || self.shown("time").unwrap_or_default(),
            |t| t.to_zoned(jiff::tz::TimeZone::system()).strftime("%m-%d %H:%M:%S%.3f").to_string(),
        );
        let mut line = format!("{} {}", out.ink(Ink::Faint, &time), self.what(out));
        line.insert_str(0, &format!("{:>6} ", self.shown("seq").unwrap_or_default()));
        if let Some(why) = self.why() {
            line.push_str("  ");
            line.push_str(&out.ink(Ink::Faint, &why));
        }
        line
    }

    /// Verdict, call, program and flow.
    pub fn what(&self, out: &Out) -> String {
        let verdict = self.verdict();
        let ink = match verdict {
            "permit" | "protect" => Ink::Good,
            "would-refuse" => Ink::Note,
            _ => Ink::Bad,
        };
        let field = |name: &str| self.shown(name).unwrap_or_default();
        let verdict = out.ink(ink, &format!("{verdict:<12}"));
        let mut what = format!("{verdict} {:<7} {:<4}", field("op"), field("proto"));
        if let Some(pid) = self.shown("pid") {
            what.push_str(&format!(" {}[{pid}]", self.program().map_or_else(|| "?".into(), escape)));
        }
        for (arrow, name) in self.flow() {
            if let Some(address) = self.shown(name) {
                what.push_str(arrow);
                what.push_str(&address);
            }
        }
        if let Some(peer) = self.shown("peer") {
            what.push_str(&format!(" ({peer})"));
        }
        what
    }

    /// The reason, or the rule, and what is special about it.
    pub fn why(&self) -> Option<String> {
        // Why it was refused says more than the rule; why it was permitted is the rule.
        let why = if self.is_refusal() { ["reason", "rule"] } else { ["rule", "reason"] };
        let why = why.into_iter().find_map(|name| self.shown(name));
        let extras = [
            "lane",
            "kex",
            "assurance",
            "session",
            "via",
            "bytes_in",
            "bytes_out",
            "duration",
            "delay_ms",
            "lost",
        ];
        let extras = extras.into_iter().filter_map(|name| {
            let value =
                self.shown(name).filter(|v| !["none", "plain", "shim", "broker"].contains(&v.as_str()))?;
            Some(format!("{name}={value}"))
        });
        let all: Vec<String> = why.into_iter().chain(extras).collect();
        (!all.is_empty()).then(|| all.join(" "))
    }

    /// The two addresses in the direction in which the flow was opened.
    fn flow(&self) -> [(&'static str, &'static str); 2] {
        match self.text("op") {
            Some("accept" | "receive") => [(" ", "remote"), (" -> ", "local")],
            _ => [(" ", "local"), (" -> ", "remote")],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_from_outside_is_escaped() {
        let record =
            Record::parse(r#"{"seq":1,"pid":2,"exe":"/tmp/\u001b[2Jx","verdict":"refuse"}"#).unwrap();
        let line = record.line(&Out::new());
        assert!(line.contains("\\u{1b}[2Jx"), "{line}");
    }

    #[test]
    fn a_flow_is_shown_in_the_direction_of_its_opening() {
        let text =
            r#"{"seq":2,"op":"accept","local":"10.0.0.1:21","remote":"10.0.0.2:5","verdict":"permit"}"#;
        let line = Record::parse(text).unwrap().line(&Out::new());
        assert!(line.contains("10.0.0.2:5 -> 10.0.0.1:21"), "{line}");
    }
}
