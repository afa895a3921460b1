//! Static programs have related channels: a server without the shim opens a data port, and its session's peer alone
//! comes in.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::process::Command;

use portcullis_tests::{Finished, Host, Net, Running};

const POLICY: &str = "\
service talk = tcp/8021, related;
clients = IPv4{10.77.0.1, 10.77.0.4};
allow talk(clients, IPv4{10.77.0.2});
";

/// With a word: a server that greets who comes, tells it a port, and gives the file there; as FTP does. With two it looks
/// there only when the session is over. Else its client, which comes for the file when told to, and may leave (`l`) before it has it.
const PROGRAM: &str = r#"
#include <arpa/inet.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
static struct sockaddr_in at = { AF_INET };
static socklen_t length = sizeof at;
static int serve(int port) {
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	at.sin_port = htons(port);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(fd, (void *)&at, sizeof at) || listen(fd, 9)) perror("listen"), exit(1);
	getsockname(fd, (void *)&at, &length);
	return fd;
}
static int dial(int port) {
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	at.sin_port = htons(port);
	if (connect(fd, (void *)&at, sizeof at)) perror("connect"), exit(1);
	return fd;
}
int main(int n, char **words) {
	char line[99] = "";
	at.sin_addr.s_addr = inet_addr("10.77.0.2");
	if (n > 1) {
		int control = serve(8021);
		puts("listens"), fflush(stdout);
		int session = accept(control, 0, 0), data = serve(0);
		dprintf(session, "%d", ntohs(at.sin_port));
		struct pollfd come = { data, POLLIN };
		if (n > 2 && (read(session, line, 1) || close(session) || poll(&come, 1, 30000) != 1)) return 2;
		int near = accept(data, 0, 0);
		if (near < 0) return perror("accept"), 1;
		write(near, "the file", 8), close(near);
		pause();
	}
	int session = dial(8021);
	read(session, line, sizeof line - 1);
	printf("port %s\n", line), fflush(stdout);
	int port = atoi(line);
	int leaves = getchar() == 'l', data = dial(port);
	if (leaves) close(session);
	memset(line, 0, sizeof line);
	read(data, line, sizeof line - 1);
	puts(line), fflush(stdout);
	getchar();
}
"#;

fn build(host: &Host, how: &str) -> String {
    let (source, program) = (host.write("talk.c", PROGRAM), host.path("talk"));
    let mut compiler = Command::new("cc");
    let _built = Finished::of(compiler.args([how, "-w", "-o"]).arg(&program).arg(source)).success();
    program.to_str().unwrap().to_owned()
}

#[test]
fn the_sessions_peer_alone_reaches_a_static_servers_data_port() {
    for alone in ["0", "1"] {
        let net = Net::new(&["client", "server", "stranger", "other"]);
        let [client, server, stranger, other] = net.hosts();
        let start = |host: &Host, words: &[&str]| {
            host.policy(POLICY);
            let mut command = host.run(words);
            command.env("PORTCULLIS_NO_BACKSTOP", alone);
            Running::start(command)
        };
        let serving = start(server, &[&build(server, "-static"), "serve"]);
        serving.line("listens");
        let mut asking = start(client, &[&build(client, "-static")]);
        let port = asking.line("port ").trim_start_matches("port ").parse().unwrap();
        assert_eq!(stranger.sees("10.77.0.2", port), "filtered");
        assert_eq!(other.sees("10.77.0.2", port), "filtered", "a client, but not of this session");
        asking.say("go\n");
        asking.line("the file");
        let data = server.record("the data connection", |r| {
            r["op"] == "accept" && r["local"] == format!("10.77.0.2:{port}") && r["verdict"] == "permit"
        });
        let control = server
            .record("the control connection", |r| r["op"] == "accept" && r["local"] == "10.77.0.2:8021");
        assert_eq!(data["session"], control["association"], "{data}");
        assert!(data["session"].is_string() && data["via"] == "guard", "{data}");
    }
}

#[test]
fn a_server_that_comes_late_to_its_data_port_does_not_wait_for_nobody() {
    for (how, alone) in [("-static", "0"), ("-static", "1"), ("-pie", "0"), ("-pie", "1")] {
        for leaves in [true, false] {
            let net = Net::new(&["client", "server"]);
            let [client, server] = net.hosts();
            let start = |host: &Host, words: &[&str]| {
                host.policy(POLICY);
                let mut command = host.run(words);
                command.env("PORTCULLIS_NO_BACKSTOP", alone);
                Running::start(command)
            };
            let program = build(server, how);
            let late: &[&str] = if leaves { &["late"] } else { &[] };
            let mut serving = start(server, &[&[program.as_str(), "serve"], late].concat());
            serving.line("listens");
            let mut asking = start(client, &[&build(client, how)]);
            asking.line("port ");
            asking.say(if leaves { "leave\n" } else { "go\n" });
            if leaves {
                assert_eq!(serving.wait(), 1, "accept(2) fails: nobody else will come ({how} {alone})");
                server.record("the refusal", |r| r["op"] == "accept" && r["verdict"] == "refuse");
            } else {
                asking.line("the file");
            }
        }
    }
}
