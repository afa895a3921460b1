//! One concrete party, as a test or a command line describes it: what is not said is not so.

use std::net::IpAddr;

use super::{Names, condition};
use crate::{
    diagnostic::{Diagnostic, Diagnostics},
    facts::{CertificateFact, CertificateFacts, Fact, ProcessFact, ProcessFacts},
    model::{Address, CertificateField, ProcessField},
    syntax::{Attribute, Comparison, Expr, Name, Value},
    view::View,
};

/// One party of which everything is known.
#[derive(Clone, Debug)]
pub(crate) struct Example {
    pub(crate) address: Option<IpAddr>,
    pub(crate) certificate: Option<CertificateFacts>,
    pub(crate) process: ProcessFacts,
    /// Whether anything was said of the process.
    pub(crate) has_process: bool,
}

impl Default for Example {
    fn default() -> Self {
        let process = ProcessFacts {
            exe: Fact::Known(String::new()),
            sha256: Fact::Known([0; 32]),
            uid: u32::MAX,
            user: String::new(),
            groups: Vec::new(),
            unit: None,
            cmdline: String::new(),
            ancestors: Vec::new(),
        };
        Self { address: None, certificate: None, process, has_process: false }
    }
}

impl Example {
    pub(crate) fn view(&self) -> View<'_> {
        View {
            address: self.address.map_or(Address::Absent, |a| Address::new(Some(a))),
            process: ProcessFact::Known(&self.process),
            certificate: self.certificate.as_ref().map_or(CertificateFact::None, CertificateFact::Shown),
            far: false,
            no_process: !self.has_process,
        }
    }
}

/// Reads a principal as the description of one party.
pub(crate) fn example(names: &Names, tree: &Expr, errors: &mut Diagnostics) -> Option<Example> {
    let mut example = Example::default();
    let before = errors.len();
    fill(names, tree, &mut example, errors, 0);
    (errors.len() == before).then_some(example)
}

fn fill(names: &Names, tree: &Expr, example: &mut Example, errors: &mut Diagnostics, depth: usize) {
    match tree {
        Expr::Any(_) | Expr::Broken(_) => {}
        Expr::And(list) => list.iter().for_each(|e| fill(names, e, example, errors, depth)),
        Expr::Named(name) => match names.sets.get(&name.value) {
            // Cycles were reported where the set is defined.
            Some(set) if depth < super::DEEPEST => {
                let mut inner = Diagnostics::default();
                fill(names, &set.tree, example, &mut inner, depth + 1);
                if let Some(error) = inner.iter().next() {
                    errors.push(not_one_party(name, error));
                }
            }
            Some(_) => {}
            None => {
                let known = names.sets.keys().map(String::as_str);
                let guess = crate::diagnostic::nearest(&name.value, known);
                let mut error = Diagnostic::error(format!("no set is called `{}`", name.value), name.span);
                error.label = guess.map(|g| format!("did you mean `{g}`?"));
                errors.push(error);
            }
        },
        Expr::Addresses { words, span, .. } => {
            let address = match words.as_slice() {
                [only] => only.value.parse::<IpAddr>().ok(),
                _ => None,
            };
            match address {
                Some(_) if example.address.is_some() => {
                    errors.push(Diagnostic::error("a party has one address", *span).label("the second"));
                }
                Some(address) => example.address = Some(address),
                None => errors.push(
                    Diagnostic::error("this describes more than one party", *span)
                        .label("one address expected here"),
                ),
            }
        }
        Expr::Attributes { process: true, list, .. } => {
            example.has_process = true;
            list.iter().for_each(|a| process(a, example, errors));
        }
        Expr::Attributes { process: false, list, .. } => {
            let certificate = example.certificate.get_or_insert_default();
            list.iter().for_each(|a| self::certificate(a, certificate, errors));
        }
        Expr::Not(_, span) => {
            let error = Diagnostic::error("this describes more than one party", *span);
            errors.push(error.label("say what it is, not what it is not"));
        }
        Expr::Or(_) => {
            let error = Diagnostic::error("this describes more than one party", tree.span());
            errors.push(error.label("one of them expected here"));
        }
    }
}

