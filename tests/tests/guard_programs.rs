//! Programs of other toolchains, which have no shim in them, and programs that drop it: served where the policy
//! permits, refused where it does not, under every kind of hold.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::OwnedFd,
        unix::fs::{PermissionsExt, chown},
    },
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{Backlog, listen},
    },
    unistd::Pid,
};
use portcullis_tests::{ALLOW_ALL, Finished, Host, Net, Running, built};
use serde_json::Value;

const NOBODY: u32 = 65534;

/// Connects to a port of 127.0.0.1, or writes to the descriptor that a second word names.
const C: &str = r#"
#include <arpa/inet.h>
#include <stdlib.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int n, char **words) {
	struct sockaddr_in to = { AF_INET, htons(atoi(words[1])), { inet_addr("127.0.0.1") } };
	int fd = n > 2 ? atoi(words[2]) : socket(AF_INET, SOCK_STREAM, 0);
	printf("%s\n", geteuid() ? "ordinary" : "root");
	printf("%s\n", socket(AF_INET, SOCK_RAW, 1) < 0 ? "no raw socket" : "raw socket");
	if (n == 2 && connect(fd, (void *)&to, sizeof to)) return perror("connect"), 1;
	return write(fd, "x", 1) != 1;
}
"#;

const RUST: &str = r#"fn main() { std::net::TcpStream::connect(("127.0.0.1", std::env::args().nth(1).unwrap().parse().unwrap())).unwrap(); }"#;

fn c(host: &Host, compiler: &str, options: &[&str], name: &str) -> String {
    let (source, program) = (host.write("dial.c", C), host.path(name));
    let mut command = Command::new(compiler);
    let _built = Finished::of(command.args(options).args(["-w", "-o"]).arg(&program).arg(source)).success();
    program.to_str().unwrap().to_owned()
}

fn rust(host: &Host) -> String {
    let (source, program) = (host.write("dial.rs", RUST), host.path("dial-rust"));
    let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["--edition=2024", "-Ctarget-feature=+crt-static"]);
    let _built = Finished::of(command.arg("-o").arg(&program).arg(source)).success();
    program.to_str().unwrap().to_owned()
}

/// Root's runs with the backstop and without, and an ordinary user's.
fn holds() -> [(Host, &'static str); 3] {
    let here = Host::here();
    let user = here.as_user(NOBODY);
    [(here, "0"), (Host::here(), "1"), (user, "1")]
}

fn run(host: &Host, alone: &str, words: &[&str]) -> Finished {
    let mut command = host.run(words);
    command.env("PORTCULLIS_NO_BACKSTOP", alone);
    Finished::of(&mut command)
}

/// Somewhere to connect to; whoever comes is closed at once.
struct Door {
    listener: TcpListener,
    port: u16,
}

impl Door {
    fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        Self { listener, port }
    }

    /// How many come while something is done.
    fn count<T>(&self, what: impl FnOnce() -> T) -> (T, usize) {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let counted = scope.spawn(|| {
                let mut count = 0;
                loop {
                    let last = done.load(Relaxed);
                    while self.listener.accept().is_ok() {
                        count += 1;
                    }
                    if last {
                        return count;
                    }
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            });
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(what));
            done.store(true, Relaxed);
            let count = counted.join().unwrap();
            (result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), count)
        })
    }
}

/// That a program is refused, on record, and then permitted and served.
fn held_and_served(host: &Host, alone: &str, exe: &str, words: &[&str], via: &[&str]) {
    let door = Door::open();
    let at = words.iter().map(|word| word.replace("PORT", &door.port.to_string())).collect::<Vec<_>>();
    let words: Vec<&str> = at.iter().map(String::as_str).collect();
    let far = format!("127.0.0.1:{}", door.port);
    for (policy, verdict, arrive) in [("allow tcp/9(*, *);", "refuse", 0), (ALLOW_ALL, "permit", 1)] {
        host.policy(policy);
        let (ran, came) = door.count(|| run(host, alone, &words));
        assert_eq!(came, arrive, "{words:?} under `{policy}`: {ran}");
        let is = |r: &Value| r["op"] == "connect" && r["remote"] == far.as_str() && r["verdict"] == verdict;
        let record = host.record(verdict, is);
        assert_eq!(record["exe"], Path::new(exe).canonicalize().unwrap().to_str().unwrap(), "{record}");
        assert!(record["via"].as_str().is_some_and(|v| via.contains(&v)), "{record}");
    }
}

