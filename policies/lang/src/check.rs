//! The syntax tree to the checked policy: names resolved, values typed. Reports every error.

mod condition;
mod example;

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    sync::Arc,
};

use portcullis_types::Protocol;

pub(crate) use example::{Example, example};

use crate::{
    diagnostic::{Diagnostic, Diagnostics, near, nearest},
    model::{Atom, Effect, Expr, Rule},
    services::{self, Ports, Service},
    source::{Source, Span, to_u32, to_usize},
    syntax::{self, Item, Name, RuleItem, ServiceItem, TestItem},
};

/// A set that, written out, has more parts than this is refused.
const LARGEST: usize = 20_000;
/// Sets defined by sets defined by sets.
const DEEPEST: usize = 64;

/// A policy whose names and values are in order.
pub(crate) struct Checked {
    pub(crate) rules: Vec<Rule>,
    pub(crate) tests: Vec<Test>,
    pub(crate) names: Names,
}

/// A `test` block.
#[derive(Clone, Debug)]
pub(crate) struct Test {
    pub(crate) name: String,
    pub(crate) span: Span,
    pub(crate) expectations: Vec<Expected>,
}

/// One line of a test.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) allow: bool,
    pub(crate) service: Service,
    pub(crate) from: Example,
    pub(crate) to: Example,
    pub(crate) span: Span,
}

/// What the policy calls what.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    pub(crate) sets: HashMap<String, Set>,
    pub(crate) services: HashMap<String, NamedService>,
}

#[derive(Clone, Debug)]
pub(crate) struct Set {
    pub(crate) name: Name,
    pub(crate) tree: syntax::Expr,
    pub(crate) value: Option<Resolved>,
}

/// A formula and what it costs.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    pub(crate) expr: Expr,
    size: usize,
    depth: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct NamedService {
    pub(crate) name: Name,
    pub(crate) items: Vec<ServiceItem>,
    pub(crate) value: Option<(Arc<Service>, bool)>,
}

/// Checks the statements of all files of a policy.
pub(crate) fn check(items: Vec<Item>, sources: &[Source], errors: &mut Diagnostics) -> Checked {
    let mut checker = Checker::new(Names::default(), errors);
    let (mut rules, mut tests) = (Vec::new(), Vec::new());
    for item in items {
        match item {
            Item::Include(_) => {}
            Item::Set { name, value } => checker.define_set(name, value),
            Item::Service { name, items } => checker.define_service(name, items),
            Item::Rule(rule) => rules.push(*rule),
            Item::Test(test) => tests.push(test),
        }
    }
    checker.resolve_all();
    checker.principals.reserve(rules.len());
    let rules = rules.into_iter().filter_map(|r| checker.rule(r, sources)).collect();
    let tests = tests.into_iter().map(|t| checker.test(t)).collect();
    Checked { rules, tests, names: checker.names }
}

/// Resolves a service that stands outside the policy, as on a command line.
pub(crate) fn service(names: &Names, items: &[ServiceItem], errors: &mut Diagnostics) -> Service {
    let mut checker = Checker::new(names.clone(), errors);
    checker.service_items(items).0
}

/// Resolves a principal that stands outside the policy.
pub(crate) fn principal(names: &Names, tree: &syntax::Expr, errors: &mut Diagnostics) -> Option<Expr> {
    let mut checker = Checker::new(names.clone(), errors);
    checker.expr(tree, 0).map(|r| r.expr)
}

struct Checker<'a> {
    names: Names,
    /// What rules have said before, so that equal things are one in memory.
    services: HashMap<Arc<Service>, ()>,
    principals: HashMap<Expr, ()>,
    atoms: HashMap<Arc<Atom>, ()>,
    /// Names being resolved, for cycles.
    open: Vec<Name>,
    errors: &'a mut Diagnostics,
}

impl<'a> Checker<'a> {
    fn new(names: Names, errors: &'a mut Diagnostics) -> Self {
        let (services, principals, atoms) = Default::default();
        Self { names, services, principals, atoms, open: Vec::new(), errors }
    }
}

/// The one that equals it and was kept first.
pub(crate) fn shared<T: Clone + Eq + Hash>(kept: &mut HashMap<T, ()>, value: T) -> T {
    match kept.entry(value) {
        Entry::Occupied(known) => known.key().clone(),
        Entry::Vacant(new) => new.insert_entry(()).key().clone(),
    }
}

