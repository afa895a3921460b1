//! Errors and warnings, and how they are shown.
//!
//! The rendering is our own sixty lines rather than a crate's: it needs one shape only, and every
//! byte of it must be escaped, because a policy may come from someone else.

use std::{
    fmt::{self, Write as _},
    sync::Arc,
};

use serde::Serialize;
use unicode_width::UnicodeWidthStr as _;

use crate::source::{Source, Span};

/// How bad it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The policy is not usable.
    Error,
    /// Legal, and surely not meant.
    Warning,
}

/// One message about a place in a policy.
#[derive(Clone, Debug)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// Lower case, no full stop.
    pub message: String,
    /// The place.
    pub span: Span,
    /// What stands right beside the caret: what would be right.
    pub label: Option<String>,
    /// Other places that belong to it.
    pub related: Vec<(String, Span)>,
    /// What to do about it.
    pub help: Option<String>,
}

impl Diagnostic {
    pub(crate) fn new(severity: Severity, message: impl Into<String>, span: Span) -> Self {
        Self { severity, message: message.into(), span, label: None, related: Vec::new(), help: None }
    }

    pub(crate) fn error(message: impl Into<String>, span: Span) -> Self {
        Self::new(Severity::Error, message, span)
    }

    pub(crate) fn warning(message: impl Into<String>, span: Span) -> Self {
        Self::new(Severity::Warning, message, span)
    }

    pub(crate) fn label(mut self, label: impl Into<String>) -> Self {
        self.label = Some(label.into());
        self
    }

    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    pub(crate) fn related(mut self, label: impl Into<String>, span: Span) -> Self {
        self.related.push((label.into(), span));
        self
    }
}

/// Messages about one policy, together with its source files.
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    list: Vec<Diagnostic>,
    left_out: usize,
    sources: Arc<[Source]>,
}

/// More messages than this help nobody; the rest is counted.
const MOST: usize = 200;

impl Diagnostics {
    /// Adds a message, unless it stands there already: one mistake is reported once.
    pub(crate) fn push(&mut self, diagnostic: Diagnostic) {
        let same = |d: &Diagnostic| d.span == diagnostic.span && d.message == diagnostic.message;
        if self.list.iter().any(same) {
            return;
        }
        if self.list.len() < MOST {
            self.list.push(diagnostic);
        } else {
            self.left_out += 1;
        }
    }

    pub(crate) fn append(&mut self, other: Self) {
        self.left_out += other.left_out;
        for diagnostic in other.list {
            self.push(diagnostic);
        }
    }

    /// Whether more are only counted, so that their text need not be thought about.
    pub(crate) fn is_full(&self) -> bool {
        self.list.len() >= MOST
    }

    pub(crate) fn with_sources(mut self, sources: impl Into<Arc<[Source]>>) -> Self {
        self.sources = sources.into();
        let key = |d: &Diagnostic| (d.severity == Severity::Warning, d.span.file, d.span.start);
        self.list.sort_by_key(key);
        self
    }

    /// Whether there is an error among them.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.list.iter().any(|d| d.severity == Severity::Error)
    }

    /// Whether there is none at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many there are, those left out included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len() + self.left_out
    }

    /// The messages, errors first.
    pub fn iter(&self) -> impl Iterator<Item = &Diagnostic> {
        self.list.iter()
    }

    /// The messages as data, for `--format json`.
    #[must_use]
    pub fn to_data(&self) -> Vec<DiagnosticData<'_>> {
        self.list.iter().map(|d| self.data(d)).collect()
    }

    fn data<'a>(&'a self, d: &'a Diagnostic) -> DiagnosticData<'a> {
        DiagnosticData {
            severity: d.severity,
            message: &d.message,
            place: self.place(d.span),
            label: d.label.as_deref(),
            help: d.help.as_deref(),
            related: d
                .related
                .iter()
                .map(|(m, s)| RelatedData { message: m, place: self.place(*s) })
                .collect(),
        }
    }

    fn place(&self, span: Span) -> Place<'_> {
        let source = self.source(span);
        let (line, column) = source.map_or((1, 1), |s| s.position(span.start));
        let (end_line, end_column) = source.map_or((1, 1), |s| s.position(span.end));
        Place { file: source.map_or("", |s| &s.name), line, column, end_line, end_column }
    }

    fn source(&self, span: Span) -> Option<&Source> {
        self.sources.get(crate::source::to_usize(span.file))
    }
}

