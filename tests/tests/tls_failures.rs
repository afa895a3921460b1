//! What becomes of protected flows when something fails or changes, with a control beside each.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use portcullis_tests::{Finished, Host, Net, Running, eventually, trust::Trust, wire::Capture};

const PROTECTED: &str = "allow tcp/8080(x509{name=\"*.example.com\"}, x509{name=\"*.example.com\"});\n";
const PLAIN: &str = "allow tcp/8080(*, *) using plain;\n";

/// Says back what it hears, to each who comes.
const ECHO: &str = "import socket, sys, threading\n\
    l = socket.create_server(('10.77.0.2', 8080))\n\
    print('listening', flush=True)\n\
    def serve(s):\n    \
        try:\n        \
            while part := s.recv(4096): s.sendall(part)\n    \
        except OSError as e: print('broken', e.errno, flush=True)\n\
    while True: threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()\n";

/// Says a line whenever it is told to, over one connection.
const TALK: &str = "import socket, sys\n\
    s = socket.create_connection(('10.77.0.2', 8080), timeout=10)\n\
    print('up', flush=True)\n\
    for line in sys.stdin:\n    \
        try:\n        \
            s.sendall(b'secret words'); print('heard', s.recv(100).decode(), flush=True)\n    \
        except OSError as e: print('broken', e.errno, flush=True)\n";

/// One question and its answer.
fn once(client: &Host) -> Finished {
    let script = "import socket; s = socket.create_connection(('10.77.0.2', 8080), timeout=10)\n\
        s.sendall(b'secret words'); print(s.recv(100).decode())";
    Finished::of(&mut client.run(&["/usr/bin/python3", "-c", script]))
}

fn part(host: &Host, name: &str) -> Pid {
    let found = eventually(&format!("{name} of {}", host.name), || {
        host.daemons().into_iter().find(|(_, is)| is == name).map(|(pid, _)| pid)
    });
    Pid::from_raw(found)
}

fn echo(server: &Host) -> Running {
    let running = server.start(&["/usr/bin/python3", "-c", ECHO]);
    running.line("listening");
    running
}

fn talk(client: &Host) -> Running {
    let mut running = client.start(&["/usr/bin/python3", "-c", TALK]);
    running.line("up");
    running.say("\n");
    running.line("heard secret words");
    running
}

fn net() -> (Net, Trust) {
    let net = Net::client_server_stranger(PROTECTED);
    let [client, server, _] = net.hosts();
    let trust = Trust::of(&[client, server]);
    (net, trust)
}

#[test]
fn a_killed_key_daemon_ends_its_flows_and_nothing_goes_in_plain_until_it_is_back() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    let _echo = echo(server);
    let wire = Capture::on(client);
    let mut talking = talk(client);
    kill(part(server, "keyd"), Signal::SIGKILL).unwrap();
    talking.say("\n");
    talking.line("broken");
    let closed = server.record("the end", |r| r["op"] == "close" && r["lane"] == "tls");
    assert_eq!(closed["reason"], "the key daemon has gone", "{closed}");
    let served = eventually("it is served again", || Some(once(client)).filter(|it| it.code() == 0));
    assert_eq!(served.stdout, "secret words\n");
    assert!(!wire.has(b"secret words"));
}

#[test]
fn a_flow_goes_on_when_its_broker_is_killed_and_is_the_next_ones() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    let _echo = echo(server);
    let mut talking = talk(client);
    let before = part(server, "broker");
    kill(before, Signal::SIGKILL).unwrap();
    eventually("another broker", || (part(server, "broker") != before).then_some(()));
    talking.say("\n");
    talking.line("heard secret words");
    eventually("the next broker knows it", || {
        server.portcullis(&["ps", "--format", "json"]).stdout.contains("client.example.com").then_some(())
    });
    assert_eq!(once(client).stdout, "secret words\n");
    // And it is the next one's to cut.
    server.policy("allow tcp/9(*, *);\n");
    server.record("the cut", |r| r["op"] == "cut" && r["lane"] == "tls");
    talking.say("\n");
    talking.line("broken");
}

