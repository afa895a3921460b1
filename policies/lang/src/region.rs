//! How far around a flow its decision holds.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    facts::{Flow, Side},
    model::{Address, Atom, Rule},
};

/// Addresses at which some condition changes, by side: the first of each run of equal ones.
#[derive(Debug)]
pub(crate) struct Edges {
    from: (Vec<u32>, Vec<u128>),
    to: (Vec<u32>, Vec<u128>),
}

impl Edges {
    pub(crate) fn new(rules: &[Rule]) -> Self {
        // What is at a loopback address is of this host; what is mapped counts as IPv4.
        let start = || {
            let v4 = vec![0, 0x7f00_0000, 0x8000_0000];
            let v6 = vec![0, 1, 2, 0xffff_0000_0000, 0x1_0000_0000_0000];
            (v4, v6)
        };
        let mut edges = Self { from: start(), to: start() };
        for rule in rules {
            for (expr, (v4, v6)) in [(&rule.from, &mut edges.from), (&rule.to, &mut edges.to)] {
                expr.atoms(false, &mut |atom, _| {
                    if let Atom::Address(set) = atom {
                        v4.extend(
                            set.v4.iter().flat_map(|(low, high)| [Some(*low), high.checked_add(1)]).flatten(),
                        );
                        v6.extend(
                            set.v6.iter().flat_map(|(low, high)| [Some(*low), high.checked_add(1)]).flatten(),
                        );
                    }
                });
                // Sets that many rules name would be kept many times.
                if v4.len() + v6.len() > 1 << 20 {
                    tidy(v4, v6);
                }
            }
        }
        tidy(&mut edges.from.0, &mut edges.from.1);
        tidy(&mut edges.to.0, &mut edges.to.1);
        edges
    }

    /// The largest prefix around the far address in which no condition changes.
    pub(crate) fn around(&self, flow: &Flow<'_>) -> IpNet {
        let (party, (v4, v6)) =
            if flow.far == Side::To { (flow.to, &self.to) } else { (flow.from, &self.from) };
        match Address::new(party.addr) {
            Address::V4(address) => {
                let next = v4.partition_point(|edge| *edge <= address);
                let low = next.checked_sub(1).and_then(|n| v4.get(n)).copied().unwrap_or(0);
                let high = v4.get(next).map_or(u32::MAX, |edge| edge - 1);
                let fits =
                    |net: &Ipv4Net| u32::from(net.network()) >= low && u32::from(net.broadcast()) <= high;
                let widest =
                    (0..=32).filter_map(|n| Ipv4Net::new(Ipv4Addr::from(address), n).ok()).find(fits);
                widest.map_or_else(|| IpAddr::V4(address.into()).into(), |net| net.trunc().into())
            }
            Address::V6(address) => {
                let next = v6.partition_point(|edge| *edge <= address);
                let low = next.checked_sub(1).and_then(|n| v6.get(n)).copied().unwrap_or(0);
                let high = v6.get(next).map_or(u128::MAX, |edge| edge - 1);
                let fits =
                    |net: &Ipv6Net| u128::from(net.network()) >= low && u128::from(net.broadcast()) <= high;
                let widest =
                    (0..=128).filter_map(|n| Ipv6Net::new(Ipv6Addr::from(address), n).ok()).find(fits);
                widest.map_or_else(|| IpAddr::V6(address.into()).into(), |net| net.trunc().into())
            }
            // No flow has this as its far address, so nothing is ever found under it.
            Address::Unknown | Address::Absent => IpAddr::V6(Ipv6Addr::UNSPECIFIED).into(),
        }
    }
}

fn tidy(v4: &mut Vec<u32>, v6: &mut Vec<u128>) {
    v4.sort_unstable();
    v4.dedup();
    v6.sort_unstable();
    v6.dedup();
}

/// The shortest list of IPv4 prefixes for an inclusive range.
pub(crate) fn prefixes_v4(low: u32, high: u32) -> impl Iterator<Item = Ipv4Net> {
    ipnet::Ipv4Subnets::new(low.into(), high.into(), 0)
}

/// The shortest list of IPv6 prefixes for an inclusive range.
pub(crate) fn prefixes_v6(low: u128, high: u128) -> impl Iterator<Item = Ipv6Net> {
    ipnet::Ipv6Subnets::new(low.into(), high.into(), 0)
}
