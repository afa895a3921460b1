//! socket, connect, bind, listen, accept, and the names of sockets.
#![expect(unsafe_code, reason = "works on the program's memory and makes its calls")]

use libc::{c_int, sockaddr, socklen_t};
use portcullis_wire::{Addr, Flags, OpCode, Request, is_token};

use crate::{
    Errno, channel, dgram,
    gate::{call, call_cancellable},
    hints::{self, CONNECTING, LISTENS, PERMITTED, Sock, WATCHED},
    judge::{Call, Op, Permit, judge},
    own,
    peer::Peer,
    shield,
    shield::{fail, returned_int},
    sys::{self, arg},
};

/// Address and length for the kernel: the copy that was judged, or what the program said.
pub fn arguments(peer: Option<&Peer>, addr: *const sockaddr, len: socklen_t) -> (usize, usize) {
    match peer {
        Some(peer) => (peer.as_arg(), peer.len()),
        None => (addr.expose_provenance(), length(len)),
    }
}

fn length(n: socklen_t) -> usize {
    arg(n.cast_signed())
}

/// The name of a socket as the kernel has it, for the broker.
fn name(nr: libc::c_long, fd: c_int) -> Addr {
    if own::sandboxed() {
        return Addr::NONE;
    }
    sys::name(nr, fd).and_then(|(bytes, n)| Peer::from_kernel(bytes, n).internet()).unwrap_or(Addr::NONE)
}

/// What a socket is bound to.
pub fn local(fd: c_int) -> Addr {
    name(libc::SYS_getsockname, fd)
}

/// socket(2).
pub fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    // SAFETY: no pointers.
    let fd = unsafe { call(libc::SYS_socket, &[arg(domain), arg(kind), arg(protocol), 0, 0, 0]) };
    let Ok(fd) = c_int::try_from(fd) else { return -1 };
    if fd < 0 {
        return returned_int(fd as isize);
    }
    let verdict = shield(|| {
        let Some(sock) = Sock::asked(domain, kind, protocol) else {
            hints::forget(fd);
            return Ok(());
        };
        hints::set(fd, sock);
        let raw = matches!(c_int::from(sock.kind), libc::SOCK_RAW | hints::SOCK_PACKET);
        if sock.passes() || (sock.is_internet() && !raw) {
            return Ok(());
        }
        judge(&Call::new(Op::Socket, fd, sock))?;
        hints::mark(fd, PERMITTED, 0);
        Ok(())
    });
    if let Err(errno) = verdict {
        hints::forget(fd);
        sys::close(fd);
        return fail(errno);
    }
    fd
}

/// connect(2).
///
/// # Safety
/// As for connect(2).
pub unsafe fn connect(fd: c_int, addr: *const sockaddr, len: socklen_t) -> c_int {
    let (mut audit_seq, mut asked) = (0, None);
    // SAFETY: by this function's contract.
    let mut peer = unsafe { Peer::copy(addr, len) };
    if let Some(peer) = &mut peer
        && let Err(errno) = shield(|| judge_connect(fd, peer, &mut audit_seq, &mut asked))
    {
        return fail(errno);
    }
    let (at, length) = arguments(peer.as_ref(), addr, len);
    // SAFETY: by this function's contract; a copied address outlives the call; no destructors.
    let result = unsafe { call_cancellable(libc::SYS_connect, &[arg(fd), at, length, 0, 0, 0]) };
    if result < 0
        && let Some(peer) = &peer
    {
        // Asked again, the program names the same address, whichever it was sent to.
        connect_failed(
            fd,
            asked.or_else(|| peer.internet()),
            c_int::try_from(-result).unwrap_or(0),
            // How a protected flow went is known at its other end.
            if asked.is_some() { 0 } else { audit_seq },
        );
    }
    returned_int(result)
}

#[cold]
fn connect_failed(fd: c_int, far: Option<Addr>, errno: c_int, audit_seq: u64) {
    let _ = shield(|| {
        if matches!(errno, libc::EINPROGRESS | libc::EINTR) {
            if let (Some(sock), Some(far)) = (hints::get(fd), far) {
                dgram::remember(Op::Connect, sock, &far);
                hints::mark(fd, CONNECTING, 0);
            }
        } else if errno != libc::EALREADY {
            hints::mark(fd, 0, CONNECTING);
            if audit_seq != 0 {
                let mut outcome = Request::new(OpCode::Outcome, 0);
                (outcome.errno, outcome.audit_seq, outcome.fd) = (errno, audit_seq, fd);
                channel::tell(&mut outcome);
            }
        }
        Ok(())
    });
}

