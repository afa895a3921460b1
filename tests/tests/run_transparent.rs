//! `portcullis run` becomes the program: nothing of its surroundings is changed by wrapping.

use std::{os::unix::process::CommandExt, process::Stdio};

use nix::sys::signal::Signal;
use portcullis_tests::{ALLOW_ALL, Finished, Host, Running};

fn host() -> Host {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    host
}

/// What a shell script prints on a host, unwrapped and wrapped.
fn both(host: &Host, script: &str) -> [Finished; 2] {
    let words = ["sh", "-c", script];
    [Finished::of(&mut host.plain(&words)), Finished::of(&mut host.run(&words))]
}

#[test]
fn the_exit_status_is_the_programs() {
    let host = host();
    for status in [0, 1, 7, 255] {
        let done = Finished::of(&mut host.run(&["sh", "-c", &format!("exit {status}")]));
        assert_eq!((done.code(), done.stderr.as_str()), (status, ""));
    }
}

#[test]
fn a_program_killed_by_a_signal_is_seen_to_be() {
    let host = host();
    assert_eq!(Finished::of(&mut host.run(&["sh", "-c", "kill -SEGV $$"])).code(), 128 + 11);
    let mut sleeper = host.start(&["sleep", "1000"]);
    portcullis_tests::eventually("it sleeps", || comm(sleeper.pid()).filter(|c| c == "sleep"));
    sleeper.signal(Signal::SIGTERM);
    assert_eq!(sleeper.wait(), 128 + 15);
}

fn comm(pid: i32) -> Option<String> {
    Some(std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned())
}

#[test]
fn a_program_that_cannot_be_run_is_reported_as_env_does() {
    let host = host();
    let absent = Finished::of(&mut host.run(&["no-such-program"]));
    assert_eq!(absent.code(), 127);
    assert!(absent.stderr.contains("cannot run `no-such-program`: No such file"), "{absent:?}");
    assert_eq!(Finished::of(&mut host.run(&["/etc/passwd"])).code(), 126);
    assert_eq!(Finished::of(&mut host.run(&["/"])).code(), 126);
}

#[test]
fn the_program_has_the_process_id_that_run_had() {
    let host = host();
    let shell = host.start(&["sh", "-c", "echo me=$$; read line"]);
    assert_eq!(shell.line("me="), format!("me={}", shell.pid()));
}

#[test]
fn session_group_and_terminal_are_untouched() {
    let host = host();
    // Fields of proc_pid_stat(5): process group, session and terminal, which are inherited.
    let [plain, wrapped] = both(&host, "cut -d' ' -f6,7 /proc/self/stat; umask; pwd; ulimit -a; id");
    assert_eq!(plain.success(), wrapped.success());
}

#[test]
fn signal_mask_and_dispositions_are_untouched() {
    let host = host();
    for before in ["", "trap '' PIPE; ", "trap '' CHLD HUP; "] {
        let script = format!("{before}exec \"$0\" \"$@\"");
        let look = ["grep", "^Sig[BIC]", "/proc/self/status"];
        let outer = |inner: &std::process::Command| {
            let mut words =
                vec!["sh".into(), "-c".into(), script.clone().into(), inner.get_program().to_owned()];
            words.extend(inner.get_args().map(ToOwned::to_owned));
            Finished::of(&mut host.plain(&words)).success()
        };
        assert_eq!(outer(&host.plain(&look)), outer(&host.run(&look)), "after {before:?}");
    }
}

#[test]
fn the_environment_gains_three_variables_and_loses_none() {
    let host = host();
    let [plain, wrapped] = both(&host, "env | sort");
    let names =
        |text: &str| text.lines().map(|l| l.split('=').next().unwrap().to_owned()).collect::<Vec<_>>();
    let (plain, wrapped) = (names(&plain.success()), names(&wrapped.success()));
    let more: Vec<_> = wrapped.iter().filter(|n| !plain.contains(n)).map(String::as_str).collect();
    assert_eq!(more, ["LD_PRELOAD", "PORTCULLIS_BROKER", "PORTCULLIS_DOOR"]);
    assert!(plain.iter().all(|n| wrapped.contains(n)));
}

