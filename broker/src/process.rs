//! Who a process is, as the kernel and this host's own files say.
//!
//! An executable is a file (device and inode), looked up from the broker's side: a path counts only
//! if it leads to that very file in the broker's own mount namespace, or if the file's content is
//! that of a program which was seen under that path before (a daemon whose package was upgraded).

use std::{
    collections::HashMap,
    fmt::Write as _,
    io::Read,
    os::{fd::BorrowedFd, unix::ffi::OsStrExt},
    time::{Duration, Instant},
};

use nix::unistd::{Gid, Group, Uid, User};
use portcullis_policy::{Fact, ProcessFacts};
use ring::digest;

use crate::{
    escape,
    sys::{
        has_ended,
        proc::{Credentials, FileId, ProcDir, file_id, unit_of, without_deleted},
    },
};

/// Longest command line kept, in bytes.
const COMMAND_LINE: usize = 1024;
/// Largest executable that is hashed, in bytes.
const LARGEST: u64 = 1 << 28;
/// Most ancestors named.
const ANCESTORS: usize = 24;
/// Entries after which a cache starts anew.
const CACHED: usize = 8192;
/// How long a user's name is remembered.
const NAMES: Duration = Duration::from_secs(60);

/// A process that ever was: ids are used again, but not with the same start.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ProcessKey {
    /// Process id.
    pub pid: i32,
    /// Start in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start: u64,
}

/// One step up.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ancestor {
    /// Which process.
    pub key: ProcessKey,
    /// What it executes, if known.
    pub exe: Option<String>,
}

/// Which runs' own policies a process is under, beside the one for all.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Under {
    /// These, by the broker's numbers.
    Layers(Vec<u8>),
    /// That is not known, so it may be any.
    Unknown,
    /// One of a run that nobody knows any more.
    Lost,
}

impl Default for Under {
    fn default() -> Self {
        Self::Layers(Vec::new())
    }
}

/// What is known of a process.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Context {
    /// Which process.
    pub key: ProcessKey,
    /// What a policy may ask of it. `exe` is unknown if this host cannot vouch for a path.
    pub facts: ProcessFacts,
    /// Whose policies hold for it.
    pub under: Under,
    /// From the parent up.
    pub ancestors: Vec<Ancestor>,
    /// The executable's file, to notice execve(2).
    pub file: Option<FileId>,
    /// To notice setuid(2) and setgroups(2).
    pub credentials: Credentials,
    /// The part of an audit record that names it, see [`crate::audit`].
    pub json: String,
}

impl Context {
    /// Path of the executable, if this host vouches for it.
    #[must_use]
    pub fn exe(&self) -> Option<&str> {
        match &self.facts.exe {
            Fact::Known(path) => Some(path),
            Fact::Unknown => None,
        }
    }

    /// SHA-256 of the executable in hex.
    #[must_use]
    pub fn sha256(&self) -> Option<String> {
        match &self.facts.sha256 {
            Fact::Known(hash) => Some(hex(hash)),
            Fact::Unknown => None,
        }
    }

