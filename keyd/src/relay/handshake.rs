//! Drives rustls through a handshake, and takes the keys from it.

use std::sync::Arc;

use rustls::{
    ClientConfig, ExtractedSecrets, ServerConfig,
    client::{ClientConnectionData, UnbufferedClientConnection},
    kernel::KernelConnection,
    pki_types::{IpAddr, Ipv4Addr, ServerName},
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};

use super::record::{Cipher, RecordError};

/// Most bytes of a flight that has not been understood; a handshake message of rustls ends at 64 KiB.
pub const LONGEST_FLIGHT: usize = 96 * 1024;

/// Why there was no handshake.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// TLS refused; the reason is rustls's or, for certificates, the verifier's.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// The keys cannot be used.
    #[error(transparent)]
    Key(#[from] RecordError),
    /// The peer closed before it was over.
    #[error("the peer closed before the handshake was over")]
    Closed,
    /// The peer sends more than a handshake has.
    #[error("the peer sent more than a handshake has")]
    TooMuch,
    /// A bug in TLS.
    #[error("the TLS library failed")]
    Panicked,
    /// Its time was over.
    #[error("the handshake took too long")]
    TimedOut,
    /// The socket failed.
    #[error("the connection failed during the handshake")]
    Socket(#[source] std::io::Error),
}

enum Side {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// A handshake under way.
pub struct Handshake {
    side: Side,
    /// Came in and is not understood yet.
    pub incoming: Vec<u8>,
    /// To be sent.
    pub outgoing: Vec<u8>,
    /// What came with the end of the handshake and rustls opened already.
    early: Early,
}

/// Data of the program, and whether nothing follows it.
#[derive(Default)]
pub struct Early {
    pub data: Vec<u8>,
    pub closed: bool,
}

/// What keeps the keys renewable.
pub enum Renewal {
    Client(Box<KernelConnection<ClientConnectionData>>),
    Server(Box<KernelConnection<ServerConnectionData>>),
}

/// What a finished handshake leaves.
pub struct Keys {
    pub seal: Cipher,
    pub open: Cipher,
    pub renewal: Renewal,
    /// Bytes behind the handshake, still protected.
    pub incoming: Vec<u8>,
    /// What came behind the handshake, already opened.
    pub early: Early,
    /// As `cipher` and `kex` in the audit log.
    pub suite: &'static str,
    pub exchange: &'static str,
}

fn name(debug: impl std::fmt::Debug) -> &'static str {
    match format!("{debug:?}").as_str() {
        "TLS13_AES_128_GCM_SHA256" => "TLS_AES_128_GCM_SHA256",
        "TLS13_AES_256_GCM_SHA384" => "TLS_AES_256_GCM_SHA384",
        "TLS13_CHACHA20_POLY1305_SHA256" => "TLS_CHACHA20_POLY1305_SHA256",
        "X25519MLKEM768" => "X25519MLKEM768",
        "X25519" => "X25519",
        _ => "other",
    }
}

impl Handshake {
    /// The connecting side.
    pub fn client(config: Arc<ClientConfig>) -> Result<Self, HandshakeError> {
        // Names are the verifier's business, and none is sent.
        let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0, 0, 0, 0])));
        Ok(Self::new(Side::Client(UnbufferedClientConnection::new(config, name)?)))
    }

    /// The accepting side.
    pub fn server(config: Arc<ServerConfig>) -> Result<Self, HandshakeError> {
        Ok(Self::new(Side::Server(UnbufferedServerConnection::new(config)?)))
    }

    fn new(side: Side) -> Self {
        Self { side, incoming: Vec::new(), outgoing: Vec::new(), early: Early::default() }
    }

    /// Works through `incoming` and fills `outgoing`. `true` once the handshake is over.
    ///
    /// # Errors
    /// [`HandshakeError::Tls`]; `outgoing` then holds the alert that tells the peer.
    pub fn advance(&mut self) -> Result<bool, HandshakeError> {
        if self.incoming.len() > LONGEST_FLIGHT {
            return Err(HandshakeError::TooMuch);
        }
        let result = self.step();
        if result.is_err() {
            // rustls has an alert for the peer; nothing else comes of this connection. What it has not
            // discarded must still be there: it remembers places in it.
            let _alert = self.step();
        }
        result
    }

    /// A panic in rustls would end the thread, and with it the flows of others.
    fn step(&mut self) -> Result<bool, HandshakeError> {
        let Self { side, incoming, outgoing, early } = self;
        let step = || match side {
            Side::Client(tls) => {
                work(incoming, outgoing, early, |bytes, step| step(tls.process_tls_records(bytes)))
            }
            Side::Server(tls) => {
                work(incoming, outgoing, early, |bytes, step| step(tls.process_tls_records(bytes)))
            }
        };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(step)).unwrap_or(Err(HandshakeError::Panicked))
    }

    /// The keys, once [`Self::advance`] said that it is over and `outgoing` was sent.
    pub fn finish(self) -> Result<Keys, HandshakeError> {
        let Self { side, incoming, early, .. } = self;
        let (suite, exchange) = match &side {
            Side::Client(tls) => (tls.negotiated_cipher_suite(), tls.negotiated_key_exchange_group()),
            Side::Server(tls) => (tls.negotiated_cipher_suite(), tls.negotiated_key_exchange_group()),
        };
        let suite = suite.map_or("other", |suite| name(suite.suite()));
        let exchange = exchange.map_or("other", |group| name(group.name()));
        let (ExtractedSecrets { tx, rx }, renewal) = match side {
            Side::Client(tls) => {
                let (secrets, kernel) = tls.dangerous_into_kernel_connection()?;
                (secrets, Renewal::Client(Box::new(kernel)))
            }
            Side::Server(tls) => {
                let (secrets, kernel) = tls.dangerous_into_kernel_connection()?;
                (secrets, Renewal::Server(Box::new(kernel)))
            }
        };
        Ok(Keys { seal: Cipher::new(tx)?, open: Cipher::new(rx)?, renewal, incoming, early, suite, exchange })
    }
}

