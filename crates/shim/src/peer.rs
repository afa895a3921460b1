//! Socket addresses as programs pass them, read once.

use core::ptr::from_ref;

use libc::{c_int, sockaddr, socklen_t};
use portcullis_wire::{Addr, Family};

use crate::{
    Errno,
    sys::{self, AddressBytes},
};

/// Longest address that the kernel takes (`sizeof(struct __kernel_sockaddr_storage)`).
const LONGEST: usize = 128;
/// `sizeof(struct sockaddr_in)`.
const V4: usize = 16;
/// `SIN6_LEN_RFC2133`: the shortest `sockaddr_in6` that the kernel takes; no scope in it.
const V6_SHORT: usize = 24;
/// `sizeof(struct sockaddr_in6)`.
const V6: usize = 28;

/// A copy of an address that a program gave. What is judged is what is passed on.
#[derive(Clone, Copy)]
pub struct Peer {
    bytes: AddressBytes,
    length: usize,
}

impl Peer {
    /// Copies an address. `None`: the kernel itself would reject it (null, too short to have a
    /// family, too long), or could not read it, so it is the kernel's to answer.
    ///
    /// # Safety
    /// As for connect(2).
    #[expect(unsafe_code, reason = "memory of the program's")]
    pub unsafe fn copy(from: *const sockaddr, length: socklen_t) -> Option<Self> {
        let length = usize::try_from(length).ok()?;
        if !(2..=LONGEST).contains(&length) || !sys::readable(from.cast(), length) {
            return None;
        }
        let mut bytes = [0; LONGEST];
        // SAFETY: the kernel has just read there; `bytes` is at least `length` long.
        unsafe { core::ptr::copy_nonoverlapping(from.cast::<u8>(), bytes.as_mut_ptr(), length) };
        Some(Self { bytes, length })
    }

    /// From what a system call wrote.
    #[must_use]
    pub fn from_kernel(bytes: AddressBytes, length: usize) -> Self {
        Self { bytes, length: length.min(LONGEST) }
    }

    /// For the kernel.
    #[must_use]
    pub fn as_arg(&self) -> usize {
        from_ref(&self.bytes).expose_provenance()
    }

    /// Its length as the program gave it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is no address at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The bytes that count.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// The kernel's family number; `AF_UNSPEC` if there is none.
    #[must_use]
    pub fn family(&self) -> c_int {
        let [low, high, ..] = self.bytes;
        if self.length < 2 { libc::AF_UNSPEC } else { c_int::from(u16::from_ne_bytes([low, high])) }
    }

    /// What the broker is asked about, for an internet address that the kernel would take.
    #[must_use]
    pub fn internet(&self) -> Option<Addr> {
        self.internet_as(self.family())
    }

    /// As [`Self::internet`], whatever family it says it is of: sendto(2) and bind(2) on an `AF_INET` socket take
    /// `AF_UNSPEC` for `AF_INET` (net/ipv4/udp.c, net/ipv4/af_inet.c).
    #[must_use]
    pub fn internet_as(&self, family: c_int) -> Option<Addr> {
        let [_, _, p0, p1, rest @ ..] = &self.bytes;
        let port = u16::from_be_bytes([*p0, *p1]);
        match family {
            libc::AF_INET if self.length >= V4 => {
                let [a, b, c, d, ..] = *rest;
                Some(Addr::v4([a, b, c, d].into(), port))
            }
            libc::AF_INET6 if self.length >= V6_SHORT => {
                let [f0, f1, f2, f3, rest @ ..] = rest;
                let (ip, rest) = rest.split_first_chunk::<16>()?;
                let [s0, s1, s2, s3, ..] = *rest else { return None };
                let scope = if self.length >= V6 { u32::from_ne_bytes([s0, s1, s2, s3]) } else { 0 };
                let flow = u32::from_ne_bytes([*f0, *f1, *f2, *f3]);
                Some(Addr { flow, ..Addr::v6((*ip).into(), port, scope) })
            }
            _ => None,
        }
    }

