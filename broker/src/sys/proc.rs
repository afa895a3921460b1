//! What `/proc/PID` says, through one descriptor of that folder, so that a number used again for
//! another process is never mistaken for the first (reads fail with `ESRCH` instead).

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
};

use nix::{
    dir::Dir,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::{
        stat::{FileStat, Mode, fstat, fstatat},
        statfs::{FsType, fstatfs},
    },
};
use procfs::FromRead;

/// `FUSE_SUPER_MAGIC` (statfs(2)).
const FUSE: FsType = FsType(0x6573_5546);
/// What is read of a file at first, in bytes.
const BLOCK: usize = 4096;
/// Most descriptors of one process that are looked through.
const MOST_DESCRIPTORS: usize = 1 << 16;

/// `/proc/PID` of one process, which stays that process.
#[derive(Debug)]
pub struct ProcDir(OwnedFd);

/// Identity of a file's content as far as the file system tells.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct FileId {
    /// Device.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
    /// Length in bytes.
    pub size: i64,
    /// Modification time, seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Change time, seconds and nanoseconds.
    pub ctime: (i64, i64),
}

impl From<&FileStat> for FileId {
    fn from(s: &FileStat) -> Self {
        Self {
            dev: s.st_dev,
            ino: s.st_ino,
            size: s.st_size,
            mtime: (s.st_mtime, s.st_mtime_nsec),
            ctime: (s.st_ctime, s.st_ctime_nsec),
        }
    }
}

/// Parent and start time of a process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Birth {
    /// Parent's process id.
    pub parent: i32,
    /// Start in clock ticks since boot.
    pub start: u64,
}

/// Credentials of a process (its main thread).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Credentials {
    /// Real user id.
    pub real: u32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id, then the supplementary ones.
    pub groups: Vec<u32>,
}

/// An executable, held open by `O_PATH`.
#[derive(Debug)]
pub struct Executable {
    /// Which file.
    pub id: FileId,
    /// On a file system that a user may have mounted (FUSE).
    pub foreign: bool,
    /// Path as the kernel tells it to this process.
    pub link: OsString,
}

