//! Daemons of Debian that hand connections from process to process, set up for one test at 10.77.0.2.

use std::{fs, path::PathBuf};

use crate::{Finished, Host, Running};

/// PostgreSQL's server, which lets everybody of the link in.
///
/// # Panics
/// It cannot be set up.
pub fn postgresql(host: &Host) -> Running {
    let versions = fs::read_dir("/usr/lib/postgresql").unwrap();
    let bin = versions.map(|v| v.unwrap().path().join("bin")).find(|p| p.join("initdb").exists()).unwrap();
    let data = host.path("pg");
    fs::create_dir(&data).unwrap();
    let data = data.to_str().unwrap();
    let _done = Finished::of(&mut host.plain(&["chown", "postgres", data])).success();
    let user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"];
    let (initdb, postgres) = (bin.join("initdb"), bin.join("postgres"));
    let make = [&user[..], &[initdb.to_str().unwrap(), "-A", "trust", "-N", "-D", data]].concat();
    let _done = Finished::of(&mut host.plain(&make)).success();
    fs::write(format!("{data}/pg_hba.conf"), "host all all 10.77.0.0/24 trust\n").unwrap();
    let words = [postgres.to_str().unwrap(), "-D", data, "-h", "10.77.0.2", "-k", "", "-c", "fsync=off"];
    let running = host.start(&[&user[..], &words].concat());
    running.line("ready to accept connections");
    running
}

/// Dovecot's IMAP server, with an empty mailbox of user `someone`, password `secret`.
///
/// # Panics
/// It cannot be set up.
pub fn dovecot(host: &Host) -> Running {
    let folder = host.path("dovecot");
    fs::create_dir_all(folder.join("mail")).unwrap();
    fs::write(folder.join("users"), "someone:{PLAIN}secret:65534:65534::/nonexistent::\n").unwrap();
    let _done =
        Finished::of(&mut host.plain(&["chown", "-R", "65534", folder.join("mail").to_str().unwrap()]));
    let at = folder.display();
    let config = format!(
        "protocols = imap\nlisten = 10.77.0.2\nbase_dir = {at}/run\nstate_dir = {at}/state\nssl = no\n\
         disable_plaintext_auth = no\nmail_location = maildir:{at}/mail\nlog_path = /dev/stderr\n\
         first_valid_uid = 1\npassdb {{\n driver = passwd-file\n args = {at}/users\n}}\n\
         userdb {{\n driver = passwd-file\n args = {at}/users\n}}\nservice imap-login {{\n chroot =\n}}\n"
    );
    let config = host.write("dovecot.conf", config);
    let running = host.start(&["/usr/sbin/dovecot", "-F", "-c", config.to_str().unwrap()]);
    host.wait_for_port(143);
    running
}

/// Asks [`dovecot`] for its mailboxes.
#[must_use]
pub fn mailboxes(from: &Host) -> String {
    let words = ["curl", "-sS", "--max-time", "10", "-u", "someone:secret", "imap://10.77.0.2/"];
    Finished::of(&mut from.run(&words)).success()
}

/// Exim's daemon, which queues what it gets; beside it the folder of its queue.
///
/// # Panics
/// It cannot be set up.
pub fn exim(host: &Host) -> (Running, PathBuf) {
    let spool = host.path("spool");
    fs::create_dir(&spool).unwrap();
    let _done = Finished::of(&mut host.plain(&["chown", "Debian-exim", spool.to_str().unwrap()])).success();
    let config = format!(
        "primary_hostname = server.example\nspool_directory = {0}\nlog_file_path = {0}/%slog\n\
         local_interfaces = 10.77.0.2\ndaemon_smtp_ports = 25\nqueue_only = true\n\
         acl_smtp_rcpt = accept\nacl_smtp_data = accept\nhost_lookup =\nrfc1413_query_timeout = 0s\n\
         pid_file_path = {0}/exim.pid\nkeep_environment =\n",
        spool.display()
    );
    let config = host.write("exim.conf", config);
    let running = host.start(&["/usr/sbin/exim4", "-bdf", "-C", config.to_str().unwrap()]);
    host.wait_for_port(25);
    (running, spool.join("input"))
}

/// Gives [`exim`] a message, and says what is in its queue then.
#[must_use]
pub fn send_mail(from: &Host, queue: &std::path::Path) -> Vec<String> {
    let script = "import smtplib\n\
        s = smtplib.SMTP('10.77.0.2', 25, 'client.example', timeout=10)\n\
        s.sendmail('a@client.example', ['b@server.example'], 'Subject: x\\n\\nhello')\n\
        print(s.quit()[0])";
    assert_eq!(Finished::of(&mut from.run(&["/usr/bin/python3", "-c", script])).success(), "221\n");
    let files = fs::read_dir(queue).unwrap();
    files.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}
