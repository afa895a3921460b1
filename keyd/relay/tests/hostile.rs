//! Peers that mean harm: bounded in time, number and memory, and beside the point for honest ones.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "what fails in a test shall stop it"
)]
mod common;

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::*;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
use portcullis_relay::{Ending, Engine, Event, Failure, How, Limits, Role, ServerSide};

/// These tests count descriptors and time of the whole process, so one runs after the other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Waits until so few descriptors are open.
fn settle(most: usize) -> usize {
    let until = Instant::now() + Duration::from_secs(10);
    while descriptors() > most && Instant::now() < until {
        thread::sleep(Duration::from_millis(20));
    }
    descriptors()
}

/// How many are open once what an earlier test has left is closed: its threads may still be at it.
fn at_rest() -> usize {
    let (mut open, mut since) = (descriptors(), Instant::now());
    while since.elapsed() < Duration::from_millis(300) {
        thread::sleep(Duration::from_millis(20));
        if descriptors() != open {
            (open, since) = (descriptors(), Instant::now());
        }
    }
    open
}

fn connect_from(from: Ipv4Addr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket: OwnedFd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::from((from, 0))))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(TcpStream::from(socket))
}

/// A server whose every verdict is yes, in front of an echo. Stops when dropped.
struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    displaced: Arc<AtomicUsize>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Server {
    fn start(side: ServerSide, limits: Limits, mixed: Option<Duration>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let engine = Arc::new(Engine::start(limits).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let displaced = Arc::new(AtomicUsize::new(0));
        let accepting = {
            let (engine, stop) = (Arc::clone(&engine), Arc::clone(&stop));
            thread::spawn(move || {
                for outer in listener.incoming().flatten() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    engine.handshake(outer.into(), Role::Server { side: side.clone(), mixed });
                }
            })
        };
        let deciding = {
            let (stop, displaced) = (Arc::clone(&stop), Arc::clone(&displaced));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match event_within(&engine, Duration::from_millis(50)) {
                        Some(Event::Ready { id, .. }) => {
                            let (mut far, inner) = tcp_pair();
                            engine.splice(id, inner.into());
                            thread::spawn(move || {
                                let mut room = [0; 4096];
                                while let Ok(count @ 1..) = far.read(&mut room) {
                                    if far.write_all(&room[..count]).is_err() {
                                        return;
                                    }
                                }
                            });
                        }
                        Some(Event::Failed { failure: Failure::Displaced, .. }) => {
                            displaced.fetch_add(1, Ordering::Relaxed);
                        }
                        _ => {}
                    }
                }
            })
        };
        Self { address, stop, displaced, threads: vec![accepting, deciding] }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _wake = TcpStream::connect(self.address);
        for thread in self.threads.drain(..) {
            let _done = thread.join();
        }
    }
}

/// One honest association, from handshake to echo.
fn honest(engine: &Engine, domain: &Domain, leaf: &Leaf, to: SocketAddr) -> Result<(), String> {
    let outer = TcpStream::connect(to).map_err(|error| error.to_string())?;
    engine.handshake(outer.into(), Role::Client { side: domain.client(leaf, true), name: name() });
    let id = loop {
        match event(engine) {
            Event::Ready { id, .. } => break id,
            Event::Closed { .. } => {}
            other => return Err(format!("{other:?}")),
        }
    };
    let (mut near, inner) = tcp_pair();
    near.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    engine.splice(id, inner.into());
    near.write_all(b"hello").map_err(|error| error.to_string())?;
    let mut back = [0; 5];
    near.read_exact(&mut back).map_err(|error| error.to_string())?;
    Ok(())
}

/// What each kind of attacker does with a connection; `true` keeps it open.
type Attack = fn(&mut TcpStream, usize) -> bool;

fn never_sends(_: &mut TcpStream, _: usize) -> bool {
    true
}

/// The start of a ClientHello of 512 bytes, and then a byte now and again.
fn drips(stream: &mut TcpStream, round: usize) -> bool {
    let start: &[u8] = if round == 0 { &[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3] } else { &[7] };
    stream.write_all(start).is_ok()
}

fn garbage(stream: &mut TcpStream, _: usize) -> bool {
    stream.write_all(&noise(11, 3000)).is_ok()
}

/// A record that announces more than a record may hold.
fn oversized(stream: &mut TcpStream, _: usize) -> bool {
    stream.write_all(&[22, 3, 3, 255, 255]).and_then(|()| stream.write_all(&[0; 70_000])).is_ok()
}

/// Whole records of one handshake message that never ends.
fn endless(stream: &mut TcpStream, _: usize) -> bool {
    let mut record = vec![22, 3, 3, 0x40, 0, 1, 0, 255, 255];
    record.resize(5 + (1 << 14), 0);
    (0..8).all(|_| stream.write_all(&record).is_ok())
}

/// A true ClientHello again and again: the server signs, the attacker does not read.
fn hello_only(stream: &mut TcpStream, _: usize) -> bool {
    let config = rustls::ClientConfig::builder_with_provider(portcullis_relay::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name()).unwrap();
    client.write_tls(stream).is_ok()
}

