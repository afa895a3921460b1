//! One protected flow: the program's bytes on one socket, TLS records on the other.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        socket::{MsgFlags, Shutdown, recv, send, sendmsg, setsockopt, shutdown, sockopt},
        uio::readv,
    },
};

use super::{
    handshake::{HandshakeError, Keys, Renewal},
    record::{CONTENT, Cipher, Content, HEADER, RECORD, RecordError, TRAILER, length},
};

/// Records that are made of one read(2).
const BATCH: usize = 16;
/// Bytes that are read from the wire at once, beside what was left of the last record.
const INTAKE: usize = 256 * 1024;
/// Bytes that one flow may move before another has its turn.
const TURN: usize = 1 << 20;

/// Buffers that all flows of a thread share, so that an idle flow has none.
pub struct Scratch {
    up: Vec<u8>,
    down: Vec<u8>,
    /// Where in `down` the program's bytes are: (offset, length).
    found: Vec<(usize, usize)>,
}

impl Scratch {
    /// Buffers for one thread.
    pub fn new() -> Self {
        Self { up: vec![0; BATCH * RECORD], down: vec![0; INTAKE + RECORD + 256], found: Vec::new() }
    }
}

/// What is known of a socket from epoll(7), edge-triggered.
#[derive(Clone, Copy, Default)]
pub struct Ready {
    pub read: bool,
    pub write: bool,
    /// The other end has shut down or failed: reading goes on until it says so.
    pub ending: bool,
}

/// How a flow ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum How {
    /// Both ends closed in order.
    #[error("closed")]
    Closed,
    /// The program's end was reset.
    #[error("reset by the program")]
    Program(#[source] Errno),
    /// The wire was reset or failed.
    #[error("reset by the peer")]
    Peer(#[source] Errno),
    /// The peer closed without saying so in TLS: something may be missing (RFC 8446, 6.1).
    #[error("truncated by the peer")]
    Truncated,
    /// The peer sent an alert other than closing.
    #[error("ended by the peer with TLS alert {0}")]
    Alert(u8),
    /// The peer sent what is no TLS.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// New keys could not be made.
    #[error(transparent)]
    Keys(#[from] HandshakeError),
    /// The broker had it cut.
    #[error("cut")]
    Cut,
}

/// One direction.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Half {
    Open,
    /// Its source has ended; what is pending goes out first.
    Draining,
    Closed,
}

/// Bytes that a socket did not take yet.
#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    done: usize,
}

impl Pending {
    /// `true` when there are none left.
    fn flush(&mut self, to: &OwnedFd, ready: &mut Ready) -> Result<bool, Errno> {
        while let Some(rest) = self.bytes.get(self.done..).filter(|rest| !rest.is_empty()) {
            match offer(send(to.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL), ready)? {
                Some(sent) => self.done += sent,
                None => return Ok(false),
            }
        }
        *self = Self::default(); // frees the memory: most flows are idle most of the time
        Ok(true)
    }
}

/// `None`: not now.
fn offer(result: nix::Result<usize>, ready: &mut Ready) -> Result<Option<usize>, Errno> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(Errno::EAGAIN) => {
            ready.write = false;
            Ok(None)
        }
        Err(Errno::EINTR) => Ok(Some(0)),
        Err(e) => Err(e),
    }
}

pub struct Flow {
    plain: OwnedFd,
    wire: OwnedFd,
    pub plain_ready: Ready,
    pub wire_ready: Ready,
    seal: Cipher,
    open: Cipher,
    renewal: Renewal,
    to_wire: Pending,
    to_plain: Pending,
    /// Beginning of a record whose rest has not arrived.
    partial: Vec<u8>,
    /// Whether `partial` came behind the handshake and may hold whole records.
    fresh: bool,
    up: Half,
    down: Half,
    /// Bytes of the program, to the wire and from it.
    pub sent: u64,
    pub received: u64,
}

impl Flow {
    /// A flow after its handshake. Both sockets are non-blocking.
    pub fn new(plain: OwnedFd, wire: OwnedFd, keys: Keys, wire_ready: Ready) -> Self {
        let Keys { seal, open, renewal, incoming, early, .. } = keys;
        // If this process dies, the kernel closes for it: that must not look like an orderly end.
        reset_on_close(&plain);
        Self {
            plain,
            wire,
            plain_ready: Ready { read: true, write: true, ending: false },
            wire_ready: Ready { read: true, ..wire_ready },
            seal,
            open,
            renewal,
            to_wire: Pending::default(),
            received: early.data.len() as u64,
            to_plain: Pending { bytes: early.data, done: 0 },
            fresh: !incoming.is_empty(),
            partial: incoming,
            up: Half::Open,
            down: if early.closed { Half::Draining } else { Half::Open },
            sent: 0,
        }
    }

