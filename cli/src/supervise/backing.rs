//! What the kernel does for the broker, as far as root must set it up: the backstop's programs on the cgroups of
//! wrapped trees.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

use portcullis_backstop::{
    Attacher, BackstopError, Cgroup, cgroup_name, events_of, keep_listeners, listeners_of, load_for_another,
    sweep,
};
use portcullis_broker::guard::{link::Handed, target::same_network};
use portcullis_types::{Lack, Without};

use super::{parts::log, table::Table};
use crate::{Mode, place::Place};

/// Of so many brokers that end as soon as they begin are the records kept; a ring is 4 MB of the kernel's memory.
const MOST_RINGS: usize = 16;

type Loaded = Result<(Vec<OwnedFd>, Attacher), BackstopError>;

/// See the module.
#[derive(Debug, Default)]
pub struct Backing {
    place: Place,
    /// What the cgroups of this state folder are called.
    name: String,
    without: Without,
    mode: Mode,
    unwanted: Option<&'static str>,
    /// The first broker's, which is loaded while that broker starts.
    ahead: Option<JoinHandle<Loaded>>,
    attacher: Option<Attacher>,
    /// Instead of that.
    table: Option<Table>,
    /// Map of the listeners that the last broker granted.
    listeners: Option<OwnedFd>,
    /// Rings of brokers that may not have had time for all records there, the oldest first; the last one is of the
    /// broker that runs.
    events: Vec<OwnedFd>,
    cgroups: Vec<Cgroup>,
    /// Where they were made.
    parents: BTreeSet<PathBuf>,
}

impl Backing {
    /// Nothing yet.
    pub fn new(place: &Place, mode: Mode, without: Without) -> Self {
        let unwanted = match (nix::unistd::geteuid().is_root(), without.has(Lack::Backstop)) {
            (false, _) => Some("only root may load it"),
            (true, true) => Some("it was told to do without (PORTCULLIS_WITHOUT, PORTCULLIS_NO_BACKSTOP)"),
            (true, false) => None,
        };
        let ahead = (unwanted.is_none() && !without.has(Lack::Bpf)).then(|| thread::spawn(load_for_another));
        let (place, name) = (place.clone(), cgroup_name(&place.state));
        Self { place, name, without, mode, unwanted, ahead, ..Self::default() }
    }

    /// Whether there is one.
    pub const fn is_there(&self) -> bool {
        self.attacher.is_some()
    }

    /// What earlier brokers may not have put on record, for the next one.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn events(&self) -> io::Result<Vec<OwnedFd>> {
        self.events.iter().map(OwnedFd::try_clone).collect()
    }

    /// The broker that runs has put on record what those before it had no time for.
    pub fn forget_earlier_events(&mut self) {
        let earlier = self.events.len().saturating_sub(1);
        self.events.drain(..earlier);
    }

    /// Sets everything up for a broker that is about to start; the result is for it. The earlier broker's
    /// grants end here, but for its listeners.
    pub fn begin(&mut self) -> Handed {
        if let Some(why) = self.unwanted {
            return Handed::Unbacked(why.to_owned());
        }
        if let Some(table) = &self.table {
            return Handed::Fenced(table.why.clone());
        }
        let why = if self.without.has(Lack::Bpf) {
            "it was told to do without BPF (PORTCULLIS_WITHOUT)".to_owned()
        } else {
            match self.load() {
                Ok(descriptors) => return Handed::Backstop(descriptors),
                Err(error) => {
                    let source =
                        std::error::Error::source(&error).map(|s| format!(": {s}")).unwrap_or_default();
                    format!("BPF cannot be used: {error}{source}")
                }
            }
        };
        let table = if self.without.has(Lack::Nftables) {
            Err("told to do without (PORTCULLIS_WITHOUT)".to_owned())
        } else {
            Table::make(&self.place, self.mode == Mode::Enforce, why.clone())
        };
        match table {
            Ok(table) => {
                self.table = Some(table);
                log(&format!("the backstop is an nftables table: {why}"));
                Handed::Fenced(why)
            }
            Err(error) => {
                log(&format!("no backstop: {why}; nftables: {error}"));
                Handed::Unbacked(format!("{why}; nftables: {error}"))
            }
        }
    }

    /// The BPF programs.
    fn load(&mut self) -> Result<Vec<OwnedFd>, BackstopError> {
        self.attacher = None;
        let ahead = self.ahead.take().and_then(|thread| thread.join().ok());
        let (descriptors, attacher) = ahead.unwrap_or_else(load_for_another)?;
        if let Some(fresh) = listeners_of(&descriptors) {
            if let Some(old) = &self.listeners {
                keep_listeners(old.as_fd(), fresh)?;
            }
            self.listeners = fresh.try_clone_to_owned().ok();
        }
        self.events.extend(events_of(&descriptors).and_then(|ring| ring.try_clone_to_owned().ok()));
        if self.events.len() > MOST_RINGS {
            super::parts::log(
                "no broker lived long enough to write what is on record: the oldest is given up",
            );
            self.events.remove(0);
        }
        self.tidy();
        for cgroup in &self.cgroups {
            attacher.attach(cgroup)?;
        }
        self.attacher = Some(attacher);
        Ok(descriptors)
    }

    /// Puts a process under the backstop, in a child of its own cgroup. `false`: no BPF programs are there to judge its
    /// calls; the nftables table may look at its packets.
    ///
    /// # Errors
    /// The process is where it was.
    pub fn enclose(&mut self, pid: u32) -> Result<bool, BackstopError> {
        if self.attacher.is_none()
            && self.table.as_ref().filter(|_| same_network(pid.cast_signed())).is_none()
        {
            return Ok(false);
        }
        let cgroup = match Cgroup::below(pid, &self.name) {
            // No cgroup v2 in this container: `ps` shows that the backstop does not hold it.
            Err(BackstopError::NoHierarchy | BackstopError::NoCgroup(_)) => return Ok(false),
            found => found?,
        };
        // One of an earlier supervisor's has programs that answer to nobody any more; one that somebody removed
        // and that was made again has none.
        let known = self.cgroups.iter().any(|known| known.path() == cgroup.path());
        match (&self.attacher, &self.table) {
            (Some(attacher), _) if !known || !Attacher::missing(&cgroup)?.is_empty() => {
                attacher.attach(&cgroup)?
            }
            (None, Some(table)) if !self.cgroups.iter().any(|known| known.is(&cgroup)) => {
                table.hold(&cgroup)?
            }
            _ => {}
        }
        if !cgroup.holds(pid)? {
            cgroup.enter(pid)?;
        }
        self.parents.extend(cgroup.path().parent().map(Path::to_path_buf));
        self.cgroups.retain(|known| known.path() != cgroup.path());
        self.cgroups.push(cgroup);
        Ok(self.attacher.is_some())
    }

    /// The last [`Self::tidy`]: a process that has just ended leaves its cgroup a moment later. What killed
    /// supervisors have left beside goes too.
    pub fn end(&mut self) {
        self.parents.iter().for_each(|parent| sweep(parent));
        for _ in 0..100 {
            self.tidy();
            if self.cgroups.is_empty() {
                self.table.iter().for_each(Table::remove);
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// Removes the cgroups of trees that have ended.
    pub fn tidy(&mut self) {
        let before = self.cgroups.len();
        self.cgroups.retain(|cgroup| !cgroup.remove_if_empty().unwrap_or(false));
        if self.cgroups.len() < before {
            self.table.iter().for_each(Table::forget_gone);
        }
    }
}
