//! Frames between broker and key daemon, over an inherited `SOCK_SEQPACKET` pair.
//!
//! The broker asks, one [`Head`] and what its kind says after it; the key daemon answers each
//! request, in order, with one [`Head`] of the same `kind` and `seq`, and in between reports
//! [`Kind::Stranger`] (its `seq` is 0). Descriptors travel as `SCM_RIGHTS`, in the order named at the kind.
//!
//! Holding the other end of the pair is the whole authority: whoever started both daemons made it.
//! The key daemon ends at anything that [`permitted`] does not list. What a filter needs to be changed later is a
//! descriptor in the broker's hands. Associations that run outlive a broker, and end with the key daemon.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Addr;

/// First word of every frame: "PCK1" read as bytes.
pub const MAGIC: u32 = u32::from_le_bytes(*b"PCK1");
/// Version of this layout.
pub const VERSION: u16 = 1;
/// Longest frame in bytes; a longer list of [`Net`] is attached ([`Head::LIST_ATTACHED`]).
pub const FRAME: usize = 32 * 1024;
/// Most [`Net`] in one frame.
pub const INLINE_NETS: usize = (FRAME - size_of::<Head>()) / size_of::<Net>();
/// Most [`Net`] in one filter, attached or not.
pub const MOST_NETS: usize = 1 << 20;
/// Most descriptors with one frame.
pub const DESCRIPTORS: usize = 4;

/// What is asked, answered or reported.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u16)]
pub enum Kind {
    /// First request. Attached: nothing, or what the answer to an earlier `Hello` carried, so that
    /// filters set before a restart go on reporting. Answer: `flags` are the abilities
    /// ([`Head::FILTERS`], [`Head::DESTROYS`], [`Head::PROTECTS`]); with `FILTERS`, three descriptors to keep;
    /// with `PROTECTS` a JSON object follows that says who this host is: `domain host ver groups addresses`.
    Hello = 1,
    /// Let only the listed [`Net`]s reach a listener or datagram socket, for good: the filter is
    /// locked. Attached: the socket; with `LIST_ATTACHED`, the list. `tag` comes back in every
    /// `Stranger`. Answer: one descriptor, which `Refill` needs.
    Filter = 2,
    /// Exchange the list of a filter. Attached: what `Filter` answered; with `LIST_ATTACHED`, the list.
    Refill = 3,
    /// End a flow now: [`Flow`] follows. Attached: its socket, if the broker has it. Answer: `count`
    /// is how, a [`CutBy`].
    Cut = 4,
    /// Protect a flow that a program is about to open: [`Open`] and a JSON object ([`PROCESS`]) follow.
    /// Attached: its TCP socket. Answer: `tag` is the association's number; [`Places`] follows, whose
    /// `inner_remote` (a token) is what the program's connect(2) must use instead. `EXDEV` for a socket in
    /// another network namespace than the key daemon's, `EPROTONOSUPPORT` for one that is not TCP (MPTCP);
    /// else what connect(2) says at once.
    Open = 5,
    /// Be the front of a listener: take what comes to its address, except from whom its filter lets through. A
    /// JSON object ([`PROCESS`]) follows; `count` is the backlog. Attached: the program's TCP socket, bound,
    /// and what [`Kind::Filter`] answered for it. Answer: `tag` is the front's number, the same for all sockets
    /// that share the address. Repeated, it changes backlog, list and process. `EOPNOTSUPP` for a socket that is
    /// bound to an interface; else as `Open`.
    Serve = 7,
    /// Give up a front (`tag`): the port is its own listener's. The end of the sockets does the same.
    Release = 8,
    /// Let an association (`tag`) that was `Shown` go on. Answer: [`Places`] follows, with the token by which the
    /// program will see its peer, unless that must wait for room in its backlog. `count` is 1 if it carries data now; else
    /// `Associated` follows.
    Admit = 9,
    /// End an association (`tag`), shown or not; the program sees `count`, an errno.
    Refuse = 10,
    /// Here is a list of members (`members.toml`), attached as a file; associations with whom it revokes
    /// end. Answer: `count` is 1 if it is newer than the one in force, else 0. `EBADMSG`: not signed.
    Members = 11,
    /// Tell of what has outlived an earlier broker: `Live` for each association that runs, `Live` and `Over` for
    /// each that has ended since, `Over` alone for who waited for that broker's word. Answer: nothing more; the
    /// reports follow.
    List = 12,
    /// Say what a peer that has `Arrived` (`tag`) may speak: `count` is a [`Speech`].
    Speak = 13,
    /// Here are this host's issuing certificate, its key, and its own certificates (`issuer.crt`, `issuer.key`,
    /// `host.crt`), attached as files: what is minted from now on is signed with them. Answer: `count` is 1 if
    /// they are newer, and, as after `Hello`, who this host is; `EBADMSG`: they do not fit, or are not this host's.
    Renew = 14,
    /// Fill the backstop's nftables form from now on: the table's name follows. What an earlier broker was granted there
    /// is taken back. `ENOENT`: there is no such table; `EBUSY`: somebody else hears what it refuses.
    Table = 15,
    /// Let pass, or no more: [`Pass`]. `ENOTCONN` before `Table`; else as the kernel says, `ENFILE` for too many.
    Pass = 16,
    /// Report: a filter dropped somebody; [`Stranger`] follows.
    Stranger = 64,
    /// Report: the peer of an association (`tag`) has proved itself; [`Places`] and a JSON object follow.
    /// `count` is 1 if the peer opened it, and then `flags` holds the low 32 bits of the front's number. A peer that
    /// may speak plain, and does, has proved nothing: then the object is empty.
    Shown = 65,
    /// Report: an association (`tag`) that could not when it was admitted carries data; [`Places`] follows.
    Associated = 66,
    /// Report: an association (`tag`) is over, or came to nothing: `errno` is then not 0. `count` and `flags` are
    /// as in `Shown`. [`Over`] and [`Places`] follow, and a text that says how; if the peer's certificate was not
    /// believed, a second line says what it was.
    Over = 67,
    /// Report: somebody came to a listener that serves plain peers as well ([`Head::MIXED`]), and waits until
    /// [`Kind::Speak`] says what it may speak; [`Places`] follows. `flags` as in `Shown`.
    Arrived = 68,
    /// Report: an association (`tag`) runs since an earlier broker was there. `count` and `flags` are as in `Shown`.
    /// [`Places`] and a JSON object follow: `peer` is what `Shown` said, `process` whose association it is
    /// ([`PROCESS`]), `since` when it began to carry data, in seconds since the Unix epoch.
    Live = 69,
    /// Report: the backstop's nftables form refused something; [`Stopped`] follows.
    Stopped = 70,
}

