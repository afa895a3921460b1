//! The one place that names the cryptography: provider, its order of preference, and the AEAD calls.
//!
//! Chosen by measurement, docs/adr/0006-tls-provider.md.

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};

pub(crate) use ::aws_lc_rs::aead;

/// Gives the provider for every TLS configuration of the key daemon.
///
/// Key exchange: X25519MLKEM768, then X25519. Suites, TLS 1.3 only: AES-128-GCM, AES-256-GCM,
/// ChaCha20-Poly1305, the order of their speed with AES instructions.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    use aws_lc_rs::{cipher_suite, kx_group};
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                cipher_suite::TLS13_AES_128_GCM_SHA256,
                cipher_suite::TLS13_AES_256_GCM_SHA384,
                cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
            ..aws_lc_rs::default_provider()
        })
    });
    Arc::clone(&PROVIDER)
}
