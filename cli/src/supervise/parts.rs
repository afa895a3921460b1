//! Broker and key daemon as child processes: started, restarted with back-off, told to end.

use std::{
    fs, io,
    io::{IoSlice, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{fs::PermissionsExt, process::CommandExt},
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    sys::{
        signal::{Signal, kill},
        socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::{Pid, geteuid, pipe2},
};

use super::{Args, backing::Backing, handover::Handover};
use crate::{
    link,
    place::Place,
    run::{RunError, failed},
};

/// How the parts are, as those see it who wait for them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Health {
    /// Not ready yet.
    Starting,
    /// The broker has said that it serves.
    Serving,
    /// They did not come up at all, and why.
    Failed(String),
}

impl Health {
    /// Whether nothing is to be hoped for.
    pub const fn is_failed(&self) -> bool {
        matches!(self, Self::Failed(_))
    }
}

/// First delay before a restart; it doubles up to [`LONGEST_DELAY`].
const FIRST_DELAY: Duration = Duration::from_millis(20);
/// Longest delay before a restart.
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// A part that lived this long starts again with the first delay.
const STEADY: Duration = Duration::from_secs(2);
/// How long a part may be stopped (`SIGSTOP`): a little longer than a program waits for an answer.
const STOPPED: Duration = Duration::from_secs(6);
/// After how long without a broker held calls are refused instead of kept waiting.
const ABSENT: Duration = Duration::from_secs(2);
/// How long a broker that was there is waited for when nobody is left who would ask it.
const OWED: Duration = Duration::from_secs(20);
/// How long a part may take to end.
const FAREWELL: Duration = Duration::from_secs(3);

/// One child process.
struct Part {
    child: Child,
    born: Instant,
    /// Since when it is stopped.
    stopped: Option<Instant>,
    /// Read end of its ready pipe, until it has said how it is.
    ready: Option<fs::File>,
    said: Vec<u8>,
    /// Write end of a pipe, closed by our death if by nothing else: then the part ends too.
    _life: Option<OwnedFd>,
}

/// Both parts, and what they share.
pub struct Parts {
    args: Args,
    doors: OwnedFd,
    control: OwnedFd,
    keyd: Option<Part>,
    /// Where the key daemon learns of each further broker; it ends when this is closed and no broker is left.
    leads: Option<OwnedFd>,
    broker: Option<Part>,
    /// What the kernel does for them.
    pub backing: Backing,
    /// What outlives a broker.
    pub handover: Handover,
    health: Health,
    delay: Duration,
    /// When to start again.
    next: Option<Instant>,
    /// Whether the broker ever served; before that, a death is a failure.
    served: bool,
    fresh: bool,
    /// Since when nobody serves.
    absent: Option<Instant>,
}

impl Parts {
    /// Makes the sockets and starts both. `fresh`: no program of an earlier supervisor can be there.
    pub fn new(args: &Args, place: &Place, fresh: bool) -> Result<Self, RunError> {
        let doors = link::bind(&place.broker_socket()).map_err(failed("bind the broker's socket"))?;
        // Programs of every user ask here.
        fs::set_permissions(place.broker_socket(), fs::Permissions::from_mode(0o666))
            .map_err(failed("open the broker's socket to programs"))?;
        link::listen(&doors).map_err(failed("listen for programs"))?;
        let control =
            link::bind_private_stream(&place.control_socket()).map_err(failed("bind the control socket"))?;
        link::listen(&control).map_err(failed("listen for commands"))?;
        Ok(Self {
            args: args.clone(),
            doors,
            control,
            keyd: None,
            leads: None,
            broker: None,
            backing: Backing::new(place, args.mode, args.without),
            handover: Handover::default(),
            health: Health::Starting,
            delay: FIRST_DELAY,
            next: Some(Instant::now()),
            served: false,
            fresh,
            absent: None,
        })
    }

    /// How the parts are.
    pub const fn health(&self) -> &Health {
        &self.health
    }

    /// When [`Self::tend`] has something to do.
    pub fn wake_in(&self) -> Option<Duration> {
        let stopped = [&self.keyd, &self.broker].into_iter().flatten().filter_map(|p| p.stopped);
        let absent = self.absent.into_iter().flat_map(|since| [since + ABSENT, since + OWED]);
        let absent = absent.filter(|at| *at > Instant::now());
        let next = stopped.map(|since| since + STOPPED).chain(self.next).chain(absent).min();
        next.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Whether no broker has served for so long that those who are held are not to wait any more.
    pub fn is_absent(&self) -> bool {
        self.absent.is_some_and(|since| since.elapsed() >= ABSENT)
    }

    /// Whether the kernel may have put on record what no broker has written yet, and one is to be hoped for.
    pub fn owes_records(&self) -> bool {
        self.absent.is_some_and(|since| self.served && since.elapsed() < OWED)
    }

    /// Pipes at which a part will say how it is.
    pub fn pipes(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [&self.keyd, &self.broker].into_iter().flatten().filter_map(|p| p.ready.as_ref().map(AsFd::as_fd))
    }

    /// Starts what is due.
    pub fn tend(&mut self) {
        self.end_stopped();
        if self.next.is_none_or(|at| at > Instant::now()) {
            return;
        }
        self.next = None;
        if let Err(error) = self.start() {
            self.fell(&format!("cannot start: {error}"), false);
        }
    }

    fn start(&mut self) -> io::Result<()> {
        let broker_end = if geteuid().is_root() { Some(self.start_keyd()?) } else { None };
        let mut command = command("broker");
        command.arg("--state").arg(&self.args.state).arg("--policy").arg(&self.args.policy);
        command.args(["--mode", self.args.mode.as_str(), "--without", &self.args.without.to_string()]);
        command.args(["--doors-fd", &self.doors.as_raw_fd().to_string()]);
        command.args(["--control-fd", &self.control.as_raw_fd().to_string()]);
        let _doors = Pass::on(&self.doors)?;
        let _control = Pass::on(&self.control)?;
        let _keyd = match &broker_end {
            Some(end) => {
                command.args(["--keyd-fd", &end.as_raw_fd().to_string()]);
                Some(Pass::on(end)?)
            }
            None => None,
        };
        // Whoever runs already is held at every moment; the first run of all is not there yet, and its broker
        // starts meanwhile.
        let rings = self.backing.events()?;
        let before = self.served.then(|| self.backing.begin());
        let handed = self.handover.begin(before, rings)?;
        command.args(["--handed-fd", &handed.as_raw_fd().to_string()]);
        let _handed = Pass::on(&handed)?;
        let (ended, life) = pipe2(OFlag::O_CLOEXEC)?;
        command.args(["--life-fd", &ended.as_raw_fd().to_string()]);
        let _ended = Pass::on(&ended)?;
        if self.fresh && !self.served {
            command.arg("--fresh");
        }
        // A run that starts a supervisor has not looked at the policy itself.
        if self.args.socket_fd.is_some() && !self.served {
            command.arg("--strict");
        }
        self.broker = Some(spawn(command, Some(life))?);
        if !self.served {
            let backstop = self.backing.begin();
            self.handover.add_backstop(backstop);
        }
        Ok(())
    }

    /// Starts the key daemon, or leads it to a new broker, whose end of their pair is the result.
    fn start_keyd(&mut self) -> io::Result<OwnedFd> {
        let pair = || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        // One pair for each broker: what one has asked, another must not get the answer to.
        let (ours, theirs) = pair()?;
        if let (Some(_), Some(leads)) = (&self.keyd, &self.leads) {
            let descriptors = [theirs.as_raw_fd()];
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            let rights = [ControlMessage::ScmRights(&descriptors)];
            sendmsg::<()>(leads.as_raw_fd(), &[IoSlice::new(b"B")], &rights, flags, None)?;
            return Ok(ours);
        }
        let (leads, led) = pair()?;
        let mut command = command("keyd");
        let _pass = [Pass::on(&theirs)?, Pass::on(&led)?];
        command.arg("--state").arg(&self.args.state);
        command.args(["--broker-fd", &theirs.as_raw_fd().to_string()]);
        command.args(["--brokers-fd", &led.as_raw_fd().to_string()]);
        self.keyd = Some(spawn(command, None)?);
        self.leads = Some(leads);
        Ok(ours)
    }

    /// Takes what the parts say of themselves.
    pub fn read_pipes(&mut self) {
        for part in [&mut self.keyd, &mut self.broker].into_iter().flatten() {
            let Some(pipe) = &mut part.ready else { continue };
            let mut bytes = [0; 4096];
            match pipe.read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Ok(n) if n > 0 => part.said.extend(bytes.iter().take(n)),
                _ => part.ready = None,
            }
        }
        let ready = |part: &Option<Part>| part.as_ref().is_some_and(|p| p.said == b"ready\n");
        let keyd_is_there = !geteuid().is_root() || ready(&self.keyd);
        if self.health == Health::Starting && keyd_is_there && ready(&self.broker) {
            self.health = Health::Serving;
            self.backing.forget_earlier_events();
            self.served = true;
            self.absent = None;
        }
    }

    /// Passes SIGHUP on: the broker loads its policy again.
    pub fn reload(&self) {
        if let Some(part) = &self.broker {
            part.signal(Signal::SIGHUP);
        }
    }

    /// A part that somebody has stopped serves nobody: another takes its place.
    fn end_stopped(&mut self) {
        for part in [&mut self.keyd, &mut self.broker].into_iter().flatten() {
            if part.stopped.is_some_and(|since| since.elapsed() >= STOPPED) {
                log("a part was stopped for too long and is killed");
                part.stopped = None;
                let _dead = part.child.kill();
            }
        }
    }

    /// Notices who has died, or was stopped.
    pub fn bury(&mut self) {
        self.read_pipes();
        for part in [&mut self.keyd, &mut self.broker].into_iter().flatten() {
            part.look();
        }
        let mut dead = Vec::new();
        for (name, slot) in [("keyd", &mut self.keyd), ("broker", &mut self.broker)] {
            if let Some(part) = slot
                && let Ok(Some(status)) = part.child.try_wait()
            {
                let said = String::from_utf8_lossy(&part.said).trim_end().to_owned();
                let why = if said.is_empty() || said == "ready" { status.to_string() } else { said };
                dead.push((format!("{name}: {why}"), part.born.elapsed()));
                *slot = None;
            }
        }
        let keyd_lives = self.served && self.keyd.is_some();
        let Some((why, age)) = dead.into_iter().next() else { return };
        if age > STEADY {
            self.delay = FIRST_DELAY;
        }
        self.fell(&why, keyd_lives);
    }

    /// One of the two is gone. A broker ends with its key daemon, which knows what it has asked; programs ask anew.
    /// A key daemon outlives its broker, and so do the flows that it protects.
    fn fell(&mut self, why: &str, keyd_lives: bool) {
        log(why);
        self.handover.end();
        let lasting = self.keyd.take_if(|_| keyd_lives);
        if lasting.is_none() {
            self.leads = None;
        }
        for part in [self.broker.take(), self.keyd.take()].into_iter().flatten() {
            let _killed = part.end(FAREWELL);
        }
        self.keyd = lasting;
        self.absent.get_or_insert_with(Instant::now);
        if self.served {
            self.health = Health::Starting;
            self.next = Some(Instant::now() + self.delay);
            self.delay = (self.delay * 2).min(LONGEST_DELAY);
        } else {
            self.health = Health::Failed(why.to_owned());
        }
    }

    /// Ends both: the broker first, which writes what is still in the rings. `false`: it could not, so another one is
    /// to come; nobody waits for that longer than [`OWED`] after `done`.
    pub fn end(&mut self, done: Instant) -> bool {
        let patient = self.served && done.elapsed() < OWED;
        if patient && self.owes_records() {
            return false;
        }
        if let Some(broker) = self.broker.take()
            && !broker.end(FAREWELL)
        {
            if patient {
                self.fell("the broker was killed as it ended", self.keyd.is_some());
                return false;
            }
            log("the broker was killed as it ended: what the kernel has put on record last is lost");
        }
        self.next = None;
        self.leads = None;
        let _killed = self.keyd.take().map(|keyd| keyd.end(FAREWELL));
        true
    }
}

impl Part {
    /// Notices that it was stopped, or goes on.
    fn look(&mut self) {
        let Ok(pid) = i32::try_from(self.child.id()) else { return };
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WCONTINUED | WaitPidFlag::WNOHANG;
        match waitid(Id::Pid(Pid::from_raw(pid)), flags) {
            Ok(WaitStatus::Stopped(..)) => self.stopped = Some(Instant::now()),
            Ok(WaitStatus::Continued(_)) => self.stopped = None,
            _ => {}
        }
    }

    fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // Not buried yet, so the id is still its own.
            let _dead = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Tells it to end. The key daemon hears no signal: it ends when there is no broker any more, nor a lead to one.
    /// `false`: it ended otherwise.
    fn end(mut self, patience: Duration) -> bool {
        self.signal(Signal::SIGTERM);
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(1)),
                Ok(Some(status)) => return status.success(),
                Err(_) => return false,
            }
        }
        log("did not end in time and was killed");
        let _dead = self.child.kill();
        let _buried = self.child.wait();
        false
    }
}

/// A descriptor that the next child inherits, as long as this lives.
struct Pass<'a>(BorrowedFd<'a>);

impl<'a> Pass<'a> {
    fn on(fd: &'a OwnedFd) -> io::Result<Self> {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        Ok(Self(fd.as_fd()))
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        // Children close what they were not given anyway.
        let _kept = fcntl(self.0, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
    }
}

/// This very program (even if its file has been replaced) as another part.
fn command(part: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("portcullis").arg(part).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    command
}

fn spawn(mut command: Command, life: Option<OwnedFd>) -> io::Result<Part> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    command.args(["--ready-fd", &write.as_raw_fd().to_string()]);
    let pass = Pass::on(&write)?;
    let child = command.spawn()?;
    drop(pass);
    Ok(Part {
        child,
        born: Instant::now(),
        stopped: None,
        ready: Some(fs::File::from(read)),
        said: Vec::new(),
        _life: life,
    })
}

/// Writes a line to the state folder's log, which is our standard error.
pub(super) fn log(text: &str) {
    use std::io::Write;
    let now = jiff::Timestamp::now();
    let _full = writeln!(io::stderr(), "{now:.3} supervisor: {text}");
}
