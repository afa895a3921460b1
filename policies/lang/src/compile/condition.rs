//! One condition in the form in which it is fastest to hold against a party.

use super::{hash::same, terms::Literal};
use crate::{
    facts::{CertificateFact, Fact, ProcessFact},
    model::{Address, Atom, CertificateField, ProcessField, Truth},
    pattern::{Pattern, Scope, Step},
    view::View,
};

/// A pattern of a common shape.
#[derive(Debug)]
enum Shape {
    /// No wildcard.
    Exact(Box<[u8]>),
    /// `*` and an end.
    Ends(Box<[u8]>),
    /// A beginning and `**`.
    Begins(Box<[u8]>),
    Any,
}

#[derive(Debug)]
enum Fast {
    Name(Shape),
    Group(Shape),
    Exe(Shape),
    User(Box<[u8]>),
    Version(u64, u64),
    V4(u32, u32),
    None,
}

/// A condition or its negation.
#[derive(Debug)]
pub(super) struct Condition {
    fast: Fast,
    literal: Literal,
}

impl Condition {
    pub(super) fn new(literal: Literal) -> Self {
        let fast = if literal.negated {
            Fast::None
        } else {
            match &*literal.atom {
                Atom::Version(low, high) => Fast::Version(*low, *high),
                Atom::Address(set) => match (&*set.v4, set.v6.is_empty()) {
                    ([(low, high)], true) => Fast::V4(*low, *high),
                    _ => Fast::None,
                },
                Atom::Certificate(CertificateField::Name, p) => shape(p).map_or(Fast::None, Fast::Name),
                Atom::Certificate(CertificateField::Group, p) => shape(p).map_or(Fast::None, Fast::Group),
                Atom::Process(ProcessField::Exe, p) => shape(p).map_or(Fast::None, Fast::Exe),
                Atom::Process(ProcessField::User, p) => match p.literal() {
                    Some(name) if crate::view::number(p).is_none() => Fast::User(name.into()),
                    _ => Fast::None,
                },
                _ => Fast::None,
            }
        };
        Self { fast, literal }
    }

    /// How it stands for a party: the same as [`View::atom`], sooner.
    #[inline]
    pub(super) fn stands(&self, view: &View<'_>) -> Truth {
        let holds = match (&self.fast, view.certificate, view.process) {
            (Fast::V4(low, high), ..) => match view.address {
                Address::V4(v4) => (*low..=*high).contains(&v4),
                _ => return self.slow(view),
            },
            (Fast::Name(shape), CertificateFact::Shown(facts), _) => facts.names.iter().any(|n| {
                let name = n.as_bytes();
                shape.matches::<true>(name.strip_suffix(b".").unwrap_or(name))
            }),
            (Fast::Group(shape), CertificateFact::Shown(facts), _) => {
                facts.groups.iter().any(|g| shape.matches::<false>(g.as_bytes()))
            }
            (Fast::Version(low, high), CertificateFact::Shown(facts), _) => {
                facts.ver.is_some_and(|v| (*low..=*high).contains(&v))
            }
            (Fast::Exe(shape), _, ProcessFact::Known(facts)) if !view.no_process => match &facts.exe {
                Fact::Known(path) => shape.matches::<false>(path.as_bytes()),
                Fact::Unknown => return Truth::UNKNOWN,
            },
            (Fast::User(name), _, ProcessFact::Known(facts)) if !view.no_process => {
                facts.user.as_bytes() == &**name
            }
            _ => return self.slow(view),
        };
        if holds { Truth::TRUE } else { Truth::FALSE }
    }

    fn slow(&self, view: &View<'_>) -> Truth {
        view.atom(&self.literal.atom, self.literal.negated)
    }
}

impl Shape {
    #[inline]
    fn matches<const FOLD: bool>(&self, text: &[u8]) -> bool {
        match self {
            Self::Exact(wanted) => same::<FOLD>(text, wanted),
            Self::Ends(end) => {
                let Some(at) = text.len().checked_sub(end.len()) else { return false };
                let (before, found) = text.split_at(at);
                let separator = if FOLD { b'.' } else { b'/' };
                same::<FOLD>(found, end) && !before.contains(&separator)
            }
            Self::Begins(beginning) => text.starts_with(beginning),
            Self::Any => true,
        }
    }
}

/// The shape of a pattern, if it is a common one.
fn shape(pattern: &Pattern) -> Option<Shape> {
    if let Some(text) = pattern.literal() {
        return Some(Shape::Exact(text.into()));
    }
    if pattern.is_any() {
        return Some(Shape::Any);
    }
    match (&*pattern.steps, pattern.scope) {
        ([Step::Star, rest @ ..], Scope::Domain | Scope::Path) if is_text(rest) => {
            Some(Shape::Ends(pattern.suffix().into()))
        }
        ([rest @ .., Step::Cross], Scope::Path | Scope::Text) if is_text(rest) => {
            Some(Shape::Begins(pattern.prefix().into()))
        }
        _ => None,
    }
}

fn is_text(steps: &[Step]) -> bool {
    steps.iter().all(|s| matches!(s, Step::Byte(_)))
}
