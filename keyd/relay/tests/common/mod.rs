//! Certificates, engines and sockets for the tests.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "what fails in a test shall stop it"
)]
#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use portcullis_relay::{ClientSide, Engine, Event, Id, Limits, Role, ServerSide, provider};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{
    RootCertStore,
    client::WebPkiServerVerifier,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    server::WebPkiClientVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
};

/// One trust domain: a root, a host that it certifies, and what that host certifies.
pub struct Domain {
    pub root: CertifiedIssuer<'static, KeyPair>,
    pub host: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate with its chain and key.
pub struct Leaf {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: KeyPair,
    /// Itself, and its issuer.
    pub pem: [String; 2],
}

pub const NAME: &str = "h1.example.com";

impl Domain {
    pub fn new() -> Self {
        let authority = |name: &str| {
            let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params
        };
        let root = CertifiedIssuer::self_signed(authority("root"), KeyPair::generate().unwrap()).unwrap();
        let host =
            CertifiedIssuer::signed_by(authority("host"), KeyPair::generate().unwrap(), &root).unwrap();
        Self { root, host }
    }

    pub fn leaf(&self, name: &str) -> Leaf {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let leaf = params.signed_by(&key, &self.host).unwrap();
        let pem = [leaf.pem(), self.host.pem()];
        Leaf { chain: vec![leaf.der().clone(), self.host.der().clone()], key, pem }
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.der().clone()).unwrap();
        Arc::new(roots)
    }

    pub fn client(&self, leaf: &Leaf, confirm: bool) -> ClientSide {
        let verifier = WebPkiServerVerifier::builder_with_provider(self.roots(), provider()).build().unwrap();
        ClientSide::new(verifier, Arc::new(SingleCertAndKey::from(leaf.certified())), confirm).unwrap()
    }

    pub fn server(&self, leaf: &Leaf) -> ServerSide {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots(), provider()).build().unwrap();
        ServerSide::new(verifier, Arc::new(SingleCertAndKey::from(leaf.certified()))).unwrap()
    }
}

impl Leaf {
    pub fn certified(&self) -> CertifiedKey {
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).unwrap();
        let key = provider().key_provider.load_private_key(key).unwrap();
        CertifiedKey::new(self.chain.clone(), key)
    }
}

pub fn limits(threads: usize) -> Limits {
    Limits { threads, ..Limits::default() }
}

/// A connected pair of TCP sockets over loopback.
pub fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    (one, other)
}

/// Waits for the next event.
pub fn event(engine: &Engine) -> Event {
    event_within(engine, Duration::from_secs(20)).expect("an event in time")
}

pub fn event_within(engine: &Engine, time: Duration) -> Option<Event> {
    let until = Instant::now() + time;
    loop {
        if let Some(event) = engine.next_event() {
            return Some(event);
        }
        let left = until.checked_duration_since(Instant::now())?;
        let mut ready = [PollFd::new(engine.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::try_from(left).unwrap()).unwrap();
    }
}

/// Two engines with one association between them, and the program's socket at each end.
pub struct Pair {
    pub client: Engine,
    pub server: Engine,
    pub client_id: Id,
    pub server_id: Id,
    pub near: TcpStream,
    pub far: TcpStream,
}

pub fn name() -> ServerName<'static> {
    ServerName::try_from(NAME).unwrap()
}

pub fn pair() -> Pair {
    let domain = Domain::new();
    // With two threads, what carries much goes from one to the other.
    let (client, server) = (Engine::start(limits(2)).unwrap(), Engine::start(limits(2)).unwrap());
    let leaf = domain.leaf(NAME);
    let (near, far, client_id, server_id) =
        join(&client, &server, &domain.client(&leaf, true), &domain.server(&leaf));
    Pair { client, server, client_id, server_id, near, far }
}

/// One association between two engines that do nothing else.
pub fn join(
    client: &Engine,
    server: &Engine,
    client_side: &ClientSide,
    server_side: &ServerSide,
) -> (TcpStream, TcpStream, Id, Id) {
    let (one, other) = tcp_pair();
    let client_id = client.handshake(one.into(), Role::Client { side: client_side.clone(), name: name() });
    let server_id = server.handshake(other.into(), Role::Server { side: server_side.clone(), mixed: None });
    let (far, inner) = tcp_pair();
    let ready = event(server);
    assert!(
        matches!(&ready, Event::Ready { id, tls: Some(tls) } if *id == server_id && tls.certificates.len() == 2),
        "{ready:?}"
    );
    server.splice(server_id, inner.into());
    let ready = event(client);
    assert!(matches!(&ready, Event::Ready { id, tls: Some(_) } if *id == client_id), "{ready:?}");
    let (near, inner) = tcp_pair();
    client.splice(client_id, inner.into());
    for socket in [&near, &far] {
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.set_nodelay(true).unwrap();
    }
    (near, far, client_id, server_id)
}

/// A stream of bytes that differ by seed and place.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Writes all and then ends the direction.
pub fn send_all(mut to: TcpStream, bytes: Vec<u8>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        to.write_all(&bytes).unwrap();
        to.shutdown(std::net::Shutdown::Write).unwrap();
    })
}

/// Reads to the end.
pub fn receive_all(mut from: TcpStream) -> std::thread::JoinHandle<std::io::Result<Vec<u8>>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).map(|_| bytes)
    })
}
