//! How a story is told: for people, or as one JSON object per line.

use serde_json::json;

use crate::{
    Format,
    audit::Record,
    output::{Ink, Out},
};

/// Tells it, and counts what did not go as it should.
pub struct Teller<'a> {
    out: &'a mut Out,
    json: bool,
    wrong: u32,
}

impl<'a> Teller<'a> {
    /// Nothing told yet.
    pub fn new(out: &'a mut Out, format: Format) -> Self {
        Self { out, json: format == Format::Json, wrong: 0 }
    }

    /// Title and picture.
    pub fn open(&mut self, title: &str, picture: &str) {
        if self.json {
            return self.out.json(&json!({ "title": title }));
        }
        self.out.line("");
        self.out.line(self.out.ink(Ink::Strong, title));
        self.out.text(picture);
    }

    /// A new scene.
    pub fn head(&mut self, text: &str) {
        if self.json {
            return self.out.json(&json!({ "scene": text }));
        }
        self.out.line("");
        self.out.line(self.out.ink(Ink::Strong, text));
    }

    /// A word to the audience.
    pub fn say(&mut self, text: &str) {
        if self.json {
            return self.out.json(&json!({ "text": text }));
        }
        self.out.line(format!("  {text}"));
    }

    /// What somebody types.
    pub fn shell(&mut self, host: &str, command: &str) {
        if self.json {
            return self.out.json(&json!({ "host": host, "command": command }));
        }
        let ink = if host == "stranger" { Ink::Bad } else { Ink::Good };
        let host = self.out.ink(ink, &format!("{host:>8}"));
        self.out.line(format!("{host} $ {command}"));
    }

    /// A file, or what a command answers.
    pub fn quote(&mut self, text: &str, ink: Option<Ink>) {
        if self.json {
            return self.out.json(&json!({ "output": text }));
        }
        for line in text.lines() {
            let line = format!("    {line}");
            self.out.line(ink.map_or_else(|| line.clone(), |ink| self.out.ink(ink, &line)));
        }
    }

    /// A record of the log, and how many like it follow.
    pub fn show(&mut self, record: &Record, more: u32) {
        if self.json {
            return self.out.json(&json!({ "record": record.value(), "more": more }));
        }
        let what = record.what(self.out);
        self.out.line(format!("  {:>4} {what}", record.shown("seq").unwrap_or_default()));
        if let Some(why) = record.why() {
            let why = self.out.ink(Ink::Faint, &why);
            self.out.line(format!("       {why}"));
        }
        if more > 0 {
            self.out.line(self.out.ink(Ink::Faint, &format!("           and {more} more like this")));
        }
    }

    /// What was to be, and whether it was.
    pub fn check(&mut self, right: bool, text: &str) {
        self.wrong += u32::from(!right);
        if self.json {
            return self.out.json(&json!({ "check": text, "right": right }));
        }
        let mark = if right { self.out.ink(Ink::Good, "✓") } else { self.out.ink(Ink::Bad, "✗") };
        self.out.line(format!("  {mark} {text}"));
    }

    /// The end; the result is how much went wrong.
    pub fn close(&mut self, seconds: f32) -> u32 {
        if self.json {
            self.out.json(&json!({ "wrong": self.wrong, "seconds": seconds }));
        } else if self.wrong == 0 {
            let time = format!("all of it in {seconds:.1} s, and nothing of it is left on this machine");
            self.out.line("");
            self.out.line(self.out.ink(Ink::Faint, &time));
        } else {
            self.out.note(format!("{} of the things above did not go as they should", self.wrong));
        }
        self.wrong
    }
}
