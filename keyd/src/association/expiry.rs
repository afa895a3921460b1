//! Associations end with their peers' certificates.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};

/// Who ends when. The timer is of the wall clock, so that it is right when that is set, too.
pub(super) struct Expiry {
    timer: TimerFd,
    /// Second since the Unix epoch after which nothing is believed, and the association.
    ends: BTreeSet<(i64, u64)>,
    of: HashMap<u64, i64>,
}

impl Expiry {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_REALTIME, flags)?;
        Ok(Self { timer, ends: BTreeSet::new(), of: HashMap::new() })
    }

    pub(super) fn add(&mut self, end: i64, id: u64) {
        let first = self.ends.first().copied();
        self.ends.insert((end, id));
        self.of.insert(id, end);
        self.wind(first);
    }

    pub(super) fn forget(&mut self, id: u64) {
        if let Some(end) = self.of.remove(&id) {
            let first = self.ends.first().copied();
            self.ends.remove(&(end, id));
            self.wind(first);
        }
    }

    /// Takes those whose end is past.
    pub(super) fn due(&mut self, now: i64) -> Vec<u64> {
        if self.ends.is_empty() {
            return Vec::new();
        }
        // Else it stays readable when the clock was set back after it had fired.
        let fired = self.timer.wait().is_ok();
        let first = self.ends.first().copied().filter(|_| !fired);
        let mut due = Vec::new();
        while let Some(&(end, id)) = self.ends.first()
            && end < now
        {
            self.ends.pop_first();
            self.of.remove(&id);
            due.push(id);
        }
        self.wind(first);
        due
    }

    /// Sets the timer to the first end, unless that is still what it was. When it fails, what comes next is late, but
    /// not forgotten.
    fn wind(&self, before: Option<(i64, u64)>) {
        if before.is_some() && before == self.ends.first().copied() {
            return;
        }
        let _late = match self.ends.first() {
            None => self.timer.unset(),
            Some((end, _)) => {
                let at = Duration::from_secs(u64::try_from(end.saturating_add(1)).unwrap_or(1).max(1));
                let (expiration, flags) =
                    (Expiration::OneShot(TimeSpec::from(at)), TimerSetTimeFlags::TFD_TIMER_ABSTIME);
                self.timer.set(expiration, flags)
            }
        };
    }
}

impl AsFd for Expiry {
    /// Readable when somebody is due.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}
