//! Protected flows, from the broker's order to their end.
//!
//! Outbound: the program is sent to a token; meanwhile the far side is reached and proves itself; the
//! broker, told whom it is, admits it; only then is the program's connect(2) answered. Inbound: the peer
//! proves itself first, to a front that stands before the program's listener ([`crate::steer`]), the broker
//! admits it, and then it is delivered to the listener. So no program ever waits for a slow peer in accept(2),
//! and none gets a byte from a peer that was not admitted.

mod bond;
mod expiry;
mod inbound;
mod lasting;
mod outbound;
mod shows;
mod telling;
mod waits;

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::socket::{getsockopt, sockopt},
};
use portcullis_relay::{Driver, Ending, Engine, Event, Failure, How, Id, Limits};
use portcullis_wire::{
    Addr,
    keyd::{Flow, Head, Kind, Over, Places},
};
use zerocopy::{FromZeros, IntoBytes};

use crate::{
    diag::{Deaths, Diag},
    identity::{Host, Peer, ProcessIdentity, Refusal, Verifier, describe},
    packet::Syn,
    sock,
    steer::Steer,
    token::{Raw, Token, Tokens},
};
use bond::Bond;
use expiry::Expiry;
use inbound::{Behind, Front};
use lasting::MOST_ENDED;
use shows::Shows;
pub(crate) use shows::read_any;
use telling::Agreed;
use waits::{Source, Waits};

/// Threads of the relay, this one included: it has what begins, and what carries little.
const THREADS: usize = 3;
/// Most associations that peers have opened and that are not running yet; more wait in the kernel's backlog.
const MOST_PENDING: usize = 1024;
/// Connection and handshake together, unless the broker says otherwise.
const PATIENCE: Duration = Duration::from_secs(20);
/// How soon a full backlog is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// How long the last step, on loopback, may take; a listener's full backlog delays it.
const LAST_STEP: Duration = Duration::from_secs(10);

enum Direction {
    Outbound {
        token: Token,
        cookie: u64,
        syn: Option<Syn>,
    },
    Inbound {
        front: u64,
        /// The peer's socket, until the broker says what may be spoken there.
        arrived: Option<OwnedFd>,
    },
}

struct Association {
    flow: Id,
    direction: Direction,
    places: Places,
    /// None until somebody speaks TLS.
    bond: Option<Arc<Bond>>,
    /// The association that it belongs to.
    of: Option<u64>,
    /// The broker was told who is there.
    shown: bool,
    /// What its handshake came to.
    agreed: Option<Agreed>,
    /// As the broker named its process.
    process: Arc<[u8]>,
    /// When it began to carry data.
    since: i64,
    /// It has outlived its broker, and the next one was not told of it yet.
    unknown: bool,
    /// The peer speaks plain, as it may here.
    plain: bool,
    admitted: bool,
    /// The last step: a connection on loopback that is not up yet.
    joining: Option<OwnedFd>,
    running: bool,
    /// Why it was cut.
    cut: Option<(i32, String)>,
    /// When it must have got further.
    until: Instant,
}

impl Association {
    fn new(flow: Id, direction: Direction, places: Places, patience: Duration) -> Self {
        Self {
            flow,
            direction,
            places,
            bond: None,
            of: None,
            shown: false,
            process: Arc::default(),
            agreed: None,
            since: 0,
            unknown: false,
            plain: false,
            admitted: false,
            joining: None,
            running: false,
            cut: None,
            until: Instant::now() + patience + LAST_STEP,
        }
    }

    /// Whom the peer has shown.
    fn verdict(&self) -> Option<&Result<Arc<Peer>, Refusal>> {
        self.bond.as_ref().and_then(|bond| bond.seen.verdict())
    }

    fn peer(&self) -> Option<&Peer> {
        self.verdict().and_then(|verdict| verdict.as_deref().ok())
    }

    const fn front(&self) -> Option<u64> {
        match self.direction {
            Direction::Inbound { front, .. } => Some(front),
            Direction::Outbound { .. } => None,
        }
    }

    /// Whether a peer waits until the broker says what it may speak.
    const fn has_arrived(&self) -> bool {
        matches!(self.direction, Direction::Inbound { arrived: Some(_), .. })
    }
}

/// The number of an association or a front, and its addresses.
pub type Placed = (u64, Places);

/// A report to the broker: its beginning, and what follows.
pub type Report = (Head, Vec<u8>);

