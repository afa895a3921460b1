//! Tokens to the syntax tree. Reports every error of a file: after one, it goes on with the next
//! statement.

mod principal;

use portcullis_types::Lane;

use crate::{
    diagnostic::{Diagnostic, Diagnostics, nearest},
    source::{Source, Span},
    syntax::{Date, Expectation, Item, Name, Options, RuleItem, ServiceItem, Spanned, TestItem},
    tokens::{self, Kind, Token},
};

/// An error was reported and the statement is lost.
struct Lost;
type Parsed<T> = Result<T, Lost>;

/// Deeper nesting is refused; a person's policy has a tenth of it.
const DEEPEST: usize = 64;

const STATEMENTS: [&str; 5] = ["allow", "deny", "service", "test", "include"];
const FORMS: &str =
    "a statement is `name = …;`, `allow …;`, `deny …;`, `service …;`, `include …;` or `test …`";
const OPTIONS: [&str; 7] = ["using", "expires", "audit", "with", "related", "as", "because"];

/// Words of a policy, all its files together: twice what 100,000 rules take. A word can take a hundred bytes
/// of memory, so the size of files alone bounds too little.
pub(crate) const MOST_WORDS: usize = 4 << 20;

/// Parses one file; `words` is how many are left to it, and to those after it.
pub(crate) fn parse(file: u32, text: &str, words: &mut usize, errors: &mut Diagnostics) -> Vec<Item> {
    let tokens = tokens::first_tokens(file, text, 0, *words, errors);
    if tokens.len() > *words {
        let message = format!("a policy has at most {MOST_WORDS} words");
        let span = tokens.last().map(|t| Span { end: t.span.start, ..t.span }).unwrap_or_default();
        errors.push(Diagnostic::error(message, span).label("what follows is not read"));
        return Vec::new();
    }
    *words -= tokens.len();
    let mut parser = Parser::new(text, tokens, errors);
    let mut items = Vec::new();
    while parser.peek().kind != Kind::End {
        let before = parser.at;
        match parser.item() {
            Ok(item) => items.push(item),
            Err(Lost) => {
                if parser.at == before {
                    parser.take();
                }
                parser.recover();
            }
        }
    }
    items.append(&mut parser.broken);
    items
}

/// Parses a principal that stands alone, as on a command line; `file` is the number that its spans have.
pub(crate) fn parse_principal(
    file: u32,
    text: &str,
    errors: &mut Diagnostics,
) -> Option<crate::syntax::Expr> {
    let tokens = tokens::tokens(file, text, errors);
    let mut parser = Parser::new(text, tokens, errors);
    let expr = parser.expr().ok()?;
    parser.expect(Kind::End, "after the principal").ok()?;
    Some(expr)
}

/// Parses a service that stands alone.
pub(crate) fn parse_service(file: u32, text: &str, errors: &mut Diagnostics) -> Option<Vec<ServiceItem>> {
    let tokens = tokens::tokens(file, text, errors);
    let mut parser = Parser::new(text, tokens, errors);
    let items = parser.service_items().ok()?;
    parser.expect(Kind::End, "after the service").ok()?;
    Some(items)
}

/// The parts of a rule that was read before.
pub(crate) fn rule_parts(source: &Source, rule: Span) -> Option<RuleParts> {
    let text = source.text.get(..rule.range().end)?;
    let mut errors = Diagnostics::default();
    let tokens = tokens::first_tokens(rule.file, text, rule.range().start, usize::MAX, &mut errors);
    let mut parser = Parser::new(text, tokens, &mut errors);
    parser.take();
    let (_, service, from, to) = parser.flow().ok()?;
    let options = parser.options().ok()?;
    Some(RuleParts { service, ends: [from, to], options })
}

/// A rule as it is written.
pub(crate) struct RuleParts {
    pub(crate) service: Span,
    /// FROM and TO.
    pub(crate) ends: [crate::syntax::Expr; 2],
    pub(crate) options: Options,
}

