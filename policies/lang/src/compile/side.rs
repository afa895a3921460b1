//! Which principals one party is: from its facts, not by asking each principal.

use std::collections::HashMap;

use arrayvec::ArrayVec;

use super::{
    code::{self, Code},
    hash::{Entry, Table},
    terms::{self, Literal, Term},
    values::{ADDRESS, Depths, EXE, GROUP, Key, SHA256, UNIT, UsesOf, Values, both, keys},
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
    pub(super) role: Role,
}

/// A principal's number and what it occurs together with, one bit of each number: so most combinations
/// that no rule has are not even looked up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Role {
    pub(super) principal: u32,
    /// Services of its rules.
    pub(super) services: u32,
    /// Principals that are the other side of its rules.
    pub(super) partners: u32,
}

/// What is looked for on a side: bits of services, and of the numbers of principals.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) services: u32,
    pub(super) principals: u32,
}

impl Role {
    #[inline(always)]
    const fn is(&self, wanted: Wanted) -> bool {
        self.services & wanted.services != 0 && super::bit(self.principal) & wanted.principals != 0
    }
}

/// A principal that a party is, and how certainly.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hit {
    pub(super) role: Role,
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
    role: Role,
    code: Code,
}

impl Entry for Place {
    fn hash(&self) -> u64 {
        self.hash
    }
}

/// One alternative of one principal, in full.
#[derive(Debug)]
struct Alternative {
    role: Role,
    literals: Box<[Literal]>,
    /// Conditions that are whole formulas.
    rest: Box<[Expr]>,
}

/// Principals of one side.
#[derive(Debug)]
pub(super) struct SideIndex {
    places: Table<Place>,
    /// Whether homes of places say of which principals they are, not of which services.
    by_principal: bool,
    depths: Depths,
    /// Principals that are everyone.
    everyone: Vec<Role>,
    /// Alternatives that do not fit a place, that no fact leads to, or that a `deny` names.
    alternatives: Vec<Alternative>,
    always: Vec<u32>,
    /// Alternatives of `deny` rules, by the fact that leads to them: where that fact is not known,
    /// they may hold.
    unknown: [Vec<u32>; 6],
}

/// What conditions can be found by.
#[derive(Default)]
struct Keys {
    /// By condition, which is one in memory: its keys, and how many alternatives have it.
    known: HashMap<usize, (Box<[Key]>, u32)>,
    /// How many alternatives a value leads to, if they are many.
    crowds: HashMap<u64, u32>,
}

/// Values that more alternatives than this share are narrowed down by a second one.
const CROWD: u32 = 3;

/// Most pairs of values under which one alternative is kept.
const LONGEST: usize = 1024;

impl Keys {
    fn of<'a>(all: impl Iterator<Item = &'a Literal>) -> Self {
        let (mut known, mut crowds) = (HashMap::<usize, (Box<[Key]>, u32)>::new(), HashMap::new());
        for literal in all.filter(|literal| !literal.negated) {
            let (_, count) = known.entry(literal.place()).or_insert_with(|| (keys(literal).into(), 0));
            *count += 1;
        }
        for (keys, count) in known.values() {
            for key in keys.iter() {
                *crowds.entry(key.hash).or_insert(0) += *count;
            }
        }
        crowds.retain(|_, count| *count > CROWD);
        Self { known, crowds }
    }

    fn get(&self, literal: &Literal) -> &[Key] {
        let found = self.known.get(&literal.place()).filter(|_| !literal.negated);
        found.map_or(&[], |(keys, _)| keys)
    }

    /// How many alternatives the values of a condition lead to; none if it has none.
    fn crowd(&self, literal: &Literal) -> Option<u32> {
        let keys = self.get(literal);
        let most = keys.iter().map(|key| self.crowds.get(&key.hash).copied().unwrap_or(1)).max()?;
        // Long lists cost memory.
        Some(most.saturating_add(to_u32(keys.len() - 1)))
    }
}

impl SideIndex {
    /// Indexes principals.
    pub(super) fn new(principals: &[Principal], by_principal: bool) -> Self {
        let mut found: Vec<(&Principal, Term)> = Vec::with_capacity(principals.len());
        let mut builder = Builder::default();
        for principal in principals {
            for term in terms::terms(&principal.expr, false) {
                if term.literals.is_empty() && term.rest.is_empty() {
                    builder.everyone.push(principal.role);
                } else {
                    found.push((principal, term));
                }
            }
        }
        builder.places.reserve(found.len());
        let keys = Keys::of(found.iter().flat_map(|(_, term)| &term.literals));
        for (principal, term) in found {
            builder.add(principal, term, &keys);
        }
        builder.finish(by_principal)
    }
}

#[derive(Default)]
struct Builder {
    places: Vec<Place>,
    everyone: Vec<Role>,
    alternatives: Vec<Alternative>,
    uses: UsesOf,
    always: Vec<u32>,
    unknown: [Vec<u32>; 6],
}

