//! TLS 1.3 records once the handshake is over (RFC 8446, 5): protected and opened where they lie.
//!
//! rustls makes the keys and renews them; the bytes go straight from one socket's buffer to the other's.
//! With rustls's own record layer each byte would be copied twice more.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;

/// Bytes before the content of a record.
pub const HEADER: usize = 5;
/// Bytes behind it: its type, and the authentication tag.
pub const TRAILER: usize = 1 + TAG;
/// Most content of one record.
pub const CONTENT: usize = 1 << 14;
/// Length of a full record.
pub const RECORD: usize = HEADER + CONTENT + TRAILER;
/// Most that may stand between the header and the next record (RFC 8446, 5.2).
const LONGEST: usize = CONTENT + 256;
const TAG: usize = 16;

/// What a record contains (RFC 8446, B.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Content {
    /// Alerts.
    Alert = 21,
    /// Handshake messages: new keys, tickets.
    Handshake = 22,
    /// The program's bytes.
    Data = 23,
}

/// Why a record is refused. The connection ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Not an encrypted record of TLS 1.3.
    #[error("no TLS record where one should begin")]
    NoRecord,
    /// Longer than records may be.
    #[error("a TLS record is too long")]
    TooLong,
    /// The tag does not fit: it was changed under way, or its key is another.
    #[error("a TLS record is not authentic")]
    NotAuthentic,
    /// No content type inside.
    #[error("a TLS record has no content type")]
    NoContent,
    /// The key was used as often as it may be, or is none.
    #[error("a TLS key cannot be used")]
    Key,
}

/// One direction's key, and how often it was used.
pub struct Cipher {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
    limit: u64,
}

impl Cipher {
    /// A key as rustls extracts it, with the number of the next record.
    pub fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        // Of the 2^24.5 full records that one key may protect with AES-GCM (RFC 8446, 5.5), two thirds.
        const GCM: u64 = 1 << 24;
        const NEVER: u64 = 1 << 62;
        let (algorithm, key, iv, limit) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv, GCM),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv, GCM),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv, NEVER),
            _ => return Err(RecordError::Key),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| RecordError::Key)?;
        let iv = iv.as_ref().try_into().map_err(|_| RecordError::Key)?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence, limit })
    }

    /// Whether the sender should change keys before the next record.
    pub const fn worn(&self) -> bool {
        self.sequence >= self.limit
    }

    /// Nonce of the next record (RFC 8446, 5.3). No number is used twice: there is no way back.
    fn nonce(&mut self) -> Result<Nonce, RecordError> {
        let mut nonce = self.iv;
        let [_, _, _, _, low @ ..] = &mut nonce;
        for (byte, number) in low.iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(RecordError::Key)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Makes a record of the `length` bytes that stand in `slot` after room for the header. Returns the
    /// record's length; `slot` needs room for header and trailer.
    pub fn seal(&mut self, slot: &mut [u8], length: usize, content: Content) -> Result<usize, RecordError> {
        let (header, rest) = slot.split_first_chunk_mut::<HEADER>().ok_or(RecordError::TooLong)?;
        let protected =
            length.checked_add(TRAILER).filter(|_| length <= CONTENT).ok_or(RecordError::TooLong)?;
        let body = rest.get_mut(..protected).ok_or(RecordError::TooLong)?;
        let (inner, tag) = body.split_last_chunk_mut::<TAG>().ok_or(RecordError::TooLong)?;
        if let Some(kind) = inner.last_mut() {
            *kind = content as u8;
        }
        let [high, low] = u16::try_from(protected).map_err(|_| RecordError::TooLong)?.to_be_bytes();
        *header = [Content::Data as u8, 3, 3, high, low];
        let nonce = self.nonce()?;
        let sealed = self.key.seal_in_place_separate_tag(nonce, Aad::from(*header), inner);
        tag.copy_from_slice(sealed.map_err(|_| RecordError::Key)?.as_ref());
        Ok(HEADER + protected)
    }

    /// Opens a record where it lies; returns its type and how many bytes after the header are content.
    pub fn open(&mut self, record: &mut [u8]) -> Result<(Content, usize), RecordError> {
        let (header, body) = record.split_first_chunk_mut::<HEADER>().ok_or(RecordError::NoRecord)?;
        let (header, nonce) = (*header, self.nonce()?);
        let opened = self.key.open_in_place(nonce, Aad::from(header), body);
        let inner = opened.map_err(|_| RecordError::NotAuthentic)?;
        // The type is the last byte that is not padding.
        let length = inner.iter().rposition(|byte| *byte != 0).ok_or(RecordError::NoContent)?;
        if length > CONTENT {
            return Err(RecordError::TooLong);
        }
        match inner.get(length) {
            Some(21) => Ok((Content::Alert, length)),
            Some(22) => Ok((Content::Handshake, length)),
            Some(23) => Ok((Content::Data, length)),
            _ => Err(RecordError::NoContent),
        }
    }
}

