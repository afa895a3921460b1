//! Principals: `x509{…}`, `IPv4{…}`, `IPv6{…}`, `process{…}`, names, `& | !` and parentheses.

use super::{DEEPEST, Parsed, Parser, elsewhere};
use crate::{
    diagnostic::{Diagnostic, nearest},
    source::Span,
    syntax::{Attribute, Comparison, Expr, Spanned, Value},
    tokens::Kind,
};

/// The sign for what other languages have a word for.
fn written(word: &str, span: Span) -> Diagnostic {
    let sign = elsewhere(word).unwrap_or_default();
    Diagnostic::error(format!("`{word}` is written `{sign}`"), span).label(format!("did you mean `{sign}`?"))
}

pub(super) const PRINCIPALS: [&str; 4] = ["x509", "IPv4", "IPv6", "process"];

impl Parser<'_> {
    pub(super) fn expr(&mut self) -> Parsed<Expr> {
        let first = self.conjunction()?;
        let expr = self.joined(first, Kind::Or, Self::conjunction, Expr::Or)?;
        if let word @ ("and" | "or") = self.word() {
            return self.lost(written(word, self.peek().span));
        }
        Ok(expr)
    }

    fn conjunction(&mut self) -> Parsed<Expr> {
        let first = self.unary()?;
        self.joined(first, Kind::And, Self::unary, Expr::And)
    }

    /// One operand, and as many more as there are signs between them.
    fn joined(
        &mut self,
        first: Expr,
        sign: Kind,
        operand: impl Fn(&mut Self) -> Parsed<Expr>,
        whole: impl FnOnce(Vec<Expr>) -> Expr,
    ) -> Parsed<Expr> {
        if self.peek().kind != sign {
            return Ok(first);
        }
        let mut list = vec![first];
        while self.accept(sign).is_some() {
            list.push(operand(self)?);
        }
        Ok(whole(list))
    }

    fn unary(&mut self) -> Parsed<Expr> {
        // `!` in a row is a loop, so that only parentheses nest.
        let mut nots = Vec::new();
        while let Some(token) = self.accept(Kind::Not) {
            nots.push(token.span);
        }
        let mut expr = self.primary()?;
        if nots.len() > 1 {
            let span = nots.first().copied().unwrap_or_default().to(expr.span());
            let error = Diagnostic::error("more than one `!` in a row", span);
            return Ok(self.broken(error.label("write none, or one")));
        }
        if let Some(span) = nots.pop() {
            let span = span.to(expr.span());
            expr = Expr::Not(Box::new(expr), span);
        }
        Ok(expr)
    }

    /// What is wrong and yet can be told where it ends, so that what follows is read.
    fn broken(&mut self, error: Diagnostic) -> Expr {
        let span = error.span;
        self.errors.push(error);
        Expr::Broken(span)
    }

    fn primary(&mut self) -> Parsed<Expr> {
        let token = self.peek();
        match token.kind {
            Kind::Star => {
                self.take();
                Ok(Expr::Any(token.span))
            }
            Kind::ParenOpen => {
                if self.depth >= DEEPEST {
                    return self.lost(
                        Diagnostic::error(format!("nested more than {DEEPEST} deep"), token.span)
                            .help("give the inner parts names: `inner = …;`"),
                    );
                }
                self.take();
                self.depth += 1;
                let expr = self.expr();
                self.depth -= 1;
                let expr = expr?;
                if self.accept(Kind::ParenClose).is_none() {
                    let error = self.not("`)` to end the parenthesis");
                    return self.lost(error.related("it begins here", token.span));
                }
                Ok(expr)
            }
            Kind::Name if self.peek_at(1).kind == Kind::BraceOpen => self.braces(),
            Kind::Name
                if self.word() == "not" && matches!(self.peek_at(1).kind, Kind::Name | Kind::ParenOpen) =>
            {
                self.lost(written("not", token.span))
            }
            Kind::Name => {
                let name = self.name("a principal")?;
                if let Some(right) = PRINCIPALS.iter().find(|p| p.eq_ignore_ascii_case(&name.value)) {
                    let error = Diagnostic::error(format!("`{}` needs its braces", name.value), name.span);
                    return Ok(self.broken(error.label(format!("such as `{right}{{…}}`"))));
                }
                Ok(Expr::Named(name))
            }
            Kind::Text => {
                self.take();
                if self.slice(token).len() < 2 || !self.slice(token).ends_with('"') {
                    // That it does not end was reported.
                    return Ok(Expr::Broken(token.span));
                }
                let error = Diagnostic::error("a string alone is no principal", token.span);
                let right = format!("did you mean `x509{{name={}}}`?", self.slice(token));
                Ok(self.broken(error.label(right)))
            }
            Kind::Word => {
                let mut span = self.take().span;
                if self.peek().kind == Kind::Slash && self.peek_at(1).kind == Kind::Word {
                    self.take();
                    span = span.to(self.take().span);
                }
                let text = self.text.get(span.range()).unwrap_or("");
                let family = if text.contains(':') { "IPv6" } else { "IPv4" };
                let error = Diagnostic::error("an address alone is no principal", span);
                Ok(self.broken(error.label(format!("did you mean `{family}{{{text}}}`?"))))
            }
            _ => self.unexpected("a principal"),
        }
    }

    fn braces(&mut self) -> Parsed<Expr> {
        let name = self.name("a principal")?;
        match name.value.as_str() {
            "x509" | "process" => self.attributes(name.value == "process", name.span),
            "IPv4" | "IPv6" => self.addresses(name.value == "IPv6", name.span),
            other => {
                let guess = nearest(other, PRINCIPALS.into_iter());
                let mut error = Diagnostic::error(format!("unknown principal `{other}`"), name.span);
                error.label = Some(guess.map_or_else(
                    || "one of `x509`, `IPv4`, `IPv6`, `process`".to_owned(),
                    |g| format!("did you mean `{g}`?"),
                ));
                self.lost(error)
            }
        }
    }

    fn addresses(&mut self, v6: bool, start: Span) -> Parsed<Expr> {
        self.expect(Kind::BraceOpen, "after the principal")?;
        let mut words = Vec::with_capacity(1);
        loop {
            if let Some(close) = self.accept(Kind::BraceClose) {
                return Ok(Expr::Addresses { v6, words, span: start.to(close.span) });
            }
            if self.peek().kind != Kind::Word {
                return self.unexpected("an address, a prefix, or `}`");
            }
            let token = self.take();
            words.push(Spanned { value: self.slice(token).to_owned(), span: token.span });
            if self.peek().kind == Kind::Word {
                return self.unexpected("`,` between addresses");
            }
            if self.accept(Kind::Comma).is_none() && self.peek().kind != Kind::BraceClose {
                return self.unexpected("`,` or `}`");
            }
        }
    }

    fn attributes(&mut self, process: bool, start: Span) -> Parsed<Expr> {
        self.expect(Kind::BraceOpen, "after the principal")?;
        let mut list = Vec::with_capacity(1);
        loop {
            if let Some(close) = self.accept(Kind::BraceClose) {
                // There are a hundred thousand of these, and room for four where two are.
                list.shrink_to_fit();
                return Ok(Expr::Attributes { process, list, span: start.to(close.span) });
            }
            list.extend(self.attribute()?);
            if self.accept(Kind::Comma).is_none() && self.peek().kind != Kind::BraceClose {
                return self.unexpected("`,` or `}`");
            }
        }
    }

    /// None if its value is wrong, which is reported.
    fn attribute(&mut self) -> Parsed<Option<Attribute>> {
        let name = self.name("an attribute or `}`")?;
        let op = match self.peek().kind {
            Kind::Equal => Comparison::Equal,
            Kind::NotEqual => Comparison::NotEqual,
            Kind::Less => Comparison::Less,
            Kind::LessEqual => Comparison::LessEqual,
            Kind::Greater => Comparison::Greater,
            Kind::GreaterEqual => Comparison::GreaterEqual,
            _ => return self.unexpected("`=` or another comparison"),
        };
        self.take();
        let token = self.peek();
        let value = match token.kind {
            Kind::Text => Value::Text(self.text_token("a value")?),
            Kind::Word => {
                self.take();
                Value::Number(Spanned { value: self.slice(token).to_owned(), span: token.span })
            }
            // A text without its quotes, up to where the attribute ends.
            Kind::Name | Kind::Star | Kind::Slash => {
                let rest = self.text.get(token.span.range().start..).unwrap_or("");
                let text = rest.split([',', '}', ';', '\n', '"', ' ']).next().unwrap_or("").trim_end();
                let end = token.span.start + crate::source::to_u32(text.len());
                let error = Diagnostic::error("a value stands in quotes", Span { end, ..token.span });
                self.errors.push(error.label(format!("did you mean \"{text}\"?")));
                while self.peek().span.start < end && self.peek().kind != Kind::End {
                    self.take();
                }
                return Ok(None);
            }
            _ => return self.unexpected("a value"),
        };
        let span = name.span.to(value.span());
        Ok(Some(Attribute { name, op, value, span }))
    }
}