impl ProcDir {
    /// Opens the folder of `pid`. The caller checks afterwards that the process it means is still
    /// alive: then the folder is that process's.
    ///
    /// # Errors
    /// `ENOENT` if there is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self(nix::fcntl::open(format!("/proc/{pid}").as_str(), flags, Mode::empty())?))
    }

    fn file(&self, name: &str) -> io::Result<File> {
        Ok(File::from(openat(&self.0, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?))
    }

    fn read(&self, name: &str, most: u64) -> io::Result<Vec<u8>> {
        let mut file = self.file(name)?;
        let room = usize::try_from(most).unwrap_or(usize::MAX);
        let mut into = vec![0; room.min(BLOCK)];
        let mut got = 0;
        // These files come whole, in one read, if there is room for more.
        loop {
            got += file.read(into.get_mut(got..).unwrap_or_default())?;
            if got < into.len() || got >= room {
                into.truncate(got);
                return Ok(into);
            }
            into.resize((2 * got).min(room), 0);
        }
    }

    /// Parent and start time.
    ///
    /// # Errors
    /// The process is gone.
    pub fn birth(&self) -> io::Result<Birth> {
        let stat = procfs::process::Stat::from_read(self.file("stat")?).map_err(io::Error::other)?;
        Ok(Birth { parent: stat.ppid, start: stat.starttime })
    }

    /// Whether others of its threads go on where the first one has begun to end. `None`: the process is gone.
    #[must_use]
    pub fn has_lost_its_first_thread(&self) -> Option<bool> {
        const EXITING: u32 = 4; // linux/sched.h, PF_EXITING
        let stat = procfs::process::Stat::from_read(self.file("stat").ok()?).ok()?;
        Some(stat.flags & EXITING != 0 && stat.num_threads > 1)
    }

    /// Effective user and groups.
    ///
    /// # Errors
    /// The process is gone.
    pub fn credentials(&self) -> io::Result<Credentials> {
        let text = self.read("status", 1 << 16)?;
        parse_credentials(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    /// Which file it executes, without its path: cheap enough to ask at each decision.
    ///
    /// # Errors
    /// Gone, a kernel thread, or not to be looked at without more rights.
    pub fn executable_id(&self) -> io::Result<FileId> {
        Ok(FileId::from(&fstatat(&self.0, "exe", AtFlags::empty())?))
    }

    /// Its memory, for reading: that of the image it has now, and of no other.
    ///
    /// # Errors
    /// Gone, or not to be looked at without more rights.
    pub fn memory(&self) -> io::Result<File> {
        self.file("mem")
    }

    /// Effective user, of its first thread.
    ///
    /// # Errors
    /// The process is gone.
    pub fn owner(&self) -> io::Result<u32> {
        Ok(fstat(&self.0)?.st_uid)
    }

    /// Whether a thread is one of its.
    #[must_use]
    pub fn has_thread(&self, tid: i32) -> bool {
        fstatat(&self.0, format!("task/{tid}").as_str(), AtFlags::empty()).is_ok()
    }

    /// What it executes.
    ///
    /// # Errors
    /// As [`Self::executable_id`].
    pub fn executable(&self) -> io::Result<Executable> {
        let held = openat(&self.0, "exe", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let id = FileId::from(&fstat(&held)?);
        let foreign = fstatfs(&held)?.filesystem_type() == FUSE;
        let link = readlinkat(&self.0, "exe")?;
        if self.executable_id()? != id {
            return Err(io::ErrorKind::Interrupted.into()); // it has just called execve(2)
        }
        Ok(Executable { id, foreign, link })
    }

    /// Opens what it executes, for reading.
    ///
    /// # Errors
    /// As [`Self::executable_id`].
    pub fn open_executable(&self) -> io::Result<File> {
        self.file("exe")
    }

    /// Control group path in the unified hierarchy, else in systemd's own.
    ///
    /// # Errors
    /// The process is gone.
    pub fn cgroup(&self) -> io::Result<Option<String>> {
        Ok(parse_cgroup(&String::from_utf8_lossy(&self.read("cgroup", 1 << 16)?)))
    }

    /// The first `most` bytes of the environment that its image was given, variables separated by NUL.
    ///
    /// # Errors
    /// Gone, or not to be looked at without more rights.
    pub fn environment(&self, most: u64) -> io::Result<Vec<u8>> {
        self.read("environ", most)
    }

    /// What the kernel told the image when it began (getauxval(3)).
    ///
    /// # Errors
    /// As [`Self::memory`].
    pub fn auxiliary_vector(&self) -> io::Result<Vec<u8>> {
        self.read("auxv", BLOCK as u64)
    }

    /// The first `most` bytes of the command line, arguments separated by NUL.
    ///
    /// # Errors
    /// The process is gone.
    pub fn command_line(&self, most: u64) -> io::Result<Vec<u8>> {
        self.read("cmdline", most)
    }

    /// The sockets among as many descriptors as one looks at in passing: descriptor and inode.
    ///
    /// # Errors
    /// Gone, or not to be looked at without more rights.
    pub fn sockets(&self) -> io::Result<Vec<(i32, u64)>> {
        self.sockets_among(MOST_DESCRIPTORS)
    }

    /// All its sockets, however many.
    ///
    /// # Errors
    /// As [`Self::sockets`].
    pub fn all_sockets(&self) -> io::Result<Vec<(i32, u64)>> {
        self.sockets_among(usize::MAX)
    }

    fn sockets_among(&self, most: usize) -> io::Result<Vec<(i32, u64)>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut folder = Dir::openat(&self.0, "fd", flags, Mode::empty())?;
        let at = openat(&self.0, "fd", flags, Mode::empty())?;
        let mut found = Vec::new();
        for entry in folder.iter().flatten().take(most) {
            let name = entry.file_name();
            let Some(number) = name.to_str().ok().and_then(|n| n.parse().ok()) else { continue };
            if let Ok(link) = readlinkat(at.as_fd(), name)
                && let Some(inode) = socket_inode(&link)
            {
                found.push((number, inode));
            }
        }
        Ok(found)
    }

    /// Whether its descriptor `number` is the socket with this inode.
    #[must_use]
    pub fn holds(&self, number: i32, inode: u64) -> bool {
        readlinkat(&self.0, format!("fd/{number}").as_str())
            .is_ok_and(|link| socket_inode(&link) == Some(inode))
    }
}

/// Which file a path names in this process's own view.
///
/// # Errors
/// As stat(2).
pub fn file_id(path: &OsStr) -> io::Result<FileId> {
    Ok(FileId::from(&nix::sys::stat::stat(path)?))
}

/// Path without the mark that the kernel puts on unlinked files; whether it was there.
#[must_use]
pub fn without_deleted(link: &OsStr) -> (OsString, bool) {
    match link.as_bytes().strip_suffix(b" (deleted)") {
        Some(path) => (OsString::from_vec(path.to_vec()), true),
        None => (link.to_owned(), false),
    }
}

fn socket_inode(link: &OsStr) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn parse_credentials(status: &[u8]) -> Option<Credentials> {
    let (mut real, mut uid) = (None, None);
    let mut groups = Vec::new();
    for line in status.split(|b| *b == b'\n') {
        let Ok(line) = std::str::from_utf8(line) else { continue };
        if let Some(ids) = line.strip_prefix("Uid:") {
            let mut ids = ids.split_ascii_whitespace(); // real, effective, saved, file system
            (real, uid) = (ids.next()?.parse().ok(), ids.next()?.parse().ok());
        } else if let Some(ids) = line.strip_prefix("Gid:") {
            groups.push(ids.split_ascii_whitespace().nth(1)?.parse().ok()?);
        } else if let Some(ids) = line.strip_prefix("Groups:") {
            groups.extend(ids.split_ascii_whitespace().filter_map(|g| g.parse::<u32>().ok()));
            break;
        }
    }
    Some(Credentials { real: real?, uid: uid?, groups })
}

fn parse_cgroup(text: &str) -> Option<String> {
    let unified = text.lines().find_map(|l| l.strip_prefix("0::"));
    let named = text.lines().find_map(|l| l.split_once(":name=systemd:").map(|(_, path)| path));
    [unified, named].into_iter().flatten().find(|path| *path != "/" && !path.is_empty()).map(str::to_owned)
}

/// systemd unit in a control group path: its last component that names one.
#[must_use]
pub fn unit_of(cgroup: &str) -> &str {
    // The backstop's own child is not where the program was put.
    let cgroup = match cgroup.rsplit_once('/') {
        Some(("", last)) if last.starts_with(portcullis_backstop::PREFIX) => "/",
        Some((above, last)) if last.starts_with(portcullis_backstop::PREFIX) => above,
        _ => cgroup,
    };
    cgroup
        .rsplit('/')
        .find(|part| part.ends_with(".service") || part.ends_with(".scope") || part.ends_with(".socket"))
        .unwrap_or(cgroup)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_with_its_sockets() {
        let me = ProcDir::open(std::process::id().cast_signed()).unwrap();
        assert_eq!(me.birth().unwrap().parent, nix::unistd::getppid().as_raw());
        assert_eq!(me.credentials().unwrap().uid, nix::unistd::geteuid().as_raw());
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let inode = fstat(&socket).unwrap().st_ino;
        let held = me.sockets().unwrap();
        let (number, _) = *held.iter().find(|(_, i)| *i == inode).unwrap();
        assert!(me.holds(number, inode));
        drop(socket);
        assert!(!me.holds(number, inode));
    }

    #[test]
    fn an_executable_is_known_by_its_file() {
        let me = ProcDir::open(std::process::id().cast_signed()).unwrap();
        let exe = me.executable().unwrap();
        assert_eq!(exe.id, file_id(&exe.link).unwrap());
        assert!(!exe.foreign);
    }

    #[test]
    fn units_are_read_from_control_groups() {
        assert_eq!(
            parse_cgroup("12:cpu:/x\n0::/system.slice/nginx.service\n").unwrap(),
            "/system.slice/nginx.service"
        );
        assert_eq!(parse_cgroup("1:name=systemd:/user.slice\n0::/\n").unwrap(), "/user.slice");
        assert_eq!(unit_of("/system.slice/nginx.service"), "nginx.service");
        assert_eq!(unit_of("/user.slice/user-1000.slice/session-2.scope/x"), "session-2.scope");
        assert_eq!(unit_of("/docker/abc"), "/docker/abc");
    }

    #[test]
    fn effective_credentials_are_taken() {
        let text = b"Name:\tUid:\t9\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t10 11 \nUid:\t0\t0\t0\t0\n";
        assert_eq!(
            parse_credentials(text).unwrap(),
            Credentials { real: 1, uid: 2, groups: vec![6, 10, 11] }
        );
    }
}
