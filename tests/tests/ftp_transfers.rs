//! Every FTP daemon of Debian with every client, each way a data connection can come about, under one rule.

use portcullis_tests::{
    Finished, Net,
    ftp::{self, Client, Daemon, Mode},
};

const SIZE: usize = 200_000;

fn transfers(daemon: Daemon) {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(ftp::POLICY);
    server.policy(ftp::POLICY);
    let _daemon = server.start(&daemon.command(server, SIZE));
    server.wait_for_port(21);
    for peer in [Client::Lftp, Client::Curl, Client::Tnftp, Client::Ftplib] {
        for &mode in peer.modes() {
            fetch(client, "10.77.0.2", peer, mode, daemon);
        }
    }
    for mode in [Mode::Epsv, Mode::Eprt].into_iter().filter(|_| daemon.has_ipv6()) {
        fetch(client, "[fd77::2]", Client::Curl, mode, daemon);
    }
    for host in [client, server] {
        // Names that daemons look up are another matter: the policy has no rule for DNS.
        let is_tcp = |r: &serde_json::Value| r["verdict"] == "refuse" && r["proto"] == "tcp";
        let refused: Vec<_> = host.records().into_iter().filter(is_tcp).collect();
        assert!(refused.is_empty(), "{daemon:?}: refused on {}: {refused:#?}", host.name);
    }
    // Each data connection names its session, and the proof it rests on.
    let related = |r: &serde_json::Value| !r["session"].is_null() && r["verdict"] == "permit";
    let data: Vec<_> = server.records().into_iter().filter(related).collect();
    assert!(data.len() >= 12, "{daemon:?}: only {} records of data channels", data.len());
    assert!(data.iter().all(|r| r["assurance"] == "address"), "{data:#?}");
}

fn fetch(client: &portcullis_tests::Host, from: &str, peer: Client, mode: Mode, daemon: Daemon) {
    let to = client.path("got");
    let _absent = std::fs::remove_file(&to);
    let done = Finished::of(&mut client.run(&peer.fetch(client, from, mode, &to)));
    let got = std::fs::read(&to).unwrap_or_default();
    let refused: Vec<_> = client.records().into_iter().filter(|r| r["verdict"] == "refuse").collect();
    assert!(
        got == ftp::content(SIZE),
        "{peer:?} {mode:?} from {daemon:?} at {from}: {} of {SIZE} bytes arrived\n{done}\n{refused:#?}",
        got.len()
    );
}

#[test]
fn vsftpd_serves_every_client_in_every_mode() {
    transfers(Daemon::Vsftpd);
}

#[test]
fn proftpd_serves_every_client_in_every_mode() {
    transfers(Daemon::Proftpd);
}

#[test]
fn pure_ftpd_serves_every_client_in_every_mode() {
    transfers(Daemon::PureFtpd);
}

#[test]
fn inetutils_ftpd_under_inetd_serves_every_client_in_every_mode() {
    transfers(Daemon::Inetutils);
}

#[test]
fn pyftpdlib_serves_every_client_in_every_mode() {
    transfers(Daemon::Pyftpdlib);
}
