//! Verdicts of the broker on real sockets: each refusal beside the same call permitted.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::process::Command;

use portcullis_tests::{Finished, Host, Net, Running, built, eventually};
use serde_json::Value;

const PY: &str = "/usr/bin/python3";

/// Runs a Python script wrapped; its output, trimmed.
fn python(host: &Host, script: &str) -> String {
    let done = Finished::of(&mut host.run(&[PY, "-c", script]));
    format!("{}{}", done.stdout.trim(), if done.status == 0 { "" } else { done.stderr.trim() })
}

/// A script that says `ok` or the errno's name.
fn attempt(body: &str) -> String {
    let body = body.replace('\n', "\n    ");
    format!(
        "import socket, errno, os\ntry:\n    {body}\n    print('ok')\nexcept OSError as e:\n    print(errno.errorcode.get(e.errno, e))"
    )
}

fn is(record: &Value, op: &str, verdict: &str) -> bool {
    record["op"] == op && record["verdict"] == verdict
}

/// A TCP server of the other host, not wrapped, that greets.
fn greeter(host: &Host, port: u16) -> Running {
    let script = format!(
        "import socket\ns = socket.create_server(('', {port}), reuse_port=True, family=socket.AF_INET6, dualstack_ipv6=True)\n\
         print('up', flush=True)\n\
         while True:\n    c, a = s.accept()\n    c.sendall(b'hello')\n    c.close()"
    );
    let running = Running::start(host.plain(&[PY, "-c", &script]));
    running.line("up");
    running
}

#[test]
fn connect_is_refused_at_once_and_permitted_where_a_rule_says_so() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let _servers = (greeter(b, 80), greeter(b, 81));
    a.policy("allow tcp/80(*, IPv4{10.77.0.2} | IPv6{fd77::2});");
    for far in ["10.77.0.2", "fd77::2", "::ffff:10.77.0.2"] {
        let connect = |port| {
            attempt(&format!(
                "s = socket.create_connection(('{far}', {port}), 5)\nassert s.recv(9) == b'hello'"
            ))
        };
        assert_eq!(python(a, &connect(80)), "ok", "{far}");
        assert_eq!(python(a, &connect(81)), "EACCES", "{far}");
    }
    let good = a.record("permit", |r| is(r, "connect", "permit"));
    assert_eq!(good["rule"], "allow tcp/80(*, IPv4{10.77.0.2} | IPv6{fd77::2});");
    let bad = a.record("refusal", |r| is(r, "connect", "refuse"));
    assert_eq!(bad["remote"], "10.77.0.2:81");
    assert_eq!(bad["exe"], std::fs::canonicalize(PY).unwrap().to_str().unwrap());
    assert!(bad["reason"].as_str().unwrap().contains("no rule permits it"));
    for r in a.records() {
        for field in
            "seq time host pid start exe sha256 user unit session op proto local remote peer assurance \
                      verdict rule reason lane association generation via"
                .split_whitespace()
        {
            assert!(r.get(field).is_some(), "{field} in {r}");
        }
    }
}

#[test]
fn a_permitted_destination_is_not_asked_for_twice_and_each_call_is_on_record() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let _server = greeter(b, 80);
    a.policy("allow tcp/80(*, *);");
    let script = "import socket\nfor i in range(500):\n    s = socket.create_connection(('10.77.0.2', 80)); s.recv(9); s.close()\nprint('ok')";
    assert_eq!(python(a, script), "ok");
    let records = a.records();
    let calls: Vec<_> = records.iter().filter(|r| is(r, "connect", "permit")).collect();
    assert_eq!(calls.len(), 500);
    let by_table = calls.iter().filter(|r| r["via"] == "table").count();
    // A broker that is late vouches for nothing, and is asked again.
    assert!(by_table >= 400, "{by_table} by table");
    assert!(calls.iter().all(|r| r["rule"] == "allow tcp/80(*, *);" && r["claim"].is_null()));
    let numbers: Vec<_> = records.iter().map(|r| r["seq"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>(), "no gaps");
}

