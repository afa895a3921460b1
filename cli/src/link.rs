//! Messages between `run` and the supervisor: one JSON value per packet, with descriptors beside it.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    cmsg_space,
    sys::{
        socket::{
            self, AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
            UnixAddr, sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::Mode;

/// Longest message; a longer one is refused by its reader.
const LONGEST: usize = 64 << 10;

/// What `run` says.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Say {
    /// First: what this run expects to be in force. `None`: whatever is. If it expects something, the process's pidfd
    /// is attached.
    Hello {
        /// Absolute path of the policy.
        policy: Option<PathBuf>,
        /// Whether refusals are enforced.
        mode: Option<Mode>,
        /// It is within another run's tree.
        nested: bool,
        /// What it is called in `ps`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    /// Before the guard: put this process under the backstop; its pidfd is attached.
    Enclose,
    /// Then, unless nested: the guard's listener and the process's pidfd are attached, in this order; the
    /// listener is missing if another was there before.
    Tree {
        /// Whether the guard's listener comes first.
        guarded: bool,
        /// The listener's number in the sender, who cannot attach anything any more: its calls are held.
        listener: Option<i32>,
        /// Whether the program begins with connections or listeners of somebody else's making.
        connected: bool,
    },
    /// Then, if nested and narrowed: the mark is there.
    Narrowed,
}

/// What there is to hold a tree beside the shim.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// The backstop holds it already; the guard will.
    Backstop,
    /// The guard: judged calls are made by proxy.
    Proxy {
        /// Landlock shall take connect(2) of TCP from the tree, where the kernel can.
        locked: bool,
    },
    /// Nothing: this user may not look into its own processes (Yama, ptrace(2)).
    Nothing,
}

/// What the supervisor answers.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Answer {
    /// To `Hello`: the broker is ready. The program's end of its door is attached.
    Welcome {
        /// Where it listens.
        broker: PathBuf,
        /// The uid that answers there.
        uid: u32,
        /// The shim that every uid can load.
        shim: PathBuf,
        /// A policy of its own narrows its tree, which puts a mark under itself.
        narrowed: bool,
    },
    /// To `Hello`: something else is in force.
    Conflict(String),
    /// To `Hello`: there is no broker, and why.
    Failed(String),
    /// To `Enclose`: what there is to hold it beside the shim.
    Enclosed(Hold),
    /// To `Tree` and `Narrowed`: it is being watched, and stopped at its beginning if it has connections.
    Watched,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Link(OwnedFd);

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Makes a socket with a name in the file system; not listening yet.
///
/// # Errors
/// As socket(2) and bind(2). A stale name is removed first.
pub fn bind(path: &Path) -> io::Result<OwnedFd> {
    make(path, SockType::SeqPacket)
}

fn make(path: &Path, kind: SockType) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let fd = socket::socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

/// As [`bind`], reachable by ourselves and root only.
///
/// # Errors
/// As [`bind`].
pub fn bind_private(path: &Path) -> io::Result<OwnedFd> {
    private(path, SockType::SeqPacket)
}

/// As [`bind_private`], for a stream of bytes.
///
/// # Errors
/// As [`bind`].
pub fn bind_private_stream(path: &Path) -> io::Result<OwnedFd> {
    private(path, SockType::Stream)
}

fn private(path: &Path, kind: SockType) -> io::Result<OwnedFd> {
    let fd = make(path, kind)?;
    // Nobody can have connected before this: the socket does not listen yet.
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(fd)
}

/// Starts listening; from now on the peer's `SO_PEERCRED` is ours.
///
/// # Errors
/// As listen(2).
pub fn listen(fd: &impl AsFd) -> io::Result<()> {
    Ok(socket::listen(&fd.as_fd(), Backlog::MAXCONN)?)
}

/// Connects to a name.
///
/// # Errors
/// As connect(2).
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let fd = socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

impl Link {
    /// Connects to a supervisor; every answer must come within `patience`.
    ///
    /// # Errors
    /// As connect(2).
    pub fn to(path: &Path, patience: Duration) -> io::Result<Self> {
        let link = Self(connect(path)?);
        let millis = i64::try_from(patience.as_millis()).unwrap_or(i64::MAX);
        socket::setsockopt(&link.0, sockopt::ReceiveTimeout, &TimeVal::milliseconds(millis))?;
        Ok(link)
    }

    /// Takes the next connection of a listening socket; it never blocks.
    ///
    /// # Errors
    /// As accept4(2).
    pub fn accept(listener: &impl AsFd) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket::accept4(listener.as_fd().as_raw_fd(), flags)?;
        Ok(Self(owned(fd)))
    }

    /// Sends one message with descriptors attached.
    ///
    /// # Errors
    /// As sendmsg(2).
    pub fn send(&self, message: &impl Serialize, fds: &[RawFd]) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let rights = [ControlMessage::ScmRights(fds)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        if fds.is_empty() {
            // Not sendmsg(2), which the guard holds.
            socket::send(self.0.as_raw_fd(), &text, flags)?;
            return Ok(());
        }
        socket::sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&text)], &rights, flags, None)?;
        Ok(())
    }

    /// Receives one message; `None` when the other side has closed.
    ///
    /// # Errors
    /// As recvmsg(2); `InvalidData` for what is no message.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; LONGEST];
        let mut space = cmsg_space!([RawFd; 2]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let got = socket::recvmsg::<()>(
            self.0.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let (length, flags) = (got.bytes, got.flags);
        let mut fds = Vec::new();
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                fds.extend(raw.into_iter().map(owned));
            }
        }
        if length == 0 {
            return Ok(None);
        }
        let whole = !flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        let text = bytes.get(..length).filter(|_| whole).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Some((serde_json::from_slice(text)?, fds)))
    }
}

#[expect(unsafe_code, reason = "nix hands out received descriptors as numbers")]
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us (accept4 or SCM_RIGHTS); nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_together() {
        let dir = std::env::temp_dir().join(format!("portcullis-link-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("s");
        let listener = bind(&path).unwrap();
        listen(&listener).unwrap();
        let here = Link::to(&path, Duration::from_secs(5)).unwrap();
        let there = Link::accept(&listener).unwrap();
        let hello =
            Say::Hello { policy: None, mode: Some(Mode::Audit), nested: true, name: Some("web".to_owned()) };
        here.send(&hello, &[0]).unwrap();
        let (said, fds) = there.receive::<Say>().unwrap().unwrap();
        assert!(
            matches!(said, Say::Hello { policy: None, mode: Some(Mode::Audit), nested: true, name: Some(name) } if name == "web")
        );
        assert_eq!(fds.len(), 1);
        drop(there);
        assert!(here.receive::<Answer>().unwrap().is_none());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
