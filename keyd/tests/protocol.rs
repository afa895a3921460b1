//! What the daemon does with a broker that breaks the rules, and what it may do itself.

#[cfg(test)]
mod common;

use std::{net::TcpListener, os::fd::AsFd, time::Duration};

use common::{Daemon, net, own_network};
use portcullis_wire::keyd::{Flow, Head, Kind, Net};
use zerocopy::{FromZeros, IntoBytes};

/// Sends one message and tells the exit status with which the daemon ends.
fn ends_after(mut keyd: Daemon, message: &[u8]) -> i32 {
    keyd.send(&[message], &[]);
    assert!(keyd.receive(Duration::from_secs(5)).is_none(), "an answer");
    keyd.ended()
}

#[test]
fn asking_out_of_turn_ends_the_connection() {
    own_network(&[]);
    for kind in [Kind::Filter, Kind::Refill, Kind::Cut, Kind::Stranger] {
        assert_eq!(ends_after(Daemon::silent(), Head::new(kind, 1).as_bytes()), 1, "{kind:?} before hello");
    }
    for kind in [Kind::Hello, Kind::Stranger] {
        assert_eq!(ends_after(Daemon::start(), Head::new(kind, 9).as_bytes()), 1, "{kind:?} after hello");
    }
}

#[test]
fn what_is_no_request_ends_the_connection() {
    own_network(&[]);
    let good = Head::new(Kind::Cut, 1);
    assert_eq!(ends_after(Daemon::start(), b"x"), 1);
    assert_eq!(ends_after(Daemon::start(), Head { magic: 7, ..good }.as_bytes()), 1);
    assert_eq!(ends_after(Daemon::start(), Head { version: 7, ..good }.as_bytes()), 1);
    assert_eq!(ends_after(Daemon::start(), Head { kind: 99, ..good }.as_bytes()), 1);
    assert_eq!(ends_after(Daemon::start(), good.as_bytes()), 1, "a cut of no flow");
    assert_eq!(
        ends_after(Daemon::start(), Head::new(Kind::Filter, 1).as_bytes()),
        1,
        "a filter of no socket"
    );
    assert_eq!(ends_after(Daemon::start(), &vec![0; 40_000]), 1, "longer than any request");
}

#[test]
fn more_descriptors_than_any_request_has_end_the_connection() {
    own_network(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut keyd = Daemon::start();
    let fd = listener.as_fd();
    keyd.send(&[Head::new(Kind::Filter, 9).as_bytes()], &[fd, fd, fd, fd, fd]);
    assert!(keyd.receive(Duration::from_secs(5)).is_none());
    assert_eq!(keyd.ended(), 1);
}

#[test]
fn a_list_that_is_not_what_its_head_says_is_refused() {
    own_network(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut keyd = Daemon::start();
    let refused = |keyd: &mut Daemon, head: Head, body: &[u8]| {
        keyd.send(&[head.as_bytes(), body], &[listener.as_fd()]);
        keyd.receive(common::PATIENCE).expect("an answer").head.errno
    };
    let head = Head { count: 1, ..Head::new(Kind::Filter, 50) };
    assert_eq!(refused(&mut keyd, head, &[]), libc::EINVAL, "too short");
    assert_eq!(refused(&mut keyd, head, &[0; 48]), libc::EINVAL, "too long");
    assert_eq!(refused(&mut keyd, Head { count: u32::MAX, ..head }, &[]), libc::EINVAL);
    assert_eq!(refused(&mut keyd, Head { flags: Head::LIST_ATTACHED, ..head }, &[]), libc::EINVAL, "no file");
    assert_eq!(refused(&mut keyd, head, net("10.0.0.0/8").as_bytes()), 0, "the control");
}

#[test]
fn a_broker_that_leaves_ends_the_daemon_in_peace() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let (other, _) = nix::sys::socket::socketpair(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::SeqPacket,
        None,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    drop(std::mem::replace(&mut keyd.broker, other));
    assert_eq!(keyd.ended(), 0);
}

#[test]
fn whoever_waits_hears_that_it_is_ready() {
    own_network(&[]);
    let (read, write) = nix::unistd::pipe().unwrap();
    let _keyd = Daemon::starting(Some(write), None);
    let mut line = [0; 64];
    let length = nix::unistd::read(&read, &mut line).unwrap();
    assert_eq!(&line[..length], b"ready\n");
}

#[test]
fn the_daemon_is_its_own_user_with_four_capabilities_in_a_sandbox() {
    own_network(&[]);
    let keyd = Daemon::start();
    let status = std::fs::read_to_string(format!("/proc/{}/status", keyd.pid)).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len() + 1..].split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let uid = field("Uid");
    assert!(uid.iter().all(|one| *one == uid[0] && one != "0"), "{uid:?}");
    assert!(field("Groups").is_empty());
    let kept = format!("{:016x}", 1_u64 << 10 | 1 << 12 | 1 << 13 | 1 << 39);
    assert_eq!(field("CapEff"), std::slice::from_ref(&kept));
    assert_eq!(field("CapPrm"), [kept]);
    for none in ["CapInh", "CapBnd", "CapAmb"] {
        assert_eq!(field(none), ["0000000000000000"], "{none}");
    }
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), (vec!["1".to_owned()], vec!["2".to_owned()]));
    // Undumpable: what is below /proc/PID is root's.
    let owner = std::os::unix::fs::MetadataExt::uid(
        &std::fs::metadata(format!("/proc/{}/environ", keyd.pid)).unwrap(),
    );
    assert_eq!(owner, 0);
}

#[test]
fn nothing_that_was_sent_stays_open_in_the_daemon() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let open = |keyd: &Daemon| std::fs::read_dir(format!("/proc/{}/fd", keyd.pid)).unwrap().count();
    let before = open(&keyd);
    let nets = vec![net("10.0.0.0/8"); 1];
    for _ in 0..10 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let handle = keyd.filter(&listener, 1, &nets).unwrap();
        assert_eq!(keyd.refill(&handle, &Net::everyone()), 0);
        assert_eq!(keyd.refill(&handle, &vec![net("10.0.0.0/33"); 5000]), libc::EINVAL);
        let _ = keyd.cut(&Flow::new_zeroed(), Some(listener.as_fd()));
    }
    assert_eq!(open(&keyd), before);
}
