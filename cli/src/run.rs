//! `portcullis run`: makes sure that a broker serves the state folder, and becomes the program.

use std::{
    ffi::{CString, OsStr, OsString, c_int},
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::OpenOptionsExt,
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{resource, wait},
    unistd,
};
use portcullis_backstop::{Cgroup, cgroup_name};
use portcullis_policy::{LoadError, Policy};
use portcullis_types::{Lack, UnknownLack, Without};
use portcullis_wire::frame::{ENV_BROKER, ENV_DOOR, LOWEST_FD};

use crate::{
    COULD_NOT, Mode, StateArg,
    guard::{self, Guard},
    link::{self, Answer, Hold, Link, Say},
    output::Out,
    place::{Place, PlaceError},
    supervise,
    sys::{self, Forked},
};

/// Options of `portcullis run`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Policy file [default: DIR/policy.pol, else /etc/portcullis/policy.pol]; under a service it narrows what the
    /// service's own permits
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Whether what the policy refuses is refused, or only recorded [default: enforce]; under a service `audit` is
    /// for a --policy of the run's own, and loosens nothing of the service's
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// A label for `ps`, of all processes of the tree; it proves nothing
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    state: StateArg,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Exit status when it is `run` itself that failed (env(1)).
pub const RUN_FAILED: u8 = 125;
/// Exit status when the program is there but cannot be started (env(1)).
const CANNOT_EXEC: u8 = 126;
/// Exit status when there is no such program (env(1)).
const NOT_FOUND: u8 = 127;

/// How long a broker may take to become ready.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often a run starts a supervisor at most.
const STARTS: u32 = 3;

/// Why a program was not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// See [`PlaceError`].
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Nothing names a policy.
    #[error("no policy: give --policy FILE, or put one at `{}` or `{SYSTEM_POLICY}`", .0.display())]
    NoPolicy(PathBuf),
    /// The policy file is not there or not readable.
    #[error("cannot read policy `{}`", path.display())]
    Policy {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The policy is no valid policy, or cannot be read.
    #[error(transparent)]
    BadPolicy(LoadError),
    /// The folder's broker serves another policy or mode.
    #[error("{0}")]
    Conflict(String),
    /// The broker did not come up.
    #[error("no broker: {0}")]
    NoBroker(String),
    /// The broker did not come up in time.
    #[error("no broker within {} s; see `{}`", PATIENCE.as_secs(), .0.display())]
    Late(PathBuf),
    /// Somebody else answers in the broker's place.
    #[error("uid {found} answers at `{}`, not the broker (uid {expected})", path.display())]
    Impostor {
        /// The socket.
        path: PathBuf,
        /// Who should answer.
        expected: u32,
        /// Who does.
        found: u32,
    },
    /// Within a wrapped program, the outer run's broker does not answer.
    #[error("the outer run's broker does not answer at `{}`", path.display())]
    Outer {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No shim library beside the command, nor installed.
    #[error(
        "no shim: `{}` is neither beside the command nor in `{}` from there",
        supervise::SHIM,
        supervise::INSTALLED
    )]
    NoShim,
    /// No folder whose files can be mapped as code.
    #[error("no place for the shim: `{}` is mounted noexec, and so are its alternatives", .0.display())]
    NoExec(PathBuf),
    /// `PORTCULLIS_WITHOUT` is no list of what can be done without.
    #[error("PORTCULLIS_WITHOUT")]
    Without(#[from] UnknownLack),
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// Why it was not.
        #[source]
        source: io::Error,
    },
}

/// Names the system call that failed.
pub fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> RunError {
    move |source| RunError::System { what, source: source.into() }
}

/// Environment variable with the label that `--name` gives to all processes of a run.
pub const ENV_NAME: &str = "PORTCULLIS_NAME";

/// Policy of a host that has one for all its programs.
const SYSTEM_POLICY: &str = "/etc/portcullis/policy.pol";

/// Runs the program. Returns only if it could not be started, with the exit status.
pub fn run(args: Args, out: &mut Out) -> u8 {
    match prepare(&args) {
        Ok(environment) => become_program(&args.command, &environment, out),
        Err(error) => {
            match &error {
                RunError::BadPolicy(LoadError::Policy(found)) => out.diagnostics(found),
                error => out.error(error),
            }
            if matches!(error, RunError::Conflict(_)) { COULD_NOT } else { RUN_FAILED }
        }
    }
}

