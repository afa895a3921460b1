//! Filters on real sockets: who gets a SYN-ACK, who does not, and who is told of it.

#![expect(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[cfg(test)]
mod common;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use common::{Daemon, PATIENCE, net, own_network};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use portcullis_wire::keyd::{Kind, Net};

const SOON: Duration = Duration::from_millis(400);

/// Connects from `source`, which may take a while where the machine has other things to do.
fn connect_from(source: &str, to: SocketAddr) -> io::Result<TcpStream> {
    connect_from_port(SocketAddr::new(source.parse().unwrap(), 0), to, PATIENCE)
}

/// Whether nobody answers a SYN from `source`.
fn is_filtered(source: &str, to: SocketAddr) -> bool {
    is_filtered_from_port(SocketAddr::new(source.parse().unwrap(), 0), to)
}

fn is_filtered_from_port(source: SocketAddr, to: SocketAddr) -> bool {
    matches!(connect_from_port(source, to, SOON), Err(e) if e.kind() == io::ErrorKind::TimedOut)
}

fn connect_from_port(source: SocketAddr, to: SocketAddr, within: Duration) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(source))?;
    let timeout = <nix::sys::time::TimeVal as nix::sys::time::TimeValLike>::milliseconds(
        i64::try_from(within.as_millis()).unwrap(),
    );
    setsockopt(&fd, sockopt::SendTimeout, &timeout)?;
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => Ok(TcpStream::from(fd)),
        Err(nix::Error::EINPROGRESS) => Err(io::ErrorKind::TimedOut.into()),
        Err(e) => Err(e.into()),
    }
}

fn loopback(listener: &TcpListener, ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), listener.local_addr().unwrap().port())
}

#[test]
fn a_stranger_gets_no_syn_ack_and_is_reported_once() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let to = loopback(&listener, "127.0.0.1");
    assert!(connect_from("127.0.0.3", to).is_ok(), "before the filter everybody is served");

    keyd.filter(&listener, 77, &[net("127.0.0.2/32")]).unwrap();
    assert!(connect_from("127.0.0.2", to).is_ok());
    let source = SocketAddr::new("127.0.0.3".parse().unwrap(), 40_001);
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let before = now();
    {
        // Long enough for the SYN to be sent again.
        let socket = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        bind(socket.as_raw_fd(), &SockaddrStorage::from(source)).unwrap();
        let _ = connect(socket.as_raw_fd(), &SockaddrStorage::from(to));
        keyd.strangers(1);
        keyd.wait_for_strangers(2, Duration::from_millis(3500));
        assert!(nix::sys::socket::getpeername::<SockaddrStorage>(socket.as_raw_fd()).is_err());
    }
    let [stranger] = keyd.strangers.as_slice() else { panic!("{:?}", keyd.strangers) };
    assert_eq!(stranger.source.socket_addr(), Some(source));
    assert_eq!(stranger.destination.socket_addr(), Some(to));
    assert_eq!((stranger.protocol, stranger.tag, stranger.missed), (6, 77, 0));
    // The kernel's clock is translated; what is lost on the way is little.
    let (time, little) = (Duration::from_nanos(stranger.time), Duration::from_millis(500));
    assert!(time > before - little && time < now() + little, "{time:?}");
}

#[test]
fn a_list_is_exchanged_while_listening_and_cannot_be_taken_off() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let handle = keyd.filter(&listener, 1, &[net("127.0.0.2/32")]).unwrap();
    assert!(connect_from("127.0.0.2", to).is_ok());
    assert!(is_filtered("127.0.0.3", to));

    assert_eq!(keyd.refill(&handle, &[net("127.0.0.3/32"), net("127.0.1.0/24")]), 0);
    assert!(is_filtered("127.0.0.2", to));
    assert!(connect_from("127.0.0.3", to).is_ok());
    assert!(connect_from("127.0.1.77", to).is_ok());

    assert!(detach(&listener).is_err(), "locked, even against root");
    assert_eq!(keyd.filter(&listener, 1, &[]).unwrap_err(), libc::EALREADY);
    assert!(is_filtered("127.0.0.2", to));

    assert_eq!(keyd.refill(&handle, &Net::everyone()), 0);
    assert!(connect_from("127.0.0.2", to).is_ok());
    assert_eq!(keyd.refill(&handle, &[]), 0);
    assert!(is_filtered("127.0.0.2", to));

    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(detach(&plain).unwrap_err(), libc::ENOENT, "a socket without a filter may be asked");
}

