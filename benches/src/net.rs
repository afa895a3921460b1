//! A far host: a network namespace at the other end of a veth pair, and this end's state folder.

use std::{
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// A namespace that answers on every address of 10.77.0.0/16, and goes when this is dropped.
#[derive(Debug)]
pub struct Far {
    name: String,
    servers: Vec<Child>,
    /// Folder for state and policy.
    pub folder: PathBuf,
}

fn ip(words: &str) -> io::Result<()> {
    let done = Command::new("ip").args(words.split(' ')).stderr(Stdio::null()).status()?;
    if done.success() { Ok(()) } else { Err(io::Error::other(format!("`ip {words}` failed; as root?"))) }
}

impl Far {
    /// Address of this end.
    pub const NEAR: Ipv4Addr = Ipv4Addr::new(10, 76, 0, 1);

    /// Makes it.
    ///
    /// # Errors
    /// What ip(8) says: it takes root.
    pub fn new(bench: &str) -> io::Result<Self> {
        let name = format!("pcb-{bench}-{}", std::process::id());
        let folder = std::env::temp_dir().join(&name);
        fs::create_dir_all(&folder)?;
        let far = Self { name: name.clone(), servers: Vec::new(), folder };
        let (near, end) = (format!("pcn{}", std::process::id()), format!("pcf{}", std::process::id()));
        ip(&format!("netns add {name}"))?;
        ip(&format!("link add {near} type veth peer name {end} netns {name}"))?;
        ip(&format!("addr add 10.76.0.1/24 dev {near}"))?;
        ip(&format!("link set {near} up"))?;
        ip(&format!("-n {name} addr add 10.76.0.2/24 dev {end}"))?;
        ip(&format!("-n {name} link set {end} up"))?;
        ip(&format!("-n {name} link set lo up"))?;
        ip(&format!("-n {name} route add local 10.77.0.0/16 dev lo"))?;
        ip(&format!("route add 10.77.0.0/16 via 10.76.0.2 dev {near}"))?;
        Ok(far)
    }

    /// A command at the far end.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        // ip-netns(8) would mount /sys anew, without cgroups.
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name)).arg("--").arg(program);
        command
    }

    /// The same command, at the far end.
    #[must_use]
    pub fn carry(&self, command: &Command) -> Command {
        let mut carried = self.command(Path::new(command.get_program()));
        carried.args(command.get_args());
        carried
    }

    /// Starts a server at the far end; it is killed with the rest.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn serve(&mut self, mut command: Command) -> io::Result<()> {
        self.servers.push(command.spawn()?);
        Ok(())
    }

    /// A policy of `rules` rules, one per /24 of 10.77.0.0/16 and then beyond; all of them permit.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn policy(&self, rules: usize) -> io::Result<PathBuf> {
        let mut text = String::new();
        for n in 0..rules {
            let (high, low) = (77 + n / 256, n % 256);
            text.push_str(&format!("allow *(*, IPv4{{10.{high}.{low}.0/24}});\n"));
        }
        text.push_str("allow *(IPv4{10.77.0.0/16, 10.76.0.0/24}, process{exe=\"/**\"});\n");
        let path = self.folder.join("bench.pol");
        fs::write(&path, text)?;
        Ok(path)
    }

    /// `portcullis run`, with this folder's state and the given policy.
    #[must_use]
    pub fn run(&self, policy: &Path) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let state = self.folder.join("state");
        let words = ["run", "--state", &text(&state), "--policy", &text(policy), "--"].map(str::to_owned);
        let mut line = vec![text(&beside("portcullis"))];
        line.extend(words);
        line
    }

    /// How many audit records have all of `needles` in them.
    #[must_use]
    pub fn records(&self, needles: &[&str]) -> usize {
        records(&self.folder.join("state"), needles)
    }
}

/// How many audit records of a state folder have all of `needles` in them.
#[must_use]
pub fn records(state: &Path, needles: &[&str]) -> usize {
    let Ok(files) = fs::read_dir(state.join("audit")) else { return 0 };
    let texts = files.filter_map(|file| fs::read_to_string(file.ok()?.path()).ok());
    texts.map(|text| text.lines().filter(|line| needles.iter().all(|n| line.contains(n))).count()).sum()
}

/// A program that was built together with this one.
#[must_use]
pub fn beside(name: &str) -> PathBuf {
    std::env::current_exe().map(|me| me.with_file_name(name)).unwrap_or_else(|_| name.into())
}

impl Drop for Far {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _dead = server.kill();
            let _gone = server.wait();
        }
        let _gone = ip(&format!("netns del {}", self.name));
        let _gone = fs::remove_dir_all(&self.folder);
    }
}