/// Does all that comes before exec; the result is the program's environment.
fn prepare(args: &Args) -> Result<Vec<CString>, RunError> {
    sys::hold_standard_descriptors().map_err(failed("open /dev/null"))?;
    let policy = args.policy.as_deref().map(readable).transpose()?;
    let asks = args.policy.is_some() || args.mode.is_some();
    let pidfd = sys::pidfd_open(unistd::getpid()).map_err(failed("open a pidfd"))?;
    if let Some(broker) = outer() {
        return join(
            &broker,
            &Hello { say: Say::Hello { policy, mode: args.mode, nested: true, name: None }, pidfd },
            asks,
        );
    }
    let hello =
        Hello { say: Say::Hello { policy, mode: args.mode, nested: false, name: args.name.clone() }, pidfd };
    let place = Place::make(args.state.state.as_deref())?;
    let (link, welcome) = reach(&place, &hello, args)?;
    let door = place_door(&welcome)?;
    if welcome.narrowed {
        narrow(&hello)?;
    }
    let pidfd = hello.pidfd;
    let hold = enclose(&link, &pidfd)?;
    let guard = guard::install(hold).map_err(failed("install the guard's filter"))?;
    let by_number = match &guard {
        Guard::Listener(listener) if hold != Hold::Nothing => Some(listener.as_raw_fd()),
        _ => None,
    };
    let tree = Say::Tree {
        guarded: matches!(guard, Guard::Listener(_)),
        listener: by_number,
        connected: is_connected(),
    };
    let mut fds = Vec::new();
    if let Guard::Listener(listener) = &guard {
        fds.push(listener.as_raw_fd());
    }
    fds.push(pidfd.as_raw_fd());
    if by_number.is_some() {
        fds.clear();
    }
    link.send(&tree, &fds).map_err(failed("hand the guard over"))?;
    await_watch(&link)?;
    Ok(environment(&welcome, door, args.name.as_deref()))
}

/// Waits until the tree is watched, and narrowed if it is to be.
fn await_watch(link: &Link) -> Result<(), RunError> {
    match link.receive::<Answer>().map_err(failed("hand the guard over"))? {
        Some((Answer::Watched, _)) => Ok(()),
        Some((Answer::Failed(why), _)) => Err(RunError::NoBroker(why)),
        _ => Err(RunError::NoBroker("it ended before the program began".into())),
    }
}

/// What a run says first, and who it is.
struct Hello {
    say: Say,
    pidfd: OwnedFd,
}

/// Whether the program will have connections, or listeners, that are there already, or on their way.
fn is_connected() -> bool {
    let Ok(all) = fs::read_dir("/proc/self/fd") else { return true };
    let numbers = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
    numbers.into_iter().any(|fd| {
        let peer = nix::sys::socket::getpeername::<nix::sys::socket::SockaddrStorage>(fd);
        peer.is_ok_and(|at| at.as_sockaddr_in().is_some() || at.as_sockaddr_in6().is_some())
            || sys::has_begun(fd)
    })
}

/// Asks the supervisor to put this process under the backstop, and what there is to hold it.
fn enclose(link: &Link, pidfd: &OwnedFd) -> Result<Hold, RunError> {
    link.send(&Say::Enclose, &[pidfd.as_raw_fd()]).map_err(failed("ask for the backstop"))?;
    match link.receive::<Answer>().map_err(failed("ask for the backstop"))? {
        Some((Answer::Enclosed(hold), _)) => Ok(hold),
        Some((Answer::Failed(why), _)) => Err(RunError::NoBroker(why)),
        _ => Err(RunError::NoBroker("it ended before the program began".into())),
    }
}

/// What the supervisor says of a broker that is ready.
struct Welcome {
    broker: PathBuf,
    uid: u32,
    shim: PathBuf,
    door: OwnedFd,
    narrowed: bool,
}

