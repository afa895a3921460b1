//! Numbers that must not be mixed up with one another.

use std::{fmt, num::NonZeroU64};

use serde::{Deserialize, Serialize};

/// Number of a loaded policy on one host; the first is 1 and it only grows.
///
/// 64 bits, so that it need not wrap. Every cached verdict and every association holds the
/// generation that admitted it; a cache whose key lacks the generation is a bug.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(NonZeroU64);

/// Why a number is no [`Generation`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("generation 0 does not exist; the first is 1")]
pub struct GenerationError;

impl Generation {
    /// The generation of the first policy that a broker loads.
    pub const FIRST: Self = Self(NonZeroU64::MIN);

    /// The number itself.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// The generation after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl TryFrom<u64> for Generation {
    type Error = GenerationError;
    fn try_from(raw: u64) -> Result<Self, GenerationError> {
        NonZeroU64::new(raw).map(Self).ok_or(GenerationError)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Index of a rule (an `allow` or a `deny`) within one compiled policy, from 0.
///
/// Meaningful only together with the [`Generation`] of that policy.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RuleId(pub u32);

/// Assigned Internet protocol number (IANA "Protocol Numbers"): 6 is TCP, 17 is UDP.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Protocol(pub u8);

impl Protocol {
    /// Internet Control Message Protocol (RFC 792).
    pub const ICMP: Self = Self(1);
    /// Transmission Control Protocol (RFC 9293). Multipath TCP counts as TCP.
    pub const TCP: Self = Self(6);
    /// User Datagram Protocol (RFC 768).
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6 (RFC 4443).
    pub const ICMPV6: Self = Self(58);
    /// Stream Control Transmission Protocol (RFC 9260).
    pub const SCTP: Self = Self(132);
    /// Lightweight User Datagram Protocol (RFC 3828).
    pub const UDPLITE: Self = Self(136);
    /// A raw or packet socket, whose protocol the kernel does not fix (IANA: reserved).
    pub const RAW: Self = Self(255);

    /// Whether flows of this protocol have port numbers.
    #[must_use]
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::TCP | Self::UDP | Self::SCTP | Self::UDPLITE)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Self::ICMP => "icmp",
            Self::TCP => "tcp",
            Self::UDP => "udp",
            Self::ICMPV6 => "icmpv6",
            Self::SCTP => "sctp",
            Self::UDPLITE => "udplite",
            Self::RAW => "raw",
            Self(other) => return write!(f, "ip-{other}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_zero_does_not_exist() {
        assert_eq!(Generation::try_from(0), Err(GenerationError));
        assert_eq!(Generation::try_from(7).unwrap().get(), 7);
    }

    #[test]
    fn generations_only_grow() {
        assert!(Generation::FIRST.next() > Generation::FIRST);
    }
}