#[test]
fn honest_peers_are_served_while_others_attack() {
    let _alone = alone();
    let domain = Domain::new();
    let leaf = domain.leaf(NAME);
    let limits = Limits {
        threads: 1,
        handshakes: 512,
        handshakes_per_peer: 64,
        handshake_time: Duration::from_secs(20),
        ..Limits::default()
    };
    let server = Server::start(domain.server(&leaf), limits, None);
    let to = server.address;
    let stop = Arc::new(AtomicBool::new(false));
    let attempts = Arc::new(AtomicUsize::new(0));
    // While one honest peer is served, each attacker comes at most this often, however busy the machine is: not so
    // often that all who may shake hands at once came after the honest one.
    const EACH: usize = 30;
    let served = Arc::new(AtomicUsize::new(0));
    let attacks: [Attack; 6] = [never_sends, drips, garbage, oversized, endless, hello_only];
    // Each from an address of its own, but for the first, which shares that of the honest.
    let attackers: Vec<_> = attacks
        .into_iter()
        .zip(1..)
        .map(|(attack, last)| {
            let (stop, attempts, served) = (Arc::clone(&stop), Arc::clone(&attempts), Arc::clone(&served));
            thread::spawn(move || {
                let (mut held, mut round, mut came) = (Vec::new(), 0, 0);
                while !stop.load(Ordering::Relaxed) {
                    let now = served.load(Ordering::Relaxed);
                    came = if now == round { came + 1 } else { 0 };
                    round = now;
                    if came > EACH {
                        thread::sleep(Duration::from_millis(1));
                        continue;
                    }
                    if let Ok(mut stream) = connect_from(Ipv4Addr::new(127, 0, 0, last), to) {
                        stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
                        attempts.fetch_add(1, Ordering::Relaxed);
                        if attack(&mut stream, 0) {
                            held.push(stream);
                        }
                    }
                    if held.len() > 300 {
                        held.drain(..100);
                    }
                    if let Some(stream) = held.last_mut() {
                        let _gone = std::ptr::fn_addr_eq(attack, drips as Attack) && drips(stream, 1);
                    }
                    thread::sleep(Duration::from_millis(2));
                }
            })
        })
        .collect();
    thread::sleep(Duration::from_millis(500));
    let engine = Engine::start(common::limits(1)).unwrap();
    // Until it was an attack worth the name.
    let mut results = Vec::new();
    while results.len() < 200 || attempts.load(Ordering::Relaxed) < 1000 {
        results.push(honest(&engine, &domain, &leaf, to));
        served.store(results.len(), Ordering::Relaxed);
        assert!(results.len() < 10_000, "nobody attacks");
    }
    stop.store(true, Ordering::Relaxed);
    for attacker in attackers {
        attacker.join().unwrap();
    }
    let refused: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    assert!(server.displaced.load(Ordering::Relaxed) > 0, "bounds were reached");
    let [failed, all] = [refused.len(), results.len()];
    assert!(failed * 100 <= all, "{failed} of {all}: {refused:?}");
}

#[test]
fn a_bound_is_one_for_all_threads() {
    const MOST: usize = 8;
    const ALL: usize = 40;
    let _alone = alone();
    let domain = Domain::new();
    let side = domain.server(&domain.leaf(NAME));
    let engine = Engine::start(Limits { handshakes_per_peer: MOST, ..common::limits(3) }).unwrap();
    let pairs: Vec<_> = (0..ALL).map(|_| tcp_pair()).collect();
    let mut silent = Vec::new();
    for (one, other) in pairs {
        engine.handshake(other.into(), Role::Server { side: side.clone(), mixed: None });
        silent.push(one);
    }
    for _ in MOST..ALL {
        let event = event(&engine);
        assert!(matches!(event, Event::Failed { failure: Failure::Displaced, .. }), "{event:?}");
    }
    let more = event_within(&engine, Duration::from_millis(200));
    assert!(more.is_none(), "{more:?}: so many may wait");
}

#[test]
fn a_silent_peer_is_dropped_in_time() {
    let _alone = alone();
    let domain = Domain::new();
    let limits = Limits {
        handshake_time: Duration::from_millis(300),
        verdict_time: Duration::from_millis(300),
        ..common::limits(1)
    };
    let engine = Engine::start(limits).unwrap();
    let side = domain.server(&domain.leaf(NAME));
    let (mut one, other) = tcp_pair();
    let began = Instant::now();
    engine.handshake(other.into(), Role::Server { side: side.clone(), mixed: None });
    one.write_all(&[22, 3, 1]).unwrap();
    assert!(matches!(event(&engine), Event::Failed { failure: Failure::TooSlow, .. }));
    assert!(began.elapsed() < Duration::from_secs(15), "the time is not the one that was set");
    // A server that never answers our client.
    let (_one, other) = tcp_pair();
    let client = domain.client(&domain.leaf(NAME), true);
    engine.handshake(other.into(), Role::Client { side: client, name: name() });
    assert!(matches!(event(&engine), Event::Failed { failure: Failure::TooSlow, .. }));
    // An owner that never decides.
    let (_one, other) = tcp_pair();
    engine.handshake(other.into(), Role::Plain);
    assert!(matches!(event(&engine), Event::Ready { .. }));
    assert!(matches!(event(&engine), Event::Failed { failure: Failure::NoVerdict, .. }));
}

