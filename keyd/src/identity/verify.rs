//! Decides whether a certificate chain proves somebody of our trust domain, for both roles in TLS.

use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, OnceLock},
};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::{HostName, IdentityError, Members, Peer, TrustDomain, chain::Chains, peer::fingerprint};

/// Why a chain proves nobody.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Signatures, constraints, usages or validity; the reason is webpki's.
    #[error("chain is not valid: {0}")]
    Chain(String),
    /// Its time is over, even with a minute's grace.
    #[error("certificate expired")]
    Expired,
    /// Its time has not come, even with a minute's grace.
    #[error("certificate is not valid yet")]
    NotYetValid,
    /// No root of ours stands above it.
    #[error("certificate is not of this trust domain")]
    UnknownIssuer,
    /// It or its extensions cannot be read.
    #[error("certificate cannot be read")]
    Unreadable,
    /// It has no SPIFFE ID, or none of our form.
    #[error("certificate shows no SPIFFE ID of a host or process: `{0}`")]
    NoSpiffeId(String),
    /// Its SPIFFE ID is of another trust domain.
    #[error("certificate shows trust domain `{0}`")]
    OtherDomain(TrustDomain),
    /// It was not signed by a host's issuing certificate.
    #[error("certificate was not issued by a host of the trust domain")]
    NotFromAHost,
    /// A host signed it for somebody else.
    #[error("certificate shows `{shown}` but was issued by host `{issuer}`")]
    OtherHost {
        /// SPIFFE ID in it.
        shown: String,
        /// Who issued it.
        issuer: HostName,
    },
    /// It lacks the host's DNS name.
    #[error("certificate of `{0}` lacks the DNS name of its host")]
    Nameless(String),
    /// It, its issuer, or all of its host was revoked.
    #[error("certificate `{serial}` of host `{host}` is revoked")]
    Revoked {
        /// Serial of the revoked one: the leaf's or its issuer's.
        serial: String,
        /// Whose.
        host: HostName,
    },
    /// The address is one member's and the certificate another's.
    #[error("address belongs to member `{owner}` but the certificate shows `{shown}`")]
    OtherMember {
        /// Whose address it is.
        owner: HostName,
        /// Who showed a certificate.
        shown: HostName,
    },
    /// Another certificate was shown before.
    #[error("certificate `{shown}` is not the one that the session began with")]
    OtherSession {
        /// SHA-256 of what was shown.
        shown: String,
    },
}

/// Whom a handshake has shown, or why not; empty if it showed nobody. Later ones of the same session must show
/// the same certificate.
#[derive(Clone, Debug, Default)]
pub struct Seen(Arc<OnceLock<Result<Arc<Peer>, Refusal>>>);

impl Seen {
    /// The verdict, if there was one.
    #[must_use]
    pub fn verdict(&self) -> Option<&Result<Arc<Peer>, Refusal>> {
        self.0.get()
    }
}

/// Verifies peers, as rustls asks for it. Cheap to clone with another expectation.
#[derive(Clone)]
pub struct Verifier {
    trust: Arc<Trust>,
    expected: Option<HostName>,
    seen: Option<Seen>,
}

/// Whom all verifiers of a host believe.
struct Trust {
    chains: Chains,
    subjects: [DistinguishedName; 1],
    domain: TrustDomain,
    revoked: HashSet<String>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("domain", &self.trust.domain)
            .field("expected", &self.expected)
            .finish_non_exhaustive()
    }
}

impl Verifier {
    /// A verifier that trusts one root, less what `members` revokes.
    pub fn new(root: &CertificateDer<'_>, members: &Members) -> Result<Self, IdentityError> {
        let algorithms = portcullis_relay::provider().signature_verification_algorithms;
        let chains = Chains::new(root, algorithms)?;
        let trust = Trust {
            subjects: [DistinguishedName::in_sequence(chains.root().subject.as_ref())],
            chains,
            domain: members.domain.clone(),
            revoked: members.revoked.iter().map(|one| one.serial.clone()).collect(),
            algorithms,
        };
        Ok(Self { trust: Arc::new(trust), expected: None, seen: None })
    }

    /// The same, for a peer whose address is this member's.
    #[must_use]
    pub fn expecting(&self, host: Option<HostName>) -> Self {
        Self { expected: host, ..self.clone() }
    }

    /// The same, for one session, whose verdict is left in what is returned beside it.
    #[must_use]
    pub fn for_one(&self, host: Option<HostName>) -> (Self, Seen) {
        let seen = Seen::default();
        (Self { seen: Some(seen.clone()), ..self.expecting(host) }, seen)
    }

    /// Verifies for rustls, and leaves the verdict to be seen.
    fn verdict(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        as_server: bool,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let Some(Seen(seen)) = &self.seen else {
            return self.check(leaf, others, as_server, now).map(drop).map_err(told);
        };
        let verdict = match seen.get() {
            Some(Ok(peer)) => return again(peer, leaf, now).map_err(told),
            _ => self.check(leaf, others, as_server, now),
        };
        let result = verdict.as_ref().map(drop).map_err(|refusal| told(refusal.clone()));
        let _first = seen.set(verdict);
        result
    }

    /// Verifies a chain at a time. What was verified before of the same certificates is not computed again.
    pub fn check(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        as_server: bool,
        now: UnixTime,
    ) -> Result<Arc<Peer>, Refusal> {
        let peer = self.trust.chains.verify(leaf, others, as_server, now)?;
        if peer.id.domain != self.trust.domain {
            return Err(Refusal::OtherDomain(peer.id.domain.clone()));
        }
        for serial in [&peer.serial, &peer.issuer_serial] {
            if self.trust.revoked.contains(serial) {
                return Err(Refusal::Revoked { serial: serial.clone(), host: peer.id.host.clone() });
            }
        }
        match &self.expected {
            Some(owner) if *owner != peer.id.host => {
                Err(Refusal::OtherMember { owner: owner.clone(), shown: peer.id.host.clone() })
            }
            _ => Ok(peer),
        }
    }
}

/// Whether a leaf is the one that was verified before.
fn again(peer: &Peer, leaf: &CertificateDer<'_>, now: UnixTime) -> Result<(), Refusal> {
    let shown = fingerprint(leaf);
    if shown != peer.fingerprint {
        return Err(Refusal::OtherSession { shown });
    }
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if now > peer.end() { Err(Refusal::Expired) } else { Ok(()) }
}

/// What rustls is told; the peer hears no more than `bad certificate` or the like.
fn told(refusal: Refusal) -> rustls::Error {
    rustls::Error::InvalidCertificate(match refusal {
        Refusal::Expired => CertificateError::Expired,
        Refusal::NotYetValid => CertificateError::NotValidYet,
        Refusal::UnknownIssuer => CertificateError::UnknownIssuer,
        Refusal::Revoked { .. } => CertificateError::Revoked,
        Refusal::Unreadable => CertificateError::BadEncoding,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verdict(leaf, others, true, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // Not reached: no configuration here offers TLS 1.2.
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signed, &self.trust.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.trust.subjects
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verdict(leaf, others, false, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, leaf, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signed, &self.trust.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms.supported_schemes()
    }
}
