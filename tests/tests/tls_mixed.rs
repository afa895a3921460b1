//! Listeners for peers with certificates and for others as well; and peers on the listener's own host.

use portcullis_tests::{
    Finished, Host, Net, Running, eventually,
    ftp::{Daemon, Session},
    trust::Trust,
    wire::Capture,
};
use serde_json::Value;

const BOTH: &str = "\
inside = x509{name=\"*.example.com\"};
near = IPv4{10.77.0.3};
allow tcp/8080(inside, inside);
allow tcp/8080(near, inside);
";

/// Greets whoever comes, and says back what it hears.
const SERVE: &str = "import socket, threading\n\
    l = socket.create_server(('0.0.0.0', 8080))\n\
    print('listening', flush=True)\n\
    def serve(s, who):\n    \
        try:\n        \
            s.sendall(b'greetings ' + who[0].encode() + b'\\n')\n        \
            while part := s.recv(4096): s.sendall(part)\n    \
        except OSError: pass\n\
    while True: threading.Thread(target=serve, args=l.accept(), daemon=True).start()\n";

/// Waits for the greeting before it says something, or does not; stays until its end.
const TALK: &str = "import socket, sys, time\n\
    began = time.monotonic()\n\
    s = socket.create_connection((sys.argv[1], 8080), timeout=10)\n\
    f = s.makefile('rw')\n\
    def say(): f.write('secret words\\n'); f.flush()\n\
    if sys.argv[2] == 'first': say()\n\
    print(f.readline().strip(), flush=True)\n\
    if sys.argv[2] != 'first': say()\n\
    print('heard', f.readline().strip(), 'after', time.monotonic() - began, flush=True)\n\
    if sys.argv[3:]: print('end', len(s.recv(10)), flush=True)\n";

fn serve(server: &Host) -> Running {
    let running = server.start(&["/usr/bin/python3", "-c", SERVE]);
    running.line("listening");
    running
}

fn talk(to: &str, who: &str) -> [String; 5] {
    ["/usr/bin/python3", "-c", TALK, to, who].map(str::to_owned)
}

fn permitted(record: &Value, from: &Host, lane: &str, assurance: &str) -> bool {
    record["op"] == "accept"
        && record["verdict"] == "permit"
        && record["remote"].as_str().is_some_and(|at| at.starts_with(&format!("{}:", from.address)))
        && (&record["lane"], &record["assurance"]) == (&lane.into(), &assurance.into())
}

