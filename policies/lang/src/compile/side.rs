//! Which principals one party is: from its facts, not by asking each principal.

use std::collections::{BTreeSet, HashMap};

use arrayvec::ArrayVec;

use super::{
    hash::{self, Table, mix},
    terms::{self, Literal, Term, folder_prefix, label_suffix},
};
use crate::{
    facts::{CertificateFact, CertificateFacts, Fact, ProcessFact},
    model::{Address, AddressSet, Atom, CertificateField, Expr, ProcessField, Truth},
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
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
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
    Prefix,
}

const LEADS: usize = 16;

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
            Self::Prefix => ADDRESS,
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

/// Where the alternatives stand that one value leads to, or two values together.
#[derive(Clone, Copy, Debug)]
struct Key {
    hash: u64,
    start: u32,
    end: u32,
}

/// The hashes of what is known of a party, by kind.
struct Values {
    hashes: ArrayVec<u64, MOST>,
    ends: [u8; LEADS + 1],
}

impl Values {
    fn push(&mut self, hash: u64) -> Result<(), TooMany> {
        self.hashes.try_push(hash).map_err(|_| TooMany)
    }

    fn text(&mut self, lead: Lead, text: &str) -> Result<(), TooMany> {
        self.push(hash::text::<false>(lead.seed(), text.as_bytes()))
    }

    #[inline]
    fn of(&self, lead: Lead) -> &[u64] {
        let at = lead as usize;
        let (start, end) = (self.ends.get(at).copied(), self.ends.get(at + 1).copied());
        let range = usize::from(start.unwrap_or(0))..usize::from(end.unwrap_or(0));
        self.hashes.get(range).unwrap_or_default()
    }
}

/// Two values together; in either order.
const fn both(a: u64, b: u64) -> u64 {
    mix(a ^ b, a.wrapping_add(b))
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
    /// Alternatives by value of a fact, or of two.
    keys: Table<Key>,
    lists: Vec<u32>,
    /// Facts that lead somewhere alone; pairs that do together; facts of either.
    single: Vec<Lead>,
    pairs: Vec<(Lead, Lead)>,
    used: u32,
    /// Numbers of labels that indexed name ends have; of slashes that folders have; lengths that
    /// prefixes have.
    labels: u64,
    slashes: u64,
    lengths_v4: Vec<u8>,
    lengths_v6: Vec<u8>,
    /// Principals that are everyone.
    everyone: Vec<u32>,
    /// Alternatives that no fact leads to.
    always: Vec<u32>,
    /// Alternatives of `deny` rules, by the fact that leads to them: where that fact is not known,
    /// they may hold.
    unknown: [Vec<u32>; 6],
}

/// Values that as many alternatives as this share are narrowed down by a second one.
const CROWD: u32 = 3;

impl SideIndex {
    /// Indexes principals; `denies` says which of them a `deny` names.
    pub(super) fn new(principals: &[Expr], denies: &[bool]) -> Self {
        let mut builder = Builder { denies, ..Builder::default() };
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
        let mut crowd: HashMap<u64, u32> = HashMap::with_capacity(found.len());
        for (_, term) in &found {
            for literal in &term.literals {
                for (_, hash) in candidates(literal) {
                    *crowd.entry(hash).or_default() += 1;
                }
            }
        }
        builder.alternatives.reserve(found.len());
        for (principal, term) in found {
            builder.add(principal, term, &crowd);
        }
        builder.finish(everyone)
    }
}

/// The facts by which a condition can be found.
fn candidates(literal: &Literal) -> Vec<(Lead, u64)> {
    let text = |lead: Lead, bytes: &[u8]| vec![(lead, hash::text::<false>(lead.seed(), bytes))];
    if literal.negated {
        return Vec::new();
    }
    match &*literal.atom {
        Atom::Sha256(sha256) => text(Lead::Sha256, sha256),
        Atom::Certificate(CertificateField::Name, pattern) => match (pattern.literal(), label_suffix(pattern)) {
            (Some(name), _) => vec![(Lead::Name, hash::text::<true>(Lead::Name.seed(), &name))],
            (None, Some(end)) => vec![(Lead::NameEnd, hash::text::<true>(Lead::NameEnd.seed(), &end))],
            (None, None) => Vec::new(),
        },
        Atom::Certificate(field, pattern) => {
            let lead = match field {
                CertificateField::Group => Lead::Group,
                CertificateField::Org => Lead::Org,
                CertificateField::Process => Lead::Process,
                CertificateField::Unit => Lead::Unit,
                CertificateField::User => Lead::User,
                CertificateField::Issuer | CertificateField::Name => Lead::Issuer,
            };
            pattern.literal().map_or_else(Vec::new, |value| text(lead, &value))
        }
        Atom::Process(field, pattern) => match (field, pattern.literal()) {
            (ProcessField::Exe, Some(path)) => text(Lead::Exe, &path),
            (ProcessField::Exe, None) => folder_prefix(pattern).map_or_else(Vec::new, |f| text(Lead::Folder, &f)),
            (ProcessField::Group, Some(group)) => text(Lead::ProcessGroup, &group),
            (ProcessField::Unit, Some(unit)) => text(Lead::ProcessUnit, &unit),
            (ProcessField::User, Some(user)) => {
                let mut found = text(Lead::ProcessUser, &user);
                let uid = view::number(pattern);
                found.extend(uid.map(|uid| (Lead::ProcessUid, mix(Lead::ProcessUid.seed(), uid.into()))));
                found
            }
            _ => Vec::new(),
        },
        Atom::Address(set) => prefixes(set).map(|(_, _, hash)| (Lead::Prefix, hash)).collect(),
        Atom::Shown | Atom::Version(..) => Vec::new(),
    }
}

