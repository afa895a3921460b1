//! The backstop's nftables form: what holds root's programs where BPF cannot be used.
//!
//! What the guard does not see is tried by a process that has no guard, in the cgroup of a wrapped tree.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::{
    fs,
    io::ErrorKind,
    net::{TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use portcullis_nft::Table;
use portcullis_tests::{ALLOW_ALL, Finished, Host, Running, built, eventually};
use serde_json::Value;

/// Does what each line says, and says how that went.
const PROGRAM: &str = "
import socket, sys
kept = []
print('up', flush=True)
for line in sys.stdin:
    what, port = line.split()
    at = ('127.0.0.1', int(port))
    how = 'ok'
    try:
        if what == 'tcp': kept.append(socket.create_connection(at, 9))
        elif what == 'listen': kept.append(socket.create_server(at))
        elif what == 'udp':
            kept.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            kept[-1].connect(at)
            kept[-1].send(b'x')
        elif what == 'send': kept[int(port)].send(b'x')
    except OSError as error: how = error.strerror
    print(what, port, how, flush=True)
";

fn python() -> [&'static str; 4] {
    ["/usr/bin/python3", "-u", "-c", PROGRAM]
}

fn without_bpf(mut command: Command) -> Command {
    command.env("PORTCULLIS_WITHOUT", "bpf");
    command
}

fn inside(host: &Host) -> Running {
    let running = Running::start(without_bpf(host.run(&python())));
    running.line("up");
    running
}

/// Where the cgroup of a process is.
fn cgroup(pid: i32) -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let tree = mounts.lines().find(|l| l.contains(" cgroup2 ")).unwrap().split(' ').nth(1).unwrap();
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    PathBuf::from(tree).join(own)
}

/// Removes a cgroup that is still there when its last process has ended.
fn remove_cgroup(folder: &Path) {
    eventually("nobody is in the cgroup", || {
        let left = fs::remove_dir(folder).is_err_and(|error| error.kind() != ErrorKind::NotFound);
        (!left).then_some(())
    });
}

/// A program that no guard holds, beside a wrapped one.
fn unguarded(host: &Host, beside: &Running) -> Running {
    let running = Running::start(host.plain(&python()));
    running.line("up");
    fs::write(cgroup(beside.pid()).join("cgroup.procs"), running.pid().to_string()).unwrap();
    running
}

fn does(program: &mut Running, what: &str, port: u16) -> String {
    program.say(&format!("{what} {port}\n"));
    program.line(&format!("{what} {port} ")).split(' ').skip(2).collect::<Vec<_>>().join(" ")
}

fn tables() -> Vec<String> {
    Table::of("portcullis-none").unwrap().names().unwrap()
}

fn name_of(program: &Running) -> String {
    cgroup(program.pid()).file_name().unwrap().to_str().unwrap().to_owned()
}

fn coverage(host: &Host, pid: i32) -> Value {
    let listed = host.portcullis(&["ps", "--format", "json"]).success();
    let rows: Vec<Value> = serde_json::from_str(&listed).unwrap();
    let row = rows.iter().find(|row| row["pid"] == pid).unwrap_or_else(|| panic!("{pid}: {listed}"));
    row["coverage"].as_array().unwrap().iter().find(|hold| hold["by"] == "backstop").unwrap().clone()
}

