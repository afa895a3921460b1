//! The only part that touches files.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    check,
    diagnostic::Diagnostics,
    parser,
    policy::{Loaded, Policy},
    source::Source,
};

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
    /// It is no valid policy.
    #[error("{0}")]
    Policy(Diagnostics),
}

pub(crate) fn load(path: &Path) -> Result<Loaded, LoadError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| LoadError::Read { path: path.to_owned(), source })?;
    parse(&path.display().to_string(), &text).map_err(LoadError::Policy)
}

pub(crate) fn parse(name: &str, text: &str) -> Result<Loaded, Diagnostics> {
    let mut errors = Diagnostics::default();
    let sources = vec![Source::new(name, text)];
    let items = parser::parse(0, text, &mut errors);
    finish(items, sources, errors)
}

fn finish(
    items: Vec<crate::syntax::Item>,
    sources: Vec<Source>,
    mut errors: Diagnostics,
) -> Result<Loaded, Diagnostics> {
    let checked = check::check(items, &sources, &mut errors);
    let errors = errors.with_sources(&sources);
    if errors.has_errors() {
        return Err(errors);
    }
    Ok(Loaded { policy: Policy::compile(checked, sources), warnings: errors })
}
