//! The checked policy: names resolved, values typed, no spans but those that verdicts show.

use std::{
    net::IpAddr,
    ops::{BitAnd, BitOr},
    sync::Arc,
};

use portcullis_types::Lane;
use serde::Serialize;

use crate::{pattern::Pattern, services::Service, source::Span};

/// One condition on one end of a flow.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Atom {
    /// The address is one of these.
    Address(AddressSet),
    /// A certificate was shown.
    Shown,
    /// The certificate's enrolment is between these, inclusive.
    Version(u64, u64),
    /// A text of the certificate matches.
    Certificate(CertificateField, Pattern),
    /// The executable has this content.
    Sha256([u8; 32]),
    /// A text of the process matches.
    Process(ProcessField, Pattern),
}

#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum CertificateField {
    Name,
    Group,
    Org,
    Process,
    Unit,
    User,
    Issuer,
}

#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum ProcessField {
    Exe,
    User,
    Group,
    Unit,
    Cmdline,
    Ancestor,
}

impl CertificateField {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Group => "group",
            Self::Org => "org",
            Self::Process => "process",
            Self::Unit => "unit",
            Self::User => "user",
            Self::Issuer => "issuer",
        }
    }

    /// Whether a certificate may have several.
    pub(crate) const fn is_many(self) -> bool {
        matches!(self, Self::Name | Self::Group)
    }
}

impl ProcessField {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Exe => "exe",
            Self::User => "user",
            Self::Group => "group",
            Self::Unit => "unit",
            Self::Cmdline => "cmdline",
            Self::Ancestor => "ancestor",
        }
    }

    /// Whether a process may have several.
    pub(crate) const fn is_many(self) -> bool {
        matches!(self, Self::Group | Self::Ancestor)
    }
}

/// Addresses as inclusive ranges: sorted, disjoint, not touching.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct AddressSet {
    pub(crate) v4: Arc<[(u32, u32)]>,
    pub(crate) v6: Arc<[(u128, u128)]>,
}

impl AddressSet {
    pub(crate) fn has_v4(&self, address: u32) -> bool {
        let n = self.v4.partition_point(|(_, high)| *high < address);
        self.v4.get(n).is_some_and(|(low, _)| *low <= address)
    }

    pub(crate) fn has_v6(&self, address: u128) -> bool {
        let n = self.v6.partition_point(|(_, high)| *high < address);
        self.v6.get(n).is_some_and(|(low, _)| *low <= address)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

/// Sorts inclusive ranges and joins those that overlap or touch.
pub(crate) fn merge<T: Ord + Copy + Step>(mut ranges: Vec<(T, T)>) -> Vec<(T, T)> {
    ranges.sort_unstable();
    let mut merged: Vec<(T, T)> = Vec::with_capacity(ranges.len());
    for (low, high) in ranges {
        match merged.last_mut() {
            Some((_, end)) if low <= end.after() => *end = (*end).max(high),
            _ => merged.push((low, high)),
        }
    }
    merged
}

/// Numbers that have a next one, the last excepted.
pub(crate) trait Step {
    const LEAST: Self;
    const MOST: Self;
    fn after(self) -> Self;
    fn before(self) -> Self;
}

macro_rules! step {
    ($($t:ty),*) => {$(
        impl Step for $t {
            const LEAST: Self = Self::MIN;
            const MOST: Self = Self::MAX;
            fn after(self) -> Self { self.saturating_add(1) }
            fn before(self) -> Self { self.saturating_sub(1) }
        }
    )*};
}
step!(u16, u32, u64, u128);

/// An address in the form that conditions are held against.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Address {
    V4(u32),
    V6(u128),
    /// There may be one, but it is not known.
    Unknown,
    /// There is none: only in tests and on the command line.
    Absent,
}

impl Address {
    pub(crate) fn new(address: Option<IpAddr>) -> Self {
        match address {
            None => Self::Unknown,
            Some(IpAddr::V4(v4)) => Self::V4(v4.into()),
            Some(IpAddr::V6(v6)) => match v6.to_ipv4_mapped() {
                Some(v4) => Self::V4(v4.into()),
                None => Self::V6(v6.into()),
            },
        }
    }

    /// Whether it never leaves the host (RFC 1122, 3.2.1.3 (g); RFC 4291, 2.5.3).
    pub(crate) const fn is_loopback(self) -> bool {
        match self {
            Self::V4(v4) => v4 >> 24 == 127,
            Self::V6(v6) => v6 == 1,
            _ => false,
        }
    }
}

/// Who: a formula over conditions.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Expr {
    Any,
    Nothing,
    Atom(Arc<Atom>),
    Not(Arc<Expr>),
    And(Arc<[Expr]>),
    Or(Arc<[Expr]>),
}

impl Expr {
    /// Where it lies in memory. Rules of one policy share equal formulas, so among them it tells which
    /// are equal.
    pub(crate) fn place(&self) -> usize {
        match self {
            Self::Any => 1,
            Self::Nothing => 2,
            Self::Atom(atom) => Arc::as_ptr(atom).addr(),
            Self::Not(inner) => Arc::as_ptr(inner).addr(),
            Self::And(list) | Self::Or(list) => Arc::as_ptr(list).addr(),
        }
    }

