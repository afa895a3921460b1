//! A run with a policy of its own under a service: it narrows what its tree may, and nobody else's.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::{os::unix::process::CommandExt, path::Path, process::Command};

use nix::{
    libc,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};
use portcullis_tests::{ALLOW_ALL, Finished, Host, Net, Running, eventually, ftp, trust::Trust};
use serde_json::Value;

const NOBODY: u32 = 65534;
const PY: &str = "/usr/bin/python3";

/// A service and what holds its runs.
struct Service<'a> {
    host: &'a Host,
    supervisor: Running,
}

impl<'a> Service<'a> {
    fn start(host: &'a Host, policy: &str, options: &[&str]) -> Self {
        host.policy(policy);
        let supervisor = Running::start(host.supervise(options));
        eventually("the broker serves", || {
            host.portcullis(&["status"]).stdout.contains("generation   ").then_some(())
        });
        Self { host, supervisor }
    }

    /// A run with a policy of its own.
    fn narrowed(&self, policy: &Path, words: &[&str]) -> Command {
        self.host.run_with(&["--policy", policy.to_str().unwrap()], words)
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.host.portcullis(&["status", "--format", "json"]).stdout).unwrap()
    }

    /// The last refusal of a call to this port.
    fn refusal(&self, port: u16) -> Value {
        let far = format!(":{port}");
        let is_it =
            |r: &Value| r["verdict"] == "refuse" && r["remote"].as_str().is_some_and(|at| at.ends_with(&far));
        self.host.record("the refusal", is_it)
    }

    /// Ends it, whoever runs under it, and starts another one.
    fn restart(&mut self, policy: &str, options: &[&str]) {
        self.supervisor.signal(Signal::SIGTERM);
        assert_eq!(self.supervisor.wait(), 0);
        *self = Self::start(self.host, policy, options);
    }

    fn end(mut self) {
        self.supervisor.signal(Signal::SIGTERM);
        assert_eq!(self.supervisor.wait(), 0);
        assert!(self.host.daemons().is_empty());
    }
}