/// What other tools call it, and this language otherwise.
pub(crate) fn elsewhere(word: &str) -> Option<&'static str> {
    Some(match word.to_ascii_lowercase().as_str() {
        "permit" | "accept" | "pass" => "allow",
        "drop" | "reject" | "block" | "forbid" | "refuse" => "deny",
        "mtls" | "ssl" | "https" => "tls",
        "esp" | "vpn" | "wireguard" => "ipsec",
        "none" | "clear" | "tcp" => "plain",
        "and" => "&",
        "or" => "|",
        "not" => "!",
        "any" | "all" | "anyone" | "everyone" | "anybody" | "world" => "*",
        "localhost" | "loopback" => "IPv4{127.0.0.0/8}",
        "cn" | "dns" | "host" | "hostname" | "san" | "fqdn" => "name",
        "o" | "organisation" | "organization" => "org",
        "version" => "ver",
        "ca" => "issuer",
        "path" | "program" | "binary" | "file" | "command" | "image" => "exe",
        "uid" | "username" | "owner" => "user",
        "gid" => "group",
        "hash" | "checksum" | "digest" => "sha256",
        "args" | "argv" | "arguments" => "cmdline",
        "parent" | "ppid" => "ancestor",
        "service" => "unit",
        _ => return None,
    })
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    /// Definitions that could not be read: their names are known, so that using them is no second error.
    broken: Vec<Item>,
    errors: &'a mut Diagnostics,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str, mut tokens: Vec<Token>, errors: &'a mut Diagnostics) -> Self {
        tokens.retain(|t| t.kind != Kind::Comment);
        Self { text, tokens, at: 0, depth: 0, broken: Vec::new(), errors }
    }

    fn peek_at(&self, n: usize) -> Token {
        let last = self.tokens.len().saturating_sub(1);
        let end = Token { kind: Kind::End, span: Span::default() };
        self.tokens.get((self.at + n).min(last)).copied().unwrap_or(end)
    }

    fn peek(&self) -> Token {
        self.peek_at(0)
    }

    fn slice(&self, token: Token) -> &'a str {
        self.text.get(token.span.range()).unwrap_or("")
    }

    fn word(&self) -> &'a str {
        let token = self.peek();
        if token.kind == Kind::Name { self.slice(token) } else { "" }
    }

    fn take(&mut self) -> Token {
        let token = self.peek();
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        token
    }

    fn accept(&mut self, kind: Kind) -> Option<Token> {
        (self.peek().kind == kind).then(|| self.take())
    }

    fn lost<T>(&mut self, diagnostic: Diagnostic) -> Parsed<T> {
        self.errors.push(diagnostic);
        Err(Lost)
    }

    fn unexpected<T>(&mut self, wanted: &str) -> Parsed<T> {
        let error = self.not(wanted);
        self.lost(error)
    }

    /// The error of the next token, which is not what is wanted.
    fn not(&self, wanted: &str) -> Diagnostic {
        let token = self.peek();
        let found = match token.kind {
            Kind::Name | Kind::Word => format!("`{}`", self.slice(token)),
            kind => kind.describe().to_owned(),
        };
        Diagnostic::error(format!("expected {wanted}, found {found}"), token.span)
    }

    fn expect(&mut self, kind: Kind, place: &str) -> Parsed<Token> {
        match self.accept(kind) {
            Some(token) => Ok(token),
            None => self.unexpected(&format!("{} {place}", kind.describe())),
        }
    }

    fn name(&mut self, wanted: &str) -> Parsed<Name> {
        if self.peek().kind != Kind::Name {
            return self.unexpected(wanted);
        }
        let token = self.take();
        let text = self.slice(token);
        if text.contains('.') {
            let error = Diagnostic::error(format!("`{text}` has dots, and names have none"), token.span);
            return self.lost(error.label(format!("a host is `x509{{name=\"{text}\"}}`")));
        }
        Ok(Spanned { value: text.to_owned(), span: token.span })
    }

    fn text_token(&mut self, wanted: &str) -> Parsed<Name> {
        if self.peek().kind != Kind::Text {
            let mut error = self.not(wanted);
            if matches!(self.peek().kind, Kind::Name | Kind::Word) {
                error.label = Some(format!("did you mean \"{}\"?", self.slice(self.peek())));
            }
            return self.lost(error);
        }
        let token = self.take();
        match tokens::unquote(self.slice(token)) {
            Ok(value) => Ok(Spanned { value, span: token.span }),
            Err((offset, c)) => {
                let start = token.span.start + offset;
                let span = Span { start, end: start + 1, ..token.span };
                self.errors.push(
                    Diagnostic::error(format!("unknown escape `\\{}`", c.escape_debug()), span)
                        .label("only `\\\"`, `\\\\` and `\\*` exist"),
                );
                Ok(Spanned { value: String::new(), span: token.span })
            }
        }
    }

    /// Goes to what looks like the next statement.
    fn recover(&mut self) {
        let mut braces = 0_usize;
        loop {
            let token = self.peek();
            match token.kind {
                Kind::End => return,
                Kind::Semicolon if braces == 0 => {
                    self.take();
                    return;
                }
                Kind::BraceOpen => braces += 1,
                Kind::BraceClose => {
                    braces = braces.saturating_sub(1);
                    // The end of a test block, after which there need be no semicolon.
                    if braces == 0 && self.starts_statement(1) {
                        self.take();
                        return;
                    }
                }
                Kind::Name if braces == 0 && (self.starts_statement(0) || self.looks_like_statement()) => {
                    return;
                }
                _ => {}
            }
            self.take();
        }
    }

    /// Whether a statement's keyword, or `name =`, stands there as the first thing on its line.
    fn starts_statement(&self, n: usize) -> bool {
        let token = self.peek_at(n);
        let keyword = STATEMENTS.contains(&self.slice(token)) || self.peek_at(n + 1).kind == Kind::Equal;
        token.kind == Kind::Name && keyword && self.is_first(token)
    }

    /// Whether a misspelt keyword stands there as the first thing on its line.
    fn looks_like_statement(&self) -> bool {
        let token = self.peek();
        self.is_first(token) && nearest(self.slice(token), STATEMENTS.into_iter()).is_some()
    }

    fn is_first(&self, token: Token) -> bool {
        let before = self.text.get(..token.span.range().start).unwrap_or("");
        before.bytes().rev().find(|b| !matches!(b, b' ' | b'\t')).is_none_or(|b| b == b'\n')
    }

    fn semicolon(&mut self) {
        if self.accept(Kind::Semicolon).is_some() {
            return;
        }
        let previous = self.at.checked_sub(1).and_then(|n| self.tokens.get(n)).map(|t| t.span);
        let span = previous.unwrap_or_default();
        let span = Span { start: span.end, end: span.end + 1, ..span };
        self.errors.push(Diagnostic::error("this statement does not end", span).label("`;` expected here"));
        if !self.starts_statement(0) && self.peek().kind != Kind::End && self.peek().kind != Kind::BraceClose
        {
            self.recover();
        }
    }

    fn item(&mut self) -> Parsed<Item> {
        let next = self.peek_at(1).kind;
        let item = match self.word() {
            _ if next == Kind::Equal => self.set()?,
            "allow" | "deny" => Item::Rule(Box::new(self.rule()?)),
            "service" => self.service()?,
            "include" => {
                self.take();
                Item::Include(self.text_token("the file to include, as a string")?)
            }
            "test" => return Ok(Item::Test(self.test()?)),
            "" => {
                let error = self.not("a statement").help(FORMS);
                return self.lost(error);
            }
            other if principal::PRINCIPALS.contains(&self.slice(self.peek_at(1))) => {
                let error = Diagnostic::error(format!("expected `=` after `{other}`"), self.peek_at(1).span);
                return self.lost(error.label(format!("did you mean `{other} = …`?")));
            }
            other => {
                let span = self.peek().span;
                let guess = elsewhere(other).filter(|g| STATEMENTS.contains(g));
                let guess = guess.or_else(|| nearest(other, STATEMENTS.into_iter()));
                let mut error = Diagnostic::error(format!("no statement begins with `{other}`"), span);
                error.label = guess.map(|g| format!("did you mean `{g}`?"));
                error.help = guess.is_none().then(|| FORMS.to_owned());
                return self.lost(error);
            }
        };
        self.semicolon();
        Ok(item)
    }

    fn set(&mut self) -> Parsed<Item> {
        let name = self.name("a name")?;
        if STATEMENTS.contains(&name.value.as_str()) || principal::PRINCIPALS.contains(&name.value.as_str()) {
            let error = Diagnostic::error(format!("`{}` is a word of the language", name.value), name.span);
            return self.lost(error.label("choose another name"));
        }
        self.expect(Kind::Equal, "after the name")?;
        match self.expr() {
            Ok(value) => Ok(Item::Set { name, value }),
            Err(Lost) => {
                let value = crate::syntax::Expr::Broken(name.span);
                self.broken.push(Item::Set { name, value });
                Err(Lost)
            }
        }
    }

    fn service(&mut self) -> Parsed<Item> {
        self.take();
        let name = self.name("the service's name")?;
        let items = self.expect(Kind::Equal, "after the service's name").and_then(|_| self.service_items());
        match items {
            Ok(items) => Ok(Item::Service { name, items }),
            Err(Lost) => {
                let items = vec![ServiceItem::Broken(name.span)];
                self.broken.push(Item::Service { name, items });
                Err(Lost)
            }
        }
    }

    fn service_items(&mut self) -> Parsed<Vec<ServiceItem>> {
        let mut items = Vec::with_capacity(1);
        let mut protocol: Option<Name> = None;
        loop {
            match self.peek().kind {
                Kind::Star => items.push(ServiceItem::Any(self.take().span)),
                // Some of IANA's names begin with a digit.
                Kind::Word if self.slice(self.peek()).contains(|c: char| c.is_ascii_alphabetic()) => {
                    let token = self.take();
                    let name = Spanned { value: self.slice(token).to_owned(), span: token.span };
                    items.push(ServiceItem::Named(name));
                }
                Kind::Word => {
                    if let Some(protocol) = protocol.clone() {
                        let ports = Some(self.ports()?);
                        items.push(ServiceItem::Protocol { protocol, ports });
                    } else {
                        let token = self.take();
                        let port = self.slice(token);
                        let error = Diagnostic::error("a port needs its protocol", token.span);
                        self.errors.push(error.label(format!("write `tcp/{port}` or `udp/{port}`")));
                        items.push(ServiceItem::Broken(token.span));
                    }
                }
                Kind::Name => {
                    let name = self.name("a service")?;
                    if self.accept(Kind::Slash).is_some() {
                        protocol = Some(name.clone());
                        let ports =
                            if self.accept(Kind::Star).is_some() { None } else { Some(self.ports()?) };
                        items.push(ServiceItem::Protocol { protocol: name, ports });
                    } else if name.value == "related" {
                        items.push(ServiceItem::Related(name.span));
                    } else if crate::services::protocol(&name.value).is_some() {
                        items.push(ServiceItem::Protocol { protocol: name, ports: None });
                    } else {
                        items.push(ServiceItem::Named(name));
                    }
                }
                _ => return self.unexpected("a service such as `smtp`, `tcp/25` or `*`"),
            }
            if self.accept(Kind::Comma).is_none() && self.accept(Kind::Or).is_none() {
                return Ok(items);
            }
        }
    }

    fn ports(&mut self) -> Parsed<Spanned<(u16, u16)>> {
        let token = self.peek();
        if token.kind != Kind::Word {
            let error = self.not("a port after the protocol").label("such as `25` or `1000-2000`");
            self.errors.push(error);
            return Ok(Spanned { value: (0, 0), span: token.span });
        }
        self.take();
        let mut span = token.span;
        let mut text = self.slice(token).to_owned();
        if self.accept(Kind::Minus).is_some() {
            let end = self.expect(Kind::Word, "(a port) after `-`")?;
            span = span.to(end.span);
            text = format!("{text}-{}", self.slice(end));
        }
        let (low, high) = text.split_once('-').unwrap_or((&text, &text));
        let (Ok(low), Ok(high)) = (low.parse::<u16>(), high.parse::<u16>()) else {
            let error = Diagnostic::error(format!("`{text}` is no port"), span);
            self.errors.push(error.label("a number from 0 to 65535, or a range such as `1000-2000`"));
            return Ok(Spanned { value: (0, 0), span });
        };
        if low > high {
            let error = Diagnostic::error("this range ends before it begins", span);
            self.errors.push(error.label(format!("did you mean `{high}-{low}`?")));
        }
        Ok(Spanned { value: (low, high), span })
    }

    fn flow(&mut self) -> Parsed<(Vec<ServiceItem>, Span, crate::syntax::Expr, crate::syntax::Expr)> {
        let start = self.peek().span;
        let services = self.service_items()?;
        let service_span = match self.at.checked_sub(1).and_then(|n| self.tokens.get(n)) {
            Some(token) => start.to(token.span),
            None => start,
        };
        if self.accept(Kind::ParenOpen).is_none() {
            let error = self.not("`(` after the service");
            return self.lost(error.help("a rule is `allow SERVICE(FROM, TO);`: FROM opens, TO accepts"));
        }
        let from = self.expr()?;
        if self.peek().kind == Kind::ParenClose {
            let span = self.peek().span;
            return self.lost(
                Diagnostic::error("a rule names who opens and who accepts", span)
                    .label("`, TO` expected here; `*` is everyone"),
            );
        }
        self.expect(Kind::Comma, "between who opens and who accepts")?;
        let to = self.expr()?;
        self.expect(Kind::ParenClose, "after who accepts")?;
        Ok((services, service_span, from, to))
    }

    fn rule(&mut self) -> Parsed<RuleItem> {
        let keyword = self.take();
        let allow = self.slice(keyword) == "allow";
        let (services, _, from, to) = self.flow()?;
        let options = self.options()?;
        let end = self.peek();
        let end = if end.kind == Kind::Semicolon {
            end.span
        } else {
            self.at.checked_sub(1).and_then(|n| self.tokens.get(n)).map_or(keyword.span, |t| t.span)
        };
        Ok(RuleItem { allow, services, from, to, options, span: keyword.span.to(end) })
    }

    fn options(&mut self) -> Parsed<Options> {
        let mut options = Options::default();
        while self.peek().kind == Kind::Name && !self.starts_statement(0) {
            let keyword = self.take();
            let span = keyword.span;
            let again = match self.slice(keyword) {
                "using" => options.lane.replace(self.lane()?).map(|o| o.span),
                "audit" => options.audit.replace(span),
                "related" => options.related.replace(span),
                "with" => {
                    if self.word() != "related" {
                        return self.unexpected("`related` after `with`");
                    }
                    options.related.replace(self.take().span)
                }
                "expires" => options.expires.replace(self.date()?).map(|o| o.span),
                "as" => {
                    let name = if self.peek().kind == Kind::Text {
                        self.text_token("the rule's name")?
                    } else {
                        self.name("the rule's name")?
                    };
                    options.name.replace(name).map(|o| o.span)
                }
                "because" => {
                    options.description.replace(self.text_token("the reason, as a string")?).map(|o| o.span)
                }
                other => {
                    let guess = nearest(other, OPTIONS.into_iter());
                    let mut error = Diagnostic::error(format!("a rule has no option `{other}`"), span);
                    error.label = guess.map(|g| format!("did you mean `{g}`?"));
                    error.help = Some(
                        "there are `using LANE`, `related`, `audit`, `expires DATE`, `as NAME`, `because \"…\"`"
                            .to_owned(),
                    );
                    self.errors.push(error);
                    // The rule itself is whole, so its names are still checked.
                    while !matches!(self.peek().kind, Kind::Semicolon | Kind::End)
                        && !self.starts_statement(0)
                    {
                        self.take();
                    }
                    return Ok(options);
                }
            };
            if let Some(first) = again {
                let text = self.slice(keyword);
                self.errors.push(
                    Diagnostic::error(format!("`{text}` is given twice"), span).related("first here", first),
                );
            }
        }
        Ok(options)
    }

    fn lane(&mut self) -> Parsed<Spanned<Lane>> {
        const LANES: [&str; 4] = ["plain", "tls", "ktls", "ipsec"];
        if self.peek().kind != Kind::Name {
            let error = self.not("a lane after `using`").label("`plain`, `tls`, `ktls` or `ipsec`");
            return self.lost(error);
        }
        let name = self.name("a lane")?;
        let value = match name.value.as_str() {
            "plain" => Lane::Plain,
            "tls" => Lane::Tls,
            "ktls" => Lane::Ktls,
            "ipsec" => Lane::Ipsec,
            other => {
                let guess = elsewhere(other).filter(|g| LANES.contains(g));
                let guess = guess.or_else(|| nearest(other, LANES.into_iter()));
                let mut error = Diagnostic::error(format!("there is no lane `{other}`"), name.span);
                error.label = Some(guess.map_or_else(
                    || "one of `plain`, `tls`, `ktls`, `ipsec`".to_owned(),
                    |g| format!("did you mean `{g}`?"),
                ));
                return self.lost(error);
            }
        };
        Ok(Spanned { value, span: name.span })
    }

    fn date(&mut self) -> Parsed<Spanned<Date>> {
        if !matches!(self.peek().kind, Kind::Word | Kind::Name | Kind::Text) {
            let error = self.not("a date after `expires`").label("such as `2027-01-31`");
            return self.lost(error);
        }
        let token = self.take();
        let text = self.slice(token);
        match Date::parse(text) {
            Some(value) => Ok(Spanned { value, span: token.span }),
            None => self.lost(
                Diagnostic::error(format!("`{text}` is no date"), token.span)
                    .label("year-month-day, such as `2027-01-31`"),
            ),
        }
    }

    fn test(&mut self) -> Parsed<TestItem> {
        let keyword = self.take();
        let name = self.text_token("the test's name, as a string")?;
        self.expect(Kind::BraceOpen, "after the test's name")?;
        let mut expectations = Vec::new();
        while self.peek().kind != Kind::BraceClose {
            if self.peek().kind == Kind::End {
                let error = self.not("`}` at the end of the test");
                return self.lost(error.related("the test begins here", keyword.span.to(name.span)));
            }
            match self.expectation() {
                Ok(expectation) => expectations.push(expectation),
                Err(Lost) => self.recover_in_test(),
            }
        }
        self.take();
        self.accept(Kind::Semicolon);
        Ok(TestItem { name, expectations })
    }

    /// Goes behind the next `;`, or to the `}` of the test.
    fn recover_in_test(&mut self) {
        let mut braces = 0_usize;
        loop {
            match self.peek().kind {
                Kind::End => return,
                Kind::BraceClose if braces == 0 => return,
                Kind::BraceClose => braces -= 1,
                Kind::BraceOpen => braces += 1,
                Kind::Semicolon => {
                    self.take();
                    return;
                }
                _ => {}
            }
            self.take();
        }
    }

    fn expectation(&mut self) -> Parsed<Expectation> {
        let keyword = self.peek();
        let allow = match self.word() {
            "allow" => true,
            "refuse" => false,
            "deny" => {
                let error = Diagnostic::error("a test expects `allow` or `refuse`", keyword.span);
                return self.lost(error.label("did you mean `refuse`?"));
            }
            word => {
                let guess = match elsewhere(word) {
                    Some("deny") => Some("refuse"),
                    Some("allow") => Some("allow"),
                    _ => nearest(word, ["allow", "refuse"].into_iter()),
                };
                let mut error = self.not("`allow` or `refuse`");
                error.label = guess.map(|g| format!("did you mean `{g}`?"));
                return self.lost(error);
            }
        };
        self.take();
        let (services, service_span, from, to) = self.flow()?;
        let span = keyword.span.to(self.peek().span);
        self.semicolon();
        Ok(Expectation { allow, services, service_span, from, to, span })
    }
}

