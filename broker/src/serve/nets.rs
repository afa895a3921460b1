//! Prefixes from which somebody may come.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use ipnet::IpNet;
use portcullis_wire::keyd::Net;

/// A prefix: network and length.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct SomeNet(pub(super) IpAddr, pub(super) u8);

impl SomeNet {
    /// One address.
    pub(super) const fn of(ip: IpAddr) -> Self {
        let ip = ip.to_canonical();
        Self(ip, if ip.is_ipv4() { 32 } else { 128 })
    }

    /// As the key daemon is told of it.
    pub(super) fn passes(self) -> Net {
        Net::new(self.0, self.1)
    }

    /// As a prefix of its family.
    pub(super) fn prefix(self) -> Option<IpNet> {
        IpNet::new(self.0, self.1).ok()
    }

    /// Its family, and its first and last address.
    fn ends(self) -> (bool, u128, u128) {
        let (is_v6, bits, width) = match self.0 {
            IpAddr::V4(ip) => (false, u32::from(ip).into(), 32),
            IpAddr::V6(ip) => (true, u128::from(ip), 128),
        };
        let free: u32 = u32::from(width - self.1.min(width));
        let rest = 1_u128.checked_shl(free).map_or(u128::MAX, |size| size - 1);
        (is_v6, bits & !rest, bits | rest)
    }
}

impl From<IpNet> for SomeNet {
    fn from(net: IpNet) -> Self {
        Self(net.network(), net.prefix_len())
    }
}

/// What lies in both of two lists.
pub(super) fn common(one: &[SomeNet], two: &[SomeNet]) -> Vec<SomeNet> {
    let (in_one, in_two): (Nets, Nets) = (one.iter().collect(), two.iter().collect());
    let there: HashSet<_> = one.iter().map(|net| net.ends()).collect();
    let narrower = two.iter().filter(|net| in_one.cover(**net) && !there.contains(&net.ends()));
    one.iter().filter(|net| in_two.cover(**net)).chain(narrower).copied().collect()
}

/// Many of them, for look-up: by family and first address, the last one. None is inside another.
#[derive(Debug, Default)]
pub(super) struct Nets(BTreeMap<(bool, u128), u128>);

impl<'a> FromIterator<&'a SomeNet> for Nets {
    fn from_iter<I: IntoIterator<Item = &'a SomeNet>>(nets: I) -> Self {
        let mut sorted: Vec<_> = nets.into_iter().map(|net| net.ends()).collect();
        // Prefixes lie apart or inside one another: the wider comes first.
        sorted.sort_by_key(|(is_v6, first, last)| (*is_v6, *first, u128::MAX - last));
        let mut all = Self::default();
        for (is_v6, first, last) in sorted {
            if !all.has(is_v6, first, last) {
                all.0.insert((is_v6, first), last);
            }
        }
        all
    }
}

impl Nets {
    /// Whether a prefix is in one of these.
    pub(super) fn cover(&self, net: SomeNet) -> bool {
        let (is_v6, first, last) = net.ends();
        self.has(is_v6, first, last)
    }

    fn has(&self, is_v6: bool, first: u128, last: u128) -> bool {
        let before = self.0.range((is_v6, 0)..=(is_v6, first)).next_back();
        before.is_some_and(|(_, end)| *end >= last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_covered_by_itself_and_by_a_wider_one_of_its_family() {
        let net = |text: &str| {
            let (ip, bits) = text.split_once('/').unwrap();
            SomeNet(ip.parse().unwrap(), bits.parse().unwrap())
        };
        let all = ["10.0.0.2/32", "10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32", "::1/128"].map(net);
        let nets: Nets = all.iter().collect();
        for inside in
            ["10.0.0.2/32", "10.0.0.4/30", "10.0.0.0/8", "192.0.2.9/32", "2001:db8::/32", "2001:db8:1::/48"]
        {
            assert!(nets.cover(net(inside)), "{inside}");
        }
        for outside in
            ["0.0.0.0/0", "8.0.0.0/6", "11.0.0.0/32", "192.0.2.0/23", "::/0", "2001:db9::/32", "::2/128"]
        {
            assert!(!nets.cover(net(outside)), "{outside}");
        }
        let everybody: Nets = [net("::/0")].iter().collect();
        assert!(everybody.cover(net("::/0")) && everybody.cover(net("ff00::/8")));
        assert!(!everybody.cover(net("10.0.0.0/8")), "no prefix of IPv6 is for IPv4");
        assert!(!Nets::default().cover(SomeNet::of([10, 0, 0, 1].into())));
    }
}