#[test]
fn listen_is_refused_without_a_rule() {
    let host = Host::here();
    host.policy("allow tcp/7001(*, process{exe=\"/usr/bin/python3*\"});");
    let listen = |port| attempt(&format!("s = socket.socket()\ns.bind(('127.0.0.1', {port}))\ns.listen()"));
    assert_eq!(python(&host, &listen(7001)), "ok");
    assert_eq!(python(&host, &listen(7002)), "EACCES");
    assert!(
        host.record("bind", |r| is(r, "bind", "permit"))["local"]
            .as_str()
            .unwrap()
            .starts_with("127.0.0.1:70")
    );
    let refused = host.record("listen", |r| is(r, "listen", "refuse"));
    assert_eq!(refused["local"], "127.0.0.1:7002");
    host.record("permitted listen", |r| is(r, "listen", "permit") && r["local"] == "127.0.0.1:7001");
}

/// A wrapped server that greets whom it accepts.
fn wrapped_greeter(host: &Host, port: u16) -> Running {
    let script = format!(
        "import socket\ns = socket.create_server(('', {port}))\nprint('up', flush=True)\n\
         while True:\n    c, a = s.accept()\n    c.sendall(b'hello')\n    c.close()"
    );
    let running = host.start(&[PY, "-c", &script]);
    running.line("up");
    running
}

fn plain_python(host: &Host, script: &str) -> String {
    let done = Finished::of(&mut host.plain(&[PY, "-c", script]));
    format!("{}{}", done.stdout.trim(), if done.status == 0 { "" } else { done.stderr.trim() })
}

fn hello(within: u8) -> String {
    attempt(&format!(
        "s = socket.create_connection(('10.77.0.1', 7003), {within})\nassert s.recv(9) == b'hello'"
    ))
}

#[test]
fn a_listener_for_some_addresses_is_filtered_for_all_others() {
    let net = Net::new(&["server", "friend", "stranger"]);
    let [server, friend, stranger] = net.hosts();
    server.policy("allow tcp/7003(IPv4{10.77.0.2}, *);");
    let _running = wrapped_greeter(server, 7003);
    assert_eq!(plain_python(friend, &hello(20)), "ok");
    assert!(plain_python(stranger, &hello(2)).contains("timed out"), "no SYN-ACK");
    let seen = server.record("the stranger", |r| r["via"] == "filter");
    assert_eq!((&seen["verdict"], &seen["op"]), (&"refuse".into(), &"accept".into()));
    assert!(seen["remote"].as_str().unwrap().starts_with("10.77.0.3:"));
    assert_eq!(seen["local"], "10.77.0.1:7003");
    server.record("the friend", |r| {
        is(r, "accept", "permit") && r["remote"].as_str().unwrap().starts_with("10.77.0.2:")
    });
}

#[test]
fn a_closed_flow_says_how_much_and_how_long() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let server = "import socket\ns = socket.create_server(('', 80))\nprint('up', flush=True)\n\
        c, a = s.accept()\nc.recv(10, socket.MSG_WAITALL)\nc.sendall(b'hello')\nc.close()";
    let server = Running::start(b.plain(&[PY, "-c", server]));
    server.line("up");
    a.policy("allow tcp/80(*, *);");
    let script = "s = socket.create_connection(('10.77.0.2', 80))\ns.sendall(b'x' * 10)\nassert s.recv(9) == b'hello'\ns.recv(1)";
    assert_eq!(python(a, &attempt(script)), "ok");
    let closed = a.record("close", |r| r["op"] == "close");
    let begun = a.record("connect", |r| r["op"] == "connect");
    assert_eq!(closed["association"], begun["association"]);
    assert_eq!(closed["bytes_out"], 10);
    assert!([5, 6].contains(&closed["bytes_in"].as_u64().unwrap()), "{closed}");
    assert!(closed["duration"].as_f64().unwrap() < 20.0);
}

