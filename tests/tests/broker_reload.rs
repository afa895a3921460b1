//! Generations: what a new policy does to what goes on already.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use portcullis_tests::{Host, Net, Running, eventually};
use serde_json::Value;

const PY: &str = "/usr/bin/python3";

/// A TCP server, not wrapped, that echoes lines.
fn echo(host: &Host, port: u16) -> Running {
    let script = format!(
        "import socket, threading\ns = socket.create_server(('', {port}))\nprint('up', flush=True)\n\
         def serve(c):\n    while True:\n        d = c.recv(100)\n        if not d: return\n        c.sendall(d)\n\
         while True:\n    c, a = s.accept()\n    threading.Thread(target=serve, args=(c,), daemon=True).start()"
    );
    let running = Running::start(host.plain(&[PY, "-c", &script]));
    running.line("up");
    running
}

/// A wrapped client with one connection to each port, that says when one breaks.
fn talker(host: &Host, far: &str, ports: &[u16]) -> Running {
    let script = format!(
        "import socket, time, select, os\nall = {{socket.create_connection(('{far}', p)): p for p in {ports:?}}}\n\
         for s in all:\n    s.sendall(b'x'); s.recv(9)\n\
         print('connected', flush=True)\n\
         while all:\n    for s in select.select(list(all), [], [], 0.05)[0]:\n        try:\n            d = s.recv(9)\n        except OSError as e:\n            d = b''\n\
         \n        if not d:\n            print('cut', all.pop(s), flush=True)"
    );
    let script = script.replace("\n\n        if", "\n        if");
    let running = host.start(&[PY, "-c", &script]);
    running.line("connected");
    running
}

fn generation(host: &Host) -> u64 {
    let status: Value =
        serde_json::from_str(&host.portcullis(&["status", "--format", "json"]).stdout).unwrap();
    status["generation"].as_u64().unwrap()
}

#[test]
fn live_flows_that_a_new_generation_refuses_are_cut_at_once_and_others_go_on() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let _servers = (echo(b, 8001), echo(b, 8002));
    a.policy("allow tcp/8001-8002(*, *);");
    let mut running = talker(a, "10.77.0.2", &[8001, 8002]);
    a.policy("allow tcp/8002(*, *);");
    running.line("cut 8001");
    assert!(!running.has_ended());
    let cut = a.record("cut", |r| r["op"] == "cut");
    assert_eq!(cut["remote"], "10.77.0.2:8001");
    assert_eq!(cut["generation"], 2);
    assert_eq!(a.records().iter().filter(|r| r["op"] == "cut").count(), 1);
    // And the reverse: nothing is cut by a generation that permits all.
    a.policy("allow *(*, *);");
    eventually("generation 3", || (generation(a) == 3).then_some(()));
    assert!(!running.has_ended());
    // A machine with other things to do may be late at times, not always.
    let mut delays = vec![cut["delay_ms"].as_f64().unwrap()];
    while delays.iter().all(|delay| *delay >= 100.0) {
        assert!(delays.len() < 10, "{delays:?}");
        let more = talker(a, "10.77.0.2", &[8001]);
        a.policy("allow tcp/8002(*, *);");
        more.line("cut 8001");
        let cut = a.records().into_iter().rfind(|r| r["op"] == "cut").unwrap();
        delays.push(cut["delay_ms"].as_f64().unwrap());
        let before = generation(a);
        a.policy("allow *(*, *);");
        eventually("the next generation", || (generation(a) > before).then_some(()));
    }
}

#[test]
fn flows_that_came_from_the_table_are_cut_as_well() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let _server = echo(b, 8001);
    a.policy("allow tcp/8001(*, *);");
    let script = "import socket, select\nall = []\nfor i in range(5):\n    s = socket.create_connection(('10.77.0.2', 8001)); s.sendall(b'x'); s.recv(9); all.append(s)\n\
        print('connected', flush=True)\nn = 0\nwhile all:\n    for s in select.select(all, [], [])[0]:\n        try: s.recv(9)\n        except OSError: pass\n        all.remove(s); n += 1\nprint('cut', n, flush=True)";
    let running = a.start(&[PY, "-c", script]);
    running.line("connected");
    a.policy("allow tcp/8002(*, *);");
    running.line("cut 5");
}

#[test]
fn a_broken_policy_leaves_the_old_in_force_and_shows_why() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let _server = echo(b, 8001);
    a.policy("allow tcp/8001(*, *);");
    let mut running = talker(a, "10.77.0.2", &[8001]);
    a.policy("allow tcp/8001(*, *;");
    let status = eventually("the diagnostic is shown", || {
        let status: Value =
            serde_json::from_str(&a.portcullis(&["status", "--format", "json"]).stdout).unwrap();
        status["diagnostic"].is_string().then_some(status)
    });
    assert!(status["diagnostic"].as_str().unwrap().contains("policy.pol:1:"), "{status}");
    assert_eq!(status["generation"], 1);
    a.record("diagnostic", |r| {
        r["op"] == "policy" && r["reason"].as_str().unwrap().contains("stays in force")
    });
    assert!(!running.has_ended());
    // A file whose own tests fail is no better, wherever it is included.
    a.write("rules/web.rules", "allow tcp/8002(*, *); test \"web\" { allow tcp/8001(*, *); }");
    a.policy("include \"rules/web.rules\";");
    let status = eventually("the failing test is shown", || {
        let status: Value =
            serde_json::from_str(&a.portcullis(&["status", "--format", "json"]).stdout).unwrap();
        let said = status["diagnostic"].as_str().is_some_and(|text| text.contains("this test wants"));
        said.then_some(status)
    });
    assert!(status["diagnostic"].as_str().unwrap().contains("web.rules:1:"), "{status}");
    assert_eq!(status["generation"], 1);
    assert!(!running.has_ended());
}

#[test]
fn a_listener_gets_a_new_filter_and_accepted_strangers_are_cut() {
    let net = Net::new(&["server", "one", "two"]);
    let [server, one, two] = net.hosts();
    server.policy("allow tcp/8003(IPv4{10.77.0.2}, *);");
    let script = "import socket, threading\ns = socket.create_server(('', 8003))\nprint('up', flush=True)\nkept = []\n\
        while True:\n    c, a = s.accept()\n    c.sendall(b'hello')\n    kept.append(c)";
    let running = server.start(&[PY, "-c", script]);
    running.line("up");
    let client = |host: &Host| {
        let script = "import socket\ntry:\n    s = socket.create_connection(('10.77.0.1', 8003), 2)\n    print(s.recv(9), flush=True)\n\
            \n    s.settimeout(20)\n    s.recv(9)\n    print('ended', flush=True)\nexcept OSError as e:\n    print('failed', e, flush=True)"
            .replace("\n\n", "\n");
        Running::start(host.plain(&[PY, "-c", &script]))
    };
    let first = client(one);
    first.line("hello");
    client(two).line("failed");
    server.policy("allow tcp/8003(IPv4{10.77.0.3}, *);");
    let ended = first.line("e"); // reset or end
    assert!(ended.contains("ended") || ended.contains("failed"), "{ended}");
    client(one).line("failed");
    client(two).line("hello");
}

#[test]
fn a_changed_include_is_a_new_generation() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let _server = echo(b, 8001);
    a.write("rules/web.rules", "allow tcp/8001(*, *);");
    a.policy("include \"rules/web.rules\";");
    let running = talker(a, "10.77.0.2", &[8001]);
    a.write("rules/web.rules", "allow tcp/8002(*, *);");
    running.line("cut 8001");
}
