//! The syntax tree: what the text says, not yet what it means. Every node has its span.

use portcullis_types::Lane;

use crate::source::Span;

/// Something with its place.
#[derive(Clone, Debug)]
pub(crate) struct Spanned<T> {
    pub(crate) value: T,
    pub(crate) span: Span,
}

pub(crate) type Name = Spanned<String>;

/// One statement.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    Include(Name),
    Service { name: Name, items: Vec<ServiceItem> },
    Set { name: Name, value: Expr },
    Rule(Box<RuleItem>),
    Test(TestItem),
}

/// One part of a service.
#[derive(Clone, Debug)]
pub(crate) enum ServiceItem {
    /// `*`
    Any(Span),
    /// `tcp`, `tcp/21`, `tcp/1000-2000`, `icmp`
    Protocol { protocol: Name, ports: Option<Spanned<(u16, u16)>> },
    /// Another service's name.
    Named(Name),
    /// `related`
    Related(Span),
    /// What could not be read; its error is reported.
    Broken(Span),
}

impl ServiceItem {
    pub(crate) fn span(&self) -> Span {
        match self {
            Self::Any(span) | Self::Related(span) | Self::Broken(span) => *span,
            Self::Protocol { protocol, ports } => ports.as_ref().map_or(protocol.span, |p| p.span),
            Self::Named(name) => name.span,
        }
    }
}

/// `allow` or `deny`.
#[derive(Clone, Debug)]
pub(crate) struct RuleItem {
    pub(crate) allow: bool,
    pub(crate) services: Vec<ServiceItem>,
    pub(crate) from: Expr,
    pub(crate) to: Expr,
    pub(crate) options: Options,
    pub(crate) span: Span,
}

/// What may follow a rule.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    pub(crate) lane: Option<Spanned<Lane>>,
    pub(crate) related: Option<Span>,
    pub(crate) audit: Option<Span>,
    pub(crate) expires: Option<Spanned<Date>>,
    pub(crate) name: Option<Name>,
    pub(crate) description: Option<Name>,
}

/// The last day on which a rule is in force.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Date {
    pub(crate) year: u16,
    pub(crate) month: u8,
    pub(crate) day: u8,
}

/// `test "name" { … }`
#[derive(Clone, Debug)]
pub(crate) struct TestItem {
    pub(crate) name: Name,
    pub(crate) expectations: Vec<Expectation>,
}

/// One line of a test.
#[derive(Clone, Debug)]
pub(crate) struct Expectation {
    pub(crate) allow: bool,
    pub(crate) services: Vec<ServiceItem>,
    pub(crate) service_span: Span,
    pub(crate) from: Expr,
    pub(crate) to: Expr,
    pub(crate) span: Span,
}

/// A principal.
#[derive(Clone, Debug)]
pub(crate) enum Expr {
    /// What could not be read; its error is reported.
    Broken(Span),
    Any(Span),
    Named(Name),
    Addresses {
        v6: bool,
        words: Vec<Name>,
        span: Span,
    },
    Attributes {
        process: bool,
        list: Vec<Attribute>,
        span: Span,
    },
    Not(Box<Expr>, Span),
    And(Vec<Expr>),
    Or(Vec<Expr>),
}

impl Expr {
    pub(crate) fn span(&self) -> Span {
        match self {
            Self::Broken(span)
            | Self::Any(span)
            | Self::Addresses { span, .. }
            | Self::Attributes { span, .. }
            | Self::Not(_, span) => *span,
            Self::Named(name) => name.span,
            Self::And(list) | Self::Or(list) => match (list.first(), list.last()) {
                (Some(first), Some(last)) => first.span().to(last.span()),
                _ => Span::default(),
            },
        }
    }
}

/// One condition in braces.
#[derive(Clone, Debug)]
pub(crate) struct Attribute {
    pub(crate) name: Name,
    pub(crate) op: Comparison,
    pub(crate) value: Value,
    pub(crate) span: Span,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
}

/// The right side of a condition.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Text(Name),
    Number(Name),
}

impl Value {
    pub(crate) const fn span(&self) -> Span {
        match self {
            Self::Text(v) | Self::Number(v) => v.span,
        }
    }
}
