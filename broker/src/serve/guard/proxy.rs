//! Calls that are made for a program, on a copy of its descriptor and of what it said.
//!
//! What limits the program limits them too: socket, user and network namespace are the socket's own; a Landlock
//! rule of the program's for the network cannot be made (see [`super::reach`]); and bind(2) is never made here.

use std::os::fd::{AsFd, OwnedFd};

use nix::poll::PollFlags;
use portcullis_guard::{book::Line, listener::Answer};
use portcullis_wire::{OpCode, Request};

use super::{
    Held, Outcome, fail,
    judging::{Letters, answered},
    waiting::{Sending, Step},
};
use crate::{
    guard::target,
    serve::Broker,
    sys::proxy::{self, Message},
};

impl Broker {
    /// connect(2), as far as it goes without waiting.
    pub(super) fn connect_for(
        &mut self,
        held: &Held,
        socket: OwnedFd,
        address: Vec<u8>,
        seq: u64,
        line: Option<Line>,
    ) -> Outcome {
        match self.try_connect(held, &socket, &address, seq, false) {
            Some(answer) => Outcome::Answer(answer),
            None => self.wait_for(held, socket, PollFlags::POLLOUT, Step::Connect { address, seq }, line),
        }
    }

    /// `None`: not yet. `waits`: the program waits for it already, whatever the socket's mode is by now.
    pub(super) fn try_connect(
        &mut self,
        held: &Held,
        socket: &OwnedFd,
        address: &[u8],
        seq: u64,
        waits: bool,
    ) -> Option<Answer> {
        // Nobody else connects it: all calls come here.
        let (done, blocks) = proxy::connect(socket.as_fd(), address);
        if (blocks || waits) && done.as_ref().is_err_and(proxy::is_under_way) {
            return None;
        }
        if let Err(error) = &done
            && !proxy::is_under_way(error)
            && seq != 0
        {
            let mut outcome = Request::new(OpCode::Outcome, 0);
            (outcome.errno, outcome.audit_seq) = (error.raw_os_error().unwrap_or(0), seq);
            self.record_outcome(held.key, &outcome, "guard");
        }
        Some(answered(done.map(|()| 0)))
    }

    /// sendto(2), sendmsg(2), sendmmsg(2), as far as they go without waiting.
    pub(super) fn send_for(
        &mut self,
        held: &Held,
        socket: OwnedFd,
        messages: Vec<Message>,
        flags: i32,
        letters: &Letters,
        line: Option<Line>,
    ) -> Outcome {
        const ZERO_COPY: i32 = 0x400_0000; // MSG_ZEROCOPY, linux/socket.h
        if flags & ZERO_COPY != 0 {
            return fail(libc::ENOBUFS); // as where no memory may be pinned for it
        }
        let blocks = flags & libc::MSG_DONTWAIT == 0 && proxy::blocks(socket.as_fd());
        let mut sending = Sending { messages, flags, lengths: letters.lengths(), done: 0 };
        match try_send(held, &socket, &mut sending, blocks) {
            Some(answer) => Outcome::Answer(answer),
            None => self.wait_for(held, socket, PollFlags::POLLOUT, Step::Send(sending), line),
        }
    }
}

/// `None`: not yet.
pub(super) fn try_send(held: &Held, socket: &OwnedFd, sending: &mut Sending, blocks: bool) -> Option<Answer> {
    while let Some(message) = sending.messages.get(sending.done) {
        let sent = proxy::send(socket.as_fd(), message, sending.flags);
        let errno = sent.as_ref().err().and_then(std::io::Error::raw_os_error);
        match (sent, errno) {
            (Ok(length), _) => {
                let Some(lengths) = sending.lengths else {
                    return Some(Answer::Return(i64::try_from(length).unwrap_or(0)));
                };
                let at = lengths.saturating_add(64 * sending.done as u64);
                let length = u32::try_from(length).unwrap_or(0).to_ne_bytes();
                if !target::write(held.tid(), at, &length) {
                    return Some(Answer::Fail(libc::EFAULT));
                }
                sending.done += 1;
            }
            (_, Some(libc::EAGAIN)) if blocks => return None,
            // Fast open without a cookie: the connection is under way, and the rest is an ordinary write.
            (_, Some(libc::EINPROGRESS)) if blocks => {
                sending.flags &= !libc::MSG_FASTOPEN;
                return None;
            }
            (Err(error), _) if sending.done == 0 => return Some(answered(Err(error))),
            (Err(_), _) => break,
        }
    }
    Some(Answer::Return(i64::try_from(sending.done).unwrap_or(0)))
}
