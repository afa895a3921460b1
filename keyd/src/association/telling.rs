//! What the broker is told.

use portcullis_relay::{Established, Failure};
use portcullis_wire::keyd::{Head, Kind};
use serde::Serialize;
use zerocopy::IntoBytes;

use super::{Association, Associations};
use crate::identity::{Peer, ProcessFacts, ProcessName};

/// Who this host is, as the broker is told.
#[derive(Serialize)]
struct Who<'a> {
    domain: &'a str,
    host: &'a str,
    ver: u64,
    groups: &'a [String],
    addresses: &'a [std::net::IpAddr],
}

/// A peer as the broker is told of it.
#[derive(Serialize)]
struct Told<'a> {
    id: String,
    names: &'a [String],
    addresses: &'a [std::net::IpAddr],
    process: Option<&'a str>,
    ver: u64,
    groups: &'a [String],
    #[serde(flatten)]
    facts: Option<&'a ProcessFacts>,
    serial: &'a str,
    issuer_serial: &'a str,
    fingerprint: &'a str,
    key: &'a str,
    until: i64,
    end: i64,
    own_serial: &'a str,
    resumed: bool,
    cipher: &'a str,
    kex: &'a str,
}

/// What a handshake came to, besides the peer.
pub(super) struct Agreed {
    cipher: Box<str>,
    kex: Box<str>,
    resumed: bool,
}

impl Association {
    /// Who the peer is, as a JSON object. `None`: it has shown nobody.
    pub(super) fn told(&self) -> Option<Vec<u8>> {
        let (bond, agreed) = (self.bond.as_ref()?, self.agreed.as_ref()?);
        let Peer {
            id, host, process, names, addresses, serial, issuer_serial, fingerprint, key, until, ..
        } = self.peer()?;
        let told = Told {
            id: id.to_string(),
            names,
            addresses,
            process: id.process.as_ref().map(ProcessName::as_str),
            ver: host.ver,
            groups: &host.groups,
            facts: process.as_ref(),
            serial,
            issuer_serial,
            fingerprint,
            key,
            until: *until,
            end: self.peer()?.end(),
            own_serial: &bond.serial,
            resumed: agreed.resumed,
            cipher: &agreed.cipher,
            kex: &agreed.kex,
        };
        serde_json::to_vec(&told).ok()
    }

    /// Writes into a report whether the peer opened it, and where.
    pub(super) fn name(&self, head: Head) -> Head {
        let Some(front) = self.front() else { return head };
        Head { count: 1, flags: u32::try_from(front & u64::from(u32::MAX)).unwrap_or(0), ..head }
    }
}

impl Associations {
    /// Who this host is, as a JSON object.
    pub fn who(&self) -> Vec<u8> {
        let facts = self.host.facts();
        let who = Who {
            domain: self.host.domain().as_str(),
            host: facts.host.as_str(),
            ver: facts.ver,
            groups: &facts.groups,
            addresses: self.host.addresses(),
        };
        serde_json::to_vec(&who).unwrap_or_default()
    }

    /// Why an association did not come about. The verifier's own words are better than what rustls makes of them.
    pub(super) fn words(&self, id: u64, failure: &Failure) -> String {
        use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible as Cannot};
        match (failure, self.all.get(&id).and_then(Association::verdict)) {
            (Failure::Tls(Error::InvalidCertificate(CertificateError::Other(own))), _) => own.0.to_string(),
            (Failure::Tls(Error::InvalidCertificate(_)), Some(Err(refusal))) => refusal.to_string(),
            (
                Failure::Tls(
                    Error::AlertReceived(AlertDescription::ProtocolVersion)
                    | Error::PeerIncompatible(
                        Cannot::SupportedVersionsExtensionRequired
                        | Cannot::Tls12NotOfferedOrEnabled
                        | Cannot::ServerTlsVersionIsDisabledByOurConfig
                        | Cannot::ServerDoesNotSupportTls12Or13,
                    ),
                ),
                _,
            ) => "the peer does not speak TLS 1.3".to_owned(),
            (Failure::Tls(Error::InvalidMessage(InvalidMessage::InvalidContentType)), _) => {
                "the peer does not speak TLS".to_owned()
            }
            _ => failure.to_string(),
        }
    }

    /// Tells the broker who is there, and waits for its word.
    pub(super) fn shown(&mut self, id: u64, tls: Option<&Established>) {
        let Some(one) = self.all.get_mut(&id) else { return };
        (one.shown, one.plain) = (true, tls.is_none());
        one.agreed = tls.map(|tls| Agreed {
            cipher: tls.cipher.as_str().into(),
            kex: tls.kex.as_str().into(),
            resumed: tls.resumed,
        });
        // The engine takes no plain peer but where one may come.
        match if one.plain { Some(b"{}".to_vec()) } else { one.told() } {
            Some(told) => self.tell(id, Kind::Shown, &told),
            None => self.stop(id, libc::EACCES, "the peer showed no certificate"),
        }
    }

    /// Reports an association to the broker: its addresses, and what follows them.
    pub(super) fn tell(&mut self, id: u64, kind: Kind, what: &[u8]) {
        let Some(one) = self.all.get(&id) else { return };
        let head = one.name(Head { tag: id, ..Head::new(kind, 0) });
        self.reports.push((head, [one.places.as_bytes(), what].concat()));
    }
}
