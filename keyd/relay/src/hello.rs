//! What the first bytes of a connection tell before any of it is believed. Pure.

use crate::sides::CONFIRM;

/// What has begun on a port that serves TLS and plain peers alike.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Beginning {
    Tls,
    Plain,
    /// Too few bytes to tell.
    Unclear,
}

/// Tells a TLS handshake record (type 22, major version 3: RFC 8446, section 5.1) from anything else.
pub(crate) fn beginning(bytes: &[u8]) -> Beginning {
    match bytes {
        [] | [22] => Beginning::Unclear,
        [22, 3, ..] => Beginning::Tls,
        _ => Beginning::Plain,
    }
}

/// Whether the ClientHello in `record` offers [`CONFIRM`] by ALPN (RFC 7301, section 3.1).
///
/// Anything that cannot be read does not; rustls will refuse it with the right alert.
pub(crate) fn offers_confirm(record: &[u8]) -> bool {
    extensions(record).is_some_and(|extensions| offers(extensions).unwrap_or(false))
}

/// ALPN's extension number (RFC 7301, section 6).
const ALPN: u16 = 16;

fn offers(mut extensions: &[u8]) -> Option<bool> {
    while !extensions.is_empty() {
        let (kind, rest) = number(extensions)?;
        let (body, rest) = sized16(rest)?;
        if kind == ALPN {
            let (mut names, _) = sized16(body)?;
            while !names.is_empty() {
                let (name, rest) = sized8(names)?;
                if name == CONFIRM {
                    return Some(true);
                }
                names = rest;
            }
            return Some(false);
        }
        extensions = rest;
    }
    Some(false)
}

/// The extensions of a ClientHello that lies whole in its first record.
fn extensions(record: &[u8]) -> Option<&[u8]> {
    // record header; message type 1 and length; version, random
    let [22, 3, _, _, _, 1, _, _, _, body @ ..] = record else { return None };
    let (_, body) = body.split_at_checked(2 + 32)?;
    let (_session, body) = sized8(body)?;
    let (_suites, body) = sized16(body)?;
    let (_compression, body) = sized8(body)?;
    Some(sized16(body)?.0)
}

fn number(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    Some((u16::from_be_bytes(*number), rest))
}

fn sized16(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = number(bytes)?;
    rest.split_at_checked(usize::from(length))
}

fn sized8(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first()?;
    rest.split_at_checked(usize::from(*length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::ends;

    #[test]
    fn a_client_hello_is_told_from_plain_protocols() {
        assert_eq!(beginning(&[22, 3, 1]), Beginning::Tls);
        assert_eq!(beginning(&[22]), Beginning::Unclear);
        assert_eq!(beginning(b""), Beginning::Unclear);
        for plain in [&b"USER anonymous"[..], b"\x16\x02", b"\x80\x2e\x01\x03", b"S", b"\0"] {
            assert_eq!(beginning(plain), Beginning::Plain);
        }
    }

    #[test]
    fn the_offer_is_found_where_rustls_puts_it() {
        assert!(offers_confirm(&ends(true).0.outgoing));
        assert!(!offers_confirm(&ends(false).0.outgoing));
    }

    proptest! {
        #[test]
        fn a_cut_or_spoilt_hello_is_no_panic(
            at in any::<prop::sample::Index>(), value in any::<u8>(), length in any::<prop::sample::Index>(),
        ) {
            let mut hello = ends(true).0.outgoing;
            let place = at.index(hello.len());
            hello[place] = value;
            hello.truncate(length.index(hello.len()));
            let _either = offers_confirm(&hello);
        }
    }
}
