//! Questions about a policy: who may reach what, and which rules are about something.

use std::{collections::HashSet, net::IpAddr};

use portcullis_types::RuleId;

use crate::{
    check::Example,
    diagnostic::Diagnostics,
    display,
    model::{Address, Atom, Effect, Expr, Rule},
    policy::Policy,
    services::Service,
    source::Span,
    tokens::{self, Kind},
};

/// What is asked: each part given narrows the answer down.
#[derive(Clone, Copy, Debug, Default)]
pub struct Question<'a> {
    /// Who opens, as [`Policy::explain_words`] takes it.
    pub from: Option<&'a str>,
    /// Who accepts.
    pub to: Option<&'a str>,
    /// What for.
    pub service: Option<&'a str>,
}

/// One rule that permits something of what was asked.
#[derive(Clone, Debug)]
pub struct Reach {
    /// The rule.
    pub rule: RuleId,
    /// What it is for, in the language's words.
    pub service: String,
    /// Who may open.
    pub from: String,
    /// Who may be reached.
    pub to: String,
    /// `deny` rules that take something of it away.
    pub except: Vec<RuleId>,
}

impl Policy {
    /// The rules by which something of what is asked is permitted, at a time.
    ///
    /// # Errors
    /// The errors of the texts.
    pub fn reach(&self, question: &Question<'_>, now: u64) -> Result<Vec<Reach>, Diagnostics> {
        let party = |name, text: Option<&str>| text.map(|t| self.party(name, t)).transpose();
        let (from, to) = (party("--from", question.from)?, party("--to", question.to)?);
        let service = question.service.map(|s| self.service_words("--service", s)).transpose()?;
        let concerns = |rule: &Rule| {
            rule.in_force(now)
                && service.as_ref().is_none_or(|s| s.overlaps(&rule.service))
                && may(from.as_ref(), &rule.from)
                && may(to.as_ref(), &rule.to)
        };
        let all: Vec<(RuleId, &Rule)> = self.rules().filter(|(_, rule)| concerns(rule)).collect();
        let denies = all.iter().filter(|(_, r)| r.effect == Effect::Deny && !r.audit);
        let denies: Vec<(RuleId, &Rule)> = denies.copied().collect();
        let mut found = Vec::new();
        for (id, rule) in all.iter().filter(|(_, r)| r.effect == Effect::Allow) {
            let asked = narrowed(&rule.service, service.as_ref());
            let against: Vec<_> = denies.iter().filter(|(_, d)| d.service.overlaps(&asked)).collect();
            let covers = |deny: &Rule| {
                let whole =
                    |party: bool, deny: &Expr, rule: &Expr| party || *deny == Expr::Any || deny == rule;
                deny.service.covers(&asked)
                    && whole(from.is_some(), &deny.from, &rule.from)
                    && whole(to.is_some(), &deny.to, &rule.to)
            };
            if against.iter().any(|(_, deny)| covers(deny)) {
                continue;
            }
            found.push(Reach {
                rule: *id,
                service: display::service(&asked),
                from: question.from.map_or_else(|| display::expr(&rule.from), str::to_owned),
                to: question.to.map_or_else(|| display::expr(&rule.to), str::to_owned),
                except: against.iter().map(|(id, _)| *id).collect(),
            });
        }
        Ok(found)
    }

    /// The rules that name something: a set, a service, a text between quotes, or an address.
    ///
    /// A rule names what the sets in it name. An address is named by every prefix it is in.
    #[must_use]
    pub fn mentions(&self, word: &str) -> Vec<RuleId> {
        let mut words: HashSet<&str> = HashSet::from([word]);
        loop {
            let before = words.len();
            for set in self.names.sets.values() {
                let place = set.name.span.to(set.tree.span());
                if self.words(place).any(|w| words.contains(w)) {
                    words.insert(&set.name.value);
                }
            }
            for service in self.names.services.values() {
                let end = service.items.last().map_or(service.name.span, |i| i.span());
                if self.words(service.name.span.to(end)).any(|w| words.contains(w)) {
                    words.insert(&service.name.value);
                }
            }
            if words.len() == before {
                break;
            }
        }
        let address = word.parse::<IpAddr>().ok().map(|a| Address::new(Some(a)));
        let by_address = |expr: &Expr| {
            expr.mentions(|atom| match (atom, address) {
                (Atom::Address(set), Some(Address::V4(v4))) => set.has_v4(v4),
                (Atom::Address(set), Some(Address::V6(v6))) => set.has_v6(v6),
                _ => false,
            })
        };
        let named = |rule: &Rule| self.words(rule.span).any(|w| words.contains(w));
        let found = self.rules().filter(|(_, r)| named(r) || by_address(&r.from) || by_address(&r.to));
        found.map(|(id, _)| id).collect()
    }

    /// The names, numbers and quoted texts of a place in the policy.
    fn words(&self, span: Span) -> impl Iterator<Item = &str> {
        let source = self.sources.get(crate::source::to_usize(span.file));
        let text = source.map_or("", |s| s.slice(span));
        let found = tokens::tokens(0, text, &mut Diagnostics::default());
        let wanted = found.into_iter().filter(|t| matches!(t.kind, Kind::Name | Kind::Word | Kind::Text));
        wanted.filter_map(move |t| text.get(t.span.range())).map(|w| w.trim_matches('"'))
    }
}

/// Whether a party, if one is given, is what a rule is about.
fn may(party: Option<&Example>, expr: &Expr) -> bool {
    party.is_none_or(|p| p.view().expr(expr, false).allows()) && *expr != Expr::Nothing
}

/// The part of a rule's service that is asked for.
fn narrowed(rule: &Service, asked: Option<&Service>) -> Service {
    match asked {
        Some(asked) if rule.covers(asked) => asked.clone(),
        Some(_) | None => rule.clone(),
    }
}
