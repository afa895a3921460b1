//! Peers that flood, stall, babble and bomb, while honest ones come and go.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test says what went wrong by panicking")]

#[cfg(test)]
mod common;

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{
    Daemon, ip,
    world::{FAR, NEAR, World, far, open, raw},
};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, getsockopt, socket, sockopt,
    },
    unistd::Pid,
};
use portcullis_wire::keyd::Kind;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, pki_types::CertificateDer, pki_types::pem::PemObject,
};

/// Connections that attackers keep open.
const OPEN: usize = 900;
/// Where they come from; the first is the honest host's own address.
const FROM: [&str; 4] = [NEAR, "10.99.0.101", "10.99.0.102", "10.99.0.103"];
/// Honest connections.
const HONEST: usize = 100;

/// What one attacker's connection does.
#[derive(Clone, Copy, Debug)]
enum Attack {
    /// Nothing.
    Silent,
    /// One byte of a ClientHello at a time.
    Slow,
    /// No TLS.
    Garbage,
    /// A record longer than any.
    Oversized,
    /// A ClientHello, and never an answer.
    Stalls,
    /// Ends its direction, and keeps the other.
    HalfOpen,
    /// Goes at once.
    Leaves,
}

const ATTACKS: [Attack; 7] = [
    Attack::Silent,
    Attack::Slow,
    Attack::Garbage,
    Attack::Oversized,
    Attack::Stalls,
    Attack::HalfOpen,
    Attack::Leaves,
];

/// Who shows this chain, whatever it is worth, and believes anybody.
fn client(chain: Vec<CertificateDer<'static>>) -> Arc<ClientConfig> {
    let config = ClientConfig::builder_with_provider(portcullis_relay::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(RootCertStore::empty());
    let key = rcgen::KeyPair::generate().unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut config = match chain.is_empty() {
        true => config.with_no_client_auth(),
        // Without checking that the key fits.
        false => {
            let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&key).unwrap();
            let shown = rustls::sign::CertifiedKey::new(chain, key);
            config.with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(shown)))
        }
    };
    config.dangerous().set_certificate_verifier(Arc::new(Anybody));
    Arc::new(config)
}

#[derive(Debug)]
struct Anybody;

impl rustls::client::danger::ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

fn hello() -> Vec<u8> {
    let mut connection = ClientConnection::new(client(Vec::new()), "h2".try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).unwrap();
    bytes
}

fn from(address: &str) -> Option<TcpStream> {
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let own: SocketAddr = format!("{address}:0").parse().unwrap();
    bind(fd.as_raw_fd(), &SockaddrStorage::from(own)).ok()?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(far(2121))).ok()?;
    let stream = TcpStream::from(fd);
    stream.set_nonblocking(true).ok()?;
    Some(stream)
}

/// Keeps [`OPEN`] hostile connections going until told to stop; how many there were.
fn attack(stop: &AtomicBool, made: &AtomicUsize) {
    let hello = hello();
    let mut held: Vec<(Attack, TcpStream, usize)> = Vec::new();
    let mut next = 0;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..50 {
            if held.len() >= OPEN {
                break;
            }
            next += 1;
            let kind = ATTACKS[next % ATTACKS.len()];
            let Some(mut stream) = from(FROM[next / ATTACKS.len() % FROM.len()]) else { break };
            made.fetch_add(1, Ordering::Relaxed);
            let _gone = match kind {
                Attack::Silent | Attack::Slow => Ok(()),
                Attack::Garbage => stream.write_all(&[0xa5; 4096]),
                Attack::Oversized => {
                    stream.write_all(&[22, 3, 1, 0xff, 0xff]).and_then(|()| stream.write_all(&[1; 60_000]))
                }
                Attack::Stalls => stream.write_all(&hello),
                Attack::HalfOpen => stream.shutdown(Shutdown::Write),
                Attack::Leaves => continue,
            };
            held.push((kind, stream, 0));
        }
        held.retain_mut(|(kind, stream, sent)| {
            if let (Attack::Slow, Some(byte)) = (*kind, hello.get(*sent)) {
                *sent += 1;
                if stream.write_all(std::slice::from_ref(byte)).is_err() {
                    return false;
                }
            }
            let mut answer = [0; 4096];
            match stream.read(&mut answer) {
                Ok(0) => false,
                Ok(_) => true,
                Err(e) => e.kind() == ErrorKind::WouldBlock,
            }
        });
        thread::sleep(Duration::from_millis(20));
    }
}

/// Shows chains that are much longer than any handshake may be.
fn bomb(stop: &AtomicBool, chain: &[CertificateDer<'static>], made: &AtomicUsize) {
    let config = client(chain.to_vec());
    while !stop.load(Ordering::Relaxed) {
        let Some(mut stream) = from(FROM[1]) else { continue };
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut connection = ClientConnection::new(config.clone(), "h2".try_into().unwrap()).unwrap();
        while connection.complete_io(&mut stream).is_ok_and(|(read, _)| read > 0) {}
        made.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(5));
    }
}

