//! Text from outside, made harmless. Pure.

use std::fmt::Write;

/// Whether a character could change what a terminal or a reader sees around it: controls, and
/// Unicode's marks for direction and invisible joining (UAX #9; general category Cf).
fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// Bytes as text; what is no UTF-8 becomes `\xNN`.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// A command line as `/proc` has it, as one line: arguments parted by a space, at most `most` bytes.
#[must_use]
pub fn command_line(raw: &[u8], most: usize) -> String {
    let trimmed = raw.strip_suffix(b"\0").unwrap_or(raw);
    let spaced: Vec<u8> = trimmed.iter().map(|b| if *b == 0 { b' ' } else { *b }).collect();
    let mut line = text(&spaced);
    if line.len() > most {
        let cut = (0..=most).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
        line.truncate(cut);
        line.push('…');
    }
    line
}

/// Appends `value` as a JSON string (RFC 8259, 7); what is harmful is written as `\uNNNN`.
pub fn json_string(out: &mut String, value: &str) {
    out.push('"');
    // As nearly all is.
    if value.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'"' && b != b'\\') {
        out.push_str(value);
        out.push('"');
        return;
    }
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if is_harmful(c) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `value` with what is harmful written as in Rust (`\u{1b}`), for plain sentences.
#[must_use]
pub fn sentence(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        if is_harmful(c) {
            let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_control_reaches_a_reader_and_json_reads_it_back() {
        let nasty = "a\"\\\n\u{1b}[31m\u{202e}é\u{9b}\u{e0041}";
        let mut out = String::new();
        json_string(&mut out, nasty);
        assert!(!out.chars().any(is_harmful));
        assert_eq!(serde_json::from_str::<String>(&out).unwrap(), nasty);
        assert!(!sentence(nasty).chars().any(is_harmful));
    }

    #[test]
    fn command_lines_are_bounded_lines() {
        assert_eq!(command_line(b"ls\0-l\0", 100), "ls -l");
        assert_eq!(command_line(b"a\xff\0", 100), "a\\xff");
        assert_eq!(command_line("éé".as_bytes(), 3), "é…");
    }
}
