//! The guard without backstop: what an ordinary user starts, and what root starts with `PORTCULLIS_NO_BACKSTOP=1`.
//! Judged calls are made by proxy, so they must be the program's own in all that it can see.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::process::Command;

use portcullis_tests::{ALLOW_ALL, Finished, Host, Net, Running};

const NOBODY: u32 = 65534;

fn build(host: &Host, name: &str, source: &str) -> String {
    let source = host.write(&format!("{name}.c"), source);
    let program = host.path(name);
    let _built =
        Finished::of(Command::new("cc").args(["-static", "-pthread", "-w", "-o"]).arg(&program).arg(source))
            .success();
    program.to_str().unwrap().to_owned()
}

/// What both kinds of runs share: an ordinary user's, and root's without backstop.
fn both(net: &Host) -> [Host; 2] {
    [net.as_user(NOBODY), net.as_user(0)]
}

fn run(host: &Host, words: &[&str]) -> Command {
    let mut command = host.run(words);
    command.env("PORTCULLIS_NO_BACKSTOP", "1");
    command
}

const CALLS: &str = r#"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
static void say(const char *what, long got) { printf("%s: %s\n", what, got < 0 ? strerror(errno) : "ok"); fflush(stdout); }
int main(int n, char **words) {
	struct sockaddr_in to = { AF_INET, htons(atoi(words[1])), { inet_addr("127.0.0.1") } }, from;
	socklen_t length = sizeof from;
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	say("connect", connect(fd, (void *)&to, sizeof to));
	fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	say("at once", connect(fd, (void *)&to, sizeof to));
	fd = socket(AF_INET, SOCK_STREAM, 0);
	say("fast", sendto(fd, "x", 1, MSG_FASTOPEN | MSG_NOSIGNAL, (void *)&to, sizeof to));
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	say("sendto", sendto(fd, "x", 1, 0, (void *)&to, sizeof to));
	struct iovec parts[2] = { { "a", 1 }, { "bc", 2 } };
	struct mmsghdr two[2] = { { { &to, sizeof to, parts, 2 } }, { { &to, sizeof to, parts, 1 } } };
	say("sendmsg", sendmsg(fd, &two[0].msg_hdr, 0));
	int sent = sendmmsg(fd, two, 2, 0);
	say("sendmmsg", sent);
	if (sent > 0) printf("%d messages of %d and %d bytes\n", sent, two[0].msg_len, two[1].msg_len);
	struct sockaddr_in here = { AF_INET, 0, { inet_addr("127.0.0.1") } };
	fd = socket(AF_INET, SOCK_STREAM, 0);
	say("bind", bind(fd, (void *)&here, sizeof here));
	if (listen(fd, 1) < 0) return say("listen", -1), 0;
	getsockname(fd, (void *)&here, &length);
	if (!fork()) {
		usleep(200000);
		int near = socket(AF_INET, SOCK_STREAM, 0);
		connect(near, (void *)&here, sizeof here);
		return write(near, "!", 1) != 1;
	}
	char byte = 0;
	int near = accept(fd, (void *)&from, &length);
	say("accept", near);
	read(near, &byte, 1);
	printf("%c from %s\n", byte, inet_ntoa(from.sin_addr));
	wait(0);
}
"#;

#[test]
fn a_static_program_is_judged_served_and_on_record() {
    for host in both(&Host::here()) {
        let program = build(&host, "calls", CALLS);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        host.policy("allow tcp/9(*, *);");
        let refused = Finished::of(&mut run(&host, &[&program, &port]));
        assert_eq!(
            refused.success(),
            "connect: Permission denied\nat once: Permission denied\nfast: Permission denied\n\
             sendto: Operation not permitted\nsendmsg: Operation not permitted\n\
             sendmmsg: Operation not permitted\nbind: ok\nlisten: Permission denied\n"
        );
        for op in ["connect", "send", "listen"] {
            let record = host.record(op, |r| r["op"] == op && r["verdict"] == "refuse");
            assert_eq!((&record["via"], &record["exe"]), (&"guard".into(), &program.as_str().into()));
        }
    }
    for host in both(&Host::here()) {
        let program = build(&host, "calls", CALLS);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        host.policy(ALLOW_ALL);
        let permitted = Finished::of(&mut run(&host, &[&program, &port]));
        assert_eq!(
            permitted.success(),
            "connect: ok\nat once: Operation now in progress\nfast: ok\nsendto: ok\nsendmsg: ok\n\
             sendmmsg: ok\n2 messages of 3 and 1 bytes\nbind: ok\naccept: ok\n! from 127.0.0.1\n"
        );
        let accepted = host.record("accept", |r| r["op"] == "accept");
        assert_eq!((&accepted["via"], &accepted["verdict"]), (&"guard".into(), &"permit".into()));
    }
}