#[test]
fn only_one_program_and_user_reaches_a_service_on_loopback() {
    let host = Host::here();
    host.policy(
        "client = process{exe=\"/usr/bin/curl\", user=\"nobody\"};\n\
         server = process{exe=\"/usr/bin/python3*\"};\n\
         allow tcp/7004(client, server);",
    );
    let _server = {
        let script = "import socket\ns = socket.create_server(('127.0.0.1', 7004))\nprint('up', flush=True)\n\
            while True:\n    c, a = s.accept()\n    c.recv(100)\n    c.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nhello')\n    c.close()";
        let running = host.start(&[PY, "-c", script]);
        running.line("up");
        running
    };
    let curl = ["curl", "-sS", "http://127.0.0.1:7004/"];
    let as_nobody = |words: &[&str]| {
        let mut line = vec!["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"];
        line.extend(words);
        Finished::of(&mut host.run(&line))
    };
    let good = as_nobody(&curl);
    assert_eq!(good.stdout, "hello", "{good}");
    let permit = host.record("connect", |r| is(r, "connect", "permit"));
    assert_eq!((&permit["assurance"], &permit["user"]), (&"kernel".into(), &"nobody".into()));
    assert!(permit["peer"].as_str().unwrap().contains("python3"), "{permit}");
    let accept = host.record("accept", |r| is(r, "accept", "permit"));
    assert!(accept["peer"].as_str().unwrap().contains("/usr/bin/curl\", user=\"nobody\""), "{accept}");
    assert_eq!(accept["assurance"], "kernel");
    // The same program as another user; another program as that user; not wrapped.
    assert_ne!(Finished::of(&mut host.run(&curl)).status, 0);
    assert_ne!(
        as_nobody(&[PY, "-c", "import socket; socket.create_connection(('127.0.0.1', 7004))"]).status,
        0
    );
    let refusals = host.records().iter().filter(|r| is(r, "connect", "refuse")).count();
    assert_eq!(refusals, 2);
    let unwrapped = Finished::of(&mut host.plain(&curl));
    assert_ne!(unwrapped.status, 0, "{unwrapped}");
    let told = host.record("unwrapped", |r| is(r, "accept", "refuse"));
    assert!(told["peer"].as_str().unwrap().contains("not wrapped"), "{told}");
    assert!(told["reason"].as_str().unwrap().contains("not wrapped"), "{told}");
}

#[test]
fn datagrams_that_nobody_asked_for_are_not_delivered_and_wake_nobody() {
    let net = Net::new(&["a", "b", "c"]);
    let [a, b, c] = net.hosts();
    a.policy("allow udp/53(*, IPv4{10.77.0.2}); allow udp/7005(IPv4{10.77.0.2}, *);");
    let echo = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.bind(('', 53))\nprint('up', flush=True)\n\
        while True:\n    d, a = s.recvfrom(100)\n    s.sendto(d, a)\n    t = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); t.sendto(b'other port', a)";
    let running = [b, c].map(|h| {
        let it = Running::start(h.plain(&[PY, "-c", echo]));
        it.line("up");
        it
    });
    // The answer comes, what another socket there sends does not, not even as readiness.
    let query = "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'q', ('10.77.0.2', 53))\n\
        s.settimeout(20)\nassert s.recv(9) == b'q'\nimport select\nassert select.select([s], [], [], 0.3)[0] == [], 'readable'";
    assert_eq!(python(a, &attempt(query)), "ok");
    assert_eq!(python(a, &attempt(&query.replace("10.77.0.2", "10.77.0.3"))), "EPERM");
    // A server: rules say who may ask, and who asked is answered.
    let server = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.bind(('', 7005))\nprint('up', flush=True)\n\
        while True:\n    d, a = s.recvfrom(100)\n    s.sendto(b're ' + d, a)";
    let served = a.start(&[PY, "-c", server]);
    served.line("up");
    let ask = |within: u8| {
        attempt(&format!(
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.settimeout({within})\ns.sendto(b'x', ('10.77.0.1', 7005))\nassert s.recv(9) == b're x'"
        ))
    };
    assert_eq!(plain_python(b, &ask(20)), "ok");
    assert!(plain_python(c, &ask(1)).contains("timed out"));
    a.record("receive", |r| {
        is(r, "receive", "permit") && r["remote"].as_str().unwrap().starts_with("10.77.0.2:")
    });
    drop(running);
}

#[test]
fn in_mode_audit_all_goes_on_and_is_on_record() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let _server = greeter(b, 80);
    a.policy("allow tcp/81(*, *);");
    let script = attempt("s = socket.create_connection(('10.77.0.2', 80))\nassert s.recv(9) == b'hello'");
    assert_eq!(Finished::of(&mut a.run_with(&["--mode", "audit"], &[PY, "-c", &script])).stdout.trim(), "ok");
    let would = a.record("would-refuse", |r| r["verdict"] == "would-refuse");
    assert_eq!(would["remote"], "10.77.0.2:80");
}

