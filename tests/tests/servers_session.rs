//! Daemons that hand connections from process to process: PostgreSQL, OpenSSH, Dovecot and Exim.

use std::{fs, os::unix::fs::PermissionsExt};

use portcullis_tests::{Finished, Host, Net, Running, daemons};

const POLICY: &str = "\
clients = IPv4{10.77.0.1};
servers = IPv4{10.77.0.2};
service remote = tcp/22;
service mail = tcp/25;
service mailbox = tcp/143;
service database = tcp/5432;
allow remote(clients, servers);
allow mail(clients, servers);
allow mailbox(clients, servers);
allow database(clients, servers);
";

/// Every TCP call on the host was permitted (names are looked up without a rule for it), and the stranger, who comes last, was not.
fn only_the_stranger_is_refused(server: &Host, stranger: &Host, port: u16) {
    let is_tcp = |r: &serde_json::Value| r["verdict"] == "refuse" && r["proto"] == "tcp";
    let refused: Vec<_> = server.records().into_iter().filter(is_tcp).collect();
    assert!(refused.is_empty(), "{refused:#?}");
    let reach = format!("exec 3<>/dev/tcp/10.77.0.2/{port}");
    assert_eq!(
        Finished::of(&mut stranger.plain(&["timeout", "1", "bash", "-c", &reach])).code(),
        124,
        "filtered"
    );
    server.record("the stranger", |r| {
        r["verdict"] == "refuse" && r["remote"].as_str().is_some_and(|a| a.starts_with("10.77.0.3:"))
    });
}

#[test]
fn postgresql_answers_queries() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let _daemon = daemons::postgresql(server);
    let query = ["psql", "-h", "10.77.0.2", "-U", "postgres", "-Atc", "select 6*7"];
    assert_eq!(Finished::of(&mut client.run(&query)).success(), "42\n");
    only_the_stranger_is_refused(server, stranger, 5432);
}

#[test]
fn sshd_gives_a_session_and_forwards_what_the_policy_allows() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let folder = server.path("ssh");
    fs::create_dir(&folder).unwrap();
    fs::create_dir_all("/run/sshd").unwrap();
    for key in ["host", "user"] {
        let path = folder.join(key);
        let words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path.to_str().unwrap()];
        let _done = Finished::of(&mut server.plain(&words)).success();
    }
    fs::copy(folder.join("user.pub"), folder.join("authorized_keys")).unwrap();
    let at = folder.display();
    let config = format!(
        "HostKey {at}/host\nAuthorizedKeysFile {at}/authorized_keys\nStrictModes no\nPidFile none\nUsePAM no\n\
         ListenAddress 10.77.0.2\nPermitRootLogin yes\nAllowTcpForwarding yes\n"
    );
    let config = server.write("sshd_config", config);
    fs::set_permissions(folder.join("user"), fs::Permissions::from_mode(0o600)).unwrap();
    let daemon = server.start(&["/usr/sbin/sshd", "-D", "-e", "-f", config.to_str().unwrap()]);
    daemon.line("Server listening");
    let key = folder.join("user").display().to_string();
    let login = [
        "ssh",
        "-F",
        "none",
        "-i",
        &key,
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
    ];
    let to = ["-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "root@10.77.0.2"];
    let session = [&login[..], &to, &["echo through"]].concat();
    assert_eq!(Finished::of(&mut client.run(&session)).success(), "through\n");
    only_the_stranger_is_refused(server, stranger, 22);

    // A forward makes sshd the caller, and sshd may not call.
    let _hidden = Running::start(server.plain(&["nc", "-l", "127.0.0.1", "4000"]));
    server.wait_for_port(4000);
    let forward = [&login[..], &["-W", "127.0.0.1:4000"], &to].concat();
    assert_ne!(Finished::of(&mut client.run(&forward)).code(), 0);
    let refused = server
        .record("the forward", |r| r["op"] == "connect" && r["verdict"] == "refuse" && r["proto"] == "tcp");
    assert_eq!((&refused["remote"], &refused["exe"]), (&"127.0.0.1:4000".into(), &"/usr/sbin/sshd".into()));
}

#[test]
fn dovecot_passes_the_login_on() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let _daemon = daemons::dovecot(server);
    let said = daemons::mailboxes(client);
    assert!(said.contains("INBOX"), "{said}");
    only_the_stranger_is_refused(server, stranger, 143);
}

#[test]
fn exim_takes_a_message() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let (_daemon, queue) = daemons::exim(server);
    let queued = daemons::send_mail(client, &queue);
    assert!(queued.iter().any(|name| name.ends_with("-H")), "the message is in the queue: {queued:?}");
    only_the_stranger_is_refused(server, stranger, 25);
}
