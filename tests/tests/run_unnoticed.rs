//! What a program notices of its sockets, descriptors, children and signals is the same wrapped and not.

use portcullis_tests::{ALLOW_ALL, Finished, Host, Net, Running, trust::Trust};

const PY: &str = "/usr/bin/python3";
const ALONE: &str = include_str!("../probes/alone.py");
const BETWEEN: &str = include_str!("../probes/between.py");

fn alone(host: &Host) {
    host.policy(ALLOW_ALL);
    let words = [PY, "-c", ALONE];
    let plain = Finished::of(&mut host.plain(&words)).success();
    let wrapped = Finished::of(&mut host.run(&words)).success();
    assert!(!plain.contains("ended by") && plain.lines().count() > 100, "{plain}");
    similar(&plain, &wrapped);
}

/// Says which lines differ.
fn similar(plain: &str, wrapped: &str) {
    let differ = |(one, other): &(&str, &str)| one != other;
    let lines: Vec<_> = plain.lines().zip(wrapped.lines()).filter(differ).collect();
    assert!(plain == wrapped, "as it is, and wrapped: {lines:#?}\nall of it, wrapped:\n{wrapped}");
}

#[test]
fn by_root_alone() {
    alone(&Host::here());
}

#[test]
fn by_a_user_alone() {
    alone(&Host::here().as_user(65534));
}

/// What each end sees, the server's first.
fn between(net: &Net, wrapped: bool) -> String {
    let [client, server] = net.hosts();
    let start = |host: &Host, role: &str| {
        let words = [PY, "-c", BETWEEN, role];
        Running::start(if wrapped { host.run(&words) } else { host.plain(&words) })
    };
    let mut serving = start(server, "server");
    serving.line("listens");
    let mut asking = start(client, "client");
    for one in [&mut asking, &mut serving] {
        assert_eq!(one.wait(), 0, "{:#?}", one.said());
    }
    let all = [serving.rest(), asking.rest()].concat().join("\n");
    assert!(!all.contains("ended by"), "{all}");
    all
}

#[test]
fn by_two_hosts() {
    let net = Net::new(&["client", "server"]);
    for host in net.hosts::<2>() {
        host.policy(ALLOW_ALL);
    }
    similar(&between(&net, false), &between(&net, true));
}

/// Urgent data stays where it is in the stream, and nothing says that it was urgent: a TLS stream has no such thing.
#[test]
fn by_two_hosts_of_a_trust_domain_but_for_urgent_data() {
    let net = Net::new(&["client", "server"]);
    let hosts = net.hosts::<2>();
    let plain = between(&net, false);
    for host in hosts {
        host.policy(ALLOW_ALL);
    }
    let _trust = Trust::of(&hosts);
    let wrapped = between(&net, true);
    let others =
        |all: &str| all.lines().filter(|line| !line.starts_with("urgent")).collect::<Vec<_>>().join("\n");
    similar(&others(&plain), &others(&wrapped));
    hosts[0].record("a protected flow", |r| r["lane"] == "tls" && r["op"] == "connect");
}
