//! The log on disk: numbering without gaps, rotation, and what happens when it cannot be written.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::{fd::BorrowedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use jiff::Timestamp;

use super::{LeftOpen, Line, More, Unsaid};
use crate::{escape::json_string, settings::Audit, sys::lock_within};

/// How much of a file's end is searched for its last record, in bytes.
const LAST: u64 = 256 * 1024;
/// How much of it is searched for what a writer that died has left: flows that are in the kernel's ring as well, and
/// those that have no end.
const RECENT: u64 = 4 << 20;

/// Where the log stood when it was opened.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tail {
    /// Number of the last record; 0 if there is none.
    pub seq: u64,
    /// Highest generation in the last records; 0 if there is none.
    pub generation: u64,
    /// Its writer took its leave.
    pub ended: bool,
}

/// Reason of the record with which a broker ends.
pub const ENDS: &str = "the broker ends";

/// The log, open for appending.
///
/// Lines are first [pushed](Self::push), then [committed](Self::commit) with one write(2). What does not
/// get to disk takes no number: it is counted, and the count is in the log once that can be written.
#[derive(Debug)]
pub struct Log {
    folder: PathBuf,
    settings: Audit,
    host: String,
    file: File,
    size: u64,
    since: Instant,
    /// Number of the last record that is on disk.
    seq: u64,
    buffer: String,
    buffered: u64,
    /// The same, for the next broker, if this one is killed.
    unsaid: Option<Unsaid>,
    lost: u64,
    lost_unsaid: u64,
    error: Option<String>,
    /// Part of a line is at the file's end and could not be cut off yet.
    torn: bool,
    second: (i64, String),
    /// Of the folder: nobody else writes.
    _lock: File,
}

impl Log {
    /// Opens the log in `folder`, which exists, and finds where it stood. A torn last line (the
    /// broker was killed in mid-write, so no verdict was given on it) is cut off.
    ///
    /// # Errors
    /// As the file calls.
    pub fn open(folder: &Path, settings: Audit, host: &str) -> io::Result<(Self, Tail)> {
        let lock = lock(folder)?;
        let newest = files(folder)?.pop();
        let (file, tail, size) = match &newest {
            Some(path) => {
                let mut file = open(path)?;
                let (tail, size) = mend(&mut file)?;
                // An empty file is named after the record that is to come first.
                let named = path.file_stem().and_then(|n| n.to_str()).and_then(|n| n.parse::<u64>().ok());
                let tail = Tail { seq: tail.seq.max(named.unwrap_or(1).saturating_sub(1)), ..tail };
                (file, tail, size)
            }
            None => (open(&name(folder, 1))?, Tail::default(), 0),
        };
        let log = Self {
            folder: folder.to_owned(),
            settings,
            host: quoted(host),
            file,
            size,
            since: Instant::now(),
            seq: tail.seq,
            buffer: String::new(),
            buffered: 0,
            unsaid: None,
            lost: 0,
            lost_unsaid: 0,
            error: None,
            torn: false,
            second: (i64::MIN, String::new()),
            _lock: lock,
        };
        Ok((log, tail))
    }

