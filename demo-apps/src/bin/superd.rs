//! superd ADDRESS:PORT COUNT PROGRAM…: accepts as many connections as said, and runs the program for each with
//! the connection as its descriptors 0 and 1, as inetd does with `nowait`.

use std::{
    net::TcpListener,
    os::fd::OwnedFd,
    process::{Command, ExitCode, Stdio},
};

use nix::errno::Errno;
use portcullis_demo_apps::{main_of, say};

fn main() -> ExitCode {
    main_of(|arguments| {
        let listener = TcpListener::bind(arguments.address()?)?;
        say(&format!("listening on {}", listener.local_addr()?.port()));
        let [program, rest @ ..] = arguments.rest(2) else { return Err(Errno::EINVAL.into()) };
        for _ in 0..arguments.count() {
            let (stream, _) = listener.accept()?;
            let (input, output) = (OwnedFd::from(stream.try_clone()?), OwnedFd::from(stream));
            Command::new(program)
                .args(rest)
                .stdin(Stdio::from(input))
                .stdout(Stdio::from(output))
                .status()?;
        }
        Ok(())
    })
}