    /// Moves what can be moved. `Ok(true)`: there is more, but others have their turn first.
    pub fn pump(&mut self, scratch: &mut Scratch) -> Result<bool, How> {
        let more_up = self.pump_up(scratch)?;
        let more_down = self.pump_down(scratch)?;
        if self.up == Half::Closed && self.down == Half::Closed {
            return Err(How::Closed);
        }
        Ok(more_up || more_down)
    }

    fn pump_up(&mut self, scratch: &mut Scratch) -> Result<bool, How> {
        let mut moved = 0;
        loop {
            if !self.to_wire.flush(&self.wire, &mut self.wire_ready).map_err(How::Peer)? {
                return Ok(false);
            }
            match self.up {
                Half::Closed => return Ok(false),
                Half::Draining => {
                    self.up = Half::Closed;
                    // ENOTCONN: the peer has closed too, which reading the wire will tell.
                    let _ = shutdown(self.wire.as_raw_fd(), Shutdown::Write);
                    return Ok(false);
                }
                Half::Open if !self.plain_ready.read => return Ok(false),
                Half::Open if moved >= TURN => return Ok(true),
                Half::Open => {}
            }
            if self.seal.worn() {
                self.renew_seal()?;
                continue;
            }
            let mut slots: Vec<_> = scratch
                .up
                .chunks_exact_mut(RECORD)
                .filter_map(|slot| slot.get_mut(HEADER..HEADER + CONTENT).map(IoSliceMut::new))
                .collect();
            let count = match readv(&self.plain, &mut slots) {
                Ok(0) => {
                    self.note(Content::Alert, &[1, 0])?; // warning, close_notify (RFC 8446, 6.1)
                    self.up = Half::Draining;
                    continue;
                }
                Ok(count) => count,
                Err(Errno::EAGAIN) => {
                    self.plain_ready.read = false;
                    return Ok(false);
                }
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(How::Program(e)),
            };
            if count < BATCH * CONTENT && !self.plain_ready.ending {
                self.plain_ready.read = false; // all there was; what comes later is a new edge
            }
            let mut end = 0;
            let mut left = count;
            for slot in scratch.up.chunks_exact_mut(RECORD) {
                if left == 0 {
                    break;
                }
                let content = left.min(CONTENT);
                end += self.seal.seal(slot, content, Content::Data)?;
                left -= content;
            }
            moved += count;
            self.sent += count as u64;
            let records = scratch.up.get(..end).unwrap_or_default();
            let result = send(self.wire.as_raw_fd(), records, MsgFlags::MSG_NOSIGNAL);
            let taken = offer(result, &mut self.wire_ready).map_err(How::Peer)?.unwrap_or(0);
            if let Some(rest) = records.get(taken..).filter(|rest| !rest.is_empty()) {
                self.to_wire.bytes.extend_from_slice(rest);
            }
        }
    }

    /// Puts a short record of ours behind what is pending for the wire.
    fn note(&mut self, content: Content, bytes: &[u8]) -> Result<(), RecordError> {
        let mut slot = [&[0; HEADER], bytes, &[0; TRAILER]].concat();
        self.seal.seal(&mut slot, bytes.len(), content)?;
        self.to_wire.bytes.extend_from_slice(&slot);
        Ok(())
    }

    /// Tells the peer that a new key follows, and takes it (RFC 8446, 4.6.3).
    fn renew_seal(&mut self) -> Result<(), How> {
        self.note(Content::Handshake, &[KEY_UPDATE, 0, 0, 1, 0])?;
        self.seal = self.renewal.next_seal()?;
        Ok(())
    }

    fn pump_down(&mut self, scratch: &mut Scratch) -> Result<bool, How> {
        let mut moved = 0;
        loop {
            if !self.to_plain.flush(&self.plain, &mut self.plain_ready).map_err(How::Program)? {
                return Ok(false);
            }
            match self.down {
                Half::Closed => return self.watch_wire(),
                Half::Draining => {
                    self.down = Half::Closed;
                    let _ = shutdown(self.plain.as_raw_fd(), Shutdown::Write);
                    continue;
                }
                Half::Open if self.fresh => {}
                Half::Open if !self.wire_ready.read => return Ok(false),
                Half::Open if moved >= TURN => return Ok(true),
                Half::Open => {}
            }
            let kept = self.partial.len();
            let (old, room) = scratch.down.split_at_mut_checked(kept).ok_or(RecordError::TooLong)?;
            old.copy_from_slice(&self.partial);
            let mut count = 0;
            if !self.fresh {
                let asked = room.len();
                count = match recv(self.wire.as_raw_fd(), room, MsgFlags::empty()) {
                    Ok(0) => return Err(How::Truncated),
                    Ok(count) => count,
                    Err(Errno::EAGAIN) => {
                        self.wire_ready.read = false;
                        return Ok(false);
                    }
                    Err(Errno::EINTR) => continue,
                    Err(e) => return Err(How::Peer(e)),
                };
                if count < asked && !self.wire_ready.ending {
                    self.wire_ready.read = false;
                }
            }
            self.fresh = false;
            moved += count;
            self.digest(scratch, kept + count)?;
        }
    }

