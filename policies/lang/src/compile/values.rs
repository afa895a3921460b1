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
    V4,
    V6,
}

const LEADS: usize = Lead::V6 as usize + 1;

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
            Self::V4 | Self::V6 => ADDRESS,
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

/// By what a condition can be found: the hash of a fact, of what kind, and how deep it is (dots in the
/// end of a name, slashes in the beginning of a path, bits of a prefix).
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub(super) lead: Lead,
    depth: u8,
    pub(super) hash: u64,
}

/// How a fact is used.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    /// It leads somewhere alone.
    alone: bool,
    /// It does with another.
    paired: bool,
}

/// How facts are used, by kind and depth.
#[derive(Debug, Default)]
pub(super) struct UsesOf {
    by_depth: BTreeMap<(Lead, u8), Use>,
    pairs: BTreeSet<(Lead, Lead)>,
}

impl UsesOf {
    pub(super) fn alone(&mut self, key: &Key) {
        self.by_depth.entry((key.lead, key.depth)).or_default().alone = true;
    }

    pub(super) fn paired(&mut self, a: &Key, b: &Key) {
        for key in [a, b] {
            self.by_depth.entry((key.lead, key.depth)).or_default().paired = true;
        }
        self.pairs.insert((a.lead, b.lead));
    }
}

/// The hashes of what is known of a party.
pub(super) struct Values {
    /// Those that may lead somewhere alone.
    alone: ArrayVec<u64, MOST>,
    /// Those that may with another, group by group.
    paired: ArrayVec<u64, MOST>,
    /// Where those of each group begin; behind the last, where they end.
    starts: [usize; LEADS + 1],
}

impl Values {
    pub(super) const fn new() -> Self {
        Self { alone: ArrayVec::new_const(), paired: ArrayVec::new_const(), starts: [0; LEADS + 1] }
    }

    #[inline(always)]
    fn push(&mut self, hash: u64, used: Use) -> Result<(), TooMany> {
        if used.alone {
            self.alone.try_push(hash).map_err(|_| TooMany)?;
        }
        if used.paired {
            self.paired.try_push(hash).map_err(|_| TooMany)?;
        }
        Ok(())
    }

