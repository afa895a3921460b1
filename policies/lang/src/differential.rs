//! The compiled policy against the naive evaluator, on random policies and flows.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portcullis_types::Protocol;

use crate::{
    check::Example,
    facts::{CertificateFact, CertificateFacts, Flow, Party, ProcessFact, ProcessFacts, Side},
    generate::{self, Dice, World},
    load,
    model::Truth,
    policy::Policy,
    reference,
    replay::Replayed,
};

/// Pairs of policy and flow: `PORTCULLIS_PAIRS`, else as many as take some seconds.
fn pairs() -> usize {
    std::env::var("PORTCULLIS_PAIRS").ok().and_then(|s| s.parse().ok()).unwrap_or(2_000_000)
}

fn policy(text: &str) -> Policy {
    load::parse("random.pol", text).unwrap_or_else(|d| panic!("{d}\n{text}")).policy
}

#[test]
fn compiled_and_naive_evaluation_agree() {
    let mut dice = Dice::new(generate::seed("compiled against reference"));
    const FLOWS: usize = 1000;
    for _ in 0..pairs() / FLOWS {
        let text = generate::policy(&mut dice);
        let policy = policy(&text);
        for _ in 0..FLOWS {
            let world = World::new(&mut dice);
            let (from, to) = (world.party(0), world.party(1));
            let flow = generate::flow(&mut dice, &from, &to);
            let (left, right) = (policy.evaluate(&flow), reference::evaluate(&policy.rules, &flow));
            assert_eq!(left, right, "compiled, then reference\n{text}\n{flow:#?}");
        }
    }
}

/// Some addresses of a prefix: its ends, and those of the world within it.
fn addresses(dice: &mut Dice, prefix: ipnet::IpNet) -> Vec<IpAddr> {
    let mut list = vec![prefix.network(), prefix.broadcast()];
    list.extend((0..4).map(|_| generate::address(dice)).filter(|a| prefix.contains(a)));
    if let ipnet::IpNet::V4(net) = prefix {
        let size = u32::from(net.broadcast()) - u32::from(net.network());
        let offset = u32::try_from(dice.roll(1 << 31)).unwrap() % size.max(1);
        list.push(Ipv4Addr::from(u32::from(net.network()) + offset).into());
    }
    list
}

