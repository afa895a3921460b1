//! Signals and limits that would end or stop those who hold a tree: the supervisor, this broker and the key daemon.

use std::{
    fs,
    os::{
        fd::{AsFd, AsRawFd},
        unix::process::parent_id,
    },
};

use nix::unistd::{Pid, getpgid, getpgrp};
use portcullis_guard::listener::Notification;

use super::{CONTINUE, Outcome, fail};
use crate::{
    audit::Line,
    guard::{calls::To, target},
    serve::Broker,
    sys::{
        message::Writer,
        pidfd_getfd, pidfd_open,
        proc::{Credentials, ProcDir},
        realtime,
    },
};

/// Bit of CAP_KILL (linux/capability.h).
const CAP_KILL: u64 = 1 << 5;

impl Broker {
    /// What is sent to anybody else is the kernel's business.
    pub(super) fn judge_signal(&mut self, tree: u64, call: &Notification, sender: Writer, to: To) -> Outcome {
        let reaches = match to {
            To::Group(None) => shares_group(sender.pid),
            // Whose it will be is not known yet.
            To::Owner => true,
            _ if !shares_namespace(call.pid.cast_signed()) => false, // it has other numbers for processes, and none for us
            To::Process(pid) => is_ours(pid),
            To::Group(Some(group)) => group == getpgrp().as_raw(),
            To::All => may_signal_us(call.pid.cast_signed()),
            To::Pidfd(number) => match behind(sender.pid, number) {
                Ok(pid) => pid.is_some_and(is_ours),
                Err(libc::EBADF) => false,
                Err(_) => true,
            },
            // A negative number means the sender itself. A leader that has ended has no number any more, its group has.
            To::PidfdsGroup(..0) => shares_group(sender.pid),
            To::PidfdsGroup(number) => match behind(sender.pid, number) {
                Ok(pid) => pid.is_none_or(|pid| pid == getpgrp().as_raw()),
                Err(errno) => errno != libc::EBADF,
            },
        };
        if !reaches && self.still_held(tree, call.id) {
            return CONTINUE;
        }
        self.refuse_to_end(sender, "a signal that would end or stop what holds this program")
    }

    /// A limit of another process: of processor time, for one, at which the kernel kills it.
    pub(super) fn judge_limit(&mut self, tree: u64, call: &Notification, sender: Writer, of: i32) -> Outcome {
        let reaches = shares_namespace(call.pid.cast_signed()) && is_ours(of);
        if !reaches && self.still_held(tree, call.id) {
            return CONTINUE;
        }
        self.refuse_to_end(sender, "a limit for what holds this program")
    }

    fn refuse_to_end(&mut self, sender: Writer, reason: &str) -> Outcome {
        let process = self.identify(sender, None).and_then(|key| self.context_of(key));
        self.log.push(&Line {
            process: process.as_deref(),
            verdict: Some("refuse"),
            reason: Some(reason),
            generation: Some(self.generation_in_force()),
            ..Line::bare(realtime(), "signal", "guard")
        });
        fail(libc::EPERM)
    }
}

/// Whether a process, or the one that this thread is of, is the supervisor or one of its children: broker and key
/// daemon.
fn is_ours(pid: i32) -> bool {
    let supervisor = parent_id().cast_signed();
    let Some((pid, ..)) = target::process_of(pid) else { return false };
    let parent = || ProcDir::open(pid).and_then(|at| at.birth()).map(|birth| birth.parent);
    pid == supervisor || parent().is_ok_and(|parent| parent == supervisor)
}

/// Whether a process is in our process group: then the supervisor was started beside it, by hand.
fn shares_group(pid: i32) -> bool {
    getpgid(Some(Pid::from_raw(pid))) == Ok(getpgrp())
}

/// Whether a thread's numbers for processes are ours. Those of another namespace have none for us, as none is above
/// ours: whoever could see it there would see us here.
fn shares_namespace(tid: i32) -> bool {
    let space = |of: &str| fs::read_link(format!("/proc/{of}/ns/pid")).ok();
    let (its, own) = (space(&tid.to_string()), space("self"));
    its.is_none() || its == own
}

/// Whether the kernel would let a thread send us signals (kill(2)).
fn may_signal_us(tid: i32) -> bool {
    let users = |pid: i32| ProcDir::open(pid).and_then(|at| at.credentials());
    let Ok(Credentials { real, uid, .. }) = users(tid) else { return true };
    let status = fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    if capabilities.is_none_or(|bits| bits & CAP_KILL != 0) {
        return true;
    }
    let supervisor = parent_id();
    let Ok(children) = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")) else {
        return true;
    };
    let ours = children.split_ascii_whitespace().filter_map(|pid| pid.parse().ok());
    ours.chain([supervisor.cast_signed()])
        .filter_map(|pid| users(pid).ok())
        .any(|our| [real, uid].iter().any(|id| [our.real, our.uid].contains(id)))
}

/// Whom a descriptor of a process stands for: a pidfd, or a folder of /proc.
fn behind(pid: i32, number: i32) -> Result<Option<i32>, i32> {
    let errno = |e: std::io::Error| e.raw_os_error().unwrap_or(libc::EPERM);
    let sender = pidfd_open(pid).map_err(errno)?;
    let copy = pidfd_getfd(sender.as_fd(), number).map_err(errno)?;
    let folder = || {
        let path = fs::read_link(format!("/proc/self/fd/{}", copy.as_raw_fd())).ok()?;
        path.file_name()?.to_str()?.parse().ok()
    };
    Ok(target::behind_pidfd(std::process::id().cast_signed(), copy.as_raw_fd()).or_else(folder))
}
