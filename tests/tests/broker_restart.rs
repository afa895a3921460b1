//! What goes on over the death of a broker or a key daemon.

use std::fs;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use portcullis_tests::{
    Finished, Host, Net, Running, eventually,
    ftp::{self, Daemon},
};

const SIZE: usize = 300_000;

/// A session that fetches the file once for each line, in the way that the line says.
const SESSION: &str = "import ftplib, sys\n\
    f = ftplib.FTP('10.77.0.2', timeout=20)\n\
    f.login()\n\
    print('ready', flush=True)\n\
    for line in sys.stdin:\n    \
        f.set_pasv(line.strip() == 'passive')\n    \
        try:\n        \
            f.retrbinary('RETR report.bin', open(sys.argv[1], 'wb').write)\n        \
            print('fetched', flush=True)\n    \
        except Exception as e:\n        \
            print('failed', e, flush=True)\n";

/// Kills one of a host's daemons and waits until all of them are there again.
fn kill_and_wait(host: &Host, name: &str) {
    let all = || {
        let mut found: Vec<(i32, String)> = host.daemons();
        found.sort();
        (found.len() == 3).then_some(found)
    };
    let before = eventually("supervisor, broker and key daemon", all);
    let (victim, _) = before.iter().find(|(_, n)| n == name).unwrap();
    kill(Pid::from_raw(*victim), Signal::SIGKILL).unwrap();
    eventually(&format!("there is another {name}"), || {
        let now = all()?;
        // A broker ends with its key daemon; that outlives a broker. And the broker answers.
        let stay = if name == "broker" { 2 } else { 1 };
        let fresh = now.iter().filter(|one| before.contains(one)).count() == stay;
        (fresh && host.portcullis(&["status"]).stdout.contains("broker       process")).then_some(())
    });
}

fn fetch(running: &mut Running, client: &Host, way: &str) {
    running.say(&format!("{way}\n"));
    let said = running.line("f");
    assert_eq!(said, "fetched", "{way}");
    assert!(fs::read(client.path("got")).unwrap() == ftp::content(SIZE), "{way}: the content differs");
}

/// The numbers of a log, which has no gap; and how many data connections are on record.
fn data_connections(host: &Host) -> usize {
    let records = host.records();
    let numbers: Vec<u64> = records.iter().map(|r| r["seq"].as_u64().unwrap()).collect();
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "a gap in {numbers:?}");
    let of_data = |r: &&serde_json::Value| {
        r["verdict"] == "permit" && r["session"].is_string() && (r["op"] == "accept" || r["op"] == "connect")
    };
    records.iter().filter(of_data).count()
}

fn session_goes_on(daemon: Daemon) {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(ftp::POLICY);
    server.policy(ftp::POLICY);
    let _daemon = server.start(&daemon.command(server, SIZE));
    server.wait_for_port(21);
    let to = client.path("got").display().to_string();
    let mut running = client.start(&["/usr/bin/python3", "-c", SESSION, &to]);
    running.line("ready");
    let mut transfers = 0;
    let mut both_ways = |running: &mut Running| {
        for way in ["passive", "active"] {
            fetch(running, client, way);
            transfers += 1;
            for host in [client, server] {
                eventually(&format!("{transfers} data connections on record on {}", host.name), || {
                    (data_connections(host) == transfers).then_some(())
                });
            }
        }
    };
    both_ways(&mut running);
    for (host, name) in [(server, "broker"), (server, "keyd"), (client, "broker"), (client, "keyd")] {
        kill_and_wait(host, name);
        both_ways(&mut running);
    }
}

#[test]
fn a_session_of_a_daemon_in_a_chroot_goes_on() {
    session_goes_on(Daemon::Vsftpd);
}

#[test]
fn a_session_of_a_privilege_separated_daemon_goes_on() {
    session_goes_on(Daemon::PureFtpd);
}

/// Accepts on port 8003 and says hello.
const GREETER: &str = "import socket\n\
    s = socket.create_server(('', 8003))\n\
    print('up', flush=True)\n\
    while True:\n    \
        c, a = s.accept()\n    \
        c.sendall(b'hello')\n    \
        c.close()";

