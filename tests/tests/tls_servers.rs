//! Servers that Debian has, and their clients, between members of a trust domain: all of it under TLS.

use std::fs;

use portcullis_tests::{Finished, Host, Net, eventually, trust::Trust, wire::Capture};

const POLICY: &str = "\
inside = x509{name=\"*.example.com\"};
service served = tcp/80, tcp/5432, tcp/6379;
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
    let versions = fs::read_dir("/usr/lib/postgresql").unwrap();
    let bin = versions.map(|v| v.unwrap().path().join("bin")).find(|p| p.join("initdb").exists()).unwrap();
    let data = server.path("pg");
    fs::create_dir(&data).unwrap();
    let data = data.to_str().unwrap();
    let _done = Finished::of(&mut server.plain(&["chown", "postgres", data])).success();
    let user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"];
    let (initdb, postgres) = (bin.join("initdb"), bin.join("postgres"));
    let make = [&user[..], &[initdb.to_str().unwrap(), "-A", "trust", "-N", "-D", data]].concat();
    let _done = Finished::of(&mut server.plain(&make)).success();
    fs::write(format!("{data}/pg_hba.conf"), "host all all 10.77.0.0/24 trust\n").unwrap();
    let words = [postgres.to_str().unwrap(), "-D", data, "-h", "10.77.0.2", "-k", "", "-c", "fsync=off"];
    let running = server.start(&[&user[..], &words].concat());
    running.line("ready to accept connections");
    // Its own rules go by the peer's address, which is the true one.
    let query = ["psql", "-h", "10.77.0.2", "-U", "postgres", "-Atc", "select inet_client_addr(), 6*7"];
    assert_eq!(Finished::of(&mut client.run(&query)).success(), "10.77.0.1|42\n");
    all_is_protected(client);
}
