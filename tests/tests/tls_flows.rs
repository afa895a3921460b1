//! Flows between members of a trust domain, under programs that know nothing of it.

use portcullis_tests::{Finished, Net, Running, trust::Trust};

const POLICY: &str = "\
inside = x509{name=\"*.example.com\"};
curl   = process{exe=\"/usr/bin/curl\"};
service web = tcp/8080;
allow web(inside, inside);
";

fn web(server: &portcullis_tests::Host) -> Running {
    server.write("site/page", "plain words");
    let site = server.path("site").display().to_string();
    let words =
        ["/usr/bin/python3", "-m", "http.server", "8080", "--bind", "10.77.0.2", "--directory", &site];
    let running = server.start(&words);
    server.wait_for_port(8080);
    running
}

#[test]
fn a_flow_between_members_is_protected_and_both_ends_are_on_record() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let _trust = Trust::of(&[client, server]);
    let _web = web(server);
    let fetch = ["curl", "-sS", "--max-time", "10", "http://10.77.0.2:8080/page"];
    let got = Finished::of(&mut client.run(&fetch));
    assert_eq!(got.stdout, "plain words", "{got}\n{}\n{}", all(client), all(server));
    let closed = client.record("the end", |r| r["op"] == "close" && r["lane"] == "tls");
    assert_eq!(closed["kex"], "X25519MLKEM768", "{closed}");
}

fn all(host: &portcullis_tests::Host) -> String {
    host.records().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}
