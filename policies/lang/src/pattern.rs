//! Patterns: `*` within one component, `**` across, a lone `*` everything.

use std::hash::{Hash, Hasher};

use arrayvec::ArrayVec;

/// Longest pattern, in bytes.
pub(crate) const LONGEST: usize = 255;

/// What `*` stops at, and whether case counts: a property of the attribute.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Scope {
    /// DNS names: labels, without regard to case, a final dot is nothing.
    Domain,
    /// Paths: components.
    Path,
    /// Anything else: `*` crosses everything.
    Text,
}

impl Scope {
    pub(crate) const fn separator(self) -> Option<u8> {
        match self {
            Self::Domain => Some(b'.'),
            Self::Path => Some(b'/'),
            Self::Text => None,
        }
    }
}

/// One step of a pattern.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Step {
    Byte(u8),
    /// `*`: any number of bytes, but no separator.
    Star,
    /// `**`: any number of bytes.
    Cross,
}

/// A pattern in its only spelling: equal patterns are equal values.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Pattern {
    pub(crate) scope: Scope,
    pub(crate) steps: Box<[Step]>,
}

impl Hash for Pattern {
    /// All at once: step by step, a compilation would spend a tenth of its time here.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let mut bytes = ArrayVec::<u8, { LONGEST + 1 }>::new();
        for step in self.steps.iter().take(LONGEST) {
            bytes.push(if let Step::Byte(byte) = step { *byte } else { b'*' });
        }
        bytes.push(self.scope as u8);
        state.write(&bytes);
    }
}

/// Why a text is no pattern.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PatternError {
    TooLong(usize),
    Nul,
}

impl Pattern {
    /// Takes a string's content with `\*` and `\\` still escaped.
    pub(crate) fn new(scope: Scope, content: &str) -> Result<Self, PatternError> {
        if content.len() > LONGEST {
            return Err(PatternError::TooLong(content.len()));
        }
        if content.contains('\0') {
            return Err(PatternError::Nul);
        }
        let content =
            if scope == Scope::Domain { content.strip_suffix('.').unwrap_or(content) } else { content };
        let mut steps: Vec<Step> = Vec::with_capacity(content.len());
        let mut bytes = content.bytes().peekable();
        while let Some(byte) = bytes.next() {
            let step = match byte {
                b'\\' => Step::Byte(bytes.next().unwrap_or(b'\\')),
                b'*' => {
                    let mut crosses = scope == Scope::Text;
                    while bytes.next_if_eq(&b'*').is_some() {
                        crosses = true;
                    }
                    if crosses { Step::Cross } else { Step::Star }
                }
                byte if scope == Scope::Domain => Step::Byte(byte.to_ascii_lowercase()),
                byte => Step::Byte(byte),
            };
            steps.push(step);
        }
        if steps == [Step::Star] {
            steps = vec![Step::Cross];
        }
        Ok(Self { scope, steps: steps.into() })
    }

    /// Whether it matches everything.
    pub(crate) fn is_any(&self) -> bool {
        *self.steps == [Step::Cross]
    }

    /// The only text it matches, if there is but one.
    pub(crate) fn literal(&self) -> Option<Vec<u8>> {
        self.is_literal().then(|| self.bytes_of(0))
    }

    /// Whether it matches but one text.
    pub(crate) fn is_literal(&self) -> bool {
        self.steps.iter().all(|step| matches!(step, Step::Byte(_)))
    }

