//! Who is who: a trust domain's certificates, from its root to one process.
//!
//! ```text
//! root (trust domain) ── issuing certificate (one host) ─┬─ host certificate
//!                                                        └─ process certificates, minted by keyd
//! ```
//!
//! A host can speak only for itself: its issuing certificate has path length 0 and critical
//! constraints on DNS names and addresses, says in an extension which host it is, and the
//! [`Verifier`] holds the SPIFFE ID of what it signs against that.

mod authority;
mod chain;
mod facts;
mod host;
mod issue;
mod key;
mod members;
mod names;
mod peer;
mod verify;

use std::{io, path::PathBuf};

pub use authority::{Authority, Enrolment, HostEntry, Overview};
pub use facts::{HostFacts, ProcessFacts};
pub use host::{Host, ProcessIdentity};
pub use issue::{PROCESS_VALIDITY, Validity};
pub use key::Key;
pub use members::{Member, Members, Revoked};
pub use names::{HostName, NameError, ProcessName, SpiffeId, TrustDomain};
pub use peer::{Peer, describe};
pub use verify::{Refusal, Seen, Verifier};

/// Any bytes as a name, an extension, a list of members and a certificate, for [`crate::fuzzing`].
///
/// # Panics
/// If what was read is not what would be written.
pub(crate) fn read_any(bytes: &[u8]) {
    fn facts_of<T>(bytes: &[u8])
    where
        T: serde::Serialize + for<'a> serde::Deserialize<'a> + PartialEq + std::fmt::Debug,
    {
        if let Ok(facts) = facts::decode::<T>(bytes) {
            let written = facts::encode(&facts).map(|der| facts::decode(&der));
            // What was padded is shorter when written, and what had escapes may be longer.
            assert!(written.as_ref().map_or(true, |again| *again == Ok(facts)), "{written:?}");
        }
    }
    facts_of::<HostFacts>(bytes);
    facts_of::<ProcessFacts>(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        if let Ok(id) = text.parse::<SpiffeId>() {
            assert_eq!(id.to_string(), text, "one form for each");
        }
        let _either = toml::from_str::<Members>(text);
    }
    let der = rustls::pki_types::CertificateDer::from(bytes);
    if let Ok(read) = peer::Read::from(&der) {
        let _either = (read.id(), read.names().count());
    }
    if let Ok(issuing) = chain::Issuing::read(&der) {
        let _either = Peer::from(&der, &issuing);
    }
    let _text = describe(&der);
}

/// Why an identity cannot be made, read or trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A file cannot be read or written.
    #[error("cannot use `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A private key lies open.
    #[error("key `{}` has mode {mode:04o} and belongs to uid {uid}; it must be 0600 and yours", path.display())]
    LooseKey {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// Its owner.
        uid: u32,
    },
    /// A key file holds no key of the kind in use.
    #[error("`{}` holds no ECDSA P-256 or Ed25519 key in PEM", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// A certificate file holds none, or one that is not what it should be.
    #[error("`{}` holds no such certificate", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// A file of the trust domain is not in its form.
    #[error("`{}` is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The list of members is not signed by the root.
    #[error("the list of members is not signed by this trust domain")]
    Unsigned,
    /// What the root signed is no list of members.
    #[error("the list of members is damaged: {0}")]
    NoList(String),
    /// There is a trust domain already.
    #[error("`{}` has a trust domain already: `{domain}`", path.display())]
    Exists {
        /// The state folder.
        path: PathBuf,
        /// Its domain.
        domain: TrustDomain,
    },
    /// The host is enrolled already.
    #[error("host `{0}` is enrolled already; `renew` it, or `revoke` it first")]
    Enrolled(HostName),
    /// The host is not enrolled, or no longer.
    #[error("host `{0}` is not enrolled, or revoked; `portcullis ca host` enrols it")]
    NotEnrolled(HostName),
    /// An address is another member's.
    #[error("address {address} belongs to member `{owner}`")]
    AddressTaken {
        /// The address.
        address: std::net::IpAddr,
        /// Whose it is.
        owner: HostName,
    },
    /// No certificate has this serial.
    #[error("no certificate with serial `{0}` was issued here")]
    NoSerial(String),
    /// A name is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// An extension cannot be read or is too long.
    #[error(transparent)]
    Extension(#[from] facts::ExtensionError),
    /// A certificate cannot be made.
    #[error("cannot make a certificate")]
    Issue(#[from] rcgen::Error),
    /// TLS cannot be set up with this identity.
    #[error("cannot use this identity for TLS")]
    Tls(#[from] rustls::Error),
    /// The system gives no random numbers.
    #[error("no random numbers")]
    Random,
}
