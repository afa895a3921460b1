//! Ends flows: through the kernel's SOCK_DESTROY, else through the flow's own descriptor.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::sys::socket::{Shutdown, SockaddrStorage, getpeername, getsockname, shutdown};
use portcullis_wire::Addr;
use portcullis_wire::keyd::{CutBy, Flow};

use crate::{diag::Diag, sock};

/// Ends one flow. With its socket, `flow` may be zeroes.
///
/// # Errors
/// `EPERM` without the privilege and without the socket, `EINVAL` for addresses of no flow.
pub fn cut(diag: &mut Diag, flow: &Flow, socket: Option<BorrowedFd<'_>>) -> io::Result<CutBy> {
    let by_name = |done| if done { CutBy::Destroy } else { CutBy::Gone };
    let Some(socket) = socket else {
        return diag.destroy(flow, 0).map(by_name);
    };
    if getpeername::<SockaddrStorage>(socket.as_raw_fd()).is_err() {
        return Ok(CutBy::Gone);
    }
    if diag.is_here(socket) {
        let destroyed = of(socket).and_then(|flow| {
            let interface = sock::bound_interface(socket).unwrap_or(0);
            diag.destroy(&flow, interface)
        });
        if let Ok(true) = destroyed {
            return Ok(CutBy::Destroy);
        }
    }
    if sock::protocol(socket)? == libc::IPPROTO_TCP && sock::disconnect(socket).is_ok() {
        return Ok(CutBy::Disconnect);
    }
    match shutdown(socket.as_raw_fd(), Shutdown::Both) {
        Ok(()) => Ok(CutBy::Shutdown),
        Err(nix::Error::ENOTCONN) => Ok(CutBy::Gone),
        Err(e) => Err(e.into()),
    }
}

/// What the kernel knows of a connected socket.
fn of(socket: BorrowedFd<'_>) -> io::Result<Flow> {
    let local: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    let remote: SockaddrStorage = getpeername(socket.as_raw_fd())?;
    let protocol = u8::try_from(sock::protocol(socket)?).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (Some(local), Some(remote)) = (addr(&local), addr(&remote)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    Ok(Flow { cookie: sock::cookie(socket)?, protocol, reserved: [0; 7], local, remote })
}

/// An address in the form of the wire; `None` if it is of no Internet family.
pub fn addr(from: &SockaddrStorage) -> Option<Addr> {
    let v4 = from.as_sockaddr_in().map(|a| Addr::v4(a.ip(), a.port()));
    v4.or_else(|| from.as_sockaddr_in6().map(|a| Addr::v6(a.ip(), a.port(), a.scope_id())))
}