#[test]
fn one_listener_serves_peers_with_certificates_and_those_whose_address_suffices() {
    let net = Net::new(&["client", "server", "near", "far"]);
    let [client, server, near, far] = net.hosts();
    client.policy(BOTH);
    server.policy(BOTH);
    let trust = Trust::of(&[client, server]);
    let _serving = serve(server);
    // Whoever speaks first, the program hears of the true peer.
    for (who, least) in [("first", 0.0), ("second", 0.2)] {
        let said = Finished::of(&mut near.plain(&talk("10.77.0.2", who)));
        assert!(said.stdout.starts_with("greetings 10.77.0.3\nheard secret words after "), "{said}");
        let took: f64 = said.stdout.trim().rsplit(' ').next().unwrap().parse().unwrap();
        assert!(took >= least, "{who}: who waits for the server must be seen to be silent: {took}");
    }
    server.record("the plain one", |r| permitted(r, near, "plain", "address"));
    // The same address, with a certificate.
    let folder = near.path("stock");
    trust.certificate("near.example.com", &[], &folder);
    let openssl = |from: &Host| {
        let at = folder.display();
        let line = format!(
            "(echo secret words; sleep 1) | timeout 10 openssl s_client -quiet -CAfile {at}/ca.crt -cert {at}/host.crt \
             -cert_chain {at}/host.crt -key {at}/host.key -connect 10.77.0.2:8080"
        );
        Finished::of(&mut from.plain(&["sh", "-c", &line]))
    };
    let said = openssl(near);
    assert!(said.stdout.contains("greetings 10.77.0.3\nsecret words"), "{said}");
    server.record("the one with a certificate", |r| permitted(r, near, "tls", "certificate"));
    // An address that no rule names must show one.
    let said = Finished::of(&mut far.plain(&talk("10.77.0.2", "first")));
    assert!(!said.stdout.contains("greetings"), "{said}");
    server.record("the plain one from elsewhere", |r| {
        r["verdict"] == "refuse" && r["remote"].as_str().is_some_and(|at| at.starts_with("10.77.0.4:"))
    });
    let said = openssl(far);
    assert!(said.stdout.contains("greetings 10.77.0.4\nsecret words"), "{said}");
    // A member speaks TLS.
    let wire = Capture::on(client);
    let said = Finished::of(&mut client.run(&talk("10.77.0.2", "second")));
    assert!(said.stdout.starts_with("greetings 10.77.0.1\nheard secret words"), "{said}");
    assert!(!wire.has(b"secret words") && !wire.has(b"greetings"));
    server.record("the member", |r| permitted(r, client, "tls", "certificate"));
    let said = Finished::of(&mut client.plain(&talk("10.77.0.2", "first")));
    assert!(!said.stdout.contains("greetings"), "a member in plain: {said}");
    // The listener's own host, and a rule that goes.
    let said = Finished::of(&mut server.run(&talk("10.77.0.2", "first")));
    assert!(said.stdout.starts_with("greetings 10.77.0.2\nheard secret words"), "{said}");
    let stays = Running::start(near.plain(&[&talk("10.77.0.2", "first")[..], &["stay".to_owned()]].concat()));
    stays.line("heard");
    server.policy(&BOTH.replace("allow tcp/8080(near, inside);\n", ""));
    server.record("the cut", |r| {
        r["op"] == "cut"
            && r["lane"] == "plain"
            && r["remote"].as_str().is_some_and(|at| at.starts_with("10.77.0.3:"))
    });
    stays.line("");
    let closed =
        server.record("its end", |r| r["op"] == "close" && r["lane"] == "plain" && r["reason"].is_string());
    assert!(closed["peer_cert"].is_null() && closed["bytes_in"].as_u64() >= Some(13), "{closed}");
    eventually("it must show a certificate now", || {
        let said = Finished::of(&mut near.plain(&talk("10.77.0.2", "first")));
        (!said.stdout.contains("greetings")).then_some(())
    });
    let said = openssl(near);
    assert!(said.stdout.contains("greetings 10.77.0.3\nsecret words"), "{said}");
}

const BOTH_FTP: &str = "\
inside = x509{name=\"*.example.com\"};
near = IPv4{10.77.0.3};
service ftp = tcp/21, related;
allow ftp(inside, inside) with related;
allow ftp(near, inside) with related;
";

#[test]
fn a_session_in_plain_has_its_data_channels_beside_those_with_certificates() {
    const SIZE: usize = 100_000;
    let net = Net::new(&["client", "server", "near", "far"]);
    let [client, server, near, far] = net.hosts();
    client.policy(BOTH_FTP);
    server.policy(BOTH_FTP);
    let _trust = Trust::of(&[client, server]);
    let _daemon = server.start(&Daemon::Vsftpd.command(server, SIZE));
    server.wait_for_port(21);
    let member = Session::begin(client, "passive");
    let it = Session::begin_plain(near, "passive");
    // Its data port is for its host, and neither for another nor for a member that has a session too.
    let port = it.port.to_string();
    let connect = "import socket, sys\n\
        s = socket.create_connection(('10.77.0.2', int(sys.argv[1])), timeout=5); s.settimeout(5)\n\
        print('got', len(s.recv(1000)))";
    let thief = ["/usr/bin/python3", "-c", connect, &port];
    for mut stolen in [far.plain(&thief), client.plain(&thief), client.run(&thief)] {
        let stolen = Finished::of(&mut stolen);
        assert!(["", "got 0\n"].contains(&stolen.stdout.as_str()), "{stolen}");
    }
    let at_port = |r: &Value| r["local"].as_str().is_some_and(|l| l.ends_with(&format!(":{port}")));
    for host in [far, client] {
        let from = format!("{}:", host.address);
        server.record("a thief", |r| {
            r["verdict"] == "refuse" && at_port(r) && r["remote"].to_string().contains(&from)
        });
    }
    it.finish(SIZE);
    member.finish(SIZE);
    Session::begin_plain(near, "active").finish(SIZE);
    let data = |from: &Host, op: &str, lane: &str, assurance: &str| {
        let from = format!("{}:", from.address);
        server.record(&format!("{op} {lane}"), |r| {
            r["op"] == op
                && !r["session"].is_null()
                && r["remote"].to_string().contains(&from)
                && (&r["lane"], &r["assurance"]) == (&lane.into(), &assurance.into())
        })
    };
    data(near, "accept", "plain", "address");
    data(near, "connect", "plain", "address");
    data(client, "accept", "tls", "certificate");
    let gone = Finished::of(&mut near.plain(&thief));
    assert_ne!(gone.code(), 0, "the port outlived its session: {gone}");
}

