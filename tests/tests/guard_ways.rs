//! Programs that do not pass through the shim: judged, served and held by guard and backstop.
//! The ways out themselves are those of `portcullis selftest`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::process::Command;

use portcullis_tests::{ALLOW_ALL, Finished, Host, built};
use serde_json::Value;

/// A program without libc's shared library, so without the shim: it says what came of each call.
const STATIC: &str = r#"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
static void say(const char *what, long got) { printf("%s: %s\n", what, got < 0 ? strerror(errno) : "ok"); fflush(stdout); }
int main(int n, char **words) {
	struct sockaddr_in to = { AF_INET, htons(atoi(words[1])), { inet_addr("127.0.0.1") } };
	for (int i = 0; i < atoi(words[2]); i++) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);
		say("connect", connect(fd, (void *)&to, sizeof to));
		close(fd);
		if (i + 1 < atoi(words[2])) getchar();
	}
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	say("sendto", sendto(fd, "x", 1, 0, (void *)&to, sizeof to));
	struct sockaddr_in any = { AF_INET };
	fd = socket(AF_INET, SOCK_STREAM, 0);
	say("bind", bind(fd, (void *)&any, sizeof any));
	say("listen", listen(fd, 1));
	say("raw", socket(AF_INET, SOCK_RAW, 1));
	say("unix", socket(AF_UNIX, SOCK_STREAM, 0));
}
"#;

fn build(host: &Host) -> String {
    let source = host.write("static.c", STATIC);
    let program = host.path("static");
    let _built =
        Finished::of(Command::new("cc").args(["-static", "-w", "-o"]).arg(&program).arg(source)).success();
    program.to_str().unwrap().to_owned()
}

/// The ways out under one kind of hold: none gets out, and each has its control.
fn try_all(mut command: Command, is_shown: impl Fn(&Value) -> bool) {
    let done = Finished::of(&mut command);
    let rows: Vec<Value> = done.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(rows.len() >= 42, "{done}");
    assert!(rows.iter().all(|row| row["out"] == false), "{done}");
    let rest: Vec<&Value> = rows.iter().filter(|row| !is_shown(row)).collect();
    assert!(rest.is_empty(), "not shown: {rest:#?}");
    assert_eq!(done.code(), 0, "{done}");
}

fn selftest() -> Command {
    let mut command = Command::new(built::portcullis());
    command.args(["selftest", "--format", "json"]);
    command
}

#[test]
fn no_way_out_gets_out_and_each_has_its_control() {
    let page = |row: &Value| row["way"] == "call from the shim's page, not asked";
    try_all(selftest(), |row| {
        row["control"] == row["opens"] && (!page(row) || row["refused_by"] == "backstop")
    });
}

#[test]
fn the_guard_alone_holds_them_too() {
    let has_control = |row: &Value| row["control"] == true || row["opens"] == false;
    let mut alone = selftest();
    alone.env("PORTCULLIS_NO_BACKSTOP", "1");
    try_all(alone, has_control);
    let user = Host::here().as_user(65534);
    let program = user.path("portcullis");
    try_all(user.plain(&[program.to_str().unwrap(), "selftest", "--format", "json"]), has_control);
}

/// Sets source routes, by options and by a control message, and takes them away.
const ROUTES: &str = "
import socket, struct
four = bytes([131, 7, 4, 127, 0, 0, 1, 0])
six = struct.pack('BBBBBBH', 0, 4, 4, 1, 1, 0, 0) + bytes(16) + socket.inet_pton(socket.AF_INET6, '::1')
def say(what, call):
    try: call(); how = 'ok'
    except OSError as error: how = error.strerror
    print(what + ':', how, flush=True)
for kind in socket.SOCK_DGRAM, socket.SOCK_STREAM:
    for family, level, option, route in (socket.AF_INET, 0, 4, four), (socket.AF_INET6, 41, 57, six):
        one = socket.socket(family, kind)
        say('set', lambda: one.setsockopt(level, option, route))
        say('taken away', lambda: one.setsockopt(level, option, None, 0))
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
to = ('127.0.0.1', 9)
say('sent', lambda: one.sendmsg([b'x'], [], 0, to))
say('sent by', lambda: one.sendmsg([b'x'], [(0, 7, four)], 0, to))
";

#[test]
fn nothing_goes_by_way_of_another_host_than_the_one_judged() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let routes = ["/usr/bin/python3", "-c", ROUTES];
    let native = Finished::of(&mut host.plain(&routes)).success();
    assert_eq!(native.matches(": ok").count(), 10, "{native}");
    let held = native.replace("set: ok", "set: Operation not permitted");
    let held = held.replace("sent by: ok", "sent by: Operation not permitted");
    assert_eq!(Finished::of(&mut host.run(&routes)).success(), held);
    let record = host.record("the refused datagram", |r| r["op"] == "send" && r["verdict"] == "refuse");
    assert_eq!(record["reason"], "a source route leads it by way of another host");
    for (name, value) in [("PORTCULLIS_NO_BACKSTOP", "1"), ("PORTCULLIS_WITHOUT", "bpf")] {
        let proxied = Host::here();
        proxied.policy(ALLOW_ALL);
        let done = Finished::of(proxied.run(&routes).env(name, value));
        assert_eq!(done.success(), held, "{name}");
    }
}

