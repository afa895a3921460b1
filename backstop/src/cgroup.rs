//! Where in the cgroup v2 hierarchy a process is, and folders of our own below that.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Component, Path, PathBuf},
    sync::OnceLock,
    time::{Duration, UNIX_EPOCH},
};

use crate::{error::BackstopError, sys};

/// A cgroup of ours, held open.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    folder: File,
}

impl Cgroup {
    /// Opens an existing cgroup by its folder.
    ///
    /// # Errors
    /// [`BackstopError::Cgroup`].
    pub fn open(path: &Path) -> Result<Self, BackstopError> {
        let folder = File::open(path).map_err(failed("open", path))?;
        Ok(Self { path: path.to_path_buf(), folder })
    }

    /// Makes (or finds) the child `name` of the cgroup that `pid` is in.
    ///
    /// A process that is in a cgroup of that name already stays there: nested runs share one.
    ///
    /// # Errors
    /// [`BackstopError::NoHierarchy`], [`BackstopError::NoCgroup`], [`BackstopError::Cgroup`].
    pub fn below(pid: u32, name: &str) -> Result<Self, BackstopError> {
        let at = folder_of(pid)?;
        if at.file_name().is_some_and(|last| last == name) {
            return Self::open(&at);
        }
        let path = at.join(name);
        match fs::create_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(failed("make", &path)(e)),
            _ => Self::open(&path),
        }
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether both are one, and not one that was made again under the other's name.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        let number = |it: &Self| it.folder.metadata().map(|meta| meta.ino()).ok();
        number(self).is_some_and(|own| number(other) == Some(own))
    }

    /// Its number, and how deep it is in the hierarchy as this process sees it; the root's children are at 1.
    ///
    /// # Errors
    /// [`BackstopError::NoHierarchy`], [`BackstopError::Cgroup`].
    pub fn place(&self) -> Result<(u64, u32), BackstopError> {
        let (root, point) = visible().ok_or(BackstopError::NoHierarchy)?;
        let below = self.path.strip_prefix(&point).map_err(|_| BackstopError::NoHierarchy)?;
        let names = |path: &Path| path.components().filter(|c| matches!(c, Component::Normal(_))).count();
        let level = u32::try_from(names(Path::new(&root)) + names(below)).unwrap_or(u32::MAX);
        let number = self.folder.metadata().map_err(failed("look at", &self.path))?.ino();
        Ok((number, level))
    }

    /// Moves a process with all its threads in.
    ///
    /// Only sockets that it makes from now on are held: the kernel remembers for each socket the
    /// cgroup that it was made in.
    ///
    /// # Errors
    /// [`BackstopError::Cgroup`].
    pub fn enter(&self, pid: u32) -> Result<(), BackstopError> {
        let file = self.path.join("cgroup.procs");
        OpenOptions::new()
            .write(true)
            .open(&file)
            .and_then(|mut procs| procs.write_all(pid.to_string().as_bytes()))
            .map_err(failed("enter", &self.path))
    }

    /// Moves a process back to where it came from, and removes this cgroup if nobody else is in it.
    ///
    /// # Errors
    /// [`BackstopError::Cgroup`].
    pub fn leave(&self, pid: u32) -> Result<(), BackstopError> {
        let above = self.path.parent().unwrap_or(&self.path);
        Self::open(above)?.enter(pid)?;
        self.remove_if_empty().map(drop)
    }

    /// Whether `pid` is in it or below it.
    ///
    /// # Errors
    /// [`BackstopError::NoCgroup`]: the process has ended.
    pub fn holds(&self, pid: u32) -> Result<bool, BackstopError> {
        Ok(folder_of(pid)?.starts_with(&self.path))
    }

    /// Removes it if no process is in it or below it; `false` if one is.
    ///
    /// # Errors
    /// [`BackstopError::Cgroup`].
    pub fn remove_if_empty(&self) -> Result<bool, BackstopError> {
        match fs::remove_dir(&self.path) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(e) => Err(failed("remove", &self.path)(e)),
        }
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackstopError {
    move |source| BackstopError::Cgroup { what, path: path.to_path_buf(), source }
}

/// Name of what belongs to the state folder that `meta` describes, so that several can stand side by side. The time of
/// birth tells it from an earlier folder that had the same inode, whose supervisor may still be ending; ext4 gives a
/// freed inode to the next folder that is made.
#[must_use]
pub fn name_of(meta: &fs::Metadata) -> String {
    let born = meta.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    format!("{:x}-{:x}-{:x}", meta.dev(), meta.ino(), born.map_or(0, |at| at.as_nanos()))
}

/// Name of the cgroups of one state folder.
#[must_use]
pub fn cgroup_name(state: &Path) -> String {
    format!("{PREFIX}{}", fs::metadata(state).map(|meta| name_of(&meta)).unwrap_or_default())
}

/// Removes the cgroups of ours in `parent` that killed supervisors have left: those in which nobody is, and which nobody
/// can be about to enter, as they are not new.
pub fn sweep(parent: &Path) {
    const NEW: Duration = Duration::from_secs(60);
    let is_old = |entry: &fs::DirEntry| {
        let made = entry.metadata().and_then(|meta| meta.modified());
        made.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > NEW))
    };
    let Ok(all) = fs::read_dir(parent) else { return };
    let ours = |entry: &fs::DirEntry| entry.file_name().to_str().is_some_and(is_name_of_ours);
    for left in all.flatten().filter(|entry| ours(entry) && is_old(entry)) {
        // The kernel keeps one that is not empty.
        let _in_use = fs::remove_dir(left.path());
    }
}