#[test]
fn what_a_process_becomes_is_judged_anew() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let _server = greeter(b, 80);
    a.policy("allow tcp/80(process{user=\"root\", exe=\"/usr/bin/python3*\"}, *);");
    // Twice as root (the second from the table), then by a raw setuid that no hook sees.
    let script = "import ctypes, socket\n\
        def go():\n    try:\n        s = socket.create_connection(('10.77.0.2', 80)); s.recv(9); s.close(); return 'ok'\n    except OSError as e:\n        return e.errno\n\
        print(go(), go(), flush=True)\n\
        ctypes.CDLL(None).syscall(105, 65534)\nprint(go(), flush=True)";
    assert_eq!(python(a, script).replace('\n', " "), "ok ok 13");
    // By exec of another program.
    let script = "import socket, os\nsocket.create_connection(('10.77.0.2', 80)).recv(9)\nos.execv('/usr/bin/curl', ['curl', '-sS', 'http://10.77.0.2/'])";
    let done = Finished::of(&mut a.run(&[PY, "-c", script]));
    assert_eq!(done.status, 7, "{done}");
}

/// One static program under two names (`probes/shared.c`).
fn images(host: &Host) -> [String; 2] {
    let [first, second] = ["first", "second"].map(|name| host.path(name));
    let source = host.write("shared.c", include_str!("../probes/shared.c"));
    let mut compiler = Command::new("cc");
    let _built = Finished::of(compiler.args(["-static", "-w", "-o"]).arg(&first).arg(source)).success();
    built::copy(&first, &second);
    [first, second].map(|path| path.display().to_string())
}

#[test]
fn a_record_of_the_kernels_is_of_the_image_that_made_the_call() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let _servers = [greeter(b, 80), greeter(b, 81)];
    let [first, second] = &images(a);
    a.policy(&format!("allow tcp/80(process{{exe=\"{first}\"}}, *);"));
    // It ends with its last call, or becomes another.
    let all = format!("for n in 1 2 3 4 5 6 7 8; do {first} 10.77.0.2; {first} 10.77.0.2 {second}; done");
    let _said = Finished::of(&mut a.run(&["sh", "-c", &all])).success();
    let records = a.records();
    let permitted = records.iter().filter(|r| r["op"] == "connect" && r["verdict"] == "permit");
    let by: Vec<&Value> = permitted.map(|r| &r["exe"]).collect();
    assert_eq!(by, vec![first.as_str(); 8 * (2 + 3)]);
}

#[test]
fn memory_that_another_process_keeps_does_not_hide_what_a_process_becomes() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let _servers = [greeter(b, 80), greeter(b, 81)];
    let [first, second] = &images(a);
    a.policy(&format!(
        "allow tcp/80(process{{exe=\"{first}\"}}, *);\nallow tcp/81(process{{exe=\"{second}\"}}, *);"
    ));
    for without in ["backstop", "bpf"] {
        let mut run = a.run(&[first, "10.77.0.2", second, "shares"]);
        let said = Finished::of(run.env("PORTCULLIS_WITHOUT", without)).success();
        let [one, other] = ["80:at 80 81:EACCES ", "80:EACCES 81:at 81 "].map(|it| it.repeat(2));
        assert_eq!(said, format!("{one}\n{other}\n"), "{without}");
        eventually("all of it has ended", || a.daemons().is_empty().then_some(()));
    }
}

