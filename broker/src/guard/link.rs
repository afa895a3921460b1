//! What outlives a broker: the supervisor hands it to each one that is started, over a `SOCK_SEQPACKET` pair on
//! which each message is one letter, numbers, and descriptors. The same way the broker leaves with it what
//! the next one will need.
//!
//! | letter | numbers | descriptors | from |
//! |---|---|---|---|
//! | `B` | | the backstop, as `portcullis_backstop::load_for_another` gives it | supervisor |
//! | `N` | why there is no backstop, as text | | supervisor |
//! | `A` | why the backstop is an nftables table, as text | | supervisor |
//! | `R` | | the record ring of the broker before, as `portcullis_backstop::events_of` has it | supervisor |
//! | `V` | | memory of records that are not on disk yet (`portcullis_broker::Unsaid`), before all else | supervisor |
//! | `L` | a tag, a mark or 0, what stands for the marks before it or 0, a mode, and a policy's path as text | pidfd of a run whose tree that policy narrows | supervisor |
//! | `M` | a tag | none: that run has put its mark under itself | supervisor |
//! | `Y` | a tag, a mark or 0, what stands for the marks before it or 0 | none: it is known | broker |
//! | `U` | a tag | none: that run's tree is no more, or cannot be narrowed | both |
//! | `T` | a tag of `L`, or 0 | guards' listeners, one of each tree that the backstop holds too | supervisor |
//! | `P` | a tag of `L`, or 0 | guards' listeners, one of each tree whose calls are made by proxy | supervisor |
//! | `S` | a tag | pidfd of a program that begins with connections, and is stopped until they are judged | supervisor |
//! | `J` | a tag | none: they are judged | broker |
//! | `K` | | the book of held calls (`portcullis_guard::book`), after all trees | supervisor |
//! | `D` | inodes of their other ends, and the label of their run | the broker's ends of doors | supervisor |
//! | `F` | tags, eight bytes each | what exchanges the lists of these listeners' filters | both |
//! | `X` | a tag | none: that filter is no more | broker |
//! | `W` | | what filters report to | both |

use std::{
    collections::VecDeque,
    ffi::OsStr,
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
};

use nix::{
    cmsg_space,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
        socketpair,
    },
};

use crate::Mode;

/// Most descriptors in one message; the kernel takes 253 (`SCM_MAX_FD`).
pub const MOST: usize = 128;

/// Longest path of a policy that can be told.
pub const LONGEST_PATH: usize = 8 * MOST - 4 * 8;

/// A run's own policy, which narrows what its tree may.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Narrowing {
    /// The supervisor's number of the run.
    pub tag: u64,
    /// What the kernel knows its tree by, if a broker before has found that out; else 0.
    pub mark: u64,
    /// What stands for the marks that the run was under before it had its own, if a broker before has seen them; else 0.
    pub before: u64,
    /// Whether what it refuses is refused.
    pub mode: Mode,
    /// Its file, no longer than [`LONGEST_PATH`].
    pub policy: PathBuf,
}

