//! Flows that peers open to listeners of this host.

use std::{
    io,
    net::SocketAddrV4,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, accept4, bind,
        getpeername, getsockname, getsockopt, listen, setsockopt, socket, sockopt,
    },
};
use portcullis_relay::{Role, ServerSide};
use portcullis_wire::{
    Addr,
    keyd::{Flow, Kind, Open, Places, Speech},
};
use rustls::sign::SingleCertAndKey;
use zerocopy::FromZeros;

use super::{
    Association, Associations, Direction, Joining, LAST_STEP, MOST_PENDING, PATIENCE, Placed, as_domain, fits,
};
use crate::{cut::addr, diag::Diag, sock};

/// Most connections taken from one listener before others have their turn.
const TURN: usize = 64;

/// Most peers of one address that are not running yet, so that one host cannot take all the places.
const MOST_OF_ONE: usize = 128;

/// How long a peer that may speak plain has to begin a ClientHello.
const SNIFF: Duration = Duration::from_millis(200);

/// A local address that is held for a program, whose own socket is on a token.
pub(super) struct Reservation {
    /// The real address.
    socket: OwnedFd,
    token: SocketAddrV4,
    is_v6: bool,
    /// Of the program's socket.
    cookie: u64,
    /// Who serves there, once somebody does.
    process: Option<Vec<u8>>,
    /// Whether plain peers may come.
    mixed: bool,
    /// Whether the program was seen to listen: it does so a moment after it was let.
    listened: bool,
    /// The flags that the real socket had when others made it.
    found: Option<OFlag>,
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
        let remote = Addr::v4(std::net::Ipv4Addr::UNSPECIFIED, 0);
        let local = Addr::v4(*self.token.ip(), self.token.port());
        let flow = Flow { protocol: 6, local, remote, ..Flow::new_zeroed() };
        let found = diag.look(&flow).ok().flatten().filter(|found| found.cookie == self.cookie)?;
        Some(found.waiting <= found.backlog)
    }
}

impl AsFd for Reservation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(flags) = self.found {
            // Whoever made it goes on with it.
            let _gone = fcntl(&self.socket, FcntlArg::F_SETFL(flags));
        }
    }
}

fn named(found: nix::Result<SockaddrStorage>) -> Option<Addr> {
    found.ok().and_then(|name| addr(&name))
}

impl Associations {
    /// Binds for a program, and locks its socket to the key daemon. Returns the reservation's number, the
    /// token that the program must bind instead, and the address it has got.
    ///
    /// # Errors
    /// bind(2)'s, and those of [`fits`].
    pub fn reserve(&mut self, program: BorrowedFd<'_>, ask: &Open, diag: &Diag) -> io::Result<Placed> {
        fits(program, diag)?;
        let is_v6 = sock::domain(program)? == libc::AF_INET6;
        let wanted = sock::as_given(&ask.local).ok_or(Errno::EINVAL)?;
        let real = stream(is_v6)?;
        setsockopt(&real, sockopt::ReuseAddr, &getsockopt(&program, sockopt::ReuseAddr)?)?;
        setsockopt(&real, sockopt::ReusePort, &getsockopt(&program, sockopt::ReusePort)?)?;
        if is_v6 {
            setsockopt(&real, sockopt::Ipv6V6Only, &getsockopt(&program, sockopt::Ipv6V6Only)?)?;
        }
        // Accepted sockets have what their listener has.
        sock::take_after(real.as_fd(), program);
        sock::bind_interface(real.as_fd(), sock::bound_interface(program)?)?;
        bind(real.as_raw_fd(), &wanted)?;
        // From here on it is the program's socket that changes. Nobody may share its token, and that is not
        // reached through an interface.
        setsockopt(&program, sockopt::ReusePort, &false)?;
        sock::bind_interface(program, 0)?;
        if is_v6 {
            sock::dual_stack(program)?;
        }
        self.place(real, program, None)
    }