/// A service with this policy on 10.77.0.1, in all ways in which its trees can be held: under the backstop, by the guard
/// alone, by the guard alone as an ordinary user. The far host, 10.77.0.2, has servers at [`PORTS`].
fn everywhere(policy: &str, check: impl Fn(&mut Service<'_>, &Host, &[&str])) {
    let net = Net::new(&["a", "b"]);
    let [host, far] = net.hosts();
    let _servers = servers(far, &PORTS);
    for (uid, options) in [(0, &[][..]), (0, &["--without", "backstop"]), (NOBODY, &[])] {
        let host = host.as_user(uid);
        let mut service = Service::start(&host, policy, options);
        check(&mut service, far, options);
        service.end();
    }
}

/// A server, not wrapped, at these ports.
fn servers(host: &Host, ports: &[u16]) -> Running {
    let script = format!(
        "import socket, select\nall = [socket.create_server(('', p)) for p in {ports:?}]\nkept = []\n\
         print('up', flush=True)\nwhile True:\n    for s in select.select(all, [], [])[0]: kept.append(s.accept())"
    );
    let running = Running::start(host.plain(&[PY, "-c", &script]));
    running.line("up");
    running
}

/// Tries ports and says which of them are there for it; then again for each line that it reads.
fn dials(far: &str, ports: &[u16]) -> String {
    format!(
        "import socket, sys, errno\ndef dial():\n    said = []\n    for p in {ports:?}:\n        s = socket.socket(); s.settimeout(20)\n\
         \x20       try: s.connect(('{far}', p)); said.append('%d:ok' % p)\n\
         \x20       except OSError as e: said.append('%d:%s' % (p, errno.errorcode.get(e.errno, e)))\n\
         \x20   print(*said, flush=True)\ndial()\nfor line in sys.stdin: dial()"
    )
}

const PORTS: [u16; 3] = [8001, 8002, 8003];
const WIDE: &str = "allow tcp/8001-8002(*, *);";
const OWN: &str = "allow tcp/8002-8003(*, *);";

#[test]
fn what_the_service_or_the_run_refuses_is_refused_and_the_record_says_who() {
    everywhere(WIDE, |service, _, options| {
        let a = service.host;
        let own = a.write("own.pol", OWN);
        let dial = dials("10.77.0.2", &PORTS);
        let other = a.start(&[PY, "-c", &dial]);
        other.line("8001:ok 8002:ok 8003:EACCES");
        let said = Finished::of(&mut service.narrowed(&own, &[PY, "-c", &dial])).success();
        assert_eq!(said, "8001:EACCES 8002:ok 8003:EACCES\n", "{options:?}");
        // So are children, orphans, and programs without the shim.
        let dial = a.write("dial.py", &dial);
        let dial = dial.to_str().unwrap();
        let orphan = format!(
            "(setsid {PY} {dial} &) ; sleep 0.1; env -i {PY} {dial}; exec env -u LD_PRELOAD {PY} {dial}"
        );
        let mut tree = service.narrowed(&own, &["sh", "-c", &orphan]);
        tree.stdin(std::process::Stdio::null());
        let said = Finished::of(&mut tree).success();
        assert_eq!(said, "8001:EACCES 8002:ok 8003:EACCES\n".repeat(3), "{options:?}");
        // And nobody else is.
        let said = Finished::of(&mut a.run(&[PY, dial])).success();
        assert_eq!(said, "8001:ok 8002:ok 8003:EACCES\n", "{options:?}");
        let shown = own.to_str().unwrap();
        let by_run = service.refusal(8001);
        assert_eq!(by_run["policy"], shown, "{by_run}");
        assert_eq!(by_run["rule"], Value::Null);
        let why = a.portcullis(&["why", &by_run["seq"].to_string()]).stdout;
        assert!(why.contains(shown) && why.contains("allow tcp/8001"), "{why}");
        let records = a.records();
        let refused = |port: &str| {
            let at = |r: &&Value| {
                r["remote"].as_str().is_some_and(|at| at.ends_with(port)) && r["verdict"] == "refuse"
            };
            records.iter().filter(at).count()
        };
        assert_eq!((refused(":8001"), refused(":8002"), refused(":8003")), (4, 0, 6), "{options:?}");
        let by_service = records.iter().filter(|r| r["verdict"] == "refuse" && r["policy"].is_null()).count();
        assert_eq!(by_service, 6, "the service's own refusals name no policy");
    });
}

/// Its first thread ends, and another one dials.
const HEADLESS: &str = "
import ctypes, errno, os, socket, sys, threading
def dial():
    while 'State:\tZ' not in open('/proc/self/status').read(): pass
    said = []
    for port in sys.argv[2:]:
        s = socket.socket(); s.settimeout(20)
        said.append(port + ':' + errno.errorcode.get(s.connect_ex((sys.argv[1], int(port))), 'ok'))
    print(*said, flush=True)
    os._exit(0)
threading.Thread(target=dial).start()
ctypes.CDLL(None).syscall(60, 0)
";

/// Whoever dials all of [`PORTS`] reaches what the service permits ([`WIDE`]), and narrowed to [`OWN`] what both permit.
fn is_narrowed(service: &Service<'_>, dial: &[&str], options: &[&str]) {
    let own = service.host.write("own.pol", OWN);
    let said = Finished::of(&mut service.host.run(dial)).success();
    assert_eq!(said, "8001:ok 8002:ok 8003:EACCES\n", "control: {options:?}");
    let said = Finished::of(&mut service.narrowed(&own, dial)).success();
    assert_eq!(said, "8001:EACCES 8002:ok 8003:EACCES\n", "{options:?}");
}

#[test]
fn a_process_stays_narrowed_when_its_first_thread_has_ended() {
    everywhere(WIDE, |service, _, options| {
        is_narrowed(service, &[PY, "-c", HEADLESS, "10.77.0.2", "8001", "8002", "8003"], options);
    });
}

#[test]
fn what_need_not_be_asked_again_is_what_both_permit() {
    everywhere("allow tcp/8001-8003(*, IPv4{10.77.0.0/24});", |service, _, options| {
        let a = service.host;
        let own = a.write("own.pol", "allow tcp/8002-8009(*, IPv4{10.0.0.0/8});");
        let dial = dials("10.77.0.2", &[8002, 8002, 8003, 8001, 8002, 8003]);
        let said = Finished::of(&mut service.narrowed(&own, &[PY, "-c", &dial])).success();
        assert_eq!(said, "8002:ok 8002:ok 8003:ok 8001:EACCES 8002:ok 8003:ok\n", "{options:?}");
        let permitted =
            a.records().iter().filter(|r| r["op"] == "connect" && r["verdict"] == "permit").count();
        assert_eq!(permitted, 5, "all on record, {options:?}");
    });
}

#[test]
fn a_related_channel_is_one_for_the_run_that_says_so() {
    everywhere(ALLOW_ALL, |service, far, options| {
        let a = service.host;
        let _daemon = Running::start(far.plain(&ftp::Daemon::Vsftpd.command(far, 1000)));
        far.wait_for_port(21);
        let own = a.write("own.pol", "service ftp = tcp/21, related;\nallow ftp(*, *);");
        let without = a.write("without.pol", "service control = tcp/21;\nallow control(*, *);");
        for (policy, comes) in [(&own, true), (&without, false)] {
            let words = ["curl", "-sS", "--max-time", "20", "-o", "got", "ftp://10.77.0.2/report.bin"];
            let done = Finished::of(service.narrowed(policy, &words).current_dir(a.state()));
            assert_eq!(done.status == 0, comes, "{options:?} {policy:?}: {done}");
        }
    });
}

#[test]
fn the_stronger_lane_of_both_is_taken() {
    let net = Net::new(&["a", "b", "c"]);
    let [a, b, c] = net.hosts();
    const INSIDE: &str = "inside = x509{name=\"*.example.com\"};\nallow tcp/8001(inside, inside);";
    b.policy(INSIDE);
    let _trust = Trust::of(&[a, b]);
    let serve = "import socket\ns = socket.create_server(('', 8001))\nprint('up', flush=True)\n\
        while True: s.accept()[0].sendall(b'hello')";
    let servers = [b.start(&[PY, "-c", serve]), Running::start(c.plain(&[PY, "-c", serve]))];
    servers.iter().for_each(|server| drop(server.line("up")));
    let service = Service::start(a, "allow *(*, *) using plain;", &[]);
    let own = a.write("own.pol", INSIDE);
    let ask = |far| {
        let script = format!("import socket\nprint(socket.create_connection(('{far}', 8001), 6).recv(9))");
        [PY.to_owned(), "-c".to_owned(), script]
    };
    // In plain, as the service has it, a member is not served; nor is, by the run's policy, whoever is no member.
    for (far, whole, narrowed) in [("10.77.0.2", false, true), ("10.77.0.3", true, false)] {
        let hello = |done: Finished| done.stdout == "b'hello'\n";
        let words = ask(far);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        assert_eq!(hello(Finished::of(&mut a.run(&words))), whole, "{far}");
        assert_eq!(hello(Finished::of(&mut service.narrowed(&own, &words))), narrowed, "{far}");
    }
    let protected = a.record("the protected one", |r| r["op"] == "admit");
    assert_eq!((&protected["remote"], &protected["lane"]), (&"10.77.0.2:8001".into(), &"tls".into()));
    service.end();
}

#[test]
fn a_denying_rule_of_either_is_named() {
    everywhere("allow *(*, *);\ndeny tcp/8001(*, *);", |service, _, options| {
        let a = service.host;
        let own = a.write("own.pol", "allow *(*, *);\n\ndeny tcp/8003(*, *);");
        let dial = dials("10.77.0.2", &PORTS);
        let said = Finished::of(&mut service.narrowed(&own, &[PY, "-c", &dial])).success();
        assert_eq!(said, "8001:EACCES 8002:ok 8003:EACCES\n", "{options:?}");
        let by_run = service.refusal(8003);
        assert_eq!(by_run["rule"], "deny tcp/8003(*, *);");
        assert!(by_run["rule_at"].as_str().unwrap().ends_with("own.pol:3"), "{by_run}");
        assert!(service.refusal(8001)["rule_at"].as_str().unwrap().ends_with("policy.pol:2"));
    });
}

#[test]
fn a_mode_of_its_own_tightens_and_never_loosens() {
    let dial = dials("10.77.0.2", &PORTS);
    let would = |r: &Value, port: &str| {
        r["verdict"] == "would-refuse" && r["remote"].as_str().unwrap().ends_with(port)
    };
    everywhere(WIDE, |service, _, options| {
        let a = service.host;
        let own = a.write("own.pol", OWN);
        let loosened = Finished::of(&mut a.run_with(&["--mode", "audit"], &["true"]));
        assert_eq!(loosened.code(), 2, "{loosened}");
        let own_text = own.to_str().unwrap();
        let mut watched = a.run_with(&["--policy", own_text, "--mode", "audit"], &[PY, "-c", &dial]);
        assert_eq!(Finished::of(&mut watched).success(), "8001:ok 8002:ok 8003:EACCES\n", "{options:?}");
        let remark = a.record("what the run's policy would refuse", |r| would(r, ":8001"));
        assert_eq!(remark["policy"], own_text, "{remark}");
        assert_eq!(a.records().iter().filter(|r| r["verdict"] == "would-refuse").count(), 1);
    });
    everywhere(WIDE, |service, _, options| {
        let a = service.host;
        service.restart(WIDE, &[options, &["--mode", "audit"]].concat());
        let own = a.write("own.pol", OWN);
        let watched = Finished::of(&mut a.run(&[PY, "-c", &dial])).success();
        assert_eq!(watched, "8001:ok 8002:ok 8003:ok\n", "{options:?}");
        let mut tightened = a.run_with(&["--mode", "enforce"], &[PY, "-c", &dial]);
        assert_eq!(Finished::of(&mut tightened).success(), "8001:ok 8002:ok 8003:EACCES\n", "{options:?}");
        // What the service only watches is on record for this tree as for others.
        let said = Finished::of(&mut service.narrowed(&own, &[PY, "-c", &dial])).success();
        assert_eq!(said, "8001:EACCES 8002:ok 8003:ok\n", "{options:?}");
        assert_eq!(a.records().iter().filter(|r| r["verdict"] == "would-refuse").count(), 2);
    });
}

#[test]
fn a_changed_policy_of_a_run_cuts_in_its_tree_and_a_broken_one_leaves_the_old() {
    let hold = "import socket, select\nall = {socket.create_connection(('10.77.0.2', p)): p for p in (8001, 8002)}\n\
        print('connected', flush=True)\nwhile all:\n    for s in select.select(list(all), [], [])[0]:\n        \
        print('cut', all.pop(s), flush=True)";
    everywhere(ALLOW_ALL, |service, _, _| {
        let a = service.host;
        let own = a.write("own.pol", "allow tcp/8001-8002(*, *);");
        let mut narrowed = Running::start(service.narrowed(&own, &[PY, "-c", hold]));
        let mut other = a.start(&[PY, "-c", hold]);
        narrowed.line("connected");
        other.line("connected");
        a.write("own.pol", "allow tcp/8001-8002(*, *;");
        let broken = eventually("the diagnostic is shown", || {
            let status = service.status();
            status["layers"][0]["diagnostic"].is_string().then_some(status)
        });
        assert!(broken["layers"][0]["in_force"] == true && broken["diagnostic"].is_null(), "{broken}");
        assert!(!narrowed.has_ended());
        a.write("own.pol", "allow tcp/8002(*, *);");
        narrowed.line("cut 8001");
        let cut = a.record("the cut", |r| r["op"] == "cut");
        assert_eq!(cut["policy"], own.to_str().unwrap(), "{cut}");
        assert!(cut["delay_ms"].as_f64().is_some());
        assert_eq!(a.records().iter().filter(|r| r["op"] == "cut").count(), 1);
        assert!(!narrowed.has_ended() && !other.has_ended());
        drop((narrowed, other));
    });
}

#[test]
fn another_broker_knows_whom_to_narrow() {
    everywhere(WIDE, |service, _, options| {
        let a = service.host;
        let own = a.write("own.pol", OWN);
        let dial = a.write("dial.py", dials("10.77.0.2", &PORTS));
        let words = ["sh", "-c", "while read line; do python3 dial.py < /dev/null; done"];
        let _there = dial;
        let mut narrowed = Running::start(service.narrowed(&own, &words));
        let mut other = a.start(&words);
        for broker in 1..3 {
            for (tree, said) in [
                (&mut narrowed, "8001:EACCES 8002:ok 8003:EACCES"),
                (&mut other, "8001:ok 8002:ok 8003:EACCES"),
            ] {
                tree.say("go\n");
                assert_eq!(tree.line("8001:"), said, "{options:?}, broker {broker}");
            }
            let before = a.broker();
            kill(Pid::from_raw(before), Signal::SIGKILL).unwrap();
            eventually("another broker", || {
                let status = service.status();
                (status["pid"].is_i64() && status["pid"] != before && status["generation"] != 0).then_some(())
            });
        }
        assert_eq!(service.status()["layers"][0]["runs"], 1);
        drop(narrowed);
        eventually("the run is forgotten", || {
            (service.status()["layers"].as_array().unwrap().is_empty()).then_some(())
        });
        drop(other);
    });
}

/// Starts a run and stops it where it has just put its mark under itself.
fn marked(mut run: Command) -> (Running, Pid) {
    #[expect(unsafe_code, reason = "no safe way to be traced from the start")]
    // SAFETY: ptrace(2) is a system call, which a forked child may make.
    unsafe {
        run.pre_exec(|| Ok(ptrace::traceme()?));
    }
    let running = Running::start(run);
    let pid = Pid::from_raw(running.pid());
    waitpid(pid, None).unwrap(); // its first execve(2)
    ptrace::setoptions(pid, Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL).unwrap();
    let mut signal = None;
    loop {
        ptrace::syscall(pid, signal.take()).unwrap();
        match waitpid(pid, None).unwrap() {
            WaitStatus::PtraceSyscall(_) => {
                let at = ptrace::getregs(pid).unwrap();
                let logs = at.rsi == libc::SECCOMP_FILTER_FLAG_LOG;
                if i64::try_from(at.orig_rax) == Ok(libc::SYS_seccomp) && logs && at.rax == 0 {
                    return (running, pid);
                }
            }
            WaitStatus::Stopped(_, Signal::SIGTRAP) => {} // execve(2)
            WaitStatus::Stopped(_, other) => signal = Some(other),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_broker_that_dies_before_it_has_seen_a_mark_leaves_no_run_refused() {
    let net = Net::new(&["a", "b"]);
    let [a, b] = net.hosts();
    let _servers = servers(b, &PORTS);
    // It is told of the mark and does not look; or it has ended by then, and the next one meets the mark.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        let host = a.as_user(0);
        let service = Service::start(&host, WIDE, &[]);
        let own = host.write("own.pol", OWN);
        let (running, pid) = marked(service.narrowed(&own, &[PY, "-c", &dials("10.77.0.2", &PORTS)]));
        let broker = Pid::from_raw(host.broker());
        kill(broker, signal).unwrap();
        ptrace::detach(pid, None).unwrap();
        if signal == Signal::SIGSTOP {
            // However far the run comes meanwhile.
            std::thread::sleep(std::time::Duration::from_millis(300));
            kill(broker, Signal::SIGKILL).unwrap();
        }
        assert_eq!(running.line("8001:"), "8001:EACCES 8002:ok 8003:EACCES", "{signal}");
        drop(running);
        service.end();
    }
}

const OWN_FILTER: &str = "
import ctypes, struct
permit = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))
program = struct.pack('HxxxxxxQ', 1, ctypes.addressof(permit))
assert ctypes.CDLL(None).syscall(317, 1, 2, program) == 0
";

#[test]
fn a_programs_own_filter_that_logs_is_no_mark() {
    everywhere(WIDE, |service, _, options| {
        let script = format!("{OWN_FILTER}{}", dials("10.77.0.2", &PORTS));
        is_narrowed(service, &[PY, "-c", &script], options);
    });
}

#[test]
fn a_tree_whose_policy_is_lost_is_refused_and_not_widened() {
    everywhere(ALLOW_ALL, |service, _, options| {
        let a = service.host;
        let own = a.write("own.pol", OWN);
        a.write("dial.py", dials("10.77.0.2", &PORTS));
        let words = ["sh", "-c", "while read line; do python3 dial.py < /dev/null; done"];
        let mut narrowed = Running::start(service.narrowed(&own, &words));
        narrowed.say("go\n");
        assert_eq!(narrowed.line("8001:"), "8001:EACCES 8002:ok 8003:ok", "{options:?}");
        service.restart(ALLOW_ALL, options);
        narrowed.say("go\n");
        assert!(!narrowed.line("8001:").contains("ok"), "{options:?}");
        if options.is_empty() && !a.is_ordinary() {
            let lost = a.record("the reason", |r| {
                r["reason"].as_str().is_some_and(|it| it.contains("went with the service"))
            });
            assert_eq!(lost["verdict"], "refuse", "{lost}");
        }
        let said = Finished::of(&mut a.run(&[PY, "dial.py"])).success();
        assert_eq!(said, "8001:ok 8002:ok 8003:ok\n", "{options:?}");
        drop(narrowed);
    });
}

#[test]
fn a_run_within_a_run_is_narrowed_by_both() {
    let net = Net::new(&["a", "b"]);
    let [_, b] = net.hosts();
    let _servers = servers(b, &[8001, 8002, 8003, 8004]);
    let [a, _] = net.hosts();
    let a = &a.as_user(0);
    let service = Service::start(a, "allow tcp/8001-8003(*, *);", &[]);
    a.write("outer.pol", "allow tcp/8002-8004(*, *);");
    a.write("inner.pol", "allow tcp/8001(*, *);\nallow tcp/8003-8004(*, *);");
    a.write("dial.py", dials("10.77.0.2", &[8001, 8002, 8003, 8004]));
    let state = a.state();
    let run = format!("{} run --state {}", a.path("portcullis").display(), state.display());
    let script = format!(
        "python3 dial.py; {run} --policy inner.pol -- sh -c 'python3 dial.py; {run} -- python3 dial.py'; \
         {run} --policy inner.pol -- python3 dial.py; python3 dial.py"
    );
    let outer = a.path("outer.pol");
    let said = Finished::of(&mut service.narrowed(&outer, &["sh", "-c", &script])).success();
    let by_outer = "8001:EACCES 8002:ok 8003:ok 8004:EACCES\n";
    let by_both = "8001:EACCES 8002:EACCES 8003:ok 8004:EACCES\n";
    assert_eq!(said, [by_outer, by_both, by_both, by_both, by_outer].concat());
    // Within a run that is not narrowed, too; and no mark of one that is over narrows the next.
    let script = format!(
        "{run} --policy inner.pol -- python3 dial.py; {run} --policy outer.pol -- python3 dial.py; python3 dial.py"
    );
    let said = Finished::of(&mut a.run(&["sh", "-c", &script])).success();
    let by_inner = "8001:ok 8002:EACCES 8003:ok 8004:EACCES\n";
    assert_eq!(said, [by_inner, by_outer, "8001:ok 8002:ok 8003:ok 8004:EACCES\n"].concat());
    service.end();
    // Where only the guard tells trees apart it is refused by name.
    for (uid, options) in [(0, ["--without", "backstop"].as_slice()), (NOBODY, &[])] {
        let [a, _] = net.hosts();
        let a = &a.as_user(uid);
        let service = Service::start(a, ALLOW_ALL, options);
        let inner = a.write("inner.pol", "allow tcp/8001(*, *);");
        let (program, state) = (a.path("portcullis"), a.state());
        let [program, state, inner] = [&program, &state, &inner].map(|path| path.to_str().unwrap());
        let nested = [program, "run", "--state", state, "--policy", inner, "--", "true"];
        let refused = Finished::of(&mut a.run(&nested));
        assert_eq!(refused.code(), 2, "{refused}");
        assert!(refused.stderr.contains("give them to the outer run"), "{refused}");
        service.end();
    }
}

#[test]
fn a_listener_is_there_for_whom_both_let_in() {
    let net = Net::new(&["a", "b", "c"]);
    let [a, b, c] = net.hosts();
    let serve = "import socket\ns = socket.create_server(('', 8001))\nprint('up', flush=True)\nwhile True: s.accept()[0].sendall(b'hello')";
    let meets = |host: &Host| {
        let script = "import socket\ntry: print(socket.create_connection(('10.77.0.1', 8001), 2).recv(9))\nexcept OSError as e: print('none')";
        Finished::of(&mut host.plain(&[PY, "-c", script])).success().trim().to_owned()
    };
    for uid in [0, NOBODY] {
        let a = &a.as_user(uid);
        let service = Service::start(a, "allow tcp/8001(IPv4{10.77.0.2, 10.77.0.3}, *);", &[]);
        let own = a.write("own.pol", "allow tcp/8001(IPv4{10.77.0.0/29} & !IPv4{10.77.0.3}, *);");
        let other = a.start(&[PY, "-c", serve]);
        other.line("up");
        assert_eq!((meets(b), meets(c)), ("b'hello'".into(), "b'hello'".into()), "the control, {uid}");
        drop(other);
        let narrowed = Running::start(service.narrowed(&own, &[PY, "-c", serve]));
        narrowed.line("up");
        assert_eq!(meets(b), "b'hello'", "{uid}");
        assert!(["none", "b''"].contains(&meets(c).as_str()), "{uid}");
        let stranger = a.record("the stranger", |r| r["op"] == "accept" && r["verdict"] == "refuse");
        assert_eq!(stranger["policy"], own.to_str().unwrap(), "{stranger}");
        drop(narrowed);
        // A port that the run's policy knows nothing of cannot be listened at.
        let closed = a.write("closed.pol", "allow tcp/8002(*, *);");
        let refused = Finished::of(&mut service.narrowed(&closed, &[PY, "-c", serve]));
        assert!(refused.stderr.contains("Permission denied"), "{refused}");
        service.end();
    }
}

#[test]
fn a_policy_that_cannot_be_used_is_shown_and_nothing_runs() {
    let host = Host::here();
    let service = Service::start(&host, ALLOW_ALL, &[]);
    let broken = host.write("broken.pol", "allow tcp/80(*, *;");
    let refused = Finished::of(&mut service.narrowed(&broken, &["echo", "ran"]));
    assert_eq!((refused.code(), refused.stdout.as_str()), (125, ""), "{refused}");
    assert!(refused.stderr.contains("broken.pol:1:"), "{refused}");
    let fine = host.write("fine.pol", "allow tcp(*, *);");
    assert_eq!(Finished::of(&mut service.narrowed(&fine, &["echo", "ran"])).success(), "ran\n");
    let shown = Running::start(service.narrowed(&fine, &["sh", "-c", "echo up; exec sleep 1000"]));
    shown.line("up");
    let rows: Value = serde_json::from_str(&host.portcullis(&["ps", "--format", "json"]).stdout).unwrap();
    assert_eq!(rows[0]["narrowed_by"], serde_json::json!([fine.to_str().unwrap()]), "{rows}");
    assert!(host.portcullis(&["status"]).stdout.contains(&format!("narrowed by  {}", fine.display())));
    drop(shown);
    service.end();
}
