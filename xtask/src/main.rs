//! Set-up, demo, tests and benches: `cargo xtask demo|test|bench NAME`.

mod debian;
mod guest;
mod steps;

use std::{
    io::{self, Write},
    process::ExitCode,
};

const USAGE: &str = "\
usage: cargo xtask demo            build, then tell the FTP story between namespaces (as root)
       cargo xtask test [FILTER]   formatting, lints, build, every test
       cargo xtask guest           what holds without backstop, tested on a Linux 6.1 (as root)
       cargo xtask bench [NAME]    one bench, with its peers side by side
       cargo xtask torture [--kills N] [--seed N]
                                   kill at random, and count what is lost
       cargo xtask setup           only install what tests and demo need";

fn main() -> ExitCode {
    let mut all = std::env::args_os().skip(1);
    if all.next().is_some_and(|word| word == "in-guest") {
        return finish(guest::enter(&all.collect::<Vec<_>>()));
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["demo"] => steps::demo(),
        ["test"] => steps::test(&[]),
        ["test", rest @ ..] => steps::test(rest),
        ["bench"] => steps::benches(),
        ["bench", name, rest @ ..] => steps::bench(name, rest),
        ["torture", rest @ ..] => steps::torture(rest),
        ["guest"] => steps::guest(),
        ["setup"] => debian::install(debian::TESTS).and_then(|()| debian::unpack_daemons()),
        _ => {
            say(USAGE);
            return ExitCode::from(2);
        }
    };
    finish(done)
}

fn finish(done: steps::Outcome) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("xtask: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Writes one line to standard error.
pub(crate) fn say(text: &str) {
    let _gone = writeln!(io::stderr(), "{text}");
}
