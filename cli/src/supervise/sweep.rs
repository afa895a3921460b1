//! Runtime folders that a killed supervisor has left, once nothing can need them any more.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::shim;
use crate::{link, place::Place};

/// File that says which state folder a runtime folder belongs to.
const OWNER: &str = "state";
/// How long a run may take from making a runtime folder to leaving word in it.
const BEGINS: Duration = Duration::from_secs(60);

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

/// Whether a supervisor answers there.
pub fn is_served(place: &Place) -> bool {
    link::connect(&place.supervisor_socket()).is_ok()
}

/// Removes the runtime folders beside ours that nothing can need any more: the supervisor does not answer, no process
/// has them in its memory or its environment (what such a process execs must find the shim), and the state folder is
/// gone, or nobody has left word whose it is: a run was killed as it began.
pub fn sweep(place: &Place) {
    sweep_older(place, BEGINS);
}

fn sweep_older(place: &Place, begins: Duration) {
    let Some(base) = place.runtime.parent() else { return };
    let Ok(all) = fs::read_dir(base) else { return };
    let others = all.flatten().map(|entry| entry.path()).filter(|path| *path != place.runtime);
    let mut over: Vec<Place> = others.filter_map(|runtime| left(runtime, begins)).collect();
    if over.is_empty() {
        return;
    }
    let Ok(needed) = needed() else { return };
    over.retain(|left| name(&left.runtime).is_some_and(|name| !needed.contains(name)));
    // All processes were looked at meanwhile, and a run may have begun.
    for left in over.into_iter().filter_map(|it| left(it.runtime, begins)) {
        unsign(&left);
        for socket in [left.supervisor_socket(), left.broker_socket(), left.control_socket()] {
            let _absent = fs::remove_file(socket);
        }
        shim::remove(&left);
        let _not_empty = fs::remove_dir(&left.runtime);
    }
}

/// A folder that nobody serves, for a state folder that is not there any more or was never named.
fn left(runtime: PathBuf, begins: Duration) -> Option<Place> {
    let named = name(&runtime)?;
    let (state, is_over) = match fs::read(runtime.join(OWNER)) {
        Ok(path) => {
            let state = PathBuf::from(OsStr::from_bytes(&path));
            let gone = match fs::metadata(&state) {
                Ok(meta) => portcullis_backstop::name_of(&meta).as_bytes() != named,
                Err(error) => error.kind() == io::ErrorKind::NotFound,
            };
            (state, gone)
        }
        Err(error) => {
            // Whoever begins makes the folder's mode what it should be, and so its change time new.
            let changed = fs::metadata(&runtime).ok()?.ctime();
            let age = u64::try_from(now().saturating_sub(changed)).unwrap_or(0);
            (PathBuf::new(), error.kind() == io::ErrorKind::NotFound && age >= begins.as_secs())
        }
    };
    let left = Place { state, runtime };
    (is_over && !is_served(&left)).then_some(left)
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

/// The name of a runtime folder, if it is one.
fn name(runtime: &Path) -> Option<&[u8]> {
    runtime.file_name().map(OsStr::as_bytes).filter(|name| is_name(name))
}

/// Whether it is made as [`portcullis_backstop::name_of`] makes names: device, inode, birth.
fn is_name(word: &[u8]) -> bool {
    let mut parts = word.split(|byte| *byte == b'-');
    let is_number = |part: &[u8]| !part.is_empty() && part.iter().all(u8::is_ascii_hexdigit);
    parts.by_ref().take(3).filter(|part| is_number(part)).count() == 3 && parts.next().is_none()
}

/// Names of the folders that some process was started with, or has mapped.
fn needed() -> io::Result<HashSet<Vec<u8>>> {
    let mut needed = HashSet::new();
    let is_process = |path: &PathBuf| {
        path.file_name().is_some_and(|n| n.as_bytes().first().is_some_and(u8::is_ascii_digit))
    };
    for process in fs::read_dir("/proc")?.flatten().map(|entry| entry.path()).filter(is_process) {
        for file in ["environ", "maps"] {
            let text = fs::read(process.join(file)).unwrap_or_default();
            let words = text.split(|byte| b"/:=\0\n ".contains(byte)).filter(|word| is_name(word));
            needed.extend(words.map(<[u8]>::to_vec));
        }
    }
    Ok(needed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use std::{
        io::Read,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn what_a_killed_run_has_left_goes_and_what_may_be_needed_stays() {
        let base = tempfile::tempdir().unwrap();
        let at = |name: &str| base.path().join(name);
        let [ours, empty, begun, served, mapped, anothers] =
            ["fe00-1-1", "fe00-2-2", "fe00-3-3", "fe00-4-4", "fe00-5-5", "notes"].map(at);
        for dir in [&ours, &empty, &begun, &served, &mapped, &anothers] {
            fs::create_dir(dir).unwrap();
        }
        for file in ["supervisor.sock", shim::NAME] {
            fs::write(begun.join(file), "").unwrap();
        }
        let left = |runtime: &PathBuf| Place { state: PathBuf::new(), runtime: runtime.clone() };
        let socket = link::bind_private(&left(&served).supervisor_socket()).unwrap();
        link::listen(&socket).unwrap();
        let mut child = Command::new("sh")
            .args(["-c", "echo; read x"])
            .env("PORTCULLIS_BROKER", mapped.join("broker.sock:1"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // `spawn` returns in the middle of execve(2), before the environment is there.
        child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        let there = || [&ours, &empty, &begun, &served, &mapped, &anothers].map(|dir| dir.exists());
        sweep(&left(&ours));
        assert_eq!(there(), [true; 6], "they may have begun just now");
        sweep_older(&left(&ours), Duration::ZERO);
        assert_eq!(there(), [true, false, false, true, true, true]);
        drop(child.stdin.take());
        child.wait().unwrap();
        sweep_older(&left(&ours), Duration::ZERO);
        assert_eq!(there(), [true, false, false, true, false, true]);
    }
}
