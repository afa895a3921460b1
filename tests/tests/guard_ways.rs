//! Programs that do not pass through the shim: judged, served and held by guard and backstop.
//! The ways out themselves are those of `portcullis selftest`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::{collections::BTreeSet, process::Command};

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

/// The ways out under one kind of hold: none gets out, and each has its control. A race that nobody won shows
/// nothing, and what the kernel has just refused may not be on record yet; such a way is tried again.
fn try_all(command: impl Fn() -> Command, is_shown: impl Fn(&Value) -> bool) {
    let mut shown = BTreeSet::new();
    let mut rest = Vec::new();
    for _ in 0..6 {
        let done = Finished::of(&mut command());
        let rows: Vec<Value> = done.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(rows.len() >= 40, "{done}");
        assert!(rows.iter().all(|row| row["out"] == false), "{done}");
        if rows.iter().all(&is_shown) {
            assert_eq!(done.code(), 0, "{done}");
        }
        shown.extend(rows.iter().filter(|row| is_shown(row)).map(|row| row["way"].to_string()));
        rest = rows.into_iter().filter(|row| !shown.contains(&row["way"].to_string())).collect();
        if rest.is_empty() {
            return;
        }
    }
    panic!("not shown: {rest:#?}");
}

fn selftest() -> Command {
    let mut command = Command::new(built::portcullis());
    command.args(["selftest", "--format", "json"]);
    command
}

#[test]
fn no_way_out_gets_out_and_each_has_its_control() {
    let page = |row: &Value| row["way"] == "call from the shim's page, not asked";
    try_all(selftest, |row| {
        row["control"] == row["opens"] && (!page(row) || row["refused_by"] == "backstop")
    });
}

#[test]
fn the_guard_alone_holds_them_too() {
    let has_control = |row: &Value| row["control"] == true || row["opens"] == false;
    let alone = || {
        let mut command = selftest();
        command.env("PORTCULLIS_NO_BACKSTOP", "1");
        command
    };
    try_all(alone, has_control);
    let user = Host::here().as_user(65534);
    let program = user.path("portcullis");
    try_all(|| user.plain(&[program.to_str().unwrap(), "selftest", "--format", "json"]), has_control);
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

#[test]
fn what_holds_a_process_is_shown() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!(
        "import socket,sys\nsocket.create_connection(('127.0.0.1',{port}))\nprint('up', flush=True)\nsys.stdin.read()"
    );
    let running = host.start(&["sh", "-c", &format!("sleep 1000 | python3 -c \"{script}\"")]);
    running.line("up");
    let rows = host.portcullis(&["ps", "--format", "json"]).success();
    assert!(rows.contains("\"held_by\":[\"shim\",\"guard\",\"backstop\"]"), "{rows}");
}
