//! Related channels: legal between the two ends of one association, proved by key, while it lives.

#![expect(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[cfg(test)]
mod common;

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use common::{
    Daemon,
    world::{
        FAR, NEAR, PROCESS, World, admit, admit_one, blocking, far, over, over_of, placed, raw, result,
        serve_as, shown,
    },
};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, listen, socket,
    },
};
use portcullis_keyd::identity::{Host, ProcessFacts, Validity};
use portcullis_wire::{
    Addr,
    keyd::{Kind, Open},
};
use rustls::{ClientConfig, ClientConnection, StreamOwned, sign::SingleCertAndKey};
use zerocopy::{FromZeros, IntoBytes};

/// The process, as one that belongs to an association.
fn of(id: u64) -> Vec<u8> {
    format!(r#"{{"name":"x","exe":"/usr/bin/x","sha256":"00","user":"u","of":{id}}}"#).into_bytes()
}

/// The process, as one that begins sessions.
const RELATED: &[u8] = br#"{"name":"x","exe":"/usr/bin/x","sha256":"00","user":"u","related":true}"#;

/// One word of what a broker is told of a peer.
fn word(told: &str, key: &str) -> String {
    let (_, rest) = told.split_once(&format!(r#""{key}":"#)).unwrap();
    rest.split([',', '}']).next().unwrap().trim_matches('"').to_owned()
}

fn stream() -> OwnedFd {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap()
}

/// A program's listener, as it makes it and as its broker has it protected; `fd` is of the daemon's host.
fn serving(daemon: &mut Daemon, at: &str, fd: OwnedFd, process: &[u8]) -> TcpListener {
    bind(fd.as_raw_fd(), &SockaddrStorage::from(at.parse::<SocketAddr>().unwrap())).unwrap();
    assert_eq!(serve_as(daemon, &fd, process), 0);
    listen(&fd, Backlog::new(16).unwrap()).unwrap();
    let listener = TcpListener::from(fd);
    listener.set_nonblocking(false).unwrap();
    listener
}

fn opening(daemon: &mut Daemon, to: SocketAddr, process: &[u8]) -> Result<(u64, OwnedFd), i32> {
    let fd = stream();
    let ask = Open { remote: Addr::from(to), ..Open::new_zeroed() };
    let body = [ask.as_bytes(), process].concat();
    let answer = daemon.ask(Kind::Open, 0, 0, &body, &[fd.as_fd()]).unwrap();
    if answer.head.errno != 0 {
        return Err(answer.head.errno);
    }
    let places = zerocopy::FromBytes::read_from_bytes(&answer.rest).unwrap();
    let portcullis_wire::keyd::Places { inner_remote, .. } = places;
    assert_eq!(connect(fd.as_raw_fd(), &raw(&inner_remote)), Err(Errno::EINPROGRESS));
    Ok((answer.head.tag, fd))
}

/// A control association: its number at each end, the programs' sockets, and what each broker was told.
struct Control {
    near: u64,
    far: u64,
    client: TcpStream,
    served: TcpStream,
    told: [String; 2],
}

fn control(world: &mut World, listener: &TcpListener) -> Control {
    let (near, client) = opening(&mut world.near, far(2121), RELATED).unwrap();
    let (far, far_told) = shown(&mut world.far);
    admit_one(&mut world.far, far);
    let (near_told, _) = admit(&mut world.near);
    assert_eq!(result(&client), 0);
    let (mut served, _) = listener.accept().unwrap();
    // As every control channel does: something is said before a data channel is wanted.
    served.write_all(b"220 ready\r\n").unwrap();
    let mut client = blocking(client);
    client.read_exact(&mut [0; 11]).unwrap();
    Control { near, far, client, served, told: [near_told, far_told] }
}

fn exchange(client: OwnedFd, listener: &TcpListener) {
    assert_eq!(result(&client), 0);
    let (mut served, _) = listener.accept().unwrap();
    served.write_all(b"data").unwrap();
    drop(served);
    let mut got = Vec::new();
    blocking(client).read_to_end(&mut got).unwrap();
    assert_eq!(got, b"data");
}

fn on_far(world: &World) -> OwnedFd {
    world.on_far(stream)
}

#[test]
fn data_channels_show_what_their_control_channel_showed() {
    let mut world = World::new();
    let fd = on_far(&world);
    let listener = serving(&mut world.far, &format!("{FAR}:2121"), fd, RELATED);
    let control = control(&mut world, &listener);
    let serials = control.told.each_ref().map(|told| word(told, "serial"));
    assert_eq!(word(&control.told[0], "own_serial"), serials[1]);
    assert_eq!(word(&control.told[0], "resumed"), "false");
    // Passive: the server's process listens, the client's opens.
    let fd = on_far(&world);
    let data = serving(&mut world.far, &format!("{FAR}:4000"), fd, &of(control.far));
    for _ in 0..3 {
        let (_, client) = opening(&mut world.near, far(4000), &of(control.near)).unwrap();
        let told = world.admitted().map(|(told, _)| told);
        assert_eq!(told.each_ref().map(|told| word(told, "serial")), serials);
        assert_eq!(told.each_ref().map(|told| word(told, "resumed")), ["true", "true"]);
        exchange(client, &data);
    }
    // Active: the other way round. The first shows certificates, for who opens has no ticket yet.
    let near_data = serving(&mut world.near, &format!("{NEAR}:4001"), stream(), &of(control.near));
    for resumed in ["false", "true"] {
        let to = SocketAddr::new(NEAR.parse().unwrap(), 4001);
        let process = of(control.far);
        let (_, client) = {
            let daemon = &mut world.far;
            let fd = {
                // A socket of the far host's namespace.
                nix::sched::setns(&world.far_net, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                opening(daemon, to, &process).unwrap()
            };
            nix::sched::setns(&world.near_net, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            fd
        };
        let (near_told, _) = admit(&mut world.near);
        let (far_told, _) = admit(&mut world.far);
        assert_eq!([word(&near_told, "serial"), word(&far_told, "serial")], serials);
        assert_eq!([word(&near_told, "resumed"), word(&far_told, "resumed")], [resumed, resumed]);
        exchange(client, &near_data);
    }
}

#[test]
fn nobody_else_gets_the_data_channel() {
    let mut world = World::new();
    let fd = on_far(&world);
    let listener = serving(&mut world.far, &format!("{FAR}:2121"), fd, RELATED);
    let (one, other) = (control(&mut world, &listener), control(&mut world, &listener));
    assert_ne!(word(&one.told[1], "serial"), word(&other.told[1], "serial"), "each has its own");
    assert_ne!(word(&one.told[0], "serial"), word(&other.told[0], "serial"));
    let fd = on_far(&world);
    let data = serving(&mut world.far, &format!("{FAR}:4000"), fd, &of(one.far));
    // Another session of the same two programs, which finds itself at the wrong door, and another process on the
    // same host, whom the far side turns away: nothing is accepted.
    for (process, near_refuses) in [(&of(other.near)[..], true), (PROCESS, false)] {
        let (id, thief) = opening(&mut world.near, far(4000), process).unwrap();
        let (far_errno, far_why, _) = over(&mut world.far);
        let (near_errno, near_why, _) = over_of(&mut world.near, id);
        assert_eq!((far_errno, near_errno), (libc::ECONNREFUSED, libc::ECONNREFUSED));
        let why = if near_refuses { near_why } else { far_why };
        assert!(why.contains("is not the one that the session began with"), "{why}");
        assert_eq!(result(&thief), libc::ECONNREFUSED);
    }
    let mut plain = TcpStream::connect(far(4000)).unwrap();
    plain.write_all(b"x").unwrap();
    assert_ne!(over(&mut world.far).0, 0);
    data.set_nonblocking(true).unwrap();
    assert_eq!(data.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    data.set_nonblocking(false).unwrap();
    // The control: who belongs to it.
    let (_, client) = opening(&mut world.near, far(4000), &of(one.near)).unwrap();
    world.admitted();
    exchange(client, &data);
    // A peer that listens in the server's place: the client's end wants the session's certificate as well.
    let fd = on_far(&world);
    let _impostor = serving(&mut world.far, &format!("{FAR}:4002"), fd, PROCESS);
    let (id, client) = opening(&mut world.near, far(4002), &of(one.near)).unwrap();
    let (_, why, _) = over_of(&mut world.near, id);
    assert!(why.contains("is not the one that the session began with"), "{why}");
    assert_eq!(result(&client), libc::ECONNREFUSED);
}

#[test]
fn the_session_ends_with_its_control_channel() {
    let mut world = World::new();
    let fd = on_far(&world);
    let listener = serving(&mut world.far, &format!("{FAR}:2121"), fd, RELATED);
    let control = control(&mut world, &listener);
    let fd = on_far(&world);
    let data = serving(&mut world.far, &format!("{FAR}:4000"), fd, &of(control.far));
    let (_, client) = opening(&mut world.near, far(4000), &of(control.near)).unwrap();
    world.admitted();
    exchange(client, &data);
    drop((control.client, control.served));
    over_of(&mut world.near, control.near);
    over_of(&mut world.far, control.far);
    let refused = TcpStream::connect_timeout(&far(4000), Duration::from_millis(300)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::TimedOut, "the port is filtered again, for everybody");
    assert_eq!(opening(&mut world.near, far(4000), &of(control.near)).unwrap_err(), libc::ENOENT);
    let fd = on_far(&world);
    bind(fd.as_raw_fd(), &SockaddrStorage::from(far(4003))).unwrap();
    assert_eq!(serve_as(&mut world.far, &fd, &of(control.far)), libc::ENOENT);
    // Nor does anything belong to an association that was not begun so.
    let fd = on_far(&world);
    let _other = serving(&mut world.far, &format!("{FAR}:2122"), fd, PROCESS);
    let (plain, _client, _) = world.client(far(2122));
    world.admitted();
    assert_eq!(opening(&mut world.near, far(2122), &of(plain)).unwrap_err(), libc::ENOENT);
    assert!(
        placed(&mut world.near, Kind::Open, &[Open::new_zeroed().as_bytes(), b"{}"].concat(), &stream())
            .is_err()
    );
}

#[test]
fn an_association_ends_with_its_peers_certificate() {
    let mut world = World::new();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let now = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        since.as_secs().cast_signed()
    };
    let host = Host::load(&world.folder.path().join("h1")).unwrap();
    let facts = ProcessFacts { exe: "/x".into(), sha256: "00".into(), user: "u".into(), unit: None };
    // A minute's grace is left for the peer's clock.
    let stock = |until: i64| {
        let made = host.mint(&"x".parse().unwrap(), &facts, Validity { from: now() - 600, until }).unwrap();
        let mut config = ClientConfig::builder_with_provider(portcullis_relay::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(host.verifier().unwrap()))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(made.shown)));
        config.enable_sni = false;
        let stream = TcpStream::connect(far(2121)).unwrap();
        stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        let connection = ClientConnection::new(Arc::new(config), "h2".try_into().unwrap()).unwrap();
        let mut tls = StreamOwned::new(connection, stream);
        tls.flush().unwrap();
        tls
    };
    let mut lasting = stock(now() + 3600);
    admit(&mut world.far);
    let (mut lasting_served, _) = listener.accept().unwrap();
    // Long enough to begin with, also where something else goes on.
    let mut brief = stock(now() - 54);
    let (id, _) = shown(&mut world.far);
    admit_one(&mut world.far, id);
    let (mut served, _) = listener.accept().unwrap();
    served.write_all(b"x").unwrap();
    brief.read_exact(&mut [0]).unwrap();
    let (errno, why, carried) = over_of(&mut world.far, id);
    assert_eq!((errno, why.as_str()), (libc::EKEYEXPIRED, "the peer's certificate has expired"));
    assert_eq!(carried.sent, 1);
    assert_eq!(served.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(brief.read(&mut [0]).is_err());
    lasting_served.write_all(b"x").unwrap();
    lasting.read_exact(&mut [0]).unwrap();
}
