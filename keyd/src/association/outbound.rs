//! Flows that programs of this host open.

use std::{
    io,
    net::{SocketAddr, SocketAddrV4},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, getsockname,
        setsockopt, socket, sockopt,
    },
};
use portcullis_relay::{ClientSide, Role};
use portcullis_wire::{
    Addr,
    keyd::{Flow, Open, Places},
};
use rustls::{pki_types::ServerName, sign::SingleCertAndKey};
use zerocopy::FromZeros;

use super::{Association, Associations, Direction, Joining, LAST_STEP, PATIENCE, as_domain, v4};
use crate::{
    cut::addr,
    diag::Diag,
    sock,
    token::{FAR_PORT, Syn},
};

impl Associations {
    /// Begins a protected flow for a program's socket. Returns its number, and where the program must connect.
    ///
    /// # Errors
    /// `EXDEV` for a socket in another network namespace, `EOPNOTSUPP` for one bound to an interface,
    /// `EAFNOSUPPORT` for one that cannot reach a token, or what bind(2) and connect(2) say at once.
    pub fn open(
        &mut self,
        program: BorrowedFd<'_>,
        ask: &Open,
        json: &[u8],
        diag: &Diag,
    ) -> io::Result<(u64, Places)> {
        if !diag.is_here(program) {
            return Err(Errno::EXDEV.into());
        }
        if sock::bound_interface(program)? != 0 {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let remote = ask.remote.socket_addr().ok_or(Errno::EINVAL)?;
        let is_v6 = sock::domain(program)? == libc::AF_INET6;
        if is_v6 && sock::dual_stack(program).is_err() {
            return Err(Errno::EAFNOSUPPORT.into()); // bound, and to v6 only
        }
        let identity = self.identity(json)?;
        let owner = self.host.members().owner(remote.ip()).map(|member| member.name.clone());
        let is_member = owner.is_some();
        let (verifier, seen) = self.verifier.for_one(owner);
        // A member's key daemon says when its own broker has admitted us; a stock TLS server does not.
        let identity = Arc::new(SingleCertAndKey::from(identity.shown));
        let side = ClientSide::new(Arc::new(verifier), identity, is_member).map_err(io::Error::other)?;

        let wire = far_socket(program, remote, &ask.local)?;
        self.hear_of_deaths()?;
        let token = self.tokens.new_token()?;
        let patience = if ask.patience == 0 { PATIENCE } else { Duration::from_millis(ask.patience.into()) };
        let local = getsockname::<SockaddrStorage>(wire.as_raw_fd()).ok().and_then(|name| addr(&name));
        let inner_remote = as_domain(SocketAddrV4::new(token, FAR_PORT), is_v6);
        let local = local.unwrap_or_default();
        let places = Places { local, remote: ask.remote, inner_local: Addr::NONE, inner_remote };
        let direction = Direction::Outbound { token, cookie: sock::cookie(program)?, syn: None };
        let until = Instant::now() + patience + LAST_STEP;
        // Names are the verifier's business, and none is sent.
        let name = ServerName::IpAddress(remote.ip().into());
        let flow = self.engine.handshake(wire, Role::Client { side, name });
        let id = flow.get();
        let one = Association {
            flow,
            direction,
            places,
            seen,
            admitted: false,
            joining: None,
            running: false,
            until,
        };
        self.insert(id, one);
        self.by_token.insert(token, id);
        Ok((id, places))
    }

    /// A SYN to a token has arrived. One that is not the program's own is refused and changes nothing.
    pub(super) fn take_syn(&mut self, arrived: Syn, diag: &mut Diag) {
        let id = self.by_token.get(&arrived.token).copied();
        let Some((id, one)) = id.and_then(|id| Some((id, self.all.get_mut(&id)?))) else {
            // What it stood for has failed before the program asked.
            let _ = self.tokens.fail(&arrived, libc::ECONNREFUSED);
            return;
        };
        let Direction::Outbound { syn, cookie, .. } = &mut one.direction else { return };
        if syn.is_some() {
            return; // sent again
        }
        let (local, remote) = (v4(arrived.from), Addr::v4(arrived.token, FAR_PORT));
        let flow = Flow { protocol: 6, local, remote, ..Flow::new_zeroed() };
        if diag.look(&flow).ok().flatten().is_none_or(|found| found.cookie != *cookie) {
            let _ = self.tokens.fail(&arrived, libc::ECONNREFUSED);
            return;
        }
        one.places.inner_local = local;
        *syn = Some(arrived);
        if one.admitted {
            self.open_held(id);
        }
    }

    /// Answers a held connect(2), if it is held already.
    pub(super) fn open_held(&mut self, id: u64) {
        let Some(one) = self.all.get_mut(&id) else { return };
        let Direction::Outbound { syn: Some(syn), .. } = &one.direction else {
            return; // its SYN is on the way
        };
        match self.tokens.open(syn) {
            Ok(socket) => one.joining = Some(Joining { socket, until: Instant::now() + LAST_STEP }),
            Err(e) => {
                let errno = e.raw_os_error().unwrap_or(libc::ECONNREFUSED);
                self.stop(id, errno, "cannot answer the program");
            }
        }
    }
}

/// A socket on its way to the far side, from where the program would have been.
fn far_socket(program: BorrowedFd<'_>, remote: SocketAddr, local: &Addr) -> io::Result<OwnedFd> {
    let family = if remote.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let wire = socket(family, SockType::Stream, flags, SockProtocol::Tcp)?;
    setsockopt(&wire, sockopt::TcpNoDelay, &true)?;
    if let Some(local) = local.socket_addr().filter(|it| !it.ip().is_unspecified() || it.port() != 0) {
        // The program holds this port too: both must say that they share it.
        setsockopt(&program, sockopt::ReuseAddr, &true)?;
        setsockopt(&wire, sockopt::ReuseAddr, &true)?;
        if local.is_ipv4() == remote.is_ipv4() {
            bind(wire.as_raw_fd(), &SockaddrStorage::from(local))?;
        }
    }
    match connect(wire.as_raw_fd(), &SockaddrStorage::from(remote)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(wire),
        Err(e) => Err(e.into()),
    }
}