/// A [`Diagnostic`] for machines.
#[derive(Debug, Serialize)]
pub struct DiagnosticData<'a> {
    severity: Severity,
    message: &'a str,
    #[serde(flatten)]
    place: Place<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    help: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    related: Vec<RelatedData<'a>>,
}

#[derive(Debug, Serialize)]
struct RelatedData<'a> {
    message: &'a str,
    #[serde(flatten)]
    place: Place<'a>,
}

#[derive(Debug, Serialize)]
struct Place<'a> {
    file: &'a str,
    line: usize,
    column: usize,
    end_line: usize,
    end_column: usize,
}

/// What a piece of a shown message is, for those who give each its colour.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// The word and the mark of a message.
    Severity(Severity),
    /// What is wrong.
    Message,
    /// The mark of another place that belongs to it.
    Related,
    /// Line numbers, arrows and bars.
    Frame,
}

impl fmt::Display for Diagnostics {
    /// As the compiler of Rust shows its own. Nothing in it can move a terminal's cursor.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.painted(|_, text| text.to_owned()))
    }
}

impl Diagnostics {
    /// What [`Display`](fmt::Display) shows, each piece as `paint` returns it.
    #[must_use]
    pub fn painted(&self, paint: impl Fn(Part, &str) -> String) -> String {
        let mut out = String::new();
        for (i, d) in self.list.iter().enumerate() {
            if i > 0 {
                out.push('\n');
            }
            let word = match d.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            };
            let severity = Part::Severity(d.severity);
            let message = paint(Part::Message, &format!(": {}", escape(&d.message)));
            let _infallible = writeln!(out, "{}{message}", paint(severity, word));
            self.excerpt(&mut out, &paint, d.span, d.label.as_deref(), ("-->", severity, '^'));
            for (message, span) in &d.related {
                self.excerpt(&mut out, &paint, *span, Some(message), (":::", Part::Related, '-'));
            }
            if let Some(help) = &d.help {
                let _infallible = writeln!(out, "  {} help: {}", paint(Part::Frame, "="), escape(help));
            }
        }
        if self.left_out > 0 {
            let _infallible = writeln!(out, "\nand {} more", self.left_out);
        }
        out
    }
}

/// Longest piece of a line that is shown, in characters.
const SHOWN: usize = 160;

impl Diagnostics {
    fn excerpt(
        &self,
        out: &mut String,
        paint: &impl Fn(Part, &str) -> String,
        span: Span,
        label: Option<&str>,
        (arrow, part, mark): (&str, Part, char),
    ) {
        let Some(source) = self.source(span) else { return };
        let (number, column) = source.position(span.start);
        let (start, line) = source.line(number);
        let gutter = number.to_string().len();
        let frame = |text: String| paint(Part::Frame, &text);
        let arrow = frame(format!("{:gutter$}{arrow}", ""));
        let _infallible = writeln!(out, "{arrow} {}:{number}:{column}", escape(&source.name));
        // A long line is shown around its mark only, so the cost does not depend on its length.
        let at = crate::source::to_usize(span.start.saturating_sub(start)).min(line.len());
        let (before, after) = (line.get(..at).unwrap_or(""), line.get(at..).unwrap_or(""));
        let before = crate::source::tail(before, 4 * SHOWN);
        let after = crate::source::head(after, 8 * SHOWN);
        let count = before.chars().count();
        let skipped = count.saturating_sub(SHOWN / 2);
        let before: String = before.chars().skip(skipped).collect();
        let skipped = skipped + usize::from(at > 4 * SHOWN);
        let before = escape(&before);
        let after_shown: String = after.chars().take(SHOWN).collect();
        let marked = after.get(..crate::tokens::width(span).min(after.len())).unwrap_or(after);
        let marked = escape(&marked.chars().take(SHOWN).collect::<String>()).width().max(1);
        let dots = if skipped > 0 { "…" } else { "" };
        let more = if after.chars().nth(SHOWN).is_some() { "…" } else { "" };
        let (bar, numbered) = (frame(format!("{:gutter$} |", "")), frame(format!("{number} |")));
        let _infallible = writeln!(out, "{bar}\n{numbered} {dots}{before}{}{more}", escape(&after_shown));
        // Wide letters take two columns, and combining ones none.
        let indent = dots.width() + before.width();
        let label = label.map_or_else(String::new, |label| format!(" {}", escape(label)));
        let marks = paint(part, &format!("{}{label}", mark.to_string().repeat(marked)));
        let _infallible = writeln!(out, "{bar} {:indent$}{marks}", "");
    }
}

