//! Whether a call may go on: the verdict table first, then the broker.

use core::sync::atomic::{AtomicBool, Ordering};

use libc::c_int;
use portcullis_wire::{
    Addr, Flags, OpCode, Reply, Request,
    shared::{Pushed, Record},
};

use crate::{
    Errno,
    channel::{self, Silence},
    hints::Sock,
    own, start, sys,
};

/// What is about to be done: numbers of `portcullis_types::Op` (a test compares them).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Op {
    /// connect(2), or sendto(2) with `MSG_FASTOPEN`.
    Connect = 1,
    /// bind(2).
    Bind = 2,
    /// listen(2).
    Listen = 3,
    /// accept(2), or a connection found at start.
    Accept = 4,
    /// First datagram to a peer.
    Send = 5,
    /// First datagram from a peer.
    Receive = 6,
    /// socket(2) of another kind than internet streams and datagrams.
    Socket = 7,
}

impl Op {
    /// What a program sees if there is no answer.
    const fn unanswered(self) -> Errno {
        match self {
            Self::Connect => Errno(libc::ECONNREFUSED),
            _ => Errno(libc::EACCES),
        }
    }
}

/// One call to judge.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// What.
    pub op: Op,
    /// On which descriptor.
    pub fd: c_int,
    /// Which kind of socket that is.
    pub sock: Sock,
    /// Bits of [`Flags`].
    pub flags: u32,
    /// For listen(2).
    pub backlog: c_int,
    /// What it is bound to, or shall be.
    pub local: Addr,
    /// Whom it concerns.
    pub remote: Addr,
}

impl Call {
    /// A call without addresses.
    #[must_use]
    pub const fn new(op: Op, fd: c_int, sock: Sock) -> Self {
        Self { op, fd, sock, flags: 0, backlog: 0, local: Addr::NONE, remote: Addr::NONE }
    }
}

/// The call goes on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Permit {
    /// With this address instead of the program's.
    pub rewrite: Option<Addr>,
    /// The kernel filters what the socket receives.
    pub filtered: bool,
    /// Its audit record, if it has one already.
    pub audit_seq: u64,
}

/// The kernel holds every judged call of this process and its children until the broker has judged it there.
static HELD: AtomicBool = AtomicBool::new(false);

/// Judges one call.
///
/// # Errors
/// The errno that the program gets: the broker's, or [`Op::unanswered`].
pub fn judge(call: &Call) -> Result<Permit, Errno> {
    start::ensure();
    let held_there = call.op != Op::Receive && call.flags & Flags::INHERITED == 0;
    if (held_there && HELD.load(Ordering::Relaxed)) || known(call) {
        return Ok(Permit::default());
    }
    let mut request = Request::new(OpCode::Judge, 0);
    request.call = call.op as u8;
    request.domain = u16::from(call.sock.domain);
    request.kind = u16::from(call.sock.kind);
    request.protocol = call.sock.protocol;
    request.fd = call.fd;
    request.flags = call.flags;
    request.backlog = call.backlog;
    request.local = call.local;
    request.remote = call.remote;
    match channel::ask(&mut request, call.fd) {
        Ok(reply) => {
            if Flags(reply.flags).has(Flags::HELD) {
                HELD.store(true, Ordering::Relaxed);
            }
            permit(&reply, call.op)
        }
        Err(
            Silence::NoBroker | Silence::NoDescriptor | Silence::Lost | Silence::TimedOut | Silence::Garbage,
        ) => Err(call.op.unanswered()),
    }
}

fn permit(reply: &Reply, op: Op) -> Result<Permit, Errno> {
    match reply.errno {
        0 => {
            let flags = Flags(reply.flags);
            Ok(Permit {
                rewrite: flags.has(Flags::REWRITE).then_some(reply.rewrite),
                filtered: flags.has(Flags::FILTERED),
                audit_seq: reply.audit_seq,
            })
        }
        errno if errno > 0 => Err(Errno(errno)),
        _ => Err(op.unanswered()),
    }
}

/// Whether the table permits it; then it is on record already, or will be by the kernel.
fn known(call: &Call) -> bool {
    let port = match call.op {
        Op::Connect | Op::Send => call.remote.port,
        Op::Accept | Op::Receive => call.local.port,
        Op::Bind | Op::Listen | Op::Socket => return false,
    };
    if call.flags & Flags::INHERITED != 0 {
        return false;
    }
    let Some(shared) = own::shared() else { return false };
    let protocol = call.sock.iana();
    let Some(hit) = shared.table.look_up(call.op as u8, protocol, &call.remote, port) else { return false };
    if !shared.state.vouches(hit.generation, sys::nanoseconds(libc::CLOCK_MONOTONIC)) {
        return false;
    }
    if hit.noted {
        return true;
    }
    let record = Record {
        call: call.op as u8,
        protocol,
        assurance: hit.assurance,
        fd: call.fd,
        rule: hit.rule,
        generation: hit.generation,
        time: sys::nanoseconds(libc::CLOCK_REALTIME),
        cookie: 0,
        local: call.local,
        remote: call.remote,
    };
    match shared.ring.push(&record) {
        Pushed::Quietly => true,
        Pushed::RingTheBell => {
            channel::tell(&mut Request::new(OpCode::Doorbell, 0));
            true
        }
        Pushed::Full => false,
    }
}

/// Whether peers that were judged under `generation` need not be judged again. Unlike a verdict this
/// holds while the broker is away: a flow that is established goes on.
#[must_use]
pub fn generation() -> Option<u64> {
    Some(own::shared()?.state.generation.load(core::sync::atomic::Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_types::Op as Word;

    #[test]
    fn numbers_are_those_of_the_shared_words() {
        for (ours, word) in [
            (Op::Connect, Word::Connect),
            (Op::Bind, Word::Bind),
            (Op::Listen, Word::Listen),
            (Op::Accept, Word::Accept),
            (Op::Send, Word::Send),
            (Op::Receive, Word::Receive),
            (Op::Socket, Word::Socket),
        ] {
            assert_eq!(ours as u8, word as u8);
        }
    }

    #[test]
    fn a_negative_errno_is_no_permit() {
        let mut reply = Reply::to(&Request::new(OpCode::Judge, 1));
        reply.errno = -1;
        assert_eq!(permit(&reply, Op::Connect).unwrap_err(), Errno(libc::ECONNREFUSED));
        assert_eq!(permit(&reply, Op::Bind).unwrap_err(), Errno(libc::EACCES));
    }
}