fn judge_connect(
    fd: c_int,
    peer: &mut Peer,
    audit_seq: &mut u64,
    asked: &mut Option<Addr>,
) -> Result<(), Errno> {
    let family = peer.family();
    if family == libc::AF_UNIX {
        return Ok(());
    }
    if family == libc::AF_UNSPEC {
        hints::mark(fd, 0, CONNECTING); // dissolves an association (connect(2))
        return Ok(());
    }
    let Some(sock) = find(fd, family).filter(|sock| !sock.passes()) else { return Ok(()) };
    if !sock.is_internet() {
        // Judged when it was made; if that was elsewhere, now.
        if !sock.has(PERMITTED) {
            judge(&Call::new(Op::Socket, fd, sock))?;
        }
        return Ok(());
    }
    // What is too short for its family, or of another one, the kernel answers.
    let Some(remote) = peer.internet() else { return Ok(()) };
    if sock.has(CONNECTING) && dgram::remembers(Op::Connect, sock, &remote) {
        return Ok(()); // asks how it went
    }
    let mut call = Call::new(Op::Connect, fd, sock);
    call.remote = remote;
    let permit = judge(&call)?;
    *audit_seq = permit.audit_seq;
    if permit.rewrite.is_some() {
        *asked = Some(remote);
        rewrite(&permit, peer);
    }
    Ok(())
}

/// A socket that the program uses with an address of `family`. Where a sandbox forbids to look, it is
/// taken for a stream, which is what programs go on making there.
fn find(fd: c_int, family: c_int) -> Option<Sock> {
    hints::find(fd).or_else(|| {
        let stream = Sock::asked(family, libc::SOCK_STREAM, 0)?;
        own::sandboxed().then_some(stream)
    })
}

/// Puts a token in the place of the address, if that is how the call may go on.
pub fn rewrite(permit: &Permit, peer: &mut Peer) {
    if let Some(token) = &permit.rewrite {
        *peer = Peer::from_wire(token);
    }
}

/// bind(2).
///
/// # Safety
/// As for bind(2).
pub unsafe fn bind(fd: c_int, addr: *const sockaddr, len: socklen_t) -> c_int {
    // SAFETY: by this function's contract.
    let mut peer = unsafe { Peer::copy(addr, len) };
    if let Some(peer) = &mut peer
        && let Err(errno) = shield(|| judge_bind(fd, peer))
    {
        return fail(errno);
    }
    let (at, length) = arguments(peer.as_ref(), addr, len);
    // SAFETY: by this function's contract; a copied address outlives the call.
    returned_int(unsafe { call(libc::SYS_bind, &[arg(fd), at, length, 0, 0, 0]) })
}

fn judge_bind(fd: c_int, peer: &mut Peer) -> Result<(), Errno> {
    let family = peer.family();
    if family == libc::AF_UNIX {
        return Ok(());
    }
    let Some(sock) = find(fd, family).filter(|sock| sock.is_internet()) else { return Ok(()) };
    let domain = c_int::from(sock.domain);
    if family != domain && family != libc::AF_UNSPEC {
        return Ok(());
    }
    let Some(local) = peer.internet_as(domain) else { return Ok(()) };
    let mut call = Call::new(Op::Bind, fd, sock);
    call.local = local;
    if !own::sandboxed() && sys::getsockopt(fd, libc::SO_REUSEPORT).is_some_and(|on| on != 0) {
        call.flags |= Flags::REUSEPORT;
    }
    let permit = judge(&call)?;
    watch(fd, sock, &permit);
    rewrite(&permit, peer);
    Ok(())
}

/// Notes whether the shim must look at the senders of a datagram socket.
pub fn watch(fd: c_int, sock: Sock, permit: &Permit) {
    if !sock.is_stream() && sock.is_internet() {
        if permit.filtered { hints::mark(fd, 0, WATCHED) } else { hints::mark(fd, WATCHED, 0) }
    }
}

/// listen(2).
pub fn listen(fd: c_int, backlog: c_int) -> c_int {
    let port = match shield(|| judge_listen(fd, backlog)) {
        Err(errno) => return fail(errno),
        Ok(port) => port,
    };
    // SAFETY: no pointers.
    let result = unsafe { call(libc::SYS_listen, &[arg(fd), arg(backlog), 0, 0, 0, 0]) };
    if result == 0
        && let (Some(port), Some(sock)) = (port, hints::get(fd))
    {
        hints::set(fd, Sock { flags: sock.flags | LISTENS, extra: u32::from(port), ..sock });
    }
    returned_int(result)
}

