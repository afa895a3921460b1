//! Checked values back to policy text, as people would write it.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use portcullis_types::Protocol;

use crate::{
    model::{AddressSet, Atom, Expr},
    pattern::Pattern,
    region::{prefixes_v4, prefixes_v6},
    services::{self, Service, protocol_name},
};

/// A formula as policy text; parsing it gives one that means the same.
pub(crate) fn expr(expr: &Expr) -> String {
    match expr {
        Expr::Any => "*".to_owned(),
        Expr::Nothing => "IPv4{}".to_owned(),
        Expr::Atom(atom) => self::atom(atom),
        Expr::Not(inner) => match &**inner {
            Expr::And(_) | Expr::Or(_) => format!("!({})", self::expr(inner)),
            Expr::Atom(atom) if two_families(atom) => format!("!({})", self::expr(inner)),
            _ => format!("!{}", self::expr(inner)),
        },
        Expr::Or(list) => list.iter().map(self::expr).collect::<Vec<_>>().join(" | "),
        Expr::And(list) => conjunction(list),
    }
}

fn two_families(atom: &Atom) -> bool {
    matches!(atom, Atom::Address(set) if !set.v4.is_empty() && !set.v6.is_empty())
}

/// Conditions of one kind share their braces.
fn conjunction(list: &[Expr]) -> String {
    let list = &one_version(list);
    let (mut certificate, mut process, mut others) = (Vec::new(), Vec::new(), Vec::new());
    let shown = list.iter().any(|e| matches!(e, Expr::Atom(a) if **a == Atom::Shown));
    let versioned = list.iter().any(|e| matches!(e, Expr::Atom(a) if range(a).is_some()));
    for part in list {
        match part {
            Expr::Atom(atom) => match &**atom {
                Atom::Shown => {}
                Atom::Version(..) | Atom::Certificate(..) => certificate.push(condition(atom, "=")),
                Atom::Sha256(_) | Atom::Process(..) => process.push(condition(atom, "=")),
                Atom::Address(_) if two_families(atom) => others.push(format!("({})", self::expr(part))),
                Atom::Address(_) => others.push(self::expr(part)),
            },
            Expr::Not(inner) => match &**inner {
                Expr::Atom(atom) => match &**atom {
                    Atom::Certificate(..) if shown => certificate.push(condition(atom, "!=")),
                    Atom::Version(low, high) if (shown || versioned) && low == high => {
                        certificate.push(format!("ver!={low}"))
                    }
                    Atom::Sha256(_) | Atom::Process(..) => process.push(condition(atom, "!=")),
                    _ => others.push(self::expr(part)),
                },
                _ => others.push(self::expr(part)),
            },
            Expr::Or(_) => others.push(format!("({})", self::expr(part))),
            _ => others.push(self::expr(part)),
        }
    }
    let mut parts = Vec::new();
    if !certificate.is_empty() || shown {
        let any = "name=\"*\"".to_owned();
        let list = if certificate.is_empty() { vec![any] } else { certificate };
        parts.push(format!("x509{{{}}}", list.join(", ")));
    }
    if !process.is_empty() {
        parts.push(format!("process{{{}}}", process.join(", ")));
    }
    parts.extend(others);
    parts.join(" & ")
}

/// Conditions on a version as one: once there must be a version, what it must not be takes off from what it must.
fn one_version(list: &[Expr]) -> Vec<Expr> {
    let version = |expr: &Expr, wanted_negated: bool| match expr {
        Expr::Atom(atom) if !wanted_negated => range(atom),
        Expr::Not(inner) if wanted_negated => match &**inner {
            Expr::Atom(atom) => range(atom),
            _ => None,
        },
        _ => None,
    };
    let wanted = list.iter().filter_map(|expr| version(expr, false));
    let Some((mut low, mut high)) = wanted.reduce(|a, b| (a.0.max(b.0), a.1.min(b.1))) else {
        return list.to_vec();
    };
    let mut holes: Vec<(u64, u64)> = list.iter().filter_map(|expr| version(expr, true)).collect();
    holes.sort_unstable();
    let mut empty = low > high;
    // What is cut off at the lower end, from the least, and at the upper end, from the greatest.
    for (from, to) in holes.iter().filter(|(from, to)| from <= to) {
        if *from <= low && low <= *to {
            (low, empty) = (to.saturating_add(1), empty || *to == u64::MAX);
        }
    }
    holes.sort_unstable_by_key(|(_, to)| std::cmp::Reverse(*to));
    for (from, to) in holes.iter().filter(|(from, to)| from <= to) {
        if *from <= high && high <= *to {
            (high, empty) = (from.saturating_sub(1), empty || *from == 0);
        }
    }
    if empty {
        (low, high) = (1, 0);
    }
    let within = |(from, to): (u64, u64)| low < from && to < high;
    let mut rest: Vec<Expr> = list
        .iter()
        .filter(|expr| version(expr, false).is_none() && version(expr, true).is_none_or(within))
        .cloned()
        .collect();
    rest.insert(0, Expr::Atom(Atom::Version(low, high).into()));
    rest
}

fn range(atom: &Atom) -> Option<(u64, u64)> {
    if let Atom::Version(low, high) = atom { Some((*low, *high)) } else { None }
}

