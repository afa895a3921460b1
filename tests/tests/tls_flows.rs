//! Flows between members of a trust domain, under programs that know nothing of it.

use std::time::SystemTime;

use nix::sys::signal::Signal;
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
    for without in ["", "backstop"] {
        // A supervisor that is there already would not hear of it.
        eventually("the broker ends", || client.daemons().is_empty().then_some(()));
        let said =
            Finished::of(client.run(&["/usr/bin/python3", "-c", code]).env("PORTCULLIS_WITHOUT", without));
        assert_eq!(said.stdout, format!("{}\n", libc_econnrefused()), "{without}: {said} {}", all(client));
    }
    assert!(!client.records().iter().any(|r| refused(r, "connect")), "{}", all(client));
}

const fn libc_econnrefused() -> i32 {
    nix::errno::Errno::ECONNREFUSED as i32
}

#[test]
fn a_filter_that_the_program_has_put_under_its_socket_is_not_thrown_away() {
    let net = Net::client_server_stranger(&POLICY.replace("tcp/8080", "tcp/8080-8081"));
    let [client, server, _] = net.hosts();
    let _trust = Trust::of(&[client, server]);
    let _web = web(server, "10.77.0.2");
    // SO_ATTACH_FILTER and SO_ATTACH_BPF, with a program that lets all pass (linux/filter.h, linux/bpf.h).
    let classic = "code = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0xffffffff))\n\
         s.setsockopt(socket.SOL_SOCKET, 26, struct.pack('HL', 1, ctypes.addressof(code)))";
    let extended = "code = ctypes.create_string_buffer(struct.pack('BBhiBBhi', 0xb7, 0, 0, -1, 0x95, 0, 0, 0))\n\
         terms = ctypes.create_string_buffer(b'MIT')\n\
         asked = struct.pack('IIQQ', 1, 2, ctypes.addressof(code), ctypes.addressof(terms)) + bytes(104)\n\
         program = ctypes.CDLL(None).syscall(321, 5, asked, len(asked))\n\
         s.setsockopt(socket.SOL_SOCKET, 50, program)";
    // A second connect(2) on the same socket finds what we have put there at the first.
    let connect = |before: &str| {
        let script = format!(
            "import ctypes, errno, socket, struct\n\
             s = socket.socket()\n\
             {before}\n\
             print(*(errno.errorcode.get(s.connect_ex(('10.77.0.2', port)), 'connected') for port in (8081, 8080)))\n"
        );
        Finished::of(&mut client.run(&["/usr/bin/python3", "-c", &script])).success()
    };
    assert_eq!(connect(""), "ECONNREFUSED connected\n");
    for own in [classic, extended] {
        let gone = format!("{own}\ns.setsockopt(socket.SOL_SOCKET, 27, 0)");
        assert_eq!(connect(&gone), "ECONNREFUSED connected\n", "the control");
        assert_eq!(connect(own), "EACCES EACCES\n", "{own}");
    }
    client
        .record("why", |r| refused(r, "connect") && r["reason"].to_string().contains("a filter of its own"));
}

/// Reads to the end of each connection, says what came and how it ended, and answers.
const HEAR: &str = "import socket, sys\n\
    l = socket.create_server(('10.77.0.2', 8080)); print('listening', flush=True)\n\
    while True:\n    \
        s, heard = l.accept()[0], b''\n    \
        try:\n        \
            while part := s.recv(4096): heard += part; print('part', part.decode(), flush=True)\n        \
            print('heard', heard.decode(), 'end', flush=True); s.sendall(b'thanks')\n    \
        except OSError as e: print('heard', heard.decode(), 'errno', e.errno, flush=True)\n    \
        s.close()\n";

