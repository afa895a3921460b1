//! TLS configurations that this engine accepts, which cannot be made any other way, and the certificate
//! that a refused peer showed.

use std::{cell::RefCell, fmt, sync::Arc};

use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption, Tls12Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        NoServerSessionStorage, ResolvesServerCert, ServerSessionMemoryCache,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use crate::{provider::provider, secrets::Keeper};

/// The ALPN name by which two engines agree that the accepting one says when its verdict is in.
///
/// In TLS 1.3 a client is done before the server has judged its certificate. With this name the server
/// sends one empty record once it splices, and the client's `Ready` waits for it: so a refusal at the far
/// end is still a failed connect. Stock TLS programs do not offer the name and are served as ever.
pub const CONFIRM: &[u8] = b"portcullis/1";

/// Tickets that a server gives with each handshake of a session: one for the next. What is opened at once with
/// another shows certificates, and brings a ticket more.
const TICKETS: usize = 1;
/// Most tickets of one session that wait to be used.
const MOST_TICKETS: usize = 8;

/// What an opening end needs: TLS 1.3, mutual, no early data; no resumption but within one session.
#[derive(Clone)]
pub struct ClientSide {
    config: Arc<ClientConfig>,
    for_session: bool,
}

impl ClientSide {
    /// `verifier` judges the peer's chain, `identity` gives our own and may change it at any time.
    ///
    /// `confirm` offers [`CONFIRM`]; leave it off towards what is known to be a stock TLS server, since a
    /// server with other names only may refuse.
    ///
    /// # Errors
    /// When the provider lacks TLS 1.3, which [`provider`] does not.
    pub fn new(
        verifier: Arc<dyn ServerCertVerifier>,
        identity: Arc<dyn ResolvesClientCert>,
        confirm: bool,
    ) -> Result<Self, Error> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Witness(verifier)))
            .with_client_cert_resolver(identity);
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        // It would tell who is meant, in the clear.
        config.enable_sni = false;
        config.key_log = Arc::new(Keeper);
        if confirm {
            config.alpn_protocols = vec![CONFIRM.to_vec()];
        }
        Ok(Self { config: Arc::new(config), for_session: false })
    }

    /// The same, for one session: handshakes with this very value and its clones may resume one another, each
    /// ticket once. The tickets go with the last of them.
    #[must_use]
    pub fn for_session(&self) -> Self {
        let mut config = ClientConfig::clone(&self.config);
        config.resumption = Resumption::in_memory_sessions(1).tls12_resumption(Tls12Resumption::Disabled);
        Self { config: Arc::new(config), for_session: true }
    }

    pub(crate) fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
    }

    pub(crate) const fn is_for_session(&self) -> bool {
        self.for_session
    }
}

/// What an accepting end needs: TLS 1.3, mutual, no early data; no tickets but within one session.
#[derive(Clone)]
pub struct ServerSide(Arc<ServerConfig>);

impl ServerSide {
    /// `verifier` judges the peer's chain and must demand one; `identity` gives our own.
    ///
    /// # Errors
    /// When `verifier` would let a peer in without a certificate.
    pub fn new(
        verifier: Arc<dyn ClientCertVerifier>,
        identity: Arc<dyn ResolvesServerCert>,
    ) -> Result<Self, Error> {
        if !verifier.offer_client_auth() || !verifier.client_auth_mandatory() {
            return Err(Error::General("a verifier that demands no certificate".into()));
        }
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(Witness(verifier)))
            .with_cert_resolver(identity);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.key_log = Arc::new(Keeper);
        config.enable_secret_extraction = true;
        Ok(Self(Arc::new(config)))
    }

    /// The same, for one session, as [`ClientSide::for_session`].
    #[must_use]
    pub fn for_session(&self) -> Self {
        let mut config = ServerConfig::clone(&self.0);
        config.session_storage = ServerSessionMemoryCache::new(MOST_TICKETS);
        config.send_tls13_tickets = TICKETS;
        Self(Arc::new(config))
    }

    pub(crate) fn config(&self, confirm: bool) -> Arc<ServerConfig> {
        let mut config = Arc::clone(&self.0);
        if confirm {
            Arc::make_mut(&mut config).alpn_protocols = vec![CONFIRM.to_vec()];
        }
        config
    }
}

impl fmt::Debug for ClientSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientSide")
    }
}

impl fmt::Debug for ServerSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerSide")
    }
}

thread_local! {
    /// The chain that the last handshake step of this thread refused. rustls verifies within the call that
    /// feeds it, so the caller finds here what its own peer showed.
    static SHOWN: RefCell<Vec<CertificateDer<'static>>> = const { RefCell::new(Vec::new()) };
}

/// Takes the chain that the handshake step before this call refused, leaf first; empty when none was.
pub(crate) fn take_shown() -> Vec<CertificateDer<'static>> {
    SHOWN.with_borrow_mut(std::mem::take)
}

/// A verifier that remembers what it refused.
struct Witness<V: ?Sized>(Arc<V>);

fn remember(leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) {
    let chain = std::iter::once(leaf).chain(rest).map(|one| one.clone().into_owned()).collect();
    SHOWN.set(chain);
}

impl<V: ?Sized> fmt::Debug for Witness<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Witness")
    }
}

impl ServerCertVerifier for Witness<dyn ServerCertVerifier> {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.0.verify_server_cert(leaf, rest, name, ocsp, now).inspect_err(|_| remember(leaf, rest))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, leaf, signed).inspect_err(|_| remember(leaf, &[]))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        self.0.root_hint_subjects()
    }
}

impl ClientCertVerifier for Witness<dyn ClientCertVerifier> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.0.verify_client_cert(leaf, rest, now).inspect_err(|_| remember(leaf, rest))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, leaf, signed).inspect_err(|_| remember(leaf, &[]))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
