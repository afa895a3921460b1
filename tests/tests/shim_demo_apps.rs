//! One small program per socket style: wrapped it prints what it prints unwrapped, and a refusal reaches it
//! as a natural error, at once.

use std::time::Instant;

use portcullis_tests::{
    ALLOW_ALL, Finished, Host, Net, Running,
    built::{self, free_port},
};

fn app(name: &str) -> String {
    built::program(name).to_str().unwrap().to_owned()
}

/// A server that listens already.
fn serving(host: &Host, wrapped: bool, words: &[&str]) -> Running {
    let server = Running::start(if wrapped { host.run(words) } else { host.plain(words) });
    server.line("listening on");
    server
}

/// Clients by name, words after the address, and how many connections each makes.
const CLIENTS: &[(&str, &[&str], usize)] = &[
    ("dial", &["3"], 3),
    ("dial-epoll", &["5", "late"], 5),
    ("dial-epoll", &["5", "early"], 5),
    ("dial-select", &[], 1),
    ("dial-threads", &["5"], 20),
    ("dial-child", &["fork"], 3),
    ("dial-child", &["clone"], 3),
    ("dial-child", &["vfork"], 3),
    ("dial-child", &["spawn"], 3),
    ("dial-child", &["system"], 3),
];

const SERVERS: &[&str] = &["one", "threads", "fork", "select", "epoll", "pass"];

fn client(name: &str, address: &str, rest: &[&str]) -> Vec<String> {
    let mut words = vec![app(name), address.to_owned()];
    words.extend(rest.iter().map(|&w| w.to_owned()));
    words
}

#[test]
fn every_client_prints_the_same_wrapped_and_not() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    for address in ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"] {
        for &(name, rest, count) in CLIENTS {
            let at = format!("{address}:{}", free_port());
            let words = client(name, &at, rest);
            let count = (2 * count).to_string();
            let _server = serving(&host, false, &[&app("serve"), &at, &count, "threads"]);
            let plain = Finished::of(&mut host.plain(&words));
            let wrapped = Finished::of(&mut host.run(&words));
            assert_eq!((plain.code(), plain.stderr.as_str()), (0, ""), "{words:?} {plain:?}");
            assert_eq!(wrapped.stdout, plain.stdout, "{words:?} {wrapped:?}");
            assert_eq!((wrapped.code(), wrapped.stderr.as_str()), (0, ""), "{words:?}");
        }
    }
}

#[test]
fn every_server_serves_the_same_wrapped_and_not() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    for &how in SERVERS {
        let mut said = Vec::new();
        for wrapped in [false, true] {
            let at = format!("127.0.0.1:{}", free_port());
            let mut server = serving(&host, wrapped, &[&app("serve"), &at, "3", how]);
            let client = Finished::of(&mut host.plain(&client("dial", &at, &["3"])));
            assert_eq!(server.wait(), 0, "{how}");
            said.push((client.stdout, client.status));
        }
        assert_eq!(said[0], said[1], "{how}");
    }
}

#[test]
fn a_server_under_a_super_server_has_its_connection() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    for wrapped in [false, true] {
        let at = format!("127.0.0.1:{}", free_port());
        let _superd = serving(&host, wrapped, &[&app("superd"), &at, "2", &app("serve-stdin")]);
        let client = Finished::of(&mut host.plain(&client("dial", &at, &["2"])));
        assert_eq!(client.success(), "pong 0 names=true\npong 1 names=true\n", "wrapped: {wrapped}");
    }
}

#[test]
fn a_connection_found_at_start_is_judged() {
    let host = Host::here();
    host.policy("");
    let at = format!("127.0.0.1:{}", free_port());
    let inner = host.run(&[&app("serve-stdin")]);
    let mut words = vec![app("superd"), at.clone(), "1".into()];
    words.push(inner.get_program().to_str().unwrap().to_owned());
    words.extend(inner.get_args().map(|a| a.to_str().unwrap().to_owned()));
    let superd = Running::start(host.plain(&words));
    superd.line("listening on");
    let client = Finished::of(&mut host.plain(&client("dial", &at, &[])));
    assert!(!client.stdout.contains("pong"), "{client:?}");
    superd.line("end of file");
    host.record("the refused connection", |r| r["op"] == "accept" && r["verdict"] == "refuse");
}

#[test]
fn datagrams_come_and_go_the_same_wrapped_and_not() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    for address in ["127.0.0.1", "[::1]"] {
        for how in ["to", "connected", "many"] {
            let mut said = Vec::new();
            for (server_wrapped, client_wrapped) in
                [(false, false), (false, true), (true, false), (true, true)]
            {
                let at = format!("{address}:{}", free_port());
                let mut server = serving(&host, server_wrapped, &[&app("serve-udp"), &at, "20"]);
                let words = client("ask-udp", &at, &["20", how]);
                let mut command = if client_wrapped { host.run(&words) } else { host.plain(&words) };
                let client = Finished::of(&mut command);
                assert_eq!(client.code(), 0, "{how} {client:?}");
                assert_eq!(server.wait(), 0);
                said.push(client.stdout);
            }
            assert!(said.iter().all(|s| *s == said[0]), "{how}: {said:?}");
        }
    }
}

