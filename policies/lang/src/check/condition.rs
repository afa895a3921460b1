//! What stands in braces: addresses and attributes.

use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Checker, and, not, shared};
use crate::{
    diagnostic::{Diagnostic, nearest},
    model::{AddressSet, Atom, CertificateField, Expr, ProcessField, merge},
    parser::elsewhere,
    pattern::{LONGEST, Pattern, PatternError, Scope},
    source::Span,
    syntax::{Attribute, Comparison, Name, Value},
};

const CERTIFICATE: [&str; 8] = ["name", "ver", "group", "org", "process", "unit", "user", "issuer"];
const PROCESS: [&str; 7] = ["exe", "sha256", "user", "group", "unit", "cmdline", "ancestor"];

/// Which field an attribute of a certificate names, and the scope of its patterns.
pub(super) fn certificate_field(name: &str) -> Option<(CertificateField, Scope)> {
    Some(match name {
        "name" => (CertificateField::Name, Scope::Domain),
        "group" => (CertificateField::Group, Scope::Text),
        "org" => (CertificateField::Org, Scope::Text),
        "process" => (CertificateField::Process, Scope::Text),
        "unit" => (CertificateField::Unit, Scope::Text),
        "user" => (CertificateField::User, Scope::Text),
        "issuer" => (CertificateField::Issuer, Scope::Text),
        _ => return None,
    })
}

/// Which field an attribute of a process names, and the scope of its patterns.
pub(super) fn process_field(name: &str) -> Option<(ProcessField, Scope)> {
    Some(match name {
        "exe" => (ProcessField::Exe, Scope::Path),
        "user" => (ProcessField::User, Scope::Text),
        "group" => (ProcessField::Group, Scope::Text),
        "unit" => (ProcessField::Unit, Scope::Text),
        "cmdline" => (ProcessField::Cmdline, Scope::Text),
        "ancestor" => (ProcessField::Ancestor, Scope::Path),
        _ => return None,
    })
}

