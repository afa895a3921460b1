//! What a program sees of its socket while two engines stand in between.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "what fails in a test shall stop it"
)]

mod common;

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
    time::Duration,
};

use common::*;
use nix::{
    libc::linger,
    sys::socket::{MsgFlags, send, setsockopt, sockopt},
};
use portcullis_relay::{Ending, Engine, Event, Failure, How, Role};

fn reset(socket: TcpStream) {
    setsockopt(&socket.as_fd(), sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 }).unwrap();
}

fn closed(engine: &Engine) -> (Ending, u64, u64) {
    match event(engine) {
        Event::Closed { ending, bytes_in, bytes_out, .. } => (ending, bytes_in, bytes_out),
        other => panic!("{other:?}"),
    }
}

fn end_of(socket: &mut TcpStream) -> Result<usize, ErrorKind> {
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).map_err(|error| error.kind())
}

#[test]
fn bytes_arrive_whole_in_both_directions_at_once() {
    const SIZE: usize = 32 << 20;
    let pair = pair();
    let sent = [
        send_all(pair.near.try_clone().unwrap(), noise(1, SIZE)),
        send_all(pair.far.try_clone().unwrap(), noise(2, SIZE)),
    ];
    let got = [receive_all(pair.far), receive_all(pair.near)];
    for thread in sent {
        thread.join().unwrap();
    }
    for (thread, seed) in got.into_iter().zip([1, 2]) {
        assert!(thread.join().unwrap().unwrap() == noise(seed, SIZE), "bytes differ");
    }
    let size = SIZE as u64;
    assert_eq!(closed(&pair.client), (Ending::Complete, size, size));
    assert_eq!(closed(&pair.server), (Ending::Complete, size, size));
}

#[test]
fn each_direction_ends_for_itself() {
    let mut pair = pair();
    pair.near.write_all(b"question").unwrap();
    pair.near.shutdown(Shutdown::Write).unwrap();
    let mut question = String::new();
    pair.far.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    std::thread::sleep(Duration::from_millis(50));
    pair.far.write_all(b"answer").unwrap();
    drop(pair.far);
    let mut answer = String::new();
    pair.near.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    assert_eq!(closed(&pair.client), (Ending::Complete, 6, 8));
    assert_eq!(closed(&pair.server), (Ending::Complete, 8, 6));
}

#[test]
fn a_reset_at_one_end_is_a_reset_at_the_other() {
    let mut one = pair();
    reset(one.near);
    assert_eq!(end_of(&mut one.far), Err(ErrorKind::ConnectionReset));
    assert_eq!(closed(&one.client).0, Ending::ProgramReset);
    assert_eq!(closed(&one.server).0, Ending::PeerReset);

    let mut other = pair();
    reset(other.far);
    assert_eq!(end_of(&mut other.near), Err(ErrorKind::ConnectionReset));
}

#[test]
fn data_before_a_reset_is_still_read() {
    let mut pair = pair();
    pair.near.write_all(b"last words").unwrap();
    let mut words = [0; 10];
    pair.far.read_exact(&mut words).unwrap();
    assert_eq!(&words, b"last words");
    reset(pair.near);
    assert_eq!(end_of(&mut pair.far), Err(ErrorKind::ConnectionReset));
}

#[test]
fn a_reset_after_the_writers_end_arrives_too() {
    let mut pair = pair();
    pair.near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(pair.far.read(&mut [0; 1]).unwrap(), 0);
    reset(pair.far);
    assert_eq!(end_of(&mut pair.near), Err(ErrorKind::ConnectionReset));
}

