//! Where the shim lies so that a program of any user can load it.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::{
    sys::statvfs::{FsFlags, statvfs},
    unistd::geteuid,
};

use crate::{
    place::Place,
    run::{RunError, failed},
};

/// File name of the shim.
pub const NAME: &str = "libportcullis_preload.so";
/// Folder of an installed shim, from the folder of the command: `/usr/lib/portcullis` from `/usr/bin`.
pub const INSTALLED: &str = "../lib/portcullis";

/// Finds the shim, and copies it unless everybody can load it where it is.
///
/// # Errors
/// [`RunError::NoShim`], [`RunError::NoExec`], or what failed.
pub fn place(place: &Place) -> Result<PathBuf, RunError> {
    let found = find().ok_or(RunError::NoShim)?;
    if is_open_to_all(&found) && may_hold_code(&found) {
        return Ok(found);
    }
    for dir in [place.runtime.clone(), beside(place)] {
        let made = fs::DirBuilder::new().recursive(true).mode(0o711).create(&dir);
        if made.is_ok() && may_hold_code(&dir) {
            let to = dir.join(NAME);
            copy(&found, &to).map_err(failed("copy the shim"))?;
            return Ok(to);
        }
    }
    Err(RunError::NoExec(place.runtime.clone()))
}

/// Removes the copies of one state folder.
pub fn remove(place: &Place) {
    for dir in [place.runtime.clone(), beside(place)] {
        for file in [dir.join(NAME), fresh(&dir.join(NAME))] {
            let _absent = fs::remove_file(file);
        }
    }
    let _absent = fs::remove_dir(beside(place));
}

/// Where the copy goes if the runtime folder is mounted noexec, as Debian mounts /run.
fn beside(place: &Place) -> PathBuf {
    let base = match geteuid() {
        root if root.is_root() => PathBuf::from("/var/lib/portcullis/shim"),
        user => PathBuf::from(format!("/tmp/portcullis-{user}/shim")),
    };
    base.join(place.runtime.file_name().unwrap_or_default())
}

fn find() -> Option<PathBuf> {
    let exe = std::env::current_exe().ok()?;
    let dir = exe.parent()?;
    // Cargo leaves a library that was built as a dependency in `deps`; unit tests run from there.
    let folders = [".", "deps", "..", INSTALLED];
    folders.into_iter().find_map(|folder| fs::canonicalize(dir.join(folder).join(NAME)).ok())
}

/// Whether programs of every user can load the file, and nobody but root and us can change it.
fn is_open_to_all(file: &Path) -> bool {
    let me = geteuid().as_raw();
    let quotable = !file.as_os_str().as_encoded_bytes().iter().any(|b| b" :\n\t".contains(b));
    quotable
        && file.ancestors().all(|p| {
            let needed = if p == file { 0o004 } else { 0o001 };
            fs::metadata(p).is_ok_and(|m| {
                let mode = m.mode();
                [0, me].contains(&m.uid()) && mode & 0o022 == 0 && mode & needed != 0
            })
        })
}

fn may_hold_code(path: &Path) -> bool {
    statvfs(path).is_ok_and(|fs| !fs.flags().contains(FsFlags::ST_NOEXEC))
}

/// The copy until it is whole.
fn fresh(to: &Path) -> PathBuf {
    to.with_extension("new")
}

/// Copies by way of a new file, as programs may have the old one mapped.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let fresh = fresh(to);
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::File::options().write(true).create_new(true).mode(0o755).open(&fresh)?;
    io::copy(&mut fs::File::open(from)?, &mut file)?;
    file.set_permissions(fs::Permissions::from_mode(0o755))?;
    fs::rename(fresh, to)
}
