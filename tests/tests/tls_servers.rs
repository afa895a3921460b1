//! Servers that Debian has, and their clients, between members of a trust domain: all of it under TLS.

use std::fs;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use portcullis_tests::{Finished, Host, Net, Running, daemons, eventually, trust::Trust, wire::Capture};

const POLICY: &str = "\
inside = x509{name=\"*.example.com\"};
service served = tcp/25, tcp/80, tcp/143, tcp/5432, tcp/6379;
allow served(inside, inside);
allow tcp/53(*, *);
allow udp(*, *);
";

fn net() -> (Net, Trust) {
    let net = Net::client_server_stranger(POLICY);
    let [client, server, _] = net.hosts();
    let trust = Trust::of(&[client, server]);
    (net, trust)
}

/// Everything over TCP was permitted, and under TLS.
fn all_is_protected(host: &Host) {
    for record in host.records() {
        let flows = ["connect", "accept", "close"].iter().any(|op| record["op"] == *op);
        if record["proto"] == "tcp" && flows {
            assert_eq!(record["lane"], "tls", "{record}");
            assert_ne!(record["verdict"], "refuse", "{record}");
        }
    }
}

#[test]
fn nginx_serves_by_workers_that_share_the_port_and_through_a_reload() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    let folder = server.path("").display().to_string();
    fs::create_dir(server.path("site")).unwrap();
    server.write("site/page", "plain words");
    let config = format!(
        "user www-data; worker_processes 3; pid {folder}/nginx.pid; error_log {folder}/error.log;\nevents {{}}\n\
         http {{ access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f; \
         uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n\
         server {{ listen 80 reuseport; root {folder}/site; }} }}\n"
    );
    let config = server.write("nginx.conf", config).display().to_string();
    let _started = Finished::of(&mut server.run(&["nginx", "-c", &config])).success();
    server.wait_for_port(80);
    let wire = Capture::on(client);
    let get = || Finished::of(&mut client.run(&["curl", "-sS", "--max-time", "10", "http://10.77.0.2/page"]));
    for _ in 0..6 {
        let got = get();
        assert_eq!(got.stdout, "plain words", "{got}");
    }
    let _told = Finished::of(&mut server.run(&["nginx", "-c", &config, "-s", "reload"])).success();
    for _ in 0..6 {
        eventually("it serves after the reload", || (get().stdout == "plain words").then_some(()));
    }
    assert!(!wire.has(b"plain words") && !wire.has(b"GET /page"));
    let told = server.record("an accept", |r| r["op"] == "accept");
    assert!(told["remote"].as_str().unwrap().starts_with("10.77.0.1:"), "{told}");
    let _ended = Finished::of(&mut server.run(&["nginx", "-c", &config, "-s", "stop"]));
    all_is_protected(client);
}

#[test]
fn redis_answers_many_questions_over_one_connection() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    let folder = server.path("").display().to_string();
    let words =
        ["--port", "6379", "--bind", "10.77.0.2", "--save", "", "--dir", &folder, "--protected-mode", "no"];
    let _redis = server.start(&[&["redis-server"], &words[..]].concat());
    server.wait_for_port(6379);
    let ask = "for n in 1 2 3 4 5; do echo \"SET key$n value$n\"; echo \"GET key$n\"; done | redis-cli -h 10.77.0.2";
    let said = Finished::of(&mut client.run(&["sh", "-c", ask]));
    assert_eq!(said.stdout.lines().filter(|l| l.starts_with("value")).count(), 5, "{said}");
    all_is_protected(client);
    all_is_protected(server);
}

#[test]
fn postgresql_answers_queries() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    let _daemon = daemons::postgresql(server);
    // Its own rules go by the peer's address, which is the true one.
    let query = ["psql", "-h", "10.77.0.2", "-U", "postgres", "-Atc", "select inet_client_addr(), 6*7"];
    assert_eq!(Finished::of(&mut client.run(&query)).success(), "10.77.0.1|42\n");
    all_is_protected(client);
}