    /// Calls `visit` for each condition, with whether it stands under an odd number of `!`.
    pub(crate) fn atoms<'a>(&'a self, negated: bool, visit: &mut impl FnMut(&'a Atom, bool)) {
        match self {
            Self::Any | Self::Nothing => {}
            Self::Atom(atom) => visit(atom, negated),
            Self::Not(inner) => inner.atoms(!negated, visit),
            Self::And(list) | Self::Or(list) => list.iter().for_each(|e| e.atoms(negated, visit)),
        }
    }

    /// How it stands, or its negation, if conditions and their negations stand as `literal` says.
    pub(crate) fn truth(&self, negated: bool, literal: &impl Fn(&Atom, bool) -> Truth) -> Truth {
        let known = |holds: bool| if holds { Truth::TRUE } else { Truth::FALSE };
        match self {
            Self::Any => known(!negated),
            Self::Nothing => known(negated),
            Self::Atom(atom) => literal(atom, negated),
            Self::Not(inner) => inner.truth(!negated, literal),
            Self::And(list) | Self::Or(list) if matches!(self, Self::And(_)) != negated => {
                let mut truth = Truth::TRUE;
                for expr in list.iter() {
                    truth = truth & expr.truth(negated, literal);
                    if truth == Truth::FALSE {
                        break;
                    }
                }
                truth
            }
            Self::And(list) | Self::Or(list) => {
                list.iter().fold(Truth::FALSE, |truth, expr| truth | expr.truth(negated, literal))
            }
        }
    }

    pub(crate) fn mentions(&self, what: impl Fn(&Atom) -> bool) -> bool {
        self.any_atom(&what)
    }

    fn any_atom(&self, what: &impl Fn(&Atom) -> bool) -> bool {
        match self {
            Self::Any | Self::Nothing => false,
            Self::Atom(atom) => what(atom),
            Self::Not(inner) => inner.any_atom(what),
            Self::And(list) | Self::Or(list) => list.iter().any(|e| e.any_atom(what)),
        }
    }
}

/// What a rule does.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// Permits, unless something denies.
    Allow,
    /// Refuses, whatever allows.
    Deny,
}

/// One `allow` or `deny` of a policy.
#[derive(Clone, Debug)]
pub struct Rule {
    /// `as …`
    pub name: Option<Arc<str>>,
    /// `because "…"`
    pub description: Option<Arc<str>>,
    /// Its text, as written.
    pub text: Arc<str>,
    /// The file it stands in.
    pub file: Arc<str>,
    /// The line it begins on, from 1.
    pub line: u32,
    /// Allows or denies.
    pub effect: Effect,
    /// Opens related channels: the service or the rule says `related`.
    pub related: bool,
    /// `using …`; `None` leaves it to who takes part.
    pub lane: Option<Lane>,
    /// `audit`: observe only.
    pub audit: bool,
    /// First second, since the Unix epoch, at which it is no longer in force.
    pub expires: Option<u64>,
    pub(crate) span: Span,
    // Of one policy, equal ones of these three are one in memory.
    pub(crate) service: Arc<Service>,
    pub(crate) from: Expr,
    pub(crate) to: Expr,
}

impl Rule {
    /// Whether it is in force at a time.
    #[must_use]
    pub fn in_force(&self, now: u64) -> bool {
        self.expires.is_none_or(|end| now < end)
    }

    /// Which of several matching `allow` rules decides: the least. One that is not `audit`, then
    /// the strongest lane, then `related`; what remains equal, the order in the file.
    pub(crate) fn rank(&self) -> (bool, u8, bool) {
        let lane = match self.lane {
            Some(Lane::Ipsec) => 0,
            Some(Lane::Ktls) => 1,
            Some(Lane::Tls) => 2,
            None => 3,
            Some(Lane::Plain) => 4,
        };
        (self.audit, lane, !self.related)
    }
}

/// How one condition, or a formula, stands: four answers at once, so that `&` and `|` are bitwise.
///
/// A condition on a fact that could not be established holds in a `deny` and not in an `allow`; one
/// on a fact that a remote host keeps to itself holds in neither; one that a handshake would settle
/// holds only as a possibility.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Truth(pub(crate) u8);

impl Truth {
    pub(crate) const TRUE: Self = Self(0b1111);
    pub(crate) const FALSE: Self = Self(0);
    /// Could not be established: fails closed.
    pub(crate) const UNKNOWN: Self = Self(0b1010);
    /// Legitimately not visible here.
    pub(crate) const INVISIBLE: Self = Self(0);
    /// A handshake would tell.
    pub(crate) const PENDING: Self = Self(0b1100);

    /// An `allow` holds.
    pub(crate) const fn allows(self) -> bool {
        self.0 & 0b0001 != 0
    }

    /// A `deny` holds.
    pub(crate) const fn denies(self) -> bool {
        self.0 & 0b0010 != 0
    }

    /// An `allow` would hold, given a suitable certificate.
    pub(crate) const fn may_allow(self) -> bool {
        self.0 & 0b0100 != 0
    }

    /// A `deny` would hold, given some certificate.
    pub(crate) const fn may_deny(self) -> bool {
        self.0 & 0b1000 != 0
    }
}

impl BitAnd for Truth {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitOr for Truth {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}
