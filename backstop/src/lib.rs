//! The kernel's own refusal: BPF programs on a cgroup that let through only what the broker granted.
//!
//! Wrapped processes live in a cgroup of their own ([`Cgroup`]). Whatever path a program takes to the
//! network (libc, a raw system call, `int 0x80`, io_uring), the kernel runs the cgroup's programs on its
//! own copy of the address, and they look in a map for what the broker granted to this image of this
//! process with these credentials ([`Holder`], [`Region`]). What is not there is refused (`EPERM`) and on
//! record ([`Event`]); what is there may be on record too, and no program can hide it.
//!
//! | hook | judges |
//! |---|---|
//! | connect4, connect6 | connect(2) of TCP and UDP, fast open |
//! | sendmsg4, sendmsg6 | datagrams with an address |
//! | bind4, bind6 | bind(2) |
//! | sock_create | sockets other than TCP and UDP: raw, ping, SCTP … |
//! | ingress | segments to TCP listeners, granted one by one |
//!
//! When the broker ends, however it ends, established flows go on and nothing new passes: see
//! `bpf/backstop.bpf.c`. The attachments live as long as the cgroup.
//!
//! **Not held here:** families without cgroup hooks (`AF_PACKET`, `AF_VSOCK`, `AF_XDP` …), which the guard
//! asks about; sockets made outside the cgroup and handed in; processes that root moves out of
//! the cgroup, for sockets they make afterwards.

mod cgroup;
mod error;
mod events;
mod grants;
mod layout;
mod model;
mod object;
mod programs;
mod ring;
mod sys;
mod types;

pub use cgroup::{Cgroup, PREFIX, all_named, cgroup_name, folder_of, is_name_of_ours, name_of, sweep};
pub use error::BackstopError;
pub use events::{Cause, Event, Events, left_over};
pub use grants::{Backstop, Once, Stats, keep_listeners, monotonic};
pub use model::{Holder, Region};
pub use programs::{Attacher, events_of, listeners_of, load, load_for_another};
