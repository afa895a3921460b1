//! Servers and clients of Debian between hosts, both ends wrapped.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use portcullis_tests::{Finished, Host, Net, Running, eventually};

const POLICY: &str = "\
clients = IPv4{10.77.0.1};
servers = IPv4{10.77.0.2};
service web = tcp/80;
service store = tcp/6379;
service cache = tcp/11211;
service queue = tcp/1883;
service echo = tcp/7;
allow web(clients, servers);
allow store(clients, servers);
allow cache(clients, servers);
allow queue(clients, servers);
allow echo(clients, servers);
";

fn curl(from: &Host) -> Finished {
    Finished::of(&mut from.plain(&["curl", "-sS", "--max-time", "1", "http://10.77.0.2/"]))
}

fn nginx(host: &Host, listen: &str, page: &str) -> String {
    host.write("www/index.html", page);
    let folder = host.path("");
    let config = host.write(
        "nginx.conf",
        format!(
            "user www-data;\nworker_processes 3;\nerror_log {0}error.log;\npid {0}nginx.pid;\nevents {{}}\n\
             http {{ access_log off; sendfile on; server {{ {listen} root {0}www; }} }}\n",
            folder.display()
        ),
    );
    config.display().to_string()
}

fn pid_of(host: &Host) -> Option<i32> {
    std::fs::read_to_string(host.path("nginx.pid")).ok()?.trim().parse().ok()
}

#[test]
fn nginx_daemonises_reloads_and_serves_its_clients_only() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let config = nginx(server, "listen 80 reuseport;", "one\n");
    // It daemonises: `run` returns, and the broker stays.
    assert_eq!(Finished::of(&mut server.run(&["/usr/sbin/nginx", "-c", &config])).code(), 0);
    server.wait_for_port(80);
    let words = ["curl", "-sS", "--max-time", "20", "http://10.77.0.2/"];
    for _ in 0..8 {
        assert_eq!(Finished::of(&mut client.run(&words)).success(), "one\n");
    }
    assert_eq!(curl(stranger).code(), 28, "filtered, so curl waits in vain");
    server.record("the stranger", |r| {
        r["verdict"] == "refuse"
            && r["via"] == "filter"
            && r["remote"].as_str().unwrap().starts_with("10.77.0.3:")
    });

    // New workers after a reload, on the listening sockets of the old master.
    server.write("www/index.html", "two\n");
    let master = eventually("nginx has written its pid", || pid_of(server));
    kill(Pid::from_raw(master), Signal::SIGHUP).unwrap();
    for _ in 0..8 {
        assert_eq!(Finished::of(&mut client.run(&words)).success(), "two\n");
    }
    kill(Pid::from_raw(master), Signal::SIGQUIT).unwrap();
    eventually("supervisor and broker end with nginx", || server.daemons().is_empty().then_some(()));
}

#[test]
fn nginx_upgrades_its_binary_while_it_serves() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let config = nginx(server, "listen 80;", "page\n");
    assert_eq!(Finished::of(&mut server.run(&["/usr/sbin/nginx", "-c", &config])).code(), 0);
    server.wait_for_port(80);
    let old = eventually("nginx has written its pid", || pid_of(server));
    kill(Pid::from_raw(old), Signal::SIGUSR2).unwrap();
    let new = eventually("a new master runs", || pid_of(server).filter(|pid| *pid != old));
    kill(Pid::from_raw(old), Signal::SIGQUIT).unwrap();
    eventually("the old one has ended", || kill(Pid::from_raw(old), None).is_err().then_some(()));
    let words = ["curl", "-sS", "--max-time", "20", "http://10.77.0.2/"];
    for _ in 0..4 {
        assert_eq!(Finished::of(&mut client.run(&words)).success(), "page\n");
    }
    kill(Pid::from_raw(new), Signal::SIGQUIT).unwrap();
}

#[test]
fn redis_replicates_from_host_to_host() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    let start = |host: &Host, more: &[&str]| {
        let folder = host.path("").display().to_string();
        let mut words = vec!["redis-server", "--save", "", "--protected-mode", "no", "--dir", &folder];
        words.extend(more);
        host.start(&words)
    };
    let _primary = start(server, &["--bind", "0.0.0.0"]);
    server.wait_for_port(6379);
    // Without a rule for it, a replica may not listen; its clients come by a unix socket.
    let socket = client.path("redis.sock").display().to_string();
    let _replica =
        start(client, &["--port", "0", "--unixsocket", &socket, "--replicaof", "10.77.0.2", "6379"]);
    let set = Finished::of(&mut client.run(&["redis-cli", "-h", "10.77.0.2", "set", "word", "portcullis"]));
    assert_eq!(set.success(), "OK\n");
    eventually("the replica has the word", || {
        let got = Finished::of(&mut client.run(&["redis-cli", "-s", &socket, "get", "word"]));
        (got.stdout == "portcullis\n").then_some(())
    });
    let words = ["timeout", "1", "redis-cli", "-h", "10.77.0.2", "ping"];
    assert_ne!(Finished::of(&mut stranger.plain(&words)).stdout, "PONG\n");
}