#[test]
fn static_programs_of_every_toolchain_are_held_and_served() {
    for (host, alone) in holds() {
        let programs = [
            c(&host, "cc", &["-static"], "dial-glibc"),
            c(&host, "cc", &["-static-pie"], "dial-pie"),
            c(&host, "musl-gcc", &["-static"], "dial-musl"),
            rust(&host),
        ];
        for program in &programs {
            held_and_served(&host, alone, program, &[program, "PORT"], &["guard"]);
        }
        let busybox = "/bin/busybox";
        held_and_served(
            &host,
            alone,
            busybox,
            &[busybox, "wget", "-qO-", "http://127.0.0.1:PORT/"],
            &["guard"],
        );
        // Written in Go, without libc: its runtime makes threads and sockets by itself.
        held_and_served(
            &host,
            alone,
            "/usr/bin/certinfo",
            &["/usr/bin/certinfo", "127.0.0.1:PORT"],
            &["guard"],
        );
    }
}

#[test]
fn programs_whose_files_give_privileges_are_held_and_keep_them_under_root() {
    for (host, alone) in holds() {
        let is_root = !host.is_ordinary();
        let set = c(&host, "cc", &[], "dial-setuid");
        chown(&set, Some(0), Some(0)).unwrap();
        std::fs::set_permissions(&set, PermissionsExt::from_mode(0o4755)).unwrap();
        let capable = c(&host, "cc", &[], "dial-capable");
        // `struct vfs_cap_data` (linux/capability.h), version 2: CAP_NET_RAW, effective at once.
        let give = "import os, struct, sys; \
            os.setxattr(sys.argv[1], 'security.capability', struct.pack('<5I', 0x02000001, 1 << 13, 0, 0, 0))";
        let _given = Finished::of(Command::new("python3").args(["-c", give, &capable])).success();
        for program in [&set, &capable] {
            let mut words = vec!["setpriv", "--reuid=65534", "--clear-groups", program, "PORT"];
            if !is_root {
                words.drain(..3);
            }
            // With privileges it has no shim. An ordinary user's run gives none (no_new_privs), so there it may have one.
            let via = if is_root { &["guard"][..] } else { &["guard", "shim"] };
            held_and_served(&host, alone, program, &words, via);
        }
        // Under ALLOW_ALL: what each of them may do.
        let door = Door::open();
        let port = door.port.to_string();
        let said = |program: &String| {
            let mut words = vec!["setpriv", "--reuid=65534", "--clear-groups", program.as_str(), &port];
            if !is_root {
                words.drain(..3);
            }
            door.count(|| run(&host, alone, &words)).0.success()
        };
        let (of_set, of_capable) = if is_root {
            ("root\nraw socket\n", "ordinary\nraw socket\n")
        } else {
            ("ordinary\nno raw socket\n", "ordinary\nno raw socket\n")
        };
        assert_eq!((said(&set).as_str(), said(&capable).as_str()), (of_set, of_capable));
    }
}

#[test]
fn a_connection_that_a_program_begins_with_is_judged_before_its_first_instruction() {
    for (host, alone) in holds() {
        for options in [&["-static"][..], &[]] {
            let program = c(&host, "cc", options, "write");
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let at = listener.local_addr().unwrap();
            for (policy, verdict) in [("allow tcp/9(*, *);", "refuse"), (ALLOW_ALL, "permit")] {
                host.policy(policy);
                let ours = TcpStream::connect(at).unwrap();
                let (mut far, _) = listener.accept().unwrap();
                // By a shell of its own: whatever else this process starts meanwhile must not have it.
                let wrapped = host.run(&[&program, "9", "7"]);
                let mut command = Command::new("/bin/sh");
                command.args(["-c", "exec 7<&0 < /dev/null; exec \"$@\"", "sh"]).arg(wrapped.get_program());
                command.args(wrapped.get_args()).env("PORTCULLIS_NO_BACKSTOP", alone);
                let ran = Finished::of(command.current_dir(host.path("")).stdin(OwnedFd::from(ours)));
                drop(command);
                let mut got = Vec::new();
                let _reset = far.read_to_end(&mut got);
                let is = |r: &Value| {
                    r["op"] == "connect" && r["remote"] == at.to_string() && r["verdict"] == verdict
                };
                let record = host.record(verdict, is);
                assert_eq!((&record["exe"], &record["via"]), (&program.as_str().into(), &"guard".into()));
                assert_eq!(host.records().iter().filter(|r| is(r)).count(), 1, "once, shim or not");
                let permitted = verdict == "permit";
                assert_eq!(got, if permitted { b"x".as_slice() } else { b"" }, "{verdict} {options:?}");
                assert_eq!(ran.code() == 0, permitted, "{ran}");
            }
        }
    }
}