/// One message.
#[derive(Debug)]
pub enum Handed {
    /// A run, and what narrows it.
    Layer(Narrowing, OwnedFd),
    /// It has put its mark under itself.
    Marked(u64),
    /// It is known, by this mark, above those that this stands for.
    Layered {
        /// The supervisor's number of the run.
        tag: u64,
        /// See [`Narrowing::mark`].
        mark: u64,
        /// See [`Narrowing::before`].
        before: u64,
    },
    /// It is no more, or cannot be narrowed.
    Unlayered(u64),
    /// The backstop. Its sender keeps no copy: the last one's closing is the broker's end.
    Backstop(Vec<OwnedFd>),
    /// Why there is none.
    Unbacked(String),
    /// It is an nftables table, which the key daemon fills, and why.
    Fenced(String),
    /// Records that the broker before was killed before it could write.
    Unsaid(OwnedFd),
    /// What the kernel put on record and the broker before had no time for.
    Ring(OwnedFd),
    /// Guards' listeners, of trees whose calls are made by proxy or go on under the backstop.
    Trees {
        /// By proxy.
        by_proxy: bool,
        /// The run's tag, if it is narrowed; else 0.
        run: u64,
        /// One of each tree.
        listeners: Vec<OwnedFd>,
    },
    /// The book of held calls.
    Book(Vec<OwnedFd>),
    /// A program that begins with connections, and is stopped.
    Begun(u64, OwnedFd),
    /// Its connections are judged.
    Judged(u64),
    /// Ends of doors: connected for as long as the supervisor lives, whatever becomes of a broker.
    Doors {
        /// What their run is called; empty if nothing.
        label: String,
        /// The inode of the programs' end, and the broker's end; half of [`MOST`], so that there is room for the label.
        doors: Vec<(u64, OwnedFd)>,
    },
    /// By a listener's tag: what exchanges the list of its locked filter.
    Filters(Vec<(u64, OwnedFd)>),
    /// The listener with this tag is no more.
    Forget(u64),
    /// What filters report to.
    Watch(Vec<OwnedFd>),
}

/// One end. Nothing waits here: what the other end does not take yet is sent later.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    unsent: VecDeque<Handed>,
}

impl From<OwnedFd> for Link {
    fn from(socket: OwnedFd) -> Self {
        Self { socket, unsent: VecDeque::new() }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Link {
    /// The supervisor's end, and the broker's.
    ///
    /// # Errors
    /// As socketpair(2).
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((ours.into(), theirs))
    }

    /// Hands something over, at most [`MOST`] descriptors at once.
    pub fn send(&mut self, handed: Handed) {
        self.unsent.push_back(handed);
        self.flush();
    }

    /// Whether something waits for the other end to take what came before; then [`Self::flush`].
    #[must_use]
    pub fn is_behind(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends what waits.
    pub fn flush(&mut self) {
        while let Some(next) = self.unsent.front() {
            match transmit(self.socket.as_fd(), next) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Or the other end is closed, which reading tells.
                _ => drop(self.unsent.pop_front()),
            }
        }
    }

    /// Takes the next. `None`: the other end is closed.
    ///
    /// # Errors
    /// `WouldBlock`: there is none. `InvalidData`: not one of ours.
    pub fn receive(&self) -> io::Result<Option<Handed>> {
        let mut text = [0; 1 + 8 * MOST];
        let mut space = cmsg_space!([RawFd; MOST]);
        let mut parts = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let got = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        let (length, whole) = (got.bytes, !got.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC));
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                fds.extend(raw.into_iter().map(own));
            }
        }
        match text.get(..length).filter(|_| whole) {
            None => Err(io::ErrorKind::InvalidData.into()),
            Some([]) => Ok(None),
            Some([letter, tags @ ..]) => read(*letter, tags, fds).map(Some),
        }
    }
}

