//! How one condition stands for one party. The only place that knows what the facts mean.

use crate::{
    facts::{CertificateFact, CertificateFacts, Fact, Flow, Party, ProcessFact, ProcessFacts, Side},
    model::{Address, Atom, CertificateField, Expr, ProcessField, Truth},
    pattern::{Pattern, Step},
};

/// One party as conditions see it.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) address: Address,
    pub(crate) process: ProcessFact<'a>,
    pub(crate) certificate: CertificateFact<'a>,
    /// It is the remote end, whose process may be unknown without anything being wrong.
    pub(crate) far: bool,
    /// Nothing was said of its process: every condition on it is false. Only in tests and on the
    /// command line.
    pub(crate) no_process: bool,
}

impl<'a> View<'a> {
    pub(crate) fn of(flow: &Flow<'a>, side: Side) -> Self {
        let party: &Party<'a> = match side {
            Side::From => flow.from,
            Side::To => flow.to,
        };
        let address = Address::new(party.addr);
        Self {
            address,
            process: party.process,
            certificate: party.certificate,
            // What is at a loopback address is a process of this host, remote or not.
            far: flow.far == side && !address.is_loopback(),
            no_process: false,
        }
    }

    /// Whether its process is one of this host.
    pub(crate) const fn is_local(&self) -> bool {
        !self.no_process && !matches!(self.process, ProcessFact::Unknown)
    }

    /// Its certificate, or how every condition on one stands.
    pub(crate) const fn shown(&self) -> Result<&'a CertificateFacts, Truth> {
        match self.certificate {
            CertificateFact::None => Err(Truth::FALSE),
            CertificateFact::Pending => Err(Truth::PENDING),
            CertificateFact::Shown(facts) => Ok(facts),
        }
    }

    /// The path of its executable, or how every condition on that stands.
    pub(crate) fn exe(&self) -> Result<&'a str, Truth> {
        match self.process {
            _ if self.no_process => Err(Truth::FALSE),
            ProcessFact::Known(facts) => match &facts.exe {
                Fact::Known(path) => Ok(path),
                Fact::Unknown => Err(Truth::UNKNOWN),
            },
            ProcessFact::UserOnly { .. } => Err(Truth::UNKNOWN),
            ProcessFact::Unknown => self.attested(|c| c.exe.as_deref()),
        }
    }

    /// The name of its user, or how every condition on that stands.
    pub(crate) fn user(&self) -> Result<&'a str, Truth> {
        match self.process {
            _ if self.no_process => Err(Truth::FALSE),
            ProcessFact::Known(facts) => Ok(&facts.user),
            ProcessFact::UserOnly { user, .. } => Ok(user),
            ProcessFact::Unknown => self.attested(|c| c.user.as_deref()),
        }
    }

    fn attested<T>(&self, of: impl Fn(&'a CertificateFacts) -> Option<T>) -> Result<T, Truth> {
        match self.certificate {
            _ if !self.far => Err(Truth::UNKNOWN),
            CertificateFact::None => Err(Truth::INVISIBLE),
            CertificateFact::Pending => Err(Truth::PENDING),
            CertificateFact::Shown(facts) => of(facts).ok_or(Truth::INVISIBLE),
        }
    }

    /// How a formula stands.
    pub(crate) fn expr(&self, expr: &Expr, negated: bool) -> Truth {
        expr.truth(negated, &|atom, negated| self.atom(atom, negated))
    }

    /// How a condition, or its negation, stands.
    pub(crate) fn atom(&self, atom: &Atom, negated: bool) -> Truth {
        match atom {
            Atom::Address(set) => match self.address {
                Address::V4(v4) => known(set.has_v4(v4) != negated),
                Address::V6(v6) => known(set.has_v6(v6) != negated),
                Address::Absent => known(negated),
                Address::Unknown => Truth::UNKNOWN,
            },
            Atom::Shown => self.certificate(negated, |_| true),
            Atom::Version(low, high) => {
                self.certificate(negated, |c| c.ver.is_some_and(|v| (*low..=*high).contains(&v)))
            }
            Atom::Certificate(field, pattern) => {
                self.certificate(negated, |c| certificate(c, *field, pattern))
            }
            Atom::Sha256(hash) => self.process(
                negated,
                |p| match &p.sha256 {
                    Fact::Known(found) => Some(found == hash),
                    Fact::Unknown => None,
                },
                |_, _| None,
                Some(|c: &CertificateFacts| c.sha256.map(|found| found == *hash)),
            ),
            Atom::Process(field, pattern) => {
                let attested = |c: &CertificateFacts| match field {
                    ProcessField::Exe => c.exe.as_deref().map(|t| pattern.matches(t)),
                    ProcessField::User => c.user.as_deref().map(|t| pattern.matches(t)),
                    ProcessField::Unit => c.unit.as_deref().map(|t| pattern.matches(t)),
                    ProcessField::Group | ProcessField::Cmdline | ProcessField::Ancestor => None,
                };
                let is_attested =
                    matches!(field, ProcessField::Exe | ProcessField::User | ProcessField::Unit);
                self.process(
                    negated,
                    |p| process(p, *field, pattern),
                    |uid, user| (*field == ProcessField::User).then(|| is_user(pattern, uid, user)),
                    is_attested.then_some(attested),
                )
            }
        }
    }

    fn certificate(&self, negated: bool, holds: impl Fn(&CertificateFacts) -> bool) -> Truth {
        match self.certificate {
            CertificateFact::None => known(negated),
            CertificateFact::Pending => Truth::PENDING,
            CertificateFact::Shown(facts) => known(holds(facts) != negated),
        }
    }

    /// `None` from one of the functions: it cannot be told.
    fn process(
        &self,
        negated: bool,
        of_process: impl Fn(&ProcessFacts) -> Option<bool>,
        of_user: impl Fn(u32, &str) -> Option<bool>,
        attested: Option<impl Fn(&CertificateFacts) -> Option<bool>>,
    ) -> Truth {
        let told = match self.process {
            _ if self.no_process => Some(false),
            ProcessFact::Known(facts) => of_process(facts),
            ProcessFact::UserOnly { uid, user } => of_user(uid, user),
            ProcessFact::Unknown if !self.far => None,
            ProcessFact::Unknown => {
                let told = match (self.certificate, attested) {
                    (CertificateFact::Pending, Some(_)) => return Truth::PENDING,
                    (CertificateFact::Shown(facts), Some(attested)) => attested(facts),
                    _ => None,
                };
                return told.map_or(Truth::INVISIBLE, |holds| known(holds != negated));
            }
        };
        told.map_or(Truth::UNKNOWN, |holds| known(holds != negated))
    }
}

