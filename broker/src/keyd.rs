//! The broker's side of its key daemon: one question at a time, reports put aside meanwhile.

mod news;

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
use portcullis_wire::keyd::{
    CutBy, FRAME, Flow, Head, INLINE_NETS, Kind, MOST_NETS, Net, Open, Pass, Places, Speech, Stopped,
    Stranger,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

pub use news::{News, Who};

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
    stopped: Vec<Stopped>,
    news: Vec<News>,
    abilities: u32,
    who: Option<Who>,
    broken: bool,
    /// Room for one message.
    frame: Vec<u8>,
}

/// An answer: its beginning, what follows, and descriptors.
struct Answer {
    head: Head,
    rest: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

/// What a key daemon leaves with the broker, so that filters go on reporting to the next one.
#[derive(Debug, Default)]
pub struct Keepsake(Vec<OwnedFd>);

/// A filter in force; whoever has this can exchange its list. Dropping it leaves the filter in force.
#[derive(Debug)]
pub struct Filter(OwnedFd);

impl Keepsake {
    /// For the supervisor to keep.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn copy(&self) -> io::Result<Vec<OwnedFd>> {
        self.0.iter().map(OwnedFd::try_clone).collect()
    }
}

impl From<Vec<OwnedFd>> for Keepsake {
    fn from(kept: Vec<OwnedFd>) -> Self {
        Self(kept)
    }
}

impl Filter {
    /// For the supervisor to keep.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn copy(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }
}

impl From<OwnedFd> for Filter {
    fn from(kept: OwnedFd) -> Self {
        Self(kept)
    }
}

impl Keyd {
    /// Says hello. `keepsake` is what an earlier key daemon left, or empty; it is replaced.
    ///
    /// # Errors
    /// What the socket says; `BrokenPipe` or `TimedOut` if nobody answers.
    pub fn new(socket: OwnedFd, keepsake: &mut Keepsake) -> io::Result<Self> {
        let mut it = Self {
            socket,
            seq: 0,
            reports: VecDeque::new(),
            stopped: Vec::new(),
            news: Vec::new(),
            abilities: 0,
            who: None,
            broken: false,
            frame: vec![0; FRAME],
        };
        let kept: Vec<_> = keepsake.0.iter().map(AsFd::as_fd).collect();
        let Answer { head, rest, descriptors } = it.asked(Head::new(Kind::Hello, 0), &[], &kept)?;
        it.abilities = head.flags;
        it.who = serde_json::from_slice(&rest).ok().filter(|_| head.flags & Head::PROTECTS != 0);
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

    /// Has the backstop's nftables form filled, the table of this name. `false`: what it refuses cannot be told.
    ///
    /// # Errors
    /// `ENOENT`: there is no such table.
    pub fn table(&mut self, name: &str) -> io::Result<bool> {
        let (head, _) = self.ask(Head::new(Kind::Table, 0), name.as_bytes(), &[])?;
        Ok(head.count != 0)
    }

    /// Lets pass, or no more.
    ///
    /// # Errors
    /// What the kernel says; `ENFILE` for too many.
    pub fn pass(&mut self, pass: &Pass) -> io::Result<()> {
        self.ask(Head::new(Kind::Pass, 0), pass.as_bytes(), &[]).map(drop)
    }

    /// What the nftables form refused, as far as [`Self::reports`] has found it.
    pub fn take_stopped(&mut self) -> Vec<Stopped> {
        std::mem::take(&mut self.stopped)
    }

    /// Takes the reports that [`Self::news`] has brought along.
    pub fn reports(&mut self) -> Vec<Stranger> {
        self.reports.drain(..).collect()
    }

    /// Takes what has arrived. What came before the end is told before the end.
    fn drain(&mut self) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        while self.receive(Duration::ZERO)?.is_some() {}
        Ok(())
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
        self.asked(head, body, descriptors).map(|answer| (answer.head, answer.descriptors))
    }

