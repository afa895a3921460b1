//! One handshake over byte buffers: rustls, fed one record at a time, so that nothing after the handshake is
//! taken from the stream. No sockets here.

use std::mem;

use rustls::{
    CommonState, Error, HandshakeKind,
    client::UnbufferedClientConnection,
    crypto::tls13::OkmBlock,
    pki_types::{CertificateDer, ServerName},
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};

use crate::{
    exporter::Exporter,
    hello,
    record::{Bad, HEADER, LARGEST, Records, Role},
    secrets::{Secrets, Traffic},
    sides::{CONFIRM, ClientSide, ServerSide},
};

/// What both ends agreed on, and whom they showed.
#[derive(Debug)]
#[non_exhaustive]
pub struct Established {
    /// The peer's chain as it was verified, leaf first.
    pub certificates: Vec<CertificateDer<'static>>,
    /// Cipher suite by its IANA name.
    pub cipher: String,
    /// Key exchange by its IANA name.
    pub kex: String,
    /// Proved by a ticket of the same session, instead of certificates.
    pub resumed: bool,
    /// Keys for other lanes, of the same two ends.
    pub exporter: Option<Exporter>,
}

/// Where a handshake stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Progress {
    /// The peer must send more.
    Waiting,
    /// Keys are agreed; [`Handshake::finish`] is next, once all output is sent.
    Done,
}

enum Connection {
    /// And whether tickets are kept for others of its session.
    Client(Box<UnbufferedClientConnection>, bool),
    /// Which configuration serves depends on the ClientHello.
    Asked(ServerSide),
    Server(Box<UnbufferedServerConnection>),
}

pub(crate) struct Handshake {
    connection: Connection,
    incoming: Vec<u8>,
    /// So much of `incoming` is whole records that rustls may see.
    visible: usize,
    /// What waits to be sent.
    pub(crate) outgoing: Vec<u8>,
    secrets: Secrets,
}

/// All that remains of a handshake.
pub(crate) struct Finished {
    pub(crate) records: Records,
    pub(crate) established: Established,
    /// What came after the handshake, still sealed.
    pub(crate) rest: Vec<u8>,
    /// Whether the accepting end says when its verdict is in.
    pub(crate) confirm: bool,
}

/// What one call into rustls asked for.
enum Asked {
    Again,
    More,
    Traffic,
    Failed(Error),
}

impl Handshake {
    pub(crate) fn client(side: &ClientSide, name: ServerName<'static>) -> Result<Self, Error> {
        let connection = UnbufferedClientConnection::new(side.config(), name)?;
        Ok(Self::new(Connection::Client(Box::new(connection), side.is_for_session())))
    }

    pub(crate) fn server(side: ServerSide) -> Self {
        Self::new(Connection::Asked(side))
    }

    fn new(connection: Connection) -> Self {
        let secrets = Secrets::default();
        Self { connection, incoming: Vec::new(), visible: 0, outgoing: Vec::new(), secrets }
    }

    /// Whether a server has seen a ClientHello.
    pub(crate) fn has_heard(&self) -> bool {
        matches!(self.connection, Connection::Server(_))
    }

    /// Takes what the peer sent.
    pub(crate) fn receive(&mut self, bytes: &[u8]) {
        self.incoming.extend_from_slice(bytes);
    }

    /// Goes on as far as what was received allows.
    ///
    /// # Errors
    /// When the handshake has failed; the alert for the peer is then in `outgoing`.
    pub(crate) fn advance(&mut self) -> Result<Progress, Error> {
        loop {
            match self.step() {
                Asked::Again => {}
                Asked::Traffic if self.state().is_some_and(|state| !state.is_handshaking()) => {
                    return Ok(Progress::Done);
                }
                Asked::More | Asked::Traffic => {
                    let Some(length) = next_record(self.incoming.get(self.visible..).unwrap_or_default())
                    else {
                        return Ok(Progress::Waiting);
                    };
                    self.visible += length;
                }
                Asked::Failed(error) => {
                    // The alert is given out first. Not one call more: rustls would look for the rest of
                    // a message in bytes that it has let go.
                    while self.state().is_some_and(CommonState::wants_write) {
                        if !matches!(self.step(), Asked::Again) {
                            break;
                        }
                    }
                    return Err(error);
                }
            }
        }
    }