fn transmit(socket: BorrowedFd<'_>, handed: &Handed) -> io::Result<()> {
    let raw = |fds: &[OwnedFd]| fds.iter().map(AsRawFd::as_raw_fd).collect();
    let (letter, tags, fds): (u8, Vec<u64>, Vec<RawFd>) = match handed {
        Handed::Backstop(fds) => (b'B', Vec::new(), raw(fds)),
        Handed::Trees { by_proxy, run, listeners } => {
            (if *by_proxy { b'P' } else { b'T' }, vec![*run], raw(listeners))
        }
        Handed::Layer(it, process) => {
            let mode = u64::from(it.mode == Mode::Audit);
            (b'L', vec![it.tag, it.mark, it.before, mode], vec![process.as_raw_fd()])
        }
        Handed::Marked(tag) => (b'M', vec![*tag], Vec::new()),
        Handed::Layered { tag, mark, before } => (b'Y', vec![*tag, *mark, *before], Vec::new()),
        Handed::Unlayered(tag) => (b'U', vec![*tag], Vec::new()),
        Handed::Unbacked(_) => (b'N', Vec::new(), Vec::new()),
        Handed::Fenced(_) => (b'A', Vec::new(), Vec::new()),
        Handed::Unsaid(fd) => (b'V', Vec::new(), vec![fd.as_raw_fd()]),
        Handed::Ring(fd) => (b'R', Vec::new(), vec![fd.as_raw_fd()]),
        Handed::Book(fds) => (b'K', Vec::new(), raw(fds)),
        Handed::Doors { doors, .. } => {
            (b'D', doors.iter().map(|d| d.0).collect(), doors.iter().map(|d| d.1.as_raw_fd()).collect())
        }
        Handed::Filters(all) => {
            (b'F', all.iter().map(|f| f.0).collect(), all.iter().map(|f| f.1.as_raw_fd()).collect())
        }
        Handed::Begun(tag, process) => (b'S', vec![*tag], vec![process.as_raw_fd()]),
        Handed::Judged(tag) => (b'J', vec![*tag], Vec::new()),
        Handed::Forget(tag) => (b'X', vec![*tag], Vec::new()),
        Handed::Watch(fds) => (b'W', Vec::new(), raw(fds)),
    };
    let words = match handed {
        Handed::Unbacked(why) | Handed::Fenced(why) => why.as_bytes(),
        Handed::Layer(it, _) => it.policy.as_os_str().as_bytes(),
        Handed::Doors { label, .. } => label.as_bytes(),
        _ => &[],
    };
    let words = words.iter().take(8 * (MOST - tags.len())).copied();
    let text: Vec<u8> =
        std::iter::once(letter).chain(tags.iter().flat_map(|t| t.to_ne_bytes())).chain(words).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control: &[_] = if fds.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&text)], control, flags, None)?;
    Ok(())
}

fn read(letter: u8, tags: &[u8], mut fds: Vec<OwnedFd>) -> io::Result<Handed> {
    let words = tags;
    let (tags, rest) = tags.as_chunks::<8>();
    let mut tags = tags.iter().map(|t| u64::from_ne_bytes(*t));
    let wrong = || io::Error::from(io::ErrorKind::InvalidData);
    Ok(match letter {
        b'L' => {
            let [tag, mark, before, audit] = [(); 4].map(|()| tags.next());
            let mode = if audit.ok_or_else(wrong)? == 0 { Mode::Enforce } else { Mode::Audit };
            let policy = OsStr::from_bytes(words.get(32..).unwrap_or_default()).into();
            let [tag, mark, before] = [tag, mark, before].map(|number| number.ok_or_else(wrong));
            let narrowing = Narrowing { tag: tag?, mark: mark?, before: before?, mode, policy };
            Handed::Layer(narrowing, fds.pop().ok_or_else(wrong)?)
        }
        b'M' => Handed::Marked(tags.next().ok_or_else(wrong)?),
        b'Y' => {
            let [tag, mark, before] = [(); 3].map(|()| tags.next().ok_or_else(wrong));
            Handed::Layered { tag: tag?, mark: mark?, before: before? }
        }
        b'U' => Handed::Unlayered(tags.next().ok_or_else(wrong)?),
        b'B' => Handed::Backstop(fds),
        b'T' | b'P' => {
            Handed::Trees { by_proxy: letter == b'P', run: tags.next().ok_or_else(wrong)?, listeners: fds }
        }
        b'N' => Handed::Unbacked(String::from_utf8_lossy(words).into_owned()),
        b'A' => Handed::Fenced(String::from_utf8_lossy(words).into_owned()),
        b'V' => Handed::Unsaid(fds.pop().ok_or_else(wrong)?),
        b'R' => Handed::Ring(fds.pop().ok_or_else(wrong)?),
        b'K' => Handed::Book(fds),
        b'D' if tags.len() >= fds.len() => {
            let label = words.get(8 * fds.len()..).unwrap_or_default();
            let label = String::from_utf8_lossy(label).into_owned();
            Handed::Doors { label, doors: tags.zip(fds).collect() }
        }
        b'W' => Handed::Watch(fds),
        b'F' if tags.len() == fds.len() && rest.is_empty() => Handed::Filters(tags.zip(fds).collect()),
        b'S' => Handed::Begun(tags.next().ok_or_else(wrong)?, fds.pop().ok_or_else(wrong)?),
        b'J' => Handed::Judged(tags.next().ok_or_else(wrong)?),
        b'X' if fds.is_empty() => Handed::Forget(tags.next().ok_or_else(wrong)?),
        _ => return Err(wrong()),
    })
}

