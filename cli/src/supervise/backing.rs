//! What the kernel does for the broker, as far as root must set it up: the backstop's programs on the cgroups of
//! wrapped trees.

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

use portcullis_backstop::{
    Attacher, BackstopError, Cgroup, cgroup_name, events_of, keep_listeners, listeners_of, load_for_another,
    sweep,
};

type Loaded = Result<(Vec<OwnedFd>, Attacher), BackstopError>;

/// See the module.
#[derive(Debug, Default)]
pub struct Backing {
    /// What the cgroups of this state folder are called.
    name: String,
    unwanted: Option<&'static str>,
    /// The first broker's, which is loaded while that broker starts.
    ahead: Option<JoinHandle<Loaded>>,
    attacher: Option<Attacher>,
    /// Map of the listeners that the last broker granted.
    listeners: Option<OwnedFd>,
    /// Ring of the records that the last broker may not have had time for.
    events: Option<OwnedFd>,
    cgroups: Vec<Cgroup>,
    /// Where they were made.
    parents: BTreeSet<PathBuf>,
}

impl Backing {
    /// Nothing yet. `unwanted`: why there shall be no backstop, if so.
    pub fn new(state: &Path, unwanted: Option<&'static str>) -> Self {
        let ahead = unwanted.is_none().then(|| thread::spawn(load_for_another));
        Self { name: cgroup_name(state), unwanted, ahead, ..Self::default() }
    }

    /// Why there shall be none.
    pub const fn unwanted(&self) -> Option<&'static str> {
        self.unwanted
    }

    /// What the last broker may not have put on record, for the next one.
    pub const fn take_events(&mut self) -> Option<OwnedFd> {
        self.events.take()
    }

    /// Sets everything up for a broker that is about to start; the result is for it. The earlier broker's
    /// grants end here, but for its listeners.
    ///
    /// # Errors
    /// What failed; the broker may be started without.
    pub fn begin(&mut self) -> Result<Vec<OwnedFd>, BackstopError> {
        self.attacher = None;
        let ahead = self.ahead.take().and_then(|thread| thread.join().ok());
        let (descriptors, attacher) = ahead.unwrap_or_else(load_for_another)?;
        if let Some(fresh) = listeners_of(&descriptors) {
            if let Some(old) = &self.listeners {
                keep_listeners(old.as_fd(), fresh)?;
            }
            self.listeners = fresh.try_clone_to_owned().ok();
        }
        self.events = events_of(&descriptors).and_then(|ring| ring.try_clone_to_owned().ok());
        self.tidy();
        for cgroup in &self.cgroups {
            attacher.attach(cgroup)?;
        }
        self.attacher = Some(attacher);
        Ok(descriptors)
    }

    /// Puts a process under the backstop, in a child of its own cgroup. `false`: there is none here.
    ///
    /// # Errors
    /// The process is where it was.
    pub fn enclose(&mut self, pid: u32) -> Result<bool, BackstopError> {
        let Some(attacher) = &self.attacher else { return Ok(false) };
        let cgroup = match Cgroup::below(pid, &self.name) {
            // No cgroup v2 in this container: `ps` shows that the backstop does not hold it.
            Err(BackstopError::NoHierarchy | BackstopError::NoCgroup(_)) => return Ok(false),
            found => found?,
        };
        // One of an earlier supervisor's has programs that answer to nobody any more; one that somebody removed
        // and that was made again has none.
        let known = self.cgroups.iter().any(|known| known.path() == cgroup.path());
        if !known || !Attacher::missing(&cgroup)?.is_empty() {
            attacher.attach(&cgroup)?;
        }
        if !cgroup.holds(pid)? {
            cgroup.enter(pid)?;
        }
        self.parents.extend(cgroup.path().parent().map(Path::to_path_buf));
        self.cgroups.retain(|known| known.path() != cgroup.path());
        self.cgroups.push(cgroup);
        Ok(true)
    }

    /// The last [`Self::tidy`]: a process that has just ended leaves its cgroup a moment later. What killed
    /// supervisors have left beside goes too.
    pub fn end(&mut self) {
        self.parents.iter().for_each(|parent| sweep(parent));
        for _ in 0..100 {
            self.tidy();
            if self.cgroups.is_empty() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// Removes the cgroups of trees that have ended.
    pub fn tidy(&mut self) {
        self.cgroups.retain(|cgroup| !cgroup.remove_if_empty().unwrap_or(false));
    }
}