/// Opens connections to a port, and becomes a program that has all of them.
const MANY: &str = "
import os, socket, sys
far = [socket.create_connection(('127.0.0.1', int(sys.argv[1]))) for _ in range(14)]
for one in far: one.set_inheritable(True)
os.environ['NUMBERS'] = ' '.join(str(one.fileno()) for one in far)
os.execv(sys.argv[2], sys.argv[2:])
";

#[test]
fn all_connections_that_a_program_begins_with_are_judged_where_there_is_little_room_for_them() {
    for (policy, arrive) in [("allow tcp/9(*, *);", 0), (ALLOW_ALL, 14)] {
        let host = Host::here();
        host.policy(policy);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let run =
            host.run(&["/bin/busybox", "sh", "-c", "for n in $NUMBERS; do echo x >&$n; done 2>/dev/null"]);
        // What holds it has this limit too: not room for all at once.
        let limited = "ulimit -n 36; exec \"$@\"";
        let mut command = host.plain(&["sh", "-c", limited, "sh", "/usr/bin/python3", "-c", MANY, &port]);
        let ran = Finished::of(command.arg(run.get_program()).args(run.get_args()));
        let came = (0..14).map(|_| listener.accept().unwrap().0);
        let arrived = came.filter(|mut one| matches!(one.read(&mut [0]), Ok(1))).count();
        assert_eq!(arrived, arrive, "{policy}: {ran}");
    }
}

/// Begins a connection to a port, and becomes a program that has it as its descriptor 9.
const OPENING: &str = "
import errno, os, socket, sys
far = socket.socket(); far.setblocking(False)
assert far.connect_ex(('127.0.0.1', int(sys.argv[1]))) == errno.EINPROGRESS
far.setblocking(True)
os.dup2(far.fileno(), 9)
os.execvp(sys.argv[2], sys.argv[2:])
";

#[test]
fn a_connection_that_is_not_up_yet_when_a_program_begins_is_judged_too() {
    for (host, alone) in holds() {
        for (policy, verdict) in [("allow tcp/9(*, *);", "refuse"), (ALLOW_ALL, "permit")] {
            host.policy(policy);
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let at = listener.local_addr().unwrap();
            // Room for one: the next SYN is dropped, and sent again after a second.
            listen(&listener, Backlog::new(0).unwrap()).unwrap();
            let _fills = TcpStream::connect(at).unwrap();
            let run = host.run(&["/bin/busybox", "sh", "-c", "echo x >&9"]);
            let mut command = Command::new("/usr/bin/python3");
            command.args(["-c", OPENING, &at.port().to_string()]);
            command.arg(run.get_program()).args(run.get_args()).env("PORTCULLIS_NO_BACKSTOP", alone);
            let mut ran = Running::start(command);
            let record = host.record(verdict, |r| r["op"] == "connect" && r["remote"] == at.to_string());
            assert_eq!((&record["verdict"], &record["via"]), (&verdict.into(), &"guard".into()));
            if verdict == "permit" {
                listener.accept().unwrap();
                let (mut came, mut got) = (listener.accept().unwrap().0, Vec::new());
                came.read_to_end(&mut got).unwrap();
                assert_eq!(got, b"x\n");
            }
            assert_eq!(ran.wait() == 0, verdict == "permit");
        }
    }
}

#[test]
fn what_waits_in_a_refused_connection_is_not_read() {
    for (policy, verdict, read) in [("allow tcp/9(*, *);", "refuse", ""), (ALLOW_ALL, "permit", "a secret")] {
        let host = Host::here();
        host.policy(policy);
        let (mut command, _far) = with_a_secret(&host, "/bin/busybox");
        assert_eq!(Finished::of(&mut command).success(), read, "{verdict}");
        host.record(verdict, |r| r["op"] == "accept" && r["verdict"] == verdict);
    }
}

