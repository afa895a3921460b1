//! Sockets of every shape that programs make: bound, bound to an interface, of IPv6 alone, inherited, mixed; and
//! ends of every kind.

#![expect(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[cfg(test)]
mod common;

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use common::world::{
    FAR, FAR_SIX, NEAR, NEAR_SIX, PROCESS, World, blocking, far, open, over, over_of, result, serve, shown,
};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
};
use portcullis_wire::keyd::{Head, Kind, Places, Speech};
use zerocopy::{FromBytes, IntoBytes};

fn tcp(family: AddressFamily) -> OwnedFd {
    socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None).unwrap()
}

fn bound(at: &str) -> OwnedFd {
    let at: SocketAddr = at.parse().unwrap();
    let fd = tcp(if at.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 });
    setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
    bind(fd.as_raw_fd(), &SockaddrStorage::from(at)).unwrap();
    fd
}

fn six(port: u16) -> SocketAddr {
    SocketAddr::new(FAR_SIX.parse().unwrap(), port)
}

fn exchange(client: OwnedFd, listener: &TcpListener) {
    assert_eq!(result(&client), 0);
    let (mut served, _) = listener.accept().unwrap();
    let mut client = blocking(client);
    client.write_all(b"ping").unwrap();
    let mut got = [0; 4];
    served.read_exact(&mut got).unwrap();
    served.write_all(&got).unwrap();
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"ping");
}

#[test]
fn a_socket_that_is_bound_to_ipv6_is_served() {
    let mut world = World::new();
    let (_, listener) = world.listener("[::]:2121");
    let own = format!("[{NEAR_SIX}]:20");
    let (_, client, places) = world.client_with(bound(&own), six(2121));
    assert_eq!(places.inner_remote.ip(), Some("::1".parse().unwrap()));
    let [_, (_, seen)] = world.admitted();
    assert_eq!(seen.remote.socket_addr(), own.parse().ok(), "the source port is the program's");
    exchange(client, &listener);
    // Bound to any address, of IPv6 alone; two at once have tokens of their own.
    let only_six = || {
        let fd = tcp(AddressFamily::Inet6);
        setsockopt(&fd, sockopt::Ipv6V6Only, &true).unwrap();
        bind(fd.as_raw_fd(), &SockaddrStorage::from("[::]:0".parse::<SocketAddr>().unwrap())).unwrap();
        fd
    };
    let (_, one, first) = world.client_with(only_six(), six(2121));
    world.admitted();
    let (_, two, second) = world.client_with(only_six(), six(2121));
    world.admitted();
    assert_ne!(first.inner_remote.port, second.inner_remote.port);
    exchange(one, &listener);
    exchange(two, &listener);
    // What fails, fails as it would natively.
    let (id, nobody, _) = world.client_with(bound(&format!("[{NEAR_SIX}]:0")), six(9));
    assert_eq!(result(&nobody), libc::ECONNREFUSED);
    assert_eq!(over_of(&mut world.near, id).0, libc::ECONNREFUSED);
    let (_, absent, _) =
        world.client_with(bound(&format!("[{NEAR_SIX}]:0")), "[fd00:99::77]:9".parse().unwrap());
    assert_eq!(result(&absent), libc::EHOSTUNREACH);
}

fn interface_of(fd: &impl AsFd) -> i32 {
    const SO_BINDTOIFINDEX: i32 = 62;
    let (mut value, mut length) = (0_i32, 4);
    #[expect(unsafe_code, reason = "nix reads no interface by its number")]
    // SAFETY: getsockopt(2) writes at most `length` bytes to `value`, which has that many.
    let done = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_BINDTOIFINDEX,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    assert_eq!(done, 0);
    value
}

