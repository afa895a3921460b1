//! What a process and its children have used, from procfs.

use std::{ffi::OsStr, fs, io, os::unix::ffi::OsStrExt, path::Path};

/// Clock ticks per second in procfs (USER_HZ, 100 on every architecture that Rust and Linux share but alpha).
const TICKS: f64 = 100.0;

/// `pid` and all that descend from it.
pub(crate) fn family(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut at = 0;
    while let Some(parent) = found.get(at).copied() {
        let Ok(tasks) = fs::read_dir(format!("/proc/{parent}/task")) else { break };
        for task in tasks.flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|word| word.parse::<u32>().ok()));
        }
        at += 1;
    }
    found
}

/// What a supervisor keeps for a state folder, itself included, and whether each is a key daemon.
pub(crate) fn of_state(state: &Path) -> Vec<(u32, bool)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        let (program, part) = (words.next(), words.next());
        if program == Some(b"portcullis") && words.any(|word| Path::new(OsStr::from_bytes(word)) == state) {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
            found.extend(pid.map(|pid: u32| (pid, part == Some(b"keyd"))));
        }
    }
    found
}

/// Seconds of processor time of `pid`, threads that have ended included (proc_pid_stat(5), fields 14 and 15).
pub(crate) fn cpu(pid: u32) -> io::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field may hold anything, in parentheses.
    let fields = text.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').skip(11).take(2);
    let ticks: f64 = fields.filter_map(|field| field.parse::<f64>().ok()).sum();
    Ok(ticks / TICKS)
}

/// KiB of anonymous memory in use (proc_pid_smaps(5)).
pub(crate) fn memory(pid: u32) -> io::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find(|line| line.starts_with("Anonymous:"));
    let word = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(word.and_then(|word| word.parse().ok()).unwrap_or_default())
}
