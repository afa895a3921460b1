//! Flows that peers open to listeners of this host.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::Arc,
    time::Instant,
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, accept4, bind,
        getpeername, getsockname, getsockopt, listen, setsockopt, socket, sockopt,
    },
};
use portcullis_relay::{Role, ServerSide};
use portcullis_wire::{
    Addr,
    keyd::{Flow, Open, Places},
};
use rustls::sign::SingleCertAndKey;
use zerocopy::FromZeros;

use super::{
    Association, Associations, Direction, Joining, LAST_STEP, MOST_PENDING, PATIENCE, as_domain, v4,
};
use crate::{cut::addr, diag::Diag, sock, token::NEAR_PORT};

/// Most connections taken from one listener before others have their turn.
const TURN: usize = 64;

/// Most peers of one address that are not running yet, so that one host cannot take all the places.
const MOST_OF_ONE: usize = 128;

/// A local address that is held for a program, whose own socket is on a token.
pub(super) struct Reservation {
    /// The real address.
    socket: OwnedFd,
    token: Ipv4Addr,
    is_v6: bool,
    /// Of the program's socket.
    cookie: u64,
    /// Who serves there, once somebody does.
    process: Option<Vec<u8>>,
    /// Whether the program was seen to listen: it does so a moment after it was let.
    listened: bool,
}

impl Reservation {
    pub(super) const fn serving(&self) -> bool {
        self.process.is_some()
    }

    pub(super) const fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Whether the program still listens, and then whether one more may wait for its accept(2).
    pub(super) fn room(&self, diag: &mut Diag) -> Option<bool> {
        let (local, remote) = (self.token_addr(), Addr::v4(Ipv4Addr::UNSPECIFIED, 0));
        let flow = Flow { protocol: 6, local, remote, ..Flow::new_zeroed() };
        let found = diag.look(&flow).ok().flatten().filter(|found| found.cookie == self.cookie)?;
        Some(found.waiting <= found.backlog)
    }

    const fn token_addr(&self) -> Addr {
        Addr::v4(self.token, NEAR_PORT)
    }
}

impl AsFd for Reservation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Associations {
    /// Binds for a program, and locks its socket to the key daemon. Returns the reservation's number, the
    /// token that the program must bind instead, and the address it has got.
    ///
    /// # Errors
    /// bind(2)'s; `EXDEV` for a socket in another network namespace.
    pub fn reserve(&mut self, program: BorrowedFd<'_>, ask: &Open, diag: &Diag) -> io::Result<(u64, Places)> {
        if !diag.is_here(program) {
            return Err(Errno::EXDEV.into());
        }
        let is_v6 = sock::domain(program)? == libc::AF_INET6;
        let wanted = sock::as_given(&ask.local).ok_or(Errno::EINVAL)?;
        let family = if is_v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let real = socket(family, SockType::Stream, flags, SockProtocol::Tcp)?;
        setsockopt(&real, sockopt::ReuseAddr, &getsockopt(&program, sockopt::ReuseAddr)?)?;
        setsockopt(&real, sockopt::ReusePort, &getsockopt(&program, sockopt::ReusePort)?)?;
        if is_v6 {
            setsockopt(&real, sockopt::Ipv6V6Only, &getsockopt(&program, sockopt::Ipv6V6Only)?)?;
        }
        bind(real.as_raw_fd(), &wanted)?;
        self.hear_of_deaths()?;
        // From here on it is the program's socket that changes. Nobody may share its token.
        setsockopt(&program, sockopt::ReusePort, &false)?;
        if is_v6 {
            sock::dual_stack(program)?;
        }
        self.tokens.lock(program)?;
        let token = self.tokens.new_token()?;
        let cookie = sock::cookie(program)?;
        let local = getsockname::<SockaddrStorage>(real.as_raw_fd()).ok().and_then(|name| addr(&name));
        let inner_local = as_domain(SocketAddrV4::new(token, NEAR_PORT), is_v6);
        let places = Places {
            local: local.unwrap_or_default(),
            inner_local,
            remote: Addr::NONE,
            inner_remote: Addr::NONE,
        };
        let id = self.next_id();
        self.reservations
            .insert(id, Reservation { socket: real, token, is_v6, cookie, process: None, listened: false });
        Ok((id, places))
    }

    /// Listens for real. Repeated, it changes backlog and process.
    ///
    /// # Errors
    /// `ENOENT` for no such reservation, `EINVAL` for another socket than the one that reserved, or listen(2)'s.
    pub fn serve(&mut self, id: u64, program: BorrowedFd<'_>, backlog: u32, json: &[u8]) -> io::Result<()> {
        self.identity(json)?;
        let one = self.reservations.get_mut(&id).ok_or(Errno::ENOENT)?;
        if sock::cookie(program)? != one.cookie {
            return Err(Errno::EINVAL.into());
        }
        let backlog = i32::try_from(backlog).ok().and_then(|most| Backlog::new(most).ok());
        listen(&one.socket, backlog.unwrap_or(Backlog::MAXCONN))?;
        one.process = Some(json.to_vec());
        Ok(())
    }