    fn step(&mut self) -> Asked {
        if let Connection::Asked(side) = &self.connection {
            if self.visible == 0 {
                return Asked::More;
            }
            let confirm = hello::offers_confirm(&self.incoming);
            match UnbufferedServerConnection::new(side.config(confirm)) {
                Ok(connection) => self.connection = Connection::Server(Box::new(connection)),
                Err(error) => return Asked::Failed(error),
            }
        }
        let seen = self.incoming.get_mut(..self.visible).unwrap_or_default();
        let (discard, asked) = match &mut self.connection {
            Connection::Client(client, _) => answer(client.process_tls_records(seen), &mut self.outgoing),
            Connection::Server(server) => answer(server.process_tls_records(seen), &mut self.outgoing),
            Connection::Asked(_) => (0, Asked::More),
        };
        self.secrets.add_last();
        let discard = discard.min(self.visible);
        self.incoming.drain(..discard);
        self.visible -= discard;
        asked
    }

    fn state(&self) -> Option<&CommonState> {
        match &self.connection {
            Connection::Client(client, _) => Some(client),
            Connection::Server(server) => Some(server),
            Connection::Asked(_) => None,
        }
    }

    /// Turns a handshake that is `Done` into the association's records.
    ///
    /// # Errors
    /// When it is not done, or the provider's keys are none that we know.
    pub(crate) fn finish(mut self) -> Result<Finished, Error> {
        let Secrets { client, server, exporter } = mem::take(&mut self.secrets);
        let state = self.state().ok_or(Error::HandshakeNotComplete)?;
        let certificates = state.peer_certificates().unwrap_or_default();
        let certificates = certificates.iter().map(|one| one.clone().into_owned()).collect();
        let suite = state.negotiated_cipher_suite().ok_or(Error::HandshakeNotComplete)?;
        let group = state.negotiated_key_exchange_group().ok_or(Error::HandshakeNotComplete)?;
        let established = Established {
            certificates,
            cipher: iana(format!("{:?}", suite.suite())),
            kex: format!("{:?}", group.name()),
            resumed: state.handshake_kind() == Some(HandshakeKind::Resumed),
            exporter: suite.tls13().zip(exporter).map(|(suite, secret)| Exporter::new(suite, secret)),
        };
        let confirm = state.alpn_protocol() == Some(CONFIRM);
        if self.visible != 0 {
            return Err(Error::HandshakeNotComplete);
        }
        let rest = mem::take(&mut self.incoming);
        let traffic =
            |secret: Option<OkmBlock>| suite.tls13().zip(secret).map(|(suite, it)| Traffic::new(suite, it));
        let (client, server) = traffic(client).zip(traffic(server)).ok_or(Error::HandshakeNotComplete)?;
        let records = match self.connection {
            Connection::Client(connection, for_session) => {
                let (keys, kernel) = connection.dangerous_into_kernel_connection()?;
                let session = for_session.then(|| Box::new(kernel));
                Records::new((keys.tx, client), (keys.rx, server), Role::Client(session))
            }
            Connection::Server(connection) => {
                let (keys, _) = connection.dangerous_into_kernel_connection()?;
                Records::new((keys.tx, server), (keys.rx, client), Role::Server)
            }
            Connection::Asked(_) => return Err(Error::HandshakeNotComplete),
        };
        let records = records.map_err(|Bad(_)| Error::General("keys of an unknown kind".into()))?;
        Ok(Finished { records, established, rest, confirm })
    }
}

/// rustls writes `TLS13_`, the registry `TLS_`.
fn iana(name: String) -> String {
    name.strip_prefix("TLS13_").map_or(name.clone(), |rest| format!("TLS_{rest}"))
}

/// Handles one status: output is appended to `out`.
fn answer<Data>(status: UnbufferedStatus<'_, '_, Data>, out: &mut Vec<u8>) -> (usize, Asked) {
    let asked = match status.state {
        Err(error) => Asked::Failed(error),
        Ok(ConnectionState::EncodeTlsData(mut encode)) => {
            let mut written = Ok(0);
            let start = out.len();
            // The first call says how much room is needed.
            if let Err(EncodeError::InsufficientSize(size)) = encode.encode(&mut []) {
                out.resize(start + size.required_size, 0);
                written = encode.encode(out.get_mut(start..).unwrap_or_default());
            }
            match written {
                Ok(length) => {
                    out.truncate(start + length);
                    Asked::Again
                }
                Err(error) => Asked::Failed(Error::General(error.to_string())),
            }
        }
        Ok(ConnectionState::TransmitTlsData(transmit)) => {
            transmit.done();
            Asked::Again
        }
        Ok(ConnectionState::BlockedHandshake) => Asked::More,
        Ok(ConnectionState::WriteTraffic(_)) => Asked::Traffic,
        // Early data is not offered, and traffic is not fed.
        Ok(_) => Asked::Failed(Error::General("traffic within the handshake".into())),
    };
    (status.discard, asked)
}

