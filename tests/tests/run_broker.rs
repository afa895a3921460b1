//! One broker for each state folder: started by the first run, shared by all, gone with the last process.

use std::{ffi::OsStr, fs, os::unix::fs::PermissionsExt, path::PathBuf};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use portcullis_tests::{ALLOW_ALL, Finished, Host, Running, built, eventually};

const NOBODY: u32 = 65534;

fn host() -> Host {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    host
}

fn one(host: &Host, part: &str) -> i32 {
    let found = |host: &Host| host.daemons().into_iter().find(|(_, name)| name == part).map(|(pid, _)| pid);
    eventually(&format!("a {part} serves"), || found(host))
}

fn nothing_is_left(host: &Host) {
    eventually("supervisor and broker end", || host.daemons().is_empty().then_some(()));
}

/// A program that is sure to run already.
fn sleeper(host: &Host) -> Running {
    let it = host.start(&["sh", "-c", "echo up; exec sleep 1000"]);
    it.line("up");
    it
}

/// What a wrapped program's environment has after `name`, which ends in `=`.
fn variable(of: &Running, name: &str) -> String {
    // In the midst of exec(2) there is none.
    eventually(&format!("its environment has {name}"), || {
        let environment = fs::read_to_string(format!("/proc/{}/environ", of.pid())).ok()?;
        environment.split('\0').find_map(|v| v.strip_prefix(name)).map(str::to_owned)
    })
}

fn broker_socket(of: &Running) -> PathBuf {
    PathBuf::from(variable(of, "PORTCULLIS_BROKER=").rsplit_once(':').unwrap().0)
}

#[test]
fn it_ends_with_the_last_process_and_leaves_nothing() {
    let host = host();
    let it = sleeper(&host);
    let socket = broker_socket(&it);
    assert!(socket.exists());
    drop(it);
    nothing_is_left(&host);
    eventually("its sockets are gone", || (!socket.parent().unwrap().exists()).then_some(()));
}

#[test]
fn it_outlives_the_run_as_long_as_a_daemon_of_its_tree_lives() {
    let host = host();
    // Twice forked, in a session of its own, without a descriptor: as daemons do it.
    let script = "import os\n\
        if os.fork() == 0:\n    os.setsid()\n    pid = os.fork()\n    if pid:\n        print(pid, flush=True); os._exit(0)\n    \
        os.closerange(0, 4096)\n    os.execv('/bin/sleep', ['sleep', '1000'])\n\
        os.wait()";
    let daemon: i32 =
        Finished::of(&mut host.run(&["python3", "-c", script])).success().trim().parse().unwrap();
    assert_eq!(host.daemons().len(), 3, "supervisor, broker and key daemon");
    kill(Pid::from_raw(daemon), Signal::SIGKILL).unwrap();
    nothing_is_left(&host);
}

#[test]
fn runs_on_one_folder_share_it() {
    let host = host();
    let _first = sleeper(&host);
    let broker = one(&host, "broker");
    let _second = sleeper(&host);
    assert_eq!(host.daemons().len(), 3);
    assert_eq!(one(&host, "broker"), broker);
}

#[test]
fn runs_that_start_at_once_share_it() {
    let host = host();
    let all: Vec<Running> = (0..12).map(|_| host.start(&["sh", "-c", "echo up; exec sleep 1000"])).collect();
    all.iter().for_each(|it| drop(it.line("up")));
    assert_eq!(host.daemons().len(), 3);
}

#[test]
fn runs_that_follow_one_another_closely_all_work() {
    let host = host();
    for _ in 0..30 {
        assert_eq!(Finished::of(&mut host.run(&["true"])).code(), 0);
    }
    nothing_is_left(&host);
}

#[test]
fn a_niced_run_is_niced_itself_and_what_serves_others_is_not() {
    let host = host();
    let run = host.run(&["sh", "-c", "nice; exec sleep 1000"]);
    let words: Vec<_> = std::iter::once(run.get_program()).chain(run.get_args()).collect();
    let it = Running::start(host.plain(&[&["nice".as_ref(), "-n7".as_ref()], &words[..]].concat()));
    assert_ne!(it.line(""), "0");
    let daemons = host.daemons();
    assert_eq!(daemons.len(), 3, "{daemons:?}");
    for (pid, part) in daemons {
        let listed = Finished::of(&mut host.plain(&["ps", "-o", "ni=", "-p", &pid.to_string()])).success();
        assert_eq!(listed.trim(), "0", "{part}");
    }
}

