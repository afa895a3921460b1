//! The log: nothing lost in silence, whatever happens to disk and broker.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::process::Command;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use portcullis_tests::{ALLOW_ALL, Finished, Host, Net, Running, eventually, ftp};
use serde_json::Value;

const PY: &str = "/usr/bin/python3";

/// Says `ok` for each line it reads, if it could listen, else the errno's name.
const LISTENER: &str = "import socket, sys, errno\nprint('up', flush=True)\nfor line in sys.stdin:\n    try:\n        s = socket.create_server(('127.0.0.1', 0)); s.close(); print('ok', flush=True)\n    except OSError as e:\n        print(errno.errorcode[e.errno], flush=True)";

fn numbers(host: &Host) -> Vec<u64> {
    let mut all: Vec<Value> = Vec::new();
    let mut files: Vec<_> =
        std::fs::read_dir(host.state().join("audit")).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    for file in files {
        all.extend(
            std::fs::read_to_string(file).unwrap().lines().map(|l| serde_json::from_str::<Value>(l).unwrap()),
        );
    }
    all.iter().map(|r| r["seq"].as_u64().unwrap()).collect()
}

fn has_no_gap(host: &Host) {
    let numbers = numbers(host);
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
}

/// A small file system under the log.
struct SmallDisk(String);

impl SmallDisk {
    fn under(host: &Host) -> Self {
        let path = host.state().join("audit");
        std::fs::create_dir(&path).unwrap();
        let path = path.display().to_string();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k,mode=0750", "none", &path]).status();
        assert!(mounted.unwrap().success());
        Self(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _gone = Command::new("umount").args(["-l", &self.0]).status();
    }
}

fn full_disk(host: &Host) -> (SmallDisk, Running) {
    host.policy(ALLOW_ALL);
    let disk = SmallDisk::under(host);
    let mut it = host.start(&[PY, "-c", LISTENER]);
    it.line("up");
    it.say("\n");
    it.line("ok");
    let fill = vec![0u8; 200_000];
    let _partly = std::fs::write(format!("{}/ballast", disk.0), fill);
    (disk, it)
}

#[test]
fn a_full_disk_refuses_new_flows_and_says_what_was_lost() {
    let host = Host::here();
    let (disk, mut it) = full_disk(&host);
    let mut said = String::new();
    for _ in 0..200 {
        it.say("\n");
        said = it.line("");
        if said != "ok" {
            break;
        }
    }
    assert_eq!(said, "EACCES");
    let status: Value =
        serde_json::from_str(&host.portcullis(&["status", "--format", "json"]).stdout).unwrap();
    assert!(status["audit_error"].as_str().unwrap().contains("space"), "{status}");
    std::fs::remove_file(format!("{}/ballast", disk.0)).unwrap();
    it.say("\n");
    assert_eq!(it.line(""), "ok", "and goes on when there is room");
    let lost = host.record("loss", |r| r["op"] == "lost");
    assert!(lost["lost"].as_u64().unwrap() >= 1);
    has_no_gap(&host);
    drop(it);
    eventually("the broker ends", || host.daemons().is_empty().then_some(()));
}

#[test]
fn a_full_disk_refuses_nothing_if_told_so() {
    let host = Host::here();
    host.write("state/portcullis.toml", "[audit]\nwhen_unwritable = \"permit\"\n");
    let (disk, mut it) = full_disk(&host);
    for _ in 0..200 {
        it.say("\n");
        assert_eq!(it.line(""), "ok");
    }
    std::fs::remove_file(format!("{}/ballast", disk.0)).unwrap();
    it.say("\n");
    it.line("ok");
    let lost = host.record("loss", |r| r["op"] == "lost");
    assert!(lost["lost"].as_u64().unwrap() > 10, "{lost}");
    has_no_gap(&host);
    drop(it);
    eventually("the broker ends", || host.daemons().is_empty().then_some(()));
}

#[test]
fn the_log_rotates_and_numbers_go_on() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    host.write("state/portcullis.toml", "[audit]\nrotate_mib = 0\n");
    for _ in 0..3 {
        Finished::of(&mut host.run(&[PY, "-c", "import socket; socket.create_server(('127.0.0.1', 0))"]))
            .success();
    }
    eventually("the broker ends", || host.daemons().is_empty().then_some(()));
    assert!(std::fs::read_dir(host.state().join("audit")).unwrap().count() > 5);
    has_no_gap(&host);
}

/// Kills the broker, and waits for the next one.
fn replace_broker(host: &Host) {
    let broker = host.broker();
    kill(Pid::from_raw(broker), Signal::SIGKILL).unwrap();
    eventually("another broker serves", || {
        let status = host.portcullis(&["status", "--format", "json"]);
        let status: Value = serde_json::from_str(&status.stdout).ok()?;
        status["pid"].as_i64().filter(|pid| *pid != i64::from(broker)).map(drop)
    });
}

