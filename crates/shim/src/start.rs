//! The constructor: everything that needs the environment, the loader or new memory happens here, once,
//! before any thread.
#![expect(unsafe_code, reason = "reads the environment as C has it")]

use core::{
    ffi::{CStr, c_char, c_void},
    sync::atomic::{AtomicU32, Ordering},
};

use portcullis_wire::frame::{ENV_BROKER, ENV_DOOR};

use crate::{door, exec, gate, own, shield, stream};

unsafe extern "C" {
    static environ: *const *const c_char;
}

/// What the environment says to us.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vars<'a> {
    /// Value of [`ENV_BROKER`].
    pub broker: Option<&'a [u8]>,
    /// Value of [`ENV_DOOR`].
    pub door: Option<&'a [u8]>,
}

/// # Safety
/// Nobody changes the environment meanwhile.
unsafe fn vars<'a>() -> Vars<'a> {
    let mut vars = Vars::default();
    // SAFETY: by this function's contract; null or a null-terminated array of C strings (environ(7)).
    let mut at = unsafe { environ };
    // SAFETY: as above.
    while !at.is_null() && !unsafe { *at }.is_null() {
        // SAFETY: as above.
        let entry: &[u8] = unsafe { CStr::from_ptr(*at) }.to_bytes();
        let value = |name: &str| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"=");
        vars.broker = vars.broker.or_else(|| value(ENV_BROKER));
        vars.door = vars.door.or_else(|| value(ENV_DOOR));
        // SAFETY: not yet at its null.
        at = unsafe { at.add(1) };
    }
    vars
}

/// Path that the loader took this library from.
fn path<'a>(symbol: *const c_void) -> Option<&'a [u8]> {
    let mut info = core::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: `info` has room for what dladdr(3) writes.
    if unsafe { libc::dladdr(symbol, info.as_mut_ptr()) } == 0 {
        return None;
    }
    // SAFETY: dladdr succeeded; zero is valid besides.
    let name = unsafe { info.assume_init() }.dli_fname;
    // SAFETY: not null, and a C string that lives as long as the library, which is never unloaded.
    (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_bytes())
}

static STARTED: AtomicU32 = AtomicU32::new(0);

/// Starts, unless that was done. `symbol` is one of the library's own.
pub fn start(symbol: *const c_void) {
    if STARTED.swap(1, Ordering::AcqRel) != 0 {
        return;
    }
    let _ = shield(|| {
        std::panic::set_hook(Box::new(|_| {})); // no size, so no allocation
        gate::install();
        own::install();
        // SAFETY: before the program's own code; other libraries' constructors do not change it.
        let vars = unsafe { vars() };
        exec::keep(path(symbol), &vars);
        door::find(vars.broker, vars.door);
        stream::judge_inherited();
        Ok(())
    });
}

/// For a call that comes before our constructor, from another library's.
pub fn ensure() {
    #[cfg(not(test))]
    if STARTED.load(Ordering::Relaxed) == 0 {
        start(ensure as *const () as *const c_void);
    }
}