    /// The kernel's form of an address that the broker gave.
    #[must_use]
    pub fn from_wire(addr: &Addr) -> Self {
        let mut bytes = [0; LONGEST];
        let [p0, p1] = addr.port.to_be_bytes();
        let mut put = |at: usize, what: &[u8]| {
            for (to, from) in bytes.iter_mut().skip(at).zip(what) {
                *to = *from;
            }
        };
        put(2, &[p0, p1]);
        if addr.family == Family::V6 as u8 {
            put(0, &FAMILY_V6);
            put(4, &addr.flow.to_ne_bytes());
            put(8, &addr.ip);
            put(24, &addr.scope.to_ne_bytes());
            Self { bytes, length: V6 }
        } else {
            put(0, &FAMILY_V4);
            put(4, addr.ip.first_chunk::<4>().unwrap_or(&[0; 4]));
            Self { bytes, length: V4 }
        }
    }

    /// Hands an address to the program as accept(2) does: cut to the room there is, with the true length; with the
    /// kernel's errors.
    ///
    /// # Safety
    /// As for accept(2).
    ///
    /// # Errors
    /// `EFAULT`, `EINVAL`: what the kernel would say of such pointers.
    #[expect(unsafe_code, reason = "memory of the program's")]
    pub unsafe fn give(&self, to: *mut sockaddr, length: *mut socklen_t) -> Result<(), Errno> {
        if !sys::writable(length.cast(), size_of::<socklen_t>()) {
            return Err(Errno(libc::EFAULT));
        }
        // SAFETY: the kernel has just been there.
        let room = unsafe { length.read_unaligned() }.cast_signed();
        let room = usize::try_from(room).map_err(|_| Errno(libc::EINVAL))?.min(self.length);
        if room > 0 && !sys::writable(to.cast(), room) {
            return Err(Errno(libc::EFAULT));
        }
        // SAFETY: `room` is no more than either side has.
        unsafe { core::ptr::copy_nonoverlapping(self.bytes.as_ptr(), to.cast::<u8>(), room) };
        // SAFETY: as above.
        unsafe { length.write_unaligned(socklen_t::try_from(self.length).unwrap_or(0)) };
        Ok(())
    }
}

const FAMILY_V4: [u8; 2] = 2u16.to_ne_bytes(); // AF_INET
const FAMILY_V6: [u8; 2] = 10u16.to_ne_bytes(); // AF_INET6
const _: () = assert!(libc::AF_INET == 2 && libc::AF_INET6 == 10);

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(unsafe_code, reason = "reads an array of the test's own")]
    fn copy(bytes: &[u8]) -> Option<Peer> {
        // SAFETY: the slice is readable for its length.
        unsafe { Peer::copy(bytes.as_ptr().cast(), u32::try_from(bytes.len()).unwrap()) }
    }

    #[test]
    fn addresses_survive_both_forms() {
        for text in ["192.0.2.1:21", "[2001:db8::1]:65535", "[::ffff:192.0.2.1]:80"] {
            let addr = Addr::from(text.parse::<core::net::SocketAddr>().unwrap());
            let peer = Peer::from_wire(&addr);
            assert_eq!(copy(peer.bytes()).unwrap().internet(), Some(addr));
        }
    }

    #[test]
    fn what_the_kernel_would_reject_is_not_judged() {
        assert!(copy(&[2]).is_none());
        assert!(copy(&[0; 129]).is_none());
        let short_v4 = [2, 0, 0, 80, 192, 0, 2, 1];
        assert_eq!(copy(&short_v4).unwrap().internet(), None);
        let mut short_v6 = [0; 23];
        short_v6[0] = 10;
        assert_eq!(copy(&short_v6).unwrap().internet(), None);
        let mut rfc2133 = [0; 24];
        rfc2133[0] = 10;
        assert!(copy(&rfc2133).unwrap().internet().is_some());
    }
}
