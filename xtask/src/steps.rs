//! What each command does, as calls of cargo and of what it built.

use std::{ffi::OsStr, io, process::Command};

use crate::{debian, say};

/// Why a command failed.
pub(crate) type Outcome = io::Result<()>;

/// Runs one step and shows it; a failing one ends the command.
pub(crate) fn run(command: &mut Command) -> Outcome {
    let shown: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect();
    let shown = shown.join(" ");
    say(&format!("\n$ {shown}"));
    let status =
        command.status().map_err(|e| io::Error::new(e.kind(), format!("cannot run `{shown}`: {e}")))?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("`{shown}`: {status}"))) }
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    command
}

/// The workspace's folder.
pub(crate) fn root() -> &'static std::path::Path {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// Builds the command and the shim, and tells the story.
pub(crate) fn demo() -> Outcome {
    debian::install(debian::DEMO)?;
    run(&mut cargo(&["build", "--quiet", "--package", "portcullis", "--package", "portcullis-preload"]))?;
    run(Command::new(target().join("debug/portcullis")).args(["demo", "ftp"]))
}

/// Cargo's target folder.
pub(crate) fn target() -> std::path::PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into)
}

/// Formatting, lints, build and tests, in this order.
pub(crate) fn test(filter: &[&str]) -> Outcome {
    debian::install(debian::TESTS)?;
    debian::unpack_daemons()?;
    run(&mut cargo(&["fmt", "--all", "--", "--check"]))?;
    run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "--deny", "warnings"]))?;
    // Tests start these as programs, so no test depends on them in cargo's eyes.
    run(&mut cargo(&["build", "--workspace", "--quiet"]))?;
    let mut command = cargo(&["test", "--workspace", "--no-fail-fast", "--quiet", "--"]);
    command.args(filter).env("PORTCULLIS_BUILT", "1");
    run(&mut command)
}

/// The test of random kills, with more of them.
pub(crate) fn torture(options: &[&str]) -> Outcome {
    debian::install(debian::TESTS)?;
    let mut command =
        cargo(&["test", "--package", "portcullis-tests", "--test", "torture", "--", "--nocapture"]);
    for option in options.chunks(2) {
        match option {
            ["--kills", number] => command.env("PORTCULLIS_KILLS", number),
            ["--seed", number] => command.env("PORTCULLIS_SEED", number),
            _ => return Err(io::Error::other("usage: cargo xtask torture [--kills N] [--seed N]")),
        };
    }
    run(&mut command)
}

/// The tests of the guard without backstop, in a guest with an older kernel.
pub(crate) fn guest() -> Outcome {
    debian::install(debian::TESTS)?;
    debian::install(debian::GUEST)?;
    run(&mut cargo(&["build", "--workspace", "--quiet"]))?;
    let mut runner = std::env::current_exe()?.into_os_string();
    runner.push(" in-guest");
    let mut command = cargo(&["test", "--quiet", "--package", "portcullis-tests", "--no-fail-fast"]);
    for name in GUEST {
        command.args(["--test", name]);
    }
    command.args(["--", "--include-ignored", "--test-threads", "1"]);
    run(command.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", runner))
}

/// What runs in the guest.
const GUEST: &[&str] = &["guard_alone", "guard_older", "guard_programs", "guard_reuse"];

/// One bench, optimised.
pub(crate) fn bench(name: &str, rest: &[&str]) -> Outcome {
    debian::install(debian::BENCH)?;
    run(&mut cargo(&["build", "--release", "--workspace", "--quiet"]))?;
    let mut command =
        cargo(&["run", "--release", "--quiet", "--package", "portcullis-benches", "--bin", name]);
    if name == "policy" {
        // Other policy engines, which nothing else needs: a workspace of their own.
        let (manifest, folder) = (root().join("benches/peers/Cargo.toml"), target().join("peers"));
        let mut build = cargo(&["build", "--release", "--quiet", "--locked", "--manifest-path"]);
        run(build.arg(manifest).arg("--target-dir").arg(&folder))?;
        command.env("PORTCULLIS_PEERS", folder.join("release/portcullis-peers"));
    }
    run(command.arg("--").args(rest))
}

/// Lists the benches.
pub(crate) fn benches() -> Outcome {
    say("cargo xtask bench NAME, where NAME is one of:");
    let mut names: Vec<String> = std::fs::read_dir(root().join("benches/src/bin"))?
        .filter_map(Result::ok)
        .map(|entry| entry.path().file_stem().unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names.dedup();
    names.iter().for_each(|name| say(&format!("    {name}")));
    Ok(())
}
