//! Ends a broker that is stuck in one turn of its loop: the supervisor starts another, and whoever is held goes on.
//!
//! A timer is set when work begins, if none is; it is not taken back when work ends, so a turn costs no system call.

use std::{
    io,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::monotonic;

/// How long one turn may take, in seconds: far more than the largest policy needs.
const LONGEST: u32 = 30;

/// When the turn in hand began (monotonic); 0 between turns.
static BEGAN: AtomicU64 = AtomicU64::new(0);
static SET: AtomicBool = AtomicBool::new(false);

/// Begins to watch.
///
/// # Errors
/// As sigaction(2).
pub fn watch() -> io::Result<()> {
    let action = SigAction::new(SigHandler::Handler(look), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler uses atomics, clock_gettime(2), alarm(2) and abort(3), all async-signal-safe.
    #[expect(unsafe_code, reason = "installs a signal handler")]
    unsafe {
        sigaction(Signal::SIGALRM, &action)?;
    }
    Ok(())
}

/// A turn begins.
pub fn work() {
    BEGAN.store(monotonic().max(1), Relaxed);
    if !SET.swap(true, Relaxed) {
        nix::unistd::alarm::set(LONGEST);
    }
}

/// A turn has ended.
pub fn rest() {
    BEGAN.store(0, Relaxed);
}

extern "C" fn look(_signal: libc::c_int) {
    let began = BEGAN.load(Relaxed);
    SET.store(began != 0, Relaxed);
    if began == 0 {
        return;
    }
    let took = u32::try_from(monotonic().saturating_sub(began) / 1_000_000_000).unwrap_or(LONGEST);
    if took >= LONGEST {
        std::process::abort();
    }
    nix::unistd::alarm::set((LONGEST - took).max(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_rests_is_left_alone() {
        watch().unwrap();
        work();
        rest();
        look(0);
        assert!(!SET.load(Relaxed), "no timer is set for one who rests");
        work();
        look(0);
        assert!(SET.load(Relaxed));
        rest();
        nix::unistd::alarm::cancel();
    }
}