    /// Opens the records in the first `filled` bytes of the intake and passes on what is in them.
    fn digest(&mut self, scratch: &mut Scratch, filled: usize) -> Result<(), How> {
        let Scratch { down, found, .. } = scratch;
        found.clear();
        let mut at = 0;
        while self.down == Half::Open {
            let rest = down.get_mut(at..filled).unwrap_or_default();
            let Some(whole) = length(rest)? else { break };
            let Some(record) = rest.get_mut(..whole) else { break };
            let (content, size) = self.open.open(record)?;
            match content {
                Content::Data if size == 0 => {}
                Content::Data => found.push((at + HEADER, size)),
                Content::Alert => self.alert(record.get(HEADER..HEADER + size).unwrap_or_default())?,
                Content::Handshake => self.message(record.get(HEADER..HEADER + size).unwrap_or_default())?,
            }
            at += whole;
        }
        self.partial.clear();
        match down.get(at..filled).filter(|rest| !rest.is_empty() && self.down == Half::Open) {
            Some(rest) => self.partial.extend_from_slice(rest),
            None => self.partial = Vec::new(),
        }
        let parts: Vec<_> =
            found.iter().filter_map(|(from, size)| down.get(*from..from + size)).map(IoSlice::new).collect();
        if parts.is_empty() {
            return Ok(());
        }
        let total: usize = found.iter().map(|(_, size)| size).sum();
        self.received += total as u64;
        let result = sendmsg::<()>(self.plain.as_raw_fd(), &parts, &[], MsgFlags::MSG_NOSIGNAL, None);
        let mut taken = offer(result, &mut self.plain_ready).map_err(How::Program)?.unwrap_or(0);
        for part in &parts {
            match part.get(taken..) {
                Some(rest) => {
                    self.to_plain.bytes.extend_from_slice(rest);
                    taken = 0;
                }
                None => taken -= part.len(),
            }
        }
        Ok(())
    }

    /// After the peer's closing: all that can still come from it is a reset.
    fn watch_wire(&mut self) -> Result<bool, How> {
        if self.wire_ready.read && self.up != Half::Closed {
            let mut rest = [0; 512];
            match recv(self.wire.as_raw_fd(), &mut rest, MsgFlags::empty()) {
                Err(Errno::EAGAIN) | Ok(0) => self.wire_ready.read = false,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(How::Peer(e)),
            }
        }
        Ok(false)
    }

    fn alert(&mut self, alert: &[u8]) -> Result<(), How> {
        match alert {
            [_, 0] => {
                self.down = Half::Draining;
                Ok(())
            }
            [_, other] => Err(How::Alert(*other)),
            _ => Err(RecordError::NoContent.into()),
        }
    }

    /// A handshake message after the handshake: new keys are taken, tickets are not.
    fn message(&mut self, message: &[u8]) -> Result<(), How> {
        const NEW_SESSION_TICKET: u8 = 4;
        match message {
            [NEW_SESSION_TICKET, ..] => Ok(()),
            [KEY_UPDATE, 0, 0, 1, asked @ 0..=1] => {
                self.open = self.renewal.next_open()?;
                if *asked == 1 && self.up == Half::Open {
                    self.renew_seal()?;
                }
                Ok(())
            }
            _ => Err(RecordError::NoContent.into()),
        }
    }

    /// Closes both sockets as `how` asks: an end that did not close in order gets a reset.
    pub fn end(self, how: &How) {
        if matches!(how, How::Closed) {
            let _ = setsockopt(&self.plain, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 });
        } else {
            reset_on_close(&self.wire);
        }
    }
}

/// Handshake type of a key update (RFC 8446, 4).
const KEY_UPDATE: u8 = 24;

/// Makes closing send RST.
pub fn reset_on_close(socket: &OwnedFd) {
    // It fails only for what is no TCP socket.
    let _ = setsockopt(socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
}

/// Borrowed sockets, for epoll(7).
impl Flow {
    pub fn plain(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.plain)
    }
}
