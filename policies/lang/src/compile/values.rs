//! What a party's facts lead to: hashes of their values, by kind.

use std::collections::{BTreeMap, BTreeSet};

use arrayvec::ArrayVec;

use super::{
    hash::{self, mix},
    side::{MOST, TooMany},
    terms::{Literal, folder_prefix, label_suffix},
};
use crate::{
    facts::{CertificateFact, CertificateFacts, Fact, ProcessFact},
    model::{Address, AddressSet, Atom, CertificateField, ProcessField},
    region::{prefixes_v4, prefixes_v6},
    view::{self, View},
};

/// A fact by whose value principals are found.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(u8)]
pub(super) enum Lead {
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

const LEADS: usize = Lead::Prefix as usize + 1;

impl Lead {
    const fn seed(self) -> u64 {
        (self as u64 + 1).wrapping_mul(0xa076_1d64_78bd_642f)
    }

    /// Which list of [`SideIndex::unknown`] holds what cannot be found when this is not known.
    pub(super) const fn unknown(self) -> Option<usize> {
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

pub(super) const EXE: usize = 0;
pub(super) const SHA256: usize = 1;
pub(super) const USER: usize = 2;
pub(super) const GROUP: usize = 3;
pub(super) const UNIT: usize = 4;
pub(super) const ADDRESS: usize = 5;

/// By what a condition can be found: the hash of a fact, of what kind, and how deep it is (labels of a name,
/// components of a path, bits of a prefix, which for IPv6 count from 64).
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub(super) lead: Lead,
    depth: u8,
    pub(super) hash: u64,
}

/// How facts are used, by kind and depth.
#[derive(Debug, Default)]
pub(super) struct UsesOf {
    /// Whether one leads somewhere alone, and with another.
    by_depth: BTreeMap<(Lead, u8), (bool, bool)>,
    pairs: BTreeSet<(Lead, Lead)>,
}

impl UsesOf {
    pub(super) fn alone(&mut self, key: &Key) {
        self.by_depth.entry((key.lead, key.depth)).or_default().0 = true;
    }

    pub(super) fn paired(&mut self, a: &Key, b: &Key) {
        for key in [a, b] {
            self.by_depth.entry((key.lead, key.depth)).or_default().1 = true;
        }
        self.pairs.insert((a.lead, b.lead));
    }
}

/// The hashes of what is known of a party, in groups.
pub(super) struct Values {
    hashes: ArrayVec<u64, MOST>,
    /// Where the hashes of each group begin; behind the last group, where they end.
    starts: [u8; MOST_GROUPS + 1],
    /// How many lead somewhere alone: the first.
    alone: usize,
}

/// Each kind of fact in three: those that lead somewhere alone, with another, or both.
const MOST_GROUPS: usize = 3 * LEADS;

impl Values {
    pub(super) const fn new() -> Self {
        Self { hashes: ArrayVec::new_const(), starts: [0; MOST_GROUPS + 1], alone: 0 }
    }

    #[inline]
    fn push(&mut self, hash: u64) -> Result<(), TooMany> {
        self.hashes.try_push(hash).map_err(|_| TooMany)
    }

    fn text(&mut self, lead: Lead, text: &str) -> Result<(), TooMany> {
        self.push(hash::text::<false>(lead.seed(), text.as_bytes()))
    }

    /// Those that may lead somewhere alone.
    #[inline]
    pub(super) fn alone(&self) -> &[u64] {
        self.hashes.get(..self.alone).unwrap_or_default()
    }

