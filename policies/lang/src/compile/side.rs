//! Which principals one party is: from its facts, not by asking each principal.

use std::collections::{BTreeSet, HashMap};

use arrayvec::ArrayVec;

use super::{
    code::{self, Code},
    hash::{Entry, Table},
    terms::{self, Literal, Term},
    values::{ADDRESS, Depths, EXE, GROUP, Lead, SHA256, UNIT, Values, both, candidates},
};
use crate::{
    facts::{Fact, ProcessFact},
    model::{Address, Expr, Truth},
    source::{to_u32, to_usize},
    view::View,
};

/// Most principals that one party may be at once, and values that may lead to them; more, and the flow
/// is decided the slow way.
pub(super) const MOST: usize = 128;

/// One principal of a policy.
pub(super) struct Principal {
    pub(super) expr: Expr,
    /// A `deny` names it.
    pub(super) denies: bool,
    /// One bit of each service of its rules: for others it need not be looked at.
    pub(super) services: u32,
}

/// A principal that a party is, and how certainly.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hit {
    pub(super) principal: u32,
    pub(super) truth: Truth,
}

pub(super) type Hits = ArrayVec<Hit, MOST>;

/// More principals, or values, than [`MOST`].
pub(super) struct TooMany;

/// One alternative of a principal, under the value that leads to it, or two values together.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Place {
    hash: u64,
    principal: u32,
    /// As in [`Principal`].
    services: u32,
    /// One more under the same key, in [`SideIndex::more`], from 1.
    next: u32,
    code: Code,
}

impl Entry for Place {
    const NONE: Self = Self { hash: 0, principal: u32::MAX, services: 0, next: 0, code: code::EMPTY };

    fn is_none(&self) -> bool {
        self.principal == u32::MAX
    }
}

/// One alternative of one principal, in full.
#[derive(Debug)]
struct Alternative {
    principal: u32,
    services: u32,
    literals: Box<[Literal]>,
    /// Conditions that are whole formulas.
    rest: Box<[Expr]>,
}

/// Principals of one side.
#[derive(Debug)]
pub(super) struct SideIndex {
    places: Table<Place>,
    more: Vec<Place>,
    /// Facts that lead somewhere together.
    pairs: Vec<(Lead, Lead)>,
    depths: Depths,
    /// Principals that are everyone, with their services.
    everyone: Vec<(u32, u32)>,
    /// Alternatives that do not fit a place, that no fact leads to, or that a `deny` names.
    alternatives: Vec<Alternative>,
    always: Vec<u32>,
    /// Alternatives of `deny` rules, by the fact that leads to them: where that fact is not known,
    /// they may hold.
    unknown: [Vec<u32>; 6],
}

/// How many share the value that a condition leads by, which condition it is, and the values.
type Leading = (u32, usize, Vec<(Lead, u64)>);

/// Values that more alternatives than this share are narrowed down by a second one.
const CROWD: u32 = 3;

impl SideIndex {
    /// Indexes principals.
    pub(super) fn new(principals: &[Principal]) -> Self {
        let mut found: Vec<(u32, Term)> = Vec::with_capacity(principals.len());
        let mut everyone = Vec::new();
        for (number, principal) in principals.iter().enumerate() {
            for term in terms::terms(&principal.expr, false) {
                if term.literals.is_empty() && term.rest.is_empty() {
                    everyone.push((to_u32(number), principal.services));
                } else {
                    found.push((to_u32(number), term));
                }
            }
        }
        let mut values: Vec<u64> = Vec::with_capacity(found.len() * 2);
        for (_, term) in &found {
            for literal in &term.literals {
                values.extend(candidates(literal).iter().map(|(_, hash)| *hash));
            }
        }
        values.sort_unstable();
        let mut crowd: HashMap<u64, u32> = HashMap::new();
        for same in values.chunk_by(|a, b| a == b) {
            // What is rare need not be remembered.
            if let (Some(value), true) = (same.first(), same.len() > to_usize(CROWD)) {
                crowd.insert(*value, to_u32(same.len()));
            }
        }
        let mut builder = Builder { principals, crowd, ..Builder::default() };
        for (principal, term) in found {
            builder.add(principal, term);
        }
        builder.finish(everyone)
    }
}

