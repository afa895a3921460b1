//! Asks the broker of a state folder, if one lives.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use portcullis_broker::control::{Answer, Request, Response};

use crate::place::{Place, PlaceError};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// See [`PlaceError`].
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The broker is there and does not answer as it should.
    #[error("the broker of `{}` does not answer", state.display())]
    Broker {
        /// Its state folder.
        state: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The broker says why it cannot.
    #[error("{0}")]
    Refused(String),
    /// The audit log is not readable.
    #[error("cannot read audit log `{}`", path.display())]
    Log {
        /// Folder or file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was asked for is not on record.
    #[error("{0}")]
    Absent(String),
}

/// How long a broker may take to answer, and to end once it has begun to.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks; `None` if no broker serves the folder. One that is just ending is waited for, since it still
/// writes what its programs have done.
///
/// # Errors
/// [`AskError`].
pub fn ask(place: &Place, request: &Request) -> Result<Option<Answer>, AskError> {
    let deadline = Instant::now() + PATIENCE;
    let broker = |source| AskError::Broker { state: place.state.clone(), source };
    loop {
        match exchange(place, request) {
            Ok(Response::Ok(answer)) => return Ok(Some(answer)),
            Ok(Response::Error(why)) => return Err(AskError::Refused(why)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(broker(error)),
            Err(_) if !is_served(place).map_err(broker)? => return Ok(None),
            Err(error) if Instant::now() > deadline => return Err(broker(error)),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn exchange(place: &Place, request: &Request) -> io::Result<Response> {
    let mut stream = UnixStream::connect(place.control_socket())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    if answer.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&answer)?)
}

/// Whether a supervisor holds the folder's lock.
fn is_served(place: &Place) -> io::Result<bool> {
    match fs::File::open(place.lock()) {
        // Shared, so that two that ask at once do not take each other for a supervisor.
        Ok(file) => match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(fs::TryLockError::WouldBlock) => Ok(true),
            Err(fs::TryLockError::Error(error)) => Err(error),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
