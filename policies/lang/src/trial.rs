//! A policy's own tests, and questions put to it in its own words.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use portcullis_types::Protocol;

use crate::{
    check::{self, Example, Expected},
    decide::{Matches, decide},
    decision::Decision,
    diagnostic::{Diagnostic, Diagnostics},
    display,
    explain::{self, Explanation, Question},
    facts::Side,
    parser,
    policy::Policy,
    services::{Ports, Service},
    source::{Source, Span, to_u32},
};

/// How one `test` block went.
#[derive(Clone, Debug)]
pub struct TestOutcome {
    /// Its name.
    pub name: String,
    /// The file it stands in.
    pub file: String,
    /// The line it begins on.
    pub line: usize,
    /// How long it took.
    pub took: Duration,
    /// How many expectations it has.
    pub expectations: usize,
    /// Those that were not met; empty if it passed.
    pub failures: Diagnostics,
}

impl TestOutcome {
    /// Whether all its expectations were met.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }
}

/// Runs all tests. They are about what rules mean, so no rule has expired yet when they run.
pub(crate) fn run(policy: &Policy) -> Vec<TestOutcome> {
    let sources: Arc<[Source]> = policy.sources.as_slice().into();
    let run = |test: &check::Test| {
        let begun = Instant::now();
        let mut failures = Diagnostics::default();
        for line in &test.expectations {
            expectation(policy, line, &mut failures);
        }
        let source = policy.sources.get(crate::source::to_usize(test.span.file));
        TestOutcome {
            name: test.name.clone(),
            file: source.map_or_else(String::new, |s| s.name.to_string()),
            line: source.map_or(0, |s| s.position(test.span.start).0),
            took: begun.elapsed(),
            expectations: test.expectations.len(),
            failures: failures.with_sources(Arc::clone(&sources)),
        }
    };
    policy.tests.iter().map(run).collect()
}

fn expectation(policy: &Policy, line: &Expected, failures: &mut Diagnostics) {
    for (protocol, port) in policy.representatives(&line.service) {
        let question = question(&line.from, &line.to, protocol, port, 0);
        let decision = answer(policy, &question);
        if decision.permits() == line.allow {
            continue;
        }
        let (wanted, got) = if line.allow { ("allowed", "refused") } else { ("refused", "allowed") };
        let service = display::port(protocol, port);
        let message = format!("this test wants {service} {wanted}, and it is {got}");
        let mut failure = Diagnostic::error(message, line.span);
        match decision.rule.and_then(|id| policy.get(id)) {
            Some(rule) => failure = failure.related("by this rule", rule.span),
            None => {
                failure.label = Some("no rule allows it".to_owned());
                let why = explain::explain(policy, &question, &service);
                if let Some(near) = why.near.first()
                    && let Some(rule) = policy.get(near.rule)
                {
                    failure = failure.related(format!("the nearest rule: {}", near.failed), rule.span);
                }
            }
        }
        failures.push(failure);
        return;
    }
}

fn question<'a>(from: &'a Example, to: &'a Example, protocol: Protocol, port: u16, now: u64) -> Question<'a> {
    Question { from: from.view(), to: to.view(), protocol, port, now, far: Side::To }
}

fn answer(policy: &Policy, question: &Question<'_>) -> Decision {
    let matches = policy.matches(&question.flow(), &question.from, &question.to);
    decide(&matches, &question.to, Side::To, |id| policy.get(id))
}

/// The answer to a question in policy words, for ports of one protocol that are decided alike.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The service, as text.
    pub service: String,
    /// The verdict and why.
    pub explanation: Explanation,
}

impl Policy {
    /// Runs the policy's own `test` blocks.
    #[must_use]
    pub fn run_tests(&self) -> Vec<TestOutcome> {
        run(self)
    }

    /// Explains a flow described in the language itself: `from` and `to` are principals that
    /// describe one party each, and what they do not say is not so.
    ///
    /// A service of several protocols or ports gives several answers.
    ///
    /// # Errors
    /// The errors of the three texts.
    pub fn explain_words(
        &self,
        from: &str,
        to: &str,
        service: &str,
        now: u64,
    ) -> Result<Vec<Answer>, Diagnostics> {
        let from = self.party("--from", from)?;
        let to = self.party("--to", to)?;
        let service = self.service_words("--service", service)?;
        let mut answers = Vec::new();
        for part in self.parts(&service) {
            let question = question(&from, &to, part.protocol, part.low, now);
            let service = display::service(&Service { any: false, ports: vec![part] });
            let explanation = explain::explain(self, &question, &service);
            answers.push(Answer { service, explanation });
        }
        Ok(answers)
    }

