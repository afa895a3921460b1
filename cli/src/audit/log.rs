//! The log's files, read in order, and followed.

use std::{
    collections::VecDeque,
    fs,
    io::{BufRead, BufReader, ErrorKind},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

use super::Record;
use crate::{control::AskError, place::Place};

/// What a line turned out to be.
#[derive(Debug)]
pub enum Entry {
    /// A record.
    Record(Record),
    /// Something else: a line that a crash tore, say.
    Broken {
        /// In which file.
        file: PathBuf,
        /// Which line, from 1.
        line: u64,
    },
}

/// The log of one state folder.
#[derive(Debug)]
pub struct Log {
    folder: PathBuf,
    /// Files not begun yet, oldest first.
    waiting: VecDeque<PathBuf>,
    /// Device and inode of those seen, so that a later look finds only new ones, whatever they are called.
    known: Vec<(u64, u64)>,
    current: Option<Current>,
    watch: Option<Inotify>,
}

#[derive(Debug)]
struct Current {
    path: PathBuf,
    lines: BufReader<fs::File>,
    number: u64,
    /// Beginning of a line whose end is not written yet.
    part: Vec<u8>,
}

/// Longest line that is read; a longer one is no record.
const LONGEST: usize = 1 << 20;

impl Log {
    /// Opens the log at its beginning. A folder without log has an empty one.
    ///
    /// # Errors
    /// [`AskError::Log`].
    pub fn open(place: &Place) -> Result<Self, AskError> {
        let folder = place.state.join("audit");
        let mut log =
            Self { folder, waiting: VecDeque::new(), known: Vec::new(), current: None, watch: None };
        log.look()?;
        Ok(log)
    }

    /// The next line. `None`: nothing more is written yet.
    ///
    /// # Errors
    /// [`AskError::Log`].
    pub fn next(&mut self) -> Result<Option<Entry>, AskError> {
        loop {
            if self.current.is_none() {
                let Some(path) = self.waiting.pop_front() else { return Ok(None) };
                let file = match fs::File::open(&path) {
                    // Too old to be kept, since it was found: the gap in the numbers tells.
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    other => other.map_err(unreadable(&path))?,
                };
                self.current =
                    Some(Current { path, lines: BufReader::new(file), number: 0, part: Vec::new() });
            }
            let Some(current) = &mut self.current else { return Ok(None) };
            if let Some(entry) = current.next().map_err(unreadable(&current.path))? {
                return Ok(Some(entry));
            }
            // At the end of the newest file, more may come; an older one is over.
            if self.waiting.is_empty() {
                return Ok(None);
            }
            let torn = (!current.part.is_empty()).then(|| current.broken());
            self.current = None;
            if torn.is_some() {
                return Ok(torn);
            }
        }
    }

    /// Waits until something was written.
    ///
    /// # Errors
    /// [`AskError::Log`].
    pub fn wait(&mut self) -> Result<(), AskError> {
        let io = |e: nix::errno::Errno| unreadable(&self.folder)(e.into());
        if self.watch.is_none() {
            let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(io)?;
            let events = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
            // The log's folder may come into being later; then looking once a second has to do.
            if watch.add_watch(&self.folder, events).is_ok() {
                self.watch = Some(watch);
            }
        } else if let Some(watch) = &self.watch {
            let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(1000_u16)).map_err(io)?;
            let _which = watch.read_events();
        }
        if self.watch.is_none() {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
        self.look()
    }

    /// Finds files that are new, in the order of their first records.
    fn look(&mut self) -> Result<(), AskError> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            other => other.map_err(unreadable(&self.folder))?,
        };
        let mut fresh = Vec::new();
        for entry in entries {
            let path = entry.map_err(unreadable(&self.folder))?.path();
            if path.extension().is_some_and(|e| e == "jsonl")
                && let Ok(meta) = fs::metadata(&path)
                && !self.known.contains(&(meta.dev(), meta.ino()))
            {
                let seq = match first_seq(&path) {
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    other => other.map_err(unreadable(&path))?,
                };
                // One that has no record yet is looked at again.
                if let Some(seq) = seq {
                    self.known.push((meta.dev(), meta.ino()));
                    fresh.push((seq, path));
                }
            }
        }
        fresh.sort();
        self.waiting.extend(fresh.into_iter().map(|(_, path)| path));
        Ok(())
    }
}

impl Current {
    fn next(&mut self) -> std::io::Result<Option<Entry>> {
        if !read_line(&mut self.lines, &mut self.part)? {
            return Ok(None);
        }
        let record = parse(&std::mem::take(&mut self.part));
        if record.is_none() {
            return Ok(Some(self.broken()));
        }
        self.number += 1;
        Ok(record.map(Entry::Record))
    }

    fn broken(&mut self) -> Entry {
        self.number += 1;
        Entry::Broken { file: self.path.clone(), line: self.number }
    }
}

fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> AskError {
    let path = path.to_owned();
    move |source| AskError::Log { path, source }
}

/// Reads on to the end of a line, and keeps no more of it than shows that it is too long. `false`: its end is not
/// there yet.
fn read_line(lines: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<bool> {
    loop {
        let some = lines.fill_buf()?;
        if some.is_empty() {
            return Ok(false);
        }
        let end = some.iter().position(|byte| *byte == b'\n');
        let length = end.map_or(some.len(), |at| at + 1);
        let room = (LONGEST + 1).saturating_sub(line.len());
        line.extend(some.iter().take(length.min(room)));
        lines.consume(length);
        if end.is_some() {
            return Ok(true);
        }
    }
}

fn parse(line: &[u8]) -> Option<Record> {
    let line = line.strip_suffix(b"\n")?;
    Record::parse(&String::from_utf8_lossy(line))
}

/// Number of a file's first record; `None` while it has none.
fn first_seq(path: &Path) -> std::io::Result<Option<u64>> {
    let mut lines = BufReader::new(fs::File::open(path)?);
    let mut line = Vec::new();
    while read_line(&mut lines, &mut line)? {
        if let Some(seq) = parse(&line).and_then(|record| record.seq()) {
            return Ok(Some(seq));
        }
        line.clear();
    }
    Ok(None)
}