/// KiB that a process holds.
fn resident(pid: Pid) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn descriptors(pid: Pid) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Admits whom a daemon shows, until the program's connection has its result.
fn settle(world: &mut World, fd: &OwnedFd, within: Duration) -> i32 {
    let end = Instant::now() + within;
    while Instant::now() < end {
        for daemon in [&mut world.far, &mut world.near] {
            answer(daemon);
        }
        if nix::sys::socket::getpeername::<SockaddrStorage>(fd.as_raw_fd()).is_ok() {
            return 0;
        }
        let errno = getsockopt(fd, sockopt::SocketError).unwrap();
        if errno != 0 {
            return errno;
        }
    }
    libc::ETIMEDOUT
}

fn answer(daemon: &mut Daemon) {
    daemon.receive(Duration::from_millis(2));
    while let Some((kind, head, _)) = daemon.reports.pop_front() {
        if kind == Kind::Shown {
            // It may be over by now.
            daemon.ask(Kind::Admit, head.tag, 0, &[], &[]).unwrap();
        }
    }
}

/// A program of each side with a connection between them, if they get it.
fn honest(world: &mut World, listener: &TcpListener) -> Option<(TcpStream, TcpStream)> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    let (_, places) = open(&mut world.near, &fd, far(2121)).unwrap();
    let connecting = connect(fd.as_raw_fd(), &raw(&places.inner_remote));
    assert_eq!(connecting, Err(Errno::EINPROGRESS));
    if settle(world, &fd, Duration::from_secs(10)) != 0 {
        return None;
    }
    let (near, (accepted, _)) = (TcpStream::from(fd), listener.accept().unwrap());
    near.set_nonblocking(false).unwrap();
    pass_a_word(&near, &accepted);
    Some((near, accepted))
}

fn pass_a_word(mut near: &TcpStream, mut far: &TcpStream) {
    far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    near.write_all(b"x").unwrap();
    far.read_exact(&mut [0]).unwrap();
}

#[test]
fn a_broker_that_does_not_listen_keeps_no_flow_waiting() {
    let mut world = World::new();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let (near, accepted) = honest(&mut world, &listener).expect("a flow");
    // Each of them is to be told of, until nobody is taken any more.
    let to = far(2121);
    let mut strangers = Vec::new();
    while let Ok(mut stranger) = TcpStream::connect_timeout(&to, Duration::from_millis(300)) {
        let _gone = stranger.write_all(&[0xa5; 64]);
        strangers.push(stranger);
        assert!(strangers.len() < 20_000, "they are taken without end");
    }
    for _ in 0..100 {
        pass_a_word(&near, &accepted);
    }
    // It listens again: it is told, and others are served. (The last of them may not have come further than the backlog.)
    let mut told = 0;
    let end = Instant::now() + Duration::from_secs(20);
    while told < strangers.len() / 2 && Instant::now() < end {
        world.far.receive(Duration::from_millis(20));
        let over = |(kind, ..): &(Kind, _, _)| *kind == Kind::Over;
        told += world.far.reports.drain(..).filter(over).count();
    }
    assert!(told >= strangers.len() / 2, "{told} of {}", strangers.len());
    // Those come from the same address: while many are under way, one more may have to make room.
    assert!((0..20).any(|_| honest(&mut world, &listener).is_some()));
}

#[test]
fn honest_programs_are_served_while_others_attack() {
    let mut world = World::new();
    for address in &FROM[1..] {
        ip(&["address", "add", &format!("{address}/24"), "dev", "wire"]);
    }
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let idle = (resident(world.far.pid), descriptors(world.far.pid));
    // A chain of 150 real certificates, none of them ours.
    let stranger = tempfile::tempdir().unwrap();
    let mut other =
        portcullis_keyd::identity::Authority::init(stranger.path(), "other.org".parse().unwrap(), 1).unwrap();
    let out = stranger.path().join("h");
    other.enrol(&"h".parse().unwrap(), &Default::default(), &out, 1).unwrap();
    let one = CertificateDer::from_pem_file(out.join("issuer.crt")).unwrap();
    let chain = vec![one; 150];

    let (stop, made, bombs) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let (mut served, mut slowest, mut largest) = (0, Duration::ZERO, 0);
    thread::scope(|scope| {
        scope.spawn(|| attack(&stop, &made));
        scope.spawn(|| bomb(&stop, &chain, &bombs));
        let grown = Instant::now() + Duration::from_secs(20);
        while made.load(Ordering::Relaxed) < OPEN && Instant::now() < grown {
            answer(&mut world.far);
        }
        for _ in 0..HONEST {
            let begun = Instant::now();
            served += usize::from(honest(&mut world, &listener).is_some());
            slowest = slowest.max(begun.elapsed());
            largest = largest.max(resident(world.far.pid));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let (made, bombs) = (made.into_inner(), bombs.into_inner());
    assert!(made > OPEN && bombs > 10, "{made} attacks, {bombs} bombs");
    assert!(served >= HONEST * 95 / 100, "{served} of {HONEST}, the slowest after {slowest:?}");
    let grown = largest.saturating_sub(idle.0);
    assert!(grown < 64 << 10, "{grown} KiB more than {} at rest", idle.0);
    // Nothing stays.
    let end = Instant::now() + Duration::from_secs(40);
    while descriptors(world.far.pid) > idle.1 + 8 && Instant::now() < end {
        answer(&mut world.far);
    }
    assert!(descriptors(world.far.pid) <= idle.1 + 8, "{} of {}", descriptors(world.far.pid), idle.1);
}
