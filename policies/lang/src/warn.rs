//! What is legal and surely not meant. A warning never keeps a policy from being put in force.

mod characters;
mod links;

use std::{collections::HashMap, sync::Arc};

pub(crate) use characters::characters;
pub(crate) use links::links;

use crate::{
    check::{Checked, and, not},
    diagnostic::{Diagnostic, Diagnostics},
    diff::is_empty,
    display,
    model::{Atom, Effect, Expr, Rule},
    parser::{self, RuleParts},
    services::{Ports, Service},
    source::{Source, Span, to_usize},
    syntax,
};

/// A rule that expires within so many seconds is worth a word: 30 days.
const SOON: u64 = 30 * 86_400;
/// Ports that are many.
const MANY: u32 = 1024;
/// Pairs of rules that are compared in search of denials that hide a rule.
const MOST_PAIRS: usize = 500_000;
/// Pairs that are looked at more closely.
const MOST_EXACT: usize = 500;

/// Looks at the rules; `now`, in seconds since the Unix epoch, if it is known.
pub(crate) fn warn(checked: &Checked, sources: &[Source], now: Option<u64>, out: &mut Diagnostics) {
    for rule in &checked.rules {
        // Of what is only counted no exact place is needed.
        let sources = if out.is_full() { &[] } else { sources };
        impossible(rule, sources, out);
        everything(rule, sources, out);
        expiring(rule, sources, now, out);
        missing_lane(rule, sources, out);
    }
    equal(&checked.rules, out);
    same_name(&checked.rules, sources, out);
    hidden(&checked.rules, out);
    weaker(&checked.rules, sources, out);
}

/// The part of a rule that is meant. Read from its text once more, as few rules are warned of.
fn place_of(rule: &Rule, sources: &[Source], part: impl Fn(&RuleParts) -> Option<Span>) -> Span {
    let source = sources.get(to_usize(rule.span.file));
    let parts = source.and_then(|source| parser::rule_parts(source, rule.span));
    parts.as_ref().and_then(part).unwrap_or(rule.span)
}

/// A rule that no flow can match.
fn impossible(rule: &Rule, sources: &[Source], out: &mut Diagnostics) {
    let no_service = !rule.service.any && rule.service.ports.is_empty();
    if no_service {
        let place = place_of(rule, sources, |parts| Some(parts.service));
        out.push(Diagnostic::warning("this rule can never match", place).label("its service is empty"));
        return;
    }
    for (end, (side, expr)) in [("FROM", &rule.from), ("TO", &rule.to)].into_iter().enumerate() {
        let place = || place_of(rule, sources, |parts| parts.ends.get(end).map(syntax::Expr::span));
        let nobody = expr.mentions(|a| matches!(a, Atom::Version(low, high) if low > high));
        if *expr == Expr::Nothing {
            let warning = Diagnostic::warning("this rule can never match", place());
            out.push(
                warning
                    .label(format!("{side} is an empty set, which nothing is in"))
                    .help("whoever shows a certificate is `x509{name=\"*\"}`; everyone is `*`"),
            );
        } else if is_empty(expr) {
            let warning = Diagnostic::warning("this rule can never match", place());
            let why = if nobody || admits_nobody(expr) {
                format!("{side}: no certificate has such a `ver`")
            } else {
                format!("{side}: nobody fulfils all of {}", display::expr(expr))
            };
            out.push(warning.label(why));
        } else if nobody {
            let warning = Diagnostic::warning("this `ver` admits nobody", place());
            out.push(warning.label(format!("in {side}")));
        }
    }
}

/// Whether the versions asked for have nothing in common.
fn admits_nobody(expr: &Expr) -> bool {
    let Expr::And(list) = expr else { return false };
    let (mut low, mut high) = (0, u64::MAX);
    for part in list.iter() {
        if let Expr::Atom(atom) = part
            && let Atom::Version(from, to) = **atom
        {
            (low, high) = (low.max(from), high.min(to));
        }
    }
    low > high
}

/// How many ports a service has; of a protocol that has none, it is one.
fn port_count(service: &Service) -> u32 {
    if service.any {
        return u32::MAX;
    }
    let count = |p: &Ports| if p.protocol.has_ports() { u32::from(p.high) - u32::from(p.low) + 1 } else { 1 };
    service.ports.iter().map(count).fold(0, u32::saturating_add)
}

/// `*` towards many services.
fn everything(rule: &Rule, sources: &[Source], out: &mut Diagnostics) {
    if rule.effect == Effect::Deny || port_count(&rule.service) < MANY {
        return;
    }
    let label = match (rule.from == Expr::Any, rule.to == Expr::Any) {
        (true, true) => "anyone may reach anyone",
        (true, false) => "anyone may open these",
        (false, true) => "these may be opened to anyone",
        (false, false) => return,
    };
    let what = if rule.service.any { "every protocol and port" } else { "very many ports" };
    let place = place_of(rule, sources, |parts| Some(parts.service));
    let warning = Diagnostic::warning(format!("this rule allows {what}"), place);
    out.push(warning.label(label).help("name the services that are meant"));
}

