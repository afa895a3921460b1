//! An ordinary user: verdicts and record as for root, without what only root can have the kernel do.

use portcullis_tests::{Finished, Net, Running};

const NOBODY: u32 = 65534;
const POLICY: &str = "\
service in = tcp/4001;
service out = tcp/4002;
allow in(IPv4{10.77.0.1}, IPv4{10.77.0.2});
allow out(IPv4{10.77.0.2}, IPv4{10.77.0.1});
";

#[test]
fn calls_are_judged_and_on_record() {
    let net = Net::new(&["other", "host"]);
    let [other, host] = net.hosts();
    let user = host.as_user(NOBODY);
    user.policy(POLICY);
    let _permitted = Running::start(other.plain(&["nc", "-l", "4002"]));
    let _refused = Running::start(other.plain(&["nc", "-l", "4003"]));
    other.wait_for_port(4002);
    other.wait_for_port(4003);
    assert_eq!(Finished::of(&mut user.run(&["nc", "-zw2", "10.77.0.1", "4002"])).code(), 0);
    assert_ne!(Finished::of(&mut user.run(&["nc", "-zw2", "10.77.0.1", "4003"])).code(), 0);
    let refused = user.record("the refused call", |r| r["op"] == "connect" && r["verdict"] == "refuse");
    assert_eq!((&refused["remote"], &refused["uid"]), (&"10.77.0.1:4003".into(), &NOBODY.into()));
    // Not wrapped, the same call gets through.
    assert_eq!(Finished::of(&mut user.plain(&["nc", "-zw2", "10.77.0.1", "4003"])).code(), 0);
}

#[test]
fn a_stranger_is_closed_at_accept_and_status_says_so() {
    let net = Net::new(&["other", "host", "stranger"]);
    let [other, host, stranger] = net.hosts();
    let user = host.as_user(NOBODY);
    user.policy(POLICY);
    let script = "import socket\n\
        l = socket.create_server(('', 4001))\n\
        print('listens', flush=True)\n\
        while True: l.accept()[0].sendall(b'hello')\n";
    let server = user.start(&["/usr/bin/python3", "-c", script]);
    server.line("listens");
    let call = "exec 3<>/dev/tcp/10.77.0.2/4001; cat <&3";
    assert_eq!(Finished::of(&mut stranger.plain(&["timeout", "5", "bash", "-c", call])).stdout, "");
    let greeted = Finished::of(&mut other.plain(&["timeout", "5", "bash", "-c", call]));
    assert_eq!(greeted.stdout, "hello", "{greeted}");
    user.record("the stranger", |r| {
        r["op"] == "accept"
            && r["verdict"] == "refuse"
            && r["remote"].as_str().unwrap().starts_with("10.77.0.3:")
    });
    let status = user.portcullis(&["status"]).stdout;
    assert!(status.contains("a stranger is closed at accept"), "{status}");
}

#[test]
fn setuid_programs_gain_nothing() {
    // no_new_privs, which the guard needs without root; said here so that nobody is surprised by it.
    let host = portcullis_tests::Host::here().as_user(NOBODY);
    host.policy(portcullis_tests::ALLOW_ALL);
    let bits = ["grep", "NoNewPrivs", "/proc/self/status"];
    assert_eq!(Finished::of(&mut host.run(&bits)).success(), "NoNewPrivs:\t1\n");
    let root = portcullis_tests::Host::here();
    root.policy(portcullis_tests::ALLOW_ALL);
    assert_eq!(Finished::of(&mut root.run(&bits)).success(), "NoNewPrivs:\t0\n");
}
