//! New images: the shim and the broker's place are put back into the environment, and the door is
//! left open for them.
//!
//! The new environment lies on the stack, as the caller may be a vfork(2) child, a signal handler, or one
//! thread of many. One too large for that is `E2BIG`, as one too large for the kernel is.
#![expect(unsafe_code, reason = "reads and builds arrays of C strings")]

use core::{
    ffi::{CStr, c_char},
    mem::MaybeUninit,
    ptr::null,
};

use libc::c_int;
use once_cell::race::OnceRef;
use portcullis_wire::frame::{ENV_BROKER, ENV_DOOR};

use crate::{
    Errno, door, own,
    shield::fail,
    start::{self, Vars},
    sys,
};

const LD_PRELOAD: &[u8] = b"LD_PRELOAD";

/// Longest string that is kept or made.
const LONGEST: usize = 1024;

/// A C string of bounded length; all zero is the empty one.
struct Text {
    bytes: [u8; LONGEST],
    length: usize,
}

impl Text {
    const fn new() -> Self {
        Self { bytes: [0; LONGEST], length: 0 }
    }

    /// Appends; `None` if it does not fit with its final zero.
    fn push(&mut self, more: &[u8]) -> Option<()> {
        let end = self.length.checked_add(more.len())?;
        if end >= LONGEST {
            return None;
        }
        self.bytes.get_mut(self.length..end)?.copy_from_slice(more);
        self.length = end;
        Some(())
    }

    fn extend(&mut self, parts: &[&[u8]]) -> bool {
        parts.iter().try_for_each(|part| self.push(part)).is_some()
    }

    const fn as_ptr(&self) -> *const c_char {
        self.bytes.as_ptr().cast()
    }
}

/// What every new image gets.
struct Kept {
    /// Path of the shim.
    path: Text,
    /// `LD_PRELOAD=` and that path.
    preload: Text,
    /// `PORTCULLIS_BROKER=` and its value.
    broker: Text,
}

/// One page of memory that the constructor maps and fills, and nobody changes after.
static KEPT: OnceRef<'static, Kept> = OnceRef::new();

/// Takes note of what new images need. Only the constructor calls it.
pub fn keep(path: Option<&[u8]>, vars: &Vars<'_>) {
    let (Some(path), Some(broker)) = (path, vars.broker) else { return };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let writable = libc::PROT_READ | libc::PROT_WRITE;
    let Some(at) = sys::map(0, size_of::<Kept>(), writable, flags, -1) else { return };
    // SAFETY: a mapping of this size, made just now, never unmapped; zero bytes are an empty `Kept`.
    let kept: &'static mut Kept = unsafe { &mut *at.cast() };
    let filled = kept.path.push(path).is_some()
        && kept.preload.extend(&[LD_PRELOAD, b"=", path])
        && kept.broker.extend(&[ENV_BROKER.as_bytes(), b"=", broker]);
    if filled {
        let _ = KEPT.set(kept);
    }
}

/// The value, if `entry` is of this variable.
fn value<'a>(entry: &'a [u8], variable: &[u8]) -> Option<&'a [u8]> {
    entry.strip_prefix(variable)?.strip_prefix(b"=")
}

/// Whether a list of libraries (ld.so(8)) has this one.
fn lists(libraries: &[u8], path: &[u8]) -> bool {
    libraries.split(|b| matches!(b, b':' | b' ')).any(|one| one == path)
}

/// Length of a null-terminated array of pointers.
///
/// # Safety
/// `array` is null or such an array.
unsafe fn count(array: *const *const c_char) -> usize {
    let mut n = 0;
    if !array.is_null() {
        // SAFETY: by this function's contract, up to and including the null.
        while !unsafe { array.add(n).read() }.is_null() {
            n += 1;
        }
    }
    n
}

/// Places that the array needs beyond the program's own: three variables and the null.
const EXTRA: usize = 4;

/// Runs `exec` with `environment` and what new images need. `exec` returns only on failure, or when
/// the image is another process's (posix_spawn).
///
/// # Safety
/// `environment` is null or a null-terminated array of C strings.
pub unsafe fn with_environment(
    environment: *const *const c_char,
    exec: &dyn Fn(*const *const c_char) -> c_int,
) -> c_int {
    start::ensure();
    let Some(kept) = KEPT.get() else { return exec(environment) };
    // SAFETY: by this function's contract, for all of these.
    unsafe {
        match count(environment) + EXTRA {
            0..=256 => sized::<256>(kept, environment, exec),
            257..=2048 => sized::<2048>(kept, environment, exec),
            2049..=16384 => sized::<16384>(kept, environment, exec),
            _ => fail(Errno(libc::E2BIG)),
        }
    }
}