    /// Gives up a reservation; associations that run go on.
    pub fn release(&mut self, id: u64) {
        self.reservations.remove(&id);
        let orphans = self.waiting_if(
            |one| matches!(one.direction, Direction::Inbound { reservation } if reservation == id),
        );
        for orphan in orphans {
            self.stop(orphan, libc::ECONNRESET, "the listener has gone");
        }
    }

    /// Takes peers from all listeners, as many as may be pending.
    pub(super) fn accept(&mut self, diag: &mut Diag) {
        let serving: Vec<_> =
            self.reservations.iter().filter(|(_, one)| one.serving()).map(|(id, _)| *id).collect();
        let mut room = MOST_PENDING.saturating_sub(self.pending.len());
        for reservation in serving {
            for _ in 0..TURN {
                if room == 0 {
                    return;
                }
                let Some(one) = self.reservations.get_mut(&reservation) else { break };
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                let Ok(number) = accept4(one.socket.as_raw_fd(), flags) else { break };
                room -= 1;
                let wire = adopt(number);
                if one.room(diag).is_none() {
                    sock::reset_on_close(wire.as_fd());
                    drop(wire);
                    if one.listened {
                        self.release(reservation); // its end was not heard of yet
                    }
                    break;
                }
                one.listened = true;
                if let Err(reason) = self.take_peer(reservation, &wire) {
                    let _ = reason; // it has gone already, has too many, or no certificate can be made: reset
                    sock::reset_on_close(wire.as_fd());
                }
            }
        }
    }

    fn take_peer(&mut self, reservation: u64, wire: &OwnedFd) -> io::Result<()> {
        let one = self.reservations.get(&reservation).ok_or(Errno::ENOENT)?;
        let json = one.process.clone().ok_or(Errno::ENOENT)?;
        let inner_remote = as_domain(SocketAddrV4::new(one.token, NEAR_PORT), one.is_v6);
        let name = |found: nix::Result<SockaddrStorage>| found.ok().and_then(|name| addr(&name));
        let remote = name(getpeername(wire.as_raw_fd())).ok_or(Errno::ENOTCONN)?;
        let local = name(getsockname(wire.as_raw_fd())).ok_or(Errno::ENOTCONN)?;
        if self.waiting().filter(|(_, other)| other.places.remote.ip() == remote.ip()).count() >= MOST_OF_ONE
        {
            return Err(Errno::EAGAIN.into());
        }
        setsockopt(wire, sockopt::TcpNoDelay, &true)?;
        let identity = self.identity(&json)?;
        let owner =
            remote.ip().and_then(|ip| self.host.members().owner(ip)).map(|member| member.name.clone());
        let (verifier, seen) = self.verifier.for_one(owner);
        let identity = Arc::new(SingleCertAndKey::from(identity.shown));
        let side = ServerSide::new(Arc::new(verifier), identity).map_err(io::Error::other)?;
        let (wire, places) = (
            wire.try_clone()?,
            Places { local, remote, inner_local: inner_remote, inner_remote: Addr::NONE },
        );
        let flow = self.engine.handshake(wire, Role::Server { side, mixed: None });
        let direction = Direction::Inbound { reservation };
        let until = Instant::now() + PATIENCE + LAST_STEP;
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
        self.insert(flow.get(), one);
        Ok(())
    }

    /// Connects to the program's listener for an admitted peer, or has it wait: beyond the backlog the kernel
    /// would have the program's end wait for seconds, and ours seem to be up.
    pub(super) fn deliver(&mut self, id: u64, reservation: u64, diag: &mut Diag) {
        let place = self.reservations.get(&reservation);
        let Some((place, has_room)) = place.and_then(|place| Some((place, place.room(diag)?))) else {
            return self.stop(id, libc::ECONNRESET, "the listener has gone");
        };
        if !has_room {
            self.queued.insert(id);
            return;
        }
        self.queued.remove(&id);
        let is_v6 = place.is_v6;
        match self.tokens.deliver(place.token) {
            Ok((socket, from)) => {
                if let Some(one) = self.all.get_mut(&id) {
                    one.places.inner_remote = if is_v6 { as_domain(from, true) } else { v4(from) };
                    one.joining = Some(Joining { socket, until: Instant::now() + LAST_STEP });
                }
            }
            Err(e) => {
                let errno = e.raw_os_error().unwrap_or(libc::ECONNREFUSED);
                self.stop(id, errno, "cannot reach the program's listener");
            }
        }
    }
}

#[expect(unsafe_code, reason = "nix returns an accepted descriptor as a number")]
fn adopt(number: i32) -> OwnedFd {
    // SAFETY: accept4(2) has just returned this descriptor, so it is open and nobody else's.
    unsafe { OwnedFd::from_raw_fd(number) }
}
