//! The compiled policy: from a flow to the rules that matter, without asking each rule.
//!
//! A rule is a service, a principal that opens and a principal that accepts. Equal principals are one,
//! with one number. An evaluation finds the numbers of what each party is, from the party's facts
//! ([`side`]), among those with a rule for the port ([`ports`]); then it looks up each combination in one
//! table. What it costs follows from how many of these principals a party is at once, not from how many
//! there are.
//!
//! Where a certificate has yet to be shown, a second index answers what could be: there, every
//! condition on the certificate of that side is taken to hold.

mod code;
mod hash;
mod ports;
mod side;
mod terms;
mod values;

use std::{collections::HashMap, sync::Arc};

use portcullis_types::{Protocol, RuleId};

use crate::{
    check,
    decide::{Brief, Matches, better},
    facts::{CertificateFact, Flow, ProcessFact, Side},
    model::{Atom, Effect, Expr, Rule, Truth},
    services::Service,
    source::{to_u32, to_usize},
    view::View,
};
use hash::{Table, mix};
use ports::PortIndex;
use side::{Hits, Principal, SideIndex, TooMany};

/// All indices of one policy.
#[derive(Debug)]
pub(crate) struct Compiled {
    ports: PortIndex,
    exact: Index,
    /// As things stand before `to`, or `from`, has shown its certificate; none if that changes nothing.
    before_to: Option<Index>,
    before_from: Option<Index>,
    expiries: Vec<u64>,
}

/// One rule's place.
#[derive(Clone, Copy, Debug)]
struct Entry {
    from: u32,
    to: u32,
    service: u32,
    /// One more rule for the same three, in [`Index::more`], from 1.
    next: u32,
    /// In [`Compiled::expiries`], from 1.
    expires: u32,
    effect: Effect,
    brief: Brief,
}

impl hash::Entry for Entry {
    const NONE: Self = Self {
        from: u32::MAX,
        to: u32::MAX,
        service: u32::MAX,
        next: 0,
        expires: 0,
        effect: Effect::Deny,
        brief: Brief::NONE,
    };

    fn is_none(&self) -> bool {
        self.from == u32::MAX
    }
}

#[derive(Debug)]
struct Index {
    from: Arc<SideIndex>,
    to: Arc<SideIndex>,
    from_partners: Vec<Partners>,
    to_partners: Vec<Partners>,
    table: Table<Entry>,
    more: Vec<Entry>,
}

/// What a principal occurs together with: one bit of each number, so that most combinations that no
/// rule has are not even looked up.
#[derive(Clone, Copy, Debug, Default)]
struct Partners {
    principals: u64,
    services: u32,
}

const fn bit(number: u32) -> u64 {
    1 << ((number.wrapping_mul(0x9e37_79b1)) >> 26)
}

/// The same for services, of which few policies have more than there are bits.
const fn service_bit(number: u32) -> u32 {
    1 << (number % u32::BITS)
}

const fn triple(from: u32, to: u32, service: u32) -> u64 {
    mix((from as u64) << 32 | to as u64, service as u64)
}

/// Combinations have no kinds, so other bits of the hash tell them apart.
const fn kind(hash: u64) -> u32 {
    1 << (hash >> 40 & 31)
}

/// Gives equal formulas one number. Equal ones are one in memory, and stay there: they are all kept.
#[derive(Default)]
struct Principals {
    places: HashMap<usize, u32>,
    all: Vec<Principal>,
}

impl Principals {
    fn number(&mut self, expr: &Expr, denies: bool, services: u32) -> u32 {
        let number = *self.places.entry(expr.place()).or_insert_with(|| {
            self.all.push(Principal { expr: expr.clone(), denies: false, services: 0 });
            to_u32(self.all.len() - 1)
        });
        if let Some(principal) = self.all.get_mut(to_usize(number)) {
            principal.denies |= denies;
            principal.services |= services;
        }
        number
    }
}

impl Principals {
    /// The same principals as they stand before their certificate is shown; with the new number of
    /// each, none if it cannot hold.
    fn before_certificate(&self) -> (Self, Vec<Option<u32>>) {
        let (mut soft, mut kept) = (Self::default(), HashMap::new());
        let number = |p: &Principal| {
            let expr = check::shared(&mut kept, terms::before_certificate(&p.expr, false));
            (expr != Expr::Nothing).then(|| soft.number(&expr, p.denies, p.services))
        };
        let numbers = self.all.iter().map(number).collect();
        (soft, numbers)
    }

    fn index(&self) -> Arc<SideIndex> {
        Arc::new(SideIndex::new(&self.all))
    }
}

