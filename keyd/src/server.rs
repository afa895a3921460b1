//! Serves the broker: one request at a time, reports in between.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read, Seek, SeekFrom},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{ControlMessage, MsgFlags, recvmsg, sendmsg},
        time::TimeSpec,
    },
    time::{ClockId, clock_gettime},
};
use portcullis_wire::keyd::{
    FRAME, Flow, Head, Kind, MOST_NETS, Net, Open, Pass, Speech, Stage, Stranger, permitted,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};
use zeroize::Zeroizing;

use crate::{
    KeydError,
    association::Associations,
    cut,
    diag::Diag,
    fence::Fence,
    filter::{self, FilterError, Watch},
    identity::Host,
    privileges, sandbox,
    steer::Steer,
    token::Raw,
};

/// What the daemon is started with.
#[derive(Debug)]
pub struct Config {
    /// One end of a `SOCK_SEQPACKET` pair; whoever holds the other gives the orders.
    pub broker: OwnedFd,
    /// Where each further broker's pair comes from, as one descriptor with one byte. As long as its other end is open,
    /// associations that run outlive a broker.
    pub brokers: Option<OwnedFd>,
    /// The host's folder. If it holds `host.crt` and what belongs to it, flows can be protected.
    pub state: Option<PathBuf>,
    /// Gets `ready\n` once the daemon serves, or one line that says why it cannot; then it is closed.
    pub ready: Option<OwnedFd>,
}

/// How long after a report attempts without one may stay untold.
const MISSED_AFTER: Duration = Duration::from_millis(1100);

/// Serves the broker until it closes the connection, and no other comes.
///
/// Takes the calling process over: its user, capabilities and sandbox change for good.
///
/// # Errors
/// [`KeydError`] if privileges cannot be given up, or if the broker does what is not permitted.
pub fn run(config: Config) -> Result<(), KeydError> {
    let Config { broker, brokers, state, ready } = config;
    let prepared = prepare(state);
    if let Some(ready) = ready {
        let line = prepared.as_ref().map_or_else(|e| format!("{e}\n"), |_| "ready\n".to_owned());
        // Nobody to tell is no reason not to serve.
        let _ = nix::unistd::write(&ready, line.as_bytes());
    }
    let (diag, associations) = prepared?;
    serve(Server {
        broker: Some(broker),
        brokers,
        diag,
        watch: None,
        fence: None,
        associations,
        stage: Stage::Hello,
        is_stuck: false,
        frame: vec![0; FRAME],
    })
}

/// Opens what needs privileges, then gives them up.
fn prepare(state: Option<PathBuf>) -> Result<(Option<Diag>, Option<Associations>), KeydError> {
    let diag = Diag::new().ok();
    // A host that is not enrolled has no keys and protects nothing; keys that lie open are an error.
    let enrolled = state.filter(|state| state.join("host.crt").exists());
    let host = enrolled.as_deref().map(Host::load).transpose()?;
    let steer = || {
        let namespace = File::open("/proc/thread-self/ns/net")?;
        Ok((Raw::new()?, Steer::new(namespace.as_fd())?))
    };
    let kernel = host.is_some().then(steer).transpose().map_err(KeydError::Tokens)?;
    privileges::drop()?;
    sandbox::enter()?;
    let keys = host.zip(kernel);
    let associations = keys.map(|(host, (raw, steer))| Associations::new(host, raw, steer)).transpose();
    Ok((diag, associations.map_err(KeydError::Tokens)?))
}

struct Server {
    /// None: it has gone, and another may come.
    broker: Option<OwnedFd>,
    brokers: Option<OwnedFd>,
    diag: Option<Diag>,
    watch: Option<Watch>,
    /// The backstop's nftables form, if that is what holds programs.
    fence: Option<Fence>,
    associations: Option<Associations>,
    stage: Stage,
    /// The broker has not taken what it was told: the rest waits, and so that nobody else has to, in silence.
    is_stuck: bool,
    /// Room for one request.
    frame: Vec<u8>,
}

