//! Live flows that end because the broker says so: what the far side and the program see.

#![expect(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[cfg(test)]
mod common;

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    time::{Duration, Instant},
};

use common::{Daemon, own_network};
use nix::sys::socket::{getsockopt, sockopt};
use portcullis_wire::Addr;
use portcullis_wire::keyd::{CutBy, Flow};
use zerocopy::FromZeros;

fn pair(at: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(at).unwrap();
    let (to, end) = (listener.local_addr().unwrap(), Instant::now() + Duration::from_secs(10));
    let near = loop {
        match TcpStream::connect(to) {
            // Seen on a busy machine: a namespace that has just been made has no route for a moment more.
            Err(e) if e.kind() == std::io::ErrorKind::NetworkUnreachable && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            connected => break connected.unwrap(),
        }
    };
    let far = listener.accept().unwrap().0;
    (near, far)
}

fn nothing() -> Flow {
    Flow::new_zeroed()
}

fn flow_of(socket: &TcpStream) -> Flow {
    let (local, remote) = (socket.local_addr().unwrap(), socket.peer_addr().unwrap());
    Flow {
        local: Addr::from(local),
        remote: Addr::from(remote),
        protocol: 6,
        cookie: cookie(socket),
        ..nothing()
    }
}

fn cookie(socket: &TcpStream) -> u64 {
    let mut value = 0_u64;
    let mut length = 8;
    #[expect(unsafe_code, reason = "nix has no SO_COOKIE")]
    // SAFETY: getsockopt(2) writes at most the eight bytes of `value`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    assert_eq!(done, 0);
    value
}

#[test]
fn in_the_daemons_namespace_the_kernel_destroys() {
    own_network(&["fd00::1/128"]);
    let mut keyd = Daemon::start();
    for at in ["127.0.0.1:0", "[fd00::1]:0", "[::ffff:127.0.0.1]:0"] {
        let (mut near, mut far) = pair(at);
        assert_eq!(keyd.cut(&nothing(), Some(near.as_fd())), Ok(CutBy::Destroy as u32), "{at}");
        assert_eq!(near.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionAborted);
        assert_eq!(far.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(keyd.cut(&nothing(), Some(near.as_fd())), Ok(CutBy::Gone as u32));
    }
}

#[test]
fn without_the_socket_the_cookie_decides() {
    own_network(&["fd00::1/128"]);
    let mut keyd = Daemon::start();
    for at in ["127.0.0.1:0", "[fd00::1]:0"] {
        let (mut near, mut far) = pair(at);
        let flow = flow_of(&near);
        let other = Flow { cookie: flow.cookie + 100, ..flow };
        assert_eq!(keyd.cut(&other, None), Ok(CutBy::Gone as u32), "another socket's cookie");
        near.write_all(b"alive").unwrap();
        far.read_exact(&mut [0; 5]).unwrap();
        assert_eq!(keyd.cut(&flow, None), Ok(CutBy::Destroy as u32));
        assert_eq!(far.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    assert_eq!(keyd.cut(&nothing(), None), Err(libc::EINVAL));
}

#[test]
fn in_another_namespace_the_descriptor_serves() {
    let mut keyd = Daemon::start();
    own_network(&[]);
    let (mut near, mut far) = pair("127.0.0.1:0");
    assert_eq!(keyd.cut(&flow_of(&near), None), Ok(CutBy::Gone as u32), "not without it");
    // A thread that waits in read(2) must wake.
    let reader = std::thread::spawn({
        let mut near = near.try_clone().unwrap();
        move || near.read(&mut [0; 8]).map_err(|e| e.raw_os_error())
    });
    std::thread::sleep(Duration::from_millis(100));
    let by = keyd.cut(&nothing(), Some(near.as_fd())).unwrap();
    let far_sees = far.read(&mut [0; 8]);
    let woke = reader.join().unwrap();
    assert_eq!(by, CutBy::Disconnect as u32);
    assert_eq!(far_sees.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(!matches!(woke, Ok(1..)), "{woke:?}");
    assert!(near.write(b"x").is_err());
}

#[test]
fn a_datagram_flow_is_cut_too() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let (near, far) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    near.connect(far.local_addr().unwrap()).unwrap();
    assert_eq!(keyd.cut(&nothing(), Some(near.as_fd())), Ok(CutBy::Destroy as u32));
    assert_eq!(getsockopt(&near, sockopt::SocketError).unwrap(), libc::ECONNABORTED);
    assert!(near.peer_addr().is_err());
}

#[test]
fn a_connection_attempt_is_cut() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    keyd.filter(&listener, 1, &[]).unwrap();
    let to = listener.local_addr().unwrap();
    let client = std::thread::spawn(move || TcpStream::connect_timeout(&to, common::PATIENCE));
    // The socket is not at hand: cookie 0 is whoever has the two addresses.
    let seen = keyd.strangers(1)[0];
    let flow = Flow { local: seen.source, remote: seen.destination, protocol: 6, ..nothing() };
    assert_eq!(keyd.cut(&flow, None), Ok(CutBy::Destroy as u32));
    assert_eq!(client.join().unwrap().unwrap_err().kind(), ErrorKind::ConnectionAborted);
}