#[test]
fn dovecot_passes_the_login_on() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    let _daemon = daemons::dovecot(server);
    let wire = Capture::on(client);
    let said = daemons::mailboxes(client);
    assert!(said.contains("INBOX"), "{said}");
    assert!(!wire.has(b"INBOX") && !wire.has(b"secret") && !wire.has(b"LOGIN"));
    all_is_protected(client);
    all_is_protected(server);
}

#[test]
fn exim_takes_a_message() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    let (_daemon, queue) = daemons::exim(server);
    let wire = Capture::on(client);
    let queued = daemons::send_mail(client, &queue);
    assert!(queued.iter().any(|name| name.ends_with("-H")), "the message is in the queue: {queued:?}");
    assert!(!wire.has(b"MAIL FROM") && !wire.has(b"hello"));
    all_is_protected(client);
    all_is_protected(server);
}

#[test]
fn nginx_upgrades_its_binary_while_it_serves() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    let folder = server.path("").display().to_string();
    server.write("site/page", "plain words");
    let config = format!(
        "user www-data; worker_processes 2; pid {folder}/nginx.pid; error_log {folder}/error.log;\nevents {{}}\n\
         http {{ access_log off; server {{ listen 80; root {folder}/site; }} }}\n"
    );
    let config = server.write("nginx.conf", config).display().to_string();
    let _started = Finished::of(&mut server.run(&["/usr/sbin/nginx", "-c", &config])).success();
    server.wait_for_port(80);
    let get = || Finished::of(&mut client.run(&["curl", "-sS", "--max-time", "10", "http://10.77.0.2/page"]));
    assert_eq!(get().stdout, "plain words");
    let pid = |name: &str| {
        let read = || fs::read_to_string(server.path(name)).ok()?.trim().parse().ok();
        Pid::from_raw(eventually(name, read))
    };
    let old = pid("nginx.pid");
    kill(old, Signal::SIGUSR2).unwrap();
    assert_eq!(pid("nginx.pid.oldbin"), old);
    let new = eventually("the new master", || Some(pid("nginx.pid")).filter(|new| *new != old));
    // Both serve the same listener, then the new one alone.
    for _ in 0..4 {
        assert_eq!(get().stdout, "plain words");
    }
    kill(old, Signal::SIGQUIT).unwrap();
    eventually("the old one ends", || kill(old, None).is_err().then_some(()));
    for _ in 0..4 {
        let got = get();
        assert_eq!(got.stdout, "plain words", "{got}\n{:#?}", server.records());
    }
    kill(new, Signal::SIGQUIT).unwrap();
    all_is_protected(client);
}

#[test]
fn a_listener_that_a_service_manager_made_is_protected() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    // As systemd does it: the listener is there before `portcullis run`, and is descriptor 3.
    let activate = "import os, socket, sys\n\
        s = socket.create_server(('10.77.0.2', 80)); os.dup2(s.fileno(), 3); os.set_inheritable(3, True)\n\
        os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execv(sys.argv[1], sys.argv[1:])";
    let serve = "import os, socket\n\
        assert os.environ['LISTEN_PID'] == str(os.getpid())\n\
        l = socket.socket(fileno=3); print('serves', flush=True)\n\
        while True:\n    \
            s, peer = l.accept(); s.sendall(b'greetings ' + peer[0].encode()); s.close()";
    let run = server.run(&["/usr/bin/python3", "-c", serve]);
    let words: Vec<&std::ffi::OsStr> = run.get_args().skip_while(|word| *word != "--").skip(1).collect();
    let running = Running::start(
        server
            .plain(&[&["/usr/bin/python3".as_ref(), "-c".as_ref(), activate.as_ref()], &words[..]].concat()),
    );
    running.line("serves");
    let ask = "import socket; s = socket.create_connection(('10.77.0.2', 80), timeout=5); print(s.recv(99).decode())";
    let ask = ["/usr/bin/python3", "-c", ask];
    let wire = Capture::on(client);
    let said = Finished::of(&mut client.run(&ask));
    assert_eq!(said.stdout, "greetings 10.77.0.1\n", "{said}\n{:#?}", server.records());
    assert!(!wire.has(b"greetings"));
    let plain = Finished::of(&mut client.plain(&ask));
    assert!(!plain.stdout.contains("greetings"), "{plain}");
    all_is_protected(client);
}
