//! What changes between two policies: flows, not words.
//!
//! A flow can only be decided otherwise if it matches a rule that one policy has and the other has
//! not. So each such rule is taken as a box of flows, and cut along the conditions of the other rules
//! until both policies are of one mind in each piece. A piece on which they differ is reported, with
//! a flow in it on which both were evaluated. A rule that would fall into many pieces is reported in one,
//! less what other rules take off ([`whole`]). Both are exact; where it cannot be told whether patterns
//! leave room for anybody, that is said.

mod pieces;
mod whole;
mod witness;
mod words;

use std::{collections::HashMap, sync::Arc};

use portcullis_types::{Protocol, RuleId};

use crate::{
    check::Example,
    model::{Atom, Effect, Expr, Rule, merge},
    policy::Policy,
    services::Service,
    source::to_u32,
};
use pieces::{Piece, Sat};
use words::{example_service, example_text, service_text};

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
    /// Only flows that one of these rules allows are of the region, if any are named.
    pub among: Vec<RuleOf>,
    /// Flows that one of these rules is about are not of the region.
    pub except: Vec<RuleOf>,
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
    /// The rule that the region is of, if it is given whole.
    #[cfg(test)]
    pub(crate) whole: Option<RuleOf>,
}

/// A rule of one of the two policies.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RuleOf {
    /// Of the new policy; else of the old one.
    pub new: bool,
    /// Its number there.
    pub rule: RuleId,
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
    /// Its number in each policy that has it: the first, if it says the same twice.
    old: Option<RuleId>,
    new: Option<RuleId>,
    service: Vec<(u32, u32)>,
    from: Form,
    to: Form,
    hulls: [Option<Hull>; 2],
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

/// Steps of cutting, for all rules together and for one.
const MOST_STEPS: usize = 20_000_000;
const MOST_STEPS_EACH: usize = 20_000;
/// Pieces of one rule; more are not told apart by anyone who reads them.
const MOST_PIECES: usize = 24;
/// Other rules that are about a part of a piece; each of them cuts it at least once.
const MOST_OPEN: usize = 64;

/// Compares two policies as they stand at a time.
#[must_use]
pub fn diff(old: &Policy, new: &Policy, now: u64) -> Diff {
    diff_in_pieces(old, new, now, MOST_PIECES).0
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
    // A bit for each kind of condition; conditions of different kinds cannot stand against each other.
    let kind = |expr: &Expr| match expr {
        Expr::Atom(atom) => Some(match &**atom {
            Atom::Address(_) => 0,
            Atom::Shown | Atom::Version(..) => 1,
            Atom::Sha256(_) => 2,
            Atom::Certificate(field, _) => 3 + *field as u32,
            Atom::Process(field, _) => 16 + *field as u32,
        }),
        _ => None,
    };
    let mut kinds = 0_u32;
    let alone = list.iter().all(|expr| {
        let bit = kind(expr).map_or(0, |kind| 1 << kind);
        let is_new = bit & !kinds != 0;
        kinds |= bit;
        is_new
    });
    if alone && !list.iter().any(is_empty) {
        return false;
    }
    let mut atoms = Atoms::default();
    let form = atoms.form(expr);
    pieces::nobody(&form, &atoms)
}

/// The same, with at most so many pieces of one rule, and the conditions that they name by number.
pub(crate) fn diff_in_pieces(old: &Policy, new: &Policy, now: u64, most: usize) -> (Diff, Vec<Arc<Atom>>) {
    let mut atoms = Atoms::default();
    let mut places: HashMap<(Effect, Arc<Service>, Expr, Expr), usize> = HashMap::new();
    let mut candidates: Vec<Candidate> = Vec::new();
    let mut numbers = [vec![usize::MAX; old.rules.len()], vec![usize::MAX; new.rules.len()]];
    for ((policy, numbers), is_new) in [old, new].into_iter().zip(&mut numbers).zip([false, true]) {
        for ((id, rule), number) in policy.rules().zip(numbers) {
            if !rule.in_force(now) || (rule.effect == Effect::Deny && rule.audit) {
                continue;
            }
            let key = (rule.effect, Arc::clone(&rule.service), rule.from.clone(), rule.to.clone());
            *number = *places.entry(key).or_insert_with(|| {
                candidates.push(candidate(rule, &mut atoms));
                candidates.len() - 1
            });
            if let Some(candidate) = candidates.get_mut(*number) {
                let _kept = if is_new { &mut candidate.new } else { &mut candidate.old }.get_or_insert(id);
            }
        }
    }
    let mut search = Search {
        old,
        new,
        now,
        atoms,
        candidates,
        numbers,
        meeting: HashMap::new(),
        most,
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
        old: None,
        new: None,
        service: service_ranges(&rule.service),
        from: atoms.form(&rule.from),
        to: atoms.form(&rule.to),
        hulls: [Hull::of(&rule.from), Hull::of(&rule.to)],
    }
}

