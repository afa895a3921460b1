//! Which principals one party is: from its facts, not by asking each principal.

use std::collections::HashMap;

use arrayvec::ArrayVec;

use super::{
    hash::{self, Table, mix},
    terms::{self, Literal, Term, folder_prefix, label_suffix},
};
use crate::{
    facts::{CertificateFact, CertificateFacts, Fact, ProcessFact},
    model::{Address, Atom, CertificateField, Expr, ProcessField, Truth},
    region::{prefixes_v4, prefixes_v6},
    source::{to_u32, to_usize},
    view::{self, View},
};

/// Most principals that one party may be at once; more, and the flow is decided the slow way.
pub(super) const MOST: usize = 128;

/// A principal that a party is, and how certainly.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hit {
    pub(super) principal: u32,
    pub(super) truth: Truth,
}

pub(super) type Hits = ArrayVec<Hit, MOST>;

/// More principals than [`MOST`].
pub(super) struct TooMany;

/// A fact by whose value principals are found.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
enum Lead {
    Name,
    NameEnd,
    Group,
    Org,
    Process,
    Unit,
    User,
    Issuer,
    Exe,
    Folder,
    Sha256,
    ProcessUser,
    ProcessUid,
    ProcessGroup,
    ProcessUnit,
}

impl Lead {
    const fn seed(self) -> u64 {
        (self as u64 + 1).wrapping_mul(0xa076_1d64_78bd_642f)
    }

    const fn bit(self) -> u32 {
        1 << self as u32
    }

    /// Which list of [`SideIndex::unknown`] holds what cannot be found when this is not known.
    const fn unknown(self) -> Option<usize> {
        Some(match self {
            Self::Exe | Self::Folder => EXE,
            Self::Sha256 => SHA256,
            Self::ProcessUser | Self::ProcessUid => USER,
            Self::ProcessGroup => GROUP,
            Self::ProcessUnit => UNIT,
            _ => return None,
        })
    }
}

const EXE: usize = 0;
const SHA256: usize = 1;
const USER: usize = 2;
const GROUP: usize = 3;
const UNIT: usize = 4;
const ADDRESS: usize = 5;

#[derive(Clone, Copy, Debug)]
struct Key {
    hash: u64,
    start: u32,
    end: u32,
}

/// Terms by address: for each prefix length in use, a hash of the address cut to it.
#[derive(Debug)]
struct Prefixes {
    lengths: Vec<u8>,
    table: Table<(u128, u8, u32, u32)>,
}

/// One alternative of one principal.
#[derive(Clone, Debug)]
struct Alternative {
    principal: u32,
    first: u32,
    end: u32,
    /// Conditions that are whole formulas: where in `rests`.
    rest: u32,
    rest_end: u32,
}

/// Principals of one side.
#[derive(Debug)]
pub(super) struct SideIndex {
    alternatives: Vec<Alternative>,
    checks: Vec<super::condition::Condition>,
    rests: Vec<Expr>,
    /// Alternatives by value of a fact.
    keys: Table<Key>,
    lists: Vec<u32>,
    v4: Prefixes,
    v6: Prefixes,
    /// Facts in use.
    used: u32,
    /// Numbers of labels that indexed name ends have; of slashes that folders have.
    labels: u64,
    slashes: u64,
    /// Principals that are everyone.
    everyone: Vec<u32>,
    /// Alternatives that no fact leads to.
    always: Vec<u32>,
    /// Alternatives of `deny` rules, by the fact that leads to them: where that fact is not known,
    /// they may hold.
    unknown: [Vec<u32>; 6],
}

/// How a term is found.
enum Pivot {
    Always,
    Texts(Vec<(Lead, u64)>, usize),
    Address(usize),
}

