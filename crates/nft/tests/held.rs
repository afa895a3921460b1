//! The table, with real sockets in a cgroup and a network namespace of their own.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::{
    fs,
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use portcullis_nft::{Pass, Refusals, Table};

/// A cgroup v2 that this test has made; a thread's sockets are those of its process, so each test is one process.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = mounts.lines().find(|l| l.contains(" cgroup2 ")).unwrap().split(' ').nth(1).unwrap();
        let path = PathBuf::from(root).join(format!("portcullis-test-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn id(&self) -> u64 {
        fs::metadata(&self.0).unwrap().ino()
    }

    /// Does something as a process in it.
    fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        let enter = |at: &PathBuf| fs::write(at.join("cgroup.procs"), "0").unwrap();
        enter(&self.0);
        let done = work();
        enter(&self.0.parent().unwrap().to_path_buf());
        done
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _gone = fs::remove_dir(&self.0);
    }
}

fn to(protocol: u8, at: SocketAddr) -> Pass {
    Pass::To { protocol, addr: at.ip(), port: at.port() }
}

/// All in one test, as it is the process that enters the cgroup.
#[test]
fn what_nobody_granted_does_not_leave_and_the_rest_does() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    assert!(std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
    let (group, name) = (Group::new("nft"), format!("portcullis-test-{}", std::process::id()));
    let table = Table::of(&name).unwrap();
    table.make(true).unwrap();
    table.hold(group.id(), 1).unwrap();
    let mut refusals = Refusals::of(&name).unwrap();
    assert!(table.names().unwrap().contains(&name));

    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = server.local_addr().unwrap();
    let v6 = TcpListener::bind("[::1]:0").unwrap();
    let at6 = v6.local_addr().unwrap();
    for at in [at, at6] {
        assert!(TcpStream::connect(at).is_ok(), "control: who is not in it");
        let refused = group.within(|| TcpStream::connect(at)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let told = refusals.take();
        let last = told.last().unwrap();
        assert_eq!((last.destination, last.arrives, last.uid), (at, false, Some(0)), "{told:?}");
        table.grant(to(6, at)).unwrap();
        table.grant(to(6, at)).unwrap();
        let mut stream = group.within(|| TcpStream::connect(at)).unwrap();
        table.clear().unwrap();
        assert!(group.within(|| TcpStream::connect(at)).is_err());
        stream.write_all(b"goes on").unwrap();
    }

    // Datagrams: what has begun goes on, from the same port.
    let hears = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = hears.local_addr().unwrap();
    let says = group.within(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    let other = group.within(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    assert_eq!(says.send_to(b"x", at).unwrap_err().kind(), ErrorKind::PermissionDenied);
    table.grant(to(17, at)).unwrap();
    says.send_to(b"x", at).unwrap();
    table.clear().unwrap();
    says.send_to(b"x", at).unwrap();
    assert!(other.send_to(b"x", at).is_err());

    table.grant(Pass::Others).unwrap();
    assert!(other.send_to(b"x", at).is_err(), "it is UDP");
    table.grant(Pass::Anything).unwrap();
    other.send_to(b"x", hears.local_addr().unwrap()).unwrap();
    table.clear().unwrap();

    // Listeners: who comes to one that is not granted waits in vain.
    let listener = group.within(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let at = listener.local_addr().unwrap();
    let patience = Duration::from_millis(300);
    assert_eq!(TcpStream::connect_timeout(&at, patience).unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(refusals.take().iter().any(|told| told.arrives && told.destination == at));
    table.grant(Pass::Listener(at.port())).unwrap();
    let come = thread::spawn(move || {
        let mut word = [0; 2];
        TcpStream::connect(at)?.read_exact(&mut word)?;
        io::Result::Ok(word)
    });
    listener.accept().unwrap().0.write_all(b"hi").unwrap();
    assert_eq!(come.join().unwrap().unwrap(), *b"hi");
    table.forget(Pass::Listener(at.port())).unwrap();
    assert!(TcpStream::connect_timeout(&at, patience).is_err());

    let other = group.within(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    // Cgroups come and go.
    table.hold_only(&[]).unwrap();
    assert!(other.send_to(b"x", hears.local_addr().unwrap()).is_ok());
    for _ in 0..2 {
        table.hold_only(&[(group.id(), 1)]).unwrap();
    }
    assert!(other.send_to(b"x", hears.local_addr().unwrap()).is_err());
    let other = group.within(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    // Another supervisor takes the table over: whom it holds it goes on holding.
    table.make(true).unwrap();
    assert!(says.send_to(b"x", hears.local_addr().unwrap()).is_ok(), "known before");
    assert!(other.send_to(b"x", hears.local_addr().unwrap()).is_err());
    // One that only tells.
    table.make(false).unwrap();
    drop(refusals.take());
    other.send_to(b"x", hears.local_addr().unwrap()).unwrap();
    assert_eq!(refusals.take().len(), 1);
    // More than there is room for: how many is known.
    let heard = |refusals: &mut Refusals| {
        let some = std::iter::from_fn(|| Some(refusals.take()).filter(|some| !some.is_empty()));
        some.flatten().map(|told| 1 + told.missed).sum::<u32>()
    };
    (0..5000).for_each(|_| drop(other.send_to(b"x", hears.local_addr().unwrap())));
    let first = heard(&mut refusals);
    assert!(first < 5000, "all had room");
    other.send_to(b"x", hears.local_addr().unwrap()).unwrap();
    assert_eq!(first + heard(&mut refusals), 5001);
    table.remove().unwrap();
    assert!(!table.names().unwrap().contains(&name));
    assert!(table.grant(Pass::Others).is_err() && table.hold(group.id(), 1).is_err());
}
