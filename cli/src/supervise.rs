//! `portcullis supervise`: one per state folder, detached; starts broker and key daemon, restarts what
//! dies, and ends both when the last process of the last wrapped tree has ended.
//!
//! One thread, one poll loop. What it knows of a run is in a [`Tree`]: the guard's listener, where the
//! kernel says when no task of the tree is left.

mod backing;
mod handover;
mod outset;
mod parts;
mod shim;
mod sweep;
mod table;

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{Pid, geteuid},
};

use portcullis_types::{Lack, Without};

pub use self::shim::{INSTALLED, NAME as SHIM, place as place_shim};
use self::{
    outset::Outset,
    parts::{Health, Parts},
};
use crate::{
    COULD_NOT, Mode,
    link::{self, Answer, Hold, Link, Say},
    output::Out,
    place::Place,
    run::{RunError, failed},
    sys,
};

/// Serve a state folder until told to end: what `run` and the systemd unit start.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// State folder, absolute
    #[arg(long)]
    pub state: PathBuf,
    /// Runtime folder, absolute [default: the state folder's own]
    #[arg(long)]
    pub runtime: Option<PathBuf>,
    /// Policy file, absolute
    #[arg(long)]
    pub policy: PathBuf,
    /// Enforce or audit
    #[arg(long, value_enum, default_value_t)]
    pub mode: Mode,
    /// The shim that programs load [default: where it is found]
    #[arg(long)]
    pub shim: Option<PathBuf>,
    /// What to do without, although this kernel has it: backstop, bpf, nftables, passpidfd, sync-wake-up, landlock
    #[arg(long, value_name = "LIST", default_value_t)]
    pub without: Without,
    /// Inherited descriptor of the lock file, already locked
    #[arg(long)]
    pub lock_fd: Option<i32>,
    /// Inherited socket on which runs arrive
    #[arg(long)]
    pub socket_fd: Option<i32>,
}

impl Args {
    /// The same as a command line.
    pub fn to_argv(&self) -> Vec<CString> {
        let mut words: Vec<Vec<u8>> = vec![b"portcullis".to_vec(), b"supervise".to_vec()];
        let mut option = |name: &str, value: &[u8]| {
            words.push(name.as_bytes().to_vec());
            words.push(value.to_vec());
        };
        option("--state", self.state.as_os_str().as_bytes());
        option("--policy", self.policy.as_os_str().as_bytes());
        option("--mode", self.mode.as_str().as_bytes());
        option("--without", self.without.to_string().as_bytes());
        for (name, path) in [("--runtime", &self.runtime), ("--shim", &self.shim)] {
            if let Some(path) = path {
                option(name, path.as_os_str().as_bytes());
            }
        }
        for (name, fd) in [("--lock-fd", self.lock_fd), ("--socket-fd", self.socket_fd)] {
            if let Some(fd) = fd {
                option(name, fd.to_string().as_bytes());
            }
        }
        words.into_iter().filter_map(|w| CString::new(w).ok()).collect()
    }
}

/// A program that was run, and all its descendants.
struct Tree {
    /// The guard's listener; without one, the first process's pidfd stands for the tree.
    watched: OwnedFd,
    guarded: bool,
}

/// A run that has connected and not yet become its program.
struct Visitor {
    link: Link,
    /// What it expects, once it has said so.
    hello: Option<(Option<PathBuf>, Option<Mode>)>,
    welcomed: bool,
    /// The process, and what there is to hold it.
    enclosed: Option<(OwnedFd, Hold)>,
}

struct Supervisor {
    args: Args,
    place: Place,
    shim: PathBuf,
    socket: OwnedFd,
    signals: SignalFd,
    parts: Parts,
    visitors: Vec<Visitor>,
    trees: Vec<Tree>,
    outset: Outset,
    /// Whether anybody was ever served; a supervisor that nobody has reached yet does not end.
    used: bool,
    born: Instant,
    told_to_end: bool,
}

/// How long a supervisor waits for the run that started it.
const UNUSED: Duration = Duration::from_secs(15);

/// Supervises until there is nothing left to do; the result is the exit status.
pub fn run(args: Args, out: &mut Out) -> u8 {
    match supervise(args) {
        Ok(()) => 0,
        Err(error) => {
            out.error(&error);
            COULD_NOT
        }
    }
}

