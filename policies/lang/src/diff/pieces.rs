//! Boxes of flows: a set of services, and for each end which conditions hold and which do not.

use std::sync::Arc;

use portcullis_types::Protocol;

use super::{Atoms, ExampleOf, Form, usual_port, witness};
use crate::{
    check::{Example, and, not},
    display,
    listener::Ranges,
    model::{Atom, Expr, ProcessField, Step, merge},
    source::to_usize,
};

/// One box.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) service: Vec<(u32, u32)>,
    pub(crate) from: End,
    pub(crate) to: End,
}

/// What is laid down of one end.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub(super) laid: Vec<(u32, bool)>,
    pub(super) addresses: Ranges,
}

/// Whether there is a flow in a box.
pub(crate) enum Sat {
    Yes(Box<Example>, Box<Example>),
    No,
    Unknown,
}

/// Whether two lists of ranges have something in common.
pub(super) fn meet<T: Ord>(a: &[(T, T)], b: &[(T, T)]) -> bool {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        if x.0 <= y.1 && y.0 <= x.1 {
            return true;
        }
        if x.1 < y.0 {
            a.next()
        } else {
            b.next()
        };
    }
    false
}

/// Whether all of the first is in the second; both sorted and merged.
fn within<T: Ord>(a: &[(T, T)], b: &[(T, T)]) -> bool {
    a.iter().all(|x| {
        let n = b.partition_point(|y| y.1 < x.0);
        b.get(n).is_some_and(|y| y.0 <= x.0 && x.1 <= y.1)
    })
}

pub(super) fn minus<T: Ord + Copy + Step>(a: &[(T, T)], b: &[(T, T)]) -> Vec<(T, T)> {
    let mut left = Vec::new();
    for (low, high) in a {
        let mut next = Some(*low);
        for (from, to) in b.iter().filter(|(from, to)| from <= high && low <= to) {
            if let Some(start) = next.filter(|start| start < from) {
                left.push((start, from.before()));
            }
            next = (*to < *high).then(|| to.after());
        }
        left.extend(next.map(|start| (start, *high)));
    }
    merge(left)
}

impl Piece {
    pub(super) fn new(service: Vec<(u32, u32)>) -> Self {
        let end = || End { laid: Vec::new(), addresses: Ranges::all() };
        Self { service, from: end(), to: end() }
    }

    /// Whether a rule holds for all of the box, for none, or for a part (`None`).
    pub(super) fn rule(&self, service: &[(u32, u32)], from: &Form, to: &Form, atoms: &Atoms) -> Option<bool> {
        if !meet(service, &self.service) {
            return Some(false);
        }
        let from = self.from.stands(from, atoms);
        if from == Some(false) {
            return from;
        }
        let to = self.to.stands(to, atoms);
        if to == Some(false) {
            return to;
        }
        (from == Some(true) && to == Some(true) && within(&self.service, service)).then_some(true)
    }

    /// The box in two parts, cut where a rule that holds for a part of it begins.
    pub(super) fn halves(&self, service: &[(u32, u32)], from: &Form, to: &Form, atoms: &Atoms) -> Vec<Self> {
        if !within(&self.service, service) {
            let outside = minus(&self.service, service);
            let inside = minus(&self.service, &outside);
            return [inside, outside].into_iter().map(|service| Self { service, ..self.clone() }).collect();
        }
        let cut = |end: &End, form: &Form| {
            end.open(form, atoms).map(|n| [end.with(n, true, atoms), end.with(n, false, atoms)])
        };
        if let Some(ends) = cut(&self.from, from) {
            return ends.into_iter().map(|from| Self { from, ..self.clone() }).collect();
        }
        let ends = cut(&self.to, to).into_iter().flatten();
        ends.map(|to| Self { to, ..self.clone() }).collect()
    }

    /// The box less what fulfils no condition of two formulas, as far as their conditions are joined by `&`.
    pub(super) fn laid(mut self, from: &Form, to: &Form, atoms: &Atoms) -> Self {
        self.from.lay(from, atoms);
        self.to.lay(to, atoms);
        self
    }

    /// A flow in the box, if it can be told that there is one.
    pub(super) fn flow(&self, atoms: &Atoms) -> Option<ExampleOf> {
        let Sat::Yes(from, to) = self.satisfiable(atoms) else { return None };
        let first = usual_port(&self.service)?;
        let protocol = Protocol(u8::try_from(first >> 16).ok()?);
        Some(ExampleOf { from, to, protocol, port: u16::try_from(first & 0xffff).ok()? })
    }

