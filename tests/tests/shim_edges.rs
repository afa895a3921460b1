//! The shim's edges: bad arguments, lost descriptors, and which symbols it has at all.

use std::process::Command;

use portcullis_tests::{ALLOW_ALL, Finished, Host, built};

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
