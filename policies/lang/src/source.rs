//! Source files and places in them.

use std::sync::Arc;

/// Bytes `start..end` of one file of a policy.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Span {
    /// Index of the file among those loaded; 0 is the first.
    pub file: u32,
    /// First byte.
    pub start: u32,
    /// One past the last byte.
    pub end: u32,
}

impl Span {
    /// The smallest span that covers both; of the first's file.
    #[must_use]
    pub fn to(self, end: Self) -> Self {
        Self { file: self.file, start: self.start.min(end.start), end: self.end.max(end.end) }
    }

    pub(crate) fn range(self) -> std::ops::Range<usize> {
        to_usize(self.start)..to_usize(self.end)
    }
}

/// Bytes of a line that no person wrote.
const LONG: usize = 4096;

/// One source file.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its name, as shown in messages.
    pub name: Arc<str>,
    /// Its text.
    pub text: Arc<str>,
    lines: Arc<[u32]>,
}

impl Source {
    /// Takes a text that is below 4 GiB (callers bound it long before).
    #[must_use]
    pub fn new(name: &str, text: &str) -> Self {
        let mut lines = vec![0];
        lines.extend(text.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(i, _)| to_u32(i + 1)));
        Self { name: name.into(), text: text.into(), lines: lines.into() }
    }

    /// Line and column of a byte, both from 1; the column counts characters.
    #[must_use]
    pub fn position(&self, offset: u32) -> (usize, usize) {
        let line = self.lines.partition_point(|start| *start <= offset).max(1);
        let start = self.lines.get(line - 1).copied().unwrap_or(0);
        let before = self.text.get(to_usize(start)..to_usize(offset)).unwrap_or("");
        // Nobody counts characters in a line of many kilobytes; in such a one bytes will do.
        let column = if before.len() > LONG { before.len() } else { before.chars().count() };
        (line, column + 1)
    }

    /// Byte where a line begins and the text of it without its end, line counted from 1.
    #[must_use]
    pub fn line(&self, number: usize) -> (u32, &str) {
        let start = number.checked_sub(1).and_then(|n| self.lines.get(n)).copied().unwrap_or(0);
        let end = self.lines.get(number).copied().map_or(self.text.len(), to_usize);
        let text = self.text.get(to_usize(start)..end).unwrap_or("");
        (start, text.trim_end_matches(['\n', '\r']))
    }

    /// The text of a span.
    #[must_use]
    pub fn slice(&self, span: Span) -> &str {
        self.text.get(span.range()).unwrap_or("")
    }
}

/// The end of a text, of about so many bytes.
pub(crate) fn tail(text: &str, bytes: usize) -> &str {
    let from = text.len().saturating_sub(bytes);
    (from..text.len()).find_map(|i| text.get(i..)).unwrap_or("")
}

/// The beginning of a text, of about so many bytes.
pub(crate) fn head(text: &str, bytes: usize) -> &str {
    let to = text.len().min(bytes);
    (0..=to).rev().find_map(|i| text.get(..i)).unwrap_or("")
}

/// A length or index that callers keep below 2^32.
pub(crate) fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Lossless on every machine we run on.
pub(crate) fn to_usize(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
