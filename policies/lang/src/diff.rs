//! What changes between two policies: flows, not words.
//!
//! A flow can only be decided otherwise if it matches a rule that one policy has and the other has
//! not. So each such rule is taken as a box of flows, and cut along the conditions of the other rules
//! until both policies are of one mind in each piece. A piece on which they differ is reported, with
//! a flow in it on which both were evaluated. The cutting is exact; where it would take too long, it
//! stops and says so.

mod pieces;
mod witness;

use std::{collections::HashMap, sync::Arc};

use portcullis_types::{Protocol, RuleId};

use crate::{
    check::Example,
    display,
    model::{Atom, Effect, Expr, Rule, merge},
    policy::Policy,
    services::{Ports, Service},
    source::{to_u32, to_usize},
};
use pieces::{Piece, Sat};

/// All that changes between two policies.
#[derive(Clone, Debug)]
pub struct Diff {
    /// Flows that are decided otherwise, as regions.
    pub changes: Vec<Change>,
    /// Whether the regions are all there is, and differ throughout. If not, [`Diff::limits`] says why.
    pub exact: bool,
    /// What could not be told in bounded time, in words.
    pub limits: Vec<String>,
}

/// A region of flows that are decided otherwise.
#[derive(Clone, Debug)]
pub struct Change {
    /// Refused before and permitted now; else the other way round.
    pub widens: bool,
    /// The region, in the language's words.
    pub service: String,
    /// Who opens.
    pub from: String,
    /// Who accepts.
    pub to: String,
    /// Whether every flow of the region is decided otherwise; else some are, the example among them.
    pub exact: bool,
    /// What decided before.
    pub old_rule: Option<RuleId>,
    /// What decides now.
    pub new_rule: Option<RuleId>,
    /// A flow of the region, as `policy explain` takes it.
    pub example: ExampleFlow,
    #[cfg(test)]
    pub(crate) piece: Piece,
}

/// One flow, as `policy explain` takes it.
#[derive(Clone, Debug)]
pub struct ExampleFlow {
    /// Who opens.
    pub from: String,
    /// Who accepts.
    pub to: String,
    /// What for.
    pub service: String,
}

impl Diff {
    /// Whether some flow that was refused is now permitted.
    #[must_use]
    pub fn widens(&self) -> bool {
        self.changes.iter().any(|c| c.widens)
    }
}

/// A formula over numbered conditions.
#[derive(Clone, Debug)]
pub(crate) enum Form {
    Any,
    Nothing,
    Atom(u32),
    Not(Box<Form>),
    And(Vec<Form>),
    Or(Vec<Form>),
}

/// A rule of either policy, or of both.
#[derive(Debug)]
struct Candidate {
    allow: bool,
    old: bool,
    new: bool,
    service: Vec<(u32, u32)>,
    from: Form,
    to: Form,
}

/// Conditions by number.
#[derive(Debug, Default)]
pub(crate) struct Atoms {
    numbers: HashMap<Arc<Atom>, u32>,
    pub(crate) all: Vec<Arc<Atom>>,
    /// The only text that a condition's pattern matches, if there is but one.
    texts: Vec<Option<String>>,
    /// Steps spent in search of texts.
    work: std::cell::Cell<usize>,
}

impl Atoms {
    fn form(&mut self, expr: &Expr) -> Form {
        match expr {
            Expr::Any => Form::Any,
            Expr::Nothing => Form::Nothing,
            Expr::Atom(atom) => {
                let next = to_u32(self.all.len());
                let number = *self.numbers.entry(Arc::clone(atom)).or_insert(next);
                if number == next {
                    let text = match &**atom {
                        Atom::Certificate(_, pattern) | Atom::Process(_, pattern) => pattern.literal(),
                        _ => None,
                    };
                    self.texts.push(text.and_then(|bytes| String::from_utf8(bytes).ok()));
                    self.all.push(Arc::clone(atom));
                }
                Form::Atom(number)
            }
            Expr::Not(inner) => Form::Not(Box::new(self.form(inner))),
            Expr::And(list) => Form::And(list.iter().map(|e| self.form(e)).collect()),
            Expr::Or(list) => Form::Or(list.iter().map(|e| self.form(e)).collect()),
        }
    }
}

