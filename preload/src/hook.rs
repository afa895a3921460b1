//! The only place that exports symbols: two macros, for two kinds of functions.
//!
//! `hooks!` stands over redhook's `hook!`. redhook answers a panic by calling the original, which would
//! fail open, so each body here is wrapped once more and a panic gives the value after `or`. Every
//! original is resolved by the list's `resolve()`, in the constructor, as redhook's own lookup
//! (`std::sync::Once`) must not be met for the first time in a signal handler or a forked child.
//!
//! `cancellable!` is for cancellation points (pthreads(7)): a cancelled thread is unwound through
//! the hook by the C library, which redhook's frames (`extern "C"`, `catch_unwind`) turn into an
//! abort. See docs/adr/0002-cancellation.md. Their bodies own nothing that has a destructor while the real
//! call is made, and cannot panic outside `portcullis_shim::shield`.

use std::{
    ffi::{c_char, c_void, CStr},
    sync::atomic::{AtomicPtr, Ordering},
};

macro_rules! hooks {
    ($($(#[doc = $doc:literal])* $name:ident => $body_name:ident: fn($($arg:ident: $type:ty),*) -> $ret:ty, or $refused:expr, $body:block)+) => {
        $(redhook::hook! {
            unsafe fn $name($($arg: $type),*) -> $ret => $body_name {
                let body = ::std::panic::AssertUnwindSafe(move || $body);
                ::std::panic::catch_unwind(body).unwrap_or($refused)
            }
        })+

        /// Looks every original up. One that this libc lacks is missing when it is called, and not before.
        pub(crate) fn resolve() {
            $(let _ = ::std::panic::catch_unwind(|| { let _ = redhook::real!($name); });)+
        }
    };
}

macro_rules! cancellable {
    ($($(#[doc = $doc:literal])* $name:ident($($arg:ident: $type:ty),*) -> $ret:ty $body:block)+) => {
        $(
            $(#[doc = $doc])*
            ///
            /// # Safety
            /// As for the function of that name in libc.
            #[no_mangle]
            pub unsafe extern "C-unwind" fn $name($($arg: $type),*) -> $ret $body
        )+
    };
}

pub(crate) use {cancellable, hooks};

/// An original that is a cancellation point itself, for `cancellable!` hooks that pass a call through.
pub(crate) struct Original {
    name: &'static CStr,
    at: AtomicPtr<c_void>,
}

impl Original {
    pub(crate) const fn new(name: &'static CStr) -> Self {
        Self { name, at: AtomicPtr::new(std::ptr::null_mut()) }
    }

    /// Its address; null if this libc lacks it.
    pub(crate) fn get(&self) -> *mut c_void {
        let there = self.at.load(Ordering::Relaxed);
        if !there.is_null() {
            return there;
        }
        // SAFETY: dlsym(3) with a C string.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr().cast::<c_char>()) };
        self.at.store(found, Ordering::Relaxed);
        found
    }
}
