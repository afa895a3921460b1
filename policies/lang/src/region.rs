//! How far around a flow its decision holds.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    decision::Region,
    facts::{Flow, Side},
    model::Address,
};

/// The flow's own address and port, and nothing around them.
pub(crate) fn point(flow: &Flow<'_>) -> Region {
    let party = if flow.far == Side::To { flow.to } else { flow.from };
    let prefix = match Address::new(party.addr) {
        Address::V4(v4) => IpNet::from(IpAddr::V4(Ipv4Addr::from(v4))),
        Address::V6(v6) => IpNet::from(IpAddr::V6(Ipv6Addr::from(v6))),
        Address::Unknown | Address::Absent => IpNet::V6(Ipv6Net::default()),
    };
    Region { prefix, ports: flow.port..=flow.port }
}

/// The shortest list of IPv4 prefixes for an inclusive range.
pub(crate) fn prefixes_v4(low: u32, high: u32) -> impl Iterator<Item = Ipv4Net> {
    ipnet::Ipv4Subnets::new(low.into(), high.into(), 0)
}

/// The shortest list of IPv6 prefixes for an inclusive range.
pub(crate) fn prefixes_v6(low: u128, high: u128) -> impl Iterator<Item = Ipv6Net> {
    ipnet::Ipv6Subnets::new(low.into(), high.into(), 0)
}