#[expect(unsafe_code, reason = "nix hands out received descriptors as numbers")]
fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us (SCM_RIGHTS); nobody else has it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_handed_over_arrives() {
        let (mut ours, theirs) = Link::pair().unwrap();
        let theirs = Link::from(theirs);
        let fd = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        ours.send(Handed::Backstop(vec![fd(), fd(), fd()]));
        ours.send(Handed::Filters((0..MOST as u64).map(|tag| (tag, fd())).collect()));
        ours.send(Handed::Trees { by_proxy: true, run: 3, listeners: vec![fd()] });
        let policy = "/".repeat(LONGEST_PATH).into();
        let narrowing = Narrowing { tag: 3, mark: u64::MAX, before: 5, mode: Mode::Audit, policy };
        ours.send(Handed::Layer(narrowing.clone(), fd()));
        ours.send(Handed::Layered { tag: 3, mark: 4, before: 5 });
        ours.send(Handed::Doors { label: "web".to_owned(), doors: vec![(5, fd()), (6, fd())] });
        ours.send(Handed::Forget(7));
        ours.send(Handed::Unbacked("no types".to_owned()));
        assert!(matches!(theirs.receive(), Ok(Some(Handed::Backstop(fds))) if fds.len() == 3));
        assert!(matches!(theirs.receive(), Ok(Some(Handed::Filters(all))) if all.len() == MOST));
        assert!(matches!(theirs.receive(), Ok(Some(Handed::Trees { by_proxy: true, run: 3, .. }))));
        assert!(matches!(theirs.receive(), Ok(Some(Handed::Layer(told, _))) if told == narrowing));
        assert!(matches!(theirs.receive(), Ok(Some(Handed::Layered { tag: 3, mark: 4, before: 5 }))));
        assert!(
            matches!(theirs.receive(), Ok(Some(Handed::Doors { label, doors })) if label == "web" && doors.iter().map(|d| d.0).eq([5, 6]))
        );
        assert!(matches!(theirs.receive(), Ok(Some(Handed::Forget(7)))));
        assert!(matches!(theirs.receive(), Ok(Some(Handed::Unbacked(why))) if why == "no types"));
        assert_eq!(theirs.receive().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        for nonsense in
            [b"Z".as_slice(), b"X", b"F12345678", b"X1234567", b"T", b"L12345678", b"Y1234567812345678"]
        {
            nix::sys::socket::send(ours.socket.as_raw_fd(), nonsense, MsgFlags::empty()).unwrap();
            assert_eq!(theirs.receive().unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        drop(ours);
        assert!(theirs.receive().unwrap().is_none());
    }

    #[test]
    fn what_is_not_taken_yet_waits_and_keeps_its_order() {
        let (mut ours, theirs) = Link::pair().unwrap();
        let theirs = Link::from(theirs);
        let mut sent = 0;
        while !ours.is_behind() {
            ours.send(Handed::Forget(sent));
            sent += 1;
        }
        for tag in 0..sent {
            ours.flush();
            assert!(matches!(theirs.receive(), Ok(Some(Handed::Forget(t))) if t == tag));
        }
        assert!(!ours.is_behind());
    }
}
