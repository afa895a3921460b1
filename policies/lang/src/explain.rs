//! Why a flow is decided as it is.

use portcullis_types::{Protocol, RuleId, Verdict};

use crate::{
    decide::decide,
    decision::Decision,
    display,
    facts::{CertificateFact, CertificateFacts, Fact, Flow, Party, ProcessFact, ProcessFacts, Side},
    model::{Atom, CertificateField, Effect, Expr, ProcessField, Rule, Truth},
    policy::Policy,
    source::to_u32,
    view::View,
};

/// Why a flow is decided as it is, and what would permit it.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// What [`Policy::evaluate`] says.
    pub decision: Decision,
    /// The `allow` rules that came nearest without matching, nearest first; at most five.
    pub near: Vec<NearMiss>,
    /// The smallest rule that would permit exactly this flow, to paste into the policy; none if it
    /// is permitted, or if a `deny` stands against it, which no rule can overrule.
    pub permit_with: Option<String>,
}

/// A rule that did not match, and the first condition that it failed on.
#[derive(Clone, Debug)]
pub struct NearMiss {
    /// The rule.
    pub rule: RuleId,
    /// In words: what the rule wants and what the flow has.
    pub failed: String,
    /// How many conditions it failed on; most near misses fail on one.
    pub failures: u32,
}

/// One flow as conditions see it.
#[derive(Clone, Copy)]
pub(crate) struct Question<'a> {
    pub(crate) from: View<'a>,
    pub(crate) to: View<'a>,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
    pub(crate) now: u64,
    pub(crate) far: Side,
}

impl<'a> Question<'a> {
    pub(crate) fn of(flow: &Flow<'a>) -> Self {
        let (from, to) = (View::of(flow, Side::From), View::of(flow, Side::To));
        Self { from, to, protocol: flow.protocol, port: flow.port, now: flow.now, far: flow.far }
    }

    pub(crate) fn flow(&self) -> Flow<'a> {
        Flow {
            from: &Party::UNKNOWN,
            to: &Party::UNKNOWN,
            protocol: self.protocol,
            port: self.port,
            now: self.now,
            far: self.far,
        }
    }
}

/// Most near misses shown.
const SHOWN: usize = 5;

/// Explains one flow; `service` is what it is for, and may be more ports that are decided alike.
pub(crate) fn explain(policy: &Policy, question: &Question<'_>, service: &str) -> Explanation {
    let far = if question.far == Side::To { &question.to } else { &question.from };
    let matches = policy.matches(&question.flow(), &question.from, &question.to);
    let decision = decide(&matches, far, question.far, |id| policy.get(id));
    if decision.verdict != Verdict::Refuse {
        return Explanation { decision, near: Vec::new(), permit_with: None };
    }
    let mut near: Vec<(u32, NearMiss)> = Vec::new();
    if decision.rule.is_none() {
        for (i, rule) in policy.rules.iter().enumerate() {
            let worst = near.get(SHOWN - 1).map_or(u32::MAX, |(far, _)| *far);
            if rule.effect == Effect::Deny || worst <= 1 {
                continue;
            }
            let Some((far, failures, failed)) = failures(rule, question, service, worst) else { continue };
            near.push((far, NearMiss { rule: RuleId(to_u32(i)), failed, failures }));
            near.sort_by_key(|(far, _)| *far);
            near.truncate(SHOWN);
        }
    }
    let near = near.into_iter().map(|(_, miss)| miss).collect();
    let permit_with = decision.rule.is_none().then(|| permitting(question, service));
    Explanation { decision, near, permit_with }
}

/// A rule for another service is as far off as one that fails on so many more conditions.
const OTHER_SERVICE: u32 = 3;

