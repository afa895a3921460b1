//! What older kernels lack, done without on this one (`PORTCULLIS_WITHOUT`): it works, and `status` says what is lost.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::process::Command;

use portcullis_tests::{Finished, Host, Running, built};
use serde_json::Value;

const NOBODY: u32 = 65534;

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
    assert!(status.contains("backstop   1 process\n"), "{status}");
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