/// One condition as policy text.
pub(crate) fn atom(atom: &Atom) -> String {
    match atom {
        Atom::Address(set) => addresses(set),
        // Who shows a certificate that has no name either is still said best so.
        Atom::Shown => "(x509{name=\"*\"} | x509{name!=\"*\"})".to_owned(),
        Atom::Version(..) | Atom::Certificate(..) => format!("x509{{{}}}", condition(atom, "=")),
        Atom::Sha256(_) | Atom::Process(..) => format!("process{{{}}}", condition(atom, "=")),
    }
}

fn condition(atom: &Atom, op: &str) -> String {
    match atom {
        Atom::Version(low, high) if low == high => format!("ver={low}"),
        Atom::Version(low, high) if low > high => "ver<0".to_owned(),
        Atom::Version(0, high) => format!("ver<={high}"),
        Atom::Version(low, u64::MAX) => format!("ver>={low}"),
        Atom::Version(low, high) => format!("ver>={low}, ver<={high}"),
        Atom::Certificate(field, pattern) => format!("{}{op}{}", field.name(), self::pattern(pattern)),
        Atom::Process(field, pattern) => format!("{}{op}{}", field.name(), self::pattern(pattern)),
        Atom::Sha256(hash) => format!("sha256{op}\"{}\"", hex(hash)),
        Atom::Address(_) | Atom::Shown => String::new(),
    }
}

/// A pattern as a string of the language.
pub(crate) fn pattern(pattern: &Pattern) -> String {
    format!("\"{}\"", pattern.content().replace('"', "\\\""))
}

/// A text as a string of the language that matches this text only.
pub(crate) fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('*', "\\*").replace('"', "\\\""))
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn addresses(set: &AddressSet) -> String {
    let v4 = set.v4.iter().map(|(low, high)| range_v4(*low, *high)).collect::<Vec<_>>().join(", ");
    let v6 = set.v6.iter().map(|(low, high)| range_v6(*low, *high)).collect::<Vec<_>>().join(", ");
    match (v4.is_empty(), v6.is_empty()) {
        (_, true) => format!("IPv4{{{v4}}}"),
        (true, false) => format!("IPv6{{{v6}}}"),
        (false, false) => format!("IPv4{{{v4}}} | IPv6{{{v6}}}"),
    }
}

fn range_v4(low: u32, high: u32) -> String {
    let mut prefixes = prefixes_v4(low, high);
    match (prefixes.next(), prefixes.next()) {
        (Some(only), None) if only.prefix_len() == 32 => only.addr().to_string(),
        (Some(only), None) => only.to_string(),
        _ => format!("{}-{}", Ipv4Addr::from(low), Ipv4Addr::from(high)),
    }
}

fn range_v6(low: u128, high: u128) -> String {
    let mut prefixes = prefixes_v6(low, high);
    match (prefixes.next(), prefixes.next()) {
        (Some(only), None) if only.prefix_len() == 128 => only.addr().to_string(),
        (Some(only), None) => only.to_string(),
        _ => format!("{}-{}", Ipv6Addr::from(low), Ipv6Addr::from(high)),
    }
}

/// An address as a principal.
pub(crate) fn address(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => format!("IPv4{{{v4}}}"),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => format!("IPv4{{{v4}}}"),
            None => format!("IPv6{{{v6}}}"),
        },
    }
}

/// A service as policy text, by its IANA name where it has one.
pub(crate) fn service(service: &Service) -> String {
    if service.any {
        return "*".to_owned();
    }
    let one = |p: &services::Ports| match (p.low, p.high) {
        (0, u16::MAX) => protocol_name(p.protocol),
        (low, high) if low == high => services::display(p.protocol, low),
        (low, high) => format!("{}/{low}-{high}", protocol_name(p.protocol)),
    };
    service.ports.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The service of one flow.
pub(crate) fn port(protocol: Protocol, port: u16) -> String {
    services::display(protocol, port)
}

#[cfg(test)]
mod tests {
    #[test]
    fn conditions_on_a_version_are_one() {
        let shown = [
            ("x509{ver>=5} & !x509{ver>=6}", "x509{ver=5}"),
            ("x509{ver>=5} & !x509{ver>=9} & !x509{ver=5}", "x509{ver>=6, ver<=8}"),
            ("x509{ver>=5, ver<=9} & !x509{ver=7}", "x509{ver>=5, ver<=9, ver!=7}"),
            ("x509{ver>=5} & !x509{ver>=3}", "x509{ver<0}"),
            ("x509{ver<=9} & !x509{ver<=4} & !x509{ver=5} & !x509{ver>=8}", "x509{ver>=6, ver<=7}"),
            ("x509{ver>=5} & !x509{ver<3} & x509{name=\"a\"}", "x509{ver>=5, name=\"a\"}"),
            ("!x509{ver>=5}", "!x509{ver>=5}"),
        ];
        for (text, wanted) in shown {
            let loaded = crate::Policy::parse("t.pol", &format!("allow smtp({text}, *);")).unwrap();
            assert_eq!(super::expr(&loaded.policy.rules[0].from), wanted, "{text}");
        }
    }
}
