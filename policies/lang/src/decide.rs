//! From the rules that match to the decision: the precedence of LANGUAGE.md, section "Verdicts".

use portcullis_types::{Assurance, Lane, RuleId, Verdict};

use crate::{
    decision::Decision,
    facts::{CertificateFact, ProcessFact},
    model::{Atom, Expr, Rule, Truth},
    view::View,
};

/// The rules that matter among those that match one flow.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Matches {
    /// First `deny` that holds.
    pub(crate) deny: Option<RuleId>,
    /// First `deny` that could hold, given some certificate.
    pub(crate) may_deny: Option<RuleId>,
    /// First `deny … audit` that holds.
    pub(crate) audit: Option<RuleId>,
    /// Best `allow` that holds.
    pub(crate) allow: Option<RuleId>,
    /// Best `allow` that would hold, given a suitable certificate.
    pub(crate) may_allow: Option<RuleId>,
}

/// Decides. `rule` finds a rule by its number; `far` is the far side.
pub(crate) fn decide<'r>(
    matches: &Matches,
    far: &View<'_>,
    far_is_to: bool,
    rule: impl Fn(RuleId) -> Option<&'r Rule>,
) -> Decision {
    if matches.deny.is_some() {
        let assurance = matches.deny.and_then(rule).map_or(Assurance::None, |r| assurance(r, far, far_is_to));
        return Decision { rule: matches.deny, assurance, ..Decision::DEFAULT };
    }
    let Some(id) = matches.allow.or(matches.may_allow) else { return Decision::DEFAULT };
    let Some(found) = rule(id) else { return Decision::DEFAULT };
    let shown = matches!(far.certificate, CertificateFact::Shown(_));
    // Between two processes of one host nothing needs protection on the way.
    let local = far.is_local() && !shown;
    let asked = match found.lane {
        _ if local => Lane::Plain,
        Some(lane) => lane,
        None if shown => Lane::Tls,
        None => Lane::Plain,
    };
    let wants = !shown && asked != Lane::Plain;
    let unsettled = matches.allow.is_none() || (matches.may_deny.is_some() && !shown);
    let protect = wants || unsettled;
    let lane = if protect && asked == Lane::Plain { Lane::Tls } else { asked };
    let observed = matches.audit.or(found.audit.then_some(id));
    Decision {
        verdict: if protect { Verdict::Protect } else { Verdict::Permit },
        rule: Some(id),
        lane,
        assurance: if unsettled { Assurance::Certificate } else { assurance(found, far, far_is_to) },
        related: found.related,
        observe_only: observed.is_some(),
        observed,
    }
}

fn assurance(rule: &Rule, far: &View<'_>, far_is_to: bool) -> Assurance {
    strength(if far_is_to { &rule.to } else { &rule.from }, far, false)
}

/// The strongest of the proofs by which a formula holds.
fn strength(expr: &Expr, far: &View<'_>, negated: bool) -> Assurance {
    match expr {
        Expr::Any | Expr::Nothing => Assurance::None,
        Expr::Atom(atom) if far.atom(atom, negated) != Truth::TRUE => Assurance::None,
        Expr::Atom(atom) => match (&**atom, far.process) {
            (Atom::Address(_), _) => Assurance::Address,
            (Atom::Process(..) | Atom::Sha256(_), ProcessFact::Known(_) | ProcessFact::UserOnly { .. }) => {
                Assurance::Kernel
            }
            _ if matches!(far.certificate, CertificateFact::Shown(_)) => Assurance::Certificate,
            _ => Assurance::None,
        },
        Expr::Not(inner) => strength(inner, far, !negated),
        Expr::And(list) | Expr::Or(list) => {
            let all = list.iter().map(|e| strength(e, far, negated));
            all.max().unwrap_or_default()
        }
    }
}
