//! Frames between shim and broker.
//!
//! A process has one *door*: a connected `SOCK_SEQPACKET` socket to the broker, inherited by its
//! children, over which it only ever sends [`OpCode::Open`], with one end of a fresh socket pair
//! attached (`SCM_RIGHTS`). That pair is its *channel*. So a child in another network or mount
//! namespace needs no path, and a thread that finds the channel busy opens another instead of
//! waiting. The broker names the writer of every message from `SCM_CREDENTIALS` and `SCM_PIDFD`,
//! never from the message.
//!
//! On a channel, one [`Request`] gets one [`Reply`] with the same `seq`. The reply to the first
//! request with [`Flags::WANT_MEMORY`] carries three descriptors: state page and verdict table (both
//! read-only, sealed) and record ring, in this order, see [`crate::shared`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Addr;

/// First word of every frame: "PCL1" read as bytes.
pub const MAGIC: u32 = u32::from_le_bytes(*b"PCL1");

/// Version of this layout. A peer with another is refused by name, never guessed at.
pub const VERSION: u16 = 1;

/// Environment variable that tells a new image where the broker listens (a path), followed after a
/// colon by the uid that must answer there: `/run/portcullis/broker.sock:61990`.
pub const ENV_BROKER: &str = "PORTCULLIS_BROKER";

/// Environment variable that tells a new image its inherited door's descriptor number.
pub const ENV_DOOR: &str = "PORTCULLIS_DOOR";

/// Lowest descriptor number that the shim may hold (programs count on the low ones).
pub const LOWEST_FD: i32 = 900;

/// What a frame asks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub enum OpCode {
    /// On a door: here is a new channel (one descriptor attached). No reply on the door; the
    /// broker answers on the channel with a `Reply` whose `seq` is 0.
    Open = 1,
    /// Judge one call: [`Request::call`] is a `portcullis_types::Op` number. The socket itself is
    /// attached, unless [`Flags::NO_DESCRIPTOR`].
    Judge = 2,
    /// Tell the true local and remote address of a socket on a token (getsockname, getpeername,
    /// accept of a protected flow). `local` and `remote` are what the kernel says.
    Name = 3,
    /// Drain this process's ring and write it to the audit log before replying (sent at exit).
    Flush = 4,
    /// The caller's credentials, namespaces or image changed: forget what is cached for it.
    Changed = 5,
    /// The ring has records and its consumer said that it sleeps. No reply.
    Doorbell = 6,
    /// A call that was judged has failed natively (`Request::errno`); the record of `audit_seq`
    /// gets its outcome. No reply.
    Outcome = 7,
}

impl TryFrom<u16> for OpCode {
    type Error = FrameError;
    fn try_from(raw: u16) -> Result<Self, FrameError> {
        Ok(match raw {
            1 => Self::Open,
            2 => Self::Judge,
            3 => Self::Name,
            4 => Self::Flush,
            5 => Self::Changed,
            6 => Self::Doorbell,
            7 => Self::Outcome,
            other => return Err(FrameError::UnknownOpCode(other)),
        })
    }
}

/// Bits of [`Request::flags`] and [`Reply::flags`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Flags(pub u32);

impl Flags {
    /// Request: no descriptor is attached, because the program's sandbox lets only write(2)
    /// through; the broker takes `Request::fd` with pidfd_getfd(2) if it needs the socket.
    pub const NO_DESCRIPTOR: u32 = 1 << 0;
    /// Request: the reply should carry verdict table and ring.
    pub const WANT_MEMORY: u32 = 1 << 1;
    /// Request: the socket is non-blocking.
    pub const NONBLOCK: u32 = 1 << 2;
    /// Request: the socket was connected before this image began (inetd, socket activation).
    pub const INHERITED: u32 = 1 << 3;
    /// Request: the socket has `SO_REUSEPORT` set (bind).
    pub const REUSEPORT: u32 = 1 << 4;
    /// Reply: `Reply::rewrite` is the address that the real call must use instead.
    pub const REWRITE: u32 = 1 << 8;
    /// Reply: the verdict is in the verdict table too; the next such call need not ask.
    pub const CACHED: u32 = 1 << 9;
    /// Reply: state page, verdict table and ring are attached, in this order.
    pub const MEMORY: u32 = 1 << 10;
    /// Reply: permitted although the policy refuses (`--mode audit`).
    pub const WOULD_REFUSE: u32 = 1 << 11;
    /// Reply: the kernel filters what this socket receives; the shim need not look at senders.
    pub const FILTERED: u32 = 1 << 12;
    /// Reply: the kernel holds every judged call of this process until the broker has judged it there: asking
    /// before costs time and gains nothing.
    pub const HELD: u32 = 1 << 13;

