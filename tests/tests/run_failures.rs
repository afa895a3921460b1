//! What a wrapped program sees when the parts that serve it die or hang.

use std::time::{Duration, Instant};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use portcullis_tests::{ALLOW_ALL, Finished, Host, Net, Running, eventually};

/// Holds one connection open, and for each line makes another: says how that went and that the first lives.
const CALLER: &str = "import errno, socket, sys\n\
    first = socket.create_connection(('127.0.0.1', 4000), 10)\n\
    print('ready', flush=True)\n\
    for line in sys.stdin:\n    \
        s = socket.socket()\n    \
        s.settimeout(20)\n    \
        try:\n        \
            s.connect(('127.0.0.1', 4000)); how = 'connected'\n    \
        except OSError as e:\n        \
            how = errno.errorcode.get(e.errno, str(e))\n    \
        s.close()\n    \
        first.sendall(b'x')\n    \
        print('result', how, first.recv(1).decode(), flush=True)\n";

/// Says everything back, to anybody, not wrapped.
const ECHO: &str = "import socket, threading\n\
    def serve(c):\n    \
        try:\n        \
            while (b := c.recv(99)): c.sendall(b)\n    \
        except OSError: pass\n\
    l = socket.create_server(('127.0.0.1', 4000))\n\
    print('serves', flush=True)\n\
    while True: threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()\n";

struct Scene {
    caller: Running,
    _echo: Running,
}

fn scene(host: &Host) -> Scene {
    host.policy(ALLOW_ALL);
    let echo = Running::start(host.plain(&["/usr/bin/python3", "-c", ECHO]));
    echo.line("serves");
    let caller = host.start(&["/usr/bin/python3", "-c", CALLER]);
    caller.line("ready");
    Scene { caller, _echo: echo }
}

impl Scene {
    /// One more call: how it ended, and how long it took. The first connection must live.
    fn call(&mut self) -> (String, Duration) {
        let begun = Instant::now();
        self.caller.say("go\n");
        let line = self.caller.line("result ");
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!(words[2], "x", "the established flow broke: {line}");
        (words[1].to_owned(), begun.elapsed())
    }

    fn is_served(&mut self) {
        eventually("calls are served again", || (self.call().0 == "connected").then_some(()));
    }
}

fn part(host: &Host, name: &str) -> Pid {
    let find = || host.daemons().into_iter().find(|(_, n)| n == name).map(|(pid, _)| Pid::from_raw(pid));
    eventually(&format!("there is a {name}"), find)
}

fn is_refusal(how: &str) -> bool {
    ["ECONNREFUSED", "EACCES", "EPERM"].contains(&how)
}

#[test]
fn a_killed_broker_is_back_before_anybody_waits_long() {
    let net = Net::new(&["host"]);
    let [host] = net.hosts();
    let mut scene = scene(host);
    for _ in 0..5 {
        assert_eq!(scene.call().0, "connected");
        let keyd = part(host, "keyd");
        kill(part(host, "broker"), Signal::SIGKILL).unwrap();
        let (how, time) = scene.call();
        assert!(how == "connected" || is_refusal(&how), "{how}");
        assert!(time < Duration::from_secs(12), "{time:?}");
        scene.is_served();
        assert_eq!(part(host, "keyd"), keyd, "the key daemon outlives the broker");
    }
}

#[test]
fn a_killed_key_daemon_is_back_too() {
    let net = Net::new(&["host"]);
    let [host] = net.hosts();
    let mut scene = scene(host);
    kill(part(host, "keyd"), Signal::SIGKILL).unwrap();
    scene.is_served();
}

#[test]
fn without_supervisor_and_broker_calls_are_refused_at_once_and_the_next_run_serves_them_again() {
    let net = Net::new(&["host"]);
    let [host] = net.hosts();
    let mut scene = scene(host);
    assert_eq!(scene.call().0, "connected");
    kill(part(host, "supervise"), Signal::SIGKILL).unwrap();
    eventually("the broker has ended too", || host.daemons().is_empty().then_some(()));
    let (how, time) = scene.call();
    assert!(is_refusal(&how), "{how}");
    // A question that nobody answers takes five.
    assert!(time < Duration::from_secs(4), "{time:?}");
    let keeper = host.start(&["sh", "-c", "echo up; exec sleep 1000"]);
    keeper.line("up");
    scene.is_served();
}

#[test]
fn a_hung_broker_costs_bounded_time() {
    let net = Net::new(&["host"]);
    let [host] = net.hosts();
    let mut scene = scene(host);
    assert_eq!(scene.call().0, "connected");
    let broker = part(host, "broker");
    kill(broker, Signal::SIGSTOP).unwrap();
    let (how, time) = scene.call();
    kill(broker, Signal::SIGCONT).unwrap();
    assert!(is_refusal(&how), "{how} after {time:?}");
    assert!(time < Duration::from_secs(19), "{time:?}");
    scene.is_served();
}

#[test]
fn programs_of_another_user_are_served_and_cannot_touch_the_state() {
    let net = Net::new(&["host"]);
    let [host] = net.hosts();
    let _scene = scene(host);
    // A daemon that gives up root after it was wrapped.
    let script = "import os, socket\n\
        os.setgid(65534); os.setuid(65534)\n\
        socket.create_connection(('127.0.0.1', 4000), 10).close()\n\
        try: os.listdir(os.environ['STATE'] + '/audit'); print('read the log')\n\
        except PermissionError: print('kept out')\n\
        broker = os.environ['PORTCULLIS_BROKER'].rsplit(':', 1)[0]\n\
        for name in ('control.sock', 'supervisor.sock'):\n    \
            s = socket.socket(socket.AF_UNIX)\n    \
            try: s.connect(os.path.dirname(broker) + '/' + name); print('reached', name)\n    \
            except PermissionError: pass\n";
    let mut run = host.run(&["/usr/bin/python3", "-c", script]);
    let done = Finished::of(run.env("STATE", host.state()));
    assert_eq!((done.stdout.as_str(), done.code()), ("kept out\n", 0), "{}", done.stderr);
    host.record("the call of uid 65534", |r| {
        r["uid"] == 65534 && r["op"] == "connect" && r["verdict"] == "permit"
    });
}
