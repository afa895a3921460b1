//! One question to the broker, and its answer.
//!
//! An idle channel is taken by an atomic swap and put back after use. A thread, or a signal handler,
//! that finds none opens another through the door; so nobody waits for anybody, and a process killed or
//! forked at any point leaves nothing locked.

use core::sync::atomic::Ordering;

use libc::c_int;
use portcullis_wire::{Flags, OpCode, Reply, Request, frame::FRAME};
use zerocopy::IntoBytes;

use crate::{
    door::{self, Held},
    own, sys,
};

/// How long an answer may take.
const PATIENCE: libc::timeval = libc::timeval { tv_sec: 5, tv_usec: 0 };
/// The same, in nanoseconds.
const PATIENCE_NS: u64 = 5_000_000_000;

/// `SO_PASSPIDFD` (asm-generic/socket.h, Linux 6.5).
const SO_PASSPIDFD: c_int = 76;

/// Most replies to earlier, abandoned questions that are skipped.
const STALE: usize = 16;

/// Why there is no answer. Each is a refusal.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Silence {
    /// Nobody answers at the door.
    NoBroker,
    /// No descriptor is left to ask with.
    NoDescriptor,
    /// The broker went away in the middle.
    Lost,
    /// It did not answer in time.
    TimedOut,
    /// What it said is no reply to this.
    Garbage,
}

/// Bounds every wait on a socket of ours.
pub fn bound(fd: c_int) {
    sys::setsockopt(fd, libc::SO_RCVTIMEO, &PATIENCE);
    sys::setsockopt(fd, libc::SO_SNDTIMEO, &PATIENCE);
}

/// A channel with its descriptor.
struct Channel(Held);

impl Channel {
    fn claim() -> Option<Self> {
        if own::borrowed() {
            return None;
        }
        for place in &own::own()?.channels {
            let held = Held(place.swap(0, Ordering::Acquire));
            if held != Held::NONE {
                if held.is_ours() {
                    return Some(Self(held));
                }
                door::unhide(held.fd());
            }
        }
        if !own::sandboxed() {
            return None;
        }
        let spare = own::spares().iter().map(|place| Held(place.swap(0, Ordering::AcqRel)));
        spare.filter(|held| *held != Held::NONE).map(Self).next()
    }

    /// Opens one, even if the program is at its limit of descriptors: that limit is not meant for us,
    /// so it is lifted for the moment, where the hard limit permits.
    fn open() -> Result<Self, Silence> {
        match Self::try_open() {
            Err(Silence::NoDescriptor) => {
                sys::with_more_descriptors(|| Self::try_open().ok()).ok_or(Silence::NoDescriptor)
            }
            other => other,
        }
    }

    fn try_open() -> Result<Self, Silence> {
        if own::sandboxed() {
            return Err(Silence::NoBroker);
        }
        let mut door = door::door();
        if door == Held::NONE {
            door = door::reopen().ok_or(Silence::NoBroker)?;
        }
        let [ours, theirs] = sys::pair().map_err(|errno| match errno {
            libc::EMFILE => Silence::NoDescriptor,
            _ => Silence::NoBroker,
        })?;
        bound(ours);
        // Set before the first message, so that the broker learns the writer of that one too.
        let one: c_int = 1;
        sys::setsockopt(theirs, libc::SO_PASSCRED, &one);
        sys::setsockopt(theirs, SO_PASSPIDFD, &one);
        let opening = Request::new(OpCode::Open, 0);
        let mut sent = sys::send(door.fd(), opening.as_bytes(), theirs, 0);
        if sent < 0
            && let Some(again) = door::reopen()
        {
            sent = sys::send(again.fd(), opening.as_bytes(), theirs, 0);
        }
        sys::close(theirs);
        if sent < 0 {
            sys::close(ours);
            return Err(Silence::NoBroker);
        }
        let ours = door::raise(ours);
        let Some(held) = Held::of(ours) else {
            sys::close(ours);
            return Err(Silence::NoBroker);
        };
        door::hide(ours);
        Ok(Self(held))
    }

    fn put_back(self) {
        if !own::borrowed()
            && let Some(own) = own::own()
        {
            for place in &own.channels {
                if place.compare_exchange(0, self.0.0, Ordering::Release, Ordering::Relaxed).is_ok() {
                    return;
                }
            }
        }
        self.close();
    }

    fn close(self) {
        if self.0.is_ours() {
            sys::close(self.0.fd());
        }
        door::unhide(self.0.fd());
    }

