//! How the supervisor hands the kernel's ends over to a broker: a `SOCK_SEQPACKET` pair, on which each
//! message is one letter and descriptors.
//!
//! | letter | descriptors |
//! |---|---|
//! | `B` | the backstop, as `portcullis_backstop::load_for_another` gives it |
//! | `T` | the guard's listener of one tree |

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
        socketpair,
    },
};

/// One message.
#[derive(Debug)]
pub enum Handed {
    /// The backstop. Its sender keeps no copy: the last one's closing is the broker's end.
    Backstop(Vec<OwnedFd>),
    /// The guard's listener of one tree.
    Tree(OwnedFd),
}

/// The supervisor's end and the broker's.
///
/// # Errors
/// As socketpair(2).
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Hands one thing over.
///
/// # Errors
/// As sendmsg(2).
pub fn send(link: BorrowedFd<'_>, handed: &Handed) -> io::Result<()> {
    let (letter, fds): (&[u8], Vec<RawFd>) = match handed {
        Handed::Backstop(fds) => (b"B", fds.iter().map(AsRawFd::as_raw_fd).collect()),
        Handed::Tree(fd) => (b"T", vec![fd.as_raw_fd()]),
    };
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(link.as_raw_fd(), &[IoSlice::new(letter)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Takes the next, without waiting. `None`: the other end is closed.
///
/// # Errors
/// `WouldBlock`: there is none. `InvalidData`: not one of ours.
pub fn receive(link: BorrowedFd<'_>) -> io::Result<Option<Handed>> {
    let mut letter = [0];
    let mut space = cmsg_space!([RawFd; 32]);
    let mut parts = [IoSliceMut::new(&mut letter)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let got = recvmsg::<()>(link.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            fds.extend(raw.into_iter().map(own));
        }
    }
    if got.bytes == 0 {
        return Ok(None);
    }
    match (&letter, fds.len()) {
        (b"B", _) => Ok(Some(Handed::Backstop(fds))),
        (b"T", 1) => Ok(fds.pop().map(Handed::Tree)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[expect(unsafe_code, reason = "nix hands out received descriptors as numbers")]
fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us (SCM_RIGHTS); nobody else has it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_is_handed_over_arrives() {
        let (ours, theirs) = pair().unwrap();
        let fd = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        send(ours.as_fd(), &Handed::Backstop(vec![fd(), fd(), fd()])).unwrap();
        send(ours.as_fd(), &Handed::Tree(fd())).unwrap();
        assert!(matches!(receive(theirs.as_fd()), Ok(Some(Handed::Backstop(fds))) if fds.len() == 3));
        assert!(matches!(receive(theirs.as_fd()), Ok(Some(Handed::Tree(_)))));
        assert_eq!(receive(theirs.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(ours);
        assert!(receive(theirs.as_fd()).unwrap().is_none());
    }
}