#[test]
fn a_connect_that_waits_when_its_broker_is_killed_has_its_end_on_record() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    // Answers SYNs and nothing else.
    let silent = "import socket, sys; l = socket.create_server(('10.77.0.2', 8080))\n\
        print('listening', flush=True); sys.stdin.read()";
    let silent = Running::start(server.plain(&["/usr/bin/python3", "-c", silent]));
    silent.line("listening");
    let come = "import socket\n\
        try: socket.create_connection(('10.77.0.2', 8080))\n\
        except OSError as e: print('failed', e.errno, flush=True)\n\
        input()";
    let come = client.start(&["/usr/bin/python3", "-c", come]);
    let asked = client.record("it is asked for", |r| r["op"] == "connect" && r["verdict"] == "protect");
    // On record is what was asked; it waits when its own connect(2) has begun.
    let waiting = ["ss", "-Htn", "state", "syn-sent", "dst", "127.0.0.0/8"];
    eventually("it waits on its token", || {
        (!Finished::of(&mut client.plain(&waiting)).stdout.is_empty()).then_some(())
    });
    kill(part(client, "broker"), Signal::SIGKILL).unwrap();
    assert_eq!(come.line("failed"), format!("failed {}", nix::libc::ECONNREFUSED));
    let end = client.record("its end", |r| r["op"] == "connect" && r["verdict"] == "refuse");
    assert_eq!((&end["reason"], &end["remote"]), (&"there is no broker".into(), &asked["remote"]), "{end}");
    drop(silent);
    let _echo = echo(server);
    assert_eq!(once(client).stdout, "secret words\n", "the control");
    let refused = client.records().into_iter().filter(|r| r["verdict"] == "refuse").count();
    assert_eq!(refused, 1, "one end for each");
}

#[test]
fn a_listener_turns_from_plain_to_protected_and_back_while_it_listens() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    for host in [client, server] {
        host.policy(PLAIN);
    }
    let _echo = echo(server);
    let wire = Capture::on(client);
    assert_eq!(once(client).stdout, "secret words\n");
    eventually("it goes in plain", || wire.has(b"secret words").then_some(()));
    let turn = |policy| [client, server].map(|host| host.policy(policy).address);
    turn(PROTECTED);
    eventually("it is protected", || {
        let records = || server.records();
        (once(client).code() == 0 && records().iter().any(|r| r["op"] == "accept" && r["lane"] == "tls"))
            .then_some(())
    });
    // Who still speaks plain is not heard.
    let script = "import socket; s = socket.create_connection(('10.77.0.2', 8080), timeout=3)\n\
        s.sendall(b'plain words'); print(s.recv(100))";
    let plain = Finished::of(&mut client.plain(&["/usr/bin/python3", "-c", script]));
    assert!(!plain.stdout.contains("plain words"), "{plain}");
    turn(PLAIN);
    eventually("it is plain again", || {
        let plain = Finished::of(&mut client.plain(&["/usr/bin/python3", "-c", script]));
        plain.stdout.contains("plain words").then_some(())
    });
}

#[test]
fn in_audit_mode_members_talk_in_plain_and_the_log_says_so() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    let echo = Running::start(server.run_with(&["--mode", "audit"], &["/usr/bin/python3", "-c", ECHO]));
    echo.line("listening");
    let script = "import socket; s = socket.create_connection(('10.77.0.2', 8080), timeout=10)\n\
        s.sendall(b'words'); print(s.recv(100).decode())";
    let words = ["/usr/bin/python3", "-c", script];
    let said = Finished::of(&mut client.run_with(&["--mode", "audit"], &words));
    assert_eq!(said.stdout, "words\n", "{said}");
    client.record("what it would be", |r| {
        r["lane"] == "plain" && r["reason"].as_str().is_some_and(|why| why.contains("would be protected"))
    });
    server.record("what it would not be", |r| r["op"] == "accept" && r["verdict"] == "would-refuse");
}