#[test]
fn a_handshake_may_hold_so_much_and_no_more() {
    let _alone = alone();
    let domain = Domain::new();
    let engine = Engine::start(Limits { handshake_bytes: 1000, ..common::limits(1) }).unwrap();
    let (mut one, other) = tcp_pair();
    engine.handshake(other.into(), Role::Server { side: domain.server(&domain.leaf(NAME)), mixed: None });
    // Reset before all of it is sent, or after.
    let _either = endless(&mut one, 0);
    let failed = event(&engine);
    assert!(
        matches!(&failed, Event::Failed { failure: Failure::TooMuch | Failure::Tls(_), .. }),
        "{failed:?}"
    );
}

#[test]
fn a_mixed_port_tells_plain_from_tls_in_time() {
    let _alone = alone();
    let domain = Domain::new();
    let leaf = domain.leaf(NAME);
    let wait = Duration::from_millis(200);
    let server = Server::start(domain.server(&leaf), common::limits(1), Some(wait));
    let exchange = |first: &[u8], pause: Duration| {
        let began = Instant::now();
        let mut plain = TcpStream::connect(server.address).unwrap();
        plain.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        thread::sleep(pause);
        plain.write_all(first).unwrap();
        let mut back = vec![0; first.len()];
        plain.read_exact(&mut back).unwrap();
        assert_eq!(back, first);
        plain.shutdown(Shutdown::Write).unwrap();
        assert_eq!(plain.read(&mut back).unwrap(), 0, "the end comes back");
        began.elapsed()
    };
    // A machine with other things to do may be late at times, not always.
    let quickest = (0..10).map(|_| exchange(b"USER anonymous\r\n", Duration::ZERO)).min();
    assert!(quickest < Some(wait), "{quickest:?}");
    // One that says nothing at first is plain after the wait, and so is a lone byte that might begin TLS.
    exchange(b"late", wait * 2);
    assert!(exchange(&[22], Duration::ZERO) >= wait);
    let engine = Engine::start(common::limits(1)).unwrap();
    honest(&engine, &domain, &leaf, server.address).unwrap();
}

#[test]
fn nothing_is_left_of_what_was_cancelled() {
    let _alone = alone();
    let domain = Domain::new();
    let leaf = domain.leaf(NAME);
    let (client_side, server_side) = (domain.client(&leaf, true), domain.server(&leaf));
    let before = at_rest();
    // What its owner leaves undecided ends as well.
    let limits = Limits { verdict_time: Duration::from_secs(1), ..common::limits(1) };
    let client = Engine::start(limits).unwrap();
    let server = Engine::start(limits).unwrap();
    let engines = descriptors();
    for round in 0..60 {
        let (one, other) = tcp_pair();
        let near = client.handshake(one.into(), Role::Client { side: client_side.clone(), name: name() });
        if round % 6 == 0 {
            client.refuse(near, How::Reset);
        }
        let far = server.handshake(other.into(), Role::Server { side: server_side.clone(), mixed: None });
        match round % 6 {
            1 => server.refuse(far, How::Denied),
            2 => server.cut(far, How::Reset),
            _ => {}
        }
        if round % 6 < 3 {
            continue;
        }
        loop {
            match event(&server) {
                Event::Ready { id, .. } if id == far => break,
                // An earlier one may have been ready before it was cancelled.
                Event::Ready { .. } | Event::Failed { .. } | Event::Closed { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        let (program, inner) = tcp_pair();
        match round % 6 {
            3 => server.refuse(far, How::Denied),
            4 => {
                server.splice(far, inner.into());
                server.cut(far, How::Denied);
            }
            _ => {
                server.splice(far, inner.into());
                drop(program);
                // A second verdict, and one for nobody.
                let (_, inner) = tcp_pair();
                server.splice(far, inner.into());
                client.cut(near, How::Reset);
            }
        }
    }
    assert_eq!(settle(engines), engines);
    drop((client, server));
    assert!(settle(before) <= before);
}

#[test]
fn an_engine_dropped_in_the_middle_leaves_nothing() {
    let _alone = alone();
    let before = at_rest();
    {
        let pair = pair();
        let _writing = thread::spawn({
            let mut near = pair.near.try_clone().unwrap();
            move || while near.write_all(&[1; 65536]).is_ok() {}
        });
        thread::sleep(Duration::from_millis(100));
        drop(pair.server);
        let ended = event(&pair.client);
        assert!(matches!(ended, Event::Closed { ending: Ending::PeerReset, .. }), "{ended:?}");
    }
    assert!(settle(before) <= before);
}
