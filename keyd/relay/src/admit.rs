//! How many handshakes may be under way, and whose turn it is. Pure.
//!
//! When there are too many, the one that began first goes: an honest peer is done in milliseconds, one that
//! only holds its place is not. Turns go round by peer address, so a flood waits behind itself.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    net::{IpAddr, Ipv6Addr},
};

use crate::Id;

/// Whom a handshake counts for: an IPv4 address, or an IPv6 network of 64 bits.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Peer(IpAddr);

impl Peer {
    pub(crate) fn new(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(six) => {
                let [a, b, c, d, ..] = six.segments();
                IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
            }
            four => four,
        })
    }
}

/// Handshakes under way, by peer; ids grow, so the smallest began first.
#[derive(Debug)]
pub(crate) struct Admission {
    total: usize,
    per_peer: usize,
    all: BTreeSet<Id>,
    by_peer: HashMap<Peer, BTreeSet<Id>>,
}

impl Admission {
    pub(crate) fn new(total: usize, per_peer: usize) -> Self {
        Self { total: total.max(1), per_peer: per_peer.max(1), all: BTreeSet::new(), by_peer: HashMap::new() }
    }

    /// Takes one more, and names the one that must go for it.
    pub(crate) fn enter(&mut self, peer: Peer, id: Id) -> Option<Id> {
        let own = self.by_peer.entry(peer).or_default();
        own.insert(id);
        self.all.insert(id);
        if own.len() > self.per_peer {
            own.first().copied()
        } else if self.all.len() > self.total {
            self.all.first().copied()
        } else {
            None
        }
    }

    pub(crate) fn leave(&mut self, peer: Peer, id: Id) {
        self.all.remove(&id);
        if let Some(own) = self.by_peer.get_mut(&peer) {
            own.remove(&id);
            if own.is_empty() {
                self.by_peer.remove(&peer);
            }
        }
    }
}

/// Handshakes that have something to do, one peer after the other.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    peers: VecDeque<Peer>,
    waiting: HashMap<Peer, VecDeque<Id>>,
    queued: HashSet<Id>,
}

impl Turns {
    /// Queues `id` unless it is queued already.
    pub(crate) fn push(&mut self, peer: Peer, id: Id) {
        if !self.queued.insert(id) {
            return;
        }
        let own = self.waiting.entry(peer).or_default();
        if own.is_empty() {
            self.peers.push_back(peer);
        }
        own.push_back(id);
    }

    pub(crate) fn pop(&mut self) -> Option<Id> {
        let peer = self.peers.pop_front()?;
        let own = self.waiting.get_mut(&peer)?;
        let id = own.pop_front()?;
        self.queued.remove(&id);
        if own.is_empty() {
            self.waiting.remove(&peer);
        } else {
            self.peers.push_back(peer);
        }
        Some(id)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(last: u8) -> Peer {
        Peer::new(IpAddr::from([192, 0, 2, last]))
    }

    #[test]
    fn the_peer_with_too_many_loses_its_oldest() {
        let mut admission = Admission::new(10, 2);
        assert_eq!(admission.enter(peer(1), Id(1)), None);
        assert_eq!(admission.enter(peer(2), Id(2)), None);
        assert_eq!(admission.enter(peer(2), Id(3)), None);
        assert_eq!(admission.enter(peer(2), Id(4)), Some(Id(2)));
        admission.leave(peer(2), Id(2));
        assert_eq!(admission.enter(peer(1), Id(5)), None);
    }

    #[test]
    fn with_too_many_in_all_the_oldest_goes() {
        let mut admission = Admission::new(3, 3);
        for id in 1..=3 {
            assert_eq!(admission.enter(peer(1), Id(id)), None);
        }
        assert_eq!(admission.enter(peer(2), Id(4)), Some(Id(1)));
    }

    #[test]
    fn neighbours_in_one_ipv6_network_are_one_peer() {
        let one = |text: &str| Peer::new(text.parse().unwrap());
        assert_eq!(one("2001:db8::1"), one("2001:db8::ffff:0:0:2"));
        assert_ne!(one("2001:db8::1"), one("2001:db8:0:1::1"));
        assert_eq!(one("::ffff:192.0.2.1"), peer(1));
    }

    #[test]
    fn a_flood_waits_behind_itself() {
        let mut turns = Turns::default();
        for id in 1..=100 {
            turns.push(peer(1), Id(id));
        }
        turns.push(peer(2), Id(200));
        turns.push(peer(2), Id(200));
        let order: Vec<Id> = std::iter::from_fn(|| turns.pop()).collect();
        assert_eq!(order.get(1), Some(&Id(200)));
        assert_eq!(order.len(), 101);
        assert!(turns.is_empty());
    }
}
