//! A process whose number was another's a moment ago, whatever the guard held for that one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::{
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::AsRawFd,
    process::Command,
    time::Duration,
};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, getsockname, listen, socket,
};
use portcullis_tests::{Finished, Host, built};

/// Starts one program and then another under the very same number (clone3(2), `set_tid`), as often as is said. The first
/// connects three times, and is killed in a fourth connect(2) that nobody answers; the second connects once.
const TWINS: &str = r#"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
static int dial(const char *port) {
	struct sockaddr_in to = { AF_INET, htons(atoi(port)), { inet_addr("127.0.0.1") } };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int why = connect(fd, (void *)&to, sizeof to) ? errno : 0;
	close(fd);
	return why == EACCES ? 'r' : why ? '?' : '.';
}
static pid_t start(pid_t number, const char *program, char **words, int to) {
	struct clone_args args = { .exit_signal = SIGCHLD };
	if (number) args.set_tid = (__u64)(unsigned long)&number, args.set_tid_size = 1;
	pid_t child = syscall(SYS_clone3, &args, sizeof args);
	if (child) return child;
	dup2(to, 1);
	execl(program, program, words[3], words[4], (char *)0);
	_exit(9);
}
int main(int n, char **words) {
	if (n == 3) { /* one of the two: a port that is open, and one that does not answer */
		int first = !strcmp(strrchr(words[0], '/'), "/first");
		for (int i = 0; i < (first ? 3 : 1); i++) putchar(dial(words[1]));
		fflush(stdout);
		if (first) putchar(dial(words[2])), fflush(stdout);
		return 0;
	}
	for (int turn = 0, missed = 0; turn < atoi(words[5]) && missed < 100; turn++) {
		char said[9] = "";
		int pipes[2], got = 0;
		pipe(pipes);
		pid_t one = start(0, words[1], words, pipes[1]);
		while (got < 3 && read(pipes[0], said + got, 1) == 1) got++;
		usleep(turn % 4 * 3000); /* however far its last call comes */
		kill(one, SIGKILL);
		waitpid(one, 0, 0);
		pid_t two = start(one, words[2], words, pipes[1]);
		if (two > 0) waitpid(two, 0, 0);
		close(pipes[1]);
		while (got < 8 && read(pipes[0], said + got, 1) == 1) got++;
		close(pipes[0]);
		if (two == one) puts(said), fflush(stdout);
		else turn--, missed++; /* somebody else has taken the number */
	}
}
"#;

const TURNS: usize = 12;

#[test]
fn who_has_the_number_of_a_killed_process_has_nothing_else_of_it() {
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = open.local_addr().unwrap().port().to_string();
    std::thread::spawn(move || while open.accept().is_ok() {});
    // Nobody takes from its queue, which is full: who else comes is not answered.
    let mute = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(mute.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))).unwrap();
    listen(&mute, Backlog::new(0).unwrap()).unwrap();
    let at = SocketAddrV4::from(getsockname::<SockaddrIn>(mute.as_raw_fd()).unwrap());
    let come = || TcpStream::connect_timeout(&at.into(), Duration::from_millis(300));
    let _full: Vec<TcpStream> = std::iter::from_fn(|| come().ok()).take(8).collect();
    assert!(come().is_err(), "it answers");
    let silent = at.port().to_string();

    for without in ["", "backstop"] {
        let host = Host::here();
        let source = host.write("twins.c", TWINS);
        let programs = ["twins", "first", "second"].map(|name| host.path(name));
        let mut compiler = Command::new("cc");
        let _built =
            Finished::of(compiler.args(["-static", "-w", "-o"]).arg(&programs[0]).arg(source)).success();
        for copy in &programs[1..] {
            built::copy(&programs[0], copy);
        }
        let [twins, first, second] = programs.each_ref().map(|path| path.to_str().unwrap());
        let words = [twins, first, second, &port, &silent, &TURNS.to_string()];
        host.policy(&format!("allow *(process{{exe=\"{first}\"}}, *);"));
        let said = Finished::of(host.run(&words).env("PORTCULLIS_WITHOUT", without)).success();
        assert_eq!(said, "...r\n".repeat(TURNS), "{without}");
        let control = Host::here();
        control.policy(portcullis_tests::ALLOW_ALL);
        let said = Finished::of(control.run(&words).env("PORTCULLIS_WITHOUT", without)).success();
        assert_eq!(said, "....\n".repeat(TURNS), "control, {without}");
    }
}
