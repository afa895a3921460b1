//! A key daemon in a process of its own, and the broker's side of its protocol.
#![expect(unsafe_code, reason = "fork(2), and descriptors from SCM_RIGHTS")]
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod world;

use std::{
    collections::VecDeque,
    io::{IoSlice, IoSliceMut, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    cmsg_space,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, kill},
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
            sendmsg, socketpair,
        },
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};
use portcullis_keyd::{Config, run};
use portcullis_wire::keyd::{FRAME, Flow, Head, INLINE_NETS, Kind, Net, Stranger};
use zerocopy::{FromBytes, IntoBytes};

/// How long anything may take that is going to happen at all, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Moves this thread into a network namespace of its own, with the given addresses on loopback.
pub fn own_network(addresses: &[&str]) {
    unshare(CloneFlags::CLONE_NEWNET).expect("network namespaces need root; they are what is tested");
    ip(&["link", "set", "lo", "up"]);
    for address in addresses {
        ip(&["address", "add", address, "dev", "lo", "nodad"]);
        // The route follows a little later.
        let bare = address.split('/').next().unwrap();
        let there = || std::net::UdpSocket::bind((bare, 0)).and_then(|socket| socket.connect((bare, 9)));
        let end = Instant::now() + PATIENCE;
        while there().is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

pub fn ip(arguments: &[&str]) {
    assert!(Command::new("ip").args(arguments).status().unwrap().success(), "ip {arguments:?}");
}

/// The daemon, started in the namespace of the calling thread.
pub struct Daemon {
    pub pid: Pid,
    pub broker: OwnedFd,
    seq: u32,
    pub strangers: Vec<Stranger>,
    /// Reports about associations.
    pub reports: VecDeque<(Kind, Head, Vec<u8>)>,
}

pub struct Answer {
    pub head: Head,
    pub rest: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

impl Daemon {
    /// Starts it and says hello.
    pub fn start() -> Self {
        let mut it = Self::silent();
        let hello = it.ask(Kind::Hello, 0, 0, &[], &[]).expect("an answer");
        assert_eq!(hello.head.flags, Head::FILTERS | Head::DESTROYS);
        assert_eq!(hello.descriptors.len(), 3);
        it
    }

    pub fn silent() -> Self {
        Self::starting(None, None)
    }

    pub fn starting(ready: Option<OwnedFd>, state: Option<std::path::PathBuf>) -> Self {
        Self::led(None, ready, state)
    }

    /// One that is led from broker to broker.
    pub fn led(brokers: Option<OwnedFd>, ready: Option<OwnedFd>, state: Option<std::path::PathBuf>) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        // SAFETY: the child does nothing but run the daemon, which takes no lock that a thread of the
        // parent might have held (glibc's allocator looks after its own over fork).
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                Self { pid: child, broker: ours, seq: 0, strangers: Vec::new(), reports: VecDeque::new() }
            }
            ForkResult::Child => {
                // Sockets of other tests would live on in here.
                let kept =
                    [Some(&theirs), ready.as_ref(), brokers.as_ref()].map(|fd| fd.map(AsRawFd::as_raw_fd));
                for fd in (3..4096).filter(|fd| !kept.contains(&Some(*fd))) {
                    // SAFETY: nothing in this process uses a descriptor that is not kept; `ours` is forgotten.
                    unsafe { libc::close(fd) };
                }
                std::mem::forget(ours);
                let status = match run(Config { broker: theirs, brokers, state, ready }) {
                    Ok(()) => 0,
                    Err(e) => {
                        let _ = writeln!(std::io::stderr(), "keyd: {e}: {e:?}");
                        1
                    }
                };
                // SAFETY: ends the child without running the parent's exit handlers.
                unsafe { libc::_exit(status) }
            }
        }
    }

    pub fn send(&self, bytes: &[&[u8]], descriptors: &[BorrowedFd<'_>]) {
        let slices: Vec<_> = bytes.iter().map(|part| IoSlice::new(part)).collect();
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[_] = if raw.is_empty() { &[] } else { &rights };
        sendmsg::<()>(self.broker.as_raw_fd(), &slices, control, MsgFlags::MSG_NOSIGNAL, None).unwrap();
    }

    /// One request and its answer; `None` if the daemon ended instead.
    pub fn ask(
        &mut self,
        kind: Kind,
        tag: u64,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Option<Answer> {
        self.seq += 1;
        let mut head = Head::new(kind, self.seq);
        (head.tag, head.flags) = (tag, flags);
        if matches!(kind, Kind::Filter | Kind::Refill) {
            head.count = u32::try_from(body.len() / size_of::<Net>()).unwrap();
        }
        let file;
        let mut fds = fds.to_vec();
        let mut body = body;
        if body.len() > INLINE_NETS * size_of::<Net>() {
            head.flags |= Head::LIST_ATTACHED;
            let list = memfd_create("nets", MFdFlags::MFD_CLOEXEC).unwrap();
            std::fs::File::from(list.try_clone().unwrap()).write_all(body).unwrap();
            body = &[];
            file = list;
            fds.push(file.as_fd());
        }
        self.send(&[head.as_bytes(), body], &fds);
        loop {
            let answer = self.receive(PATIENCE)?;
            if answer.head.seq == self.seq {
                return Some(answer);
            }
        }
    }

    /// The next message; strangers are put aside (and returned, with `seq` 0). `None`: nothing came.
    pub fn receive(&mut self, within: Duration) -> Option<Answer> {
        let mut fds = [PollFd::new(self.broker.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::try_from(within).unwrap()).unwrap() == 0 {
            return None;
        }
        let mut frame = vec![0; FRAME];
        let mut space = cmsg_space!([i32; 4]);
        let mut slices = [IoSliceMut::new(&mut frame)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.broker.as_raw_fd(), &mut slices, Some(&mut space), flags).ok()?;
        let mut descriptors = Vec::new();
        for control in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                // SAFETY: just installed by the kernel for this message.
                descriptors.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let length = message.bytes;
        if length == 0 {
            return None;
        }
        let (kind, head, rest) = Head::decode(&frame[..length]).unwrap();
        if kind == Kind::Stranger {
            self.strangers.push(Stranger::read_from_bytes(rest).unwrap());
        } else if head.seq == 0 {
            self.reports.push_back((kind, head, rest.to_vec()));
        }
        Some(Answer { head, rest: rest.to_vec(), descriptors })
    }

    /// Waits until `count` strangers were reported.
    pub fn strangers(&mut self, count: usize) -> &[Stranger] {
        self.wait_for_strangers(count, PATIENCE);
        assert!(self.strangers.len() >= count, "{:?}", self.strangers);
        &self.strangers
    }

    /// Waits until `count` strangers were reported, or the time is over.
    pub fn wait_for_strangers(&mut self, count: usize, within: Duration) {
        let end = Instant::now() + within;
        while self.strangers.len() < count && Instant::now() < end {
            self.receive(Duration::from_millis(50));
        }
    }

    /// The next report about an association.
    pub fn report(&mut self) -> (Kind, Head, Vec<u8>) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(report) = self.reports.pop_front() {
                return report;
            }
            assert!(Instant::now() < end, "no report");
            self.receive(Duration::from_millis(50));
        }
    }

    /// A daemon with a host's keys.
    pub fn with_keys(folder: &std::path::Path) -> Self {
        let mut it = Self::starting(None, Some(folder.to_owned()));
        let hello = it.ask(Kind::Hello, 0, 0, &[], &[]).expect("an answer");
        assert_eq!(hello.head.flags, Head::FILTERS | Head::DESTROYS | Head::PROTECTS);
        it
    }

    /// The same, and what leads it to further brokers.
    pub fn lasting(folder: &std::path::Path) -> (Self, OwnedFd) {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let mut it = Self::led(Some(theirs), None, Some(folder.to_owned()));
        it.ask(Kind::Hello, 0, 0, &[], &[]).expect("an answer");
        (it, ours)
    }

    /// Its broker dies.
    pub fn bereave(&mut self) {
        let (_closed, other) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        self.broker = other;
        self.reports.clear();
    }

    /// Another broker comes.
    pub fn lead(&mut self, leads: &OwnedFd) {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (raw, letter) = ([theirs.as_raw_fd()], [IoSlice::new(b"B")]);
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(leads.as_raw_fd(), &letter, &rights, MsgFlags::empty(), None).unwrap();
        self.broker = ours;
        let hello = self.ask(Kind::Hello, 0, 0, &[], &[]).expect("an answer");
        assert_ne!(hello.head.flags & Head::PROTECTS, 0);
    }

    pub fn filter(&mut self, socket: impl AsFd, tag: u64, nets: &[Net]) -> Result<OwnedFd, i32> {
        let mut answer = self.ask(Kind::Filter, tag, 0, nets.as_bytes(), &[socket.as_fd()]).unwrap();
        if answer.head.errno == 0 { Ok(answer.descriptors.remove(0)) } else { Err(answer.head.errno) }
    }

    pub fn refill(&mut self, handle: &OwnedFd, nets: &[Net]) -> i32 {
        self.ask(Kind::Refill, 0, 0, nets.as_bytes(), &[handle.as_fd()]).unwrap().head.errno
    }

    /// How a flow was cut, or the errno for which it was not.
    pub fn cut(&mut self, flow: &Flow, socket: Option<BorrowedFd<'_>>) -> Result<u32, i32> {
        let fds: Vec<_> = socket.into_iter().collect();
        let head = self.ask(Kind::Cut, 0, 0, flow.as_bytes(), &fds).unwrap().head;
        if head.errno == 0 { Ok(head.count) } else { Err(head.errno) }
    }

    /// Exit status once it has ended by itself.
    pub fn ended(self) -> i32 {
        match waitpid(self.pid, None).unwrap() {
            WaitStatus::Exited(_, status) => {
                std::mem::forget(self);
                status
            }
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// `10.0.0.0/8` and the like.
pub fn net(text: &str) -> Net {
    let (ip, bits) = text.split_once('/').unwrap();
    Net::new(ip.parse().unwrap(), bits.parse().unwrap())
}