impl Checker<'_> {
    fn define_set(&mut self, name: Name, tree: syntax::Expr) {
        if let Some(first) = self.names.sets.get(&name.value) {
            self.errors.push(
                Diagnostic::error(format!("`{}` is defined twice", name.value), name.span)
                    .related("first defined here", first.name.span),
            );
            return;
        }
        self.names.sets.insert(name.value.clone(), Set { name, tree, value: None });
    }

    fn define_service(&mut self, name: Name, items: Vec<ServiceItem>) {
        if services::protocol(&name.value).is_some() || name.value == "related" {
            let error = Diagnostic::error(format!("`{}` is a word of the language", name.value), name.span);
            self.errors.push(error.label("choose another name"));
            return;
        }
        if let Some(first) = self.names.services.get(&name.value) {
            self.errors.push(
                Diagnostic::error(format!("service `{}` is defined twice", name.value), name.span)
                    .related("first defined here", first.name.span),
            );
            return;
        }
        self.names.services.insert(name.value.clone(), NamedService { name, items, value: None });
    }

    /// Resolves what is defined, used or not, so that its errors are seen.
    fn resolve_all(&mut self) {
        let mut sets: Vec<Name> = self.names.sets.values().map(|s| s.name.clone()).collect();
        sets.sort_by_key(|n| (n.span.file, n.span.start));
        for name in sets {
            self.set(&name, 0);
        }
        let mut services: Vec<Name> = self.names.services.values().map(|s| s.name.clone()).collect();
        services.sort_by_key(|n| (n.span.file, n.span.start));
        for name in services {
            self.named_service(&name);
        }
    }

    /// Whether resolving this name would never end; says so.
    fn is_cycle(&mut self, name: &Name) -> bool {
        let Some(at) = self.open.iter().position(|open| open.value == name.value) else { return false };
        let chain: Vec<String> = self.open.iter().skip(at).map(|n| format!("`{}`", n.value)).collect();
        let mut error = Diagnostic::error(format!("`{}` is defined by itself", name.value), name.span);
        if chain.len() > 1 {
            error.help = Some(format!("{} and back", chain.join(" uses ")));
        }
        self.errors.push(error);
        true
    }

    fn set(&mut self, name: &Name, depth: usize) -> Option<Resolved> {
        let Some(set) = self.names.sets.get(&name.value) else {
            self.unknown_set(name);
            return None;
        };
        if let Some(value) = &set.value {
            return Some(value.clone());
        }
        if depth > DEEPEST {
            let error = Diagnostic::error(format!("sets refer to sets more than {DEEPEST} deep"), name.span);
            self.errors.push(error);
            return None;
        }
        let tree = set.tree.clone();
        if self.is_cycle(name) {
            return None;
        }
        self.open.push(name.clone());
        let value = self.expr(&tree, depth + 1);
        self.open.pop();
        // A set that failed is empty from here on, so that its error is reported once.
        let value = value.unwrap_or(Resolved { expr: Expr::Nothing, size: 1, depth: 1 });
        if let Some(set) = self.names.sets.get_mut(&name.value) {
            set.value = Some(value.clone());
        }
        Some(value)
    }

    fn unknown_set(&mut self, name: &Name) {
        let mut error = Diagnostic::error(format!("no set is called `{}`", name.value), name.span);
        if self.errors.is_full() {
            self.errors.push(error);
            return;
        }
        let guess = nearest(&name.value, self.names.sets.keys().map(String::as_str));
        let other = crate::parser::elsewhere(&name.value).filter(|g| g.contains(['*', '{']));
        match guess.and_then(|g| self.names.sets.get(g)) {
            _ if other.is_some() => error.label = other.map(|g| format!("did you mean `{g}`?")),
            Some(set) => {
                error.label = Some(format!("did you mean `{}`?", set.name.value));
                error.related.push(("defined here".to_owned(), set.name.span));
            }
            None => {
                error.help = Some(format!("define it: `{} = x509{{name=\"…\"}};`", name.value));
            }
        }
        self.errors.push(error);
    }

    fn expr(&mut self, tree: &syntax::Expr, depth: usize) -> Option<Resolved> {
        let one = |expr| Some(Resolved { expr, size: 1, depth: 1 });
        let resolved = match tree {
            syntax::Expr::Broken(_) => return None,
            syntax::Expr::Any(_) => return one(Expr::Any),
            syntax::Expr::Named(name) => return self.set(name, depth),
            syntax::Expr::Addresses { v6, words, .. } => return one(self.addresses(*v6, words)),
            syntax::Expr::Attributes { process, list, .. } => {
                let expr = self.attributes(*process, list);
                Resolved { expr, size: list.len() + 1, depth: 2 }
            }
            syntax::Expr::Not(inner, _) => {
                let inner = self.expr(inner, depth)?;
                Resolved { expr: not(inner.expr), size: inner.size + 1, depth: inner.depth + 1 }
            }
            syntax::Expr::And(list) | syntax::Expr::Or(list) => {
                let all: Vec<Option<Resolved>> = list.iter().map(|e| self.expr(e, depth)).collect();
                let all: Vec<Resolved> = all.into_iter().collect::<Option<_>>()?;
                let size = all.iter().fold(1_usize, |n, r| n.saturating_add(r.size));
                let depth = all.iter().map(|r| r.depth).max().unwrap_or(0) + 1;
                let list = all.into_iter().map(|r| r.expr).collect();
                let expr = if matches!(tree, syntax::Expr::And(_)) { and(list) } else { or(list) };
                Resolved { expr, size, depth }
            }
        };
        if resolved.size > LARGEST || resolved.depth > 4 * DEEPEST {
            let message = format!("this set, written out, has more than {LARGEST} parts");
            self.errors.push(Diagnostic::error(message, tree.span()));
            return None;
        }
        Some(resolved)
    }

    fn named_service(&mut self, name: &Name) -> (Arc<Service>, bool) {
        let Some(found) = self.names.services.get(&name.value) else {
            if let Some(ports) = services::iana(&name.value) {
                return (Arc::new(Service::new(false, ports)), false);
            }
            self.unknown_service(name);
            return Default::default();
        };
        if let Some(value) = &found.value {
            return value.clone();
        }
        if self.open.len() > DEEPEST {
            let error =
                Diagnostic::error(format!("services refer to services more than {DEEPEST} deep"), name.span);
            self.errors.push(error);
            return Default::default();
        }
        // `service ftp = ftp, related;` means IANA's own.
        let is_itself = self.open.last().is_some_and(|n| n.value == name.value);
        if let (true, Some(ports)) = (is_itself, services::iana(&name.value)) {
            return (Arc::new(Service::new(false, ports)), false);
        }
        let items = found.items.clone();
        if self.is_cycle(name) {
            return Default::default();
        }
        self.open.push(name.clone());
        let (service, related) = self.service_items(&items);
        self.open.pop();
        let value = (Arc::new(service), related);
        if let Some(found) = self.names.services.get_mut(&name.value) {
            found.value = Some(value.clone());
        }
        value
    }

    fn unknown_service(&mut self, name: &Name) {
        let mut error = Diagnostic::error(format!("no service is called `{}`", name.value), name.span);
        if self.errors.is_full() {
            self.errors.push(error);
            return;
        }
        let usual: Vec<&str> =
            self.names.services.keys().map(String::as_str).chain(services::names()).collect();
        // Of two that are equally near, the one that people use.
        let guess = match (near(&name.value, usual.into_iter()), near(&name.value, services::rare_names())) {
            (Some(usual), Some(rare)) if rare.0 < usual.0 => Some(rare.1),
            (usual, rare) => usual.or(rare).map(|found| found.1),
        };
        let guess = services::common_name(&name.value).or(guess).map(str::to_owned);
        match guess {
            Some(guess) => error.label = Some(format!("did you mean `{guess}`?")),
            None => error.help = Some(format!("define it: `service {} = tcp/PORT;`", name.value)),
        }
        self.errors.push(error);
    }

    fn service_items(&mut self, items: &[ServiceItem]) -> (Service, bool) {
        let (mut any, mut related, mut ports) = (false, false, Vec::new());
        for item in items {
            match item {
                ServiceItem::Any(_) => any = true,
                ServiceItem::Related(_) => related = true,
                ServiceItem::Broken(_) => {}
                ServiceItem::Named(name) => {
                    let (service, also) = self.named_service(name);
                    any |= service.any;
                    related |= also;
                    ports.extend_from_slice(&service.ports);
                }
                ServiceItem::Protocol { protocol, ports: range } => {
                    let Some(number) = services::protocol(&protocol.value) else {
                        self.unknown_protocol(protocol);
                        continue;
                    };
                    ports.extend(self.port_range(number, protocol, range.as_ref()));
                }
            }
        }
        (Service::new(any, ports), related)
    }

    fn port_range(
        &mut self,
        number: Protocol,
        protocol: &Name,
        range: Option<&syntax::Spanned<(u16, u16)>>,
    ) -> Option<Ports> {
        let (low, high) = range.map_or((0, u16::MAX), |r| r.value);
        if let (false, Some(range)) = (number.has_ports(), range) {
            let error = Diagnostic::error(format!("`{}` has no ports", protocol.value), range.span);
            self.errors.push(error.label(format!("write `{}` alone", protocol.value)));
            return None;
        }
        Some(Ports { protocol: number, low, high })
    }

    fn unknown_protocol(&mut self, protocol: &Name) {
        let known = ["tcp", "udp", "sctp", "udplite", "icmp", "icmpv6", "raw", "igmp", "gre", "esp", "ah"];
        let mut error = Diagnostic::error(format!("unknown protocol `{}`", protocol.value), protocol.span);
        let is_service = self.names.services.contains_key(&protocol.value)
            || services::iana(&protocol.value).is_some_and(|ports| !ports.is_empty());
        match nearest(&protocol.value, known.into_iter()) {
            _ if is_service => {
                error.label = Some("this is a service, which has its ports: write it alone".to_owned());
            }
            Some(guess) => error.label = Some(format!("did you mean `{guess}`?")),
            None => error.help = Some("others are written by number: `ip-47`".to_owned()),
        }
        self.errors.push(error);
    }

    fn rule(&mut self, item: RuleItem, sources: &[Source]) -> Option<Rule> {
        let (service, related) = self.service_items(&item.services);
        let from = self.expr(&item.from, 0);
        let to = self.expr(&item.to, 0);
        let options = item.options;
        if !item.allow {
            let wrong = [
                (options.lane.as_ref().map(|l| l.span), "a `deny` has no lane"),
                (options.related, "a `deny` opens no related channels"),
            ];
            for (span, message) in wrong {
                if let Some(span) = span {
                    self.errors.push(Diagnostic::error(message, span).label("remove this"));
                }
            }
        }
        let source = sources.get(to_usize(item.span.file))?;
        let text = |name: Option<Name>| name.map(|n| Arc::from(crate::tokens::plain(&n.value)));
        let (line, _) = source.position(item.span.start);
        Some(Rule {
            name: text(options.name),
            description: text(options.description),
            text: source.slice(item.span).into(),
            file: Arc::clone(&source.name),
            line: to_u32(line),
            effect: if item.allow { Effect::Allow } else { Effect::Deny },
            related: item.allow && (related || options.related.is_some()),
            lane: options.lane.map(|l| l.value),
            audit: options.audit.is_some(),
            expires: options.expires.map(|d| d.value.end()),
            span: item.span,
            service: shared(&mut self.services, Arc::new(service)),
            from: shared(&mut self.principals, from?.expr),
            to: shared(&mut self.principals, to?.expr),
        })
    }

    fn test(&mut self, item: TestItem) -> Test {
        let mut expectations = Vec::new();
        for line in item.expectations {
            let (service, _) = self.service_items(&line.services);
            // A service that something is wrong with has no ports either, and that has been said.
            if service.any || (service.ports.is_empty() && !self.errors.has_errors()) {
                let error = Diagnostic::error("a test is about one service", line.service_span);
                self.errors.push(error.label("such as `smtp` or `tcp/25`"));
            }
            let from = example(&self.names, &line.from, self.errors);
            let to = example(&self.names, &line.to, self.errors);
            if let (Some(from), Some(to)) = (from, to) {
                expectations.push(Expected { allow: line.allow, service, from, to, span: line.span });
            }
        }
        Test { name: crate::tokens::plain(&item.name.value), span: item.name.span, expectations }
    }
}