#[test]
fn a_program_with_the_shim_is_judged_once() {
    let script = "import socket\n\
        l = socket.create_server(('127.0.0.1', 0))\n\
        s = socket.create_connection(l.getsockname())\n\
        c, _ = l.accept()\n\
        u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
        u.sendto(b'x', ('127.0.0.1', 9))\n\
        s.sendall(b'hello')\n\
        print(c.recv(9))\n";
    for host in both(&Host::here()) {
        host.policy(ALLOW_ALL);
        let done = Finished::of(&mut run(&host, &["/usr/bin/python3", "-c", script]));
        assert_eq!(done.success(), "b'hello'\n");
        let records = host.records();
        for op in ["bind", "listen", "connect", "accept", "send"] {
            let all: Vec<_> = records.iter().filter(|r| r["op"] == op).collect();
            assert_eq!(all.len(), 1, "{op}: {all:?}");
        }
    }
}

/// Connects to an address where nobody answers, with and without a handler that restarts calls.
const SIGNALS: &str = r#"
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>
static void none(int n) {}
static void in(int milliseconds, int flags) {
	struct sigaction act = { .sa_handler = none, .sa_flags = flags };
	sigaction(SIGALRM, &act, 0);
	struct itimerval once = { .it_value = { 0, milliseconds * 1000 } };
	setitimer(ITIMER_REAL, &once, 0);
}
static void say(const char *what, long got) { printf("%s: %s\n", what, got < 0 ? strerror(errno) : "ok"); fflush(stdout); }
int main(int n, char **words) {
	struct sockaddr_in to = { AF_INET, htons(80), { inet_addr(words[1]) } }, any = { AF_INET };
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	in(300, 0);
	say("interrupted", connect(fd, (void *)&to, sizeof to));
	close(fd);
	fd = socket(AF_INET, SOCK_STREAM, 0);
	in(300, SA_RESTART);
	say("restarted", connect(fd, (void *)&to, sizeof to));
	fd = socket(AF_INET, SOCK_STREAM, 0);
	struct timeval patience = { 0, 200000 };
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	say("limited", connect(fd, (void *)&to, sizeof to));
	fd = socket(AF_INET, SOCK_STREAM, 0);
	bind(fd, (void *)&any, sizeof any);
	listen(fd, 1);
	in(300, 0);
	say("accept", accept(fd, 0, 0));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	say("limited", accept(fd, 0, 0));
}
"#;

#[test]
fn signals_and_time_limits_are_as_natively_and_make_no_second_record() {
    let net = Net::new(&["other", "host"]);
    let [_, host] = net.hosts();
    // Where nobody answers: the neighbour is not there, and is given up after some seconds. Each run asks for
    // one of its own: the search that another began could end before the signal comes.
    let mut nobody = (200..).map(|number| format!("10.77.0.{number}"));
    let mut next = || nobody.next().unwrap();
    let native = build(host, "signals", SIGNALS);
    let expected = Finished::of(&mut host.plain(&[&native, &next()])).success();
    assert!(expected.starts_with("interrupted: Interrupted system call\nrestarted: No route to host\n"));
    let [user, root] = both(host);
    // With the backstop too: the call goes on in the kernel then, and is interrupted there.
    for (host, alone) in [(user, "1"), (root, "1"), (host.as_user(0), "0")] {
        let program = build(&host, "signals", SIGNALS);
        host.policy(ALLOW_ALL);
        let mut command = run(&host, &[&program, &next()]);
        command.env("PORTCULLIS_NO_BACKSTOP", alone);
        assert_eq!(Finished::of(&mut command).success(), expected, "{alone}");
        let connects = host.records().into_iter().filter(|r| r["op"] == "connect").count();
        assert_eq!(connects, 3, "one for each socket");
    }
}