/// Steps for all rules together, and for one rule, before the cutting stops.
const MOST_STEPS: usize = 8_000_000;
const MOST_STEPS_EACH: usize = 1_000_000;
/// Regions of one rule.
const MOST_PIECES: usize = 256;

/// Compares two policies as they stand at a time.
#[must_use]
pub fn diff(old: &Policy, new: &Policy, now: u64) -> Diff {
    diff_with_atoms(old, new, now).0
}

#[cfg(test)]
pub(crate) use pieces::End;

/// Whether certainly nobody fulfils a formula. Looks only where conditions could stand against each
/// other.
pub(crate) fn is_empty(expr: &Expr) -> bool {
    let Expr::And(list) = expr else {
        return match expr {
            Expr::Nothing => true,
            Expr::Atom(atom) => matches!(**atom, Atom::Version(low, high) if low > high),
            Expr::Or(list) => list.iter().all(is_empty),
            _ => false,
        };
    };
    let kind = |expr: &Expr| match expr {
        Expr::Atom(atom) => Some(match &**atom {
            Atom::Address(_) => (0, None, None),
            Atom::Shown | Atom::Version(..) => (1, None, None),
            Atom::Certificate(field, _) => (2, Some(*field), None),
            Atom::Sha256(_) => (3, None, None),
            Atom::Process(field, _) => (4, None, Some(*field)),
        }),
        _ => None,
    };
    let mut kinds: Vec<_> = list.iter().map(kind).collect();
    kinds.sort();
    let alone = kinds.iter().all(Option::is_some) && kinds.windows(2).all(|w| w.first() != w.last());
    if alone && !list.iter().any(is_empty) {
        return false;
    }
    let mut atoms = Atoms::default();
    let form = atoms.form(expr);
    pieces::nobody(&form, &atoms)
}

/// The same, with the conditions that its pieces name by number.
pub(crate) fn diff_with_atoms(old: &Policy, new: &Policy, now: u64) -> (Diff, Vec<Arc<Atom>>) {
    let mut atoms = Atoms::default();
    let mut places: HashMap<(Effect, Arc<Service>, Expr, Expr), usize> = HashMap::new();
    let mut candidates: Vec<Candidate> = Vec::new();
    for (policy, is_new) in [(old, false), (new, true)] {
        for rule in policy.rules.iter().filter(|r| r.in_force(now)) {
            if rule.effect == Effect::Deny && rule.audit {
                continue;
            }
            let key = (rule.effect, Arc::clone(&rule.service), rule.from.clone(), rule.to.clone());
            let place = *places.entry(key).or_insert_with(|| {
                candidates.push(candidate(rule, &mut atoms));
                candidates.len() - 1
            });
            if let Some(candidate) = candidates.get_mut(place) {
                if is_new { candidate.new = true } else { candidate.old = true }
            }
        }
    }
    let mut search = Search {
        old,
        new,
        now,
        atoms,
        candidates,
        meeting: HashMap::new(),
        steps: 0,
        found: Vec::new(),
        limits: Vec::new(),
    };
    search.run();
    let mut limits = search.limits;
    limits.sort();
    limits.dedup();
    (Diff { exact: limits.is_empty(), changes: search.found, limits }, search.atoms.all)
}

fn candidate(rule: &Rule, atoms: &mut Atoms) -> Candidate {
    Candidate {
        allow: rule.effect == Effect::Allow,
        old: false,
        new: false,
        service: service_ranges(&rule.service),
        from: atoms.form(&rule.from),
        to: atoms.form(&rule.to),
    }
}

/// A service as ranges of protocol and port in one number.
fn service_ranges(service: &Service) -> Vec<(u32, u32)> {
    let range = |protocol: Protocol, low: u16, high: u16| {
        let base = u32::from(protocol.0) << 16;
        if protocol.has_ports() { (base | u32::from(low), base | u32::from(high)) } else { (base, base) }
    };
    if service.any {
        return merge((0..=u8::MAX).map(|p| range(Protocol(p), 0, u16::MAX)).collect());
    }
    let contained = service.ports.iter().filter(|p| p.protocol.has_ports() || p.low == 0);
    merge(contained.map(|p| range(p.protocol, p.low, p.high)).collect())
}

