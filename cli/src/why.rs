//! `portcullis why`: one refusal, explained.
//!
//! Everything that is said stands in the record, so that it can be explained long after policy, process and
//! broker are gone.

use portcullis_broker::control::Request;
use serde::Serialize;

use crate::{
    COULD_NOT, Format, StateArg,
    audit::{Entry, Log, Record},
    control::{self, AskError},
    output::{Ink, Out, escape},
    place::Place,
};

/// Options of `portcullis why`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Number of an audit record
    #[arg(value_name = "SEQ", conflicts_with = "last")]
    seq: Option<u64>,
    /// The last refusal (as without SEQ)
    #[arg(long)]
    last: bool,
    /// How the explanation is printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[command(flatten)]
    state: StateArg,
}

/// An explanation, as JSON has it.
#[derive(Serialize)]
struct Explanation<'a> {
    record: &'a serde_json::Value,
    because: Vec<String>,
    allow: Option<&'a str>,
}

/// Explains; the result is the exit status.
pub fn run(args: &Args, out: &mut Out) -> u8 {
    match find(args) {
        Ok(record) => {
            match args.format {
                Format::Json => out.json(&Explanation {
                    record: record.value(),
                    because: sentences(&record),
                    allow: record.text("allow"),
                }),
                Format::Text => tell(&record, out),
            }
            0
        }
        Err(error) => {
            out.error(&error);
            COULD_NOT
        }
    }
}

fn find(args: &Args) -> Result<Record, AskError> {
    let place = Place::find(args.state.state.as_deref())?;
    control::ask(&place, &Request::Flush)?;
    let mut log = Log::open(&place)?;
    let mut found = None;
    while let Some(entry) = log.next()? {
        let Entry::Record(record) = entry else { continue };
        let wanted = args.seq.map_or_else(|| record.is_refusal(), |seq| record.seq() == Some(seq));
        if wanted {
            found = Some(record);
        }
    }
    let absent = || match args.seq {
        Some(seq) => format!("no record {seq} is in the audit log of `{}`", place.state.display()),
        None => format!("no refusal is in the audit log of `{}`", place.state.display()),
    };
    found.ok_or_else(|| AskError::Absent(absent()))
}

fn tell(record: &Record, out: &mut Out) {
    let line = record.line(out);
    out.line(line);
    out.line("");
    for sentence in sentences(record) {
        out.line(sentence);
    }
    if let Some(rule) = record.shown("allow") {
        out.line("");
        out.line("This rule would allow it, and nothing else:");
        out.line("");
        out.line(format!("    {}", out.ink(Ink::Good, &rule)));
    }
}

/// Who, what, and by which rule, in plain words and safe for a terminal.
fn sentences(record: &Record) -> Vec<String> {
    let reason = record.shown("reason").map(|reason| capital(&reason));
    [who(record), what(record), own_policy(record), rule(record), reason, certificate(record), other(record)]
        .into_iter()
        .flatten()
        .collect()
}

fn who(record: &Record) -> Option<String> {
    let exe = record.shown("exe");
    if exe.is_none() && record.shown("pid").is_none() {
        return None;
    }
    let exe = exe.unwrap_or_else(|| "a program that cannot be vouched for".into());
    let mut text = format!("Who: {exe}");
    let add = |text: &mut String, before: &str, field: &str| {
        if let Some(value) = record.shown(field).filter(|v| !v.is_empty()) {
            text.push_str(before);
            text.push_str(&value);
        }
    };
    add(&mut text, ", process ", "pid");
    add(&mut text, ", user ", "user");
    add(&mut text, ", unit ", "unit");
    if let Some(parent) = record.value().get("parents").and_then(first_text) {
        text.push_str(", started by ");
        text.push_str(&escape(parent));
    }
    text.push('.');
    Some(text)
}

fn first_text(value: &serde_json::Value) -> Option<&str> {
    let all = value.as_str().or_else(|| value.as_array()?.first()?.as_str())?;
    // The broker writes them nearest first: `/bin/sh < /usr/sbin/cron`.
    all.split(" < ").next().filter(|t| !t.is_empty())
}

