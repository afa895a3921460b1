//! One alternative in one cache line: what to compare with what, and the texts themselves.
//!
//! A look-up among very many principals costs what its cache misses cost, so everything that decides
//! whether an alternative holds lies beside the key that led to it.

use super::terms::Literal;
use crate::{
    model::{Address, Atom, CertificateField, ProcessField, Truth},
    pattern::{Pattern, Scope, Step},
    view::{self, View},
};

/// Room for conditions; with hash, principal, services and link it makes 64 bytes.
const ROOM: usize = 44;

/// Conditions in a row, each an operation, a length where it has a text, and its operands.
pub(super) type Code = [u8; ROOM];

/// No condition.
pub(super) const EMPTY: Code = [END; ROOM];

const END: u8 = 0;
const NAME: u8 = 1;
/// A star and an end.
const NAME_END: u8 = 2;
const GROUP: u8 = 3;
const EXE: u8 = 4;
/// A beginning and anything.
const FOLDER: u8 = 5;
const USER: u8 = 6;
const VERSION: u8 = 7;
const V4: u8 = 8;
/// The number of an alternative that does not fit.
const ELSEWHERE: u8 = 9;

/// Writes an alternative's conditions; `None` if there is no room, or no operation for one.
pub(super) fn write<'a>(literals: impl Iterator<Item = &'a Literal>) -> Option<Code> {
    let mut code = EMPTY;
    let mut room = code.as_mut_slice();
    for literal in literals {
        if literal.negated {
            return None;
        }
        let mut put = |bytes: &[u8]| {
            let (now, later) = std::mem::take(&mut room).split_at_mut_checked(bytes.len())?;
            now.copy_from_slice(bytes);
            room = later;
            Some(())
        };
        let mut text = |op: u8, text: &[u8]| {
            put(&[op, u8::try_from(text.len()).ok()?])?;
            put(text)
        };
        match &*literal.atom {
            Atom::Certificate(CertificateField::Name, pattern) => match pattern.literal() {
                Some(name) => text(NAME, &name)?,
                None => text(NAME_END, &star_and_end(pattern)?)?,
            },
            Atom::Certificate(CertificateField::Group, pattern) => text(GROUP, &pattern.literal()?)?,
            Atom::Process(ProcessField::Exe, pattern) => match pattern.literal() {
                Some(path) => text(EXE, &path)?,
                None => text(FOLDER, &beginning(pattern)?)?,
            },
            Atom::Process(ProcessField::User, pattern) if view::number(pattern).is_none() => {
                text(USER, &pattern.literal()?)?;
            }
            Atom::Version(low, high) => {
                put(&[VERSION])?;
                put(&low.to_le_bytes())?;
                put(&high.to_le_bytes())?;
            }
            Atom::Address(set) => {
                let ([(low, high)], []) = (&*set.v4, &*set.v6) else { return None };
                put(&[V4])?;
                put(&low.to_le_bytes())?;
                put(&high.to_le_bytes())?;
            }
            _ => return None,
        }
    }
    Some(code)
}

/// Refers to an alternative that is kept elsewhere.
pub(super) fn elsewhere(number: u32) -> Code {
    let mut code = EMPTY;
    if let Some((op, operand)) = code.split_first_mut()
        && let Some(operand) = operand.first_chunk_mut()
    {
        (*op, *operand) = (ELSEWHERE, number.to_le_bytes());
    }
    code
}

/// How the conditions stand for a party. `other` answers for alternatives kept elsewhere.
#[inline]
pub(super) fn run(code: &Code, view: &View<'_>, other: impl Fn(u32) -> Truth) -> Truth {
    let mut rest = code.as_slice();
    let mut truth = Truth::TRUE;
    while let Some((op, after)) = rest.split_first() {
        let (stands, after) = match *op {
            END => break,
            VERSION => {
                let Some((low, after)) = after.split_first_chunk() else { break };
                let Some((high, after)) = after.split_first_chunk() else { break };
                let (low, high) = (u64::from_le_bytes(*low), u64::from_le_bytes(*high));
                let holds = view.shown().map(|c| c.ver.is_some_and(|v| (low..=high).contains(&v)));
                (settle(holds), after)
            }
            V4 => {
                let Some((low, after)) = after.split_first_chunk() else { break };
                let Some((high, after)) = after.split_first_chunk() else { break };
                let range = u32::from_le_bytes(*low)..=u32::from_le_bytes(*high);
                let stands = match view.address {
                    Address::V4(v4) => settle(Ok(range.contains(&v4))),
                    Address::V6(_) | Address::Absent => Truth::FALSE,
                    Address::Unknown => Truth::UNKNOWN,
                };
                (stands, after)
            }
            ELSEWHERE => {
                let Some(number) = after.first_chunk() else { break };
                return other(u32::from_le_bytes(*number));
            }
            op => {
                let Some((length, after)) = after.split_first() else { break };
                let Some((wanted, after)) = after.split_at_checked(usize::from(*length)) else { break };
                (settle(text(op, wanted, view)), after)
            }
        };
        truth = truth & stands;
        if truth == Truth::FALSE {
            break;
        }
        rest = after;
    }
    truth
}

fn settle(holds: Result<bool, Truth>) -> Truth {
    match holds {
        Ok(true) => Truth::TRUE,
        Ok(false) => Truth::FALSE,
        Err(truth) => truth,
    }
}

#[inline]
fn text(op: u8, wanted: &[u8], view: &View<'_>) -> Result<bool, Truth> {
    use super::hash::same;
    Ok(match op {
        NAME => view.shown()?.names.iter().any(|n| same(undotted(n), wanted)),
        NAME_END => view.shown()?.names.iter().any(|n| {
            let name = undotted(n);
            let Some(at) = name.len().checked_sub(wanted.len()) else { return false };
            let (label, end) = name.split_at(at);
            same(end, wanted) && !label.contains(&b'.')
        }),
        GROUP => view.shown()?.groups.iter().any(|g| g.as_bytes() == wanted),
        EXE => view.exe()?.as_bytes() == wanted,
        FOLDER => view.exe()?.as_bytes().starts_with(wanted),
        _ => view.user()?.as_bytes() == wanted,
    })
}

fn undotted(name: &str) -> &[u8] {
    let name = name.as_bytes();
    name.strip_suffix(b".").unwrap_or(name)
}

/// The end of a pattern that is one star and that end.
fn star_and_end(pattern: &Pattern) -> Option<Vec<u8>> {
    match (&*pattern.steps, pattern.scope) {
        ([Step::Star, rest @ ..], Scope::Domain) if is_text(rest) => Some(pattern.suffix()),
        _ => None,
    }
}

/// The beginning of a pattern that is that beginning and anything.
fn beginning(pattern: &Pattern) -> Option<Vec<u8>> {
    match &*pattern.steps {
        [rest @ .., Step::Cross] if is_text(rest) => Some(pattern.prefix()),
        _ => None,
    }
}

fn is_text(steps: &[Step]) -> bool {
    steps.iter().all(|s| matches!(s, Step::Byte(_)))
}
