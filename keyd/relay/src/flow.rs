//! One association under way: bytes between the program's socket and the peer's, both directions.
//!
//! What a program may see is what its own socket would show: FIN for `close_notify`, RST for RST and for a
//! stream that ends without `close_notify`. Buffers are the thread's; an association holds bytes only while
//! one side does not take them, or a record has come in part.

use std::{
    array,
    io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write},
    net::{Shutdown, TcpStream},
    ops::Range,
    time::{Duration, Instant},
};

use crate::{
    record::{Alert, Bad, FULL, HEADER, LARGEST, OVERHEAD, Opened, PLAIN, Records, Whole, whole},
    socket::{ask_whether_gone, write},
};

/// Records per batch at most: 256 KiB of plaintext.
pub(crate) const BATCH: usize = 16;
/// Records shorter than this are moved together instead of written as pieces of their own.
const SHORT: usize = 4096;
/// Pieces of one batch at most: all but the first hold [`SHORT`] bytes or more.
const PIECES: usize = BATCH * LARGEST / SHORT + 2;

/// Bytes from which on an association is a stream, and turns from which on it is a conversation that goes on.
const STREAM: u64 = 64 << 10;
const LONG: u32 = 64;

/// What one thread's associations share.
pub(crate) struct Scratch {
    /// Plaintext read from programs, sealed in place.
    seal: Vec<u8>,
    /// Records read from peers, opened in place.
    open: Vec<u8>,
    pieces: Vec<Range<usize>>,
    /// Bytes that this thread's associations hold for sockets that do not take them.
    pub(crate) held: usize,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self {
            seal: vec![0; BATCH * FULL],
            open: vec![0; BATCH * LARGEST],
            pieces: Vec::with_capacity(PIECES),
            held: 0,
        }
    }

    /// Room for what a handshake reads.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        self.open.get_mut(..PLAIN).unwrap_or_default()
    }
}

/// How an association ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Ending {
    /// Both ends closed their direction.
    #[error("closed by both ends")]
    Complete,
    /// The program reset its socket, or closed it with data unread.
    #[error("reset by the program")]
    ProgramReset,
    /// The peer reset its socket.
    #[error("reset by the peer")]
    PeerReset,
    /// The network gave the peer up; the kernel's error number.
    #[error("the peer is lost: {}", io::Error::from_raw_os_error(*.0))]
    PeerLost(i32),
    /// The peer's stream ended without `close_notify`, so it may be incomplete.
    #[error("the peer's stream ended without close_notify")]
    Truncated,
    /// The peer ended the association by this alert (RFC 8446, section 6).
    #[error("ended by the peer with alert {0}")]
    PeerAlert(u8),
    /// What the peer sent is no TLS; the alert it was told.
    #[error("the peer sent a bad record, alert {0}")]
    BadRecord(u8),
    /// The owner of the engine cut it.
    #[error("cut")]
    Cut,
    /// A fault in this program, met by what this association carried.
    #[error("internal fault")]
    Fault,
}

/// Bytes of one direction that a socket has not taken yet.
#[derive(Default)]
struct Held {
    bytes: Vec<u8>,
    sent: usize,
}

impl Held {
    fn is_empty(&self) -> bool {
        self.sent >= self.bytes.len()
    }

    fn len(&self) -> usize {
        self.bytes.len().saturating_sub(self.sent)
    }

    /// Writes what it can; `true` when nothing is left, and then holds no memory either. `last`: the end of the stream
    /// follows at once, so that both go in one packet.
    fn flush(&mut self, to: &TcpStream, last: bool) -> io::Result<bool> {
        while !self.is_empty() {
            match write(to, self.bytes.get(self.sent..).unwrap_or_default(), last) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        *self = Self::default();
        Ok(true)
    }
}

/// One direction.
struct Way {
    held: Held,
    /// Its source is complete.
    ended: bool,
    /// And its sink was told.
    shut: bool,
    /// Bytes of the program's that were read.
    count: u64,
    /// Records per batch: more while batches are full and taken, fewer when the sink is slow.
    batch: usize,
}

impl Way {
    fn new() -> Self {
        Self { held: Held::default(), ended: false, shut: false, count: 0, batch: 2 }
    }

