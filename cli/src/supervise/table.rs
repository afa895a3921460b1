//! The backstop's nftables form: the table on wrapped cgroups, made, shown to hold, and removed.

use std::{io, net::UdpSocket, path::PathBuf};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use portcullis_backstop::{BackstopError, Cgroup, PREFIX, all_named, cgroup_name, is_name_of_ours};
use portcullis_nft as nft;

use super::sweep;
use crate::{
    place::Place,
    sys::{self, Forked},
};

/// See the module.
#[derive(Debug)]
pub struct Table {
    table: nft::Table,
    /// Its name, and that of the cgroups that it holds.
    name: String,
    /// Why it is not BPF.
    pub why: String,
}

impl Table {
    /// Makes it, and tries it on a process of ours.
    ///
    /// # Errors
    /// Why there cannot be one here, or that it does not hold.
    pub fn make(place: &Place, enforces: bool, why: String) -> Result<Self, String> {
        let name = cgroup_name(&place.state);
        let text = |error: io::Error| error.to_string();
        let it = Self { table: nft::Table::of(&name).map_err(text)?, name: name.clone(), why };
        for left in it.table.names().map_err(text)? {
            // A killed supervisor's, with nobody in it. One that lives may have no programs just now.
            let is_empty = |left: &str| all_named(left).is_ok_and(|cgroups| cgroups.is_empty());
            let is_over = |left: &str| is_empty(left) && !sweep::is_served(&beside(place, left));
            if left != name && is_name_of_ours(&left) && is_over(&left) {
                let _gone = nft::Table::of(&left).and_then(|table| table.remove());
            }
        }
        let cgroup = Cgroup::below(std::process::id(), &name).map_err(|e| e.to_string())?;
        let held = it
            .table
            .make(true)
            .map_err(text)
            .and_then(|()| it.hold(&cgroup).map_err(|e| e.to_string()))
            .and_then(|()| is_held(&cgroup).map_err(text))
            .and_then(
                |held| if held { Ok(()) } else { Err("it does not hold this kernel's cgroups".to_owned()) },
            )
            .and_then(|()| if enforces { Ok(()) } else { it.table.make(false).map_err(text) });
        let _in_use = cgroup.remove_if_empty();
        if held.is_err() {
            it.remove();
        }
        held.map(|()| it)
    }

    /// Holds the sockets that are made in a cgroup from now on.
    ///
    /// # Errors
    /// The table has gone.
    pub fn hold(&self, cgroup: &Cgroup) -> Result<(), BackstopError> {
        let (number, level) = cgroup.place()?;
        let failed = |source| BackstopError::Cgroup { what: "hold", path: cgroup.path().to_owned(), source };
        self.table.hold(number, level).map_err(failed)
    }

    /// Forgets cgroups that have gone, as every packet of this host passes by the rules of all. A killed supervisor's that
    /// are there stay held.
    pub fn forget_gone(&self) {
        let place = |path: &PathBuf| Cgroup::open(path)?.place();
        let there =
            all_named(&self.name).and_then(|all| all.iter().map(place).collect::<Result<Vec<_>, _>>());
        if let Ok(there) = there {
            let _as_before = self.table.hold_only(&there);
        }
    }

    /// Removes it: nobody is in those cgroups any more.
    pub fn remove(&self) {
        let _gone = self.table.remove();
    }
}

/// The place of another supervisor, by the name of its table.
fn beside(place: &Place, table: &str) -> Place {
    let named = table.strip_prefix(PREFIX).unwrap_or(table);
    Place { state: PathBuf::new(), runtime: place.runtime.with_file_name(named) }
}

/// Whether a process in the cgroup is kept from sending, where one outside is not. Older kernels count a cgroup's depth
/// from another root than what is mounted in a container; then nothing would match.
fn is_held(cgroup: &Cgroup) -> io::Result<bool> {
    let send = || {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let own = socket.local_addr()?;
        socket.send_to(&[0], own)
    };
    send()?;
    match sys::fork_quietly()? {
        Forked::Child => {
            let entered = cgroup.enter(std::process::id()).is_ok();
            let refused = send().is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied);
            std::process::exit(i32::from(!(entered && refused)));
        }
        Forked::Parent(child) => {
            let ended = waitpid(child, Some(WaitPidFlag::__WALL))?;
            Ok(matches!(ended, WaitStatus::Exited(_, 0)))
        }
    }
}
