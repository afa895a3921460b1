//! Which addresses are this host's own, and word of changes.

use std::{
    collections::HashSet,
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// `RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR` (linux/rtnetlink.h).
const GROUPS: u32 = 0x10 | 0x100;

/// The host's own addresses.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Own(HashSet<IpAddr>);

impl Own {
    /// Reads them.
    ///
    /// # Errors
    /// As getifaddrs(3).
    pub fn read() -> io::Result<Self> {
        let all = nix::ifaddrs::getifaddrs()?.filter_map(|i| i.address).filter_map(|a| {
            let v4 = a.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| a.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        });
        Ok(Self(all.collect()))
    }

    /// Whether a flow to or from `ip` stays on this host: loopback, one of the host's addresses, or
    /// unspecified (which connect(2) takes for loopback).
    #[must_use]
    pub fn has(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_loopback() || ip.is_unspecified() || self.0.contains(&ip)
    }

    /// All but loopback, which is whole prefixes.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.0.iter().copied().filter(|ip| !ip.is_loopback())
    }
}

/// Word of changed addresses.
#[derive(Debug)]
pub struct Changes(OwnedFd);

impl Changes {
    /// # Errors
    /// The kernel has no rtnetlink.
    pub fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
        Ok(Self(netlink))
    }

    /// Empties it; what changed is read anew by [`Own::read`].
    pub fn take(&self) {
        let mut buffer = [0; 8192];
        while matches!(
            recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()),
            Ok(_) | Err(nix::Error::ENOBUFS)
        ) {}
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_always_own_and_the_world_is_not() {
        let own = Own::read().unwrap();
        for ip in ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1"] {
            assert!(own.has(ip.parse().unwrap()), "{ip}");
        }
        assert!(!own.has("192.0.2.77".parse().unwrap()));
    }
}