/// The answer to one request: what its `Head` says, and descriptors.
#[derive(Default)]
struct Answer {
    flags: u32,
    count: u32,
    errno: i32,
    descriptor: Option<OwnedFd>,
    keep: bool,
    /// Replaces the request's `tag`.
    tag: Option<u64>,
    /// What follows the `Head`.
    body: Vec<u8>,
}

impl Answer {
    fn failed(errno: i32) -> Self {
        Self { errno, ..Self::default() }
    }
}

fn serve(mut server: Server) -> Result<(), KeydError> {
    let mut look_for_missed: Option<Instant> = None;
    loop {
        let due = server.associations.as_ref().and_then(Associations::deadline);
        let due = [due, look_for_missed].into_iter().flatten().min();
        let timeout = due.map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now());
            // Rounded up, so that what is due is due when its time has come.
            let left = if left.is_zero() { left } else { left.saturating_add(Duration::from_millis(1)) };
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let ready = {
            let Some(asks) = server.broker.as_ref().or(server.brokers.as_ref()) else { return Ok(()) };
            // Without a broker, or while it does not listen, what filters report waits where it is; and so do peers.
            let is_stuck = server.is_stuck;
            let watch = server.watch.as_ref().filter(|_| server.broker.is_some() && !is_stuck);
            let [relay, all, arriving] = server.associations.as_ref().map_or([None; 3], Associations::watch);
            let arriving = arriving.filter(|_| !is_stuck);
            let refused = server.fence.as_ref().and_then(Fence::watched).filter(|_| !is_stuck);
            let mut fds = Vec::with_capacity(6);
            let all = [Some(asks.as_fd()), watch.map(AsFd::as_fd), relay, all, arriving, refused];
            let at = all.map(|fd| {
                fds.extend(fd.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
                fd.map(|_| fds.len() - 1)
            });
            if let Some(asks) = fds.first_mut().filter(|_| is_stuck) {
                asks.set_events(PollFlags::POLLIN | PollFlags::POLLOUT);
            }
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(KeydError::Broker(e.into())),
            }
            let signs = at.map(|at| at.and_then(|at| fds.get(at)).and_then(PollFd::revents));
            signs.map(|signs| !(signs.unwrap_or(PollFlags::empty()) - PollFlags::POLLOUT).is_empty())
        };
        let stays = match server.work(ready, &mut look_for_missed) {
            Err(KeydError::Broker(e)) if e.raw_os_error() == Some(libc::EPIPE) => false,
            done => done?,
        };
        if !stays && !server.bereave() {
            return Ok(());
        }
    }
}

impl Server {
    /// Does what has become possible. `false`: the broker has closed the connection.
    fn work(
        &mut self,
        [asked, reported, relay, associations, arrived, refused]: [bool; 6],
        look_for_missed: &mut Option<Instant>,
    ) -> Result<bool, KeydError> {
        if asked && !(if self.broker.is_some() { self.answer_one()? } else { self.welcome()? }) {
            return Ok(false);
        }
        self.turn([relay, associations, arrived])?;
        if refused && self.has_room() {
            self.tell_refused()?;
        }
        let due = look_for_missed.is_some_and(|at| Instant::now() >= at);
        if (reported || due) && self.report()? {
            *look_for_missed = Some(Instant::now() + MISSED_AFTER);
        } else if due {
            *look_for_missed = None;
        }
        Ok(true)
    }

    /// Goes on without a broker, if another may come: what runs goes on, and nothing new begins.
    fn bereave(&mut self) -> bool {
        (self.broker, self.stage, self.is_stuck) = (None, Stage::Hello, false);
        if let Some(all) = &mut self.associations {
            all.bereave();
        }
        // The next broker hears refusals on a socket of its own; the kernel tells one at a time.
        if let Some(fence) = self.fence.take() {
            let _gone = fence.clear();
        }
        self.brokers.is_some()
    }

