//! Files and folders that `run` cannot use or trust, and somebody else in the broker's place: refused by name, and
//! nothing runs, or is told anything.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use portcullis_tests::{ALLOW_ALL, Finished, Host, Running, eventually};

const NOBODY: u32 = 65534;
const PY: &str = "/usr/bin/python3";

type Spoil = fn(&Path);

/// What is wrong with a state folder, how it gets so, and what is said of it.
const SPOILT: [(&str, Spoil, &str); 9] = [
    ("settings with a key that is none", |at| put(at, "portcullis.toml", b"bogus = 1\n"), "unknown field"),
    ("settings that are no TOML", |at| put(at, "portcullis.toml", b"[audit\n"), "TOML parse error"),
    ("settings that are no text", |at| put(at, "portcullis.toml", b"# \xff\xfe\n"), "valid UTF-8"),
    ("settings without end", |at| put(at, "portcullis.toml", &vec![b'#'; 2 << 20]), "larger than"),
    ("a folder for settings", |at| fs::create_dir(at.join("portcullis.toml")).unwrap(), "not a file"),
    ("a file for the log", |at| put(at, "audit", b""), "audit log"),
    ("a link for the log", |at| symlink("/tmp", at.join("audit")).unwrap(), "audit log"),
    ("a folder for the lock", |at| fs::create_dir(at.join("lock")).unwrap(), "Is a directory"),
    (
        "open to all",
        |at| fs::set_permissions(at, PermissionsExt::from_mode(0o777)).unwrap(),
        "writable by others",
    ),
];

fn put(folder: &Path, name: &str, content: &[u8]) {
    fs::write(folder.join(name), content).unwrap();
}

#[test]
fn what_is_wrong_with_a_state_folder_is_said_and_nothing_runs() {
    for (what, spoil, said) in SPOILT {
        let host = Host::here();
        host.policy(ALLOW_ALL);
        let run = || Finished::of(&mut host.run(&["echo", "ran"]));
        assert_eq!(run().success(), "ran\n", "{what}: not yet");
        eventually("the broker ends", || host.daemons().is_empty().then_some(()));
        fs::remove_dir_all(host.state()).unwrap();
        fs::create_dir(host.state()).unwrap();
        spoil(&host.state());
        let done = run();
        assert_eq!((done.status, done.stdout.as_str()), (125, ""), "{what}: {done}");
        assert!(done.stderr.contains(said), "{what}: {done}");
        eventually("nothing is left", || host.daemons().is_empty().then_some(()));
    }
}

#[test]
fn a_policy_that_cannot_be_read_is_named_and_nothing_runs() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let large = host.write("large.pol", "");
    fs::File::create(&large).and_then(|file| file.set_len(1 << 30)).unwrap();
    let binary = host.write("binary.pol", b"# \xff\xfe\n");
    let pipe = host.path("pipe.pol");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (policy, said) in [
        (large.to_str().unwrap(), "larger than"),
        (binary.to_str().unwrap(), "not UTF-8"),
        ("/dev/zero", "no regular file"),
        (pipe.to_str().unwrap(), "no regular file"),
        ("/nonexistent", "No such file"),
    ] {
        let done = Finished::of(&mut host.run_with(&["--policy", policy], &["echo", "ran"]));
        assert_eq!((done.status, done.stdout.as_str()), (125, ""), "{policy}: {done}");
        assert!(done.stderr.contains(said), "{policy}: {done}");
    }
    assert_eq!(Finished::of(&mut host.run(&["echo", "ran"])).success(), "ran\n");
}

/// For each line, connects to the port; says `ok` or the errno's name.
const CALLER: &str = "import socket, sys, errno\nprint('up', flush=True)\nfor line in sys.stdin:\n    try:\n        socket.create_connection(('127.0.0.1', int(sys.argv[1])), 10).close(); print('ok', flush=True)\n    except OSError as e:\n        print(errno.errorcode[e.errno], flush=True)";
/// Listens at a path as another user, and says what it is told.
const IMPOSTOR: &str = "import os, socket, sys\ns = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\ns.bind(sys.argv[1])\nos.chmod(sys.argv[1], 0o666)\nos.setuid(65534)\ns.listen(9)\nprint('listens', flush=True)\nc, _ = s.accept()\nprint('told', len(c.recv(4096)), flush=True)";

#[test]
fn whoever_takes_the_brokers_place_is_told_nothing() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port().to_string();
    let mut caller = host.start(&[PY, "-c", CALLER, &port]);
    caller.line("up");
    caller.say("\n");
    assert_eq!(caller.line(""), "ok");
    let environment = fs::read_to_string(format!("/proc/{}/environ", caller.pid())).unwrap();
    let broker = environment.split('\0').find_map(|v| v.strip_prefix("PORTCULLIS_BROKER=")).unwrap();
    let path = broker.rsplit_once(':').unwrap().0;
    let supervisor = host.daemons().into_iter().find(|(_, part)| part == "supervise").unwrap().0;
    kill(Pid::from_raw(supervisor), Signal::SIGKILL).unwrap();
    eventually("all of it is dead", || host.daemons().is_empty().then_some(()));

    fs::remove_file(path).unwrap();
    let impostor = Running::start(host.plain(&[PY, "-c", IMPOSTOR, path]));
    impostor.line("listens");
    caller.say("\n");
    assert_ne!(caller.line(""), "ok");
    assert_eq!(impostor.line("told"), "told 0", "it was found out by its user id, and left");
}

#[test]
fn want_of_descriptors_is_said_at_once() {
    let here = Host::here();
    let user = here.as_user(NOBODY);
    for (host, few) in [(&here, "1000"), (&user, "1000"), (&user, "12")] {
        host.policy(ALLOW_ALL);
        let program =
            if host.is_ordinary() { host.path("portcullis") } else { portcullis_tests::built::portcullis() };
        let script = format!(
            "ulimit -n {few}; exec \"$0\" run --state state --policy policy.pol -- sh -c 'echo ran; ulimit -n'"
        );
        let done = Finished::of(&mut host.plain(&["sh", "-c", &script, program.to_str().unwrap()]));
        if few == "12" {
            assert_eq!((done.status, done.stdout.as_str()), (125, ""), "{done}");
            assert!(done.stderr.contains("Too many open files"), "{done}");
        } else {
            assert_eq!(done.success(), format!("ran\n{few}\n"), "{few}");
        }
    }
}
