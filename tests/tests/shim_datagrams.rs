//! Datagrams that nobody asked for do not reach a program, with and without a privileged side.

use std::{net::UdpSocket, time::Duration};

use portcullis_tests::{
    ALLOW_ALL, Host, Running,
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