#[test]
fn writing_to_a_closed_program_is_answered_by_reset() {
    let mut pair = pair();
    drop(pair.far);
    assert_eq!(pair.near.read(&mut [0; 1]).unwrap(), 0);
    // As natively: the end was read already, so the reset shows at the next write.
    let error = loop {
        match pair.near.write_all(b"too late") {
            Ok(()) => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    assert_eq!(closed(&pair.client).0, Ending::PeerReset);
    assert_eq!(closed(&pair.server).0, Ending::ProgramReset);
}

#[test]
fn urgent_data_stays_in_its_place_in_the_stream() {
    let mut pair = pair();
    pair.near.write_all(b"ab").unwrap();
    send(std::os::fd::AsRawFd::as_raw_fd(&pair.near), b"!", MsgFlags::MSG_OOB).unwrap();
    pair.near.write_all(b"cd").unwrap();
    let mut bytes = [0; 5];
    pair.far.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ab!cd");
}

#[test]
fn a_slow_reader_stops_the_writer() {
    let mut pair = pair();
    pair.near.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let chunk = noise(3, 1 << 20);
    let mut sent = 0;
    // More than every buffer on the way may hold, kernel's included.
    while sent < 256 << 20 {
        match pair.near.write(&chunk) {
            Ok(count) => sent += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    assert!(sent < 128 << 20, "{sent} bytes went nowhere");
    let mut got = vec![0; sent];
    pair.far.read_exact(&mut got).unwrap();
    let mut due = chunk.iter().cycle();
    let mut at = 0;
    // Partial writes continue with the chunk's start.
    while at < sent {
        let piece = (sent - at).min(chunk.len());
        let _ = due.next();
        if got[at..at + piece] != chunk[..piece] {
            break;
        }
        at += piece;
    }
    assert!(at > 0);
}

#[test]
fn a_cut_resets_both_programs() {
    let mut pair = pair();
    pair.client.cut(pair.client_id, How::Reset);
    assert_eq!(closed(&pair.client).0, Ending::Cut);
    assert_eq!(end_of(&mut pair.near), Err(ErrorKind::ConnectionReset));
    assert_eq!(end_of(&mut pair.far), Err(ErrorKind::ConnectionReset));
}

#[test]
fn a_denying_cut_tells_the_peer_why() {
    let mut pair = pair();
    pair.server.cut(pair.server_id, How::Denied);
    assert_eq!(end_of(&mut pair.near), Err(ErrorKind::ConnectionReset));
    assert_eq!(end_of(&mut pair.far), Err(ErrorKind::ConnectionReset));
    assert_eq!(closed(&pair.client).0, Ending::PeerAlert(49));
}

#[test]
fn dropping_the_engine_resets_the_programs() {
    let mut pair = pair();
    drop(pair.client);
    assert_eq!(end_of(&mut pair.near), Err(ErrorKind::ConnectionReset));
    assert_eq!(end_of(&mut pair.far), Err(ErrorKind::ConnectionReset));
}

#[test]
fn many_streams_at_once_are_each_whole_on_whichever_thread_they_are() {
    const SIZE: usize = 1 << 20;
    let domain = Domain::new();
    let (client, server) = (Engine::start(limits(3)).unwrap(), Engine::start(limits(3)).unwrap());
    let leaf = domain.leaf(NAME);
    let sides = (domain.client(&leaf, true), domain.server(&leaf));
    let joined: Vec<_> = (0..8).map(|_| join(&client, &server, &sides.0, &sides.1)).collect();
    let threads: Vec<_> = joined
        .iter()
        .zip(1..)
        .map(|((near, far, ..), seed)| {
            let (mut near, mut far) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            let sent = std::thread::spawn(move || near.write_all(&noise(seed, SIZE)).unwrap());
            let got = std::thread::spawn(move || {
                let mut bytes = vec![0; SIZE];
                far.read_exact(&mut bytes).unwrap();
                bytes
            });
            (sent, got, seed)
        })
        .collect();
    for (sent, got, seed) in threads {
        sent.join().unwrap();
        assert!(got.join().unwrap() == noise(seed, SIZE), "bytes differ");
    }
    // The engine has each, wherever it is.
    for (mut near, mut far, client_id, _) in joined {
        far.write_all(b"x").unwrap();
        near.read_exact(&mut [0]).unwrap();
        client.report(client_id);
        let told = event(&client);
        assert!(
            matches!(told, Event::Traffic { id, bytes_in: 1, bytes_out, .. } if id == client_id && bytes_out == SIZE as u64),
            "{told:?}"
        );
        client.cut(client_id, How::Reset);
        assert_eq!(closed(&client), (Ending::Cut, 1, SIZE as u64));
        assert_eq!(end_of(&mut near), Err(ErrorKind::ConnectionReset));
        assert_eq!(end_of(&mut far), Err(ErrorKind::ConnectionReset));
        assert_eq!(closed(&server), (Ending::PeerReset, SIZE as u64, 1));
        client.report(client_id);
    }
    assert!(event_within(&client, Duration::from_millis(100)).is_none(), "nothing is told of what is over");
}

#[test]
fn a_refusal_at_the_far_end_is_a_failed_connect() {
    let domain = Domain::new();
    let (client, server) = (Engine::start(limits(1)).unwrap(), Engine::start(limits(1)).unwrap());
    let leaf = domain.leaf(NAME);
    for how in [How::Denied, How::Reset] {
        let (one, other) = tcp_pair();
        client.handshake(one.into(), Role::Client { side: domain.client(&leaf, true), name: name() });
        let id = server.handshake(other.into(), Role::Server { side: domain.server(&leaf), mixed: None });
        assert!(matches!(event(&server), Event::Ready { .. }));
        server.refuse(id, how);
        let failed = event(&client);
        match how {
            How::Denied => assert!(
                matches!(
                    &failed,
                    Event::Failed {
                        failure: Failure::Tls(rustls::Error::AlertReceived(
                            rustls::AlertDescription::AccessDenied
                        )),
                        ..
                    }
                ),
                "{failed:?}"
            ),
            How::Reset => {
                assert!(matches!(&failed, Event::Failed { failure: Failure::Reset, .. }), "{failed:?}");
            }
        }
    }
}

#[test]
fn a_refused_certificate_is_shown_at_the_end_that_refused_it() {
    let (ours, theirs) = (Domain::new(), Domain::new());
    let (client, server) = (Engine::start(limits(1)).unwrap(), Engine::start(limits(1)).unwrap());
    let (one, other) = tcp_pair();
    let stranger = theirs.leaf("evil.org");
    client.handshake(one.into(), Role::Client { side: ours.client(&stranger, true), name: name() });
    server.handshake(other.into(), Role::Server { side: ours.server(&ours.leaf(NAME)), mixed: None });
    match event(&server) {
        Event::Failed { failure: Failure::Tls(rustls::Error::InvalidCertificate(_)), shown, .. } => {
            assert_eq!(shown, stranger.chain);
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        event(&client),
        Event::Failed { failure: Failure::Tls(rustls::Error::AlertReceived(_)), .. }
    ));
}

#[test]
fn a_refused_connect_keeps_its_errno() {
    let domain = Domain::new();
    let engine = Engine::start(limits(1)).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::SOCK_NONBLOCK,
        None,
    )
    .unwrap();
    let address = nix::sys::socket::SockaddrStorage::from(port);
    let _in_progress = nix::sys::socket::connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address);
    let side = domain.client(&domain.leaf(NAME), true);
    engine.handshake(socket, Role::Client { side, name: name() });
    let failed = event(&engine);
    assert!(
        matches!(failed, Event::Failed { failure: Failure::Connect(nix::libc::ECONNREFUSED), .. }),
        "{failed:?}"
    );
}
