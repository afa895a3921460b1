//! The record layer once keys are known (RFC 8446, section 5): pure, on the caller's buffers, in place.
//!
//! rustls shakes hands; sealing and opening is here, because that is where the bytes are: a batch is read, sealed where
//! it lies, and written, without a copy in between.

use rustls::{
    CipherSuite, ConnectionTrafficSecrets, ContentType,
    client::ClientConnectionData,
    crypto::cipher::{AeadKey, Iv},
    kernel::KernelConnection,
};
use zeroize::Zeroizing;

use crate::{
    provider::aead::{
        AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
    },
    secrets::Traffic,
};

/// Header: type, legacy version, length (RFC 8446, section 5.2).
pub(crate) const HEADER: usize = 5;
/// Largest plaintext of one record (section 5.1).
pub(crate) const PLAIN: usize = 1 << 14;
/// Authentication tag of all three suites (RFC 5116, section 5.1; RFC 8439, section 2.8).
const TAG: usize = 16;
/// What a record that we seal has beyond its plaintext: header, inner type, tag.
pub(crate) const OVERHEAD: usize = HEADER + 1 + TAG;
/// A full record that we seal.
pub(crate) const FULL: usize = PLAIN + OVERHEAD;
/// Largest protected payload that a peer may send (section 5.2).
const CIPHER: usize = PLAIN + 256;
/// Largest record of a peer, header included.
pub(crate) const LARGEST: usize = HEADER + CIPHER;
/// Keys are changed before this many records: 2^24, rustls's limit for AES-GCM (section 5.5 allows 2^24.5).
const REKEY: u64 = (1 << 24) - 1024;
/// Longest handshake message that is put together from pieces after the handshake: a ticket fits.
const LONGEST_MESSAGE: usize = 1 << 16;

/// Longest key of the suites, in bytes.
const LONGEST_KEY: usize = 32;

/// Post-handshake message types (RFC 8446, section 4).
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Alerts that this layer sends (RFC 8446, section 6).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Alert {
    CloseNotify = 0,
    UnexpectedMessage = 10,
    BadRecordMac = 20,
    RecordOverflow = 22,
    DecodeError = 50,
    AccessDenied = 49,
    InternalError = 80,
}

impl Alert {
    /// The alert with this code, as far as this layer sends it.
    pub(crate) fn of(code: u8) -> Self {
        let ours = [Self::UnexpectedMessage, Self::BadRecordMac, Self::RecordOverflow, Self::DecodeError];
        ours.into_iter().find(|alert| *alert as u8 == code).unwrap_or(Self::InternalError)
    }
}

/// Why a peer's record ends its association.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Bad(pub(crate) Alert);

/// What a peer's record held, and where in the buffer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Opened {
    /// Bytes for the program, this many from the start of the payload; zero is legal.
    Data(usize),
    /// The peer's side is complete.
    CloseNotify,
    /// The peer ends the association, with this alert.
    Fatal(u8),
    /// Taken care of; `reply` asks for [`Records::key_update`].
    Handled { reply: bool },
}

/// One direction's key, nonce and count.
struct Key {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Key {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Bad> {
        let make = |algorithm: &'static Algorithm, key: &AeadKey, iv: &Iv| {
            let bytes = key.as_ref().get(..algorithm.key_len())?;
            let key = LessSafeKey::new(UnboundKey::new(algorithm, bytes).ok()?);
            Some(Self { key, iv: iv.as_ref().try_into().ok()?, sequence })
        };
        match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => make(&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => make(&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => make(&CHACHA20_POLY1305, key, iv),
            _ => None,
        }
        .ok_or(Bad(Alert::InternalError))
    }

    /// The key after the one in use (section 7.2).
    fn next(traffic: &mut Traffic) -> Result<Self, Bad> {
        let mut made = || {
            traffic.update()?;
            let algorithm = match traffic.suite().common.suite {
                CipherSuite::TLS13_AES_128_GCM_SHA256 => &AES_128_GCM,
                CipherSuite::TLS13_AES_256_GCM_SHA384 => &AES_256_GCM,
                CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => &CHACHA20_POLY1305,
                _ => return None,
            };
            let mut key = Zeroizing::new([0; LONGEST_KEY]);
            let key = key.get_mut(..algorithm.key_len())?;
            let iv = traffic.keys(key)?;
            let key = LessSafeKey::new(UnboundKey::new(algorithm, key).ok()?);
            Some(Self { key, iv, sequence: 0 })
        };
        made().ok_or(Bad(Alert::InternalError))
    }