    /// Asks, and leaves the answer to those who wait for it, or to news.
    fn say(&mut self, head: Head, body: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<Head> {
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
        Ok(asked)
    }

    fn asked(&mut self, head: Head, body: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<Answer> {
        let asked = self.say(head, body, descriptors)?;
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.receive(left) {
                Ok(Some(Some(answer))) if answer.head.seq == asked.seq && answer.head.kind == asked.kind => {
                    return match answer.head.errno {
                        0 => Ok(answer),
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
    fn receive(&mut self, within: Duration) -> io::Result<Option<Option<Answer>>> {
        let mut frame = std::mem::take(&mut self.frame);
        let mut received = self.receive_now(&mut frame);
        let timeout = PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX);
        while !within.is_zero() && matches!(received, Ok(None)) {
            received = match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) => break,
                Ok(_) => self.receive_now(&mut frame),
                Err(Errno::EINTR) => Ok(None),
                Err(e) => Err(e.into()),
            };
        }
        self.frame = frame;
        received
    }

    /// One message, if there is one.
    fn receive_now(&mut self, frame: &mut [u8]) -> io::Result<Option<Option<Answer>>> {
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 4]);
        let mut slices = [IoSliceMut::new(frame)];
        let (fd, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT);
        let message = recvmsg::<()>(fd, &mut slices, Some(&mut space), flags);
        let (length, descriptors) = match message {
            Err(Errno::EAGAIN) => return Ok(None),
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
        match kind {
            Kind::Stranger => {}
            Kind::Stopped => {
                let stopped = Stopped::read_from_bytes(rest).map_err(|_| io::ErrorKind::InvalidData)?;
                if self.stopped.len() < MOST_REPORTS {
                    self.stopped.push(stopped);
                }
                return Ok(Some(None));
            }
            // It is over; that is on its way.
            Kind::Admit if head.errno != 0 => return Ok(Some(None)),
            Kind::Shown | Kind::Arrived | Kind::Live | Kind::Admit | Kind::Associated | Kind::Over => {
                self.news.push(News::read(kind, &head, rest).ok_or(io::ErrorKind::InvalidData)?);
                return Ok(Some(None));
            }
            _ => return Ok(Some(Some(Answer { head, rest: rest.to_vec(), descriptors }))),
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

/// Protected flows.
impl Keyd {
    /// Who this host is. `None`: it has no keys, and flows cannot be protected.
    #[must_use]
    pub const fn who(&self) -> Option<&Who> {
        self.who.as_ref()
    }

    /// Begins a protected flow for a program's socket. `process` is a JSON object with
    /// [`portcullis_wire::keyd::PROCESS`]. Returns the association's number, and in `inner_remote` what the
    /// program's connect(2) must use instead.
    ///
    /// # Errors
    /// `EXDEV` for a socket in another network namespace than the key daemon's, `EPROTONOSUPPORT` for one that
    /// is not TCP (MPTCP is not), or what connect(2) says at once.
    pub fn open(&mut self, socket: BorrowedFd<'_>, ask: &Open, process: &str) -> io::Result<(u64, Places)> {
        let body = [ask.as_bytes(), process.as_bytes()].concat();
        let Answer { head, rest, .. } = self.asked(Head::new(Kind::Open, 0), &body, &[socket])?;
        let places = Places::read_from_bytes(&rest).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok((head.tag, places))
    }

    /// Says what a peer that has arrived may speak.
    ///
    /// # Errors
    /// `ENOENT` if it is over, or speaks already.
    pub fn speak(&mut self, id: u64, speech: Speech) -> io::Result<()> {
        let count = speech as u32;
        self.ask(Head { tag: id, count, ..Head::new(Kind::Speak, 0) }, &[], &[]).map(drop)
    }

    /// Stands before a program's listener for a process as in [`Self::open`], except for those whom the
    /// listener's filter lets through. `mixed`: they are reported when they have arrived, and may be let to speak
    /// plain. Returns the front's number.
    ///
    /// # Errors
    /// As for [`Self::open`]; `EOPNOTSUPP` for a socket that is bound to an interface.
    pub fn serve(
        &mut self,
        socket: BorrowedFd<'_>,
        filter: &Filter,
        backlog: u32,
        process: &str,
        mixed: bool,
    ) -> io::Result<u64> {
        let flags = if mixed { Head::MIXED } else { 0 };
        let head = Head { count: backlog, flags, ..Head::new(Kind::Serve, 0) };
        self.ask(head, process.as_bytes(), &[socket, filter.0.as_fd()]).map(|(head, _)| head.tag)
    }

    /// Gives up a front; the end of its sockets does the same.
    ///
    /// # Errors
    /// `BrokenPipe` and the like.
    pub fn release(&mut self, id: u64) -> io::Result<()> {
        self.ask(Head { tag: id, ..Head::new(Kind::Release, 0) }, &[], &[]).map(drop)
    }

    /// Lets an association that was shown go on. Nobody waits for it: [`News::Admitted`] follows, or it is over.
    ///
    /// # Errors
    /// `BrokenPipe` and the like.
    pub fn admit(&mut self, id: u64) -> io::Result<()> {
        self.say(Head { tag: id, ..Head::new(Kind::Admit, 0) }, &[], &[]).map(drop)
    }

    /// Ends an association, shown or running.
    ///
    /// # Errors
    /// `ENOENT` if it is over.
    pub fn refuse(&mut self, id: u64, errno: i32) -> io::Result<()> {
        let count = errno.unsigned_abs();
        self.ask(Head { tag: id, count, ..Head::new(Kind::Refuse, 0) }, &[], &[]).map(drop)
    }

    /// Hands over a list of members (`members.toml`), of which associations with whom it revokes end. `true`
    /// if it is newer than the one in force.
    ///
    /// # Errors
    /// `EBADMSG` if the trust domain's root did not sign it.
    pub fn members(&mut self, list: &str) -> io::Result<bool> {
        let mut file = File::from(memfd_create(c"members", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(list.as_bytes())?;
        self.ask(Head::new(Kind::Members, 0), &[], &[file.as_fd()]).map(|(head, _)| head.count == 1)
    }

    /// Gives it this host's renewed `issuer.crt`, `issuer.key` and `host.crt`, of which it alone reads the key. Who
    /// this host is from now on is [`Self::who`]. `false`: it has them already.
    ///
    /// # Errors
    /// `EBADMSG`: they do not fit, or are not this host's. As its connection.
    pub fn renew(&mut self, files: [&File; 3]) -> io::Result<bool> {
        let answer = self.asked(Head::new(Kind::Renew, 0), &[], &files.map(AsFd::as_fd))?;
        self.who = serde_json::from_slice(&answer.rest).map(Some).map_err(io::Error::other)?;
        Ok(answer.head.count == 1)
    }

    /// Waits until something has arrived. `false`: nothing has, or it has ended.
    pub fn wait(&mut self, within: Duration) -> bool {
        !self.broken && !within.is_zero() && matches!(self.receive(within), Ok(Some(_)))
    }

    /// Whether something has arrived that was not taken yet.
    #[must_use]
    pub fn has_news(&self) -> bool {
        !(self.news.is_empty() && self.reports.is_empty() && self.stopped.is_empty())
    }

    /// Asks for what has outlived an earlier broker: [`News::Live`] for each association that runs, that and
    /// [`News::Over`] for each that has ended since, `Over` alone for who waited for that broker's word. They
    /// are there when this returns.
    ///
    /// # Errors
    /// `BrokenPipe` and the like.
    pub fn list(&mut self) -> io::Result<()> {
        self.ask(Head::new(Kind::List, 0), &[], &[]).map(drop)
    }

    /// Takes the news of protected flows that have arrived; never waits. Call when [`AsFd`] is readable.
    ///
    /// # Errors
    /// `BrokenPipe` if the key daemon has ended, once all that it has said was taken.
    pub fn news(&mut self) -> io::Result<Vec<News>> {
        let ended = self.drain();
        if self.has_news() { Ok(std::mem::take(&mut self.news)) } else { ended.map(|()| Vec::new()) }
    }
}

impl AsFd for Keyd {
    /// Readable when there are [`Keyd::news`], or when the key daemon has ended.
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
    use portcullis_wire::keyd::Over;

    use super::{news::NOBODY, *};
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
            let stopped = Stopped { uid: 9, ..Stopped::new_zeroed() };
            tell(&socket, &[Head::new(Kind::Stopped, 0).as_bytes(), stopped.as_bytes()]);
            tell(&socket, &[Head { count: CutBy::Destroy as u32, ..cut }.as_bytes()]);
            take(&socket);
        });
        assert!(keyd.destroys() && !keyd.filters());
        assert_eq!(keyd.cut_by_name(&Flow::new_zeroed()).unwrap(), CutBy::Destroy);
        assert_eq!(keyd.news().unwrap(), []);
        assert_eq!(keyd.reports().iter().map(|s| s.tag).collect::<Vec<_>>(), [7]);
        assert!(keyd.has_news(), "nothing else would have it looked at");
        assert_eq!(keyd.take_stopped().iter().map(|s| s.uid).collect::<Vec<_>>(), [9]);
        assert!(!keyd.has_news());
    }

    #[test]
    fn news_of_flows_are_read_whole_and_kept_apart() {
        let places =
            Places { local: portcullis_wire::Addr::v4([192, 0, 2, 1].into(), 21), ..Places::default() };
        let mut keyd = greeted(move |socket| {
            let shown = Head { tag: 3, count: 1, flags: 9, ..Head::new(Kind::Shown, 0) };
            for peer in [&b"{\"id\":1}"[..], NOBODY] {
                tell(&socket, &[shown.as_bytes(), places.as_bytes(), peer]);
            }
            tell(&socket, &[Head { tag: 3, ..Head::new(Kind::Associated, 0) }.as_bytes(), places.as_bytes()]);
            let over = Head { tag: 3, errno: 5, ..Head::new(Kind::Over, 0) };
            let carried = Over { sent: 1, received: 2, cookie: 3 };
            tell(&socket, &[over.as_bytes(), carried.as_bytes(), places.as_bytes(), b"why\nwho"]);
            let asked = take(&socket);
            tell(&socket, &[Head { count: 1, ..asked }.as_bytes(), places.as_bytes()]);
            let asked = take(&socket);
            tell(&socket, &[Head { errno: libc::ENOENT, ..asked }.as_bytes()]);
            let asked = take(&socket);
            tell(&socket, &[asked.as_bytes()]);
        });
        keyd.admit(3).unwrap();
        keyd.admit(4).unwrap();
        keyd.refuse(5, libc::ECONNREFUSED).unwrap();
        let (id, carried) = (3, Over { sent: 1, received: 2, cookie: 3 });
        assert_eq!(
            keyd.news().unwrap(),
            [
                News::Shown { id, front: Some(9), places, peer: Some("{\"id\":1}".to_owned()) },
                News::Shown { id, front: Some(9), places, peer: None },
                News::Associated { id, places },
                News::Over {
                    id,
                    errno: 5,
                    why: "why".to_owned(),
                    shown: Some("who".to_owned()),
                    front: None,
                    places,
                    carried
                },
                News::Admitted { id, places, runs: true },
            ]
        );
        assert!(!keyd.wait(PATIENCE), "it ends, and has said all");
        assert!(keyd.news().is_err(), "it has ended since");
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