/// The prefixes of a set: family, length and hash.
fn prefixes(set: &AddressSet) -> impl Iterator<Item = (bool, u8, u64)> {
    let v4 = set.v4.iter().flat_map(|(low, high)| prefixes_v4(*low, *high)).map(|net| {
        let (address, length) = (u32::from(net.network()), net.prefix_len());
        (false, length, address_hash(address.into(), length))
    });
    let v6 = set.v6.iter().flat_map(|(low, high)| prefixes_v6(*low, *high)).map(|net| {
        let (address, length) = (u128::from(net.network()), net.prefix_len());
        // Kept apart from IPv4 by the length.
        (true, length, address_hash(address, length + 64))
    });
    v4.chain(v6)
}

#[derive(Default)]
struct Builder<'a> {
    denies: &'a [bool],
    alternatives: Vec<Alternative>,
    checks: Vec<super::condition::Condition>,
    rests: Vec<Expr>,
    keys: HashMap<u64, Vec<u32>>,
    single: u32,
    pairs: BTreeSet<(Lead, Lead)>,
    labels: u64,
    slashes: u64,
    lengths: BTreeSet<(bool, u8)>,
    always: Vec<u32>,
    unknown: [Vec<u32>; 6],
}

impl Builder<'_> {
    fn add(&mut self, principal: u32, term: Term, crowd: &HashMap<u64, u32>) {
        let number = to_u32(self.alternatives.len());
        let denied = self.denies.get(to_usize(principal)).copied().unwrap_or(false);
        // What each condition leads by, the least crowded first; long lists cost memory.
        let mut leads: Vec<(u32, usize, Vec<(Lead, u64)>)> = Vec::new();
        for (at, literal) in term.literals.iter().enumerate() {
            let facts = candidates(literal);
            let most = facts.iter().map(|(_, h)| crowd.get(h).copied().unwrap_or(0)).max();
            leads.extend(most.map(|most| (most.saturating_add(to_u32(facts.len())), at, facts)));
        }
        leads.sort_by_key(|(crowd, at, _)| (*crowd, *at));
        let mut leads = leads.into_iter();
        let chosen = match (leads.next(), leads.next()) {
            (None, _) => {
                self.always.push(number);
                Vec::new()
            }
            (Some(first), Some(second)) if first.0 > CROWD && first.2.len() * second.2.len() <= 1024 => {
                for (a, left) in &first.2 {
                    for (b, right) in &second.2 {
                        self.pairs.insert((*a.min(b), *a.max(b)));
                        self.keys.entry(both(*left, *right)).or_default().push(number);
                    }
                }
                vec![first, second]
            }
            (Some(first), _) => {
                for (lead, hash) in &first.2 {
                    self.single |= lead.bit();
                    self.keys.entry(*hash).or_default().push(number);
                }
                vec![first]
            }
        };
        for (_, at, facts) in chosen {
            if let Some(literal) = term.literals.get(at) {
                self.depths(&literal.atom);
            }
            let list = facts.first().and_then(|(lead, _)| lead.unknown()).filter(|_| denied);
            if let Some(list) = list.and_then(|n| self.unknown.get_mut(n)) {
                list.push(number);
            }
        }
        let first = to_u32(self.checks.len());
        self.checks.extend(term.literals.into_iter().map(super::condition::Condition::new));
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

    /// Notes at which depths of names and paths, and lengths of prefixes, something is to be found.
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
            Atom::Address(set) => self.lengths.extend(prefixes(set).map(|(v6, length, _)| (v6, length))),
            _ => {}
        }
    }

    fn finish(self, everyone: Vec<u32>) -> SideIndex {
        let mut lists = Vec::new();
        let mut keys: Vec<_> = self.keys.into_iter().collect();
        keys.sort_unstable();
        let keys: Vec<Key> = keys
            .into_iter()
            .map(|(hash, numbers)| {
                let start = to_u32(lists.len());
                lists.extend(numbers);
                Key { hash, start, end: to_u32(lists.len()) }
            })
            .collect();
        let table = Table::new(keys.len(), keys.iter().map(|k| (k.hash, *k)), Key { hash: 0, start: 0, end: 0 });
        let used = self.pairs.iter().fold(self.single, |bits, (a, b)| bits | a.bit() | b.bit());
        let lengths = |v6| self.lengths.iter().filter(|l| l.0 == v6).map(|l| l.1).collect();
        SideIndex {
            alternatives: self.alternatives,
            checks: self.checks,
            rests: self.rests,
            keys: table,
            lists,
            single: ALL.into_iter().filter(|lead| self.single & lead.bit() != 0).collect(),
            lengths_v4: lengths(false),
            lengths_v6: lengths(true),
            pairs: self.pairs.into_iter().collect(),
            used,
            labels: self.labels,
            slashes: self.slashes,
            everyone,
            always: self.always,
            unknown: self.unknown,
        }
    }
}

