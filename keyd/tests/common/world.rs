//! Two hosts with a link between them: real programs' sockets, real daemons, a wire between them.

use std::{
    fs::File,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, getsockopt, listen,
        setsockopt, socket, sockopt,
    },
};
use portcullis_keyd::identity::{Authority, Enrolment};
use portcullis_wire::{
    Addr,
    keyd::{Head, Kind, Net, Open, Over, Places},
};
use tempfile::TempDir;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{Daemon, PATIENCE, ip};

pub const PROCESS: &[u8] = br#"{"name":"x","exe":"/usr/bin/x","sha256":"00","user":"u"}"#;
pub const NEAR: &str = "10.99.0.1";
pub const FAR: &str = "10.99.0.2";
pub const NEAR_SIX: &str = "fd00:99::1";
pub const FAR_SIX: &str = "fd00:99::2";

/// Two hosts with a link between them; each has its daemon.
pub struct World {
    pub near_net: File,
    pub far_net: File,
    pub near: Daemon,
    pub far: Daemon,
    pub folder: TempDir,
}

pub fn own_net() -> File {
    File::open("/proc/thread-self/ns/net").unwrap()
}

impl World {
    pub fn new() -> Self {
        Self::as_members("h1", "h2", &[("h1", NEAR), ("h2", FAR)])
    }

    /// Hosts with these names, of a trust domain with these members.
    pub fn as_members(near_name: &str, far_name: &str, members: &[(&str, &str)]) -> Self {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let far_net = own_net();
        ip(&["link", "set", "lo", "up"]);
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let near_net = own_net();
        ip(&["link", "set", "lo", "up"]);
        ip(&["link", "add", "wire", "type", "veth", "peer", "name", "eriw"]);
        setns(&far_net, CloneFlags::CLONE_NEWNET).unwrap();
        // A link is moved to where somebody lives.
        let mut lodger = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        setns(&near_net, CloneFlags::CLONE_NEWNET).unwrap();
        ip(&["link", "set", "eriw", "netns", &lodger.id().to_string()]);
        ip(&["address", "add", &format!("{NEAR}/24"), "dev", "wire"]);
        ip(&["address", "add", &format!("{NEAR_SIX}/64"), "dev", "wire", "nodad"]);
        ip(&["link", "set", "wire", "up"]);
        setns(&far_net, CloneFlags::CLONE_NEWNET).unwrap();
        lodger.kill().unwrap();
        lodger.wait().unwrap();
        ip(&["address", "add", &format!("{FAR}/24"), "dev", "eriw"]);
        ip(&["address", "add", &format!("{FAR_SIX}/64"), "dev", "eriw", "nodad"]);
        ip(&["link", "set", "eriw", "up"]);

        let folder = tempfile::tempdir().unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let now = now.as_secs().cast_signed();
        let mut authority = Authority::init(folder.path(), "example.com".parse().unwrap(), now).unwrap();
        for (name, address) in members {
            let with = Enrolment { addresses: vec![address.parse().unwrap()], ..Enrolment::default() };
            authority.enrol(&name.parse().unwrap(), &with, &folder.path().join(name), now).unwrap();
        }
        for (name, _) in members {
            authority.publish(&folder.path().join(name)).unwrap();
        }
        let far = Daemon::with_keys(&folder.path().join(far_name));
        setns(&near_net, CloneFlags::CLONE_NEWNET).unwrap();
        let near = Daemon::with_keys(&folder.path().join(near_name));
        Self { near_net, far_net, near, far, folder }
    }

    pub fn on_far<T>(&self, act: impl FnOnce() -> T) -> T {
        setns(&self.far_net, CloneFlags::CLONE_NEWNET).unwrap();
        let result = act();
        setns(&self.near_net, CloneFlags::CLONE_NEWNET).unwrap();
        result
    }