/// The length of the first record in `bytes`, header included, or `None` when it is not whole.
///
/// What can be no record is given to rustls as it is, which finds the right alert.
fn next_record(bytes: &[u8]) -> Option<usize> {
    let [kind, major, _, high, low, ..] = bytes else {
        return match bytes {
            [kind, ..] if !(20..=23).contains(kind) => Some(bytes.len()),
            _ => None,
        };
    };
    let length = HEADER + usize::from(u16::from_be_bytes([*high, *low]));
    if !(20..=23).contains(kind) || *major != 3 || length > LARGEST {
        return Some(bytes.len());
    }
    (bytes.len() >= length).then_some(length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{ends, shake};

    #[test]
    fn a_handshake_does_not_care_how_its_bytes_are_cut() {
        for piece in [1, 2, 5, 100, 1 << 16] {
            let (client, server) = ends(true);
            let (client, server) = shake(client, server, piece);
            assert!(client.confirm && server.confirm);
            assert_eq!(client.established.cipher, "TLS_AES_128_GCM_SHA256");
            assert_eq!(server.established.kex, "X25519MLKEM768");
            assert_eq!(client.established.certificates, server.established.certificates);
        }
    }

    #[test]
    fn without_the_name_nobody_waits() {
        let (client, server) = ends(false);
        let (client, server) = shake(client, server, 1000);
        assert!(!client.confirm && !server.confirm);
    }

    #[test]
    fn what_follows_the_handshake_is_left_alone() {
        let (mut client, mut server) = ends(false);
        server.receive(&mem::take(&mut client.outgoing));
        assert_eq!(server.advance(), Ok(Progress::Waiting));
        client.receive(&mem::take(&mut server.outgoing));
        assert_eq!(client.advance(), Ok(Progress::Done));
        let flight = mem::take(&mut client.outgoing);
        let mut records = client.finish().unwrap().records;
        let mut early = Vec::new();
        records.alert(crate::record::Alert::CloseNotify, &mut early).unwrap();
        server.receive(&flight);
        server.receive(&early);
        assert_eq!(server.advance(), Ok(Progress::Done));
        assert_eq!(server.finish().unwrap().rest, early);
    }

    #[test]
    fn garbage_is_answered_by_an_alert() {
        let (_, mut server) = ends(false);
        server.receive(b"GET / HTTP/1.0\r\n\r\n");
        server.advance().unwrap_err();
        assert_eq!(server.outgoing.first(), Some(&21));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever a peer sends in place of its first or second flight, nobody panics.
        #[test]
        fn a_spoilt_flight_is_an_error_and_no_panic(
            second in any::<bool>(),
            spoil in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in any::<prop::sample::Index>(),
            piece in 1usize..2000,
        ) {
            let (mut client, mut server) = ends(true);
            if second {
                server.receive(&mem::take(&mut client.outgoing));
                server.advance().unwrap();
                client.receive(&mem::take(&mut server.outgoing));
                client.advance().unwrap();
            }
            let mut flight = mem::take(&mut client.outgoing);
            for (at, value) in spoil {
                let at = at.index(flight.len());
                flight[at] ^= value;
            }
            flight.truncate(1 + cut.index(flight.len()));
            for part in flight.chunks(piece) {
                server.receive(part);
                if server.advance().is_err() {
                    break;
                }
            }
        }

        /// The same for a server that is hostile to a client.
        #[test]
        fn a_spoilt_answer_is_an_error_and_no_panic(
            spoil in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            piece in 1usize..2000,
        ) {
            let (mut client, mut server) = ends(true);
            server.receive(&mem::take(&mut client.outgoing));
            server.advance().unwrap();
            let mut flight = mem::take(&mut server.outgoing);
            for (at, value) in spoil {
                let at = at.index(flight.len());
                flight[at] ^= value;
            }
            for part in flight.chunks(piece) {
                client.receive(part);
                if client.advance().is_err() {
                    break;
                }
            }
        }

        #[test]
        fn arbitrary_bytes_are_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), header in any::<bool>()) {
            let (mut client, mut server) = ends(true);
            if header {
                server.receive(&[22, 3, 1, 1, 0]);
                client.receive(&[22, 3, 3, 1, 0]);
            }
            server.receive(&bytes);
            client.receive(&bytes);
            let _error_or_more = server.advance();
            let _error_or_more = client.advance();
        }
    }
}