    /// Decides a flow between two parties of which everything is known.
    pub(crate) fn decide_example(
        &self,
        from: &Example,
        to: &Example,
        protocol: Protocol,
        port: u16,
        now: u64,
    ) -> Decision {
        answer(self, &question(from, to, protocol, port, now))
    }

    /// The rules that matter for such a flow.
    pub(crate) fn matches_example(
        &self,
        from: &Example,
        to: &Example,
        (protocol, port): (Protocol, u16),
        now: u64,
    ) -> Matches {
        let question = question(from, to, protocol, port, now);
        self.matches(&question.flow(), &question.from, &question.to)
    }

    pub(crate) fn party(&self, name: &str, text: &str) -> Result<Example, Diagnostics> {
        let mut errors = Diagnostics::default();
        let tree = parser::parse_principal(to_u32(self.sources.len()), text, &mut errors);
        // Names are resolved, and attributes checked, as in the policy itself.
        let checked = tree.as_ref().and_then(|t| check::principal(&self.names, t, &mut errors));
        let found = match (&tree, checked, errors.has_errors()) {
            (Some(tree), Some(_), false) => check::example(&self.names, tree, &mut errors),
            _ => None,
        };
        found.ok_or_else(|| errors.with_sources(self.sources_and(name, text)))
    }

    pub(crate) fn service_words(&self, name: &str, text: &str) -> Result<Service, Diagnostics> {
        let mut errors = Diagnostics::default();
        let service = parser::parse_service(to_u32(self.sources.len()), text, &mut errors)
            .map(|items| check::service(&self.names, &items, &mut errors));
        if let Some(Service { any: false, ports }) = &service
            && ports.is_empty()
            && !errors.has_errors()
        {
            let whole = Span { file: to_u32(self.sources.len()), start: 0, end: to_u32(text.len()) };
            errors.push(
                Diagnostic::error("this service has no port", whole).label("such as `smtp` or `tcp/25`"),
            );
        }
        match service.filter(|_| !errors.has_errors()) {
            Some(service) => Ok(service),
            None => Err(errors.with_sources(self.sources_and(name, text))),
        }
    }

    /// The files of the policy, and behind them a text that is none.
    fn sources_and(&self, name: &str, text: &str) -> Vec<Source> {
        self.sources.iter().cloned().chain([Source::new(name, text)]).collect()
    }

    /// The parts of a service, such that no decision changes within one.
    fn parts(&self, service: &Service) -> Vec<Ports> {
        let whole = |protocol| Ports { protocol, low: 0, high: u16::MAX };
        let mut protocols = vec![Protocol::TCP, Protocol::UDP];
        protocols.extend(self.rules.iter().flat_map(|r| r.service.ports.iter().map(|p| p.protocol)));
        let all = Service::new(false, protocols.into_iter().map(whole).collect());
        let service = if service.any { &all } else { service };
        let starts = self.representatives(service);
        let part = |(n, (protocol, low)): (usize, &(Protocol, u16))| {
            let last =
                service.ports.iter().find(|p| p.protocol == *protocol && p.low <= *low && *low <= p.high);
            let next = starts.get(n + 1).filter(|(other, _)| other == protocol).map(|(_, port)| port - 1);
            let high = last.map_or(*low, |p| p.high);
            Ports { protocol: *protocol, low: *low, high: next.map_or(high, |next| next.min(high)) }
        };
        starts.iter().enumerate().map(part).collect()
    }

    /// Ports that stand for all of a service: its decisions can only change at these.
    pub(crate) fn representatives(&self, service: &Service) -> Vec<(Protocol, u16)> {
        let mut found = Vec::new();
        for ports in &service.ports {
            if !ports.protocol.has_ports() {
                found.push((ports.protocol, 0));
                continue;
            }
            found.push((ports.protocol, ports.low));
            let within = |port: u16| (ports.low..=ports.high).contains(&port);
            for rule in &self.rules {
                for other in rule.service.ports.iter().filter(|o| o.protocol == ports.protocol) {
                    let edges = [other.low, other.high.saturating_add(1)];
                    found.extend(edges.into_iter().filter(|p| within(*p)).map(|p| (ports.protocol, p)));
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// Every failure of the policy's own tests.
pub(crate) fn failures(policy: &Policy) -> Diagnostics {
    let mut all = Diagnostics::default();
    for outcome in run(policy) {
        if !outcome.passed() {
            all.append(outcome.failures);
        }
    }
    all
}
