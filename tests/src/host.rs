//! One host: a namespace, a state folder, a policy, and what runs there.

use std::{
    cell::RefCell,
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::Ipv4Addr,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

use crate::{built, eventually, wait::PATIENCE};

/// A host with a state folder of its own.
#[derive(Debug)]
pub struct Host {
    /// What the test calls it.
    pub name: String,
    /// Its IPv4 address; the IPv6 address ends in the same number.
    pub address: Ipv4Addr,
    namespace: Option<String>,
    user: Option<u32>,
    folder: TempDir,
    has_policy: RefCell<bool>,
}

impl Host {
    pub(crate) fn in_namespace(name: &str, namespace: &str, address: Ipv4Addr) -> Self {
        let folder = tempfile::Builder::new().prefix("pct-").tempdir().unwrap();
        // Daemons that give up root go on reading what is in it.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(folder.path().join("state")).unwrap();
        Self {
            name: name.to_owned(),
            address,
            namespace: Some(namespace.to_owned()),
            user: None,
            folder,
            has_policy: RefCell::new(false),
        }
    }

    /// This machine itself, with its own loopback.
    #[must_use]
    pub fn here() -> Self {
        let mut host = Self::in_namespace("here", "", Ipv4Addr::LOCALHOST);
        host.namespace = None;
        host
    }

    /// The same host as an ordinary user sees it, with a state folder of that user's own.
    #[must_use]
    pub fn as_user(&self, uid: u32) -> Self {
        let mut host = Self::in_namespace(&self.name, "", self.address);
        host.namespace.clone_from(&self.namespace);
        host.user = Some(uid);
        // Cargo's folder may not be theirs to enter.
        for file in ["portcullis", "libportcullis_preload.so"] {
            built::copy(&built::program(file), &host.path(file));
        }
        std::os::unix::fs::chown(host.path("state"), Some(uid), Some(uid)).unwrap();
        host
    }

    /// Whether an ordinary user runs programs here.
    #[must_use]
    pub fn is_ordinary(&self) -> bool {
        self.user.is_some_and(|uid| uid != 0)
    }

    /// Its addresses on the link.
    #[must_use]
    pub fn addresses(&self) -> [std::net::IpAddr; 2] {
        let [.., last] = self.address.octets();
        [self.address.into(), format!("fd77::{last}").parse().unwrap()]
    }

    /// A path in this host's own folder.
    #[must_use]
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The state folder.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.path("state")
    }

    /// Writes a file into the host's folder, readable by all.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// Puts a policy in force: for the next run, or as a new generation if a broker serves already.
    pub fn policy(&self, text: &str) -> &Self {
        // Renamed into place, so that no broker reads half of it.
        let fresh = self.write("policy.new", text);
        fs::rename(fresh, self.path("policy.pol")).unwrap();
        self.has_policy.replace(true);
        self
    }

    /// A command on this host, not wrapped.
    #[must_use]
    pub fn plain<S: AsRef<OsStr>>(&self, words: &[S]) -> Command {
        let mut line: Vec<&OsStr> = Vec::new();
        let net = self.namespace.as_ref().map(|name| format!("--net=/run/netns/{name}"));
        if let Some(net) = &net {
            line.extend([OsStr::new("nsenter"), OsStr::new(net), OsStr::new("--")]);
        }
        let user = self.user.map(|uid| (format!("--reuid={uid}"), format!("--regid={uid}")));
        if let Some((uid, gid)) = &user {
            line.extend(["setpriv", uid, gid, "--clear-groups", "--"].map(OsStr::new));
        }
        line.extend(words.iter().map(AsRef::as_ref));
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).current_dir(self.folder.path()).stdin(Stdio::null());
        for name in ["PORTCULLIS_STATE", "PORTCULLIS_BROKER", "PORTCULLIS_DOOR", "XDG_RUNTIME_DIR"] {
            command.env_remove(name);
        }
        command
    }

    fn binary(&self) -> PathBuf {
        if self.user.is_some() { self.path("portcullis") } else { built::portcullis() }
    }

    /// `portcullis run` of a command, with more options.
    #[must_use]
    pub fn run_with<S: AsRef<OsStr>>(&self, options: &[&str], words: &[S]) -> Command {
        let mut line = vec![self.binary().into_os_string(), "run".into()];
        line.extend(["--state".into(), self.state().into_os_string()]);
        if *self.has_policy.borrow() && !options.contains(&"--policy") {
            line.extend(["--policy".into(), self.path("policy.pol").into_os_string()]);
        }
        line.extend(options.iter().map(Into::into));
        line.push("--".into());
        line.extend(words.iter().map(|w| w.as_ref().to_owned()));
        self.plain(&line)
    }

    /// `portcullis run` of a command.
    #[must_use]
    pub fn run<S: AsRef<OsStr>>(&self, words: &[S]) -> Command {
        self.run_with(&[], words)
    }

    /// What a service manager starts here: a supervisor that stays, under the host's policy.
    #[must_use]
    pub fn supervise(&self, options: &[&str]) -> Command {
        let (program, state, policy) = (self.binary(), self.state(), self.path("policy.pol"));
        let mut line =
            vec![program.as_os_str(), OsStr::new("supervise"), OsStr::new("--state"), state.as_os_str()];
        line.extend([OsStr::new("--policy"), policy.as_os_str()]);
        line.extend(options.iter().map(OsStr::new));
        self.plain(&line)
    }

    /// Another `portcullis` command, told where the state is.
    #[must_use]
    pub fn portcullis(&self, words: &[&str]) -> Finished {
        let mut line = vec![self.binary().into_os_string()];
        line.extend(words.iter().map(Into::into));
        line.extend(["--state".into(), self.state().into_os_string()]);
        Finished::of(self.plain(&line).env("TZ", "UTC"))
    }

    /// Starts a wrapped program and leaves it running.
    pub fn start<S: AsRef<OsStr>>(&self, words: &[S]) -> Running {
        Running::start(self.run(words))
    }

    /// The audit log as it is now.
    ///
    /// # Panics
    /// It is not what `portcullis audit` promises.
    #[must_use]
    pub fn records(&self) -> Vec<Value> {
        // A broker that is late is asked again.
        let asked = || self.portcullis(&["audit", "--format", "json"]);
        let printed = eventually("the log is told", || Some(asked()).filter(|it| it.code() == 0));
        printed.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The first record that `is` takes, once there is one.
    ///
    /// # Panics
    /// There is none in time.
    pub fn record(&self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let found = crate::until(|| self.records().into_iter().find(|r| is(r)));
        found.unwrap_or_else(|| {
            let all: Vec<String> = self.records().iter().map(ToString::to_string).collect();
            panic!("no record of {what} on {}; there are:\n{}", self.name, all.join("\n"))
        })
    }

    /// How a port looks from here, to a program that is not wrapped: `open`, `closed` or `filtered`.
    ///
    /// # Panics
    /// It cannot be told.
    #[must_use]
    pub fn sees(&self, address: &str, port: u16) -> String {
        let program = built::portcullis().display().to_string();
        let words = [&program, "demo", "probe", address, &port.to_string()];
        let said = Finished::of(&mut self.plain(&words)).success();
        serde_json::from_str::<Value>(&said).unwrap()[0]["seen"].as_str().unwrap().to_owned()
    }

    /// Waits until somebody listens on a TCP port of this host.
    pub fn wait_for_port(&self, port: u16) {
        let filter = format!("sport = :{port}");
        eventually(&format!("somebody listens on port {port} of {}", self.name), || {
            let listed = self.plain(&["ss", "-Htln", &filter]).output().ok()?;
            (!listed.stdout.is_empty()).then_some(())
        });
    }

    /// Process id of the broker that serves this host.
    #[must_use]
    pub fn broker(&self) -> i32 {
        let status = self.portcullis(&["status", "--format", "json"]);
        let status: Value = serde_json::from_str(&status.stdout).unwrap();
        i32::try_from(status["pid"].as_i64().unwrap_or_else(|| panic!("no broker: {status}"))).unwrap()
    }

    /// Processes that have this host's state folder on their command line: supervisor, broker and key daemon.
    #[must_use]
    pub fn daemons(&self) -> Vec<(i32, String)> {
        let state = self.state();
        let needle = state.as_os_str().as_encoded_bytes();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|b| *b == 0).collect();
            if words.contains(&needle)
                && words.get(1).is_some_and(|w| [b"supervise".as_slice(), b"broker", b"keyd"].contains(w))
            {
                found.push((pid, String::from_utf8_lossy(words[1]).into_owned()));
            }
        }
        found
    }
}

