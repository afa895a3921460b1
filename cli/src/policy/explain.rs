//! `policy explain`.

use std::path::PathBuf;

use clap::Args;
use portcullis_policy::{Answer, Policy, Rule};
use portcullis_types::Verdict;
use serde::Serialize;

use super::{FINDINGS, FormatArg, RuleData, cite};
use crate::{
    COULD_NOT,
    output::{Ink, Out},
};

#[derive(Args)]
pub struct Arguments {
    /// Policy file; `-` is standard input
    file: PathBuf,
    /// Who opens the flow, such as 'x509{name="a.example.com"}'; what it does not say is not so
    #[arg(long, value_name = "PRINCIPAL")]
    from: String,
    /// Who accepts it
    #[arg(long, value_name = "PRINCIPAL")]
    to: String,
    /// What for, such as smtp or tcp/25
    #[arg(long, value_name = "SERVICE")]
    service: String,
    #[command(flatten)]
    format: FormatArg,
}

#[derive(Serialize)]
struct Report<'a> {
    service: &'a str,
    verdict: Verdict,
    rule: Option<RuleData<'a>>,
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    lane: Option<portcullis_types::Lane>,
    /// The policy permits it, and yet every host refuses it.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused_for: Option<String>,
    related: bool,
    observe_only: bool,
    near: Vec<Near<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    permit_with: Option<&'a str>,
}

#[derive(Serialize)]
struct Near<'a> {
    rule: RuleData<'a>,
    failed: &'a str,
    failures: u32,
}

/// 0 permitted, 1 refused, 2 could not.
pub fn run(arguments: &Arguments, out: &mut Out) -> u8 {
    let policy = match super::load(&arguments.file, out) {
        Ok(loaded) => loaded.policy,
        Err(status) => return status,
    };
    let answers = policy.explain_words(&arguments.from, &arguments.to, &arguments.service, super::now());
    let answers = match answers {
        Ok(answers) => answers,
        Err(errors) => {
            out.diagnostics(&errors);
            return COULD_NOT;
        }
    };
    for answer in &answers {
        if arguments.format.is_json() {
            out.json(&report(&policy, answer));
        } else {
            show(&policy, answer, out);
        }
    }
    let permitted = |a: &Answer| a.explanation.decision.verdict != Verdict::Refuse;
    if answers.iter().all(permitted) { 0 } else { FINDINGS }
}

/// Why, in one sentence.
fn reason(policy: &Policy, answer: &Answer) -> String {
    let decision = &answer.explanation.decision;
    let rule = decision.rule.and_then(|id| policy.get(id));
    let described = |rule: &Rule| rule.description.as_deref().map(portcullis_policy::escape);
    match (decision.verdict, rule) {
        (Verdict::Refuse, None) => "no rule allows it".to_owned(),
        (Verdict::Refuse, Some(rule)) => {
            described(rule).unwrap_or_else(|| "this rule denies it, whatever allows it".to_owned())
        }
        (Verdict::Permit | Verdict::Protect, _) if decision.observe_only => {
            let line = decision.observed.and_then(|id| policy.get(id)).map(cite).unwrap_or_default();
            format!("this rule allows it; it goes on record as would-refuse, because of {line}")
        }
        (Verdict::Permit | Verdict::Protect, Some(rule)) => {
            described(rule).unwrap_or_else(|| "this rule allows it, and none denies it".to_owned())
        }
        (Verdict::Permit | Verdict::Protect, None) => String::new(),
    }
}

/// Why every host refuses what the policy permits, if the flow would travel as none can.
fn no_lane(answer: &Answer) -> Option<String> {
    let decision = &answer.explanation.decision;
    let missing = decision.permits() && !decision.lane.is_available();
    missing.then(|| format!("no host has the lane {} yet, so each refuses this flow", decision.lane))
}

fn report<'a>(policy: &'a Policy, answer: &'a Answer) -> Report<'a> {
    let decision = &answer.explanation.decision;
    let data = |id| policy.get(id).map(|rule| RuleData::new(id, rule));
    let near = answer
        .explanation
        .near
        .iter()
        .filter_map(|m| Some(Near { rule: data(m.rule)?, failed: &m.failed, failures: m.failures }));
    Report {
        service: &answer.service,
        verdict: decision.verdict,
        rule: decision.rule.and_then(data),
        reason: reason(policy, answer),
        lane: decision.rule.and_then(|id| policy.get(id)).and_then(|rule| rule.lane),
        refused_for: no_lane(answer),
        related: decision.related,
        observe_only: decision.observe_only,
        near: near.collect(),
        permit_with: answer.explanation.permit_with.as_deref(),
    }
}

fn show(policy: &Policy, answer: &Answer, out: &mut Out) {
    let decision = &answer.explanation.decision;
    let ink = if decision.verdict == Verdict::Refuse { Ink::Bad } else { Ink::Good };
    let verdict = out.ink(ink, &decision.verdict.to_string());
    out.line(format!("{verdict} {}", answer.service));
    if let Some(rule) = decision.rule.and_then(|id| policy.get(id)) {
        out.line(format!("  rule {}", cite(rule)));
        if let Some(lane) = rule.lane {
            out.line(format!("  lane {lane}"));
        }
    }
    out.line(format!("  why  {}", reason(policy, answer)));
    if let Some(why) = no_lane(answer) {
        out.line(format!("  {} {why}", out.ink(Ink::Note, "but")));
    }
    let near = &answer.explanation.near;
    if !near.is_empty() {
        out.line("  nearest rules that do not match:");
    }
    for miss in near {
        let Some(rule) = policy.get(miss.rule) else { continue };
        out.line(format!("    {}", cite(rule)));
        let more =
            if miss.failures > 1 { format!(" (and {} more)", miss.failures - 1) } else { String::new() };
        out.line(format!("      {}{more}", portcullis_policy::escape(&miss.failed)));
    }
    if let Some(line) = &answer.explanation.permit_with {
        out.line("  the smallest rule that would permit it:");
        out.line(format!("    {}", portcullis_policy::escape(line)));
    }
}
