//! Who may open flows to a listening process.

use portcullis_types::Protocol;

use crate::{
    decision::ListenerScope,
    facts::Party,
    model::{Address, Atom, Effect, Expr, Rule, Step, merge},
    region::{prefixes_v4, prefixes_v6},
    view::View,
};

/// Inclusive ranges of both families: sorted, disjoint, not touching.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Ranges {
    pub(crate) v4: Vec<(u32, u32)>,
    pub(crate) v6: Vec<(u128, u128)>,
}

impl Ranges {
    pub(crate) fn all() -> Self {
        Self { v4: vec![(0, u32::MAX)], v6: vec![(0, u128::MAX)] }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    pub(crate) fn is_all(&self) -> bool {
        *self == Self::all()
    }

    pub(crate) fn union(&self, other: &Self) -> Self {
        let join = |a: &[_], b: &[_]| merge([a, b].concat());
        Self { v4: join(&self.v4, &other.v4), v6: merge([&*self.v6, &*other.v6].concat()) }
    }

    pub(crate) fn complement(&self) -> Self {
        Self { v4: complement(&self.v4), v6: complement(&self.v6) }
    }

    pub(crate) fn intersection(&self, other: &Self) -> Self {
        self.complement().union(&other.complement()).complement()
    }
}

fn complement<T: Ord + Copy + Step>(ranges: &[(T, T)]) -> Vec<(T, T)> {
    let mut gaps = Vec::with_capacity(ranges.len() + 1);
    let mut next = Some(T::LEAST);
    for (low, high) in ranges {
        if let Some(start) = next.filter(|start| start < low) {
            gaps.push((start, low.before()));
        }
        next = (*high < T::MOST).then(|| high.after());
    }
    gaps.extend(next.map(|start| (start, T::MOST)));
    gaps
}

/// What of the remote end's formula is assumed of things other than its address.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Assume {
    /// No certificate, and a process that cannot be seen.
    Stranger,
    /// Whatever certificate suits.
    Certificate,
    /// Whatever process of this host suits.
    Local,
    /// Nothing: what holds now holds whatever certificate and process there may be.
    Nothing,
}

/// The addresses from which a remote end fulfils a formula.
fn addresses(expr: &Expr, negated: bool, assume: Assume) -> Ranges {
    let known = |holds: bool| if holds { Ranges::all() } else { Ranges::default() };
    match expr {
        Expr::Any => known(!negated),
        Expr::Nothing => known(negated),
        Expr::Not(inner) => addresses(inner, !negated, assume),
        Expr::Atom(atom) => match (&**atom, assume) {
            (Atom::Address(set), _) => {
                let ranges = Ranges { v4: set.v4.to_vec(), v6: set.v6.to_vec() };
                if negated { ranges.complement() } else { ranges }
            }
            (Atom::Shown | Atom::Version(..) | Atom::Certificate(..), Assume::Certificate) => known(true),
            (_, Assume::Nothing) => known(false),
            (Atom::Shown | Atom::Version(..) | Atom::Certificate(..), _) => known(negated),
            // A certificate can vouch for a process, and a process of this host can be seen.
            (Atom::Sha256(_) | Atom::Process(..), Assume::Stranger) => known(false),
            (Atom::Sha256(_) | Atom::Process(..), _) => known(true),
        },
        Expr::And(list) | Expr::Or(list) => {
            let all = list.iter().map(|e| addresses(e, negated, assume));
            if matches!(expr, Expr::And(_)) == negated {
                all.fold(Ranges::default(), |sum, r| sum.union(&r))
            } else {
                all.fold(Ranges::all(), |sum, r| sum.intersection(&r))
            }
        }
    }
}

