//! Makes certificates: what is in each kind.

use std::net::IpAddr;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CidrSubnet, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyUsagePurpose, NameConstraints, SanType,
    SerialNumber, SigningKey,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;

use super::{
    IdentityError, Key, ProcessFacts, SpiffeId, TrustDomain,
    facts::{self, HOST_OID, HostFacts, PROCESS_OID},
};

const DAY: i64 = 24 * 60 * 60;
/// How long a process certificate lives, in seconds. It is renewed at half of that. An association ends with its
/// peer's certificate, so this bounds how long one can last; what is stolen sooner is revoked.
pub const PROCESS_VALIDITY: i64 = 8 * 60 * 60;
/// Certificates are valid from a little before now, for peers whose clocks are behind.
const BACKDATED: i64 = 5 * 60;

/// When a certificate is valid, in seconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Validity {
    /// First second.
    pub from: i64,
    /// Last second.
    pub until: i64,
}

impl Validity {
    /// Ten years, for a root.
    #[must_use]
    pub const fn root(now: i64) -> Self {
        Self { from: now - BACKDATED, until: now + 3652 * DAY }
    }
    /// A year, for a host.
    #[must_use]
    pub const fn host(now: i64) -> Self {
        Self { from: now - BACKDATED, until: now + 365 * DAY }
    }
    /// [`PROCESS_VALIDITY`].
    #[must_use]
    pub const fn process(now: i64) -> Self {
        Self { from: now - BACKDATED, until: now + PROCESS_VALIDITY }
    }
}

/// A certificate just made, and its serial number in hexadecimal.
pub struct Issued {
    pub certificate: Certificate,
    pub serial: String,
}

/// Hexadecimal, lower case.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn params(name: &str, validity: Validity) -> Result<(CertificateParams, String), IdentityError> {
    let time = |at| OffsetDateTime::from_unix_timestamp(at).map_err(|_| rcgen::Error::Time);
    let mut serial = [0; 16];
    SystemRandom::new().fill(&mut serial).map_err(|_| IdentityError::Random)?;
    // Positive, and never shortened by a leading zero (RFC 5280, 4.1.2.2).
    let [first, ..] = &mut serial;
    *first = *first & 0x7f | 0x40;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    (params.not_before, params.not_after) = (time(validity.from)?, time(validity.until)?);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.use_authority_key_identifier_extension = true;
    Ok((params, hex(&serial)))
}

fn uri(text: &str) -> Result<SanType, IdentityError> {
    Ok(SanType::URI(text.try_into()?))
}

/// The root of a trust domain.
pub fn root(domain: &TrustDomain, key: &Key, validity: Validity) -> Result<Issued, IdentityError> {
    let (mut params, serial) = params(&format!("{domain} root"), validity)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.subject_alt_names = vec![uri(&format!("spiffe://{domain}"))?];
    params.use_authority_key_identifier_extension = false;
    Ok(Issued { certificate: params.self_signed(key)?, serial })
}

/// What one host signs with. Its constraints hold for every DNS name and address below it; there is
/// none on URIs, because webpki would then refuse every leaf.
pub fn issuing(
    host: &HostFacts,
    addresses: &[IpAddr],
    key: &Key,
    (root, root_key): (&CertificateDer<'_>, &Key),
    validity: Validity,
) -> Result<Issued, IdentityError> {
    let (mut params, serial) = params(&format!("{} issuing", host.host), validity)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let mut permitted = vec![GeneralSubtree::DnsName(host.host.as_str().to_owned())];
    let single = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => CidrSubnet::V4(ip.octets(), [0xff; 4]),
        IpAddr::V6(ip) => CidrSubnet::V6(ip.octets(), [0xff; 16]),
    };
    permitted.extend(addresses.iter().map(|ip| GeneralSubtree::IpAddress(single(ip))));
    // A kind of name without a permitted subtree is unconstrained (RFC 5280, 4.2.1.10).
    let none =
        [CidrSubnet::V4([0; 4], [0; 4]), CidrSubnet::V6([0; 16], [0; 16])].map(GeneralSubtree::IpAddress);
    let excluded = if addresses.is_empty() { none.to_vec() } else { Vec::new() };
    params.name_constraints =
        Some(NameConstraints { permitted_subtrees: permitted, excluded_subtrees: excluded });
    params.custom_extensions = vec![CustomExtension::from_oid_content(&HOST_OID, facts::encode(host)?)];
    let issuer = Issuer::from_ca_cert_der(root, root_key)?;
    Ok(Issued { certificate: params.signed_by(key, &issuer)?, serial })
}

/// A host's own certificate, or one of its processes'.
pub fn leaf(
    id: &SpiffeId,
    addresses: &[IpAddr],
    host: &HostFacts,
    process: Option<&ProcessFacts>,
    key: &Key,
    issuer: &Issuer<'_, impl SigningKey>,
    validity: Validity,
) -> Result<Issued, IdentityError> {
    // RFC 5280's upper bound for a common name is 64; the names that count are in the extension.
    let shown: String =
        id.process.as_ref().map_or(id.host.as_str(), |name| name.as_str()).chars().take(64).collect();
    let (mut params, serial) = params(&shown, validity)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![uri(&id.to_string())?, SanType::DnsName(id.host.as_str().try_into()?)];
    params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
    params.custom_extensions = vec![CustomExtension::from_oid_content(&HOST_OID, facts::encode(host)?)];
    if let Some(process) = process {
        let content = facts::encode(process)?;
        params.custom_extensions.push(CustomExtension::from_oid_content(&PROCESS_OID, content));
    }
    Ok(Issued { certificate: params.signed_by(key, issuer)?, serial })
}
