//! What the key daemon tells unasked, as it is read.

use std::net::IpAddr;

use portcullis_wire::keyd::{Head, Kind, Over, Places};
use serde::Deserialize;
use zerocopy::FromBytes;

/// A peer that has proved nothing.
pub(super) const NOBODY: &[u8] = b"{}";

/// Who this host is in its trust domain.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
pub struct Who {
    /// Trust domain.
    pub domain: String,
    /// DNS name.
    pub host: String,
    /// Version of its enrolment.
    pub ver: u64,
    /// Groups it is in.
    pub groups: Vec<String>,
    /// Addresses in its certificates.
    pub addresses: Vec<IpAddr>,
}

/// What happened to a protected flow.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum News {
    /// The peer has proved itself; [`Keyd::admit`] or [`Keyd::refuse`] it.
    Shown {
        /// Number of the association.
        id: u64,
        /// Low 32 bits of the front's number, if the peer opened it.
        front: Option<u32>,
        /// Its addresses, as far as they are known.
        places: Places,
        /// Whom the certificate names: a JSON object with `id names addresses process ver groups exe
        /// sha256 user unit serial issuer_serial fingerprint key until end cipher kex`. `None` for one that speaks plain,
        /// as it may at a mixed listener.
        peer: Option<String>,
    },
    /// Somebody came to a listener that serves plain peers as well; [`Keyd::speak`] is next.
    Arrived {
        /// Number of the association.
        id: u64,
        /// Low 32 bits of the front's number.
        front: u32,
        /// Its addresses.
        places: Places,
    },
    /// It runs since an earlier broker was there.
    Live {
        /// Number of the association.
        id: u64,
        /// Low 32 bits of the front's number, if the peer opened it.
        front: Option<u32>,
        /// Its addresses.
        places: Places,
        /// A JSON object: `peer` as in `Shown`, `process` as it was given, `since` in seconds since the Unix epoch.
        what: String,
    },
    /// It goes on as it was admitted to.
    Admitted {
        /// Number of the association.
        id: u64,
        /// Its addresses, as far as they are known.
        places: Places,
        /// It carries data already: there will be no [`Self::Associated`].
        runs: bool,
    },
    /// It carries data, which was not so yet when it was admitted.
    Associated {
        /// Number of the association.
        id: u64,
        /// Its addresses.
        places: Places,
    },
    /// It is over, or came to nothing.
    Over {
        /// Number of the association.
        id: u64,
        /// 0 if both ends closed in order.
        errno: i32,
        /// How, in words.
        why: String,
        /// What the peer showed, if that was not believed.
        shown: Option<String>,
        /// As in `Shown`.
        front: Option<u32>,
        /// Its addresses, as far as they are known.
        places: Places,
        /// Bytes that went out and came in.
        carried: Over,
    },
}

impl News {
    pub(super) fn read(kind: Kind, head: &Head, rest: &[u8]) -> Option<Self> {
        let id = head.tag;
        let front = (head.count == 1).then_some(head.flags);
        match kind {
            Kind::Shown => {
                let (places, peer) = Places::read_from_prefix(rest).ok()?;
                let peer = Some(peer).filter(|it| *it != NOBODY).map(|it| String::from_utf8(it.to_vec()));
                Some(Self::Shown { id, front, places, peer: peer.transpose().ok()? })
            }
            Kind::Arrived => {
                Some(Self::Arrived { id, front: head.flags, places: Places::read_from_bytes(rest).ok()? })
            }
            Kind::Live => {
                let (places, what) = Places::read_from_prefix(rest).ok()?;
                Some(Self::Live { id, front, places, what: String::from_utf8(what.to_vec()).ok()? })
            }
            Kind::Admit => {
                let places = Places::read_from_bytes(rest).unwrap_or_default();
                Some(Self::Admitted { id, places, runs: head.count == 1 })
            }
            Kind::Associated => Some(Self::Associated { id, places: Places::read_from_bytes(rest).ok()? }),
            Kind::Over => {
                let (carried, rest) = Over::read_from_prefix(rest).ok()?;
                let (places, text) = Places::read_from_prefix(rest).ok()?;
                let text = String::from_utf8_lossy(text);
                let mut lines = text.splitn(2, '\n').map(str::to_owned);
                let (why, shown) = (lines.next().unwrap_or_default(), lines.next());
                Some(Self::Over { id, errno: head.errno, why, shown, front, places, carried })
            }
            _ => None,
        }
    }
}
