//! Where things are: the state folder, and the runtime folder with the sockets.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::unistd::{AccessFlags, Uid, access, geteuid};
use portcullis_backstop::name_of;

/// Why there is no place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// Neither option nor environment says where, and there is no home.
    #[error("no state folder: give --state DIR or set PORTCULLIS_STATE or HOME")]
    Nowhere,
    /// The folder cannot be made or opened.
    #[error("cannot use state folder `{}`", path.display())]
    State {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Somebody else's folder: its owner could replace what we write.
    #[error("state folder `{}` belongs to uid {owner}, not to uid {me}", path.display())]
    Owner {
        /// The folder.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who asks.
        me: u32,
    },
    /// No folder for sockets.
    #[error("cannot use runtime folder `{}`", path.display())]
    Runtime {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The state folder and what belongs to it.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// State folder, absolute, without symbolic links.
    pub state: PathBuf,
    /// Folder of the sockets and of the shim's copy; named after the state folder's device, inode and birth,
    /// so that however the state folder is spelt, its broker is found.
    pub runtime: PathBuf,
}

/// Longest socket name that is put into the runtime folder, with its slash.
const LONGEST_NAME: usize = "/supervisor.sock".len();
/// Size of `sun_path` (unix(7)), with its final NUL.
const SUN_PATH: usize = 108;

impl Place {
    /// Finds the state folder that `option` or the environment names; it must exist.
    ///
    /// # Errors
    /// [`PlaceError`].
    pub fn find(option: Option<&Path>) -> Result<Self, PlaceError> {
        let named = name_state(option)?;
        let state = |source| PlaceError::State { path: named.clone(), source };
        let path = fs::canonicalize(&named).map_err(state)?;
        let meta = fs::metadata(&path).map_err(state)?;
        if !meta.is_dir() {
            return Err(state(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let runtime = runtime_base(geteuid()).join(name_of(&meta));
        Ok(Self { state: path, runtime })
    }

    /// As [`Self::find`], and makes state and runtime folder if need be. For those that start a broker.
    ///
    /// # Errors
    /// [`PlaceError`].
    pub fn make(option: Option<&Path>) -> Result<Self, PlaceError> {
        let named = name_state(option)?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&named)
            .map_err(|source| PlaceError::State { path: named.clone(), source })?;
        let place = Self::find(Some(&named))?;
        let me = geteuid();
        let owner = fs::metadata(&place.state)
            .map_err(|source| PlaceError::State { path: named.clone(), source })?
            .uid();
        if owner != me.as_raw() {
            return Err(PlaceError::Owner { path: named, owner, me: me.as_raw() });
        }
        place.make_runtime()?;
        Ok(place)
    }

    /// Makes the runtime folder, which a supervisor that ends takes away with it: whoever starts one calls
    /// this with the lock held.
    ///
    /// # Errors
    /// [`PlaceError::Runtime`].
    pub fn make_runtime(&self) -> Result<(), PlaceError> {
        make_runtime(&self.runtime, geteuid())
            .map_err(|source| PlaceError::Runtime { path: self.runtime.clone(), source })
    }

    /// Where programs find the broker.
    pub fn broker_socket(&self) -> PathBuf {
        self.runtime.join("broker.sock")
    }
    /// Where commands ask the broker.
    pub fn control_socket(&self) -> PathBuf {
        self.runtime.join("control.sock")
    }
    /// Where `run` finds the supervisor.
    pub fn supervisor_socket(&self) -> PathBuf {
        self.runtime.join("supervisor.sock")
    }
    /// Held by the supervisor as long as it lives.
    pub fn lock(&self) -> PathBuf {
        self.state.join("lock")
    }
    /// What the daemons have to say.
    pub fn log(&self) -> PathBuf {
        self.state.join("log")
    }
}

/// Which state folder `option` or the environment names; it may not be there yet.
///
/// # Errors
/// [`PlaceError::Nowhere`].
pub fn name_state(option: Option<&Path>) -> Result<PathBuf, PlaceError> {
    if let Some(path) = option {
        return Ok(path.to_owned());
    }
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(path) = var("PORTCULLIS_STATE") {
        return Ok(path);
    }
    if geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/portcullis"));
    }
    // XDG Base Directory Specification: a relative path is to be ignored.
    let xdg = var("XDG_STATE_HOME").filter(|p| p.is_absolute());
    xdg.or_else(|| var("HOME").map(|home| home.join(".local/state")))
        .map(|base| base.join("portcullis"))
        .ok_or(PlaceError::Nowhere)
}

fn runtime_base(me: Uid) -> PathBuf {
    if me.is_root() && access("/run", AccessFlags::W_OK).is_ok() {
        return PathBuf::from("/run/portcullis");
    }
    let fits = |p: &Path| {
        // device, inode and nanoseconds are at most 16 hexadecimal digits each
        let longest = p.as_os_str().len() + "/portcullis/".len() + 50 + LONGEST_NAME;
        // LD_PRELOAD has no way to quote the characters that separate its entries (ld.so(8)).
        let plain = !p.as_os_str().as_encoded_bytes().iter().any(|b| b" :\n\t".contains(b));
        longest < SUN_PATH
            && plain
            && p.is_absolute()
            && fs::metadata(p).is_ok_and(|m| m.uid() == me.as_raw())
    };
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(path) if fits(&path) => path.join("portcullis"),
        _ => PathBuf::from(format!("/tmp/portcullis-{me}")),
    }
}

/// Makes the runtime folder: others may pass through it to the sockets that are open to them, and list nothing.
fn make_runtime(path: &Path, me: Uid) -> io::Result<()> {
    let base = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    for dir in [base, path] {
        fs::DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
        // Not followed: in /tmp, another user could have been there first.
        let meta = fs::symlink_metadata(dir)?;
        if !meta.is_dir() || meta.uid() != me.as_raw() {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("`{}` belongs to uid {}", dir.display(), meta.uid()),
            ));
        }
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_names_the_state_folder() {
        assert_eq!(name_state(Some(Path::new("x/y"))).unwrap(), Path::new("x/y"));
    }
}
