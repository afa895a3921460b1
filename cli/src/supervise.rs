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
mod visitors;

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

use portcullis_types::Without;

pub use self::shim::{INSTALLED, NAME as SHIM, place as place_shim};
use self::{outset::Outset, parts::Parts, visitors::Visitor};
use crate::{
    COULD_NOT, Mode,
    link::{self, Link},
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
    /// Its run's tag, if a policy of its own narrows it.
    run: Option<u64>,
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
    /// Since when there is nothing to do any more but to put on record what the last ones did.
    done: Option<Instant>,
}

/// What it is to have room for where it may take that: as many as systemd gives to a service (systemd.exec(5)).
const DESCRIPTORS: u64 = 524_288;

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
    // One for each tree, one for each door, and what brokers leave here. Root's limit may have been meant for the one
    // program that happens to come first.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let raised = hard.max(DESCRIPTORS);
        let _as_it_was = setrlimit(Resource::RLIMIT_NOFILE, raised, raised)
            .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
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
        done: None,
    };
    supervisor.serve()?;
    supervisor.end();
    Ok(())
}

/// Waits a moment for one that is ending: a service manager starts the next one as soon as it is gone, and whoever
/// looked at its open files just then has not let go of them.
fn lock(place: &Place) -> io::Result<OwnedFd> {
    let file = fs::File::options().create(true).truncate(false).write(true).open(place.lock())?;
    portcullis_broker::lock_within(&file, Duration::from_secs(1))?;
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
                let since = *self.done.get_or_insert_with(Instant::now);
                if self.parts.end(since) {
                    return Ok(());
                }
            } else {
                self.done = None;
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
        self.told_to_end || (idle && !self.is_service() && abandoned)
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
        fds.extend(self.visitors.iter().map(|v| PollFd::new(v.as_fd(), PollFlags::POLLIN)));
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
            let lives = !fired || only_held;
            if let Some(run) = tree.run.filter(|_| !lives) {
                self.parts.handover.end_run(run);
            }
            lives
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
            self.visitors.push(Visitor::new(link));
        }
        if signalled {
            self.take_signals();
        }
        self.parts.read_pipes();
        Ok(())
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

    /// Removes what was made, when the parts have ended. New runs fail to connect from here on, and find the
    /// lock free once this process is gone.
    fn end(&mut self) {
        let place = &self.place;
        let _absent = fs::remove_file(place.supervisor_socket());
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