#[test]
fn options_half_closes_resets_and_urgent_data_come_through_as_far_as_they_can() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let _trust = Trust::of(&[client, server]);
    let hear = server.start(&["/usr/bin/python3", "-c", HEAR]);
    hear.line("listening");
    let talk = |script: &str| {
        let script = format!(
            "import socket, struct\ns = socket.create_connection(('10.77.0.2', 8080), timeout=10)\n{script}"
        );
        Finished::of(&mut client.run(&["/usr/bin/python3", "-c", &script])).success()
    };
    // One direction is closed, the other still carries.
    assert_eq!(
        talk("s.sendall(b'half'); s.shutdown(socket.SHUT_WR); print(s.recv(100), s.recv(100))"),
        "b'thanks' b''\n"
    );
    assert_eq!(hear.line("heard"), "heard half end");
    // A reset is one at the far side, too.
    let reset = "import socket, struct\n\
        s = socket.create_connection(('10.77.0.2', 8080), timeout=10); s.sendall(b'reset')\n\
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); input(); s.close()";
    let mut resets = client.start(&["/usr/bin/python3", "-c", reset]);
    hear.line("part reset");
    resets.say("\n");
    assert_eq!(hear.line("heard"), format!("heard reset errno {}", nix::errno::Errno::ECONNRESET as i32));
    // Urgent data stays in its place; nothing tells the far side that it was urgent.
    assert_eq!(talk("s.send(b'a'); s.send(b'!', socket.MSG_OOB); s.send(b'b')"), "");
    assert_eq!(hear.line("heard"), "heard a!b end");
    // What may be asked and set while it is up.
    let options = "s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)\n\
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)\n\
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n\
        info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 200)\n\
        print(s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), s.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), info[0])";
    assert_eq!(talk(options), "1 77 1\n");
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
    assert!(cut["delay_ms"].is_number(), "{cut}");
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
fn a_server_that_begins_anew_has_its_port_at_once() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let _trust = Trust::of(&[client, server]);
    let mut first = web(server, "10.77.0.2");
    // One that has ended, by the server's close, and one that goes on.
    assert_eq!(fetch(client, PAGE).stdout, "plain words");
    let stays = client.start(&["/usr/bin/python3", "-c", STAY]);
    stays.line("up");
    first.signal(Signal::SIGKILL);
    first.wait();
    let _again = web(server, "10.77.0.2");
    let got = fetch(client, PAGE);
    assert_eq!(got.stdout, "plain words", "{got}");
    stays.line("end");
}

/// Says something, waits for an end, and says when that was.
const LAST: &str = "import socket, time\n\
    s = socket.create_connection(('10.77.0.2', 8080), timeout=30)\n\
    s.sendall(b'GET ')\n\
    print('up', flush=True)\n\
    try: s.recv(10)\n\
    except OSError: pass\n\
    print('end', time.time(), flush=True)\n";

fn since_epoch(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64()
}

fn clock() -> f64 {
    since_epoch(SystemTime::now())
}

/// A flow that is there at both ends.
fn lasting(client: &Host, server: &Host) -> Running {
    let accepts = || server.records().iter().filter(|r| r["op"] == "accept").count();
    let before = accepts();
    let it = client.start(&["/usr/bin/python3", "-c", LAST]);
    it.line("up");
    eventually("the flow is there", || (accepts() > before).then_some(()));
    it
}

/// When it ended, in seconds since the Unix epoch.
fn end_of(flow: &Running) -> f64 {
    flow.line("end").rsplit(' ').next().unwrap().parse().unwrap()
}

/// How long something takes that must be quick: a machine with other things to do may be late at times, not always.
fn is_quick(what: &str, mut seconds: impl FnMut() -> Vec<f64>) {
    let mut took = Vec::new();
    for _ in 0..10 {
        took.push(seconds());
        if took.last().unwrap().iter().all(|seconds| *seconds < 0.1) {
            return;
        }
    }
    panic!("{what}, in seconds: {took:?}");
}

