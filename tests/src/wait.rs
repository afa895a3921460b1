//! Waiting for what is going to happen: bounded, and no longer than needed.

use std::time::{Duration, Instant};

/// How long anything may take that is going to happen at all, on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Asks again and again until there is an answer; `None` after a minute.
pub fn until<T>(mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// As [`until`], and ends the test, naming `what`, if it does not happen.
pub fn eventually<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    until(ask).unwrap_or_else(|| panic!("did not happen in {} s: {what}", PATIENCE.as_secs()))
}
