//! close, dup and their kin: hints follow descriptors, and descriptors of ours stay out of the way.
//!
//! The program does not see them: closing one is `EBADF`, as if it were not there; if it wants the
//! number for itself, ours moves.

use libc::{c_int, c_uint};

use crate::{channel, door, hints, own};

/// Before close(2): whether the program may.
#[inline]
#[must_use]
pub fn may_close(fd: c_int) -> bool {
    if door::hides(fd) {
        return false;
    }
    hints::forget(fd);
    true
}

/// Before the program makes `fd` something else (dup2, dup3).
#[inline]
pub fn make_way(fd: c_int) {
    if door::hides(fd) && !own::borrowed() {
        channel::make_way(fd);
        door::make_way(fd);
    }
}

/// The next stretch at or after `low` that has no descriptor of ours in it, for closing it whole;
/// `None` when there is none up to `high`.
#[must_use]
pub fn stretch(low: c_uint, high: c_uint) -> Option<(c_uint, c_uint)> {
    let ours = |n: c_uint| c_int::try_from(n).is_ok_and(door::hides);
    let mut low = low;
    while ours(low) {
        low = low.checked_add(1)?;
    }
    if low > high {
        return None;
    }
    let next =
        door::hidden().filter_map(|fd| c_uint::try_from(fd).ok()).filter(|&n| n > low && n <= high).min();
    Some((low, next.map_or(high, |n| n - 1)))
}

/// Runs `close` over every stretch of low..=high; its first failure ends it.
pub fn close_stretches(low: c_uint, high: c_uint, mut close: impl FnMut(c_uint, c_uint) -> c_int) -> c_int {
    let mut from = low;
    while let Some((a, b)) = stretch(from, high) {
        let result = close(a, b);
        if result != 0 {
            return result;
        }
        match b.checked_add(1) {
            Some(next) if b < high => from = next,
            _ => break,
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_a_range_leaves_ours_out() {
        door::hide(905);
        door::hide(907);
        let mut closed = Vec::new();
        let all = |a, b, closed: &mut Vec<_>| {
            closed.push((a, b));
            0
        };
        assert_eq!(close_stretches(3, u32::MAX, |a, b| all(a, b, &mut closed)), 0);
        assert_eq!(closed, [(3, 904), (906, 906), (908, u32::MAX)]);
        closed.clear();
        close_stretches(905, 905, |a, b| all(a, b, &mut closed));
        assert!(closed.is_empty());
        assert!(!may_close(905));
        door::unhide(905);
        door::unhide(907);
        assert!(may_close(905));
    }
}