fn what(record: &Record) -> Option<String> {
    let proto = record.shown("proto").unwrap_or_else(|| "a".into());
    let end = |field: &str| record.shown(field).unwrap_or_else(|| "an unknown address".into());
    let (local, remote) = (end("local"), end("remote"));
    Some(match record.text("op")? {
        "connect" => format!("What: it wanted to connect to {remote} over {proto}."),
        "send" => format!("What: it wanted to send to {remote} over {proto}."),
        "bind" => format!("What: it wanted to take the local address {local} over {proto}."),
        "listen" => format!("What: it wanted to be reachable at {local} over {proto}."),
        "accept" => format!("What: {remote} wanted to connect to it at {local} over {proto}."),
        "receive" => format!("What: {remote} sent to it at {local} over {proto}."),
        "socket" => format!("What: it wanted a {proto} socket."),
        "cut" => format!("What: a flow that lived was cut, between {local} and {remote} over {proto}."),
        "signal" => "What: it wanted to end or stop a part of Portcullis by a signal.".into(),
        other => format!("What: {}.", escape(other)),
    })
}

fn rule(record: &Record) -> Option<String> {
    let Some(rule) = record.shown("rule") else {
        let unsaid = record.is_refusal() && record.shown("reason").is_none();
        return unsaid.then(|| "Rule: none permits it.".to_owned());
    };
    let named = record.shown("rule_name").map_or_else(String::new, |n| format!(" ({n})"));
    let at = record.shown("rule_at").map_or_else(String::new, |at| format!(", at {at}"));
    Some(format!("Rule: {}{named}{at}.", rule.trim_end_matches(';')))
}

/// Which policy it was that refused, if not the one that is in force for all. (A record of the policy itself has that
/// field too.)
fn own_policy(record: &Record) -> Option<String> {
    let policy = record.shown("policy").filter(|_| record.is_refusal())?;
    Some(format!("Policy: its run's own, {policy}, which narrows what the service permits."))
}

fn certificate(record: &Record) -> Option<String> {
    record.shown("peer_cert").map(|shown| format!("Certificate at the far end: {shown}."))
}

fn other(record: &Record) -> Option<String> {
    match record.verdict() {
        "would-refuse" => {
            Some("It went on all the same, as `audit` asks: `--mode audit`, or the word in the rule.".into())
        }
        "permit" | "protect" => Some("It was permitted.".into()),
        _ => None,
    }
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    let mut whole: String = chars.next().into_iter().flat_map(char::to_uppercase).chain(chars).collect();
    if !whole.ends_with(['.', '!', '?']) {
        whole.push('.');
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_explained_in_plain_words() {
        let record = Record::parse(
            r#"{"seq":3,"pid":7,"exe":"/usr/bin/curl","user":"www\u001b-data","parents":"/bin/sh < /sbin/init","op":"connect","peer_cert":"`CN=\u001b`",
                "proto":"tcp","remote":"192.0.2.1:80","verdict":"refuse","reason":"no rule permits it"}"#,
        )
        .unwrap();
        assert_eq!(
            sentences(&record),
            [
                "Who: /usr/bin/curl, process 7, user www\\u{1b}-data, started by /bin/sh.",
                "What: it wanted to connect to 192.0.2.1:80 over tcp.",
                "No rule permits it.",
                "Certificate at the far end: `CN=\\u{1b}`."
            ]
        );
    }

    #[test]
    fn what_is_no_call_is_explained_too() {
        let said = |text: &str| what(&Record::parse(text).unwrap()).unwrap();
        assert_eq!(
            said(
                r#"{"seq":1,"op":"cut","proto":"tcp","local":"10.0.0.1:21","remote":"10.0.0.2:5","verdict":"refuse"}"#
            ),
            "What: a flow that lived was cut, between 10.0.0.1:21 and 10.0.0.2:5 over tcp."
        );
        let signal = said(r#"{"seq":1,"op":"signal","pid":7,"verdict":"refuse"}"#);
        assert_eq!(signal, "What: it wanted to end or stop a part of Portcullis by a signal.");
    }
}
