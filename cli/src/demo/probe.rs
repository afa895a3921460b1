//! A small port scanner: what a stranger sees.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt::SocketError},
};
use serde::{Deserialize, Serialize};

use crate::{COULD_NOT, output::Out};

/// How one port answered.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Seen {
    /// A handshake was completed.
    Open,
    /// It was refused by a RST.
    Closed,
    /// Nothing came back.
    Filtered,
}

/// One port and how it answered.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Port {
    /// Its number.
    pub port: u16,
    /// How it answered.
    pub seen: Seen,
}

/// How long a port may take to answer, on a link without delay.
const PATIENCE: Duration = Duration::from_millis(300);

/// Tries all ports at once and prints one JSON array; the result is the exit status.
pub fn run(address: IpAddr, ports: &[u16], out: &mut Out) -> u8 {
    match probe(address, ports) {
        Ok(seen) => {
            out.json(&seen);
            0
        }
        Err(error) => {
            out.error(&error);
            COULD_NOT
        }
    }
}

fn probe(address: IpAddr, ports: &[u16]) -> io::Result<Vec<Port>> {
    let mut waiting: Vec<(u16, OwnedFd)> = Vec::new();
    let mut seen = Vec::new();
    for &port in ports {
        let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket::socket(family, SockType::Stream, flags, None)?;
        let to = SockaddrStorage::from(SocketAddr::new(address, port));
        match socket::connect(fd.as_raw_fd(), &to) {
            Ok(()) => seen.push(Port { port, seen: Seen::Open }),
            Err(Errno::EINPROGRESS) => waiting.push((port, fd)),
            Err(Errno::ECONNREFUSED) => seen.push(Port { port, seen: Seen::Closed }),
            Err(_) => seen.push(Port { port, seen: Seen::Filtered }),
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while !waiting.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds: Vec<_> =
            waiting.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLOUT)).collect();
        let count = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO))?;
        let mut fired = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect::<Vec<_>>().into_iter();
        if count == 0 {
            break;
        }
        waiting.retain(|(port, fd)| {
            if !fired.next().unwrap_or(false) {
                return true;
            }
            let answer = match socket::getsockopt(fd, SocketError) {
                Ok(0) => Seen::Open,
                Ok(error) if error == Errno::ECONNREFUSED as i32 => Seen::Closed,
                _ => Seen::Filtered,
            };
            seen.push(Port { port: *port, seen: answer });
            false
        });
    }
    seen.extend(waiting.iter().map(|(port, _)| Port { port: *port, seen: Seen::Filtered }));
    seen.sort_by_key(|p| p.port);
    Ok(seen)
}
