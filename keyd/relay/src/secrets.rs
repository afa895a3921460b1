//! The secrets that rustls lets out to a [`KeyLog`], which keeps them here until the handshake takes them, and what
//! becomes of a traffic secret when either end asks for new keys. Only these leave rustls, and none leaves this crate.
//!
//! rustls's own key schedule would keep the peer's certificates and our configuration for as long as the association
//! runs: several times what the association itself needs.

use std::cell::RefCell;

use rustls::{
    KeyLog, Tls13CipherSuite,
    crypto::{cipher::NONCE_LEN, tls13::OkmBlock},
};

use zeroize::Zeroizing;

use crate::exporter::expand;

/// What a handshake has let out so far.
#[derive(Default)]
pub(crate) struct Secrets {
    /// Of what the client sends, and of what the server sends (RFC 8446, section 7.1).
    pub(crate) client: Option<OkmBlock>,
    pub(crate) server: Option<OkmBlock>,
    pub(crate) exporter: Option<OkmBlock>,
}

thread_local! {
    static SECRETS: RefCell<Secrets> = const { RefCell::new(Secrets { client: None, server: None, exporter: None }) };
}

impl Secrets {
    /// Adds what the handshake step before this call let out.
    pub(crate) fn add_last(&mut self) {
        let last = SECRETS.take();
        self.client = last.client.or(self.client.take());
        self.server = last.server.or(self.server.take());
        self.exporter = last.exporter.or(self.exporter.take());
    }
}

/// Keeps them.
#[derive(Debug)]
pub(crate) struct Keeper;

/// As rustls names them (the NSS key log format's words).
const CLIENT: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER: &str = "SERVER_TRAFFIC_SECRET_0";
const EXPORTER: &str = "EXPORTER_SECRET";

impl KeyLog for Keeper {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        SECRETS.with_borrow_mut(|secrets| {
            let place = match label {
                CLIENT => &mut secrets.client,
                SERVER => &mut secrets.server,
                EXPORTER => &mut secrets.exporter,
                _ => return,
            };
            *place = Some(OkmBlock::new(secret));
        });
    }

    fn will_log(&self, label: &str) -> bool {
        [CLIENT, SERVER, EXPORTER].contains(&label)
    }
}

/// The secret of one direction. Zeroed when dropped.
pub(crate) struct Traffic {
    suite: &'static Tls13CipherSuite,
    secret: OkmBlock,
}

impl Traffic {
    pub(crate) fn new(suite: &'static Tls13CipherSuite, secret: OkmBlock) -> Self {
        Self { suite, secret }
    }

    /// Goes on to the next secret (RFC 8446, section 7.2).
    pub(crate) fn update(&mut self) -> Option<()> {
        let expander = self.suite.hkdf_provider.expander_for_okm(&self.secret);
        let mut next = Zeroizing::new([0; OkmBlock::MAX_LEN]);
        let next = next.get_mut(..expander.hash_len())?;
        expand(expander.as_ref(), b"traffic upd", b"", next)?;
        self.secret = OkmBlock::new(next);
        Some(())
    }

    /// Key and nonce of the secret as it is (section 7.3). `key` is as long as the suite's key.
    pub(crate) fn keys(&self, key: &mut [u8]) -> Option<[u8; NONCE_LEN]> {
        let expander = self.suite.hkdf_provider.expander_for_okm(&self.secret);
        let mut iv = [0; NONCE_LEN];
        expand(expander.as_ref(), b"key", b"", key)?;
        expand(expander.as_ref(), b"iv", b"", &mut iv)?;
        Some(iv)
    }

    pub(crate) fn suite(&self) -> &'static Tls13CipherSuite {
        self.suite
    }
}