#[test]
fn memcached_serves_over_tcp() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let _cache = server.start(&["memcached", "-u", "nobody", "-U", "0", "-l", "10.77.0.2"]);
    server.wait_for_port(11211);
    let script = "import socket\n\
        s = socket.create_connection(('10.77.0.2', 11211), 5)\n\
        s.sendall(b'set k 0 0 5\\r\\nvalue\\r\\nget k\\r\\nquit\\r\\n')\n\
        print(s.makefile().read())";
    let said = Finished::of(&mut client.run(&["/usr/bin/python3", "-c", script])).success();
    assert!(said.contains("STORED") && said.contains("value"), "{said}");
}

#[test]
fn mosquitto_passes_messages_on() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let config = server.write("mosquitto.conf", "listener 1883 0.0.0.0\nallow_anonymous true\nuser nobody\n");
    let _queue = server.start(&["mosquitto", "-c", config.to_str().unwrap()]);
    server.wait_for_port(1883);
    let hear = ["stdbuf", "-oL", "mosquitto_sub", "-h", "10.77.0.2", "-t", "t", "-C", "1", "-W", "15", "-d"];
    let hears = Running::start(client.run(&hear));
    hears.line("SUBACK");
    let say = ["mosquitto_pub", "-h", "10.77.0.2", "-t", "t", "-m", "hello"];
    assert_eq!(Finished::of(&mut client.run(&say)).code(), 0);
    hears.line("hello");
}

#[test]
fn an_outgoing_connection_that_a_program_is_started_with_is_judged_as_such() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    let inetd = ["tcpsvd", "-l", "server", "10.77.0.2", "7", "cat"];
    let _inetd = Running::start(server.plain(&inetd));
    server.wait_for_port(7);
    // Whoever opened it hands it on, as a proxy command does.
    let script = "import os, socket\n\
        s = socket.create_connection(('10.77.0.2', 7))\n\
        s.sendall(b'hello\\n')\n\
        os.dup2(s.fileno(), 0)\n\
        os.execv('/usr/bin/head', ['head', '-n1'])";
    let handed_on = || Finished::of(&mut client.run(&["/usr/bin/python3", "-c", script])).stdout;
    client.policy("allow tcp/7(*, IPv4{10.77.0.2});");
    assert_eq!(handed_on(), "hello\n");
    client.record("it goes on", |r| {
        r["exe"] == "/usr/bin/head" && r["op"] == "connect" && r["verdict"] == "permit"
    });
    let python = std::fs::canonicalize("/usr/bin/python3").unwrap();
    client.policy(&format!("allow tcp/7(process{{exe=\"{}\"}}, IPv4{{10.77.0.2}});", python.display()));
    assert_eq!(handed_on(), "");
    client.record("it does not", |r| {
        r["exe"] == "/usr/bin/head" && r["op"] == "connect" && r["verdict"] == "refuse"
    });
}

#[test]
fn a_connection_that_inetd_hands_over_is_judged_when_the_program_starts() {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, stranger] = net.hosts();
    // tcpsvd is not wrapped: it takes every connection, and starts a wrapped program for each.
    let run = server.run(&["cat"]);
    let mut words: Vec<String> = ["tcpsvd", "-l", "server", "10.77.0.2", "7"].map(Into::into).into();
    let wrapped = std::iter::once(run.get_program()).chain(run.get_args());
    // The run is inside the server's namespace already.
    words.extend(wrapped.skip(3).map(|w| w.to_str().unwrap().to_owned()));
    let _inetd = Running::start(server.plain(&words));
    server.wait_for_port(7);
    let say = "exec 3<>/dev/tcp/10.77.0.2/7; echo hello >&3; read -t 5 -u 3 line; echo \"got $line\"";
    let got = Finished::of(&mut client.run(&["bash", "-c", say]));

    assert_eq!(got.stdout, "got hello\n", "{got}");
    assert_ne!(Finished::of(&mut stranger.plain(&["bash", "-c", say])).stdout, "got hello\n");
    server.record("the stranger", |r| {
        r["verdict"] == "refuse"
            && r["op"] == "accept"
            && r["remote"].as_str().unwrap().starts_with("10.77.0.3:")
    });
}
