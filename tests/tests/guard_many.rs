//! Many calls held at once, and callers that end or exec meanwhile: nobody stalls, nothing leaks.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::{
    net::TcpListener,
    process::Command,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use nix::sys::signal::Signal;
use portcullis_tests::{ALLOW_ALL, Finished, Host, Running};

/// `all PORT`: a thousand threads connect at once. `crowd PORT`: a thousand processes do, and then nobody does anything.
/// `exec PORT`: some connect all the while, and another execs.
const PROGRAM: &str = r#"
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
enum { MANY = 1000, SOME = 8 };
static struct sockaddr_in to = { AF_INET };
static pthread_barrier_t gate;
static atomic_int served;
static int dial(void) {
	int fd = socket(AF_INET, SOCK_STREAM, 0), how = connect(fd, (void *)&to, sizeof to);
	close(fd);
	return how;
}
static void *once(void *_) {
	pthread_barrier_wait(&gate);
	if (dial() == 0) served++;
	return 0;
}
static void crowd(void) {
	int go[2], how, done = 0;
	pipe(go);
	for (int i = 0; i < MANY; i++) switch (fork()) {
	case -1: perror("fork"), exit(1);
	case 0: close(go[1]), read(go[0], &how, 1), _exit(dial() != 0);
	}
	close(go[0]), close(go[1]);
	while (wait(&how) > 0)
		if (how == 0 && ++done % 10 == 0) printf("%d processes served\n", done), fflush(stdout);
	pause();
}
static void *always(void *_) { for (;;) dial(); }
int main(int n, char **words) {
	pthread_t all[MANY];
	pthread_attr_t small;
	if (n < 3) return puts("another image"), 0;
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 65536);
	to.sin_port = htons(atoi(words[2])), to.sin_addr.s_addr = inet_addr("127.0.0.1");
	if (!strcmp(words[1], "crowd")) crowd();
	if (!strcmp(words[1], "all")) {
		pthread_barrier_init(&gate, 0, MANY);
		for (int i = 0; i < MANY; i++) if (pthread_create(all + i, &small, once, 0)) return perror("thread"), 1;
		for (int i = 0; i < MANY; i++) pthread_join(all[i], 0);
		printf("%d served\n", served);
		return 0;
	}
	for (int i = 0; i < SOME; i++) pthread_create(all + i, &small, always, 0);
	puts("at it"), fflush(stdout);
	usleep(300000);
	if (!strcmp(words[1], "exec")) execl("/proc/self/exe", words[0], (char *)0);
	pause();
}
"#;

fn build(host: &Host) -> String {
    let source = host.write("many.c", PROGRAM);
    let program = host.path("many");
    let built =
        Finished::of(Command::new("cc").args(["-static", "-pthread", "-w", "-o"]).arg(&program).arg(source));
    assert_eq!(built.code(), 0, "{built}");
    program.to_str().unwrap().to_owned()
}

/// Runs the tests of one kind of hold, with somebody who accepts.
fn with_server(test: impl Fn(&Host, &dyn Fn(&str) -> Command)) {
    for alone in ["0", "1"] {
        let host = Host::here();
        host.policy(ALLOW_ALL);
        let program = build(&host);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096).unwrap()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    if listener.accept().is_err() {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            let over = Over(&done);
            test(&host, &|kind| {
                let mut command = host.run(&[program.as_str(), kind, &port]);
                command.env("PORTCULLIS_NO_BACKSTOP", alone);
                command
            });
            drop(over);
        });
    }
}

/// Lets the server end, also when a test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[test]
fn a_thousand_threads_are_served_at_once_and_each_is_on_record() {
    with_server(|host, run| {
        assert_eq!(Finished::of(&mut run("all")).success(), "1000 served\n");
        let connects = || host.records().iter().filter(|r| r["op"] == "connect").count();
        portcullis_tests::eventually("all are on record", || (connects() == 1000).then_some(()));
    });
}

/// How often the threads of a process have slept and woken.
fn turns(pid: i32) -> u64 {
    let switches = |task: std::fs::DirEntry| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        count.map_or(0, |count| count.trim().parse::<u64>().unwrap())
    };
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().map(switches).sum()
}

#[test]
fn a_thousand_processes_are_served_at_once_and_then_nobody_does_anything() {
    // A network of this thread's own: the broker hears of every connection that ends where it is.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let _up = Finished::of(Command::new("ip").args(["link", "set", "lo", "up"])).success();
    with_server(|host, run| {
        let crowd = Running::start(run("crowd"));
        for served in (10..=1000).step_by(10) {
            crowd.line(&format!("{served} processes served"));
        }
        let all = || host.daemons().into_iter().map(|(pid, _)| turns(pid)).collect::<Vec<_>>();
        assert_eq!(all().len(), 3, "supervisor, broker and key daemon");
        portcullis_tests::eventually("a second passes in which no part wakes up", || {
            let before = all();
            std::thread::sleep(Duration::from_secs(1));
            (all() == before).then_some(())
        });
    });
}

#[test]
fn who_ends_or_execs_in_the_midst_of_calls_leaves_the_others_served() {
    with_server(|_, run| {
        // Keeps the broker of this folder.
        let killed = Running::start(run("kill"));
        killed.line("at it");
        let execs = Running::start(run("exec"));
        execs.line("another image");
        killed.signal(Signal::SIGKILL);
        assert_eq!(Finished::of(&mut run("all")).success(), "1000 served\n");
    });
}