/// `!`, in its shortest form.
pub(crate) fn not(expr: Expr) -> Expr {
    match expr {
        Expr::Any => Expr::Nothing,
        Expr::Nothing => Expr::Any,
        Expr::Not(inner) => (*inner).clone(),
        other => Expr::Not(Arc::new(other)),
    }
}

/// `&`, flat, sorted, without repetition.
pub(crate) fn and(list: Vec<Expr>) -> Expr {
    let inner = |expr: &Expr| if let Expr::And(inner) = expr { Some(Arc::clone(inner)) } else { None };
    join(list, &Expr::Any, &Expr::Nothing, inner, Expr::And)
}

/// `|`, flat, sorted, without repetition.
pub(crate) fn or(list: Vec<Expr>) -> Expr {
    let inner = |expr: &Expr| if let Expr::Or(inner) = expr { Some(Arc::clone(inner)) } else { None };
    join(list, &Expr::Nothing, &Expr::Any, inner, Expr::Or)
}

/// What `&` and `|` have in common: `neutral` drops out, `decisive` is the whole, and operands of the same
/// kind are taken apart (`inner`) before the rest is put together again (`whole`).
fn join(
    list: Vec<Expr>,
    neutral: &Expr,
    decisive: &Expr,
    inner: impl Fn(&Expr) -> Option<Arc<[Expr]>>,
    whole: impl FnOnce(Arc<[Expr]>) -> Expr,
) -> Expr {
    let mut flat = Vec::with_capacity(list.len());
    for expr in list {
        if expr == *decisive {
            return expr;
        }
        match inner(&expr) {
            Some(operands) => flat.extend(operands.iter().cloned()),
            None if expr == *neutral => {}
            None => flat.push(expr),
        }
    }
    if flat.len() > 1 {
        flat.sort();
        flat.dedup();
    }
    match (flat.len(), flat.pop()) {
        (1, Some(only)) => only,
        (_, None) => neutral.clone(),
        (_, Some(last)) => {
            flat.push(last);
            whole(flat.into())
        }
    }
}
