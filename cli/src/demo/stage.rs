//! Where the demo plays: three hosts on one link, and what runs there. All of it is gone when it is dropped.

use std::{
    fs, io,
    io::Write,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    audit::{Entry, Log, Record},
    control::{self, AskError},
    place::Place,
    sys,
};

/// Why the demo stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DemoError {
    /// Namespaces need root.
    #[error("the demo makes network namespaces, so it needs root")]
    NotRoot,
    /// A program is not installed.
    #[error("`{0}` is not installed; as root: apt-get install --no-install-recommends iproute2 vsftpd lftp")]
    Missing(&'static str),
    /// A program cannot be started.
    #[error("cannot run `{program}`")]
    Start {
        /// Which.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program failed.
    #[error("`{program}` failed: {said}")]
    Program {
        /// Which.
        program: String,
        /// What it wrote to standard error.
        said: String,
    },
    /// Something that the story waits for did not happen.
    #[error("it did not happen in time that {0}")]
    Late(String),
    /// The log could not be read.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// A file could not be written.
    #[error("cannot write `{}`", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(10);
/// First part of the namespaces' names; the process id follows.
const PREFIX: &str = "portcullis-demo";

/// A link with hosts.
pub struct Stage {
    /// The link's own namespace.
    pub switch: String,
    hosts: Vec<String>,
    folder: PathBuf,
}

/// One host.
pub struct Host {
    /// Its address.
    pub address: Ipv4Addr,
    namespace: String,
    folder: PathBuf,
}

impl Stage {
    /// Sets up hosts of these names: 10.77.0.1, 10.77.0.2 and so on.
    ///
    /// # Errors
    /// [`DemoError`].
    pub fn set(names: &[&str]) -> Result<(Self, Vec<Host>), DemoError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(DemoError::NotRoot);
        }
        sweep();
        let id = format!("{PREFIX}-{}", std::process::id());
        let folder = std::env::temp_dir().join(&id);
        let switch = format!("{id}-switch");
        let mut stage = Self { switch: switch.clone(), hosts: Vec::new(), folder };
        ip(None, &format!("netns add {switch}\n"))?;
        ip(Some(&switch), "link add name sw0 type bridge\nlink set sw0 up\n")?;
        let mut hosts = Vec::new();
        for (n, name) in (1u8..).zip(names) {
            let namespace = format!("{id}-{name}");
            ip(None, &format!("netns add {namespace}\n"))?;
            stage.hosts.push(namespace.clone());
            let wire = format!("link add p{n} type veth peer name eth0 netns {namespace}\n");
            ip(Some(&switch), &format!("{wire}link set p{n} master sw0 up\n"))?;
            let address = Ipv4Addr::new(10, 77, 0, n);
            ip(
                Some(&namespace),
                &format!("link set lo up\naddr add {address}/24 dev eth0\nlink set eth0 up\n"),
            )?;
            let host = Host { address, namespace, folder: stage.folder.join(name) };
            let state = host.state();
            fs::create_dir_all(&state).map_err(|source| DemoError::File { path: state, source })?;
            hosts.push(host);
        }
        Ok((stage, hosts))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.hosts.iter().chain([&self.switch]).for_each(|name| remove(name));
        let _absent = fs::remove_dir_all(&self.folder);
    }
}

/// Runs commands of ip(8), in a namespace.
fn ip(namespace: Option<&str>, commands: &str) -> Result<(), DemoError> {
    let mut command = Command::new("ip");
    if let Some(name) = namespace {
        command.args(["-n", name]);
    }
    let missing = |_| DemoError::Missing("ip");
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(commands.as_bytes()).map_err(missing)?;
    }
    let done = child.wait_with_output().map_err(missing)?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    Err(DemoError::Program { program: "ip".into(), said })
}