/// All protected flows of this host.
pub struct Associations {
    host: Host,
    /// What `host` makes of its members; a copy serves each handshake.
    verifier: Verifier,
    tokens: Tokens,
    steer: Steer,
    deaths: Option<Deaths>,
    engine: Engine,
    /// The engine's part in this thread.
    driver: Driver,
    last: u64,
    all: HashMap<u64, Association>,
    /// Those that are not running yet. There may be many thousands that run, and no step looks at them all.
    pending: HashSet<u64>,
    /// How many of them peers have opened.
    arriving: usize,
    /// Those of them that wait until the program's accept(2) makes room.
    queued: HashSet<u64>,
    by_token: HashMap<SocketAddr, u64>,
    fronts: HashMap<u64, Front>,
    minted: HashMap<Arc<[u8]>, ProcessIdentity>,
    expiry: Expiry,
    /// There is no broker.
    bereaved: bool,
    /// Told of when somebody asks for what has outlived a broker.
    ended: Vec<Report>,
    reports: Vec<Report>,
    waits: Waits,
}

/// Seconds since the Unix epoch.
fn now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

/// A token as an address that a socket of this domain can use.
fn as_domain(addr: SocketAddr, is_v6: bool) -> Addr {
    match addr {
        SocketAddr::V4(four) if is_v6 => Addr::v6(four.ip().to_ipv6_mapped(), four.port(), 0),
        other => Addr::from(other),
    }
}

/// Whether a program's socket can be on a token.
///
/// # Errors
/// `EXDEV` for a socket in another network namespace, `EPROTONOSUPPORT` for one that is not TCP. MPTCP is not:
/// the kernel names its subflows, not the program's socket.
fn fits(program: BorrowedFd<'_>, diag: &Diag) -> io::Result<()> {
    if !diag.is_here(program) {
        return Err(Errno::EXDEV.into());
    }
    if sock::protocol(program)? != libc::IPPROTO_TCP {
        return Err(Errno::EPROTONOSUPPORT.into());
    }
    Ok(())
}

impl Associations {
    /// Begins to serve with a host's keys. Must run as the daemon's own user.
    pub fn new(host: Host, raw: Raw, steer: Steer) -> io::Result<Self> {
        let limits = Limits {
            threads: THREADS,
            // Whoever only holds a place is displaced before there are no places left.
            handshakes: MOST_PENDING / 2,
            handshakes_per_peer: MOST_PENDING / 4,
            handshake_time: PATIENCE,
            verdict_time: PATIENCE + LAST_STEP,
            ..Limits::default()
        };
        let (engine, driver) = Engine::start_here(limits)?;
        let (tokens, expiry, waits) = (Tokens::new(raw, host.mark())?, Expiry::new()?, Waits::new()?);
        waits.add(&engine, Source::Engine)?;
        waits.add(&tokens, Source::Syns)?;
        waits.add(&expiry, Source::Expiry)?;
        Ok(Self {
            verifier: host.verifier().map_err(io::Error::other)?,
            tokens,
            waits,
            steer,
            host,
            deaths: None,
            engine,
            driver,
            last: 0,
            all: HashMap::new(),
            pending: HashSet::new(),
            arriving: 0,
            queued: HashSet::new(),
            by_token: HashMap::new(),
            fronts: HashMap::new(),
            minted: HashMap::new(),
            expiry,
            bereaved: false,
            ended: Vec::new(),
            reports: Vec::new(),
        })
    }

    /// What to poll, besides; [`Self::turn`] is told which is readable. The first are the relay's sockets; the last,
    /// peers that arrive, for whom there may be no room.
    pub fn watch(&self) -> [Option<BorrowedFd<'_>>; 3] {
        let [all, fronts] = self.waits.as_fds();
        [Some(self.driver.as_fd()), Some(all), (self.arriving < MOST_PENDING).then_some(fronts)]
    }

    /// Associations that are not running yet.
    fn waiting(&self) -> impl Iterator<Item = (u64, &Association)> {
        self.pending.iter().filter_map(|id| Some((*id, self.all.get(id)?)))
    }

    /// Those of them that are such.
    fn waiting_if(&self, such: impl Fn(&Association) -> bool) -> Vec<u64> {
        self.waiting().filter(|(_, one)| such(one)).map(|(id, _)| id).collect()
    }

    fn insert(&mut self, id: u64, one: Association) {
        self.pending.insert(id);
        self.arriving += usize::from(one.front().is_some());
        self.waits.expect(id, None, Some(one.until));
        self.all.insert(id, one);
    }

    /// It runs, or is over.
    fn settle(&mut self, id: u64, front: Option<u64>, until: Instant) {
        if self.pending.remove(&id) && front.is_some() {
            self.arriving = self.arriving.saturating_sub(1);
        }
        self.queued.remove(&id);
        self.waits.expect(id, Some(until), None);
    }