/// What a command that has ended left.
#[derive(Debug)]
pub struct Finished {
    /// Exit status; 128 and the signal's number for one that was killed.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Runs a command to its end.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn of(command: &mut Command) -> Self {
        Self::from(command.output().unwrap_or_else(|e| panic!("{command:?}: {e}")))
    }

    /// Exit status.
    #[must_use]
    pub const fn code(&self) -> i32 {
        self.status
    }

    /// Standard output of a command that must have succeeded.
    ///
    /// # Panics
    /// It has not.
    pub fn success(self) -> String {
        assert_eq!(self.status, 0, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self.stdout
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit {}\n{}", self.status, self.stdout)?;
        if !self.stderr.is_empty() {
            write!(f, "---- on standard error ----\n{}", self.stderr)?;
        }
        Ok(())
    }
}

impl From<Output> for Finished {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let status = output.status.code().or_else(|| output.status.signal().map(|s| 128 + s)).unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { status, stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

/// A program that runs, in a process group of its own; it is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Running {
    /// Starts it; what it says can be waited for.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(mut command: Command) -> Self {
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let (to, lines) = mpsc::channel();
        let out: Box<dyn Read + Send> = Box::new(child.stdout.take().unwrap());
        let err: Box<dyn Read + Send> = Box::new(child.stderr.take().unwrap());
        for stream in [out, err] {
            let to = to.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    if to.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        Self { child, lines }
    }

    /// Its process id, which is the wrapped program's.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Writes to its standard input.
    pub fn say(&mut self, text: &str) {
        self.child.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// The next line that contains `text`, on standard output or error.
    ///
    /// # Panics
    /// It does not come within a minute.
    pub fn line(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(_) => panic!("`{text}` was not said; instead:\n{}", seen.join("\n")),
            }
        }
    }

    /// What it has said and nobody has taken.
    #[must_use]
    pub fn said(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// As [`Self::said`], with what it had said and nobody had read when it ended.
    #[must_use]
    pub fn rest(&self) -> Vec<String> {
        std::iter::from_fn(|| self.lines.recv_timeout(Duration::from_secs(5)).ok()).collect()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Whether it has ended by itself.
    #[must_use]
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end; the result is its exit status, or 128 and the number of the signal.
    pub fn wait(&mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let status = eventually("the program ends", || self.child.try_wait().unwrap());
        status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _gone = killpg(Pid::from_raw(self.pid()), Signal::SIGKILL);
        let _dead = self.child.wait();
    }
}