/// A set that is used as one party and is none, because of what was found in it.
fn not_one_party(name: &Name, inner: &Diagnostic) -> Diagnostic {
    let message = format!("`{}` describes more than one party", name.value);
    let (why, place) = inner
        .related
        .last()
        .cloned()
        .unwrap_or_else(|| (inner.label.clone().unwrap_or_else(|| inner.message.clone()), inner.span));
    Diagnostic::error(message, name.span).label("say which one").related(why, place)
}

/// The single text an attribute stands for.
fn text(attribute: &Attribute, errors: &mut Diagnostics) -> Option<String> {
    let span = attribute.value.span();
    if attribute.op != Comparison::Equal {
        let error = Diagnostic::error("this describes more than one party", attribute.span);
        errors.push(error.label("write `=`"));
        return None;
    }
    let Value::Text(value) = &attribute.value else {
        errors.push(Diagnostic::error(format!("`{}` is text", attribute.name.value), span).label("quote it"));
        return None;
    };
    let mut chars = value.value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            '*' => {
                let error = Diagnostic::error("this describes more than one party", span);
                errors.push(error.label("a text without `*` expected here"));
                return None;
            }
            _ => {}
        }
    }
    Some(crate::tokens::plain(&value.value))
}

fn certificate(attribute: &Attribute, facts: &mut CertificateFacts, errors: &mut Diagnostics) {
    if attribute.name.value == "ver" {
        let number = match &attribute.value {
            Value::Number(n) if attribute.op == Comparison::Equal => n.value.parse().ok(),
            _ => None,
        };
        let error = |label: &str| Diagnostic::error("a party has one `ver`", attribute.span).label(label);
        if facts.ver.is_some() {
            errors.push(error("the second"));
        } else if number.is_none() {
            errors.push(error("write `ver=` and a number"));
        }
        facts.ver = number;
        return;
    }
    let Some((field, _)) = condition::certificate_field(&attribute.name.value) else {
        unknown(attribute, errors);
        return;
    };
    let Some(text) = text(attribute, errors) else { return };
    match field {
        CertificateField::Name => facts.names.push(text),
        CertificateField::Group => facts.groups.push(text),
        CertificateField::Org => facts.org = Some(text),
        CertificateField::Process => facts.process = Some(text),
        CertificateField::Unit => facts.unit = Some(text),
        CertificateField::User => facts.user = Some(text),
        CertificateField::Issuer => facts.issuer = Some(text),
    }
}

fn process(attribute: &Attribute, example: &mut Example, errors: &mut Diagnostics) {
    if attribute.name.value == "sha256" {
        let hash = text(attribute, errors).and_then(|t| condition::hex(&t));
        match hash {
            Some(hash) => example.process.sha256 = Fact::Known(hash),
            None => {
                errors.push(Diagnostic::error("a SHA-256 is 64 hexadecimal digits in quotes", attribute.span))
            }
        }
        return;
    }
    let Some((field, _)) = condition::process_field(&attribute.name.value) else {
        unknown(attribute, errors);
        return;
    };
    let Some(text) = text(attribute, errors) else { return };
    let facts = &mut example.process;
    match field {
        ProcessField::Exe => facts.exe = Fact::Known(text),
        // A name and a number are one user.
        ProcessField::User => match text.parse() {
            Ok(uid) => {
                facts.uid = uid;
                if facts.user.is_empty() {
                    facts.user = text;
                }
            }
            Err(_) => facts.user = text,
        },
        ProcessField::Group => facts.groups.push(text),
        ProcessField::Unit => facts.unit = Some(text),
        ProcessField::Cmdline => facts.cmdline = text,
        ProcessField::Ancestor => facts.ancestors.push(Fact::Known(text)),
    }
}

fn unknown(attribute: &Attribute, errors: &mut Diagnostics) {
    let message = format!("unknown attribute `{}`", attribute.name.value);
    errors.push(Diagnostic::error(message, attribute.name.span));
}
