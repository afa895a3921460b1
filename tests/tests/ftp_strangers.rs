//! The data port is open while its session lives, for its session's peer, and for nobody else.

use portcullis_tests::{
    ALLOW_ALL, Finished, Net, Running, eventually,
    ftp::{Daemon, Session},
};
use serde_json::Value;

/// Two clients that the rule knows, so that the second can be a stranger to the first one's session.
const POLICY: &str = "\
service ftp = tcp/21, related;
clients = IPv4{10.77.0.1, 10.77.0.4};
servers = IPv4{10.77.0.2};
allow ftp(clients, servers);
";
const SIZE: usize = 300_000;

fn is_refused_from(record: &Value, address: &str) -> bool {
    record["verdict"] == "refuse"
        && record["remote"].as_str().is_some_and(|r| r.starts_with(&format!("{address}:")))
}

fn strangers(daemon: Daemon) {
    let net = Net::new(&["client", "server", "stranger", "other"]);
    let [client, server, stranger, other] = net.hosts();
    for host in [client, server, other] {
        host.policy(POLICY);
    }
    let _daemon = server.start(&daemon.command(server, SIZE));
    server.wait_for_port(21);

    // Passive: the server's port.
    let it = Session::begin(client, "passive");
    let port = it.port;
    assert_eq!(stranger.sees("10.77.0.2", 21), "filtered", "{daemon:?}: control port");
    assert_eq!(stranger.sees("10.77.0.2", port), "filtered", "{daemon:?}: data port");
    // Not even for a client of the same server, which may open sessions of its own ...
    assert_eq!(other.sees("10.77.0.2", 21), "open", "{daemon:?}: control port for a client");
    assert_eq!(other.sees("10.77.0.2", port), "filtered", "{daemon:?}: data port of another session");
    // ... nor for another process of the session's own host.
    let thief = Finished::of(&mut client.run(&["nc", "-w", "2", "10.77.0.2", &port.to_string()]));
    assert_ne!(thief.code(), 0, "{daemon:?}: the port was grabbed");
    it.finish(SIZE);
    let at_port = |r: &Value| r["local"].as_str().is_some_and(|l| l.ends_with(&format!(":{port}")));
    server.record("the stranger", |r| is_refused_from(r, "10.77.0.3") && at_port(r));
    server.record("another client", |r| is_refused_from(r, "10.77.0.4") && at_port(r));
    client.record("the thief", |r| {
        r["verdict"] == "refuse" && r["exe"].as_str().is_some_and(|e| e.contains("/nc"))
    });
    assert_ne!(client.sees("10.77.0.2", port), "open", "{daemon:?}: the port outlived its session");

    // Active: the client's port.
    let it = Session::begin(client, "active");
    let port = it.port;
    assert_eq!(stranger.sees("10.77.0.1", port), "filtered", "{daemon:?}: active data port");
    it.finish(SIZE);
    client.record("the stranger", |r| is_refused_from(r, "10.77.0.3"));
    assert_ne!(client.sees("10.77.0.1", port), "open", "{daemon:?}: the port outlived its session");
}

#[test]
fn nobody_else_reaches_the_data_port_of_vsftpd() {
    strangers(Daemon::Vsftpd);
}

#[test]
fn nobody_else_reaches_the_data_port_of_proftpd() {
    strangers(Daemon::Proftpd);
}

#[test]
fn nobody_else_reaches_the_data_port_of_pure_ftpd() {
    strangers(Daemon::PureFtpd);
}

#[test]
fn nobody_else_reaches_the_data_port_of_inetutils_ftpd() {
    strangers(Daemon::Inetutils);
}

#[test]
fn nobody_else_reaches_the_data_port_of_pyftpdlib() {
    strangers(Daemon::Pyftpdlib);
}

#[test]
fn under_a_policy_that_allows_all_the_same_stranger_gets_in() {
    let net = Net::new(&["client", "server", "stranger"]);
    let [client, server, stranger] = net.hosts();
    client.policy(ALLOW_ALL);
    server.policy(ALLOW_ALL);
    let _daemon = server.start(&Daemon::Vsftpd.command(server, SIZE));
    server.wait_for_port(21);
    let session = Session::begin(client, "passive");
    assert_eq!(stranger.sees("10.77.0.2", 21), "open");
    assert_eq!(stranger.sees("10.77.0.2", session.port), "open");
}

#[test]
fn a_port_nobody_came_to_closes_with_its_session() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(POLICY);
    server.policy(POLICY);
    let _daemon = server.start(&Daemon::Vsftpd.command(server, SIZE));
    server.wait_for_port(21);
    let session = Session::begin(client, "passive");
    let port = session.port;
    // It is there, for the session's host.
    assert_eq!(client.sees("10.77.0.2", port), "open");
    drop(session);
    eventually("the port is closed", || (client.sees("10.77.0.2", port) != "open").then_some(()));
}

#[test]
fn without_a_control_connection_nothing_is_related() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(POLICY);
    server.policy(POLICY);
    // A program on the server that listens without a session, and one on the client that connects without.
    let listener = Finished::of(&mut server.run(&["nc", "-l", "-w", "2", "4321"]));
    assert_ne!(listener.code(), 0);
    server.record("the listener", |r| r["op"] == "listen" && r["verdict"] == "refuse");
    let _open = Running::start(server.plain(&["nc", "-l", "4321"]));
    server.wait_for_port(4321);
    let caller = Finished::of(&mut client.run(&["nc", "-w", "2", "10.77.0.2", "4321"]));
    assert_ne!(caller.code(), 0);
    client.record("the caller", |r| r["op"] == "connect" && r["verdict"] == "refuse");
    // The same call, not wrapped, gets through: it was not the network that refused it.
    assert_eq!(client.sees("10.77.0.2", 4321), "open");
}

#[test]
fn one_process_with_many_controls_is_said_to_be_shared() {
    let net = Net::new(&["client", "server", "stranger", "other"]);
    let [client, server, _, other] = net.hosts();
    for host in [client, server, other] {
        host.policy(POLICY);
    }
    let _daemon = server.start(&Daemon::Pyftpdlib.command(server, SIZE));
    server.wait_for_port(21);
    let first = Session::begin(client, "passive");
    let second = Session::begin(other, "passive");
    server.record("a shared session", |r| r["op"] == "listen" && r.to_string().contains("shared"));
    first.finish(SIZE);
    second.finish(SIZE);
}