#[test]
fn only_the_workers_of_nginx_reach_redis() {
    let net = Net::new(&["host", "visitor"]);
    let [host, visitor] = net.hosts();
    host.policy(
        "allow tcp/6379(process{exe=\"/usr/sbin/nginx\", user=\"www-data\"}, process{exe=\"/usr/bin/redis*\"});\n\
         allow tcp/80(IPv4{10.77.0.2}, process{exe=\"/usr/sbin/nginx\"});",
    );
    let folder = host.path("").display().to_string();
    let redis = ["redis-server", "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--dir", &folder];
    let redis = [&redis[..], &["--daemonize", "no"]].concat();
    let redis = Running::start(host.run_with(&["--name", "store"], &redis));
    host.wait_for_port(6379);
    let config = format!(
        "user www-data; worker_processes 2; pid {folder}/nginx.pid; error_log {folder}/error.log;\nevents {{}}\n\
         http {{ access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f; \
         uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n\
         server {{ listen 80; location / {{ proxy_pass http://127.0.0.1:6379; proxy_read_timeout 2s; }} }} }}\n"
    );
    let config = host.write("nginx.conf", config);
    // As a service manager starts it: it goes into the background by itself.
    let nginx = ["nginx", "-c", &config.display().to_string()];
    Finished::of(&mut host.run_with(&["--name", "front"], &nginx)).success();
    host.wait_for_port(80);
    let get = Finished::of(&mut visitor.plain(&["curl", "-sS", "--max-time", "20", "http://10.77.0.1/"]));
    assert_eq!(get.status, 0, "{get}");
    let connect = host.record("nginx to redis", |r| r["op"] == "connect");
    assert_eq!((&connect["verdict"], &connect["user"]), (&"permit".into(), &"www-data".into()), "{connect}");
    assert!(connect["peer"].as_str().unwrap().contains("redis"), "{connect}");
    let accept = host.record("redis accepts", |r| r["op"] == "accept" && r["local"] == "127.0.0.1:6379");
    assert_eq!((&accept["verdict"], &accept["assurance"]), (&"permit".into(), &"kernel".into()), "{accept}");
    assert!(accept["peer"].as_str().unwrap().contains("nginx\", user=\"www-data\""), "{accept}");
    // Both write over their environment, and yet `ps` knows what their runs are called.
    let listed = host.portcullis(&["ps", "--format", "json"]).success();
    let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
    for (exe, name, least) in [("nginx", "front", 2), ("redis", "store", 1)] {
        let is_it = |row: &&Value| row["exe"].as_str().is_some_and(|path| path.contains(exe));
        let rows: Vec<_> = listed.iter().filter(is_it).collect();
        assert!(rows.len() >= least && rows.iter().all(|row| row["name"] == name), "{rows:?}");
    }
    // The same host, another program, wrapped and not: refused.
    let ping = ["redis-cli", "-h", "127.0.0.1", "ping"];
    assert_ne!(Finished::of(&mut host.run(&ping)).stdout.trim(), "PONG");
    host.record("redis-cli", |r| {
        is(r, "connect", "refuse") && r["exe"].as_str().unwrap().contains("redis-cli")
    });
    assert_ne!(Finished::of(&mut host.plain(&ping)).stdout.trim(), "PONG");
    host.record("redis-cli, not wrapped", |r| is(r, "accept", "refuse"));
    // A stranger at nginx is not answered.
    let other = Finished::of(&mut host.plain(&["curl", "-sS", "--max-time", "1", "http://10.77.0.1/"]));
    assert_ne!(other.status, 0);
    drop(redis);
}

#[test]
fn raw_sockets_are_refused_without_a_rule_for_everything() {
    let host = Host::here();
    let raw = attempt("s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)");
    host.policy("allow tcp/80(*, *); allow icmp(*, *);");
    assert_eq!(python(&host, &raw), "EPERM");
    host.record("raw", |r| is(r, "socket", "refuse") && r["proto"] == "raw");
    let host = Host::here();
    host.policy(portcullis_tests::ALLOW_ALL);
    assert_eq!(python(&host, &raw), "ok");
    host.record("raw", |r| is(r, "socket", "permit"));
}

#[test]
fn a_listener_that_was_inherited_is_known_by_who_holds_it_now() {
    // As nginx and others do it: made before fork and setuid, served by children that asked nothing.
    let net = Net::new(&["host"]);
    let [host] = net.hosts();
    host.policy(
        "server = process{user=\"nobody\"};\nallow tcp/7010(*, server);\nallow tcp/7010(IPv4{127.0.0.0/8}, process{user=\"root\"});",
    );
    let script = "import socket, os, time\ns = socket.create_server(('127.0.0.1', 7010))\n\
        if os.fork():\n    os._exit(0)\nos.setsid()\nos.setuid(65534)\nprint('up', flush=True)\ntime.sleep(1000)";
    let running = host.start(&[PY, "-c", script]);
    running.line("up");
    let go = attempt("s = socket.create_connection(('127.0.0.1', 7010), 5)");
    assert_eq!(python(host, &go), "ok");
    let permit = host.record("connect", |r| is(r, "connect", "permit"));
    assert!(permit["peer"].as_str().unwrap().contains("user=\"nobody\""), "{permit}");
}

#[test]
fn the_broker_keeps_two_capabilities_and_a_user_of_its_own() {
    let host = Host::here();
    host.policy(portcullis_tests::ALLOW_ALL);
    let _it = {
        let it = host.start(&["sh", "-c", "echo up; exec sleep 1000"]);
        it.line("up");
        it
    };
    let status = std::fs::read_to_string(format!("/proc/{}/status", host.broker())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_else(|| panic!("{name}"));
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ")
    };
    assert!(field("Uid:").split(' ').all(|uid| uid != "0"), "{}", field("Uid:"));
    assert_eq!(field("Groups:"), "");
    // CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE (linux/capability.h: 2 and 19)
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 1 << 2 | 1 << 19, "{set}");
    }
    assert_eq!(u64::from_str_radix(&field("CapInh:"), 16).unwrap(), 0);
}