    /// The bytes from a step on, up to a wildcard.
    fn bytes_of(&self, from: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.steps.len() - from);
        let rest = self.steps.iter().skip(from);
        bytes.extend(rest.map_while(|s| if let Step::Byte(b) = s { Some(*b) } else { None }));
        bytes
    }

    /// The bytes after its last wildcard, if it has one.
    pub(crate) fn suffix(&self) -> Vec<u8> {
        let last = self.steps.iter().rposition(|step| !matches!(step, Step::Byte(_)));
        self.bytes_of(last.map_or(0, |n| n + 1))
    }

    /// The bytes before its first wildcard.
    pub(crate) fn prefix(&self) -> Vec<u8> {
        self.bytes_of(0)
    }

    /// Whether it matches a text. Linear in the text's length, whatever the pattern; no allocation.
    pub(crate) fn matches(&self, text: &str) -> bool {
        let mut text = text.as_bytes();
        if self.scope == Scope::Domain {
            text = text.strip_suffix(b".").unwrap_or(text);
        }
        // The common shapes: no wildcard, or one.
        let mut steps = &*self.steps;
        while let ([Step::Byte(p), rest @ ..], [b, after @ ..]) = (steps, text) {
            if !self.same(*p, *b) {
                return false;
            }
            (steps, text) = (rest, after);
        }
        while let ([rest @ .., Step::Byte(p)], [before @ .., b]) = (steps, text) {
            if !self.same(*p, *b) {
                return false;
            }
            (steps, text) = (rest, before);
        }
        match steps {
            [] => text.is_empty(),
            [Step::Byte(_), ..] => false,
            [Step::Cross] => true,
            [Step::Star] => !self.scope.separator().is_some_and(|s| text.contains(&s)),
            steps => self.simulate(steps, text),
        }
    }

    fn same(&self, pattern: u8, byte: u8) -> bool {
        pattern == if self.scope == Scope::Domain { byte.to_ascii_lowercase() } else { byte }
    }

    /// All states at once; a pattern has at most 255 steps, so 256 bits hold them.
    fn simulate(&self, steps: &[Step], text: &[u8]) -> bool {
        let mut states = Run::default();
        states.set(0);
        states.close(steps);
        for byte in text {
            let mut next = Run::default();
            for (i, step) in steps.iter().enumerate() {
                if !states.has(i) {
                    continue;
                }
                match step {
                    Step::Byte(p) if self.same(*p, *byte) => next.set(i + 1),
                    Step::Byte(_) => {}
                    Step::Star if Some(*byte) == self.scope.separator() => {}
                    Step::Star | Step::Cross => next.set(i),
                }
            }
            if next.is_over() {
                return false;
            }
            next.close(steps);
            states = next;
        }
        states.has(steps.len())
    }

    /// All states before the first byte, for those who look for texts instead of matching one.
    pub(crate) fn start(&self) -> Run {
        let mut run = Run::default();
        run.set(0);
        run.close(&self.steps);
        run
    }

    /// The states after one more byte; in small letters if case does not count.
    pub(crate) fn step(&self, run: &Run, byte: u8) -> Run {
        let mut next = Run::default();
        for (i, step) in self.steps.iter().enumerate().filter(|(i, _)| run.has(*i)) {
            match step {
                Step::Byte(p) if self.same(*p, byte) => next.set(i + 1),
                Step::Byte(_) => {}
                Step::Star if Some(byte) == self.scope.separator() => {}
                Step::Star | Step::Cross => next.set(i),
            }
        }
        next.close(&self.steps);
        next
    }

    /// Whether what led to these states matches.
    pub(crate) fn accepts(&self, run: &Run) -> bool {
        run.has(self.steps.len())
    }

    /// The bytes it names.
    pub(crate) fn bytes(&self) -> impl Iterator<Item = u8> {
        self.steps.iter().filter_map(|s| if let Step::Byte(b) = s { Some(*b) } else { None })
    }

    /// Its text with something in the place of each wildcard.
    pub(crate) fn filled(&self, filling: &str) -> String {
        let mut bytes = Vec::new();
        for step in &self.steps {
            match step {
                Step::Byte(b) => bytes.push(*b),
                Step::Star | Step::Cross => bytes.extend(filling.bytes()),
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The pattern of all absolute paths.
    pub(crate) fn below_root() -> Self {
        Self { scope: Scope::Path, steps: [Step::Byte(b'/'), Step::Cross].into() }
    }

    /// The pattern that matches everything.
    pub(crate) fn exact_any(scope: Scope) -> Self {
        Self { scope, steps: [Step::Cross].into() }
    }

    /// As a string's content, such that [`Pattern::new`] gives this pattern again.
    pub(crate) fn content(&self) -> String {
        let mut bytes = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            match step {
                Step::Byte(b @ (b'*' | b'\\')) => bytes.extend([b'\\', *b]),
                Step::Byte(b) => bytes.push(*b),
                Step::Star => bytes.push(b'*'),
                Step::Cross if self.is_any() || self.scope == Scope::Text => bytes.push(b'*'),
                Step::Cross => bytes.extend(b"**"),
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// The places in a pattern that a text can have led to.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub(crate) struct Run([u64; 5]);

impl Run {
    fn set(&mut self, i: usize) {
        if let Some(word) = self.0.get_mut(i / 64) {
            *word |= 1 << (i % 64);
        }
    }

    fn has(&self, i: usize) -> bool {
        self.0.get(i / 64).is_some_and(|word| word >> (i % 64) & 1 == 1)
    }

    /// Nothing that follows can match.
    pub(crate) fn is_over(&self) -> bool {
        self.0 == [0; 5]
    }

    /// A wildcard may match nothing.
    fn close(&mut self, steps: &[Step]) {
        for (i, step) in steps.iter().enumerate() {
            if !matches!(step, Step::Byte(_)) && self.has(i) {
                self.set(i + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(scope: Scope, pattern: &str, text: &str) -> bool {
        Pattern::new(scope, pattern).unwrap().matches(text)
    }

    #[test]
    fn a_star_stays_within_its_label() {
        assert!(matches(Scope::Domain, "*.example.com", "a.example.com"));
        assert!(!matches(Scope::Domain, "*.example.com", "a.b.example.com"));
        assert!(!matches(Scope::Domain, "*.example.com", "example.com"));
        assert!(matches(Scope::Domain, "**.example.com", "a.b.example.com"));
        assert!(matches(Scope::Domain, "A.Example.com.", "a.eXample.com"));
        assert!(matches(Scope::Domain, "a.example.com", "a.example.com."));
    }

    #[test]
    fn a_star_stays_within_its_component() {
        assert!(matches(Scope::Path, "/usr/bin/*", "/usr/bin/curl"));
        assert!(!matches(Scope::Path, "/usr/bin/*", "/usr/bin/x/curl"));
        assert!(matches(Scope::Path, "/tmp/**", "/tmp/a/b"));
        assert!(matches(Scope::Path, "/tmp/**", "/tmp/"));
        assert!(!matches(Scope::Path, "/tmp/**", "/tmp"));
        assert!(!matches(Scope::Path, "/usr/bin/curl", "/usr/bin/Curl"));
    }

    #[test]
    fn a_lone_star_is_everything() {
        assert!(matches(Scope::Path, "*", "/usr/bin/curl"));
        assert!(matches(Scope::Domain, "*", "a.b.c"));
        assert!(matches(Scope::Domain, "*", ""));
    }

    #[test]
    fn an_escaped_star_is_itself() {
        assert!(matches(Scope::Text, r"a\*", "a*"));
        assert!(!matches(Scope::Text, r"a\*", "ab"));
    }

    #[test]
    fn many_wildcards_stay_linear() {
        let bomb = "*a".repeat(127);
        let text = "a".repeat(100_000);
        assert!(!matches(Scope::Path, &(bomb + "b"), &text));
    }

    #[test]
    fn text_between_wildcards_is_found() {
        assert!(matches(Scope::Path, "/a/*/c/**/e", "/a/b/c/d/x/e"));
        assert!(!matches(Scope::Path, "/a/*/c/**/e", "/a/b/b/c/d/x/e"));
        assert!(matches(Scope::Domain, "web*.*.org", "web12.x.org"));
    }
}
