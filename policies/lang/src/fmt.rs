//! One way to write a policy. Works on tokens, so that nothing but spaces and line ends can change,
//! and comments stay where they are.

use crate::{
    diagnostic::{Diagnostics, Severity},
    parser,
    source::Source,
    tokens::{self, Kind, Token},
};

/// Longest line, where there is a place to break it.
const WIDTH: usize = 100;

/// Formats a policy's text. Formatting the result again changes nothing.
///
/// # Errors
/// The text's syntax errors. Names are not looked at, so one file of several can be formatted.
pub fn format(name: &str, text: &str) -> Result<String, Diagnostics> {
    let mut errors = Diagnostics::default();
    if text.len() > crate::load::LARGEST {
        let message = format!("this policy is larger than {} bytes", crate::load::LARGEST);
        errors.push(crate::diagnostic::Diagnostic::error(message, crate::source::Span::default()));
        return Err(errors.with_sources([Source::new(name, "")]));
    }
    parser::parse(0, text, &mut { parser::MOST_WORDS }, &mut errors);
    if errors.iter().any(|d| d.severity == Severity::Error) {
        return Err(errors.with_sources([Source::new(name, text)]));
    }
    let tokens = tokens::tokens(0, text, &mut errors);
    Ok(layout(&statements(text, &tokens)))
}

/// One statement, or one comment that stands alone.
#[derive(Default)]
struct Statement {
    /// Words that may not be separated by a line end, with whether a space comes before each.
    words: Vec<(bool, String)>,
    /// A comment behind it on its last line.
    comment: Option<String>,
    blank_before: bool,
    indent: usize,
    /// How many words stand before the `=` of a definition.
    key: Option<usize>,
}

/// Whether a line end stands between two places.
fn lines_between(text: &str, from: usize, to: usize) -> usize {
    text.get(from..to).unwrap_or("").bytes().filter(|b| *b == b'\n').count()
}

fn statements(text: &str, tokens: &[Token]) -> Vec<Statement> {
    let mut done: Vec<Statement> = Vec::new();
    let mut current = Statement::default();
    let (mut end, mut braces, mut indent) = (0, 0_usize, 0);
    let mut previous: Option<Kind> = None;
    for token in tokens {
        let range = token.span.range();
        let lines = lines_between(text, end, range.start);
        end = range.end;
        let slice = text.get(range).unwrap_or("").trim_end();
        if token.kind == Kind::End {
            break;
        }
        if token.kind == Kind::Comment {
            if current.words.is_empty() {
                match done.last_mut() {
                    Some(last) if lines == 0 && last.comment.is_none() => {
                        last.comment = Some(slice.to_owned())
                    }
                    _ => done.push(Statement {
                        comment: Some(slice.to_owned()),
                        blank_before: lines > 1,
                        indent,
                        ..Statement::default()
                    }),
                }
            } else {
                // In the midst of a statement: it ends its line.
                current.words.push((true, format!("{slice}\n")));
            }
            continue;
        }
        let closes_test = token.kind == Kind::BraceClose && braces == 0 && indent > 0;
        if closes_test && current.words.is_empty() {
            indent -= 1;
        }
        if current.words.is_empty() {
            current.blank_before = lines > 1 && !closes_test;
            current.indent = indent;
            previous = None;
        }
        let space = previous.is_some_and(|p| is_spaced(p, token.kind, braces > 0));
        if token.kind == Kind::Equal && braces == 0 {
            current.key = Some(current.words.len());
        }
        let word = match slice {
            "&&" => "&",
            "||" => "|",
            "==" => "=",
            other => other,
        };
        push(&mut current.words, space, word, previous, token.kind, braces > 0);
        let opens_test = token.kind == Kind::BraceOpen && previous == Some(Kind::Text);
        previous = Some(token.kind);
        match token.kind {
            Kind::BraceOpen if opens_test => indent += 1,
            Kind::BraceOpen => braces += 1,
            Kind::BraceClose if braces > 0 => braces -= 1,
            _ => {}
        }
        // A `;` after the `}` of a test says nothing.
        if token.kind == Kind::Semicolon && current.words.len() == 1 {
            current = Statement::default();
        } else if opens_test || closes_test || token.kind == Kind::Semicolon {
            done.push(std::mem::take(&mut current));
        }
    }
    if !current.words.is_empty() {
        done.push(current);
    }
    done
}

/// Options that are followed by what they say.
const VALUED: [&str; 5] = ["using", "with", "expires", "as", "because"];

/// Adds a token: to the last word, unless a line may end before it.
fn push(
    words: &mut Vec<(bool, String)>,
    space: bool,
    text: &str,
    before: Option<Kind>,
    kind: Kind,
    in_braces: bool,
) {
    let may_break = matches!(before, Some(Kind::Comma))
        || matches!(kind, Kind::And | Kind::Or)
        || (kind == Kind::Equal && !in_braces)
        || (space && !matches!(before, Some(Kind::And | Kind::Or)));
    // What an option says stays on its line.
    let option = |last: &str| last.rsplit(' ').next().is_some_and(|word| VALUED.contains(&word));
    match words.last_mut() {
        Some((_, last)) if (!may_break || (space && !in_braces && option(last))) && !last.ends_with('\n') => {
            if space {
                last.push(' ');
            }
            last.push_str(text);
        }
        _ => words.push((space, text.to_owned())),
    }
}

