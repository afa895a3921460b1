//! dial-changed ADDRESS:PORT [COUNT]: connects as often as said, becomes nobody, connects again, and lets a
//! forked child do the same. As root.
#![expect(unsafe_code, reason = "fork(2)")]

use std::{io, net::TcpStream, process::ExitCode};

use nix::{
    sys::wait::waitpid,
    unistd::{ForkResult, Uid, fork, setuid},
};
use portcullis_demo_apps::{Arguments, ask, main_of, name_of, say};

fn main() -> ExitCode {
    main_of(run)
}

fn dial(arguments: &Arguments, who: &str) {
    let to = arguments.address();
    let answer = to.and_then(|to| ask(TcpStream::connect(to)?, 0)).unwrap_or_else(|e| name_of(&e));
    say(&format!("{who}: {answer}"));
}

fn run(arguments: &Arguments) -> io::Result<()> {
    for _ in 0..arguments.count() {
        dial(arguments, "root");
    }
    setuid(Uid::from_raw(65534))?;
    dial(arguments, "nobody");
    // SAFETY: this program has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            dial(arguments, "child");
            // SAFETY: ends the child without its parent's exit handlers.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            waitpid(child, None)?;
            Ok(())
        }
    }
}
