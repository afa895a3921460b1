//! Everything that can go wrong here.

use std::{io, path::PathBuf};

/// Why the backstop could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackstopError {
    /// This build was made without it.
    #[error("this build has no kernel backstop (PORTCULLIS_NO_BACKSTOP was set)")]
    NotBuiltIn,
    /// The kernel does not tell where its structures' fields are.
    #[error("the kernel has no type information in /sys/kernel/btf/vmlinux (CONFIG_DEBUG_INFO_BTF)")]
    NoTypes(#[source] io::Error),
    /// The object was refused as a whole.
    #[error("the kernel did not take the backstop's maps and programs")]
    Load(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// One program was refused.
    #[error("the kernel did not take the backstop's program `{program}`")]
    Program {
        /// Which.
        program: String,
        /// Why; the verifier's words are in it.
        #[source]
        source: io::Error,
    },
    /// The object lacks something that its source has.
    #[error("the backstop's object has no `{0}`")]
    Missing(&'static str),
    /// A map could not be read or written.
    #[error("the backstop's map `{map}` cannot be used")]
    Map {
        /// Which.
        map: &'static str,
        /// Why.
        #[source]
        source: aya::maps::MapError,
    },
    /// There is no room for another process or grant.
    #[error("the backstop's map `{0}` is full")]
    Full(&'static str),
    /// More separate ranges of ports than an entry holds.
    #[error("{found} ranges of ports meet in one prefix, and {most} fit")]
    TooManyRanges {
        /// As many.
        found: usize,
        /// The limit.
        most: usize,
    },
    /// The caller's process ids are not the kernel's: it lives in a container.
    #[error(
        "process ids here are not the kernel's own (a pid namespace); the backstop cannot name processes"
    )]
    ForeignPids,
    /// No cgroup v2 hierarchy is mounted.
    #[error("no cgroup v2 hierarchy is mounted")]
    NoHierarchy,
    /// A process is not in the cgroup v2 hierarchy that is visible here.
    #[error("process {0} is in no cgroup that is visible here")]
    NoCgroup(u32),
    /// A cgroup cannot be made, entered or removed.
    #[error("cannot {what} cgroup `{}`", path.display())]
    Cgroup {
        /// What was tried.
        what: &'static str,
        /// Its folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The programs could not be put on a cgroup or taken off.
    #[error("cannot {what} program `{hook}`")]
    Attach {
        /// What was tried.
        what: &'static str,
        /// Which.
        hook: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel could not be asked who a thread is.
    #[error("cannot ask the kernel who a thread is")]
    Identify(#[source] io::Error),
    /// What was handed over is not one set of the backstop's descriptors.
    #[error("{found} descriptors were handed over instead of {wanted}")]
    HandedOver {
        /// As many came.
        found: usize,
        /// As many make a set.
        wanted: usize,
    },
}
