//! Who takes part in the trust domain. The key daemon checks the list's signature; here it is read for addresses.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{ErrorKind, Read},
    net::IpAddr,
    os::unix::fs::MetadataExt,
    time::Instant,
};

use serde::Deserialize;

use super::super::Broker;
use crate::audit::More;

/// Name of the list in a host's folder.
pub(in crate::serve) const FILE: &str = "members.toml";
/// Longest list that is read, in bytes.
const LONGEST: u64 = 64 << 20;

/// The list, as far as it is needed here.
#[derive(Debug, Default)]
pub(in crate::serve) struct List {
    number: u64,
    owners: HashMap<IpAddr, String>,
    revoked: HashSet<String>,
}

#[derive(Deserialize)]
struct Written {
    number: u64,
    #[serde(default, rename = "member")]
    members: Vec<Member>,
    #[serde(default)]
    revoked: Vec<Revoked>,
}

#[derive(Deserialize)]
struct Member {
    name: String,
    addresses: Vec<IpAddr>,
}

#[derive(Deserialize)]
struct Revoked {
    serial: String,
}

impl List {
    fn read(text: &str) -> Option<Self> {
        let Written { number, members, revoked } = toml::from_str(text).ok()?;
        let owners = members
            .into_iter()
            .flat_map(|m| m.addresses.into_iter().map(move |at| (at.to_canonical(), m.name.clone())))
            .collect();
        Some(Self { number, owners, revoked: revoked.into_iter().map(|one| one.serial).collect() })
    }

    /// Whether an address is a member's.
    pub(in crate::serve) fn has(&self, ip: IpAddr) -> bool {
        self.owners.contains_key(&ip.to_canonical())
    }

    /// All members' addresses.
    pub(in crate::serve) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.owners.keys().copied()
    }

    pub(super) fn revokes(&self, serial: &str) -> bool {
        self.revoked.contains(serial)
    }
}

impl Broker {
    /// Reads the list of members, and puts it in force if it is newer and the key daemon believes it. Whether it is.
    pub(in crate::serve) fn read_members(&mut self) -> bool {
        let Some(keyd) = self.keyd.as_mut().filter(|keyd| keyd.who().is_some()) else { return false };
        let mut text = String::new();
        let read =
            File::open(self.state.join(FILE)).and_then(|it| it.take(LONGEST).read_to_string(&mut text));
        if let Err(error) = read.and_then(|_| keyd.members(&text)) {
            self.note("members", &format!("the list of members is not taken: {error}"), &[]);
            return false;
        }
        let Some(list) = List::read(&text).filter(|list| list.number > self.lanes.members.number) else {
            return false;
        };
        let number = list.number;
        self.lanes.members = list;
        self.note("members", "a list of members is in force", &[("number", More::Number(number))]);
        true
    }

    /// Has the key daemon take up new keys and certificates of this host, if there are any. Whether there are.
    pub(in crate::serve) fn renew_keys(&mut self) -> bool {
        let open = |name: &str| File::open(self.state.join(name));
        let (Ok(issuing), Ok(key), Ok(chain)) = (open("issuer.crt"), open("issuer.key"), open("host.crt"))
        else {
            return false;
        };
        let Some(keyd) = self.keyd.as_mut().filter(|keyd| keyd.who().is_some()) else { return false };
        let loose = key.metadata().is_ok_and(|meta| meta.mode() & 0o077 != 0);
        let renewed = if loose {
            Err(ErrorKind::PermissionDenied.into())
        } else {
            keyd.renew([&issuing, &key, &chain])
        };
        self.lanes.who = keyd.who().cloned();
        match &renewed {
            Ok(false) => {}
            Ok(true) => self.note("members", "this host's renewed keys and certificates are in use", &[]),
            Err(error) => self.note("members", &format!("renewed keys are not taken: {error}"), &[]),
        }
        renewed.unwrap_or(false)
    }

    /// After the list has changed, which is written last: new keys are taken up, the revoked are cut, and everything is
    /// judged again.
    pub(in crate::serve) fn follow_members(&mut self) {
        let began = Instant::now();
        let renewed = self.renew_keys();
        if self.read_members() || renewed {
            self.cut_revoked(began);
            self.judge_everything_again(began);
        }
    }
}