#[test]
fn a_socket_that_is_bound_to_an_interface_keeps_to_it() {
    let mut world = World::new();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let fd = tcp(AddressFamily::Inet);
    setsockopt(&fd, sockopt::BindToDevice, &"wire".into()).unwrap();
    let (_, client, _) = world.client_with(fd, far(2121));
    assert_eq!(interface_of(&client), 0, "a token is not on the link");
    world.admitted();
    exchange(client, &listener);
    // Bound to an interface that leads nowhere: as natively.
    ip_link_without_route();
    let fd = tcp(AddressFamily::Inet);
    setsockopt(&fd, sockopt::BindToDevice, &"aside".into()).unwrap();
    set_tcp(&fd, libc::TCP_SYNCNT, 1);
    let (id, client, _) = world.client_with(fd, far(2121));
    assert_eq!(over_of(&mut world.near, id).0, libc::ETIMEDOUT);
    assert_eq!(result(&client), libc::ETIMEDOUT);
    // A listener on an interface cannot have a front.
    let fd = world.bound("0.0.0.0:2222");
    world.on_far(|| setsockopt(&fd, sockopt::BindToDevice, &"eriw".into()).unwrap());
    assert_eq!(serve(&mut world.far, &fd, &[], 0).1, libc::EOPNOTSUPP);
}

fn ip_link_without_route() {
    common::ip(&["link", "add", "aside", "type", "veth", "peer", "name", "edisa"]);
    common::ip(&["link", "set", "aside", "up"]);
    common::ip(&["link", "set", "edisa", "up"]);
}

fn fd_blocking(fd: &OwnedFd) {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
}

#[test]
fn what_is_not_tcp_is_refused_by_name() {
    let mut world = World::new();
    #[expect(unsafe_code, reason = "nix does not know this protocol")]
    // SAFETY: socket(2) takes no pointer; the descriptor it returns is nobody else's.
    let mptcp =
        unsafe { OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP)) };
    assert_eq!(open(&mut world.near, &mptcp, far(2121)).unwrap_err(), libc::EPROTONOSUPPORT);
    bind(mptcp.as_raw_fd(), &SockaddrStorage::from("0.0.0.0:2222".parse::<SocketAddr>().unwrap())).unwrap();
    let tcp = tcp(AddressFamily::Inet);
    let filter = world.near.filter(&tcp, 1, &[]).unwrap();
    let fds = [mptcp.as_fd(), filter.as_fd()];
    assert_eq!(world.near.ask(Kind::Serve, 0, 0, PROCESS, &fds).unwrap().head.errno, libc::EPROTONOSUPPORT);
    let udp = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).unwrap();
    assert_eq!(open(&mut world.near, &udp, far(2121)).unwrap_err(), libc::EPROTONOSUPPORT);
}

#[test]
fn an_inherited_listener_is_protected_as_it_is_and_given_back() {
    let mut world = World::new();
    let listener = world.on_far(|| TcpListener::bind((FAR, 2121)).unwrap());
    let fd = OwnedFd::from(listener.try_clone().unwrap());
    let (front, errno) = serve(&mut world.far, &fd, &[common::net(&format!("{NEAR}/32"))], 0);
    assert_eq!(errno, 0);
    // As a member it would be a hole in the list.
    let mut plain = TcpStream::connect(far(2121)).unwrap();
    plain.write_all(b"x").unwrap();
    listener.accept().unwrap().0.read_exact(&mut [0]).unwrap();
    let _answered = world.far.ask(Kind::Release, front, 0, &[], &[]).unwrap();
    assert!(TcpStream::connect(far(2121)).is_ok());
}

/// What is reported next, with its addresses.
fn arrived(world: &mut World) -> u64 {
    let (kind, head, rest) = common::world::later(&mut world.far, 0);
    assert_eq!((kind, rest.len()), (Kind::Arrived, size_of::<Places>()));
    assert_eq!(Places::read_from_bytes(&rest).unwrap().remote.ip(), Some(NEAR.parse().unwrap()));
    head.tag
}

