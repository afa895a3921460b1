//! What associations wait for, and until when: however many there are, only those are looked at that have something.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Who has something.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Source {
    Engine,
    Syns,
    Deaths,
    Expiry,
    /// The last step of an association.
    Joining(u64),
    /// Peers at a front.
    Front(u64),
}

impl Source {
    const fn number(self) -> u64 {
        match self {
            Self::Engine => 0,
            Self::Syns => 1,
            Self::Deaths => 2,
            Self::Expiry => 3,
            Self::Joining(id) => id << 3 | 4,
            Self::Front(id) => id << 3 | 5,
        }
    }

    const fn of(number: u64) -> Option<Self> {
        Some(match (number & 7, number >> 3) {
            (0, 0) => Self::Engine,
            (1, 0) => Self::Syns,
            (2, 0) => Self::Deaths,
            (3, 0) => Self::Expiry,
            (4, id) => Self::Joining(id),
            (5, id) => Self::Front(id),
            _ => return None,
        })
    }
}

/// See the module.
pub(super) struct Waits {
    all: Epoll,
    /// Apart, because they are not looked at while there is no room for more peers.
    fronts: Epoll,
    deadlines: BTreeSet<(Instant, u64)>,
}

impl Waits {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = || Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC);
        Ok(Self { all: epoll()?, fronts: epoll()?, deadlines: BTreeSet::new() })
    }

    pub(super) fn add(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        let (epoll, flags) = match source {
            Source::Front(_) => (&self.fronts, EpollFlags::EPOLLIN),
            Source::Joining(_) => (&self.all, EpollFlags::EPOLLOUT),
            _ => (&self.all, EpollFlags::EPOLLIN),
        };
        Ok(epoll.add(fd, EpollEvent::new(flags, source.number()))?)
    }

    /// Stops waiting for a last step, whose socket somebody else gets.
    pub(super) fn remove(&self, fd: impl AsFd) {
        // It fails for one that is not waited for.
        let _ = self.all.delete(fd);
    }

    /// Readable when somebody has something; the second only counts while there is room for more peers.
    pub(super) fn as_fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.all.0.as_fd(), self.fronts.0.as_fd()]
    }

    /// Who has something now.
    pub(super) fn ready(&self) -> Vec<Source> {
        ready(&self.all)
    }

    /// The fronts to which somebody has come.
    pub(super) fn fronts(&self) -> Vec<Source> {
        ready(&self.fronts)
    }

    /// Moves the deadline of an association.
    pub(super) fn expect(&mut self, id: u64, before: Option<Instant>, until: Option<Instant>) {
        if let Some(before) = before {
            self.deadlines.remove(&(before, id));
        }
        if let Some(until) = until {
            self.deadlines.insert((until, id));
        }
    }

    /// When the first deadline is.
    pub(super) fn first(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Whose deadline has passed.
    pub(super) fn late(&self) -> Vec<u64> {
        if self.deadlines.is_empty() {
            return Vec::new();
        }
        let now = Instant::now() + Duration::from_nanos(1);
        self.deadlines.iter().take_while(|(at, _)| *at < now).map(|(_, id)| *id).collect()
    }
}

fn ready(epoll: &Epoll) -> Vec<Source> {
    let mut events = [EpollEvent::empty(); 256];
    // Interrupted, or nothing: it is looked at again.
    let count = epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
    events.iter().take(count).filter_map(|event| Source::of(event.data())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_their_number() {
        for source in [
            Source::Engine,
            Source::Syns,
            Source::Deaths,
            Source::Expiry,
            Source::Joining(7),
            Source::Front(u64::MAX >> 3),
        ] {
            assert_eq!(Source::of(source.number()), Some(source));
        }
    }

    #[test]
    fn deadlines_are_moved_and_taken_in_order() {
        let mut waits = Waits::new().unwrap();
        let at = Instant::now();
        let soon = at + Duration::from_secs(100);
        waits.expect(1, None, Some(soon));
        waits.expect(2, None, Some(at));
        assert_eq!((waits.first(), waits.late()), (Some(at), vec![2]));
        waits.expect(2, Some(at), Some(soon));
        assert!(waits.late().is_empty());
        waits.expect(1, Some(soon), None);
        waits.expect(2, Some(soon), None);
        assert_eq!(waits.first(), None);
    }
}
