//! What a party's facts lead to: hashes of their values, by kind.

use std::{collections::BTreeSet, sync::Arc};

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
    source::to_u32,
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

const LEADS: usize = 16;

impl Lead {
    const fn seed(self) -> u64 {
        (self as u64 + 1).wrapping_mul(0xa076_1d64_78bd_642f)
    }

    pub(super) const fn bit(self) -> u32 {
        1 << self as u32
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

pub(super) const ALL: [Lead; LEADS] = [
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

/// The hashes of what is known of a party, by kind.
pub(super) struct Values {
    hashes: ArrayVec<u64, MOST>,
    /// By kind: where its hashes begin and end.
    ranges: [(u8, u8); LEADS],
    /// How many of the first lead somewhere alone.
    single: u8,
}

impl Values {
    pub(super) const fn new() -> Self {
        Self { hashes: ArrayVec::new_const(), ranges: [(0, 0); LEADS], single: 0 }
    }

    fn push(&mut self, hash: u64) -> Result<(), TooMany> {
        self.hashes.try_push(hash).map_err(|_| TooMany)
    }

    fn text(&mut self, lead: Lead, text: &str) -> Result<(), TooMany> {
        self.push(hash::text::<false>(lead.seed(), text.as_bytes()))
    }

    /// Those that may lead somewhere alone.
    #[inline]
    pub(super) fn single(&self) -> &[u64] {
        self.hashes.get(..usize::from(self.single)).unwrap_or_default()
    }

    #[inline]
    pub(super) fn of(&self, lead: Lead) -> &[u64] {
        let (start, end) = self.ranges.get(lead as usize).copied().unwrap_or_default();
        let range = usize::from(start)..usize::from(end);
        self.hashes.get(range).unwrap_or_default()
    }
}

/// Two values together; in either order.
pub(super) const fn both(a: u64, b: u64) -> u64 {
    mix(a ^ b, a.wrapping_add(b))
}

/// The facts by which a condition can be found.
pub(super) fn candidates(literal: &Literal) -> Vec<(Lead, u64)> {
    let text = |lead: Lead, bytes: &[u8]| vec![(lead, hash::text::<false>(lead.seed(), bytes))];
    if literal.negated {
        return Vec::new();
    }
    match &*literal.atom {
        Atom::Sha256(sha256) => text(Lead::Sha256, sha256),
        Atom::Certificate(CertificateField::Name, pattern) => {
            match (pattern.literal(), label_suffix(pattern)) {
                (Some(name), _) => vec![(Lead::Name, hash::text::<true>(Lead::Name.seed(), &name))],
                (None, Some(end)) => vec![(Lead::NameEnd, hash::text::<true>(Lead::NameEnd.seed(), &end))],
                (None, None) => Vec::new(),
            }
        }
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
            (ProcessField::Exe, None) => {
                folder_prefix(pattern).map_or_else(Vec::new, |f| text(Lead::Folder, &f))
            }
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

#[expect(clippy::cast_possible_truncation, reason = "the two halves of the address are wanted")]
const fn address_hash(address: u128, length: u8) -> u64 {
    mix(address as u64 ^ (length as u64) << 56, (address >> 64) as u64 ^ Lead::Prefix.seed())
}

/// An address cut to its first bits.
fn cut(address: u128, width: u8, length: u8) -> u128 {
    let drop = u32::from(width - length.min(width));
    address.checked_shr(drop).and_then(|a| a.checked_shl(drop)).unwrap_or(0)
}

/// At which depths of names and paths, and for which lengths of prefixes, something is to be found;
/// for one set of principals.
#[derive(Debug, Default)]
pub(super) struct Depths {
    /// Facts that lead somewhere: those that do alone, then those that do with another.
    leads: Vec<Lead>,
    single: usize,
    labels: u64,
    slashes: u64,
    v4: Vec<u8>,
    v6: Vec<u8>,
}

impl Depths {
    pub(super) fn new(single: u32, paired: u32, atoms: impl Iterator<Item = Arc<Atom>>) -> Self {
        let of = |bits: u32| ALL.into_iter().filter(move |lead| bits & lead.bit() != 0);
        let leads: Vec<Lead> = of(single).chain(of(paired & !single)).collect();
        let mut depths = Self { leads, single: of(single).count(), ..Self::default() };
        let mut lengths = BTreeSet::new();
        for atom in atoms {
            depths.add(&atom, &mut lengths);
        }
        for (v6, length) in lengths {
            if v6 { depths.v6.push(length) } else { depths.v4.push(length) }
        }
        depths
    }

    fn add(&mut self, atom: &Atom, lengths: &mut BTreeSet<(bool, u8)>) {
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
            Atom::Address(set) => lengths.extend(prefixes(set).map(|(v6, length, _)| (v6, length))),
            _ => {}
        }
    }

    pub(super) const fn nothing(&self) -> bool {
        self.leads.is_empty()
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
        // At most 128, so they fit.
        let count = |values: &Values| u8::try_from(values.hashes.len()).unwrap_or(u8::MAX);
        for (n, lead) in self.leads.iter().enumerate() {
            if n == self.single {
                values.single = count(values);
            }
            let start = count(values);
            match lead {
                Lead::Prefix => self.address(view, values)?,
                Lead::Exe | Lead::Folder | Lead::Sha256 => self.executable(*lead, view, attested, values)?,
                Lead::ProcessUser | Lead::ProcessUid | Lead::ProcessGroup | Lead::ProcessUnit => {
                    process(*lead, view, attested, values)?;
                }
                lead => {
                    if let Some(facts) = certificate {
                        self.certificate(*lead, facts, values)?;
                    }
                }
            }
            let end = count(values);
            if let Some(slot) = values.ranges.get_mut(*lead as usize) {
                *slot = (start, end);
            }
        }
        if self.single == self.leads.len() {
            values.single = count(values);
        }
        Ok(())
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
        let mut rest = name;
        while let Some(at) = rest.iter().rposition(|byte| *byte == b'.') {
            rest = rest.get(..at).unwrap_or_default();
            // What lies behind this dot has `dots` dots in it; very many share the last bit.
            if self.labels >> dots.min(63) & 1 == 1 {
                values
                    .push(hash::text::<true>(Lead::NameEnd.seed(), name.get(at + 1..).unwrap_or_default()))?;
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