    /// Takes the pair of a broker that has come. `false`: none will.
    fn welcome(&mut self) -> Result<bool, KeydError> {
        let Some(brokers) = &self.brokers else { return Ok(false) };
        match receive(brokers.as_fd(), &mut [0; 2]) {
            Ok(Some((1, descriptors))) => self.broker = descriptors.into_iter().next(),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Ok(_) | Err(Errno::ECONNRESET) => {
                self.brokers = None;
                return Ok(false);
            }
            Err(e) => return Err(KeydError::Broker(e.into())),
        }
        if let Some(all) = self.associations.as_mut().filter(|_| self.broker.is_some()) {
            all.welcome();
        }
        Ok(true)
    }

    /// Sends to the broker, if there is one.
    fn tell(&self, parts: &[&[u8]], descriptors: &[BorrowedFd<'_>]) -> Result<(), KeydError> {
        let Some(broker) = &self.broker else { return Ok(()) };
        let sent = send(broker.as_fd(), parts, descriptors, MsgFlags::empty());
        sent.map_err(|e| KeydError::Broker(e.into()))
    }

    /// Takes one request and answers it. `false`: the broker has closed the connection.
    fn answer_one(&mut self) -> Result<bool, KeydError> {
        let mut frame = std::mem::take(&mut self.frame);
        let answered = self.answer_in(&mut frame);
        self.frame = frame;
        answered
    }

    fn answer_in(&mut self, frame: &mut [u8]) -> Result<bool, KeydError> {
        let Some(broker) = &self.broker else { return Ok(false) };
        let (length, descriptors) = match receive(broker.as_fd(), frame) {
            Ok(Some(message)) => message,
            Ok(None) => return Err(KeydError::TooLong),
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(true),
            Err(Errno::ECONNRESET) => return Ok(false),
            Err(e) => return Err(KeydError::Broker(e.into())),
        };
        if length == 0 {
            return Ok(false);
        }
        let (kind, head, rest) = Head::decode(frame.get(..length).unwrap_or_default())?;
        if !permitted(self.stage, kind) {
            return Err(KeydError::NotPermitted { kind, stage: self.stage });
        }
        let answer = self.perform(kind, &head, rest, descriptors)?;
        let mut reply = Head::new(kind, head.seq);
        (reply.flags, reply.count, reply.errno, reply.tag) =
            (answer.flags, answer.count, answer.errno, answer.tag.unwrap_or(head.tag));
        let kept = self.watch.as_ref().filter(|_| answer.keep).map(Watch::keep);
        let descriptors: Vec<_> =
            answer.descriptor.iter().map(AsFd::as_fd).chain(kept.into_iter().flatten()).collect();
        self.tell(&[reply.as_bytes(), &answer.body], &descriptors)?;
        Ok(true)
    }

    fn perform(
        &mut self,
        kind: Kind,
        head: &Head,
        rest: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, KeydError> {
        let misfit = KeydError::Shape { kind, bytes: rest.len(), descriptors: descriptors.len() };
        let mut attached = descriptors.into_iter();
        let answer = match kind {
            Kind::Hello => {
                let kept: Vec<_> = attached.by_ref().collect();
                let watch = match <[OwnedFd; 3]>::try_from(kept) {
                    Ok(kept) => Watch::adopt(kept).or_else(|_| Watch::new()),
                    Err(none) if none.is_empty() => Watch::new(),
                    Err(_) => return Err(misfit),
                };
                self.watch = watch.ok();
                self.stage = if self.protects() { Stage::Protecting } else { Stage::Serving };
                let filters = if self.watch.is_some() { Head::FILTERS } else { 0 };
                let destroys = if self.can_destroy() { Head::DESTROYS } else { 0 };
                let protects = if self.protects() { Head::PROTECTS } else { 0 };
                let body = self.associations.as_ref().map(Associations::who).unwrap_or_default();
                Answer { flags: filters | destroys | protects, keep: true, body, ..Answer::default() }
            }
            Kind::Filter | Kind::Refill => {
                let target = attached.next().ok_or(misfit)?;
                let file = if head.flags & Head::LIST_ATTACHED == 0 { None } else { attached.next() };
                let nets = match list(head, rest, file) {
                    Ok(nets) => nets,
                    Err(e) => return Ok(Answer::failed(e.raw_os_error().unwrap_or(libc::EINVAL))),
                };
                let done = match (kind, &self.watch) {
                    (Kind::Refill, _) => filter::refill(target, &nets).map(|()| None),
                    (_, Some(watch)) => {
                        let mark = self.associations.as_ref().map_or(0, Associations::mark);
                        filter::attach(watch, target.as_fd(), head.tag, &nets, mark).map(Some)
                    }
                    (_, None) => Err(FilterError::Kernel(Errno::EPERM.into())),
                };
                match done {
                    Ok(descriptor) => Answer { descriptor, ..Answer::default() },
                    Err(e) => Answer::failed(e.errno()),
                }
            }
            Kind::Cut => {
                let socket = attached.next();
                let flow = Flow::read_from_bytes(rest).map_err(|_| misfit)?;
                let cut = match &mut self.diag {
                    Some(diag) => cut::cut(diag, &flow, socket.as_ref().map(AsFd::as_fd)),
                    None => Err(Errno::EPERM.into()),
                };
                match cut {
                    Ok(by) => Answer { count: by as u32, ..Answer::default() },
                    Err(e) => Answer::failed(e.raw_os_error().unwrap_or(libc::EINVAL)),
                }
            }
            Kind::Table => match Fence::of(rest) {
                Ok(fence) => Answer { count: self.fence.insert(fence).tells().into(), ..Answer::default() },
                Err(e) => Answer::failed(e.raw_os_error().unwrap_or(libc::EINVAL)),
            },
            Kind::Pass => {
                let Ok(asked) = Pass::read_from_bytes(rest) else { return Err(misfit) };
                match self.fence.as_ref().map(|fence| fence.pass(&asked)) {
                    Some(Some(Ok(()))) => Answer::default(),
                    Some(Some(Err(e))) => Answer::failed(e.raw_os_error().unwrap_or(libc::EINVAL)),
                    Some(None) => return Err(misfit),
                    None => Answer::failed(libc::ENOTCONN),
                }
            }
            Kind::Renew => {
                let (Some(all), [Some(issuing), Some(key), Some(chain)]) =
                    (&mut self.associations, std::array::from_fn(|_| attached.next()))
                else {
                    return Err(misfit);
                };
                let renewed = whole(issuing).and_then(|issuing| {
                    let key = Zeroizing::new(whole(key)?);
                    all.renew(&issuing, &key, &whole(chain)?)
                });
                match renewed {
                    Ok(newer) => Answer { count: newer.into(), body: all.who(), ..Answer::default() },
                    Err(e) => Answer::failed(e.raw_os_error().unwrap_or(libc::EBADMSG)),
                }
            }
            Kind::Open
            | Kind::Serve
            | Kind::Release
            | Kind::Admit
            | Kind::Refuse
            | Kind::Members
            | Kind::List
            | Kind::Speak => {
                return self.associate(kind, head, rest, (attached.next(), attached.next()), misfit);
            }
            Kind::Stranger
            | Kind::Shown
            | Kind::Associated
            | Kind::Over
            | Kind::Arrived
            | Kind::Live
            | Kind::Stopped => {
                return Err(misfit);
            }
        };
        Ok(answer)
    }

    /// Whether flows can be protected: there are keys, and the kernel names sockets.
    const fn protects(&self) -> bool {
        self.associations.is_some() && self.diag.is_some()
    }

    /// Requests about protected flows.
    fn associate(
        &mut self,
        kind: Kind,
        head: &Head,
        rest: &[u8],
        (program, filter): (Option<OwnedFd>, Option<OwnedFd>),
        misfit: KeydError,
    ) -> Result<Answer, KeydError> {
        let (Some(all), Some(diag)) = (&mut self.associations, &mut self.diag) else {
            return Err(misfit);
        };
        if kind == Kind::Members {
            let file = program.ok_or(misfit)?;
            let taken = whole(file).and_then(|text| all.members(&text));
            return Ok(match taken {
                Ok(newer) => Answer { count: newer.into(), ..Answer::default() },
                Err(e) => Answer::failed(e.raw_os_error().unwrap_or(libc::EBADMSG)),
            });
        }
        if kind == Kind::List && program.is_none() {
            // Told before the answer: what comes after it is news.
            all.list();
            self.tell_all(MsgFlags::empty())?;
            return Ok(Answer::default());
        }
        let mixed = head.flags & Head::MIXED != 0;
        let tagged = |tag| Answer { tag: Some(tag), ..Answer::default() };
        let plain = |()| Answer::default();
        let program = program.as_ref().map(AsFd::as_fd);
        let done = match (kind, program) {
            (Kind::Open, Some(program)) => {
                let (ask, json) = Open::read_from_prefix(rest).map_err(|_| misfit)?;
                all.open(program, &ask, json, diag)
                    .map(|(tag, places)| Answer { body: places.as_bytes().to_vec(), ..tagged(tag) })
            }
            (Kind::Serve, Some(program)) => {
                let filter = filter.ok_or(misfit)?;
                all.serve(program, filter.as_fd(), head.count, rest, mixed, diag).map(tagged)
            }
            (Kind::Release, None) => {
                all.release(head.tag);
                Ok(Answer::default())
            }
            (Kind::Speak, None) => {
                let speech = Speech::try_from(head.count).map_err(|_| misfit)?;
                all.speak(head.tag, speech).map(plain)
            }
            (Kind::Admit, None) => all.admit(head.tag, diag).map(|runs| Answer {
                count: runs.into(),
                body: all.places(head.tag).map(|it| it.as_bytes().to_vec()).unwrap_or_default(),
                ..Answer::default()
            }),
            (Kind::Refuse, None) => {
                all.refuse(head.tag, i32::try_from(head.count).unwrap_or(libc::ECONNREFUSED)).map(plain)
            }
            _ => return Err(misfit),
        };
        Ok(done.unwrap_or_else(|e| Answer::failed(e.raw_os_error().unwrap_or(libc::EINVAL))))
    }

    /// Does what associations call for, and tells the broker of them.
    fn turn(&mut self, ready: [bool; 3]) -> Result<(), KeydError> {
        let (Some(all), Some(diag)) = (&mut self.associations, &mut self.diag) else {
            return Ok(());
        };
        all.turn(diag, ready);
        self.tell_all(MsgFlags::MSG_DONTWAIT)
    }

    /// Tells the broker what there is to report of associations. One that does not listen keeps no flow waiting.
    fn tell_all(&mut self, flags: MsgFlags) -> Result<(), KeydError> {
        let (Some(all), Some(broker)) = (&mut self.associations, &self.broker) else {
            return Ok(());
        };
        self.is_stuck = false;
        let mut reports = all.reports().into_iter();
        while let Some((head, body)) = reports.next() {
            if let Err(e) = send(broker.as_fd(), &[head.as_bytes(), &body], &[], flags) {
                all.keep(std::iter::once((head, body)).chain(reports));
                self.is_stuck = e == Errno::EAGAIN;
                return if self.is_stuck { Ok(()) } else { Err(KeydError::Broker(e.into())) };
            }
        }
        Ok(())
    }

    /// Whether the broker can be told something at once.
    fn has_room(&mut self) -> bool {
        let Some(broker) = &self.broker else { return true };
        let mut broker = [PollFd::new(broker.as_fd(), PollFlags::POLLOUT)];
        // Also when it has gone, which who tells it finds out.
        self.is_stuck = poll(&mut broker, PollTimeout::ZERO) == Ok(0);
        !self.is_stuck
    }

    /// Tells some of what the backstop's nftables form refused. Without a broker it is in no log.
    fn tell_refused(&mut self) -> Result<(), KeydError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let all = self.fence.as_mut().map(|fence| fence.take(u64::try_from(now).unwrap_or(0)));
        for stopped in all.unwrap_or_default() {
            self.tell(&[Head::new(Kind::Stopped, 0).as_bytes(), stopped.as_bytes()], &[])?;
        }
        Ok(())
    }

    /// Whether the kernel lets us destroy: asked for a flow that cannot be.
    fn can_destroy(&mut self) -> bool {
        let nobody = portcullis_wire::Addr::v4(std::net::Ipv4Addr::UNSPECIFIED, 0);
        let flow = Flow { cookie: 1, protocol: 6, reserved: [0; 7], local: nobody, remote: nobody };
        self.diag.as_mut().is_some_and(|diag| diag.destroy(&flow, 0).is_ok())
    }

    /// Tells the broker whom filters dropped. Whether there was anybody.
    fn report(&mut self) -> Result<bool, KeydError> {
        let epoch = epoch();
        let mut any = false;
        while self.has_room() {
            let Some(watch) = self.watch.as_mut().filter(|_| self.broker.is_some()) else { break };
            let missed = if any { 0 } else { watch.missed() };
            let Some(stranger) = watch.next(epoch).or((missed > 0).then(Stranger::new_zeroed)) else { break };
            let head = Head { tag: stranger.tag, ..Head::new(Kind::Stranger, 0) };
            self.tell(&[head.as_bytes(), Stranger { missed, ..stranger }.as_bytes()], &[])?;
            any = true;
        }
        Ok(any)
    }
}

/// Unix time, in nanoseconds, at which CLOCK_MONOTONIC was 0.
fn epoch() -> u64 {
    let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap_or(TimeSpec::new(0, 0));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.saturating_sub(Duration::from(monotonic)).as_nanos()).unwrap_or(0)
}

