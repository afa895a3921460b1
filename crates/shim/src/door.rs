//! The way in to the broker: an inherited connection, or a new one by path.
//!
//! Found once by the constructor, in the environment, and kept in statics, which children inherit. A
//! descriptor of ours is remembered together with its inode: if the program closed the number behind
//! our back and reused it, nothing is ever written there.

use core::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::OnceLock;

use libc::c_int;
use portcullis_wire::frame::LOWEST_FD;

use crate::{channel, own, sys};

/// Where the broker listens, and as whom it must answer.
struct Broker {
    path: libc::sockaddr_un,
    uid: u32,
}

static BROKER: OnceLock<Broker> = OnceLock::new();

/// A descriptor and its inode; 0 is none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Held(pub u64);

impl Held {
    /// Neither descriptor nor inode.
    pub const NONE: Self = Self(0);

    /// Takes note of a socket.
    #[must_use]
    pub fn of(fd: c_int) -> Option<Self> {
        let inode = sys::socket_inode(fd)?;
        Some(Self(u64::from(u32::try_from(fd).ok()?.checked_add(1)?) | u64::from(inode) << 32))
    }

    /// The descriptor.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the low half was made from a descriptor")]
    pub fn fd(self) -> c_int {
        (self.0 as u32).wrapping_sub(1).cast_signed()
    }

    /// Whether the number still is what it was. In a sandbox, which may not allow the question, it is
    /// taken to be so.
    #[must_use]
    pub fn is_ours(self) -> bool {
        self.0 != 0 && (own::sandboxed() || Self::of(self.fd()) == Some(self))
    }
}

static DOOR: AtomicU64 = AtomicU64::new(0);

/// Descriptors that the program shall not see; 0 is a free place, else number + 1.
static HIDDEN: [AtomicI32; 32] = [const { AtomicI32::new(0) }; 32];
/// How many are in use, so that the usual question is one load.
static HIDDEN_FROM: AtomicU32 = AtomicU32::new(u32::MAX);

/// Whether a descriptor is one of ours.
#[must_use]
pub fn hides(fd: c_int) -> bool {
    match u32::try_from(fd) {
        Ok(n) if n >= HIDDEN_FROM.load(Ordering::Relaxed) => {
            HIDDEN.iter().any(|place| place.load(Ordering::Relaxed) == fd.wrapping_add(1))
        }
        _ => false,
    }
}

/// All descriptors of ours, in no order.
pub fn hidden() -> impl Iterator<Item = c_int> {
    HIDDEN.iter().map(|place| place.load(Ordering::Relaxed)).filter(|&n| n != 0).map(|n| n - 1)
}

/// Notes a descriptor as ours. In a vfork(2) child it is not noted: the parent has no such descriptor.
pub fn hide(fd: c_int) {
    if own::borrowed() {
        return;
    }
    if let Ok(n) = u32::try_from(fd) {
        HIDDEN_FROM.fetch_min(n, Ordering::Relaxed);
    }
    for place in &HIDDEN {
        if place.compare_exchange(0, fd.wrapping_add(1), Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return;
        }
    }
}