/// # Safety
/// As for [`with_environment`]; fewer than `N` - [`EXTRA`] entries.
#[inline(never)]
unsafe fn sized<const N: usize>(
    kept: &Kept,
    environment: *const *const c_char,
    exec: &dyn Fn(*const *const c_char) -> c_int,
) -> c_int {
    let mut array = [const { MaybeUninit::<*const c_char>::uninit() }; N];
    let mut libraries = Text::new();
    let left_open = Door::leave_open();
    let door = left_open.as_ref().map(|door| door.entry());
    // SAFETY: by this function's contract.
    let filled = unsafe { fill(kept, environment, &mut array, &mut libraries, door.as_ref()) };
    let result = match filled {
        Some(()) => exec(array.as_ptr().cast()),
        None => fail(Errno(libc::E2BIG)),
    };
    if let Some(door) = left_open {
        door.close_again();
    }
    result
}

/// # Safety
/// As for [`with_environment`].
unsafe fn fill(
    kept: &Kept,
    environment: *const *const c_char,
    array: &mut [MaybeUninit<*const c_char>],
    libraries: &mut Text,
    door: Option<&Text>,
) -> Option<()> {
    let mut places = array.iter_mut();
    let mut put = |entry: *const c_char| {
        places.next()?.write(entry);
        Some(())
    };
    let mut preloaded = false;
    // SAFETY: by this function's contract.
    for i in 0..unsafe { count(environment) } {
        // SAFETY: as above, and each entry is a C string.
        let at = unsafe { environment.add(i).read() };
        // SAFETY: as above.
        let entry = unsafe { CStr::from_ptr(at) }.to_bytes();
        if let Some(theirs) = value(entry, LD_PRELOAD) {
            if lists(theirs, text(&kept.path)) {
                preloaded = true;
                put(at)?;
            } else if !preloaded {
                preloaded = true;
                libraries.push(text(&kept.preload))?;
                if !theirs.is_empty() {
                    libraries.push(b":")?;
                    libraries.push(theirs)?;
                }
                put(libraries.as_ptr())?;
            }
        } else if value(entry, ENV_BROKER.as_bytes()).is_none() && value(entry, ENV_DOOR.as_bytes()).is_none()
        {
            put(at)?;
        }
    }
    if !preloaded {
        put(kept.preload.as_ptr())?;
    }
    put(kept.broker.as_ptr())?;
    if let Some(door) = door {
        put(door.as_ptr())?;
    }
    put(null())
}

fn text(text: &Text) -> &[u8] {
    text.bytes.get(..text.length).unwrap_or_default()
}

/// The door while it is not closed by exec.
struct Door(c_int);

impl Door {
    fn leave_open() -> Option<Self> {
        let door = door::door();
        if own::sandboxed() || door == door::Held::NONE {
            return None;
        }
        (sys::fcntl(door.fd(), libc::F_SETFD, 0) == 0).then_some(Self(door.fd()))
    }

    fn close_again(self) {
        sys::fcntl(self.0, libc::F_SETFD, libc::FD_CLOEXEC);
    }

    /// `PORTCULLIS_DOOR=` and its number.
    fn entry(&self) -> Text {
        let mut digits = [0u8; 10];
        let mut from = digits.len();
        let mut n = self.0.unsigned_abs();
        for (i, digit) in digits.iter_mut().enumerate().rev() {
            *digit = b'0' + u8::try_from(n % 10).unwrap_or(0);
            from = i;
            n /= 10;
            if n == 0 {
                break;
            }
        }
        let mut entry = Text::new();
        entry.extend(&[ENV_DOOR.as_bytes(), b"=", digits.get(from..).unwrap_or_default()]);
        entry
    }
}

/// Leaves the door open for what libc executes by itself (system, popen), without our hooks: until
/// [`DoorLeftOpen::close_again`].
#[must_use]
pub fn leave_door_open() -> DoorLeftOpen {
    start::ensure();
    DoorLeftOpen(Door::leave_open())
}

/// See [`leave_door_open`]. Has no destructor, as a thread may be cancelled meanwhile: then the door stays
/// open for new images, which does no harm.
pub struct DoorLeftOpen(Option<Door>);

