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

/// How long a program waits for the broker, as for any other question.
const PATIENCE: Duration = Duration::from_secs(5);

/// One of them.
struct Program {
    process: OwnedFd,
    /// Since when it is stopped at its image's beginning.
    stopped: Option<Instant>,
}

/// See the module.
#[derive(Default)]
pub struct Outset(HashMap<Pid, Program>);

impl Outset {
    /// Sees to it that a process stops when it has become its program.
    ///
    /// # Errors
    /// As ptrace(2).
    pub fn expect(&mut self, pid: Pid, process: OwnedFd) -> nix::Result<()> {
        // Should this process end, so does that one, rather than going on unjudged.
        ptrace::seize(pid, Options::PTRACE_O_TRACEEXEC | Options::PTRACE_O_EXITKILL)?;
        self.0.insert(pid, Program { process, stopped: None });
        Ok(())
    }

    /// A child has changed its state: the programs that have stopped now.
    pub fn look(&mut self) -> Vec<(Pid, OwnedFd)> {
        let mut begun = Vec::new();
        self.0.retain(|pid, program| match waitpid(*pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_EXEC)) => {
                program.stopped = Some(Instant::now());
                begun.extend(program.process.try_clone().map(|process| (*pid, process)));
                true
            }
            Ok(WaitStatus::Stopped(_, signal)) => ptrace::cont(*pid, signal).is_ok(),
            Ok(WaitStatus::PtraceEvent(..)) => ptrace::cont(*pid, None).is_ok(),
            Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => true,
            _ => false, // it has ended
        });
        begun
    }

    /// Lets one go on, whose connections have been judged.
    pub fn release(&mut self, pid: Pid) {
        if let Some(program) = self.0.get_mut(&pid) {
            program.stopped = None;
            // One that is being killed stays: its parent hears of its end when `look` has.
            if ptrace::detach(pid, None).is_ok() {
                self.0.remove(&pid);
            }
        }
    }

    /// How long it is until one has waited long enough.
    pub fn wake_in(&self) -> Option<Duration> {
        let since = self.0.values().filter_map(|p| p.stopped).min()?;
        Some(PATIENCE.saturating_sub(since.elapsed()))
    }

    /// Ends those that nobody has judged in time; how many.
    pub fn tend(&mut self) -> usize {
        let late = |p: &Program| p.stopped.is_some_and(|since| since.elapsed() >= PATIENCE);
        let mut ended = 0;
        for (pid, program) in self.0.iter_mut().filter(|(_, program)| late(program)) {
            // Still traced, so it is still this process.
            let _has_ended = kill(*pid, Signal::SIGKILL);
            program.stopped = None;
            ended += 1;
        }
        ended
    }
}
