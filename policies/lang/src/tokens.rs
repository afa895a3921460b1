//! Text to tokens.

use crate::{
    diagnostic::{Diagnostic, Diagnostics},
    source::{Span, to_u32, to_usize},
};

/// What a token is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    /// A name or keyword.
    Name,
    /// Begins with a digit (number, port range, date), or stands within `IPv4{…}` or `IPv6{…}`.
    Word,
    /// A string with its quotes.
    Text,
    /// `#` or `//` to the end of the line.
    Comment,
    Star,
    Slash,
    Comma,
    Semicolon,
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    And,
    Or,
    Not,
    Minus,
    ParenOpen,
    ParenClose,
    BraceOpen,
    BraceClose,
    End,
}

impl Kind {
    /// How messages call it.
    pub(crate) const fn describe(self) -> &'static str {
        match self {
            Self::Name => "a name",
            Self::Word => "a number",
            Self::Text => "a string",
            Self::Comment => "a comment",
            Self::Star => "`*`",
            Self::Slash => "`/`",
            Self::Comma => "`,`",
            Self::Semicolon => "`;`",
            Self::Equal => "`=`",
            Self::NotEqual => "`!=`",
            Self::Less => "`<`",
            Self::LessEqual => "`<=`",
            Self::Greater => "`>`",
            Self::GreaterEqual => "`>=`",
            Self::And => "`&`",
            Self::Or => "`|`",
            Self::Not => "`!`",
            Self::Minus => "`-`",
            Self::ParenOpen => "`(`",
            Self::ParenClose => "`)`",
            Self::BraceOpen => "`{`",
            Self::BraceClose => "`}`",
            Self::End => "the end of the file",
        }
    }
}

/// One token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token {
    pub(crate) kind: Kind,
    pub(crate) span: Span,
}

/// Splits a text. Comments are kept; `End` comes last. What cannot be a token is reported and left out.
pub(crate) fn tokens(file: u32, text: &str, errors: &mut Diagnostics) -> Vec<Token> {
    first_tokens(file, text, 0, usize::MAX, errors)
}

/// The same from one place on, up to so many, and perhaps a few more.
pub(crate) fn first_tokens(
    file: u32,
    text: &str,
    from: usize,
    most: usize,
    errors: &mut Diagnostics,
) -> Vec<Token> {
    let room = (text.len().saturating_sub(from) / 3).min(most);
    let mut lexer = Lexer { file, text, at: from, errors, out: Vec::with_capacity(room) };
    while lexer.out.len() <= most && lexer.next() {}
    let end = to_u32(text.len());
    lexer.out.push(Token { kind: Kind::End, span: Span { file, start: end, end } });
    lexer.out
}

/// Whether a dot stands there before a letter: in a DNS name without its quotes, which the parser tells of.
fn is_dotted(text: &str, at: usize) -> bool {
    text.get(at..).and_then(|t| t.strip_prefix('.')).is_some_and(|t| t.starts_with(char::is_alphanumeric))
}

struct Lexer<'a> {
    file: u32,
    text: &'a str,
    at: usize,
    errors: &'a mut Diagnostics,
    out: Vec<Token>,
}

