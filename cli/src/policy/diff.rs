//! `policy diff`.

use std::path::PathBuf;

use clap::Args;
use portcullis_policy::{Change, Policy, RuleOf, diff, escape};
use serde::Serialize;

use super::{FINDINGS, FormatArg, RuleData, cite, replay};
use crate::{
    COULD_NOT,
    output::{Ink, Out},
};

#[derive(Args)]
pub struct Arguments {
    /// The policy as it was
    old: PathBuf,
    /// The policy as it is to be
    new: PathBuf,
    /// The exit status is 1 if something that was refused is now permitted
    #[arg(long)]
    no_widening: bool,
    /// Also say which recorded flows are decided otherwise, counted by process
    #[arg(long, value_name = "AUDIT.jsonl")]
    replay: Vec<PathBuf>,
    #[command(flatten)]
    format: FormatArg,
}

#[derive(Serialize)]
struct Report<'a> {
    exact: bool,
    limits: &'a [String],
    widens: bool,
    changes: Vec<ChangeData<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay: Option<replay::Summary>,
}

#[derive(Serialize)]
struct ChangeData<'a> {
    becomes: &'static str,
    service: &'a str,
    from: &'a str,
    to: &'a str,
    among: Vec<Place<'a>>,
    except: Vec<Place<'a>>,
    exact: bool,
    old_rule: Option<RuleData<'a>>,
    new_rule: Option<RuleData<'a>>,
    example: ExampleData<'a>,
}

/// Where a rule stands; there can be very many of them.
#[derive(Serialize)]
struct Place<'a> {
    policy: &'static str,
    number: u32,
    file: &'a str,
    line: u32,
}

#[derive(Serialize)]
struct ExampleData<'a> {
    from: &'a str,
    to: &'a str,
    service: &'a str,
    old: &'static str,
    new: &'static str,
}

/// 0 done, 1 it widens and must not, 2 could not.
pub fn run(arguments: &Arguments, out: &mut Out) -> u8 {
    let mut load = |path| super::load(path, out).map(|loaded| loaded.policy);
    let (old, new) = match (load(&arguments.old), load(&arguments.new)) {
        (Ok(old), Ok(new)) => (old, new),
        _ => return COULD_NOT,
    };
    let now = super::now();
    let found = diff(&old, &new, now);
    let replayed = match arguments.replay.is_empty() {
        true => None,
        false => match replay::run(&arguments.replay, &old, &new, now) {
            Ok(summary) => Some(summary),
            Err(text) => {
                out.note(format!("error: {text}"));
                return COULD_NOT;
            }
        },
    };
    let widens = found.widens() || replayed.as_ref().is_some_and(replay::Summary::widens);
    let untold = replayed.as_ref().is_some_and(replay::Summary::is_doubtful);
    if arguments.format.is_json() {
        let changes = found.changes.iter().map(|c| data(c, &old, &new)).collect();
        let (exact, limits) = (found.exact, found.limits.as_slice());
        out.json(&Report { exact, limits, widens, changes, replay: replayed });
    } else {
        for change in &found.changes {
            show(change, &old, &new, out);
        }
        for limit in &found.limits {
            out.line(format!("not exact: {limit}"));
        }
        if let Some(replayed) = &replayed {
            replayed.show(out);
        }
    }
    // What could not be told may widen.
    let doubtful = widens || untold || !found.exact;
    if arguments.no_widening && doubtful { FINDINGS } else { 0 }
}

const fn becomes(change: &Change) -> &'static str {
    if change.widens { "allowed" } else { "refused" }
}

const fn verdicts(change: &Change) -> (&'static str, &'static str) {
    if change.widens { ("refuse", "permit") } else { ("permit", "refuse") }
}

fn data<'a>(change: &'a Change, old: &'a Policy, new: &'a Policy) -> ChangeData<'a> {
    let rule = |policy: &'a Policy, id| Some(RuleData::new(id, policy.get(id)?));
    let places = |list: &[RuleOf]| list.iter().filter_map(|of| place(*of, old, new)).collect();
    let (before, after) = verdicts(change);
    ChangeData {
        becomes: becomes(change),
        service: &change.service,
        from: &change.from,
        to: &change.to,
        among: places(&change.among),
        except: places(&change.except),
        exact: change.exact,
        old_rule: change.old_rule.and_then(|id| rule(old, id)),
        new_rule: change.new_rule.and_then(|id| rule(new, id)),
        example: ExampleData {
            from: &change.example.from,
            to: &change.example.to,
            service: &change.example.service,
            old: before,
            new: after,
        },
    }
}

fn place<'a>(of: RuleOf, old: &'a Policy, new: &'a Policy) -> Option<Place<'a>> {
    let rule = if of.new { new } else { old }.get(of.rule)?;
    let policy = if of.new { "new" } else { "old" };
    Some(Place { policy, number: of.rule.0, file: &rule.file, line: rule.line })
}

/// Most rules that are named to people.
const NAMED: usize = 8;

/// What of a region other rules decide.
fn named(what: &str, list: &[RuleOf], old: &Policy, new: &Policy, out: &mut Out) {
    if list.is_empty() {
        return;
    }
    let named = list.iter().take(NAMED).filter_map(|of| place(*of, old, new));
    let mut text: Vec<String> = named.map(|p| format!("{}:{}", escape(p.file), p.line)).collect();
    if list.len() > NAMED {
        text.push(format!("and {} more", list.len() - NAMED));
    }
    out.line(format!("    {what} {}", text.join(", ")));
}

fn show(change: &Change, old: &Policy, new: &Policy, out: &mut Out) {
    let ink = if change.widens { Ink::Good } else { Ink::Bad };
    let sign = if change.widens { '+' } else { '-' };
    let head = out.ink(ink, &format!("{sign} becomes {}", becomes(change)));
    let region = format!("{}({}, {})", change.service, change.from, change.to);
    let some = if change.exact { "" } else { "some of " };
    out.line(format!("{head}: {some}{}", escape(&region)));
    named("as far as allowed by", &change.among, old, new, out);
    named("except what these are about:", &change.except, old, new, out);
    let rule = |policy: &Policy, id: Option<_>| match id.and_then(|id| policy.get(id)) {
        Some(rule) => format!("by {}", cite(rule)),
        None => "as no rule allows it".to_owned(),
    };
    let (before, after) = verdicts(change);
    let example = &change.example;
    let flow = format!("--from '{}' --to '{}' --service {}", example.from, example.to, example.service);
    out.line(format!("    for example {}", escape(&flow)));
    out.line(format!("    before {before} {}", rule(old, change.old_rule)));
    out.line(format!("    now    {after} {}", rule(new, change.new_rule)));
}