fn detach(listener: &TcpListener) -> Result<(), i32> {
    let zero = 0_i32;
    #[expect(unsafe_code, reason = "nix has no SO_DETACH_FILTER")]
    // SAFETY: setsockopt(2) reads the four bytes of `zero`.
    let done = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_FILTER,
            (&raw const zero).cast(),
            4,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap()) }
}

#[test]
fn the_longest_prefix_decides_and_a_hole_is_a_longer_one() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let nets = [net("127.0.0.0/8"), net("127.0.5.0/24").refused(), net("127.0.5.9/32")];
    keyd.filter(&listener, 1, &nets).unwrap();
    assert!(connect_from("127.0.4.1", to).is_ok());
    assert!(is_filtered("127.0.5.1", to));
    assert!(connect_from("127.0.5.9", to).is_ok());
}

#[test]
fn source_ports_decide_within_a_prefix() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let one = net("127.0.0.2/32");
    let nets = [one.ports(20, 20), one.ports(5000, 5002)];
    keyd.filter(&listener, 1, &nets).unwrap();
    let at = |port| SocketAddr::new("127.0.0.2".parse().unwrap(), port);
    for passes in [20, 5000, 5001, 5002] {
        assert!(connect_from_port(at(passes), to, PATIENCE).is_ok(), "{passes}");
    }
    for dropped in [21, 19, 4999, 5003] {
        assert!(is_filtered_from_port(at(dropped), to), "{dropped}");
    }
    let five = [one.ports(1, 1), one.ports(2, 2), one.ports(3, 3), one.ports(4, 4), one.ports(5, 5)];
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(keyd.filter(&other, 1, &five).unwrap_err(), libc::EINVAL);
    assert!(keyd.filter(&other, 1, &five[..4]).is_ok());
}

#[test]
fn ipv6_and_dual_stack_listeners_tell_the_families_apart() {
    own_network(&["fd00::1/128", "fd00::2/128", "fd00::3/128"]);
    let mut keyd = Daemon::start();
    let dual = TcpListener::bind("[::]:0").unwrap();
    let (six, four) = (loopback(&dual, "fd00::1"), loopback(&dual, "127.0.0.1"));
    assert!(connect_from("fd00::3", six).is_ok() && connect_from("127.0.0.3", four).is_ok());
    let handle = keyd.filter(&dual, 6, &[net("fd00::2/128"), net("127.0.0.2/32")]).unwrap();
    assert!(connect_from("fd00::2", six).is_ok() && connect_from("127.0.0.2", four).is_ok());
    assert!(is_filtered("fd00::3", six) && is_filtered("127.0.0.3", four));
    keyd.strangers(2);
    let sources: Vec<_> = keyd.strangers.iter().filter_map(|s| Some(s.source.ip()?.to_string())).collect();
    assert_eq!(sources, ["fd00::3", "127.0.0.3"]);

    assert_eq!(keyd.refill(&handle, &[net("::/0")]), 0);
    assert!(connect_from("fd00::3", six).is_ok(), "all of IPv6");
    assert!(is_filtered("127.0.0.2", four), "and nothing of IPv4");
    assert_eq!(keyd.refill(&handle, &[net("0.0.0.0/0")]), 0);
    assert!(is_filtered("fd00::3", six));
    assert!(connect_from("127.0.0.3", four).is_ok());
}

#[test]
fn a_hundred_thousand_prefixes_are_one_list() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let mut nets: Vec<_> =
        (0..100_000_u32).map(|i| Net::new(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + i * 64)), 27)).collect();
    let handle = keyd.filter(&listener, 1, &nets).unwrap();
    assert!(is_filtered("127.0.0.2", to));
    nets.push(net("127.0.0.2/32"));
    assert_eq!(keyd.refill(&handle, &nets), 0);
    assert!(connect_from("127.0.0.2", to).is_ok());
}

#[test]
fn an_accepted_flow_keeps_its_data_and_the_listener_may_be_gone() {
    use std::io::{Read, Write};
    own_network(&[]);
    let mut keyd = Daemon::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    keyd.filter(&listener, 1, &[net("127.0.0.2/32")]).unwrap();
    let mut near = connect_from("127.0.0.2", listener.local_addr().unwrap()).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    drop(listener);
    let sent = vec![7; 300_000];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            near.write_all(&sent).unwrap();
            near.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        far.read_to_end(&mut got).unwrap();
        assert_eq!(got, sent);
    });
}

