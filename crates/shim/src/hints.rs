//! What kind of socket a descriptor is, so that a judged call need not ask the kernel first.
//!
//! Hints are written where descriptors are made (socket, accept, dup) and forgotten where they are
//! closed. A program can make and close descriptors behind our back; the boundary is the
//! kernel's, and a stale hint at worst asks the broker about the wrong protocol. A child process inherits hints
//! together with the descriptors they are about.
//!
//! Sixty-four bits each: domain 8, type 4, protocol 9, flags 10, port or serial 32.

use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use libc::c_int;

use crate::{own, sys};

/// Descriptors that have a hint; those above are looked up by system calls each time.
pub const MOST: usize = 65_536;

/// The obsolete way to a packet socket (packet(7)).
pub const SOCK_PACKET: c_int = 10;
/// `IPPROTO_MPTCP` (linux/in.h).
const MPTCP: u16 = 262;

/// What a socket is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Sock {
    /// `SO_DOMAIN`.
    pub domain: u8,
    /// `SO_TYPE`, without flags.
    pub kind: u8,
    /// `SO_PROTOCOL`.
    pub protocol: u16,
    /// Bits below.
    pub flags: u16,
    /// For a listener its port, host byte order; for a datagram socket a number that no earlier
    /// socket of this process had.
    pub extra: u32,
}

/// Listening; `extra` is its port.
pub const LISTENS: u16 = 1 << 0;
/// A datagram socket whose senders the kernel does not filter: the shim looks at them.
pub const WATCHED: u16 = 1 << 2;
/// A non-blocking connect(2) that was permitted is under way.
pub const CONNECTING: u16 = 1 << 3;

/// Of another family, and permitted when it was made.
pub const PERMITTED: u16 = 1 << 4;

/// Set in every hint, so that none is zero.
const VALID: u64 = 1 << 31;

impl Sock {
    /// Whether calls on it are judged at all.
    #[must_use]
    pub fn is_internet(self) -> bool {
        matches!(c_int::from(self.domain), libc::AF_INET | libc::AF_INET6)
    }

    /// Whether it never leaves the kernel's own concerns.
    #[must_use]
    pub fn passes(self) -> bool {
        matches!(c_int::from(self.domain), libc::AF_UNIX | libc::AF_NETLINK | libc::AF_ALG)
    }

    /// Whether bytes flow in it, so that it has one peer.
    #[must_use]
    pub fn is_stream(self) -> bool {
        c_int::from(self.kind) == libc::SOCK_STREAM
    }

    /// Protocol number for table and records; multipath TCP counts as TCP, raw and packet as 255.
    #[must_use]
    pub fn iana(self) -> u8 {
        match (c_int::from(self.kind), self.protocol) {
            (libc::SOCK_RAW | SOCK_PACKET, _) => 255,
            (_, MPTCP) => 6,
            (_, protocol) => u8::try_from(protocol).unwrap_or(255),
        }
    }

    /// Whether this flag is set.
    #[must_use]
    pub const fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// As socket(2) was asked for it.
    #[must_use]
    pub fn asked(domain: c_int, kind: c_int, protocol: c_int) -> Option<Self> {
        const FLAGS: c_int = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let kind = u8::try_from(kind & !FLAGS).ok()?;
        let domain = u8::try_from(domain).ok()?;
        let internet = matches!(c_int::from(domain), libc::AF_INET | libc::AF_INET6);
        let protocol = match (c_int::from(kind), protocol) {
            (libc::SOCK_STREAM, 0) if internet => 6,
            (libc::SOCK_DGRAM, 0) if internet => 17,
            (libc::SOCK_SEQPACKET, 0) if internet => 132,
            (_, p) => u16::try_from(p).ok()?,
        };
        Some(Self { domain, kind, protocol, flags: 0, extra: serial() })
    }

    fn pack(self) -> u64 {
        u64::from(self.domain)
            | u64::from(self.kind & 0xf) << 8
            | u64::from(self.protocol & 0x1ff) << 12
            | VALID
            | u64::from(self.flags & 0x3ff) << 21
            | u64::from(self.extra) << 32
    }