/// What a peer may speak at a listener that serves plain peers as well. A member of the trust domain speaks
/// TLS, whatever the broker says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum Speech {
    /// TLS, and nothing else.
    Tls = 0,
    /// Plain, at once.
    Plain = 1,
    /// TLS if it begins a ClientHello within 200 ms, else plain.
    Either = 2,
}

impl TryFrom<u32> for Speech {
    type Error = u32;
    fn try_from(raw: u32) -> Result<Self, u32> {
        [Self::Tls, Self::Plain, Self::Either].into_iter().find(|one| *one as u32 == raw).ok_or(raw)
    }
}

/// Keys of the JSON object that names a process: `name` (given by the policy), `exe`, `sha256`, `user`
/// and, if there is one, `unit`; all texts. `related` (true or false): each association gets a certificate of
/// its own, which stands for its session. `of` (a number): this belongs to that association, begun as `related`, as
/// long as it lives. Both ends must show the certificates that they showed there, whichever opens; what listens, and
/// what is on its way, ends with it. `ENOENT`: it is over.
pub const PROCESS: [&str; 7] = ["name", "exe", "sha256", "user", "unit", "related", "of"];

impl Kind {
    /// All kinds, for tests over pairs.
    pub const ALL: [Self; 22] = [
        Self::Hello,
        Self::Filter,
        Self::Refill,
        Self::Cut,
        Self::Open,
        Self::Serve,
        Self::Release,
        Self::Admit,
        Self::Refuse,
        Self::Members,
        Self::List,
        Self::Speak,
        Self::Renew,
        Self::Table,
        Self::Pass,
        Self::Stranger,
        Self::Shown,
        Self::Associated,
        Self::Over,
        Self::Arrived,
        Self::Live,
        Self::Stopped,
    ];
}