fn known(holds: bool) -> Truth {
    if holds { Truth::TRUE } else { Truth::FALSE }
}

fn certificate(facts: &CertificateFacts, field: CertificateField, pattern: &Pattern) -> bool {
    let one = |text: &Option<String>| text.as_deref().is_some_and(|t| pattern.matches(t));
    match field {
        CertificateField::Name => facts.names.iter().any(|t| pattern.matches(t)),
        CertificateField::Group => facts.groups.iter().any(|t| pattern.matches(t)),
        CertificateField::Org => one(&facts.org),
        CertificateField::Process => one(&facts.process),
        CertificateField::Unit => one(&facts.unit),
        CertificateField::User => one(&facts.user),
        CertificateField::Issuer => one(&facts.issuer),
    }
}

fn process(facts: &ProcessFacts, field: ProcessField, pattern: &Pattern) -> Option<bool> {
    Some(match field {
        ProcessField::Exe => match &facts.exe {
            Fact::Known(path) => pattern.matches(path),
            Fact::Unknown => return None,
        },
        ProcessField::User => is_user(pattern, facts.uid, &facts.user),
        ProcessField::Group => facts.groups.iter().any(|g| pattern.matches(g)),
        ProcessField::Unit => facts.unit.as_deref().is_some_and(|u| pattern.matches(u)),
        ProcessField::Cmdline => pattern.matches(&facts.cmdline),
        ProcessField::Ancestor => {
            let mut all_known = true;
            for ancestor in &facts.ancestors {
                match ancestor {
                    Fact::Known(path) if pattern.matches(path) => return Some(true),
                    Fact::Known(_) => {}
                    Fact::Unknown => all_known = false,
                }
            }
            return all_known.then_some(false);
        }
    })
}

/// A pattern of digits alone is also held against the number.
fn is_user(pattern: &Pattern, uid: u32, user: &str) -> bool {
    pattern.matches(user) || number(pattern) == Some(uid)
}

/// The number that a pattern of digits alone stands for; `4294967295` (no user) is none.
pub(crate) fn number(pattern: &Pattern) -> Option<u32> {
    if !(1..=10).contains(&pattern.steps.len()) {
        return None;
    }
    let mut n = 0_u64;
    for step in &pattern.steps {
        let Step::Byte(digit @ b'0'..=b'9') = step else { return None };
        n = n * 10 + u64::from(digit - b'0');
    }
    u32::try_from(n).ok().filter(|n| *n != u32::MAX)
}
