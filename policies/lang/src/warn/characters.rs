//! Characters that look like others, or change the order in which a line is shown.

use crate::{
    diagnostic::{Diagnostic, Diagnostics, is_bidi},
    source::{Source, Span, to_u32},
    tokens::{self, Kind},
};

/// Letters of other scripts that look like ASCII ones (Unicode Technical Standard 39, confusables:
/// the ones of Cyrillic, Greek and Armenian that most fonts draw alike).
const LOOKALIKES: &[(char, char)] = &[
    ('а', 'a'),
    ('А', 'A'),
    ('В', 'B'),
    ('с', 'c'),
    ('С', 'C'),
    ('ԁ', 'd'),
    ('е', 'e'),
    ('Е', 'E'),
    ('һ', 'h'),
    ('Н', 'H'),
    ('і', 'i'),
    ('І', 'I'),
    ('ј', 'j'),
    ('Ј', 'J'),
    ('К', 'K'),
    ('ӏ', 'l'),
    ('М', 'M'),
    ('о', 'o'),
    ('О', 'O'),
    ('р', 'p'),
    ('Р', 'P'),
    ('ԛ', 'q'),
    ('ѕ', 's'),
    ('Ѕ', 'S'),
    ('Т', 'T'),
    ('ѵ', 'v'),
    ('ԝ', 'w'),
    ('х', 'x'),
    ('Х', 'X'),
    ('у', 'y'),
    ('α', 'a'),
    ('Α', 'A'),
    ('Β', 'B'),
    ('Ε', 'E'),
    ('Η', 'H'),
    ('ι', 'i'),
    ('Ι', 'I'),
    ('Κ', 'K'),
    ('Μ', 'M'),
    ('ν', 'v'),
    ('Ν', 'N'),
    ('ο', 'o'),
    ('Ο', 'O'),
    ('ρ', 'p'),
    ('Ρ', 'P'),
    ('Τ', 'T'),
    ('υ', 'u'),
    ('Χ', 'X'),
    ('Υ', 'Y'),
    ('Ζ', 'Z'),
    ('օ', 'o'),
    ('ս', 'u'),
    ('հ', 'h'),
    ('ո', 'n'),
    ('ⅼ', 'l'),
    ('ｅ', 'e'),
    ('ａ', 'a'),
    ('ｏ', 'o'),
    ('․', '.'),
    ('∗', '*'),
    ('＊', '*'),
    ('⁄', '/'),
    ('∕', '/'),
    ('‐', '-'),
    ('‑', '-'),
    ('–', '-'),
    ('−', '-'),
];

/// Warns of such characters. Plain ASCII files, which are nearly all, cost one look.
pub(crate) fn characters(sources: &[Source], out: &mut Diagnostics) {
    for (file, source) in (0..).zip(sources) {
        if source.text.is_ascii() {
            continue;
        }
        let found = tokens::tokens(file, &source.text, &mut Diagnostics::default());
        for token in found {
            let text = source.slice(token.span);
            if text.is_ascii() {
                continue;
            }
            let at = |i: usize, c: char| {
                let start = token.span.start + to_u32(i);
                Span { file, start, end: start + to_u32(c.len_utf8()) }
            };
            if let Some((i, c)) = text.char_indices().find(|(_, c)| is_bidi(*c)) {
                let message = format!("U+{:04X} changes the order in which this line is shown", u32::from(c));
                let warning = Diagnostic::warning(message, at(i, c));
                out.push(warning.label("what you see is not what is there"));
            }
            if token.kind == Kind::Comment {
                continue;
            }
            let alike = |c: char| LOOKALIKES.iter().find(|(other, _)| *other == c).map(|(_, ascii)| *ascii);
            if let Some((i, c, ascii)) = text.char_indices().find_map(|(i, c)| Some((i, c, alike(c)?))) {
                let message = format!("U+{:04X} looks like `{ascii}` and is another letter", u32::from(c));
                out.push(Diagnostic::warning(message, at(i, c)).label(format!("did you mean `{ascii}`?")));
            }
        }
    }
}