#[test]
fn a_program_in_another_network_namespace_is_refused_with_that_reason() {
    let (net, _trust) = net();
    let [client, server, _] = net.hosts();
    let _echo = echo(server);
    assert_eq!(once(client).stdout, "secret words\n", "the control");
    // A namespace below the client's, with a way out.
    let script =
        "import socket; s = socket.socket(); s.settimeout(5); print(s.connect_ex(('10.77.0.2', 8080)))";
    let words = ["unshare", "--net", "/usr/bin/python3", "-c", script];
    let said = Finished::of(&mut client.run(&words));
    assert_eq!(said.stdout, format!("{}\n", nix::errno::Errno::EACCES as i32), "{said}");
    let named = |r: &serde_json::Value, op: &str| {
        let why = r["reason"].as_str().unwrap_or_default();
        r["verdict"] == "refuse" && r["op"] == op && why.contains("network namespace")
    };
    client.record("the reason", |r| named(r, "connect"));
    // A listener there could be reached by nobody.
    let script = "import socket, subprocess; subprocess.run(['ip', 'link', 'set', 'lo', 'up'])\n\
        s = socket.socket(); s.bind(('127.0.0.1', 8080))\n\
        try: s.listen(); print('listens')\n\
        except OSError as e: print(e.errno)";
    let words = ["unshare", "--net", "/usr/bin/python3", "-c", script];
    let said = Finished::of(&mut client.run(&words));
    assert_eq!(said.stdout, format!("{}\n", nix::errno::Errno::EACCES as i32), "{said}");
    client.record("the reason", |r| named(r, "listen"));
    let why = client.portcullis(&["why", "--last"]).success();
    assert!(why.contains("network namespace"), "{why}");
    // While one is there, `status` says so.
    let tells =
        || client.portcullis(&["status"]).stdout.contains("1 process is in another network namespace");
    let here = client.start(&["sleep", "60"]);
    eventually("it is there", || client.portcullis(&["ps"]).stdout.contains("sleep 60").then_some(()));
    assert!(!tells(), "the control");
    let _there = client.start(&["unshare", "--net", "sleep", "60"]);
    eventually("status says so", || tells().then_some(()));
    drop(here);
}

#[test]
fn who_meets_no_front_is_on_record_with_that_reason() {
    let (net, _trust) = net();
    let [_, server, stranger] = net.hosts();
    let _echo = echo(server);
    // One attempt after the other, from ports of their own.
    let knock = "import socket, time\n\
        end = time.time() + 15\n\
        print('knocks', flush=True)\n\
        while time.time() < end:\n    \
            s = socket.socket(); s.setblocking(False); s.connect_ex(('10.77.0.2', 8080)); time.sleep(0.002); s.close()";
    let knocking = Running::start(stranger.plain(&["/usr/bin/python3", "-c", knock]));
    knocking.line("knocks");
    kill(part(server, "keyd"), Signal::SIGKILL).unwrap();
    let missed = server.record("one who was dropped", |r| r["via"] == "filter" && r["op"] == "accept");
    assert!(missed["reason"].to_string().contains("no key daemon was there to ask"), "{missed}");
}

#[test]
fn an_ordinary_user_is_told_why_nothing_is_protected() {
    let (net, trust) = net();
    let [client, server, _] = net.hosts();
    let _echo = echo(server);
    assert_eq!(once(client).stdout, "secret words\n", "the control");
    let user = client.as_user(1234);
    user.policy(PROTECTED);
    trust.renew(&user, &[]);
    let script =
        "import socket; s = socket.socket(); print(s.connect_ex(('10.77.0.2', 8080)), flush=True); input()";
    let trying = user.start(&["/usr/bin/python3", "-c", script]);
    assert_eq!(trying.line(""), format!("{}", nix::errno::Errno::EACCES as i32));
    let why = "used by a key daemon that root has started, and by no other";
    user.record("the reason", |r| r["verdict"] == "refuse" && r["reason"].to_string().contains(why));
    let status = user.portcullis(&["status"]);
    assert!(status.stdout.contains(why), "{status}");
}

