//! Who takes part: the members of a trust domain and what was revoked, signed by its root.
//!
//! Addresses in it only ever *add* protection. A revoked host stays a member: its address goes on
//! being protected, and nothing it shows is believed.

use std::{net::IpAddr, path::Path};

use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::{HostName, IdentityError, Key, TrustDomain, issue::hex, key::replace, peer::Read};

/// One host.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its name.
    pub name: HostName,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// One certificate that is not believed any more.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoked {
    /// Serial number in hexadecimal; an issuing certificate's takes all that it signed with it.
    pub serial: String,
    /// When, in seconds since the Unix epoch.
    pub at: i64,
}

/// The list, as it lies in `members.toml`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Members {
    /// Whose list it is.
    pub domain: TrustDomain,
    /// Number of the list; it only grows.
    pub number: u64,
    /// The hosts.
    #[serde(default, rename = "member")]
    pub members: Vec<Member>,
    /// The revoked.
    #[serde(default)]
    pub revoked: Vec<Revoked>,
}

/// Before the signature, on a last line of its own.
const SIGNED: &str = "# signed: ";
/// Longest list that is read, in bytes.
const LONGEST: u64 = 64 << 20;

impl Members {
    /// The member with an address; v4-mapped ones are IPv4.
    #[must_use]
    pub fn owner(&self, address: IpAddr) -> Option<&Member> {
        let address = address.to_canonical();
        self.members.iter().find(|member| member.addresses.contains(&address))
    }

    /// Signs the list and puts it in place of an older one.
    pub fn save(&self, path: &Path, root: &Key) -> Result<(), IdentityError> {
        let damaged =
            |e: toml::ser::Error| IdentityError::Damaged { path: path.to_owned(), reason: e.to_string() };
        let text = toml::to_string(self).map_err(damaged)?;
        let signature = hex(&root.sign(text.as_bytes())?);
        replace(path, format!("{text}{SIGNED}{signature}\n").as_bytes(), 0o644)
    }

    /// Reads a list.
    ///
    /// # Errors
    /// [`IdentityError::Unsigned`] unless the holder of `root` signed it.
    pub fn load(path: &Path, root: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let at = |source| IdentityError::File { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(at)?.len() > LONGEST {
            return Err(at(std::io::ErrorKind::FileTooLarge.into()));
        }
        Self::read(&std::fs::read_to_string(path).map_err(at)?, root)
    }

    /// Reads a list from its text.
    ///
    /// # Errors
    /// [`IdentityError::Unsigned`] unless the holder of `root` signed it, [`IdentityError::NoList`] if it is
    /// signed and yet no list.
    pub fn read(text: &str, root: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (body, signature) = text.rsplit_once(SIGNED).ok_or(IdentityError::Unsigned)?;
        let signature = signature.strip_suffix('\n').and_then(unhex).ok_or(IdentityError::Unsigned)?;
        let root = Read::from(root).map_err(|_| IdentityError::Unsigned)?;
        let key = &root.certificate.public_key().subject_public_key.data;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
            .verify(body.as_bytes(), &signature)
            .map_err(|_| IdentityError::Unsigned)?;
        toml::from_str(body).map_err(|e| IdentityError::NoList(e.to_string()))
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    digits
        .chunks(2)
        .map(|pair| match pair {
            [high, low] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()
            }
            _ => None,
        })
        .collect()
}
