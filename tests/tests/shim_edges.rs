//! The shim's edges: bad arguments, lost descriptors, and which symbols it has at all.

use std::process::Command;

use portcullis_tests::{ALLOW_ALL, Finished, Host, Net, built};

#[test]
fn careless_calls_have_the_results_they_have_unwrapped() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let program = built::program("edges");
    let words = [program.to_str().unwrap()];
    let plain = Finished::of(&mut host.plain(&words));
    let wrapped = Finished::of(&mut host.run(&words));
    assert_eq!(wrapped.stdout, plain.stdout);
    assert_eq!((wrapped.code(), wrapped.stderr), (0, String::new()));
}

#[test]
fn a_thread_with_the_smallest_stack_has_room_for_every_call() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let (program, source) = (host.path("small"), host.write("small.c", include_str!("../probes/small.c")));
    let mut compiler = Command::new("cc");
    let _built = Finished::of(compiler.args(["-w", "-pthread", "-o"]).arg(&program).arg(source)).success();
    let words = [program.to_str().unwrap()];
    // A dot for each thread, and how the child's went.
    let all = format!("{} 0\n", ".".repeat(24));
    assert_eq!(Finished::of(&mut host.plain(&words)).success(), all);
    assert_eq!(Finished::of(&mut host.run(&words)).success(), all);
}

/// Good and bad addresses, lengths, messages, pointers and descriptors, for each call and kind of socket.
const FAULTS: &str = include_str!("../probes/faults.c");

/// Ten thousand calls, by the shim and by a static program, as they are and wrapped. Some go to addresses of the whole
/// link and of nobody: on a link where nobody is.
fn faults(uid: u32, without: Option<&str>) {
    let net = Net::new(&["alone"]);
    let [host] = net.hosts();
    let host = host.as_user(uid);
    host.policy(ALLOW_ALL);
    let source = host.write("faults.c", FAULTS);
    for kind in ["-rdynamic", "-static"] {
        let program = host.path(format!("faults{kind}"));
        let _built =
            Finished::of(Command::new("cc").args([kind, "-w", "-o"]).arg(&program).arg(&source)).success();
        let words = [program.to_str().unwrap()];
        let plain = Finished::of(&mut host.plain(&words)).success();
        let mut wrapped = host.run(&words);
        if let Some(what) = without {
            wrapped.env("PORTCULLIS_WITHOUT", what);
        }
        let wrapped = Finished::of(&mut wrapped).success();
        assert!(plain.lines().count() > 10_000 && plain.lines().count() == wrapped.lines().count());
        // Fast open means nothing to a unix socket; where calls are made by proxy it is refused before anybody looks.
        let by_proxy = uid != 0 || without.is_some();
        let is_known = |one: &str| by_proxy && one.starts_with("unix fast-open");
        let differ = |(one, other): &(&str, &str)| one != other && !is_known(one);
        let lines: Vec<_> = plain.lines().zip(wrapped.lines()).filter(differ).collect();
        assert!(lines.is_empty(), "as it is, and wrapped ({kind}): {lines:#?}");
    }
}

#[test]
fn whatever_a_call_is_given_its_result_is_the_one_it_has_unwrapped() {
    faults(0, None);
}

#[test]
fn whatever_a_call_is_given_its_result_is_the_same_where_calls_are_made_by_proxy() {
    faults(0, Some("backstop"));
    faults(0, Some("bpf"));
}

#[test]
fn whatever_a_user_gives_a_call_its_result_is_the_same() {
    faults(65534, None);
}

#[test]
fn threads_that_wait_in_a_call_can_be_cancelled() {
    let host = Host::here();
    host.policy(ALLOW_ALL);
    let program = built::program("cancel");
    let done = Finished::of(&mut host.run(&[program.to_str().unwrap()]));
    let expected = "accept: cancelled\nrecv: cancelled\nrecvmsg: cancelled\nconnect: cancelled\n";
    assert_eq!(done.success(), expected);
}

#[test]
fn nothing_but_these_symbols_is_exported() {
    let library = built::program("libportcullis_preload.so");
    let listed = Finished::of(Command::new("nm").args(["-D", "--defined-only"]).arg(library)).success();
    let names: Vec<&str> = listed.lines().filter_map(|line| line.split(' ').nth(2)).collect();
    insta::assert_snapshot!(names.join(" "), @"_Exit __close __connect __dup2 __fxstat __fxstat64 __recv_chk __recvfrom_chk __vfork _exit accept accept4 bind capset chroot close close_range closefrom connect dup dup2 dup3 execl execle execlp execv execve execveat execvp execvpe fcntl fcntl64 fexecve fstat fstat64 getpeername getsockname initgroups kill killpg listen pidfd_send_signal popen posix_spawn posix_spawnp prctl pthread_cancel pthread_kill quick_exit raise recv recvfrom recvmmsg recvmsg sendmmsg sendmsg sendto setegid seteuid setfsgid setfsuid setgid setgroups setns setregid setresgid setresuid setreuid setuid sigqueue socket syscall system tgkill unshare vfork");
}