impl Checker<'_> {
    /// A condition: the one that equals it, if there was one before.
    fn atom(&mut self, atom: Atom) -> Expr {
        Expr::Atom(shared(&mut self.atoms, Arc::new(atom)))
    }

    pub(super) fn addresses(&mut self, v6: bool, words: &[Name]) -> Expr {
        let mut set = (Vec::new(), Vec::new());
        for word in words {
            let result = if v6 {
                range_v6(&word.value).map(|range| set.1.push(range))
            } else {
                range_v4(&word.value).map(|range| set.0.push(range))
            };
            if let Err(label) = result {
                let what = if v6 { "IPv6" } else { "IPv4" };
                let message = format!("`{}` is no {what} address or prefix", word.value);
                self.errors.push(Diagnostic { label, ..Diagnostic::error(message, word.span) });
            }
        }
        let set = AddressSet { v4: merge(set.0).into(), v6: merge(set.1).into() };
        if set.is_empty() { Expr::Nothing } else { self.atom(Atom::Address(set)) }
    }

    pub(super) fn attributes(&mut self, process: bool, list: &[Attribute]) -> Expr {
        if list.is_empty() {
            return Expr::Nothing;
        }
        let all = list.iter().map(|a| if process { self.process(a) } else { self.certificate(a) });
        and(all.collect())
    }

    fn certificate(&mut self, attribute: &Attribute) -> Expr {
        let condition = if attribute.name.value == "ver" {
            self.version(attribute)
        } else {
            let Some((field, scope)) = certificate_field(&attribute.name.value) else {
                return self.unknown_attribute(&attribute.name, &CERTIFICATE, &PROCESS, "process");
            };
            self.pattern(attribute, scope).map(|p| Atom::Certificate(field, p))
        };
        let Some(condition) = condition else { return Expr::Nothing };
        let condition = self.atom(condition);
        if attribute.op == Comparison::NotEqual {
            // Of those who show a certificate, the others.
            and(vec![self.atom(Atom::Shown), not(condition)])
        } else {
            condition
        }
    }

    fn process(&mut self, attribute: &Attribute) -> Expr {
        let condition = if attribute.name.value == "sha256" {
            self.sha256(attribute)
        } else {
            let Some((field, scope)) = process_field(&attribute.name.value) else {
                return self.unknown_attribute(&attribute.name, &PROCESS, &CERTIFICATE, "x509");
            };
            self.pattern(attribute, scope).map(|p| Atom::Process(field, p))
        };
        let Some(condition) = condition else { return Expr::Nothing };
        let condition = self.atom(condition);
        if attribute.op == Comparison::NotEqual { not(condition) } else { condition }
    }

    fn unknown_attribute(&mut self, name: &Name, known: &[&str], other: &[&str], owner: &str) -> Expr {
        let mut error = Diagnostic::error(format!("unknown attribute `{}`", name.value), name.span);
        if other.contains(&name.value.as_str()) {
            error.label = Some(format!("belongs to `{owner}{{…}}`"));
        } else if let Some(guess) = elsewhere(&name.value)
            .filter(|guess| known.contains(guess))
            .or_else(|| nearest(&name.value, known.iter().copied()))
        {
            error.label = Some(format!("did you mean `{guess}`?"));
        } else {
            error.help = Some(format!("there are `{}`", known.join("`, `")));
        }
        self.errors.push(error);
        Expr::Nothing
    }

    fn version(&mut self, attribute: &Attribute) -> Option<Atom> {
        let Value::Number(number) = &attribute.value else {
            let error = Diagnostic::error("`ver` is a number", attribute.value.span());
            self.errors.push(error.label("write it without quotes"));
            return None;
        };
        let Ok(n) = number.value.parse::<u64>() else {
            let error = Diagnostic::error(format!("`{}` is no version", number.value), number.span);
            self.errors.push(error.label("a whole number below 2^64"));
            return None;
        };
        let (low, high) = match attribute.op {
            Comparison::Equal | Comparison::NotEqual => (Some(n), Some(n)),
            Comparison::Less => (Some(0), n.checked_sub(1)),
            Comparison::LessEqual => (Some(0), Some(n)),
            Comparison::Greater => (n.checked_add(1), Some(u64::MAX)),
            Comparison::GreaterEqual => (Some(n), Some(u64::MAX)),
        };
        // `ver<0`: a range that contains nothing.
        Some(low.zip(high).map_or(Atom::Version(1, 0), |(low, high)| Atom::Version(low, high)))
    }

    fn is_equality(&mut self, attribute: &Attribute) -> bool {
        let ok = matches!(attribute.op, Comparison::Equal | Comparison::NotEqual);
        if !ok {
            let message = format!("`{}` is text, which has no order", attribute.name.value);
            self.errors.push(Diagnostic::error(message, attribute.span).label("only `=` and `!=`"));
        }
        ok
    }

    fn pattern(&mut self, attribute: &Attribute, scope: Scope) -> Option<Pattern> {
        if !self.is_equality(attribute) {
            return None;
        }
        let Value::Text(text) = &attribute.value else {
            let Value::Number(n) = &attribute.value else { return None };
            let error = Diagnostic::error(format!("`{}` is text", attribute.name.value), n.span);
            self.errors.push(error.label(format!("did you mean \"{}\"?", n.value)));
            return None;
        };
        match Pattern::new(scope, &text.value) {
            Ok(pattern) => {
                self.suspicious_path(attribute, text, scope);
                if let Some(label) = vain(&attribute.name.value, scope, text.value.as_str()) {
                    let message = format!("no `{}` is like this", attribute.name.value);
                    self.errors.push(Diagnostic::warning(message, text.span).label(label));
                }
                Some(pattern)
            }
            Err(error) => {
                self.errors.push(pattern_error(error, text.span));
                None
            }
        }
    }

    fn suspicious_path(&mut self, attribute: &Attribute, text: &Name, scope: Scope) {
        if scope == Scope::Path && !text.value.starts_with(['/', '*']) && !text.value.is_empty() {
            let message = format!("`{}` can only match a path, which begins with `/`", attribute.name.value);
            self.errors.push(
                Diagnostic::error(message, text.span).label(format!("did you mean \"**/{}\"?", text.value)),
            );
        }
    }

    fn sha256(&mut self, attribute: &Attribute) -> Option<Atom> {
        if !self.is_equality(attribute) {
            return None;
        }
        let (text, span) = match &attribute.value {
            Value::Text(text) | Value::Number(text) => (text.value.as_str(), text.span),
        };
        match hex(text) {
            Some(hash) if matches!(attribute.value, Value::Text(_)) => Some(Atom::Sha256(hash)),
            _ => {
                let error = Diagnostic::error("a SHA-256 is 64 hexadecimal digits in quotes", span);
                self.errors.push(error.label(format!("these are {} characters", text.chars().count())));
                None
            }
        }
    }
}