    /// Takes the place of a listener that the program was started with. Returns what [`Self::reserve`] does,
    /// and a listener on a token, which the program must use instead.
    ///
    /// # Errors
    /// Those of [`fits`]; `EINVAL` for a socket that does not listen.
    pub fn adopt(
        &mut self,
        old: OwnedFd,
        json: &[u8],
        mixed: bool,
        diag: &mut Diag,
    ) -> io::Result<(Placed, OwnedFd)> {
        fits(old.as_fd(), diag)?;
        if !sock::listens(old.as_fd()) {
            return Err(Errno::EINVAL.into());
        }
        self.identity(json)?;
        let is_v6 = sock::domain(old.as_fd())? == libc::AF_INET6;
        let flags = OFlag::from_bits_retain(fcntl(&old, FcntlArg::F_GETFL)?);
        let new = stream(is_v6)?;
        if is_v6 {
            sock::dual_stack(new.as_fd())?;
        }
        let backlog = named(getsockname(old.as_raw_fd())).and_then(|local| {
            let remote = Addr { port: 0, ..unspecified(&local) };
            let flow = Flow {
                protocol: 6,
                cookie: sock::cookie(old.as_fd()).ok()?,
                local,
                remote,
                ..Flow::new_zeroed()
            };
            diag.look(&flow).ok().flatten().map(|found| found.backlog)
        });
        let ((id, places), token) = {
            let placed = self.place(old, new.as_fd(), Some(flags))?;
            let token = self.reservations.get(&placed.0).map(|one| one.token).ok_or(Errno::ENOENT)?;
            (placed, token)
        };
        let ready =
            bind(new.as_raw_fd(), &sock::as_given(&as_domain(token.into(), is_v6)).ok_or(Errno::EINVAL)?)
                .and_then(|()| listen(&new, backlog_of(backlog.unwrap_or(u32::MAX))));
        // The real one must not make us wait when somebody else takes what was there.
        let ready = ready.and_then(|()| match self.reservations.get(&id) {
            Some(one) => fcntl(one, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop),
            None => Err(Errno::ENOENT),
        });
        let ready = ready.and_then(|()| fcntl(&new, FcntlArg::F_SETFL(flags)).map(drop));
        if let Err(e) = ready {
            self.release(id);
            return Err(e.into());
        }
        if let Some(one) = self.reservations.get_mut(&id) {
            (one.process, one.mixed, one.listened) = (Some(json.to_vec()), mixed, true);
        }
        Ok(((id, places), new))
    }

    /// Puts a program's socket on a token, of which `real` is the address.
    fn place(&mut self, real: OwnedFd, program: BorrowedFd<'_>, found: Option<OFlag>) -> io::Result<Placed> {
        self.hear_of_deaths()?;
        self.tokens.lock(program)?;
        let (token, is_v6) = (self.tokens.near()?, sock::domain(program)? == libc::AF_INET6);
        let cookie = sock::cookie(program)?;
        let places = Places {
            local: named(getsockname(real.as_raw_fd())).unwrap_or_default(),
            inner_local: as_domain(token.into(), is_v6),
            remote: Addr::NONE,
            inner_remote: Addr::NONE,
        };
        let id = self.next_id();
        let (process, mixed, listened) = (None, false, false);
        let one = Reservation { socket: real, token, is_v6, cookie, process, mixed, listened, found };
        self.reservations.insert(id, one);
        Ok((id, places))
    }

    /// Listens for real. Repeated, it changes backlog and process.
    ///
    /// # Errors
    /// `ENOENT` for no such reservation, `EINVAL` for another socket than the one that reserved, or listen(2)'s.
    pub fn serve(
        &mut self,
        id: u64,
        program: BorrowedFd<'_>,
        backlog: u32,
        json: &[u8],
        mixed: bool,
    ) -> io::Result<()> {
        self.identity(json)?;
        let one = self.reservations.get_mut(&id).ok_or(Errno::ENOENT)?;
        if sock::cookie(program)? != one.cookie {
            return Err(Errno::EINVAL.into());
        }
        listen(&one.socket, backlog_of(backlog))?;
        (one.process, one.mixed) = (Some(json.to_vec()), mixed);
        Ok(())
    }

    /// Gives up a reservation; associations that run go on.
    pub fn release(&mut self, id: u64) {
        self.reservations.remove(&id);
        let orphans = self.waiting_if(|one| one.reservation() == Some(id));
        for orphan in orphans {
            self.stop(orphan, libc::ECONNRESET, "the listener has gone");
        }
    }

    /// Takes peers from all listeners, as many as may be pending.
    pub(super) fn accept(&mut self, diag: &mut Diag) {
        let serving: Vec<_> =
            self.reservations.iter().filter(|(_, one)| one.serving()).map(|(id, _)| *id).collect();
        for reservation in serving {
            for _ in 0..TURN {
                if self.arriving >= MOST_PENDING {
                    return;
                }
                let Some(one) = self.reservations.get_mut(&reservation) else { break };
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                let Ok(number) = accept4(one.socket.as_raw_fd(), flags) else { break };
                let wire = took(number);
                // What is refused, also by an error, is reset; the engine sets this anew.
                sock::reset_on_close(wire.as_fd());
                if one.room(diag).is_none() {
                    drop(wire);
                    if one.listened {
                        self.release(reservation); // its end was not heard of yet
                    }
                    break;
                }
                one.listened = true;
                // An error: it has gone already, or has too many, or no certificate can be made.
                let _reset = self.take_peer(reservation, wire);
            }
        }
    }

