//! The `portcullis` command.
//!
//! `run` becomes the program it wraps, so what Rust's runtime changes before `main` (SIGPIPE, closed
//! standard descriptors) would be the program's to notice: hence `no_main`.
#![cfg_attr(not(test), no_main)]

mod audit;
mod ca;
mod control;
mod demo;
mod guard;
mod link;
mod output;
mod parts;
mod place;
mod policy;
mod run;
mod selftest;
mod supervise;
mod sys;
mod view;
mod why;

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::output::Out;

/// A distributed per-process firewall: the policy says who may talk to whom; every program is held to it.
#[derive(Parser)]
#[command(name = "portcullis", version, max_term_width = 100, after_help = STATUS)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The exit status of every command.
const STATUS: &str = "\
Exit status: 0 done or permitted, 1 refused or something was found, 2 could not.
Of run: the program's, or 125 if run itself failed, 126 if the program cannot be started, 127 if it is not there.";

#[derive(Subcommand)]
enum Command {
    /// Run a program under the policy; its exit status is the program's
    Run(run::Args),
    /// Print the audit log
    Audit(audit::Args),
    /// Explain a refusal, and which rule would allow it
    Why(why::Args),
    /// List wrapped processes, their listeners and associations
    Ps(view::Args),
    /// Say what is in force, and what is not held
    Status(view::Args),
    /// Try the ways out, live, in a namespace of its own
    Selftest(selftest::Args),
    /// Check, explain, test, compare, format and query policies
    #[command(subcommand)]
    Policy(policy::Command),
    /// Manage a local trust domain
    #[command(subcommand)]
    Ca(ca::Command),
    /// Show what Portcullis does, live
    #[command(subcommand)]
    Demo(demo::Command),
    #[command(hide = true)]
    Supervise(supervise::Args),
    #[command(hide = true)]
    Broker(parts::BrokerArgs),
    #[command(hide = true)]
    Keyd(parts::KeydArgs),
}

/// What happens to a call that the policy refuses.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It is refused.
    #[default]
    Enforce,
    /// It is permitted, and recorded as `would-refuse`.
    Audit,
}

impl Mode {
    /// As the command line spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Audit => "audit",
        }
    }
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON value, or one per line where there can be many.
    Json,
}

/// Option of every command that reads a state folder.
#[derive(clap::Args, Clone, Debug)]
pub struct StateArg {
    /// State folder [default: $PORTCULLIS_STATE, else /var/lib/portcullis or $XDG_STATE_HOME/portcullis]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
}

/// Exit status of a command that could not do what it was asked.
pub const COULD_NOT: u8 = 2;

fn dispatch(command: Command, out: &mut Out) -> u8 {
    match command {
        Command::Run(args) => run::run(args, out),
        Command::Audit(args) => audit::run(args, out),
        Command::Why(args) => why::run(&args, out),
        Command::Ps(args) => view::ps(&args, out),
        Command::Status(args) => view::status(&args, out),
        Command::Selftest(args) => selftest::run(&args, out),
        Command::Policy(command) => policy::run(command, out),
        Command::Ca(command) => ca::run(command, out),
        Command::Demo(command) => demo::run(command, out),
        Command::Supervise(args) => supervise::run(args, out),
        Command::Broker(args) => parts::broker(args, out),
        Command::Keyd(args) => parts::keyd(&args, out),
    }
}

#[cfg_attr(test, expect(dead_code, reason = "only `main` calls it"))]
fn start() -> u8 {
    let mut out = Out::new();
    match Cli::try_parse() {
        Ok(cli) => dispatch(cli.command, &mut out),
        Err(error) => match out.usage(&error) {
            COULD_NOT if std::env::args_os().nth(1).is_some_and(|word| word == "run") => run::RUN_FAILED,
            status => status,
        },
    }
}

/// Called by the C library instead of by Rust's runtime.
#[cfg(not(test))]
#[expect(unsafe_code, reason = "defining `main` is an unsafe attribute: the name must be unique, and is")]
#[unsafe(no_mangle)]
pub extern "C" fn main(_argc: std::ffi::c_int, _argv: *const *const std::ffi::c_char) -> std::ffi::c_int {
    std::ffi::c_int::from(start())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn what_a_certificate_is_to_say_needs_a_host() {
        let parsed = |words: &str| super::Cli::try_parse_from(words.split(' ')).is_ok();
        assert!(parsed("portcullis ca renew --out DIR"));
        assert!(parsed("portcullis ca renew a.example.com --ver 3 --group web --address 10.0.0.1 --out DIR"));
        for said in ["--ver 3", "--group web", "--address 10.0.0.1"] {
            assert!(!parsed(&format!("portcullis ca renew {said} --out DIR")), "{said}");
        }
    }
}