impl SideIndex {
    /// Indexes principals; `denies` says which of them a `deny` names.
    pub(super) fn new(principals: &[Expr], denies: &[bool]) -> Self {
        let mut found: Vec<(u32, Term)> = Vec::with_capacity(principals.len());
        let mut everyone = Vec::new();
        for (number, principal) in principals.iter().enumerate() {
            for term in terms::terms(principal, false) {
                if term.literals.is_empty() && term.rest.is_empty() {
                    everyone.push(to_u32(number));
                } else {
                    found.push((to_u32(number), term));
                }
            }
        }
        let mut crowd: HashMap<u64, u32> = HashMap::new();
        for (_, term) in &found {
            for literal in &term.literals {
                for (_, hash) in candidates(&literal.atom, literal.negated) {
                    *crowd.entry(hash).or_default() += 1;
                }
            }
        }
        let mut index = Builder { denies, ..Builder::default() };
        for (principal, term) in found {
            index.add(principal, term, &crowd);
        }
        index.finish(everyone)
    }
}

/// The facts by which a condition can be found.
fn candidates(atom: &Atom, negated: bool) -> Vec<(Lead, u64)> {
    let text = |fact: Lead, bytes: &[u8]| vec![(fact, hash::text::<false>(fact.seed(), bytes))];
    if negated {
        return Vec::new();
    }
    match atom {
        Atom::Sha256(sha256) => text(Lead::Sha256, sha256),
        Atom::Certificate(CertificateField::Name, pattern) => {
            match (pattern.literal(), label_suffix(pattern)) {
                (Some(name), _) => vec![(Lead::Name, hash::text::<true>(Lead::Name.seed(), &name))],
                (None, Some(end)) => vec![(Lead::NameEnd, hash::text::<true>(Lead::NameEnd.seed(), &end))],
                (None, None) => Vec::new(),
            }
        }
        Atom::Certificate(field, pattern) => {
            let fact = match field {
                CertificateField::Group => Lead::Group,
                CertificateField::Org => Lead::Org,
                CertificateField::Process => Lead::Process,
                CertificateField::Unit => Lead::Unit,
                CertificateField::User => Lead::User,
                CertificateField::Issuer | CertificateField::Name => Lead::Issuer,
            };
            pattern.literal().map_or_else(Vec::new, |value| text(fact, &value))
        }
        Atom::Process(field, pattern) => match (field, pattern.literal()) {
            (ProcessField::Exe, Some(path)) => text(Lead::Exe, &path),
            (ProcessField::Exe, None) => {
                folder_prefix(pattern).map_or_else(Vec::new, |f| text(Lead::Folder, &f))
            }
            (ProcessField::Group, Some(group)) => text(Lead::ProcessGroup, &group),
            (ProcessField::Unit, Some(unit)) => text(Lead::ProcessUnit, &unit),
            (ProcessField::User, Some(user)) => {
                let mut found = text(Lead::ProcessUser, &user);
                found.extend(
                    view::number(pattern)
                        .map(|uid| (Lead::ProcessUid, mix(Lead::ProcessUid.seed(), uid.into()))),
                );
                found
            }
            _ => Vec::new(),
        },
        Atom::Address(_) | Atom::Shown | Atom::Version(..) => Vec::new(),
    }
}

/// Everything about an address set that a pivot needs: how many prefixes it is.
fn prefix_count(atom: &Atom) -> usize {
    let Atom::Address(set) = atom else { return usize::MAX };
    let v4 = set.v4.iter().map(|(low, high)| prefixes_v4(*low, *high).count()).sum::<usize>();
    let v6 = set.v6.iter().map(|(low, high)| prefixes_v6(*low, *high).count()).sum::<usize>();
    v4 + v6
}