    fn take_peer(&mut self, reservation: u64, wire: OwnedFd) -> io::Result<()> {
        let one = self.reservations.get(&reservation).ok_or(Errno::ENOENT)?;
        let inner_local = as_domain(one.token.into(), one.is_v6);
        let remote = named(getpeername(wire.as_raw_fd())).ok_or(Errno::ENOTCONN)?;
        let local = named(getsockname(wire.as_raw_fd())).ok_or(Errno::ENOTCONN)?;
        let of_one = self.waiting().filter(|(_, other)| other.places.remote.ip() == remote.ip());
        if of_one.count() >= MOST_OF_ONE {
            return Err(Errno::EAGAIN.into());
        }
        // A member that arrives in plain is refused, whatever the policy says of its address.
        let is_member = remote.ip().is_some_and(|ip| self.host.members().owner(ip).is_some());
        let asks = one.mixed && !is_member;
        setsockopt(&wire, sockopt::TcpNoDelay, &true)?;
        let places = Places { local, remote, inner_local, inner_remote: Addr::NONE };
        let flow = self.engine.name();
        let direction = Direction::Inbound { reservation, arrived: Some(wire) };
        self.insert(flow.get(), Association::new(flow, direction, places, super::Seen::default(), PATIENCE));
        if asks {
            self.tell(flow.get(), Kind::Arrived, &[]);
            return Ok(());
        }
        self.speak(flow.get(), Speech::Tls)
    }

    /// Begins to talk to a peer that has arrived.
    ///
    /// # Errors
    /// `ENOENT` if nobody waits for this. When no certificate can be made, the peer is sent away.
    pub fn speak(&mut self, id: u64, speech: Speech) -> io::Result<()> {
        let one = self.all.get_mut(&id).ok_or(Errno::ENOENT)?;
        let Direction::Inbound { reservation, arrived } = &mut one.direction else {
            return Err(Errno::ENOENT.into());
        };
        let (wire, reservation) = (arrived.take().ok_or(Errno::ENOENT)?, *reservation);
        let (flow, remote) = (one.flow, one.places.remote);
        if speech == Speech::Plain {
            self.engine.begin(flow, wire, Role::Plain);
            return Ok(());
        }
        let side = self.side_for(reservation, &remote).map(|(side, seen)| {
            if let Some(one) = self.all.get_mut(&id) {
                one.seen = seen;
            }
            side
        });
        match side {
            Ok(side) => {
                let mixed = (speech == Speech::Either).then_some(SNIFF);
                self.engine.begin(flow, wire, Role::Server { side, mixed });
                Ok(())
            }
            Err(e) => {
                self.over(id, e.raw_os_error().unwrap_or(libc::EIO), "no certificate can be made", (0, 0));
                Err(e)
            }
        }
    }

    /// What is shown to a peer, and who judges what it shows.
    fn side_for(&mut self, reservation: u64, remote: &Addr) -> io::Result<(ServerSide, super::Seen)> {
        let json = self.reservations.get(&reservation).and_then(|one| one.process.clone());
        let identity = self.identity(&json.ok_or(Errno::ENOENT)?)?;
        let owner =
            remote.ip().and_then(|ip| self.host.members().owner(ip)).map(|member| member.name.clone());
        let (verifier, seen) = self.verifier.for_one(owner);
        let identity = Arc::new(SingleCertAndKey::from(identity.shown));
        Ok((ServerSide::new(Arc::new(verifier), identity).map_err(io::Error::other)?, seen))
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
                    one.places.inner_remote = as_domain(from.into(), is_v6);
                    one.joining = Some(Joining { socket, until: std::time::Instant::now() + LAST_STEP });
                }
            }
            Err(e) => {
                let errno = e.raw_os_error().unwrap_or(libc::ECONNREFUSED);
                self.stop(id, errno, "cannot reach the program's listener");
            }
        }
    }
}

fn stream(is_v6: bool) -> nix::Result<OwnedFd> {
    let family = if is_v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(family, SockType::Stream, flags, SockProtocol::Tcp)
}

fn backlog_of(most: u32) -> Backlog {
    i32::try_from(most).ok().and_then(|most| Backlog::new(most).ok()).unwrap_or(Backlog::MAXCONN)
}

/// The unspecified address of the same family.
fn unspecified(of: &Addr) -> Addr {
    Addr { family: of.family, ..Addr::NONE }
}

#[expect(unsafe_code, reason = "nix returns an accepted descriptor as a number")]
fn took(number: i32) -> OwnedFd {
    // SAFETY: accept4(2) has just returned this descriptor, so it is open and nobody else's.
    unsafe { OwnedFd::from_raw_fd(number) }
}
