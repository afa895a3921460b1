//! What the caller knows about one flow: the arguments of an evaluation.

use std::net::IpAddr;

use portcullis_types::Protocol;

/// One of the two ends of a flow.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Side {
    /// The end that opens the flow.
    From,
    /// The end that accepts it.
    To,
}

impl Side {
    /// The other end.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::From => Self::To,
            Self::To => Self::From,
        }
    }
}

/// One flow as this host sees it: who opens, who accepts, and what for.
#[derive(Clone, Copy, Debug)]
pub struct Flow<'a> {
    /// The end that opens the flow.
    pub from: &'a Party<'a>,
    /// The end that accepts it.
    pub to: &'a Party<'a>,
    /// Assigned Internet protocol number.
    pub protocol: Protocol,
    /// Service port in host byte order; 0 if the protocol has none.
    pub port: u16,
    /// Seconds since the Unix epoch, for `expires`.
    pub now: u64,
    /// The end that is not the process being judged. A remote process is invisible without a
    /// certificate, which refuses nothing by itself (LANGUAGE.md, "What is not known").
    pub far: Side,
}

/// What is known of one end of a flow.
#[derive(Clone, Copy, Debug)]
pub struct Party<'a> {
    /// Its address; `None` if the caller does not know it (yet). An IPv4-mapped IPv6 address
    /// (RFC 4291, section 2.5.5.2) counts as the IPv4 address in it.
    pub addr: Option<IpAddr>,
    /// Its process, if that is on this host.
    pub process: ProcessFact<'a>,
    /// Its certificate.
    pub certificate: CertificateFact<'a>,
}

/// What is known of the process at one end.
#[derive(Clone, Copy, Debug)]
pub enum ProcessFact<'a> {
    /// A remote process, or one this host knows nothing of.
    Unknown,
    /// A process of this host known only by the user its socket belongs to.
    UserOnly {
        /// Numeric user.
        uid: u32,
        /// Name of that user, empty if it has none.
        user: &'a str,
    },
    /// A process of this host.
    Known(&'a ProcessFacts),
}

/// What is known of the certificate of one end.
#[derive(Clone, Copy, Debug)]
pub enum CertificateFact<'a> {
    /// There is none and there will be none.
    None,
    /// Not shown yet: a handshake would show it.
    Pending,
    /// Shown, verified, and its key proven.
    Shown(&'a CertificateFacts),
}

/// One fact about a process, as far as the kernel could be made to vouch for it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fact<T> {
    /// Established.
    Known(T),
    /// Could not be established safely.
    Unknown,
}

/// A process of this host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ProcessFacts {
    /// Path of the executable as the broker sees it.
    pub exe: Fact<String>,
    /// SHA-256 of the executable's content.
    pub sha256: Fact<[u8; 32]>,
    /// Effective user, numeric.
    pub uid: u32,
    /// Name of that user, empty if it has none.
    pub user: String,
    /// Names of all its groups, primary and supplementary.
    pub groups: Vec<String>,
    /// systemd unit, if it is in one.
    pub unit: Option<String>,
    /// Command line, arguments joined by single spaces.
    pub cmdline: String,
    /// Executables of its ancestors, parent first.
    pub ancestors: Vec<Fact<String>>,
}

/// A verified certificate.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct CertificateFacts {
    /// DNS names of the host.
    pub names: Vec<String>,
    /// Process name: the last part of the SPIFFE ID, if it is a process certificate.
    pub process: Option<String>,
    /// Version of the host's enrolment.
    pub ver: Option<u64>,
    /// Groups of the host.
    pub groups: Vec<String>,
    /// Organisation.
    pub org: Option<String>,
    /// systemd unit of the process.
    pub unit: Option<String>,
    /// User of the process.
    pub user: Option<String>,
    /// Issuer's distinguished name, as text.
    pub issuer: Option<String>,
    /// Executable of the process, which a condition `process{exe}` on a remote end is held against.
    pub exe: Option<String>,
    /// SHA-256 of that executable.
    pub sha256: Option<[u8; 32]>,
}

impl Party<'_> {
    /// An end of which nothing is known: no address, a remote process, no certificate.
    pub const UNKNOWN: Self =
        Self { addr: None, process: ProcessFact::Unknown, certificate: CertificateFact::None };
}