fn supervise(args: Args) -> Result<(), RunError> {
    let inherited: Vec<i32> = [args.lock_fd, args.socket_fd].into_iter().flatten().collect();
    sys::close_others(&inherited);
    for fd in &inherited {
        sys::close_on_exec(*fd).map_err(failed("take over a descriptor"))?;
    }
    let place = match &args.runtime {
        Some(runtime) => Place { state: args.state.clone(), runtime: runtime.clone() },
        None => Place::make(Some(&args.state))?,
    };
    // Let go when this process ends, however that happens.
    let _lock = match args.lock_fd {
        Some(fd) => sys::adopt(fd).map_err(failed("take over the lock"))?,
        None => lock(&place).map_err(failed("lock the state folder, which another supervisor serves"))?,
    };
    if args.socket_fd.is_some() {
        // The run that happens to come first may be a niced one, and what is started here serves all that follow.
        sys::be_as_nice_as_others();
    }
    // One for each tree, one for each door, and what brokers leave here.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _as_it_was = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    place.make_runtime()?;
    let shim = match &args.shim {
        Some(shim) => shim.clone(),
        None => place_shim(&place)?,
    };
    let socket = match args.socket_fd {
        Some(fd) => sys::adopt(fd).map_err(failed("take over the socket"))?,
        None => own_socket(&place)?,
    };
    let fresh = !sweep::is_signed(&place);
    sweep::sign(&place).map_err(failed("sign the runtime folder"))?;
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD] {
        mask.add(signal);
    }
    // The others too: no program that is held ends what holds it.
    SigSet::all().thread_block().map_err(failed("block signals"))?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(failed("receive signals"))?;
    let parts = Parts::new(&args, &place, fresh)?;
    let mut supervisor = Supervisor {
        args,
        place,
        shim,
        socket,
        signals,
        parts,
        visitors: Vec::new(),
        trees: Vec::new(),
        outset: Outset::default(),
        used: false,
        born: Instant::now(),
        told_to_end: false,
    };
    supervisor.serve()?;
    supervisor.end();
    Ok(())
}

fn lock(place: &Place) -> io::Result<OwnedFd> {
    let file = fs::File::options().create(true).truncate(false).write(true).open(place.lock())?;
    file.try_lock()?;
    Ok(file.into())
}

fn own_socket(place: &Place) -> Result<OwnedFd, RunError> {
    let socket =
        link::bind_private(&place.supervisor_socket()).map_err(failed("bind the supervisor's socket"))?;
    link::listen(&socket).map_err(failed("listen for runs"))?;
    Ok(socket)
}

impl Supervisor {
    fn serve(&mut self) -> Result<(), RunError> {
        loop {
            self.parts.tend();
            self.tend_outset();
            self.answer_visitors();
            if self.is_done() {
                return Ok(());
            }
            self.wait().map_err(failed("wait"))?;
        }
    }

    /// Whether it stays when nobody is left.
    const fn is_service(&self) -> bool {
        self.args.socket_fd.is_none()
    }

    /// Whether nobody is left to serve.
    fn is_done(&self) -> bool {
        let idle = self.trees.is_empty() && self.visitors.is_empty();
        let abandoned = self.used || self.born.elapsed() > UNUSED || self.parts.health().is_failed();
        // What the last ones did while no broker was there is on record when the next one has begun.
        self.told_to_end || (idle && !self.is_service() && abandoned && !self.parts.owes_records())
    }