/// Has a call judged by the broker after this one.
fn kill_and_judge(host: &Host, it: &mut Running) {
    replace_broker(host);
    eventually("calls are judged again", || {
        it.say("\n");
        (it.line("") == "ok").then_some(())
    });
}

#[test]
fn a_killed_broker_takes_up_where_it_was() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let mut it = host.start(&[PY, "-c", LISTENER]);
    it.line("up");
    for _ in 0..2 {
        it.say("\n");
        it.line("ok");
        kill_and_judge(&host, &mut it);
    }
    has_no_gap(&host);
    let records = host.records();
    let generations: Vec<u64> = records.iter().filter_map(|r| r["generation"].as_u64()).collect();
    assert!(generations.is_sorted() && *generations.last().unwrap() >= 3, "{generations:?}");
}

#[test]
fn who_follows_sees_each_record_once_over_rotations_and_a_killed_broker() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    host.write("state/portcullis.toml", "[audit]\nrotate_mib = 0\n");
    let mut it = host.start(&[PY, "-c", LISTENER]);
    it.line("up");
    let state = host.state();
    let program = portcullis_tests::built::portcullis();
    let words = ["audit", "--follow", "--format", "json", "--state"].map(std::ffi::OsStr::new);
    let words = [&[program.as_os_str()], &words[..], &[state.as_os_str()]].concat();
    let follower = Running::start(host.plain(&words));
    for _ in 0..2 {
        for _ in 0..5 {
            it.say("\n");
            it.line("ok");
        }
        kill_and_judge(&host, &mut it);
    }
    assert!(std::fs::read_dir(host.state().join("audit")).unwrap().count() > 5);
    let last = host.records().last().unwrap()["seq"].as_u64().unwrap();
    for seq in 1..=last {
        let record: Value = serde_json::from_str(&follower.line("")).unwrap();
        assert_eq!(record["seq"], seq, "{record}");
    }
}

#[test]
fn a_session_outlives_the_broker() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(ftp::POLICY);
    server.policy(ftp::POLICY);
    let _running = server.start(&ftp::Daemon::Pyftpdlib.command(server, 1000));
    server.wait_for_port(21);
    let script = "import ftplib, sys\nf = ftplib.FTP('10.77.0.2', timeout=20)\nf.login()\nprint('in', flush=True)\n\
        for line in sys.stdin:\n    got = []\n    try:\n        f.retrbinary('RETR report.bin', got.append)\n        print('got', sum(map(len, got)), flush=True)\n    except Exception as e:\n        print('not', repr(e), flush=True)";
    let mut session = client.start(&[PY, "-c", script]);
    session.line("in");
    session.say("\n");
    session.line("got 1000");
    for host in [server, client] {
        replace_broker(host);
        session.say("\n");
        session.line("got 1000");
    }
}

#[test]
fn no_policy_refuses_everything_and_says_so() {
    let host = Host::here();
    let done =
        Finished::of(&mut host.run(&[PY, "-c", "import socket; socket.create_server(('127.0.0.1', 0))"]));
    if done.status == 1 {
        let refused = host.record("refusal", |r| r["verdict"] == "refuse");
        assert!(refused["reason"].as_str().unwrap().contains("no policy is in force"), "{refused}");
    } else {
        assert_eq!(done.status, 125, "{done}");
    }
}

/// For each line, connects twice to the far host, whom nobody refuses: the second call is known.
const CALLER: &str = "import socket, sys\nprint('up', flush=True)\nfor line in sys.stdin:\n    for _ in range(2):\n        socket.create_connection(('10.77.0.2', 7), 10).close()\n    print('done', flush=True)";

#[test]
fn what_the_kernel_stops_recording_is_recorded_by_the_program() {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy("allow tcp/7(*, IPv4{10.77.0.2});");
    let _echo = Running::start(server.plain(&["tcpsvd", "-l", "server", "10.77.0.2", "7", "true"]));
    server.wait_for_port(7);
    let mut it = client.start(&[PY, "-c", CALLER]);
    it.line("up");
    let mut calls = || {
        it.say("\n");
        it.line("done");
    };
    let connects = || {
        let all = client.records();
        all.into_iter().filter(|r| r["op"] == "connect" && r["verdict"] == "permit").collect::<Vec<_>>()
    };
    calls();
    eventually("both are on record", || (connects().len() == 2).then_some(()));
    calls();
    eventually("the kernel tells of the others", || (connects().len() == 4).then_some(()));

    // As a service manager does that moves a session.
    let pid = connects()[0]["pid"].clone();
    let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .map(|path| format!("{path}/cgroup.procs"))
        .into_iter()
        .find(|path| std::path::Path::new(path).exists());
    std::fs::write(root.unwrap(), pid.to_string()).unwrap();
    eventually("it is noticed", || {
        calls();
        let lost = |r: &Value| r["op"] == "lost" && r["by_pid"] == pid;
        client.records().iter().any(lost).then_some(())
    });
    let before = connects().len();
    calls();
    eventually("the program's own word is taken", || (connects().len() == before + 2).then_some(()));
}