/// Length of the record at the beginning of `bytes`, header included; `None` if its header is not all there.
pub fn length(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some([kind, major, _, high, low]) = bytes.first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    if *kind != Content::Data as u8 || *major != 3 {
        return Err(RecordError::NoRecord);
    }
    if !(TRAILER..=LONGEST).contains(&length) {
        return Err(RecordError::TooLong);
    }
    Ok(Some(HEADER + length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::crypto::cipher::{AeadKey, Iv};

    fn cipher() -> Cipher {
        let key = AeadKey::from([7; 32]);
        Cipher::new((0, ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv: Iv::from([9; 12]) })).unwrap()
    }

    fn sealed(cipher: &mut Cipher, content: &[u8], kind: Content) -> Vec<u8> {
        let mut slot = [&[0; HEADER], content, &[0; TRAILER]].concat();
        let length = cipher.seal(&mut slot, content.len(), kind).unwrap();
        assert_eq!(length, slot.len());
        slot
    }

    #[test]
    fn records_survive_in_order() {
        let (mut near, mut far) = (cipher(), cipher());
        for (content, kind) in
            [(vec![], Content::Data), (vec![1; 1], Content::Alert), (vec![0; CONTENT], Content::Data)]
        {
            let mut record = sealed(&mut near, &content, kind);
            assert_eq!(length(&record), Ok(Some(record.len())));
            assert_eq!(far.open(&mut record), Ok((kind, content.len())));
            assert_eq!(&record[HEADER..HEADER + content.len()], content);
        }
    }

    #[test]
    fn what_was_changed_repeated_or_left_out_is_not_authentic() {
        let mut near = cipher();
        let (first, second) =
            (sealed(&mut near, b"one", Content::Data), sealed(&mut near, b"two", Content::Data));
        for at in 0..first.len() {
            let mut changed = first.clone();
            changed[at] ^= 1;
            assert_eq!(cipher().open(&mut changed), Err(RecordError::NotAuthentic), "{at}");
        }
        assert_eq!(cipher().open(&mut second.clone()), Err(RecordError::NotAuthentic), "left out");
        let mut far = cipher();
        assert!(far.open(&mut first.clone()).is_ok());
        assert_eq!(far.open(&mut first.clone()), Err(RecordError::NotAuthentic), "repeated");
    }

    #[test]
    fn lengths_beyond_the_protocol_are_refused() {
        assert_eq!(length(&[23, 3, 3, 0]), Ok(None));
        assert_eq!(length(&[22, 3, 3, 0, 40]), Err(RecordError::NoRecord));
        assert_eq!(length(b"GET /"), Err(RecordError::NoRecord));
        assert_eq!(length(&[23, 3, 3, 0xff, 0xff]), Err(RecordError::TooLong));
        assert_eq!(length(&[23, 3, 3, 0, 16]), Err(RecordError::TooLong));
        assert_eq!(length(&[23, 3, 3, 0x41, 0x00]), Ok(Some(HEADER + LONGEST)));
        let mut slot = vec![0; RECORD + 1];
        assert_eq!(cipher().seal(&mut slot, CONTENT + 1, Content::Data), Err(RecordError::TooLong));
        assert_eq!(cipher().seal(&mut slot[..30], 20, Content::Data), Err(RecordError::TooLong));
    }
}
