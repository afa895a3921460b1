//! Signatures from a leaf up to the root. What was verified of a certificate is kept, byte for byte, since it is shown
//! again: a host's issuing certificate by every leaf of that host, a process's leaf by each of its flows. What time and
//! the list of members say of it is asked each time, and so is the proof that the peer has its key.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustls::{
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateDer, TrustAnchor, UnixTime},
};

use super::{HostFacts, IdentityError, Peer, Refusal, facts::HOST_OID, peer::Read};

/// How far a peer's clock may be from ours.
pub const SKEW: Duration = Duration::from_secs(60);
/// Most issuing certificates that are kept.
const MOST_KNOWN: usize = 4096;
/// Most leaves that are kept, for each role: those of associations with a certificate of their own come once only.
const MOST_LEAVES: usize = 256;

/// What the root says of a host, in the host's issuing certificate.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Issuing {
    /// Who it is.
    pub(super) facts: HostFacts,
    /// Serial number in hexadecimal.
    pub(super) serial: String,
    /// First and last second of its validity.
    pub(super) from: i64,
    pub(super) until: i64,
}

impl Issuing {
    /// Reads one whose signature was verified.
    pub(super) fn read(der: &CertificateDer<'_>) -> Result<Self, Refusal> {
        let read = Read::from(der)?;
        let facts = read.facts(&HOST_OID)?.ok_or(Refusal::NotFromAHost)?;
        let validity = read.certificate.validity();
        let (from, until) = (validity.not_before.timestamp(), validity.not_after.timestamp());
        Ok(Self { facts, serial: read.serial, from, until })
    }

    fn in_time(&self, now: UnixTime) -> Result<(), webpki::Error> {
        in_time(now, self.from, self.until)
    }
}

fn in_time(now: UnixTime, from: i64, until: i64) -> Result<(), webpki::Error> {
    let seconds = |at: i64| UnixTime::since_unix_epoch(Duration::from_secs(at.try_into().unwrap_or(0)));
    let (not_before, not_after) = (seconds(from), seconds(until));
    if now < not_before {
        return Err(webpki::Error::CertNotValidYet { time: now, not_before });
    }
    if now > not_after {
        return Err(webpki::Error::CertExpired { time: now, not_after });
    }
    Ok(())
}

/// An issuing certificate whose signature, constraints and place under the root were verified: all but its time.
struct Known {
    anchor: TrustAnchor<'static>,
    issuing: Arc<Issuing>,
}

/// Whom leaves prove whose signature, constraints, usage and place below their issuer were verified, in one role: all
/// but time.
type Leaves = Mutex<HashMap<CertificateDer<'static>, Arc<Peer>>>;

/// Verifies chains under one root.
pub(super) struct Chains {
    root: TrustAnchor<'static>,
    algorithms: WebPkiSupportedAlgorithms,
    known: Mutex<HashMap<CertificateDer<'static>, Arc<Known>>>,
    servers: Leaves,
    clients: Leaves,
}

impl Chains {
    pub(super) fn new(
        root: &CertificateDer<'_>,
        algorithms: WebPkiSupportedAlgorithms,
    ) -> Result<Self, IdentityError> {
        let root = webpki::anchor_from_trusted_cert(root)
            .map_err(|e| rustls::Error::General(e.to_string()))?
            .to_owned();
        Ok(Self {
            root,
            algorithms,
            known: Mutex::default(),
            servers: Mutex::default(),
            clients: Mutex::default(),
        })
    }

