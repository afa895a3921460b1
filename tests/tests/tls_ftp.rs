//! FTP between members of a trust domain: the control channel and every data channel under TLS, no port range
//! opened, and neither daemon nor client knows.

use portcullis_tests::{
    Finished, Host, Net, Running, eventually,
    ftp::{self, Client, Daemon, Mode, Session},
    trust::Trust,
    wire::Capture,
};
use serde_json::Value;

const POLICY: &str = "\
inside = x509{name=\"*.example.com\"};
service ftp = tcp/21, related;
allow ftp(inside, inside) with related;
";

const SIZE: usize = 200_000;

fn everything(host: &Host) -> String {
    host.records().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn transfers(daemon: Daemon, clients: &[Client]) {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(POLICY);
    server.policy(POLICY);
    let _trust = Trust::of(&[client, server]);
    let _daemon = server.start(&daemon.command(server, SIZE));
    server.wait_for_port(21);
    for &peer in clients {
        for &mode in peer.modes() {
            fetch(client, server, "10.77.0.2", peer, mode);
        }
    }
    if daemon.has_ipv6() {
        for mode in [Mode::Epsv, Mode::Eprt] {
            fetch(client, server, "[fd77::2]", Client::Curl, mode);
        }
    }
    for host in [client, server] {
        let is_tcp = |r: &Value| r["verdict"] == "refuse" && r["proto"] == "tcp";
        let refused: Vec<_> = host.records().into_iter().filter(is_tcp).collect();
        assert!(refused.is_empty(), "{daemon:?}: refused on {}: {refused:#?}", host.name);
    }
    let data = |r: &Value| !r["session"].is_null() && r["op"] == "close" && r["lane"] == "tls";
    let data: Vec<_> = server.records().into_iter().filter(data).collect();
    let least: usize = clients.iter().map(|c| c.modes().len()).sum();
    assert!(data.len() >= least, "{daemon:?}: only {} records of data channels", data.len());
    assert!(data.iter().all(|r| r["assurance"] == "certificate"), "{data:#?}");
}

fn fetch(client: &Host, server: &Host, from: &str, peer: Client, mode: Mode) {
    let to = client.path("got");
    let _absent = std::fs::remove_file(&to);
    let ended = Finished::of(&mut client.run(&peer.fetch(client, from, mode, &to)));
    let same = std::fs::read(&to).ok() == Some(ftp::content(SIZE));
    assert!(same, "{peer:?} {mode:?} {from}: {ended}\n{}\n--\n{}", everything(client), everything(server));
}

#[test]
fn vsftpd_serves_all_modes() {
    transfers(Daemon::Vsftpd, &[Client::Lftp]);
}

#[test]
fn proftpd_serves_all_modes() {
    transfers(Daemon::Proftpd, &[Client::Curl]);
}

#[test]
fn pure_ftpd_serves_all_modes() {
    transfers(Daemon::PureFtpd, &[Client::Tnftp]);
}

#[test]
fn inetd_serves_all_modes() {
    transfers(Daemon::Inetutils, &[Client::Ftplib]);
}

#[test]
fn pyftpdlib_serves_all_modes() {
    transfers(Daemon::Pyftpdlib, &[Client::Lftp]);
}

#[test]
fn neither_the_commands_nor_the_file_are_on_the_wire_and_every_channel_begins_with_a_client_hello() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(POLICY);
    server.policy(POLICY);
    let _trust = Trust::of(&[client, server]);
    let _daemon = server.start(&Daemon::Vsftpd.command(server, SIZE));
    server.wait_for_port(21);
    let wire = Capture::on(client);
    fetch(client, server, "10.77.0.2", Client::Lftp, Mode::Pasv);
    let passive = wire.segments().iter().filter(|s| s.is_client_hello() && s.ports.1 > 1023).count();
    assert_eq!(passive, 1, "one data channel to the server");
    fetch(client, server, "10.77.0.2", Client::Lftp, Mode::Port);
    let hello =
        |of: &dyn Fn((u16, u16)) -> bool| wire.segments().iter().any(|s| s.is_client_hello() && of(s.ports));
    assert!(hello(&|(_, to)| to == 21), "to the control port");
    assert!(hello(&|(from, _)| from == 20), "from the active data port");
    let content = ftp::content(SIZE);
    assert!(!wire.has(b"USER") && !wire.has(b"report.bin") && !wire.has(&content[1000..1032]));
    // The control: the same capture sees what is said in plain.
    let _listener = Running::start(server.plain(&["nc", "-l", "4000"]));
    server.wait_for_port(4000);
    let mut plain = client.plain(&["bash", "-c", "exec 3<>/dev/tcp/10.77.0.2/4000; echo USER anonymous >&3"]);
    let _said = Finished::of(&mut plain).success();
    eventually("the capture sees it", || wire.has(b"USER").then_some(()));
}

