//! dial-confined ADDRESS:PORT [COUNT]: connects, then forks a child that gives up what it can, as vsftpd's do
//! (root directory, user, groups, and by seccomp(2) every system call but those that it is going to make), and
//! lets it connect as often as said, and then a child of its own. Whatever else is called there kills it. As root.
#![expect(unsafe_code, reason = "system calls that leave no room for a library")]

use std::{io, mem, net::TcpStream, process::ExitCode};

use libc::{c_int, sock_filter, sockaddr_in};
use nix::{
    sys::wait::waitpid,
    unistd::{ForkResult, fork},
};
use portcullis_demo_apps::{Arguments, ask, main_of, say};

fn main() -> ExitCode {
    main_of(run)
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let to = arguments.address()?;
    say(&ask(TcpStream::connect(to)?, 0)?);
    let port = to.port();
    let count = arguments.count();
    // SAFETY: this program has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let all = || (0..count).all(|_| dial(port));
            let done = confine().is_ok() && all() && child_succeeds(all);
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!done)) }
        }
        ForkResult::Parent { child } => {
            say(&format!("{:?}", waitpid(child, None)?).replace(&child.to_string(), "child"));
            Ok(())
        }
    }
}

/// Calls that are left.
const LEFT: &[libc::c_long] = &[
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_write,
    libc::SYS_read,
    libc::SYS_close,
    libc::SYS_clone,
    libc::SYS_wait4,
    libc::SYS_exit_group,
];

fn confine() -> io::Result<()> {
    let mut filter = vec![jump(0x20, 0, 0, 0)]; // BPF_LD | BPF_W | BPF_ABS: the call's number
    for &nr in LEFT {
        filter.push(jump(0x15, u32::try_from(nr).unwrap_or(u32::MAX), 0, 1)); // BPF_JMP | BPF_JEQ | BPF_K
        filter.push(jump(0x06, libc::SECCOMP_RET_ALLOW, 0, 0)); // BPF_RET | BPF_K
    }
    filter.push(jump(0x06, libc::SECCOMP_RET_KILL_PROCESS, 0, 0));
    let program =
        libc::sock_fprog { len: u16::try_from(filter.len()).unwrap_or(0), filter: filter.as_mut_ptr() };
    let check = |result: c_int| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: C strings, an empty list, and a filter of the length that it says.
    unsafe {
        check(libc::chroot(c"/proc/self/fdinfo".as_ptr()))?;
        check(libc::chdir(c"/".as_ptr()))?;
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setgid(65534))?;
        check(libc::setuid(65534))?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        check(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program))
    }
}

const fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Whether a child does something; it is forked without the C library's help, which makes calls of its own.
fn child_succeeds(does: impl Fn() -> bool) -> bool {
    let signal = libc::c_long::from(libc::SIGCHLD);
    // SAFETY: a fork of a program with one thread; the child ends here.
    let child = unsafe { libc::syscall(libc::SYS_clone, signal, 0, 0, 0, 0) };
    if child == 0 {
        let status = i32::from(!does());
        // SAFETY: ends the child.
        unsafe { libc::_exit(status) }
    }
    let mut status = -1;
    // SAFETY: room for a status.
    let ended = unsafe { libc::waitpid(libc::pid_t::try_from(child).unwrap_or(-1), &raw mut status, 0) };
    ended > 0 && status == 0
}

fn dial(port: u16) -> bool {
    // SAFETY: a live address, and buffers with their sizes.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        let mut to: sockaddr_in = mem::zeroed();
        to.sin_family = 2; // AF_INET
        to.sin_port = port.to_be();
        to.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
        if libc::connect(fd, (&raw const to).cast(), 16) != 0 {
            return false;
        }
        let asked = b"ping 1\n";
        let mut answer = [0u8; 16];
        let wrote = libc::write(fd, asked.as_ptr().cast(), asked.len());
        let got = libc::read(fd, answer.as_mut_ptr().cast(), answer.len());
        libc::close(fd);
        wrote == 7 && got == 7 && answer.starts_with(b"pong 1\n")
    }
}