#[test]
fn a_refused_connect_fails_at_once_in_every_style_and_its_permitted_twin_goes_on() {
    let host = Host::here();
    let (open, shut) = (free_port(), free_port());
    host.policy(&format!("service open = tcp/{open};\nallow open(*, *);\n"));
    let count = CLIENTS.iter().map(|c| c.2).sum::<usize>().to_string();
    let mut kept = Vec::new();
    for port in [open, shut] {
        let at = format!("127.0.0.1:{port}");
        kept.push(serving(&host, false, &[&app("serve"), &at, &count, "threads"]));
    }
    for &(name, rest, _) in CLIENTS {
        let permitted = Finished::of(&mut host.run(&client(name, &format!("127.0.0.1:{open}"), rest)));
        assert!(permitted.stdout.contains("pong") && permitted.code() == 0, "{name} {rest:?} {permitted:?}");
        let began = Instant::now();
        let refused = Finished::of(&mut host.run(&client(name, &format!("127.0.0.1:{shut}"), rest)));
        assert!(!refused.stdout.contains("pong"), "{name} {rest:?} {refused:?}");
        assert!(refused.stdout.contains("EACCES"), "{name} {rest:?} {refused:?}");
        // A question that nobody answers takes five seconds.
        assert!(began.elapsed().as_secs() < 5, "{name} {rest:?} took {:?}", began.elapsed());
    }
    let records = host.records();
    let refused = records.iter().filter(|r| r["op"] == "connect" && r["verdict"] == "refuse").count();
    // dial-child stops at its first refusal, and the others try all they have.
    assert!(refused >= CLIENTS.len(), "{refused} of {}", records.len());
}

#[test]
fn a_listener_that_no_rule_permits_is_refused_at_listen() {
    let host = Host::here();
    let (open, shut) = (free_port(), free_port());
    host.policy(&format!("service open = tcp/{open};\nallow open(*, *);\n"));
    let words = |port: u16| [app("serve"), format!("127.0.0.1:{port}"), "1".to_owned()];
    let refused = Finished::of(&mut host.run(&words(shut)));
    assert_eq!((refused.code(), refused.stdout.as_str()), (1, "EACCES\n"));
    let mut server = Running::start(host.run(&words(open)));
    server.line("listening on");
    let client = Finished::of(&mut host.plain(&client("dial", &format!("127.0.0.1:{open}"), &[])));
    assert_eq!(client.success(), "pong 0 names=true\n");
    assert_eq!(server.wait(), 0);
}

#[test]
fn connects_in_a_signal_handler_are_served_in_the_middle_of_others() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let at = format!("127.0.0.1:{}", free_port());
    let _server = serving(&host, false, &[&app("serve"), &at, "1000000", "threads"]);
    let done = Finished::of(&mut host.run(&client("dial-signal", &at, &["300"])));
    assert_eq!(done.success(), "answers=300 in-handler=true failed=0\n");
}

#[test]
fn children_in_a_sandbox_of_their_own_are_served_and_refused() {
    let host = Host::here();
    let (open, shut) = (free_port(), free_port());
    host.policy(&format!(
        "service open = tcp/{open};\nservice shut = tcp/{shut};\n\
         allow open(*, *);\nallow shut(process{{user=\"root\"}}, *);\n"
    ));
    for (port, child) in [(open, "Exited(Pid(child), 0)"), (shut, "Exited(Pid(child), 1)")] {
        let at = format!("127.0.0.1:{port}");
        let _server = serving(&host, false, &[&app("serve"), &at, "7", "threads"]);
        let done = Finished::of(&mut host.run(&client("dial-confined", &at, &["3"])));
        assert_eq!(done.success(), format!("pong 0\n{child}\n"), "port {port}");
    }
    // The child is judged as who it has become.
    let refused = host.record("the child's refusal", |r| r["verdict"] == "refuse");
    assert_eq!(refused["user"], "nobody", "{refused}");
}

#[test]
fn verdicts_that_are_remembered_end_with_the_credentials_they_were_given_to() {
    let net = Net::new(&["near", "far"]);
    let [near, far] = net.hosts();
    near.policy("allow *(process{user=\"root\"}, *);\n");
    let at = format!("{}:7001", far.address);
    let _server = serving(far, false, &[&app("serve"), &at, "100", "threads"]);
    let done = Finished::of(&mut near.run(&client("dial-changed", &at, &["5"])));
    assert_eq!(done.success(), "root: pong 0\n".repeat(5) + "nobody: EACCES\nchild: EACCES\n");
    // Most of the five were answered from the table, and all of them are on record.
    let records = near.records();
    let of = |verdict: &str| {
        records.iter().filter(|r| r["op"] == "connect" && r["verdict"] == verdict).collect::<Vec<_>>()
    };
    assert_eq!((of("permit").len(), of("refuse").len()), (5, 2), "{records:?}");
    assert!(of("permit").iter().any(|r| r["via"] == "table"), "{:?}", of("permit"));
}

/// listen(2) takes a free port for who has not asked for one.
#[test]
fn a_listener_that_was_never_bound_is_judged_by_the_port_it_gets() {
    let root = Host::here();
    for host in [root.as_user(65534), root] {
        host.policy("service low = tcp/1-1023; service high = tcp/1024-65535;\nallow high(*, *);\n");
        let script = "import socket\nfor family in 2, 10:\n    s = socket.socket(family); s.listen(); \
            socket.create_connection(('localhost', s.getsockname()[1])); print(s.getsockname()[1])";
        let ports = Finished::of(&mut host.run(&["/usr/bin/python3", "-c", script])).success();
        for port in ports.lines() {
            let at = format!(":{port}");
            let record = host.record("the listener", |r| {
                r["op"] == "listen" && r["local"].as_str().is_some_and(|local| local.ends_with(&at))
            });
            assert_eq!(record["verdict"], "permit", "{record}");
        }
        assert!(!host.records().iter().any(|r| r["verdict"] == "refuse"), "{:?}", host.records());
        host.policy("service low = tcp/1-1023;\nallow low(*, *);\n");
        portcullis_tests::eventually("the broker ends", || host.daemons().is_empty().then_some(()));
        let refused = Finished::of(&mut host.run(&["/usr/bin/python3", "-c", script]));
        assert!(refused.stderr.contains("PermissionError"), "{refused}");
    }
}