#[test]
fn a_cut_is_quick() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let trust = Trust::of(&[client, server]);
    let mut web_now = web(server, "10.77.0.2");
    let again = || {
        eventually("it is permitted again", || (fetch(client, PAGE).code() == 0).then_some(()));
    };
    let cuts = || server.records().into_iter().filter(|r| r["op"] == "cut").collect::<Vec<_>>();
    let told = |before: usize| {
        let cut = eventually("the cut", || cuts().into_iter().nth(before));
        cut["delay_ms"].as_f64().unwrap() / 1000.0
    };
    is_quick("from the file of a policy to the end of a flow, and as the log tells", || {
        let (it, before) = (lasting(client, server), cuts().len());
        let began = clock();
        server.policy("allow tcp/9(*, *);\n");
        let took = vec![end_of(&it) - began, told(before)];
        server.policy(POLICY);
        again();
        took
    });
    is_quick("from the server's end to the client's", || {
        let it = lasting(client, server);
        let began = clock();
        web_now.signal(Signal::SIGKILL);
        let end = end_of(&it);
        web_now.wait();
        web_now = web(server, "10.77.0.2");
        vec![end - began]
    });
    is_quick("from a list that revokes to the end of a flow, and as the log tells", || {
        let (it, before) = (lasting(client, server), cuts().len());
        trust.ca(&["revoke", "client.example.com"]);
        trust.publish(&[server]);
        let began = std::fs::metadata(server.state().join("members.toml")).unwrap().modified().unwrap();
        let took = vec![end_of(&it) - since_epoch(began), told(before)];
        trust.enrol(client, &[]);
        trust.publish(&[server]);
        again();
        took
    });
}

#[test]
fn what_runs_is_cut_when_the_certificate_of_its_peer_ends() {
    // Nobody is believed longer than that after a certificate's end, whose clock may be behind.
    const GRACE: u64 = 60;
    // Long enough for a flow to begin, and shorter than a test waits for a line.
    const TIME: u64 = 16;
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let trust = Trust::of(&[client, server]);
    let _web = web(server, "10.77.0.2");
    is_quick("from the end of a certificate to the end of a flow, and as the log tells", || {
        let end = clock() as u64 + TIME;
        trust.ends(client, end - GRACE);
        let it = lasting(client, server);
        // The last second of a certificate is one in which it is good.
        let took = end_of(&it) - (end + 1) as f64;
        assert!(took > 0.0, "{took}");
        let shown = format!(" until {} ", end - GRACE);
        let is_its = |r: &Value| r["op"] == "cut" && r["peer_cert"].to_string().contains(&shown);
        let cut = server.record("the cut", is_its);
        assert_eq!(cut["reason"], "the peer's certificate has expired");
        let why = server.portcullis(&["why", "--last"]);
        assert!(why.stdout.contains("the peer's certificate has expired"), "{why}");
        // The next run reads its keys anew.
        drop(it);
        eventually("the client's daemons have ended", || client.daemons().is_empty().then_some(()));
        vec![took, cut["delay_ms"].as_f64().unwrap() / 1000.0]
    });
    let closed = server.record("the end", |r| r["op"] == "close" && r["lane"] == "tls");
    assert_eq!((&closed["bytes_in"], &closed["bytes_out"]), (&4.into(), &0.into()), "{closed}");
    // The control: whose certificate has not ended goes on, and is not cut.
    trust.renew(client, &[]);
    let it = lasting(client, server);
    let cuts = |host: &Host| host.records().iter().filter(|r| r["op"] == "cut").count();
    let before = cuts(server);
    assert_ne!(before, 0);
    assert_eq!(fetch(client, PAGE).stdout, "plain words");
    assert!(it.said().is_empty() && cuts(server) == before);
}

#[test]
fn ps_shows_a_protected_flow_with_its_peer() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let _trust = Trust::of(&[client, server]);
    let _web = web(server, "10.77.0.2");
    let it = client.start(&["/usr/bin/python3", "-c", LAST]);
    it.line("up");
    let row = |host: &Host| {
        let rows: Value = serde_json::from_str(&host.portcullis(&["ps", "--format", "json"]).stdout).ok()?;
        let all = rows.as_array()?.iter().filter_map(|row| row["associations"].as_array()).flatten();
        let mut tls = all.filter(|one| one["lane"] == "tls");
        tls.next().filter(|one| one["bytes_in"].as_u64().max(one["bytes_out"].as_u64()) > Some(0)).cloned()
    };
    let near = eventually("the client's ps shows it", || row(client));
    assert_eq!((&near["cipher"], &near["kex"]), (&"TLS_AES_128_GCM_SHA256".into(), &"X25519MLKEM768".into()));
    assert_eq!((&near["remote"], &near["bytes_out"]), (&"10.77.0.2:8080".into(), &4.into()), "{near}");
    assert_eq!(near["peer"], "spiffe://example.com/host/server.example.com/process/web");
    let far = eventually("the server's ps shows it", || row(server));
    assert_eq!((&far["bytes_in"], &far["bytes_out"]), (&4.into(), &0.into()), "{far}");
    let earlier = near["duration"].as_f64().unwrap();
    let later = eventually("ps, again", || row(client))["duration"].as_f64().unwrap();
    assert!(earlier > 0.0 && later > earlier, "{earlier} {later}");
    let shown = client.portcullis(&["ps"]).success();
    for part in ["0 bytes in, 4 out", "X25519MLKEM768", "host/server.example.com"] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
}

