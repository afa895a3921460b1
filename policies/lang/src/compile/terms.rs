//! Formulas as alternatives: each a list of conditions that must all hold.

use std::sync::Arc;

use crate::{
    model::{Atom, Expr, ProcessField},
    pattern::{Pattern, Scope},
};

/// A condition or its negation.
#[derive(Clone, Debug)]
pub(super) struct Literal {
    pub(super) atom: Arc<Atom>,
    pub(super) negated: bool,
}

impl Literal {
    /// Where its condition lies in memory: those of one policy that are equal are one.
    pub(super) fn place(&self) -> usize {
        Arc::as_ptr(&self.atom).addr()
    }
}

/// One alternative.
#[derive(Clone, Debug, Default)]
pub(super) struct Term {
    pub(super) literals: Vec<Literal>,
    /// What would have been too large to multiply out; must hold too.
    pub(super) rest: Vec<Expr>,
}

/// More alternatives than this are not multiplied out.
const MOST: usize = 256;

/// The alternatives of a formula. A choice by itself is never too large; a product of choices may be.
pub(super) fn terms(expr: &Expr, negated: bool) -> Vec<Term> {
    match expr {
        Expr::Any if !negated => vec![Term::default()],
        Expr::Nothing if negated => vec![Term::default()],
        Expr::Any | Expr::Nothing => Vec::new(),
        Expr::Atom(atom) => {
            let literals = vec![Literal { atom: Arc::clone(atom), negated }];
            vec![Term { literals, rest: Vec::new() }]
        }
        Expr::Not(inner) => terms(inner, !negated),
        Expr::And(list) | Expr::Or(list) => {
            if matches!(expr, Expr::And(_)) == negated {
                return list.iter().flat_map(|e| terms(e, negated)).collect();
            }
            let mut product = vec![Term::default()];
            for part in list.iter() {
                let alternatives = terms(part, negated);
                let size = product.len().saturating_mul(alternatives.len());
                if size <= MOST || product.len() == 1 {
                    let each =
                        |left: &Term| alternatives.iter().map(|right| join(left, right)).collect::<Vec<_>>();
                    product = product.iter().flat_map(each).collect();
                } else {
                    let part = if negated { crate::check::not(part.clone()) } else { part.clone() };
                    product.iter_mut().for_each(|term| term.rest.push(part.clone()));
                }
            }
            product
        }
    }
}

fn join(left: &Term, right: &Term) -> Term {
    Term {
        literals: [left.literals.as_slice(), &right.literals].concat(),
        rest: [left.rest.as_slice(), &right.rest].concat(),
    }
}

/// What a formula about a remote end amounts to before its certificate is shown, as possibilities.
pub(super) fn before_certificate(expr: &Expr, negated: bool) -> Expr {
    let known = |holds: bool| if holds { Expr::Any } else { Expr::Nothing };
    match expr {
        Expr::Any => known(!negated),
        Expr::Nothing => known(negated),
        Expr::Not(inner) => before_certificate(inner, !negated),
        Expr::Atom(atom) => match &**atom {
            Atom::Address(_) if negated => Expr::Not(Arc::new(expr.clone())),
            Atom::Address(_) => expr.clone(),
            Atom::Shown | Atom::Version(..) | Atom::Certificate(..) | Atom::Sha256(_) => Expr::Any,
            Atom::Process(ProcessField::Exe | ProcessField::User | ProcessField::Unit, _) => Expr::Any,
            // No certificate tells these.
            Atom::Process(ProcessField::Group | ProcessField::Cmdline | ProcessField::Ancestor, _) => {
                Expr::Nothing
            }
        },
        Expr::And(list) | Expr::Or(list) => {
            let list = list.iter().map(|e| before_certificate(e, negated)).collect();
            if matches!(expr, Expr::And(_)) == negated {
                crate::check::or(list)
            } else {
                crate::check::and(list)
            }
        }
    }
}

/// The end of a pattern of names that is whole labels, without the dot before it.
pub(super) fn label_suffix(pattern: &Pattern) -> Option<Vec<u8>> {
    if pattern.scope != Scope::Domain || pattern.is_literal() {
        return None;
    }
    let suffix = pattern.suffix();
    let dot = suffix.iter().position(|b| *b == b'.')?;
    let labels = suffix.get(dot + 1..)?;
    (!labels.is_empty()).then(|| labels.to_vec())
}

/// The beginning of a pattern of paths that is whole components, with the slash behind it.
pub(super) fn folder_prefix(pattern: &Pattern) -> Option<Vec<u8>> {
    if pattern.scope != Scope::Path || pattern.is_literal() {
        return None;
    }
    let prefix = pattern.prefix();
    let slash = prefix.iter().rposition(|b| *b == b'/')?;
    let folder = prefix.get(..=slash)?;
    (folder.len() > 1).then(|| folder.to_vec())
}