impl DoorLeftOpen {
    /// Closed by exec again.
    pub fn close_again(self) {
        if let Some(door) = self.0 {
            door.close_again();
        }
    }
}

/// Runs `exec` with the arguments of an execl(3) as an array, and the place behind its null. The first
/// five lie in `registers`, as the x86_64 ABI has them (rsi, rdx, rcx, r8, r9); the rest on the stack.
///
/// # Safety
/// Together they hold C strings up to a null.
pub unsafe fn with_arguments(
    registers: *const [*const c_char; 5],
    rest: *const *const c_char,
    exec: &dyn Fn(*const *const c_char, *const *const c_char) -> c_int,
) -> c_int {
    // SAFETY: five pointers were pushed there, and beyond the fifth is the stack's.
    let at = |i: usize| unsafe {
        match i.checked_sub(5) {
            None => registers.cast::<*const c_char>().add(i).read(),
            Some(i) => rest.add(i).read(),
        }
    };
    let n = (0..).take_while(|&i| !at(i).is_null()).count();
    match n {
        0..=255 => listed::<256>(n, &at, exec),
        256..=8191 => listed::<8192>(n, &at, exec),
        _ => fail(Errno(libc::E2BIG)),
    }
}

#[inline(never)]
fn listed<const N: usize>(
    n: usize,
    at: &dyn Fn(usize) -> *const c_char,
    exec: &dyn Fn(*const *const c_char, *const *const c_char) -> c_int,
) -> c_int {
    let mut array = [const { MaybeUninit::<*const c_char>::uninit() }; N];
    for (i, place) in array.iter_mut().enumerate().take(n + 1) {
        place.write(at(i));
    }
    exec(array.as_ptr().cast(), at(n + 1).cast())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;

    fn built(given: &[&str]) -> Vec<String> {
        let path = b"/opt/shim.so";
        let vars = Vars { broker: Some(b"/run/b.sock:1"), door: None };
        keep(Some(path), &vars);
        let strings: Vec<CString> = given.iter().map(|s| CString::new(*s).unwrap()).collect();
        let mut pointers: Vec<*const c_char> = strings.iter().map(|s| s.as_ptr()).collect();
        pointers.push(null());
        let out = std::cell::RefCell::new(Vec::new());
        let take = |env: *const *const c_char| {
            // SAFETY: `fill` made a null-terminated array of C strings.
            unsafe {
                for i in 0..count(env) {
                    out.borrow_mut().push(CStr::from_ptr(*env.add(i)).to_str().unwrap().to_owned());
                }
            }
            0
        };
        // SAFETY: a null-terminated array of C strings.
        unsafe { with_environment(pointers.as_ptr(), &take) };
        out.into_inner()
    }

    #[test]
    fn an_empty_environment_gets_the_shim_and_the_broker() {
        assert_eq!(built(&[]), ["LD_PRELOAD=/opt/shim.so", "PORTCULLIS_BROKER=/run/b.sock:1"]);
    }

    #[test]
    fn libraries_of_the_programs_own_stay() {
        assert_eq!(
            built(&["A=1", "LD_PRELOAD=/x.so", "PORTCULLIS_BROKER=/elsewhere:0", "PORTCULLIS_DOOR=5"]),
            ["A=1", "LD_PRELOAD=/opt/shim.so:/x.so", "PORTCULLIS_BROKER=/run/b.sock:1"]
        );
        assert_eq!(built(&["LD_PRELOAD=/x.so:/opt/shim.so"])[0], "LD_PRELOAD=/x.so:/opt/shim.so");
    }

    #[test]
    fn execl_arguments_are_gathered_from_registers_and_stack() {
        let strings: Vec<CString> = (0..8).map(|i| CString::new(i.to_string()).unwrap()).collect();
        let mut all: Vec<*const c_char> = strings.iter().map(|s| s.as_ptr()).collect();
        all.push(null());
        all.push(c"environment".as_ptr());
        let registers: [*const c_char; 5] = all[..5].try_into().unwrap();
        let seen = std::cell::Cell::new(0);
        // SAFETY: eight strings, a null, and what follows it.
        unsafe {
            with_arguments(&raw const registers, all[5..].as_ptr(), &|argv, env| {
                seen.set(count(argv));
                assert_eq!(CStr::from_ptr(env.cast()), c"environment");
                0
            });
        }
        assert_eq!(seen.get(), 8);
    }
}