    /// Those of a group.
    #[inline]
    pub(super) fn group(&self, number: usize) -> &[u64] {
        match self.starts.get(number..number + 2) {
            Some(&[start, end]) => self.hashes.get(usize::from(start)..usize::from(end)).unwrap_or_default(),
            _ => &[],
        }
    }
}

/// Two values together: both are hashes already. The first is of the lesser kind.
pub(super) const fn both(a: u64, b: u64) -> u64 {
    a ^ b.rotate_left(32)
}

/// The facts by which a condition can be found: any of them.
pub(super) fn keys(literal: &Literal) -> Vec<Key> {
    let text = |lead: Lead, bytes: &[u8]| key(lead, 0, hash::text::<false>(lead.seed(), bytes));
    if literal.negated {
        return Vec::new();
    }
    let found = match &*literal.atom {
        Atom::Sha256(sha256) => Some(text(Lead::Sha256, sha256)),
        Atom::Certificate(CertificateField::Name, pattern) => match pattern.literal() {
            Some(name) => Some(key(Lead::Name, 0, hash::text::<true>(Lead::Name.seed(), &name))),
            None => label_suffix(pattern).map(|end| {
                let hash = hash::text::<true>(Lead::NameEnd.seed(), &end);
                key(Lead::NameEnd, count(&end, b'.'), hash)
            }),
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
            pattern.literal().map(|value| text(lead, &value))
        }
        Atom::Process(field, pattern) => match (field, pattern.literal()) {
            (ProcessField::Exe, Some(path)) => Some(text(Lead::Exe, &path)),
            (ProcessField::Exe, None) => folder_prefix(pattern)
                .map(|folder| Key { depth: count(&folder, b'/'), ..text(Lead::Folder, &folder) }),
            (ProcessField::Group, Some(group)) => Some(text(Lead::ProcessGroup, &group)),
            (ProcessField::Unit, Some(unit)) => Some(text(Lead::ProcessUnit, &unit)),
            (ProcessField::User, Some(user)) => {
                let name = text(Lead::ProcessUser, &user);
                if let Some(uid) = view::number(pattern) {
                    let uid = key(Lead::ProcessUid, 0, mix(Lead::ProcessUid.seed(), uid.into()));
                    return vec![name, uid];
                }
                Some(name)
            }
            _ => None,
        },
        Atom::Address(set) => return prefixes(set),
        Atom::Shown | Atom::Version(..) => None,
    };
    Vec::from_iter(found)
}

const fn key(lead: Lead, depth: u8, hash: u64) -> Key {
    Key { lead, depth, hash }
}

/// How often a byte occurs; very many are as many as [`DEEPEST`].
fn count(text: &[u8], byte: u8) -> u8 {
    let count = text.iter().filter(|b| **b == byte).count();
    u8::try_from(count).unwrap_or(DEEPEST).min(DEEPEST)
}

/// Depths of names and paths from here on are not told apart.
const DEEPEST: u8 = 63;

/// The prefixes of a set.
fn prefixes(set: &AddressSet) -> Vec<Key> {
    let v4 = set.v4.iter().flat_map(|(low, high)| prefixes_v4(*low, *high));
    let v4 = v4.map(|net| (u128::from(u32::from(net.network())), net.prefix_len()));
    let v6 = set.v6.iter().flat_map(|(low, high)| prefixes_v6(*low, *high));
    let v6 = v6.map(|net| (u128::from(net.network()), net.prefix_len() + V6));
    v4.chain(v6).map(|(address, depth)| key(Lead::Prefix, depth, address_hash(address, depth))).collect()
}

/// What is added to the length of prefixes of IPv6, to keep them apart from those of IPv4.
const V6: u8 = 64;

#[expect(clippy::cast_possible_truncation, reason = "the two halves of the address are wanted")]
const fn address_hash(address: u128, depth: u8) -> u64 {
    mix(address as u64 ^ (depth as u64) << 56, (address >> 64) as u64 ^ Lead::Prefix.seed())
}

/// An address cut to its first bits.
fn cut(address: u128, width: u8, length: u8) -> u128 {
    let drop = u32::from(width - length.min(width));
    address.checked_shr(drop).and_then(|a| a.checked_shl(drop)).unwrap_or(0)
}

/// Which facts are looked at, for one set of principals.
#[derive(Debug, Default)]
pub(super) struct Depths {
    /// First those that lead somewhere alone, last those that only do so with another.
    groups: Vec<Group>,
    /// How many groups have facts that lead somewhere alone.
    alone: usize,
    /// Groups whose facts lead somewhere together.
    pairs: Vec<(usize, usize)>,
}

/// Facts of one kind at some depths.
#[derive(Debug)]
struct Group {
    lead: Lead,
    /// Of names and paths: a bit for each depth.
    levels: u64,
    /// Of addresses: the lengths of prefixes.
    v4: Vec<u8>,
    v6: Vec<u8>,
}

impl Depths {
    pub(super) fn new(uses: &UsesOf) -> Self {
        let mut depths = Self::default();
        let mut first_paired = 0;
        for part in [(true, false), (true, true), (false, true)] {
            let keys = uses.by_depth.iter().filter(|(_, used)| **used == part);
            let keys: Vec<(Lead, u8)> = keys.map(|(key, _)| *key).collect();
            depths.groups.extend(keys.chunk_by(|a, b| a.0 == b.0).filter_map(Group::new));
            match part {
                (true, false) => first_paired = depths.groups.len(),
                (true, true) => depths.alone = depths.groups.len(),
                _ => {}
            }
        }
        let of = |lead: Lead| {
            let groups = depths.groups.iter().enumerate().skip(first_paired);
            groups.filter(move |(_, group)| group.lead == lead).map(|(number, _)| number)
        };
        let all = uses
            .pairs
            .iter()
            .flat_map(|(a, b)| of(*a).flat_map(|left| of(*b).map(move |right| (left, right))));
        depths.pairs = all.collect();
        depths
    }

