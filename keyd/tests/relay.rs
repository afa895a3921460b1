//! Flows through two relays: what one program does is what the other sees.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what went wrong by panicking")]

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use portcullis_keyd::{
    identity::{Authority, Enrolment, Host, ProcessFacts, Validity, client_config, server_config},
    relay::{Event, HandshakeError, How, Relay, Role},
};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

/// Two hosts of one trust domain, each with a relay.
struct Pair {
    folder: TempDir,
    near: Relay,
    far: Relay,
    client: Role,
    server: Role,
    near_events: Mutex<mpsc::Receiver<Event>>,
    far_events: Mutex<mpsc::Receiver<Event>>,
    ids: AtomicU64,
}

fn relay() -> (Relay, Mutex<mpsc::Receiver<Event>>) {
    let (tell, hear) = mpsc::channel();
    let tell = Mutex::new(tell);
    (Relay::new(2, move |event| drop(tell.lock().unwrap().send(event))).unwrap(), Mutex::new(hear))
}

impl Pair {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let now = now.as_secs().cast_signed();
        let mut authority = Authority::init(folder.path(), "example.com".parse().unwrap(), now).unwrap();
        for host in ["h1", "h2"] {
            let out = folder.path().join(host);
            authority.enrol(&host.parse().unwrap(), &Enrolment::default(), &out, now).unwrap();
        }
        let (h1, h2) =
            (Host::load(&folder.path().join("h1")).unwrap(), Host::load(&folder.path().join("h2")).unwrap());
        let shown = |host: &Host| {
            let facts = ProcessFacts {
                exe: "/usr/bin/x".to_owned(),
                sha256: "00".repeat(32),
                user: "u".to_owned(),
                unit: None,
            };
            host.mint(&"x".parse().unwrap(), &facts, Validity::process(now)).unwrap().shown
        };
        let client = Role::Client(Arc::new(client_config(shown(&h1), h2.verifier().unwrap()).unwrap()));
        let server = Role::Server(Arc::new(server_config(shown(&h2), h2.verifier().unwrap()).unwrap()));
        let ((near, near_events), (far, far_events)) = (relay(), relay());
        Self { folder, near, far, client, server, near_events, far_events, ids: AtomicU64::new(0) }
    }

    fn id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// The two programs' ends of a new protected flow, and the wire between the relays.
    fn flow(&self) -> (TcpStream, TcpStream) {
        let (wire_near, wire_far) = connected();
        self.over(wire_near, wire_far)
    }

    fn over(&self, wire_near: TcpStream, wire_far: TcpStream) -> (TcpStream, TcpStream) {
        let ((near, near_plain), (far, far_plain)) = (connected(), connected());
        self.near
            .start(self.id(), ready(wire_near), self.client.clone(), Some(ready(near_plain)), PATIENCE)
            .unwrap();
        self.far
            .start(self.id(), ready(wire_far), self.server.clone(), Some(ready(far_plain)), PATIENCE)
            .unwrap();
        (near, far)
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }
}

fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn ready(socket: TcpStream) -> OwnedFd {
    socket.set_nonblocking(true).unwrap();
    socket.set_nodelay(true).unwrap();
    socket.into()
}

fn next(events: &Mutex<mpsc::Receiver<Event>>) -> Event {
    events.lock().unwrap().recv_timeout(PATIENCE).unwrap()
}