impl Lexer<'_> {
    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn span(&self, start: usize) -> Span {
        Span { file: self.file, start: to_u32(start), end: to_u32(self.at) }
    }

    fn push(&mut self, kind: Kind, len: usize) {
        let start = self.at;
        self.at += len;
        let span = self.span(start);
        self.out.push(Token { kind, span });
    }

    fn take(&mut self, kind: Kind, accept: impl Fn(char) -> bool) {
        let len = self.rest().find(|c| !accept(c)).unwrap_or(self.rest().len());
        self.push(kind, len);
    }

    /// Whether the next token stands within the braces of an address set.
    fn in_addresses(&self) -> bool {
        let mut back = self.out.iter().rev().filter(|t| t.kind != Kind::Comment);
        // Only words and commas may stand between here and the brace; two suffice to tell, because
        // every word that follows the brace was itself read in this mode.
        match back.next().map(|t| t.kind) {
            Some(Kind::BraceOpen) => back.next().is_some_and(|t| {
                let name = self.text.get(t.span.range()).unwrap_or("");
                t.kind == Kind::Name
                    && (name.eq_ignore_ascii_case("ipv4") || name.eq_ignore_ascii_case("ipv6"))
            }),
            _ => false,
        }
    }

    /// Whether a token ends right here.
    fn follows_a_token(&self) -> bool {
        let ends = |t: &Token| to_usize(t.span.end) == self.at;
        self.out.last().is_some_and(|t| matches!(t.kind, Kind::Star | Kind::Name | Kind::Word) && ends(t))
    }

    fn next(&mut self) -> bool {
        let rest = self.rest();
        let Some(c) = rest.chars().next() else { return false };
        let second = rest.as_bytes().get(1).copied();
        match c {
            ' ' | '\t' | '\r' | '\n' => self.at += 1,
            '\u{feff}' if self.at == 0 => self.at += c.len_utf8(),
            '#' => self.take(Kind::Comment, |c| c != '\n'),
            '/' if second == Some(b'/') => self.take(Kind::Comment, |c| c != '\n'),
            '/' if second == Some(b'*') => self.block_comment(),
            '"' => self.string(),
            '{' => {
                self.push(Kind::BraceOpen, 1);
                if self.in_addresses() {
                    self.addresses();
                }
            }
            '*' => self.push(Kind::Star, 1),
            '/' => self.push(Kind::Slash, 1),
            ',' => self.push(Kind::Comma, 1),
            ';' => self.push(Kind::Semicolon, 1),
            '=' if second == Some(b'=') => self.push(Kind::Equal, 2),
            '=' => self.push(Kind::Equal, 1),
            '!' if second == Some(b'=') => self.push(Kind::NotEqual, 2),
            '!' => self.push(Kind::Not, 1),
            '<' if second == Some(b'=') => self.push(Kind::LessEqual, 2),
            '<' => self.push(Kind::Less, 1),
            '>' if second == Some(b'=') => self.push(Kind::GreaterEqual, 2),
            '>' => self.push(Kind::Greater, 1),
            '&' if second == Some(b'&') => self.push(Kind::And, 2),
            '&' => self.push(Kind::And, 1),
            '|' if second == Some(b'|') => self.push(Kind::Or, 2),
            '|' => self.push(Kind::Or, 1),
            '-' => self.push(Kind::Minus, 1),
            '(' => self.push(Kind::ParenOpen, 1),
            ')' => self.push(Kind::ParenClose, 1),
            '}' => self.push(Kind::BraceClose, 1),
            '0'..='9' => {
                self.take(Kind::Word, |c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':'))
            }
            c if c == '_' || c.is_alphabetic() || (is_dotted(rest, 0) && self.follows_a_token()) => {
                let rest = self.rest();
                let mut len = rest.len();
                for (i, c) in rest.char_indices() {
                    if !(c == '_' || c == '-' || c.is_alphanumeric() || is_dotted(rest, i)) {
                        len = i;
                        break;
                    }
                }
                self.push(Kind::Name, len);
            }
            c => self.unexpected(c),
        }
        true
    }

    fn unexpected(&mut self, c: char) {
        let start = self.at;
        self.at += c.len_utf8();
        // A run of rubbish is one error.
        while self.rest().starts_with(c) {
            self.at += c.len_utf8();
        }
        let span = self.span(start);
        let help = match c {
            '\'' => Some("strings stand in double quotes"),
            '\0' => Some("a policy is text: it has no NUL"),
            ':' => Some("a set is written `name = …;`"),
            '.' => Some("a name with dots is a string: \"…\""),
            _ => None,
        };
        let mut error = Diagnostic::error(format!("unexpected character `{}`", c.escape_debug()), span);
        error.help = help.map(str::to_owned);
        self.errors.push(error);
    }

    fn block_comment(&mut self) {
        let start = self.at;
        let len = self.rest().find("*/").map_or(self.rest().len(), |n| n + 2);
        self.at += len;
        let span = Span { file: self.file, start: to_u32(start), end: to_u32(start) + 2 };
        self.errors.push(
            Diagnostic::error("a comment goes from `#` or `//` to the end of its line", span)
                .help("begin each line with `#`"),
        );
    }

    fn string(&mut self) {
        let start = self.at;
        let mut chars = self.rest().char_indices().skip(1);
        let mut end = None;
        while let Some((i, c)) = chars.next() {
            match c {
                '\\' => {
                    chars.next();
                }
                '"' => {
                    end = Some(i + 1);
                    break;
                }
                '\n' => break,
                _ => {}
            }
        }
        if let Some(len) = end {
            self.push(Kind::Text, len);
            return;
        }
        // It is taken to end where such strings end, so that what follows is still understood.
        let rest = self.rest().get(1..).unwrap_or("");
        let len = rest.find(['\n', ',', '}', ')', ';']).unwrap_or(rest.len());
        self.push(Kind::Text, len + 1);
        let span = Span { file: self.file, start: to_u32(start), end: to_u32(start) + 1 };
        self.errors
            .push(Diagnostic::error("this string does not end on its line", span).help("close it with `\"`"));
    }

    /// The inside of `IPv4{…}` or `IPv6{…}`: words between commas.
    fn addresses(&mut self) {
        loop {
            let Some(c) = self.rest().chars().next() else { return };
            match c {
                ' ' | '\t' | '\r' | '\n' => self.at += 1,
                '#' => self.take(Kind::Comment, |c| c != '\n'),
                '/' if self.rest().starts_with("//") => self.take(Kind::Comment, |c| c != '\n'),
                ',' => self.push(Kind::Comma, 1),
                // `}` ends it; the others end it too, as someone forgot the `}`.
                '}' | ';' | ')' | '(' | '{' | '"' | '=' => return,
                c if c.is_ascii_graphic() => {
                    self.take(Kind::Word, |c| c.is_ascii_graphic() && !",;(){}\"=#".contains(c));
                }
                c => self.unexpected(c),
            }
        }
    }
}

/// The content of a string token, escapes resolved except `\*`, which a pattern needs to know of.
///
/// # Errors
/// The byte offset within the token and length of an escape that does not exist.
pub(crate) fn unquote(token: &str) -> Result<String, (u32, char)> {
    let inner = token.strip_prefix('"').unwrap_or(token);
    let inner = inner.strip_suffix('"').unwrap_or(inner);
    let mut out = String::with_capacity(inner.len());
    let mut chars = inner.char_indices();
    while let Some((i, c)) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some((_, '"')) => out.push('"'),
            Some((_, c @ ('\\' | '*'))) => {
                out.push('\\');
                out.push(c);
            }
            Some((_, c)) => return Err((to_u32(i) + 1, c)),
            None => return Err((to_u32(i) + 1, '\\')),
        }
    }
    Ok(out)
}

/// A string's content for people: all escapes resolved.
pub(crate) fn plain(content: &str) -> String {
    let mut out = String::with_capacity(content.len());
    let mut chars = content.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
    }
    out
}

/// Number of bytes of a span.
pub(crate) fn width(span: Span) -> usize {
    to_usize(span.end.saturating_sub(span.start))
}