/// The inverse of [`service_ranges`].
fn service_text(ranges: &[(u32, u32)]) -> String {
    let all = Service { any: true, ports: Vec::new() };
    if *ranges == service_ranges(&all) {
        return "*".to_owned();
    }
    let others = complement(&service_ranges(&all), ranges);
    if others.len() * 4 < ranges.len() {
        return format!("* except {}", service_list(&others));
    }
    service_list(ranges)
}

fn complement(all: &[(u32, u32)], ranges: &[(u32, u32)]) -> Vec<(u32, u32)> {
    pieces::minus(all, ranges)
}

fn service_list(ranges: &[(u32, u32)]) -> String {
    let mut ports = Vec::new();
    for (low, high) in ranges {
        for protocol in (low >> 16)..=(high >> 16) {
            let Ok(number) = u8::try_from(protocol) else { continue };
            let protocol = Protocol(number);
            let base = u32::from(number) << 16;
            let (from, to) = ((*low).max(base) - base, (*high).min(base | 0xffff) - base);
            let (Ok(low), Ok(high)) = (u16::try_from(from), u16::try_from(to)) else { continue };
            let (low, high) = if protocol.has_ports() { (low, high) } else { (0, u16::MAX) };
            ports.push(Ports { protocol, low, high });
        }
    }
    display::service(&Service { any: false, ports })
}

/// A service that people recognise, if there is a choice.
fn usual_port(ranges: &[(u32, u32)]) -> Option<u32> {
    let has = |n: &u32| ranges.iter().any(|(low, high)| (low..=high).contains(&n));
    let tcp = 6 << 16;
    let usual = [443, 80, 22, 25, 8080, 5000, 1].map(|port| tcp | port);
    let first = |from: u32| ranges.iter().map(|(low, _)| *low).find(|low| *low >= from);
    usual.into_iter().find(has).or_else(|| first(tcp | 1)).or_else(|| first(0))
}

/// How one policy stands on a piece.
#[derive(Clone, Copy, Default)]
struct Tally {
    deny: bool,
    allow: bool,
    /// A rule that holds in a part of the piece only.
    open_deny: Option<usize>,
    open_allow: Option<usize>,
}

impl Tally {
    fn add(&mut self, number: usize, allow: bool, truth: Option<bool>) {
        match (truth, allow) {
            (Some(true), true) => self.allow = true,
            (Some(true), false) => self.deny = true,
            (None, true) => self.open_allow = Some(number),
            (None, false) => self.open_deny = Some(number),
            (Some(false), _) => {}
        }
    }

    /// Whether the piece is permitted, or the rule on which that depends.
    fn verdict(&self) -> Result<bool, usize> {
        match (self.deny, self.open_deny, self.allow, self.open_allow) {
            (true, ..) | (_, _, false, None) => Ok(false),
            (_, Some(rule), true, _) | (_, None, false, Some(rule)) => Err(rule),
            // Whether anything allows comes first: without it the denial does not matter.
            (_, Some(_), false, Some(rule)) => Err(rule),
            (_, None, true, _) => Ok(true),
        }
    }
}

struct Search<'a> {
    old: &'a Policy,
    new: &'a Policy,
    now: u64,
    atoms: Atoms,
    candidates: Vec<Candidate>,
    /// The candidates for some of the same ports, by service.
    meeting: HashMap<Vec<(u32, u32)>, Vec<usize>>,
    steps: usize,
    found: Vec<Change>,
    limits: Vec<String>,
}

