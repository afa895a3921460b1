//! The real key daemons, one at each end, with the least of a broker for each: it admits whoever is shown.

use std::{
    collections::HashMap,
    io::{self, IoSlice, IoSliceMut},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
        mpsc::{Sender, channel},
    },
    thread,
    time::Duration,
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrStorage,
        connect, recvmsg, sendmsg, socket, socketpair,
    },
};
use portcullis_keyd::{Config, run};
use portcullis_wire::{
    Addr,
    keyd::{FRAME, Head, Kind, Net, Open, Places},
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::Outcome;

/// The process, with a certificate of its own for each association.
const PROCESS: &str = r#"{"name":"bench","exe":"/bench","sha256":"00","user":"root","related":true}"#;
const PATIENCE: Duration = Duration::from_secs(10);

/// Is a key daemon, whose broker is at its standard input.
pub(crate) fn serve(folder: &Path) -> Outcome<()> {
    let broker = io::stdin().as_fd().try_clone_to_owned()?;
    Ok(run(Config { broker, brokers: None, state: Some(folder.to_owned()), ready: None })?)
}

/// An answer: what its head says, what follows, and a descriptor.
type Answer = (Head, Vec<u8>, Option<OwnedFd>);

/// What stands in for a broker.
pub(crate) struct Broker {
    socket: OwnedFd,
    last: AtomicU32,
    asked: Mutex<HashMap<u32, Sender<Answer>>>,
    /// Number of the association that was admitted last.
    admitted: AtomicU64,
}

/// The process, for what belongs to an association.
fn of(id: u64) -> String {
    format!(r#"{{"name":"bench","exe":"/bench","sha256":"00","user":"root","of":{id}}}"#)
}

impl Broker {
    /// Starts a key daemon and serves it.
    pub(crate) fn start(mut command: Command, folder: &Path) -> Outcome<(Child, Arc<Self>)> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let child = command.arg("keyd").arg(folder).stdin(Stdio::from(theirs)).spawn()?;
        let (last, admitted) = (AtomicU32::new(0), AtomicU64::new(0));
        let broker = Arc::new(Self { socket: ours, last, asked: Mutex::default(), admitted });
        let serves = Arc::clone(&broker);
        thread::spawn(move || serves.listen());
        let (hello, _, _) = broker.ask(Head::new(Kind::Hello, 0), &[], &[])?;
        if hello.flags & Head::PROTECTS == 0 {
            return Err("the key daemon cannot protect here".into());
        }
        Ok((child, broker))
    }

    fn asked(&self) -> MutexGuard<'_, HashMap<u32, Sender<Answer>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, head: &Head, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[_] = if raw.is_empty() { &[] } else { &rights };
        let parts = [IoSlice::new(head.as_bytes()), IoSlice::new(body)];
        sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    fn ask(&self, head: Head, body: &[u8], fds: &[BorrowedFd<'_>]) -> Outcome<Answer> {
        let seq = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let (tell, answer) = channel();
        self.asked().insert(seq, tell);
        self.send(&Head { seq, ..head }, body, fds)?;
        let answer = answer.recv_timeout(PATIENCE)?;
        match answer.0.errno {
            0 => Ok(answer),
            errno => Err(io::Error::from_raw_os_error(errno).into()),
        }
    }

    /// Admits whoever is shown, and passes answers on, until the daemon ends.
    fn listen(&self) -> Option<()> {
        let mut frame = vec![0; FRAME];
        loop {
            let mut space = cmsg_space!([i32; 4]);
            let mut slices = [IoSliceMut::new(&mut frame)];
            let (fd, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_CMSG_CLOEXEC);
            let message = recvmsg::<()>(fd, &mut slices, Some(&mut space), flags).ok()?;
            let mut attached = None;
            for control in message.cmsgs().ok()? {
                attached = taken(control).into_iter().next().or(attached);
            }
            let length = message.bytes;
            let (kind, head, rest) = Head::decode(frame.get(..length)?).ok()?;
            if head.seq != 0 {
                let asked = self.asked().remove(&head.seq);
                // Admissions are waited for by nobody.
                let _nobody = asked.map(|tell| tell.send((head, rest.to_vec(), attached)));
            } else if kind == Kind::Shown {
                let seq = self.last.fetch_add(1, Ordering::Relaxed) + 1;
                self.admitted.store(head.tag, Ordering::Relaxed);
                self.send(&Head { tag: head.tag, ..Head::new(Kind::Admit, seq) }, &[], &[]).ok()?;
            }
        }
    }

    /// Number of the association that was admitted last.
    pub(crate) fn admitted(&self) -> u64 {
        self.admitted.load(Ordering::Relaxed)
    }

    /// Protects a listener, as a broker does where every peer must have a certificate. With `control`, who comes there
    /// belongs to that association.
    pub(crate) fn protect(&self, listener: &TcpListener, control: Option<u64>) -> Outcome<()> {
        // Nobody comes in plain, and anybody may prove who he is.
        let nets = Net::everyone().map(Net::refused);
        let head = Head { count: 2, ..Head::new(Kind::Filter, 0) };
        let (_, _, filter) = self.ask(head, nets.as_bytes(), &[listener.as_fd()])?;
        let filter = filter.ok_or("no filter")?;
        let head = Head { count: 4096, ..Head::new(Kind::Serve, 0) };
        let process = control.map_or_else(|| PROCESS.to_owned(), of);
        self.ask(head, process.as_bytes(), &[listener.as_fd(), filter.as_fd()])?;
        Ok(())
    }

    /// Connects as a wrapped program does.
    pub(crate) fn open(&self, to: SocketAddr, control: Option<u64>) -> Outcome<TcpStream> {
        let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        let ask = Open { remote: Addr::from(to), ..Open::new_zeroed() };
        let process = control.map_or_else(|| PROCESS.to_owned(), of);
        let body = [ask.as_bytes(), process.as_bytes()].concat();
        let (_, places, _) = self.ask(Head::new(Kind::Open, 0), &body, &[fd.as_fd()])?;
        let places = Places::read_from_bytes(&places).map_err(|_| "no places")?;
        let token = places.inner_remote.socket_addr().ok_or("no token")?;
        match connect(fd.as_raw_fd(), &SockaddrStorage::from(token)) {
            Ok(()) => Ok(TcpStream::from(fd)),
            Err(Errno::EINTR) => Err("interrupted".into()),
            Err(e) => Err(e.into()),
        }
    }
}

#[expect(unsafe_code, reason = "descriptors from SCM_RIGHTS come as numbers")]
fn taken(message: ControlMessageOwned) -> Vec<OwnedFd> {
    use std::os::fd::FromRawFd;
    let ControlMessageOwned::ScmRights(numbers) = message else { return Vec::new() };
    // SAFETY: the kernel has installed these descriptors for this very message, which is consumed here, so they
    // are open and nobody else's.
    numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect()
}