    fn adapt(&mut self, full: bool, taken: bool) {
        self.batch = match (full, taken) {
            (_, false) => (self.batch / 2).max(1),
            (true, true) => (self.batch * 2).min(BATCH),
            (false, true) => self.batch,
        };
    }
}

/// Which socket an event is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Side {
    Outer,
    Inner,
}

/// What epoll said of one socket since it last had nothing more.
#[derive(Clone, Copy)]
struct Ready {
    readable: bool,
    /// More than data waits: an end, an error, an urgent mark. Then a short read does not mean empty.
    odd: bool,
    failed: bool,
}

/// What epoll says now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Signs {
    pub(crate) readable: bool,
    pub(crate) odd: bool,
    pub(crate) failed: bool,
}

/// What is next for an association.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Next {
    /// Nothing until epoll says so.
    Wait,
    /// There is more to do now; others first.
    Again,
    Over(Ending),
}

pub(crate) struct Flow {
    inner: TcpStream,
    /// `None`: the outer side is plain.
    records: Option<Records>,
    /// The last record from the peer, as far as it has come.
    partial: Vec<u8>,
    /// `partial` came with the handshake and was not looked at.
    fresh: bool,
    inward: Way,
    outward: Way,
    outer_ready: Ready,
    inner_ready: Ready,
    /// Counted in [`Scratch::held`].
    counted: usize,
    /// The key that we seal under must change, because of its age or because the peer asked.
    owes_update: bool,
    /// A write met a reset. The kernel says that once, and shows an end to whoever reads after it.
    broken: bool,
    /// Turns that it has had.
    turns: u32,
    began: Instant,
}

const ASSUMED: Ready = Ready { readable: true, odd: true, failed: false };

impl Flow {
    /// Begins with what came after the handshake. `greet` sends the empty record that a confirming client
    /// waits for.
    pub(crate) fn new(
        inner: TcpStream,
        mut records: Option<Records>,
        rest: Vec<u8>,
        greet: bool,
        began: Instant,
    ) -> Result<Self, Bad> {
        let mut outward = Way::new();
        if let (true, Some(records)) = (greet, &mut records) {
            records.empty(&mut outward.held.bytes)?;
        }
        Ok(Self {
            inner,
            records,
            fresh: !rest.is_empty(),
            partial: rest,
            inward: Way::new(),
            outward,
            outer_ready: ASSUMED,
            inner_ready: ASSUMED,
            counted: 0,
            owes_update: false,
            broken: false,
            turns: 0,
            began,
        })
    }

    pub(crate) fn inner(&self) -> &TcpStream {
        &self.inner
    }

    /// Bytes from the peer to the program, from the program to the peer, and time since the first packet.
    pub(crate) fn traffic(&self) -> (u64, u64, Duration) {
        (self.inward.count, self.outward.count, self.began.elapsed())
    }

    /// Whether it carries much, or for long, and not just a word or two.
    pub(crate) const fn is_stream(&self) -> bool {
        self.inward.count + self.outward.count >= STREAM || self.turns >= LONG
    }

    pub(crate) fn note(&mut self, side: Side, signs: Signs) {
        let ready = match side {
            Side::Outer => &mut self.outer_ready,
            Side::Inner => &mut self.inner_ready,
        };
        ready.readable |= signs.readable | signs.odd | signs.failed;
        ready.odd |= signs.odd | signs.failed;
        ready.failed |= signs.failed;
    }

    /// Seals `alert` for the peer; what the program's socket had not passed on is dropped.
    pub(crate) fn last_words(&mut self, outer: &TcpStream, alert: Alert) {
        if let Some(records) = &mut self.records
            && !self.outward.ended
            && records.alert(alert, &mut self.outward.held.bytes).is_ok()
        {
            let _unsent_is_lost = self.outward.held.flush(outer, false);
        }
    }

    /// Stops counting what is held.
    pub(crate) fn release(&mut self, scratch: &mut Scratch) {
        scratch.held = scratch.held.saturating_sub(self.counted);
        self.counted = 0;
    }

