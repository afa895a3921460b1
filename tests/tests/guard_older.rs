//! What an older kernel lacks, said and bounded. `cargo xtask guest` runs these on Linux 6.1.
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
