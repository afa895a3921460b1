//! `policy test`.

use std::path::Path;

use clap::Args;
use portcullis_policy::{DiagnosticData, Policy, TestOutcome};
use serde::Serialize;

use super::{FINDINGS, Files, FormatArg};
use crate::{
    COULD_NOT,
    output::{Ink, Out},
};

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    format: FormatArg,
}

#[derive(Serialize)]
struct Report<'a> {
    test: &'a str,
    file: &'a str,
    line: usize,
    passed: bool,
    expectations: usize,
    nanoseconds: u64,
    failures: Vec<DiagnosticData<'a>>,
}

/// The worst of the files' statuses.
pub fn run(arguments: &Arguments, out: &mut Out) -> u8 {
    arguments.files.files.iter().map(|path| one(path, arguments, out)).max().unwrap_or(0)
}

fn one(path: &Path, arguments: &Arguments, out: &mut Out) -> u8 {
    let loaded = if super::is_stdin(path) {
        Policy::load_input_untested(super::STDIN, std::io::stdin())
    } else {
        Policy::load_untested(path)
    };
    let policy = match loaded {
        Ok(loaded) => loaded.policy,
        Err(error) => {
            super::report(&error, out);
            return COULD_NOT;
        }
    };
    let outcomes = policy.run_tests();
    for outcome in &outcomes {
        if arguments.format.is_json() {
            out.json(&report(outcome));
        } else {
            show(outcome, out);
        }
    }
    let failed = outcomes.iter().filter(|o| !o.passed()).count();
    if !arguments.format.is_json() {
        let word = if failed == 0 { out.ink(Ink::Good, "ok") } else { out.ink(Ink::Bad, "FAILED") };
        let name = portcullis_policy::escape(&super::name_of(path));
        out.line(format!("{name}: {word}. {} passed; {failed} failed", outcomes.len() - failed));
    }
    if failed == 0 { 0 } else { FINDINGS }
}

fn report(outcome: &TestOutcome) -> Report<'_> {
    Report {
        test: &outcome.name,
        file: &outcome.file,
        line: outcome.line,
        passed: outcome.passed(),
        expectations: outcome.expectations,
        nanoseconds: u64::try_from(outcome.took.as_nanos()).unwrap_or(u64::MAX),
        failures: outcome.failures.to_data(),
    }
}

fn show(outcome: &TestOutcome, out: &mut Out) {
    let word = if outcome.passed() { out.ink(Ink::Good, "ok") } else { out.ink(Ink::Bad, "FAILED") };
    let name = portcullis_policy::escape(&outcome.name);
    let lines = outcome.expectations;
    let took = outcome.took;
    out.line(format!("test \"{name}\" … {word} ({lines} expectations, {took:.1?})"));
    if !outcome.passed() {
        out.findings(&outcome.failures);
    }
}