    /// Whether all bits of `mask` are set.
    #[must_use]
    pub const fn has(self, mask: u32) -> bool {
        self.0 & mask == mask
    }
}

/// What the shim asks. 144 bytes, one size for all; unused fields are zero.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Request {
    /// [`MAGIC`].
    pub magic: u32,
    /// [`VERSION`].
    pub version: u16,
    /// One of [`OpCode`].
    pub opcode: u16,
    /// Chosen by the asker, echoed in the reply; not 0.
    pub seq: u32,
    /// Bits of [`Flags`].
    pub flags: u32,
    /// A `portcullis_types::Op` number, for [`OpCode::Judge`].
    pub call: u8,
    /// Zero.
    pub reserved: u8,
    /// `SO_DOMAIN` of the socket (`AF_*`).
    pub domain: u16,
    /// `SO_TYPE` of the socket (`SOCK_*`), without flag bits.
    pub kind: u16,
    /// `SO_PROTOCOL` of the socket (`IPPROTO_*`); `IPPROTO_MPTCP` is 262.
    pub protocol: u16,
    /// The descriptor's number in the asking process.
    pub fd: i32,
    /// A positive errno, for [`OpCode::Outcome`].
    pub errno: i32,
    /// backlog, for listen.
    pub backlog: i32,
    /// Zero.
    pub reserved2: u32,
    /// `SO_COOKIE` of the socket if the shim knows it, else 0. A claim.
    pub cookie: u64,
    /// Audit number that an [`OpCode::Outcome`] belongs to.
    pub audit_seq: u64,
    /// Local address: what the socket is bound to, or what bind(2) was asked for.
    pub local: Addr,
    /// Remote address: what connect(2) or sendto(2) was asked for, or whom accept(2) returned.
    pub remote: Addr,
    /// Zero; room for later.
    pub reserved3: [u8; 32],
}

/// What the broker answers. 144 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Reply {
    /// [`MAGIC`].
    pub magic: u32,
    /// [`VERSION`].
    pub version: u16,
    /// The [`OpCode`] this answers.
    pub opcode: u16,
    /// Echo of `Request::seq`.
    pub seq: u32,
    /// Bits of [`Flags`].
    pub flags: u32,
    /// 0: go on. Positive: fail with this errno.
    pub errno: i32,
    /// Rule that decided; `u32::MAX` if none did.
    pub rule: u32,
    /// A `portcullis_types::Lane` number.
    pub lane: u8,
    /// A `portcullis_types::Assurance` number.
    pub assurance: u8,
    /// Zero.
    pub reserved: [u8; 6],
    /// Generation of the policy that decided.
    pub generation: u64,
    /// Number of the audit record; 0 if none was written (yet).
    pub audit_seq: u64,
    /// With [`Flags::REWRITE`]: the address that the real call must use (a token).
    pub rewrite: Addr,
    /// True local address, for [`OpCode::Name`] and for bind on a token.
    pub local: Addr,
    /// True remote address, for [`OpCode::Name`].
    pub remote: Addr,
    /// Zero; room for later.
    pub reserved2: [u8; 12],
}

/// Size of a [`Request`] and of a [`Reply`], in bytes.
pub const FRAME: usize = 144;

const _: () = assert!(size_of::<Request>() == FRAME && size_of::<Reply>() == FRAME);

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum FrameError {
    /// Not [`FRAME`] bytes long.
    Length(usize),
    /// Does not begin with [`MAGIC`].
    Magic(u32),
    /// Another [`VERSION`].
    Version(u16),
    /// No such [`OpCode`].
    UnknownOpCode(u16),
}

