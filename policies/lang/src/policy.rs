//! The compiled policy and what can be asked of it.

use std::path::Path;

use portcullis_types::{Protocol, RuleId};

use crate::{
    check::{Checked, Names, Test},
    compile::Compiled,
    decide::{Matches, decide},
    decision::{Decision, ListenerScope, Region},
    diagnostic::Diagnostics,
    explain::{Explanation, Question},
    facts::{CertificateFact, Flow, Party, ProcessFact, ProcessFacts, Side},
    load::{self, LoadError},
    model::{Address, Atom, Effect, Expr, ProcessField, Rule},
    region::Edges,
    source::{Source, to_u32, to_usize},
    view::View,
};

/// A policy: compiled, immutable, shared by reference.
///
/// Its own tests have passed and it has no errors: there is no other way to get one.
#[derive(Debug)]
pub struct Policy {
    pub(crate) rules: Vec<Rule>,
    pub(crate) tests: Vec<Test>,
    pub(crate) names: Names,
    pub(crate) sources: Vec<Source>,
    addresses: [bool; 2],
    process_groups: bool,
    /// Sets with a condition on processes, in the order of the text.
    processes: Vec<(String, Expr)>,
    compiled: Option<Compiled>,
    edges: Edges,
}

/// A policy that may be put in force, and what is odd about it.
#[derive(Debug)]
pub struct Loaded {
    /// The policy.
    pub policy: Policy,
    /// Warnings; no errors.
    pub warnings: Diagnostics,
}

impl Loaded {
    /// Adds warnings of executables that are links on this host; `target` says what a path leads to.
    #[must_use]
    pub fn with_links(self, target: impl Fn(&str) -> Option<String>) -> Self {
        let Self { policy, mut warnings } = self;
        warnings.append(crate::warn::links(&policy, target));
        let warnings = warnings.with_sources(policy.sources.as_slice());
        Self { policy, warnings }
    }
}

impl Policy {
    /// Reads a policy and the files it includes, checks it, and runs its own tests.
    ///
    /// # Errors
    /// [`LoadError::Read`] if the file cannot be read or is no regular file; [`LoadError::Policy`]
    /// with every error of all its files, which it displays in full, failed tests among them.
    pub fn load(path: &Path) -> Result<Loaded, LoadError> {
        load::load(path)
    }

    /// Does the same for a text that includes nothing.
    ///
    /// # Errors
    /// Every error of the text, and every failed test.
    pub fn parse(name: &str, text: &str) -> Result<Loaded, Diagnostics> {
        load::parse(name, text)
    }

    /// Reads and checks a policy without running its tests: for `policy test`, never to be enforced.
    ///
    /// # Errors
    /// As [`Policy::load`].
    pub fn load_untested(path: &Path) -> Result<Loaded, LoadError> {
        load::load_untested(path)
    }

    /// Reads a policy from what is no file, such as standard input; it includes nothing.
    ///
    /// # Errors
    /// As [`Policy::load`].
    pub fn load_input(name: &str, input: impl std::io::Read) -> Result<Loaded, LoadError> {
        load::load_input(name, input)
    }

    /// The same, without running its tests.
    ///
    /// # Errors
    /// As [`Policy::load`].
    pub fn load_input_untested(name: &str, input: impl std::io::Read) -> Result<Loaded, LoadError> {
        load::load_input_untested(name, input)
    }

    pub(crate) fn compile(checked: Checked, sources: Vec<Source>) -> Self {
        let Checked { rules, tests, names } = checked;
        let by_address = |side: Side| {
            let is_address = |a: &Atom| matches!(a, Atom::Address(_));
            rules.iter().any(|r| match side {
                Side::From => r.from.mentions(is_address),
                Side::To => r.to.mentions(is_address),
            })
        };
        let addresses = [by_address(Side::From), by_address(Side::To)];
        let is_group = |a: &Atom| matches!(a, Atom::Process(ProcessField::Group, _));
        let process_groups = rules.iter().any(|r| r.from.mentions(is_group) || r.to.mentions(is_group));
        let compiled = Compiled::new(&rules);
        let edges = Edges::new(&rules);
        let processes = processes(&names);
        Self { rules, tests, names, sources, addresses, process_groups, processes, compiled, edges }
    }

    /// Decides one flow. Total, deterministic, and without allocation.
    ///
    /// Precedence follows LANGUAGE.md, section "Verdicts".
    #[must_use]
    pub fn evaluate(&self, flow: &Flow<'_>) -> Decision {
        let (from, to) = (View::of(flow, Side::From), View::of(flow, Side::To));
        let matches = self.matches(flow, &from, &to);
        let far = if flow.far == Side::To { &to } else { &from };
        decide(&matches, far, flow.far, |id| self.get(id))
    }

