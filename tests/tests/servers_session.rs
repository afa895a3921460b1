//! Daemons that hand connections from process to process: PostgreSQL, OpenSSH, Dovecot and Exim.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use portcullis_tests::{Finished, Host, Net, Running};

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

fn postgresql() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").unwrap();
    versions.map(|v| v.unwrap().path().join("bin")).find(|p| p.join("initdb").exists()).unwrap()
}

#[test]
fn postgresql_answers_queries() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let bin = postgresql();
    let data = server.path("pg");
    fs::create_dir(&data).unwrap();
    let user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"];
    let _done = Finished::of(&mut server.plain(&["chown", "postgres", data.to_str().unwrap()])).success();
    let (initdb, postgres) = (bin.join("initdb"), bin.join("postgres"));
    let data = data.to_str().unwrap();
    let words = [&user[..], &[initdb.to_str().unwrap(), "-A", "trust", "-N", "-D", data]].concat();
    let _done = Finished::of(&mut server.plain(&words)).success();
    fs::write(format!("{data}/pg_hba.conf"), "host all all 10.77.0.0/24 trust\n").unwrap();
    let words = [
        &user[..],
        &[postgres.to_str().unwrap(), "-D", data, "-h", "10.77.0.2", "-k", "", "-c", "fsync=off"],
    ]
    .concat();
    let server_runs = server.start(&words);
    server_runs.line("ready to accept connections");
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
    let folder = server.path("dovecot");
    fs::create_dir_all(folder.join("mail")).unwrap();
    fs::write(folder.join("users"), "someone:{PLAIN}secret:65534:65534::/nonexistent::\n").unwrap();
    let _done =
        Finished::of(&mut server.plain(&["chown", "-R", "65534", folder.join("mail").to_str().unwrap()]));
    let at = folder.display();
    let config = format!(
        "protocols = imap\nlisten = 10.77.0.2\nbase_dir = {at}/run\nstate_dir = {at}/state\nssl = no\n\
         disable_plaintext_auth = no\nmail_location = maildir:{at}/mail\nlog_path = /dev/stderr\n\
         first_valid_uid = 1\npassdb {{\n driver = passwd-file\n args = {at}/users\n}}\n\
         userdb {{\n driver = passwd-file\n args = {at}/users\n}}\nservice imap-login {{\n chroot =\n}}\n"
    );
    let config = server.write("dovecot.conf", config);
    let _daemon = server.start(&["/usr/sbin/dovecot", "-F", "-c", config.to_str().unwrap()]);
    server.wait_for_port(143);
    let words = ["curl", "-sS", "--max-time", "10", "-u", "someone:secret", "imap://10.77.0.2/"];
    let said = Finished::of(&mut client.run(&words)).success();
    assert!(said.contains("INBOX"), "{said}");
    only_the_stranger_is_refused(server, stranger, 143);
}

#[test]
fn exim_takes_a_message() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let spool = server.path("spool");
    fs::create_dir(&spool).unwrap();
    let _done = Finished::of(&mut server.plain(&["chown", "Debian-exim", spool.to_str().unwrap()])).success();
    let config = format!(
        "primary_hostname = server.example\nspool_directory = {0}\nlog_file_path = {0}/%slog\n\
         local_interfaces = 10.77.0.2\ndaemon_smtp_ports = 25\nqueue_only = true\n\
         acl_smtp_rcpt = accept\nacl_smtp_data = accept\nhost_lookup =\nrfc1413_query_timeout = 0s\n\
         pid_file_path = {0}/exim.pid\nkeep_environment =\n",
        spool.display()
    );
    let config = server.write("exim.conf", config);
    let _daemon = server.start(&["/usr/sbin/exim4", "-bdf", "-C", config.to_str().unwrap()]);
    server.wait_for_port(25);
    let script = "import smtplib\n\
        s = smtplib.SMTP('10.77.0.2', 25, 'client.example', timeout=10)\n\
        s.sendmail('a@client.example', ['b@server.example'], 'Subject: x\\n\\nhello')\n\
        print(s.quit()[0])";
    assert_eq!(Finished::of(&mut client.run(&["/usr/bin/python3", "-c", script])).success(), "221\n");
    let queued = Finished::of(&mut server.plain(&["sh", "-c", "ls \"$0\"/input", spool.to_str().unwrap()]));
    assert!(queued.success().contains("-H"), "the message is in the queue");
    only_the_stranger_is_refused(server, stranger, 25);
}
