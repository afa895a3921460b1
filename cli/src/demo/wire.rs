//! What crosses the link: counted while it happens, told at the end.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt::RcvBuf,
    },
};
use serde::{Deserialize, Serialize};

use crate::{COULD_NOT, output::Out};

/// Room for frames that wait, in bytes.
const ROOM: usize = 32 << 20;
/// Length of a link header (IEEE 802.3), and of an IPv4 header without options.
const LINK: usize = 14;

/// What was seen.
#[derive(Debug, Default, Deserialize, Serialize)]
pub struct Seen {
    /// TCP segments with something in them.
    pub segments: u64,
    /// Of the texts that were looked for, those that were in one.
    pub found: Vec<String>,
    /// Ports, from and to, of flows that began with a TLS ClientHello.
    pub hellos: Vec<(u16, u16)>,
}

/// Listens until standard input ends, then prints one JSON object; the result is the exit status.
pub fn run(texts: &[String], out: &mut Out) -> u8 {
    match listen(texts, out) {
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

fn listen(texts: &[String], out: &mut Out) -> io::Result<Seen> {
    let link = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    let _less = setsockopt(&link, RcvBuf, &ROOM);
    out.line("listening");
    let (mut seen, mut frame, input) = (Seen::default(), vec![0; 1 << 16], io::stdin());
    loop {
        let mut fds = [link.as_fd(), input.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut fds, PollTimeout::NONE)?;
        let ended = fds.get(1).and_then(PollFd::any).unwrap_or(true);
        while let Ok(length) = recv(link.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT) {
            seen.take(frame.get(..length).unwrap_or_default(), texts);
        }
        if ended {
            return Ok(seen);
        }
    }
}

impl Seen {
    fn take(&mut self, frame: &[u8], texts: &[String]) {
        let Some((ports, payload)) = payload(frame).filter(|(_, payload)| !payload.is_empty()) else {
            return;
        };
        self.segments += 1;
        for text in texts.iter().filter(|text| contains(payload, text.as_bytes())) {
            if !self.found.contains(text) {
                self.found.push(text.clone());
            }
        }
        // A handshake record whose first message is a ClientHello (RFC 8446, 4 and 5.1).
        if matches!(payload, [22, 3, _, _, _, 1, ..]) && !self.hellos.contains(&ports) {
            self.hellos.push(ports);
        }
    }
}

/// Ports and content of a TCP segment over IPv4.
fn payload(frame: &[u8]) -> Option<((u16, u16), &[u8])> {
    let ip = frame.get(LINK..).filter(|_| frame.get(12..LINK) == Some(&[8, 0]))?;
    let header = usize::from(ip.first()? & 15) * 4;
    let length = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
    let tcp = ip.get(header..length).filter(|_| ip.get(9) == Some(&6))?;
    let port = |at: usize| tcp.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes);
    Some(((port(0)?, port(2)?), tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?))
}

fn contains(all: &[u8], part: &[u8]) -> bool {
    let Some(first) = part.first() else { return false };
    all.iter()
        .enumerate()
        .any(|(at, byte)| byte == first && all.get(at..).is_some_and(|r| r.starts_with(part)))
}
