//! One host's own identity, and the certificates it mints for its processes.

use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};

use rcgen::Issuer;
use rustls::{
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    sign::CertifiedKey,
};

use super::{
    HostFacts, HostName, IdentityError, Key, Members, ProcessFacts, ProcessName, SpiffeId, TrustDomain,
    Validity, Verifier, chain::Issuing, issue, key::InTls, peer::Peer,
};

/// What a host folder holds, read and checked: it can mint, and verify others.
#[derive(Debug)]
pub struct Host {
    root: CertificateDer<'static>,
    domain: TrustDomain,
    members: Members,
    authority: Delegated,
}

/// What the trust domain lets this host certify, and with what.
#[derive(Debug)]
struct Delegated {
    /// In every chain, so it is there once for all, and for good: a renewal, once in months, leaves one behind.
    issuing: &'static [u8],
    /// Signs with the key of `issuing`.
    issuer: Issuer<'static, Key>,
    facts: HostFacts,
    /// Last second of the issuing certificate.
    until: i64,
    /// In the certificates of this host.
    addresses: Vec<IpAddr>,
}

/// A certificate and the file that it lies in, for what is said of it.
type Filed<'a> = (CertificateDer<'static>, &'a Path);

fn unfit(path: &Path) -> IdentityError {
    IdentityError::NoCertificate { path: path.to_owned() }
}

impl Delegated {
    /// From the issuing certificate with its key, and the host's own certificate.
    fn new((issuing, at): Filed<'_>, key: Key, (leaf, leaf_at): Filed<'_>) -> Result<Self, IdentityError> {
        let read = Issuing::read(&issuing).map_err(|_| unfit(at))?;
        let addresses = Peer::from(&leaf, &read).map_err(|_| unfit(leaf_at))?.addresses;
        let issuer = Issuer::from_ca_cert_der(&issuing, key)?;
        Ok(Self { issuing: issuing.to_vec().leak(), issuer, facts: read.facts, until: read.until, addresses })
    }
}

/// A process certificate with its key, ready for TLS.
#[derive(Clone, Debug)]
pub struct ProcessIdentity {
    /// What is shown in the handshake.
    pub shown: Arc<CertifiedKey>,
    /// Whom it names.
    pub id: SpiffeId,
    /// Serial number in hexadecimal.
    pub serial: String,
    /// When it ends and should be renewed.
    pub validity: Validity,
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let file = std::fs::read(path).map_err(|source| IdentityError::File { path: path.to_owned(), source })?;
    certificates_in(&file, path)
}

fn certificates_in(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    found.ok().filter(|found| !found.is_empty()).ok_or_else(|| unfit(path))
}

/// The first of a chain.
fn first<'a>(chain: Vec<CertificateDer<'static>>, path: &'a Path) -> Result<Filed<'a>, IdentityError> {
    chain.into_iter().next().map(|first| (first, path)).ok_or_else(|| unfit(path))
}

/// Reads a file with one certificate.
pub(super) fn certificate(path: &Path) -> Result<CertificateDer<'static>, IdentityError> {
    match <[_; 1]>::try_from(certificates(path)?) {
        Ok([one]) => Ok(one),
        Err(_) => Err(IdentityError::NoCertificate { path: path.to_owned() }),
    }
}

fn certified(chain: Vec<CertificateDer<'static>>, key: Key) -> Arc<CertifiedKey> {
    Arc::new(CertifiedKey::new(chain, Arc::new(InTls(Arc::new(key)))))
}

impl Host {
    /// Reads `ca.crt`, `issuer.crt`, `issuer.key`, `host.crt`, `host.key` and `members.toml`.
    pub fn load(folder: &Path) -> Result<Self, IdentityError> {
        let root = certificate(&folder.join("ca.crt"))?;
        let members = Members::load(&folder.join("members.toml"), &root)?;
        let [issuing_at, chain_at] = ["issuer.crt", "host.crt"].map(|name| folder.join(name));
        let leaf = first(certificates(&chain_at)?, &chain_at)?;
        // Stock programs use it, and here nobody: but one that others may read is refused.
        drop(Key::load(&folder.join("host.key"))?);
        let key = Key::load(&folder.join("issuer.key"))?;
        let authority = Delegated::new((certificate(&issuing_at)?, &issuing_at), key, leaf)?;
        Ok(Self { domain: members.domain.clone(), root, members, authority })
    }

