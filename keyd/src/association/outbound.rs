//! Flows that programs of this host open.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, getsockname,
        setsockopt, socket, sockopt,
    },
};
use portcullis_relay::Role;
use portcullis_wire::{
    Addr,
    keyd::{Flow, Open, Places},
};
use rustls::pki_types::ServerName;
use zerocopy::FromZeros;

use super::{Association, Associations, Direction, PATIENCE, Placed, as_domain, fits};
use crate::{cut::addr, diag::Diag, packet::Syn, sock};

/// How long the kernel may try to connect: tcp_syn_retries (tcp(7)) take some two minutes.
const CONNECTING: Duration = Duration::from_secs(150);

impl Associations {
    /// Begins a protected flow for a program's socket. Returns its number, and where the program must connect.
    ///
    /// # Errors
    /// Those of [`fits`] and of [`Self::shows`], `EAFNOSUPPORT` for one that cannot reach a token, or what bind(2) and connect(2) say at
    /// once.
    pub fn open(
        &mut self,
        program: BorrowedFd<'_>,
        ask: &Open,
        json: &[u8],
        diag: &Diag,
    ) -> io::Result<Placed> {
        fits(program, diag)?;
        let remote = ask.remote.socket_addr().ok_or(Errno::EINVAL)?;
        let is_v6 = sock::domain(program)? == libc::AF_INET6;
        // One that is bound to IPv6, or to IPv6 alone, cannot reach a token of IPv4.
        let own = getsockname::<SockaddrStorage>(program.as_raw_fd()).ok();
        let own = own.as_ref().and_then(SockaddrStorage::as_sockaddr_in6).map(|own| own.ip());
        let bound = own.filter(|ip| !ip.is_unspecified());
        let six = is_v6
            && match bound {
                Some(ip) => ip.to_ipv4_mapped().is_none(),
                None => sock::dual_stack(program).is_err(),
            };
        let shows = self.shows(json)?;
        // A member's key daemon says when its own broker has admitted us; a stock TLS server does not.
        let (bond, of, is_member) = self.bind(shows, &ask.remote);
        let side = bond.client(is_member)?;

        let wire = far_socket(program, remote, &ask.local)?;
        self.hear_of_deaths()?;
        let token = self.tokens.far(six, |at| self.by_token.contains_key(at))?;
        let cookie = sock::cookie(program)?;
        self.tokens.guard(program, cookie)?;
        let patience = if ask.patience == 0 {
            CONNECTING + PATIENCE
        } else {
            Duration::from_millis(ask.patience.into())
        };
        let local = getsockname::<SockaddrStorage>(wire.as_raw_fd()).ok().and_then(|name| addr(&name));
        let (at, inner_remote) = (token.at, as_domain(token.at, is_v6));
        let local = local.unwrap_or_default();
        let places = Places { local, remote: ask.remote, inner_local: Addr::NONE, inner_remote };
        let direction = Direction::Outbound { token, cookie, syn: None };
        if sock::bound_interface(program)? != 0 {
            // A token is not reached through an interface.
            sock::bind_interface(program, 0)?;
        }
        // Names are the verifier's business, and none is sent.
        let name = ServerName::IpAddress(remote.ip().into());
        let flow = self.engine.handshake(wire, Role::Client { side, name });
        let id = flow.get();
        let mut one = Association::new(flow, direction, places, patience);
        (one.bond, one.of, one.process) = (Some(bond), of, self.shared(json));
        self.insert(id, one);
        self.by_token.insert(at, id);
        Ok((id, places))
    }

    /// A SYN to a token has arrived. One that is not the program's own is refused and changes nothing.
    pub(super) fn take_syn(&mut self, arrived: Syn, diag: &mut Diag) {
        let id = self.by_token.get(&arrived.token).copied();
        let Some((id, one)) = id.and_then(|id| Some((id, self.all.get_mut(&id)?))) else {
            // What it stood for has failed before the program asked. At a port of `::1` that is no token any more nobody
            // holds a SYN, so the kernel answers, and what listens there may be anybody's.
            if arrived.token.is_ipv4() {
                let _ = self.tokens.fail(&arrived, libc::ECONNREFUSED);
            }
            return;
        };
        let Direction::Outbound { syn, cookie, .. } = &mut one.direction else { return };
        if syn.is_some() {
            return; // sent again
        }
        let (local, remote) = (Addr::from(arrived.from), Addr::from(arrived.token));
        let flow = Flow { protocol: 6, local, remote, ..Flow::new_zeroed() };
        if diag.look(&flow).ok().flatten().is_none_or(|found| found.cookie != *cookie) {
            let _ = self.tokens.fail(&arrived, libc::ECONNREFUSED);
            return;
        }
        one.places.inner_local = local;
        *syn = Some(arrived);
        if one.admitted {
            self.open_held(id, diag);
        }
    }

    /// Answers a held connect(2), if it is held already.
    pub(super) fn open_held(&mut self, id: u64, diag: &mut Diag) {
        let Some(one) = self.all.get_mut(&id) else { return };
        let Direction::Outbound { syn: Some(syn), .. } = &one.direction else {
            return; // its SYN is on the way
        };
        match self.tokens.open(syn) {
            Ok(socket) => self.begin_joining(id, socket, diag),
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
    sock::take_after(wire.as_fd(), program);
    let interface = sock::bound_interface(program)?;
    if interface != 0 {
        sock::bind_interface(wire.as_fd(), interface)?;
    }
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