    /// The next record's nonce (section 5.3). A count never repeats under one key.
    fn nonce(&mut self) -> Result<Nonce, Bad> {
        let mut nonce = self.iv;
        for (byte, count) in nonce.iter_mut().skip(4).zip(self.sequence.to_be_bytes()) {
            *byte ^= count;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(Bad(Alert::InternalError))?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

/// Which end this is.
pub(crate) enum Role {
    /// It keeps tickets for later handshakes of its session, if there is one.
    Client(Option<Box<KernelConnection<ClientConnectionData>>>),
    Server,
}

/// Both directions of one association.
pub(crate) struct Records {
    seal: Key,
    open: Key,
    /// Where new keys come from when either end asks for them.
    sealing: Traffic,
    opening: Traffic,
    role: Role,
    /// A handshake message of which only a part has come.
    message: Vec<u8>,
}

/// What one direction begins with: the number of its next record, the keys, and the secret that they are of.
pub(crate) type Direction = ((u64, ConnectionTrafficSecrets), Traffic);

impl Records {
    pub(crate) fn new(seal: Direction, open: Direction, role: Role) -> Result<Self, Bad> {
        Ok(Self {
            seal: Key::new(seal.0)?,
            open: Key::new(open.0)?,
            sealing: seal.1,
            opening: open.1,
            role,
            message: Vec::new(),
        })
    }

    /// Seals one record of application data where it lies.
    ///
    /// `record` is header, plaintext, then room for type and tag: [`OVERHEAD`] more than the plaintext.
    pub(crate) fn seal(&mut self, record: &mut [u8]) -> Result<(), Bad> {
        self.seal_as(ContentType::ApplicationData, record)
    }

    fn seal_as(&mut self, kind: ContentType, record: &mut [u8]) -> Result<(), Bad> {
        let fault = Bad(Alert::InternalError);
        let (header, payload) = record.split_first_chunk_mut::<HEADER>().ok_or(fault)?;
        let length = u16::try_from(payload.len()).map_err(|_| fault)?;
        let [high, low] = length.to_be_bytes();
        *header = [u8::from(ContentType::ApplicationData), 3, 3, high, low];
        let (inner, tag) = payload.split_last_chunk_mut::<TAG>().ok_or(fault)?;
        *inner.last_mut().ok_or(fault)? = u8::from(kind);
        let nonce = self.seal.nonce()?;
        let sealed = self.seal.key.seal_in_place_separate_tag(nonce, Aad::from(*header), inner);
        tag.copy_from_slice(sealed.map_err(|_| fault)?.as_ref());
        Ok(())
    }

    /// Appends a small record of its own to `out`.
    pub(crate) fn append(&mut self, kind: ContentType, content: &[u8], out: &mut Vec<u8>) -> Result<(), Bad> {
        let start = out.len();
        out.extend_from_slice(&[0; HEADER]);
        out.extend_from_slice(content);
        out.resize(out.len() + 1 + TAG, 0);
        let record = out.get_mut(start..).ok_or(Bad(Alert::InternalError))?;
        self.seal_as(kind, record)
    }

    /// Appends an alert: `close_notify` as a warning, all others fatal.
    pub(crate) fn alert(&mut self, alert: Alert, out: &mut Vec<u8>) -> Result<(), Bad> {
        let level = if alert == Alert::CloseNotify { 1 } else { 2 };
        self.append(ContentType::Alert, &[level, alert as u8], out)
    }

    /// Appends an empty record, which carries nothing to the program (section 5.1 allows it).
    pub(crate) fn empty(&mut self, out: &mut Vec<u8>) -> Result<(), Bad> {
        self.append(ContentType::ApplicationData, &[], out)
    }

    /// Whether so many records were sealed under one key that it must change.
    pub(crate) fn key_is_worn(&self) -> bool {
        self.seal.sequence >= REKEY
    }

    /// Appends a KeyUpdate that asks for none in return, and seals under the next key from here on.
    pub(crate) fn key_update(&mut self, out: &mut Vec<u8>) -> Result<(), Bad> {
        self.append(ContentType::Handshake, &[KEY_UPDATE, 0, 0, 1, 0], out)?;
        self.seal = Key::next(&mut self.sealing)?;
        Ok(())
    }

    /// Opens one record where it lies: `header` and `payload` as [`whole`] found them.
    pub(crate) fn open(&mut self, header: [u8; HEADER], payload: &mut [u8]) -> Result<Opened, Bad> {
        let nonce = self.open.nonce()?;
        let opened = self.open.key.open_in_place(nonce, Aad::from(header), payload);
        let inner = opened.map_err(|_| Bad(Alert::BadRecordMac))?;
        if inner.len() > PLAIN + 1 {
            return Err(Bad(Alert::RecordOverflow));
        }
        // Padding is zeros after the type (section 5.4); all zeros is a record without type.
        let end = inner.iter().rposition(|byte| *byte != 0).ok_or(Bad(Alert::UnexpectedMessage))?;
        let (content, rest) = inner.split_at(end);
        let kind = rest.first().copied().map(ContentType::from);
        match kind {
            Some(ContentType::ApplicationData) if self.message.is_empty() => Ok(Opened::Data(end)),
            Some(ContentType::Alert) if self.message.is_empty() => match content {
                [_, 0] => Ok(Opened::CloseNotify),
                // RFC 8446, section 6: every other alert is fatal, whatever its level says.
                [_, code] => Ok(Opened::Fatal(*code)),
                _ => Err(Bad(Alert::DecodeError)),
            },
            Some(ContentType::Handshake) if !content.is_empty() => {
                self.message.extend_from_slice(content);
                self.messages()
            }
            _ => Err(Bad(Alert::UnexpectedMessage)),
        }
    }

    /// Takes the whole messages out of what has come: tickets are kept where a session wants them, keys updated.
    fn messages(&mut self) -> Result<Opened, Bad> {
        let message = std::mem::take(&mut self.message);
        let mut rest: &[u8] = &message;
        let mut reply = false;
        while let [kind, a, b, c, body @ ..] = rest {
            let length = usize::try_from(u32::from_be_bytes([0, *a, *b, *c])).unwrap_or(usize::MAX);
            if length > LONGEST_MESSAGE {
                return Err(Bad(Alert::DecodeError));
            }
            let Some((body, after)) = body.split_at_checked(length) else { break };
            match (*kind, &mut self.role) {
                (NEW_SESSION_TICKET, Role::Client(session)) => {
                    // What is no ticket is of no use later.
                    let _kept = session.as_mut().map(|session| session.handle_new_session_ticket(body));
                }
                (KEY_UPDATE, _) => {
                    reply = match body {
                        [0] => false,
                        [1] => true,
                        _ => return Err(Bad(Alert::DecodeError)),
                    };
                    // Section 5.1: no message may span a change of keys.
                    if !after.is_empty() {
                        return Err(Bad(Alert::UnexpectedMessage));
                    }
                    self.open = Key::next(&mut self.opening)?;
                }
                _ => return Err(Bad(Alert::UnexpectedMessage)),
            }
            rest = after;
        }
        self.message = rest.to_vec();
        Ok(Opened::Handled { reply })
    }
}

/// What stands at the start of a buffer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Whole {
    /// A record: its header, and the length of its payload.
    Record([u8; HEADER], usize),
    /// Not all of it has come.
    Partial,
}

/// Finds the record at the start of `bytes`, which must be protected (RFC 8446, section 5.2).
pub(crate) fn whole(bytes: &[u8]) -> Result<Whole, Bad> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else { return Ok(Whole::Partial) };
    let [kind, _, _, high, low] = *header;
    if kind != u8::from(ContentType::ApplicationData) {
        return Err(Bad(Alert::UnexpectedMessage));
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    match length {
        0..=TAG => Err(Bad(Alert::DecodeError)),
        _ if length > CIPHER => Err(Bad(Alert::RecordOverflow)),
        _ if rest.len() < length => Ok(Whole::Partial),
        _ => Ok(Whole::Record(*header, length)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;

    use super::*;
    use crate::testing::{ends, shake, with_rustls};

    fn pair() -> (Records, Records) {
        let (client, server) = ends(false);
        let (client, server) = shake(client, server, 1 << 16);
        (client.records, server.records)
    }

    fn sealed(records: &mut Records, plain: &[u8]) -> Vec<u8> {
        let mut record = vec![0; plain.len() + OVERHEAD];
        record[HEADER..HEADER + plain.len()].copy_from_slice(plain);
        records.seal(&mut record).unwrap();
        record
    }

    fn opened(records: &mut Records, record: &mut [u8]) -> Result<Opened, Bad> {
        match whole(record)? {
            Whole::Record(header, length) => {
                assert_eq!(HEADER + length, record.len());
                records.open(header, &mut record[HEADER..])
            }
            Whole::Partial => panic!("not whole"),
        }
    }

    #[test]
    fn what_one_end_seals_the_other_opens() {
        let (mut client, mut server) = pair();
        for length in [0, 1, 100, PLAIN - 1, PLAIN] {
            let plain = vec![0xa5; length];
            let mut record = sealed(&mut client, &plain);
            assert_eq!(opened(&mut server, &mut record), Ok(Opened::Data(length)));
            assert_eq!(&record[HEADER..HEADER + length], plain);
            let mut record = sealed(&mut server, &plain);
            assert_eq!(opened(&mut client, &mut record), Ok(Opened::Data(length)));
        }
    }

    #[test]
    fn a_record_opens_once_and_in_its_turn() {
        let (mut client, mut server) = pair();
        let (first, mut second) = (sealed(&mut client, b"one"), sealed(&mut client, b"two"));
        assert_eq!(opened(&mut server, &mut second), Err(Bad(Alert::BadRecordMac)));
        let (mut client, mut server) = pair();
        let record = sealed(&mut client, b"one");
        assert_eq!(opened(&mut server, &mut record.clone()), Ok(Opened::Data(3)));
        assert_eq!(opened(&mut server, &mut record.clone()), Err(Bad(Alert::BadRecordMac)));
        assert_ne!(first, record, "another association, another key");
    }

    #[test]
    fn keys_change_on_request_and_by_age() {
        let (mut client, mut server) = pair();
        for _ in 0..3 {
            let mut update = Vec::new();
            client.append(ContentType::Handshake, &[KEY_UPDATE, 0, 0, 1, 1], &mut update).unwrap();
            client.seal = Key::next(&mut client.sealing).unwrap();
            assert_eq!(opened(&mut server, &mut update), Ok(Opened::Handled { reply: true }));
            let mut reply = Vec::new();
            server.key_update(&mut reply).unwrap();
            assert_eq!(opened(&mut client, &mut reply), Ok(Opened::Handled { reply: false }));
            let mut record = sealed(&mut client, b"on");
            assert_eq!(opened(&mut server, &mut record), Ok(Opened::Data(2)));
            let mut record = sealed(&mut server, b"on");
            assert_eq!(opened(&mut client, &mut record), Ok(Opened::Data(2)));
        }
        client.seal.sequence = REKEY;
        assert!(client.key_is_worn());
        let mut update = Vec::new();
        server.open.sequence = REKEY;
        client.key_update(&mut update).unwrap();
        assert!(!client.key_is_worn());
        assert_eq!(opened(&mut server, &mut update), Ok(Opened::Handled { reply: false }));
    }

    #[test]
    fn keys_change_as_those_of_rustls_do() {
        let (ours, mut theirs) = with_rustls();
        let mut ours = ours.records;
        for _ in 0..3 {
            theirs.refresh_traffic_keys().unwrap();
            theirs.writer().write_all(b"theirs").unwrap();
            let mut flight = Vec::new();
            while theirs.wants_write() {
                theirs.write_tls(&mut flight).unwrap();
            }
            let Ok(Whole::Record(_, length)) = whole(&flight) else { panic!("no KeyUpdate") };
            let (update, data) = flight.split_at_mut(HEADER + length);
            assert_eq!(opened(&mut ours, update), Ok(Opened::Handled { reply: true }));
            assert_eq!(opened(&mut ours, data), Ok(Opened::Data(6)));
            let mut answer = Vec::new();
            ours.key_update(&mut answer).unwrap();
            answer.extend(sealed(&mut ours, b"ours"));
            theirs.read_tls(&mut answer.as_slice()).unwrap();
            theirs.process_new_packets().unwrap();
            let mut heard = [0; 4];
            theirs.reader().read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"ours");
        }
    }

    #[test]
    fn messages_may_come_in_pieces_but_not_across_a_change_of_keys() {
        let (mut client, mut server) = pair();
        let mut records = [Vec::new(), Vec::new()];
        server.append(ContentType::Handshake, &[NEW_SESSION_TICKET, 0, 0, 4, 1, 2], &mut records[0]).unwrap();
        server.append(ContentType::Handshake, &[3, 4], &mut records[1]).unwrap();
        assert_eq!(opened(&mut client, &mut records[0]), Ok(Opened::Handled { reply: false }));
        assert_eq!(opened(&mut client, &mut records[1]), Ok(Opened::Handled { reply: false }));

        // Data between the pieces is not permitted (RFC 8446, section 5.1).
        let mut piece = Vec::new();
        server.append(ContentType::Handshake, &[NEW_SESSION_TICKET, 0, 0, 4, 1, 2], &mut piece).unwrap();
        opened(&mut client, &mut piece).unwrap();
        let mut data = sealed(&mut server, b"x");
        assert_eq!(opened(&mut client, &mut data), Err(Bad(Alert::UnexpectedMessage)));

        let (mut client, mut server) = pair();
        let mut both = Vec::new();
        server
            .append(ContentType::Handshake, &[KEY_UPDATE, 0, 0, 1, 0, NEW_SESSION_TICKET, 0, 0, 0], &mut both)
            .unwrap();
        assert_eq!(opened(&mut client, &mut both), Err(Bad(Alert::UnexpectedMessage)));
    }

    #[test]
    fn tickets_are_for_clients_and_other_messages_for_nobody() {
        for kind in [0, 1, 2, 13, 20, 255] {
            let (mut client, mut server) = pair();
            let mut record = Vec::new();
            server.append(ContentType::Handshake, &[kind, 0, 0, 0], &mut record).unwrap();
            assert_eq!(opened(&mut client, &mut record), Err(Bad(Alert::UnexpectedMessage)));
        }
        let (mut client, mut server) = pair();
        let mut record = Vec::new();
        client.append(ContentType::Handshake, &[NEW_SESSION_TICKET, 0, 0, 0], &mut record).unwrap();
        assert_eq!(opened(&mut server, &mut record), Err(Bad(Alert::UnexpectedMessage)));
    }

    #[test]
    fn alerts_and_padding_are_read_and_the_rest_refused() {
        let (mut client, mut server) = pair();
        let mut end = Vec::new();
        client.alert(Alert::CloseNotify, &mut end).unwrap();
        assert_eq!(opened(&mut server, &mut end), Ok(Opened::CloseNotify));
        let mut fatal = Vec::new();
        client.alert(Alert::AccessDenied, &mut fatal).unwrap();
        assert_eq!(opened(&mut server, &mut fatal), Ok(Opened::Fatal(49)));

        // Content, its type, then zeros: made by sealing the type as content.
        let mut padded = sealed_as(&mut client, &[7, 7, 23, 0, 0, 0], 0);
        assert_eq!(opened(&mut server, &mut padded), Ok(Opened::Data(2)));
        let mut nothing = sealed_as(&mut client, &[0; 10], 0);
        assert_eq!(opened(&mut server, &mut nothing), Err(Bad(Alert::UnexpectedMessage)));
        let mut change = sealed_as(&mut client, &[1], 20);
        assert_eq!(opened(&mut server, &mut change), Err(Bad(Alert::UnexpectedMessage)));
    }

    fn sealed_as(records: &mut Records, plain: &[u8], kind: u8) -> Vec<u8> {
        let mut record = vec![0; plain.len() + OVERHEAD];
        record[HEADER..HEADER + plain.len()].copy_from_slice(plain);
        records.seal_as(ContentType::from(kind), &mut record).unwrap();
        record
    }

    #[test]
    fn sizes_have_their_bounds() {
        let header = |length: u16| {
            let [high, low] = length.to_be_bytes();
            [23, 3, 3, high, low]
        };
        assert_eq!(whole(&header(16)), Err(Bad(Alert::DecodeError)));
        assert_eq!(whole(&header(16641)), Err(Bad(Alert::RecordOverflow)));
        assert_eq!(whole(&header(16640)), Ok(Whole::Partial));
        assert_eq!(whole(&[22, 3, 3, 0, 30]), Err(Bad(Alert::UnexpectedMessage)));
        assert_eq!(whole(&[20, 3, 3, 0, 1]), Err(Bad(Alert::UnexpectedMessage)));
        let (mut client, mut server) = pair();
        let mut long = sealed(&mut client, &vec![1; PLAIN + 1]);
        assert_eq!(opened(&mut server, &mut long), Err(Bad(Alert::RecordOverflow)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_changed_record_is_refused(
            plain in prop::collection::vec(any::<u8>(), 0..200),
            at in any::<prop::sample::Index>(),
            change in 1u8..,
        ) {
            let (mut client, mut server) = pair();
            let mut record = sealed(&mut client, &plain);
            let at = at.index(record.len() - HEADER) + HEADER;
            record[at] ^= change;
            prop_assert_eq!(opened(&mut server, &mut record), Err(Bad(Alert::BadRecordMac)));
        }

        /// What an authenticated peer may put into records is arbitrary; it is an error or handled.
        #[test]
        fn arbitrary_content_is_no_panic(
            contents in prop::collection::vec((any::<u8>(), prop::collection::vec(0u8..32, 0..12)), 1..6),
        ) {
            let (mut client, mut server) = pair();
            for (kind, content) in contents {
                let mut record = sealed_as(&mut client, &content, kind % 26);
                if opened(&mut server, &mut record).is_err() {
                    break;
                }
            }
        }
    }
}
