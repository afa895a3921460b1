//! The only place that writes to the user's terminal.

use std::io::{self, IsTerminal, Write};

use portcullis_policy::{Diagnostics, Part, Severity};

/// Standard output and standard error of one command.
///
/// A reader that goes away (`| head`) ends the command quietly, by SIGPIPE.
pub struct Out {
    stdout: io::Stdout,
    stderr: io::Stderr,
    /// Whether each of them is shown in colour.
    colour: bool,
    colour_of_notes: bool,
    /// Why a part of the result was not written, if one was not.
    lost: Option<io::Error>,
}

/// How a piece of text is coloured on a terminal (ECMA-48 SGR parameters).
#[derive(Clone, Copy, Debug)]
pub enum Ink {
    /// A permit, or a success.
    Good,
    /// A refusal, or an error.
    Bad,
    /// Something to notice.
    Note,
    /// Less important than its surroundings.
    Faint,
    /// A heading.
    Strong,
}

impl Ink {
    const fn sgr(self) -> &'static str {
        match self {
            Self::Good => "32",
            Self::Bad => "31",
            Self::Note => "33",
            Self::Faint => "2",
            Self::Strong => "1",
        }
    }

    fn on(self, text: &str) -> String {
        format!("\x1b[{}m{text}\x1b[0m", self.sgr())
    }
}

impl Out {
    /// The process's own standard output and error. Colour only on a terminal, and not with `NO_COLOR`.
    #[must_use]
    pub fn new() -> Self {
        let stdout = io::stdout();
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let (colour, colour_of_notes) =
            (wanted && stdout.is_terminal(), wanted && io::stderr().is_terminal());
        Self { stdout, stderr: io::stderr(), colour, colour_of_notes, lost: None }
    }

    /// Writes one line of the result.
    pub fn line(&mut self, text: impl AsRef<str>) {
        let mut to = self.stdout.lock();
        let written = writeln!(to, "{}", text.as_ref()).and_then(|()| to.flush());
        self.keep(written);
    }

    /// Whoever closed standard output does not want the rest; a full disk is another matter.
    fn keep(&mut self, written: io::Result<()>) {
        if let Err(error) = written
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            self.lost.get_or_insert(error);
        }
    }

    /// The exit status, unless some of the result could not be written: then it says so.
    #[must_use]
    pub fn unless_lost(&mut self, status: u8) -> u8 {
        let Some(error) = self.lost.take() else { return status };
        self.note(format!("error: cannot write the result: {error}"));
        crate::COULD_NOT
    }

    /// Writes text of the result as it is.
    pub fn text(&mut self, text: impl AsRef<str>) {
        let mut to = self.stdout.lock();
        let written = to.write_all(text.as_ref().as_bytes()).and_then(|()| to.flush());
        self.keep(written);
    }

    /// Writes one value as a line of JSON.
    pub fn json(&mut self, value: &impl serde::Serialize) {
        if let Ok(text) = serde_json::to_string(value) {
            self.line(text);
        }
    }

    /// Writes one line about the command itself to standard error.
    pub fn note(&mut self, text: impl AsRef<str>) {
        let _gone = writeln!(self.stderr, "portcullis: {}", text.as_ref());
    }

    /// Writes text to standard error as it is.
    pub fn diagnostic(&mut self, text: impl AsRef<str>) {
        let _gone = self.stderr.write_all(text.as_ref().as_bytes());
    }

    /// Writes what is wrong with a policy to standard error.
    pub fn diagnostics(&mut self, found: &Diagnostics) {
        let text = painted(found, self.colour_of_notes);
        let _gone = self.stderr.write_all(text.as_bytes());
    }

    /// Writes what is wrong with a policy as the result.
    pub fn findings(&mut self, found: &Diagnostics) {
        self.line(painted(found, self.colour));
    }

    /// Writes an error, `error: ` before it and its causes behind.
    pub fn error(&mut self, error: &dyn std::error::Error) {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(it) = cause {
            text.push_str(": ");
            text.push_str(&it.to_string());
            cause = it.source();
        }
        let _gone = writeln!(self.stderr, "portcullis: error: {text}");
    }

    /// Prints what the argument parser has to say; the result is the exit status.
    pub fn usage(&mut self, error: &clap::Error) -> u8 {
        let _gone = error.print();
        u8::try_from(error.exit_code()).unwrap_or(crate::COULD_NOT)
    }

    /// `text` in colour, if this output has colour.
    #[must_use]
    pub fn ink(&self, ink: Ink, text: &str) -> String {
        if self.colour { ink.on(text) } else { text.to_owned() }
    }
}

fn painted(found: &Diagnostics, colour: bool) -> String {
    found.painted(|part, text| match part {
        _ if !colour => text.to_owned(),
        Part::Severity(Severity::Error) => Ink::Bad.on(text),
        Part::Severity(Severity::Warning) => Ink::Note.on(text),
        Part::Message => Ink::Strong.on(text),
        Part::Related => Ink::Good.on(text),
        Part::Frame => Ink::Faint.on(text),
    })
}

/// Makes text from outside safe for a terminal: control characters, escape sequences and characters that
/// change the direction of text become visible escapes.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        let hidden = matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
        match c {
            '\\' => safe.push_str("\\\\"),
            c if c.is_control() || hidden => safe.extend(c.escape_default()),
            c => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_outside_moves_the_cursor_or_turns_the_text() {
        assert_eq!(escape("a\x1b[2Jb\r\n"), "a\\u{1b}[2Jb\\r\\n");
        assert_eq!(escape("x\u{202e}gpj"), "x\\u{202e}gpj");
        assert_eq!(escape("back\\slash é"), "back\\\\slash é");
        assert_eq!(escape("\u{9b}31m"), "\\u{9b}31m");
    }
}