fn expiring(rule: &Rule, sources: &[Source], now: Option<u64>, out: &mut Diagnostics) {
    let (Some(end), Some(now)) = (rule.expires, now) else { return };
    let place = || place_of(rule, sources, |parts| Some(parts.options.expires.as_ref()?.span));
    if end <= now {
        let warning = Diagnostic::warning("this rule has expired", place());
        out.push(warning.label("it has no force any more").help("take it out, or give it a later date"));
    } else if end - now <= SOON {
        let days = (end - now).div_ceil(86_400);
        let warning = Diagnostic::warning("this rule expires soon", place());
        out.push(warning.label(format!("in {days} day{}", if days == 1 { "" } else { "s" })));
    }
}

/// A lane that no host has: what asks for it is refused.
fn missing_lane(rule: &Rule, sources: &[Source], out: &mut Diagnostics) {
    let Some(lane) = rule.lane.filter(|lane| !lane.is_available()) else { return };
    let place = place_of(rule, sources, |parts| Some(parts.options.lane.as_ref()?.span));
    let warning = Diagnostic::warning(format!("no host has the lane `{lane}` yet"), place);
    out.push(
        warning
            .label("all that this rule decides is refused")
            .help("`using tls` is mutual TLS 1.3 on any host"),
    );
}

/// Two rules of one name: verdicts would not say which.
fn same_name(rules: &[Rule], sources: &[Source], out: &mut Diagnostics) {
    let mut first: HashMap<&str, &Rule> = HashMap::new();
    let place = |rule: &Rule, sources: &[Source]| {
        place_of(rule, sources, |parts| Some(parts.options.name.as_ref()?.span))
    };
    for rule in rules {
        let Some(name) = rule.name.as_deref() else { continue };
        if let Some(before) = first.get(name) {
            let sources = if out.is_full() { &[] } else { sources };
            out.push(
                Diagnostic::warning(format!("two rules are called `{name}`"), place(rule, sources))
                    .label("verdicts do not tell them apart by name")
                    .related("the other one", place(before, sources)),
            );
        } else {
            first.insert(name, rule);
        }
    }
}

/// Services of one policy that are equal are one in memory.
fn place(service: &Arc<Service>) -> usize {
    Arc::as_ptr(service).addr()
}

/// Two rules that say the same.
fn equal(rules: &[Rule], out: &mut Diagnostics) {
    let mut first: HashMap<_, &Rule> = HashMap::with_capacity(rules.len());
    for rule in rules {
        let options = (rule.audit, rule.lane, rule.related, rule.expires);
        let key = (rule.effect, place(&rule.service), rule.from.place(), rule.to.place(), options);
        match first.get(&key) {
            Some(before) => out.push(
                Diagnostic::warning("this rule says what another one says", rule.span)
                    .label("it changes nothing")
                    .related("the other one", before.span),
            ),
            None => {
                first.insert(key, rule);
            }
        }
    }
}

/// An `allow` that can never count, because a `deny` stands against all of it.
fn hidden(rules: &[Rule], out: &mut Diagnostics) {
    let denies = rules.iter().filter(|r| r.effect == Effect::Deny && !r.audit);
    let denies: Vec<&Rule> = denies.collect();
    let (mut room, mut exact) = (MOST_PAIRS, MOST_EXACT);
    let mut by_service: HashMap<usize, Vec<&Rule>> = HashMap::new();
    for rule in rules.iter().filter(|r| r.effect == Effect::Allow) {
        let denies = by_service.entry(place(&rule.service)).or_insert_with(|| {
            room = room.saturating_sub(denies.len());
            denies.iter().filter(|deny| deny.service.covers(&rule.service)).copied().collect()
        });
        if room == 0 || room < denies.len() {
            return;
        }
        room -= denies.len();
        let lasts = |deny: &Rule| deny.expires.is_none_or(|end| rule.expires.is_some_and(|e| e <= end));
        let covers =
            |deny: &&&Rule| contains(&deny.from, &rule.from) && contains(&deny.to, &rule.to) && lasts(deny);
        let mut deny = denies.iter().find(covers);
        if deny.is_none() {
            // What a glance does not tell may be told by looking for anybody who is left.
            let mut left = |outer: &Expr, inner: &Expr| {
                exact = exact.saturating_sub(1);
                exact > 0 && is_empty(&and(vec![inner.clone(), not(outer.clone())]))
            };
            deny = denies.iter().find(|deny| {
                let (from, to) = (contains(&deny.from, &rule.from), contains(&deny.to, &rule.to));
                (from || to)
                    && lasts(deny)
                    && (from || left(&deny.from, &rule.from))
                    && (to || left(&deny.to, &rule.to))
            });
        }
        if let Some(deny) = deny {
            out.push(
                Diagnostic::warning("this rule never counts", rule.span)
                    .label("all of it is denied")
                    .related("denied here; a `deny` beats every `allow`, wherever it stands", deny.span),
            );
        }
    }
}

