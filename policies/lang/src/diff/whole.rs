//! A changed rule as one region, less what other rules take off.
//!
//! A flow that becomes allowed matches an `allow` of the new policy and none of its `deny`. Before, either
//! no `allow` matched it: then that `allow` is new. Or a `deny` did: then that `deny` is gone. So of a new
//! `allow`, that which no old `allow` and no new `deny` is about; and of a `deny` that is gone, that which
//! some new `allow` and no new `deny` is about: these together are what becomes allowed, no more and no
//! less. What becomes refused is the same with the policies in the other order.

use super::{
    ExampleOf, RuleOf, Search,
    pieces::{Piece, Sat},
    words::service_text,
};
use crate::{policy::Policy, source::to_usize};

/// Steps in search of flows, for all rules together and for one.
const MOST_STEPS: usize = 200_000_000;
const MOST_STEPS_EACH: usize = 8_000_000;

/// Whether there is a flow.
enum Found {
    Flow(Box<ExampleOf>),
    Nobody,
    Unknown,
}

impl Search<'_> {
    /// Reports a changed rule as one region, if anything of it changes.
    pub(super) fn whole(&mut self, seed: usize, others: &[usize]) {
        let (Some(candidate), Some(whole)) = (self.candidates.get(seed), self.box_of(seed)) else { return };
        let allow = candidate.allow;
        // Something becomes allowed by an `allow` that is new, or for want of a `deny` that is gone.
        let widens = candidate.new.is_some() == allow;
        let meets: Vec<usize> =
            others.iter().copied().filter(|i| *i != seed && self.truth(&whole, *i) != Some(false)).collect();
        let of = |number: &usize, new: bool, allows: bool| {
            let candidate = self.candidates.get(*number).filter(|c| c.allow == allows)?;
            let rule = if new { candidate.new } else { candidate.old }?;
            Some(RuleOf { new, rule })
        };
        // `widens` is also which policy permits these flows: the new one, or else the old.
        let denies = meets.iter().filter_map(|i| of(i, widens, false));
        let (mut among, mut except): (Vec<RuleOf>, Vec<RuleOf>) = (Vec::new(), denies.collect());
        #[cfg(test)]
        let own = of(&seed, widens == allow, allow);
        let mut partners = Vec::new();
        if allow {
            except.extend(meets.iter().filter_map(|i| of(i, !widens, true)));
        } else {
            partners.extend(meets.iter().copied().filter(|i| of(i, widens, true).is_some()));
            among.extend(partners.iter().filter_map(|i| of(i, widens, true)));
        }
        let words = [
            service_text(&candidate.service),
            self.atoms.text(&candidate.from),
            self.atoms.text(&candidate.to),
        ];
        let budget = (self.steps + MOST_STEPS_EACH).min(MOST_STEPS);
        let mut unknown = false;
        // What a `deny` was about may all be denied still, by others.
        if !allow && matches!(self.flow(&whole, &[seed], allow, widens, budget), Found::Nobody) {
            return;
        }
        let tries: Vec<Vec<usize>> = match allow {
            true => vec![vec![seed]],
            false => partners.into_iter().map(|partner| vec![seed, partner]).collect(),
        };
        for wanted in tries {
            match self.flow(&whole, &wanted, allow, widens, budget) {
                Found::Nobody => {}
                Found::Unknown => unknown = true,
                Found::Flow(flow) if self.report(&whole, &flow, widens, words.clone()) => {
                    if let Some(change) = self.found.last_mut() {
                        (change.among, change.except) = (among, except);
                        #[cfg(test)]
                        {
                            change.whole = own;
                        }
                    }
                    return;
                }
                Found::Flow(_) => unknown = true,
            }
        }
        if unknown {
            let limit = "some patterns are too many to tell whether anybody is left by them";
            self.limits.push(limit.to_owned());
        }
    }

    /// A flow of a piece that all of some rules are about and, of those that take off from it, none.
    fn flow(&mut self, whole: &Piece, wanted: &[usize], allow: bool, widens: bool, budget: usize) -> Found {
        let mut stack = vec![whole.clone()];
        let mut unknown = false;
        while let Some(piece) = stack.pop() {
            self.steps += self.atoms.work.take() + 64;
            if self.steps > budget {
                return Found::Unknown;
            }
            let truths = wanted.iter().map(|rule| (*rule, self.truth(&piece, *rule)));
            let open = truths.filter(|(_, truth)| *truth != Some(true)).min_by_key(|(_, t)| t.is_none());
            match open {
                Some((_, Some(_))) => continue,
                Some((rule, None)) => {
                    self.halve(&piece, rule, true, &mut stack);
                    continue;
                }
                None => {}
            }
            let flow = match piece.satisfiable(&self.atoms) {
                Sat::No => continue,
                Sat::Yes(..) => piece.flow(&self.atoms),
                Sat::Unknown => None,
            };
            let Some(flow) = flow else {
                unknown = true;
                continue;
            };
            let Some(rule) = self.taken_off(&flow, allow, widens) else {
                return Found::Flow(Box::new(flow));
            };
            match self.truth(&piece, rule) {
                // All of the piece is taken off.
                Some(true) => {}
                None => self.halve(&piece, rule, false, &mut stack),
                Some(false) => unknown = true,
            }
        }
        if unknown { Found::Unknown } else { Found::Nobody }
    }

    /// Cuts a piece in two; the half in which the rule is more, or less, likely to hold is looked at first.
    fn halve(&self, piece: &Piece, rule: usize, inside: bool, stack: &mut Vec<Piece>) {
        let Some(candidate) = self.candidates.get(rule) else { return };
        let mut halves = piece.halves(&candidate.service, &candidate.from, &candidate.to, &self.atoms);
        if inside {
            halves.reverse();
        }
        stack.append(&mut halves);
    }

    /// A rule that takes a flow off the region.
    fn taken_off(&self, flow: &ExampleOf, allow: bool, widens: bool) -> Option<usize> {
        let matches = |policy: &Policy| {
            policy.matches_example(&flow.from, &flow.to, (flow.protocol, flow.port), self.now)
        };
        let (permits, refuses) = if widens { (self.new, self.old) } else { (self.old, self.new) };
        let number = |new: bool, id: portcullis_types::RuleId| {
            let [olds, news] = &self.numbers;
            if new { news } else { olds }.get(to_usize(id.0)).copied()
        };
        match matches(permits).deny {
            Some(deny) => number(widens, deny.id),
            None if allow => matches(refuses).allow.and_then(|found| number(!widens, found.id)),
            None => None,
        }
    }
}