/// Takes back [`hide`].
pub fn unhide(fd: c_int) {
    if own::borrowed() {
        return;
    }
    for place in &HIDDEN {
        let _ = place.compare_exchange(fd.wrapping_add(1), 0, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Moves a fresh descriptor out of the program's way, close-on-exec. If there is no room up there, it
/// stays where it is.
#[must_use]
pub fn raise(fd: c_int) -> c_int {
    for lowest in [LOWEST_FD, 200, 60, 20] {
        let high = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, lowest);
        if high >= 0 {
            sys::close(fd);
            return high;
        }
        if high != -libc::EINVAL {
            break; // not because of a low limit: the descriptors are used up
        }
    }
    fd
}

/// Takes in what the environment says. Only the constructor calls it.
pub fn find(broker: Option<&[u8]>, door: Option<&[u8]>) {
    let Some(broker) = broker.and_then(parse) else { return };
    let uid = broker.uid;
    if BROKER.set(broker).is_err() {
        return;
    }
    if let Some(fd) = door.and_then(number)
        && let Ok(fd) = c_int::try_from(fd)
        && fd > 2
        && sys::getsockopt(fd, libc::SO_DOMAIN) == Some(libc::AF_UNIX)
        && sys::getsockopt(fd, libc::SO_TYPE) == Some(libc::SOCK_SEQPACKET)
        && sys::peer_credentials(fd).is_some_and(|peer| peer.uid == uid)
    {
        sys::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
        channel::bound(fd); // whoever opened it may not have
        let kept = if fd >= LOWEST_FD { fd } else { raise(fd) };
        if let Some(held) = Held::of(kept) {
            hide(held.fd());
            DOOR.store(held.0, Ordering::Release);
            return;
        }
    }
    reopen();
}

/// The door, if it is open.
#[must_use]
pub fn door() -> Held {
    let door = Held(DOOR.load(Ordering::Acquire));
    if door.is_ours() { door } else { Held::NONE }
}

/// Opens another door by path, in place of one that is lost. `None`: nobody answers there who should.
pub fn reopen() -> Option<Held> {
    let broker = BROKER.get()?;
    if own::sandboxed() {
        return None;
    }
    let fd = sys::seqpacket();
    if fd < 0 {
        return None;
    }
    let fd = raise(fd);
    let held = Held::of(fd);
    channel::bound(fd);
    let answers = sys::connect_unix(fd, &broker.path)
        && sys::peer_credentials(fd).is_some_and(|peer| peer.uid == broker.uid);
    let Some(held) = held.filter(|_| answers) else {
        sys::close(fd);
        return None;
    };
    if own::borrowed() {
        return Some(held); // for this child alone; closed by its exec
    }
    hide(fd);
    let was = Held(DOOR.swap(held.0, Ordering::AcqRel));
    if was != Held::NONE {
        if was.is_ours() {
            sys::close(was.fd());
        }
        unhide(was.fd());
    }
    Some(held)
}

/// Gives the door another number, because the program wants this one (dup2).
pub fn make_way(fd: c_int) {
    let door = Held(DOOR.load(Ordering::Acquire));
    if door.0 == 0 || door.fd() != fd || own::borrowed() {
        return;
    }
    let moved = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, LOWEST_FD);
    if moved >= 0
        && door.is_ours()
        && let Some(held) = Held::of(moved)
    {
        hide(moved);
        DOOR.store(held.0, Ordering::Release);
    }
    unhide(fd);
}

fn parse(text: &[u8]) -> Option<Broker> {
    let colon = text.iter().rposition(|&b| b == b':')?;
    let (path, uid) = (text.get(..colon)?, text.get(colon + 1..)?);
    let mut address =
        libc::sockaddr_un { sun_family: u16::try_from(libc::AF_UNIX).ok()?, sun_path: [0; 108] };
    if path.is_empty() || path.len() >= address.sun_path.len() {
        return None;
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = from.cast_signed();
    }
    Some(Broker { path: address, uid: u32::try_from(number(uid)?).ok()? })
}

fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 10 {
        return None;
    }
    text.iter().try_fold(0u64, |sum, &b| {
        let digit = b.checked_sub(b'0').filter(|d| *d < 10)?;
        Some(sum * 10 + u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_names_path_and_uid() {
        let it = parse(b"/run/a:b.sock:61990").unwrap();
        assert_eq!(it.uid, 61990);
        assert_eq!(it.path.sun_path[4].cast_unsigned(), b'/');
        assert!(parse(b"/run/a.sock").is_none());
        assert!(parse(b"/run/a.sock:-1").is_none());
        assert!(parse(b":0").is_none());
    }

    #[test]
    fn a_reused_number_is_not_ours() {
        let [a, b] = sys::pair().unwrap();
        let held = Held::of(a).unwrap();
        assert!(held.is_ours());
        assert_eq!(held.fd(), a);
        sys::close(a);
        assert!(!held.is_ours());
        sys::close(b);
    }
}
