//! What holds each process, since when, and what does not, and why: for `ps` and `status`.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
};

use portcullis_backstop::cgroup_name;

use super::{Broker, answers::rfc3339, far::is_wrapped};
use crate::{
    control::{Covered, Hold, ListenerRow, ProcessRow, Uncovered},
    process::{Context, ProcessKey},
    sys::{boottime, image, proc::ProcDir, realtime},
};

/// Nanoseconds of a clock tick: `USER_HZ` is 100 on x86_64.
const TICK: u64 = 10_000_000;
/// What the four are called, in their order everywhere.
const NAMES: [&str; 4] = ["shim", "guard", BACKSTOP, "filter"];
const BACKSTOP: &str = "backstop";

/// How one of the four was when it was last looked at.
#[derive(Clone, Copy, Debug)]
struct Seen {
    holds: bool,
    /// Nanoseconds since the epoch.
    since: u64,
}

/// What was seen of the processes that are there.
#[derive(Debug, Default)]
pub(super) struct Coverages(HashMap<ProcessKey, [Seen; 4]>);

impl Coverages {
    /// Since when each is as it is now. Shim, guard and backstop come with a process or do not; what is otherwise than
    /// before has changed by now, and a filter comes with its listener.
    fn since(&mut self, key: ProcessKey, now: u64, born: u64, holds: [bool; 4]) -> [u64; 4] {
        let [shim, guard, backstop, filter] = holds;
        let first = |holds, since| Seen { holds, since };
        let seen = self.0.entry(key).or_insert([
            first(shim, born),
            first(guard, born),
            first(backstop, born),
            first(filter, if filter { now } else { born }),
        ]);
        for (seen, holds) in seen.iter_mut().zip(holds) {
            if seen.holds != holds {
                *seen = Seen { holds, since: now };
            }
        }
        seen.map(|seen| seen.since)
    }

    /// Forgets those that are not there any more.
    pub(super) fn keep(&mut self, there: &HashSet<ProcessKey>) {
        self.0.retain(|key, _| there.contains(key));
    }
}

impl Broker {
    /// What holds a process.
    pub(super) fn coverage(&mut self, context: &Context, listeners: &[ListenerRow]) -> Vec<Hold> {
        let key = context.key;
        let missing: [Option<String>; 4] = [
            self.why_no_shim(key).map(str::to_owned),
            self.why_no_guard(key).map(str::to_owned),
            self.why_no_backstop(key),
            self.why_no_filter(listeners).map(str::to_owned),
        ];
        let holds = missing.each_ref().map(Option::is_none);
        let now = realtime();
        let born = now.saturating_sub(boottime()).saturating_add(key.start.saturating_mul(TICK));
        let since = self.coverages.since(key, now, born, holds);
        let all = NAMES.into_iter().zip(missing).zip(since);
        all.map(|((by, why), since)| Hold {
            by: by.to_owned(),
            holds: why.is_none(),
            since: rfc3339(since),
            form: (by == BACKSTOP && why.is_none()).then(|| self.form().to_owned()),
            why,
        })
        .collect()
    }

    fn why_no_shim(&self, key: ProcessKey) -> Option<&'static str> {
        if is_wrapped(key.pid) {
            return None;
        }
        let Ok(at) = ProcDir::open(key.pid) else { return Some("it has ended") };
        match image::why_no_preload(&at) {
            Err(_) if self.shimmed.contains(&key) => None,
            Err(_) => Some("nobody may look into it"),
            Ok(why) => Some(why),
        }
    }

    fn why_no_guard(&self, key: ProcessKey) -> Option<&'static str> {
        let status = fs::read_to_string(format!("/proc/{}/status", key.pid)).unwrap_or_default();
        let filtered = status.lines().any(|l| l == "Seccomp:\t2");
        let scope = || fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
        match (filtered, self.guards.is_empty()) {
            (true, false) => None,
            (true, true) if self.owner != 0 && !matches!(scope().trim(), "" | "0") => {
                Some("this system forbids a user to look into its own processes (kernel.yama.ptrace_scope)")
            }
            (true, true) => Some("another program's seccomp listener was there first"),
            (false, _) => Some("no seccomp filter is under it"),
        }
    }

    fn why_no_backstop(&self, key: ProcessKey) -> Option<String> {
        if self.enclosed(key.pid) || self.fenced(key.pid) {
            return None;
        }
        if self.kernel.is_none() && self.fence.is_none() {
            return Some(self.unbacked.clone().unwrap_or_else(|| "nobody has loaded it".to_owned()));
        }
        if self.in_cgroup(key.pid) {
            return Some("it is in another network namespace than the nftables table".to_owned());
        }
        let at = ProcDir::open(key.pid).and_then(|at| at.cgroup()).ok().flatten();
        let at = at.unwrap_or_else(|| "none that is visible here".to_owned());
        Some(format!("its cgroup is {at}, not one of {}", cgroup_name(&self.state)))
    }

    /// Which of its forms a backstop has.
    fn form(&self) -> &'static str {
        if self.fence.is_some() { "nftables" } else { "bpf" }
    }

    fn why_no_filter(&self, listeners: &[ListenerRow]) -> Option<&'static str> {
        if listeners.iter().any(|l| ["kernel-filter", "front"].contains(&l.held_by.as_str())) {
            return None;
        }
        let privileged = self.keyd.as_ref().is_some_and(crate::keyd::Keyd::filters);
        Some(match (listeners.iter().any(|l| l.held_by == "accept"), privileged) {
            (true, false) => "no key daemon here may put a filter on its listeners",
            (true, true) => "the kernel took no filter for its listeners",
            (false, _) if listeners.is_empty() => "it listens nowhere",
            (false, _) => "anyone may come to its listeners",
        })
    }
}

/// The same over all processes.
pub(super) fn summary(rows: &[ProcessRow]) -> Vec<Covered> {
    let covered = |by: &str| {
        let holds: Vec<&Hold> = rows.iter().flat_map(|row| &row.coverage).filter(|h| h.by == by).collect();
        let mut missing: BTreeMap<&str, usize> = BTreeMap::new();
        for why in holds.iter().filter_map(|hold| hold.why.as_deref()) {
            *missing.entry(why).or_default() += 1;
        }
        Covered {
            by: by.to_owned(),
            processes: holds.iter().filter(|hold| hold.holds).count(),
            form: holds.iter().find_map(|hold| hold.form.clone()),
            missing: missing
                .into_iter()
                .map(|(why, processes)| Uncovered { why: why.to_owned(), processes })
                .collect(),
        }
    };
    NAMES.into_iter().map(covered).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_is_so_since_it_was_seen() {
        let key = ProcessKey { pid: 7, start: 9 };
        let mut all = Coverages::default();
        assert_eq!(all.since(key, 100, 50, [true, true, false, false]), [50; 4]);
        assert_eq!(all.since(key, 200, 50, [false, true, false, true]), [200, 50, 50, 200]);
        assert_eq!(all.since(key, 300, 50, [false, true, false, true]), [200, 50, 50, 200]);
        all.keep(&HashSet::new());
        assert_eq!(all.since(key, 400, 50, [true; 4]), [50, 50, 50, 400]);
    }
}
