//! Errors as programs see them, and the wall between a bug of ours and the program.

use std::panic::{AssertUnwindSafe, catch_unwind};

use libc::c_int;

/// A positive errno.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Errno(pub c_int);

/// Runs one decision. A panic in it is a refusal with `EACCES`, never the program's end, and never a
/// way round the decision.
///
/// # Errors
/// What `decide` says.
pub fn shield<T>(decide: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    catch_unwind(AssertUnwindSafe(decide)).unwrap_or(Err(Errno(libc::EACCES)))
}

/// Sets `errno` and gives the -1 that goes with it.
#[expect(unsafe_code, reason = "errno is behind a pointer")]
pub fn fail(errno: Errno) -> c_int {
    // SAFETY: __errno_location(3) gives the calling thread's own, always valid, int.
    unsafe { *libc::__errno_location() = errno.0 };
    -1
}

/// What libc makes of a system call's result: -4095..=-1 is an errno (syscall(2)).
pub fn returned(result: isize) -> isize {
    if (-4095..0).contains(&result) {
        fail(Errno(c_int::try_from(-result).unwrap_or(libc::EINVAL)));
        return -1;
    }
    result
}

/// As [`returned`], for calls that return an int.
pub fn returned_int(result: isize) -> c_int {
    c_int::try_from(returned(result)).unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_refusal() {
        std::panic::set_hook(Box::new(|_| {}));
        assert_eq!(shield(|| -> Result<(), Errno> { panic!("ours") }), Err(Errno(libc::EACCES)));
        let _ = std::panic::take_hook();
    }
}
