//! Keys for other lanes, bound to one association (RFC 8446, section 7.5). rustls's unbuffered connections have no
//! exporter of their own; they let out its secret.

use std::fmt;

use rustls::{
    Tls13CipherSuite,
    crypto::tls13::{HkdfExpander, OkmBlock},
};

/// Makes keying material that both ends of one association have, and nobody else. Zeroed when dropped.
pub struct Exporter {
    suite: &'static Tls13CipherSuite,
    secret: OkmBlock,
}

impl Exporter {
    pub(crate) fn new(suite: &'static Tls13CipherSuite, secret: OkmBlock) -> Self {
        Self { suite, secret }
    }

    /// Fills `out` with what `label` and `context` name, which both ends must agree on.
    ///
    /// `None` when `out` is longer than 255 hashes or `label` than 249 bytes.
    #[must_use]
    pub fn export(&self, label: &[u8], context: &[u8], out: &mut [u8]) -> Option<()> {
        let hash = self.suite.common.hash_provider;
        let expander = self.suite.hkdf_provider.expander_for_okm(&self.secret);
        let empty = hash.hash(&[]);
        let mut derived = [0; OkmBlock::MAX_LEN];
        let derived = derived.get_mut(..expander.hash_len())?;
        expand(expander.as_ref(), label, empty.as_ref(), derived)?;
        let expander = self.suite.hkdf_provider.expander_for_okm(&OkmBlock::new(derived));
        derived.fill(0);
        expand(expander.as_ref(), b"exporter", hash.hash(context).as_ref(), out)
    }
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

/// HKDF-Expand-Label (RFC 8446, section 7.1).
pub(crate) fn expand(
    expander: &dyn HkdfExpander,
    label: &[u8],
    context: &[u8],
    out: &mut [u8],
) -> Option<()> {
    const PREFIX: &[u8] = b"tls13 ";
    let length = u16::try_from(out.len()).ok()?.to_be_bytes();
    let named = [u8::try_from(PREFIX.len() + label.len()).ok()?];
    let within = [u8::try_from(context.len()).ok()?];
    expander.expand_slice(&[&length, &named, PREFIX, label, &within, context], out).ok()
}

#[cfg(test)]
mod tests {
    use crate::testing::{ends, shake, with_rustls};

    #[test]
    fn both_ends_export_the_same_and_another_association_something_else() {
        let export = |finished: &crate::handshake::Finished| {
            let mut key = [0; 48];
            let exporter = finished.established.exporter.as_ref().unwrap();
            exporter.export(b"EXPORTER-portcullis", b"context", &mut key).unwrap();
            key
        };
        let pair = || {
            let (client, server) = ends(true);
            shake(client, server, 1000)
        };
        let (client, server) = pair();
        assert_eq!(export(&client), export(&server));
        assert_ne!(export(&client), export(&pair().0));
        assert_eq!(format!("{:?}", client.established.exporter), "Some(<redacted>)");
    }

    #[test]
    fn what_is_exported_is_what_rustls_exports() {
        let (ours, theirs) = with_rustls();
        let expected = theirs.export_keying_material([0; 80], b"label", Some(b"context")).unwrap();
        let mut key = [0; 80];
        ours.established.exporter.unwrap().export(b"label", b"context", &mut key).unwrap();
        assert_eq!(key, expected);
    }
}
