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

/// sshd with keys of its own, and the words that log in to it, up to the options that say what for.
fn sshd(server: &Host) -> (Running, Vec<String>) {
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
    let login = format!(
        "ssh -F none -i {at}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \
         -o BatchMode=yes root@10.77.0.2"
    );
    (daemon, login.split_whitespace().map(ToOwned::to_owned).collect())
}

#[test]
fn sshd_gives_a_session_and_forwards_nothing_without_a_rule() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let (_daemon, login) = sshd(server);
    let session = [&login[..], &["echo through".to_owned()]].concat();
    assert_eq!(Finished::of(&mut client.run(&session)).success(), "through\n");
    only_the_stranger_is_refused(server, stranger, 22);

    // A forward makes sshd the caller, and sshd may not call.
    let _hidden = Running::start(server.plain(&["nc", "-l", "127.0.0.1", "4000"]));
    server.wait_for_port(4000);
    let forward = [&login[..], &["-W".to_owned(), "127.0.0.1:4000".to_owned()]].concat();
    assert_ne!(Finished::of(&mut client.run(&forward)).code(), 0);
    let refused = server
        .record("the forward", |r| r["op"] == "connect" && r["verdict"] == "refuse" && r["proto"] == "tcp");
    assert_eq!((&refused["remote"], &refused["exe"]), (&"127.0.0.1:4000".into(), &"/usr/sbin/sshd".into()));
}

#[test]
fn sshd_forwards_both_ways_what_rules_allow() {
    let forwards = "sshd = process{exe=\"/usr/sbin/sshd\"};\nssh = process{exe=\"/usr/bin/ssh\"};\n\
        allow tcp/4000(sshd, *);\nallow tcp/4001(*, sshd);\nallow tcp/4002(ssh, *);\nallow tcp/4003(*, ssh);\n";
    let net = Net::client_server_stranger(&format!("{POLICY}{forwards}"));
    let [client, server, _] = net.hosts();
    let (_daemon, login) = sshd(server);
    // Behind each end of the tunnel somebody who is not wrapped.
    let behind = |host: &Host, port: u16| {
        let text = port.to_string();
        let service =
            Running::start(host.plain(&["tcpsvd", "-l", "here", "127.0.0.1", &text, "echo", &text]));
        host.wait_for_port(port);
        service
    };
    let _services = [behind(server, 4000), behind(client, 4002)];
    let ways = "-N -o ExitOnForwardFailure=yes -L 4003:127.0.0.1:4000 -R 4001:127.0.0.1:4002";
    let ways: Vec<String> = ways.split_whitespace().map(ToOwned::to_owned).collect();
    let _tunnel = client.start(&[&login[..], &ways].concat());
    for (host, port, answer) in [(client, 4003, "4000\n"), (server, 4001, "4002\n")] {
        host.wait_for_port(port);
        let reach = format!("exec 3<>/dev/tcp/127.0.0.1/{port}; cat <&3");
        assert_eq!(Finished::of(&mut host.plain(&["bash", "-c", &reach])).success(), answer);
    }
    let by = |host: &Host, exe: &str, remote: &str| {
        host.record("the call at the tunnel's end", |r| r["exe"] == exe && r["remote"] == remote)
    };
    assert_eq!(by(server, "/usr/sbin/sshd", "127.0.0.1:4000")["verdict"], "permit");
    assert_eq!(by(client, "/usr/bin/ssh", "127.0.0.1:4002")["verdict"], "permit");
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