    /// It as the policy language would say: `process{exe="/usr/bin/nc", user="root"}`.
    #[must_use]
    pub fn principal(&self) -> String {
        let exe = self.exe().map_or_else(|| "?".to_owned(), escape::sentence);
        format!("process{{exe=\"{exe}\", user=\"{}\"}}", escape::sentence(&self.facts.user))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads contexts, and remembers what costs time.
#[derive(Debug, Default)]
pub struct Inspector {
    hashes: HashMap<FileId, [u8; 32]>,
    /// Executables seen under their own path, by content: hash and inode to path.
    verified: HashMap<([u8; 32], u64), String>,
    users: HashMap<u32, (Instant, String)>,
    groups: HashMap<u32, (Instant, String)>,
}

impl Inspector {
    /// Whether `context` is still true of the process, as far as may change: its file and its
    /// credentials.
    #[must_use]
    pub fn is_current(context: &Context, at: &ProcDir) -> bool {
        Self::is_current_file(context, at) && at.credentials().is_ok_and(|c| c == context.credentials)
    }

    /// The first half of [`Self::is_current`], for one whose credentials are known otherwise.
    #[must_use]
    pub fn is_current_file(context: &Context, at: &ProcDir) -> bool {
        at.executable_id().ok() == context.file
    }

    /// Reads the context of the process behind `pidfd`, whose folder `at` is. `None`: it has ended.
    #[must_use]
    pub fn read(&mut self, pid: i32, pidfd: BorrowedFd<'_>, at: &ProcDir) -> Option<Context> {
        // A process that calls execve(2) or setuid(2) meanwhile is read again, so that the parts fit.
        for turn in 0..8 {
            let before = self.read_once(pid, at)?;
            if has_ended(pidfd) {
                return None;
            }
            // In the midst of execve(2) the file is the new one already, and there are no arguments yet.
            if turn < 4 && before.facts.cmdline.is_empty() {
                std::thread::yield_now();
                continue;
            }
            if Self::is_current(&before, at) {
                return Some(before);
            }
        }
        None
    }

    fn read_once(&mut self, pid: i32, at: &ProcDir) -> Option<Context> {
        let birth = at.birth().ok()?;
        let key = ProcessKey { pid, start: birth.start };
        let credentials = at.credentials().ok()?;
        let (file, exe, sha256) = self.executable(at, true);
        let ancestors = self.ancestors(birth.parent);
        let facts = ProcessFacts {
            exe: exe.map_or(Fact::Unknown, Fact::Known),
            sha256: sha256.map_or(Fact::Unknown, Fact::Known),
            uid: credentials.uid,
            user: self.user(credentials.uid),
            groups: credentials.groups.iter().map(|g| self.group(*g)).collect(),
            unit: at.cgroup().ok().flatten().map(|c| unit_of(&c).to_owned()),
            cmdline: at
                .command_line(4 * COMMAND_LINE as u64)
                .map(|raw| escape::command_line(&raw, COMMAND_LINE))
                .unwrap_or_default(),
            ancestors: ancestors.iter().map(|a| a.exe.clone().map_or(Fact::Unknown, Fact::Known)).collect(),
        };
        let json = fragment(key, &facts);
        Some(Context { key, facts, under: Under::default(), ancestors, file, credentials, json })
    }

    /// Parents of a process, from `pid` up.
    pub fn ancestors(&mut self, mut pid: i32) -> Vec<Ancestor> {
        let mut all = Vec::new();
        while pid > 0 && all.len() < ANCESTORS {
            let Ok(at) = ProcDir::open(pid) else { break };
            let Ok(birth) = at.birth() else { break };
            let (_, exe, _) = self.executable(&at, false);
            all.push(Ancestor { key: ProcessKey { pid, start: birth.start }, exe });
            pid = birth.parent;
        }
        all
    }

    /// File, path and hash of an executable.
    fn executable(
        &mut self,
        at: &ProcDir,
        hashed: bool,
    ) -> (Option<FileId>, Option<String>, Option<[u8; 32]>) {
        let Ok(executable) = at.executable() else { return (None, None, None) };
        let id = executable.id;
        if executable.foreign {
            return (Some(id), None, None);
        }
        let (path, deleted) = without_deleted(&executable.link);
        // The link first as it is: a file may really be called "x (deleted)".
        let leads_there = |path| file_id(path).is_ok_and(|f| (f.dev, f.ino) == (id.dev, id.ino));
        let found = [&executable.link, &path].into_iter().find(|p| leads_there(p));
        let name = found.map(|p| escape::text(p.as_bytes()));
        let unnamed_but_once_seen = name.is_none() && deleted;
        let sha256 = if hashed || unnamed_but_once_seen { self.hash(at, id) } else { None };
        let name = match (name, sha256) {
            (Some(name), Some(hash)) => {
                remember(&mut self.verified, (hash, id.ino), name.clone());
                Some(name)
            }
            (None, Some(hash)) if deleted => {
                let told = escape::text(path.as_bytes());
                self.verified.get(&(hash, id.ino)).filter(|seen| **seen == told).cloned()
            }
            (name, _) => name,
        };
        (Some(id), name, sha256)
    }

    fn hash(&mut self, at: &ProcDir, id: FileId) -> Option<[u8; 32]> {
        if let Some(known) = self.hashes.get(&id) {
            return Some(*known);
        }
        let mut file = at.open_executable().ok()?;
        let same = |file: &std::fs::File| nix::sys::stat::fstat(file).is_ok_and(|s| FileId::from(&s) == id);
        if !same(&file) || u64::try_from(id.size).ok()? > LARGEST {
            return None;
        }
        let mut sum = digest::Context::new(&digest::SHA256);
        let mut block = vec![0; 256 * 1024];
        loop {
            match file.read(&mut block) {
                Ok(0) => break,
                Ok(got) => sum.update(block.get(..got)?),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
        if !same(&file) {
            return None;
        }
        let hash: [u8; 32] = sum.finish().as_ref().try_into().ok()?;
        remember(&mut self.hashes, id, hash);
        Some(hash)
    }

    /// A user's name, or the number as text.
    pub fn user(&mut self, uid: u32) -> String {
        named(&mut self.users, uid, || Some(User::from_uid(Uid::from_raw(uid)).ok()??.name))
    }

    fn group(&mut self, gid: u32) -> String {
        named(&mut self.groups, gid, || Some(Group::from_gid(Gid::from_raw(gid)).ok()??.name))
    }
}

fn named(
    cache: &mut HashMap<u32, (Instant, String)>,
    id: u32,
    look_up: impl FnOnce() -> Option<String>,
) -> String {
    if let Some((since, name)) = cache.get(&id)
        && since.elapsed() < NAMES
    {
        return name.clone();
    }
    let name = look_up().unwrap_or_else(|| id.to_string());
    remember(cache, id, (Instant::now(), name.clone()));
    name
}

fn remember<K: Eq + std::hash::Hash, V>(cache: &mut HashMap<K, V>, key: K, value: V) {
    if cache.len() >= CACHED {
        cache.clear();
    }
    cache.insert(key, value);
}

/// `"pid":…,"start":…,"exe":…,"sha256":…,"uid":…,"user":…,"unit":…`
fn fragment(key: ProcessKey, of: &ProcessFacts) -> String {
    let mut out = String::with_capacity(256);
    let optional = |out: &mut String, name: &str, value: Option<&str>| {
        let _ = write!(out, ",\"{name}\":");
        match value {
            Some(value) => escape::json_string(out, value),
            None => out.push_str("null"),
        }
    };
    let _ = write!(out, "\"pid\":{},\"start\":{}", key.pid, key.start);
    let exe = if let Fact::Known(path) = &of.exe { Some(path.as_str()) } else { None };
    optional(&mut out, "exe", exe);
    let hash = if let Fact::Known(hash) = &of.sha256 { Some(hex(hash)) } else { None };
    optional(&mut out, "sha256", hash.as_deref());
    let _ = write!(out, ",\"uid\":{}", of.uid);
    optional(&mut out, "user", Some(&of.user));
    optional(&mut out, "unit", of.unit.as_deref());
    out
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Write as _,
        process::{Child, Command, Stdio},
    };

    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::pidfd_open;

    /// A process that is what it was started for: `spawn` returns in the midst of its execve(2).
    fn sleeper(program: &std::path::Path) -> Child {
        let child = Command::new(program).arg("60").spawn().unwrap();
        until_it_runs(&child, program.file_name().unwrap().to_str().unwrap());
        child
    }

    fn until_it_runs(child: &Child, name: &str) {
        let line = || fs::read_to_string(format!("/proc/{}/cmdline", child.id())).unwrap();
        while !line().split('\0').next().unwrap().ends_with(name) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// By another process: a child of another test's thread would inherit what is open for writing here, and what is
    /// cannot be run.
    fn copy(program: &std::path::Path) {
        assert!(Command::new("cp").arg("/bin/sleep").arg(program).status().unwrap().success());
    }

    fn look(inspector: &mut Inspector, child: &Child) -> Context {
        let pid = child.id().cast_signed();
        let pidfd = pidfd_open(pid).unwrap();
        inspector.read(pid, pidfd.as_fd(), &ProcDir::open(pid).unwrap()).unwrap()
    }

    #[test]
    fn a_process_is_named_by_its_file_user_and_parents() {
        let mut child = sleeper("/bin/sleep".as_ref());
        let seen = look(&mut Inspector::default(), &child);
        assert_eq!(seen.exe(), fs::canonicalize("/bin/sleep").unwrap().to_str());
        assert_eq!(seen.sha256().unwrap().len(), 64);
        assert_eq!(seen.facts.cmdline, "/bin/sleep 60");
        assert_eq!(seen.ancestors[0].key.pid, std::process::id().cast_signed());
        assert!(seen.json.starts_with("\"pid\":"));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn an_upgraded_program_keeps_its_name_and_is_told_apart_by_hash() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("daemon");
        copy(&program);
        let mut inspector = Inspector::default();
        let mut old = sleeper(&program);
        let before = look(&mut inspector, &old);
        fs::rename(&program, folder.path().join("old")).unwrap();
        fs::remove_file(folder.path().join("old")).unwrap();
        copy(&program);
        let one_more = "echo >>\"$0\"";
        assert!(Command::new("sh").args(["-c", one_more]).arg(&program).status().unwrap().success());
        let after = look(&mut inspector, &old);
        // Renamed before it was unlinked, so the kernel now tells another path.
        assert_eq!((after.exe(), after.sha256()), (None, before.sha256()));
        let mut new = sleeper(&program);
        let upgraded = look(&mut inspector, &new);
        assert_eq!(upgraded.exe(), before.exe());
        assert_ne!(upgraded.sha256(), before.sha256());
        fs::remove_file(&program).unwrap();
        let unlinked = look(&mut inspector, &new);
        assert_eq!((unlinked.exe(), unlinked.sha256()), (upgraded.exe(), upgraded.sha256()));
        assert_eq!(look(&mut Inspector::default(), &new).exe(), None, "never verified");
        for child in [&mut old, &mut new] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn an_exec_is_noticed() {
        let mut shell = Command::new("/bin/sh");
        let mut child = shell.args(["-c", "read x; exec sleep 60"]).stdin(Stdio::piped()).spawn().unwrap();
        until_it_runs(&child, "/bin/sh");
        let at = ProcDir::open(child.id().cast_signed()).unwrap();
        let mut inspector = Inspector::default();
        let before = look(&mut inspector, &child);
        assert!(Inspector::is_current(&before, &at));
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        until_it_runs(&child, "sleep");
        assert!(!Inspector::is_current(&before, &at));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