impl Search<'_> {
    fn run(&mut self) {
        let changed: Vec<usize> =
            self.candidates.iter().enumerate().filter(|(_, c)| c.old != c.new).map(|(i, _)| i).collect();
        for (n, seed) in changed.iter().enumerate() {
            // What an earlier changed rule is about was dealt with there.
            self.seed(*seed, changed.get(..n).unwrap_or_default());
        }
    }

    fn seed(&mut self, seed: usize, earlier: &[usize]) {
        let Some(candidate) = self.candidates.get(seed) else { return };
        let whole = Piece::new(candidate.service.clone());
        let others = match self.meeting.get(&whole.service) {
            Some(known) => known.clone(),
            None => {
                let meets = |i: &usize| {
                    self.candidates.get(*i).is_some_and(|c| pieces::meet(&c.service, &whole.service))
                };
                let found: Vec<usize> = (0..self.candidates.len()).filter(meets).collect();
                self.meeting.insert(whole.service.clone(), found.clone());
                found
            }
        };
        let budget = (self.steps + MOST_STEPS_EACH).min(MOST_STEPS);
        let mut pieces = 0;
        let mut stack = vec![(whole, others)];
        while let Some((piece, others)) = stack.pop() {
            self.steps += self.atoms.work.take();
            if self.steps > budget || pieces >= MOST_PIECES {
                stack.push((piece, others));
                self.give_up(seed, &stack);
                return;
            }
            pieces += usize::from(self.cut(piece, others, seed, earlier, &mut stack));
        }
    }

    /// Reports a piece, drops it, or cuts it in two. Whether it was reported.
    fn cut(
        &mut self,
        piece: Piece,
        mut others: Vec<usize>,
        seed: usize,
        earlier: &[usize],
        stack: &mut Vec<(Piece, Vec<usize>)>,
    ) -> bool {
        self.steps += others.len() + 1;
        let truth = |i: usize| {
            self.candidates
                .get(i)
                .map_or(Some(false), |c| piece.rule(&c.service, &c.from, &c.to, &self.atoms))
        };
        match truth(seed) {
            Some(false) => return false,
            // First into the rule itself.
            None => {
                self.split(&piece, &others, seed, stack);
                return false;
            }
            Some(true) => {}
        }
        let mut tallies = [Tally::default(); 2];
        let mut dealt_with = false;
        others.retain(|i| {
            let Some(candidate) = self.candidates.get(*i) else { return false };
            let truth = truth(*i);
            dealt_with |= truth == Some(true) && earlier.binary_search(i).is_ok();
            let [old, new] = &mut tallies;
            if candidate.old {
                old.add(*i, candidate.allow, truth);
            }
            if candidate.new {
                new.add(*i, candidate.allow, truth);
            }
            truth != Some(false)
        });
        if dealt_with {
            return false;
        }
        let [old, new] = tallies.map(|t| t.verdict());
        match (old, new) {
            (Ok(before), Ok(after)) if before == after => false,
            (Ok(_), Ok(after)) => self.report(&piece, after, None),
            (Err(rule), _) | (_, Err(rule)) => {
                self.split(&piece, &others, rule, stack);
                false
            }
        }
    }

    /// Cuts a piece where a rule that holds in part of it begins or ends.
    fn split(&mut self, piece: &Piece, others: &[usize], rule: usize, stack: &mut Vec<(Piece, Vec<usize>)>) {
        let Some(candidate) = self.candidates.get(rule) else { return };
        for half in piece.halves(&candidate.service, &candidate.from, &candidate.to, &self.atoms) {
            match half.satisfiable(&self.atoms) {
                Sat::No => {}
                Sat::Yes(..) => stack.push((half, others.to_vec())),
                Sat::Unknown => {
                    self.limits.push("some patterns are too many to tell whether they overlap".to_owned())
                }
            }
        }
    }

    /// Reports a piece with a flow in it, unless that flow is not decided otherwise after all.
    fn report(&mut self, piece: &Piece, widens: bool, whole: Option<usize>) -> bool {
        let Sat::Yes(from, to) = piece.satisfiable(&self.atoms) else { return false };
        let Some(first) = usual_port(&piece.service) else { return false };
        let (Ok(protocol), Ok(port)) = (u8::try_from(first >> 16), u16::try_from(first & 0xffff)) else {
            return false;
        };
        let protocol = Protocol(protocol);
        let decide = |policy: &Policy| policy.decide_example(&from, &to, protocol, port, self.now);
        let (before, after) = (decide(self.old), decide(self.new));
        let differs = before.permits() != after.permits();
        if !differs || after.permits() != widens {
            if whole.is_none() {
                self.limits
                    .push("a region could not be confirmed by a flow in it, and is left out".to_owned());
            }
            return false;
        }
        let rule = whole.and_then(|n| self.candidates.get(n));
        let [service, from_text, to_text] = match rule {
            Some(c) => [service_text(&c.service), self.atoms.text(&c.from), self.atoms.text(&c.to)],
            None => [service_text(&piece.service), piece.from.text(&self.atoms), piece.to.text(&self.atoms)],
        };
        self.found.push(Change {
            widens,
            service,
            from: from_text,
            to: to_text,
            exact: whole.is_none(),
            old_rule: before.rule,
            new_rule: after.rule,
            example: ExampleFlow {
                from: example_text(&from),
                to: example_text(&to),
                service: example_service(protocol, port),
            },
            #[cfg(test)]
            piece: piece.clone(),
        });
        true
    }

    /// Reports a rule whose region would take too long to cut out: all of it, and what is known.
    fn give_up(&mut self, seed: usize, left: &[(Piece, Vec<usize>)]) {
        self.limits
            .push("the regions of some rules are too many to be told apart; they are given whole".to_owned());
        for widens in [true, false] {
            let pieces = left.iter().rev().take(64);
            let _found = pieces.into_iter().any(|(piece, _)| self.report(piece, widens, Some(seed)));
        }
    }
}