#[test]
fn the_users_own_preload_stays_behind_the_shim() {
    let host = host();
    let mut run = host.run(&["sh", "-c", "echo $LD_PRELOAD"]);
    let printed = Finished::of(run.env("LD_PRELOAD", "libm.so.6")).success();
    let (shim, theirs) = printed.trim().split_once(':').unwrap();
    assert!(shim.ends_with("libportcullis_preload.so"), "{printed}");
    assert_eq!(theirs, "libm.so.6");
}

#[test]
fn low_descriptors_are_the_programs_own() {
    let host = host();
    let [plain, wrapped] = both(&host, "ls /proc/self/fd");
    let low = |text: String| {
        text.lines().filter_map(|l| l.parse::<u32>().ok()).filter(|n| *n < 900).collect::<Vec<_>>()
    };
    assert_eq!(low(plain.success()), low(wrapped.success()));
}

#[test]
fn closed_standard_descriptors_stay_closed() {
    let host = host();
    let look = "for n in 0 1 2; do [ -e /proc/$$/fd/$n ] || echo $n; done >>\"$0\"";
    let found = host.path("closed");
    let run = host.run(&["sh", "-c", look, found.to_str().unwrap()]);
    let mut words =
        vec!["sh".into(), "-c".into(), "exec \"$0\" \"$@\" <&- 2>&-".into(), run.get_program().to_owned()];
    words.extend(run.get_args().map(ToOwned::to_owned));
    assert_eq!(Finished::of(&mut host.plain(&words)).code(), 0);
    assert_eq!(std::fs::read_to_string(found).unwrap(), "0\n2\n");
}

#[test]
fn a_pipeline_ends_with_its_programs_although_the_broker_lives_on() {
    let host = host();
    let keeper = host.start(&["sleep", "1000"]);
    portcullis_tests::eventually("it sleeps", || comm(keeper.pid()).filter(|c| c == "sleep"));
    // The output is read to its end: whoever else held the pipe would keep this from returning.
    let mut run = host.run(&["sh", "-c", "cat; echo done >&2"]);
    let mut child = run.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"through\n").unwrap();
    let done = Finished::from(child.wait_with_output().unwrap());
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("through\n", "done\n"));
}

#[test]
fn so_does_the_pipeline_of_the_run_that_starts_the_broker() {
    let host = host();
    // The program leaves a process behind, with the broker, that has none of the pipes.
    let mut run = host.run(&["sh", "-c", "setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $!"]);
    let done = Finished::of(&mut run);
    let sleeper: i32 = done.success().trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(sleeper), Signal::SIGKILL).unwrap();
}

#[test]
fn the_program_has_no_child_that_it_did_not_start() {
    let host = host();
    let script = "import os\n\
        try:\n    print(os.waitpid(-1, os.WNOHANG))\n\
        except ChildProcessError:\n    print('none')";
    assert_eq!(Finished::of(&mut host.run(&["python3", "-c", script])).success(), "none\n");
}

#[test]
fn it_is_a_containers_first_process() {
    let host = host();
    let run = host.run(&["sh", "-c", "echo $$; exit 5"]);
    let mut words = ["unshare", "--pid", "--fork", "--mount-proc"].map(Into::into).to_vec();
    words.push(run.get_program().to_owned());
    words.extend(run.get_args().map(ToOwned::to_owned));
    let done = Finished::of(&mut host.plain(&words));
    assert_eq!((done.stdout.as_str(), done.code()), ("1\n", 5), "{}", done.stderr);
}

#[test]
fn job_control_stops_and_continues_the_program() {
    let host = host();
    let mut run = host.run(&["sleep", "1000"]);
    let sleeper = Running::start({
        run.process_group(0);
        run
    });
    let state = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", sleeper.pid())).ok()?;
        stat.rsplit(") ").next()?.chars().next()
    };
    portcullis_tests::eventually("it sleeps", || comm(sleeper.pid()).filter(|c| c == "sleep"));
    sleeper.signal(Signal::SIGTSTP);
    portcullis_tests::eventually("it stops", || state().filter(|s| *s == 'T'));
    sleeper.signal(Signal::SIGCONT);
    portcullis_tests::eventually("it continues", || state().filter(|s| *s == 'S'));
}
