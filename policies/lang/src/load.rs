//! The only part that touches files.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    check,
    diagnostic::{Diagnostic, Diagnostics},
    parser,
    policy::{Loaded, Policy},
    source::{Source, Span, to_u32},
    syntax::Item,
    trial, warn,
};

/// Bytes of a policy, all its files together: four times what 100,000 rules take.
pub const LARGEST: usize = 32 << 20;
/// Files of a policy.
const MOST_FILES: usize = 256;
/// Files that include files.
const DEEPEST: usize = 16;

/// Why a policy could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file itself cannot be read.
    #[error("cannot read policy `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is a device, a pipe, a folder.
    #[error("policy `{}` is no regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// It is larger than any policy.
    #[error("policy `{}` is larger than {LARGEST} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It is not UTF-8.
    #[error("policy `{}` is not UTF-8: byte {offset} on line {line}", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// The first byte that cannot be.
        offset: usize,
        /// Its line, from 1.
        line: usize,
    },
    /// It is no valid policy.
    #[error("{0}")]
    Policy(Diagnostics),
}

/// A policy before it is judged by its own tests.
pub(crate) fn load_untested(path: &Path) -> Result<Loaded, LoadError> {
    let mut loader = Loader { room: LARGEST, words: parser::MOST_WORDS, ..Loader::default() };
    let source = loader.source(path)?;
    loader.add(path, source, 0);
    finish(loader, now()).map_err(LoadError::Policy)
}

/// Seconds since the Unix epoch.
fn now() -> Option<u64> {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|d| d.as_secs())
}

/// Reads one policy file, and none that it includes, for tools that work on its text.
///
/// # Errors
/// All but [`LoadError::Policy`].
pub fn read(path: &Path) -> Result<String, LoadError> {
    Loader { room: LARGEST, words: parser::MOST_WORDS, ..Loader::default() }.read(path)
}

/// Reads a policy from what is no file, such as standard input.
///
/// # Errors
/// All but [`LoadError::Policy`] and [`LoadError::NotAFile`].
pub fn read_input(name: &str, input: impl io::Read) -> Result<String, LoadError> {
    text(Path::new(name), input, LARGEST)
}

/// The text of a file, if it has no more than so many bytes.
fn text(path: &Path, input: impl io::Read, most: usize) -> Result<String, LoadError> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    let read = input.take(limit).read_to_end(&mut bytes);
    read.map_err(|source| LoadError::Read { path: path.to_owned(), source })?;
    if bytes.len() > most {
        return Err(LoadError::TooLarge { path: path.to_owned() });
    }
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let before = error.as_bytes().get(..offset).unwrap_or_default();
        let line = before.iter().filter(|b| **b == b'\n').count() + 1;
        LoadError::NotText { path: path.to_owned(), offset, line }
    })
}

pub(crate) fn load(path: &Path) -> Result<Loaded, LoadError> {
    tested(load_untested(path)?).map_err(LoadError::Policy)
}

/// Checks a text that includes nothing, as at the time `now`.
pub(crate) fn parse_untested(name: &str, text: &str, now: Option<u64>) -> Result<Loaded, Diagnostics> {
    let mut loader = Loader { room: LARGEST, words: parser::MOST_WORDS, is_text: true, ..Loader::default() };
    if text.len() > LARGEST {
        loader.sources.push(Source::new(name, ""));
        let message = format!("this policy is larger than {LARGEST} bytes");
        loader.errors.push(Diagnostic::error(message, Span::default()));
    } else {
        loader.add(Path::new(name), Source::new(name, text), 0);
    }
    finish(loader, now)
}

pub(crate) fn parse(name: &str, text: &str) -> Result<Loaded, Diagnostics> {
    tested(parse_untested(name, text, None)?)
}

pub(crate) fn load_input(name: &str, input: impl io::Read) -> Result<Loaded, LoadError> {
    tested(load_input_untested(name, input)?).map_err(LoadError::Policy)
}

pub(crate) fn load_input_untested(name: &str, input: impl io::Read) -> Result<Loaded, LoadError> {
    parse_untested(name, &read_input(name, input)?, now()).map_err(LoadError::Policy)
}

/// Holds a policy to its own tests.
pub(crate) fn tested(loaded: Loaded) -> Result<Loaded, Diagnostics> {
    let failures = trial::failures(&loaded.policy);
    if failures.is_empty() {
        return Ok(loaded);
    }
    let sources = loaded.policy.sources;
    let mut all = loaded.warnings;
    all.append(failures);
    Err(all.with_sources(sources))
}