/// Why nothing can have a value that a pattern asks for, as far as it is written in ASCII.
fn vain(attribute: &str, scope: Scope, text: &str) -> Option<String> {
    let parts: Vec<&str> = text.split(scope.separator().map_or(' ', char::from)).collect();
    match scope {
        Scope::Domain => {
            let text = text.strip_suffix('.').unwrap_or(text);
            if text.parse::<std::net::Ipv4Addr>().is_ok() {
                return Some(format!("did you mean `IPv4{{{text}}}`?"));
            }
            if text.is_empty() || text.starts_with('.') || text.contains("..") {
                return Some("a label has at least one letter".to_owned());
            }
            let is_odd = |c: &char| c.is_ascii() && !c.is_ascii_alphanumeric() && !"-_.*".contains(*c);
            match text.chars().find(is_odd)? {
                c @ ('?' | '[' | ']' | '{' | '}') => {
                    Some(format!("`{c}` is no wildcard: there are `*` and `**`"))
                }
                c @ (':' | '/' | '@') => Some(format!("a host's name alone, without `{c}`")),
                c => Some(format!("a host's name has no `{}`", c.escape_default())),
            }
        }
        Scope::Path => {
            let [_, inner @ .., last] = parts.as_slice() else {
                return text.is_empty().then(|| "a path begins with `/`".to_owned());
            };
            let inner = inner.iter().find(|part| ["", ".", ".."].contains(part));
            if let Some(part) = inner {
                return Some(format!("the kernel's path of a file has no `/{part}/`"));
            }
            ["", ".", ".."]
                .contains(last)
                .then(|| "a file is no folder: it has a name behind the last `/`".to_owned())
        }
        Scope::Text if attribute == "unit" => {
            let is_whole = !text.is_empty() && !text.contains(['.', '*']);
            is_whole.then(|| format!("did you mean \"{text}.service\"?"))
        }
        Scope::Text => None,
    }
}

fn pattern_error(error: PatternError, span: Span) -> Diagnostic {
    match error {
        PatternError::TooLong(length) => {
            let message = format!("this pattern has {length} bytes; {LONGEST} are the most");
            Diagnostic::error(message, span)
        }
        PatternError::Nul => Diagnostic::error("a pattern has no NUL", span),
    }
}

