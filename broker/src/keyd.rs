//! The broker's side of its key daemon: one question at a time, reports put aside meanwhile.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, IoSlice, IoSliceMut, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
    },
};
use portcullis_wire::keyd::{CutBy, Flow, Head, INLINE_NETS, Kind, MOST_NETS, Net, Stranger};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// How long an answer may take. A list of a million nets needs about a second.
const PATIENCE: Duration = Duration::from_secs(3);
/// Most reports that wait here; more are counted into the next one's `missed`.
const MOST_REPORTS: usize = 4096;

/// A connected key daemon.
///
/// An error of kind `BrokenPipe` or `TimedOut` means that it is dead or hung: this client answers
/// nothing more, and the supervisor brings another.
#[derive(Debug)]
pub struct Keyd {
    socket: OwnedFd,
    seq: u32,
    reports: VecDeque<Stranger>,
    abilities: u32,
    broken: bool,
}

/// What a key daemon leaves with the broker, so that filters go on reporting to the next one.
#[derive(Debug, Default)]
pub struct Keepsake(Vec<OwnedFd>);

/// A filter in force; whoever has this can exchange its list. Dropping it leaves the filter in force.
#[derive(Debug)]
pub struct Filter(OwnedFd);

impl Keyd {
    /// Says hello. `keepsake` is what an earlier key daemon left, or empty; it is replaced.
    ///
    /// # Errors
    /// What the socket says; `BrokenPipe` or `TimedOut` if nobody answers.
    pub fn new(socket: OwnedFd, keepsake: &mut Keepsake) -> io::Result<Self> {
        let mut it = Self { socket, seq: 0, reports: VecDeque::new(), abilities: 0, broken: false };
        let kept: Vec<_> = keepsake.0.iter().map(AsFd::as_fd).collect();
        let (head, descriptors) = it.ask(Head::new(Kind::Hello, 0), &[], &kept)?;
        it.abilities = head.flags;
        if !descriptors.is_empty() {
            keepsake.0 = descriptors;
        }
        Ok(it)
    }

    /// Whether listeners can be filtered here. If not, strangers are turned away at accept.
    #[must_use]
    pub const fn filters(&self) -> bool {
        self.abilities & Head::FILTERS != 0
    }

    /// Whether flows can be cut by their addresses. If not, cutting needs the socket.
    #[must_use]
    pub const fn destroys(&self) -> bool {
        self.abilities & Head::DESTROYS != 0
    }

