//! The naive evaluator: asks every rule. What the compiled one is held against.

use portcullis_types::RuleId;

use crate::{
    decide::{Brief, Matches, better},
    facts::Flow,
    model::{Effect, Rule},
    source::to_u32,
    view::View,
};

/// Decides one flow, in time proportional to the number of rules.
#[cfg(test)]
pub(crate) fn evaluate(rules: &[Rule], flow: &Flow<'_>) -> crate::decision::Decision {
    use crate::facts::Side;
    let (from, to) = (View::of(flow, Side::From), View::of(flow, Side::To));
    let matches = matches(rules, flow, &from, &to);
    let far = if flow.far == Side::To { &to } else { &from };
    crate::decide::decide(&matches, far, flow.far, |id| rules.get(crate::source::to_usize(id.0)))
}

/// The rules that matter.
pub(crate) fn matches(rules: &[Rule], flow: &Flow<'_>, from: &View<'_>, to: &View<'_>) -> Matches {
    let mut found = Matches::default();
    // Of equal rank, the first in the file.
    let (mut best, mut best_possible) = (None, None);
    for (i, rule) in rules.iter().enumerate() {
        if !rule.in_force(flow.now) || !rule.service.contains(flow.protocol, flow.port) {
            continue;
        }
        let number = to_u32(i);
        let brief = || Brief::of(RuleId(number), number, rule);
        let truth = from.expr(&rule.from, false) & to.expr(&rule.to, false);
        match (rule.effect, rule.audit) {
            (Effect::Deny, false) => {
                if truth.denies() {
                    better(&mut found.deny, &brief());
                }
                if truth.may_deny() {
                    better(&mut found.may_deny, &brief());
                }
            }
            (Effect::Deny, true) if truth.denies() => better(&mut found.audit, &brief()),
            (Effect::Deny, true) => {}
            (Effect::Allow, _) => {
                let rank = (rule.rank(), number);
                if truth.allows() && best.is_none_or(|b| rank < b) {
                    best = Some(rank);
                    found.allow = Some(brief());
                }
                if truth.may_allow() && best_possible.is_none_or(|b| rank < b) {
                    best_possible = Some(rank);
                    found.may_allow = Some(brief());
                }
            }
        }
    }
    found
}