    /// Whether there is a flow in the box, and one such.
    pub(super) fn satisfiable(&self, atoms: &Atoms) -> Sat {
        if self.service.is_empty() {
            return Sat::No;
        }
        match (witness::party(&self.from, atoms), witness::party(&self.to, atoms)) {
            (witness::Found::None, _) | (_, witness::Found::None) => Sat::No,
            (witness::Found::One(from), witness::Found::One(to)) => Sat::Yes(from, to),
            _ => Sat::Unknown,
        }
    }
}

#[cfg(test)]
impl End {
    pub(crate) fn laid(&self) -> &[(u32, bool)] {
        &self.laid
    }

    pub(crate) const fn addresses(&self) -> &Ranges {
        &self.addresses
    }
}

impl End {
    fn with(&self, atom: u32, holds: bool, atoms: &Atoms) -> Self {
        let mut end = self.clone();
        if let Some(Atom::Address(set)) = atoms.all.get(to_usize(atom)).map(|a| &**a) {
            end.addresses = if holds {
                let all =
                    Ranges { v4: minus(&self.addresses.v4, &set.v4), v6: minus(&self.addresses.v6, &set.v6) };
                Ranges { v4: minus(&self.addresses.v4, &all.v4), v6: minus(&self.addresses.v6, &all.v6) }
            } else {
                Ranges { v4: minus(&self.addresses.v4, &set.v4), v6: minus(&self.addresses.v6, &set.v6) }
            };
        }
        end.laid.push((atom, holds));
        end
    }

    /// Lays down conditions that are joined by `&`.
    fn lay(&mut self, form: &Form, atoms: &Atoms) {
        match form {
            Form::And(list) => list.iter().for_each(|f| self.lay(f, atoms)),
            Form::Atom(n) if self.atom(*n, atoms).is_none() => *self = self.with(*n, true, atoms),
            Form::Not(inner) => {
                if let Form::Atom(n) = **inner
                    && self.atom(n, atoms).is_none()
                {
                    *self = self.with(n, false, atoms);
                }
            }
            _ => {}
        }
    }

    /// Whether a formula holds for all parties of this end, none, or some (`None`).
    fn stands(&self, form: &Form, atoms: &Atoms) -> Option<bool> {
        match form {
            Form::Any => Some(true),
            Form::Nothing => Some(false),
            Form::Atom(n) => self.atom(*n, atoms),
            Form::Not(inner) => self.stands(inner, atoms).map(|b| !b),
            Form::And(list) => all(list.iter().map(|f| self.stands(f, atoms)), true),
            Form::Or(list) => all(list.iter().map(|f| self.stands(f, atoms)), false),
        }
    }

    /// The first condition of a formula that holds for some parties only.
    fn open(&self, form: &Form, atoms: &Atoms) -> Option<u32> {
        if self.stands(form, atoms).is_some() {
            return None;
        }
        match form {
            Form::Any | Form::Nothing => None,
            Form::Atom(n) => Some(*n),
            Form::Not(inner) => self.open(inner, atoms),
            Form::And(list) | Form::Or(list) => list.iter().find_map(|f| self.open(f, atoms)),
        }
    }

    fn atom(&self, number: u32, atoms: &Atoms) -> Option<bool> {
        if let Some((_, holds)) = self.laid.iter().find(|(n, _)| *n == number) {
            return Some(*holds);
        }
        let atom = atoms.all.get(to_usize(number))?;
        if let Atom::Address(set) = &**atom {
            let (v4, v6) = (&self.addresses.v4, &self.addresses.v6);
            if !meet(v4, &set.v4) && !meet(v6, &set.v6) {
                return Some(false);
            }
            return (within(v4, &set.v4) && within(v6, &set.v6)).then_some(true);
        }
        let known = |(n, holds): &(u32, bool)| follows(atoms, *n, *holds, number);
        self.laid.iter().find_map(known)
    }