    /// Moves one batch each way. `most` bounds the batch in records.
    pub(crate) fn turn(&mut self, outer: &TcpStream, scratch: &mut Scratch, most: usize) -> Next {
        self.turns = self.turns.saturating_add(1);
        let mut out = self.outward(outer, scratch, most);
        let mut into = self.inward(outer, scratch, most);
        // What one end sent before its reset, and there is no more of it, the other may still read.
        self.broken = matches!(out, Err(Ending::PeerReset)) || matches!(into, Err(Ending::ProgramReset));
        while out == Err(Ending::PeerReset) && into == Ok(true) {
            into = self.inward(outer, scratch, most);
        }
        while into == Err(Ending::ProgramReset) && out == Ok(true) {
            out = self.outward(outer, scratch, most);
        }
        let moved = out.and_then(|out| Ok(out | into?));
        let held = self.inward.held.len() + self.outward.held.len();
        scratch.held = (scratch.held + held).saturating_sub(self.counted);
        self.counted = held;
        match moved {
            Err(ending) => Next::Over(ending),
            Ok(_) if self.inward.shut && self.outward.shut => Next::Over(Ending::Complete),
            Ok(true) => Next::Again,
            // All that could be passed on was; now the reset follows.
            Ok(false) if self.inner_ready.failed => Next::Over(Ending::ProgramReset),
            Ok(false) if self.outer_ready.failed => Next::Over(failure_of(outer)),
            Ok(false) => Next::Wait,
        }
    }