fn pivot(term: &Term, crowd: &HashMap<u64, u32>) -> Pivot {
    let mut best = (u64::MAX, Pivot::Always);
    for (i, literal) in term.literals.iter().enumerate() {
        let facts = candidates(&literal.atom, literal.negated);
        if let Some(worst) = facts.iter().map(|(_, h)| u64::from(crowd.get(h).copied().unwrap_or(0))).max() {
            // An exact text says more than the end or the beginning of one.
            let vague = facts.iter().any(|(f, _)| matches!(f, Lead::NameEnd | Lead::Folder));
            let cost = worst * if vague { 3 } else { 2 };
            if cost < best.0 {
                best = (cost, Pivot::Texts(facts, i));
            }
        } else if !literal.negated && matches!(*literal.atom, Atom::Address(_)) {
            // Long lists cost memory, and prefixes are looked up only if some set needs them.
            let count = prefix_count(&literal.atom) as u64;
            let cost = 8 + count;
            if cost < best.0 {
                best = (cost, Pivot::Address(i));
            }
        }
    }
    best.1
}

#[derive(Default)]
struct Builder<'a> {
    denies: &'a [bool],
    alternatives: Vec<Alternative>,
    checks: Vec<super::condition::Condition>,
    rests: Vec<Expr>,
    keys: HashMap<u64, Vec<u32>>,
    v4: HashMap<(u128, u8), Vec<u32>>,
    v6: HashMap<(u128, u8), Vec<u32>>,
    used: u32,
    labels: u64,
    slashes: u64,
    always: Vec<u32>,
    unknown: [Vec<u32>; 6],
}

