//! Static programs at both ends of a protected flow, with the backstop and without; and the shim without its BPF form.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::process::Command;

use portcullis_tests::{Finished, Host, Net, Running, trust::Trust};

const POLICY: &str = "\
inside = x509{name=\"*.example.com\"};
service greeting = tcp/8080;
allow greeting(inside, inside);
";

/// With a word more: greets one who comes, and says who that is. Else asks for the greeting.
const PROGRAM: &str = r#"
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int n, char **words) {
	struct sockaddr_in at = { AF_INET, htons(8080), { inet_addr("10.77.0.2") } }, from = { 0 };
	socklen_t length = sizeof from;
	char line[99] = "";
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	if (n < 2) {
		if (connect(fd, (void *)&at, sizeof at)) return perror("connect"), 1;
		read(fd, line, sizeof line - 1);
		return puts(line), 0;
	}
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(fd, (void *)&at, sizeof at) || listen(fd, 9)) return perror("listen"), 1;
	puts("listens"), fflush(stdout);
	int near = accept(fd, (void *)&from, &length);
	if (near < 0) return perror("accept"), 1;
	printf("from %s\n", inet_ntoa(from.sin_addr)), fflush(stdout);
	write(near, "plain words", 11);
	close(near);
	pause();
}
"#;

fn build(host: &Host) -> String {
    let source = host.write("greet.c", PROGRAM);
    let program = host.path("greet");
    let built = Finished::of(Command::new("cc").args(["-static", "-w", "-o"]).arg(&program).arg(source));
    assert_eq!(built.code(), 0, "{built}");
    program.to_str().unwrap().to_owned()
}

#[test]
fn static_programs_have_the_lane_too() {
    for alone in ["0", "1"] {
        let net = Net::client_server_stranger(POLICY);
        let [client, server, _] = net.hosts();
        let _trust = Trust::of(&[client, server]);
        let mut serve = server.run(&[&build(server), "serve"]);
        serve.env("PORTCULLIS_NO_BACKSTOP", alone);
        let serving = Running::start(serve);
        serving.line("listens");
        let mut dial = client.run(&[&build(client)]);
        dial.env("PORTCULLIS_NO_BACKSTOP", alone);
        let got = Finished::of(&mut dial);
        let all = |host: &Host| host.records().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        assert_eq!(got.stdout, "plain words\n", "{got}\n{}\n{}", all(client), all(server));
        serving.line("from 10.77.0.1");
        for (host, op) in [(client, "connect"), (server, "accept")] {
            let record = host.record(op, |r| r["op"] == op);
            assert_eq!((&record["lane"], &record["via"]), (&"tls".into(), &"guard".into()), "{record}");
        }
    }
}

/// Its first question goes through the shim, which then connects to the token: that call is held, and was judged.
#[test]
fn a_program_with_the_shim_has_it_where_calls_are_made_by_proxy() {
    for without in ["backstop", "bpf"] {
        let net = Net::client_server_stranger(POLICY);
        let [client, server, _] = net.hosts();
        let _trust = Trust::of(&[client, server]);
        let mut serve = server.run(&[&build(server), "serve"]);
        serve.env("PORTCULLIS_WITHOUT", without);
        let serving = Running::start(serve);
        serving.line("listens");
        let script =
            "import socket; print(socket.create_connection(('10.77.0.2', 8080), 10).recv(99).decode())";
        let mut dial = client.run(&["/usr/bin/python3", "-c", script]);
        dial.env("PORTCULLIS_WITHOUT", without);
        let got = Finished::of(&mut dial);
        assert_eq!(got.stdout, "plain words\n", "{got}");
        let record = client.record("connect", |r| r["op"] == "connect");
        assert_eq!((&record["lane"], &record["via"]), (&"tls".into(), &"shim".into()), "{record}");
    }
}