/// Any bytes as a broker could send them, for [`crate::fuzzing`].
pub(crate) fn read_any(bytes: &[u8]) {
    let Ok((_, head, rest)) = Head::decode(bytes) else { return };
    let _either = list(&head, rest, None).map(|nets| filter::read_any(&nets));
    let _either = Flow::read_from_bytes(rest);
    let _either = Pass::read_from_bytes(rest);
    if let Ok((_, json)) = Open::read_from_prefix(rest) {
        crate::association::read_any(json);
    }
}

/// A list of nets, from the frame or from a file. Read once: the file may change meanwhile.
fn list(head: &Head, rest: &[u8], file: Option<OwnedFd>) -> io::Result<Vec<Net>> {
    let einval = || io::Error::from_raw_os_error(libc::EINVAL);
    let count = usize::try_from(head.count).ok().filter(|count| *count <= MOST_NETS).ok_or_else(einval)?;
    let length = count * size_of::<Net>();
    let read;
    let bytes = match file {
        None if head.flags & Head::LIST_ATTACHED != 0 || rest.len() != length => return Err(einval()),
        None => rest,
        Some(file) => {
            let mut bytes = vec![0; length];
            File::from(file).read_exact_at(&mut bytes, 0)?;
            read = bytes;
            &read
        }
    };
    Ok(bytes.chunks_exact(size_of::<Net>()).filter_map(|net| Net::read_from_bytes(net).ok()).collect())
}

/// A text file from its beginning, if it is not absurdly long.
fn whole(file: OwnedFd) -> io::Result<String> {
    const LONGEST: u64 = 64 << 20;
    let mut file = File::from(file);
    file.seek(SeekFrom::Start(0))?;
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text)?;
    Ok(text)
}

/// Takes one message with its descriptors; 0 bytes when the other end is closed; `None` if it was cut
/// off, because it was longer than a frame or had more descriptors than any.
fn receive(socket: BorrowedFd<'_>, frame: &mut [u8]) -> nix::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 4]);
    let mut slices = [IoSliceMut::new(frame)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let cut_off = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
    let mut descriptors = Vec::new();
    if let Ok(control) = message.cmsgs() {
        for one in control {
            descriptors.extend(crate::sock::received(one));
        }
    }
    Ok((!cut_off).then_some((message.bytes, descriptors)))
}

fn send(
    socket: BorrowedFd<'_>,
    parts: &[&[u8]],
    descriptors: &[BorrowedFd<'_>],
    flags: MsgFlags,
) -> nix::Result<()> {
    let slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[_] = if raw.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &slices, control, flags | MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}
