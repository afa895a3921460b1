//! What the preload hooks do, as a library that tests can load.
//!
//! Everything here runs inside other people's programs: in signal handlers, between fork and exec, on
//! small stacks, in sandboxes. So nothing that a hook can reach allocates, locks, logs, reads the
//! environment or panics by design; if our own bug does panic, [`shield`] turns it into a refusal.
//! `errno` changes only when a call fails.
//!
//! | module | what |
//! |---|---|
//! | [`gate`] | makes the judged calls themselves, all from one page |
//! | [`own`] | what a process image remembers; wiped by the kernel in a forked child |
//! | [`hints`] | what kind of socket a descriptor is, without a system call |
//! | [`door`], [`channel`] | the ways to the broker |
//! | [`judge`] | table first, then the broker |
//! | [`stream`], [`dgram`] | connect, bind, listen, accept; sendto, sendmsg, recvfrom |
//! | [`fds`], [`exec`], [`creds`] | descriptors of our own, new images, changed credentials and sandboxes |
//! | [`start`] | the constructor |

pub mod channel;
pub mod creds;
pub mod dgram;
pub mod door;
pub mod exec;
pub mod fds;
pub mod gate;
pub mod hints;
pub mod judge;
pub mod own;
pub mod peer;
pub mod receive;
pub mod shield;
pub mod start;
pub mod stream;
pub mod sys;

pub use shield::{Errno, shield};