#[test]
fn one_that_waits_stalls_nobody() {
    let net = Net::new(&["other", "host"]);
    let [_, host] = net.hosts();
    let user = host.as_user(NOBODY);
    user.policy(ALLOW_ALL);
    let waits = "import socket,threading\n\
        def go():\n    try: socket.create_connection(('10.77.0.200', 80))\n    except OSError as e: print(e, flush=True)\n\
        all = [threading.Thread(target=go) for _ in range(50)]\n\
        [t.start() for t in all]\n\
        print('waits', flush=True)\n\
        l = socket.create_server(('127.0.0.1', 0))\n\
        s = socket.create_connection(l.getsockname())\n\
        l.accept()[0].sendall(b'served')\n\
        print(s.recv(9), flush=True)\n\
        [t.join() for t in all]\n";
    let waiting = Running::start(run(&user, &["/usr/bin/python3", "-c", waits]));
    waiting.line("waits");
    waiting.line("served");
    // Only then do the others give up.
    waiting.line("No route to host");
}

/// Two threads: one exchanges the address behind the other's back.
const FLIPPED: &str = r#"
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
static struct sockaddr_in to = { AF_INET };
static struct iovec part = { "x", 1 };
static struct msghdr message = { &to, sizeof to, &part, 1 };
static volatile unsigned short good, bad;
static volatile int stop, tcp, unix_;
static void *flip(void *_) { while (!stop) { *(volatile unsigned short *)&to.sin_port = bad; *(volatile unsigned short *)&to.sin_port = good; } }
static void *swap(void *_) { while (!stop) { dup2(tcp, 100); dup2(unix_, 100); } }
int main(int n, char **words) {
	pthread_t other;
	good = htons(atoi(words[1])), bad = htons(atoi(words[2]));
	to.sin_addr.s_addr = inet_addr("127.0.0.1"), to.sin_port = good;
	pthread_create(&other, 0, flip, 0);
	for (int i = 0; i < 150; i++) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);
		connect(fd, (void *)&to, sizeof to);
		close(fd);
		fd = socket(AF_INET, SOCK_DGRAM, 0);
		sendto(fd, "x", 1, 0, (void *)&to, sizeof to);
		sendmsg(fd, &message, 0);
		close(fd);
	}
	stop = 1;
	pthread_join(other, 0);
	stop = 0;
	if (n > 3) return puts("done"), 0;
	unix_ = socket(AF_UNIX, SOCK_STREAM, 0), tcp = socket(AF_INET, SOCK_STREAM, 0);
	to.sin_port = bad;
	dup2(unix_, 100);
	pthread_create(&other, 0, swap, 0);
	for (int i = 0; i < 200; i++) connect(100, (void *)&to, sizeof to);
	stop = 1;
	pthread_join(other, 0);
	puts("done");
}
"#;

/// Whether Landlock takes connect(2) of TCP from the tree (Linux 6.7): before that an exchanged descriptor passes, as
/// SECURITY.md says.
fn has_second_lock() -> bool {
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(7))
}

#[test]
fn what_was_judged_is_what_is_done() {
    for host in both(&Host::here()) {
        let program = build(&host, "flipped", FLIPPED);
        let [good, bad] = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let port = |l: &std::net::TcpListener| l.local_addr().unwrap().port();
        let [near, far] = [port(&good), port(&bad)];
        let datagrams = std::net::UdpSocket::bind(("127.0.0.1", far)).unwrap();
        let wanted = std::net::UdpSocket::bind(("127.0.0.1", near)).unwrap();
        for socket in [&datagrams, &wanted] {
            socket.set_nonblocking(true).unwrap();
        }
        for listener in [&good, &bad] {
            listener.set_nonblocking(true).unwrap();
        }
        host.policy(&format!("service mine = tcp/{near}, udp/{near};\nallow mine(*, *);\n"));
        let done = std::sync::atomic::AtomicBool::new(false);
        let accepts = std::thread::scope(|scope| {
            let (done, good) = (&done, &good);
            let accepted = scope.spawn(move || {
                let mut count = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    match good.accept() {
                        Ok(_) => count += 1,
                        Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
                    }
                }
                count
            });
            let (near, far) = (near.to_string(), far.to_string());
            let mut words = vec![program.as_str(), near.as_str(), far.as_str()];
            if !has_second_lock() {
                words.push("addresses alone");
            }
            let ran = Finished::of(&mut run(&host, &words));
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(ran.success(), "done\n");
            accepted.join().unwrap()
        });
        assert!(accepts > 0 && wanted.recv(&mut [0; 9]).is_ok(), "what is permitted gets through");
        assert!(bad.accept().is_err(), "a connection that nobody judged");
        assert!(datagrams.recv(&mut [0; 9]).is_err(), "a datagram that nobody judged");
    }
}
