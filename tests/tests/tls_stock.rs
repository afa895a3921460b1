//! Stock TLS programs at one end and wrapped ones, which know nothing of it, at the other.

use portcullis_tests::{
    Finished, Host, Net, Running,
    stock::{PAGE, Papers, Shows, Stock},
    trust::Trust,
};
use serde_json::Value;

const POLICY: &str = "\
inside = x509{name=\"*.example.com\"};
service web_port = tcp/8080;
allow web_port(inside, inside);
";

const NAME: &str = "stock.example.com";
const ID: &str = "spiffe://example.com/host/stock.example.com";

fn web(server: &Host) -> Running {
    server.write("site/page", PAGE);
    let site = server.path("site").display().to_string();
    let words =
        ["/usr/bin/python3", "-m", "http.server", "8080", "--bind", "10.77.0.2", "--directory", &site];
    let running = server.start(&words);
    server.wait_for_port(8080);
    running
}

/// Whether a record is a refusal that says this of its reason, or of what was shown.
fn refused(record: &Value, op: &str, text: &str) -> bool {
    record["verdict"] == "refuse"
        && record["op"] == op
        && record["proto"] == "tcp"
        && format!("{} {}", record["reason"], record["peer_cert"]).contains(text)
}

/// A stock client is served with a proper certificate, and refused with any other, by name.
fn client(stock: Stock) {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let trust = Trust::of(&[client, server]);
    let papers = Papers::of(&trust, NAME, stranger.path("stock"));
    let _web = web(server);
    let served = || stock.ask(stranger, &papers, Shows::Own);
    let first = served();
    assert!(first.stdout.contains(PAGE), "{first}\n{:#?}", server.records());
    let accepted = server.record("the stock client", |r| r["op"] == "accept" && r["verdict"] == "permit");
    assert_eq!((&accepted["peer"], &accepted["lane"]), (&ID.into(), &"tls".into()), "{accepted}");
    let sent_away = |from: &Host, shows: Shows, text: &str| {
        let got = stock.ask(from, &papers, shows);
        assert!(!got.stdout.contains(PAGE), "{shows:?}: {got}");
        let told = server.record(text, |r| refused(r, "accept", text));
        assert!(told["remote"].as_str().unwrap().starts_with(&format!("{}:", from.address)), "{told}");
        told
    };
    sent_away(stranger, Shows::Nothing, "peer sent no certificates");
    sent_away(stranger, Shows::InOldTls, "the peer does not speak TLS 1.3");
    let foreign = sent_away(stranger, Shows::Foreign, "CN=mallory");
    assert!(foreign["reason"].as_str().unwrap().contains("not of this trust domain"), "{foreign}");
    let expired = sent_away(stranger, Shows::Expired, "certificate expired");
    assert!(expired["peer_cert"].as_str().unwrap().contains(ID), "{expired}");
    sent_away(client, Shows::Own, "belongs to member `client.example.com` but the certificate shows `stock.");
    let again = served();
    assert!(again.stdout.contains(PAGE), "the control, after them all: {again}");
    trust.ca(&["revoke", NAME]);
    trust.publish(&[server]);
    server.record("the new list", |r| r["op"] == "members" && r["number"].as_u64() > Some(3));
    let revoked = sent_away(stranger, Shows::Own, "is revoked");
    assert!(revoked["peer_cert"].as_str().unwrap().contains(ID), "{revoked}");
    let why = server.portcullis(&["why", "--last"]).success();
    assert!(why.contains("is revoked") && why.contains(ID), "{why}");
}

/// A stock server is reached if it shows a proper certificate, and else the wrapped client's call fails, by name.
fn server(stock: Stock) {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let trust = Trust::of(&[client, server]);
    let papers = Papers::of(&trust, NAME, stranger.path("stock"));
    let fetch = |at: &Host| {
        let url = format!("http://{}:8080/page", at.address);
        Finished::of(&mut client.run(&["curl", "-sS", "--max-time", "10", &url]))
    };
    let served = |shows: Shows| {
        let _server = stock.serve(stranger, &papers, shows);
        fetch(stranger)
    };
    let first = served(Shows::Own);
    assert!(first.stdout.contains(PAGE), "{first}\n{:#?}", client.records());
    let admitted = client.record("the stock server", |r| r["op"] == "admit");
    assert_eq!(admitted["peer"], ID, "{admitted}");
    let turned_down = |got: &Finished, text: &str| {
        assert!(!got.stdout.contains(PAGE), "{got}");
        client.record(text, |r| refused(r, "connect", text))
    };
    turned_down(&served(Shows::InOldTls), "the peer does not speak TLS 1.3");
    let foreign = turned_down(&served(Shows::Foreign), "CN=mallory");
    assert!(foreign["reason"].as_str().unwrap().contains("not of this trust domain"), "{foreign}");
    let expired = turned_down(&served(Shows::Expired), "certificate expired");
    assert!(expired["peer_cert"].as_str().unwrap().contains(ID), "{expired}");
    {
        let _server = stock.serve(server, &papers, Shows::Own);
        let elsewhere = "belongs to member `server.example.com` but the certificate shows `stock.";
        turned_down(&fetch(server), elsewhere);
    }
    let again = served(Shows::Own);
    assert!(again.stdout.contains(PAGE), "the control, after them all: {again}");
    trust.ca(&["revoke", NAME]);
    trust.publish(&[client]);
    client.policy(&format!("{POLICY}# again\n"));
    let revoked = turned_down(&served(Shows::Own), "is revoked");
    assert!(revoked["peer_cert"].as_str().unwrap().contains(ID), "{revoked}");
    let why = client.portcullis(&["why", "--last"]).success();
    assert!(why.contains("is revoked") && why.contains(ID), "{why}");
}

#[test]
fn openssl_is_a_client() {
    client(Stock::Openssl);
}

#[test]
fn curl_is_a_client() {
    client(Stock::Curl);
}

#[test]
fn stunnel_is_a_client() {
    client(Stock::Stunnel);
}

#[test]
fn nginx_is_a_client() {
    client(Stock::Nginx);
}

#[test]
fn python_is_a_client() {
    client(Stock::Python);
}

#[test]
fn openssl_is_a_server() {
    server(Stock::Openssl);
}

#[test]
fn stunnel_is_a_server() {
    server(Stock::Stunnel);
}

#[test]
fn nginx_is_a_server() {
    server(Stock::Nginx);
}

#[test]
fn python_is_a_server() {
    server(Stock::Python);
}