    /// Puts on record what an earlier writer was killed before it could write, and keeps there what is not written yet.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn keep_in(&mut self, memory: BorrowedFd<'_>) -> io::Result<()> {
        let (mut unsaid, left) = Unsaid::open(memory)?;
        for line in String::from_utf8_lossy(&left).split_inclusive('\n') {
            let number = line.strip_prefix("{\"seq\":").and_then(|rest| rest.split_once(','));
            let number = number.and_then(|(number, _)| number.parse().ok()).unwrap_or(0);
            // It may have been written just before.
            if number == self.seq + self.buffered + 1 && line.ends_with('\n') {
                self.buffer.push_str(line);
                self.buffered += 1;
            }
        }
        let _counted = self.commit();
        unsaid.clear();
        self.unsaid = Some(unsaid);
        Ok(())
    }

    /// From here on records are this host's.
    pub fn name_host(&mut self, name: &str) {
        self.host = quoted(name);
    }

    /// Number of the last record on disk.
    #[must_use]
    pub const fn seq(&self) -> u64 {
        self.seq
    }

    /// Records lost so far.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Why the log cannot be written, if so.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Tries again after an error, by writing down what was lost. `true`: the log can be written.
    #[must_use]
    pub fn retry(&mut self, now: u64) -> bool {
        if self.error.is_some() && self.buffered == 0 {
            self.format_lost(now);
        }
        self.commit()
    }

    /// Takes one line; the number it gets if the next [`Self::commit`] succeeds.
    pub fn push(&mut self, line: &Line<'_>) -> u64 {
        if self.lost_unsaid > 0 && self.buffered == 0 {
            self.format_lost(line.time);
        }
        self.format(line)
    }

    fn format_lost(&mut self, now: u64) {
        let lost = [("lost", More::Number(self.lost_unsaid))];
        let reason = format!("{} records could not be written", self.lost_unsaid);
        self.format(&Line { reason: Some(&reason), more: &lost, ..Line::bare(now, "lost", "broker") });
    }

    fn format(&mut self, line: &Line<'_>) -> u64 {
        self.buffered += 1;
        let seq = self.seq + self.buffered;
        let stamp = self.stamp(line.time);
        let before = self.buffer.len();
        line.write(&mut self.buffer, seq, &stamp, &self.host);
        if let Some(unsaid) = &mut self.unsaid {
            unsaid.add(self.buffer.get(before..).unwrap_or_default());
        }
        seq
    }

    /// RFC 3339 in UTC with nanoseconds.
    fn stamp(&mut self, time: u64) -> String {
        let seconds = i64::try_from(time / 1_000_000_000).unwrap_or(0);
        if self.second.0 != seconds {
            let text = Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH).to_string();
            self.second = (seconds, text.trim_end_matches('Z').to_owned());
        }
        format!("{}.{:09}Z", self.second.1, time % 1_000_000_000)
    }

    /// Whether records wait to be written.
    #[must_use]
    pub const fn is_behind(&self) -> bool {
        self.buffered > 0
    }

    /// Writes what was pushed. `false`: it is not on disk, and was counted as lost.
    #[must_use]
    pub fn commit(&mut self) -> bool {
        if self.buffered == 0 {
            return self.error.is_none();
        }
        let outcome = self.rotate_if_due().and_then(|()| self.write_out());
        let done = outcome.is_ok();
        match outcome {
            Ok(()) => {
                self.size += self.buffer.len() as u64;
                self.seq += self.buffered;
                self.lost_unsaid = 0;
                self.error = None;
            }
            Err(error) => {
                // The line that says what was lost before is no loss itself.
                let own = u64::from(self.error.is_some());
                self.lost += self.buffered - own;
                self.lost_unsaid += self.buffered - own;
                self.error = Some(error.to_string());
            }
        }
        self.buffer.clear();
        self.buffered = 0;
        self.unsaid.iter_mut().for_each(Unsaid::clear);
        done
    }

    fn write_out(&mut self) -> io::Result<()> {
        if self.torn {
            self.file.set_len(self.size)?;
            self.torn = false;
        }
        let mut rest = self.buffer.as_bytes();
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return self.undo(io::ErrorKind::WriteZero.into()),
                Ok(done) => rest = rest.get(done..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.undo(error),
            }
        }
        Ok(())
    }

    /// Cuts off what was written in part.
    fn undo(&mut self, error: io::Error) -> io::Result<()> {
        self.torn = self.file.set_len(self.size).is_err();
        Err(error)
    }

    fn rotate_if_due(&mut self) -> io::Result<()> {
        let hours = Duration::from_secs(self.settings.rotate_hours.saturating_mul(3600));
        let full = self.size >= self.settings.rotate_mib.saturating_mul(1 << 20);
        if self.size == 0 || !(full || self.since.elapsed() >= hours) {
            return Ok(());
        }
        let next = open(&name(&self.folder, self.seq + 1))?;
        self.file.sync_data()?;
        self.file = next;
        self.size = 0;
        self.since = Instant::now();
        if self.settings.keep_files > 0 {
            let all = files(&self.folder)?;
            for old in all.iter().take(all.len().saturating_sub(self.settings.keep_files + 1)) {
                fs::remove_file(old)?;
            }
        }
        Ok(())
    }

    /// Gets everything to the disk itself.
    ///
    /// # Errors
    /// As fdatasync(2).
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Which flows the last records say were opened: for what may have been put there just before its writer died.
    #[must_use]
    pub fn recent_connects(&self) -> HashSet<u64> {
        let recent = self.recent();
        // Within a string of JSON there is no bare quotation mark.
        let connects = recent.lines().filter(|line| line.contains("\"op\":\"connect\""));
        let flow = |line: &str| {
            let (_, rest) = line.split_once("\"association\":\"")?;
            u64::from_str_radix(rest.split_once('"')?.0, 16).ok()
        };
        connects.filter_map(flow).collect()
    }

    /// Which protected flows the last records begin and do not end.
    #[must_use]
    pub fn left_open(&self) -> LeftOpen {
        LeftOpen::read(self.recent().lines())
    }

    /// The ends of the last two files, oldest first.
    fn recent(&self) -> String {
        let all = files(&self.folder).unwrap_or_default();
        let mut text = String::new();
        for path in all.iter().skip(all.len().saturating_sub(2)) {
            let Ok(mut file) = File::open(path) else { continue };
            let size = file.metadata().map_or(0, |m| m.len());
            let mut end = Vec::new();
            let read = file.seek(SeekFrom::Start(size.saturating_sub(RECENT)));
            if read.and_then(|_| file.read_to_end(&mut end)).is_ok() {
                text.push_str(&String::from_utf8_lossy(&end));
            }
        }
        text
    }
}