    /// A program's listener on the far host, as it makes it and as the broker has it protected.
    pub fn listener(&mut self, at: &str) -> (u64, TcpListener) {
        let fd = self.bound(at);
        let (front, errno) = serve(&mut self.far, &fd, &[], 0);
        assert_eq!(errno, 0);
        listen(&fd, Backlog::new(16).unwrap()).unwrap();
        (front, TcpListener::from(fd))
    }

    /// A socket on the far host that does not listen yet.
    pub fn bound(&self, at: &str) -> OwnedFd {
        let family = if at.starts_with('[') { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let fd = self.on_far(|| socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap());
        setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
        bind(fd.as_raw_fd(), &SockaddrStorage::from(at.parse::<SocketAddr>().unwrap())).unwrap();
        fd
    }

    /// A program on the near host begins to connect.
    pub fn client(&mut self, to: SocketAddr) -> (u64, OwnedFd, Places) {
        let fd = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        let (id, places) = open(&mut self.near, &fd, to).unwrap();
        let begun = connect(fd.as_raw_fd(), &raw(&places.inner_remote));
        assert_eq!(begun, Err(Errno::EINPROGRESS));
        (id, fd, places)
    }

    /// As [`Self::client`], by a socket that the program has made and maybe bound.
    pub fn client_with(&mut self, fd: OwnedFd, to: SocketAddr) -> (u64, OwnedFd, Places) {
        let own = nix::sys::socket::getsockname::<SockaddrStorage>(fd.as_raw_fd()).unwrap();
        let local = match (own.as_sockaddr_in(), own.as_sockaddr_in6()) {
            (Some(own), _) => Addr::v4(own.ip(), own.port()),
            (_, Some(own)) => Addr::v6(own.ip(), own.port(), own.scope_id()),
            _ => Addr::NONE,
        };
        let ask = Open { remote: Addr::from(to), local, ..Open::new_zeroed() };
        let body = [ask.as_bytes(), PROCESS].concat();
        let (id, places) = placed(&mut self.near, Kind::Open, &body, &fd).unwrap();
        assert_eq!(connect(fd.as_raw_fd(), &raw(&places.inner_remote)), Err(Errno::EINPROGRESS));
        (id, fd, places)
    }

    /// A whole association: the program's socket at each end.
    pub fn pair(&mut self, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let (_, client, _) = self.client(far(2121));
        self.admitted();
        assert_eq!(result(&client), 0);
        let (served, _) = listener.accept().unwrap();
        served.set_read_timeout(Some(PATIENCE)).unwrap();
        (blocking(client), served)
    }

    /// Both brokers admit, the far one first; returns what each was told of its peer, and the places.
    pub fn admitted(&mut self) -> [(String, Places); 2] {
        let far = admit(&mut self.far);
        let near = admit(&mut self.near);
        [near, far]
    }
}

pub fn admit(daemon: &mut Daemon) -> (String, Places) {
    let (id, told) = shown(daemon);
    (told, admit_one(daemon, id))
}

/// Admits an association, and waits until it carries data.
pub fn admit_one(daemon: &mut Daemon, id: u64) -> Places {
    let answer = daemon.ask(Kind::Admit, id, 0, &[], &[]).unwrap();
    assert_eq!(answer.head.errno, 0);
    if answer.head.count == 1 {
        return Places::read_from_bytes(&answer.rest).unwrap();
    }
    let (kind, head, rest) = later(daemon, id);
    assert_eq!((kind, head.tag), (Kind::Associated, id), "{}", String::from_utf8_lossy(&rest));
    Places::read_from_bytes(&rest).unwrap()
}

/// The next report that is not of the end of another association.
pub fn later(daemon: &mut Daemon, id: u64) -> (Kind, Head, Vec<u8>) {
    loop {
        let report = daemon.report();
        if report.0 != Kind::Over || report.1.tag == id {
            return report;
        }
    }
}

pub fn raw(addr: &Addr) -> SockaddrStorage {
    let [a, b, c, d, ..] = addr.ip;
    match addr.family {
        4 => SocketAddr::from(([a, b, c, d], addr.port)).into(),
        _ => SocketAddr::from((addr.ip, addr.port)).into(),
    }
}

pub fn shown(daemon: &mut Daemon) -> (u64, String) {
    let (kind, head, rest) = later(daemon, 0);
    assert_eq!(kind, Kind::Shown, "{}", String::from_utf8_lossy(&rest));
    (head.tag, String::from_utf8(rest[size_of::<Places>()..].to_vec()).unwrap())
}

/// Errno and reason of the next end.
pub fn over(daemon: &mut Daemon) -> (i32, String, Over) {
    over_if(daemon, |_| true)
}

/// Errno and reason of the end of one association.
pub fn over_of(daemon: &mut Daemon, id: u64) -> (i32, String, Over) {
    over_if(daemon, |tag| tag == id)
}

fn over_if(daemon: &mut Daemon, wanted: impl Fn(u64) -> bool) -> (i32, String, Over) {
    loop {
        if let (Kind::Over, head, rest) = daemon.report()
            && wanted(head.tag)
        {
            let (carried, why) = Over::read_from_prefix(&rest).unwrap();
            let why = why[size_of::<Places>()..].split(|byte| *byte == b'\n').next().unwrap();
            return (head.errno, String::from_utf8(why.to_vec()).unwrap(), carried);
        }
    }
}

pub fn placed(daemon: &mut Daemon, kind: Kind, body: &[u8], fd: &OwnedFd) -> Result<(u64, Places), i32> {
    let answer = daemon.ask(kind, 0, 0, body, &[fd.as_fd()]).unwrap();
    match answer.head.errno {
        0 => Ok((answer.head.tag, Places::read_from_bytes(&answer.rest).unwrap())),
        errno => Err(errno),
    }
}

pub fn open(daemon: &mut Daemon, fd: &OwnedFd, to: SocketAddr) -> Result<(u64, Places), i32> {
    let ask = Open { remote: Addr::from(to), patience: 20_000, ..Open::new_zeroed() };
    placed(daemon, Kind::Open, &[ask.as_bytes(), PROCESS].concat(), fd)
}

/// Has a listener filtered, so that `plain` come to it as they are and all others to its front. The front's number
/// and an errno.
pub fn serve(daemon: &mut Daemon, fd: &OwnedFd, plain: &[Net], flags: u32) -> (u64, i32) {
    serving(daemon, fd, plain, flags, PROCESS)
}

/// As [`serve`], where nobody may come in plain; the errno.
pub fn serve_as(daemon: &mut Daemon, fd: &OwnedFd, process: &[u8]) -> i32 {
    serving(daemon, fd, &[], 0, process).1
}

fn serving(daemon: &mut Daemon, fd: &OwnedFd, plain: &[Net], flags: u32, process: &[u8]) -> (u64, i32) {
    let all = [plain, &Net::everyone().map(Net::refused)].concat();
    let filter = daemon.filter(fd, 1, &all).unwrap();
    let head = Head { count: 16, flags, ..Head::new(Kind::Serve, 77) };
    daemon.send(&[head.as_bytes(), process], &[fd.as_fd(), filter.as_fd()]);
    loop {
        let answer = daemon.receive(PATIENCE).unwrap();
        if answer.head.seq == 77 {
            return (answer.head.tag, answer.head.errno);
        }
    }
}

pub fn blocking(fd: OwnedFd) -> TcpStream {
    let stream = TcpStream::from(fd);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The result of a connection under way.
pub fn result(fd: &OwnedFd) -> i32 {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    assert_eq!(poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap(), 1, "no result");
    getsockopt(fd, sockopt::SocketError).unwrap()
}

pub fn far(port: u16) -> SocketAddr {
    SocketAddr::new(FAR.parse().unwrap(), port)
}