#[test]
fn a_front_for_all_addresses_leaves_the_one_that_has_another_listener_alone() {
    let net = Net::client_server_stranger("allow tcp/8080(x509{name=\"*.example.com\"}, *);\n");
    let [client, server, stranger] = net.hosts();
    let _trust = Trust::of(&[client, server]);
    // The kernel lets two of one user share a port so, and prefers the one at the very address.
    let serve = |at: &str| SERVE.replace("('0.0.0.0', 8080)", &format!("('{at}', 8080), reuse_port=True"));
    let (all, other) = (serve("0.0.0.0"), serve("10.77.0.2").replace("greetings", "another"));
    let all = server.start(&["/usr/bin/python3", "-c", &all]);
    all.line("listening");
    let said = || Finished::of(&mut stranger.plain(&talk("10.77.0.2", "first")));
    assert!(!said().stdout.contains("greetings"), "the control: he shows no certificate");
    let wrapped = || Finished::of(&mut client.run(&talk("10.77.0.2", "first")));
    assert!(wrapped().stdout.starts_with("greetings"));
    let other = Running::start(server.plain(&["/usr/bin/python3", "-c", &other]));
    other.line("listening");
    // The first one is reset, as the front has taken him.
    eventually("he reaches the other listener", || said().stdout.starts_with("another").then_some(()));
    assert!(said().stdout.starts_with("another"), "and from then on");
    assert!(!wrapped().stdout.contains("greetings"), "who asks for a certificate there is shown none");
    drop(other);
    eventually("the front is there again", || wrapped().stdout.starts_with("greetings").then_some(()));
    assert!(!said().stdout.contains("greetings"));
}

#[test]
fn between_processes_of_one_host_rules_ask_for_the_certificate_that_the_host_would_give() {
    let net = Net::client_server_stranger("");
    let [_, server, _] = net.hosts();
    let policy = "inside = x509{name=\"*.example.com\"};\nallow tcp/8080(inside, inside);\n";
    server.policy(policy);
    let _trust = Trust::of(&[server]);
    let _serving = serve(server);
    for to in ["127.0.0.1", "10.77.0.2"] {
        let said = Finished::of(&mut server.run(&talk(to, "first")));
        assert!(said.stdout.contains("heard secret words"), "{to}: {said}\n{:#?}", server.records());
    }
    for op in ["connect", "accept"] {
        let told = server.record(op, |r| r["op"] == op && r["verdict"] == "permit");
        assert_eq!((&told["lane"], &told["assurance"]), (&"plain".into(), &"kernel".into()), "{told}");
        let reason = "by the certificate that this host gives its process at the far end";
        assert_eq!(told["reason"], reason, "{told}");
    }
    // One that is not wrapped has none.
    let said = Finished::of(&mut server.plain(&talk("127.0.0.1", "first")));
    assert!(!said.stdout.contains("greetings"), "{said}");
    server.record("the one that is not wrapped", |r| {
        r["op"] == "accept" && r["verdict"] == "refuse" && r["reason"].to_string().contains("not wrapped")
    });
    // One that is too old is refused, at the call.
    server.policy(&policy.replace("(inside, inside", "(inside, inside & x509{ver>99990101}"));
    eventually("the newer enrolment is asked for", || {
        let said = Finished::of(&mut server.run(&talk("127.0.0.1", "first")));
        (!said.stdout.contains("greetings")).then_some(())
    });
}

#[test]
fn records_bear_the_name_that_the_host_has_in_its_certificates() {
    let net = Net::client_server_stranger("allow tcp/9(*, *);\n");
    let [client, _, stranger] = net.hosts();
    let _trust = Trust::of(&[client]);
    stranger.policy("allow tcp/9(*, *);\n");
    let machine = Finished::of(&mut client.plain(&["hostname"])).success();
    for (host, name) in [(client, "client.example.com"), (stranger, machine.trim())] {
        let _done = Finished::of(&mut host.run(&["true"])).success();
        for record in host.records() {
            assert_eq!(record["host"], name, "{record}");
        }
    }
}