impl Compiled {
    /// `None` for a policy whose services overlap in more ways than can be indexed.
    pub(crate) fn new(rules: &[Rule]) -> Option<Self> {
        let mut order: Vec<usize> = (0..rules.len()).collect();
        order.sort_by_key(|i| rules.get(*i).map(|r| (r.effect == Effect::Allow).then(|| r.rank())));
        let mut ranks = vec![0; rules.len()];
        for (rank, i) in order.iter().enumerate() {
            if let Some(slot) = ranks.get_mut(*i) {
                *slot = to_u32(rank);
            }
        }
        let mut services: Vec<&Service> = Vec::new();
        let mut service_numbers: HashMap<&Service, u32> = HashMap::new();
        let mut expiries: Vec<u64> = rules.iter().filter_map(|r| r.expires).collect();
        expiries.sort_unstable();
        expiries.dedup();
        let (mut froms, mut tos) = (Principals::default(), Principals::default());
        let mut entries = Vec::with_capacity(rules.len());
        for (i, (rule, rank)) in rules.iter().zip(&ranks).enumerate() {
            let service = *service_numbers.entry(&rule.service).or_insert_with(|| {
                services.push(&rule.service);
                to_u32(services.len() - 1)
            });
            if rule.from == Expr::Nothing || rule.to == Expr::Nothing {
                continue;
            }
            let (denies, services) = (rule.effect == Effect::Deny, service_bit(service));
            entries.push(Entry {
                from: froms.number(&rule.from, denies, services),
                to: tos.number(&rule.to, denies, services),
                service,
                next: 0,
                expires: rule.expires.map_or(0, |end| to_u32(expiries.partition_point(|e| *e < end) + 1)),
                effect: rule.effect,
                brief: Brief::of(RuleId(to_u32(i)), *rank, rule),
            });
        }
        let (from, to) = (froms.index(), tos.index());
        let unsettled =
            |list: &Principals| list.all.iter().any(|p| p.expr.mentions(|a| !matches!(a, Atom::Address(_))));
        let soften = |list: &[Option<u32>], n: u32| list.get(to_usize(n)).copied().flatten();
        let before_to = unsettled(&tos).then(|| {
            let (soft, numbers) = tos.before_certificate();
            let moved = entries.iter().filter_map(|e| Some(Entry { to: soften(&numbers, e.to)?, ..*e }));
            Index::new(moved.collect(), (Arc::clone(&from), froms.all.len()), (soft.index(), soft.all.len()))
        });
        let before_from = unsettled(&froms).then(|| {
            let (soft, numbers) = froms.before_certificate();
            let moved = entries.iter().filter_map(|e| Some(Entry { from: soften(&numbers, e.from)?, ..*e }));
            Index::new(moved.collect(), (soft.index(), soft.all.len()), (Arc::clone(&to), tos.all.len()))
        });
        let exact = Index::new(entries, (from, froms.all.len()), (to, tos.all.len()));
        Some(Self { ports: PortIndex::new(&services)?, exact, before_to, before_from, expiries })
    }

    /// The rules that matter; `None` if a party is too many principals at once.
    #[inline]
    pub(crate) fn matches(&self, flow: &Flow<'_>, from: &View<'_>, to: &View<'_>) -> Option<Matches> {
        let (far, near) = if flow.far == Side::To { (to, from) } else { (from, to) };
        let mut found = Matches::default();
        let now = flow.now;
        let services = self.ports.services(flow.protocol, flow.port);
        let exact = self.exact.search(from, to, services, |entry, truth| {
            if self.in_force(entry, now) {
                match (entry.effect, entry.brief.audit) {
                    (Effect::Allow, _) if truth.allows() => better(&mut found.allow, &entry.brief),
                    (Effect::Deny, false) if truth.denies() => better(&mut found.deny, &entry.brief),
                    (Effect::Deny, true) if truth.denies() => better(&mut found.audit, &entry.brief),
                    _ => {}
                }
            }
        });
        exact.ok()?;
        if matches!(near.certificate, CertificateFact::Pending) {
            return None;
        }
        if !matches!(far.certificate, CertificateFact::Pending) || found.deny.is_some() {
            return Some(found);
        }
        let before = if flow.far == Side::To { &self.before_to } else { &self.before_from };
        let Some(before) = before else { return Some(found) };
        // That index takes the process for one that only a certificate would tell.
        if !far.far || far.no_process || !matches!(far.process, ProcessFact::Unknown) {
            return None;
        }
        let possible = before.search(from, to, services, |entry, truth| {
            if self.in_force(entry, now) {
                match (entry.effect, entry.brief.audit) {
                    (Effect::Allow, _) if truth.may_allow() => better(&mut found.may_allow, &entry.brief),
                    (Effect::Deny, false) if truth.may_deny() => better(&mut found.may_deny, &entry.brief),
                    _ => {}
                }
            }
        });
        possible.ok()?;
        Some(found)
    }