#[test]
fn within_a_region_the_decision_is_the_same() {
    let mut dice = Dice::new(generate::seed("regions"));
    for _ in 0..pairs() / 5000 {
        let text = generate::policy(&mut dice);
        let policy = policy(&text);
        for _ in 0..100 {
            let world = World::new(&mut dice);
            let (from, to) = (world.party(0), world.party(1));
            let flow = generate::flow(&mut dice, &from, &to);
            let (decision, region) = policy.evaluate_region(&flow);
            assert_eq!(decision, policy.evaluate(&flow));
            let far = if flow.far == Side::To { &to } else { &from };
            let Some(address) = far.addr else {
                assert_eq!(region.prefix.to_string(), "::/128");
                continue;
            };
            let address = match address {
                IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
                v4 @ IpAddr::V4(_) => v4,
            };
            assert!(
                region.prefix.contains(&address) && region.ports.contains(&flow.port),
                "{region:?} {flow:#?}"
            );
            for address in addresses(&mut dice, region.prefix) {
                // An IPv6 socket shows an IPv4 address as a mapped one.
                let mapped = match address {
                    IpAddr::V4(v4) => IpAddr::V6(Ipv4Addr::to_ipv6_mapped(&v4)),
                    IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(v6.octets())),
                };
                for address in [address, mapped] {
                    for port in [*region.ports.start(), *region.ports.end()] {
                        let party = Party { addr: Some(address), ..*far };
                        let (from, to) = if flow.far == Side::To { (&from, &party) } else { (&party, &to) };
                        let moved = Flow { from, to, port, ..flow };
                        assert_eq!(
                            policy.evaluate(&moved),
                            decision,
                            "{region:?}\n{text}\n{flow:#?}\n{moved:#?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn formatting_keeps_the_meaning() {
    let mut dice = Dice::new(generate::seed("formatting"));
    for _ in 0..300 {
        let text: String = generate::policy(&mut dice).replace(", ", ",  # why\n").replace(" & ", "&");
        let once = crate::fmt::format("t.pol", &text).unwrap_or_else(|d| panic!("{d}\n{text}"));
        assert_eq!(crate::fmt::format("t.pol", &once).unwrap(), once);
        let (old, new) = (policy(&text), policy(&once));
        let parts = |p: &Policy| -> Vec<_> {
            p.rules
                .iter()
                .map(|r| (r.effect, r.service.clone(), r.from.clone(), r.to.clone(), r.rank(), r.expires))
                .collect()
        };
        assert_eq!(parts(&old), parts(&new), "{text}\n{once}");
    }
}

#[test]
fn a_printed_principal_reads_back_as_itself() {
    let mut dice = Dice::new(generate::seed("printing"));
    for _ in 0..2000 {
        let text = generate::principal(&mut dice, 3);
        let first = policy(&format!("allow *({text}, *);"));
        let printed = crate::display::expr(&first.rules[0].from);
        let again = policy(&format!("allow *({printed}, *);"));
        for _ in 0..50 {
            let world = World::new(&mut dice);
            let (from, to) = (world.party(0), world.party(1));
            let flow = generate::flow(&mut dice, &from, &to);
            assert_eq!(first.evaluate(&flow), again.evaluate(&flow), "{text}\n{printed}\n{flow:#?}");
        }
    }
}

/// Whether a party is in one end of a piece.
fn in_end(
    end: &crate::diff::End,
    atoms: &[std::sync::Arc<crate::model::Atom>],
    view: &crate::view::View<'_>,
) -> bool {
    let by_address = match view.address {
        crate::model::Address::V4(v4) => end.addresses().v4.iter().any(|r| (r.0..=r.1).contains(&v4)),
        crate::model::Address::V6(v6) => end.addresses().v6.iter().any(|r| (r.0..=r.1).contains(&v6)),
        _ => false,
    };
    by_address
        && end.laid().iter().all(|(n, holds)| {
            let atom = &atoms[usize::try_from(*n).unwrap()];
            view.atom(atom, !holds) == Truth::TRUE
        })
}

#[test]
fn a_diff_holds_all_flows_that_change_and_no_other() {
    let mut dice = Dice::new(generate::seed("diff against exhaustive evaluation"));
    let (mut inexact, mut changed, mut total) = (0, 0, 0);
    let everybody = generate::everybody();
    // Enough of them that chance does not decide about the share of inexact ones, below.
    for _ in 0..pairs() / 1000 {
        let old_text = generate::policy(&mut dice);
        // The new policy is the old one, with some rules left out and some put in.
        let mut lines: Vec<String> = old_text.lines().map(|l| format!("{l}\n")).collect();
        for _ in 0..=dice.roll(2) {
            if !lines.is_empty() && dice.roll(2) == 0 {
                lines.remove(dice.roll(lines.len()));
            } else {
                let at = dice.roll(lines.len() + 1);
                lines.insert(at, generate::rule(&mut dice));
            }
        }
        let new_text: String = lines.concat();
        let (old, new) = (policy(&old_text), policy(&new_text));
        let (diff, atoms) = crate::diff::diff_in_pieces(&old, &new, 0, dice.one(&[0, 2, 24]));
        total += 1;
        inexact += usize::from(!diff.exact);
        let mut look = |from: &Example, to: &Example, protocol: Protocol, port: u16| {
            let before = old.decide_example(from, to, protocol, port, 0).permits();
            let after = new.decide_example(from, to, protocol, port, 0).permits();
            changed += usize::from(before != after);
            let number = u32::from(protocol.0) << 16 | u32::from(port);
            let is_of = |of: &crate::diff::RuleOf| {
                let rule = if of.new { &new } else { &old }.get(of.rule).unwrap();
                let holds = |expr, party: &Example| party.view().expr(expr, false) == Truth::TRUE;
                rule.service.contains(protocol, port) && holds(&rule.from, from) && holds(&rule.to, to)
            };
            let pieces: Vec<_> = diff
                .changes
                .iter()
                .filter(|c| {
                    c.piece.service.iter().any(|r| (r.0..=r.1).contains(&number))
                        && in_end(&c.piece.from, &atoms, &from.view())
                        && in_end(&c.piece.to, &atoms, &to.view())
                        && (c.among.is_empty() || c.among.iter().any(is_of))
                        && c.whole.as_ref().is_none_or(is_of)
                        && !c.except.iter().any(is_of)
                })
                .collect();
            let told =
                format!("old\n{old_text}\nnew\n{new_text}\n{from:#?}\n{to:#?}\n{protocol} {port}\n{diff:#?}");
            for piece in pieces.iter().filter(|p| p.exact) {
                assert!(
                    before != after && piece.widens == after,
                    "a region holds a flow that does not change\n{told}"
                );
            }
            assert!(
                before == after || !pieces.is_empty() || !diff.exact,
                "a flow changes and is in no region\n{told}"
            );
        };
        for _ in 0..50 {
            let (from, to) = (generate::example(&mut dice), generate::example(&mut dice));
            let (protocol, port) = generate::port(&mut dice);
            look(&from, &to, protocol, port);
        }
        // Every flow there is, in a small world.
        if total % 16 == 0 {
            for (from, to) in everybody.iter().flat_map(|from| everybody.iter().map(move |to| (from, to))) {
                for (protocol, port) in generate::SERVED {
                    look(from, to, protocol, port);
                }
            }
        }
        assert!(!crate::diff::diff(&old, &old, 0).widens());
        // Examples are meant to be pasted.
        for change in &diff.changes {
            let e = &change.example;
            for (policy, permits) in [(&old, !change.widens), (&new, change.widens)] {
                let answers =
                    policy.explain_words(&e.from, &e.to, &e.service, 0).unwrap_or_else(|d| panic!("{d}"));
                assert!(
                    answers.iter().all(|a| a.explanation.decision.permits() == permits),
                    "{change:#?}\n{told}",
                    told = old_text
                );
            }
        }
    }
    assert!(inexact * 100 <= total, "{inexact} of {total} are not exact");
    assert!(changed > 0);
}

#[test]
fn what_replay_says_holds_whatever_was_not_recorded() {
    let mut dice = Dice::new(generate::seed("replay"));
    let (mut told, mut untold) = (0, 0);
    for _ in 0..pairs() / 5000 {
        let (old, new) = (policy(&generate::policy(&mut dice)), policy(&generate::policy(&mut dice)));
        let replay = crate::replay::Replay::new(&old, &new, 0);
        for _ in 0..50 {
            let (world, other) = (World::new(&mut dice), World::new(&mut dice));
            let (from, to) = (world.party(0), world.party(1));
            let flow = Flow { now: 0, far: Side::To, ..generate::flow(&mut dice, &from, &to) };
            let ProcessFact::Known(known) = from.process else { continue };
            let (CertificateFact::Shown(own), ProcessFact::Unknown) = (from.certificate, to.process) else {
                continue;
            };
            let shown = !matches!(to.certificate, CertificateFact::None);
            let named = |facts: &CertificateFacts| facts.names.first().cloned().into_iter().collect();
            let recorded = CertificateFacts { names: named(own), ..CertificateFacts::default() };
            let process_recorded =
                ProcessFacts { groups: vec![], cmdline: String::new(), ancestors: vec![], ..known.clone() };
            let from = Party {
                process: ProcessFact::Known(&process_recorded),
                certificate: CertificateFact::Shown(&recorded),
                ..from
            };
            let theirs = other.certificate(1);
            let (names, process) = (named(theirs), theirs.process.clone());
            let peer = CertificateFacts { names, process, ..CertificateFacts::default() };
            let peer = if shown { CertificateFact::Shown(&peer) } else { CertificateFact::None };
            let to = Party { certificate: peer, ..to };
            let said = replay.flow(&Flow { from: &from, to: &to, ..flow });
            // The same flow, all of it.
            let own = CertificateFacts { names: named(own), ..own.clone() };
            let theirs = CertificateFacts { names: named(theirs), ..theirs.clone() };
            let from = Party {
                process: ProcessFact::Known(known),
                certificate: CertificateFact::Shown(&own),
                ..from
            };
            let theirs = if shown { CertificateFact::Shown(&theirs) } else { CertificateFact::None };
            let to = Party { certificate: theirs, ..to };
            let flow = Flow { from: &from, to: &to, ..flow };
            let permits = |policy: &Policy| policy.evaluate(&flow).permits();
            let right = match said {
                Replayed::Same => permits(&old) == permits(&new),
                Replayed::Allowed => !permits(&old) && permits(&new),
                Replayed::Refused => permits(&old) && !permits(&new),
                Replayed::Unknown => true,
            };
            assert!(right, "{said:?}\n{flow:#?}");
            *(if said == Replayed::Unknown { &mut untold } else { &mut told }) += 1;
        }
    }
    assert!(told > untold && untold > 0, "{told} told, {untold} not");
}

#[test]
fn a_rule_that_many_others_overlap_is_compared_exactly() {
    let allow = |i: usize| {
        format!("allow smtp(x509{{group=\"g{i}\", name=\"*.z{}.org\"}}, IPv4{{10.0.{i}.0/24}});\n", i % 7)
    };
    let deny = "deny *(x509{group=\"bad\"}, IPv4{10.0.0.0/9});\n";
    let wide = "allow smtp(x509{name=\"*.org\"} | x509{name=\"**.z3.org\"}, *);\n";
    let rules: String = (0..200).map(allow).collect();
    let diff = crate::diff::diff(&policy(&(rules.clone() + deny)), &policy(&(rules + wide)), 0);
    assert!(diff.exact, "{:?}", diff.limits);
    let [first, second] = diff.changes.as_slice() else { panic!("{:#?}", diff.changes) };
    assert!(first.widens && first.among.len() == 201 && first.except.is_empty());
    assert!(second.widens && second.among.is_empty() && second.except.len() == 200);
}