    /// The end in the language's words.
    pub(super) fn text(&self, atoms: &Atoms) -> String {
        let part = |(n, holds): &(u32, bool)| {
            let atom = atoms.all.get(to_usize(*n))?;
            if matches!(**atom, Atom::Address(_)) {
                return None;
            }
            let expr = Expr::Atom(Arc::clone(atom));
            Some(if *holds { expr } else { not(expr) })
        };
        let mut parts: Vec<Expr> = self.laid.iter().filter_map(part).collect();
        if !self.addresses.is_all() {
            let set = |ranges: &Ranges| {
                let (v4, v6) = (ranges.v4.as_slice().into(), ranges.v6.as_slice().into());
                Expr::Atom(Arc::new(Atom::Address(crate::model::AddressSet { v4, v6 })))
            };
            let others = self.addresses.complement();
            let size = |r: &Ranges| r.v4.len() + r.v6.len();
            let shorter = size(&others) < size(&self.addresses);
            parts.push(if shorter { not(set(&others)) } else { set(&self.addresses) });
        }
        display::expr(&and(parts))
    }
}

/// Whether certainly no party fulfils a formula.
pub(super) fn nobody(form: &Form, atoms: &Atoms) -> bool {
    let mut stack = vec![End { laid: Vec::new(), addresses: Ranges::all() }];
    let mut steps = 0;
    while let Some(end) = stack.pop() {
        steps += 1;
        match (end.stands(form, atoms), end.open(form, atoms)) {
            (Some(false), _) => {}
            (None, Some(atom)) if steps < 200 => {
                let halves = [end.with(atom, false, atoms), end.with(atom, true, atoms)];
                stack.extend(
                    halves.into_iter().filter(|e| !matches!(witness::party(e, atoms), witness::Found::None)),
                );
            }
            // Someone does, or it cannot be told.
            _ => return false,
        }
    }
    true
}

/// `&` of three-valued answers, or `|`.
fn all(list: impl Iterator<Item = Option<bool>>, is_and: bool) -> Option<bool> {
    let mut open = false;
    for item in list {
        match item {
            None => open = true,
            Some(holds) if holds != is_and => return Some(holds),
            Some(_) => {}
        }
    }
    (!open).then_some(is_and)
}

fn about_certificate(atom: &Atom) -> bool {
    matches!(atom, Atom::Shown | Atom::Version(..) | Atom::Certificate(..))
}

/// What one condition, holding or not, says of another, as far as that is quickly told. What it does
/// not tell is found when the piece turns out to be empty.
fn follows(atoms: &Atoms, known: u32, holds: bool, asked: u32) -> Option<bool> {
    let text = |n: u32| atoms.texts.get(to_usize(n)).and_then(Option::as_deref);
    let (known_text, asked_text) = (text(known), text(asked));
    let (known, asked) = (&**atoms.all.get(to_usize(known))?, &**atoms.all.get(to_usize(asked))?);
    if about_certificate(asked) {
        match (known, holds) {
            (Atom::Shown, false) => return Some(false),
            (known, true) if *asked == Atom::Shown && about_certificate(known) => return Some(true),
            _ => {}
        }
    }
    let one_value = |many: bool, known: &crate::pattern::Pattern, asked: &crate::pattern::Pattern| {
        match (holds, known_text, asked_text) {
            // Of two texts without wildcards it is told without looking for one in the other.
            (true, Some(text), Some(other)) if many && text != other => None,
            (true, Some(text), _) if asked.matches(text) => Some(true),
            (true, Some(_), _) if !many => Some(false),
            (true, None, Some(text)) if !many && !known.matches(text) => Some(false),
            (false, None, Some(text)) if known.matches(text) => Some(false),
            _ => None,
        }
    };
    match (known, asked) {
        (Atom::Version(a, b), Atom::Version(c, d)) => match holds {
            true if c <= a && b <= d => Some(true),
            true if d < a || b < c || d < c => Some(false),
            false if a <= c && d <= b => Some(false),
            _ => None,
        },
        (Atom::Sha256(a), Atom::Sha256(b)) if holds => Some(a == b),
        (Atom::Certificate(a, known), Atom::Certificate(b, asked)) if a == b => {
            one_value(a.is_many(), known, asked)
        }
        // A user has a number too, so two patterns of which one is a number are left alone.
        (Atom::Process(ProcessField::User, known), Atom::Process(ProcessField::User, asked))
            if crate::view::number(known).is_some() || crate::view::number(asked).is_some() =>
        {
            None
        }
        (Atom::Process(a, known), Atom::Process(b, asked)) if a == b => one_value(a.is_many(), known, asked),
        _ => None,
    }
}
