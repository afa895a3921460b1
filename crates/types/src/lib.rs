//! The words every part of Portcullis shares. Pure: no sockets, clocks or environment.
#![forbid(unsafe_code)]

mod numbers;
mod verdict;

pub use numbers::{Generation, GenerationError, Protocol, RuleId};
pub use verdict::{Assurance, Lane, Op, Verdict};
