//! Protected flows between two hosts: real programs' sockets, real daemons, a wire between them.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test says what went wrong by panicking")]

#[cfg(test)]
mod common;

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use common::{
    Daemon, PATIENCE,
    world::{FAR, NEAR, PROCESS, World, admit, blocking, far, open, over, placed, raw, result, serve, shown},
};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, listen, setsockopt,
        socket, sockopt,
    },
};
use portcullis_keyd::identity::Authority;
use portcullis_wire::{
    Addr,
    keyd::{Head, Kind, Net, Open, Over},
};
use zerocopy::{FromZeros, IntoBytes};

#[test]
fn two_programs_talk_and_each_is_named_to_the_other() {
    let mut world = World::new();
    let (front, listener) = world.listener(&format!("{FAR}:2121"));
    assert_eq!(listener.local_addr().unwrap(), far(2121));
    let (_, client, _) = world.client(far(2121));
    let [(near_told, near), (far_told, far_places)] = world.admitted();
    assert!(near_told.contains(r#""id":"spiffe://example.com/host/h2/process/x""#), "{near_told}");
    assert!(far_told.contains(r#""id":"spiffe://example.com/host/h1/process/x""#), "{far_told}");
    assert!(far_told.contains(r#""kex":"X25519MLKEM768""#), "{far_told}");

    assert_eq!(result(&client), 0);
    let mut client = blocking(client);
    let (mut served, inner) = listener.accept().unwrap();
    assert_eq!(near.remote.socket_addr(), Some(far(2121)));
    assert_eq!(near.local.socket_addr(), far_places.remote.socket_addr());
    assert_eq!(far_places.inner_remote.socket_addr(), Some(inner));
    assert_eq!(near.inner_local.socket_addr(), client.local_addr().ok());
    assert_eq!(far_places.local.socket_addr(), Some(far(2121)));

    client.write_all(b"USER anonymous\r\n").unwrap();
    let mut got = [0; 16];
    served.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"USER anonymous\r\n");
    served.write_all(&[7; 500_000]).unwrap();
    drop(served);
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 500_000);
    drop(client);
    let (errno, why, carried) = over(&mut world.near);
    assert_eq!(
        (errno, why.as_str(), carried),
        (0, "closed by both ends", Over { sent: 16, received: 500_000, ..carried })
    );
    assert_eq!(over(&mut world.far).2, Over { sent: 500_000, received: 16, cookie: 0 });

    // The listener's end closes the port.
    drop(listener);
    let end = Instant::now() + PATIENCE;
    while TcpStream::connect(far(2121)).is_ok() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(TcpStream::connect(far(2121)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    let released = world.far.ask(Kind::Release, front, 0, &[], &[]).unwrap();
    assert_eq!(released.head.errno, 0, "twice is once");
}

#[test]
fn the_far_sides_failure_is_the_programs_errno() {
    let mut world = World::new();
    let (_, client, _) = world.client(far(9));
    assert_eq!(result(&client), libc::ECONNREFUSED, "nobody listens");
    assert_eq!(over(&mut world.near).0, libc::ECONNREFUSED);
    let (_, client, _) = world.client("10.99.0.77:9".parse().unwrap());
    assert_eq!(result(&client), libc::EHOSTUNREACH, "nobody has the address");
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    assert_eq!(open(&mut world.near, &fd, "192.0.2.1:9".parse().unwrap()).unwrap_err(), libc::ENETUNREACH);
    // A peer that speaks no TLS.
    let plain = world.on_far(|| TcpListener::bind((FAR, 2121)).unwrap());
    std::thread::spawn(move || plain.accept().unwrap().0.write_all(b"220 ready\r\n"));
    while over_pending(&mut world.near) {}
    let (_, client, _) = world.client(far(2121));
    assert_eq!(result(&client), libc::ECONNREFUSED);
    let (_, why, _) = over(&mut world.near);
    assert!(why.contains("does not speak TLS"), "{why}");
}

fn over_pending(daemon: &mut Daemon) -> bool {
    daemon.receive(Duration::from_millis(100)).is_some() || daemon.reports.pop_front().is_some()
}

#[test]
fn who_is_not_admitted_gets_nothing() {
    let mut world = World::new();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    listener.set_nonblocking(true).unwrap();
    // The far broker refuses: the program's connect(2) fails, and nobody was accepted.
    let (_, client, _) = world.client(far(2121));
    let (far_id, _) = shown(&mut world.far);
    world.far.ask(Kind::Refuse, far_id, 0, &[], &[]).unwrap();
    assert_eq!(result(&client), libc::ECONNREFUSED);
    assert!(over(&mut world.near).1.contains("AccessDenied"));
    assert!(listener.accept().is_err());
    // The near broker refuses.
    let (id, client, _) = world.client(far(2121));
    over(&mut world.far);
    admit(&mut world.far);
    assert_eq!(shown(&mut world.near).0, id);
    let head = Head { tag: id, count: libc::EACCES.cast_unsigned(), ..Head::new(Kind::Refuse, 90) };
    world.near.send(&[head.as_bytes()], &[]);
    assert_eq!(result(&client), libc::ECONNREFUSED);
    assert_eq!(over(&mut world.near).0, libc::EACCES);
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(false).unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    // Nobody in plain, and nobody past the door.
    let mut plain = TcpStream::connect(far(2121)).unwrap();
    plain.write_all(b"USER anonymous\r\n\r\n").unwrap();
    plain.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"220"), "at most an alert");
    assert!(listener.accept().is_err());
}

#[test]
fn who_comes_before_the_program_listens_is_reset_and_later_ones_are_served() {
    let mut world = World::new();
    let fd = world.bound(&format!("{FAR}:2121"));
    assert_eq!(TcpStream::connect(far(2121)).unwrap_err().kind(), ErrorKind::ConnectionRefused, "bound only");
    assert_eq!(serve(&mut world.far, &fd, &[], 0).1, 0);
    let (_, client, _) = world.client(far(2121));
    assert_eq!(result(&client), libc::ECONNREFUSED);
    over(&mut world.near);
    listen(&fd, Backlog::new(16).unwrap()).unwrap();
    let (_, client, _) = world.client(far(2121));
    world.admitted();
    assert_eq!(result(&client), 0);
}

fn bind_to_link(socket: &OwnedFd, link: &str) {
    let index = i32::try_from(nix::net::if_::if_nametoindex(link).unwrap()).unwrap();
    // SAFETY: all zeroes are an address of the packet family's structure.
    #[expect(unsafe_code, reason = "nix cannot make an address of the packet family")]
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    address.sll_ifindex = index;
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    #[expect(unsafe_code, reason = "as above")]
    // SAFETY: bind(2) reads `length` bytes from `address`, which has that many.
    let done = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(done, 0);
}

/// Whether a text is in any frame that has crossed the link since the capture began.
fn was_on_the_wire(capture: &OwnedFd, text: &[u8]) -> bool {
    use nix::sys::socket::{MsgFlags, recv};
    let mut frame = vec![0; 70_000];
    let mut found = false;
    while let Ok(length) = recv(capture.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT) {
        found |= frame[..length].windows(text.len()).any(|part| part == text);
    }
    found
}

#[test]
fn nothing_that_a_program_says_is_on_the_wire() {
    let mut world = World::new();
    let said = b"USER anonymous\r\n";
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    // On the link alone: on loopback, where the daemon hands over, it is plain.
    let (kind, all) = (SockType::Raw, nix::sys::socket::SockProtocol::EthAll);
    let wire = socket(AddressFamily::Packet, kind, SockFlag::SOCK_CLOEXEC, all).unwrap();
    bind_to_link(&wire, "wire");
    let (_, client, _) = world.client(far(2121));
    world.admitted();
    assert_eq!(result(&client), 0);
    let mut client = blocking(client);
    client.write_all(said).unwrap();
    let (mut served, _) = listener.accept().unwrap();
    served.read_exact(&mut [0; 16]).unwrap();
    assert!(!was_on_the_wire(&wire, said));

    let plain = world.on_far(|| TcpListener::bind((FAR, 2122)).unwrap());
    TcpStream::connect(far(2122)).unwrap().write_all(said).unwrap();
    plain.accept().unwrap().0.read_exact(&mut [0; 16]).unwrap();
    assert!(was_on_the_wire(&wire, said), "the control");
}

#[test]
fn a_syn_to_a_token_from_another_socket_takes_nothing() {
    let mut world = World::new();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let fd =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
            .unwrap();
    let (_, places) = open(&mut world.near, &fd, far(2121)).unwrap();
    let thief =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
            .unwrap();
    assert_eq!(connect(thief.as_raw_fd(), &raw(&places.inner_remote)), Err(Errno::EINPROGRESS));
    assert_eq!(result(&thief), libc::ECONNREFUSED);
    assert_eq!(connect(fd.as_raw_fd(), &raw(&places.inner_remote)), Err(Errno::EINPROGRESS));
    world.admitted();
    assert_eq!(result(&fd), 0);
    listener.accept().unwrap().0.write_all(b"x").unwrap();
    blocking(fd).read_exact(&mut [0]).unwrap();
}

#[test]
fn no_other_address_is_a_token_and_what_comes_there_wakes_nobody() {
    const TOKENS_PORT: u16 = 1023;
    let mut world = World::new();
    let (_, client, places) = world.client(far(9));
    assert_eq!(places.inner_remote.socket_addr().unwrap().port(), TOKENS_PORT);
    assert_eq!(result(&client), libc::ECONNREFUSED, "a token is answered");
    let connect =
        |port| TcpStream::connect_timeout(&far(port), Duration::from_millis(400)).unwrap_err().kind();
    assert_eq!(connect(9), ErrorKind::ConnectionRefused);
    assert_eq!(connect(TOKENS_PORT), ErrorKind::TimedOut);
    assert_eq!(world.on_far(|| connect(TOKENS_PORT)), ErrorKind::TimedOut);
}

#[test]
fn many_at_once_are_all_served_through_a_short_backlog() {
    const MANY: usize = 100;
    let mut world = World::new();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    listener.set_nonblocking(true).unwrap();
    let clients: Vec<_> = (0..MANY).map(|_| world.client(far(2121)).1).collect();
    let (mut up, mut served) = ([0, 0], Vec::new());
    let end = Instant::now() + PATIENCE;
    while (up != [MANY, MANY] || served.len() < MANY) && Instant::now() < end {
        for (daemon, up) in [&mut world.near, &mut world.far].into_iter().zip(&mut up) {
            daemon.receive(Duration::from_millis(1));
            while let Some((kind, head, rest)) = daemon.reports.pop_front() {
                match kind {
                    Kind::Shown => {
                        let answer = daemon.ask(Kind::Admit, head.tag, 0, &[], &[]).unwrap().head;
                        assert_eq!(answer.errno, 0);
                        *up += usize::from(answer.count == 1);
                    }
                    Kind::Associated => *up += 1,
                    other => panic!("{other:?} {}", String::from_utf8_lossy(&rest)),
                }
            }
        }
        served.extend(listener.accept().map(|(stream, _)| stream));
    }
    assert_eq!((up, served.len()), ([MANY, MANY], MANY));
    for stream in &served {
        stream.set_nonblocking(false).unwrap();
        let mut stream = stream;
        stream.write_all(b"x").unwrap();
    }
    for client in clients {
        assert_eq!(result(&client), 0);
        blocking(client).read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn a_protected_port_is_reached_past_its_front_by_the_daemon_alone_and_by_whom_its_list_names() {
    let mut world = World::new();
    let (_, _listener) = world.listener(&format!("{FAR}:2121"));
    // From the host itself, to the listener as it is: the filter lets nobody through.
    let connect = |port| TcpStream::connect_timeout(&far(port), Duration::from_millis(400));
    assert_eq!(world.on_far(|| connect(2121)).unwrap_err().kind(), ErrorKind::TimedOut);
    // From the link: that is the front, where one must prove who one is.
    let mut stranger = TcpStream::connect(far(2121)).unwrap();
    stranger.write_all(b"USER anonymous\r\n\r\n").unwrap();
    assert!(!matches!(stranger.read(&mut [0; 1]), Ok(1..)) || over(&mut world.far).0 != 0);
    // One port serves both: who is on the list comes to the program itself, from the link too.
    let fd = world.bound(&format!("{FAR}:2222"));
    let near = common::net(&format!("{NEAR}/32"));
    assert_eq!(serve(&mut world.far, &fd, &[near], 0).1, 0);
    listen(&fd, Backlog::new(16).unwrap()).unwrap();
    let listener = TcpListener::from(fd);
    let plain = TcpStream::connect(far(2222)).unwrap();
    let (served, peer) = listener.accept().unwrap();
    assert_eq!((peer, served.local_addr().unwrap()), (plain.local_addr().unwrap(), far(2222)));
}

#[test]
fn sockets_that_share_a_port_have_one_front() {
    let mut world = World::new();
    let shared = |world: &World| {
        let fd = world
            .on_far(|| socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap());
        setsockopt(&fd, sockopt::ReusePort, &true).unwrap();
        bind(fd.as_raw_fd(), &SockaddrStorage::from(far(2121))).unwrap();
        fd
    };
    let (first, second) = (shared(&world), shared(&world));
    let front = serve(&mut world.far, &first, &[], 0);
    assert_eq!(serve(&mut world.far, &second, &[], 0), front);
    listen(&first, Backlog::new(16).unwrap()).unwrap();
    listen(&second, Backlog::new(16).unwrap()).unwrap();
    drop(first);
    let (_, client, _) = world.client(far(2121));
    world.admitted();
    assert_eq!(result(&client), 0);
    TcpListener::from(second).accept().unwrap();
}

#[test]
fn a_port_that_is_given_up_is_its_own_listeners_again() {
    let mut world = World::new();
    let fd = world.bound(&format!("{FAR}:2121"));
    let filter = world.far.filter(&fd, 1, &Net::everyone().map(Net::refused)).unwrap();
    let head = Head { count: 16, ..Head::new(Kind::Serve, 77) };
    world.far.send(&[head.as_bytes(), PROCESS], &[fd.as_fd(), filter.as_fd()]);
    let front = world.far.receive(PATIENCE).unwrap().head.tag;
    listen(&fd, Backlog::new(16).unwrap()).unwrap();
    let (_, client, _) = world.client(far(2121));
    world.admitted();
    assert_eq!(result(&client), 0);
    world.far.ask(Kind::Release, front, 0, &[], &[]).unwrap();
    assert_eq!(world.far.refill(&filter, &Net::everyone()), 0);
    let plain = TcpStream::connect(far(2121)).unwrap();
    let listener = TcpListener::from(fd);
    let peers = [listener.accept().unwrap().1, listener.accept().unwrap().1];
    assert!(peers.contains(&plain.local_addr().unwrap()), "{peers:?}");
}

#[test]
fn another_members_certificate_at_a_members_address_is_refused_by_name() {
    let mut world = World::as_members("h1", "h2", &[("h1", NEAR), ("h2", "10.99.0.222"), ("h3", FAR)]);
    let (_, _listener) = world.listener(&format!("{FAR}:2121"));
    let (_, client, _) = world.client(far(2121));
    assert_eq!(result(&client), libc::ECONNREFUSED);
    let (_, why, _) = over(&mut world.near);
    assert_eq!(why, "address belongs to member `h3` but the certificate shows `h2`");
}

#[test]
fn a_program_that_gives_up_leaves_nothing() {
    let mut world = World::new();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let (id, client, _) = world.client(far(2121));
    drop(client);
    let (errno, why, _) = over(&mut world.near);
    assert!(errno != 0 && !why.is_empty());
    assert_eq!(world.near.ask(Kind::Admit, id, 0, &[], &[]).unwrap().head.errno, libc::ENOENT);
    drop(listener);
}

#[test]
fn sockets_of_other_shapes_are_served_or_refused_by_name() {
    let mut world = World::new();
    // A dual-stack listener, and a v6 socket that goes to a v4-mapped address.
    let (_, listener) = world.listener("[::]:2222");
    let fd = socket(
        AddressFamily::Inet6,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    setsockopt(&fd, sockopt::Ipv6V6Only, &true).unwrap();
    let mapped = format!("[::ffff:{FAR}]:2222").parse().unwrap();
    let (_, places) = open(&mut world.near, &fd, mapped).unwrap();
    assert_eq!(connect(fd.as_raw_fd(), &raw(&places.inner_remote)), Err(Errno::EINPROGRESS));
    world.admitted();
    assert_eq!(result(&fd), 0);
    let (mut served, _) = listener.accept().unwrap();
    served.write_all(b"hello").unwrap();
    let mut got = [0; 5];
    blocking(fd).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    // In another network namespace.
    let elsewhere =
        world.on_far(|| socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap());
    assert_eq!(open(&mut world.near, &elsewhere, far(2222)).unwrap_err(), libc::EXDEV);
    let fd = world.bound(&format!("{FAR}:2223"));
    assert_eq!(serve(&mut world.near, &fd, &[], 0).1, libc::EXDEV);
    // One without a port.
    let fd =
        world.on_far(|| socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap());
    assert_eq!(serve(&mut world.far, &fd, &[], 0).1, libc::EINVAL);
    // One that is limited to an interface.
    let fd = world.bound(&format!("{FAR}:2224"));
    setsockopt(&fd, sockopt::BindToDevice, &"eriw".into()).unwrap();
    assert_eq!(serve(&mut world.far, &fd, &[], 0).1, libc::EOPNOTSUPP);
}

#[test]
fn a_source_port_that_the_program_has_bound_is_the_wires_too() {
    let mut world = World::new();
    let (_, _listener) = world.listener(&format!("{FAR}:2121"));
    let fd =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
            .unwrap();
    let own: SocketAddr = format!("{NEAR}:20").parse().unwrap();
    bind(fd.as_raw_fd(), &SockaddrStorage::from(own)).unwrap();
    let ask = Open { remote: Addr::from(far(2121)), local: Addr::from(own), ..Open::new_zeroed() };
    let body = [ask.as_bytes(), PROCESS].concat();
    let (_, places) = placed(&mut world.near, Kind::Open, &body, &fd).unwrap();
    assert_eq!(connect(fd.as_raw_fd(), &raw(&places.inner_remote)), Err(Errno::EINPROGRESS));
    let [_, (_, far_places)] = world.admitted();
    assert_eq!(far_places.remote.socket_addr(), Some(own));
    assert_eq!(result(&fd), 0);
}

#[test]
fn a_revoked_peer_is_cut_at_once() {
    let mut world = World::new();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let (_, client, _) = world.client(far(2121));
    world.admitted();
    assert_eq!(result(&client), 0);
    let (mut served, _) = listener.accept().unwrap();
    served.set_read_timeout(Some(PATIENCE)).unwrap();
    let members = |world: &mut World, name: &str| {
        let file = File::open(world.folder.path().join(name)).unwrap();
        let head = world.far.ask(Kind::Members, 0, 0, &[], &[file.as_fd()]).unwrap().head;
        if head.errno == 0 { Ok(head.count) } else { Err(head.errno) }
    };
    assert_eq!(members(&mut world, "h2/members.toml"), Ok(0), "the one in force");
    assert_eq!(members(&mut world, "h2/ca.crt"), Err(libc::EBADMSG));
    let mut authority = Authority::open(world.folder.path()).unwrap();
    authority.revoke_host(&"h1".parse().unwrap(), 1).unwrap();
    authority.publish(&world.folder.path().join("h2")).unwrap();
    assert_eq!(members(&mut world, "h2/members.toml"), Ok(1));
    assert_eq!(served.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    // And it does not come back.
    let (_, client, _) = world.client(far(2121));
    let told = loop {
        let (_, why, _) = over(&mut world.far);
        if why != "the peer's certificate is revoked" {
            break why;
        }
    };
    assert!(told.contains("of host `h1` is revoked"), "{told}");
    drop(client);
}

#[test]
fn a_daemon_that_dies_takes_its_flows_along() {
    let mut world = World::new();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let (_, client, _) = world.client(far(2121));
    world.admitted();
    assert_eq!(result(&client), 0);
    let (mut served, _) = listener.accept().unwrap();
    let mut client = blocking(client);
    client.write_all(b"x").unwrap();
    served.read_exact(&mut [0]).unwrap();
    nix::sys::signal::kill(world.near.pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    served.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(served.read(&mut [0; 8]).is_err(), "not an end of file: something may be missing");
    assert_eq!(client.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}
