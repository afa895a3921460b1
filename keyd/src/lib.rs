//! Privileged side: kernel filters, cuts, keys, protected flows.
//!
//! [`run`] is the whole daemon. It takes orders from the broker alone; `portcullis_wire::keyd` says what may
//! be asked, and when. It runs as its own user with CAP_BPF (filters: longest-prefix maps ask for it),
//! CAP_NET_ADMIN (filters on TCP sockets, cuts, the mark that tokens demand), CAP_NET_BIND_SERVICE (it
//! binds for programs; whether they may, the broker has asked) and CAP_NET_RAW (it moves a program's binding to
//! an interface to its own socket; raw sockets it cannot make any more). No file is within its reach once it
//! serves, and only the system calls that `sandbox` lists.
//!
//! - `filter`, `program`, `asm`, `bpf`: who reaches a socket (docs/adr/0007-kernel-filters.md).
//! - `cut`, `diag`: ending flows.
//! - `fence`: the backstop's nftables form (docs/adr/0004-nftables-form.md).
//! - [`identity`]: the trust domain, process certificates, who is believed.
//! - `steer`: which connections to a program's port are the key daemon's (docs/adr/0008-protected-listeners.md).
//! - `association`, `token`, `packet`: protected flows, whose bytes `portcullis_relay` carries.

mod asm;
mod association;
mod bpf;
mod cut;
mod diag;
mod error;
mod fence;
mod filter;
#[doc(hidden)]
pub mod fuzzing;
pub mod identity;
mod packet;
mod privileges;
mod program;
mod sandbox;
mod server;
mod sock;
mod steer;
mod token;

pub use error::KeydError;
pub use server::{Config, run};