    /// The rules that matter for a flow as its parties are seen.
    pub(crate) fn matches(&self, flow: &Flow<'_>, from: &View<'_>, to: &View<'_>) -> Matches {
        let found = self.compiled.as_ref().and_then(|c| c.matches(flow, from, to));
        // What no index answers, every rule is asked for: rare, and just as right.
        found.unwrap_or_else(|| crate::reference::matches(&self.rules, flow, from, to))
    }

    /// Decides one flow, and says how far around it the same holds.
    #[must_use]
    pub fn evaluate_region(&self, flow: &Flow<'_>) -> (Decision, Region) {
        let ports = match &self.compiled {
            Some(compiled) => compiled.ports_around(flow.protocol, flow.port),
            None => flow.port..=flow.port,
        };
        (self.evaluate(flow), Region { prefix: self.edges.around(flow), ports })
    }

    /// Who may open flows to this process on this port, at the time `now`.
    #[must_use]
    pub fn listener(&self, local: &Party<'_>, protocol: Protocol, port: u16, now: u64) -> ListenerScope {
        crate::listener::scope(&self.rules, local, protocol, port, now)
    }

    /// What the policy calls a process: the first of its sets with a condition on processes that the process is
    /// in. Conditions on certificates and addresses in such a set stand open.
    #[must_use]
    pub fn name_of(&self, process: &ProcessFacts) -> Option<&str> {
        let view = View {
            address: Address::Unknown,
            process: ProcessFact::Known(process),
            certificate: CertificateFact::Pending,
            far: false,
            no_process: false,
        };
        let found = self.processes.iter().find(|(_, expr)| view.expr(expr, false).may_allow());
        found.map(|(name, _)| name.as_str())
    }

    /// Whether a rule that opens related channels may let somebody reach this service.
    #[must_use]
    pub fn is_related(&self, protocol: Protocol, port: u16) -> bool {
        self.rules
            .iter()
            .any(|r| r.related && r.effect == Effect::Allow && r.service.contains(protocol, port))
    }

    /// A rule by its number.
    ///
    /// # Panics
    /// Never for a number that this policy gave.
    #[must_use]
    #[expect(clippy::indexing_slicing, reason = "rule numbers come from this policy; see the doc")]
    pub fn rule(&self, id: RuleId) -> &Rule {
        &self.rules[to_usize(id.0)]
    }

    /// A rule by its number, if there is one.
    #[must_use]
    pub fn get(&self, id: RuleId) -> Option<&Rule> {
        self.rules.get(to_usize(id.0))
    }

    /// All rules, in the order of the file.
    pub fn rules(&self) -> impl Iterator<Item = (RuleId, &Rule)> {
        self.rules.iter().enumerate().map(|(i, rule)| (RuleId(to_u32(i)), rule))
    }

    /// Why a flow is decided as it is, and what would permit it.
    #[must_use]
    pub fn explain(&self, flow: &Flow<'_>) -> Explanation {
        let service = crate::display::port(flow.protocol, flow.port);
        crate::explain::explain(self, &Question::of(flow), &service)
    }

    /// Whether some rule has a condition on the address of who opens a flow, so that the source
    /// address of an outgoing one must be known before it is judged.
    #[must_use]
    pub fn uses_local_addresses(&self) -> bool {
        self.uses_addresses_of(Side::From)
    }

    /// Whether some rule has a condition on the groups of a process.
    #[must_use]
    pub const fn uses_process_groups(&self) -> bool {
        self.process_groups
    }

    /// Whether some rule has a condition on the address of that side.
    #[must_use]
    pub fn uses_addresses_of(&self, side: Side) -> bool {
        let [from, to] = self.addresses;
        if side == Side::From { from } else { to }
    }
}

/// Sets that name processes.
fn processes(names: &Names) -> Vec<(String, Expr)> {
    let is_process = |a: &Atom| matches!(a, Atom::Process(..) | Atom::Sha256(_));
    let mut found: Vec<_> = names
        .sets
        .values()
        .filter_map(|set| Some((set.name.span, &set.name.value, &set.value.as_ref()?.expr)))
        .filter(|(_, _, expr)| expr.mentions(is_process))
        .collect();
    found.sort_by_key(|(span, ..)| (span.file, span.start));
    found.into_iter().map(|(_, name, expr)| (name.clone(), expr.clone())).collect()
}