    /// Its name, `ver` and groups.
    #[must_use]
    pub const fn facts(&self) -> &HostFacts {
        &self.authority.facts
    }

    /// Who takes part, as last read.
    #[must_use]
    pub const fn members(&self) -> &Members {
        &self.members
    }

    /// Its trust domain.
    #[must_use]
    pub const fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// Addresses in its certificates.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.authority.addresses
    }

    /// Takes a newer list of members, as it lies in `members.toml`. An older one, or another domain's, is
    /// not taken: `false`.
    pub fn take_members(&mut self, text: &str) -> Result<bool, IdentityError> {
        let members = Members::read(text, &self.root)?;
        let newer = members.domain == self.domain && members.number > self.members.number;
        if newer {
            self.members = members;
        }
        Ok(newer)
    }

    /// Takes this same host's renewed issuing certificate, its key, and the host's own certificates, as they lie in
    /// `issuer.crt`, `issuer.key` and `host.crt`. Nothing changes unless what is minted with them is believed by
    /// others; `false`: they are those that it has.
    pub fn renew(&mut self, issuing: &str, key: &str, chain: &str, now: i64) -> Result<bool, IdentityError> {
        let [issuing_at, key_at, chain_at] = ["issuer.crt", "issuer.key", "host.crt"].map(Path::new);
        let issuing = first(certificates_in(issuing.as_bytes(), issuing_at)?, issuing_at)?;
        if &*issuing.0 == self.authority.issuing {
            return Ok(false);
        }
        let leaf = first(certificates_in(chain.as_bytes(), chain_at)?, chain_at)?;
        let newer = Delegated::new(issuing, Key::read(key, key_at)?, leaf)?;
        let before = std::mem::replace(&mut self.authority, newer);
        if self.is_believed(&before.facts.host, now) {
            return Ok(true);
        }
        self.authority = before;
        Err(unfit(issuing_at))
    }

    /// Whether others take what is minted here for a process of this host.
    fn is_believed(&self, host: &HostName, now: i64) -> bool {
        let text = String::new;
        let facts = ProcessFacts { exe: text(), sha256: text(), user: text(), unit: None };
        let at = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(now).unwrap_or(0)));
        let minted = || self.mint(&"unnamed".parse().ok()?, &facts, Validity::process(now)).ok();
        let verified = || {
            let (minted, verifier) = (minted()?, self.verifier().ok()?.expecting(Some(host.clone())));
            let (leaf, others) = minted.shown.cert.split_first()?;
            verifier.check(leaf, others, true, at).ok()
        };
        verified().is_some()
    }

    /// As [`Self::take_members`], from a file.
    pub fn refresh(&mut self, path: &Path) -> Result<bool, IdentityError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| IdentityError::File { path: path.to_owned(), source })?;
        self.take_members(&text)
    }

    /// Verifies others of the trust domain.
    pub fn verifier(&self) -> Result<Verifier, IdentityError> {
        Verifier::new(&self.root, &self.members)
    }

    /// What the kernel marks our own packets with, for the filters of protected listeners: the same as long as
    /// it is the same host, so that filters need not be changed when the key daemon begins anew.
    #[must_use]
    pub fn mark(&self) -> u32 {
        let named = [&*self.root, self.authority.facts.host.as_str().as_bytes()].concat();
        let digest = ring::digest::digest(&ring::digest::SHA256, &named);
        let mark = digest.as_ref().first_chunk().map_or(1, |word| u32::from_ne_bytes(*word));
        mark.max(1)
    }

    /// Makes a certificate and key for a process. `name` comes from the policy, never from the process.
    pub fn mint(
        &self,
        name: &ProcessName,
        facts: &ProcessFacts,
        validity: Validity,
    ) -> Result<ProcessIdentity, IdentityError> {
        let by = &self.authority;
        let (domain, host) = (self.domain.clone(), by.facts.host.clone());
        let id = SpiffeId { domain, host, process: Some(name.clone()) };
        let validity = Validity { until: validity.until.min(by.until), ..validity };
        let key = Key::generate_for_process()?;
        let made = issue::leaf(&id, &by.addresses, &by.facts, Some(facts), &key, &by.issuer, validity)?;
        let chain = vec![made.certificate.der().clone(), CertificateDer::from_slice(by.issuing)];
        Ok(ProcessIdentity { shown: certified(chain, key), id, serial: made.serial, validity })
    }
}