impl Renewal {
    /// The next key of the direction that sends.
    pub fn next_seal(&mut self) -> Result<Cipher, HandshakeError> {
        Ok(Cipher::new(match self {
            Self::Client(kernel) => kernel.update_tx_secret()?,
            Self::Server(kernel) => kernel.update_tx_secret()?,
        })?)
    }

    /// The next key of the direction that receives.
    pub fn next_open(&mut self) -> Result<Cipher, HandshakeError> {
        Ok(Cipher::new(match self {
            Self::Client(kernel) => kernel.update_rx_secret()?,
            Self::Server(kernel) => kernel.update_rx_secret()?,
        })?)
    }
}

/// What one step of rustls calls for.
enum Step {
    Again,
    Wait,
    Over,
    Closed,
}

fn work<D>(
    incoming: &mut Vec<u8>,
    outgoing: &mut Vec<u8>,
    early: &mut Early,
    mut process: impl FnMut(
        &mut [u8],
        &mut dyn FnMut(UnbufferedStatus<'_, '_, D>) -> (usize, Result<Step, rustls::Error>),
    ) -> (usize, Result<Step, rustls::Error>),
) -> Result<bool, HandshakeError> {
    loop {
        let mut step = |status: UnbufferedStatus<'_, '_, D>| {
            let UnbufferedStatus { discard, state, .. } = status;
            let step = state.map(|state| match state {
                ConnectionState::EncodeTlsData(mut data) => {
                    encode(&mut |room| data.encode(room), outgoing);
                    Step::Again
                }
                ConnectionState::TransmitTlsData(data) => {
                    data.done(); // the caller sends all of `outgoing` before anything else
                    Step::Again
                }
                ConnectionState::ReadTraffic(mut data) => {
                    while let Some(Ok(record)) = data.next_record() {
                        early.data.extend_from_slice(record.payload);
                    }
                    Step::Again
                }
                ConnectionState::WriteTraffic(_) => Step::Over,
                ConnectionState::BlockedHandshake => Step::Wait,
                ConnectionState::PeerClosed => {
                    early.closed = true;
                    Step::Again
                }
                // Early data is not offered, and nothing was closed by us.
                _ => Step::Closed,
            });
            (discard, step)
        };
        let (discard, stepped) = process(incoming.as_mut_slice(), &mut step);
        incoming.drain(..discard.min(incoming.len()));
        match stepped? {
            Step::Again => {}
            Step::Wait => return Ok(false),
            Step::Over => return Ok(true),
            Step::Closed => return Err(HandshakeError::Closed),
        }
    }
}

fn encode(data: &mut dyn FnMut(&mut [u8]) -> Result<usize, EncodeError>, outgoing: &mut Vec<u8>) {
    let end = outgoing.len();
    let mut room = 8 * 1024;
    loop {
        outgoing.resize(end + room, 0);
        match data(outgoing.get_mut(end..).unwrap_or_default()) {
            Ok(length) => return outgoing.truncate(end + length),
            Err(EncodeError::InsufficientSize(needed)) if needed.required_size > room => {
                room = needed.required_size
            }
            Err(_) => return outgoing.truncate(end),
        }
    }
}
