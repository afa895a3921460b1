//! What fuzzers call, and `cargo test` with the corpus: one function for each border.

use std::{fs, path::Path};

use portcullis_types::{Protocol, RuleId};

use crate::{
    decide::decide,
    facts::{CertificateFact, CertificateFacts, Fact, Flow, Party, ProcessFact, ProcessFacts, Side},
    policy::Policy,
    reference,
    source::to_usize,
    view::View,
};

/// Takes any bytes for a policy: what is said of them can be shown, and what is formatted stays so.
///
/// # Panics
/// If not.
pub fn parse(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match Policy::parse("fuzz.pol", &text) {
        Ok(loaded) => drop(loaded.warnings.to_string()),
        Err(errors) => {
            assert!(errors.has_errors());
            drop(errors.to_string());
            drop(errors.to_data());
        }
    }
    if let Ok(once) = crate::format("fuzz.pol", &text) {
        assert_eq!(crate::format("fuzz.pol", &once).ok().as_deref(), Some(once.as_str()));
    }
}

/// Writes any bytes as files, cut at each NUL, into a folder and loads the first.
pub fn include(folder: &Path, bytes: &[u8]) {
    for (name, part) in ["a.pol", "b.pol", "c.pol"].into_iter().zip(bytes.split(|b| *b == 0)) {
        let _full_disk = fs::write(folder.join(name), part);
    }
    let _either = Policy::load(&folder.join("a.pol"));
}

/// Takes any bytes for a policy and, if it is one, asks it about some flows both ways.
///
/// # Panics
/// If the compiled policy and the naive evaluator disagree.
pub fn compile(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(loaded) = Policy::parse("fuzz.pol", text) else { return };
    let policy = loaded.policy;
    let certificate = CertificateFacts {
        names: vec!["a.example.com".to_owned()],
        ver: Some(3),
        groups: vec!["ops".to_owned()],
        exe: Some("/usr/bin/curl".to_owned()),
        ..CertificateFacts::default()
    };
    let process = ProcessFacts {
        exe: Fact::Known("/usr/bin/curl".to_owned()),
        sha256: Fact::Unknown,
        uid: 0,
        user: "root".to_owned(),
        groups: Vec::new(),
        unit: None,
        cmdline: String::new(),
        ancestors: vec![Fact::Unknown],
    };
    let certificates =
        [CertificateFact::None, CertificateFact::Pending, CertificateFact::Shown(&certificate)];
    let processes =
        [ProcessFact::Unknown, ProcessFact::Known(&process), ProcessFact::UserOnly { uid: 0, user: "root" }];
    let addresses = [None, "10.0.0.1".parse().ok(), "::1".parse().ok(), "2001:db8::1".parse().ok()];
    for addr in addresses {
        for certificate in certificates {
            for process in processes {
                for (port, far) in [(0, Side::To), (25, Side::From), (65535, Side::To)] {
                    let one = Party { addr, process, certificate };
                    let flow = Flow { from: &one, to: &one, protocol: Protocol::TCP, port, now: 1, far };
                    agree(&policy, &flow);
                }
            }
        }
    }
    assert!(crate::diff(&policy, &policy, 1).changes.is_empty());
}

/// Takes any bytes for two policies, cut at the first NUL, and compares them.
///
/// # Panics
/// If a flow that the comparison names as an example is not decided as it says.
pub fn diff(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (old, new) = text.split_once('\0').unwrap_or((text, ""));
    let (Ok(old), Ok(new)) = (Policy::parse("old.pol", old), Policy::parse("new.pol", new)) else { return };
    let (old, new) = (old.policy, new.policy);
    for change in crate::diff(&old, &new, 1).changes {
        let flow = &change.example;
        for (policy, permits) in [(&old, !change.widens), (&new, change.widens)] {
            let Ok(answers) = policy.explain_words(&flow.from, &flow.to, &flow.service, 1) else {
                unreachable!("an example is a flow: {flow:?}")
            };
            assert!(answers.iter().all(|a| a.explanation.decision.permits() == permits), "{change:?}");
        }
    }
}

fn agree(policy: &Policy, flow: &Flow<'_>) {
    let (from, to) = (View::of(flow, Side::From), View::of(flow, Side::To));
    let matches = reference::matches(&policy.rules, flow, &from, &to);
    let far = if flow.far == Side::To { &to } else { &from };
    let naive = decide(&matches, far, flow.far, |id: RuleId| policy.rules.get(to_usize(id.0)));
    assert_eq!(policy.evaluate(flow), naive);
}