/// Says how a call to port 8003 goes.
fn call(from: &Host, within: &str) -> String {
    let script = "import socket, sys\n\
        try: print(socket.create_connection(('10.77.0.1', 8003), int(sys.argv[1])).recv(9).decode())\n\
        except OSError as e: print(e)";
    let words = ["/usr/bin/python3", "-c", script, within];
    portcullis_tests::Finished::of(&mut from.plain(&words)).stdout.trim().to_owned()
}

fn is_served(host: &Host) {
    assert_eq!(call(host, "20"), "hello", "{}", host.name);
}

fn is_filtered(host: &Host) {
    assert_eq!(call(host, "1"), "timed out", "{}", host.name);
}

fn will_be_served(host: &Host) {
    eventually("the other list is in force", || (call(host, "1") == "hello").then_some(()));
}

#[test]
fn a_locked_filter_follows_the_policy_of_every_broker_and_goes_on_reporting() {
    let net = Net::new(&["server", "one", "two"]);
    let [server, one, two] = net.hosts();
    server.policy("allow tcp/8003(IPv4{10.77.0.2}, *);");
    let running = server.start(&["/usr/bin/python3", "-c", GREETER]);
    running.line("up");
    is_served(one);
    is_filtered(two);
    for name in ["broker", "keyd"] {
        kill_and_wait(server, name);
        is_served(one);
        is_filtered(two);
        let before = server.records().len();
        server.policy("allow tcp/8003(IPv4{10.77.0.3}, *);");
        will_be_served(two);
        is_filtered(one);
        eventually("the stranger is on record", || {
            let found = server.records().into_iter().skip(before).any(|r| {
                r["via"] == "filter"
                    && r["remote"].as_str().is_some_and(|a| a.starts_with("10.77.0.2:"))
                    && r["exe"].is_string()
            });
            found.then_some(())
        });
        server.policy("allow tcp/8003(IPv4{10.77.0.2}, *);");
        will_be_served(one);
    }
    let shown = server.portcullis(&["ps"]).success();
    assert!(shown.contains("8003 for addresses, by kernel-filter"), "{shown}");
}

/// Connects as fast as it can until it is told to stop, and says how often that went well.
const HURRY: &str = "import select, socket, struct, sys\n\
    n = 0\n\
    print('begun', flush=True)\n\
    while not select.select([sys.stdin], [], [], 0)[0]:\n    \
        s = socket.socket()\n    \
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n    \
        try:\n        \
            s.connect(('10.77.0.2', 8001)); n += 1\n    \
        except OSError: pass\n    \
        s.close()\n\
    print('done', n, flush=True)\n";

/// A program that hurries, with a server to connect to.
struct Hurried<'a> {
    client: &'a Host,
    running: Running,
    by_proxy: bool,
    _serving: Running,
}

impl<'a> Hurried<'a> {
    fn start(client: &'a Host, server: &Host, without: &str) -> Self {
        client.policy("allow tcp/8001(*, *);");
        let script = "import socket\ns = socket.create_server(('', 8001), backlog=4096)\nprint('up', flush=True)\n\
            while True: s.accept()[0].close()";
        let serving = Running::start(server.plain(&["/usr/bin/python3", "-c", script]));
        serving.line("up");
        let mut run = client.run(&["/usr/bin/python3", "-c", HURRY]);
        run.env("PORTCULLIS_WITHOUT", without);
        let running = Running::start(run);
        running.line("begun");
        std::thread::sleep(std::time::Duration::from_millis(300));
        Self { client, running, by_proxy: !without.is_empty(), _serving: serving }
    }