#[test]
fn another_mode_or_policy_is_an_error() {
    let host = host();
    let _first = sleeper(&host);
    let other = Finished::of(&mut host.run_with(&["--mode", "audit"], &["echo", "ran"]));
    assert_eq!((other.code(), other.stdout.as_str()), (2, ""));
    assert!(other.stderr.contains("mode `enforce`"), "{}", other.stderr);

    let narrow = host.write("other.pol", "deny *(*, *);\n").display().to_string();
    let other = Finished::of(&mut host.run_with(&["--policy", &narrow], &["echo", "ran"]));
    assert_eq!((other.code(), other.stdout.as_str()), (2, ""));
    assert!(other.stderr.contains("other.pol"), "{}", other.stderr);

    // The same words under another name are the same policy.
    let same = host.write("same.pol", ALLOW_ALL).display().to_string();
    let joined =
        Finished::of(&mut host.run_with(&["--policy", &same, "--mode", "enforce"], &["echo", "ran"]));
    assert_eq!(joined.success(), "ran\n");
}

#[test]
fn nested_runs_join_the_outer_one() {
    let host = host();
    let _first = sleeper(&host);
    let broker = one(&host, "broker");
    let nested = host.run(&["echo", "inner"]);
    let mut words = vec![nested.get_program().to_owned()];
    words.extend(nested.get_args().map(ToOwned::to_owned));
    assert_eq!(Finished::of(&mut host.run(&words)).success(), "inner\n");
    assert_eq!(one(&host, "broker"), broker);

    // Also one that names another folder, and nothing is made there.
    let elsewhere = host.path("elsewhere");
    let program = portcullis_tests::built::portcullis();
    let words =
        [program.to_str().unwrap(), "run", "--state", elsewhere.to_str().unwrap(), "--", "echo", "inner"];
    assert_eq!(Finished::of(&mut host.run(&words)).success(), "inner\n");
    assert!(!elsewhere.exists());
}

#[test]
fn a_nested_run_cannot_ask_for_another_mode() {
    let host = host();
    let nested = host.run_with(&["--mode", "audit"], &["echo", "inner"]);
    let mut words = vec![nested.get_program().to_owned()];
    words.extend(nested.get_args().map(ToOwned::to_owned));
    let done = Finished::of(&mut host.run(&words));
    assert_eq!((done.code(), done.stdout.as_str()), (2, ""));
}

#[test]
fn a_killed_broker_is_replaced() {
    let host = host();
    let _first = sleeper(&host);
    let broker = one(&host, "broker");
    kill(Pid::from_raw(broker), Signal::SIGKILL).unwrap();
    eventually("another broker serves", || {
        host.daemons().into_iter().find(|(pid, name)| name == "broker" && *pid != broker)
    });
    assert_eq!(Finished::of(&mut host.run(&["echo", "ran"])).success(), "ran\n");
}

#[test]
fn a_killed_supervisor_takes_everything_with_it_and_the_next_run_starts_afresh() {
    let host = host();
    let _first = sleeper(&host);
    kill(Pid::from_raw(one(&host, "supervise")), Signal::SIGKILL).unwrap();
    nothing_is_left(&host);
    assert_eq!(Finished::of(&mut host.run(&["echo", "ran"])).success(), "ran\n");
    nothing_is_left(&host);
}

#[test]
fn it_works_for_an_ordinary_user() {
    let host = Host::here().as_user(NOBODY);
    host.policy(ALLOW_ALL);
    let it = host.start(&["sh", "-c", "echo up; exec sleep 1000"]);
    it.line("up");
    assert_eq!(Finished::of(&mut host.run(&["id", "-u"])).success(), "65534\n");
    drop(it);
    nothing_is_left(&host);
}