fn ended(events: &Mutex<mpsc::Receiver<Event>>) -> (u64, u64, How) {
    loop {
        match next(events) {
            Event::Ended { sent, received, how, .. } => return (sent, received, how),
            Event::Shaken { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

fn noise(length: usize, mut seed: u64) -> Vec<u8> {
    std::iter::repeat_with(|| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        seed.to_be_bytes()[0]
    })
    .take(length)
    .collect()
}

#[test]
fn bytes_arrive_whole_both_ways_at_once() {
    let pair = Pair::new();
    let (near, far) = pair.flow();
    let (up, down) = (noise(30_000_001, 1), noise(20_000_003, 2));
    std::thread::scope(|scope| {
        for (socket, bytes) in [(&near, &up), (&far, &down)] {
            scope.spawn(move || {
                let mut socket = socket;
                // In pieces of all sizes.
                let mut rest = &bytes[..];
                let mut size = 1;
                while !rest.is_empty() {
                    let (piece, after) = rest.split_at(size.min(rest.len()));
                    socket.write_all(piece).unwrap();
                    (rest, size) = (after, size * 5 % 1_000_003 + 1);
                }
                socket.shutdown(Shutdown::Write).unwrap();
            });
        }
        for (socket, bytes) in [(&near, &down), (&far, &up)] {
            scope.spawn(move || {
                let mut socket = socket;
                let mut got = Vec::new();
                socket.read_to_end(&mut got).unwrap();
                assert!(got == *bytes);
            });
        }
    });
    let (sent, received, how) = ended(&pair.near_events);
    assert_eq!((sent, received), (30_000_001, 20_000_003));
    assert!(matches!(how, How::Closed));
    let (sent, received, how) = ended(&pair.far_events);
    assert_eq!((sent, received), (20_000_003, 30_000_001));
    assert!(matches!(how, How::Closed));
}

#[test]
fn the_handshake_is_told_with_its_cipher_and_exchange() {
    let pair = Pair::new();
    let _flow = pair.flow();
    for events in [&pair.near_events, &pair.far_events] {
        let Event::Shaken { suite, exchange, .. } = next(events) else { panic!() };
        assert_eq!((suite, exchange), ("TLS_AES_128_GCM_SHA256", "X25519MLKEM768"));
    }
}

#[test]
fn one_direction_closes_and_the_other_goes_on() {
    let pair = Pair::new();
    let (mut near, mut far) = pair.flow();
    near.write_all(b"question").unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    let mut got = String::new();
    far.read_to_string(&mut got).unwrap();
    assert_eq!(got, "question");
    std::thread::sleep(Duration::from_millis(50));
    far.write_all(&noise(1_000_000, 3)).unwrap();
    drop(far);
    let mut answer = Vec::new();
    near.read_to_end(&mut answer).unwrap();
    assert!(answer == noise(1_000_000, 3));
    assert!(matches!(ended(&pair.near_events).2, How::Closed));
}

fn reset(socket: TcpStream) {
    let socket = OwnedFd::from(socket);
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Linger, &linger).unwrap();
}

#[test]
fn a_reset_is_a_reset_in_both_directions() {
    let pair = Pair::new();
    for turned in [false, true] {
        let (near, far) = pair.flow();
        let (one, mut other) = if turned { (far, near) } else { (near, far) };
        other.write_all(b"x").unwrap();
        (&one).read_exact(&mut [0]).unwrap();
        reset(one);
        assert_eq!(other.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        let hows = [ended(&pair.near_events).2, ended(&pair.far_events).2];
        assert!(hows.iter().any(|how| matches!(how, How::Program(_))), "{hows:?}");
        assert!(hows.iter().any(|how| matches!(how, How::Peer(_))), "{hows:?}");
    }
}

#[test]
fn a_wire_that_ends_without_close_notify_is_a_reset() {
    let pair = Pair::new();
    let (wire_near, wire_far) = connected();
    let cutter = wire_near.try_clone().unwrap();
    let (mut near, mut far) = pair.over(wire_near, wire_far);
    near.write_all(b"x").unwrap();
    far.read_exact(&mut [0]).unwrap();
    cutter.shutdown(Shutdown::Both).unwrap();
    assert_eq!(far.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(matches!(ended(&pair.far_events).2, How::Truncated));
}

#[test]
fn what_is_changed_on_the_wire_never_reaches_the_program() {
    let pair = Pair::new();
    let ((wire_near, mut a), (mut b, wire_far)) = (connected(), connected());
    let (mut near, mut far) = pair.over(wire_near, wire_far);
    let (mut a2, mut b2) = (a.try_clone().unwrap(), b.try_clone().unwrap());
    std::thread::spawn(move || drop(std::io::copy(&mut b2, &mut a2)));
    let meddle = Arc::new(AtomicU64::new(0));
    let meddling = meddle.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = a.read(&mut buffer) {
            buffer[count - 1] ^= meddling.load(Ordering::Relaxed).to_le_bytes()[0];
            b.write_all(&buffer[..count]).unwrap();
        }
    });
    near.write_all(b"good").unwrap();
    far.read_exact(&mut [0; 4]).unwrap();
    meddle.store(1, Ordering::Relaxed);
    near.write_all(b"evil").unwrap();
    assert_eq!(far.read(&mut [0; 4]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(matches!(ended(&pair.far_events).2, How::Record(_)));
}

#[test]
fn a_cut_resets_both_ends_at_once() {
    let pair = Pair::new();
    let (mut near, mut far) = pair.flow();
    near.write_all(b"x").unwrap();
    far.read_exact(&mut [0]).unwrap();
    let begun = Instant::now();
    pair.near.cut(0);
    assert_eq!(near.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(far.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(begun.elapsed() < Duration::from_millis(100));
    assert!(matches!(ended(&pair.near_events).2, How::Cut));
}

#[test]
fn silence_and_garbage_end_in_time_and_by_name() {
    let pair = Pair::new();
    let (mut silent, wire) = connected();
    pair.far.start(pair.id(), ready(wire), pair.server.clone(), None, Duration::from_millis(200)).unwrap();
    let begun = Instant::now();
    let Event::Failed { error, .. } = next(&pair.far_events) else { panic!() };
    assert!(matches!(error, HandshakeError::TimedOut));
    assert!((200..1000).contains(&begun.elapsed().as_millis()));
    assert!(silent.read(&mut [0]).is_err(), "reset");

    for garbage in [&b"GET / HTTP/1.0\r\n\r\n"[..], &[22, 3, 1, 0xff, 0xff], &noise(200_000, 9)] {
        let (mut peer, wire) = connected();
        pair.far.start(pair.id(), ready(wire), pair.server.clone(), None, PATIENCE).unwrap();
        let _ = peer.write_all(garbage);
        let Event::Failed { error, .. } = next(&pair.far_events) else { panic!() };
        assert!(matches!(error, HandshakeError::Tls(_)), "{error:?}");
    }
    let (peer, wire) = connected();
    pair.far.start(pair.id(), ready(wire), pair.server.clone(), None, PATIENCE).unwrap();
    drop(peer);
    let Event::Failed { error, .. } = next(&pair.far_events) else { panic!() };
    assert!(matches!(error, HandshakeError::Closed | HandshakeError::Socket(_)), "{error:?}");
}

#[test]
fn a_slow_program_bounds_what_is_held_and_loses_nothing() {
    let pair = Pair::new();
    let (near, mut far) = pair.flow();
    let bytes = noise(40_000_000, 5);
    let sent = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for piece in bytes.chunks(100_000) {
                (&near).write_all(piece).unwrap();
                sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
            near.shutdown(Shutdown::Write).unwrap();
        });
        std::thread::sleep(Duration::from_millis(700));
        let held = sent.load(Ordering::Relaxed);
        assert!(held < 30_000_000, "{held} bytes are somewhere");
        let mut got = Vec::new();
        far.read_to_end(&mut got).unwrap();
        assert!(got == bytes);
    });
}

#[test]
fn a_flow_may_wait_for_its_program() {
    let pair = Pair::new();
    let ((wire_near, wire_far), (near, near_plain), (far, far_plain)) =
        (connected(), connected(), connected());
    pair.near.start(0, ready(wire_near), pair.client.clone(), Some(ready(near_plain)), PATIENCE).unwrap();
    pair.far.start(1, ready(wire_far), pair.server.clone(), None, PATIENCE).unwrap();
    assert!(matches!(next(&pair.far_events), Event::Shaken { id: 1, .. }));
    (&near).write_all(b"early").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    pair.far.join(1, ready(far_plain));
    let mut got = [0; 5];
    (&far).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"early");
    (&far).write_all(b"late").unwrap();
    (&near).read_exact(&mut got[..4]).unwrap();
}

#[test]
fn a_thousand_flows_live_side_by_side() {
    let pair = Pair::new();
    let flows: Vec<_> = (0..1000).map(|_| pair.flow()).collect();
    for turn in 0..3_u8 {
        for (at, (near, _)) in flows.iter().enumerate() {
            let mut near = near;
            near.write_all(&[turn, at.to_le_bytes()[0]]).unwrap();
        }
        for (at, (_, far)) in flows.iter().enumerate() {
            let (mut far, mut got) = (far, [0; 2]);
            far.read_exact(&mut got).unwrap();
            assert_eq!(got, [turn, at.to_le_bytes()[0]]);
        }
    }
}

fn openssl(arguments: &[&str]) -> Child {
    Command::new("openssl")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn a_stock_client_gets_in_changes_keys_and_closes() {
    let pair = Pair::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let (crt, key, ca) = (pair.path("h1/host.crt"), pair.path("h1/host.key"), pair.path("h1/ca.crt"));
    let mut client = openssl(&[
        "s_client",
        "-connect",
        &to,
        "-cert",
        &crt,
        "-cert_chain",
        &crt,
        "-key",
        &key,
        "-CAfile",
        &ca,
    ]);
    let (wire, _) = listener.accept().unwrap();
    let (far, plain) = connected();
    pair.far.start(pair.id(), ready(wire), pair.server.clone(), Some(ready(plain)), PATIENCE).unwrap();
    assert!(matches!(next(&pair.far_events), Event::Shaken { exchange: "X25519", .. }));
    let mut stdin = client.stdin.take().unwrap();
    let mut far = std::io::BufReader::new(far);
    // s_client's command K: update the key and ask for an update.
    for line in ["one\n", "K\n", "two\n", "K\n", "three\n"] {
        stdin.write_all(line.as_bytes()).unwrap();
        stdin.flush().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        if line != "K\n" {
            let mut got = String::new();
            std::io::BufRead::read_line(&mut far, &mut got).unwrap();
            assert_eq!(got, line);
            far.get_mut().write_all(format!("got {line}").as_bytes()).unwrap();
        }
    }
    std::thread::sleep(Duration::from_millis(200)); // s_client prints what it has read before it quits
    stdin.write_all(b"Q\n").unwrap();
    let out = client.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(["got one", "got two", "got three"].iter().all(|text| said.contains(text)), "{said}");
    assert_eq!(far.read(&mut [0; 8]).unwrap(), 0, "an orderly end");
}

#[test]
fn a_stock_server_is_reached_tickets_and_all() {
    let pair = Pair::new();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (crt, key, ca) = (pair.path("h2/host.crt"), pair.path("h2/host.key"), pair.path("h2/ca.crt"));
    let port_text = port.to_string();
    let mut server = openssl(&[
        "s_server",
        "-accept",
        &port_text,
        "-cert",
        &crt,
        "-cert_chain",
        &crt,
        "-key",
        &key,
        "-CAfile",
        &ca,
        "-Verify",
        "4",
        "-rev",
    ]);
    let end = Instant::now() + PATIENCE;
    let wire = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(wire) => break wire,
            Err(e) => assert!(Instant::now() < end, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let (mut near, plain) = connected();
    pair.near.start(pair.id(), ready(wire), pair.client.clone(), Some(ready(plain)), PATIENCE).unwrap();
    near.write_all(b"drawer\n").unwrap();
    let mut got = [0; 7];
    near.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"reward\n");
    server.kill().unwrap();
    server.wait().unwrap();
}