/// Whether a space stands between two tokens.
fn is_spaced(before: Kind, kind: Kind, in_braces: bool) -> bool {
    let is_comparison = |k: Kind| {
        matches!(
            k,
            Kind::Equal | Kind::NotEqual | Kind::Less | Kind::LessEqual | Kind::Greater | Kind::GreaterEqual
        )
    };
    match (before, kind) {
        (
            _,
            Kind::Comma | Kind::Semicolon | Kind::ParenClose | Kind::BraceClose | Kind::Slash | Kind::Minus,
        )
        | (Kind::ParenOpen | Kind::Not | Kind::Slash | Kind::Minus | Kind::BraceOpen, _) => false,
        (Kind::Comma, _) => true,
        (_, k) | (k, _) if in_braces && is_comparison(k) => false,
        (Kind::Name | Kind::Word | Kind::Star, Kind::ParenOpen) | (Kind::Name, Kind::BraceOpen) => false,
        _ => true,
    }
}

fn layout(statements: &[Statement]) -> String {
    let mut out = String::new();
    // Definitions that follow one another form a group, and their `=` stand under each other.
    let together = |before: &Statement, next: &Statement| {
        before.key.is_some() && next.key.is_some() && !next.blank_before
    };
    for group in statements.chunk_by(together) {
        let widest = group.iter().filter_map(|s| Some(key_width(s, s.key?))).max().unwrap_or(0);
        for statement in group {
            if statement.blank_before && !out.is_empty() {
                out.push('\n');
            }
            let own = statement.key.map_or(widest, |key| key_width(statement, key));
            // A very long name does not push the others away.
            write_statement(&mut out, statement, if widest <= 40 { widest - own } else { 0 });
        }
    }
    out
}

/// Characters before the `=` of a definition.
fn key_width(statement: &Statement, key: usize) -> usize {
    statement.words.iter().take(key).map(|(space, w)| usize::from(*space) + w.chars().count()).sum()
}

fn write_statement(out: &mut String, statement: &Statement, padding: usize) {
    let indent = statement.indent * 4;
    let mut column = indent;
    out.push_str(&" ".repeat(indent));
    for (i, (space, word)) in statement.words.iter().enumerate() {
        if Some(i) == statement.key {
            out.push_str(&" ".repeat(padding));
            column += padding;
        }
        let width = word.trim_end().chars().count();
        if column > indent && column + usize::from(*space) + width > WIDTH && i > 0 && !out.ends_with('\n') {
            out.push('\n');
        }
        if out.ends_with('\n') && i > 0 {
            out.push_str(&" ".repeat(indent + 4));
            column = indent + 4;
        } else if *space {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += width;
    }
    if let Some(comment) = &statement.comment {
        if !statement.words.is_empty() {
            out.push_str("  ");
        }
        out.push_str(comment);
    }
    if !out.ends_with('\n') {
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formatted(text: &str) -> String {
        let once = format("t.pol", text).unwrap_or_else(|d| panic!("{d}"));
        assert_eq!(format("t.pol", &once).unwrap(), once, "formatting again changes it");
        once
    }

    #[test]
    fn the_figures_are_written_as_we_would() {
        for text in [
            include_str!("../../examples/figure-1.pol"),
            include_str!("../../examples/figure-2.pol"),
            include_str!("../../examples/beyond.pol"),
        ] {
            assert_eq!(formatted(text), text);
        }
    }

    #[test]
    fn comments_stay_with_their_statement() {
        let text = "# head\n\n\n\na=x509{ name = \"b\" ,ver>3};# why\nallow smtp ( a ,* )using tls  expires 2027-01-31;\n// end";
        assert_eq!(
            formatted(text),
            "# head\n\na = x509{name=\"b\", ver>3};  # why\nallow smtp(a, *) using tls expires 2027-01-31;\n// end\n"
        );
    }

    #[test]
    fn a_comment_within_a_statement_ends_its_line() {
        let text = "a = IPv4{10.0.0.1, # first\n 10.0.0.2};";
        assert_eq!(formatted(text), "a = IPv4{10.0.0.1, # first\n    10.0.0.2};\n");
    }

    #[test]
    fn long_lists_are_folded() {
        let list = (0..40).map(|i| format!("10.0.0.{i}")).collect::<Vec<_>>().join(",");
        let text = formatted(&format!("a = IPv4{{{list}}};"));
        assert!(text.lines().all(|l| l.chars().count() <= WIDTH) && text.lines().count() > 1);
    }

    #[test]
    fn tests_are_indented() {
        let text = "test \"x\"{allow smtp(*,*);\n# c\nrefuse tcp/1000-2000( *, !(a|b) );};";
        assert_eq!(
            formatted(text),
            "test \"x\" {\n    allow smtp(*, *);\n    # c\n    refuse tcp/1000-2000(*, !(a | b));\n}\n"
        );
    }
}
