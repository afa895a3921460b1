//! A local trust domain on disk: what `portcullis ca` does.
//!
//! `STATE/ca/` holds `root.crt`, `root.key` (0600), `index.toml` (what was issued) and `members.toml`.

use std::{
    fs::{self, DirBuilder},
    net::IpAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rcgen::Issuer;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::{
    HostFacts, HostName, IdentityError, Key, Member, Members, Revoked, SpiffeId, TrustDomain, Validity,
    host::certificate,
    issue::{self, hex},
    key::replace,
    peer::Read,
};

/// What a host is enrolled with.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Enrolment {
    /// Addresses; none keeps those it has.
    pub addresses: Vec<IpAddr>,
    /// `ver`; `None` keeps the one it has, at first the day as a number such as 20260131.
    pub ver: Option<u64>,
    /// Groups; `None` keeps those it has.
    pub groups: Option<Vec<String>>,
}

/// One enrolled host.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostEntry {
    /// Its name.
    pub name: HostName,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Version of its enrolment.
    pub ver: u64,
    /// Its groups.
    pub groups: Vec<String>,
    /// Serial numbers of the issuing and host certificates it was ever given.
    pub serials: Vec<String>,
    /// When the newest of them end, in seconds since the Unix epoch.
    pub until: i64,
    /// Whether all of them are revoked.
    pub revoked: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    #[serde(default, rename = "host")]
    hosts: Vec<HostEntry>,
}

/// What `portcullis ca show` tells.
#[derive(Clone, Debug, Serialize)]
pub struct Overview {
    /// Name of the trust domain.
    pub domain: TrustDomain,
    /// SHA-256 of the root certificate, in hexadecimal.
    pub root: String,
    /// When the root ends, in seconds since the Unix epoch.
    pub until: i64,
    /// Number of the newest list of members.
    pub number: u64,
    /// The hosts.
    pub hosts: Vec<HostEntry>,
    /// What is revoked.
    pub revoked: Vec<Revoked>,
}

/// A trust domain whose root key is at hand.
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
    root: CertificateDer<'static>,
    key: Key,
    index: Index,
    members: Members,
}

fn make_folder(path: &Path, mode: u32) -> Result<(), IdentityError> {
    let made = DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(|source| IdentityError::File { path: path.to_owned(), source })
}

impl Authority {
    /// Makes a trust domain in a state folder.
    ///
    /// # Errors
    /// [`IdentityError::Exists`] if there is one: a root is never replaced.
    pub fn init(state: &Path, domain: TrustDomain, now: i64) -> Result<Self, IdentityError> {
        if let Ok(there) = Self::open(state) {
            return Err(IdentityError::Exists { path: state.to_owned(), domain: there.members.domain });
        }
        let folder = state.join("ca");
        make_folder(state, 0o755)?;
        make_folder(&folder, 0o700)?;
        if folder.join("root.key").exists() {
            return Err(IdentityError::Exists { path: state.to_owned(), domain });
        }
        let key = Key::generate()?;
        let made = issue::root(&domain, &key, Validity::root(now))?.certificate;
        let members = Members { domain, number: 0, members: Vec::new(), revoked: Vec::new() };
        let mut it = Self { root: made.der().clone(), folder, key, index: Index::default(), members };
        it.key.save(&it.folder.join("root.key"))?;
        replace(&it.folder.join("root.crt"), made.pem().as_bytes(), 0o644)?;
        it.save()?;
        Ok(it)
    }

    /// Opens the trust domain of a state folder.
    pub fn open(state: &Path) -> Result<Self, IdentityError> {
        let folder = state.join("ca");
        let root = certificate(&folder.join("root.crt"))?;
        let key = Key::load(&folder.join("root.key"))?;
        let members = Members::load(&folder.join("members.toml"), &root)?;
        let path = folder.join("index.toml");
        let text =
            fs::read_to_string(&path).map_err(|source| IdentityError::File { path: path.clone(), source })?;
        let index = toml::from_str(&text)
            .map_err(|e: toml::de::Error| IdentityError::Damaged { path, reason: e.to_string() })?;
        Ok(Self { folder, root, key, index, members })
    }

    fn save(&mut self) -> Result<(), IdentityError> {
        self.members.number += 1;
        let entry = |host: &HostEntry| Member { name: host.name.clone(), addresses: host.addresses.clone() };
        self.members.members = self.index.hosts.iter().map(entry).collect();
        let path = self.folder.join("index.toml");
        let text = toml::to_string(&self.index)
            .map_err(|e| IdentityError::Damaged { path: path.clone(), reason: e.to_string() })?;
        replace(&path, text.as_bytes(), 0o600)?;
        self.members.save(&self.folder.join("members.toml"), &self.key)
    }

    /// Enrols a host and writes its folder.
    ///
    /// # Errors
    /// [`IdentityError::Enrolled`] if it is enrolled and not revoked, [`IdentityError::AddressTaken`].
    pub fn enrol(
        &mut self,
        name: &HostName,
        with: &Enrolment,
        out: &Path,
        now: i64,
    ) -> Result<HostEntry, IdentityError> {
        if self.index.hosts.iter().any(|host| host.name == *name && !host.revoked) {
            return Err(IdentityError::Enrolled(name.clone()));
        }
        self.issue(name, with, out, now)
    }

    /// Gives an enrolled host new keys and certificates. The old ones stay good until they end.
    pub fn renew(
        &mut self,
        name: &HostName,
        with: &Enrolment,
        out: &Path,
        now: i64,
    ) -> Result<HostEntry, IdentityError> {
        if !self.index.hosts.iter().any(|host| host.name == *name && !host.revoked) {
            return Err(IdentityError::NotEnrolled(name.clone()));
        }
        self.issue(name, with, out, now)
    }