    /// Stops the broker. What is permitted already goes on for a while, and is on record in the kernel alone.
    fn stop_broker(&self) -> Pid {
        let broker = || self.client.daemons().into_iter().find(|(_, name)| name == "broker");
        let broker = Pid::from_raw(eventually("there is a broker", broker).0);
        kill(broker, Signal::SIGSTOP).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(200));
        broker
    }

    /// How many calls are in the log's files, whether or not a broker is there.
    fn written(&self) -> usize {
        let files = std::fs::read_dir(self.client.state().join("audit")).unwrap();
        let text = files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap());
        text.map(|text| text.matches(r#""op":"connect""#).count()).sum()
    }

    /// Ends the program, and looks whether all that it did is on record.
    fn end(mut self) {
        let done = self.finish();
        self.is_on_record(done);
    }

    /// Ends the program, which says how many calls it made.
    fn finish(&mut self) -> usize {
        let before = self.written();
        self.running.say("stop\n");
        let done: usize = self.running.line("done").trim_start_matches("done ").parse().unwrap();
        self.running.wait();
        assert!(self.by_proxy || done > before, "nothing was left to write: {done}");
        done
    }

    fn is_on_record(&self, done: usize) {
        let is_connect = |r: &serde_json::Value| r["op"] == "connect" && r["verdict"] == "permit";
        let count = || self.client.records().iter().filter(|r| is_connect(r)).count();
        if portcullis_tests::until(|| (count() >= done).then_some(())).is_none() {
            let said = std::fs::read_to_string(self.client.state().join("log")).unwrap_or_default();
            let others = self.client.records().into_iter().filter(|r| !is_connect(r) && r["op"] != "close");
            let others: Vec<_> =
                others.map(|r| format!("{} {} {}", r["seq"], r["time"], r["reason"])).collect();
            panic!("of {done} only {} are on record; the others: {others:#?}\n{said}", count());
        }
    }
}

#[test]
fn no_record_is_lost_with_a_broker() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    // By proxy the broker itself puts calls on record: what it had not written the next one does.
    for without in ["", "backstop"] {
        let client = client.as_user(0);
        let hurried = Hurried::start(&client, server, without);
        for restarts in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(if restarts > 0 { 300 } else { 0 }));
            kill(hurried.stop_broker(), Signal::SIGKILL).unwrap();
        }
        hurried.end();
    }
}

#[test]
fn no_record_is_lost_when_the_last_program_ends_with_its_broker() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    let hurried = Hurried::start(client, server, "");
    // It cannot take leave: it is killed after a while.
    hurried.stop_broker();
    hurried.end();
}

#[test]
fn no_record_is_lost_when_a_service_is_told_to_end_while_its_broker_is_gone() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy("allow tcp/8001(*, *);");
    let mut service = Running::start(client.supervise(&[]));
    eventually("it serves", || {
        client.portcullis(&["status"]).stdout.contains("generation   1").then_some(())
    });
    let mut hurried = Hurried::start(client, server, "");
    let broker = hurried.stop_broker();
    let done = hurried.finish();
    // It may have been stopped for too long already.
    let _replaced = kill(broker, Signal::SIGKILL);
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait(), 0);
    hurried.is_on_record(done);
}

#[test]
fn datagrams_follow_a_new_generation_before_their_socket_is_used_again() {
    let net = Net::new(&["server", "one", "two"]);
    let [server, one, two] = net.hosts();
    server.policy("allow udp/5353(IPv4{10.77.0.2}, *);");
    // Nothing brings the socket before the broker, not even its reading: read(2) is not asked about.
    let script = "import os, socket, sys\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
        s.bind(('10.77.0.1', 5353))\ns.setblocking(False)\nprint('bound', flush=True)\nfor line in sys.stdin:\n    \
        got = []\n    try:\n        while True: got.append(os.read(s.fileno(), 9).decode())\n    \
        except BlockingIOError: print('got', *got, flush=True)";
    let mut running = server.start(&["/usr/bin/python3", "-c", script]);
    running.line("bound");
    let send = |host: &Host, text: &str| {
        let script = format!(
            "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'{text}', ('10.77.0.1', 5353))"
        );
        let _sent = Finished::of(&mut host.plain(&["/usr/bin/python3", "-c", &script])).success();
    };
    kill_and_wait(server, "broker");
    for (host, text) in [(one, "one"), (two, "two")] {
        send(host, text);
    }
    server.policy("allow udp/5353(IPv4{10.77.0.3}, *);");
    server.record("the new generation", |r| {
        r["op"] == "policy" && r["reason"].as_str().unwrap().contains("generation 3")
    });
    for (host, text) in [(one, "three"), (two, "four")] {
        send(host, text);
    }
    running.say("read\n");
    assert_eq!(running.line("got"), "got one four", "what had arrived stays, and no other but who may");
}
