//! recvfrom, recvmsg, recvmmsg on datagram sockets whose senders the kernel does not filter (no
//! privileged side): a datagram from a refused sender is dropped, and the next one taken.
//!
//! For every other socket this costs one look at its hint.
#![expect(unsafe_code, reason = "works on the program's memory and makes its calls")]

use libc::{c_int, c_uint, c_void, mmsghdr, msghdr, sockaddr, socklen_t, timespec};

use crate::{
    Errno, dgram,
    gate::call_cancellable,
    hints::{self, Sock, WATCHED},
    judge::{Call, Op, judge},
    own,
    peer::Peer,
    shield,
    shield::{fail, returned, returned_int},
    stream,
    sys::{self, arg},
};

/// The socket, if its senders are looked at.
#[inline]
fn watched(fd: c_int, flags: c_int) -> Option<Sock> {
    hints::get(fd).filter(|sock| sock.has(WATCHED) && flags & libc::MSG_ERRQUEUE == 0)
}

/// Whether a datagram from `far` may be seen.
fn admitted(fd: c_int, sock: Sock, far: &Peer) -> bool {
    shield(|| {
        let Some(remote) = far.internet() else { return Ok(()) };
        if dgram::remembers(Op::Send, sock, &remote) || dgram::remembers(Op::Receive, sock, &remote) {
            return Ok(());
        }
        let mut call = Call::new(Op::Receive, fd, sock);
        (call.local, call.remote) = (stream::local(fd), remote);
        judge(&call)?;
        dgram::remember(Op::Receive, sock, &remote);
        Ok::<(), Errno>(())
    })
    .is_ok()
}

/// After a look at a refused datagram with `MSG_PEEK`: it is still there, and must go.
fn discard(fd: c_int, flags: c_int) {
    if flags & libc::MSG_PEEK != 0 {
        let args = [arg(fd), 0, 0, arg(libc::MSG_DONTWAIT), 0, 0];
        // SAFETY: nothing is written: the buffer has no length.
        unsafe { sys::call(libc::SYS_recvfrom, args) };
    }
}

/// recvfrom(2), and recv(2) when `addr` is null.
///
/// # Safety
/// As for recvfrom(2).
pub unsafe fn recvfrom(
    fd: c_int,
    buffer: *mut c_void,
    size: usize,
    flags: c_int,
    addr: *mut sockaddr,
    len: *mut socklen_t,
) -> isize {
    let Some(sock) = watched(fd, flags) else {
        let args = [
            arg(fd),
            buffer.expose_provenance(),
            size,
            arg(flags),
            addr.expose_provenance(),
            len.expose_provenance(),
        ];
        // SAFETY: by this function's contract; no destructors.
        return returned(unsafe { call_cancellable(libc::SYS_recvfrom, &args) });
    };
    loop {
        let mut bytes = [0u8; 128];
        let mut got = 128u32;
        let args = [
            arg(fd),
            buffer.expose_provenance(),
            size,
            arg(flags),
            (&raw mut bytes).expose_provenance(),
            (&raw mut got).expose_provenance(),
        ];
        // SAFETY: by this function's contract, and both locals are writable; no destructors.
        let result = returned(unsafe { call_cancellable(libc::SYS_recvfrom, &args) });
        if result < 0 {
            return result;
        }
        let far = Peer::from_kernel(bytes, usize::try_from(got).unwrap_or(0));
        if admitted(fd, sock, &far) {
            if !addr.is_null()
                // SAFETY: by this function's contract.
                && let Err(errno) = unsafe { far.give(addr, len) }
            {
                return fail(errno) as isize;
            }
            return result;
        }
        discard(fd, flags);
    }
}

/// recvmsg(2).
///
/// # Safety
/// As for recvmsg(2).
pub unsafe fn recvmsg(fd: c_int, message: *mut msghdr, flags: c_int) -> isize {
    let Some(sock) = watched(fd, flags).filter(|_| sys::writable(message.cast(), size_of::<msghdr>())) else {
        let args = [arg(fd), message.expose_provenance(), arg(flags), 0, 0, 0];
        // SAFETY: by this function's contract; no destructors.
        return returned(unsafe { call_cancellable(libc::SYS_recvmsg, &args) });
    };
    // SAFETY: by this function's contract.
    returned(unsafe { next_message(fd, sock, message, flags, false) })
}

/// Waits as recvmsg(2) does, and says whether a message is what came. An error that came stays for the next call.
fn comes(fd: c_int, flags: c_int) -> bool {
    let mut it = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let args = [(&raw mut it).expose_provenance(), 1, arg(sys::patience(fd, flags)), 0, 0, 0];
    // SAFETY: `it` is one, and writable; no destructors.
    unsafe { call_cancellable(libc::SYS_poll, &args) == 1 && it.revents & libc::POLLERR == 0 }
}