/// Text from outside, fit for a terminal: control and direction-changing characters are escaped.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' => out.push(' '),
            c if c.is_control()
                || is_bidi(c)
                || matches!(c, '\u{200b}' | '\u{feff}' | '\u{2028}' | '\u{2029}') =>
            {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

/// Characters that change the order in which a line is shown (Unicode Standard Annex 9, 2).
pub(crate) const fn is_bidi(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The candidate nearest to a misspelt word, if one is near.
pub(crate) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    near(word, candidates).map(|(_, candidate)| candidate)
}

/// The nearest candidate, and how far off it is.
pub(crate) fn near<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<(usize, &'a str)> {
    if word.len() > 64 {
        return None;
    }
    let limit = match word.chars().count() {
        0 => return None,
        1..=2 => 1,
        3..=5 => 2,
        _ => 3,
    };
    // Each letter more or less is an edit, and a letter has up to four bytes.
    let alike = |candidate: &&str| candidate.len().abs_diff(word.len()) <= 4 * limit;
    candidates
        .filter(alike)
        .map(|c| (distance(&word.to_ascii_lowercase(), &c.to_ascii_lowercase()), c))
        .filter(|(d, c)| *d <= limit && *d < c.chars().count())
        .min_by_key(|(d, c)| (*d, *c))
}

/// Edits (insert, delete, replace, swap of neighbours) between two short words.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut older: Vec<usize> = Vec::new();
    let mut old: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut new = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let get = |row: &[usize], k: usize| row.get(k).copied().unwrap_or(usize::MAX / 2);
            let mut best =
                (get(&old, j) + usize::from(x != y)).min(get(&old, j + 1) + 1).min(get(&new, j) + 1);
            let swapped = i > 0 && j > 0 && a.get(i - 1) == Some(y) && b.get(j - 1) == Some(x);
            if swapped {
                best = best.min(get(&older, j - 1) + 1);
            }
            new.push(best);
        }
        older = std::mem::replace(&mut old, new);
    }
    old.last().copied().unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_words_find_their_neighbour() {
        assert_eq!(nearest("exee", ["exe", "user"].into_iter()), Some("exe"));
        assert_eq!(nearest("usre", ["exe", "user"].into_iter()), Some("user"));
        assert_eq!(nearest("colour", ["exe", "user"].into_iter()), None);
    }

    #[test]
    fn colours_are_all_that_is_added() {
        let errors = crate::Policy::parse("t.pol", "a = IPv4{1.2.3};\na = *;\nallow smtp(b, a)").unwrap_err();
        let painted = errors.painted(|part, text| {
            let letter = match part {
                Part::Severity(_) => 's',
                Part::Message => 'm',
                Part::Related => 'r',
                Part::Frame => 'f',
            };
            format!("\u{1}{letter}{text}\u{2}")
        });
        assert!("smrf".chars().all(|letter| painted.contains(&format!("\u{1}{letter}"))), "{painted}");
        let mut plain = String::new();
        let mut rest = painted.chars();
        while let Some(c) = rest.next() {
            match c {
                '\u{1}' => drop(rest.next()),
                '\u{2}' => {}
                c => plain.push(c),
            }
        }
        assert_eq!(plain, errors.to_string());
    }

    #[test]
    fn control_characters_reach_no_terminal() {
        assert_eq!(escape("a\u{1b}[31mb\u{202e}c"), "a\\u{1b}[31mb\\u{202e}c");
    }
}