/// How far off a rule is, how many conditions it fails on, and the first in words; `None` if as far as
/// `worst` or further.
fn failures(rule: &Rule, question: &Question<'_>, service: &str, worst: u32) -> Option<(u32, u32, String)> {
    let in_force = rule.in_force(question.now);
    let is_for = rule.service.contains(question.protocol, question.port);
    let from = distance(&rule.from, &question.from, false);
    let to = distance(&rule.to, &question.to, false);
    let count = u32::from(!in_force) + u32::from(!is_for) + from + to;
    let far = count + if is_for { 0 } else { OTHER_SERVICE };
    if count == 0 || far >= worst {
        return None;
    }
    let failed = if !in_force {
        "it has expired".to_owned()
    } else if from > 0 {
        describe(&rule.from, &question.from, "FROM")
    } else if to > 0 {
        describe(&rule.to, &question.to, "TO")
    } else {
        format!("it is for {}, and this is {service}", display::service(&rule.service))
    };
    Some((far, count, failed))
}

/// The least number of conditions that would have to be otherwise for a formula to hold.
fn distance(expr: &Expr, view: &View<'_>, negated: bool) -> u32 {
    match expr {
        Expr::Any => u32::from(negated),
        Expr::Nothing => u32::from(!negated),
        Expr::Atom(atom) => u32::from(!view.atom(atom, negated).allows()),
        Expr::Not(inner) => distance(inner, view, !negated),
        Expr::And(list) | Expr::Or(list) => {
            let all = list.iter().map(|e| distance(e, view, negated));
            if matches!(expr, Expr::And(_)) == negated {
                all.min().unwrap_or(1)
            } else {
                all.fold(0, u32::saturating_add)
            }
        }
    }
}

fn describe(expr: &Expr, view: &View<'_>, side: &str) -> String {
    let Some((atom, negated)) = culprit(expr, view, false) else {
        return format!("{side} is empty: nothing is in it");
    };
    let wanted = display::atom(atom);
    let not = if negated { "not " } else { "" };
    format!("{side} must {not}be {wanted}, and {}", has(atom, view, negated))
}

/// The first condition that keeps a formula from holding, along the branch that came nearest.
fn culprit<'e>(expr: &'e Expr, view: &View<'_>, negated: bool) -> Option<(&'e Atom, bool)> {
    match expr {
        Expr::Any | Expr::Nothing => None,
        Expr::Atom(atom) => (!view.atom(atom, negated).allows()).then_some((&**atom, negated)),
        Expr::Not(inner) => culprit(inner, view, !negated),
        Expr::And(list) | Expr::Or(list) => {
            if matches!(expr, Expr::And(_)) == negated {
                let nearest = list.iter().min_by_key(|e| distance(e, view, negated));
                nearest.and_then(|e| culprit(e, view, negated))
            } else {
                list.iter().find_map(|e| culprit(e, view, negated))
            }
        }
    }
}

/// What a party has instead of what a condition wants.
fn has(atom: &Atom, view: &View<'_>, negated: bool) -> String {
    let truth = view.atom(atom, negated);
    match atom {
        Atom::Address(_) => match view.address {
            crate::model::Address::V4(v4) => format!("it is {}", std::net::Ipv4Addr::from(v4)),
            crate::model::Address::V6(v6) => format!("it is {}", std::net::Ipv6Addr::from(v6)),
            crate::model::Address::Unknown => "its address is not known".to_owned(),
            crate::model::Address::Absent => "no address is given".to_owned(),
        },
        Atom::Shown | Atom::Version(..) | Atom::Certificate(..) => match view.certificate {
            CertificateFact::None => "it shows no certificate".to_owned(),
            CertificateFact::Pending => "its certificate has yet to be shown".to_owned(),
            CertificateFact::Shown(facts) => certificate(atom, facts),
        },
        Atom::Sha256(_) | Atom::Process(..) => match view.process {
            _ if truth == Truth::UNKNOWN => "that could not be established".to_owned(),
            ProcessFact::Known(facts) => process(atom, facts),
            ProcessFact::UserOnly { uid, user } => format!("its user is {} ({uid})", display::quoted(user)),
            ProcessFact::Unknown => match view.certificate {
                CertificateFact::Shown(_) => "its certificate says otherwise, or nothing".to_owned(),
                _ => "the process of another host is seen by its certificate alone".to_owned(),
            },
        },
    }
}