/// Busybox's cat(1) with a connection in which something waits to be read, and who made that connection.
fn with_a_secret(host: &Host, program: &str) -> (Command, (TcpListener, TcpStream)) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    far.write_all(b"a secret").unwrap();
    far.shutdown(std::net::Shutdown::Write).unwrap();
    let (near, _) = listener.accept().unwrap();
    let mut command = host.run(&[program, "cat"]);
    command.stdin(OwnedFd::from(near));
    (command, (listener, far))
}

#[test]
fn a_program_that_cannot_be_looked_into_does_not_begin_with_a_connection() {
    let host = Host::here().as_user(NOBODY);
    host.policy(ALLOW_ALL);
    let program = host.path("busybox");
    built::copy("/bin/busybox".as_ref(), &program);
    let ran = |mode| {
        std::fs::set_permissions(&program, PermissionsExt::from_mode(mode)).unwrap();
        let (mut command, _far) = with_a_secret(&host, program.to_str().unwrap());
        Finished::of(&mut command)
    };
    assert_eq!(ran(0o755).success(), "a secret", "the control");
    // Whose file cannot be read is nobody's to look into but root's.
    let unread = ran(0o711);
    assert_eq!((unread.stdout.as_str(), unread.code() == 0), ("", false), "{unread}");
    host.record("why", |r| r["reason"].to_string().contains("begins with cannot be looked at"));
}

#[test]
fn a_program_begins_with_nothing_that_nobody_has_judged() {
    let host = Host::here();
    host.policy("allow tcp/9(*, *);");
    let keeps = host.start(&["sh", "-c", "echo up; read x"]);
    keeps.line("up");
    let (mut command, _far) = with_a_secret(&host, "/bin/busybox");
    // Stopped before the program begins, and replaced sooner or later.
    kill(Pid::from_raw(host.broker()), Signal::SIGSTOP).unwrap();
    let ran = Finished::of(&mut command);
    assert_eq!(ran.stdout, "", "{ran}");
}

const GREETER: &str = r#"
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>
int main() {
	puts("up");
	fflush(stdout);
	for (;;) {
		int fd = accept(9, 0, 0);
		write(fd, "hello", 5);
		close(fd);
	}
}
"#;

#[test]
fn a_listener_that_a_static_program_begins_with_is_filtered_before_its_first_instruction() {
    let net = Net::new(&["server", "friend", "stranger"]);
    let [server, friend, stranger] = net.hosts();
    let (source, program) = (server.write("greeter.c", GREETER), server.path("greeter"));
    let _built =
        Finished::of(Command::new("cc").args(["-static", "-w", "-o"]).arg(&program).arg(source)).success();
    for alone in ["0", "1"] {
        for (policy, there) in [(ALLOW_ALL, "open"), ("allow tcp/8001(IPv4{10.77.0.2}, *);", "filtered")] {
            server.policy(policy);
            let run = server.run(&[program.to_str().unwrap()]);
            let words: Vec<String> = run.get_args().map(|word| word.to_str().unwrap().to_owned()).collect();
            // As a service manager does it.
            let begin = "import os, socket, sys\ns = socket.create_server(('', 8001))\nos.dup2(s.fileno(), 9)\n\
                os.execvp(sys.argv[1], sys.argv[1:])";
            let run = words.iter().position(|word| word == "--").unwrap() + 1;
            let line = [&["/usr/bin/python3", "-c", begin].map(str::to_owned), &words[run..]].concat();
            let mut command = server.plain(&line);
            command.env("PORTCULLIS_NO_BACKSTOP", alone);
            let running = Running::start(command);
            running.line("up");
            assert_eq!(friend.sees("10.77.0.1", 8001), "open", "{policy}, {alone}");
            assert_eq!(stranger.sees("10.77.0.1", 8001), there, "{policy}, {alone}");
            drop(running);
            portcullis_tests::eventually("all is over", || server.daemons().is_empty().then_some(()));
        }
    }
    let took = |r: &Value| r["op"] == "listen" && r["verdict"] == "permit" && r["via"] == "guard";
    assert_eq!(server.records().iter().filter(|r| took(r)).count(), 4);
    server.record("the stranger", |r| r["op"] == "accept" && r["via"] == "filter");
}
