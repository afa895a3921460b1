//! Privileged side: kernel filters, keys, relays.
//!
//! [`run`] is the whole daemon. It takes orders from the broker alone (see `portcullis_wire::keyd` for
//! what may be asked), and keeps nothing that a restart would lose. It runs as its own user with
//! CAP_NET_ADMIN (cut flows) and CAP_BPF (filters: longest-prefix maps need it), no file within
//! reach, and the system calls that `sandbox` lists.

mod asm;
mod association;
mod bpf;
mod cut;
mod diag;
mod error;
mod filter;
pub mod identity;
mod privileges;
mod program;
pub mod relay;
mod sandbox;
mod server;
mod sock;
mod token;

pub use error::KeydError;
pub use server::{Config, run};
