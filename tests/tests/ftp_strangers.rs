//! The data port is open while its session lives, for its session's peer, and for nobody else.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use portcullis_tests::{
    ALLOW_ALL, Finished, Host, Net, Running, built, eventually,
    ftp::{self, Client, Daemon, Mode},
};
use serde_json::Value;

/// Two clients that the rule knows, so that the second can be a stranger to the first one's session.
const POLICY: &str = "\
service ftp = tcp/21, related;
clients = IPv4{10.77.0.1, 10.77.0.4};
servers = IPv4{10.77.0.2};
allow ftp(clients, servers);
";
const SIZE: usize = 3_000_000;
const RATE: usize = 1_000_000;

/// How a port looks from a host: `open`, `closed` or `filtered`.
fn seen(from: &Host, address: &str, port: u16) -> String {
    let program = built::portcullis().display().to_string();
    let words = [&program, "demo", "probe", address, &port.to_string()];
    let said = Finished::of(&mut from.plain(&words)).success();
    serde_json::from_str::<Value>(&said).unwrap()[0]["seen"].as_str().unwrap().to_owned()
}

/// A transfer under way, and the port that one side opened for it.
struct Transfer {
    client: Running,
    port: u16,
}

/// Starts a slow download and waits until data flows.
fn transfer(client: &Host, server: &Host, mode: Mode) -> Transfer {
    let to = client.path("got");
    let opener = if mode.is_passive() { server } else { client };
    let before = opener.records().len();
    let running = client.start(&Client::Curl.fetch(client, "10.77.0.2", mode, &to));
    let port = eventually("a data port is opened", || {
        let records = opener.records();
        let listens = records.iter().skip(before).find(|r| {
            r["op"] == "listen" && r["verdict"] == "permit" && !r["local"].as_str().unwrap().ends_with(":21")
        })?;
        listens["local"].as_str()?.rsplit(':').next()?.parse().ok()
    });
    eventually("data flows", || std::fs::metadata(&to).ok().filter(|m| m.len() > 0));
    Transfer { client: running, port }
}

impl Transfer {
    /// Waits for its end; it must be whole.
    fn finish(mut self, client: &Host) {
        assert_eq!(self.client.wait(), 0);
        assert!(std::fs::read(client.path("got")).unwrap() == ftp::content(SIZE), "the content differs");
    }

    /// That it still flows, so that what was just seen was seen meanwhile.
    fn is_under_way(&self, client: &Host) {
        let now = std::fs::metadata(client.path("got")).unwrap().len();
        assert!(usize::try_from(now).unwrap() < SIZE, "the transfer had ended already");
    }
}

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
    let _daemon = server.start(&daemon.command(server, SIZE, RATE));
    server.wait_for_port(21);

    // Passive: the server's port.
    let it = transfer(client, server, Mode::Epsv);
    assert_ne!(seen(stranger, "10.77.0.2", 21), "open", "{daemon:?}: control port");
    assert_ne!(seen(stranger, "10.77.0.2", it.port), "open", "{daemon:?}: data port");
    // Not even for a client of the same server, which may open sessions of its own ...
    assert_eq!(seen(other, "10.77.0.2", 21), "open", "{daemon:?}: control port for a client");
    assert_ne!(seen(other, "10.77.0.2", it.port), "open", "{daemon:?}: data port of another session");
    // ... nor for another process of the session's own host.
    let thief = ["nc", "-w", "2", "10.77.0.2", &it.port.to_string()].map(ToOwned::to_owned);
    let thief = Finished::of(&mut client.run(&thief));
    assert_ne!((thief.code(), thief.stdout.len()), (0, SIZE), "{daemon:?}: the port was grabbed");
    it.is_under_way(client);
    let port = it.port;
    it.finish(client);
    server.record("the stranger", |r| is_refused_from(r, "10.77.0.3"));
    server.record("another client", |r| is_refused_from(r, "10.77.0.4"));
    client.record("the thief", |r| {
        r["verdict"] == "refuse" && r["exe"].as_str().is_some_and(|e| e.contains("nc"))
    });
    assert_ne!(seen(client, "10.77.0.2", port), "open", "{daemon:?}: the port outlived its session");

    // Active: the client's port.
    let it = transfer(client, server, Mode::Eprt);
    assert_ne!(seen(stranger, "10.77.0.1", it.port), "open", "{daemon:?}: active data port");
    it.finish(client);
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
fn nobody_else_reaches_the_data_port_of_pyftpdlib() {
    strangers(Daemon::Pyftpdlib);
}

/// A listener for data that nobody has come to yet: `RETR` has not been said.
const WAITING: &str = "import ftplib, sys\n\
    f = ftplib.FTP('10.77.0.2', timeout=20)\n\
    f.login()\n\
    print('port', f.makepasv()[1], flush=True)\n\
    sys.stdin.readline()\n";

#[test]
fn under_a_policy_that_allows_all_the_same_stranger_gets_in() {
    let net = Net::new(&["client", "server", "stranger"]);
    let [client, server, stranger] = net.hosts();
    client.policy(ALLOW_ALL);
    server.policy(ALLOW_ALL);
    let _daemon = server.start(&Daemon::Vsftpd.command(server, SIZE, RATE));
    server.wait_for_port(21);
    let session = client.start(&["/usr/bin/python3", "-c", WAITING]);
    let port = session.line("port ").trim_start_matches("port ").parse().unwrap();
    assert_eq!(seen(stranger, "10.77.0.2", 21), "open");
    assert_eq!(seen(stranger, "10.77.0.2", port), "open");
}

#[test]
fn a_port_nobody_came_to_closes_with_its_session() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(POLICY);
    server.policy(POLICY);
    let _daemon = server.start(&Daemon::Vsftpd.command(server, SIZE, RATE));
    server.wait_for_port(21);
    let mut session = client.start(&["/usr/bin/python3", "-c", WAITING]);
    let port = session.line("port ").trim_start_matches("port ").parse().unwrap();
    // It is there, for the session's host.
    assert_eq!(seen(client, "10.77.0.2", port), "open");
    session.say("\n");
    assert_eq!(session.wait(), 0);
    eventually("the port is closed", || (seen(client, "10.77.0.2", port) != "open").then_some(()));
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
    assert_eq!(seen(client, "10.77.0.2", 4321), "open");
}

#[test]
fn one_process_with_many_controls_is_said_to_be_shared() {
    let net = Net::new(&["client", "server", "stranger", "other"]);
    let [client, server, _, other] = net.hosts();
    for host in [client, server, other] {
        host.policy(POLICY);
    }
    let _daemon = server.start(&Daemon::Pyftpdlib.command(server, SIZE, RATE));
    server.wait_for_port(21);
    let mut first = client.start(&["/usr/bin/python3", "-c", WAITING]);
    first.line("port ");
    let second = other.start(&["/usr/bin/python3", "-c", WAITING]);
    second.line("port ");
    server.record("a shared session", |r| r["op"] == "listen" && r.to_string().contains("shared"));
    first.say("\n");
    assert_eq!(first.wait(), 0);
}