/// Who may open flows to `local`.
pub(crate) fn scope(
    rules: &[Rule],
    local: &Party<'_>,
    protocol: Protocol,
    port: u16,
    now: u64,
) -> ListenerScope {
    let view = View {
        // A wildcard address stands for every address the host has, so a condition on it may hold.
        address: match Address::new(local.addr) {
            Address::V4(0) | Address::V6(0) => Address::Unknown,
            address => address,
        },
        process: local.process,
        certificate: local.certificate,
        far: false,
        no_process: false,
    };
    let wildcard = view.address == Address::Unknown;
    let (mut allowed, mut denied, mut barred) = (Ranges::default(), Ranges::default(), Ranges::default());
    let (mut certificate, mut processes, mut proven) = (false, false, Ranges::default());
    for rule in rules {
        if !rule.in_force(now) || !rule.service.contains(protocol, port) {
            continue;
        }
        match rule.effect {
            Effect::Deny if rule.audit => {}
            Effect::Deny => {
                // Only what it denies whatever the local address turns out to be is taken off.
                let certain =
                    if wildcard { certain(&rule.to, &view) } else { view.expr(&rule.to, false).denies() };
                if certain {
                    denied = denied.union(&addresses(&rule.from, false, Assume::Stranger));
                    barred = barred.union(&addresses(&rule.from, false, Assume::Nothing));
                }
            }
            Effect::Allow => {
                let truth = view.expr(&rule.to, false);
                if !(truth.may_allow() || (wildcard && possible(&rule.to, &view))) {
                    continue;
                }
                let strangers = addresses(&rule.from, false, Assume::Stranger);
                let is_process = |a: &Atom| matches!(a, Atom::Process(..) | Atom::Sha256(_));
                let by_process = rule.from.mentions(is_process);
                let others = addresses(&rule.from, false, Assume::Certificate);
                if others != strangers {
                    certificate = true;
                    proven = proven.union(&others);
                }
                processes |= by_process && !addresses(&rule.from, false, Assume::Local).is_empty();
                allowed = allowed.union(&strangers);
            }
        }
    }
    let reach = allowed.intersection(&denied.complement());
    if reach.is_all() {
        return ListenerScope::Anyone;
    }
    if barred.is_all() || (reach.is_empty() && !certificate && !processes) {
        return ListenerScope::Nobody;
    }
    let proven = proven.intersection(&barred.complement());
    ListenerScope::Addresses {
        proven_v4: proven.v4.iter().flat_map(|(low, high)| prefixes_v4(*low, *high)).collect(),
        proven_v6: proven.v6.iter().flat_map(|(low, high)| prefixes_v6(*low, *high)).collect(),
        v4: reach.v4.iter().flat_map(|(low, high)| prefixes_v4(*low, *high)).collect(),
        v6: reach.v6.iter().flat_map(|(low, high)| prefixes_v6(*low, *high)).collect(),
        certificate,
        processes,
    }
}

/// Whether a formula can hold for one of the local addresses.
fn possible(expr: &Expr, view: &View<'_>) -> bool {
    with_address(expr, false, view, true)
}

/// Whether a formula, as a `deny` sees it, holds for every local address.
fn certain(expr: &Expr, view: &View<'_>) -> bool {
    with_address(expr, false, view, false)
}

/// A formula's truth if every condition on the address stands as given, negated or not.
fn with_address(expr: &Expr, negated: bool, view: &View<'_>, assume: bool) -> bool {
    match expr {
        Expr::Any => !negated,
        Expr::Nothing => negated,
        Expr::Not(inner) => with_address(inner, !negated, view, assume),
        Expr::Atom(atom) => match &**atom {
            Atom::Address(_) => assume,
            atom => {
                let truth = view.atom(atom, negated);
                if assume { truth.may_allow() } else { truth.denies() }
            }
        },
        Expr::And(list) | Expr::Or(list) => {
            let mut all = list.iter().map(|e| with_address(e, negated, view, assume));
            if matches!(expr, Expr::And(_)) == negated { all.any(|b| b) } else { all.all(|b| b) }
        }
    }
}
