//! Socket addresses in one fixed layout.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Address family as this protocol numbers it (not the kernel's `AF_*`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Family {
    /// No address: unbound, unconnected, or not asked for.
    None = 0,
    /// `AF_INET`.
    V4 = 4,
    /// `AF_INET6`, v4-mapped addresses included: the socket's family is told, not the peer's.
    V6 = 6,
    /// Any other family that carries traffic; the kernel's number is in `Request::domain`.
    Other = 255,
}

/// A transport address. 28 bytes, no padding.
///
/// `port` is in host byte order; `ip` in network byte order, v4 in its first four bytes and the
/// rest zero; `scope` is the interface index of a link-local v6 address.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Addr {
    /// One of [`Family`].
    pub family: u8,
    /// Zero.
    pub reserved: u8,
    /// Port in host byte order; 0 if the protocol has none or none is bound.
    pub port: u16,
    /// `sin6_scope_id`; 0 otherwise.
    pub scope: u32,
    /// `sin6_flowinfo`, as the program gave it; 0 otherwise.
    pub flow: u32,
    /// The address, see above.
    pub ip: [u8; 16],
}

impl Addr {
    /// No address.
    pub const NONE: Self = Self { family: 0, reserved: 0, port: 0, scope: 0, flow: 0, ip: [0; 16] };

    /// An IPv4 address; `port` in host byte order.
    #[must_use]
    pub const fn v4(ip: Ipv4Addr, port: u16) -> Self {
        let o = ip.octets();
        let ip = [o[0], o[1], o[2], o[3], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        Self { family: Family::V4 as u8, reserved: 0, port, scope: 0, flow: 0, ip }
    }

    /// An IPv6 address; `port` in host byte order.
    #[must_use]
    pub const fn v6(ip: Ipv6Addr, port: u16, scope: u32) -> Self {
        Self { family: Family::V6 as u8, reserved: 0, port, scope, flow: 0, ip: ip.octets() }
    }

    /// The address without port, v4-mapped ones as IPv4 (RFC 4291, 2.5.5.2): what a policy sees.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        let [a, b, c, d, ..] = self.ip;
        match self.family {
            4 => Some(IpAddr::V4(Ipv4Addr::new(a, b, c, d))),
            6 => Some(IpAddr::V6(Ipv6Addr::from(self.ip)).to_canonical()),
            _ => None,
        }
    }

    /// The address with port, v4-mapped ones as IPv4.
    #[must_use]
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        Some(match self.ip()? {
            IpAddr::V4(ip) => SocketAddr::V4(SocketAddrV4::new(ip, self.port)),
            IpAddr::V6(ip) => SocketAddr::V6(SocketAddrV6::new(ip, self.port, self.flow, self.scope)),
        })
    }

    /// 128-bit form in which v4 is v4-mapped, so that one prefix length serves both families.
    #[must_use]
    pub fn key(&self) -> u128 {
        let [a, b, c, d, ..] = self.ip;
        match self.family {
            4 => Ipv4Addr::new(a, b, c, d).to_ipv6_mapped().to_bits(),
            6 => u128::from_be_bytes(self.ip),
            _ => 0,
        }
    }
}

/// Whether an address may stand for somebody else: the key daemon's tokens are loopback addresses of their own
/// (127.64.0.0/10), and in IPv6 ports of the only one there is.
#[must_use]
pub const fn is_token(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => matches!(ip.octets(), [127, 64..=127, ..]),
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(four) => matches!(four.octets(), [127, 64..=127, ..]),
            None => ip.is_loopback(),
        },
    }
}

impl From<SocketAddr> for Addr {
    fn from(from: SocketAddr) -> Self {
        match from {
            SocketAddr::V4(a) => Self::v4(*a.ip(), a.port()),
            SocketAddr::V6(a) => Self { flow: a.flowinfo(), ..Self::v6(*a.ip(), a.port(), a.scope_id()) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_v6_and_v4_have_one_key() {
        let four = Addr::from("192.0.2.1:80".parse::<SocketAddr>().unwrap());
        let six = Addr::from("[::ffff:192.0.2.1]:80".parse::<SocketAddr>().unwrap());
        assert_eq!(four.key(), six.key());
        assert_eq!(four.ip(), six.ip());
        assert_ne!(four.family, six.family);
    }
}