/// Ends what runs in a namespace, gently and then not, and removes it.
fn remove(namespace: &str) {
    let begun = Instant::now();
    loop {
        let listed = Command::new("ip").args(["netns", "pids", namespace]).stderr(Stdio::null()).output();
        let text = listed.map(|l| String::from_utf8_lossy(&l.stdout).into_owned()).unwrap_or_default();
        let pids: Vec<i32> = text.lines().filter_map(|l| l.trim().parse().ok()).collect();
        if pids.is_empty() || begun.elapsed() > PATIENCE {
            break;
        }
        let signal =
            if begun.elapsed() < Duration::from_millis(500) { Signal::SIGTERM } else { Signal::SIGKILL };
        for pid in pids {
            let _gone = kill(Pid::from_raw(pid), signal);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _absent = Command::new("ip").args(["netns", "delete", namespace]).stderr(Stdio::null()).status();
}

/// Removes what a demo left that was killed.
fn sweep() {
    let listed = Command::new("ip").args(["netns", "list"]).output();
    let text = listed.map(|l| String::from_utf8_lossy(&l.stdout).into_owned()).unwrap_or_default();
    for name in text.lines().filter_map(|l| l.split_whitespace().next()) {
        let rest = name.strip_prefix(PREFIX).and_then(|r| r.strip_prefix('-'));
        let pid = rest.and_then(|r| r.split('-').next()).and_then(|p| p.parse().ok());
        if let Some(pid) = pid
            && kill(Pid::from_raw(pid), None).is_err()
        {
            remove(name);
            let _absent = fs::remove_dir_all(std::env::temp_dir().join(format!("{PREFIX}-{pid}")));
        }
    }
}

/// A command in a namespace.
pub fn inside(namespace: &str, program: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{namespace}")).arg("--").arg(program);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

impl Host {
    /// Its state folder.
    pub fn state(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// A path in its own folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Writes a file into its folder.
    ///
    /// # Errors
    /// [`DemoError::File`].
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Result<PathBuf, DemoError> {
        let path = self.folder.join(name);
        let parent = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(parent)
            .and_then(|()| fs::write(&path, content))
            .map_err(|source| DemoError::File { path: path.clone(), source })?;
        Ok(path)
    }

    /// A command on this host.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = inside(&self.namespace, program);
        command.current_dir(&self.folder);
        command
    }

    /// A wrapped command on this host, under its `policy.pol`.
    ///
    /// # Errors
    /// [`DemoError::Start`].
    pub fn wrapped(&self, words: &[&str]) -> Result<Command, DemoError> {
        let mut command = self.command(&own_path()?);
        command.arg("run").arg("--state").arg(self.state()).arg("--policy").arg(self.path("policy.pol"));
        command.arg("--").args(words);
        Ok(command)
    }

    /// A `portcullis` command on this host, to its end.
    ///
    /// # Errors
    /// [`DemoError`].
    pub fn portcullis(&self, words: &[&str]) -> Result<String, DemoError> {
        let mut command = self.command(&own_path()?);
        command.args(words).stdout(Stdio::piped());
        finish(start(command, "portcullis")?, "portcullis")
    }

    /// Records that are in its log now.
    ///
    /// # Errors
    /// [`DemoError::Ask`].
    pub fn records(&self) -> Result<Vec<Record>, DemoError> {
        let place = Place::find(Some(&self.state())).map_err(AskError::from)?;
        control::ask(&place, &portcullis_broker::control::Request::Flush)?;
        let mut log = Log::open(&place)?;
        let mut records = Vec::new();
        while let Some(entry) = log.next()? {
            if let Entry::Record(record) = entry {
                records.push(record);
            }
        }
        Ok(records)
    }

    /// The last record that `is` takes, once there is one after number `after`.
    ///
    /// # Errors
    /// [`DemoError::Late`].
    pub fn record(&self, what: &str, after: u64, is: impl Fn(&Record) -> bool) -> Result<Record, DemoError> {
        wait_for(what, || {
            let records = self.records().ok()?;
            records.into_iter().rfind(|r| r.seq().is_some_and(|n| n > after) && is(r))
        })
    }

    /// Number of its last record.
    ///
    /// # Errors
    /// [`DemoError::Ask`].
    pub fn last(&self) -> Result<u64, DemoError> {
        Ok(self.records()?.iter().filter_map(Record::seq).max().unwrap_or(0))
    }
}

/// This very program.
///
/// # Errors
/// [`DemoError::Start`].
pub fn own_path() -> Result<PathBuf, DemoError> {
    std::env::current_exe().map_err(|source| DemoError::Start { program: "portcullis".into(), source })
}

/// Waits for an answer, and for Ctrl-C.
///
/// # Errors
/// [`DemoError::Late`], [`DemoError::Interrupted`].
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> Result<T, DemoError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if sys::was_interrupted() {
            return Err(DemoError::Interrupted);
        }
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            return Err(DemoError::Late(what.to_owned()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Starts a program.
///
/// # Errors
/// [`DemoError::Start`].
pub fn start(mut command: Command, program: &str) -> Result<Child, DemoError> {
    command.spawn().map_err(|source| DemoError::Start { program: program.to_owned(), source })
}

/// Waits for a program's success; the result is its standard output, if that was wanted.
///
/// # Errors
/// [`DemoError::Program`].
pub fn finish(mut child: Child, program: &str) -> Result<String, DemoError> {
    wait_for(&format!("{program} ends"), || child.try_wait().ok().flatten())?;
    let done = child
        .wait_with_output()
        .map_err(|source| DemoError::Start { program: program.to_owned(), source })?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    Err(DemoError::Program { program: program.to_owned(), said: format!("{}, {said}", done.status) })
}