const ALL: [Lead; LEADS] = [
    Lead::Name,
    Lead::NameEnd,
    Lead::Group,
    Lead::Org,
    Lead::Process,
    Lead::Unit,
    Lead::User,
    Lead::Issuer,
    Lead::Exe,
    Lead::Folder,
    Lead::Sha256,
    Lead::ProcessUser,
    Lead::ProcessUid,
    Lead::ProcessGroup,
    Lead::ProcessUnit,
    Lead::Prefix,
];

#[expect(clippy::cast_possible_truncation, reason = "the two halves of the address are wanted")]
const fn address_hash(address: u128, length: u8) -> u64 {
    mix(address as u64 ^ (length as u64) << 56, (address >> 64) as u64 ^ Lead::Prefix.seed())
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
        if self.used == 0 {
            return Ok(());
        }
        self.try_unknown(view, hits)?;
        let values = self.values(view)?;
        for lead in &self.single {
            for hash in values.of(*lead) {
                self.by_hash(*hash, view, hits)?;
            }
        }
        for (a, b) in &self.pairs {
            for left in values.of(*a) {
                for right in values.of(*b) {
                    self.by_hash(both(*left, *right), view, hits)?;
                }
            }
        }
        Ok(())
    }

    const fn uses(&self, lead: Lead) -> bool {
        self.used & lead.bit() != 0
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

    /// What a fact would lead to that could not be established: it may hold, in a `deny`.
    #[inline]
    fn try_unknown(&self, view: &View<'_>, hits: &mut Hits) -> Result<(), TooMany> {
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
                    self.try_all(list, view, hits)?;
                }
            }
        }
        Ok(())
    }

    /// The hashes of what is known of a party, as far as they may lead somewhere.
    #[inline]
    fn values(&self, view: &View<'_>) -> Result<Values, TooMany> {
        let mut values = Values { hashes: ArrayVec::new(), ends: [0; LEADS + 1] };
        let certificate = match view.certificate {
            CertificateFact::Shown(facts) => Some(facts),
            CertificateFact::None | CertificateFact::Pending => None,
        };
        // What a certificate says of its process counts where nothing nearer does.
        let remote = view.far && !view.no_process && matches!(view.process, ProcessFact::Unknown);
        let attested = certificate.filter(|_| remote);
        for (lead, end) in ALL.into_iter().zip(1..) {
            if self.uses(lead) {
                match lead {
                    Lead::Prefix => self.address(view, &mut values)?,
                    Lead::Exe | Lead::Folder | Lead::Sha256 => self.executable(lead, view, attested, &mut values)?,
                    Lead::ProcessUser | Lead::ProcessUid | Lead::ProcessGroup | Lead::ProcessUnit => {
                        process(lead, view, attested, &mut values)?;
                    }
                    lead => {
                        if let Some(facts) = certificate {
                            self.certificate(lead, facts, &mut values)?;
                        }
                    }
                }
            }
            if let Some(slot) = values.ends.get_mut(end) {
                // At most 128.
                *slot = u8::try_from(values.hashes.len()).unwrap_or(u8::MAX);
            }
        }
        Ok(values)
    }

    fn address(&self, view: &View<'_>, values: &mut Values) -> Result<(), TooMany> {
        match view.address {
            Address::V4(v4) => {
                for length in &self.lengths_v4 {
                    values.push(address_hash(cut(v4.into(), 32, *length), *length))?;
                }
            }
            Address::V6(v6) => {
                for length in &self.lengths_v6 {
                    values.push(address_hash(cut(v6, 128, *length), *length + 64))?;
                }
            }
            Address::Unknown | Address::Absent => {}
        }
        Ok(())
    }

    fn certificate(&self, lead: Lead, facts: &CertificateFacts, values: &mut Values) -> Result<(), TooMany> {
        let one = match lead {
            Lead::Name | Lead::NameEnd => {
                for name in &facts.names {
                    let name = name.as_bytes();
                    let name = name.strip_suffix(b".").unwrap_or(name);
                    if lead == Lead::Name {
                        values.push(hash::text::<true>(Lead::Name.seed(), name))?;
                    } else {
                        self.name_ends(name, values)?;
                    }
                }
                return Ok(());
            }
            Lead::Group => return facts.groups.iter().try_for_each(|group| values.text(lead, group)),
            Lead::Org => &facts.org,
            Lead::Process => &facts.process,
            Lead::Unit => &facts.unit,
            Lead::User => &facts.user,
            _ => &facts.issuer,
        };
        one.as_ref().map_or(Ok(()), |text| values.text(lead, text))
    }

    fn name_ends(&self, name: &[u8], values: &mut Values) -> Result<(), TooMany> {
        let (mut dots, most) = (0, 64 - self.labels.leading_zeros());
        for (at, byte) in name.iter().enumerate().rev() {
            if *byte != b'.' {
                continue;
            }
            // What lies behind this dot has `dots` dots in it; very many share the last bit.
            if self.labels >> dots.min(63) & 1 == 1 {
                values.push(hash::text::<true>(Lead::NameEnd.seed(), name.get(at + 1..).unwrap_or_default()))?;
            }
            dots += 1;
            if dots >= most && most < 64 {
                break;
            }
        }
        Ok(())
    }

    fn executable(
        &self,
        lead: Lead,
        view: &View<'_>,
        attested: Option<&CertificateFacts>,
        values: &mut Values,
    ) -> Result<(), TooMany> {
        let (path, sha256) = match (view.process, attested) {
            (ProcessFact::Known(facts), _) if !view.no_process => {
                let path = if let Fact::Known(path) = &facts.exe { Some(path) } else { None };
                let sha256 = if let Fact::Known(sha256) = &facts.sha256 { Some(sha256) } else { None };
                (path, sha256)
            }
            (_, Some(facts)) => (facts.exe.as_ref(), facts.sha256.as_ref()),
            _ => return Ok(()),
        };
        match (lead, path, sha256) {
            (Lead::Exe, Some(path), _) => values.text(lead, path),
            (Lead::Folder, Some(path), _) => self.folders(path.as_bytes(), values),
            (Lead::Sha256, _, Some(sha256)) => values.push(hash::text::<false>(lead.seed(), sha256)),
            _ => Ok(()),
        }
    }

    fn folders(&self, path: &[u8], values: &mut Values) -> Result<(), TooMany> {
        let (mut slashes, most) = (0, 64 - self.slashes.leading_zeros());
        for (at, byte) in path.iter().enumerate() {
            if *byte != b'/' {
                continue;
            }
            slashes += 1;
            if self.slashes >> slashes.min(63) & 1 == 1 {
                values.push(hash::text::<false>(Lead::Folder.seed(), path.get(..=at).unwrap_or_default()))?;
            }
            if slashes >= most && most < 64 {
                break;
            }
        }
        Ok(())
    }
}

