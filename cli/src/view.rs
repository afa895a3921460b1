//! `portcullis ps` and `portcullis status`: what is wrapped, and what holds it.

use portcullis_broker::control::{Answer, Hold, ProcessRow, Request, Status};
use serde::Serialize;

use crate::{
    COULD_NOT, Format, StateArg,
    control::{self, AskError},
    output::{Ink, Out, escape},
    place::Place,
    run::ENV_NAME,
};

/// Options of `portcullis ps` and `portcullis status`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// How the result is printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[command(flatten)]
    state: StateArg,
}

/// Exit status of `status` when something is not as it should be.
const FINDINGS: u8 = 1;

/// Lists wrapped processes; the result is the exit status.
pub fn ps(args: &Args, out: &mut Out) -> u8 {
    let rows = match ask(args, &Request::Ps) {
        Ok(Some(Answer::Ps(rows))) => rows,
        Ok(_) => Vec::new(),
        Err(error) => {
            out.error(&error);
            return COULD_NOT;
        }
    };
    let named = |row: ProcessRow| ProcessRow { name: label(row.pid).or(row.name), ..row };
    let rows: Vec<ProcessRow> = rows.into_iter().map(named).collect();
    match args.format {
        Format::Json => out.json(&rows),
        Format::Text => table(&rows, out),
    }
    0
}

/// `run --name` of the innermost run, as the process's environment has it. Those that write over that (nginx, redis) have
/// the name that the broker knows.
fn label(pid: i32) -> Option<String> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mut values = environment.split(|b| *b == 0).filter_map(|v| v.strip_prefix(ENV_NAME.as_bytes()));
    Some(String::from_utf8_lossy(values.next()?.strip_prefix(b"=")?).into_owned())
}

fn ask(args: &Args, request: &Request) -> Result<Option<Answer>, AskError> {
    let place = Place::find(args.state.state.as_deref())?;
    control::ask(&place, request)
}

fn table(rows: &[ProcessRow], out: &mut Out) {
    let head = format!(
        "{:>7}  {:<10} {:<10} {:<26} {:>9} {:>7}  COMMAND",
        "PID", "NAME", "USER", "HELD BY", "PERMITTED", "REFUSED"
    );
    out.line(out.ink(Ink::Strong, &head));
    for row in rows {
        let held = if row.held_by.is_empty() { "nothing".to_owned() } else { row.held_by.join(",") };
        let refused = format!("{:>7}", row.refused);
        let refused = if row.refused > 0 { out.ink(Ink::Bad, &refused) } else { refused };
        out.line(format!(
            "{:>7}  {:<10} {:<10} {:<26} {:>9} {refused}  {}",
            row.pid,
            row.name.as_deref().map_or_else(|| "-".into(), escape),
            escape(&row.user),
            escape(&held),
            row.permitted,
            // The broker has escaped it already.
            row.cmdline,
        ));
        for policy in &row.narrowed_by {
            out.line(out.ink(Ink::Faint, &format!("         narrowed by {policy}")));
        }
        for line in coverage(&row.coverage) {
            out.line(out.ink(Ink::Faint, &format!("         {}", escape(&line))));
        }
        for it in &row.listeners {
            out.line(out.ink(
                Ink::Faint,
                &format!("         listens on {} for {}, by {}", it.local, it.scope, it.held_by),
            ));
            if let Some(why) = &it.unprotected {
                let text = format!("           who must prove who he is there is refused: {}", escape(why));
                out.line(out.ink(Ink::Bad, &text));
            }
        }
        for it in &row.associations {
            let address = |a: &Option<String>| a.as_deref().map_or_else(|| "?".into(), escape);
            let rule = it.rule.as_deref().map_or_else(String::new, |r| format!(", rule {}", escape(r)));
            let carried = match (it.bytes_in, it.bytes_out) {
                (Some(received), Some(sent)) => format!(", {received} bytes in, {sent} out"),
                _ => String::new(),
            };
            let text = format!(
                "         {} {} - {} {}, assurance {}, generation {}{rule}{carried}, for {:.0} s",
                it.proto,
                address(&it.local),
                address(&it.remote),
                it.lane,
                it.assurance,
                it.generation,
                it.duration,
            );
            out.line(out.ink(Ink::Faint, &text));
            if let (Some(peer), Some(cipher), Some(kex)) = (&it.peer, &it.cipher, &it.kex) {
                let text = format!("           with {}, {cipher}, {kex}, since {}", escape(peer), it.since);
                out.line(out.ink(Ink::Faint, &text));
            }
        }
    }
}

