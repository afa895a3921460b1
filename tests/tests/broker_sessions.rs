//! Related channels: whose data connection it is, and who is kept out.

use portcullis_tests::{
    Finished, Net,
    ftp::{Client, Daemon, POLICY, content},
};

const SIZE: usize = 300_000;

fn fetches(daemon: Daemon) {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(POLICY);
    server.policy(POLICY);
    let running = server.start(&daemon.command(server, SIZE, 0));
    server.wait_for_port(21);
    let mut bad = Vec::new();
    for with in [Client::Lftp, Client::Curl, Client::Tnftp, Client::Ftplib] {
        for mode in with.modes() {
            let to = client.path(format!("got-{with:?}-{mode:?}"));
            let words = with.fetch(client, "10.77.0.2", *mode, &to);
            let done = Finished::of(&mut client.run(&words));
            if std::fs::read(&to).ok() != Some(content(SIZE)) {
                bad.push(format!("{with:?} {mode:?}: {done}"));
            }
        }
    }
    if !bad.is_empty() {
        for host in [client, server] {
            for r in host.records().iter().filter(|r| r["verdict"] == "refuse") {
                println!("{} {r}", host.name);
            }
        }
        panic!("{}", bad.join("\n"));
    }
    drop(running);
}

#[test]
fn vsftpd_is_served() {
    fetches(Daemon::Vsftpd);
}
#[test]
fn proftpd_is_served() {
    fetches(Daemon::Proftpd);
}
#[test]
fn pure_ftpd_is_served() {
    fetches(Daemon::PureFtpd);
}
#[test]
fn inetutils_ftpd_under_inetd_is_served() {
    fetches(Daemon::Inetutils);
}
#[test]
fn pyftpdlib_is_served() {
    fetches(Daemon::Pyftpdlib);
}