#[test]
fn what_the_guard_does_not_see_the_table_refuses() {
    let host = Host::here();
    let [open, closed] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let [open_at, closed_at] = [&open, &closed].map(|l| l.local_addr().unwrap().port());
    let hears = UdpSocket::bind(("127.0.0.1", open_at)).unwrap();
    let [granted, not_granted] = [(); 2].map(|()| built::free_port());
    host.policy(&format!("service some = tcp/{open_at}, udp/{open_at}, tcp/{granted};\nallow some(*, *);"));
    let mut inside = inside(&host);
    let mut control = Running::start(host.plain(&python()));
    let mut unguarded = unguarded(&host, &inside);
    assert_eq!(coverage(&host, inside.pid())["form"], "nftables");
    let status = host.portcullis(&["status"]).stdout;
    assert!(
        status.contains("(by nftables)") && status.contains("the backstop is an nftables table"),
        "{status}"
    );

    assert_eq!(does(&mut inside, "tcp", closed_at), "Permission denied");
    assert_eq!(does(&mut control, "tcp", closed_at), "ok", "who is not in the cgroup");
    assert_eq!(does(&mut unguarded, "tcp", closed_at), "Connection refused");
    assert_eq!(does(&mut unguarded, "udp", closed_at), "Operation not permitted");
    let far = format!("127.0.0.1:{closed_at}");
    for op in ["connect", "send"] {
        let record = host.record(op, |r| r["via"] == "backstop" && r["op"] == op && r["remote"] == *far);
        assert_eq!((&record["verdict"], &record["by_uid"]), (&"refuse".into(), &0.into()), "{record}");
    }
    // Granted to one of the tree, and so to all of it.
    assert_eq!(does(&mut unguarded, "tcp", open_at), "Connection refused", "nobody has asked yet");
    assert_eq!(does(&mut inside, "tcp", open_at), "ok");
    assert_eq!(does(&mut inside, "udp", open_at), "ok");
    assert_eq!(does(&mut unguarded, "tcp", open_at), "ok");

    // Listeners.
    assert_eq!(does(&mut inside, "listen", granted), "ok");
    assert_eq!(does(&mut unguarded, "listen", not_granted), "ok");
    let reach = |port: u16, within| TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), within);
    assert!(reach(granted, Duration::from_secs(20)).is_ok());
    assert!(reach(not_granted, Duration::from_millis(500)).is_err());
    host.record("listen", |r| {
        r["via"] == "backstop" && r["op"] == "listen" && r["local"] == format!("127.0.0.1:{not_granted}")
    });

    // The broker's death: what runs goes on, nothing new passes, until the next one has judged it.
    kill(Pid::from_raw(host.broker()), Signal::SIGKILL).unwrap();
    eventually("nothing new passes", || (does(&mut unguarded, "tcp", open_at) != "ok").then_some(()));
    for kept in 0..2 {
        assert_eq!(does(&mut inside, "send", kept), "ok");
    }
    eventually("a connect is served again", || (does(&mut inside, "tcp", open_at) == "ok").then_some(()));
    let told = || host.records().iter().filter(|r| r["via"] == "backstop" && r["remote"] == *far).count();
    let before = told();
    assert_eq!(does(&mut unguarded, "tcp", closed_at), "Connection refused");
    eventually("the next broker hears of it", || (told() > before).then_some(()));
    drop(hears);

    // A new policy takes back what the old one granted.
    assert_eq!(does(&mut unguarded, "tcp", open_at), "ok");
    host.policy(&format!("allow tcp/{granted}(*, *);"));
    eventually("the new policy is in force", || (does(&mut inside, "tcp", open_at) != "ok").then_some(()));
    assert_eq!(does(&mut unguarded, "tcp", open_at), "Connection refused");

    let table = name_of(&inside);
    assert!(tables().contains(&table));
    // Of whom the supervisor does not know goes first: it leaves a table that somebody is under.
    drop(unguarded);
    drop(inside);
    eventually("the table has gone", || (!tables().contains(&table)).then_some(()));
}

#[test]
fn what_a_killed_supervisor_leaves_holds_on_and_is_removed_by_the_next() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap().port();
    let _hears = UdpSocket::bind(("127.0.0.1", at)).unwrap();
    let mut first = inside(&host);
    let mut beside = unguarded(&host, &first);
    let (table, folder) = (name_of(&first), cgroup(first.pid()));
    assert_eq!(does(&mut first, "udp", at), "ok");
    let supervisor = host.daemons().into_iter().find(|(_, part)| part == "supervise").unwrap().0;
    kill(Pid::from_raw(supervisor), Signal::SIGKILL).unwrap();
    eventually("all parts have ended", || host.daemons().is_empty().then_some(()));
    assert_eq!(does(&mut beside, "tcp", at), "Connection refused");
    assert_eq!(does(&mut first, "send", 0), "ok", "what runs goes on");

    // The same folder's next run takes it over.
    let mut second = inside(&host);
    assert_eq!(does(&mut second, "tcp", at), "ok");
    assert_eq!(does(&mut beside, "udp", at), "Operation not permitted");
    let supervisor = host.daemons().into_iter().find(|(_, part)| part == "supervise").unwrap().0;
    kill(Pid::from_raw(supervisor), Signal::SIGKILL).unwrap();
    drop((first, second, beside));
    eventually("all parts have ended", || host.daemons().is_empty().then_some(()));
    assert!(tables().contains(&table));

    // Another folder's removes it, once the cgroup has gone (which is swept when it is a minute old).
    remove_cgroup(&folder);
    let other = Host::here();
    other.policy(ALLOW_ALL);
    drop(inside(&other));
    assert!(!tables().contains(&table));
}