/// The next message that may be seen: what the kernel says, without `errno`. What went wrong after others were taken
/// (`later`) is left for the next call to hear, as recvmmsg(2) does.
///
/// # Safety
/// As for recvmsg(2), and `message` is readable and writable.
unsafe fn next_message(fd: c_int, sock: Sock, message: *mut msghdr, flags: c_int, later: bool) -> isize {
    loop {
        if later && !own::sandboxed() && !comes(fd, flags) {
            return -(libc::EAGAIN as isize);
        }
        let mut bytes = [0u8; 128];
        // SAFETY: by this function's contract.
        let asked = unsafe { message.read() };
        if !asked.msg_name.is_null() && asked.msg_namelen.cast_signed() < 0 {
            return -(libc::EINVAL as isize); // before anything is taken
        }
        let mut copy = asked;
        copy.msg_name = (&raw mut bytes).cast();
        copy.msg_namelen = 128;
        let args = [arg(fd), (&raw mut copy).expose_provenance(), arg(flags), 0, 0, 0];
        // SAFETY: the program's buffers by this function's contract, and ours; no destructors.
        let result = unsafe { call_cancellable(libc::SYS_recvmsg, &args) };
        if result < 0 {
            return result;
        }
        let far = Peer::from_kernel(bytes, usize::try_from(copy.msg_namelen).unwrap_or(0));
        if admitted(fd, sock, &far) {
            let mut length = asked.msg_namelen;
            if !asked.msg_name.is_null()
                // SAFETY: by this function's contract.
                && let Err(errno) = unsafe { far.give(asked.msg_name.cast(), &raw mut length) }
            {
                return -(errno.0 as isize);
            }
            (copy.msg_name, copy.msg_namelen) = (asked.msg_name, length);
            // SAFETY: by this function's contract.
            unsafe { message.write(copy) };
            return result;
        }
        discard(fd, flags);
    }
}

/// recvmmsg(2). From a watched socket the messages are taken one by one, for as long as the kernel would go on.
///
/// # Safety
/// As for recvmmsg(2).
pub unsafe fn recvmmsg(
    fd: c_int,
    vector: *mut mmsghdr,
    count: c_uint,
    flags: c_int,
    timeout: *mut timespec,
) -> c_int {
    let Some(sock) = watched(fd, flags).filter(|_| count > 0) else {
        let args = [
            arg(fd),
            vector.expose_provenance(),
            arg(count.cast_signed()),
            arg(flags),
            timeout.expose_provenance(),
            0,
        ];
        // SAFETY: by this function's contract; no destructors.
        return returned_int(unsafe { call_cancellable(libc::SYS_recvmmsg, &args) });
    };
    let began = sys::nanoseconds(libc::CLOCK_MONOTONIC);
    if !timeout.is_null() && !sys::writable(timeout.cast(), size_of::<timespec>()) {
        return fail(Errno(libc::EFAULT));
    }
    // SAFETY: null, or the kernel has just been there.
    let within = match unsafe { timeout.as_ref() } {
        None => u64::MAX,
        Some(time) => match nanoseconds(time) {
            Some(within) => within,
            None => return fail(Errno(libc::EINVAL)),
        },
    };
    let mut flags = flags;
    let mut done = 0;
    while done < count.min(1024) {
        let one = vector.wrapping_add(usize::try_from(done).unwrap_or(0));
        let result = if sys::writable(one.cast(), size_of::<mmsghdr>()) {
            // SAFETY: by this function's contract.
            unsafe { next_message(fd, sock, one.cast(), flags & !libc::MSG_WAITFORONE, done > 0) }
        } else {
            -(libc::EFAULT as isize)
        };
        let Ok(got) = c_uint::try_from(result) else {
            return if done == 0 { returned_int(result) } else { c_int::try_from(done).unwrap_or(0) };
        };
        // SAFETY: the kernel has just been there.
        unsafe { (*one).msg_len = got };
        done += 1;
        if flags & libc::MSG_WAITFORONE != 0 {
            flags |= libc::MSG_DONTWAIT;
        }
        let left = within.saturating_sub(sys::nanoseconds(libc::CLOCK_MONOTONIC).saturating_sub(began));
        // SAFETY: null or writable by this function's contract.
        if let Some(time) = unsafe { timeout.as_mut() } {
            (time.tv_sec, time.tv_nsec) = ((left / SECOND).cast_signed(), (left % SECOND).cast_signed());
        }
        if left == 0 {
            break;
        }
    }
    c_int::try_from(done).unwrap_or(0)
}

/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;

/// A time as the kernel takes it; `None` where that says `EINVAL`.
fn nanoseconds(time: &timespec) -> Option<u64> {
    let (seconds, rest) = (u64::try_from(time.tv_sec).ok()?, u64::try_from(time.tv_nsec).ok()?);
    (rest < SECOND).then(|| seconds.saturating_mul(SECOND).saturating_add(rest))
}
