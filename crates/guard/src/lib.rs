//! The guard: a seccomp filter (seccomp(2), `SECCOMP_RET_USER_NOTIF`) under a wrapped program and all
//! its descendants, so that the kernel asks the broker about calls that did not come through the shim:
//! static programs, raw system calls, cleared environments, setuid helpers.
//!
//! [`filter`] says which calls, as data; [`listener`] installs it and speaks to the kernel's end.

pub mod book;
pub mod filter;
pub mod landlock;
pub mod listener;
