//! A wrapped program neither ends nor stops what holds it, whoever it is; to all others it may send what it could.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::{
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use portcullis_tests::{ALLOW_ALL, Finished, Host, Running, built, eventually};

/// For each line `HOW PID SIGNAL` on its standard input, sends that, and says what came of it.
const SENDER: &str = r#"
import ctypes, fcntl, os, resource, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    if libc.syscall(number, *args) < 0: raise OSError(ctypes.get_errno(), '')
info = ctypes.create_string_buffer(128)
def owned(pid, n):
    one, other = socket.socketpair()
    fcntl.fcntl(one, fcntl.F_SETOWN, pid)
    fcntl.fcntl(one, 10, n) # F_SETSIG
    fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC)
    other.send(b'x')
def limit(pid, n): # SIGKILL, at the hard limit
    resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1))
ways = {
    'owned': owned,
    'limit': limit,
    'group by pidfd': lambda pid, n: call(424, os.pidfd_open(os.getpgid(pid)), n, None, 4),
    'join': lambda pid, n: os.setpgid(0, pid),
    'own group': lambda pid, n: os.kill(0, n),
    'kill': lambda pid, n: os.kill(pid, n),
    'group': lambda pid, n: os.kill(-os.getpgid(pid), n),
    'all': lambda pid, n: os.kill(-1, n),
    'tkill': lambda pid, n: call(200, pid, n),
    'tgkill': lambda pid, n: call(234, pid, pid, n),
    'queue': lambda pid, n: call(129, pid, n, (info.__setitem__(slice(8, 12), b'\xff' * 4), info)[1]),
    'pidfd': lambda pid, n: signal.pidfd_send_signal(os.pidfd_open(pid), n),
    'folder': lambda pid, n: signal.pidfd_send_signal(os.open(f'/proc/{pid}', os.O_RDONLY), n),
}
print('ready', flush=True)
for line in sys.stdin:
    how, pid, n = line.rsplit(maxsplit=2)
    try: ways[how](int(pid), int(n)); print('told', how, 0, flush=True)
    except OSError as e: print('told', how, e.errno, flush=True)
"#;

struct Sender(Running);

impl Sender {
    fn start(command: Command) -> Self {
        let running = Running::start(command);
        running.line("ready");
        Self(running)
    }

