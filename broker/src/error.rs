//! Why a broker cannot serve.

use std::{io, path::PathBuf};

/// Why a broker cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// The state folder is missing, or cannot be looked at.
    #[error("cannot use state folder `{}`", path.display())]
    StateFolder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The state folder belongs to someone else.
    #[error("state folder `{}` belongs to uid {owner}, not to {expected}", path.display())]
    ForeignState {
        /// The folder.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who should.
        expected: u32,
    },
    /// Others may write to the state folder.
    #[error("state folder `{}` is writable by others (mode {mode:04o}); chmod go-w it", path.display())]
    LooseState {
        /// The folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The audit log cannot be opened or written.
    #[error("cannot write audit log in `{}`", path.display())]
    AuditLog {
        /// The folder of the log.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The settings file is unreadable or wrong.
    #[error("settings in `{}`: {reason}", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, over one or more lines.
        reason: String,
    },
    /// The policy that was to be in force first is none; the text has its own layout.
    #[error("the policy cannot be used: {0}")]
    Policy(String),
    /// A kernel facility that the broker cannot do without failed.
    #[error("{what} failed")]
    Kernel {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Privileges could not be dropped.
    #[error("cannot drop privileges to uid {uid}")]
    Privileges {
        /// The user to become.
        uid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl BrokerError {
    /// Makes [`Self::Kernel`] out of what a call returned; for `map_err`.
    pub(crate) fn kernel<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Kernel { what, source: source.into() }
    }
}
