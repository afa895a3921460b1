//! Exported hooks. What they do is in `portcullis_shim`; here is which libc functions exist, with
//! which arguments.
//!
//! No `fork`, `clone` or `__fork`: the kernel itself wipes what a child must not have
//! (`MADV_WIPEONFORK`), and the door is inherited like any descriptor. `vfork` is here because its child
//! shares the parent's memory and must be told apart.
#![expect(unsafe_code, reason = "exports and calls C functions")]
// redhook 2.0.0 declares `extern fn` and `static mut`, as was usual.
#![allow(missing_abi, reason = "redhook's macros")]
#![allow(non_camel_case_types, non_upper_case_globals, reason = "redhook names types after C functions")]
#![allow(missing_docs, reason = "each exported symbol is libc's, and documented there")]
#![allow(clippy::missing_safety_doc, reason = "each exported symbol has libc's contract")]

mod exec;
mod fds;
mod hook;
mod identity;
mod net;
mod signals;

use std::ffi::c_void;

/// Before any thread, and before the program's own code.
extern "C" fn begin() {
    net::resolve();
    fds::resolve();
    exec::resolve();
    identity::resolve();
    signals::resolve();
    portcullis_shim::start::start(begin as *const () as *const c_void);
}

/// After `main` has returned, or in exit(3).
extern "C" fn end() {
    portcullis_shim::creds::flush();
}

#[used]
#[link_section = ".init_array"]
static BEGIN: extern "C" fn() = begin;

#[used]
#[link_section = ".fini_array"]
static END: extern "C" fn() = end;
