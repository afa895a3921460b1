//! From the rules that match to the decision: the precedence of LANGUAGE.md, section "Verdicts".

use portcullis_types::{Assurance, Lane, RuleId, Verdict};

use crate::{
    decision::Decision,
    facts::{CertificateFact, ProcessFact, Side},
    model::{Atom, Expr, Rule, Truth},
    view::View,
};

/// What of a rule a decision needs, small enough to lie beside the rule's place in an index.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Brief {
    pub(crate) id: RuleId,
    /// Order among those of its effect; the least decides.
    pub(crate) rank: u32,
    pub(crate) lane: Option<Lane>,
    pub(crate) related: bool,
    pub(crate) audit: bool,
    pub(crate) from: Kinds,
    pub(crate) to: Kinds,
}

/// What kinds of condition a formula has.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Kinds(u8);

impl Kinds {
    const ADDRESS: u8 = 1;
    const CERTIFICATE: u8 = 2;
    const PROCESS: u8 = 4;
    /// There is a choice in it, so which conditions it holds by depends on the flow.
    const CHOICE: u8 = 8;

    pub(crate) fn of(expr: &Expr) -> Self {
        let mut kinds = Self::default();
        kinds.add(expr, false);
        kinds
    }

    const fn has(self, kind: u8) -> bool {
        self.0 & kind != 0
    }

    fn add(&mut self, expr: &Expr, negated: bool) {
        match expr {
            Expr::Any | Expr::Nothing => {}
            Expr::Atom(atom) => {
                self.0 |= match **atom {
                    Atom::Address(_) => Self::ADDRESS,
                    Atom::Shown | Atom::Version(..) | Atom::Certificate(..) => Self::CERTIFICATE,
                    Atom::Sha256(_) | Atom::Process(..) => Self::PROCESS,
                };
            }
            Expr::Not(inner) => self.add(inner, !negated),
            Expr::And(list) | Expr::Or(list) => {
                if matches!(expr, Expr::And(_)) == negated {
                    self.0 |= Self::CHOICE;
                }
                list.iter().for_each(|e| self.add(e, negated));
            }
        }
    }
}

impl Brief {
    pub(crate) fn of(id: RuleId, rank: u32, rule: &Rule) -> Self {
        let (from, to) = (Kinds::of(&rule.from), Kinds::of(&rule.to));
        Self { id, rank, lane: rule.lane, related: rule.related, audit: rule.audit, from, to }
    }
}

/// The rules that matter among those that match one flow.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Matches {
    /// First `deny` that holds.
    pub(crate) deny: Option<Brief>,
    /// First `deny` that could hold, given some certificate.
    pub(crate) may_deny: Option<Brief>,
    /// First `deny … audit` that holds.
    pub(crate) audit: Option<Brief>,
    /// Best `allow` that holds.
    pub(crate) allow: Option<Brief>,
    /// Best `allow` that would hold, given a suitable certificate.
    pub(crate) may_allow: Option<Brief>,
}

/// Keeps the better of two.
pub(crate) fn better(kept: &mut Option<Brief>, found: &Brief) {
    if kept.is_none_or(|k| found.rank < k.rank) {
        *kept = Some(*found);
    }
}

/// Decides. `rule` finds a rule by its number; `far` is the far side.
#[inline]
pub(crate) fn decide<'r>(
    matches: &Matches,
    far: &View<'_>,
    side: Side,
    rule: impl Fn(RuleId) -> Option<&'r Rule>,
) -> Decision {
    if let Some(deny) = &matches.deny {
        let assurance = assurance(deny, far, side, rule);
        return Decision { rule: Some(deny.id), assurance, ..Decision::DEFAULT };
    }
    let Some(found) = matches.allow.or(matches.may_allow) else { return Decision::DEFAULT };
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
    let observed = matches.audit.map(|a| a.id).or(found.audit.then_some(found.id));
    Decision {
        verdict: if protect { Verdict::Protect } else { Verdict::Permit },
        rule: Some(found.id),
        lane,
        assurance: if unsettled { Assurance::Certificate } else { assurance(&found, far, side, rule) },
        related: found.related,
        observe_only: observed.is_some(),
        observed,
    }
}

/// The strongest of the proofs by which a rule holds for the far side.
fn assurance<'r>(
    found: &Brief,
    far: &View<'_>,
    side: Side,
    rule: impl Fn(RuleId) -> Option<&'r Rule>,
) -> Assurance {
    let kinds = if side == Side::To { found.to } else { found.from };
    if kinds.has(Kinds::CHOICE) {
        let expr = rule(found.id).map(|r| if side == Side::To { &r.to } else { &r.from });
        return expr.map_or(Assurance::None, |e| strength(e, far, false).1);
    }
    let shown = matches!(far.certificate, CertificateFact::Shown(_));
    let here = matches!(far.process, ProcessFact::Known(_) | ProcessFact::UserOnly { .. });
    if shown && (kinds.has(Kinds::CERTIFICATE) || (kinds.has(Kinds::PROCESS) && !here)) {
        Assurance::Certificate
    } else if kinds.has(Kinds::PROCESS) && here {
        Assurance::Kernel
    } else if kinds.has(Kinds::ADDRESS) {
        Assurance::Address
    } else {
        Assurance::None
    }
}

/// How a formula stands, and the strongest proof by which it does if it holds.
fn strength(expr: &Expr, far: &View<'_>, negated: bool) -> (Truth, Assurance) {
    let (truth, proof) = match expr {
        Expr::Any | Expr::Nothing => (far.expr(expr, negated), Assurance::None),
        Expr::Atom(atom) => {
            let proof = match (&**atom, far.process) {
                (Atom::Address(_), _) => Assurance::Address,
                (
                    Atom::Process(..) | Atom::Sha256(_),
                    ProcessFact::Known(_) | ProcessFact::UserOnly { .. },
                ) => Assurance::Kernel,
                _ if matches!(far.certificate, CertificateFact::Shown(_)) => Assurance::Certificate,
                _ => Assurance::None,
            };
            (far.atom(atom, negated), proof)
        }
        Expr::Not(inner) => strength(inner, far, !negated),
        Expr::And(list) | Expr::Or(list) => {
            let all = list.iter().map(|e| strength(e, far, negated));
            let joined = matches!(expr, Expr::And(_)) != negated;
            let none = if joined { Truth::TRUE } else { Truth::FALSE };
            all.fold((none, Assurance::None), |(truth, most), (found, proof)| {
                (if joined { truth & found } else { truth | found }, most.max(proof))
            })
        }
    };
    (truth, if truth == Truth::TRUE { proof } else { Assurance::None })
}
