//! dial-child ADDRESS:PORT fork|clone|vfork|spawn|system: lets a child connect: after fork(2), after the bare
//! system call, or by executing this program again after vfork(2), posix_spawn(3) or system(3), the last three
//! with an empty environment where the call takes one. The parent connects before and after.
#![expect(unsafe_code, reason = "the raw ways to make a process")]

use std::{ffi::CString, io, net::TcpStream, process::ExitCode};

use nix::{
    errno::Errno,
    sys::wait::{WaitStatus, waitpid},
    unistd::{ForkResult, Pid, fork},
};
use portcullis_demo_apps::{Arguments, ask, main_of, name_of, say};

fn main() -> ExitCode {
    main_of(run)
}

fn dial(arguments: &Arguments, n: usize) -> io::Result<()> {
    let stream = TcpStream::connect(arguments.address()?)?;
    say(&ask(stream, n)?);
    Ok(())
}

fn run(arguments: &Arguments) -> io::Result<()> {
    if let Ok(n) = arguments.text(2) {
        return dial(arguments, n.parse().unwrap_or(0)); // the executed child
    }
    dial(arguments, 0)?;
    let child = start(arguments, arguments.text(1)?)?;
    let status = match waitpid(child, None)? {
        WaitStatus::Exited(_, status) => status,
        _ => -1,
    };
    say(&format!("child {status}"));
    dial(arguments, 2)
}

fn in_child(arguments: &Arguments) -> ! {
    let status = dial(arguments, 1).map_or_else(
        |error| {
            say(&name_of(&error));
            1
        },
        |()| 0,
    );
    // SAFETY: ends the process without its parent's exit handlers.
    unsafe { libc::_exit(status) }
}

fn start(arguments: &Arguments, how: &str) -> io::Result<Pid> {
    let program = CString::new(std::env::current_exe()?.into_os_string().into_encoded_bytes())?;
    let words = [arguments.text(0)?, how, "1"].map(CString::new);
    let [address, how_word, n] = words;
    let (address, how_word, n) = (address?, how_word?, n?);
    let argv = [program.as_ptr(), address.as_ptr(), how_word.as_ptr(), n.as_ptr(), std::ptr::null()];
    let empty = [std::ptr::null::<libc::c_char>()];
    match how {
        // SAFETY: this program has one thread.
        "fork" => match unsafe { fork() }? {
            ForkResult::Child => in_child(arguments),
            ForkResult::Parent { child } => Ok(child),
        },
        // SAFETY: as fork(2); no flag that shares anything.
        "clone" => match unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } {
            0 => in_child(arguments),
            pid => process(pid),
        },
        "vfork" => {
            #[expect(deprecated, reason = "legacy programs use it")]
            // SAFETY: the child does nothing but execute or end.
            let pid = unsafe { libc::vfork() };
            if pid == 0 {
                // SAFETY: null-terminated arrays of C strings.
                unsafe {
                    libc::execve(program.as_ptr(), argv.as_ptr(), empty.as_ptr());
                    libc::_exit(127)
                }
            }
            process(pid.into())
        }
        "spawn" => {
            let mut pid = 0;
            // SAFETY: null-terminated arrays of C strings; posix_spawn(3) does not change the strings.
            let result = unsafe {
                libc::posix_spawn(
                    &raw mut pid,
                    program.as_ptr(),
                    std::ptr::null(),
                    std::ptr::null(),
                    argv.as_ptr().cast(),
                    empty.as_ptr().cast(),
                )
            };
            if result == 0 { process(pid.into()) } else { Err(io::Error::from_raw_os_error(result)) }
        }
        "system" => {
            let line =
                CString::new(format!("{} {} system 1", program.to_string_lossy(), arguments.text(0)?))?;
            // SAFETY: as above; the shell is another program, so this one stays as it is.
            match unsafe { fork() }? {
                ForkResult::Parent { child } => Ok(child),
                ForkResult::Child => {
                    // SAFETY: a C string.
                    let status = unsafe { libc::system(line.as_ptr()) };
                    // SAFETY: as in `in_child`.
                    unsafe { libc::_exit(libc::WEXITSTATUS(status)) }
                }
            }
        }
        _ => Err(Errno::EINVAL.into()),
    }
}

fn process(pid: i64) -> io::Result<Pid> {
    match i32::try_from(pid) {
        Ok(pid) if pid > 0 => Ok(Pid::from_raw(pid)),
        _ => Err(io::Error::last_os_error()),
    }
}
