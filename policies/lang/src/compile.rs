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
use side::{Hit, Hits, Principal, Role, SideIndex, TooMany, Wanted};

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
#[repr(align(32))]
struct Entry {
    from: u32,
    to: u32,
    service: u32,
    /// In [`Compiled::expiries`], from 1.
    expires: u32,
    effect: Effect,
    brief: Brief,
}

impl hash::Entry for Entry {
    fn hash(&self) -> u64 {
        triple(self.from, self.to, self.service)
    }
}

#[derive(Debug)]
struct Index {
    from: Arc<SideIndex>,
    to: Arc<SideIndex>,
    /// Set if the partners that principals of a side know are not those that this index has.
    from_moved: u32,
    to_moved: u32,
    table: Table<Entry>,
}

/// A bit for the number of a principal.
const fn bit(number: u32) -> u32 {
    1 << (number.wrapping_mul(0x9e37_79b1) >> 27)
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
    1 << (hash & 31)
}

/// Gives equal formulas one number. Equal ones are one in memory, and stay there: they are all kept.
#[derive(Default)]
struct Principals {
    places: HashMap<usize, u32>,
    all: Vec<Principal>,
}

impl Principals {
    /// The number of a principal of which something more is said.
    fn number(&mut self, expr: &Expr, denies: bool, services: u32, partners: u32) -> u32 {
        let number = *self.places.entry(expr.place()).or_insert_with(|| {
            let role = Role { principal: to_u32(self.all.len()), services: 0, partners: 0 };
            self.all.push(Principal { expr: expr.clone(), denies: false, role });
            role.principal
        });
        if let Some(Principal { denies: denied, role, .. }) = self.all.get_mut(to_usize(number)) {
            *denied |= denies;
            role.services |= services;
            role.partners |= partners;
        }
        number
    }

    /// The same principals as they stand before their certificate is shown; with the new number of
    /// each, none if it cannot hold.
    fn before_certificate(&self) -> (Self, Vec<Option<u32>>) {
        let (mut soft, mut kept) = (Self::default(), HashMap::new());
        let number = |Principal { expr, denies, role }: &Principal| {
            let expr = check::shared(&mut kept, terms::before_certificate(expr, false));
            let is_some = expr != Expr::Nothing;
            is_some.then(|| soft.number(&expr, *denies, role.services, role.partners))
        };
        let numbers = self.all.iter().map(number).collect();
        (soft, numbers)
    }

    fn index(&self, side: Side) -> Arc<SideIndex> {
        // Who accepts is looked for second, when it is known whom somebody who opens has a rule for.
        Arc::new(SideIndex::new(&self.all, side == Side::To))
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
            let to = tos.number(&rule.to, denies, services, 0);
            let from = froms.number(&rule.from, denies, services, bit(to));
            tos.number(&rule.to, denies, services, bit(from));
            entries.push(Entry {
                from,
                to,
                service,
                expires: rule.expires.map_or(0, |end| to_u32(expiries.partition_point(|e| *e < end) + 1)),
                effect: rule.effect,
                brief: Brief::of(RuleId(to_u32(i)), *rank, rule),
            });
        }
        let (from, to) = (froms.index(Side::From), tos.index(Side::To));
        let unsettled =
            |list: &Principals| list.all.iter().any(|p| p.expr.mentions(|a| !matches!(a, Atom::Address(_))));
        let soften = |list: &[Option<u32>], n: u32| list.get(to_usize(n)).copied().flatten();
        let before_to = unsettled(&tos).then(|| {
            let (soft, numbers) = tos.before_certificate();
            let moved = entries.iter().filter_map(|e| Some(Entry { to: soften(&numbers, e.to)?, ..*e }));
            let table = table(moved.collect());
            Index {
                from: Arc::clone(&from),
                to: soft.index(Side::To),
                from_moved: 0,
                to_moved: u32::MAX,
                table,
            }
        });
        let before_from = unsettled(&froms).then(|| {
            let (soft, numbers) = froms.before_certificate();
            let moved = entries.iter().filter_map(|e| Some(Entry { from: soften(&numbers, e.from)?, ..*e }));
            let table = table(moved.collect());
            Index {
                from: soft.index(Side::From),
                to: Arc::clone(&to),
                from_moved: u32::MAX,
                to_moved: 0,
                table,
            }
        });
        let exact = Index { from, to, from_moved: 0, to_moved: 0, table: table(entries) };
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

/// Rules by principals and service; of several for the same three, the best comes first.
fn table(mut entries: Vec<Entry>) -> Table<Entry> {
    let key = |e: &Entry| (e.from, e.to, e.service);
    entries.sort_unstable_by_key(|e| (hash::Entry::hash(e), key(e), e.brief.rank));
    let mut kept = Vec::with_capacity(entries.len());
    for group in entries.chunk_by(|a, b| key(a) == key(b)) {
        kept.extend(group.iter().filter(|entry| is_needed(entry, group)));
    }
    Table::new(kept, |entry| kind(hash::Entry::hash(entry)))
}

impl Index {
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
        self.from.hits(from, Wanted { services: wanted, principals: u32::MAX }, &mut froms)?;
        // Only whom and what somebody who opens has a rule for is looked for any further.
        let (mut partners, mut theirs) = (self.to_moved, 0);
        for Hit { role, .. } in &froms {
            partners |= role.partners;
            theirs |= role.services;
        }
        let wanted = theirs & wanted;
        if wanted == 0 {
            return Ok(());
        }
        self.to.hits(to, Wanted { services: wanted, principals: partners }, &mut tos)?;
        for from in &froms {
            for to in &tos {
                let (left, right, truth) = (&from.role, &to.role, from.truth & to.truth);
                let both = left.services & right.services & wanted;
                if both == 0
                    || (left.partners | self.to_moved) & bit(right.principal) == 0
                    || (right.partners | self.from_moved) & bit(left.principal) == 0
                    || truth == Truth::FALSE
                {
                    continue;
                }
                for service in services.iter().filter(|s| both & service_bit(**s) != 0) {
                    let (from, to, service) = (left.principal, right.principal, *service);
                    let hash = triple(from, to, service);
                    if !self.table.may_have(hash, kind(hash)) {
                        continue;
                    }
                    for entry in self.table.near(hash) {
                        if (entry.from, entry.to, entry.service) == (from, to, service) {
                            visit(entry, truth);
                        }
                    }
                }
            }
        }
        Ok(())
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