/// The cgroups of this name, wherever they are.
///
/// # Errors
/// [`BackstopError::NoHierarchy`]; [`BackstopError::Cgroup`]: not all could be looked through.
pub fn all_named(name: &str) -> Result<Vec<PathBuf>, BackstopError> {
    let (_, point) = visible().ok_or(BackstopError::NoHierarchy)?;
    let (mut found, mut waiting) = (Vec::new(), vec![point]);
    while let Some(folder) = waiting.pop() {
        let children = match fs::read_dir(&folder) {
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => continue,
            all => all.and_then(Iterator::collect::<io::Result<Vec<_>>>),
        };
        for child in children.map_err(failed("look through", &folder))? {
            if child.file_name() == name {
                found.push(child.path());
            } else if child.file_type().is_ok_and(|kind| kind.is_dir()) {
                waiting.push(child.path());
            }
        }
    }
    Ok(found)
}

/// Whether [`cgroup_name`] gives such names. Others may call theirs after us.
#[must_use]
pub fn is_name_of_ours(name: &str) -> bool {
    let is_hex = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit());
    name.strip_prefix(PREFIX).is_some_and(|rest| rest.split('-').count() == 3 && rest.split('-').all(is_hex))
}

/// How the names of our cgroups begin.
pub const PREFIX: &str = "portcullis-";

/// The folder of the cgroup that `pid` is in.
///
/// # Errors
/// [`BackstopError::NoHierarchy`], [`BackstopError::NoCgroup`].
pub fn folder_of(pid: u32) -> Result<PathBuf, BackstopError> {
    let (root, point) = visible().ok_or(BackstopError::NoHierarchy)?;
    let groups =
        fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(|_| BackstopError::NoCgroup(pid))?;
    membership(&groups, &root).map(|below| point.join(below)).ok_or(BackstopError::NoCgroup(pid))
}

/// Root and place of the hierarchy as this process can reach it: where it is mounted, or a mount of our own
/// that has no name. ip-netns(8) `exec`, for one, leaves a /sys without it.
fn visible() -> Option<(String, PathBuf)> {
    static OWN: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some((root, point)) = hierarchy(&mounts)
        && point.join("cgroup.procs").exists()
    {
        return Some((root, point));
    }
    let own = OWN.get_or_init(|| sys::mount_unnamed(c"cgroup2").ok()).as_ref()?;
    Some(("/".to_owned(), PathBuf::from(format!("/proc/self/fd/{}", own.as_raw_fd()))))
}

/// Root and mount point of the cgroup v2 hierarchy in the text of proc_pid_mountinfo(5).
fn hierarchy(mountinfo: &str) -> Option<(String, PathBuf)> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        if kind.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        Some((unescape(fields.next()?), PathBuf::from(unescape(fields.next()?))))
    })
}

/// Path below the mount's root in the text of cgroups(7)'s `/proc/PID/cgroup`.
fn membership(groups: &str, root: &str) -> Option<String> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = if root == "/" { path } else { path.strip_prefix(root)? };
    if !below.is_empty() && !below.starts_with('/') {
        return None;
    }
    // "/../x": the process is outside our cgroup namespace.
    if below.split('/').any(|part| part == "..") || below.ends_with(" (deleted)") {
        return None;
    }
    Some(below.trim_start_matches('/').to_owned())
}

/// Undoes the octal escapes of mountinfo.
fn unescape(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .into_iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
";

    #[test]
    fn a_cgroup_that_somebody_has_called_after_us_is_not_ours() {
        assert!(is_name_of_ours(&cgroup_name(Path::new("/"))));
        for name in
            ["portcullis-", "portcullis-web", "portcullis-a-b", "portcullis-site.slice", "portcullis-a-b-web"]
        {
            assert!(!is_name_of_ours(name), "{name}");
        }
    }

    #[test]
    fn the_hierarchy_is_found_wherever_it_is_mounted() {
        assert_eq!(hierarchy(HYBRID), Some(("/".into(), "/sys/fs/cgroup/unified".into())));
        let odd = "5 1 0:9 /a\\040b /mnt/c\\040d rw - cgroup2 none rw";
        assert_eq!(hierarchy(odd), Some(("/a b".into(), "/mnt/c d".into())));
        assert_eq!(hierarchy("5 1 0:9 / /x rw - cgroup cgroup rw"), None);
    }

    #[test]
    fn membership_is_relative_to_what_is_mounted() {
        let groups = "4:memory:/elsewhere\n0::/system.slice/vsftpd.service\n";
        assert_eq!(membership(groups, "/").as_deref(), Some("system.slice/vsftpd.service"));
        assert_eq!(membership(groups, "/system.slice").as_deref(), Some("vsftpd.service"));
        assert_eq!(membership(groups, "/user.slice"), None);
        assert_eq!(membership(groups, "/system.sl"), None);
        assert_eq!(membership("0::/\n", "/").as_deref(), Some(""));
        assert_eq!(membership("0::/../out\n", "/"), None);
        assert_eq!(membership("4:memory:/x\n", "/"), None);
    }
}