/// The first and last IPv4 address of which a formula can hold, if it asks for IPv4 addresses: the quick
/// way to tell that two rules have nothing to do with each other.
#[derive(Clone, Copy, Debug)]
struct Hull(u32, u32);

impl Hull {
    fn of(expr: &Expr) -> Option<Self> {
        match expr {
            Expr::Atom(atom) => match &**atom {
                Atom::Address(set) if set.v6.is_empty() => Some(Self(set.v4.first()?.0, set.v4.last()?.1)),
                _ => None,
            },
            Expr::And(list) => list.iter().find_map(Self::of),
            _ => None,
        }
    }

    /// Whether no address of an end is in it.
    fn misses(self, end: &pieces::End) -> bool {
        let v4 = &end.addresses.v4;
        v4.first().is_none_or(|r| r.0 > self.1) || v4.last().is_none_or(|r| r.1 < self.0)
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

/// A flow of which everything is known.
pub(crate) struct ExampleOf {
    from: Box<Example>,
    to: Box<Example>,
    protocol: Protocol,
    port: u16,
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
    /// The candidate of each rule of the old policy, and of the new.
    numbers: [Vec<usize>; 2],
    /// The candidates for some of the same ports, by service.
    meeting: HashMap<Vec<(u32, u32)>, Arc<[usize]>>,
    /// Pieces of one rule.
    most: usize,
    steps: usize,
    found: Vec<Change>,
    limits: Vec<String>,
}

/// What cutting did to a piece.
enum Cut {
    /// It was reported.
    Reported,
    /// It is as before, is empty, or is cut in two.
    Dealt,
    /// What is in it cannot be told.
    Doubtful,
}

impl Search<'_> {
    fn run(&mut self) {
        let is_changed = |c: &Candidate| c.old.is_some() != c.new.is_some();
        let changed = self.candidates.iter().enumerate().filter(|(_, c)| is_changed(c));
        let changed: Vec<usize> = changed.map(|(i, _)| i).collect();
        // What is in the box of an earlier rule that was cut to the end was dealt with there.
        let mut earlier: Vec<usize> = Vec::new();
        for seed in changed {
            let Some(candidate) = self.candidates.get(seed) else { continue };
            let service = candidate.service.clone();
            let others = self.meeting(&service);
            let kept = self.found.len();
            if self.pieces(seed, &others, &earlier) {
                earlier.push(seed);
            } else {
                self.found.truncate(kept);
                self.whole(seed, &others);
            }
        }
    }

    /// The candidates for some of the same ports.
    fn meeting(&mut self, service: &[(u32, u32)]) -> Arc<[usize]> {
        if let Some(known) = self.meeting.get(service) {
            return Arc::clone(known);
        }
        let meets = |i: &usize| self.candidates.get(*i).is_some_and(|c| pieces::meet(&c.service, service));
        let found: Arc<[usize]> = (0..self.candidates.len()).filter(meets).collect();
        self.meeting.insert(service.to_vec(), Arc::clone(&found));
        found
    }

    /// Cuts a rule's box into pieces. Whether that came to an end.
    fn pieces(&mut self, seed: usize, others: &[usize], earlier: &[usize]) -> bool {
        let Some(whole) = self.box_of(seed) else { return true };
        let budget = (self.steps + MOST_STEPS_EACH).min(MOST_STEPS);
        let mut pieces = 0;
        let mut stack = vec![(whole, others.to_vec())];
        while let Some((piece, others)) = stack.pop() {
            self.steps += self.atoms.work.take();
            if self.steps > budget || pieces >= self.most {
                return false;
            }
            match self.cut(piece, others, seed, earlier, &mut stack) {
                Cut::Reported => pieces += 1,
                Cut::Dealt => {}
                Cut::Doubtful => return false,
            }
        }
        true
    }

    /// A rule's box, as far as its conditions are joined by `&`.
    fn box_of(&self, number: usize) -> Option<Piece> {
        let candidate = self.candidates.get(number)?;
        let piece = Piece::new(candidate.service.clone());
        Some(piece.laid(&candidate.from, &candidate.to, &self.atoms))
    }

    fn truth(&self, piece: &Piece, number: usize) -> Option<bool> {
        let Some(candidate) = self.candidates.get(number) else { return Some(false) };
        let [from, to] = candidate.hulls;
        if from.is_some_and(|h| h.misses(&piece.from)) || to.is_some_and(|h| h.misses(&piece.to)) {
            return Some(false);
        }
        piece.rule(&candidate.service, &candidate.from, &candidate.to, &self.atoms)
    }

    /// Reports a piece, drops it, or cuts it in two.
    fn cut(
        &mut self,
        piece: Piece,
        others: Vec<usize>,
        seed: usize,
        earlier: &[usize],
        stack: &mut Vec<(Piece, Vec<usize>)>,
    ) -> Cut {
        match self.truth(&piece, seed) {
            Some(false) => return Cut::Dealt,
            // First into the rule itself.
            None => return self.split(&piece, &others, seed, stack),
            Some(true) => {}
        }
        self.steps += others.len() + 1;
        let mut tallies = [Tally::default(); 2];
        let (mut dealt_with, mut open) = (false, 0);
        let mut meets = Vec::with_capacity(MOST_OPEN);
        for i in others {
            let (truth, Some(candidate)) = (self.truth(&piece, i), self.candidates.get(i)) else { continue };
            dealt_with |= truth == Some(true) && earlier.binary_search(&i).is_ok();
            open += usize::from(truth.is_none());
            let [old, new] = &mut tallies;
            if candidate.old.is_some() {
                old.add(i, candidate.allow, truth);
            }
            if candidate.new.is_some() {
                new.add(i, candidate.allow, truth);
            }
            if truth != Some(false) {
                meets.push(i);
            }
            if open > MOST_OPEN {
                return Cut::Doubtful;
            }
        }
        if dealt_with {
            return Cut::Dealt;
        }
        let [old, new] = tallies.map(|t| t.verdict());
        match (old, new) {
            (Ok(before), Ok(after)) if before == after => Cut::Dealt,
            (Ok(_), Ok(after)) => self.report_piece(&piece, after),
            (Err(rule), _) | (_, Err(rule)) => self.split(&piece, &meets, rule, stack),
        }
    }

    /// Cuts a piece where a rule that holds in part of it begins or ends.
    fn split(
        &mut self,
        piece: &Piece,
        others: &[usize],
        rule: usize,
        stack: &mut Vec<(Piece, Vec<usize>)>,
    ) -> Cut {
        let Some(candidate) = self.candidates.get(rule) else { return Cut::Dealt };
        for half in piece.halves(&candidate.service, &candidate.from, &candidate.to, &self.atoms) {
            match half.satisfiable(&self.atoms) {
                Sat::No => {}
                Sat::Yes(..) => stack.push((half, others.to_vec())),
                Sat::Unknown => return Cut::Doubtful,
            }
        }
        Cut::Dealt
    }

    fn report_piece(&mut self, piece: &Piece, widens: bool) -> Cut {
        let Some(flow) = piece.flow(&self.atoms) else { return Cut::Doubtful };
        let words = [service_text(&piece.service), piece.from.text(&self.atoms), piece.to.text(&self.atoms)];
        if self.report(piece, &flow, widens, words) { Cut::Reported } else { Cut::Doubtful }
    }

    /// Reports a region with a flow in it, unless that flow is not decided otherwise after all.
    #[cfg_attr(not(test), expect(unused_variables, reason = "tests look at pieces"))]
    fn report(&mut self, piece: &Piece, flow: &ExampleOf, widens: bool, words: [String; 3]) -> bool {
        let ExampleOf { from, to, protocol, port } = flow;
        let decide = |policy: &Policy| policy.decide_example(from, to, *protocol, *port, self.now);
        let (before, after) = (decide(self.old), decide(self.new));
        if before.permits() == after.permits() || after.permits() != widens {
            return false;
        }
        let [service, from_text, to_text] = words;
        self.found.push(Change {
            widens,
            service,
            from: from_text,
            to: to_text,
            among: Vec::new(),
            except: Vec::new(),
            exact: true,
            old_rule: before.rule,
            new_rule: after.rule,
            example: ExampleFlow {
                from: example_text(from),
                to: example_text(to),
                service: example_service(*protocol, *port),
            },
            #[cfg(test)]
            piece: piece.clone(),
            #[cfg(test)]
            whole: None,
        });
        true
    }
}