fn process(
    lead: Lead,
    view: &View<'_>,
    attested: Option<&CertificateFacts>,
    values: &mut Values,
) -> Result<(), TooMany> {
    let uid_hash = |uid: u32| mix(Lead::ProcessUid.seed(), uid.into());
    match (view.process, attested) {
        _ if view.no_process => Ok(()),
        (ProcessFact::Known(facts), _) => match lead {
            Lead::ProcessUser => values.text(lead, &facts.user),
            Lead::ProcessUid => values.push(uid_hash(facts.uid)),
            Lead::ProcessGroup => facts.groups.iter().try_for_each(|group| values.text(lead, group)),
            _ => facts.unit.as_ref().map_or(Ok(()), |unit| values.text(lead, unit)),
        },
        (ProcessFact::UserOnly { uid, user }, _) => match lead {
            Lead::ProcessUser => values.text(lead, user),
            Lead::ProcessUid => values.push(uid_hash(uid)),
            _ => Ok(()),
        },
        (ProcessFact::Unknown, Some(facts)) => match lead {
            Lead::ProcessUser => facts.user.as_ref().map_or(Ok(()), |user| values.text(lead, user)),
            Lead::ProcessUnit => facts.unit.as_ref().map_or(Ok(()), |unit| values.text(lead, unit)),
            _ => Ok(()),
        },
        (ProcessFact::Unknown, None) => Ok(()),
    }
}