    fn issue(
        &mut self,
        name: &HostName,
        with: &Enrolment,
        out: &Path,
        now: i64,
    ) -> Result<HostEntry, IdentityError> {
        let before = self.index.hosts.iter().find(|host| host.name == *name).cloned();
        let mut addresses: Vec<_> = with.addresses.iter().map(IpAddr::to_canonical).collect();
        if addresses.is_empty() {
            addresses = before.iter().flat_map(|host| host.addresses.clone()).collect();
        }
        for address in &addresses {
            if let Some(owner) = self.members.owner(*address).filter(|owner| owner.name != *name) {
                return Err(IdentityError::AddressTaken { address: *address, owner: owner.name.clone() });
            }
        }
        let groups = with.groups.clone().or_else(|| before.as_ref().map(|host| host.groups.clone()));
        let ver = with.ver.or_else(|| before.as_ref().map(|host| host.ver)).unwrap_or_else(|| day(now));
        let facts = HostFacts { host: name.clone(), ver, groups: groups.unwrap_or_default() };
        let validity = Validity::host(now);

        let (issuing_key, host_key) = (Key::generate()?, Key::generate()?);
        let issuing = issue::issuing(&facts, &addresses, &issuing_key, (&self.root, &self.key), validity)?;
        let issuer = Issuer::from_ca_cert_der(issuing.certificate.der(), &issuing_key)?;
        let id = SpiffeId { domain: self.members.domain.clone(), host: name.clone(), process: None };
        let host = issue::leaf(&id, &addresses, &facts, None, &host_key, &issuer, validity)?;

        let mut serials = before.map(|host| host.serials).unwrap_or_default();
        serials.extend([issuing.serial, host.serial]);
        let HostFacts { groups, .. } = facts;
        let entry = HostEntry {
            name: name.clone(),
            addresses,
            ver,
            groups,
            serials,
            until: validity.until,
            revoked: false,
        };
        self.index.hosts.retain(|host| host.name != *name);
        self.index.hosts.push(entry.clone());
        self.index.hosts.sort_by(|a, b| a.name.cmp(&b.name));
        // On record first: a folder that was written has an entry that can be revoked.
        self.save()?;

        make_folder(out, 0o755)?;
        issuing_key.save(&out.join("issuer.key"))?;
        host_key.save(&out.join("host.key"))?;
        let issuing_pem = issuing.certificate.pem();
        replace(&out.join("issuer.crt"), issuing_pem.as_bytes(), 0o644)?;
        replace(&out.join("host.crt"), format!("{}{issuing_pem}", host.certificate.pem()).as_bytes(), 0o644)?;
        let root = self.folder.join("root.crt");
        let pem = fs::read(&root).map_err(|source| IdentityError::File { path: root, source })?;
        replace(&out.join("ca.crt"), &pem, 0o644)?;
        self.publish(out)?;
        Ok(entry)
    }

    /// Writes the newest list of members to a host's folder.
    pub fn publish(&self, out: &Path) -> Result<(), IdentityError> {
        self.members.save(&out.join("members.toml"), &self.key)
    }

    /// Revokes all that a host was ever given. It stays a member, see [`Members`].
    pub fn revoke_host(&mut self, name: &HostName, now: i64) -> Result<Vec<String>, IdentityError> {
        let host = self.index.hosts.iter_mut().find(|host| host.name == *name);
        let host = host.ok_or_else(|| IdentityError::NotEnrolled(name.clone()))?;
        host.revoked = true;
        let serials = host.serials.clone();
        self.revoke(&serials, now)?;
        Ok(serials)
    }

    /// Revokes one certificate by its serial number in hexadecimal (colons are ignored). It may be a
    /// process certificate's, which is on no record here.
    pub fn revoke_serial(&mut self, serial: &str, now: i64) -> Result<String, IdentityError> {
        let serial = serial.replace(':', "").to_ascii_lowercase();
        if serial.is_empty() || serial.len() > 40 || !serial.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(IdentityError::NoSerial(serial));
        }
        self.revoke(std::slice::from_ref(&serial), now)?;
        Ok(serial)
    }

    fn revoke(&mut self, serials: &[String], now: i64) -> Result<(), IdentityError> {
        for serial in serials {
            if !self.members.revoked.iter().any(|one| one.serial == *serial) {
                self.members.revoked.push(Revoked { serial: serial.clone(), at: now });
            }
        }
        self.save()
    }

    /// What there is.
    pub fn overview(&self) -> Result<Overview, IdentityError> {
        let unfit = |_| IdentityError::NoCertificate { path: self.folder.join("root.crt") };
        Ok(Overview {
            domain: self.members.domain.clone(),
            root: hex(ring::digest::digest(&ring::digest::SHA256, &self.root).as_ref()),
            until: Read::from(&self.root).map_err(unfit)?.certificate.validity().not_after.timestamp(),
            number: self.members.number,
            hosts: self.index.hosts.clone(),
            revoked: self.members.revoked.clone(),
        })
    }
}

/// The day of a time, as a number that reads like a date.
fn day(now: i64) -> u64 {
    let date =
        time::OffsetDateTime::from_unix_timestamp(now).unwrap_or(time::OffsetDateTime::UNIX_EPOCH).date();
    let year = u64::try_from(date.year()).unwrap_or(0);
    year * 10_000 + u64::from(u8::from(date.month())) * 100 + u64::from(date.day())
}
