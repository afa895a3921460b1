//! The backstop's nftables form, for kernels whose BPF cannot be used: one table that looks at what sockets of wrapped
//! cgroups send, and lets pass what was granted. See docs/adr/0004-nftables-form.md.
//!
//! The crates there are drive the `nft` command, bind a C library, or are licensed otherwise; what is needed is four
//! kinds of objects and one kind of log message.

#![forbid(unsafe_code)]

mod netlink;
mod refusals;
mod rule;
mod table;

pub use refusals::{Refusal, Refusals};
pub use table::{Pass, Table};
