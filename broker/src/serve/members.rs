//! All processes of the trees that are served here, whether they have asked anything or not.

use std::{collections::HashMap, fs, os::fd::AsFd, rc::Rc};

use nix::sys::socket::{UnixAddr, getsockname};
use portcullis_wire::frame::ENV_BROKER;

use super::{Broker, far::Held};
use crate::{
    process::Context,
    sys::{pidfd_open, proc::ProcDir},
};

/// Most of an environment that is looked through, in bytes.
const ENVIRONMENT: u64 = 1 << 20;

impl Broker {
    /// Process ids of what was run here and of its descendants: by their cgroup, which no program leaves; where
    /// there is none, by their environment, which says whom they ask, or by that of an ancestor.
    pub(super) fn members(&self) -> Vec<i32> {
        let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
        let all: Vec<i32> = all.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        let place = self.place();
        let named = |pid: i32| {
            let environment = ProcDir::open(pid).and_then(|at| at.environment(ENVIRONMENT));
            environment.is_ok_and(|e| e.split(|b| *b == 0).any(|variable| variable == place))
        };
        let parents: HashMap<i32, i32> = all
            .iter()
            .filter_map(|pid| Some((*pid, ProcDir::open(*pid).ok()?.birth().ok()?.parent)))
            .collect();
        let mut members: HashMap<i32, bool> = HashMap::new();
        for pid in &all {
            // Up to somebody of whom it is known already.
            let (mut branch, mut at, mut is) = (Vec::new(), *pid, false);
            while at > 1 && branch.len() < 4096 {
                if let Some(known) = members.get(&at) {
                    is = *known;
                    break;
                }
                branch.push(at);
                if self.enclosed(at) || self.fenced(at) || named(at) {
                    is = true;
                    break;
                }
                at = parents.get(&at).copied().unwrap_or(0);
            }
            members.extend(branch.into_iter().map(|pid| (pid, is)));
        }
        all.into_iter().filter(|pid| members.get(pid).copied().unwrap_or(false)).collect()
    }

    /// The variable that programs served here have in their environment.
    fn place(&self) -> Vec<u8> {
        let mut text = format!("{ENV_BROKER}=").into_bytes();
        let address = getsockname::<UnixAddr>(std::os::fd::AsRawFd::as_raw_fd(&self.doors));
        if let Some(path) = address.as_ref().ok().and_then(UnixAddr::path) {
            text.extend(path.as_os_str().as_encoded_bytes());
        }
        text.extend(format!(":{}", self.owner).into_bytes());
        text
    }

    /// All members with their sockets, those without any left out: for a broker that was restarted.
    pub(super) fn members_with_sockets(&mut self) -> Vec<(Rc<Context>, Held)> {
        let mut found = Vec::new();
        for pid in self.members() {
            let Ok(at) = ProcDir::open(pid) else { continue };
            let Some(held) = at.sockets().ok().filter(|held| !held.is_empty()) else { continue };
            if let Some(context) = self.look_up(pid) {
                found.push((Rc::new(context), held));
            }
        }
        found
    }

    /// What is known of a process that has not asked anything.
    pub(super) fn look_up(&mut self, pid: i32) -> Option<Context> {
        let (pidfd, at) = (pidfd_open(pid).ok()?, ProcDir::open(pid).ok()?);
        self.read_context(pid, pidfd.as_fd(), &at)
    }
}
