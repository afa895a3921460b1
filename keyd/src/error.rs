//! Why the key daemon ends.

use std::io;

use portcullis_wire::keyd::{HeadError, Kind, Stage};

/// Why the key daemon ends. A request that cannot be done is no such reason: the broker is told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeydError {
    /// The broker asked for what its stage does not allow.
    #[error("request `{kind:?}` is not permitted at stage `{stage:?}`")]
    NotPermitted {
        /// What was asked.
        kind: Kind,
        /// How far the connection was.
        stage: Stage,
    },
    /// The broker sent no frame.
    #[error("the broker sent no request")]
    Frame(#[from] HeadError),
    /// What follows a frame's beginning does not fit its kind.
    #[error("request `{kind:?}` has {bytes} bytes and {descriptors} descriptors, which do not fit it")]
    Shape {
        /// What was asked.
        kind: Kind,
        /// Length of what follows the beginning.
        bytes: usize,
        /// How many descriptors came with it.
        descriptors: usize,
    },
    /// A message was longer than any request.
    #[error("the broker sent a message too long for any request")]
    TooLong,
    /// The connection to the broker broke.
    #[error("cannot talk to the broker")]
    Broker(#[source] io::Error),
    /// A privilege could not be given up.
    #[error("cannot give up privileges: {step}")]
    Privileges {
        /// Which step.
        step: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The host's keys and certificates are not usable.
    #[error(transparent)]
    Identity(#[from] crate::identity::IdentityError),
    /// Tokens cannot be held.
    #[error("cannot hold tokens")]
    Tokens(#[source] io::Error),
    /// The sandbox could not be built.
    #[error("cannot enter the sandbox: {0}")]
    Sandbox(String),
}
