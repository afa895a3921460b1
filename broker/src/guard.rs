//! The guard's side of the broker: what a held system call asks for, and the memory that it points to.
//!
//! [`calls`] is pure: numbers and bytes to a typed question. [`target`] reads the caller's memory, once.
//! [`link`] is how listeners and the backstop come from the supervisor. What is decided and done is in
//! `serve/guard.rs`.

pub(crate) mod calls;
pub mod link;
pub mod target;