#[test]
fn renewed_keys_and_a_new_ver_are_taken_up_while_everything_runs() {
    let policy = "new = x509{name=\"*.example.com\", ver>20990101};\nallow tcp/8080(new, *);\n";
    let net = Net::client_server_stranger(policy);
    let [client, server, _] = net.hosts();
    let trust = Trust::of(&[client, server]);
    let _web = web(server, "10.77.0.2");
    // It keeps its supervisor, broker and key daemon.
    let _stays = client.start(&["sleep", "60"]);
    assert_ne!(fetch(client, PAGE).code(), 0);
    let before = client.daemons();
    trust.renew(client, &["--ver", "20990102"]);
    let in_use =
        |r: &Value| r["reason"].as_str().is_some_and(|why| why.contains("renewed keys and certificates"));
    client.record("that they are in use", in_use);
    let got = fetch(client, PAGE);
    assert_eq!(got.stdout, "plain words", "{got}\n{}\n--\n{}", all(client), all(server));
    assert_eq!(client.daemons(), before);
    // Somebody else's are not taken.
    let own = ["issuer.crt", "issuer.key", "host.crt"];
    for file in own {
        std::fs::copy(server.state().join(file), client.state().join(file)).unwrap();
    }
    trust.publish(&[client]);
    client.record("that they are not", |r| r["reason"].to_string().contains("are not taken"));
    assert_eq!(fetch(client, PAGE).stdout, "plain words");
}

/// Says what arrives over each connection.
const ARRIVALS: &str = "
import socket
listener = socket.create_server(('10.77.0.2', 8080))
print('listens', flush=True)
while True:
    try: print('heard', listener.accept()[0].makefile('rb').read(), flush=True)
    except OSError as error: print('heard', error.errno, flush=True)
";

/// Connects, and becomes a program that has the connection for its standard output.
const BEGIN: &str = "
import os, socket, sys
far = socket.create_connection(('10.77.0.2', 8080))
os.dup2(far.fileno(), 1)
os.execv(sys.argv[1], sys.argv[1:])
";

#[test]
fn a_connection_that_a_program_begins_with_does_not_go_on_in_plain_where_it_must_be_protected() {
    for (policy, arrives) in [(POLICY, false), ("allow tcp/8080(*, *) using plain;\n", true)] {
        let net = Net::client_server_stranger(policy);
        let [client, server, _] = net.hosts();
        let _trust = Trust::of(&[client, server]);
        let hears = Running::start(server.plain(&["/usr/bin/python3", "-c", ARRIVALS]));
        hears.line("listens");
        // Without the shim, and with it.
        for program in [&["/bin/busybox", "echo", "plain words"][..], &["/bin/echo", "plain words"]] {
            let run = client.run(program);
            let mut begin = client.plain(&["/usr/bin/python3", "-c", BEGIN]);
            // It is in the namespace already.
            begin.args(run.get_args().skip_while(|word| *word != "--").skip(1));
            let ran = Finished::of(&mut begin);
            let heard = hears.line("heard");
            assert_eq!(
                heard.contains("plain words"),
                arrives,
                "{program:?} {policy}: {ran}\n{}",
                all(client)
            );
        }
        let verdict = if arrives { "permit" } else { "refuse" };
        client.record(verdict, |r| r["op"] == "connect" && r["verdict"] == verdict && r["via"] == "guard");
    }
}