impl Builder {
    fn add(&mut self, principal: &Principal, term: Term, keys: &Keys) {
        // The condition whose values are least crowded leads, and the next one with it if they are.
        let (mut first, mut second) = (None, None);
        for (at, literal) in term.literals.iter().enumerate() {
            let Some(crowd) = keys.crowd(literal) else { continue };
            if first.is_none_or(|(least, _)| crowd < least) {
                (first, second) = (Some((crowd, at)), first);
            } else if second.is_none_or(|(least, _)| crowd < least) {
                second = Some((crowd, at));
            }
        }
        let at = |chosen: Option<(u32, usize)>| chosen.and_then(|(_, at)| term.literals.get(at));
        let of = |chosen| at(chosen).map_or(&[][..], |literal| keys.get(literal));
        let crowded = first.is_some_and(|(crowd, _)| crowd > CROWD);
        if !crowded || of(first).len() * of(second).len() > LONGEST {
            second = None;
        }
        let led = |n: usize| [first, second].into_iter().flatten().any(|(_, at)| at == n);
        // What led here has been looked at by its hash, so it is made sure of last.
        let part = |last: bool| {
            let part = term.literals.iter().enumerate().filter(move |(n, _)| led(*n) == last);
            part.map(|(_, literal)| literal)
        };
        let written = if term.rest.is_empty() { code::write(part(false).chain(part(true))) } else { None };
        let code = written.unwrap_or_else(|| code::elsewhere(to_u32(self.alternatives.len())));
        let role = principal.role;
        for left in of(first) {
            if second.is_none() {
                self.uses.alone(left);
                self.places.push(Place { hash: left.hash, role, code });
            }
            for right in of(second) {
                let (a, b) = if left.lead <= right.lead { (left, right) } else { (right, left) };
                self.uses.paired(a, b);
                self.places.push(Place { hash: both(a.hash, b.hash), role, code });
            }
        }
        if first.is_none() || principal.denies || written.is_none() {
            let number = to_u32(self.alternatives.len());
            if first.is_none() {
                self.always.push(number);
            }
            for chosen in [first, second] {
                let list = of(chosen).first().and_then(|key| key.lead.unknown()).filter(|_| principal.denies);
                if let Some(list) = list.and_then(|n| self.unknown.get_mut(n)) {
                    list.push(number);
                }
            }
            let (literals, rest) = (term.literals.into(), term.rest.into());
            self.alternatives.push(Alternative { role, literals, rest });
        }
    }

    fn finish(mut self, by_principal: bool) -> SideIndex {
        self.places.sort_unstable_by_key(|p| (p.hash, p.role.principal));
        SideIndex {
            places: Table::new(self.places, |place| {
                if by_principal { super::bit(place.role.principal) } else { place.role.services }
            }),
            by_principal,
            depths: Depths::new(&self.uses),
            everyone: self.everyone,
            alternatives: self.alternatives,
            always: self.always,
            unknown: self.unknown,
        }
    }
}

impl SideIndex {
    /// The principals that a party is, among those that are wanted.
    #[inline(always)]
    pub(super) fn hits(&self, view: &View<'_>, wanted: Wanted, hits: &mut Hits) -> Result<(), TooMany> {
        for role in self.everyone.iter().filter(|role| role.is(wanted)) {
            keep(role, Truth::TRUE, hits)?;
        }
        self.try_all(&self.always, view, wanted, hits)?;
        if self.depths.nothing() {
            return Ok(());
        }
        self.try_unknown(view, wanted, hits)?;
        let mut values = Values::new();
        self.depths.values(view, &mut values)?;
        let kinds = if self.by_principal { wanted.principals } else { wanted.services };
        // Most values lead nowhere, so that is told before anything is called.
        self.depths.find(&values, |hash| {
            if self.places.may_have(hash, kinds) { self.at(hash, view, wanted, hits) } else { Ok(()) }
        })
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

    fn try_all(
        &self,
        numbers: &[u32],
        view: &View<'_>,
        wanted: Wanted,
        hits: &mut Hits,
    ) -> Result<(), TooMany> {
        for number in numbers {
            if let Some(Alternative { role, .. }) = self.alternatives.get(to_usize(*number))
                && role.is(wanted)
            {
                keep(role, self.alternative(*number, view), hits)?;
            }
        }
        Ok(())
    }

    #[inline(never)]
    fn at(&self, hash: u64, view: &View<'_>, wanted: Wanted, hits: &mut Hits) -> Result<(), TooMany> {
        for place in self.places.near(hash) {
            if place.hash == hash && place.role.is(wanted) {
                let truth = code::run(&place.code, view, |number| self.alternative(number, view));
                keep(&place.role, truth, hits)?;
            }
        }
        Ok(())
    }

    /// What a fact would lead to that could not be established: it may hold, in a `deny`.
    #[inline]
    fn try_unknown(&self, view: &View<'_>, wanted: Wanted, hits: &mut Hits) -> Result<(), TooMany> {
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
fn keep(role: &Role, truth: Truth, hits: &mut Hits) -> Result<(), TooMany> {
    if truth == Truth::FALSE {
        return Ok(());
    }
    hits.try_push(Hit { role: *role, truth }).map_err(|_| TooMany)
}
