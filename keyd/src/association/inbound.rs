//! Flows that peers open to listeners of this host.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
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
    keyd::{Flow, Kind, Places, Speech},
};
use zerocopy::FromZeros;

use super::{
    Association, Associations, Bond, Direction, MOST_PENDING, PATIENCE, Shows, Source, as_domain, fits,
};
use crate::{
    cut::addr,
    diag::Diag,
    sock,
    steer::{self, Place},
};

/// Most connections taken from one listener before others have their turn.
const TURN: usize = 64;

/// Most peers of one address that wait for broker or program, so that one host cannot take all the places. Those
/// in their handshake displace one another.
const MOST_OF_ONE: usize = 128;

/// Least backlog of a front.
const LEAST_BACKLOG: u32 = 128;

/// How long a peer that may speak plain has to begin a ClientHello.
const SNIFF: Duration = Duration::from_millis(200);

/// A listener of ours before a program's.
pub(super) struct Front {
    socket: OwnedFd,
    /// Where it stands for the program's.
    places: Vec<Place>,
    /// The program's own address.
    local: SocketAddr,
    /// Of the program's sockets: those that share the address.
    owners: Vec<u64>,
    /// Who serves there.
    process: Arc<[u8]>,
    /// The association that all who come there belong to.
    of: Option<u64>,
    /// Whether plain peers may come.
    mixed: bool,
    /// Whether the program was seen to listen: it does so a moment after it was let.
    listened: bool,
    /// Of a front for all addresses: those that have listeners of their own, which are not protected.
    pub(super) except: Vec<(u64, Place)>,
}

/// What is behind a front.
pub(super) enum Behind {
    /// The program's listener; whether one more may wait for its accept(2).
    Program { has_room: bool },
    /// Another listener, which stands at that very address.
    Another(u64),
    /// None.
    Nothing,
}

impl Front {
    /// Takes leave of owners; whether there is none any more.
    pub(super) fn bury(&mut self, dead: &[u64]) -> bool {
        self.owners.retain(|owner| !dead.contains(owner));
        self.owners.is_empty()
    }

    pub(super) const fn of(&self) -> Option<u64> {
        self.of
    }

    /// Who listens at an address that peers have come to.
    pub(super) fn behind(&self, at: SocketAddr, diag: &mut Diag) -> Behind {
        let none = if at.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0_u8; 16]) };
        let (local, remote) = (Addr::from(at), Addr::from(SocketAddr::new(none, 0)));
        let flow = Flow { protocol: 6, local, remote, ..Flow::new_zeroed() };
        match diag.look(&flow).ok().flatten() {
            Some(found) if self.owners.contains(&found.cookie) => {
                Behind::Program { has_room: found.waiting <= found.backlog }
            }
            Some(found) if self.local.ip().is_unspecified() && !found.is_anywhere => {
                Behind::Another(found.cookie)
            }
            _ => Behind::Nothing,
        }
    }
}