fn list(texts: &[String]) -> String {
    if texts.is_empty() {
        return "none".to_owned();
    }
    texts.iter().map(|t| display::quoted(t)).collect::<Vec<_>>().join(", ")
}

fn certificate(atom: &Atom, facts: &CertificateFacts) -> String {
    let one = |text: &Option<String>| text.as_deref().map_or("none".to_owned(), display::quoted);
    let Atom::Certificate(field, _) = atom else {
        return facts.ver.map_or("it has no ver".to_owned(), |ver| format!("its ver is {ver}"));
    };
    let value = match field {
        CertificateField::Name => list(&facts.names),
        CertificateField::Group => list(&facts.groups),
        CertificateField::Org => one(&facts.org),
        CertificateField::Process => one(&facts.process),
        CertificateField::Unit => one(&facts.unit),
        CertificateField::User => one(&facts.user),
        CertificateField::Issuer => one(&facts.issuer),
    };
    format!("its {} is {value}", field.name())
}

fn process(atom: &Atom, facts: &ProcessFacts) -> String {
    let path = |fact: &Fact<String>| match fact {
        Fact::Known(path) if path.is_empty() => "not given".to_owned(),
        Fact::Known(path) => display::quoted(path),
        Fact::Unknown => "unknown".to_owned(),
    };
    let Atom::Process(field, _) = atom else { return "its sha256 is another".to_owned() };
    let value = match field {
        ProcessField::Exe => path(&facts.exe),
        ProcessField::User if facts.user.is_empty() && facts.uid == u32::MAX => "not given".to_owned(),
        ProcessField::User => display::quoted(&facts.user),
        ProcessField::Group => list(&facts.groups),
        ProcessField::Unit => facts.unit.as_deref().map_or("none".to_owned(), display::quoted),
        ProcessField::Cmdline => display::quoted(&facts.cmdline),
        ProcessField::Ancestor => facts.ancestors.iter().map(path).collect::<Vec<_>>().join(", "),
    };
    format!("its {} is {value}", field.name())
}

/// The smallest rule that would permit a flow.
fn permitting(question: &Question<'_>, service: &str) -> String {
    let from = principal(&question.from, question.far == Side::From);
    let to = principal(&question.to, question.far == Side::To);
    format!("allow {service}({from}, {to});")
}

/// The narrowest principal that the facts of a party fulfil.
fn principal(view: &View<'_>, far: bool) -> String {
    let mut parts = Vec::new();
    if let CertificateFact::Shown(facts) = view.certificate {
        let mut conditions: Vec<String> =
            facts.names.iter().take(1).map(|n| format!("name={}", display::quoted(n))).collect();
        if let Some(process) = facts.process.as_ref().filter(|_| far) {
            conditions.push(format!("process={}", display::quoted(process)));
        }
        if !conditions.is_empty() {
            parts.push(format!("x509{{{}}}", conditions.join(", ")));
        }
    }
    let mut process = Vec::new();
    match view.process {
        ProcessFact::Known(facts) => {
            if let Fact::Known(exe) = &facts.exe
                && !exe.is_empty()
            {
                process.push(format!("exe={}", display::quoted(exe)));
            }
            if facts.uid != u32::MAX || !facts.user.is_empty() {
                process.push(format!("user={}", user(facts.uid, &facts.user)));
            }
        }
        ProcessFact::UserOnly { uid, user } => process.push(format!("user={}", self::user(uid, user))),
        ProcessFact::Unknown => {}
    }
    if !process.is_empty() {
        parts.push(format!("process{{{}}}", process.join(", ")));
    }
    if parts.is_empty() {
        match view.address {
            crate::model::Address::V4(v4) => {
                parts.push(display::address(std::net::Ipv4Addr::from(v4).into()))
            }
            crate::model::Address::V6(v6) => {
                parts.push(display::address(std::net::Ipv6Addr::from(v6).into()))
            }
            _ => {}
        }
    }
    if parts.is_empty() { "*".to_owned() } else { parts.join(" & ") }
}

fn user(uid: u32, name: &str) -> String {
    if name.is_empty() { format!("\"{uid}\"") } else { display::quoted(name) }
}
