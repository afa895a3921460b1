//! Calls that reach into other processes, and Landlock.

use std::os::fd::{AsFd, AsRawFd};

use portcullis_guard::{
    landlock,
    listener::{Answer, Notification},
};
use portcullis_types::Lack;

use super::{CONTINUE, Outcome, fail};
use crate::{
    guard::{calls::Span, target},
    serve::Broker,
    sys::{pidfd_getfd, pidfd_open, proc::ProcDir},
};

/// Most parents that are asked about.
const ANCESTORS: usize = 64;

impl Broker {
    /// Whether a process is in a wrapped tree, so that its own calls come here.
    fn is_wrapped(&mut self, pid: i32) -> bool {
        let Some((pid, ..)) = target::process_of(pid) else { return false };
        self.enclosed(pid) || (self.guards.by_proxy() && self.descends(pid))
    }

    /// Whether a process or one of its parents is known here.
    fn descends(&self, mut pid: i32) -> bool {
        for _ in 0..ANCESTORS {
            if self.by_pid.contains_key(&pid) {
                return true;
            }
            let parent = ProcDir::open(pid).and_then(|at| at.birth()).map_or(0, |birth| birth.parent);
            if parent <= 1 {
                return false;
            }
            pid = parent;
        }
        false
    }

    /// Whether the kernel takes connect(2) of TCP from trees whose calls are made by proxy.
    pub(in crate::serve) fn has_landlock(&self) -> bool {
        landlock::version() >= landlock::NETWORK && !self.without.has(Lack::Landlock)
    }

    /// Whether the kernel itself keeps a tree's hands off others.
    fn is_landlocked(&self, tree: u64) -> bool {
        self.guards.trees.get(&tree).is_some_and(|t| t.by_proxy) && self.has_landlock()
    }

    pub(super) fn judge_trace(&mut self, tree: u64, call: &Notification, request: i64, pid: i32) -> Outcome {
        // PTRACE_TRACEME: the parent, who could trace anyway, is told of it.
        if request == i64::from(libc::PTRACE_TRACEME) {
            return CONTINUE;
        }
        self.judge_reach(tree, call, pid)
    }

    /// Into processes of the tree only: another's sockets are outside the boundary.
    pub(super) fn judge_reach(&mut self, tree: u64, call: &Notification, pid: i32) -> Outcome {
        let inside = self.is_landlocked(tree) || self.is_wrapped(pid);
        if inside && self.still_held(tree, call.id) { CONTINUE } else { fail(libc::EPERM) }
    }

    /// pidfd_getfd(2), on a copy of the pidfd, so that it cannot be exchanged meanwhile.
    pub(super) fn take_for(
        &mut self,
        tree: u64,
        call: &Notification,
        pid: i32,
        pidfd: i32,
        number: i32,
    ) -> Outcome {
        if self.is_landlocked(tree) {
            return CONTINUE;
        }
        let taken = (|| {
            let caller = pidfd_open(pid).ok()?;
            let copy = pidfd_getfd(caller.as_fd(), pidfd).ok()?;
            let whose = target::behind_pidfd(std::process::id().cast_signed(), copy.as_raw_fd())?;
            // We may look into every process; the caller only into those of its own user.
            let (_, theirs, _) = target::process_of(whose)?;
            let (_, its, _) = target::process_of(pid)?;
            if !self.is_wrapped(whose) || (its != 0 && its != theirs) {
                return None;
            }
            Some(pidfd_getfd(copy.as_fd(), number))
        })();
        if !self.still_held(tree, call.id) {
            return fail(libc::EPERM);
        }
        match taken {
            Some(Ok(fd)) => Outcome::Descriptor(fd, true),
            Some(Err(error)) => fail(error.raw_os_error().unwrap_or(libc::EPERM)),
            None => fail(libc::EPERM),
        }
    }
}

/// landlock_create_ruleset(2) where calls are made by proxy: rules for the network would hold the program and not
/// who acts for it, so the kernel looks as it did before it had any (Linux 6.6), and a program that wants them knows.
pub(super) fn landlock(tid: i32, attributes: Span, flags: u64) -> Outcome {
    /// The last version without them.
    const FILES: i64 = 3;
    /// Bytes of `struct landlock_ruleset_attr` then.
    const KNOWN: usize = 8;
    const MOST: u64 = 128;
    if flags == landlock::ASK_VERSION {
        return match landlock::version() {
            0 => CONTINUE,
            version => Outcome::Answer(Answer::Return(version.min(FILES))),
        };
    }
    // No version has as many.
    let attributes = Span { length: attributes.length.min(MOST), ..attributes };
    let bytes = target::read_span(tid, attributes).unwrap_or_default();
    let beyond = bytes.get(KNOWN..).is_some_and(|rest| rest.iter().any(|b| *b != 0));
    if beyond { fail(libc::E2BIG) } else { CONTINUE }
}