    /// When [`Self::turn`] is due even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        let soon = (!self.queued.is_empty()).then(|| Instant::now() + LOOK_AGAIN);
        [self.waits.first(), self.driver.deadline(), soon].into_iter().flatten().min()
    }

    /// Does what has become possible; `ready` says of which of [`Self::watch`].
    pub fn turn(&mut self, diag: &mut Diag, [relay, ready, arrived]: [bool; 3]) {
        for source in if ready { self.waits.ready() } else { Vec::new() } {
            match source {
                Source::Syns => self.tokens.held().into_iter().for_each(|syn| self.take_syn(syn, diag)),
                Source::Engine => self.take_events(),
                Source::Deaths => {
                    let dead = self.deaths.as_ref().map(Deaths::take).unwrap_or_default();
                    self.bury(&dead);
                }
                Source::Expiry => {
                    for id in self.expiry.due(now()) {
                        self.stop(id, libc::EKEYEXPIRED, "the peer's certificate has expired");
                    }
                }
                Source::Joining(id) => self.join(id, diag),
                Source::Front(_) => {}
            }
        }
        if arrived && self.arriving < MOST_PENDING {
            for source in self.waits.fronts() {
                if let Source::Front(front) = source {
                    self.accept(front, diag);
                }
            }
        }
        let queued: Vec<_> = self.queued.iter().copied().collect();
        for id in queued {
            if let Some(front) = self.all.get(&id).and_then(Association::front) {
                self.deliver(id, front, diag);
            }
        }
        for id in self.waits.late() {
            self.stop(id, libc::ETIMEDOUT, "it took too long");
        }
        // At last, as all that came before may have told it something.
        self.driver.turn(relay);
        self.take_events();
    }

    fn take_events(&mut self) {
        while let Some(event) = self.engine.next_event() {
            self.take_event(event);
        }
    }

    /// What the broker is to be told.
    pub fn reports(&mut self) -> Vec<Report> {
        std::mem::take(&mut self.reports)
    }

    /// Has reports told later.
    pub fn keep(&mut self, reports: impl Iterator<Item = Report>) {
        self.reports.splice(0..0, reports);
    }

    /// What the kernel marks our packets with.
    pub fn mark(&self) -> u32 {
        self.tokens.mark()
    }

    fn next_id(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn take_event(&mut self, event: Event) {
        match event {
            Event::Ready { id, tls } => self.shown(id.get(), tls.as_ref()),
            Event::Failed { id, failure, shown } => {
                if let Failure::Connect(libc::ETIMEDOUT) = failure
                    && let Some(Association { direction: Direction::Outbound { syn, .. }, .. }) =
                        self.all.get_mut(&id.get())
                {
                    // Its own SYN, unanswered for as long, ends by itself, and no packet could say it.
                    *syn = None;
                }
                let errno = match &failure {
                    Failure::Connect(errno) | Failure::Inner(errno) => *errno,
                    Failure::TooSlow | Failure::NoVerdict => libc::ETIMEDOUT,
                    _ => libc::ECONNREFUSED,
                };
                let mut why = self.words(id.get(), &failure);
                if let Some(leaf) = shown.first() {
                    why = format!("{why}\n{}", describe(leaf));
                }
                self.over(id.get(), errno, &why, (0, 0));
            }
            Event::Closed { id, ending, bytes_in, bytes_out, .. } => {
                let errno = match ending {
                    Ending::Complete => 0,
                    Ending::Cut => libc::ECONNABORTED,
                    Ending::PeerLost(errno) => errno,
                    _ => libc::ECONNRESET,
                };
                let cut = self.all.get_mut(&id.get()).and_then(|one| one.cut.take());
                let (errno, why) =
                    cut.filter(|_| ending == Ending::Cut).unwrap_or_else(|| (errno, ending.to_string()));
                self.over(id.get(), errno, &why, (bytes_out, bytes_in));
            }
            _ => {}
        }
    }

    /// Its addresses, as far as they are known.
    pub fn places(&self, id: u64) -> Option<Places> {
        self.all.get(&id).map(|one| one.places)
    }

    /// The broker's word: it may go on. Whether it runs already, of which there is no report then.
    pub fn admit(&mut self, id: u64, diag: &mut Diag) -> io::Result<bool> {
        let one = self.all.get_mut(&id).ok_or(Errno::ENOENT)?;
        if !one.shown {
            return Err(Errno::EINVAL.into()); // nobody
        }
        if one.admitted {
            return Err(Errno::EALREADY.into());
        }
        one.admitted = true;
        match one.front() {
            None => self.open_held(id, diag),
            Some(front) => self.deliver(id, front, diag),
        }
        let is_told = |(head, _): &mut Report| head.tag == id && head.kind == Kind::Associated as u16;
        Ok(self.reports.pop_if(is_told).is_some())
    }

    /// The broker's word: it ends.
    pub fn refuse(&mut self, id: u64, errno: i32) -> io::Result<()> {
        if !self.all.contains_key(&id) {
            return Err(Errno::ENOENT.into());
        }
        self.stop(id, if errno > 0 { errno } else { libc::ECONNREFUSED }, "refused by the broker");
        Ok(())
    }

    /// Takes this host's renewed keys and certificates: what begins from now on shows them. What runs goes on.
    /// `false`: it has them already.
    pub fn renew(&mut self, issuing: &str, key: &str, chain: &str) -> io::Result<bool> {
        let newer = self.host.renew(issuing, key, chain, now()).map_err(|_| Errno::EBADMSG)?;
        if newer {
            self.minted.clear();
        }
        Ok(newer)
    }

    /// Takes a newer list of members, and ends what it revokes. `false`: it is not newer.
    pub fn members(&mut self, text: &str) -> io::Result<bool> {
        let newer = self.host.take_members(text).map_err(|_| Errno::EBADMSG)?;
        self.verifier = self.host.verifier().map_err(|_| Errno::EBADMSG)?;
        let revoked: HashSet<&str> =
            self.host.members().revoked.iter().map(|one| one.serial.as_str()).collect();
        let is_revoked = |one: &Association| {
            let serials = one.peer().map(|peer| [&peer.serial, &peer.issuer_serial]);
            serials.into_iter().flatten().any(|it| revoked.contains(it.as_str()))
        };
        let ended: Vec<_> = self.all.iter().filter(|(_, one)| is_revoked(one)).map(|(id, _)| *id).collect();
        for id in ended {
            self.stop(id, libc::EACCES, "the peer's certificate is revoked");
        }
        Ok(newer)
    }

    /// Ends an association wherever it is.
    fn stop(&mut self, id: u64, errno: i32, why: &str) {
        let Some(one) = self.all.get_mut(&id) else { return };
        if one.running {
            // It is over when the engine says so, with what it carried.
            one.cut = Some((errno, why.to_owned()));
            return self.engine.cut(one.flow, How::Reset);
        }
        self.engine.refuse(one.flow, if one.plain { How::Reset } else { How::Denied });
        self.over(id, errno, why, (0, 0));
    }

    /// Forgets an association, answers its program if that still waits, and tells the broker.
    fn over(&mut self, id: u64, errno: i32, why: &str, (sent, received): (u64, u64)) {
        let Some(one) = self.all.remove(&id) else { return };
        self.settle(id, one.front(), one.until);
        self.expiry.forget(id);
        if one.bond.as_ref().is_some_and(|bond| bond.is_related()) && one.of.is_none() {
            self.close_session(id);
        }
        if let Direction::Outbound { token, syn, .. } = &one.direction {
            self.by_token.remove(&token.at);
            if let Some(syn) = syn.as_ref().filter(|_| !one.running && one.joining.is_none()) {
                // If it cannot be sent, the program's own patience ends it.
                let _ = self.tokens.fail(syn, errno);
            }
        }
        let head = one.name(Head { tag: id, errno, ..Head::new(Kind::Over, 0) });
        let cookie = match one.direction {
            Direction::Outbound { cookie, .. } => cookie,
            Direction::Inbound { .. } => 0,
        };
        let mut body = Over { sent, received, cookie }.as_bytes().to_vec();
        body.extend(one.places.as_bytes());
        body.extend(why.as_bytes());
        if one.unknown {
            self.ended.extend([one.live(id), (head, body)]);
            self.ended.truncate(MOST_ENDED);
        } else {
            self.reports.push((head, body));
        }
    }

    /// What belonged to an association goes with it: listeners, and what is on its way. What runs, the broker ends.
    fn close_session(&mut self, id: u64) {
        let fronts: Vec<_> =
            self.fronts.iter().filter(|(_, one)| one.of() == Some(id)).map(|(id, _)| *id).collect();
        for front in fronts {
            self.release(front);
        }
        for one in self.waiting_if(|one| one.of == Some(id)) {
            self.stop(one, libc::ECONNREFUSED, "the association that it belongs to is over");
        }
    }

    /// The last step, on loopback, is under way; it is up at once, unless the program's backlog is full.
    fn begin_joining(&mut self, id: u64, socket: OwnedFd, diag: &mut Diag) {
        let Some(one) = self.all.get_mut(&id) else { return };
        let until = Instant::now() + LAST_STEP;
        self.waits.expect(id, Some(one.until), Some(until));
        one.until = until;
        let waits = self.waits.add(&socket, Source::Joining(id));
        one.joining = Some(socket);
        match waits {
            Ok(()) => self.join(id, diag),
            Err(e) => self.stop(id, e.raw_os_error().unwrap_or(libc::EIO), "cannot wait for the program"),
        }
    }

    /// Looks at a last step under way.
    fn join(&mut self, id: u64, diag: &mut Diag) {
        let Some(one) = self.all.get_mut(&id) else { return };
        let Some(socket) = one.joining.take() else { return };
        match up(&socket) {
            Ok(false) => one.joining = Some(socket),
            Ok(true) if self.is_right_program(id, diag) => {
                self.waits.remove(&socket);
                self.start(id, socket);
            }
            Ok(true) => self.stop(id, libc::EACCES, "another socket took the program's place"),
            Err(e) => self.stop(id, e as i32, "the program has gone"),
        }
    }

    /// Both ends of the loopback hop are who they should be: the kernel names the socket at the other end.
    fn is_right_program(&self, id: u64, diag: &mut Diag) -> bool {
        let Some(one) = self.all.get(&id) else { return false };
        let (cookie, local, remote) = match &one.direction {
            Direction::Outbound { cookie, .. } => (*cookie, one.places.inner_local, one.places.inner_remote),
            Direction::Inbound { front, .. } => {
                let at = one.places.local.socket_addr();
                let front = self.fronts.get(front).zip(at).map(|(front, at)| front.behind(at, diag));
                return matches!(front, Some(Behind::Program { .. }));
            }
        };
        let as_v4 = |addr: Addr| addr.socket_addr().map_or(addr, Addr::from);
        let (local, remote) = (as_v4(local), as_v4(remote));
        let flow = Flow { protocol: 6, local, remote, ..Flow::new_zeroed() };
        diag.look(&flow).ok().flatten().is_some_and(|found| found.cookie == cookie)
    }

    /// All is proved: bytes may pass.
    fn start(&mut self, id: u64, socket: OwnedFd) {
        let Some(one) = self.all.get_mut(&id) else { return };
        (one.running, one.since) = (true, now());
        if let Direction::Outbound { token, .. } = &one.direction {
            self.by_token.remove(&token.at);
        }
        self.engine.splice(one.flow, socket);
        let (front, until, end) = (one.front(), one.until, one.peer().map(Peer::end));
        self.settle(id, front, until);
        if let Some(end) = end {
            self.expiry.add(end, id);
        }
        self.tell(id, Kind::Associated, &[]);
    }

    /// Gives up what dead sockets had.
    fn bury(&mut self, dead: &[u64]) {
        self.tokens.forget(dead);
        let gone: Vec<_> =
            self.fronts.iter_mut().filter_map(|(id, one)| one.bury(dead).then_some(*id)).collect();
        for id in gone {
            self.release(id);
        }
        for front in self.fronts.values_mut() {
            front.except.retain(|(listener, place)| {
                let stays = !dead.contains(listener);
                if !stays {
                    self.steer.unset(place);
                }
                stays
            });
        }
        let cancelled = self.waiting_if(
            |one| matches!(&one.direction, Direction::Outbound { cookie, .. } if dead.contains(cookie)),
        );
        for id in cancelled {
            self.stop(id, libc::ECANCELED, "the program gave up");
        }
    }

    /// Begins to hear of sockets' ends, once somebody needs it.
    fn hear_of_deaths(&mut self) -> io::Result<()> {
        if self.deaths.is_none() {
            let deaths = Deaths::new()?;
            self.waits.add(&deaths, Source::Deaths)?;
            self.deaths = Some(deaths);
        }
        Ok(())
    }
}

/// Whether a connection that was begun is up.
fn up(socket: &OwnedFd) -> Result<bool, Errno> {
    match getsockopt(socket, sockopt::SocketError)? {
        0 => match nix::sys::socket::getpeername::<nix::sys::socket::SockaddrStorage>(
            std::os::fd::AsRawFd::as_raw_fd(socket),
        ) {
            Ok(_) => Ok(true),
            Err(Errno::ENOTCONN) => Ok(false),
            Err(e) => Err(e),
        },
        errno => Err(Errno::from_raw(errno)),
    }
}