    #[expect(clippy::cast_possible_truncation, reason = "fields are masked to their widths")]
    fn unpack(word: u64) -> Option<Self> {
        (word & VALID != 0).then_some(Self {
            domain: word as u8,
            kind: (word >> 8) as u8 & 0xf,
            protocol: (word >> 12) as u16 & 0x1ff,
            flags: (word >> 21) as u16 & 0x3ff,
            extra: (word >> 32) as u32,
        })
    }
}

fn serial() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn slot(fd: c_int) -> Option<&'static AtomicU64> {
    own::hints()?.get(usize::try_from(fd).ok()?)
}

/// The hint, if there is one.
#[must_use]
pub fn get(fd: c_int) -> Option<Sock> {
    Sock::unpack(slot(fd)?.load(Ordering::Relaxed))
}

/// The hint, or what the kernel says; `None` if it is no socket.
pub fn find(fd: c_int) -> Option<Sock> {
    if let Some(sock) = get(fd) {
        return Some(sock);
    }
    if own::sandboxed() {
        return None;
    }
    let domain = u8::try_from(sys::getsockopt(fd, libc::SO_DOMAIN)?).unwrap_or(u8::MAX);
    let kind = u8::try_from(sys::getsockopt(fd, libc::SO_TYPE)?).unwrap_or(u8::MAX);
    let protocol = u16::try_from(sys::getsockopt(fd, libc::SO_PROTOCOL)?).unwrap_or(u16::MAX);
    let sock = Sock { domain, kind, protocol, flags: 0, extra: serial() };
    set(fd, sock);
    Some(sock)
}

/// Highest descriptor that ever had a hint, so that a sweep over all descriptors stays short.
static HIGHEST: AtomicUsize = AtomicUsize::new(0);

/// Writes a hint.
pub fn set(fd: c_int, sock: Sock) {
    let (Some(slot), Ok(at)) = (slot(fd), usize::try_from(fd)) else { return };
    if own::borrowed() {
        return;
    }
    if at > HIGHEST.load(Ordering::Relaxed) {
        HIGHEST.fetch_max(at, Ordering::Relaxed);
    }
    slot.store(sock.pack(), Ordering::Relaxed);
}

/// Sets or clears flags of a hint that is there.
pub fn mark(fd: c_int, set: u16, clear: u16) {
    if let Some(slot) = slot(fd) {
        let there = slot.load(Ordering::Relaxed);
        if let Some(sock) = Sock::unpack(there) {
            let sock = Sock { flags: sock.flags & !clear | set, ..sock };
            // If another thread changed it meanwhile, its word stands.
            let _ = slot.compare_exchange(there, sock.pack(), Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

/// Forgets a descriptor.
#[inline]
pub fn forget(fd: c_int) {
    if let Some(slot) = slot(fd)
        && slot.load(Ordering::Relaxed) != 0
        && !own::borrowed()
    {
        slot.store(0, Ordering::Relaxed);
    }
}

/// Forgets a range, both ends included.
pub fn forget_range(low: u32, high: u32) {
    let (Ok(low), Ok(high)) = (usize::try_from(low), usize::try_from(high)) else { return };
    let high = high.min(HIGHEST.load(Ordering::Relaxed));
    if own::borrowed() || low > high {
        return;
    }
    for slot in own::hints().unwrap_or_default().iter().take(high.saturating_add(1)).skip(low) {
        if slot.load(Ordering::Relaxed) != 0 {
            slot.store(0, Ordering::Relaxed);
        }
    }
}

/// What dup(2) and its kin do.
pub fn duplicate(from: c_int, to: c_int) {
    if from == to {
        return;
    }
    match get(from) {
        Some(sock) => set(to, sock),
        None => forget(to),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_survive_packing() {
        let sock = Sock { domain: 10, kind: 1, protocol: 262, flags: LISTENS | CONNECTING, extra: 65535 };
        assert_eq!(Sock::unpack(sock.pack()), Some(sock));
        assert_eq!(Sock::unpack(0), None);
        assert_eq!(sock.iana(), 6);
    }

    #[test]
    fn socket_arguments_give_what_the_kernel_would_say() {
        let sock = Sock::asked(libc::AF_INET6, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0).unwrap();
        assert_eq!((sock.iana(), sock.is_internet(), sock.is_stream()), (17, true, false));
        assert_eq!(Sock::asked(libc::AF_PACKET, libc::SOCK_RAW, 0x300).unwrap().iana(), 255);
    }
}
