//! Which cryptography TLS uses: the one place that decides.
//!
//! aws-lc-rs, because it has X25519MLKEM768, which ring lacks. ring makes and signs certificates,
//! verifies the list of members, and hashes.

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};

/// TLS 1.3 suites with AES-128 first (fastest with AES instructions), key exchange by
/// X25519MLKEM768, else X25519.
pub fn get() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        use aws_lc_rs::{cipher_suite::*, kx_group};
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                TLS13_AES_128_GCM_SHA256,
                TLS13_AES_256_GCM_SHA384,
                TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
            ..aws_lc_rs::default_provider()
        })
    });
    PROVIDER.clone()
}