impl Builder<'_> {
    fn add(&mut self, principal: u32, term: Term, crowd: &HashMap<u64, u32>) {
        let number = to_u32(self.alternatives.len());
        let denied = self.denies.get(to_usize(principal)).copied().unwrap_or(false);
        let chosen = pivot(&term, crowd);
        let mut settled = None;
        match &chosen {
            Pivot::Always => self.always.push(number),
            Pivot::Texts(facts, at) => {
                for (fact, hash) in facts {
                    self.used |= fact.bit();
                    self.keys.entry(*hash).or_default().push(number);
                }
                if let Some(Literal { atom, .. }) = term.literals.get(*at) {
                    self.depths(atom);
                }
                let lists = facts.first().and_then(|(fact, _)| fact.unknown());
                if let Some(list) = lists.filter(|_| denied).and_then(|n| self.unknown.get_mut(n)) {
                    list.push(number);
                }
            }
            Pivot::Address(at) => {
                if let Some(Atom::Address(set)) = term.literals.get(*at).map(|l| &*l.atom) {
                    for net in set.v4.iter().flat_map(|(low, high)| prefixes_v4(*low, *high)) {
                        let key = (u128::from(u32::from(net.network())), net.prefix_len());
                        self.v4.entry(key).or_default().push(number);
                    }
                    for net in set.v6.iter().flat_map(|(low, high)| prefixes_v6(*low, *high)) {
                        self.v6.entry((net.network().into(), net.prefix_len())).or_default().push(number);
                    }
                }
                // Prefixes are compared in full, so this condition needs no further look, unless the
                // address is not known.
                settled = (!denied).then_some(*at);
                if denied && let Some(list) = self.unknown.get_mut(ADDRESS) {
                    list.push(number);
                }
            }
        }
        let first = to_u32(self.checks.len());
        for (i, literal) in term.literals.into_iter().enumerate() {
            if settled != Some(i) {
                self.checks.push(super::condition::Condition::new(literal));
            }
        }
        let rest = to_u32(self.rests.len());
        self.rests.extend(term.rest);
        self.alternatives.push(Alternative {
            principal,
            first,
            end: to_u32(self.checks.len()),
            rest,
            rest_end: to_u32(self.rests.len()),
        });
    }

    fn depths(&mut self, atom: &Atom) {
        match atom {
            Atom::Certificate(CertificateField::Name, pattern) => {
                if let Some(end) = label_suffix(pattern) {
                    let dots = end.iter().filter(|b| **b == b'.').count();
                    self.labels |= 1_u64.checked_shl(to_u32(dots)).unwrap_or(1 << 63);
                }
            }
            Atom::Process(ProcessField::Exe, pattern) => {
                if let Some(folder) = folder_prefix(pattern) {
                    let slashes = folder.iter().filter(|b| **b == b'/').count();
                    self.slashes |= 1_u64.checked_shl(to_u32(slashes)).unwrap_or(1 << 63);
                }
            }
            _ => {}
        }
    }

    fn finish(self, everyone: Vec<u32>) -> SideIndex {
        let mut lists = Vec::new();
        let mut take = |numbers: Vec<u32>| {
            let start = to_u32(lists.len());
            lists.extend(numbers);
            (start, to_u32(lists.len()))
        };
        let mut keys: Vec<_> = self.keys.into_iter().collect();
        keys.sort_unstable();
        let keys: Vec<Key> = keys
            .into_iter()
            .map(|(hash, numbers)| {
                let (start, end) = take(numbers);
                Key { hash, start, end }
            })
            .collect();
        let mut prefixes = |map: HashMap<(u128, u8), Vec<u32>>| {
            let mut all: Vec<_> = map.into_iter().collect();
            all.sort_unstable();
            let mut lengths: Vec<u8> = all.iter().map(|((_, length), _)| *length).collect();
            lengths.sort_unstable();
            lengths.dedup();
            let all: Vec<_> = all
                .into_iter()
                .map(|((address, length), numbers)| {
                    let (start, end) = take(numbers);
                    (address, length, start, end)
                })
                .collect();
            let items = all.iter().map(|e| (address_hash(e.0, e.1), *e));
            Prefixes { lengths, table: Table::new(all.len(), items, (0, 0, 0, 0)) }
        };
        let (v4, v6) = (prefixes(self.v4), prefixes(self.v6));
        let table =
            Table::new(keys.len(), keys.iter().map(|k| (k.hash, *k)), Key { hash: 0, start: 0, end: 0 });
        SideIndex {
            alternatives: self.alternatives,
            checks: self.checks,
            rests: self.rests,
            keys: table,
            lists,
            v4,
            v6,
            used: self.used,
            labels: self.labels,
            slashes: self.slashes,
            everyone,
            always: self.always,
            unknown: self.unknown,
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the two halves of the address are wanted")]
fn address_hash(address: u128, length: u8) -> u64 {
    mix(address as u64 ^ u64::from(length) << 56, (address >> 64) as u64)
}

/// An address cut to its first bits.
fn cut(address: u128, width: u8, length: u8) -> u128 {
    let drop = u32::from(width - length.min(width));
    address.checked_shr(drop).and_then(|a| a.checked_shl(drop)).unwrap_or(0)
}

impl SideIndex {
    /// The principals that a party is.
    #[inline]
    pub(super) fn hits(&self, view: &View<'_>, hits: &mut Hits) -> Result<(), TooMany> {
        for principal in &self.everyone {
            hits.try_push(Hit { principal: *principal, truth: Truth::TRUE }).map_err(|_| TooMany)?;
        }
        self.try_all(&self.always, view, hits)?;
        self.by_address(view, hits)?;
        if self.used == 0 {
            return Ok(());
        }
        match view.process {
            _ if view.no_process => {}
            ProcessFact::Known(_) | ProcessFact::UserOnly { .. } => self.by_process(view, hits)?,
            ProcessFact::Unknown if !view.far => {
                for list in self.unknown.iter().take(ADDRESS) {
                    self.try_all(list, view, hits)?;
                }
            }
            ProcessFact::Unknown => {}
        }
        if let CertificateFact::Shown(facts) = view.certificate {
            self.by_certificate(facts, view, hits)?;
        }
        Ok(())
    }

    fn uses(&self, fact: Lead) -> bool {
        self.used & fact.bit() != 0
    }

    #[inline]
    fn try_all(&self, numbers: &[u32], view: &View<'_>, hits: &mut Hits) -> Result<(), TooMany> {
        for number in numbers {
            let Some(alternative) = self.alternatives.get(to_usize(*number)) else { continue };
            let range = to_usize(alternative.first)..to_usize(alternative.end);
            let mut truth = Truth::TRUE;
            for check in self.checks.get(range).unwrap_or_default() {
                truth = truth & check.stands(view);
                if truth == Truth::FALSE {
                    break;
                }
            }
            if alternative.rest != alternative.rest_end {
                let range = to_usize(alternative.rest)..to_usize(alternative.rest_end);
                for rest in self.rests.get(range).unwrap_or_default() {
                    truth = truth & view.expr(rest, false);
                }
            }
            if truth != Truth::FALSE {
                let principal = alternative.principal;
                hits.try_push(Hit { principal, truth }).map_err(|_| TooMany)?;
            }
        }
        Ok(())
    }

    #[inline]
    fn by_hash(&self, hash: u64, view: &View<'_>, hits: &mut Hits) -> Result<(), TooMany> {
        match self.keys.get(hash, |key| key.hash == hash) {
            Some(key) => {
                let list = self.lists.get(to_usize(key.start)..to_usize(key.end)).unwrap_or_default();
                self.try_all(list, view, hits)
            }
            None => Ok(()),
        }
    }

    #[inline]
    fn by_text(&self, fact: Lead, text: &str, view: &View<'_>, hits: &mut Hits) -> Result<(), TooMany> {
        self.by_hash(hash::text::<false>(fact.seed(), text.as_bytes()), view, hits)
    }

    fn by_address(&self, view: &View<'_>, hits: &mut Hits) -> Result<(), TooMany> {
        let (prefixes, address, width) = match view.address {
            Address::V4(v4) => (&self.v4, u128::from(v4), 32),
            Address::V6(v6) => (&self.v6, v6, 128),
            Address::Unknown => {
                return self.unknown.get(ADDRESS).map_or(Ok(()), |list| self.try_all(list, view, hits));
            }
            Address::Absent => return Ok(()),
        };
        for length in &prefixes.lengths {
            let cut = cut(address, width, *length);
            let found = prefixes.table.get(address_hash(cut, *length), |e| e.0 == cut && e.1 == *length);
            if let Some((_, _, start, end)) = found {
                let list = self.lists.get(to_usize(*start)..to_usize(*end)).unwrap_or_default();
                self.try_all(list, view, hits)?;
            }
        }
        Ok(())
    }

    fn by_process(&self, view: &View<'_>, hits: &mut Hits) -> Result<(), TooMany> {
        let (uid, user) = match view.process {
            ProcessFact::Known(facts) => (facts.uid, facts.user.as_str()),
            ProcessFact::UserOnly { uid, user } => (uid, user),
            ProcessFact::Unknown => return Ok(()),
        };
        if self.uses(Lead::ProcessUser) {
            self.by_text(Lead::ProcessUser, user, view, hits)?;
        }
        if self.uses(Lead::ProcessUid) {
            self.by_hash(mix(Lead::ProcessUid.seed(), uid.into()), view, hits)?;
        }
        let ProcessFact::Known(facts) = view.process else {
            for list in [EXE, SHA256, GROUP, UNIT] {
                self.try_all(self.unknown.get(list).map_or(&[], Vec::as_slice), view, hits)?;
            }
            return Ok(());
        };
        match &facts.exe {
            Fact::Known(path) => self.by_path(path, view, hits)?,
            Fact::Unknown => self.try_all(self.unknown.get(EXE).map_or(&[], Vec::as_slice), view, hits)?,
        }
        if self.uses(Lead::Sha256) {
            match &facts.sha256 {
                Fact::Known(sha256) => {
                    self.by_hash(hash::text::<false>(Lead::Sha256.seed(), sha256), view, hits)?;
                }
                Fact::Unknown => {
                    self.try_all(self.unknown.get(SHA256).map_or(&[], Vec::as_slice), view, hits)?
                }
            }
        }
        if self.uses(Lead::ProcessGroup) {
            for group in &facts.groups {
                self.by_text(Lead::ProcessGroup, group, view, hits)?;
            }
        }
        if self.uses(Lead::ProcessUnit)
            && let Some(unit) = &facts.unit
        {
            self.by_text(Lead::ProcessUnit, unit, view, hits)?;
        }
        Ok(())
    }

    fn by_path(&self, path: &str, view: &View<'_>, hits: &mut Hits) -> Result<(), TooMany> {
        if self.uses(Lead::Exe) {
            self.by_text(Lead::Exe, path, view, hits)?;
        }
        if self.slashes == 0 {
            return Ok(());
        }
        let (mut slashes, deepest) = (0, 64 - self.slashes.leading_zeros());
        for (at, byte) in path.bytes().enumerate() {
            if byte != b'/' {
                continue;
            }
            slashes += 1;
            // Deeper ones than can be told apart share the last bit.
            if self.slashes >> slashes.min(63) & 1 == 1 {
                let folder = path.as_bytes().get(..=at).unwrap_or_default();
                self.by_hash(hash::text::<false>(Lead::Folder.seed(), folder), view, hits)?;
            }
            if slashes >= deepest && deepest < 64 {
                break;
            }
        }
        Ok(())
    }

    fn by_certificate(
        &self,
        facts: &CertificateFacts,
        view: &View<'_>,
        hits: &mut Hits,
    ) -> Result<(), TooMany> {
        for name in &facts.names {
            let name = name.as_bytes();
            let name = name.strip_suffix(b".").unwrap_or(name);
            if self.uses(Lead::Name) {
                self.by_hash(hash::text::<true>(Lead::Name.seed(), name), view, hits)?;
            }
            if self.labels != 0 {
                self.by_name_end(name, view, hits)?;
            }
        }
        if self.uses(Lead::Group) {
            for group in &facts.groups {
                self.by_text(Lead::Group, group, view, hits)?;
            }
        }
        let others = [
            (Lead::Org, &facts.org),
            (Lead::Process, &facts.process),
            (Lead::Unit, &facts.unit),
            (Lead::User, &facts.user),
            (Lead::Issuer, &facts.issuer),
        ];
        for (fact, value) in others {
            if self.uses(fact)
                && let Some(value) = value
            {
                self.by_text(fact, value, view, hits)?;
            }
        }
        self.attested(facts, view, hits)
    }

    fn by_name_end(&self, name: &[u8], view: &View<'_>, hits: &mut Hits) -> Result<(), TooMany> {
        let (mut dots, most) = (0, 64 - self.labels.leading_zeros());
        for (at, byte) in name.iter().enumerate().rev() {
            if *byte != b'.' {
                continue;
            }
            // What lies behind this dot has `dots` dots in it.
            if self.labels >> dots.min(63) & 1 == 1 {
                let end = name.get(at + 1..).unwrap_or_default();
                self.by_hash(hash::text::<true>(Lead::NameEnd.seed(), end), view, hits)?;
            }
            dots += 1;
            if dots >= most && most < 64 {
                break;
            }
        }
        Ok(())
    }

    /// What a certificate says of its process, where nothing nearer does.
    fn attested(&self, facts: &CertificateFacts, view: &View<'_>, hits: &mut Hits) -> Result<(), TooMany> {
        if !view.far || view.no_process || !matches!(view.process, ProcessFact::Unknown) {
            return Ok(());
        }
        if let Some(exe) = &facts.exe {
            self.by_path(exe, view, hits)?;
        }
        if let Some(sha256) = &facts.sha256 {
            self.by_hash(hash::text::<false>(Lead::Sha256.seed(), sha256), view, hits)?;
        }
        if let Some(user) = &facts.user {
            self.by_text(Lead::ProcessUser, user, view, hits)?;
        }
        if let Some(unit) = &facts.unit {
            self.by_text(Lead::ProcessUnit, unit, view, hits)?;
        }
        Ok(())
    }
}