/// Reaches the folder's supervisor, starting one if there is none.
fn reach(place: &Place, hello: &Hello, args: &Args) -> Result<(Link, Welcome), RunError> {
    let mut ahead = None;
    let reached = try_to_reach(place, hello, args, &mut ahead);
    if reached.is_err()
        && let Some(cgroup) = ahead
    {
        let _stays = cgroup.leave(std::process::id());
    }
    // The broker, which reads it anyway, may have ended because of it.
    if let Err(RunError::NoBroker(_)) = &reached
        && let Ok(policy) = policy_of(place, args)
    {
        check(&policy)?;
    }
    reached
}

fn try_to_reach(
    place: &Place,
    hello: &Hello,
    args: &Args,
    ahead: &mut Option<Cgroup>,
) -> Result<(Link, Welcome), RunError> {
    let deadline = Instant::now() + PATIENCE;
    let mut started = 0;
    while Instant::now() < deadline {
        match Link::to(&place.supervisor_socket(), deadline.saturating_duration_since(Instant::now())) {
            Ok(link) => match greet(&link, hello)? {
                Some(welcome) => return Ok((link, welcome)),
                None => continue, // it was about to end
            },
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
            Err(error) => return Err(failed("reach the supervisor")(error)),
        }
        let lock = fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(place.lock())
            .map_err(|source| PlaceError::State { path: place.state.clone(), source })?;
        match lock.try_lock() {
            // One may have met another that was about to end; what ends each time has a reason.
            Ok(()) if started == STARTS => {
                let log = fs::read_to_string(place.log()).unwrap_or_default();
                let last = log.lines().last().unwrap_or("its log says nothing").to_owned();
                return Err(RunError::NoBroker(format!("the supervisor ends as it begins: {last}")));
            }
            Ok(()) => {
                started += 1;
                let without = without()?;
                start(place, &lock, args, without).inspect_err(|_| {
                    let _not_empty = fs::remove_dir(&place.runtime);
                })?;
                *ahead = move_ahead(place, without);
            }
            // Another run is starting one, or one is ending.
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    Err(RunError::Late(place.log()))
}

/// What the user asks to do without. A supervisor takes it from the run that starts it, and from no other.
fn without() -> Result<Without, RunError> {
    let all: Without = std::env::var("PORTCULLIS_WITHOUT").unwrap_or_default().parse()?;
    let no_backstop = std::env::var_os("PORTCULLIS_NO_BACKSTOP").is_some_and(|v| !v.is_empty() && v != "0");
    Ok(if no_backstop { all.and(Lack::Backstop) } else { all })
}

/// Moves this process to the cgroup where the supervisor will hold it. For the first move in a while the kernel
/// waits until all its processors have looked up, some milliseconds; broker and key daemon start meanwhile.
/// What fails here the supervisor tries again, and says why.
fn move_ahead(place: &Place, without: Without) -> Option<Cgroup> {
    if !unistd::geteuid().is_root() || without.has(Lack::Backstop) {
        return None;
    }
    let cgroup = Cgroup::below(std::process::id(), &cgroup_name(&place.state)).ok()?;
    cgroup.enter(std::process::id()).ok().map(|()| cgroup)
}

/// Greets a supervisor. `None`: it closed without an answer, because it ends.
fn greet(link: &Link, hello: &Hello) -> Result<Option<Welcome>, RunError> {
    let ended =
        |e: &io::Error| matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
    let attached: &[RawFd] = match hello.say {
        Say::Hello { policy: None, mode: None, .. } => &[],
        _ => &[hello.pidfd.as_raw_fd()],
    };
    let exchange = link.send(&hello.say, attached).and_then(|()| link.receive::<Answer>());
    match exchange {
        Ok(Some((Answer::Welcome { broker, uid, shim, narrowed }, fds))) => {
            let door = fds.into_iter().next().ok_or_else(|| RunError::NoBroker("it gives no door".into()))?;
            Ok(Some(Welcome { broker, uid, shim, door, narrowed }))
        }
        Ok(Some((Answer::Conflict(why), _))) => Err(RunError::Conflict(why)),
        Ok(Some((Answer::Failed(why), _))) => Err(RunError::NoBroker(why)),
        Ok(None | Some((Answer::Watched | Answer::Enclosed(_), _))) => Ok(None),
        Err(error) if ended(&error) => Ok(None),
        Err(error) => Err(failed("reach the supervisor")(error)),
    }
}

/// Starts a supervisor: detached from terminal, session, parent and descriptors, and not our child, so that
/// the program we become neither waits for it nor hears of its end. The lock goes with it: it belongs to the
/// open file, which both have until we close ours.
fn start(place: &Place, lock: &fs::File, args: &Args, without: Without) -> Result<(), RunError> {
    let policy = policy_of(place, args)?;
    place.make_runtime()?;
    let shim = supervise::place_shim(place)?;
    let socket =
        link::bind_private(&place.supervisor_socket()).map_err(failed("bind the supervisor's socket"))?;
    link::listen(&socket).map_err(failed("listen for runs"))?;
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(place.log())
        .map_err(|source| PlaceError::State { path: place.state.clone(), source })?;
    let nowhere =
        fs::File::options().read(true).write(true).open("/dev/null").map_err(failed("open /dev/null"))?;
    let arguments = supervise::Args {
        state: place.state.clone(),
        runtime: Some(place.runtime.clone()),
        policy,
        mode: args.mode.unwrap_or_default(),
        shim: Some(shim),
        without,
        lock_fd: Some(lock.as_raw_fd()),
        socket_fd: Some(socket.as_raw_fd()),
    }
    .to_argv();
    match sys::fork_quietly().map_err(failed("start the supervisor"))? {
        Forked::Parent(child) => {
            wait::waitpid(child, Some(wait::WaitPidFlag::__WALL)).map_err(failed("start the supervisor"))?;
            Ok(())
        }
        Forked::Child => {
            let status = detach(&nowhere, &log, lock, &socket, &arguments).map_or(1, |never| match never {});
            std::process::exit(status)
        }
    }
}

/// In the child: leaves session and parent, and becomes the supervisor.
fn detach(
    nowhere: &fs::File,
    log: &fs::File,
    lock: &fs::File,
    socket: &OwnedFd,
    arguments: &[CString],
) -> io::Result<std::convert::Infallible> {
    unistd::setsid()?;
    if let Forked::Parent(_) = sys::fork_quietly()? {
        std::process::exit(0);
    }
    unistd::chdir("/")?;
    unistd::dup2_stdin(nowhere)?;
    unistd::dup2_stdout(nowhere)?;
    unistd::dup2_stderr(log)?;
    let kept = [lock.as_raw_fd(), socket.as_raw_fd()];
    sys::close_others(&kept);
    for fd in [lock.as_fd(), socket.as_fd()] {
        fcntl(fd, FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
    }
    let environment = [c"PATH=/usr/sbin:/usr/bin:/sbin:/bin"];
    Ok(unistd::execve(c"/proc/self/exe", arguments, &environment)?)
}

/// Shows what is wrong with a policy.
fn check(policy: &Path) -> Result<(), RunError> {
    Policy::load(policy).map(drop).map_err(RunError::BadPolicy)
}

/// Begins to be narrowed by a policy of its own: what comes after is known by its mark.
fn narrow(hello: &Hello) -> Result<(), RunError> {
    if let Say::Hello { policy: Some(policy), .. } = &hello.say {
        check(policy)?;
    }
    guard::mark().map_err(failed("put the mark of its policy under the program"))
}

/// The policy file's absolute path, once it has been seen to be readable.
fn readable(path: &Path) -> Result<PathBuf, RunError> {
    let policy = |source| RunError::Policy { path: path.to_owned(), source };
    let absolute = fs::canonicalize(path).map_err(policy)?;
    // What is no file is the broker's to refuse; opening a pipe would wait for its writer.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    fs::File::options().read(true).custom_flags(flags.bits()).open(&absolute).map_err(policy)?;
    Ok(absolute)
}

/// The policy that a supervisor of this run's would serve.
fn policy_of(place: &Place, args: &Args) -> Result<PathBuf, RunError> {
    args.policy.as_deref().map_or_else(|| default_policy(place), readable)
}

fn default_policy(place: &Place) -> Result<PathBuf, RunError> {
    let own = place.state.join("policy.pol");
    let there = [own.as_path(), Path::new(SYSTEM_POLICY)].into_iter().find(|p| p.exists());
    there.map_or_else(|| Err(RunError::NoPolicy(own.clone())), readable)
}

/// The outer run's broker, if this process is in a wrapped tree.
fn outer() -> Option<PathBuf> {
    let value = std::env::var_os(ENV_BROKER)?;
    let at = value.as_bytes().iter().rposition(|b| *b == b':')?;
    let path = PathBuf::from(OsStr::from_bytes(value.as_bytes().get(..at)?));
    // Without a filter the variables are left over from elsewhere: every wrapped process is under the guard.
    let status = fs::read_to_string("/proc/self/status").ok()?;
    status.lines().any(|l| l == "Seccomp:\t2").then_some(path)
}

/// Joins the outer run: same door, same broker, same policy, which a policy of its own may narrow.
fn join(broker: &Path, hello: &Hello, asks: bool) -> Result<Vec<CString>, RunError> {
    if asks {
        let supervisor = broker.with_file_name("supervisor.sock");
        let link = Link::to(&supervisor, PATIENCE)
            .map_err(|source| RunError::Outer { path: supervisor.clone(), source })?;
        let welcome = greet(&link, hello)?.ok_or_else(|| RunError::NoBroker("the outer run ends".into()))?;
        if welcome.narrowed {
            narrow(hello)?;
            link.send(&Say::Narrowed, &[]).map_err(failed("say that the mark is there"))?;
            await_watch(&link)?;
        }
    }
    link::connect(broker).map_err(|source| RunError::Outer { path: broker.to_owned(), source })?;
    Ok(std::env::vars_os().filter_map(|(name, value)| variable(&name, &value)).collect())
}

/// Makes sure who is behind the program's door, and puts it where the program will not look.
fn place_door(welcome: &Welcome) -> Result<RawFd, RunError> {
    use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
    let found = getsockopt(&welcome.door, PeerCredentials).map_err(failed("ask who the broker is"))?.uid();
    if found != welcome.uid {
        return Err(RunError::Impostor { path: welcome.broker.clone(), expected: welcome.uid, found });
    }
    // Programs count on low numbers; where the limit leaves no room above, just below the limit.
    let (soft, _) =
        resource::getrlimit(resource::Resource::RLIMIT_NOFILE).map_err(failed("ask for a limit"))?;
    let highest = c_int::try_from(soft).unwrap_or(c_int::MAX);
    let lowest = LOWEST_FD.min(highest.saturating_sub(8)).max(3);
    fcntl(&welcome.door, FcntlArg::F_DUPFD(lowest)).map_err(failed("place the door's descriptor"))
}

fn variable(name: &OsStr, value: &OsStr) -> Option<CString> {
    let mut whole = name.as_bytes().to_vec();
    whole.push(b'=');
    whole.extend_from_slice(value.as_bytes());
    CString::new(whole).ok()
}

/// The program's environment: ours, with the shim before whatever is preloaded already.
fn environment(welcome: &Welcome, door: RawFd, name: Option<&str>) -> Vec<CString> {
    const PRELOAD: &str = "LD_PRELOAD";
    let mut preload = welcome.shim.clone().into_os_string();
    if let Some(theirs) = std::env::var_os(PRELOAD).filter(|v| !v.is_empty()) {
        preload.push(":");
        preload.push(theirs);
    }
    let mut broker = welcome.broker.clone().into_os_string();
    broker.push(format!(":{}", welcome.uid));
    let mut ours = vec![(PRELOAD, preload), (ENV_BROKER, broker), (ENV_DOOR, door.to_string().into())];
    ours.extend(name.map(|name| (ENV_NAME, name.into())));
    let kept = std::env::vars_os().filter(|(name, _)| !ours.iter().any(|(n, _)| name == n));
    let ours = ours.iter().map(|(n, v)| (OsString::from(n), v.clone()));
    kept.chain(ours).filter_map(|(name, value)| variable(&name, &value)).collect()
}

/// Execs the program, found as execvp(3) finds it.
fn become_program(command: &[OsString], environment: &[CString], out: &mut Out) -> u8 {
    let arguments: Vec<CString> =
        command.iter().filter_map(|a| CString::new(a.clone().into_vec()).ok()).collect();
    let Some(program) = arguments.first() else { return RUN_FAILED };
    let Err(errno) = unistd::execvpe(program, &arguments, environment);
    let name = command.first().map(|c| crate::output::escape(&c.to_string_lossy())).unwrap_or_default();
    out.note(format!("error: cannot run `{name}`: {}", errno.desc()));
    if errno == Errno::ENOENT { NOT_FOUND } else { CANNOT_EXEC }
}
