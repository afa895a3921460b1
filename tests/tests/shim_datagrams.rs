//! Datagrams that nobody asked for do not reach a program, with and without a privileged side; what it asks for does.

use std::{net::UdpSocket, time::Duration};

use portcullis_tests::{
    ALLOW_ALL, Finished, Host, Net, Running,
    built::{self, free_port},
};

/// A wrapped server on `host`, and whether a stranger's question is answered in time.
fn answers(host: &Host, within: Duration) -> bool {
    let program = host.path("serve-udp");
    if !program.exists() {
        built::copy(&built::program("serve-udp"), &program);
    }
    let at = format!("127.0.0.1:{}", free_port());
    let mut server = Running::start(host.run(&[program.to_str().unwrap(), &at, "1"]));
    server.line("listening on");
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.set_read_timeout(Some(within)).unwrap();
    stranger.send_to(b"ping 7", &at).unwrap();
    let mut answer = [0; 10];
    let answered = stranger.recv_from(&mut answer).is_ok_and(|(n, _)| &answer[..n] == b"pong 7");
    assert_eq!(server.has_ended() || answered, answered, "it ends when it has answered, and not before");
    answered
}

const NOBODY: u32 = 65534;

#[test]
fn unsolicited_datagrams_are_not_received() {
    let root = Host::here();
    for host in [root.as_user(NOBODY), root] {
        host.policy("");
        assert!(!answers(&host, Duration::from_secs(1)));
        host.record("the bind", |r| r["op"] == "bind" && r["proto"] == "udp");
    }
}

#[test]
fn datagrams_that_a_rule_permits_are_received() {
    let root = Host::here();
    for host in [root.as_user(NOBODY), root] {
        host.policy(ALLOW_ALL);
        assert!(answers(&host, Duration::from_secs(20)));
    }
}

/// Names as the C library resolves them: both kinds of address at once by datagrams, and by a stream where the answer
/// does not fit into one.
#[test]
fn names_are_resolved_where_a_rule_permits_it_and_only_there() {
    const PY: &str = "/usr/bin/python3";
    const NAMES: &str = include_str!("../probes/names.py");
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    server.policy("allow domain(*, process{exe=\"/usr/bin/python3*\"});");
    let serving = server.start(&[PY, "-c", NAMES, "serve", "10.77.0.2"]);
    serving.line("serves");
    let settings = client.write("resolv.conf", "nameserver 10.77.0.2\noptions timeout:20 attempts:1\n");
    let asked = |name: &str| {
        let line = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
        let words = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            line,
            settings.to_str().unwrap(),
            PY,
            "-c",
            NAMES,
            "ask",
            name,
        ];
        Finished::of(&mut client.run(&words)).success()
    };
    client.policy("allow domain(*, IPv4{10.77.0.2});");
    for name in ["short.test", "long.test"] {
        assert_eq!(asked(name), "192.0.2.80\n", "{name}");
    }
    for proto in ["udp", "tcp"] {
        client.record("the question", |r| {
            r["proto"] == proto && r["remote"] == "10.77.0.2:53" && r["verdict"] == "permit"
        });
        server.record("it, there", |r| r["proto"] == proto && r["verdict"] == "permit" && r["op"] != "bind");
    }
    portcullis_tests::eventually("the broker ends", || client.daemons().is_empty().then_some(()));
    client.policy("allow http(*, IPv4{10.77.0.2});");
    assert_eq!(asked("short.test"), "EAI_AGAIN\n");
    client.record("the refusal", |r| r["remote"] == "10.77.0.2:53" && r["verdict"] == "refuse");
}
