//! What is shown to peers: certificates, made now or not long ago.

use std::{io, sync::Arc};

use nix::errno::Errno;
use portcullis_wire::Addr;
use serde::Deserialize;

use super::{Associations, Bond, now};
use crate::identity::{ProcessFacts, ProcessIdentity, ProcessName, Validity};

/// Most identities that are kept for further flows of the same process.
const MOST_MINTED: usize = 1024;

/// A process as the broker names it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    name: ProcessName,
    exe: String,
    sha256: String,
    user: String,
    #[serde(default)]
    unit: Option<String>,
    /// Each association gets a certificate of its own, and others may follow that belong to it.
    #[serde(default)]
    related: bool,
    /// The association that this belongs to.
    #[serde(default)]
    of: Option<u64>,
}

/// What is shown in an association's handshakes.
pub(super) enum Shows {
    /// A certificate of the process.
    Process { identity: ProcessIdentity, related: bool },
    /// What another association has shown, which lives.
    Same(u64, Arc<Bond>),
}

impl Associations {
    /// What a process shows, as the broker names it.
    ///
    /// # Errors
    /// `ENOENT` if what it belongs to is over, or was not begun for others to follow.
    pub(super) fn shows(&mut self, json: &[u8]) -> io::Result<Shows> {
        let named: Named = serde_json::from_slice(json)?;
        if let Some(of) = named.of {
            let found = self.all.get(&of).filter(|one| one.running);
            let bond = found.and_then(|one| one.bond.clone()).filter(|bond| bond.is_related());
            return Ok(Shows::Same(of, bond.ok_or(Errno::ENOENT)?));
        }
        let related = named.related;
        let identity = if related { self.mint(named)? } else { self.identity(json, named)? };
        Ok(Shows::Process { identity, related })
    }

    fn mint(&self, named: Named) -> io::Result<ProcessIdentity> {
        let Named { name, exe, sha256, user, unit, .. } = named;
        let facts = ProcessFacts { exe, sha256, user, unit };
        self.host.mint(&name, &facts, Validity::process(now())).map_err(io::Error::other)
    }

    /// An identity for a process, minted now or not long ago.
    fn identity(&mut self, json: &[u8], named: Named) -> io::Result<ProcessIdentity> {
        let now = now();
        if let Some(one) = self.minted.get(json)
            && now < i64::midpoint(one.validity.from, one.validity.until)
        {
            return Ok(one.clone());
        }
        let made = self.mint(named)?;
        if self.minted.len() >= MOST_MINTED {
            self.minted.retain(|_, one| now < i64::midpoint(one.validity.from, one.validity.until));
        }
        if self.minted.len() < MOST_MINTED {
            self.minted.insert(json.into(), made.clone());
        }
        Ok(made)
    }

    /// How the broker names a process, once for all its flows.
    pub(super) fn shared(&self, json: &[u8]) -> Arc<[u8]> {
        self.minted.get_key_value(json).map_or_else(|| json.into(), |(there, _)| there.clone())
    }

    /// Ties an association to what it shows. Returns what it belongs to, and whether the peer is a member, too.
    pub(super) fn bind(&self, shows: Shows, remote: &Addr) -> (Arc<Bond>, Option<u64>, bool) {
        let owner =
            remote.ip().and_then(|ip| self.host.members().owner(ip)).map(|member| member.name.clone());
        let is_member = owner.is_some();
        match shows {
            Shows::Process { identity, related } => {
                (Bond::new(identity, &self.verifier, owner, related), None, is_member)
            }
            Shows::Same(of, bond) => (bond, Some(of), is_member),
        }
    }
}

/// Any bytes as what names a process, for [`crate::fuzzing`].
pub(crate) fn read_any(bytes: &[u8]) {
    let _either = serde_json::from_slice::<Named>(bytes);
}
