//! `portcullis policy …`: the language's tools.
//!
//! Results go to standard output, findings of `check` and `test` included; what kept a command from
//! doing its work goes to standard error. Exit status: 0 done or permitted, 1 refused or findings,
//! 2 could not.

mod check;
mod diff;
mod explain;
mod fmt;
mod query;
mod replay;
mod test;

use std::{
    io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use clap::{Args, Subcommand};
use portcullis_policy::{LoadError, Loaded, Policy, Rule};
use portcullis_types::RuleId;
use serde::Serialize;

use crate::{COULD_NOT, Format, output::Out};

/// Refused, or something was found.
const FINDINGS: u8 = 1;

/// The language's tools.
#[derive(Subcommand)]
pub enum Command {
    /// Say what is wrong, or odd, about policies; their own tests are run
    Check(check::Arguments),
    /// Write policies the one way they are written
    Fmt(fmt::Arguments),
    /// Say how one flow is decided, by which rule, and why
    Explain(explain::Arguments),
    /// Run the `test` blocks of policies
    Test(test::Arguments),
    /// Say which flows become allowed, and which refused, between two policies
    Diff(diff::Arguments),
    /// Say who may reach what, and which rules are about something
    Query(query::Arguments),
}

/// Runs one of them; the result is the exit status.
pub fn run(command: Command, out: &mut Out) -> u8 {
    let status = match command {
        Command::Check(arguments) => check::run(&arguments, out),
        Command::Fmt(arguments) => fmt::run(&arguments, out),
        Command::Explain(arguments) => explain::run(&arguments, out),
        Command::Test(arguments) => test::run(&arguments, out),
        Command::Diff(arguments) => diff::run(&arguments, out),
        Command::Query(arguments) => query::run(&arguments, out),
    };
    out.unless_lost(status)
}

/// Option of every tool.
#[derive(Args)]
struct FormatArg {
    /// How the result is printed
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
}

impl FormatArg {
    const fn is_json(&self) -> bool {
        matches!(self.format, Format::Json)
    }
}

/// Seconds since the Unix epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// What standard input is called in messages.
const STDIN: &str = "<stdin>";

/// Whether a file named on the command line is standard input.
fn is_stdin(path: &Path) -> bool {
    path == Path::new("-")
}

/// How a file named on the command line is called in messages.
fn name_of(path: &Path) -> String {
    if is_stdin(path) { STDIN.to_owned() } else { path.display().to_string() }
}

/// A policy from a file or from standard input.
fn load_any(path: &Path) -> Result<Loaded, LoadError> {
    if is_stdin(path) { Policy::load_input(STDIN, io::stdin()) } else { Policy::load(path) }
}

/// A policy that a tool needs in order to answer.
fn load(path: &Path, out: &mut Out) -> Result<Loaded, u8> {
    load_any(path).map_err(|error| {
        report(&error, out);
        COULD_NOT
    })
}

fn report(error: &LoadError, out: &mut Out) {
    match error {
        LoadError::Policy(diagnostics) => out.diagnostics(diagnostics),
        error => out.error(error),
    }
}

/// A rule as data.
#[derive(Serialize)]
struct RuleData<'a> {
    number: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<&'a str>,
    text: &'a str,
    file: &'a str,
    line: u32,
}

impl<'a> RuleData<'a> {
    fn new(id: RuleId, rule: &'a Rule) -> Self {
        Self {
            number: id.0,
            name: rule.name.as_deref(),
            description: rule.description.as_deref(),
            text: &rule.text,
            file: &rule.file,
            line: rule.line,
        }
    }
}

/// `file:line`, then the rule's text in one line, safe for a terminal.
fn cite(rule: &Rule) -> String {
    let text: Vec<&str> = rule.text.lines().map(str::trim).collect();
    let (file, text) = (portcullis_policy::escape(&rule.file), portcullis_policy::escape(&text.join(" ")));
    format!("{file}:{}: {text}", rule.line)
}

/// Files named on the command line.
#[derive(Args)]
struct Files {
    /// Policy files; `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}