impl core::fmt::Display for FrameError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Self::Length(n) => write!(f, "frame of {n} bytes instead of {FRAME}"),
            Self::Magic(m) => write!(f, "frame begins with {m:#010x} instead of {MAGIC:#010x}"),
            Self::Version(v) => write!(f, "protocol version {v} instead of {VERSION}; restart the program"),
            Self::UnknownOpCode(o) => write!(f, "unknown request {o}"),
        }
    }
}

impl core::error::Error for FrameError {}

impl Request {
    /// A request with everything but `opcode` and `seq` zero.
    #[must_use]
    pub const fn new(opcode: OpCode, seq: u32) -> Self {
        Self {
            magic: MAGIC,
            version: VERSION,
            opcode: opcode as u16,
            seq,
            flags: 0,
            call: 0,
            reserved: 0,
            domain: 0,
            kind: 0,
            protocol: 0,
            fd: -1,
            errno: 0,
            backlog: 0,
            reserved2: 0,
            cookie: 0,
            audit_seq: 0,
            local: Addr::NONE,
            remote: Addr::NONE,
            reserved3: [0; 32],
        }
    }

    /// Reads one frame.
    ///
    /// # Errors
    /// [`FrameError`] for anything that is not exactly one frame of this version.
    pub fn decode(bytes: &[u8]) -> Result<(OpCode, Self), FrameError> {
        let it = Self::read_from_bytes(bytes).map_err(|_| FrameError::Length(bytes.len()))?;
        check(it.magic, it.version)?;
        Ok((OpCode::try_from(it.opcode)?, it))
    }
}

impl Reply {
    /// A reply to `request` that lets the call go on.
    #[must_use]
    pub const fn to(request: &Request) -> Self {
        Self {
            magic: MAGIC,
            version: VERSION,
            opcode: request.opcode,
            seq: request.seq,
            flags: 0,
            errno: 0,
            rule: u32::MAX,
            lane: 0,
            assurance: 0,
            reserved: [0; 6],
            generation: 0,
            audit_seq: 0,
            rewrite: Addr::NONE,
            local: Addr::NONE,
            remote: Addr::NONE,
            reserved2: [0; 12],
        }
    }

    /// Reads one frame.
    ///
    /// # Errors
    /// [`FrameError`] for anything that is not exactly one frame of this version.
    pub fn decode(bytes: &[u8]) -> Result<(OpCode, Self), FrameError> {
        let it = Self::read_from_bytes(bytes).map_err(|_| FrameError::Length(bytes.len()))?;
        check(it.magic, it.version)?;
        Ok((OpCode::try_from(it.opcode)?, it))
    }
}

const fn check(magic: u32, version: u16) -> Result<(), FrameError> {
    if magic != MAGIC {
        return Err(FrameError::Magic(magic));
    }
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire() {
        let mut asked = Request::new(OpCode::Judge, 7);
        asked.remote = Addr::v4([192, 0, 2, 1].into(), 21);
        let (op, got) = Request::decode(asked.as_bytes()).unwrap();
        assert_eq!((op, got.seq, got.remote), (OpCode::Judge, 7, asked.remote));
        assert_eq!(Reply::decode(Reply::to(&got).as_bytes()).unwrap().1.seq, 7);
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        let asked = Request::new(OpCode::Judge, 7);
        assert_eq!(Request::decode(&asked.as_bytes()[..143]).unwrap_err(), FrameError::Length(143));
        let other = Request { version: 9, ..asked };
        assert_eq!(Request::decode(other.as_bytes()).unwrap_err(), FrameError::Version(9));
        let unknown = Request { opcode: 99, ..asked };
        assert_eq!(Request::decode(unknown.as_bytes()).unwrap_err(), FrameError::UnknownOpCode(99));
        assert_eq!(Request::decode(&[0; 144]).unwrap_err(), FrameError::Magic(0));
    }
}