impl Atoms {
    /// A formula as policy text.
    fn text(&self, form: &Form) -> String {
        display::expr(&self.expr(form))
    }

    fn expr(&self, form: &Form) -> Expr {
        match form {
            Form::Any => Expr::Any,
            Form::Nothing => Expr::Nothing,
            Form::Atom(n) => self.all.get(to_usize(*n)).map_or(Expr::Nothing, |a| Expr::Atom(Arc::clone(a))),
            Form::Not(inner) => crate::check::not(self.expr(inner)),
            Form::And(list) => crate::check::and(list.iter().map(|f| self.expr(f)).collect()),
            Form::Or(list) => crate::check::or(list.iter().map(|f| self.expr(f)).collect()),
        }
    }
}

fn example_service(protocol: Protocol, port: u16) -> String {
    let name = crate::services::protocol_name(protocol);
    if protocol.has_ports() { format!("{name}/{port}") } else { name }
}

/// A party as `policy explain` takes it.
fn example_text(example: &Example) -> String {
    let mut parts = Vec::new();
    let text = |name: &str, text: &str| format!("{name}={}", display::quoted(text));
    if let Some(facts) = &example.certificate {
        let mut list: Vec<String> = facts.names.iter().map(|n| text("name", n)).collect();
        list.extend(facts.groups.iter().map(|g| text("group", g)));
        list.extend(facts.ver.map(|v| format!("ver={v}")));
        let others = [
            ("org", &facts.org),
            ("process", &facts.process),
            ("unit", &facts.unit),
            ("user", &facts.user),
            ("issuer", &facts.issuer),
        ];
        list.extend(others.into_iter().filter_map(|(name, value)| value.as_ref().map(|v| text(name, v))));
        parts.push(format!("x509{{{}}}", list.join(", ")));
    }
    if example.has_process {
        let facts = &example.process;
        let mut list = Vec::new();
        if let crate::facts::Fact::Known(exe) = &facts.exe {
            list.push(text("exe", exe));
        }
        if let crate::facts::Fact::Known(sha256) = &facts.sha256
            && *sha256 != [0; 32]
        {
            list.push(format!("sha256=\"{}\"", display::hex(sha256)));
        }
        if !facts.user.is_empty() {
            list.push(text("user", &facts.user));
        }
        list.extend(facts.groups.iter().map(|g| text("group", g)));
        list.extend(facts.unit.as_ref().map(|u| text("unit", u)));
        if !facts.cmdline.is_empty() {
            list.push(text("cmdline", &facts.cmdline));
        }
        for ancestor in &facts.ancestors {
            if let crate::facts::Fact::Known(path) = ancestor {
                list.push(text("ancestor", path));
            }
        }
        parts.push(format!("process{{{}}}", list.join(", ")));
    }
    parts.extend(example.address.map(display::address));
    if parts.is_empty() { "*".to_owned() } else { parts.join(" & ") }
}
