//! Recorded flows, decided by two policies. A record does not hold all that a rule can ask for; where
//! the verdict depends on what nobody wrote down, that is the answer.

use std::{collections::HashSet, sync::Arc};

use crate::{
    facts::{CertificateFact, Flow, Side},
    model::{Atom, CertificateField, Effect, Expr, ProcessField, Rule, Truth},
    policy::Policy,
    services::Service,
    view::View,
};

/// Two policies, and the rules that only one of them has.
#[derive(Debug)]
pub struct Replay<'a> {
    old: &'a Policy,
    new: &'a Policy,
    changed: Vec<&'a Rule>,
}

/// What becomes of a recorded flow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Replayed {
    /// Its verdict stays.
    Same,
    /// It was refused and becomes allowed.
    Allowed,
    /// It was allowed and becomes refused.
    Refused,
    /// That depends on facts that are not recorded.
    Unknown,
}

/// How a rule stands if what is not recorded is in its favour, and if it is not.
struct Bounds {
    most: Truth,
    least: Truth,
}

impl<'a> Replay<'a> {
    /// Compares two policies as they stand at a time.
    #[must_use]
    pub fn new(old: &'a Policy, new: &'a Policy, now: u64) -> Self {
        let (olds, news) = (keys(old, now), keys(new, now));
        let only = |policy: &'a Policy, others: &HashSet<Key<'_>>| {
            let rules = policy.rules.iter().filter(|r| r.in_force(now) && !others.contains(&key(r)));
            rules.collect::<Vec<_>>()
        };
        let changed = [only(old, &news), only(new, &olds)].concat();
        Self { old, new, changed }
    }

    /// Decides one flow. Of the near side are recorded address, executable, hash, user and unit of the
    /// process, and the name of the host, as the only name in its certificate; of the far side its address
    /// and, if it has shown a certificate, the first name and the process in it.
    #[must_use]
    pub fn flow(&self, flow: &Flow<'_>) -> Replayed {
        if !self.changed.iter().any(|rule| is_about(rule, flow)) {
            return Replayed::Same;
        }
        match (permits(self.old, flow), permits(self.new, flow)) {
            (Some(before), Some(after)) if before == after => Replayed::Same,
            (Some(_), Some(true)) => Replayed::Allowed,
            (Some(_), Some(false)) => Replayed::Refused,
            _ => Replayed::Unknown,
        }
    }
}

type Key<'a> = (Effect, bool, &'a Arc<Service>, &'a Expr, &'a Expr);

fn key(rule: &Rule) -> Key<'_> {
    (rule.effect, rule.audit && rule.effect == Effect::Deny, &rule.service, &rule.from, &rule.to)
}

fn keys(policy: &Policy, now: u64) -> HashSet<Key<'_>> {
    policy.rules.iter().filter(|r| r.in_force(now)).map(key).collect()
}

fn bounds(rule: &Rule, flow: &Flow<'_>) -> Option<Bounds> {
    if !rule.in_force(flow.now) || !rule.service.contains(flow.protocol, flow.port) {
        return None;
    }
    let with = |missing: Truth| {
        side(&rule.from, flow, Side::From, missing) & side(&rule.to, flow, Side::To, missing)
    };
    Some(Bounds { most: with(Truth::TRUE), least: with(Truth::FALSE) })
}

fn side(expr: &Expr, flow: &Flow<'_>, side: Side, missing: Truth) -> Truth {
    let view = View::of(flow, side);
    expr.truth(false, &|atom, negated| {
        if is_recorded(atom, &view, flow.far == side) { view.atom(atom, negated) } else { missing }
    })
}

fn is_recorded(atom: &Atom, view: &View<'_>, far: bool) -> bool {
    let shown = matches!(view.certificate, CertificateFact::Shown(_));
    match atom {
        Atom::Address(_) => true,
        Atom::Shown => shown || far,
        Atom::Certificate(CertificateField::Name, _) => shown || far,
        Atom::Certificate(CertificateField::Process, _) => far,
        Atom::Certificate(..) | Atom::Version(..) => far && !shown,
        // Of the far side a certificate may have told.
        Atom::Process(..) | Atom::Sha256(_) if far => !shown,
        Atom::Process(ProcessField::Group | ProcessField::Cmdline | ProcessField::Ancestor, _) => false,
        Atom::Process(..) | Atom::Sha256(_) => true,
    }
}

/// Whether a rule may decide a flow.
fn is_about(rule: &Rule, flow: &Flow<'_>) -> bool {
    bounds(rule, flow).is_some_and(|b| match rule.effect {
        Effect::Allow => b.most.allows(),
        Effect::Deny => b.most.denies() && !rule.audit,
    })
}

/// Whether a policy permits a flow, if that can be told.
fn permits(policy: &Policy, flow: &Flow<'_>) -> Option<bool> {
    let (mut allowed, mut may_allow, mut denied, mut may_deny) = (false, false, false, false);
    for rule in &policy.rules {
        let Some(bounds) = bounds(rule, flow) else { continue };
        match rule.effect {
            Effect::Allow => {
                allowed |= bounds.least.allows();
                may_allow |= bounds.most.allows();
            }
            Effect::Deny if rule.audit => {}
            Effect::Deny => {
                denied |= bounds.least.denies();
                may_deny |= bounds.most.denies();
            }
        }
    }
    match (denied || !may_allow, allowed && !may_deny) {
        (true, _) => Some(false),
        (false, true) => Some(true),
        (false, false) => None,
    }
}