    pub(super) const fn nothing(&self) -> bool {
        self.groups.is_empty()
    }

    /// Groups whose facts lead somewhere together.
    pub(super) fn pairs(&self) -> &[(usize, usize)] {
        &self.pairs
    }

    /// The hashes of what is known of a party, as far as they may lead somewhere.
    #[inline]
    pub(super) fn values(&self, view: &View<'_>, values: &mut Values) -> Result<(), TooMany> {
        let certificate = match view.certificate {
            CertificateFact::Shown(facts) => Some(facts),
            CertificateFact::None | CertificateFact::Pending => None,
        };
        // What a certificate says of its process counts where nothing nearer does.
        let remote = view.far && !view.no_process && matches!(view.process, ProcessFact::Unknown);
        let attested = certificate.filter(|_| remote);
        for (number, group) in self.groups.iter().enumerate() {
            match group.lead {
                Lead::Prefix => group.address(view, values)?,
                Lead::Exe | Lead::Folder | Lead::Sha256 => group.executable(view, attested, values)?,
                Lead::ProcessUser | Lead::ProcessUid | Lead::ProcessGroup | Lead::ProcessUnit => {
                    process(group.lead, view, attested, values)?;
                }
                _ => {
                    if let Some(facts) = certificate {
                        group.certificate(facts, values)?;
                    }
                }
            }
            // At most 128, so it fits.
            let end = u8::try_from(values.hashes.len()).unwrap_or(u8::MAX);
            if let Some(start) = values.starts.get_mut(number + 1) {
                *start = end;
            }
            if number + 1 == self.alone {
                values.alone = values.hashes.len();
            }
        }
        Ok(())
    }
}

impl Group {
    /// Of keys of one kind.
    fn new(keys: &[(Lead, u8)]) -> Option<Self> {
        let (lead, _) = *keys.first()?;
        let mut group = Self { lead, levels: 0, v4: Vec::new(), v6: Vec::new() };
        for (_, depth) in keys {
            match (lead, depth.checked_sub(V6)) {
                (Lead::Prefix, None) => group.v4.push(*depth),
                (Lead::Prefix, Some(length)) => group.v6.push(length),
                _ => group.levels |= 1 << depth.min(&DEEPEST),
            }
        }
        Some(group)
    }

    const fn has_level(&self, depth: u32) -> bool {
        self.levels >> (if depth < DEEPEST as u32 { depth } else { DEEPEST as u32 }) & 1 == 1
    }

    /// Whether nothing is to be found from this depth on.
    const fn ends_before(&self, depth: u32) -> bool {
        depth < DEEPEST as u32 && self.levels >> depth == 0
    }

    fn address(&self, view: &View<'_>, values: &mut Values) -> Result<(), TooMany> {
        match view.address {
            Address::V4(v4) => {
                for length in &self.v4 {
                    values.push(address_hash(cut(v4.into(), 32, *length), *length))?;
                }
            }
            Address::V6(v6) => {
                for length in &self.v6 {
                    values.push(address_hash(cut(v6, 128, *length), *length + V6))?;
                }
            }
            Address::Unknown | Address::Absent => {}
        }
        Ok(())
    }

    fn certificate(&self, facts: &CertificateFacts, values: &mut Values) -> Result<(), TooMany> {
        let lead = self.lead;
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
        let mut dots = 0;
        let mut rest = name;
        while let Some(at) = rest.iter().rposition(|byte| *byte == b'.') {
            rest = rest.get(..at).unwrap_or_default();
            // What lies behind this dot has `dots` dots in it.
            if self.has_level(dots) {
                let end = name.get(at + 1..).unwrap_or_default();
                values.push(hash::text::<true>(Lead::NameEnd.seed(), end))?;
            }
            dots += 1;
            if self.ends_before(dots) {
                break;
            }
        }
        Ok(())
    }

    fn executable(
        &self,
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
        match (self.lead, path, sha256) {
            (Lead::Exe, Some(path), _) => values.text(Lead::Exe, path),
            (Lead::Folder, Some(path), _) => self.folders(path.as_bytes(), values),
            (Lead::Sha256, _, Some(sha256)) => values.push(hash::text::<false>(Lead::Sha256.seed(), sha256)),
            _ => Ok(()),
        }
    }

    fn folders(&self, path: &[u8], values: &mut Values) -> Result<(), TooMany> {
        let mut slashes = 0;
        for (at, byte) in path.iter().enumerate() {
            if *byte != b'/' {
                continue;
            }
            slashes += 1;
            if self.has_level(slashes) {
                let folder = path.get(..=at).unwrap_or_default();
                values.push(hash::text::<false>(Lead::Folder.seed(), folder))?;
            }
            if self.ends_before(slashes + 1) {
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