    #[inline]
    fn in_force(&self, entry: &Entry, now: u64) -> bool {
        match entry.expires.checked_sub(1) {
            None => true,
            Some(n) => self.expiries.get(to_usize(n)).is_some_and(|end| now < *end),
        }
    }

    /// The ports around one for which the same rules are.
    pub(crate) fn ports_around(&self, protocol: Protocol, port: u16) -> std::ops::RangeInclusive<u16> {
        self.ports.around(protocol, port)
    }
}

impl Index {
    /// Of rules, and the principals of each side with their number.
    fn new(mut entries: Vec<Entry>, from: (Arc<SideIndex>, usize), to: (Arc<SideIndex>, usize)) -> Self {
        let mut from_partners = vec![Partners::default(); from.1];
        let mut to_partners = vec![Partners::default(); to.1];
        for entry in &entries {
            if let Some(partners) = from_partners.get_mut(to_usize(entry.from)) {
                partners.principals |= bit(entry.to);
                partners.services |= service_bit(entry.service);
            }
            if let Some(partners) = to_partners.get_mut(to_usize(entry.to)) {
                partners.principals |= bit(entry.from);
                partners.services |= service_bit(entry.service);
            }
        }
        // Of several rules for the same three, the best comes first and the others hang behind it.
        let key = |e: &Entry| (e.from, e.to, e.service);
        entries.sort_unstable_by_key(|e| (key(e), e.brief.rank));
        let (mut heads, mut more): (Vec<Entry>, Vec<Entry>) = (Vec::with_capacity(entries.len()), Vec::new());
        let mut i = entries.len();
        while let Some(last) = i.checked_sub(1).and_then(|n| entries.get(n)).copied() {
            let start = entries.partition_point(|e| key(e) < key(&last));
            let group = entries.get(start..i).unwrap_or_default();
            let mut next = 0;
            for entry in group.iter().skip(1).rev().filter(|e| is_needed(e, group)) {
                more.push(Entry { next, ..*entry });
                next = to_u32(more.len());
            }
            heads.extend(group.first().map(|first| Entry { next, ..*first }));
            i = start;
        }
        let item = |e: &Entry| {
            let hash = triple(e.from, e.to, e.service);
            (hash, kind(hash), *e)
        };
        let table = Table::new(heads.len(), heads.iter().map(item));
        Self { from: from.0, to: to.0, from_partners, to_partners, table, more }
    }

    #[inline]
    fn search(
        &self,
        from: &View<'_>,
        to: &View<'_>,
        services: &[u32],
        mut visit: impl FnMut(&Entry, Truth),
    ) -> Result<(), TooMany> {
        let wanted = services.iter().fold(0, |bits, s| bits | service_bit(*s));
        let (mut froms, mut tos) = (Hits::new(), Hits::new());
        self.from.hits(from, wanted, &mut froms)?;
        if froms.is_empty() {
            return Ok(());
        }
        self.to.hits(to, wanted, &mut tos)?;
        for from in &froms {
            let Some(partners) = self.from_partners.get(to_usize(from.principal)) else { continue };
            for to in &tos {
                if partners.principals & bit(to.principal) == 0 {
                    continue;
                }
                let Some(others) = self.to_partners.get(to_usize(to.principal)) else { continue };
                let truth = from.truth & to.truth;
                let both = partners.services & others.services;
                if others.principals & bit(from.principal) == 0 || both & wanted == 0 || truth == Truth::FALSE
                {
                    continue;
                }
                for service in services {
                    if both & service_bit(*service) != 0 {
                        self.visit(from.principal, to.principal, *service, truth, &mut visit);
                    }
                }
            }
        }
        Ok(())
    }

    #[inline]
    fn visit(&self, from: u32, to: u32, service: u32, truth: Truth, visit: &mut impl FnMut(&Entry, Truth)) {
        let is_it = |e: &Entry| e.from == from && e.to == to && e.service == service;
        let hash = triple(from, to, service);
        if !self.table.may_have(hash, kind(hash)) {
            return;
        }
        let mut next = self.table.get(hash, is_it);
        while let Some(entry) = next {
            visit(entry, truth);
            next = entry.next.checked_sub(1).and_then(|n| self.more.get(to_usize(n)));
        }
    }
}

/// Whether a rule can decide although others of its group come before it: not if one of those has
/// the same effect and never expires.
fn is_needed(entry: &Entry, group: &[Entry]) -> bool {
    let kind = |e: &Entry| (e.effect, e.effect == Effect::Deny && e.brief.audit);
    let hides = |e: &&Entry| e.brief.rank < entry.brief.rank && e.expires == 0 && kind(e) == kind(entry);
    // The best of each kind is among the first few; groups can be long in the softened indices.
    !group.iter().take(8).any(|e| hides(&e))
}