fn finish(loader: Loader, now: Option<u64>) -> Result<Loaded, Diagnostics> {
    let Loader { items, sources, mut errors, .. } = loader;
    let checked = check::check(items, &sources, &mut errors);
    warn::characters(&sources, &mut errors);
    if errors.has_errors() {
        return Err(errors.with_sources(sources.as_slice()));
    }
    warn::warn(&checked, &sources, now, &mut errors);
    let warnings = errors.with_sources(sources.as_slice());
    Ok(Loaded { policy: Policy::compile(checked, sources), warnings })
}

#[derive(Default)]
struct Loader {
    items: Vec<Item>,
    sources: Vec<Source>,
    /// Device and inode of the files being read, for cycles, and of all that were.
    open: Vec<(u64, u64)>,
    done: Vec<(u64, u64)>,
    /// Bytes and words that are left.
    room: usize,
    words: usize,
    /// A text that is not in a file includes nothing.
    is_text: bool,
    identity: Option<(u64, u64)>,
    errors: Diagnostics,
}

impl Loader {
    /// Reads one file, whatever it turns out to be.
    fn read(&mut self, path: &Path) -> Result<String, LoadError> {
        let failed = |source| LoadError::Read { path: path.to_owned(), source };
        // Looked at before it is opened, as opening a device can have effects; and again after,
        // as it may have been replaced. O_NONBLOCK: opening a pipe would wait for its writer.
        if !fs::metadata(path).map_err(failed)?.is_file() {
            return Err(LoadError::NotAFile { path: path.to_owned() });
        }
        let file: File = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(LoadError::NotAFile { path: path.to_owned() });
        }
        self.identity = Some((metadata.dev(), metadata.ino()));
        let text = text(path, file, self.room)?;
        self.room -= text.len();
        Ok(text)
    }

    fn source(&mut self, path: &Path) -> Result<Source, LoadError> {
        Ok(Source::new(&path.display().to_string(), &self.read(path)?))
    }

    /// Takes the statements of one file and of what it includes.
    fn add(&mut self, path: &Path, source: Source, depth: usize) {
        let (file, text) = (to_u32(self.sources.len()), Arc::clone(&source.text));
        self.sources.push(source);
        let identity = self.identity.take();
        self.open.extend(identity);
        self.done.extend(identity);
        let items = parser::parse(file, &text, &mut self.words, &mut self.errors);
        for item in items {
            if let Item::Include(name) = &item {
                let wanted = crate::tokens::plain(&name.value);
                self.include(path, &wanted, name.span, depth);
            }
            self.items.push(item);
        }
        if identity.is_some() {
            self.open.pop();
        }
    }

    fn include(&mut self, from: &Path, wanted: &str, span: Span, depth: usize) {
        let refuse = |message: String| Diagnostic::error(message, span);
        if self.is_text {
            self.errors.push(refuse("a policy that is not in a file includes nothing".to_owned()));
            return;
        }
        if wanted.is_empty() || Path::new(wanted).is_absolute() {
            let error = refuse("an include is relative to the file it stands in".to_owned());
            self.errors.push(error.label("such as \"common.pol\" or \"shared/common.pol\""));
            return;
        }
        if wanted.contains('\0') {
            self.errors.push(refuse("a file name has no NUL".to_owned()));
            return;
        }
        if depth >= DEEPEST || self.sources.len() >= MOST_FILES {
            let limit = format!("a policy has at most {MOST_FILES} files, {DEEPEST} deep");
            self.errors.push(refuse(limit));
            return;
        }
        let path = from.parent().unwrap_or(Path::new("")).join(wanted);
        match self.source(&path) {
            Err(error) => {
                let mut message = format!("{error}");
                if let Some(cause) = std::error::Error::source(&error) {
                    message = format!("{message}: {cause}");
                }
                self.errors.push(refuse(message.replacen("policy", "included file", 1)));
            }
            Ok(source) => {
                let identity = self.identity.unwrap_or_default();
                if self.open.contains(&identity) {
                    self.errors.push(refuse(format!("`{wanted}` includes itself")).label("leave this out"));
                } else if !self.done.contains(&identity) {
                    self.add(&path, source, depth + 1);
                }
                // What two files include counts once.
                self.identity = None;
            }
        }
    }
}