#[derive(Default)]
struct Builder<'a> {
    principals: &'a [Principal],
    crowd: HashMap<u64, u32>,
    places: Vec<Place>,
    alternatives: Vec<Alternative>,
    single: u32,
    pairs: BTreeSet<(Lead, Lead)>,
    leading: Vec<std::sync::Arc<crate::model::Atom>>,
    always: Vec<u32>,
    unknown: [Vec<u32>; 6],
}

impl Builder<'_> {
    fn add(&mut self, principal: u32, term: Term) {
        let Some(Principal { denies, services, .. }) = self.principals.get(to_usize(principal)) else {
            return;
        };
        let (denied, services) = (*denies, *services);
        // What each condition leads by, the least crowded first; long lists cost memory.
        let mut leads: Vec<Leading> = Vec::new();
        for (at, literal) in term.literals.iter().enumerate() {
            let facts = candidates(literal);
            let most = facts.iter().map(|(_, h)| self.crowd.get(h).copied().unwrap_or(1)).max();
            leads.extend(most.map(|most| (most.saturating_add(to_u32(facts.len() - 1)), at, facts)));
        }
        leads.sort_by_key(|(crowd, at, _)| (*crowd, *at));
        let mut leads = leads.into_iter();
        let mut keys: Vec<u64> = Vec::new();
        let chosen = match (leads.next(), leads.next()) {
            (None, _) => Vec::new(),
            (Some(first), Some(second)) if first.0 > CROWD && first.2.len() * second.2.len() <= 1024 => {
                for (a, left) in &first.2 {
                    for (b, right) in &second.2 {
                        self.pairs.insert((*a.min(b), *a.max(b)));
                        keys.push(both(*left, *right));
                    }
                }
                vec![first, second]
            }
            (Some(first), _) => {
                for (lead, hash) in &first.2 {
                    self.single |= lead.bit();
                    keys.push(*hash);
                }
                vec![first]
            }
        };
        // What led here has been looked at by its hash, so it is made sure of last.
        let led = |at: usize| chosen.iter().any(|(_, by, _)| *by == at);
        let (last, first): (Vec<_>, Vec<_>) = term.literals.iter().enumerate().partition(|(at, _)| led(*at));
        let order = first.into_iter().chain(last).map(|(_, literal)| literal);
        let written = if term.rest.is_empty() { code::write(order) } else { None };
        for (_, at, _) in &chosen {
            self.leading.extend(term.literals.get(*at).map(|l| std::sync::Arc::clone(&l.atom)));
        }
        let mut code = written.unwrap_or(code::EMPTY);
        if chosen.is_empty() || denied || written.is_none() {
            let number = to_u32(self.alternatives.len());
            if chosen.is_empty() {
                self.always.push(number);
            }
            if written.is_none() {
                code = code::elsewhere(number);
            }
            for (_, _, facts) in &chosen {
                let list = facts.first().and_then(|(lead, _)| lead.unknown()).filter(|_| denied);
                if let Some(list) = list.and_then(|n| self.unknown.get_mut(n)) {
                    list.push(number);
                }
            }
            let (literals, rest) = (term.literals.into(), term.rest.into());
            self.alternatives.push(Alternative { principal, services, literals, rest });
        }
        self.places.extend(keys.into_iter().map(|hash| Place { hash, principal, services, next: 0, code }));
    }

    fn finish(mut self, everyone: Vec<(u32, u32)>) -> SideIndex {
        self.places.sort_unstable_by_key(|p| (p.hash, p.principal));
        let mut more: Vec<Place> = Vec::new();
        let mut heads: Vec<(u32, Place)> = Vec::with_capacity(self.places.len());
        for group in self.places.chunk_by(|a, b| a.hash == b.hash) {
            let mut next = 0;
            for place in group.iter().skip(1) {
                more.push(Place { next, ..*place });
                next = to_u32(more.len());
            }
            let services = group.iter().fold(0, |all, place| all | place.services);
            heads.extend(group.first().map(|first| (services, Place { next, ..*first })));
        }
        drop(self.places);
        let paired = self.pairs.iter().fold(0, |bits, (a, b)| bits | a.bit() | b.bit());
        SideIndex {
            places: Table::new(heads.len(), heads.iter().map(|(services, p)| (p.hash, *services, *p))),
            more,
            pairs: self.pairs.into_iter().collect(),
            depths: Depths::new(self.single, paired, self.leading.into_iter()),
            everyone,
            alternatives: self.alternatives,
            always: self.always,
            unknown: self.unknown,
        }
    }
}