#[test]
fn datagrams_are_filtered_and_reported_likewise() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let to = receiver.local_addr().unwrap();
    let (friend, stranger) =
        (UdpSocket::bind("127.0.0.2:53").unwrap(), UdpSocket::bind("127.0.0.3:0").unwrap());
    let mut buffer = [0; 16];
    stranger.send_to(b"before", to).unwrap();
    assert_eq!(receiver.recv(&mut buffer).unwrap(), 6);
    keyd.filter(&receiver, 9, &[net("127.0.0.2/32").ports(53, 53)]).unwrap();
    for _ in 0..3 {
        stranger.send_to(b"after", to).unwrap();
    }
    receiver.set_read_timeout(Some(SOON)).unwrap();
    assert!(receiver.recv(&mut buffer).is_err());
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    friend.send_to(b"answer", to).unwrap();
    assert_eq!(receiver.recv(&mut buffer).unwrap(), 6);
    keyd.strangers(1);
    keyd.wait_for_strangers(2, SOON);
    let [one] = keyd.strangers.as_slice() else { panic!("{:?}", keyd.strangers) };
    assert_eq!((one.protocol, one.source.socket_addr()), (17, stranger.local_addr().ok()));
}

#[test]
fn a_flood_is_bounded_and_what_was_not_reported_is_counted() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
    keyd.filter(&receiver, 9, &[]).unwrap();
    let to = receiver.local_addr().unwrap();
    let begun = Instant::now();
    for i in 0..3000_u32 {
        let source = Ipv4Addr::from(0x7f01_0000 + i);
        UdpSocket::bind((source, 0)).unwrap().send_to(b"x", to).unwrap();
    }
    let end = Instant::now() + PATIENCE;
    let (mut reported, mut missed) = (0, 0);
    while reported + missed < 3000 && Instant::now() < end {
        keyd.wait_for_strangers(keyd.strangers.len() + 1, Duration::from_secs(1));
        reported = keyd.strangers.iter().filter(|s| s.time != 0).count() as u64;
        missed = keyd.strangers.iter().map(|s| s.missed).sum();
    }
    assert_eq!(reported + missed, 3000);
    let seconds = begun.elapsed().as_secs() + 2;
    assert!((200..=200 * seconds).contains(&reported), "{reported} in {seconds} s");
}

#[test]
fn a_restarted_daemon_hears_of_strangers_to_filters_of_the_old_one() {
    own_network(&[]);
    let mut old = Daemon::silent();
    let kept = old.ask(Kind::Hello, 0, 0, &[], &[]).unwrap().descriptors;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let handle = old.filter(&listener, 5, &[net("127.0.0.2/32")]).unwrap();
    drop(old);
    assert!(is_filtered("127.0.0.3", to), "a filter outlives its daemon");

    let mut new = Daemon::silent();
    let borrowed: Vec<_> = kept.iter().map(AsFd::as_fd).collect();
    new.ask(Kind::Hello, 0, 0, &[], &borrowed).unwrap();
    assert_eq!(new.strangers(1).len(), 1, "dropped while there was no daemon");
    assert_eq!(new.refill(&handle, &[net("127.0.0.3/32")]), 0);
    assert!(connect_from("127.0.0.3", to).is_ok());
    assert!(is_filtered("127.0.0.2", to));
    assert_eq!(new.strangers(2).last().unwrap().source.ip(), Some("127.0.0.2".parse().unwrap()));
}

#[test]
fn what_cannot_be_filtered_is_refused_with_its_errno() {
    own_network(&[]);
    let mut keyd = Daemon::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for wrong in
        [net("10.0.0.0/33"), Net { family: 5, ..net("10.0.0.0/8") }, Net { reserved: 1, ..net("::/0") }]
    {
        assert_eq!(keyd.filter(&listener, 1, &[wrong]).unwrap_err(), libc::EINVAL);
    }
    let raw =
        socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), nix::sys::socket::SockProtocol::Icmp);
    assert_eq!(keyd.filter(raw.unwrap(), 1, &[]).unwrap_err(), libc::EPROTONOSUPPORT);
    let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert_eq!(keyd.filter(&file, 1, &[]).unwrap_err(), libc::ENOTSOCK);
    assert_eq!(keyd.refill(&file, &[]), libc::EINVAL);
    assert_eq!(keyd.refill(&OwnedFd::from(listener.try_clone().unwrap()), &[]), libc::EINVAL);
    assert!(connect_from("127.0.0.3", listener.local_addr().unwrap()).is_ok(), "nothing was attached");
    assert!(keyd.filter(&listener, 1, &[net("127.0.0.2/32")]).is_ok());
}