impl Date {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let (year, month, day) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || year.len() != 4 || month.len() != 2 || day.len() != 2 {
            return None;
        }
        let date = Self { year: year.parse().ok()?, month: month.parse().ok()?, day: day.parse().ok()? };
        let leap =
            date.year.is_multiple_of(4) && (!date.year.is_multiple_of(100) || date.year.is_multiple_of(400));
        let days = match date.month {
            4 | 6 | 9 | 11 => 30,
            2 if leap => 29,
            2 => 28,
            1..=12 => 31,
            _ => return None,
        };
        (date.year >= 1970 && (1..=days).contains(&date.day)).then_some(date)
    }

    /// The first second, since the Unix epoch, on which the day is over (UTC).
    pub(crate) fn end(self) -> u64 {
        // Days from civil, after Hinnant, "chrono-Compatible Low-Level Date Algorithms".
        let (month, day) = (u64::from(self.month), u64::from(self.day));
        let year = u64::from(self.year) - u64::from(month <= 2);
        let (era, of_era) = (year / 400, year % 400);
        let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year;
        (days + 1).saturating_sub(719_468) * 86_400
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_ends_with_its_last_second() {
        assert_eq!(Date::parse("1970-01-01").unwrap().end(), 86_400);
        assert_eq!(Date::parse("2027-01-31").unwrap().end(), 1_801_440_000);
        assert_eq!(Date::parse("2024-02-29").unwrap().end(), 1_709_251_200);
        assert!(Date::parse("2027-02-29").is_none());
        assert!(Date::parse("2027-1-31").is_none());
    }
}
