//! Which connections to a program's listening port are the key daemon's: decided in the kernel, before a
//! listener is looked for (docs/adr/0008-protected-listeners.md).
//!
//! The program binds and listens as ever, at its own address. A protected port has a *front* beside it, a
//! listener of ours. Connections from another host go to the front if the list of the program's filter has
//! their source as a hole: it does not come in plain. All others, and what the host sends itself, go to the
//! program, whose filter lets them through or drops them. So one port serves both,
//! no socket changes its address, and a port turns from plain to protected and back while it listens.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use portcullis_wire::{Addr, Family};

use crate::{
    asm::{Assembly, If, JumpError, Label, R, Width},
    bpf::{Map, Shape, choose_listeners},
    filter::{self, NO_RANGE},
};

/// Most addresses with a front.
const MOST: u32 = 1 << 16;
/// Port (32 bits, host byte order), family (32 bits), address: where a listener is.
pub type Place = [u8; 24];
const PLACE: u32 = 24;

/// The places of a listener. One at the unspecified address of both families has two.
pub fn places(at: SocketAddr, both_families: bool) -> Vec<Place> {
    let place = |ip: IpAddr| {
        let Addr { family, ip, port, .. } = Addr::from(SocketAddr::new(ip, at.port()));
        let mut place = [0; 24];
        let bytes = u32::from(port).to_ne_bytes().into_iter().chain([family, 0, 0, 0]).chain(ip);
        for (to, from) in place.iter_mut().zip(bytes) {
            *to = from;
        }
        place
    };
    let mut all = vec![place(at.ip())];
    if both_families && at.ip().is_unspecified() && at.is_ipv6() {
        all.push(place(IpAddr::from([0; 4])));
    }
    all
}

/// The fronts of one network namespace. Dropped, or killed, it leaves every port to its own listener, whose
/// filter lets nobody through who should have come to the front.
pub struct Steer {
    /// By place: the program's filter, which says who may come in plain.
    plain: Map,
    fronts: Map,
    /// A list without an entry.
    empty: Map,
    _link: OwnedFd,
}

impl Steer {
    /// Begins to choose. Needs privileges that are given up later.
    pub fn new(namespace: BorrowedFd<'_>) -> io::Result<Self> {
        let empty = Map::new(filter::KEY)?;
        let plain = Map::of_maps(PLACE, MOST, &empty)?;
        let fronts = Map::new(Shape::sockets(PLACE, MOST))?;
        let code =
            program(plain.as_fd().as_raw_fd(), fronts.as_fd().as_raw_fd()).map_err(io::Error::other)?;
        Ok(Self { _link: choose_listeners(&code, namespace)?, plain, fronts, empty })
    }

    /// Sends to `front` whoever comes to a place and is a hole in the list of `filter`.
    pub fn set(&self, place: &Place, front: BorrowedFd<'_>, filter: BorrowedFd<'_>) -> io::Result<()> {
        let number = front.as_raw_fd().cast_unsigned();
        self.fronts.insert(place, &mut u64::from(number).to_ne_bytes())?;
        self.plain.insert(place, &mut filter.as_raw_fd().to_ne_bytes())
    }

    /// Leaves a place to its own listener, though there is a front for all addresses: nobody is a hole in an empty list.
    pub fn except(&self, place: &Place) -> io::Result<()> {
        self.plain.insert(place, &mut self.empty.as_fd().as_raw_fd().to_ne_bytes())
    }

    /// Leaves a place to its own listener, or to a front for all addresses.
    pub fn unset(&self, place: &Place) {
        // In this order: without a front, and with a list, nobody gets through.
        let _ = self.fronts.remove(place);
        let _ = self.plain.remove(place);
    }
}

