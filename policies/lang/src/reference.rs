//! The naive evaluator: asks every rule. What the compiled one is held against.

use portcullis_types::RuleId;

use crate::{
    decide::{Matches, decide},
    decision::Decision,
    facts::{Flow, Side},
    model::{Effect, Rule},
    source::{to_u32, to_usize},
    view::View,
};

/// Decides one flow, in time proportional to the number of rules.
pub(crate) fn evaluate(rules: &[Rule], flow: &Flow<'_>) -> Decision {
    let (from, to) = (View::of(flow, Side::From), View::of(flow, Side::To));
    let matches = matches(rules, flow, &from, &to);
    let far = if flow.far == Side::To { &to } else { &from };
    decide(&matches, far, flow.far == Side::To, |id| rules.get(to_usize(id.0)))
}

/// The rules that matter.
pub(crate) fn matches(rules: &[Rule], flow: &Flow<'_>, from: &View<'_>, to: &View<'_>) -> Matches {
    let mut found = Matches::default();
    let (mut best, mut best_possible) = (None, None);
    for (i, rule) in rules.iter().enumerate() {
        if !rule.in_force(flow.now) || !rule.service.contains(flow.protocol, flow.port) {
            continue;
        }
        let id = RuleId(to_u32(i));
        let truth = from.expr(&rule.from, false) & to.expr(&rule.to, false);
        match (rule.effect, rule.audit) {
            (Effect::Deny, false) => {
                found.deny = found.deny.or(truth.denies().then_some(id));
                found.may_deny = found.may_deny.or(truth.may_deny().then_some(id));
            }
            (Effect::Deny, true) => found.audit = found.audit.or(truth.denies().then_some(id)),
            (Effect::Allow, _) => {
                let rank = (rule.rank(), id);
                if truth.allows() && best.is_none_or(|b| rank < b) {
                    best = Some(rank);
                }
                if truth.may_allow() && best_possible.is_none_or(|b| rank < b) {
                    best_possible = Some(rank);
                }
            }
        }
    }
    found.allow = best.map(|(_, id)| id);
    found.may_allow = best_possible.map(|(_, id)| id);
    found
}
