//! What the small programs share: a one-line protocol, and words for their results.
//!
//! The protocol: a client sends `ping N`, the server answers `pong N` and closes. Programs print what
//! happened, errors by name, so that two runs can be compared.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::SocketAddr,
    process::ExitCode,
};

use nix::errno::Errno;

/// A program's arguments by position.
#[derive(Debug)]
pub struct Arguments(Vec<String>);

impl Arguments {
    /// Those of this process.
    #[must_use]
    pub fn new() -> Self {
        Self(std::env::args().skip(1).collect())
    }

    /// The argument at `position` as text.
    ///
    /// # Errors
    /// `EINVAL` if there is none.
    pub fn text(&self, position: usize) -> io::Result<&str> {
        self.0.get(position).map(String::as_str).ok_or_else(|| Errno::EINVAL.into())
    }

    /// The first argument as address and port.
    ///
    /// # Errors
    /// `EINVAL` if it is none.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.text(0)?.parse().map_err(|_| Errno::EINVAL.into())
    }

    /// The second argument as a count; 1 if there is none.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.get(1).and_then(|n| n.parse().ok()).unwrap_or(1)
    }

    /// All from `position` on.
    #[must_use]
    pub fn rest(&self, position: usize) -> &[String] {
        self.0.get(position..).unwrap_or_default()
    }
}

impl Default for Arguments {
    fn default() -> Self {
        Self::new()
    }
}

/// Prints one line, at once.
pub fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _gone = out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush());
}

/// Runs a program; its error is printed by the name that errno(3) has for it.
pub fn main_of(run: impl FnOnce(&Arguments) -> io::Result<()>) -> ExitCode {
    match run(&Arguments::new()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&name_of(&error));
            ExitCode::FAILURE
        }
    }
}

/// `ECONNREFUSED` and its like.
#[must_use]
pub fn name_of(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |n| format!("{:?}", Errno::from_raw(n)))
}

/// A client's side of the protocol.
///
/// # Errors
/// Those of the stream.
pub fn ask(mut stream: impl Read + Write, n: usize) -> io::Result<String> {
    stream.write_all(format!("ping {n}\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.trim_end().to_owned())
}

/// A server's side of the protocol; gives what was asked.
///
/// # Errors
/// Those of the stream.
pub fn answer(mut stream: impl Read + Write) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(&mut stream).read_line(&mut line)?;
    let line = line.trim_end().to_owned();
    stream.write_all(format!("{}\n", line.replace("ping", "pong")).as_bytes())?;
    Ok(line)
}
