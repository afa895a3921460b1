//! What a verified certificate tells of its holder. Pure.

use std::net::IpAddr;

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{
    HostFacts, ProcessFacts, SpiffeId,
    chain::{Issuing, SKEW},
    facts,
    facts::{HOST_OID, PROCESS_OID},
    issue::hex,
    verify::Refusal,
};

/// Who is at the far end, as its certificate proves.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Peer {
    /// Trust domain, host and process.
    pub id: SpiffeId,
    /// What the root says of the host, from its issuing certificate.
    pub host: HostFacts,
    /// What the host says of the process.
    pub process: Option<ProcessFacts>,
    /// DNS names.
    pub names: Vec<String>,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Serial number in hexadecimal.
    pub serial: String,
    /// Serial number of the host's issuing certificate.
    pub issuer_serial: String,
    /// SHA-256 of the certificate, in hexadecimal.
    pub fingerprint: String,
    /// SHA-256 of its public key (SubjectPublicKeyInfo), in hexadecimal: the same for all of one session.
    pub key: String,
    /// First second of validity, of itself and of its issuer, since the Unix epoch.
    pub from: i64,
    /// Last second.
    pub until: i64,
}

/// SHA-256, in hexadecimal.
fn sha256(bytes: &[u8]) -> String {
    hex(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref())
}

/// What a certificate is known by.
pub(super) fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    sha256(certificate)
}

/// Parts of a certificate that are looked at.
pub(super) struct Read<'a> {
    pub(super) certificate: X509Certificate<'a>,
    pub(super) serial: String,
}

impl<'a> Read<'a> {
    pub(super) fn from(der: &'a CertificateDer<'_>) -> Result<Self, Refusal> {
        let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| Refusal::Unreadable)?;
        if !rest.is_empty() {
            return Err(Refusal::Unreadable);
        }
        let serial = hex(certificate.raw_serial());
        Ok(Self { certificate, serial })
    }

    /// The one SPIFFE ID (X.509-SVID, 2: exactly one URI).
    pub(super) fn id(&self) -> Result<SpiffeId, Refusal> {
        let mut uris = self.names().filter_map(|name| match name {
            GeneralName::URI(text) => Some(*text),
            _ => None,
        });
        match (uris.next(), uris.next()) {
            (Some(text), None) => {
                text.parse().map_err(|_| Refusal::NoSpiffeId(text.chars().take(300).collect()))
            }
            (None, _) => Err(Refusal::NoSpiffeId(self.certificate.subject().to_string())),
            (Some(_), Some(_)) => Err(Refusal::NoSpiffeId("more than one URI".to_owned())),
        }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &GeneralName<'a>> {
        let names = self.certificate.subject_alternative_name().ok().flatten();
        names.into_iter().flat_map(|names| names.value.general_names.iter())
    }

    /// The content of one of our extensions.
    pub(super) fn facts<T: for<'d> serde::Deserialize<'d>>(&self, oid: &[u64]) -> Result<Option<T>, Refusal> {
        let oid = x509_parser::der_parser::Oid::from(oid).map_err(|_| Refusal::Unreadable)?;
        let found = self.certificate.get_extension_unique(&oid).map_err(|_| Refusal::Unreadable)?;
        found.map(|extension| facts::decode(extension.value).map_err(|_| Refusal::Unreadable)).transpose()
    }
}

impl Peer {
    /// When nothing is believed of it any more, since the Unix epoch: a peer's clock may be behind.
    #[must_use]
    pub fn end(&self) -> i64 {
        self.until.saturating_add_unsigned(SKEW.as_secs())
    }

    /// Reads a leaf whose signature was verified. Refuses one that is not of its issuer's host.
    pub(super) fn from(leaf: &CertificateDer<'_>, issuing: &Issuing) -> Result<Self, Refusal> {
        let fingerprint = fingerprint(leaf);
        let leaf = Read::from(leaf)?;
        let id = leaf.id()?;
        let host = issuing.facts.clone();
        let shown: HostFacts = leaf.facts(&HOST_OID)?.ok_or(Refusal::NotFromAHost)?;
        if id.host != host.host || shown != host {
            return Err(Refusal::OtherHost { shown: id.to_string(), issuer: host.host });
        }
        let (mut names, mut addresses) = (Vec::new(), Vec::new());
        for name in leaf.names() {
            match name {
                GeneralName::DNSName(name) => names.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => addresses.extend(ip(bytes)),
                _ => {}
            }
        }
        if !names.iter().any(|name| name == host.host.as_str()) {
            return Err(Refusal::Nameless(id.to_string()));
        }
        let key = sha256(leaf.certificate.public_key().raw);
        let process: Option<ProcessFacts> = leaf.facts(&PROCESS_OID)?;
        let validity = leaf.certificate.validity();
        let from = validity.not_before.timestamp().max(issuing.from);
        let until = validity.not_after.timestamp().min(issuing.until);
        let (serial, issuer_serial) = (leaf.serial.clone(), issuing.serial.clone());
        Ok(Self { id, host, process, names, addresses, serial, issuer_serial, fingerprint, key, from, until })
    }
}

/// A certificate that was not believed, in words for the log.
#[must_use]
pub fn describe(der: &CertificateDer<'_>) -> String {
    let fingerprint = hex(ring::digest::digest(&ring::digest::SHA256, der).as_ref());
    let Ok(read) = Read::from(der) else {
        return format!("a certificate that cannot be read ({fingerprint})");
    };
    let name = read.id().map_or_else(|_| read.certificate.subject().to_string(), |id| id.to_string());
    let name: String = name.chars().take(300).collect();
    let issuer: String = read.certificate.issuer().to_string().chars().take(300).collect();
    let until = read.certificate.validity().not_after;
    format!(
        "`{name}`, serial {}, issued by `{issuer}`, valid until {until}, SHA-256 {fingerprint}",
        read.serial
    )
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}