#[test]
fn a_folder_that_is_somebody_elses_is_refused_by_name() {
    let host = host();
    std::os::unix::fs::chown(host.state(), Some(NOBODY), None).unwrap();
    let done = Finished::of(&mut host.run(&["echo", "ran"]));
    assert_eq!((done.code(), done.stdout.as_str()), (125, ""));
    assert!(done.stderr.contains("belongs to uid 65534"), "{}", done.stderr);
}

#[test]
fn a_folder_that_cannot_be_written_is_refused_by_name() {
    let host = Host::here().as_user(NOBODY);
    host.policy(ALLOW_ALL);
    fs::set_permissions(host.state(), fs::Permissions::from_mode(0o555)).unwrap();
    let done = Finished::of(&mut host.run(&["echo", "ran"]));
    assert_eq!((done.code(), done.stdout.as_str()), (125, ""));
    assert!(done.stderr.contains("state folder"), "{}", done.stderr);
}

#[test]
fn a_broken_policy_is_shown_and_nothing_runs() {
    let host = Host::here();
    host.policy("allow ftp(anyone\n");
    let done = Finished::of(&mut host.run(&["echo", "ran"]));
    assert_eq!((done.code(), done.stdout.as_str()), (125, ""));
    assert!(done.stderr.contains("policy.pol:"), "{}", done.stderr);
    // Mended, it runs at once; and no broker was killed.
    host.policy(ALLOW_ALL);
    assert_eq!(Finished::of(&mut host.run(&["echo", "ran"])).success(), "ran\n");
    let killed = |it: &serde_json::Value| it["reason"].as_str().is_some_and(|why| why.contains("killed"));
    assert!(!host.records().iter().any(killed));
    nothing_is_left(&host);
}

#[test]
fn an_option_that_run_has_not_is_no_program() {
    let host = host();
    for (options, command) in [(&["--bogus"][..], &["echo", "ran"][..]), (&[][..], &[][..])] {
        let done = Finished::of(&mut host.run_with(options, command));
        assert_eq!((done.code(), done.stdout.as_str()), (125, ""), "{done}");
        assert!(done.stderr.contains("Usage: portcullis run"), "{done}");
    }
    assert_eq!(Finished::of(&mut host.run(&["echo", "--bogus"])).success(), "--bogus\n");
}

#[test]
fn without_a_policy_nothing_runs() {
    let host = Host::here();
    let done = Finished::of(&mut host.run(&["echo", "ran"]));
    assert_eq!((done.code(), done.stdout.as_str()), (125, ""));
    assert!(done.stderr.contains("no policy: give --policy FILE"), "{}", done.stderr);
    let absent = Finished::of(&mut host.run_with(&["--policy", "/no/such.pol"], &["echo", "ran"]));
    assert_eq!((absent.code(), absent.stdout.as_str()), (125, ""));
    assert!(absent.stderr.contains("`/no/such.pol`"), "{}", absent.stderr);
}

/// A tree of which only the last process asks anything.
fn tree_with_one_that_asks(host: &Host) -> Running {
    let ask = "python3 -c 'import socket; s = socket.create_server((\"127.0.0.1\", 0)); print(\"up\", flush=True); input()'";
    let it = host.start(&["sh", "-c", &format!("sleep 1000 & env -i sleep 1001 & {ask}; true")]);
    it.line("up");
    it
}

fn every_process_is_listed(host: &Host, held_by: &str) {
    let _other = sleeper(&self::host());
    let it = tree_with_one_that_asks(host);
    // Each is what it is once it has begun.
    let sleeps = |listed: &str| listed.lines().filter(|l| l.contains("  sleep 100")).count() == 2;
    let listed =
        eventually("both sleep", || Some(host.portcullis(&["ps"]).success()).filter(|it| sleeps(it)));
    let rows: Vec<&str> = listed.lines().skip(1).filter(|l| !l.starts_with("         ")).collect();
    // The shell, two that sleep, the one that asks; and none of another folder's.
    assert_eq!(rows.len(), 4, "{listed}");
    assert!(rows.iter().all(|row| row.contains(held_by)), "{listed}");
    for command in ["sleep 1000", "sleep 1001"] {
        assert!(rows.iter().any(|row| row.ends_with(command)), "{command}: {listed}");
    }
    let status = host.portcullis(&["status"]);
    assert!(status.stdout.contains("serves       4 processes"), "{status}");
    drop(it);
}