/// Gives the port, for sockets that are judged.
fn judge_listen(fd: c_int, backlog: c_int) -> Result<Option<u16>, Errno> {
    let Some(sock) = find(fd, libc::AF_INET).filter(|sock| sock.is_internet()) else { return Ok(None) };
    let mut at = local(fd);
    if at.port == 0 && !own::sandboxed() && sock.is_stream() {
        // listen(2) takes a free port by itself; the verdict is on a port, so it is taken before.
        let mut any =
            Peer::from_wire(&Addr { family: if at.family == 0 { 4 } else { at.family }, ..Addr::NONE });
        judge_bind(fd, &mut any)?;
        // SAFETY: `any` is readable for its length and outlives the call.
        unsafe { call(libc::SYS_bind, &[arg(fd), any.as_arg(), any.len(), 0, 0, 0]) };
        at = local(fd);
    }
    let mut call = Call::new(Op::Listen, fd, sock);
    (call.local, call.backlog) = (at, backlog);
    judge(&call)?;
    Ok(Some(at.port))
}

/// Which of the two calls the program made: a sandbox may know only that one.
#[derive(Clone, Copy)]
pub enum Accept {
    /// accept(2).
    Plain,
    /// accept4(2) with its flags.
    Flags(c_int),
}

/// accept(2) and accept4(2). A refused peer is reset, and the next one is waited for, unless the broker says that there
/// will be none (`ECONNABORTED`).
///
/// # Safety
/// As for accept(2).
pub unsafe fn accept(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t, how: Accept) -> c_int {
    let (nr, flags) = match how {
        Accept::Plain => (libc::SYS_accept, 0),
        Accept::Flags(flags) => (libc::SYS_accept4, arg(flags)),
    };
    let listener = find(fd, libc::AF_INET).filter(|sock| !sock.passes());
    let Some(listener) = listener.filter(|sock| sock.is_internet()) else {
        let args = [arg(fd), addr.expose_provenance(), len.expose_provenance(), flags, 0, 0];
        // SAFETY: by this function's contract; nothing here has a destructor.
        let result = returned_int(unsafe { call_cancellable(nr, &args) });
        if result >= 0 {
            hints::forget(result);
        }
        return result;
    };
    loop {
        let mut bytes = [0u8; 128];
        let mut got = 128u32;
        let args =
            [arg(fd), (&raw mut bytes).expose_provenance(), (&raw mut got).expose_provenance(), flags, 0, 0];
        // SAFETY: both are writable for what accept(2) writes; nothing here has a destructor.
        let result = returned_int(unsafe { call_cancellable(nr, &args) });
        if result < 0 {
            return result;
        }
        let mut peer = Peer::from_kernel(bytes, usize::try_from(got).unwrap_or(0));
        let judged = shield(|| judge_accept(listener, result, &mut peer));
        if judged.is_ok() {
            if !addr.is_null()
                // SAFETY: by this function's contract.
                && let Err(errno) = unsafe { peer.give(addr, len) }
            {
                // As in the kernel, the connection is lost.
                hints::forget(result);
                sys::close(result);
                return fail(errno);
            }
            return result;
        }
        reset(result);
        if judged == Err(Errno(libc::ECONNABORTED)) {
            return fail(Errno(libc::ECONNABORTED));
        }
    }
}

fn judge_accept(listener: Sock, fd: c_int, peer: &mut Peer) -> Result<(), Errno> {
    let sock = Sock { flags: 0, extra: 0, ..listener };
    hints::set(fd, sock);
    let mut call = Call::new(Op::Accept, fd, sock);
    call.local = local(fd);
    if call.local.family == 0 {
        // In a sandbox: the listener's port, as far as it was seen.
        let port = if listener.has(LISTENS) { u16::try_from(listener.extra).unwrap_or(0) } else { 0 };
        call.local = Addr { port, ..Addr::NONE };
    }
    call.remote = peer.internet().unwrap_or(Addr::NONE);
    // The peer of a protected flow is told by its true name.
    rewrite(&judge(&call)?, peer);
    Ok(())
}