impl TryFrom<u16> for Kind {
    type Error = u16;
    fn try_from(raw: u16) -> Result<Self, u16> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == raw).ok_or(raw)
    }
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Stage {
    /// Nothing was asked yet.
    Hello,
    /// Versions agree.
    Serving,
    /// As `Serving`, on a host that has keys.
    Protecting,
}

/// What the broker may ask, and when. Everything else ends its connection.
#[must_use]
pub const fn permitted(stage: Stage, kind: Kind) -> bool {
    matches!(
        (stage, kind),
        (Stage::Hello, Kind::Hello)
            | (Stage::Serving | Stage::Protecting, Kind::Filter | Kind::Refill | Kind::Cut)
            | (Stage::Serving | Stage::Protecting, Kind::Table | Kind::Pass)
            | (Stage::Protecting, Kind::Open | Kind::Serve | Kind::Release)
            | (Stage::Protecting, Kind::Admit | Kind::Refuse | Kind::Members | Kind::List | Kind::Speak)
            | (Stage::Protecting, Kind::Renew)
    )
}

/// Beginning of every frame. 32 bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Head {
    /// [`MAGIC`].
    pub magic: u32,
    /// [`VERSION`].
    pub version: u16,
    /// One of [`Kind`].
    pub kind: u16,
    /// Chosen by the asker, echoed in the answer; 0 in reports.
    pub seq: u32,
    /// Bits, see the constants.
    pub flags: u32,
    /// Number of [`Net`] (`Filter`, `Refill`), or what the answer's kind says.
    pub count: u32,
    /// Answer: 0, or the positive errno for which the request failed.
    pub errno: i32,
    /// `Filter`: the broker's name for the socket, echoed in each `Stranger`.
    pub tag: u64,
}

impl Head {
    /// The list of [`Net`] is not in the frame but in a file (memfd) that is attached last.
    pub const LIST_ATTACHED: u32 = 1 << 0;
    /// `Serve`: peers may be plain; each is reported when it has `Arrived`.
    pub const MIXED: u32 = 1 << 1;
    /// Answer to `Hello`: `Filter` works here.
    pub const FILTERS: u32 = 1 << 8;
    /// Answer to `Hello`: `Cut` can use the kernel's SOCK_DESTROY here.
    pub const DESTROYS: u32 = 1 << 9;
    /// Answer to `Hello`: the host has keys, so flows can be protected.
    pub const PROTECTS: u32 = 1 << 10;

    /// A frame's beginning with everything but `kind` and `seq` zero.
    #[must_use]
    pub const fn new(kind: Kind, seq: u32) -> Self {
        Self { magic: MAGIC, version: VERSION, kind: kind as u16, seq, flags: 0, count: 0, errno: 0, tag: 0 }
    }

    /// Takes the beginning off a frame; the rest is returned beside it.
    ///
    /// # Errors
    /// [`HeadError`] for anything that does not begin a frame of this version.
    pub fn decode(bytes: &[u8]) -> Result<(Kind, Self, &[u8]), HeadError> {
        let (it, rest) = Self::read_from_prefix(bytes).map_err(|_| HeadError::Length(bytes.len()))?;
        if it.magic != MAGIC {
            return Err(HeadError::Magic(it.magic));
        }
        if it.version != VERSION {
            return Err(HeadError::Version(it.version));
        }
        Ok((Kind::try_from(it.kind).map_err(HeadError::Kind)?, it, rest))
    }
}

/// Why bytes do not begin a frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum HeadError {
    /// Shorter than a [`Head`].
    Length(usize),
    /// Does not begin with [`MAGIC`].
    Magic(u32),
    /// Another [`VERSION`].
    Version(u16),
    /// No such [`Kind`].
    Kind(u16),
}

impl core::fmt::Display for HeadError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Self::Length(n) => write!(f, "frame of only {n} bytes"),
            Self::Magic(m) => write!(f, "frame begins with {m:#010x} instead of {MAGIC:#010x}"),
            Self::Version(v) => write!(f, "protocol version {v} instead of {VERSION}"),
            Self::Kind(k) => write!(f, "unknown request {k}"),
        }
    }
}

impl core::error::Error for HeadError {}

