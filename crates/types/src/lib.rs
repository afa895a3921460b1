//! The words every part of Portcullis shares. Pure: no sockets, clocks or environment.
#![forbid(unsafe_code)]

mod account;
mod numbers;
mod verdict;
mod without;

pub use account::account;
pub use numbers::{Generation, GenerationError, Protocol, RuleId};
pub use verdict::{Assurance, Lane, Op, Verdict};
pub use without::{Lack, UnknownLack, Without};