    /// Program to peer. `true` when there is more to do.
    fn outward(&mut self, mut outer: &TcpStream, scratch: &mut Scratch, most: usize) -> Result<bool, Ending> {
        if !self.flush_outward(outer)? || self.outward.ended {
            return Ok(false);
        }
        self.update_key(outer)?;
        if !self.inner_ready.readable || !self.outward.held.is_empty() {
            return Ok(false);
        }
        if let Some(records) = &mut self.records
            && records.key_is_worn()
        {
            self.owes_update = true;
            self.update_key(outer)?;
            return Ok(true);
        }
        let batch = self.outward.batch.min(most);
        let room = scratch.seal.get_mut(..batch * FULL).unwrap_or_default();
        let count = {
            // Each record's plaintext is read to where it will be sealed.
            let mut records = room.chunks_exact_mut(FULL);
            let mut slices: [IoSliceMut<'_>; BATCH] = array::from_fn(|_| {
                let record = records.next().unwrap_or_default();
                IoSliceMut::new(record.get_mut(HEADER..HEADER + PLAIN).unwrap_or_default())
            });
            read(&self.inner, slices.get_mut(..batch).unwrap_or_default())
        };
        let count = match count {
            Ok(Some(count)) => count,
            Ok(None) => {
                self.inner_ready = Ready { failed: self.inner_ready.failed, readable: false, odd: false };
                return Ok(false);
            }
            Err(_) => return Err(Ending::ProgramReset),
        };
        if count == 0 && self.broken {
            return Err(Ending::ProgramReset);
        }
        if count == 0 {
            self.outward.ended = true;
            if let Some(records) = &mut self.records {
                records.alert(Alert::CloseNotify, &mut self.outward.held.bytes).map_err(bad)?;
            }
            self.flush_outward(outer)?;
            return Ok(false);
        }
        if count < batch * PLAIN && !self.inner_ready.odd {
            self.inner_ready.readable = false;
        }
        self.outward.count += count as u64;
        let sealed = match &mut self.records {
            Some(records) => seal(records, room, count)?,
            None => compact(room, count),
        };
        let ready = room.get(..sealed).unwrap_or_default();
        let written = match outer.write(ready) {
            Ok(written) => written,
            Err(error) if is_pause(&error) => 0,
            Err(error) => return Err(lost(&error)),
        };
        self.outward.adapt(count == batch * PLAIN, written == sealed);
        if written < sealed {
            // The kernel marked the socket short of room, so epoll will tell when there is some again.
            self.outward.held.bytes = ready.get(written..).unwrap_or_default().to_vec();
            return Ok(false);
        }
        Ok(self.inner_ready.readable)
    }

    /// Changes our key when that is due and nothing waits before it: one answer to any number of requests.
    fn update_key(&mut self, outer: &TcpStream) -> Result<(), Ending> {
        if let Some(records) = &mut self.records
            && self.owes_update
            && self.outward.held.is_empty()
            && !self.outward.ended
        {
            self.owes_update = false;
            records.key_update(&mut self.outward.held.bytes).map_err(bad)?;
            self.flush_outward(outer)?;
        }
        Ok(())
    }

    fn flush_outward(&mut self, outer: &TcpStream) -> Result<bool, Ending> {
        if !self.outward.held.flush(outer, self.outward.ended).map_err(|error| lost(&error))? {
            return Ok(false);
        }
        if self.outward.ended && !self.outward.shut {
            self.outward.shut = true;
            // Where the other way has ended before, both sockets are closed at once, which says the same.
            if !self.inward.shut {
                outer.shutdown(Shutdown::Write).map_err(|error| lost(&error))?;
                // It fails for a socket that has failed, of which epoll tells.
                let _gone = ask_whether_gone(&self.inner);
            }
        }
        Ok(true)
    }

    /// Peer to program. `true` when there is more to do.
    fn inward(&mut self, mut outer: &TcpStream, scratch: &mut Scratch, most: usize) -> Result<bool, Ending> {
        if !self.flush_inward()? || self.inward.ended || !(self.outer_ready.readable || self.fresh) {
            return Ok(false);
        }
        let batch = self.inward.batch.min(most);
        let held = self.partial.len();
        // A record in part, then at least one whole record's worth.
        let limit = (batch * LARGEST).max(held + PLAIN).min(scratch.open.len());
        let room = scratch.open.get_mut(..limit).unwrap_or_default();
        let (before, space) = room.split_at_mut_checked(held).ok_or(Ending::BadRecord(80))?;
        before.copy_from_slice(&self.partial);
        let mut ended = false;
        let count = match outer.read(space) {
            Ok(0) if self.broken => return Err(Ending::PeerReset),
            Ok(0) => {
                ended = true;
                0
            }
            Ok(count) => {
                if count < space.len() && !self.outer_ready.odd {
                    self.outer_ready.readable = false;
                }
                count
            }
            Err(error) if is_pause(&error) => {
                self.outer_ready = Ready { failed: self.outer_ready.failed, readable: false, odd: false };
                0
            }
            Err(error) => return Err(lost(&error)),
        };
        if count == 0 && !ended && !self.fresh {
            return Ok(false);
        }
        self.fresh = false;
        let bytes = room.get_mut(..held + count).unwrap_or_default();
        scratch.pieces.clear();
        let used = match &mut self.records {
            Some(records) => {
                open(records, bytes, &mut scratch.pieces, &mut self.inward.ended, &mut self.owes_update)?
            }
            None => {
                scratch.pieces.push(0..bytes.len());
                self.inward.ended |= ended;
                bytes.len()
            }
        };
        let rest = bytes.get(used..).unwrap_or_default();
        if rest.is_empty() {
            self.partial = Vec::new();
        } else {
            self.partial.clear();
            self.partial.extend_from_slice(rest);
        }
        if ended && !self.inward.ended {
            // What came whole is the program's, then the reset (RFC 8446, section 6.1).
            self.pass_on(scratch)?;
            return Err(Ending::Truncated);
        }
        let taken = self.pass_on(scratch)?;
        self.inward.adapt(held + count == limit, taken);
        self.update_key(outer)?;
        if taken {
            self.flush_inward()?;
        }
        Ok(taken && !self.inward.ended && self.outer_ready.readable)
    }

    /// Writes the batch's pieces to the program and holds the rest; `true` when there was none.
    fn pass_on(&mut self, scratch: &Scratch) -> Result<bool, Ending> {
        let total: usize = scratch.pieces.iter().map(Range::len).sum();
        if total == 0 {
            return Ok(true);
        }
        self.inward.count += total as u64;
        let mut slices = [IoSlice::new(&[]); PIECES];
        for (slice, piece) in slices.iter_mut().zip(&scratch.pieces) {
            *slice = IoSlice::new(scratch.open.get(piece.clone()).unwrap_or_default());
        }
        let slices = slices.get(..scratch.pieces.len()).unwrap_or_default();
        let mut written = match (&self.inner).write_vectored(slices) {
            Ok(written) => written,
            Err(error) if is_pause(&error) => 0,
            Err(_) => return Err(Ending::ProgramReset),
        };
        if written == total {
            return Ok(true);
        }
        let mut left = Vec::with_capacity(total - written);
        for slice in slices {
            let skipped = written.min(slice.len());
            written -= skipped;
            left.extend_from_slice(slice.get(skipped..).unwrap_or_default());
        }
        self.inward.held = Held { bytes: left, sent: 0 };
        Ok(false)
    }

    fn flush_inward(&mut self) -> Result<bool, Ending> {
        if !self.inward.held.flush(&self.inner, false).map_err(|_| Ending::ProgramReset)? {
            return Ok(false);
        }
        if self.inward.ended && !self.inward.shut {
            self.inward.shut = true;
            if !self.outward.shut {
                self.inner.shutdown(Shutdown::Write).map_err(|_| Ending::ProgramReset)?;
            }
        }
        Ok(true)
    }
}

