//! The demo tells its story, and leaves nothing behind.

use std::process::Command;

use nix::sys::signal::Signal;
use portcullis_tests::{Finished, Running, built};
use serde_json::Value;

fn demo() -> Command {
    let mut command = Command::new(built::portcullis());
    command.args(["demo", "ftp"]);
    command
}

/// Namespaces and folders of the demo with this process id.
fn remains(pid: i32) -> Vec<String> {
    let listed = Finished::of(Command::new("ip").args(["netns", "list"])).success();
    let name = format!("portcullis-demo-{pid}");
    let folder = std::env::temp_dir().join(&name);
    let spaces = listed.lines().filter(|l| l.starts_with(&format!("{name}-"))).map(ToOwned::to_owned);
    spaces.chain(folder.exists().then(|| folder.display().to_string())).collect()
}

#[test]
fn it_ends_well_without_colour_in_a_pipe() {
    let mut child = demo().stdout(std::process::Stdio::piped()).spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let mut story = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut story).unwrap();
    assert!(child.wait().unwrap().success(), "{story}");
    assert!(!story.contains('✗') && !story.contains('\u{1b}'), "{story}");
    for part in [
        "A passive transfer",
        "An active transfer",
        "filtered: not even a SYN-ACK",
        "begins with a TLS ClientHello",
        "in none a command, a file name or a line of the file",
        "without a certificate vsftpd never hears of it",
        "refused by what its certificate says",
        "lane=tls kex=X25519MLKEM768 assurance=certificate",
        "portcullis why",
        "allow ",
    ] {
        assert!(story.contains(part), "no `{part}` in:\n{story}");
    }
    assert_eq!(story.matches("6 MiB arrived").count(), 2);
    assert_eq!(remains(pid), [""; 0]);
}

#[test]
fn in_json_each_line_is_an_object_and_the_last_says_how_it_went() {
    let story = Finished::of(demo().args(["--format", "json"])).success();
    let lines: Vec<Value> = story.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.last().unwrap();
    assert!(last["wrong"] == 0 && last["seconds"].as_f64().unwrap() > 0.0, "{last}");
    assert!(lines.iter().filter(|line| line["right"] == true).count() > 10, "{story}");
    assert!(lines.iter().any(|line| line["record"]["verdict"] == "protect"), "{story}");
}

#[test]
fn interrupted_it_cleans_up() {
    let mut demo = Running::start(demo());
    demo.line("A passive transfer");
    assert!(!remains(demo.pid()).is_empty(), "it was at work");
    demo.signal(Signal::SIGINT);
    assert_eq!(demo.wait(), 130);
    assert_eq!(remains(demo.pid()), [""; 0]);
}

#[test]
fn a_killed_one_is_cleaned_up_by_the_next() {
    let mut first = Running::start(demo());
    first.line("A passive transfer");
    first.signal(Signal::SIGKILL);
    first.wait();
    assert!(!remains(first.pid()).is_empty());
    let mut next = Running::start(demo());
    next.line("The server starts");
    assert_eq!(remains(first.pid()), [""; 0]);
    next.signal(Signal::SIGTERM);
    assert_eq!(next.wait(), 130);
}