#[test]
fn ftp_that_is_encrypted_itself_has_its_data_channels_too() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(POLICY);
    server.policy(POLICY);
    let _trust = Trust::of(&[client, server]);
    let command = Daemon::Vsftpd.command(server, SIZE);
    let (key, config) = (server.path("own.pem"), server.path("vsftpd.conf"));
    let make = format!(
        "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=ftp -keyout {0} -out {0}",
        key.display()
    );
    let _made = Finished::of(&mut server.plain(&["sh", "-c", &make])).success();
    let ssl = format!(
        "ssl_enable=YES\nallow_anon_ssl=YES\nforce_anon_logins_ssl=YES\nforce_anon_data_ssl=YES\n\
         require_ssl_reuse=NO\nrsa_cert_file={}\n",
        key.display()
    );
    std::fs::write(&config, std::fs::read_to_string(&config).unwrap() + &ssl).unwrap();
    let _daemon = server.start(&command);
    server.wait_for_port(21);
    let get = |encrypted: bool, passive: bool| {
        let to = client.path("got").display().to_string();
        let _absent = std::fs::remove_file(&to);
        let script = format!(
            "set net:max-retries 1; set net:timeout 10; set ssl:verify-certificate no; set ftp:ssl-allow-anonymous {encrypted}; \
             set ftp:ssl-force {encrypted}; set ftp:ssl-protect-data {encrypted}; set ftp:passive-mode {passive}; \
             open 10.77.0.2; get report.bin -o {to}"
        );
        let ended = Finished::of(&mut client.run(&["lftp", "--norc", "-c", &script]));
        (std::fs::read(&to).ok() == Some(ftp::content(SIZE)), ended)
    };
    for passive in [true, false] {
        let (same, ended) = get(true, passive);
        assert!(same, "passive {passive}: {ended}\n{}\n--\n{}", everything(client), everything(server));
    }
    let (same, ended) = get(false, true);
    assert!(!same, "the control: the daemon itself asks for encryption: {ended}");
    let data = |r: &Value| !r["session"].is_null() && r["op"] == "close" && r["lane"] == "tls";
    assert!(server.records().iter().filter(|r| data(r)).count() >= 2);
}

/// Refused, with a protected peer or an attempt at one.
fn refused(record: &Value, op: &str) -> bool {
    record["verdict"] == "refuse" && record["op"] == op
}

const CONNECT: &str = "import socket, sys\n\
    s = socket.create_connection(('10.77.0.2', int(sys.argv[1])), timeout=10)\n\
    s.settimeout(5)\n\
    print('got', len(s.recv(1000)), flush=True)\n";

#[test]
fn a_data_port_is_open_to_the_session_that_has_the_key_and_to_nobody_else() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(POLICY);
    server.policy(POLICY);
    let _trust = Trust::of(&[client, server]);
    let _daemon = server.start(&Daemon::Vsftpd.command(server, SIZE));
    server.wait_for_port(21);
    let it = Session::begin(client, "passive");
    let port = it.port.to_string();
    let at_port = |r: &Value| r["local"].as_str().is_some_and(|l| l.ends_with(&format!(":{port}")));
    // A process of the client's own host, same address, that no broker holds.
    let thief = ["/usr/bin/python3", "-c", CONNECT, &port];
    let stolen = Finished::of(&mut client.plain(&thief));
    assert!(!stolen.stdout.starts_with("got 1"), "{stolen}");
    server.record("the thief in plain", |r| refused(r, "accept") && at_port(r) && r["via"] == "keyd");
    // One that is held: its own broker refuses it.
    assert_ne!(Finished::of(&mut client.run(&thief)).code(), 0);
    client.record("the thief at home", |r| refused(r, "connect"));
    // Another session between the same two hosts: its key is another.
    let other = Session::begin(client, "passive");
    assert_ne!(other.port, it.port);
    let mut astray = Session::begin(client, "passive");
    astray.running.say(&format!("{port}\n"));
    assert_ne!(astray.running.wait(), 0, "another session was let in");
    let turned_away = client.record("another session", |r| refused(r, "connect") && r["via"] == "keyd");
    assert!(turned_away["reason"].as_str().unwrap().contains("not the one that the session began with"));
    let shown = turned_away["peer_cert"].as_str().unwrap_or_else(|| panic!("{turned_away}"));
    assert!(shown.contains("spiffe://example.com/host/server.example.com/process/unnamed"), "{shown}");
    let both = || server.records().iter().filter(|r| refused(r, "accept") && at_port(r)).count() >= 2;
    eventually("the server refuses it too", || both().then_some(()));
    it.finish(SIZE);
    other.finish(SIZE);
    let gone = Finished::of(&mut client.plain(&thief));
    assert_ne!(gone.code(), 0, "the port outlived its session: {gone}");
}