/// Addresses and source ports that a filter decides alike. 24 bytes.
///
/// The longest prefix that covers a source decides; so a hole in a permitted prefix is a longer
/// one with an empty port range. The same prefix may stand up to four times, with different ports.
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Net {
    /// Network byte order; v4 in the first four bytes, the rest zero.
    pub ip: [u8; 16],
    /// A [`crate::Family`] number, 4 or 6. A v6 prefix never covers v4 sources.
    pub family: u8,
    /// Prefix length in bits: up to 32 for v4, 128 for v6.
    pub bits: u8,
    /// Lowest source port that passes, host byte order.
    pub low: u16,
    /// Highest source port that passes; below `low`: none passes.
    pub high: u16,
    /// Zero.
    pub reserved: u16,
}

impl Net {
    /// All source ports of a prefix; bits beyond `bits` in the address are ignored.
    #[must_use]
    pub fn new(ip: core::net::IpAddr, bits: u8) -> Self {
        let addr = Addr::from(core::net::SocketAddr::new(ip, 0));
        Self { ip: addr.ip, family: addr.family, bits, low: 0, high: u16::MAX, reserved: 0 }
    }

    /// Every v4 and every v6 address.
    #[must_use]
    pub const fn everyone() -> [Self; 2] {
        let v4 = Self { ip: [0; 16], family: 4, bits: 0, low: 0, high: u16::MAX, reserved: 0 };
        [v4, Self { family: 6, ..v4 }]
    }

    /// The same prefix, passing only source ports `low..=high`.
    #[must_use]
    pub const fn ports(self, low: u16, high: u16) -> Self {
        Self { low, high, ..self }
    }

    /// The same prefix, passing nothing: a hole in a shorter one.
    #[must_use]
    pub const fn refused(self) -> Self {
        self.ports(1, 0)
    }
}

/// A flow to cut. 72 bytes.
///
/// With the socket attached, all fields may be zero. Without, all are needed, except that cookie 0
/// cuts whoever has the two addresses; else the kernel cuts only the socket with that cookie.
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Flow {
    /// `SO_COOKIE` of the socket.
    pub cookie: u64,
    /// IANA protocol number: 6 or 17.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 7],
    /// The socket's own address, in the socket's own family (v4-mapped ones as v6).
    pub local: Addr,
    /// The far address, likewise.
    pub remote: Addr,
}

/// How a flow was ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum CutBy {
    /// It had ended before.
    Gone = 0,
    /// SOCK_DESTROY: RST to the far side, `ECONNABORTED` to the program.
    Destroy = 1,
    /// Disconnected through the descriptor: RST to the far side, `ECONNRESET` to the program.
    Disconnect = 2,
    /// Shut down through the descriptor, both ways: FIN to the far side, end of file to the program.
    Shutdown = 3,
}

impl TryFrom<u32> for CutBy {
    type Error = u32;
    fn try_from(raw: u32) -> Result<Self, u32> {
        Ok(match raw {
            0 => Self::Gone,
            1 => Self::Destroy,
            2 => Self::Disconnect,
            3 => Self::Shutdown,
            other => return Err(other),
        })
    }
}

/// Somebody whom a filter dropped. 88 bytes.
///
/// One report for each attempt: repeats of the same two addresses and ports within 70 s are the
/// same (a SYN is sent again after 1, 2, 4 ... 64 s, tcp(7), `tcp_syn_retries`).
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Stranger {
    /// Nanoseconds since the Unix epoch; 0 if only `missed` is reported.
    pub time: u64,
    /// Attempts dropped but not reported since the last report, because there were too many.
    pub missed: u64,
    /// IANA protocol number: 6 or 17.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 7],
    /// Who.
    pub source: Addr,
    /// Whom it wanted.
    pub destination: Addr,
    /// `tag` of the filter.
    pub tag: u64,
}

/// What the backstop's nftables form lets pass. 24 bytes.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Pass {
    /// Where to; v4 as v4-mapped, network byte order.
    pub ip: [u8; 16],
    /// IANA protocol number: 6 or 17.
    pub protocol: u8,
    /// One of the constants.
    pub what: u8,
    /// Host byte order.
    pub port: u16,
    /// Zero.
    pub reserved: u32,
}