/// Waits until an earlier writer is gone: a broker whose supervisor was killed still takes its leave.
fn lock(folder: &Path) -> io::Result<File> {
    let lock = File::open(folder)?;
    lock_within(&lock, Duration::from_secs(10))?;
    Ok(lock)
}

fn name(folder: &Path, first: u64) -> PathBuf {
    folder.join(format!("{first:020}.jsonl"))
}

/// Files of the log, oldest first: their names are the numbers of their first records.
fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_number = |n: &str| n.len() == 20 && n.bytes().all(|b| b.is_ascii_digit());
        if path.extension().is_some_and(|e| e == "jsonl")
            && path.file_stem().and_then(|n| n.to_str()).is_some_and(is_number)
        {
            all.push(path);
        }
    }
    all.sort();
    Ok(all)
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o640).open(path)
}

/// As JSON.
fn quoted(text: &str) -> String {
    let mut quoted = String::new();
    json_string(&mut quoted, text);
    quoted
}

/// Cuts off a torn last line and reads the last record.
fn mend(file: &mut File) -> io::Result<(Tail, u64)> {
    let size = file.metadata()?.len();
    let from = size.saturating_sub(LAST);
    file.seek(SeekFrom::Start(from))?;
    let mut end = Vec::new();
    file.read_to_end(&mut end)?;
    let whole = end.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    let size = from + whole as u64;
    if whole < end.len() {
        file.set_len(size)?;
        end.truncate(whole);
    }
    let mut tail = Tail::default();
    for line in end.split(|b| *b == b'\n') {
        let Ok(record) = serde_json::from_slice::<serde_json::Value>(line) else { continue };
        let number = |field: &str| record.get(field).and_then(serde_json::Value::as_u64).unwrap_or(0);
        tail.seq = tail.seq.max(number("seq"));
        tail.generation = tail.generation.max(number("generation"));
        tail.ended = record.get("reason").and_then(serde_json::Value::as_str) == Some(ENDS);
    }
    Ok((tail, size))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn numbers(folder: &Path) -> Vec<u64> {
        let mut all = Vec::new();
        for path in files(folder).unwrap() {
            for line in fs::read_to_string(path).unwrap().lines() {
                all.push(serde_json::from_str::<serde_json::Value>(line).unwrap()["seq"].as_u64().unwrap());
            }
        }
        all
    }

    fn line(generation: u64) -> Line<'static> {
        Line { generation: Some(generation), ..Line::bare(1_700_000_000_123_456_789, "connect", "shim") }
    }

    #[test]
    fn the_last_flows_are_known_and_so_is_who_took_leave() {
        let folder = tempfile::tempdir().unwrap();
        let (mut log, _) = Log::open(folder.path(), Audit::default(), "h").unwrap();
        let bait = "\"op\":\"connect\",\"association\":\"99\"";
        log.push(&Line { association: Some(0x4f), reason: Some(bait), ..line(1) });
        log.push(&Line { association: Some(0x50), ..Line::bare(1, "close", "broker") });
        log.push(&Line { reason: Some(ENDS), ..Line::bare(2, "broker", "broker") });
        assert!(log.commit());
        assert_eq!(log.recent_connects(), HashSet::from([0x4f]));
        drop(log);
        let (_, tail) = Log::open(folder.path(), Audit::default(), "h").unwrap();
        assert!(tail.ended);
    }

    #[test]
    fn numbers_have_no_gap_over_restarts_rotations_and_torn_lines() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Audit { rotate_mib: 0, ..Audit::default() };
        for round in 0..3 {
            let (mut log, tail) = Log::open(folder.path(), settings.clone(), "h").unwrap();
            assert_eq!(
                tail,
                Tail { seq: round * 4, generation: if round == 0 { 0 } else { 9 }, ended: false }
            );
            for _ in 0..2 {
                log.push(&line(9));
                log.push(&line(1));
                assert!(log.commit());
            }
            let newest = files(folder.path()).unwrap().pop().unwrap();
            OpenOptions::new().append(true).open(newest).unwrap().write_all(b"{\"seq\":99,\"ti").unwrap();
        }
        let _log = Log::open(folder.path(), settings, "h").unwrap();
        assert_eq!(numbers(folder.path()), (1..=12).collect::<Vec<_>>());
        assert_eq!(files(folder.path()).unwrap().len(), 6, "one file per commit");
    }

    #[test]
    fn old_files_go_when_told_so() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Audit { rotate_mib: 0, keep_files: 2, ..Audit::default() };
        let (mut log, _) = Log::open(folder.path(), settings, "h").unwrap();
        for _ in 0..9 {
            log.push(&line(1));
            assert!(log.commit());
        }
        assert_eq!(numbers(folder.path()), [7, 8, 9]);
    }

    #[test]
    fn a_loss_is_counted_and_said_and_leaves_no_gap() {
        let folder = tempfile::tempdir().unwrap();
        let (mut log, _) = Log::open(folder.path(), Audit::default(), "h").unwrap();
        log.push(&line(1));
        assert!(log.commit());
        let good =
            std::mem::replace(&mut log.file, OpenOptions::new().write(true).open("/dev/full").unwrap());
        for _ in 0..3 {
            log.push(&line(1));
            assert!(!log.commit());
        }
        assert_eq!((log.lost(), log.seq()), (3, 1));
        assert!(log.error().is_some());
        (log.file, log.torn) = (good, false);
        log.push(&line(1));
        assert!(log.commit());
        assert!(log.error().is_none());
        let text = fs::read_to_string(files(folder.path()).unwrap().pop().unwrap()).unwrap();
        assert!(text.lines().nth(1).unwrap().ends_with("\"lost\":3}"), "{text}");
        assert_eq!(numbers(folder.path()), [1, 2, 3]);
    }

    #[test]
    fn what_a_killed_writer_had_not_written_the_next_one_writes() {
        let folder = tempfile::tempdir().unwrap();
        let memory = Unsaid::make().unwrap();
        let log = |keeps: bool| {
            let (mut log, _) = Log::open(folder.path(), Audit::default(), "h").unwrap();
            if keeps {
                log.keep_in(memory.as_fd()).unwrap();
            }
            log
        };
        let mut first = log(true);
        first.push(&line(1));
        assert!(first.commit());
        first.push(&line(1));
        assert_eq!(first.push(&line(1)), 3);
        drop(first);
        assert_eq!(numbers(folder.path()), [1]);
        let mut second = log(true);
        assert_eq!(numbers(folder.path()), [1, 2, 3]);
        assert_eq!(second.push(&line(1)), 4);
        drop(second);
        // One that was killed between writing and saying so.
        let mut third = log(false);
        third.push(&line(1));
        assert!(third.commit());
        drop(third);
        drop(log(true));
        assert_eq!(numbers(folder.path()), [1, 2, 3, 4]);
    }
}
