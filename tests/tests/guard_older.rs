//! What an older kernel lacks, said and bounded: as told (`PORTCULLIS_WITHOUT`), and in `cargo xtask guest` on Linux 6.1.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::{fs, process::Command};

use portcullis_tests::{ALLOW_ALL, Finished, Host, Running, built};
use serde_json::Value;

const NOBODY: u32 = 65534;
const SCOPE: &str = "/proc/sys/kernel/yama/ptrace_scope";

fn coverage(host: &Host, running: &Running, by: &str) -> Value {
    let listed = host.portcullis(&["ps", "--format", "json"]).success();
    let rows: Vec<Value> = serde_json::from_str(&listed).unwrap();
    let row = rows.iter().find(|row| row["pid"] == running.pid()).unwrap_or_else(|| panic!("{listed}"));
    row["coverage"].as_array().unwrap().iter().find(|hold| hold["by"] == by).unwrap().clone()
}

#[test]
#[ignore = "needs a kernel without BTF: cargo xtask guest"]
fn without_type_information_there_is_no_backstop_and_it_is_said_why() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let running = host.start(&["sh", "-c", "echo up; read x"]);
    running.line("up");
    assert_eq!(coverage(&host, &running, "guard")["holds"], true);
    let backstop = coverage(&host, &running, "backstop");
    assert_eq!(backstop["holds"], false);
    assert!(backstop["why"].as_str().unwrap().contains("no type information"), "{backstop}");
}

#[test]
#[ignore = "needs a kernel without Landlock's rules for the network: cargo xtask guest"]
fn of_all_ways_out_only_the_exchanged_descriptor_is_open() {
    let root = Finished::of(Command::new(built::portcullis()).args(["selftest", "--format", "json"]));
    let user = Host::here().as_user(NOBODY);
    let program = user.path("portcullis");
    let ordinary =
        Finished::of(&mut user.plain(&[program.to_str().unwrap(), "selftest", "--format", "json"]));
    for done in [root, ordinary] {
        let rows: Vec<Value> = done.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(rows.len() >= 42, "{done}");
        let out: Vec<&Value> = rows.iter().filter(|r| r["out"] == true).map(|r| &r["way"]).collect();
        assert!(out.iter().all(|way| *way == "second thread swaps the descriptor"), "{done}");
        let shown = |row: &&Value| row["control"] == true || row["opens"] == false;
        let rest: Vec<&Value> = rows.iter().filter(|row| !shown(row)).collect();
        assert!(rest.is_empty(), "without control: {rest:#?}");
    }
}

#[test]
#[ignore = "needs a kernel with Yama: cargo xtask guest"]
fn where_yama_forbids_to_look_into_programs_the_shim_holds_alone_and_it_is_said() {
    let before = fs::read_to_string(SCOPE).unwrap();
    fs::write(SCOPE, "1").unwrap();
    let user = Host::here().as_user(NOBODY);
    user.policy("allow tcp/9(*, *);");
    let script = "import socket\n\
        try: socket.create_connection(('127.0.0.1', 1))\n\
        except OSError as e: print(e, flush=True)\n\
        input()\n";
    let running = user.start(&["/usr/bin/python3", "-c", script]);
    running.line("Permission denied");
    let guard = coverage(&user, &running, "guard");
    let shim = coverage(&user, &running, "shim");
    fs::write(SCOPE, before).unwrap();
    assert_eq!((&guard["holds"], &shim["holds"]), (&false.into(), &true.into()));
    assert!(guard["why"].as_str().unwrap().contains("kernel.yama.ptrace_scope"), "{guard}");
}

/// A permitted and a refused connect and datagram, and what `status` says is not held.
fn tried(host: &Host, without: &str) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap().port();
    host.policy(&format!("service some = tcp/{at}, udp/{at};\nallow some(*, *);"));
    let script = format!(
        "import socket, threading\n\
         def tried(kind, port):\n    \
             s = socket.socket(socket.AF_INET, kind)\n    \
             return s.connect_ex(('127.0.0.1', port))\n\
         said = [tried(kind, port) for kind in (1, 2) for port in ({at}, 9)]\n\
         thread = threading.Thread(target=lambda: said.append(tried(1, {at})))\n\
         thread.start(); thread.join()\n\
         print('said', said, flush=True)\n\
         input()\n"
    );
    let mut command = host.run(&["/usr/bin/python3", "-c", &script]);
    command.env("PORTCULLIS_WITHOUT", without);
    let running = Running::start(command);
    running.line("said [0, 13, 0, 13, 0]");
    host.portcullis(&["status"]).success()
}

#[test]
fn what_is_missing_costs_what_status_says_and_no_more() {
    let lost = [
        ("passpidfd", "messages come without their writer's pidfd (Linux 6.5 has it)"),
        ("sync-wake-up", "not woken at once (Linux 6.6 does)"),
        ("landlock", "no Landlock rules for the network (Linux 6.7 has them)"),
    ];
    for (without, gap) in lost {
        for user in [None, Some(NOBODY)] {
            let host = user.map_or_else(Host::here, |uid| Host::here().as_user(uid));
            let status = tried(&host, &format!("backstop,{without}"));
            assert!(status.contains(gap) && status.contains(without), "{status}");
        }
    }
    let status = tried(&Host::here(), "passpidfd,sync-wake-up");
    assert!(status.contains("backstop   1 processes\n"), "{status}");
    let status = tried(&Host::here(), "");
    assert!(lost.iter().all(|(_, gap)| !status.contains(gap)), "control: {status}");
}

#[test]
fn without_landlock_the_exchanged_descriptor_alone_is_open_and_the_table_closes_it() {
    let selftest = |without: &str| {
        let mut command = Command::new(built::portcullis());
        command.args(["selftest", "--format", "json"]).env("PORTCULLIS_WITHOUT", without);
        let done = Finished::of(&mut command);
        let rows: Vec<Value> = done.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(rows.len() >= 42, "{done}");
        rows.into_iter()
            .filter(|row| row["out"] == true)
            .map(|row| row["way"].to_string())
            .collect::<Vec<_>>()
    };
    let out = selftest("backstop,landlock");
    assert!(out.iter().all(|way| way.contains("second thread swaps the descriptor")), "{out:?}");
    assert_eq!(selftest("bpf,landlock"), [""; 0]);
}
