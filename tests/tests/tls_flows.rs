//! Flows between members of a trust domain, under programs that know nothing of it.

use std::fs;

use portcullis_tests::{Finished, Host, Net, Running, eventually, trust::Trust, wire::Capture};
use serde_json::Value;

const POLICY: &str = "\
inside = x509{name=\"*.example.com\"};
curl   = process{exe=\"/usr/bin/curl\"};
web    = process{exe=\"/usr/bin/python3*\"};
service web_port = tcp/8080;
allow web_port(inside, inside & web);
";

const PAGE: &str = "http://10.77.0.2:8080/page";

fn web(server: &Host, at: &str) -> Running {
    server.write("site/page", "plain words");
    let site = server.path("site").display().to_string();
    let words = ["/usr/bin/python3", "-m", "http.server", "8080", "--bind", at, "--directory", &site];
    let running = server.start(&words);
    server.wait_for_port(8080);
    running
}

fn fetch(client: &Host, url: &str) -> Finished {
    Finished::of(&mut client.run(&["curl", "-gsS", "--max-time", "10", url]))
}

fn all(host: &Host) -> String {
    host.records().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn refused(record: &Value, op: &str) -> bool {
    record["verdict"] == "refuse" && record["op"] == op && record["proto"] == "tcp"
}

/// What a refusal says of its reason and of what was shown.
fn says(record: &Value) -> String {
    format!("{} {}", record["reason"], record["peer_cert"])
}

#[test]
fn a_flow_between_members_is_protected_and_both_ends_are_on_record() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let _trust = Trust::of(&[client, server]);
    let _web = web(server, "::");
    let wire = Capture::on(client);
    for url in [PAGE, "http://[fd77::2]:8080/page"] {
        let got = fetch(client, url);
        assert_eq!(got.stdout, "plain words", "{got}\n{}\n--\n{}", all(client), all(server));
    }
    assert!(!wire.has(b"GET ") && !wire.has(b"plain words"));
    let peers = [(client, "server.example.com/process/web"), (server, "client.example.com/process/curl")];
    for (host, peer) in peers {
        let closed = host.record("the end", |r| r["op"] == "close" && r["lane"] == "tls");
        assert_eq!(closed["peer"], format!("spiffe://example.com/host/{peer}"));
        assert_eq!((&closed["kex"], &closed["assurance"]), (&"X25519MLKEM768".into(), &"certificate".into()));
        assert!(
            closed["bytes_in"].as_u64() > Some(50) && closed["bytes_out"].as_u64() > Some(50),
            "{closed}"
        );
        assert!(closed["duration"].is_number() && closed["cipher"].is_string(), "{closed}");
        assert!(closed["peer_cert"].as_str().unwrap().contains(" sha256 "), "{closed}");
    }
    // The program is told the true names.
    let accepted = server.record("the accept", |r| r["op"] == "accept" && r["verdict"] == "permit");
    assert!(accepted["remote"].as_str().unwrap().starts_with("10.77.0.1:"), "{accepted}");
    assert_eq!(accepted["local"], "10.77.0.2:8080");
    // Somebody without a certificate, and a member in plain.
    for host in [stranger, client] {
        let got = Finished::of(&mut host.plain(&["curl", "-sS", "--max-time", "5", PAGE]));
        assert_ne!(got.code(), 0, "{got}");
        let from = format!("{}:", host.address);
        server.record("the plain one", |r| {
            refused(r, "accept") && r["remote"].as_str().is_some_and(|a| a.starts_with(&from))
        });
    }
}

#[test]
fn programs_see_native_names_and_errors() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let _trust = Trust::of(&[client, server]);
    let _web = web(server, "10.77.0.2");
    let script = "import asyncio, errno, select, socket\n\
        to = ('10.77.0.2', 8080)\n\
        s = socket.create_connection(to, timeout=10)\n\
        assert s.getpeername() == to, s.getpeername()\n\
        assert s.getsockname()[0] == '10.77.0.1', s.getsockname()\n\
        n = socket.socket(); n.setblocking(False)\n\
        e = select.epoll(); e.register(n, select.EPOLLOUT)\n\
        assert n.connect_ex(to) == errno.EINPROGRESS\n\
        assert e.poll(10), 'never writable'\n\
        again = n.connect_ex(to)\n\
        assert again in (0, errno.EISCONN), again\n\
        assert n.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 and n.getpeername() == to\n\
        b = socket.socket(); b.bind(('10.77.0.1', 2020)); b.connect(to)\n\
        assert b.getsockname() == ('10.77.0.1', 2020), b.getsockname()\n\
        async def many():\n    \
            streams = await asyncio.gather(*[asyncio.open_connection(*to) for _ in range(20)])\n    \
            assert all(w.get_extra_info('peername') == to for _, w in streams)\n\
        asyncio.run(many())\n\
        dead = socket.socket(); dead.settimeout(10)\n\
        assert dead.connect_ex(('10.77.0.9', 8080)) == errno.EHOSTUNREACH\n\
        print('all native')\n";
    let said = Finished::of(&mut client.run(&["/usr/bin/python3", "-c", script]));
    assert_eq!(said.stdout, "all native\n", "{said}");
    // Nobody listens: as natively, and no refusal.
    drop(_web);
    let code = "import socket; print(socket.socket().connect_ex(('10.77.0.2', 8080)))";
    let said = Finished::of(&mut client.run(&["/usr/bin/python3", "-c", code]));
    assert_eq!(said.stdout, format!("{}\n", libc_econnrefused()), "{said}");
    assert!(!client.records().iter().any(|r| refused(r, "connect")), "{}", all(client));
}

const fn libc_econnrefused() -> i32 {
    nix::errno::Errno::ECONNREFUSED as i32
}

/// A connection that stays until it is cut, and says so.
const STAY: &str = "import socket\n\
    s = socket.create_connection(('10.77.0.2', 8080), timeout=30)\n\
    print('up', flush=True)\n\
    try: print('end', len(s.recv(10)), flush=True)\n\
    except OSError as e: print('end', e.errno, flush=True)\n";

#[test]
fn what_is_not_permitted_any_more_is_cut_at_once() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let trust = Trust::of(&[client, server]);
    let _web = web(server, "10.77.0.2");
    let stay = || {
        let it = client.start(&["/usr/bin/python3", "-c", STAY]);
        it.line("up");
        it
    };
    let is_cut = |r: &Value, text: &str| r["op"] == "cut" && r["lane"] == "tls" && says(r).contains(text);
    // A rule that asks for a newer enrolment.
    let it = stay();
    eventually("the flow is there", || all(server).contains("\"accept\"").then_some(()));
    server.policy(&POLICY.replace("(inside, inside", "(inside & x509{ver>99990101}, inside"));
    let cut = server.record("the cut", |r| is_cut(r, "no longer permitted"));
    assert!(cut["delay_ms"].as_f64() < Some(2000.0), "{cut}");
    assert_eq!(
        cut["peer"],
        "spiffe://example.com/host/client.example.com/process/unnamed".replace("unnamed", "web")
    );
    it.line("end");
    server.policy(POLICY);
    eventually("the old policy again", || (fetch(client, PAGE).code() == 0).then_some(()));
    // A revoked peer.
    let it = stay();
    trust.ca(&["revoke", "client.example.com"]);
    trust.publish(&[server]);
    server.record("the revoked", |r| is_cut(r, "revoked"));
    it.line("end");
    assert_ne!(fetch(client, PAGE).code(), 0);
}

#[test]
fn ps_shows_a_protected_flow_with_its_peer() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let _trust = Trust::of(&[client, server]);
    let _web = web(server, "10.77.0.2");
    let it = client.start(&["/usr/bin/python3", "-c", STAY]);
    it.line("up");
    let shown = eventually("ps shows it", || {
        let rows: Value =
            serde_json::from_str(&client.portcullis(&["ps", "--format", "json"]).stdout).ok()?;
        let text = rows.to_string();
        text.contains("server.example.com").then_some(text)
    });
    for part in ["X25519MLKEM768", "TLS_AES_128_GCM_SHA256", "\"lane\":\"tls\"", "10.77.0.2:8080"] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    drop(it);
    let _absent = fs::remove_file(client.path("wire"));
}