/// The program, for every TCP connection that arrives and belongs to no socket yet: pass on, choose the front,
/// or (where the front has gone) drop.
fn program(plain: i32, fronts: i32) -> Result<Vec<[u8; 8]>, JumpError> {
    use Width::{D, W};
    // Helpers (linux/bpf.h, bpf_func_id).
    const LOOK_UP: i32 = 1;
    const RELEASE: i32 = 86;
    const ASSIGN: i32 = 124;
    // struct bpf_sk_lookup
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const REMOTE_V4: i16 = 16;
    const REMOTE_V6: i16 = 20;
    const LOCAL_V4: i16 = 40;
    const LOCAL_V6: i16 = 44;
    const LOCAL_PORT: i16 = 60;
    const INTERFACE: i16 = 64;
    // The stack, downward from r10.
    const PLACE: i16 = -24;
    const SOURCE: i16 = -48; // the key of a filter's list: prefix length, family, address
    const ALL_BITS: i32 = 32 + 128;
    let [r0, r1, r2, r3, r6, r7, fp] = [0, 1, 2, 3, 6, 7, 10].map(R);
    let mut asm = Assembly::default();
    let [v6, look, other, found, drop, pass]: [Label; 6] = std::array::from_fn(|_| asm.label());

    asm.copy(r6, r1);
    asm.load(W, r1, r6, PROTOCOL);
    asm.jump_if(If::Unequal, r1, libc::IPPROTO_TCP, pass);
    // 0: nobody's packet, but somebody asks who listens (sock_diag).
    asm.load(W, r1, r6, INTERFACE);
    asm.jump_if(If::Equal, r1, 0, pass);
    for word in 0..6 {
        asm.store_imm(D, fp, SOURCE + 8 * word, 0); // PLACE too
    }
    asm.store_imm(W, fp, SOURCE, ALL_BITS);
    asm.load(W, r1, r6, LOCAL_PORT);
    asm.store(W, fp, PLACE, r1);
    let family = |asm: &mut Assembly, family: Family| {
        asm.store_imm(W, fp, PLACE + 4, family as i32);
        asm.store_imm(W, fp, SOURCE + 4, family as i32);
    };
    let address = |asm: &mut Assembly, from: i16, to: i16| {
        asm.load(W, r1, r6, from);
        asm.store(W, fp, to, r1);
    };
    asm.load(W, r1, r6, FAMILY);
    asm.jump_if(If::Equal, r1, libc::AF_INET6, v6);
    asm.jump_if(If::Unequal, r1, libc::AF_INET, pass);
    family(&mut asm, Family::V4);
    address(&mut asm, LOCAL_V4, PLACE + 8);
    address(&mut asm, REMOTE_V4, SOURCE + 8);
    asm.and(r1, 0xff); // the first byte
    asm.jump_if(If::Equal, r1, 127, pass);
    asm.jump(look);
    asm.here(v6);
    family(&mut asm, Family::V6);
    for word in 0..4 {
        address(&mut asm, LOCAL_V6 + 4 * word, PLACE + 8 + 4 * word);
        address(&mut asm, REMOTE_V6 + 4 * word, SOURCE + 8 + 4 * word);
    }

    // Only this host has ::1.
    asm.load(D, r1, fp, SOURCE + 8);
    asm.jump_if(If::Unequal, r1, 0, look);
    asm.load(D, r1, fp, SOURCE + 16);
    asm.set64(r2, 1_u64.to_be());
    asm.sub(r1, r2);
    asm.jump_if(If::Equal, r1, 0, pass);

    asm.here(look);
    // A host that calls its own address is itself there. (The interface is that of the address then.)
    for half in [8, 16] {
        asm.load(D, r1, fp, PLACE + half);
        asm.load(D, r2, fp, SOURCE + half);
        asm.sub(r1, r2);
        asm.jump_if(If::Unequal, r1, 0, other);
    }
    asm.jump(pass);
    asm.here(other);
    let look_up = |asm: &mut Assembly, map: i32| {
        asm.map(r1, map);
        asm.copy(r2, fp);
        asm.add(r2, PLACE.into());
        asm.call(LOOK_UP);
    };
    look_up(&mut asm, plain);
    asm.jump_if(If::Unequal, r0, 0, found);
    // Nobody at this very address: at the unspecified one?
    for half in [0, 8] {
        asm.store_imm(D, fp, PLACE + 8 + half, 0);
    }
    look_up(&mut asm, plain);
    asm.jump_if(If::Equal, r0, 0, pass);
    asm.here(found);
    asm.copy(r1, r0);
    asm.copy(r2, fp);
    asm.add(r2, SOURCE.into());
    asm.call(LOOK_UP);
    asm.jump_if(If::Equal, r0, 0, pass);
    asm.load(W, r1, r0, 0);
    asm.jump_if(If::Unequal, r1, NO_RANGE.cast_signed(), pass);

    look_up(&mut asm, fronts);
    asm.jump_if(If::Equal, r0, 0, drop);
    asm.copy(r7, r0);
    asm.copy(r1, r6);
    asm.copy(r2, r7);
    asm.set(r3, 0);
    asm.call(ASSIGN);
    asm.copy(r1, r7);
    asm.call(RELEASE);
    asm.here(pass);
    asm.set(r0, 1);
    asm.exit();
    asm.here(drop);
    asm.set(r0, 0);
    asm.exit();
    asm.finish()
}