impl AsFd for Front {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn named(found: nix::Result<SockaddrStorage>) -> Option<Addr> {
    found.ok().and_then(|name| addr(&name)).and_then(|at| at.socket_addr()).map(Addr::from)
}

impl Associations {
    /// Stands before a program's listener, except for those whom `filter` lets through. Returns the front's number.
    ///
    /// # Errors
    /// Those of [`fits`] and of [`Self::shows`], `EOPNOTSUPP` for a socket that is bound to an interface, `EINVAL` for one without a port.
    pub fn serve(
        &mut self,
        program: BorrowedFd<'_>,
        filter: BorrowedFd<'_>,
        backlog: u32,
        json: &[u8],
        mixed: bool,
        diag: &Diag,
    ) -> io::Result<u64> {
        fits(program, diag)?;
        if sock::bound_interface(program)? != 0 {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let local = named(getsockname(program.as_raw_fd())).and_then(|at| at.socket_addr());
        let local = local.filter(|at| at.port() != 0).ok_or(Errno::EINVAL)?;
        let of = match self.shows(json)? {
            Shows::Process { .. } => None,
            Shows::Same(of, _) => Some(of),
        };
        let cookie = sock::cookie(program)?;
        let there = self.fronts.iter().find(|(_, one)| one.local == local).map(|(id, _)| *id);
        let id = match there {
            Some(id) => id,
            None => {
                let is_v6 = sock::domain(program)? == libc::AF_INET6;
                let both = is_v6 && !getsockopt(&program, sockopt::Ipv6V6Only)?;
                let front = Front {
                    socket: self.front_socket(is_v6)?,
                    places: steer::places(local, both),
                    local,
                    owners: Vec::new(),
                    process: Arc::default(),
                    of,
                    mixed,
                    listened: false,
                    except: Vec::new(),
                };
                self.hear_of_deaths()?;
                let id = self.next_id();
                self.waits.add(&front, Source::Front(id))?;
                self.fronts.insert(id, front);
                id
            }
        };
        let Some(front) = self.fronts.get_mut(&id) else { return Err(Errno::ENOENT.into()) };
        // Those that have proved themselves wait in the program's own backlog; here is room for more.
        listen(&front.socket, backlog_of(backlog.max(LEAST_BACKLOG)))?;
        // They are learned again, in case that an end was not heard of.
        for (_, place) in front.except.drain(..) {
            self.steer.unset(&place);
        }
        if !front.owners.contains(&cookie) {
            front.owners.push(cookie);
            front.listened = false;
        }
        (front.process, front.of, front.mixed) = (json.into(), of, mixed);
        for place in &front.places {
            self.steer.set(place, front.socket.as_fd(), filter)?;
        }
        let places = front.places.clone();
        for other in self.fronts.values_mut() {
            other.except.retain(|(_, place)| !places.contains(place));
        }
        Ok(id)
    }

    /// A socket for a front. Its own address is a token that nobody is told; what comes there is not served.
    fn front_socket(&self, is_v6: bool) -> io::Result<OwnedFd> {
        let made = stream(is_v6)?;
        // What is accepted here is at the program's port, and must not keep it from a program that begins anew.
        setsockopt(&made, sockopt::ReuseAddr, &true)?;
        let at = as_domain(SocketAddr::new(self.tokens.any()?.into(), 0), is_v6);
        if is_v6 {
            sock::dual_stack(made.as_fd())?;
        }
        bind(made.as_raw_fd(), &sock::as_given(&at).ok_or(Errno::EINVAL)?)?;
        Ok(made)
    }

    /// Gives up a front; associations that run go on.
    pub fn release(&mut self, id: u64) {
        if let Some(gone) = self.fronts.remove(&id) {
            let except = gone.except.iter().map(|(_, place)| place);
            gone.places.iter().chain(except).for_each(|place| self.steer.unset(place));
        }
        let orphans = self.waiting_if(|one| one.front() == Some(id));
        for orphan in orphans {
            self.stop(orphan, libc::ECONNRESET, "the listener has gone");
        }
    }

    /// Takes peers from a front, as many as may be pending.
    pub(super) fn accept(&mut self, front: u64, diag: &mut Diag) {
        for _ in 0..TURN {
            if self.arriving >= MOST_PENDING {
                return;
            }
            let Some(one) = self.fronts.get_mut(&front) else { break };
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let Ok(number) = accept4(one.socket.as_raw_fd(), flags) else { break };
            let wire = took(number);
            // What is refused, also by an error, is reset; the engine sets this anew.
            sock::reset_on_close(wire.as_fd());
            if self.bereaved {
                continue; // nobody could admit it
            }
            let local = named(getsockname(wire.as_raw_fd())).and_then(|at| at.socket_addr());
            let Some(at) = local.filter(|at| at.port() == one.local.port()) else {
                continue; // it came to the front's own address
            };
            match one.behind(at, diag) {
                Behind::Program { .. } => one.listened = true,
                Behind::Another(listener) => {
                    // Reset this once, and not met again: later ones are that listener's.
                    for place in steer::places(at, false) {
                        if !one.except.contains(&(listener, place)) && self.steer.except(&place).is_ok() {
                            one.except.push((listener, place));
                        }
                    }
                    continue;
                }
                Behind::Nothing => {
                    drop(wire);
                    if one.listened {
                        self.release(front); // its end was not heard of yet
                    }
                    break;
                }
            }
            // An error: it has gone already, or has too many, or no certificate can be made.
            let _reset = self.take_peer(front, wire, Addr::from(at));
        }
    }

    fn take_peer(&mut self, front: u64, wire: OwnedFd, local: Addr) -> io::Result<()> {
        let one = self.fronts.get(&front).ok_or(Errno::ENOENT)?;
        let remote = named(getpeername(wire.as_raw_fd())).ok_or(Errno::ENOTCONN)?;
        let waits = |other: &Association| other.shown || other.has_arrived();
        let of_one =
            self.waiting().filter(|(_, other)| waits(other) && other.places.remote.ip() == remote.ip());
        if of_one.count() >= MOST_OF_ONE {
            return Err(Errno::EAGAIN.into());
        }
        // A member that arrives in plain is refused, whatever the policy says of its address.
        let is_member = remote.ip().is_some_and(|ip| self.host.members().owner(ip).is_some());
        let asks = one.mixed && !is_member;
        let places = Places { local, remote, inner_local: local, inner_remote: Addr::NONE };
        let (flow, process) = (self.engine.name(), one.process.clone());
        let direction = Direction::Inbound { front, arrived: Some(wire) };
        let new = Association { process, ..Association::new(flow, direction, places, PATIENCE) };
        self.insert(flow.get(), new);
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
        let Direction::Inbound { front, arrived } = &mut one.direction else {
            return Err(Errno::ENOENT.into());
        };
        let (wire, front) = (arrived.take().ok_or(Errno::ENOENT)?, *front);
        let (flow, remote) = (one.flow, one.places.remote);
        if speech == Speech::Plain {
            self.engine.begin(flow, wire, Role::Plain);
            return Ok(());
        }
        let side = self.side_for(front, &remote).map(|(side, bond, of)| {
            if let Some(one) = self.all.get_mut(&id) {
                (one.bond, one.of) = (Some(bond), of);
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

    /// What is shown to a peer, and what that ties it to.
    fn side_for(&mut self, front: u64, remote: &Addr) -> io::Result<(ServerSide, Arc<Bond>, Option<u64>)> {
        let json = self.fronts.get(&front).map(|one| one.process.clone());
        let shows = self.shows(&json.ok_or(Errno::ENOENT)?)?;
        let (bond, of, _) = self.bind(shows, remote);
        Ok((bond.server()?, bond, of))
    }

    /// Connects to the program's listener for an admitted peer, or has it wait: beyond the backlog the kernel
    /// would have the program's end wait for seconds, and ours seem to be up.
    pub(super) fn deliver(&mut self, id: u64, front: u64, diag: &mut Diag) {
        let Some(to) = self.all.get(&id).and_then(|one| one.places.local.socket_addr()) else { return };
        match self.fronts.get(&front).map_or(Behind::Nothing, |one| one.behind(to, diag)) {
            Behind::Program { has_room: true } => self.queued.remove(&id),
            Behind::Program { has_room: false } => {
                self.queued.insert(id);
                return;
            }
            Behind::Another(_) => return self.stop(id, libc::ECONNRESET, "another listener took its place"),
            Behind::Nothing => return self.stop(id, libc::ECONNRESET, "the listener has gone"),
        };
        match self.tokens.deliver(to) {
            Ok((socket, from)) => {
                if let Some(one) = self.all.get_mut(&id) {
                    one.places.inner_remote = Addr::from(from);
                }
                self.begin_joining(id, socket, diag);
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

#[expect(unsafe_code, reason = "nix returns an accepted descriptor as a number")]
fn took(number: i32) -> OwnedFd {
    // SAFETY: accept4(2) has just returned this descriptor, so it is open and nobody else's.
    unsafe { OwnedFd::from_raw_fd(number) }
}