    /// Those of the group with this number that may lead somewhere with another.
    #[inline(always)]
    fn of(&self, number: usize) -> &[u64] {
        match self.starts.get(number..number + 2) {
            Some(&[start, end]) => self.paired.get(start..end).unwrap_or_default(),
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

/// How often a byte occurs in a part of a pattern, which is not long.
fn count(text: &[u8], byte: u8) -> u8 {
    u8::try_from(text.iter().filter(|b| **b == byte).count()).unwrap_or(u8::MAX)
}

/// The prefixes of a set.
fn prefixes(set: &AddressSet) -> Vec<Key> {
    let v4 = set.v4.iter().flat_map(|(low, high)| prefixes_v4(*low, *high));
    let v4 = v4.map(|net| (Lead::V4, u128::from(u32::from(net.network())), net.prefix_len()));
    let v6 = set.v6.iter().flat_map(|(low, high)| prefixes_v6(*low, *high));
    let v6 = v6.map(|net| (Lead::V6, u128::from(net.network()), net.prefix_len()));
    v4.chain(v6).map(|(lead, address, depth)| key(lead, depth, address_hash(lead, address, depth))).collect()
}

#[expect(clippy::cast_possible_truncation, reason = "the two halves of the address are wanted")]
const fn address_hash(lead: Lead, address: u128, depth: u8) -> u64 {
    mix(address as u64 ^ (depth as u64) << 56, (address >> 64) as u64 ^ lead.seed())
}

/// Which facts are looked at, for one set of principals.
#[derive(Debug, Default)]
pub(super) struct Depths {
    groups: Vec<Group>,
    /// Groups whose facts lead somewhere together.
    pairs: Vec<(usize, usize)>,
}

/// Facts of one kind, and at which depths they lead somewhere.
#[derive(Debug)]
struct Group {
    lead: Lead,
    /// How one that has no depth is used.
    used: Use,
    /// From the least.
    depths: Vec<(u8, Use)>,
}

impl Depths {
    pub(super) fn new(uses: &UsesOf) -> Self {
        let all: Vec<_> = uses.by_depth.iter().map(|((lead, depth), used)| (*lead, *depth, *used)).collect();
        let groups: Vec<_> = all.chunk_by(|a, b| a.0 == b.0).filter_map(Group::new).collect();
        let place = |lead: Lead| groups.iter().position(|group| group.lead == lead);
        let pairs = uses.pairs.iter().filter_map(|(a, b)| Some((place(*a)?, place(*b)?))).collect();
        Self { groups, pairs }
    }

    pub(super) const fn nothing(&self) -> bool {
        self.groups.is_empty()
    }

    /// Calls `visit` with all by which something may be found.
    #[inline(always)]
    pub(super) fn find(
        &self,
        values: &Values,
        mut visit: impl FnMut(u64) -> Result<(), TooMany>,
    ) -> Result<(), TooMany> {
        for hash in &values.alone {
            visit(*hash)?;
        }
        for (a, b) in &self.pairs {
            let lefts = values.of(*a);
            for right in values.of(*b) {
                for left in lefts {
                    visit(both(*left, *right))?;
                }
            }
        }
        Ok(())
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
        for (group, start) in self.groups.iter().zip(1..) {
            match (group.lead, certificate) {
                (Lead::V4 | Lead::V6, _) => group.address(view, values)?,
                (Lead::Exe | Lead::Folder, _) => group.executable(view, attested, values)?,
                (Lead::ProcessUser | Lead::ProcessUid | Lead::ProcessGroup | Lead::ProcessUnit, _) => {
                    group.process(view, attested, values)?;
                }
                (Lead::Sha256, _) => group.content(view, attested, values)?,
                (_, Some(facts)) => group.certificate(facts, values)?,
                (_, None) => {}
            }
            if let Some(start) = values.starts.get_mut::<usize>(start) {
                *start = values.paired.len();
            }
        }
        Ok(())
    }
}

impl Group {
    /// Of keys of one kind.
    fn new(keys: &[(Lead, u8, Use)]) -> Option<Self> {
        let (lead, _, used) = *keys.first()?;
        Some(Self { lead, used, depths: keys.iter().map(|(_, depth, used)| (*depth, *used)).collect() })
    }

    #[inline]
    fn text(&self, text: &str, values: &mut Values) -> Result<(), TooMany> {
        values.push(hash::text::<false>(self.lead.seed(), text.as_bytes()), self.used)
    }

    // Each of these by itself: together they are more than a compiler keeps in registers.
    #[inline(never)]
    fn address(&self, view: &View<'_>, values: &mut Values) -> Result<(), TooMany> {
        let (address, width) = match (view.address, self.lead) {
            (Address::V4(v4), Lead::V4) => (v4.into(), u32::BITS),
            (Address::V6(v6), Lead::V6) => (v6, u128::BITS),
            _ => return Ok(()),
        };
        for (length, used) in &self.depths {
            let drop = width.saturating_sub((*length).into());
            let prefix = address.checked_shr(drop).and_then(|a| a.checked_shl(drop)).unwrap_or(0);
            values.push(address_hash(self.lead, prefix, *length), *used)?;
        }
        Ok(())
    }

    #[inline(never)]
    fn certificate(&self, facts: &CertificateFacts, values: &mut Values) -> Result<(), TooMany> {
        let lead = self.lead;
        let one = match lead {
            Lead::Name | Lead::NameEnd => {
                for name in &facts.names {
                    let name = name.as_bytes();
                    let name = name.strip_suffix(b".").unwrap_or(name);
                    if lead == Lead::Name {
                        values.push(hash::text::<true>(Lead::Name.seed(), name), self.used)?;
                    } else {
                        self.name_ends(name, values)?;
                    }
                }
                return Ok(());
            }
            Lead::Group => return facts.groups.iter().try_for_each(|group| self.text(group, values)),
            Lead::Org => &facts.org,
            Lead::Process => &facts.process,
            Lead::Unit => &facts.unit,
            Lead::User => &facts.user,
            _ => &facts.issuer,
        };
        one.as_ref().map_or(Ok(()), |text| self.text(text, values))
    }

    #[inline(never)]
    fn name_ends(&self, name: &[u8], values: &mut Values) -> Result<(), TooMany> {
        let mut dots = hash::Marks::from_end(name, b'.');
        let mut next = 0;
        for (depth, used) in &self.depths {
            // What lies behind the first dot from the end has none in it.
            while next < *depth {
                if dots.next_back().is_none() {
                    return Ok(());
                }
                next += 1;
            }
            let Some(dot) = dots.next_back() else { break };
            let end = name.get(dot + 1..).unwrap_or_default();
            values.push(hash::text::<true>(Lead::NameEnd.seed(), end), *used)?;
            next += 1;
        }
        Ok(())
    }

    #[inline(never)]
    fn executable(
        &self,
        view: &View<'_>,
        attested: Option<&CertificateFacts>,
        values: &mut Values,
    ) -> Result<(), TooMany> {
        let path = match (view.process, attested) {
            (ProcessFact::Known(facts), _) if !view.no_process => match &facts.exe {
                Fact::Known(path) => path,
                Fact::Unknown => return Ok(()),
            },
            (_, Some(CertificateFacts { exe: Some(path), .. })) => path,
            _ => return Ok(()),
        };
        if self.lead == Lead::Exe { self.text(path, values) } else { self.folders(path.as_bytes(), values) }
    }

    #[inline(never)]
    fn content(
        &self,
        view: &View<'_>,
        attested: Option<&CertificateFacts>,
        values: &mut Values,
    ) -> Result<(), TooMany> {
        let sha256 = match (view.process, attested) {
            (ProcessFact::Known(facts), _) if !view.no_process => match &facts.sha256 {
                Fact::Known(sha256) => sha256,
                Fact::Unknown => return Ok(()),
            },
            (_, Some(CertificateFacts { sha256: Some(sha256), .. })) => sha256,
            _ => return Ok(()),
        };
        values.push(hash::text::<false>(Lead::Sha256.seed(), sha256), self.used)
    }

    #[inline(never)]
    fn folders(&self, path: &[u8], values: &mut Values) -> Result<(), TooMany> {
        let mut slashes = hash::Marks::from_start(path, b'/');
        let mut next = 1;
        for (depth, used) in &self.depths {
            while next < *depth {
                if slashes.next().is_none() {
                    return Ok(());
                }
                next += 1;
            }
            let Some(slash) = slashes.next() else { break };
            let folder = path.get(..=slash).unwrap_or_default();
            values.push(hash::text::<false>(Lead::Folder.seed(), folder), *used)?;
            next += 1;
        }
        Ok(())
    }

    #[inline(never)]
    fn process(
        &self,
        view: &View<'_>,
        attested: Option<&CertificateFacts>,
        values: &mut Values,
    ) -> Result<(), TooMany> {
        let mut one = |text: Option<&String>| text.map_or(Ok(()), |text| self.text(text, values));
        match (view.process, attested) {
            _ if view.no_process => Ok(()),
            (ProcessFact::Known(facts), _) => match self.lead {
                Lead::ProcessUser => self.text(&facts.user, values),
                Lead::ProcessUid => self.uid(facts.uid, values),
                Lead::ProcessGroup => facts.groups.iter().try_for_each(|group| self.text(group, values)),
                _ => one(facts.unit.as_ref()),
            },
            (ProcessFact::UserOnly { uid, user }, _) => match self.lead {
                Lead::ProcessUser => self.text(user, values),
                Lead::ProcessUid => self.uid(uid, values),
                _ => Ok(()),
            },
            (ProcessFact::Unknown, Some(facts)) => match self.lead {
                Lead::ProcessUser => one(facts.user.as_ref()),
                Lead::ProcessUnit => one(facts.unit.as_ref()),
                _ => Ok(()),
            },
            (ProcessFact::Unknown, None) => Ok(()),
        }
    }

    #[inline(never)]
    fn uid(&self, uid: u32, values: &mut Values) -> Result<(), TooMany> {
        values.push(mix(Lead::ProcessUid.seed(), uid.into()), self.used)
    }
}