fn speak(world: &mut World, id: u64, speech: Speech) {
    // `count` is not among what `ask` sets.
    let head = Head { tag: id, count: speech as u32, ..Head::new(Kind::Speak, 4_000_000) };
    world.far.send(&[head.as_bytes()], &[]);
}

#[test]
fn a_mixed_port_serves_plain_peers_and_those_with_certificates() {
    let mut world = World::as_members("h1", "h2", &[("h1", "10.99.0.200"), ("h2", "10.99.0.201")]);
    let fd = world.bound(&format!("{FAR}:2121"));
    assert_eq!(serve(&mut world.far, &fd, &[], Head::MIXED).1, 0);
    listen(&fd, Backlog::new(16).unwrap()).unwrap();
    fd_blocking(&fd);
    let listener = TcpListener::from(fd);
    // With a certificate, where both may be.
    let (_, client, _) = world.client(far(2121));
    let one = arrived(&mut world);
    speak(&mut world, one, Speech::Either);
    world.admitted();
    exchange(client, &listener);
    // A peer that says nothing is plain after a moment, and hears a server that speaks first.
    for speech in [Speech::Either, Speech::Plain] {
        let mut plain = TcpStream::connect(far(2121)).unwrap();
        plain.set_read_timeout(Some(common::PATIENCE)).unwrap();
        let one = arrived(&mut world);
        speak(&mut world, one, speech);
        let (shown, told) = shown(&mut world.far);
        assert_eq!((shown, told.as_str()), (one, "{}"));
        assert_eq!(world.far.ask(Kind::Admit, one, 0, &[], &[]).unwrap().head.errno, 0);
        let (mut served, _) = listener.accept().unwrap();
        served.write_all(b"220 ready").unwrap();
        let mut got = [0; 9];
        plain.read_exact(&mut got).unwrap();
        plain.write_all(b"QUIT").unwrap();
        drop(plain);
        let mut said = Vec::new();
        served.read_to_end(&mut said).unwrap();
        assert_eq!((&got, said.as_slice()), (b"220 ready", &b"QUIT"[..]));
        drop(served);
        assert_eq!(over(&mut world.far).0, 0);
    }
    // Plain, where only TLS may be, and a plain peer that the broker does not want.
    let mut plain = TcpStream::connect(far(2121)).unwrap();
    let one = arrived(&mut world);
    speak(&mut world, one, Speech::Tls);
    plain.write_all(b"USER anonymous\r\n").unwrap();
    assert_ne!(over(&mut world.far).0, 0);
    let mut plain = TcpStream::connect(far(2121)).unwrap();
    plain.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let one = arrived(&mut world);
    world.far.ask(Kind::Refuse, one, 0, &[], &[]).unwrap();
    assert_eq!(plain.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(world.far.ask(Kind::Speak, one, 0, &[], &[]).unwrap().head.errno, libc::ENOENT);
}

#[test]
fn a_member_is_never_plain_even_on_a_mixed_port() {
    let mut world = World::new();
    let fd = world.bound(&format!("{FAR}:2121"));
    assert_eq!(serve(&mut world.far, &fd, &[], Head::MIXED).1, 0);
    listen(&fd, Backlog::new(16).unwrap()).unwrap();
    let mut plain = TcpStream::connect(far(2121)).unwrap();
    plain.write_all(b"USER anonymous\r\n").unwrap();
    let (errno, why, _) = over(&mut world.far);
    assert!(errno != 0 && why.contains("does not speak TLS"), "{why}");
    fd_blocking(&fd);
    let (_, client, _) = world.client(far(2121));
    world.admitted();
    exchange(client, &TcpListener::from(fd));
}

#[test]
fn ends_are_what_they_were_at_the_other_side() {
    let mut world = World::new();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // A reset, either way.
    let (mut client, served) = world.pair(&listener);
    setsockopt(&served, sockopt::Linger, &linger).unwrap();
    drop(served);
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(over(&mut world.near).0, libc::ECONNRESET);
    let (client, mut served) = world.pair(&listener);
    setsockopt(&client, sockopt::Linger, &linger).unwrap();
    drop(client);
    assert_eq!(served.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(over(&mut world.near).0, libc::ECONNRESET);
    // One direction ends, the other goes on for as long as it likes.
    let (mut client, mut served) = world.pair(&listener);
    client.write_all(b"all I have").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut said = Vec::new();
    served.read_to_end(&mut said).unwrap();
    assert_eq!(said, b"all I have");
    served.write_all(&[9; 300_000]).unwrap();
    drop(served);
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).unwrap();
    assert_eq!(heard.len(), 300_000);
    drop(client);
    assert_eq!(over(&mut world.near).0, 0);
    // What was in flight when the sender was reset has arrived or not, but the end is no end of file.
    let (mut client, mut served) = world.pair(&listener);
    client.write_all(&[1; 1000]).unwrap();
    served.read_exact(&mut [0; 1000]).unwrap();
    served.write_all(&[2; 1000]).unwrap();
    setsockopt(&served, sockopt::Linger, &linger).unwrap();
    drop(served);
    let mut got = Vec::new();
    assert_eq!(client.read_to_end(&mut got).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn what_a_program_asks_of_its_socket_is_asked_of_the_wire() {
    let mut world = World::new();
    // A far side that answers nobody: the program's own patience ends its connect(2).
    let mute = world.on_far(|| TcpListener::bind((FAR, 2121)).unwrap());
    let nothing = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0 }];
    attach(&mute, &nothing);
    let fd = tcp(AddressFamily::Inet);
    set_tcp(&fd, libc::TCP_SYNCNT, 1);
    let (_, client, _) = world.client_with(fd, far(2121));
    let (errno, why, _) = over(&mut world.near);
    assert_eq!(
        (errno, why.as_str()),
        (libc::ETIMEDOUT, "no connection: Connection timed out (os error 110)")
    );
    assert_eq!(result(&client), libc::ETIMEDOUT);
    // How packets are marked.
    let marked = world.on_far(|| TcpListener::bind((FAR, 2122)).unwrap());
    set_tcp(&marked, libc::TCP_SAVE_SYN, 1);
    let fd = tcp(AddressFamily::Inet);
    setsockopt(&fd, sockopt::Ipv4Tos, &0x48).unwrap();
    let (_, _client, _) = world.client_with(fd, far(2122));
    let (wire, _) = marked.accept().unwrap();
    assert_eq!(saved_syn(&wire)[1], 0x48, "type of service");
}

fn set_tcp(fd: &impl AsFd, name: i32, value: i32) {
    #[expect(unsafe_code, reason = "nix does not know this option")]
    // SAFETY: setsockopt(2) reads four bytes from `value`, which has that many.
    let done = unsafe {
        libc::setsockopt(fd.as_fd().as_raw_fd(), libc::IPPROTO_TCP, name, (&raw const value).cast(), 4)
    };
    assert_eq!(done, 0);
}

/// The headers of the SYN that opened a connection (tcp(7), TCP_SAVED_SYN).
fn saved_syn(fd: &TcpStream) -> [u8; 128] {
    let (mut syn, mut length) = ([0; 128], 128);
    #[expect(unsafe_code, reason = "nix does not know this option")]
    // SAFETY: getsockopt(2) writes at most `length` bytes to `syn`, which has that many.
    let done = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_SAVED_SYN,
            syn.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    assert_eq!(done, 0);
    syn
}

fn attach(listener: &TcpListener, code: &[libc::sock_filter]) {
    let program =
        libc::sock_fprog { len: u16::try_from(code.len()).unwrap(), filter: code.as_ptr().cast_mut() };
    #[expect(unsafe_code, reason = "nix cannot attach a filter")]
    // SAFETY: setsockopt(2) reads the program and the code that it points to, both of which live.
    let done = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            libc::socklen_t::try_from(size_of_val(&program)).unwrap(),
        )
    };
    assert_eq!(done, 0);
}
