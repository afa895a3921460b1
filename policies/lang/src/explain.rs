//! Why a flow is decided as it is.

use portcullis_types::RuleId;

use crate::{decision::Decision, facts::Flow, policy::Policy};

/// Why a flow is decided as it is, and what would permit it.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// What [`Policy::evaluate`] says.
    pub decision: Decision,
    /// The rules that came nearest without matching, nearest first.
    pub near: Vec<NearMiss>,
    /// The smallest rule that would permit exactly this flow, to paste into the policy; none if it
    /// is permitted, or if a `deny` stands against it, which no rule can overrule.
    pub permit_with: Option<String>,
}

/// A rule that did not match, and the one condition that it failed on.
#[derive(Clone, Debug)]
pub struct NearMiss {
    /// The rule.
    pub rule: RuleId,
    /// In words: what the rule wants and what the flow has.
    pub failed: String,
}

pub(crate) fn explain(policy: &Policy, flow: &Flow<'_>) -> Explanation {
    Explanation { decision: policy.evaluate(flow), near: Vec::new(), permit_with: None }
}
