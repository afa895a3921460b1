//! Runtime folders that a killed supervisor has left, once nothing can need them any more.

use std::{
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::shim;
use crate::{link, place::Place};

/// File that says which state folder a runtime folder belongs to.
const OWNER: &str = "state";

/// Leaves word in the runtime folder whose it is.
///
/// # Errors
/// As write(2).
pub fn sign(place: &Place) -> io::Result<()> {
    fs::write(place.runtime.join(OWNER), place.state.as_os_str().as_bytes())
}

/// Whether an earlier supervisor has left word and not taken it back: programs of its trees may still be there.
pub fn is_signed(place: &Place) -> bool {
    place.runtime.join(OWNER).exists()
}

/// Takes it back.
pub fn unsign(place: &Place) {
    let _absent = fs::remove_file(place.runtime.join(OWNER));
}

/// Removes the runtime folders beside ours whose state folder is gone, whose supervisor does not answer, and
/// which no process has in its memory or its environment: what such a process execs must find the shim.
pub fn sweep(place: &Place) {
    let Some(base) = place.runtime.parent() else { return };
    let Ok(all) = fs::read_dir(base) else { return };
    for runtime in all.flatten().map(|entry| entry.path()).filter(|path| *path != place.runtime) {
        let Some(state) = owner(&runtime) else { continue };
        let left = Place { state, runtime };
        if is_over(&left) && !is_needed(&left.runtime) {
            unsign(&left);
            for socket in [left.supervisor_socket(), left.broker_socket(), left.control_socket()] {
                let _absent = fs::remove_file(socket);
            }
            shim::remove(&left);
            let _not_empty = fs::remove_dir(&left.runtime);
        }
    }
}

fn owner(runtime: &Path) -> Option<PathBuf> {
    let path = fs::read(runtime.join(OWNER)).ok()?;
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(&path)))
}

/// Whether the state folder is gone, or another has its name, and nobody serves it.
fn is_over(left: &Place) -> bool {
    let named = left.runtime.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let gone = match fs::metadata(&left.state) {
        Ok(meta) => portcullis_backstop::name_of(&meta) != named,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    gone && link::connect(&left.supervisor_socket()).is_err()
}

/// Whether some process was started with, or has mapped, what is in the folder.
fn is_needed(runtime: &Path) -> bool {
    let Some(name) = runtime.file_name().map(|n| n.as_bytes().to_vec()) else { return true };
    let Ok(processes) = fs::read_dir("/proc") else { return true };
    let mentions = |file: PathBuf| {
        fs::read(file).is_ok_and(|text| text.windows(name.len()).any(|part| part == name.as_slice()))
    };
    processes
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|n| n.as_bytes().first().is_some_and(u8::is_ascii_digit)))
        .any(|process| mentions(process.join("environ")) || mentions(process.join("maps")))
}