pub(super) fn hex(text: &str) -> Option<[u8; 32]> {
    let mut hash = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (i, byte) in hash.iter_mut().enumerate() {
        let digits = text.get(2 * i..2 * i + 2)?;
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    Some(hash)
}

/// The error is what would be right, if that can be told.
type Guess = Option<String>;

fn range_v4(word: &str) -> Result<(u32, u32), Guess> {
    use std::net::Ipv4Addr;
    if let Some((low, high)) = word.split_once('-') {
        let low: Ipv4Addr = low.parse().map_err(|_| None)?;
        let high: Ipv4Addr = high.parse().map_err(|_| None)?;
        return if low <= high {
            Ok((low.into(), high.into()))
        } else {
            Err(Some(format!("did you mean `{high}-{low}`?")))
        };
    }
    if word.contains(':') {
        return Err(Some("did you mean `IPv6{…}`?".to_owned()));
    }
    if !word.contains('/') {
        let address: Ipv4Addr = word.parse().map_err(|_| guess_v4(word))?;
        return Ok((address.into(), address.into()));
    }
    let net: Ipv4Net = word.parse().map_err(|_| guess_v4(word))?;
    if net.addr() != net.network() {
        return Err(Some(format!("did you mean `{}` or `{}`?", net.trunc(), net.addr())));
    }
    Ok((net.network().into(), net.broadcast().into()))
}

fn guess_v4(word: &str) -> Guess {
    let (address, length) = word.split_once('/').unwrap_or((word, ""));
    if length.parse::<u32>().is_ok_and(|n| n > 32) {
        return Some("a prefix has 0 to 32 bits".to_owned());
    }
    if length.contains('.') {
        return Some("write the mask as a number of bits, such as `/24`".to_owned());
    }
    let parts: Vec<&str> = address.split('.').collect();
    if parts.iter().any(|p| p.parse::<u32>().is_ok_and(|n| n > 255)) {
        return Some("each of the four numbers is at most 255".to_owned());
    }
    if parts.iter().any(|p| p.len() > 1 && p.starts_with('0')) {
        return Some("a leading zero could mean octal; leave it out".to_owned());
    }
    if parts.len() < 4 && !length.is_empty() && parts.iter().all(|p| p.parse::<u8>().is_ok()) {
        return Some(format!("did you mean `{}{}/{length}`?", address, ".0".repeat(4 - parts.len())));
    }
    Some(guess_name(word).unwrap_or_else(|| "such as `192.0.2.1` or `192.0.2.0/24`".to_owned()))
}

/// What to write for a host's name that stands where an address should.
fn guess_name(word: &str) -> Guess {
    let is_name = word.contains('.') && !word.contains([':', '/']) && word.contains(char::is_alphabetic);
    is_name.then(|| format!("a host is `x509{{name=\"{word}\"}}`"))
}

fn range_v6(word: &str) -> Result<(u128, u128), Guess> {
    use std::net::Ipv6Addr;
    let mapped = |low: u128, high: u128| {
        let (first, last) = (0xffff_0000_0000_u128, 0xffff_ffff_ffff_u128);
        first <= low && high <= last
    };
    let say_mapped = || Err(Some("an IPv4-mapped address counts as IPv4: write `IPv4{…}`".to_owned()));
    if let Some((low, high)) = word.split_once('-') {
        let low: Ipv6Addr = low.parse().map_err(|_| None)?;
        let high: Ipv6Addr = high.parse().map_err(|_| None)?;
        return match (low.into(), high.into()) {
            (low, high) if low <= high && mapped(low, high) => say_mapped(),
            (low, high) if low <= high => Ok((low, high)),
            _ => Err(Some(format!("did you mean `{high}-{low}`?"))),
        };
    }
    let net: Ipv6Net = if word.contains('/') {
        word.parse().map_err(|_| guess_v6(word))?
    } else {
        word.parse::<Ipv6Addr>().map_err(|_| guess_v6(word))?.into()
    };
    if net.addr() != net.network() {
        return Err(Some(format!("did you mean `{}` or `{}`?", net.trunc(), net.addr())));
    }
    let (low, high) = (net.network().into(), net.broadcast().into());
    if mapped(low, high) { say_mapped() } else { Ok((low, high)) }
}

fn guess_v6(word: &str) -> Guess {
    if word.parse::<IpNet>().is_ok() || word.parse::<std::net::Ipv4Addr>().is_ok() {
        return Some("did you mean `IPv4{…}`?".to_owned());
    }
    if word.contains('%') {
        return Some("a policy names no interface: leave out the zone".to_owned());
    }
    let length = word.split_once('/').and_then(|(_, n)| n.parse::<u32>().ok());
    if length.is_some_and(|n| n > 128) {
        return Some("a prefix has 0 to 128 bits".to_owned());
    }
    Some(guess_name(word).unwrap_or_else(|| "such as `2001:db8::1` or `2001:db8::/32`".to_owned()))
}