    pub(super) const fn root(&self) -> &TrustAnchor<'static> {
        &self.root
    }

    /// Verifies signatures, constraints, usage and times, and reads whom the leaf names.
    pub(super) fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        as_server: bool,
        now: UnixTime,
    ) -> Result<Arc<Peer>, Refusal> {
        let leaves = if as_server { &self.servers } else { &self.clients };
        let there = leaves.lock().unwrap_or_else(PoisonError::into_inner).get(leaf).cloned();
        if let Some(there) = there {
            return with_skew(now, |now| in_time(now, there.from, there.until)).map(|()| there);
        }
        let issuing = self.issuing(leaf, others, as_server, now)?;
        let peer = Arc::new(Peer::from(leaf, &issuing)?);
        let mut all = leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= MOST_LEAVES {
            all.clear();
        }
        all.insert(leaf.clone().into_owned(), peer.clone());
        Ok(peer)
    }

    /// What stands above a leaf that is not known.
    fn issuing(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        as_server: bool,
        now: UnixTime,
    ) -> Result<Arc<Issuing>, Refusal> {
        let entity = webpki::EndEntityCert::try_from(leaf).map_err(|_| Refusal::Unreadable)?;
        let known = {
            let all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            others.iter().find_map(|one| all.get(one)).cloned()
        };
        let found = with_skew(now, |now| match &known {
            Some(known) => {
                self.path(&entity, std::slice::from_ref(&known.anchor), &[], as_server, now)?;
                known.issuing.in_time(now).map(|()| None)
            }
            None => self.path(&entity, std::slice::from_ref(&self.root), others, as_server, now),
        });
        self.found(found?, known.as_deref())
    }

    /// The issuing certificate, if exactly one stands between leaf and anchor.
    fn path(
        &self,
        entity: &webpki::EndEntityCert<'_>,
        anchors: &[TrustAnchor<'static>],
        others: &[CertificateDer<'_>],
        as_server: bool,
        now: UnixTime,
    ) -> Result<Option<CertificateDer<'static>>, webpki::Error> {
        let usage = if as_server { webpki::KeyUsage::server_auth() } else { webpki::KeyUsage::client_auth() };
        let path = entity.verify_for_usage(self.algorithms.all, anchors, others, now, usage, None, None)?;
        let mut above = path.intermediate_certificates();
        Ok(match (above.next(), above.next()) {
            (Some(issuing), None) => Some(issuing.der().into_owned()),
            _ => None,
        })
    }

    fn found(
        &self,
        issuing: Option<CertificateDer<'static>>,
        known: Option<&Known>,
    ) -> Result<Arc<Issuing>, Refusal> {
        if let Some(known) = known {
            return Ok(known.issuing.clone());
        }
        let der = issuing.ok_or(Refusal::NotFromAHost)?;
        let issuing = Arc::new(Issuing::read(&der)?);
        let anchor = webpki::anchor_from_trusted_cert(&der).map_err(|_| Refusal::Unreadable)?.to_owned();
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= MOST_KNOWN {
            all.clear();
        }
        all.insert(der, Arc::new(Known { anchor, issuing: issuing.clone() }));
        Ok(issuing)
    }
}

/// What is said of a time, or of one within [`SKEW`] of it.
fn with_skew<T>(now: UnixTime, verify: impl Fn(UnixTime) -> Result<T, webpki::Error>) -> Result<T, Refusal> {
    let shifted = match verify(now) {
        Err(webpki::Error::CertExpired { .. }) => now.as_secs().checked_sub(SKEW.as_secs()),
        Err(webpki::Error::CertNotValidYet { .. }) => now.as_secs().checked_add(SKEW.as_secs()),
        other => return named(other),
    };
    named(verify(UnixTime::since_unix_epoch(Duration::from_secs(shifted.unwrap_or(0)))))
}

fn named<T>(result: Result<T, webpki::Error>) -> Result<T, Refusal> {
    result.map_err(|e| match e {
        webpki::Error::CertExpired { .. } => Refusal::Expired,
        webpki::Error::CertNotValidYet { .. } => Refusal::NotYetValid,
        webpki::Error::UnknownIssuer => Refusal::UnknownIssuer,
        other => Refusal::Chain(other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_has_its_time() {
        let facts = HostFacts { host: "h1".parse().unwrap(), ver: 1, groups: Vec::new() };
        let issuing = Issuing { facts, serial: String::new(), from: 100, until: 200 };
        let at = |second| issuing.in_time(UnixTime::since_unix_epoch(Duration::from_secs(second)));
        assert!(matches!(at(99), Err(webpki::Error::CertNotValidYet { .. })));
        assert_eq!((at(100), at(200)), (Ok(()), Ok(())));
        assert!(matches!(at(201), Err(webpki::Error::CertExpired { .. })));
    }
}
