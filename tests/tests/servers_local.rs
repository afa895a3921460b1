//! Servers and clients on one host: the one broker knows both ends of a loopback connection.

use portcullis_tests::{Finished, Host, Net, Running};

/// One rule says that nobody but nginx's workers may reach redis.
const POLICY: &str = "\
service redis = tcp/6379;
service front = tcp/8379;
nginx = process{exe=\"/usr/sbin/nginx\"};
store = process{exe=\"/usr/bin/redis-*\"};
allow redis(nginx & process{user=\"www-data\"}, store);
allow front(*, nginx);
";

fn redis(host: &Host) -> Running {
    let folder = host.path("");
    let folder = folder.to_str().unwrap();
    let words = ["redis-server", "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--dir", folder];
    let server = host.start(&words);
    host.wait_for_port(6379);
    server
}

/// nginx as a relay to redis, its workers as www-data.
fn nginx(host: &Host) -> Running {
    let config = host.write(
        "nginx.conf",
        format!(
            "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\nuser www-data;\nworker_processes 2;\n\
             daemon off;\nerror_log stderr;\npid {0}/nginx.pid;\nevents {{}}\n\
             stream {{ server {{ listen 127.0.0.1:8379; proxy_pass 127.0.0.1:6379; }} }}\n",
            host.path("").display()
        ),
    );
    let server = host.start(&["/usr/sbin/nginx", "-c", config.to_str().unwrap()]);
    host.wait_for_port(8379);
    server
}

#[test]
fn only_nginx_workers_reach_redis() {
    let net = Net::new(&["host"]);
    let [host] = net.hosts();
    host.policy(POLICY);
    let _redis = redis(host);
    let _nginx = nginx(host);

    // By way of nginx, whoever asks.
    assert_eq!(Finished::of(&mut host.run(&["redis-cli", "-p", "8379", "ping"])).success(), "PONG\n");
    assert_eq!(Finished::of(&mut host.plain(&["redis-cli", "-p", "8379", "ping"])).success(), "PONG\n");
    let worker = host.record("the worker's call", |r| {
        r["op"] == "connect" && r["exe"] == "/usr/sbin/nginx" && r["remote"] == "127.0.0.1:6379"
    });
    assert_eq!((&worker["verdict"], &worker["user"]), (&"permit".into(), &"www-data".into()));
    assert_eq!(worker["assurance"], "kernel");
    // An executable is a file, whatever link it was started by.
    let file = std::fs::canonicalize("/usr/bin/redis-server").unwrap();
    let listening = host.record("redis", |r| r["op"] == "listen" && r["local"] == "127.0.0.1:6379");
    assert_eq!(listening["exe"].as_str(), file.to_str());

    // Directly, not: neither wrapped, nor not, nor as the right user with the wrong program.
    let direct = Finished::of(&mut host.run(&["redis-cli", "-p", "6379", "ping"]));
    assert_ne!(direct.stdout, "PONG\n");
    let refused = host.record("the direct call", |r| r["op"] == "connect" && r["verdict"] == "refuse");
    assert!(refused["exe"].as_str().unwrap().ends_with("redis-cli"), "{refused}");
    let unwrapped = Finished::of(&mut host.plain(&["redis-cli", "-p", "6379", "ping"]));
    assert_ne!(unwrapped.stdout, "PONG\n");
    let as_www_data = ["setpriv", "--reuid=www-data", "--clear-groups", "redis-cli", "-p", "6379", "ping"];
    assert_ne!(Finished::of(&mut host.plain(&as_www_data)).stdout, "PONG\n");
    host.record("a stranger at redis", |r| r["op"] == "accept" && r["verdict"] == "refuse");
}

#[test]
fn under_a_policy_that_allows_all_everybody_reaches_redis() {
    let net = Net::new(&["host"]);
    let [host] = net.hosts();
    host.policy(portcullis_tests::ALLOW_ALL);
    let _redis = redis(host);
    assert_eq!(Finished::of(&mut host.run(&["redis-cli", "-p", "6379", "ping"])).success(), "PONG\n");
    assert_eq!(Finished::of(&mut host.plain(&["redis-cli", "-p", "6379", "ping"])).success(), "PONG\n");
}
