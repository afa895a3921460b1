//! Messages over `SOCK_SEQPACKET`, with the writer as the kernel names it.

use std::{
    io::{self, IoSlice},
    mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};

/// `SO_PASSPIDFD` (asm-generic/socket.h; Linux 6.5).
const SO_PASSPIDFD: i32 = 76;
/// `SCM_PIDFD` (linux/socket.h; Linux 6.5).
const SCM_PIDFD: i32 = 4;

/// Room for one frame and a bit, so that a longer one is told apart.
pub const ROOM: usize = 256;

/// Who wrote a message, by the kernel's word.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Writer {
    /// Process id (of the thread group) in this process's namespace.
    pub pid: i32,
    /// Real user id.
    pub uid: u32,
    /// Real group id.
    pub gid: u32,
}

/// One message.
#[derive(Debug)]
pub struct Message {
    bytes: [u8; ROOM],
    length: usize,
    /// Bytes or descriptors did not fit.
    pub truncated: bool,
    /// The writer; `None` if the message was sent before [`name_writers`].
    pub writer: Option<Writer>,
    /// The writer's pidfd, where the kernel has `SO_PASSPIDFD`.
    pub pidfd: Option<OwnedFd>,
    /// What was attached.
    pub attached: Vec<OwnedFd>,
}

impl Message {
    /// What was written.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// Makes the kernel name the writer of every message from now on; for an accepted socket the
/// listener passes it on. Where `SO_PASSPIDFD` is missing the pid alone comes.
///
/// # Errors
/// Not a Unix socket.
pub fn name_writers(socket: BorrowedFd<'_>) -> io::Result<()> {
    setsockopt(&socket, sockopt::PassCred, &true)?;
    let on: i32 = 1;
    // SAFETY: `on` is readable for its size; a kernel without this option says ENOPROTOOPT.
    #[expect(unsafe_code, reason = "nix 0.31 has no SO_PASSPIDFD")]
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSPIDFD,
            (&raw const on).cast(),
            mem::size_of_val(&on).try_into().unwrap_or(4),
        );
    }
    Ok(())
}

/// Control data: credentials, a pidfd, and up to two attached descriptors.
#[repr(C, align(8))]
struct Control([u8; 128]);

/// Takes one message without waiting. `None`: the other end hung up.
///
/// # Errors
/// `WouldBlock` if there is none; `EMFILE` leaves descriptors out and shows as `truncated`.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Message>> {
    let mut message = Message {
        bytes: [0; ROOM],
        length: 0,
        truncated: false,
        writer: None,
        pidfd: None,
        attached: Vec::new(),
    };
    let mut control = Control([0; 128]);
    let mut part = libc::iovec { iov_base: message.bytes.as_mut_ptr().cast(), iov_len: ROOM };
    // SAFETY: all fields of msghdr are integers and pointers, for which zero is valid.
    #[expect(unsafe_code, reason = "msghdr has private padding on some targets")]
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = mem::size_of::<Control>();
    // SAFETY: `header` points at one iovec over `message.bytes` and at `control`, both of the
    // lengths given and alive during the call.
    #[expect(unsafe_code, reason = "nix drops SCM_PIDFD's descriptor unseen")]
    let got = unsafe {
        libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC)
    };
    let Ok(got) = usize::try_from(got) else { return Err(io::Error::last_os_error()) };
    message.length = got.min(ROOM);
    message.truncated = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    let filled = header.msg_controllen.min(control.0.len());
    read_control(control.0.get(..filled).unwrap_or_default(), &mut message);
    Ok((got != 0).then_some(message))
}

/// Reads control messages (cmsg(3)): length, level, type, data, each aligned to 8.
fn read_control(mut rest: &[u8], into: &mut Message) {
    const HEADER: usize = mem::size_of::<libc::cmsghdr>();
    fn word(bytes: &[u8], at: usize) -> Option<i32> {
        Some(i32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
    }
    while let Some(length) = rest.get(..8).and_then(|b| b.try_into().ok()).map(usize::from_ne_bytes) {
        let (Some(level), Some(kind), Some(data)) = (word(rest, 8), word(rest, 12), rest.get(HEADER..length))
        else {
            return;
        };
        match (level, kind) {
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                if let (Some(pid), Some(uid), Some(gid)) = (word(data, 0), word(data, 4), word(data, 8)) {
                    into.writer = Some(Writer { pid, uid: uid.cast_unsigned(), gid: gid.cast_unsigned() });
                }
            }
            (libc::SOL_SOCKET, SCM_PIDFD) => into.pidfd = word(data, 0).and_then(own),
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                into.attached.extend(data.chunks_exact(4).filter_map(|fd| word(fd, 0)).filter_map(own));
            }
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(8)..).unwrap_or_default();
    }
}

fn own(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: the kernel has just put this descriptor into our table for this message, and it is
    // named once.
    #[expect(unsafe_code, reason = "takes ownership of a number")]
    (number >= 0).then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sends one message with descriptors attached, without waiting and without `SIGPIPE`.
///
/// # Errors
/// `WouldBlock` if the reader is behind, `EPIPE` if it is gone.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], attached: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<RawFd> = attached.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control: &[_] = if numbers.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn the_kernel_names_the_writer_and_hands_over_what_was_attached() {
        let (ours, theirs) = pair();
        name_writers(ours.as_fd()).unwrap();
        let (a, _b) = pair();
        send(theirs.as_fd(), b"hello", &[a.as_fd()]).unwrap();
        let got = receive(ours.as_fd()).unwrap().unwrap();
        assert_eq!(got.bytes(), b"hello");
        assert_eq!(got.writer.unwrap().pid, std::process::id().cast_signed());
        assert_eq!(got.attached.len(), 1);
        assert!(!got.truncated);
        drop(theirs);
        assert!(receive(ours.as_fd()).unwrap().is_none());
    }

    #[test]
    fn too_many_descriptors_are_closed_and_said_so() {
        let (ours, theirs) = pair();
        name_writers(ours.as_fd()).unwrap();
        let (a, _b) = pair();
        let many = [a.as_fd(); 100];
        send(theirs.as_fd(), b"x", &many).unwrap();
        let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let got = receive(ours.as_fd()).unwrap().unwrap();
        assert!(got.truncated && got.attached.len() < 30);
        drop(got);
        assert_eq!(std::fs::read_dir("/proc/self/fd").unwrap().count(), before);
    }

    #[test]
    fn a_long_message_is_told_apart() {
        let (ours, theirs) = pair();
        send(theirs.as_fd(), &[0; 4096], &[]).unwrap();
        assert!(receive(ours.as_fd()).unwrap().unwrap().truncated);
    }
}
