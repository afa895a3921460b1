//! What an evaluation answers.

use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portcullis_types::{Assurance, Lane, RuleId, Verdict};

/// The outcome for one flow.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Decision {
    /// What to do. Always the verdict to enforce, whatever `observe_only` says.
    pub verdict: Verdict,
    /// The rule that decided; `None` when nothing permits the flow.
    pub rule: Option<RuleId>,
    /// How the flow travels if it is permitted.
    pub lane: Lane,
    /// What proves that the far side is who the rule says.
    pub assurance: Assurance,
    /// Whether the rule opens related channels.
    pub related: bool,
    /// The flow goes on, and is to be recorded as would-refuse because of [`Decision::observed`].
    pub observe_only: bool,
    /// The `audit` rule for which it is recorded so.
    pub observed: Option<RuleId>,
}

impl Decision {
    /// Refused, because nothing permits it.
    pub(crate) const DEFAULT: Self = Self {
        verdict: Verdict::Refuse,
        rule: None,
        lane: Lane::Plain,
        assurance: Assurance::None,
        related: false,
        observe_only: false,
        observed: None,
    };

    /// Whether the flow may go on, protected or not.
    #[must_use]
    pub fn permits(&self) -> bool {
        self.verdict != Verdict::Refuse
    }
}

/// A box around a flow's far address and service port. Within it, all else equal, the decision is
/// the same.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Region {
    /// Addresses of the far side; the unspecified address if the flow has no far address. For an
    /// IPv4-mapped address this is a prefix of IPv4.
    pub prefix: IpNet,
    /// Service ports, host byte order.
    pub ports: RangeInclusive<u16>,
}

/// Who may open flows to one listening process.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ListenerScope {
    /// No rule could ever permit a flow to it.
    Nobody,
    /// Every address may, without a certificate.
    Anyone,
    /// Some may.
    Addresses {
        /// IPv4 addresses that may without a certificate, `deny` rules by address taken off.
        v4: Vec<Ipv4Net>,
        /// The same of IPv6.
        v6: Vec<Ipv6Net>,
        /// Some rule could admit others by their certificate.
        certificate: bool,
        /// IPv4 addresses from which some rule could, `deny` rules by address taken off.
        proven_v4: Vec<Ipv4Net>,
        /// The same of IPv6.
        proven_v6: Vec<Ipv6Net>,
        /// Some rule admits processes of this host by `process{}`.
        processes: bool,
    },
}