#[test]
fn a_local_client_that_has_closed_already_is_known_if_it_asked_and_nobody_if_not() {
    let net = Net::new(&["host"]);
    let [host] = net.hosts();
    // The kernel shows a closed socket as root's.
    host.policy("allow tcp/7011(process{user=\"root\"}, process{exe=\"/usr/bin/python3*\"});");
    let script = "import socket, time\ns = socket.create_server(('127.0.0.1', 7011))\nprint('up', flush=True)\n\
        while True:\n    time.sleep(0.7)\n    c, a = s.accept()\n    print('from', a[1], c.recv(9), flush=True)";
    let server = host.start(&[PY, "-c", script]);
    server.line("up");
    let quick = "import socket, os\nif os.environ.get('AS'): os.setuid(65534)\ns = socket.create_connection(('127.0.0.1', 7011)); s.sendall(b'x'); print(s.getsockname()[1]); s.close()";
    let permitted = Finished::of(&mut host.run(&[PY, "-c", quick])).success();
    server.line(&format!("from {} b'x'", permitted.trim()));
    let accept = host.record("accept", |r| is(r, "accept", "permit"));
    assert!(accept["peer"].as_str().unwrap().contains("user=\"root\""), "{accept}");
    let refused = Finished::of(host.plain(&[PY, "-c", quick]).env("AS", "nobody")).success();
    let told = host.record("refusal", |r| is(r, "accept", "refuse"));
    assert_eq!(told["remote"], format!("127.0.0.1:{}", refused.trim()));
    assert!(told["peer"].is_null(), "{told}");
}

#[test]
fn on_one_host_a_session_is_told_from_others_at_the_same_address() {
    let net = Net::new(&["host"]);
    let [host] = net.hosts();
    host.policy("service ctl = tcp/7021, related;\nallow ctl(process{exe=\"/usr/bin/python3*\"}, process{exe=\"/usr/bin/python3*\"});");
    let server = "import socket, sys\nl = socket.create_server(('127.0.0.1', 7021))\nprint('up', flush=True)\nc, a = l.accept()\n\
        d = socket.create_server(('127.0.0.1', 0))\nprint('port', d.getsockname()[1], flush=True)\n\
        while True:\n    s, a = d.accept()\n    s.sendall(b'data')\n    s.close()";
    let server = host.start(&[PY, "-c", server]);
    server.line("up");
    let client = "import socket, sys, os\nc = socket.create_connection(('127.0.0.1', 7021))\nprint('in', flush=True)\n\
        for line in sys.stdin:\n    pid = os.fork()\n    if pid == 0:\n        try:\n            print(socket.create_connection(('127.0.0.1', int(line)), 3).recv(9), flush=True)\n        except OSError as e:\n            print('not', e, flush=True)\n        os._exit(0)\n    os.wait()";
    let mut client = host.start(&[PY, "-c", client]);
    client.line("in");
    let port = server.line("port ").trim_start_matches("port ").to_owned();
    client.say(&format!("{port}\n"));
    client.line("b'data'"); // by a child, which does so for its session
    let thief = format!(
        "import socket, os\nif os.environ.get('AS'): os.setuid(65534)\ntry:\n    print(socket.create_connection(('127.0.0.1', {port}), 3).recv(9))\nexcept OSError as e:\n    print('not', e)"
    );
    let wrapped = Finished::of(&mut host.run(&[PY, "-c", &thief])).success();
    assert!(wrapped.contains("not"), "{wrapped}");
    let other = Finished::of(host.plain(&[PY, "-c", &thief]).env("AS", "nobody")).success();
    assert!(!other.contains("data"), "{other}");
    host.record("the thief that is wrapped", |r| is(r, "connect", "refuse"));
    host.record("the thief that is not", |r| {
        is(r, "accept", "refuse") && r["peer"].to_string().contains("not wrapped")
    });
    let data = host.record("data", |r| is(r, "accept", "permit") && r["session"].is_string());
    assert_eq!(data["assurance"], "kernel");
    client.say(&format!("{port}\n"));
    client.line("b'data'");
}