    fn wait(&mut self) -> io::Result<()> {
        let waits_for_first = !self.used && !self.is_service() && self.visitors.is_empty();
        let unused = waits_for_first.then(|| UNUSED.saturating_sub(self.born.elapsed()));
        let soonest = [self.parts.wake_in(), unused, self.outset.wake_in()].into_iter().flatten().min();
        // Rounded up, so that it is due by then.
        let timeout = soonest.map(|wait| PollTimeout::try_from(wait + Duration::from_millis(1)));
        let timeout = timeout.map_or(PollTimeout::NONE, |wait| wait.unwrap_or(PollTimeout::MAX));
        let mut fds = vec![
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.visitors.iter().map(|v| PollFd::new(v.link.as_fd(), PollFlags::POLLIN)));
        // A guard's listener reports POLLHUP; its notifications are not ours to take, but for a broker that does
        // not come back. A pidfd is readable at its process's end.
        let absent = self.parts.is_absent();
        fds.extend(self.trees.iter().map(|t| {
            let events = if t.guarded && !absent { PollFlags::empty() } else { PollFlags::POLLIN };
            PollFd::new(t.watched.as_fd(), events)
        }));
        let handover: Vec<_> = self.parts.handover.watched().collect();
        let handovers = handover.len();
        fds.extend(handover);
        fds.extend(self.parts.pipes().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(()),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        let fired: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let trees = fds.iter().skip(2 + self.visitors.len()).take(self.trees.len());
        let held: Vec<bool> = trees.map(|fd| fd.revents() == Some(PollFlags::POLLIN)).collect();
        drop(fds);
        let mut fired = fired.into_iter();
        let (arrived, signalled) = (fired.next().unwrap_or(false), fired.next().unwrap_or(false));
        let spoke: Vec<bool> = fired.by_ref().take(self.visitors.len()).collect();
        let ended: Vec<bool> = fired.by_ref().take(self.trees.len()).collect();
        let mut ended = ended.into_iter();
        let handed = fired.by_ref().take(handovers).fold(false, |any, one| any | one);
        let before = self.trees.len();
        let mut held = held.into_iter();
        self.trees.retain(|tree| {
            let (fired, held) = (ended.next().unwrap_or(false), held.next().unwrap_or(false));
            let only_held = tree.guarded && held;
            if only_held {
                handover::refuse(&tree.watched);
            }
            !fired || only_held
        });
        if self.trees.len() != before {
            self.parts.backing.tidy();
        }
        if handed {
            self.parts.handover.hear();
            self.parts.handover.tidy();
        }
        self.hear(&spoke);
        if arrived && let Ok(link) = Link::accept(&self.socket) {
            self.visitors.push(Visitor { link, hello: None, welcomed: false, enclosed: None });
        }
        if signalled {
            self.take_signals();
        }
        self.parts.read_pipes();
        Ok(())
    }

    /// Takes what visitors say; one that has said all, or nonsense, is gone.
    fn hear(&mut self, spoke: &[bool]) {
        let visitors = std::mem::take(&mut self.visitors);
        for (i, mut visitor) in visitors.into_iter().enumerate() {
            if !spoke.get(i).copied().unwrap_or(false) {
                self.visitors.push(visitor);
                continue;
            }
            match visitor.link.receive::<Say>() {
                Ok(Some((Say::Hello { policy, mode }, _))) if visitor.hello.is_none() => {
                    visitor.hello = Some((policy, mode));
                    self.visitors.push(visitor);
                }
                Ok(Some((Say::Enclose, fds))) if visitor.welcomed && visitor.enclosed.is_none() => {
                    let pidfd = fds.into_iter().next();
                    let answer = match pidfd.as_ref().map(|p| self.enclose(p)) {
                        Some(Ok(hold)) => Answer::Enclosed(hold),
                        Some(Err(error)) => Answer::Failed(error.to_string()),
                        None => continue,
                    };
                    visitor.enclosed = pidfd.zip(match answer {
                        Answer::Enclosed(hold) => Some(hold),
                        _ => None,
                    });
                    if visitor.link.send(&answer, &[]).is_ok() {
                        self.visitors.push(visitor);
                    }
                }
                Ok(Some((Say::Tree { guarded, listener, connected }, fds))) if visitor.welcomed => {
                    if connected && let Err(error) = self.expect(&visitor) {
                        let why =
                            format!("the connections that the program begins with cannot be judged: {error}");
                        let _gone = visitor.link.send(&Answer::Failed(why), &[]);
                        continue;
                    }
                    let taken = listener.and_then(|n| self.take_listener(&visitor, n));
                    if let Some(watched) = taken.or_else(|| fds.into_iter().next())
                        && visitor.link.send(&Answer::Watched, &[]).is_ok()
                    {
                        self.trees.push(Tree { watched, guarded });
                        self.used = true;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.visitors.push(visitor),
                // It ended, or does not keep to the order: closing is the answer.
                _ => self.used = true,
            }
        }
    }

    /// Puts a process under the backstop, if there is one.
    fn enclose(&mut self, pidfd: &OwnedFd) -> io::Result<Hold> {
        let pid = behind(pidfd)?.as_raw().cast_unsigned();
        if self.parts.backing.enclose(pid).map_err(io::Error::other)? {
            return Ok(Hold::Backstop);
        }
        // Whoever makes calls for it must be able to take its descriptors; whether it has this one is no matter.
        let barred = sys::pidfd_getfd(pidfd, 0).is_err_and(|e| e.raw_os_error() == Some(libc::EPERM));
        let locked = !self.args.without.has(Lack::Landlock);
        Ok(if barred { Hold::Nothing } else { Hold::Proxy { locked } })
    }

    /// Has a process stopped when it has become its program, so that its connections are judged. Where nobody may act
    /// for it, the shim alone judges them.
    fn expect(&mut self, visitor: &Visitor) -> io::Result<()> {
        match &visitor.enclosed {
            Some((_, Hold::Nothing)) => Ok(()),
            Some((process, _)) => Ok(self.outset.expect(behind(process)?, process.try_clone()?)?),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn tend_outset(&mut self) {
        for tag in self.parts.handover.take_judged() {
            self.outset.release(tag);
        }
        for tag in self.outset.tend() {
            self.parts.handover.forget_begun(tag);
            parts::log("a program was ended: nobody judged in time the connections that it begins with");
        }
    }

    /// Takes the guard's listener out of a process that sends nothing any more, and lets the broker serve it.
    fn take_listener(&mut self, visitor: &Visitor, number: i32) -> Option<OwnedFd> {
        let (process, hold) = visitor.enclosed.as_ref()?;
        let listener = sys::pidfd_getfd(process, number).ok()?;
        self.parts.handover.add_tree(&listener, matches!(hold, Hold::Proxy { .. })).ok()?;
        Some(listener)
    }

    /// Answers those who wait for the broker, once it is known how it is.
    fn answer_visitors(&mut self) {
        let health = self.parts.health().clone();
        for visitor in &mut self.visitors {
            let Some((policy, mode)) = &visitor.hello else { continue };
            if visitor.welcomed {
                continue;
            }
            let mut door = None;
            let answer = match (conflict(&self.args, policy.as_deref(), *mode), &health) {
                (Some(why), _) => Answer::Conflict(why),
                (None, Health::Starting) => continue,
                (None, Health::Failed(why)) => Answer::Failed(why.clone()),
                (None, Health::Serving) => match self.parts.handover.add_door() {
                    Ok(end) => {
                        door = Some(end);
                        Answer::Welcome {
                            broker: self.place.broker_socket(),
                            // The supervisor has called listen(2), and keeps the socket over the broker's
                            // restarts.
                            uid: geteuid().as_raw(),
                            shim: self.shim.clone(),
                        }
                    }
                    Err(error) => Answer::Failed(format!("no door: {error}")),
                },
            };
            let attached: Vec<i32> = door.iter().map(AsRawFd::as_raw_fd).collect();
            visitor.welcomed = true;
            // A visitor that has gone is noticed at the next turn.
            let _gone = visitor.link.send(&answer, &attached);
        }
    }

    fn take_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            match i32::try_from(info.ssi_signo).ok().and_then(|n| Signal::try_from(n).ok()) {
                Some(Signal::SIGTERM | Signal::SIGINT) => self.told_to_end = true,
                Some(Signal::SIGHUP) => self.parts.reload(),
                _ => self.parts.bury(),
            }
        }
        for (tag, process) in self.outset.look() {
            let _it_is_ended_in_time = self.parts.handover.add_begun(tag, process);
        }
    }

    /// Ends what was started and removes what was made. New runs fail to connect from here on, and find the
    /// lock free once this process is gone.
    fn end(&mut self) {
        let place = &self.place;
        let _absent = fs::remove_file(place.supervisor_socket());
        self.parts.end();
        self.parts.backing.end();
        for path in [place.broker_socket(), place.control_socket()] {
            let _absent = fs::remove_file(path);
        }
        if !self.trees.is_empty() {
            // Told to end while programs run: they are refused new calls, and what they exec loads the shim.
            return;
        }
        shim::remove(place);
        sweep::unsign(place);
        sweep::sweep(place);
        let _not_empty = fs::remove_dir(&place.runtime);
    }
}

/// The process that a pidfd is of.
fn behind(pidfd: &OwnedFd) -> io::Result<Pid> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let pid = info.lines().find_map(|l| l.strip_prefix("Pid:")).and_then(|p| p.trim().parse().ok());
    pid.filter(|pid| *pid > 0).map(Pid::from_raw).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Why what a run expects is not what is in force.
fn conflict(args: &Args, policy: Option<&Path>, mode: Option<Mode>) -> Option<String> {
    let state = args.state.display();
    if let Some(mode) = mode
        && mode != args.mode
    {
        return Some(format!(
            "a broker in mode `{}` serves state folder `{state}`, so this run cannot have mode `{}`; \
             give another --state or leave --mode out",
            args.mode.as_str(),
            mode.as_str()
        ));
    }
    let policy = policy?;
    let same = || fs::read(policy).ok().zip(fs::read(&args.policy).ok()).is_some_and(|(a, b)| a == b);
    (policy != args.policy && !same()).then(|| {
        format!(
            "a broker with policy `{}` serves state folder `{state}`, so this run cannot have policy `{}`; \
             give another --state or leave --policy out",
            args.policy.display(),
            policy.display()
        )
    })
}