    fn send(&mut self, how: &str, pid: i32, signal: Signal) -> i32 {
        self.0.say(&format!("{how} {pid} {}\n", signal as i32));
        self.0.line("told").rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// A process that is not wrapped, in a group of its own, and its number.
fn bystander(host: &Host) -> (Child, i32) {
    let child = host.plain(&["sleep", "60"]).stdout(Stdio::null()).process_group(0).spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    // Its user and its group are its own once it runs.
    eventually("it runs", || {
        (std::fs::read_link(format!("/proc/{pid}/exe")).ok()?.ends_with("sleep")).then_some(())
    });
    (child, pid)
}

const WAYS: [&str; 7] = ["kill", "group", "tkill", "tgkill", "queue", "pidfd", "folder"];
const ENDING: [Signal; 4] = [Signal::SIGKILL, Signal::SIGSTOP, Signal::SIGTERM, Signal::SIGINT];

fn all_others_can_be_ended(host: &Host, sender: &mut Sender) {
    for how in WAYS {
        let (mut other, pid) = bystander(host);
        assert_eq!(sender.send(how, pid, Signal::SIGKILL), 0, "{how}");
        assert!(!other.wait().unwrap().success());
    }
    let (mut other, pid) = bystander(host);
    assert_eq!(sender.send("limit", pid, Signal::SIGKILL), 0);
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    assert!(
        limits.lines().any(|l| l.split_whitespace().eq(["Max", "cpu", "time", "1", "1", "seconds"])),
        "{limits}"
    );
    other.kill().unwrap();
    other.wait().unwrap();
}

fn ours_cannot(host: &Host, sender: &mut Sender) {
    let before = host.daemons();
    assert!(before.len() >= 2, "{before:?}");
    let refused = nix::libc::EPERM;
    for (pid, name) in &before {
        for how in WAYS {
            for signal in ENDING {
                assert_eq!(sender.send(how, *pid, signal), refused, "{how} {signal} to {name}");
            }
        }
        assert_eq!(sender.send("limit", *pid, Signal::SIGKILL), refused, "{name}");
        for signal in ENDING {
            assert_eq!(sender.send("owned", *pid, signal), refused, "{signal} to {name}");
        }
        // Those that the guard does not ask about are not heard.
        assert_eq!(sender.send("owned", *pid, Signal::SIGUSR1), 0, "{name}");
        for signal in [Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGSEGV, Signal::SIGABRT, Signal::SIGTSTP] {
            assert_eq!(sender.send("kill", *pid, signal), 0, "{signal} to {name}");
        }
    }
    assert_eq!(host.daemons(), before);
    let stopped =
        |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap().contains("T (stopped)");
    assert!(!before.iter().any(|(pid, _)| stopped(*pid)));
    host.record("what was refused", |r| {
        r["op"] == "signal" && r["verdict"] == "refuse" && r["via"] == "guard"
    });
}

#[test]
fn root_inside_a_tree_ends_others_but_not_what_holds_it() {
    for backstop in [true, false] {
        let host = Host::here();
        host.policy(ALLOW_ALL);
        let mut command = host.run(&["/usr/bin/python3", "-c", SENDER]);
        if !backstop {
            command.env("PORTCULLIS_NO_BACKSTOP", "1");
        }
        let mut sender = Sender::start(command);
        all_others_can_be_ended(&host, &mut sender);
        ours_cannot(&host, &mut sender);
        // From outside, all can be ended, and the rest comes back.
        let keyd = host.daemons().into_iter().find(|(_, name)| name == "keyd").unwrap().0;
        kill(Pid::from_raw(keyd), Signal::SIGKILL).unwrap();
        eventually("another key daemon", || {
            host.daemons().into_iter().find(|(pid, name)| name == "keyd" && *pid != keyd)
        });
        drop(sender);
        eventually("all have ended", || host.daemons().is_empty().then_some(()));
    }
}

#[test]
fn a_user_inside_a_tree_ends_others_but_not_what_holds_it() {
    let host = Host::here().as_user(61_993);
    host.policy(ALLOW_ALL);
    let mut sender = Sender::start(host.run(&["/usr/bin/python3", "-c", SENDER]));
    all_others_can_be_ended(&host, &mut sender);
    ours_cannot(&host, &mut sender);
    // Everything that this user has, what holds it included.
    assert_eq!(sender.send("all", 1, Signal::SIGTERM), nix::libc::EPERM);
    drop(sender);
    eventually("all have ended", || host.daemons().is_empty().then_some(()));
}

#[test]
fn who_has_no_power_over_what_holds_it_may_send_to_all() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let as_other = ["setpriv", "--reuid=61994", "--regid=61994", "--clear-groups", "--", "/usr/bin/python3"];
    let mut sender = Sender::start(host.run(&[&as_other[..], &["-c", SENDER]].concat()));
    let before = host.daemons();
    let mut other =
        host.plain(&[&as_other[..5], &["sleep", "60"]].concat()).stdout(Stdio::null()).spawn().unwrap();
    let pid = i32::try_from(other.id()).unwrap();
    eventually("it runs", || {
        (std::fs::read_link(format!("/proc/{pid}/exe")).ok()?.ends_with("sleep")).then_some(())
    });
    assert_eq!(sender.send("all", 1, Signal::SIGKILL), 0);
    assert!(!other.wait().unwrap().success());
    assert_eq!(host.daemons(), before);
}

#[test]
fn a_supervisor_that_was_started_beside_a_program_does_not_end_with_its_group() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let (program, state, policy) = (built::portcullis(), host.state(), host.path("policy.pol"));
    let words = [
        "supervise".as_ref(),
        "--state".as_ref(),
        state.as_os_str(),
        "--policy".as_ref(),
        policy.as_os_str(),
    ];
    let supervise = host.plain(&[&[program.as_os_str()], &words[..]].concat());
    let supervisor = Running::start(supervise);
    eventually("the broker serves", || {
        host.portcullis(&["status"]).stdout.contains("generation   1").then_some(())
    });
    let mut sender = Sender::start(host.run(&["/usr/bin/python3", "-c", SENDER]));
    // As a script has them, without job control.
    assert_eq!(sender.send("join", supervisor.pid(), Signal::SIGKILL), 0);
    let before = host.daemons();
    assert_eq!(before.len(), 3, "{before:?}");
    for how in ["own group", "group by pidfd", "group"] {
        assert_eq!(sender.send(how, supervisor.pid(), Signal::SIGKILL), nix::libc::EPERM, "{how}");
    }
    assert_eq!(host.daemons(), before);
}

/// Sends itself what the guard asks about, while a timer's handler runs all the time.
const INTERRUPTED: &str = "
import ctypes, os, signal, threading
signal.signal(signal.SIGALRM, lambda *_: None)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
queue = ctypes.CDLL(None, use_errno=True).sigqueue
for _ in range(1000):
    os.kill(os.getpid(), signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    assert queue(os.getpid(), signal.SIGTERM, None) == 0, ctypes.get_errno()
signal.setitimer(signal.ITIMER_REAL, 0)
";

const QUEUED: &str = "
import ctypes, os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
assert ctypes.CDLL(None).sigqueue(os.getpid(), signal.SIGTERM, ctypes.c_void_p(7)) == 0
info = signal.sigwaitinfo([signal.SIGTERM])
assert (info.si_code, info.si_pid, info.si_uid) == (-1, os.getpid(), os.getuid()), info
print('as sent')
";

#[test]
fn a_handler_that_runs_meanwhile_keeps_no_signal_from_being_sent() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    Finished::of(&mut host.run(&["/usr/bin/python3", "-c", INTERRUPTED])).success();
    // What a queued signal brings along is what the sender gave.
    assert_eq!(Finished::of(&mut host.run(&["/usr/bin/python3", "-c", QUEUED])).success(), "as sent\n");
}
