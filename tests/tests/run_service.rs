//! A supervisor that a service manager starts: it stays, and runs join it.

use nix::sys::signal::Signal;
use portcullis_tests::{ALLOW_ALL, Finished, Host, Running, built, eventually};

#[test]
fn it_stays_without_runs_serves_them_and_ends_when_told() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let (state, program) = (host.state(), built::portcullis());
    let mut service = Running::start(host.supervise(&[]));
    eventually("the broker serves", || {
        host.portcullis(&["status"]).stdout.contains("generation   1").then_some(())
    });
    for _ in 0..3 {
        let run = ["run", "--state", state.to_str().unwrap(), "--", "echo", "ran"];
        let line: Vec<&str> = std::iter::once(program.to_str().unwrap()).chain(run).collect();
        assert_eq!(Finished::of(&mut host.plain(&line)).success(), "ran\n");
    }
    assert!(!service.has_ended());
    assert_eq!(host.daemons().len(), 3, "one supervisor, one broker, one key daemon");
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait(), 0);
    assert!(host.daemons().is_empty());
}

#[test]
fn a_second_one_on_the_same_folder_is_an_error() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let keeper = host.start(&["sh", "-c", "echo up; exec sleep 1000"]);
    keeper.line("up");
    let second = Finished::of(&mut host.supervise(&[]));
    assert_eq!(second.code(), 2, "{second}");
    assert!(second.stderr.contains("another supervisor serves"), "{second}");
}

#[test]
fn what_programs_need_stays_when_it_ends_before_them() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let mut service = Running::start(host.supervise(&[]));
    eventually("the broker serves", || {
        host.portcullis(&["status"]).stdout.contains("generation   1").then_some(())
    });
    // Each line it reads, the shell starts a program that loads the shim afresh.
    let script =
        "echo up $LD_PRELOAD; while read line; do curl -sS http://127.0.0.1:9/ 2>&1; echo done; done";
    let mut shell = host.start(&["sh", "-c", script]);
    let shim = shell.line("up ").trim_start_matches("up ").to_owned();
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait(), 0);
    assert!(std::path::Path::new(&shim).exists(), "{shim}");
    shell.say("go\n");
    assert!(shell.line("curl:").contains("connect"), "refused, and not without the shim");
    let mut service = Running::start(host.supervise(&[]));
    eventually("the broker serves", || {
        assert!(!service.has_ended(), "{:?}", service.rest());
        host.portcullis(&["status"]).stdout.contains("generation   ").then_some(())
    });
    shell.say("go\n");
    shell.line("curl:");
    host.record("the call of an older program", |r| {
        r["op"] == "connect" && r["verdict"] == "permit" && r["generation"] == 2
    });
    drop(service);
}