impl Pass {
    /// Whatever goes to `port` of `ip`.
    pub const TO: u8 = 0;
    /// What is neither TCP nor UDP.
    pub const OTHERS: u8 = 1;
    /// Who comes to the TCP listener at `port`.
    pub const LISTENER: u8 = 2;
    /// That listener is no more.
    pub const NO_LISTENER: u8 = 3;
    /// None of all that goes out, but for datagrams that have a way already.
    pub const NOTHING: u8 = 4;
    /// Everything: whoever has a raw socket may send what he likes.
    pub const ANYTHING: u8 = 5;
}

/// What the backstop's nftables form refused. 72 bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Stopped {
    /// Nanoseconds since the Unix epoch.
    pub time: u64,
    /// User of the socket that it left from; `u32::MAX` if that is not known.
    pub uid: u32,
    /// IANA protocol number.
    pub protocol: u8,
    /// 1: it came to a listener.
    pub arrives: u8,
    /// How many before it could not be told, or more.
    pub missed: u16,
    /// Who sent it.
    pub source: Addr,
    /// Where it should have gone.
    pub destination: Addr,
}

/// What a program wants to open. 64 bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Open {
    /// Where to.
    pub remote: Addr,
    /// The program's own address, as far as it has asked for one.
    pub local: Addr,
    /// How long connection and handshake may take together, in milliseconds; 0: 20 s.
    pub patience: u32,
    /// Zero.
    pub reserved: u32,
}

/// The addresses of an association: what programs believe, and what their sockets have. 112 bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Places {
    /// The true local address.
    pub local: Addr,
    /// The true remote address.
    pub remote: Addr,
    /// The program's socket's local address.
    pub inner_local: Addr,
    /// The program's socket's remote address.
    pub inner_remote: Addr,
}

/// What an association has carried, and for whom. 24 bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Over {
    /// Bytes of the program that went out.
    pub sent: u64,
    /// Bytes for the program that came in.
    pub received: u64,
    /// The kernel's number of the program's socket, if the program has opened it; else 0.
    pub cookie: u64,
}

const _: () = assert!(size_of::<Open>() == 64 && size_of::<Places>() == 112 && size_of::<Over>() == 24);
const _: () = assert!(size_of::<Head>() == 32 && size_of::<Net>() == 24);
const _: () = assert!(size_of::<Pass>() == 24 && size_of::<Stopped>() == 72);
const _: () = assert!(size_of::<Flow>() == 72 && size_of::<Stranger>() == 88);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_asked_at_each_stage_is_exactly_this() {
        use Kind::*;
        let on_one_screen: [(Stage, &[Kind]); 3] = [
            (Stage::Hello, &[Hello]),
            (Stage::Serving, &[Filter, Refill, Cut, Table, Pass]),
            (
                Stage::Protecting,
                &[
                    Filter, Refill, Cut, Table, Pass, Open, Serve, Release, Admit, Refuse, Members, List,
                    Speak, Renew,
                ],
            ),
        ];
        for (stage, listed) in on_one_screen {
            for kind in Kind::ALL {
                assert_eq!(permitted(stage, kind), listed.contains(&kind), "{stage:?} {kind:?}");
            }
        }
    }

    #[test]
    fn every_kind_survives_its_number_and_no_other_exists() {
        let known: Vec<_> = (0..=u16::MAX).filter_map(|raw| Kind::try_from(raw).ok()).collect();
        assert_eq!(known, Kind::ALL);
    }

    #[test]
    fn what_is_no_frame_is_named() {
        let good = Head::new(Kind::Cut, 1);
        assert_eq!(
            Head::decode(good.as_bytes()).map(|(kind, head, rest)| (kind, head, rest.len())),
            Ok((Kind::Cut, good, 0))
        );
        assert_eq!(Head::decode(&good.as_bytes()[1..]).unwrap_err(), HeadError::Length(31));
        assert_eq!(Head::decode(Head { magic: 1, ..good }.as_bytes()).unwrap_err(), HeadError::Magic(1));
        assert_eq!(Head::decode(Head { version: 9, ..good }.as_bytes()).unwrap_err(), HeadError::Version(9));
        assert_eq!(Head::decode(Head { kind: 0, ..good }.as_bytes()).unwrap_err(), HeadError::Kind(0));
    }
}
