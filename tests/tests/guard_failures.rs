//! What a program without the shim sees when the broker dies or is stopped while its calls are held.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::{
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use portcullis_tests::{ALLOW_ALL, Finished, Host, Running, eventually};

/// Greets who comes, and for each line on its standard input connects and waits for the greeting; says how that went,
/// and what accept(2) fails with.
const PROGRAM: &str = r#"
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
static struct sockaddr_in to = { AF_INET };
static void *serve(void *_) {
	int l = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(l, (void *)&to, sizeof to) || listen(l, 9)) perror("listen"), exit(1);
	puts("listens"), fflush(stdout);
	for (;;) {
		int fd = accept(l, 0, 0);
		if (fd < 0) printf("accept %s\n", strerror(errno)), fflush(stdout);
		write(fd, "!", 1);
		close(fd);
	}
}
int main(int n, char **words) {
	pthread_t server;
	char line[99];
	to.sin_port = htons(atoi(words[1])), to.sin_addr.s_addr = inet_addr("127.0.0.1");
	pthread_create(&server, 0, serve, 0);
	while (fgets(line, sizeof line, stdin)) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);
		const char *how = connect(fd, (void *)&to, sizeof to) ? strerror(errno) : 0;
		if (!how) how = read(fd, line, 1) == 1 ? "ok" : "unanswered";
		printf("connect %s\n", how), fflush(stdout);
		close(fd);
	}
}
"#;

struct Scene {
    host: Host,
    program: Running,
    by_proxy: bool,
    /// What accept(2) failed with.
    told: Vec<String>,
}

fn scene(by_proxy: bool, port: u16) -> Scene {
    let host = Host::here();
    let source = host.write("served.c", PROGRAM);
    let built = host.path("served");
    let _built =
        Finished::of(Command::new("cc").args(["-static", "-pthread", "-w", "-o"]).arg(&built).arg(source))
            .success();
    host.policy(ALLOW_ALL);
    let mut command = host.run(&[built.to_str().unwrap(), &port.to_string()]);
    if by_proxy {
        command.env("PORTCULLIS_NO_BACKSTOP", "1");
    }
    let program = Running::start(command);
    program.line("listens");
    let mut scene = Scene { host, program, by_proxy, told: Vec::new() };
    assert_eq!(scene.connect().0, "connect ok");
    scene
}

impl Scene {
    fn connect(&mut self) -> (String, Duration) {
        let began = Instant::now();
        self.program.say("go\n");
        loop {
            let line = self.program.line("");
            if line.starts_with("connect ") {
                return (line, began.elapsed());
            }
            self.told.push(line);
        }
    }

    fn broker(&self) -> Pid {
        Pid::from_raw(self.host.broker())
    }
}

#[test]
fn another_broker_takes_over_what_a_killed_one_held() {
    for (by_proxy, port) in [(false, 4101), (true, 4102)] {
        let mut scene = scene(by_proxy, port);
        // The server is held in accept(2) all the while, and hears nothing of it.
        for _ in 0..3 {
            kill(scene.broker(), Signal::SIGKILL).unwrap();
            eventually("a connect is served again", || (scene.connect().0 == "connect ok").then_some(()));
        }
        assert!(scene.told.is_empty(), "{:?}", scene.told);
        let ps = scene.host.portcullis(&["ps", "--format", "json"]).success();
        let held = if scene.by_proxy { "[\"guard\"]" } else { "[\"guard\",\"backstop\"]" };
        assert!(ps.contains(held), "{ps}");
    }
}

#[test]
fn a_stopped_broker_costs_bounded_time() {
    for (by_proxy, port) in [(false, 4103), (true, 4104)] {
        let mut scene = scene(by_proxy, port);
        kill(scene.broker(), Signal::SIGSTOP).unwrap();
        let (how, time) = scene.connect();
        assert!(time < Duration::from_secs(20), "{how} after {time:?}");
        eventually("a connect is served again", || (scene.connect().0 == "connect ok").then_some(()));
    }
}

#[test]
fn without_a_broker_held_calls_are_refused_until_one_is_back() {
    use std::{fs::Permissions, os::unix::fs::PermissionsExt};
    let mut scene = scene(true, 4105);
    let state = scene.host.state();
    let broker = scene.broker();
    // A broker does not serve a folder that others may write to.
    std::fs::set_permissions(&state, Permissions::from_mode(0o777)).unwrap();
    kill(broker, Signal::SIGKILL).unwrap();
    let (how, time) = scene.connect();
    assert!(how == "connect Connection refused" && time < Duration::from_secs(15), "{how} after {time:?}");
    std::fs::set_permissions(&state, Permissions::from_mode(0o755)).unwrap();
    eventually("a connect is served again", || (scene.connect().0 == "connect ok").then_some(()));
}