#[test]
fn ps_lists_those_that_have_asked_nothing_too() {
    every_process_is_listed(&host(), "shim,guard,backstop");
}

#[test]
fn ps_lists_an_ordinary_users_processes_too() {
    let here = host();
    let host = here.as_user(65534);
    host.policy(ALLOW_ALL);
    every_process_is_listed(&host, "shim");
}

#[test]
fn a_name_is_a_label_in_ps() {
    let host = host();
    let script =
        "import socket; s = socket.create_server(('127.0.0.1', 0)); print('up', flush=True); input()";
    let it = Running::start(host.run_with(&["--name", "web\u{1b}[2J"], &["python3", "-c", script]));
    it.line("up");
    let listed = host.portcullis(&["ps"]).success();
    let row = listed.lines().find(|l| l.trim_start().starts_with(&it.pid().to_string()));
    assert!(row.is_some_and(|row| row.contains("web\\u{1b}[2J")), "{listed}");
}

#[test]
fn ps_shows_what_a_process_has_become_since_it_asked() {
    let host = host();
    let script = "exec 3<>/dev/udp/127.0.0.1/9; echo up; read line; exec sleep 1000";
    let mut it = host.start(&["bash", "-c", script]);
    it.line("up");
    let shows = |exe: &str| {
        let shown = format!("\"exe\":\"/usr/bin/{exe}\"");
        host.portcullis(&["ps", "--format", "json"]).success().contains(&shown).then_some(())
    };
    eventually("it is bash that asked", || shows("bash"));
    it.say("go on\n");
    eventually("it is sleep now", || shows("sleep"));
}

#[test]
fn a_long_command_line_is_no_obstacle() {
    let host = host();
    let long = "x".repeat(120_000);
    assert_eq!(Finished::of(&mut host.run(&["sh", "-c", "echo ${#0}", &long])).success(), "120000\n");
}

#[test]
fn what_a_killed_supervisor_left_of_a_folder_that_is_gone_is_swept() {
    let gone = host();
    let it = sleeper(&gone);
    // A copy in the runtime folder, or, built where everybody can read it, the one that was built.
    let shim = PathBuf::from(variable(&it, "LD_PRELOAD="));
    let runtime = broker_socket(&it).parent().unwrap().to_owned();
    kill(Pid::from_raw(one(&gone, "supervise")), Signal::SIGKILL).unwrap();
    nothing_is_left(&gone);
    fs::remove_dir_all(gone.state()).unwrap();
    // As long as the program lives, what it execs must find the shim.
    let other = host();
    assert_eq!(Finished::of(&mut other.run(&["true"])).code(), 0);
    nothing_is_left(&other);
    assert!(runtime.exists() && shim.exists());
    drop(it);
    assert_eq!(Finished::of(&mut other.run(&["true"])).code(), 0);
    eventually("it is swept", || (!runtime.exists()).then_some(()));
}

#[test]
fn an_installed_command_finds_its_shim_below_any_prefix() {
    let host = host();
    for (program, place) in [
        ("portcullis", "bin/portcullis"),
        ("libportcullis_preload.so", "lib/portcullis/libportcullis_preload.so"),
    ] {
        let to = host.write(place, []);
        built::copy(&built::program(program), &to);
    }
    let (command, policy) = (host.path("bin/portcullis"), host.path("policy.pol"));
    let run = || {
        let words = [command.as_os_str(), "run".as_ref(), "--policy".as_ref(), policy.as_os_str()];
        let words: Vec<&OsStr> = words.into_iter().chain(["--".as_ref(), "true".as_ref()]).collect();
        Finished::of(host.plain(&words).env("PORTCULLIS_STATE", host.state()))
    };
    run().success();
    nothing_is_left(&host);
    fs::remove_file(host.path("lib/portcullis/libportcullis_preload.so")).unwrap();
    let without = run();
    assert_eq!(without.code(), 125, "{without}");
    assert!(without.stderr.contains("is neither beside the command nor in `../lib/portcullis`"), "{without}");
}
