//! The policy language: text to compiled policy.
//!
//! Stages, one module and one type each: `text -> tokens -> syntax tree (with spans) -> checked
//! policy -> compiled policy`. What the language means is in `policies/LANGUAGE.md`. Everything is
//! pure but `load`, which reads files.
//!
//! ```
//! use portcullis_policy::{Flow, Party, Policy, Side};
//! use portcullis_types::{Protocol, Verdict};
//!
//! let loaded = Policy::parse("example.pol", "allow smtp(*, IPv4{192.0.2.25});").unwrap();
//! let to = Party { addr: "192.0.2.25".parse().ok(), ..Party::UNKNOWN };
//! let flow = Flow { from: &Party::UNKNOWN, to: &to, protocol: Protocol::TCP, port: 25, now: 0, far: Side::To };
//! assert_eq!(loaded.policy.evaluate(&flow).verdict, Verdict::Permit);
//! ```
#![forbid(unsafe_code)]

mod check;
mod compile;
mod decide;
mod decision;
mod diagnostic;
mod diff;
#[cfg(test)]
mod differential;
mod display;
mod explain;
mod facts;
mod fmt;
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
mod generate;
mod listener;
mod load;
mod model;
mod parser;
mod pattern;
mod policy;
mod query;
mod reference;
mod region;
mod replay;
mod services;
mod source;
mod syntax;
mod tokens;
mod trial;
mod view;
mod warn;

pub use decision::{Decision, ListenerScope, Region};
pub use diagnostic::{Diagnostic, DiagnosticData, Diagnostics, Part, Severity, escape};
pub use diff::{Change, Diff, ExampleFlow, RuleOf, diff};
pub use explain::{Explanation, NearMiss};
pub use facts::{CertificateFact, CertificateFacts, Fact, Flow, Party, ProcessFact, ProcessFacts, Side};
pub use fmt::format;
pub use load::{LoadError, read, read_input};
pub use model::{Effect, Rule};
pub use policy::{Loaded, Policy};
pub use query::{Question, Reach};
pub use replay::{Replay, Replayed};
pub use source::{Source, Span};
pub use trial::{Answer, TestOutcome};
