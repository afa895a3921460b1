//! Private keys: made, kept in files that nobody else can read, never shown.

use std::{
    fmt, fs,
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

use nix::unistd::geteuid;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PublicKeyData, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme, sign::Signer};
use zeroize::{Zeroize, Zeroizing};

use super::IdentityError;

/// A private key, ECDSA over P-256 or Ed25519. Wiped when dropped; `Debug` shows nothing; cannot be cloned.
pub struct Key(KeyPair);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(<redacted>)")
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Key {
    /// Makes a new key that lasts: what every TLS program knows (ECDSA over P-256).
    pub fn generate() -> Result<Self, IdentityError> {
        Ok(Self(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?))
    }

    /// Makes a new key of a process: what costs handshakes least (Ed25519, docs/adr/0006-tls-provider.md).
    pub fn generate_for_process() -> Result<Self, IdentityError> {
        Ok(Self(KeyPair::generate_for(&PKCS_ED25519)?))
    }

    /// Reads a key (PKCS #8 in PEM).
    ///
    /// # Errors
    /// [`IdentityError::LooseKey`] if anyone but its owner may read or write it, or if the owner is
    /// neither the caller nor root.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        let at = |source| IdentityError::File { path: path.to_owned(), source };
        let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path).map_err(at)?;
        let found = file.metadata().map_err(at)?;
        let foreign = found.uid() != 0 && found.uid() != geteuid().as_raw();
        if found.mode() & 0o077 != 0 || foreign {
            let (mode, uid) = (found.mode() & 0o7777, found.uid());
            return Err(IdentityError::LooseKey { path: path.to_owned(), mode, uid });
        }
        let mut pem = Zeroizing::new(String::with_capacity(4096));
        file.take(4096).read_to_string(&mut pem).map_err(at)?;
        Self::read(&pem, path)
    }

    /// Reads a key that lies at `path`.
    pub(super) fn read(pem: &str, path: &Path) -> Result<Self, IdentityError> {
        KeyPair::from_pem(pem).map(Self).map_err(|_| IdentityError::NoKey { path: path.to_owned() })
    }

    /// Writes the key, mode 0600, in place of an older one at once.
    pub fn save(&self, path: &Path) -> Result<(), IdentityError> {
        let pem = Zeroizing::new(self.0.serialize_pem());
        replace(path, pem.as_bytes(), 0o600)
    }

    /// Signs a message (ECDSA with SHA-256 in DER, or Ed25519).
    pub(super) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IdentityError> {
        Ok(self.0.sign(message)?)
    }
}

/// Certificates are made for it, and signed with it.
impl PublicKeyData for Key {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.0.algorithm()
    }
}

impl rcgen::SigningKey for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

/// A key as TLS uses it, without a copy.
#[derive(Clone, Debug)]
pub(super) struct InTls(pub(super) Arc<Key>);

impl rustls::sign::SigningKey for InTls {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered.contains(&self.scheme()).then(|| Box::new(self.clone()) as _)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        if self.scheme() == SignatureScheme::ED25519 {
            SignatureAlgorithm::ED25519
        } else {
            SignatureAlgorithm::ECDSA
        }
    }
}

impl Signer for InTls {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        self.0.sign(message).map_err(|_| rustls::Error::General("signing failed".to_owned()))
    }

    fn scheme(&self) -> SignatureScheme {
        if self.0.algorithm() == &PKCS_ED25519 {
            SignatureScheme::ED25519
        } else {
            SignatureScheme::ECDSA_NISTP256_SHA256
        }
    }
}

/// Writes a file beside `path` and moves it there, so that a reader finds the old or the new one whole.
pub(super) fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), IdentityError> {
    let at = |source| IdentityError::File { path: path.to_owned(), source };
    let name = path.file_name().ok_or_else(|| at(io::ErrorKind::InvalidInput.into()))?;
    let beside = path.with_file_name(format!(".{}.new", name.to_string_lossy()));
    match fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(e)),
        _ => {}
    }
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside).map_err(at)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(at)?;
    fs::rename(&beside, path).map_err(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_survives_its_file_and_is_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.key");
        for key in [Key::generate().unwrap(), Key::generate_for_process().unwrap()] {
            key.save(&path).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
            let again = Key::load(&path).unwrap();
            assert_eq!(again.0.serialize_der(), key.0.serialize_der());
            assert_eq!(again.0.algorithm(), key.0.algorithm());
            assert_eq!(format!("{key:?}"), "Key(<redacted>)");
        }
    }

    #[test]
    fn loose_permissions_links_and_garbage_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.key");
        Key::generate().unwrap().save(&path).unwrap();
        for loose in [0o640, 0o604, 0o620, 0o666] {
            fs::set_permissions(&path, fs::Permissions::from_mode(loose)).unwrap();
            assert!(matches!(Key::load(&path), Err(IdentityError::LooseKey { .. })), "{loose:o}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        assert!(Key::load(&path).is_ok());
        let link = folder.path().join("link.key");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(Key::load(&link), Err(IdentityError::File { .. })));
        replace(&path, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", 0o600).unwrap();
        assert!(matches!(Key::load(&path), Err(IdentityError::NoKey { .. })));
    }
}