    /// Lets only `nets` reach `socket`, for good. `tag` comes back in each [`Stranger`].
    ///
    /// # Errors
    /// `EALREADY` if the socket has a locked filter, `EPROTONOSUPPORT` if it is neither TCP nor UDP,
    /// `EINVAL` for a malformed list, `EPERM` without [`Self::filters`].
    pub fn filter(&mut self, socket: BorrowedFd<'_>, tag: u64, nets: &[Net]) -> io::Result<Filter> {
        let head = Head { tag, ..Head::new(Kind::Filter, 0) };
        let (_, mut descriptors) = self.ask_with(head, nets, socket)?;
        descriptors.pop().map(Filter).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Exchanges the list of a filter, while the socket listens.
    ///
    /// # Errors
    /// `EINVAL` for a malformed list: then the old one stays in force. `ENOMEM`: then only who is on
    /// both lists, or was added before memory ended, passes.
    pub fn refill(&mut self, filter: &Filter, nets: &[Net]) -> io::Result<()> {
        self.ask_with(Head::new(Kind::Refill, 0), nets, filter.0.as_fd()).map(drop)
    }

    /// Ends the flow of a socket at hand.
    ///
    /// # Errors
    /// What the kernel says; `ENOTSOCK` and the like.
    pub fn cut(&mut self, socket: BorrowedFd<'_>) -> io::Result<CutBy> {
        self.cut_flow(&Flow::new_zeroed(), &[socket])
    }

    /// Ends a flow by its addresses and cookie, in the key daemon's network namespace.
    ///
    /// # Errors
    /// `EPERM` without [`Self::destroys`].
    pub fn cut_by_name(&mut self, flow: &Flow) -> io::Result<CutBy> {
        self.cut_flow(flow, &[])
    }

    fn cut_flow(&mut self, flow: &Flow, descriptors: &[BorrowedFd<'_>]) -> io::Result<CutBy> {
        let (head, _) = self.ask(Head::new(Kind::Cut, 0), flow.as_bytes(), descriptors)?;
        CutBy::try_from(head.count).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// Takes all reports that have arrived; never waits. Call when [`AsFd`] is readable.
    ///
    /// # Errors
    /// `BrokenPipe` if the key daemon has ended.
    pub fn reports(&mut self) -> io::Result<Vec<Stranger>> {
        while !self.broken && self.receive(Duration::ZERO)?.is_some() {}
        Ok(self.reports.drain(..).collect())
    }

    fn ask_with(
        &mut self,
        head: Head,
        nets: &[Net],
        first: BorrowedFd<'_>,
    ) -> io::Result<(Head, Vec<OwnedFd>)> {
        if nets.len() > MOST_NETS {
            return Err(Errno::EINVAL.into());
        }
        let count = u32::try_from(nets.len()).map_err(|_| Errno::EINVAL)?;
        if nets.len() <= INLINE_NETS {
            return self.ask(Head { count, ..head }, nets.as_bytes(), &[first]);
        }
        let mut list = File::from(memfd_create(c"nets", MFdFlags::MFD_CLOEXEC)?);
        list.write_all(nets.as_bytes())?;
        let head = Head { count, flags: head.flags | Head::LIST_ATTACHED, ..head };
        self.ask(head, &[], &[first, list.as_fd()])
    }

    fn ask(
        &mut self,
        head: Head,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<(Head, Vec<OwnedFd>)> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.seq = self.seq.checked_add(1).unwrap_or(1);
        let asked = Head { seq: self.seq, ..head };
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[_] = if raw.is_empty() { &[] } else { &rights };
        let parts = [IoSlice::new(asked.as_bytes()), IoSlice::new(body)];
        let sent = sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None);
        if let Err(e) = sent {
            self.broken = true;
            return Err(e.into());
        }
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.receive(left) {
                Ok(Some(Some((head, descriptors)))) if head.seq == asked.seq && head.kind == asked.kind => {
                    return match head.errno {
                        0 => Ok((head, descriptors)),
                        errno => Err(io::Error::from_raw_os_error(errno)),
                    };
                }
                Ok(Some(None)) => {}
                Ok(Some(Some(_))) => {
                    self.broken = true;
                    return Err(io::ErrorKind::InvalidData.into());
                }
                Ok(None) => {
                    self.broken = true;
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// One message: `None` if none came in time, `Some(None)` if it was a report.
    #[expect(clippy::type_complexity, reason = "the three cases are told apart right here")]
    fn receive(&mut self, within: Duration) -> io::Result<Option<Option<(Head, Vec<OwnedFd>)>>> {
        let timeout = PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(Errno::EINTR) => return if within.is_zero() { Ok(None) } else { self.receive(within) },
            Err(e) => return Err(e.into()),
        }
        let mut frame = [0; 256];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 4]);
        let mut slices = [IoSliceMut::new(&mut frame)];
        let (fd, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT);
        let message = recvmsg::<()>(fd, &mut slices, Some(&mut space), flags);
        let (length, descriptors) = match message {
            Ok(message) => {
                let mut descriptors = Vec::new();
                for control in message.cmsgs()? {
                    descriptors.extend(received(control));
                }
                (message.bytes, descriptors)
            }
            Err(e) => {
                self.broken = true;
                return Err(e.into());
            }
        };
        if length == 0 {
            self.broken = true;
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let decoded = Head::decode(frame.get(..length).unwrap_or_default());
        let Ok((kind, head, rest)) = decoded else {
            self.broken = true;
            return Err(io::ErrorKind::InvalidData.into());
        };
        if kind != Kind::Stranger {
            return Ok(Some(Some((head, descriptors))));
        }
        let stranger = Stranger::read_from_bytes(rest).map_err(|_| io::ErrorKind::InvalidData)?;
        if self.reports.len() < MOST_REPORTS {
            self.reports.push_back(stranger);
        } else if let Some(last) = self.reports.back_mut() {
            last.missed = last.missed.saturating_add(stranger.missed).saturating_add(1);
        }
        Ok(Some(None))
    }
}

impl AsFd for Keyd {
    /// Readable when there are [`Keyd::reports`], or when the key daemon has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[expect(unsafe_code, reason = "descriptors from SCM_RIGHTS come as numbers")]
fn received(message: ControlMessageOwned) -> Vec<OwnedFd> {
    use std::os::fd::FromRawFd;
    let ControlMessageOwned::ScmRights(numbers) = message else {
        return Vec::new();
    };
    // SAFETY: the kernel has installed these descriptors for this very message, which is consumed
    // here, so they are open and nobody else's.
    numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, recv, send, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    fn take(socket: &OwnedFd) -> Head {
        let mut frame = [0; 4096];
        let length = recv(socket.as_raw_fd(), &mut frame, MsgFlags::empty()).unwrap();
        Head::decode(&frame[..length]).unwrap().1
    }

    fn tell(socket: &OwnedFd, parts: &[&[u8]]) {
        send(socket.as_raw_fd(), &parts.concat(), MsgFlags::empty()).unwrap();
    }

    /// A key daemon that greets, and then does as told.
    fn greeted(then: impl FnOnce(OwnedFd) + Send + 'static) -> Keyd {
        let (ours, theirs) = pair();
        std::thread::spawn(move || {
            let hello = take(&theirs);
            tell(&theirs, &[Head { flags: Head::DESTROYS, ..hello }.as_bytes()]);
            then(theirs);
        });
        Keyd::new(ours, &mut Keepsake::default()).unwrap()
    }

    #[test]
    fn reports_between_question_and_answer_are_not_lost() {
        let mut keyd = greeted(|socket| {
            let cut = take(&socket);
            let report = Head { tag: 7, ..Head::new(Kind::Stranger, 0) };
            tell(&socket, &[report.as_bytes(), Stranger { tag: 7, ..Stranger::new_zeroed() }.as_bytes()]);
            tell(&socket, &[Head { count: CutBy::Destroy as u32, ..cut }.as_bytes()]);
            take(&socket);
        });
        assert!(keyd.destroys() && !keyd.filters());
        assert_eq!(keyd.cut_by_name(&Flow::new_zeroed()).unwrap(), CutBy::Destroy);
        assert_eq!(keyd.reports().unwrap().iter().map(|s| s.tag).collect::<Vec<_>>(), [7]);
    }

    #[test]
    fn a_refusal_is_the_errno_and_the_connection_stays() {
        let mut keyd = greeted(|socket| {
            for errno in [libc::EPERM, 0] {
                let asked = take(&socket);
                tell(&socket, &[Head { errno, ..asked }.as_bytes()]);
            }
        });
        let flow = Flow::new_zeroed();
        assert_eq!(keyd.cut_by_name(&flow).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(keyd.cut_by_name(&flow).unwrap(), CutBy::Gone);
    }

    #[test]
    fn a_dead_daemon_and_a_babbling_one_are_told_from_a_refusal() {
        let mut dead = greeted(drop);
        assert!(dead.cut_by_name(&Flow::new_zeroed()).is_err());
        let again = dead.cut_by_name(&Flow::new_zeroed()).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::BrokenPipe);
        let mut babbling = greeted(|socket| {
            take(&socket);
            tell(&socket, &[b"what?"]);
            take(&socket);
        });
        let e = babbling.cut_by_name(&Flow::new_zeroed()).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::InvalidData);
        assert!(babbling.cut_by_name(&Flow::new_zeroed()).is_err());
    }
}
