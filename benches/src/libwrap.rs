//! tcpd's library, found at run time so that the benches build without it.
#![expect(unsafe_code, reason = "a C library")]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    fmt::Write as _,
    fs,
    path::PathBuf,
};

/// `hosts_ctl(daemon, name, address, user)`, tcpd.h.
type HostsCtl = unsafe extern "C" fn(*const c_char, *const c_char, *const c_char, *const c_char) -> c_int;

/// `hosts_ctl` on a file of its own.
#[derive(Debug)]
pub struct Libwrap {
    decide: HostsCtl,
    allow: *mut *const c_char,
    deny: *mut *const c_char,
    path: PathBuf,
    name: CString,
}

impl Libwrap {
    /// `None`: it is not installed.
    #[must_use]
    pub fn new() -> Option<Self> {
        // SAFETY: the names are C strings; libwrap's constructors have no preconditions.
        let library = unsafe { libc::dlopen(c"libwrap.so.0".as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return None;
        }
        // SAFETY: `library` is open and stays so; the names are C strings.
        let symbol = |name: &CStr| unsafe { libc::dlsym(library, name.as_ptr()) };
        let (decide, allow, deny) =
            (symbol(c"hosts_ctl"), symbol(c"hosts_allow_table"), symbol(c"hosts_deny_table"));
        if decide.is_null() || allow.is_null() || deny.is_null() {
            return None;
        }
        // SAFETY: this is hosts_ctl's type in tcpd.h: four strings, which it does not change, to an int.
        let decide = unsafe { std::mem::transmute::<*mut c_void, HostsCtl>(decide) };
        let path = std::env::temp_dir().join(format!("portcullis-bench-{}.allow", std::process::id()));
        let name = CString::new(path.to_str()?).ok()?;
        Some(Self { decide, allow: allow.cast(), deny: deny.cast(), path, name })
    }

    /// Uses a file of so many lines of addresses; everything else is denied.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn load(&self, lines: usize, last: &str) -> std::io::Result<()> {
        let mut text = String::new();
        for n in 0..lines {
            let _infallible = writeln!(text, "d{}: 10.{}.{}.0/255.255.255.0", n % 97, n / 256 % 256, n % 256);
        }
        text.push_str(last);
        fs::write(&self.path, text)?;
        // SAFETY: both are libwrap's own variables, read by `hosts_ctl` on this thread only; the strings live
        // as long as `self`, which `permits` needs.
        unsafe {
            *self.allow = self.name.as_ptr();
            *self.deny = c"/dev/null".as_ptr();
        }
        Ok(())
    }

    /// What it says to an address.
    #[must_use]
    pub fn permits(&self, daemon: &CStr, address: &CStr) -> bool {
        // SAFETY: four C strings that outlive the call.
        let said =
            unsafe { (self.decide)(daemon.as_ptr(), c"".as_ptr(), address.as_ptr(), c"unknown".as_ptr()) };
        said != 0
    }
}

impl Drop for Libwrap {
    fn drop(&mut self) {
        let _best_effort = fs::remove_file(&self.path);
    }
}