/// Closes a connection that was refused, so that the far side sees a reset.
pub fn reset(fd: c_int) {
    hints::forget(fd);
    if !own::sandboxed() {
        sys::setsockopt(fd, libc::SO_LINGER, &libc::linger { l_onoff: 1, l_linger: 0 });
    }
    sys::close(fd);
}

/// getsockname(2) and getpeername(2) of a protected flow: the true name. `None`: the kernel's is true.
///
/// The kernel knows the program's side of a protected flow by a token. Whichever way the descriptor came here
/// (fork, exec, SCM_RIGHTS), that is seen by the address.
///
/// # Safety
/// As for getsockname(2).
pub unsafe fn true_name(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t, remote: bool) -> Option<c_int> {
    if addr.is_null() || len.is_null() {
        return None;
    }
    let name = |nr| sys::name(nr, fd).and_then(|(bytes, n)| Peer::from_kernel(bytes, n).internet());
    let own = |nr| name(nr).filter(|at: &Addr| at.ip().is_some_and(|ip| ip.is_loopback()));
    let is_token = |at: Addr| at.ip().is_some_and(is_token);
    let (local, peer) = if remote {
        (Addr::NONE, own(libc::SYS_getpeername).filter(|at| is_token(*at))?)
    } else {
        // Towards a token the kernel chooses a loopback address; a sandbox may forbid to ask whose it is.
        let local = own(libc::SYS_getsockname)?;
        let peer = if own::sandboxed() {
            Addr::NONE
        } else {
            name(libc::SYS_getpeername).filter(|at| is_token(*at))?
        };
        (local, peer)
    };
    let told = shield(|| {
        let mut request = Request::new(OpCode::Name, 0);
        (request.fd, request.local, request.remote) = (fd, local, peer);
        let reply = channel::ask(&mut request, fd).map_err(|_| Errno(libc::ENOTCONN))?;
        if reply.errno != 0 {
            return Err(Errno(reply.errno));
        }
        Ok(if remote { reply.remote } else { reply.local })
    });
    match told {
        // Nobody answers: the flow is over, or nearly. Better its token than no name.
        Err(_) => None,
        Ok(true_name) if true_name.family == 0 => None,
        Ok(true_name) => {
            // SAFETY: by this function's contract.
            let given = unsafe { Peer::from_wire(&true_name).give(addr, len) };
            Some(given.map_or_else(fail, |()| 0))
        }
    }
}

/// A connection or a listener that was there before this image: inetd, tcpsvd, socket activation. A connection that is
/// refused reads as end-of-file.
pub fn judge_inherited() {
    for fd in 0..10 {
        let internet = |domain: &c_int| matches!(*domain, libc::AF_INET | libc::AF_INET6);
        if sys::getsockopt(fd, libc::SO_DOMAIN).filter(internet).is_none() {
            continue;
        }
        let Some(sock) = hints::find(fd).filter(|sock| sock.is_stream()) else { continue };
        let remote = name(libc::SYS_getpeername, fd);
        let listens = sys::getsockopt(fd, libc::SO_ACCEPTCONN) == Some(1);
        if remote.family == 0 && !listens {
            continue;
        }
        let mut call = Call::new(if listens { Op::Listen } else { Op::Accept }, fd, sock);
        call.flags = Flags::INHERITED;
        (call.local, call.remote) = (local(fd), remote);
        // A listener may be others' as well, and who comes to it is judged at accept in any case.
        if judge(&call).is_err() && !listens {
            close_inherited(fd);
        }
    }
}

fn close_inherited(fd: c_int) {
    // SAFETY: a path that outlives the call.
    let null = unsafe {
        let args =
            [arg(libc::AT_FDCWD), c"/dev/null".as_ptr().expose_provenance(), arg(libc::O_RDWR), 0, 0, 0];
        sys::call(libc::SYS_openat, args)
    };
    // SAFETY: no pointers. Copies of the descriptor elsewhere (the other two of inetd's) end too.
    unsafe { sys::call(libc::SYS_shutdown, [arg(fd), arg(libc::SHUT_RDWR), 0, 0, 0, 0]) };
    match c_int::try_from(null) {
        Ok(null) if null >= 0 => {
            // SAFETY: no pointers; the number is the refused connection's.
            unsafe { sys::call(libc::SYS_dup2, [arg(null), arg(fd), 0, 0, 0, 0]) };
            sys::close(null);
        }
        _ => sys::close(fd),
    }
    hints::forget(fd);
}