/// Since when a process is held by what, and what does not hold it. That it has no filter says nothing, unless it
/// listens.
fn coverage(all: &[Hold]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut times: Vec<&str> = all.iter().filter(|h| h.holds).map(|h| h.since.as_str()).collect();
    times.dedup();
    for since in times {
        let names: Vec<&str> =
            all.iter().filter(|h| h.holds && h.since == since).map(|h| h.by.as_str()).collect();
        lines.push(format!("held by {} since {since}", names.join(", ")));
    }
    for hold in all.iter().filter(|h| h.by != "filter") {
        if let Some(why) = &hold.why {
            lines.push(format!("no {} since {}: {why}", hold.by, hold.since));
        }
    }
    lines
}

/// `status` as JSON.
#[derive(Serialize)]
struct Report<'a> {
    state: String,
    running: bool,
    #[serde(flatten)]
    broker: Option<&'a Status>,
}

/// Says how the folder's broker is; the result is the exit status.
pub fn status(args: &Args, out: &mut Out) -> u8 {
    let place = match Place::find(args.state.state.as_deref()) {
        Ok(place) => place,
        Err(error) => {
            out.error(&error);
            return COULD_NOT;
        }
    };
    let status = match control::ask(&place, &Request::Status) {
        Ok(Some(Answer::Status(status))) => Some(*status),
        Ok(_) => None,
        Err(error) => {
            out.error(&error);
            return COULD_NOT;
        }
    };
    let state = place.state.display().to_string();
    match args.format {
        Format::Json => out.json(&Report { state, running: status.is_some(), broker: status.as_ref() }),
        Format::Text => describe(&state, status.as_ref(), out),
    }
    status.map_or(0, |s| if is_sound(&s) { 0 } else { FINDINGS })
}

fn is_sound(status: &Status) -> bool {
    status.generation > 0
        && status.diagnostic.is_none()
        && status.layers.iter().all(|layer| layer.diagnostic.is_none())
        && status.audit_lost == 0
        && status.audit_error.is_none()
}

/// So many of them.
fn number(count: u64, what: &str) -> String {
    let ending = match (count, what.ends_with('s')) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{count} {what}{ending}")
}

fn describe(state: &str, status: Option<&Status>, out: &mut Out) {
    out.line(format!("state        {}", escape(state)));
    let Some(s) = status else {
        out.line("broker       not running; it starts with the first `portcullis run`");
        return;
    };
    out.line(format!("broker       process {}, uid {}", s.pid, s.uid));
    out.line(format!(
        "mode         {}",
        if s.mode == portcullis_broker::Mode::Audit { "audit" } else { "enforce" }
    ));
    out.line(format!("policy       {}", escape(&s.policy)));
    let loaded = s.loaded.as_deref().map_or_else(String::new, |t| format!(", since {}", escape(t)));
    match s.generation {
        0 => out.line(out.ink(Ink::Bad, "generation   none in force: everything is refused")),
        n => out.line(format!("generation   {n}{loaded}")),
    }
    for layer in &s.layers {
        let mode = if layer.mode == portcullis_broker::Mode::Audit { "audit" } else { "enforce" };
        let text =
            format!("narrowed by  {}, mode {mode}, for {}", layer.policy, number(layer.runs as u64, "run"));
        out.line(if layer.in_force {
            text
        } else {
            out.ink(Ink::Bad, &format!("{text}: none in force, refused"))
        });
        if let Some(diagnostic) = &layer.diagnostic {
            out.line(out.ink(Ink::Bad, "             the file as it is now is not in force:"));
            diagnostic.lines().for_each(|line| out.line(format!("               {}", escape(line))));
        }
    }
    let associations = number(s.associations as u64, "association");
    out.line(format!("serves       {}, {associations}", number(s.processes as u64, "process")));
    for covered in &s.coverage {
        let form = covered.form.as_deref().filter(|form| *form != "bpf");
        let form = form.map_or_else(String::new, |form| format!(" (by {})", escape(form)));
        out.line(format!("  {:<10} {}{form}", covered.by, number(covered.processes as u64, "process")));
        for missing in covered.missing.iter().filter(|_| covered.by != "filter") {
            out.line(format!("             not {}: {}", missing.processes, escape(&missing.why)));
        }
    }
    out.line(format!("audit        {}, {} lost", number(s.audit_seq, "record"), s.audit_lost));
    out.line(format!("key daemon   {}", if s.keyd { "answers" } else { "none" }));
    if let Some(error) = &s.audit_error {
        out.line(out.ink(Ink::Bad, &format!("the audit log cannot be written: {}", escape(error))));
    }
    if let Some(text) = &s.diagnostic {
        out.line(out.ink(Ink::Bad, "the policy file as it is now is not in force:"));
        for line in text.lines() {
            out.line(format!("  {}", escape(line)));
        }
    }
    if !s.gaps.is_empty() {
        out.line(out.ink(Ink::Strong, "not held here:"));
        for gap in &s.gaps {
            out.line(format!("  - {}", escape(gap)));
        }
    }
}