/// Whether whoever fulfils the second formula fulfils the first, as far as that is seen at a glance.
fn contains(outer: &Expr, inner: &Expr) -> bool {
    if *outer == Expr::Any || outer == inner || *inner == Expr::Nothing {
        return true;
    }
    match (outer, inner) {
        (Expr::And(list), inner) => list.iter().all(|e| contains(e, inner)),
        (Expr::Or(list), inner) if list.iter().any(|e| contains(e, inner)) => true,
        (outer, Expr::Or(list)) => list.iter().all(|e| contains(outer, e)),
        (outer, Expr::And(list)) => list.iter().any(|e| contains(outer, e)),
        (Expr::Atom(outer), Expr::Atom(inner)) => atom_contains(outer, inner),
        _ => false,
    }
}

fn atom_contains(outer: &Atom, inner: &Atom) -> bool {
    match (outer, inner) {
        (Atom::Address(a), Atom::Address(b)) => {
            let v4 = b.v4.iter().all(|(low, high)| a.v4.iter().any(|(l, h)| l <= low && high <= h));
            v4 && b.v6.iter().all(|(low, high)| a.v6.iter().any(|(l, h)| l <= low && high <= h))
        }
        (Atom::Version(a, b), Atom::Version(c, d)) => a <= c && d <= b,
        (Atom::Certificate(f, a), Atom::Certificate(g, b)) if f == g => pattern_contains(a, b),
        (Atom::Process(f, a), Atom::Process(g, b)) if f == g => pattern_contains(a, b),
        _ => false,
    }
}

fn pattern_contains(outer: &crate::pattern::Pattern, inner: &crate::pattern::Pattern) -> bool {
    let text = || inner.literal().and_then(|b| String::from_utf8(b).ok());
    outer.is_any() || text().is_some_and(|t| outer.matches(&t))
}

/// What kinds of condition prove a party: by certificate, by address.
fn proofs(expr: &Expr) -> (bool, bool) {
    let certificate = |a: &Atom| matches!(a, Atom::Shown | Atom::Version(..) | Atom::Certificate(..));
    (expr.mentions(certificate), expr.mentions(|a| matches!(a, Atom::Address(_))))
}

/// An `allow` by address beside one by certificate for the same.
fn weaker(rules: &[Rule], sources: &[Source], out: &mut Diagnostics) {
    let allows = rules.iter().filter(|r| r.effect == Effect::Allow);
    let ends = |rule: &Rule| [(proofs(&rule.from), true), (proofs(&rule.to), false)];
    let allows: Vec<_> = allows.map(|rule| (rule, ends(rule))).collect();
    let key = |rule: &Rule, is_from: bool| {
        (place(&rule.service), is_from, if is_from { &rule.to } else { &rule.from }.place())
    };
    if !allows.iter().any(|(_, ends)| ends.iter().any(|((_, address), _)| *address)) {
        return;
    }
    let mut strong: HashMap<_, &Rule> = HashMap::new();
    for (rule, ends) in &allows {
        for ((certificate, _), is_from) in ends {
            if *certificate {
                strong.entry(key(rule, *is_from)).or_insert(rule);
            }
        }
    }
    for (rule, ends) in allows {
        for ((certificate, address), is_from) in ends {
            if certificate || !address {
                continue;
            }
            if let Some(other) = strong.get(&key(rule, is_from)) {
                let side = if is_from { "FROM" } else { "TO" };
                let sources = if out.is_full() { &[] } else { sources };
                let place = place_of(rule, sources, |parts| {
                    let [from, to] = &parts.ends;
                    Some(if is_from { from } else { to }.span())
                });
                out.push(
                    Diagnostic::warning(
                        "this rule trusts an address where another asks for a certificate",
                        place,
                    )
                    .label(format!("{side} is proven by its address alone"))
                    .related("by certificate here", other.span),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_protocol_without_ports_has_not_very_many() {
        let said = |service: &str| {
            let text = format!("allow {service}(*, x509{{name=\"a\"}});");
            crate::load::parse_untested("t.pol", &text, None).unwrap().warnings.to_string()
        };
        assert_eq!(said("icmp, tcp/1-9"), "");
        assert!(said("icmp, tcp").contains("very many ports"));
    }

    /// What is said of a rule that expires at the end of 2027-01-31, so many seconds before that.
    fn said(seconds: u64) -> String {
        let text = "allow ssh(*, x509{name=\"a\"}) expires 2027-01-31;\n";
        crate::load::parse_untested("t.pol", text, Some(1_801_440_000 - seconds))
            .unwrap()
            .warnings
            .to_string()
    }

    #[test]
    fn a_rule_is_warned_of_for_thirty_days_before_it_expires() {
        assert_eq!(said(30 * 86_400 + 1), "");
        assert!(said(30 * 86_400).contains("^^^^^^^^^^ in 30 days\n"), "{}", said(30 * 86_400));
        assert!(said(1).contains("this rule expires soon") && said(1).contains(" in 1 day\n"));
        assert!(said(0).contains("this rule has expired"));
    }
}