/// Another user waits for the token of a program's connect(2), and answers there once the key daemon is
/// dead. Returns what he says, and what becomes of the program.
fn steal(bound_to: &str, far: &str, table: &str) -> (String, String) {
    let net = Net::client_server_stranger(PROTECTED);
    let [client, server, stranger] = net.hosts();
    let _trust = Trust::of(&[client, server]);
    // Its handshake never ends, so that the program waits on its token.
    let mute = "import socket, sys, time; family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n\
        l = socket.create_server((sys.argv[1], 8080), family=family); print('listening', flush=True); time.sleep(60)";
    let mute = Running::start(stranger.plain(&["/usr/bin/python3", "-c", mute, far]));
    mute.line("listening");
    let talk = "import socket, sys\n\
        s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET); s.bind((sys.argv[1], 0))\n\
        s.settimeout(15); print('begins', flush=True)\n\
        try: s.connect((sys.argv[2], 8080)); s.sendall(b'secret words'); print('said')\n\
        except OSError as e: print('broken', e)";
    let talking = client.start(&["/usr/bin/python3", "-c", talk, bound_to, far]);
    talking.line("begins");
    let thief = "import errno, socket, sys, time\n\
        six = sys.argv[1] == 'tcp6'\n\
        family, local = (socket.AF_INET6, '::1') if six else (socket.AF_INET, '127.0.0.1')\n\
        end, there = time.time() + 20, None\n\
        while not there and time.time() < end:\n    \
            lines = [line.split() for line in open('/proc/net/' + sys.argv[1])][1:]\n    \
            there = next((l[2] for l in lines if l[3] == '02' and (six or l[2].split(':')[0].endswith('7F'))), None)\n\
        port, why = int(there.split(':')[1], 16), errno.EADDRINUSE\n\
        socket.create_server(('', 54321)).close(); print('any other', flush=True)\n\
        while why == errno.EADDRINUSE and time.time() < end:\n    \
            l = socket.socket(family)\n    \
            try: l.bind(('::1' if six else '0.0.0.0', port)); l.listen(); why = 0\n    \
            except OSError as e: why = e.errno; l.close()\n\
        if why: print('ends', why, flush=True); sys.exit()\n\
        socket.create_connection((local, port)).sendall(b'the control')\n\
        heard = l.accept()[0].recv(100); l.settimeout(5)\n\
        try: heard += l.accept()[0].recv(100)\n\
        except TimeoutError: pass\n\
        print('ends', heard.decode(), flush=True)";
    let as_other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", "/usr/bin/python3"];
    let thief = Running::start(client.plain(&[&as_other[..], &["-c", thief, table]].concat()));
    thief.line("any other");
    kill(part(client, "keyd"), Signal::SIGKILL).unwrap();
    (thief.line("ends"), talking.line(""))
}

#[test]
fn no_other_user_takes_the_place_of_a_killed_key_daemon() {
    let (thief, program) = steal("10.77.0.1", "10.77.0.3", "tcp");
    assert_eq!(thief, format!("ends {}", nix::errno::Errno::EACCES as i32));
    assert!(program.starts_with("broken"), "{program}");
}

#[test]
fn who_takes_the_port_on_which_a_program_of_ipv6_waits_is_not_taken_for_its_far_side() {
    let (thief, program) = steal("fd77::1", "fd77::3", "tcp6");
    assert_eq!(thief, "ends the control");
    assert!(program.starts_with("broken"), "{program}");
}

#[test]
fn what_waited_to_be_accepted_when_the_key_daemon_was_killed_is_no_local_connection() {
    let net = Net::client_server_stranger("allow tcp/8080(*, *);\n");
    let [client, server, _] = net.hosts();
    let _trust = Trust::of(&[client, server]);
    let script = "import socket, sys\n\
        l = socket.create_server(('10.77.0.2', 8080)); print('listening', flush=True)\n\
        for line in sys.stdin:\n    \
            s, peer = l.accept(); print('accepted', peer[0], flush=True)";
    let mut serving = server.start(&["/usr/bin/python3", "-c", script]);
    serving.line("listening");
    let come = "import socket, sys; s = socket.create_connection(('10.77.0.2', 8080), timeout=10)\n\
        print('up', flush=True); sys.stdin.read()";
    let come = ["/usr/bin/python3", "-c", come];
    let first = client.start(&come);
    first.line("up");
    serving.say("\n");
    assert_eq!(serving.line("accepted"), "accepted 10.77.0.1", "the control");
    let waits = client.start(&come);
    waits.line("up");
    kill(part(server, "keyd"), Signal::SIGKILL).unwrap();
    server.record("its end", |r| {
        r["op"] == "broker" && r["reason"].to_string().contains("key daemon has gone")
    });
    serving.say("\n");
    server.record("what it was", |r| {
        r["op"] == "accept"
            && r["verdict"] == "refuse"
            && r["reason"] == "the protected flow that it belonged to is over"
    });
    let local =
        |r: &serde_json::Value| r["op"] == "accept" && r["verdict"] == "permit" && r["lane"] == "plain";
    assert!(!server.records().iter().any(local), "{:#?}", server.records());
}
