//! TLS as it is between members: version 1.3, both sides show certificates, nothing is resumed.

use std::sync::Arc;

use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

use super::{IdentityError, Verifier, provider};

/// For the side that connects.
pub fn client_config(shown: Arc<CertifiedKey>, verifier: Verifier) -> Result<ClientConfig, IdentityError> {
    let mut config = ClientConfig::builder_with_provider(provider::get())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
    config.resumption = Resumption::disabled();
    config.enable_secret_extraction = true; // for `relay`, in this process
    config.enable_sni = false; // it would tell who is meant, in the clear
    Ok(config)
}

/// For the side that accepts.
pub fn server_config(shown: Arc<CertifiedKey>, verifier: Verifier) -> Result<ServerConfig, IdentityError> {
    let mut config = ServerConfig::builder_with_provider(provider::get())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
    config.enable_secret_extraction = true;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}