    fn exchange(&self, request: &Request, attach: c_int) -> Result<Reply, Silence> {
        let fd = self.0.fd();
        let sandboxed = own::sandboxed();
        let sent = if sandboxed {
            sys::write(fd, request.as_bytes())
        } else {
            sys::send(fd, request.as_bytes(), attach, 0)
        };
        if sent < 0 {
            return Err(silence(sent));
        }
        for _ in 0..STALE {
            let mut bytes = [0u8; FRAME];
            let mut fds = [-1; 3];
            let (got, attached) = if sandboxed {
                (sys::read(fd, &mut bytes), 0)
            } else {
                sys::receive(fd, &mut bytes, &mut fds)
            };
            let memory = fds.iter().take(attached);
            let answer = read(got, &bytes);
            if let Ok((_, reply)) = answer
                && Flags(reply.flags).has(Flags::MEMORY)
                && attached == fds.len()
            {
                own::adopt(fds);
            } else {
                memory.for_each(|&fd| sys::close(fd));
            }
            let (opcode, reply) = answer?;
            if reply.seq == request.seq && opcode as u16 == request.opcode {
                return Ok(reply);
            }
            if reply.seq == 0 && reply.errno != 0 {
                return Err(Silence::NoBroker); // the channel was not admitted
            }
        }
        Err(Silence::Garbage)
    }
}

/// Errno of a failed send or receive.
fn silence(result: isize) -> Silence {
    match c_int::try_from(-result) {
        Ok(libc::EAGAIN | libc::ETIMEDOUT) => Silence::TimedOut,
        _ => Silence::Lost,
    }
}

/// What was received, as a reply.
fn read(got: isize, bytes: &[u8]) -> Result<(OpCode, Reply), Silence> {
    match usize::try_from(got) {
        Err(_) => Err(silence(got)),
        Ok(0) => Err(Silence::Lost),
        Ok(n) => Reply::decode(bytes.get(..n).unwrap_or_default()).map_err(|_| Silence::Garbage),
    }
}

/// Asks one question; `attach` is a descriptor for the broker to see, or -1. Blocks for at most about
/// five seconds.
///
/// # Errors
/// [`Silence`]. The caller refuses.
pub fn ask(request: &mut Request, attach: c_int) -> Result<Reply, Silence> {
    if own::sandboxed() {
        request.flags |= Flags::NO_DESCRIPTOR;
    } else if wants_memory(request) {
        request.flags |= Flags::WANT_MEMORY;
    }
    request.seq = number();
    let _quiet = (!own::sandboxed()).then(sys::Quiet::new);
    let began = sys::nanoseconds(libc::CLOCK_MONOTONIC);
    let mut why = Silence::NoBroker;
    for _ in 0..2 {
        let channel = match Channel::claim() {
            Some(channel) => channel,
            None => Channel::open()?,
        };
        match channel.exchange(request, attach) {
            Ok(reply) => {
                channel.put_back();
                return Ok(reply);
            }
            Err(silence) => {
                // Whatever this one would still say is not for the next question.
                channel.close();
                own::forsake();
                why = silence;
            }
        }
        let waited = sys::nanoseconds(libc::CLOCK_MONOTONIC).wrapping_sub(began);
        if why != Silence::Lost || waited >= PATIENCE_NS {
            break; // a restarted broker is asked again, a hung one is not
        }
        if wants_memory(request) {
            request.flags |= Flags::WANT_MEMORY;
        }
    }
    Err(why)
}

/// Whether the answer should bring the verdict table along.
fn wants_memory(request: &Request) -> bool {
    request.opcode == OpCode::Judge as u16
        && !own::sandboxed()
        && !own::borrowed()
        && own::own().is_some()
        && own::shared().is_none()
}

/// Says something that has no reply. Never blocks; nothing comes of it if there is no channel.
pub fn tell(request: &mut Request) {
    request.seq = number();
    let Some(channel) = Channel::claim().or_else(|| Channel::open().ok()) else { return };
    let bytes = request.as_bytes();
    if own::sandboxed() {
        sys::write(channel.0.fd(), bytes);
    } else {
        sys::send(channel.0.fd(), bytes, -1, libc::MSG_DONTWAIT);
    }
    channel.put_back();
}

/// Opens channels for threads and children, before a sandbox forbids to open any.
pub fn prepare() {
    let _quiet = sys::Quiet::new();
    own::make_spares();
    for place in own::spares() {
        if place.load(Ordering::Relaxed) == 0
            && let Ok(channel) = Channel::open()
            && place.compare_exchange(0, channel.0.0, Ordering::AcqRel, Ordering::Relaxed).is_err()
        {
            channel.close();
        }
    }
}

/// Whether this process has asked anything yet.
pub fn used() -> bool {
    !own::borrowed()
        && own::own().is_some_and(|own| own.channels.iter().any(|place| place.load(Ordering::Relaxed) != 0))
}

/// Gives a channel another number, because the program wants this one (dup2).
pub fn make_way(fd: c_int) {
    let Some(own) = own::own().filter(|_| !own::borrowed()) else { return };
    for place in &own.channels {
        let held = Held(place.load(Ordering::Relaxed));
        let mine = held != Held::NONE && held.fd() == fd;
        if mine && place.compare_exchange(held.0, 0, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            let moved = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, portcullis_wire::frame::LOWEST_FD);
            door::unhide(fd);
            if moved >= 0
                && let Some(held) = Held::of(moved)
            {
                door::hide(moved);
                Channel(held).put_back();
            }
        }
    }
}

/// A number for a request, never 0.
fn number() -> u32 {
    own::own().map_or(1, |own| own.seq.fetch_add(1, Ordering::Relaxed).wrapping_add(1).max(1))
}