/// Seals `count` bytes that lie in records of `room`; returns the length of all records.
fn seal(records: &mut Records, room: &mut [u8], count: usize) -> Result<usize, Ending> {
    let mut left = count;
    let mut sealed = 0;
    for record in room.chunks_exact_mut(FULL) {
        let length = left.min(PLAIN);
        if length == 0 {
            break;
        }
        let record = record.get_mut(..length + OVERHEAD).unwrap_or_default();
        records.seal(record).map_err(bad)?;
        sealed += record.len();
        left -= length;
    }
    Ok(sealed)
}

/// Moves `count` bytes that lie in records of `room` together, for a plain peer.
fn compact(room: &mut [u8], count: usize) -> usize {
    let mut done = 0;
    let mut from = HEADER;
    while done < count {
        let length = (count - done).min(PLAIN);
        room.copy_within(from..from + length, done);
        done += length;
        from += FULL;
    }
    done
}

/// Opens the whole records at the start of `bytes`; the program's pieces go to `pieces`. Returns how much of
/// `bytes` was used.
fn open(
    records: &mut Records,
    bytes: &mut [u8],
    pieces: &mut Vec<Range<usize>>,
    ended: &mut bool,
    owes_update: &mut bool,
) -> Result<usize, Ending> {
    let mut at = 0;
    while !*ended {
        let found = whole(bytes.get(at..).unwrap_or_default()).map_err(bad)?;
        let Whole::Record(header, length) = found else { break };
        let start = at + HEADER;
        at = start + length;
        let payload = bytes.get_mut(start..at).unwrap_or_default();
        match records.open(header, payload).map_err(bad)? {
            Opened::Data(0) => {}
            Opened::Data(length) => match pieces.last_mut() {
                Some(last) if length < SHORT => {
                    bytes.copy_within(start..start + length, last.end);
                    last.end += length;
                }
                _ => pieces.push(start..start + length),
            },
            Opened::CloseNotify => {
                *ended = true;
                // Nothing counts after it (RFC 8446, section 6.1).
                at = bytes.len();
            }
            Opened::Fatal(code) => return Err(Ending::PeerAlert(code)),
            Opened::Handled { reply } => *owes_update |= reply,
        }
    }
    Ok(at)
}

/// `None` when nothing is there now.
fn read(mut from: &TcpStream, into: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>> {
    match from.read_vectored(into) {
        Ok(count) => Ok(Some(count)),
        Err(error) if is_pause(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether to try again after the next event. The sockets do not block, so nothing interrupts them.
fn is_pause(error: &io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock
}

fn bad(Bad(alert): Bad) -> Ending {
    Ending::BadRecord(alert as u8)
}

fn lost(error: &io::Error) -> Ending {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::NotConnected => Ending::PeerReset,
        _ => Ending::PeerLost(error.raw_os_error().unwrap_or_default()),
    }
}

fn failure_of(outer: &TcpStream) -> Ending {
    outer.take_error().ok().flatten().map_or(Ending::PeerReset, |error| lost(&error))
}