impl SideIndex {
    /// The principals that a party is, among those with a rule for one of the services that are wanted.
    #[inline(always)]
    pub(super) fn hits(&self, view: &View<'_>, wanted: u32, hits: &mut Hits) -> Result<(), TooMany> {
        for (principal, _) in self.everyone.iter().filter(|(_, services)| services & wanted != 0) {
            hits.try_push(Hit { principal: *principal, truth: Truth::TRUE }).map_err(|_| TooMany)?;
        }
        self.try_all(&self.always, view, wanted, hits)?;
        if self.depths.nothing() {
            return Ok(());
        }
        self.try_unknown(view, wanted, hits)?;
        let mut values = Values::new();
        self.depths.values(view, &mut values)?;
        for hash in values.single() {
            self.by_hash(*hash, view, wanted, hits)?;
        }
        for (a, b) in &self.pairs {
            for left in values.of(*a) {
                for right in values.of(*b) {
                    self.by_hash(both(*left, *right), view, wanted, hits)?;
                }
            }
        }
        Ok(())
    }

    fn alternative(&self, number: u32, view: &View<'_>) -> Truth {
        let Some(alternative) = self.alternatives.get(to_usize(number)) else { return Truth::FALSE };
        let mut truth = Truth::TRUE;
        for literal in &alternative.literals {
            truth = truth & view.atom(&literal.atom, literal.negated);
            if truth == Truth::FALSE {
                return truth;
            }
        }
        alternative.rest.iter().fold(truth, |truth, rest| truth & view.expr(rest, false))
    }

    fn try_all(&self, numbers: &[u32], view: &View<'_>, wanted: u32, hits: &mut Hits) -> Result<(), TooMany> {
        for number in numbers {
            if let Some(Alternative { principal, services, .. }) = self.alternatives.get(to_usize(*number))
                && services & wanted != 0
            {
                keep(*principal, self.alternative(*number, view), hits)?;
            }
        }
        Ok(())
    }

    /// Most values lead nowhere, so that is told before anything is called.
    #[inline(always)]
    fn by_hash(&self, hash: u64, view: &View<'_>, wanted: u32, hits: &mut Hits) -> Result<(), TooMany> {
        if self.places.may_have(hash, wanted) { self.at(hash, view, wanted, hits) } else { Ok(()) }
    }

    #[inline(never)]
    fn at(&self, hash: u64, view: &View<'_>, wanted: u32, hits: &mut Hits) -> Result<(), TooMany> {
        let mut next = self.places.get(hash, |place| place.hash == hash && !place.is_none());
        while let Some(place) = next {
            if place.services & wanted != 0 {
                let truth = code::run(&place.code, view, |number| self.alternative(number, view));
                keep(place.principal, truth, hits)?;
            }
            next = place.next.checked_sub(1).and_then(|n| self.more.get(to_usize(n)));
        }
        Ok(())
    }

    /// What a fact would lead to that could not be established: it may hold, in a `deny`.
    #[inline]
    fn try_unknown(&self, view: &View<'_>, wanted: u32, hits: &mut Hits) -> Result<(), TooMany> {
        let mut unknown: u32 = 0;
        if view.address == Address::Unknown {
            unknown |= 1 << ADDRESS;
        }
        match view.process {
            _ if view.no_process => {}
            ProcessFact::Known(facts) => {
                unknown |= u32::from(facts.exe == Fact::Unknown) << EXE;
                unknown |= u32::from(facts.sha256 == Fact::Unknown) << SHA256;
            }
            ProcessFact::UserOnly { .. } => unknown |= 1 << EXE | 1 << SHA256 | 1 << GROUP | 1 << UNIT,
            ProcessFact::Unknown if view.far => {}
            ProcessFact::Unknown => unknown |= (1 << ADDRESS) - 1,
        }
        if unknown != 0 {
            for (n, list) in self.unknown.iter().enumerate() {
                if unknown >> n & 1 == 1 {
                    self.try_all(list, view, wanted, hits)?;
                }
            }
        }
        Ok(())
    }
}

/// A principal that may hold.
#[inline]
fn keep(principal: u32, truth: Truth, hits: &mut Hits) -> Result<(), TooMany> {
    if truth == Truth::FALSE {
        return Ok(());
    }
    hits.try_push(Hit { principal, truth }).map_err(|_| TooMany)
}
