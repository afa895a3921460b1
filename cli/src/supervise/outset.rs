//! Programs that are started with connections of somebody else's making (inetd, a shell, socket activation): they
//! are stopped where their image begins, before its first instruction, until the broker has judged what they hold.
//!
//! The shim judges connections too, but a static program has no shim. Who may have a connection is told by the
//! program, not by `run`, so this waits for its execve(2), by ptrace(2); nothing else is traced, and ptrace ends there.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::sys;

/// How long a program waits for the broker, as for any other question.
const PATIENCE: Duration = Duration::from_secs(5);

/// One of them.
struct Program {
    /// Of it alone: another process may have its number before the broker has answered.
    tag: u64,
    process: OwnedFd,
    /// Since when it is stopped at its image's beginning.
    stopped: Option<Instant>,
}

/// See the module.
#[derive(Default)]
pub struct Outset {
    programs: HashMap<Pid, Program>,
    /// The last tag given.
    last: u64,
}

impl Outset {
    /// Sees to it that a process stops when it has become its program.
    ///
    /// # Errors
    /// As ptrace(2).
    pub fn expect(&mut self, pid: Pid, process: OwnedFd) -> nix::Result<()> {
        // Should this process end, so does that one, rather than going on unjudged.
        ptrace::seize(pid, Options::PTRACE_O_TRACEEXEC | Options::PTRACE_O_EXITKILL)?;
        self.last += 1;
        self.programs.insert(pid, Program { tag: self.last, process, stopped: None });
        Ok(())
    }

    /// A child has changed its state: the programs that have stopped now, each with its tag.
    pub fn look(&mut self) -> Vec<(u64, OwnedFd)> {
        let mut begun = Vec::new();
        self.programs.retain(|pid, program| {
            match waitpid(*pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
                Ok(WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_EXEC)) => {
                    program.stopped = Some(Instant::now());
                    begun.extend(program.process.try_clone().map(|process| (program.tag, process)));
                    true
                }
                Ok(WaitStatus::Stopped(_, signal)) => ptrace::cont(*pid, signal).is_ok(),
                // Stopped as a whole, until somebody continues it.
                Ok(WaitStatus::PtraceEvent(_, signal, libc::PTRACE_EVENT_STOP))
                    if signal != Signal::SIGTRAP =>
                {
                    sys::stay_stopped(*pid).is_ok()
                }
                Ok(WaitStatus::PtraceEvent(..)) => ptrace::cont(*pid, None).is_ok(),
                // A real-time signal, which nix does not know: lost to a program that has not begun yet.
                Err(Errno::EINVAL) => ptrace::cont(*pid, None).is_ok(),
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => true,
                _ => false, // it has ended
            }
        });
        begun
    }

    /// Lets one go on, whose connections have been judged.
    pub fn release(&mut self, tag: u64) {
        if let Some((pid, program)) = self.programs.iter_mut().find(|(_, program)| program.tag == tag) {
            program.stopped = None;
            let pid = *pid;
            // One that is being killed stays: its parent hears of its end when `look` has.
            if ptrace::detach(pid, None).is_ok() {
                self.programs.remove(&pid);
            }
        }
    }

    /// How long it is until one has waited long enough.
    pub fn wake_in(&self) -> Option<Duration> {
        let since = self.programs.values().filter_map(|p| p.stopped).min()?;
        Some(PATIENCE.saturating_sub(since.elapsed()))
    }

    /// Ends those that nobody has judged in time; their tags.
    pub fn tend(&mut self) -> Vec<u64> {
        let late = |p: &Program| p.stopped.is_some_and(|since| since.elapsed() >= PATIENCE);
        let mut ended = Vec::new();
        for (pid, program) in self.programs.iter_mut().filter(|(_, program)| late(program)) {
            // Still traced, so it is still this process.
            let _has_ended = kill(*pid, Signal::SIGKILL);
            program.stopped = None;
            ended.push(program.tag);
        }
        ended
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use std::{
        io::{Read, Write},
        process::{Child, Command, Stdio},
    };

    use super::*;

    /// A process that becomes another program when it is told to.
    fn waiting() -> (Child, Pid) {
        let mut child = Command::new("sh")
            .args(["-c", "echo; read x; exec true"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // `spawn` returns in the middle of the shell's own execve(2), which is not the one that is meant.
        child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        (child, pid)
    }

    /// Whether nothing begins for a while.
    fn none_begins(outset: &mut Outset) -> bool {
        (0..100).all(|_| {
            std::thread::sleep(Duration::from_millis(1));
            outset.look().is_empty()
        })
    }

    fn look_for_one(outset: &mut Outset) -> u64 {
        for _ in 0..5000 {
            if let [(tag, _)] = outset.look()[..] {
                return tag;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("it has not begun");
    }

    #[test]
    fn a_program_begins_whatever_signal_comes_before_and_is_released_by_its_own_tag_alone() {
        let mut outset = Outset::default();
        let (mut child, pid) = waiting();
        outset.expect(pid, sys::pidfd_open(pid).unwrap()).unwrap();
        // SAFETY: numbers. nix has no real-time signals.
        #[expect(unsafe_code, reason = "no wrapper in nix")]
        unsafe {
            libc::kill(pid.as_raw(), libc::SIGRTMIN())
        };
        assert!(none_begins(&mut outset));
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        let tag = look_for_one(&mut outset);
        outset.release(tag + 1);
        outset.release(tag - 1);
        assert!(child.try_wait().unwrap().is_none() && outset.wake_in().is_some(), "still stopped");
        outset.release(tag);
        assert!(child.wait().unwrap().success() && outset.wake_in().is_none());
    }

    #[test]
    fn a_program_that_is_stopped_before_it_begins_stays_so_until_it_is_continued() {
        let mut outset = Outset::default();
        let (mut child, pid) = waiting();
        outset.expect(pid, sys::pidfd_open(pid).unwrap()).unwrap();
        kill(pid, Signal::SIGSTOP).unwrap();
        // It has been told, and has stopped.
        let status = || std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        for _ in 0..5000 {
            assert!(outset.look().is_empty());
            if status().contains("State:\tt") {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        assert!(none_begins(&mut outset));
        kill(pid, Signal::SIGCONT).unwrap();
        let tag = look_for_one(&mut outset);
        outset.release(tag);
        assert!(child.wait().unwrap().success());
    }
}