#[test]
fn a_service_keeps_its_table_while_it_has_no_programs() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let (state, policy) = (host.state().display().to_string(), host.path("policy.pol").display().to_string());
    let portcullis = |words: &[&str]| {
        let mut command = Command::new(built::portcullis());
        command.args(words);
        Running::start(command)
    };
    let mut service = portcullis(&["supervise", "--state", &state, "--policy", &policy, "--without", "bpf"]);
    let joins = || {
        let running = portcullis(&[&["run", "--state", &state, "--"][..], &python()].concat());
        running.line("up");
        running
    };
    eventually("it serves", || host.portcullis(&["status"]).stdout.contains("generation   ").then_some(()));
    let first = joins();
    let (table, folder) = (name_of(&first), cgroup(first.pid()));
    drop(first);
    remove_cgroup(&folder);
    // What others find without a cgroup they remove.
    let other = Host::here();
    other.policy(ALLOW_ALL);
    drop(inside(&other));
    assert!(tables().contains(&table));
    let second = joins();
    assert_eq!(coverage(&host, second.pid())["form"], "nftables");
    // One that was removed and made again is held again.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut beside = unguarded(&host, &second);
    assert_eq!(does(&mut beside, "tcp", listener.local_addr().unwrap().port()), "Connection refused");
    drop((second, beside));
    remove_cgroup(&folder);
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait(), 0);
    assert!(!tables().contains(&table));
}

#[test]
fn no_way_out_gets_out_past_guard_and_table() {
    let done = Finished::of(&mut without_bpf({
        let mut command = Command::new(built::portcullis());
        command.args(["selftest", "--format", "json"]);
        command
    }));
    let rows: Vec<Value> = done.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(rows.len() >= 42 && rows.iter().all(|row| row["out"] == false), "{done}");
    let unproven = |row: &&Value| row["control"] != true && row["opens"] != false;
    assert_eq!(rows.iter().find(unproven), None, "{done}");
}

#[test]
fn another_network_namespace_is_the_guards_alone_and_that_is_said() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let running = Running::start(without_bpf(host.run(&["unshare", "-n", "sh", "-c", "echo up; read x"])));
    running.line("up");
    let why = coverage(&host, running.pid())["why"].clone();
    assert_eq!(why, "it is in another network namespace than the nftables table");
}

#[test]
fn where_neither_form_can_be_had_the_guard_holds_alone_and_says_why() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let mut command = host.run(&["sh", "-c", "echo up; read x"]);
    command.env("PORTCULLIS_WITHOUT", "bpf,nftables");
    let running = Running::start(command);
    running.line("up");
    let backstop = coverage(&host, running.pid());
    let why = backstop["why"].as_str().unwrap();
    assert!(why.contains("without BPF") && why.contains("nftables: told to do without"), "{why}");
    assert!(host.portcullis(&["status"]).stdout.contains("win a race to send datagrams"));
    let other = Host::here();
    other.policy(ALLOW_ALL);
    let mut wrong = other.run(&["true"]);
    wrong.env("PORTCULLIS_WITHOUT", "pbf");
    let done = Finished::of(&mut wrong);
    assert!(done.code() == 125 && done.stderr.contains("WITHOUT: `pbf` is nothing to do without"), "{done}");
    assert_eq!(done.stderr.matches("`pbf`").count(), 1, "{done}");
}