#[test]
fn a_static_program_has_verdicts_and_records_like_any_other() {
    let host = Host::here();
    let program = build(&host);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    host.policy("allow tcp/9(*, *);");
    let refused = Finished::of(&mut host.run(&[&program, &port, "1"]));
    assert_eq!(
        refused.success(),
        "connect: Permission denied\nsendto: Operation not permitted\nbind: ok\nlisten: Permission denied\n\
         raw: Operation not permitted\nunix: ok\n"
    );
    for op in ["connect", "send", "listen", "socket"] {
        let record = host.record(op, |r| r["op"] == op && r["verdict"] == "refuse");
        assert_eq!((&record["via"], &record["exe"]), (&"guard".into(), &program.as_str().into()));
    }
    let open = Host::here();
    open.policy(ALLOW_ALL);
    let permitted = Finished::of(&mut open.run(&[&program, &port, "1"]));
    assert_eq!(permitted.success(), "connect: ok\nsendto: ok\nbind: ok\nlisten: ok\nraw: ok\nunix: ok\n");
    let connects = open.records().into_iter().filter(|r| r["op"] == "connect" && r["verdict"] == "permit");
    assert_eq!(connects.count(), 1, "on record once, though two hold it");
}

/// What `ps` says of one of the four for a process.
fn hold(host: &Host, pid: i32, by: &str) -> Value {
    let listed = host.portcullis(&["ps", "--format", "json"]).success();
    let rows: Vec<Value> = serde_json::from_str(&listed).unwrap();
    let row = rows.iter().find(|row| row["pid"] == pid).unwrap_or_else(|| panic!("{pid}: {listed}"));
    let all = row["coverage"].as_array().unwrap();
    let named = |hold: &&Value| hold["holds"] == true;
    let held: Vec<&Value> = all.iter().filter(named).map(|hold| &hold["by"]).collect();
    assert_eq!(row["held_by"].as_array().unwrap().iter().collect::<Vec<_>>(), held, "{row}");
    all.iter().find(|hold| hold["by"] == by).unwrap().clone()
}

#[test]
fn what_holds_a_process_is_shown_with_why_not_and_since_when() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let wait =
        host.write("wait.c", "#include <stdio.h>\nint main() { puts(\"up\"); fflush(stdout); getchar(); }\n");
    let program = host.path("wait");
    let mut compiler = Command::new("cc");
    let _built = Finished::of(compiler.args(["-static", "-w", "-o"]).arg(&program).arg(wait)).success();
    let program = program.to_str().unwrap();
    let [shimmed, fixed] = [&["sh", "-c", "echo up; read x"][..], &[program][..]].map(|it| host.start(it));
    for (running, shim) in [(&shimmed, true), (&fixed, false)] {
        running.line("up");
        assert_eq!(hold(&host, running.pid(), "shim")["holds"], shim);
        for by in ["guard", "backstop"] {
            assert_eq!(hold(&host, running.pid(), by)["holds"], true);
        }
    }
    assert_eq!(hold(&host, fixed.pid(), "shim")["why"], "it is a static program");
    let status = host.portcullis(&["status"]).stdout;
    assert!(
        status.contains("  shim       1 process\n             not 1: it is a static program\n"),
        "{status}"
    );

    // Root takes it out of its cgroup: that it did not begin so is shown.
    let [began, others] =
        [&fixed, &shimmed].map(|running| hold(&host, running.pid(), "backstop")["since"].clone());
    let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", fixed.pid())).unwrap();
    let group = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
    let (outer, own) = group.rsplit_once('/').unwrap();
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let tree =
        mounts.lines().find(|line| line.contains(" cgroup2 ")).and_then(|l| l.split(' ').nth(1)).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100)); // times are in seconds
    std::fs::write(format!("{tree}{outer}/cgroup.procs"), fixed.pid().to_string()).unwrap();
    let moved = hold(&host, fixed.pid(), "backstop");
    assert_eq!(moved["holds"], false);
    assert!(moved["since"].as_str() > began.as_str(), "{moved} {began}");
    assert!(moved["why"].as_str().unwrap().ends_with(&format!("not one of {own}")), "{moved}");
    assert_eq!(hold(&host, shimmed.pid(), "backstop")["since"], others, "the other is as it was");
}

#[test]
fn without_backstop_it_is_said_why() {
    let user = Host::here().as_user(65534);
    user.policy(ALLOW_ALL);
    let mut alone = user.run(&["sh", "-c", "echo up; read x"]);
    alone.env("PORTCULLIS_NO_BACKSTOP", "1");
    let root = Host::here();
    root.policy(ALLOW_ALL);
    let mut told = root.run(&["sh", "-c", "echo up; read x"]);
    told.env("PORTCULLIS_NO_BACKSTOP", "1");
    for (host, command, why) in [
        (&user, alone, "only root may load it"),
        (&root, told, "it was told to do without (PORTCULLIS_WITHOUT, PORTCULLIS_NO_BACKSTOP)"),
    ] {
        let running = portcullis_tests::Running::start(command);
        running.line("up");
        let backstop = hold(host, running.pid(), "backstop");
        assert_eq!((&backstop["holds"], &backstop["why"]), (&false.into(), &why.into()));
        assert_eq!(hold(host, running.pid(), "guard")["holds"], true);
    }
}
