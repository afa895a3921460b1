//! One party for which given conditions hold and others do not, or the certainty that there is none.

use std::{
    cell::Cell,
    collections::{HashSet, VecDeque},
};

use super::{Atoms, pieces::End};
use crate::{
    check::Example,
    facts::Fact,
    model::{Atom, CertificateField, ProcessField, merge},
    pattern::{Pattern, Run, Scope},
    source::to_usize,
    view,
};

/// A party that was looked for.
pub(super) enum Found {
    One(Box<Example>),
    None,
    /// The patterns are too many.
    Unknown,
}

/// Why there is no text.
enum No {
    Text,
    Idea,
}

/// Inclusive ranges.
type Versions = Vec<(u64, u64)>;

/// The conditions of one end, by what they are about.
#[derive(Default)]
struct Wanted<'a> {
    shown: Option<bool>,
    certificate: bool,
    versions: (Versions, Versions),
    sha256: (Vec<[u8; 32]>, Vec<[u8; 32]>),
    certificates: Vec<(CertificateField, &'a Pattern, bool)>,
    processes: Vec<(ProcessField, &'a Pattern, bool)>,
}

/// Looks for a party.
pub(super) fn party(end: &End, atoms: &Atoms) -> Found {
    let (mut wanted, work) = (Wanted::default(), &atoms.work);
    for (number, holds) in &end.laid {
        let Some(atom) = atoms.all.get(to_usize(*number)) else { continue };
        let about = matches!(**atom, Atom::Shown | Atom::Version(..) | Atom::Certificate(..));
        wanted.certificate |= *holds && about;
        match &**atom {
            Atom::Address(_) => {}
            Atom::Shown => wanted.shown = Some(*holds),
            Atom::Version(low, high) => {
                if *holds { &mut wanted.versions.0 } else { &mut wanted.versions.1 }.push((*low, *high));
            }
            Atom::Sha256(hash) => {
                if *holds { &mut wanted.sha256.0 } else { &mut wanted.sha256.1 }.push(*hash)
            }
            Atom::Certificate(field, pattern) => wanted.certificates.push((*field, pattern, *holds)),
            Atom::Process(field, pattern) => wanted.processes.push((*field, pattern, *holds)),
        }
    }
    let mut example = Example { address: address(end), ..Example::default() };
    if example.address.is_none() || (wanted.certificate && wanted.shown == Some(false)) {
        return Found::None;
    }
    let done = certificate(&wanted, &mut example, work).and_then(|()| process(&wanted, &mut example, work));
    match done {
        Ok(()) => Found::One(Box::new(example)),
        Err(No::Text) => Found::None,
        Err(No::Idea) => Found::Unknown,
    }
}

/// An address that people recognise, if there is a choice.
fn address(end: &End) -> Option<std::net::IpAddr> {
    let set = crate::model::AddressSet {
        v4: end.addresses.v4.as_slice().into(),
        v6: end.addresses.v6.as_slice().into(),
    };
    let usual = [[192, 0, 2, 1], [198, 51, 100, 1], [203, 0, 113, 1], [10, 0, 0, 1]].map(u32::from_be_bytes);
    if let Some(v4) = usual.into_iter().find(|a| set.has_v4(*a)) {
        return Some(std::net::Ipv4Addr::from(v4).into());
    }
    // Addresses that are not of one host would surprise in an example.
    let inner = |(low, high): &(u32, u32)| if high - low > 1 { low + 1 } else { *low };
    if let Some(range) = set.v4.iter().find(|r| r.1 > 0).or(set.v4.first()) {
        return Some(std::net::Ipv4Addr::from(inner(range)).into());
    }
    let mapped = |a: u128| a >> 32 == 0xffff;
    let low = set
        .v6
        .iter()
        .map(|(low, high)| if mapped(*low) { (0x1_0000_0000_0000, *high) } else { (*low, *high) });
    let low = low.filter(|(low, high)| low <= high).map(|(low, _)| low).max_by_key(|low| *low > 1);
    low.map(|low| std::net::Ipv6Addr::from(low).into())
}

fn certificate(wanted: &Wanted<'_>, example: &mut Example, work: &Cell<usize>) -> Result<(), No> {
    if !wanted.certificate && wanted.shown != Some(true) {
        return Ok(());
    }
    let facts = example.certificate.get_or_insert_default();
    let (with, without) = &wanted.versions;
    if !with.is_empty() {
        let low = with.iter().map(|v| v.0).max().unwrap_or(0);
        let high = with.iter().map(|v| v.1).min().unwrap_or(u64::MAX);
        let mut at = Some(low);
        for (from, to) in merge(without.iter().filter(|v| v.0 <= v.1).copied().collect()) {
            at = at.and_then(|a| if (from..=to).contains(&a) { to.checked_add(1) } else { Some(a) });
        }
        let empty = with.iter().any(|v| v.0 > v.1);
        facts.ver = Some(at.filter(|a| *a <= high && !empty).ok_or(No::Text)?);
    }
    use CertificateField as F;
    for field in [F::Name, F::Group, F::Org, F::Process, F::Unit, F::User, F::Issuer] {
        let of = |holds: bool| -> Vec<&Pattern> {
            let list = wanted.certificates.iter().filter(|c| c.0 == field && c.2 == holds);
            list.map(|c| c.1).collect()
        };
        let texts = texts(&of(true), &of(false), field.is_many(), work)?;
        let first = texts.first().cloned();
        match field {
            F::Name => facts.names = texts,
            F::Group => facts.groups = texts,
            F::Org => facts.org = first,
            F::Process => facts.process = first,
            F::Unit => facts.unit = first,
            F::User => facts.user = first,
            F::Issuer => facts.issuer = first,
        }
    }
    Ok(())
}

fn process(wanted: &Wanted<'_>, example: &mut Example, work: &Cell<usize>) -> Result<(), No> {
    if wanted.processes.is_empty() && wanted.sha256.0.is_empty() && wanted.sha256.1.is_empty() {
        return Ok(());
    }
    // Nothing said is the simplest that conditions that do not hold can be told.
    example.has_process = wanted.processes.iter().any(|p| p.2) || !wanted.sha256.0.is_empty();
    if !example.has_process {
        return Ok(());
    }
    let facts = &mut example.process;
    match wanted.sha256.0.as_slice() {
        // Of so many hashes one is left.
        [] => {
            let other = (0..=u8::MAX).map(|n| [n; 32]).find(|hash| !wanted.sha256.1.contains(hash));
            facts.sha256 = Fact::Known(other.ok_or(No::Idea)?);
        }
        [first, rest @ ..] => {
            if rest.iter().any(|h| h != first) || wanted.sha256.1.contains(first) {
                return Err(No::Text);
            }
            facts.sha256 = Fact::Known(*first);
        }
    }
    use ProcessField as F;
    for field in [F::Exe, F::User, F::Group, F::Unit, F::Cmdline, F::Ancestor] {
        let of = |holds: bool| -> Vec<&Pattern> {
            let list = wanted.processes.iter().filter(|p| p.0 == field && p.2 == holds);
            list.map(|p| p.1).collect()
        };
        let (with, without) = (of(true), of(false));
        if field == F::User {
            (facts.user, facts.uid) = user(&with, &without, work)?;
            continue;
        }
        let mut texts = texts(&with, &without, field.is_many(), work)?;
        if texts.is_empty() && !without.is_empty() && !field.is_many() && field != F::Unit {
            // Every process has one of these, so it must be one that none of the others is.
            let any = Pattern::exact_any(without.first().map_or(Scope::Text, |p| p.scope));
            texts = self::texts(&[&any], &without, false, work)?;
        }
        let first = texts.first().cloned();
        match field {
            F::Exe => facts.exe = Fact::Known(first.unwrap_or_else(|| "/usr/bin/example".to_owned())),
            F::User => {}
            F::Group => facts.groups = texts,
            F::Unit => facts.unit = first,
            F::Cmdline => facts.cmdline = first.unwrap_or_default(),
            F::Ancestor => facts.ancestors = texts.into_iter().map(Fact::Known).collect(),
        }
    }
    Ok(())
}

/// A user's name and number. A pattern that is a number is fulfilled by either.
fn user(with: &[&Pattern], without: &[&Pattern], work: &Cell<usize>) -> Result<(String, u32), No> {
    let name = |with: &[&Pattern]| match with {
        [] if without.is_empty() => Ok(String::new()),
        [] => text(&[&Pattern::exact_any(Scope::Text)], without, work),
        with => text(with, without, work),
    };
    let mut failed = No::Text;
    // With the name alone, where no number is asked for; else with one of the numbers, and the name for
    // the rest.
    let numbers: Vec<u32> = with.iter().filter_map(|p| view::number(p)).collect();
    if numbers.is_empty() {
        return Ok((name(with)?, u32::MAX));
    }
    for uid in numbers {
        if without.iter().any(|p| view::number(p) == Some(uid)) {
            // Two spellings of one number: a name could tell them apart.
            failed = No::Idea;
            continue;
        }
        let rest: Vec<&Pattern> = with.iter().copied().filter(|p| view::number(p) != Some(uid)).collect();
        let alone = rest.is_empty().then(|| uid.to_string());
        let alone = alone.filter(|text| !without.iter().any(|p| p.matches(text)));
        match alone.map_or_else(|| name(&rest), Ok) {
            Ok(name) => return Ok((name, uid)),
            Err(No::Idea) => failed = No::Idea,
            Err(No::Text) => {}
        }
    }
    Err(failed)
}

/// Texts for the patterns that must match and those that must not: one for all, or, if there may be
/// `many`, one for each.
fn texts(with: &[&Pattern], without: &[&Pattern], many: bool, work: &Cell<usize>) -> Result<Vec<String>, No> {
    if with.is_empty() {
        return Ok(Vec::new());
    }
    if !many {
        return Ok(vec![text(with, without, work)?]);
    }
    let mut texts: Vec<String> = Vec::new();
    for pattern in with {
        if !texts.iter().any(|t| pattern.matches(t)) {
            texts.push(text(&[pattern], without, work)?);
        }
    }
    Ok(texts)
}

/// Fillings for wildcards, to be tried before anything is searched.
const FILLINGS: [&str; 8] = ["host", "x1", "", "q7w", "a.b", "/usr/bin/x1", "/x1", "a/b"];
/// States that a search may visit.
const MOST_STATES: usize = 2_000;

/// A text that all of the first match and none of the second; a path, if it can be one.
fn text(with: &[&Pattern], without: &[&Pattern], work: &Cell<usize>) -> Result<String, No> {
    let path = Pattern::below_root();
    if with.iter().any(|p| p.scope == path.scope) {
        let with: Vec<&Pattern> = with.iter().copied().chain([&path]).collect();
        if let Ok(found) = any_text(&with, without, work) {
            return Ok(found);
        }
    }
    any_text(with, without, work)
}

fn any_text(with: &[&Pattern], without: &[&Pattern], work: &Cell<usize>) -> Result<String, No> {
    work.set(work.get() + 4 * (with.len() + without.len()));
    let fits = |text: &str| with.iter().all(|p| p.matches(text)) && !without.iter().any(|p| p.matches(text));
    for pattern in with {
        if let Some(only) = pattern.literal() {
            let only = String::from_utf8(only).map_err(|_| No::Idea)?;
            return if fits(&only) { Ok(only) } else { Err(No::Text) };
        }
        if let Some(found) = FILLINGS.iter().map(|f| pattern.filled(f)).find(|t| fits(t)) {
            return Ok(found);
        }
    }
    search(with, without, work)
}

/// Looks through all texts, as far as the patterns can tell them apart.
fn search(with: &[&Pattern], without: &[&Pattern], work: &Cell<usize>) -> Result<String, No> {
    if with.len() + without.len() > 40 {
        return Err(No::Idea);
    }
    let all: Vec<&Pattern> = with.iter().chain(without).copied().collect();
    let mut alphabet: Vec<u8> = all.iter().flat_map(|p| p.bytes()).collect();
    alphabet.extend(all.iter().filter_map(|p| p.scope.separator()));
    // A letter that none of them names stands for all such letters.
    alphabet.extend((b'a'..=b'z').chain(b'0'..=b'9').find(|b| !alphabet.contains(b)));
    alphabet.sort_unstable();
    alphabet.dedup();
    let start: Vec<Run> = all.iter().map(|p| p.start()).collect();
    let mut seen: HashSet<Vec<Run>> = HashSet::from([start.clone()]);
    let mut queue = VecDeque::from([(start, Vec::new())]);
    while let Some((state, text)) = queue.pop_front() {
        let accepted = |(p, run): (&&Pattern, &Run)| p.accepts(run);
        let (yes, no) = state.split_at(with.len());
        if with.iter().zip(yes).all(accepted) && !without.iter().zip(no).any(accepted) {
            return String::from_utf8(text).map_err(|_| No::Idea);
        }
        work.set(work.get() + all.len() * alphabet.len());
        for byte in &alphabet {
            let next: Vec<Run> = all.iter().zip(&state).map(|(p, run)| p.step(run, *byte)).collect();
            let dead = next.iter().take(with.len()).any(Run::is_over);
            if !dead && !seen.contains(&next) {
                if seen.len() >= MOST_STATES {
                    return Err(No::Idea);
                }
                seen.insert(next.clone());
                let mut longer = text.clone();
                longer.push(*byte);
                queue.push_back((next, longer));
            }
        }
    }
    Err(No::Text)
}
