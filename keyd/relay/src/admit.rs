//! How many handshakes may be under way, and whose turn it is. Pure.
//!
//! When there are too many, one goes that its peer keeps waiting: first of those that have not sent a whole
//! ClientHello, then of the rest, the one that began first. An honest peer is done in milliseconds; one that only
//! holds its place is not. What waits for us goes last, since that is no fault of its peer. Turns go round by peer
//! address, so a flood waits behind itself.

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

/// Whom a handshake waits for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Waits {
    /// For the ClientHello of its peer, or for it to leave.
    Hello,
    /// For its peer to go on.
    Peer,
    /// For its turn.
    Turn,
}

/// Handshakes under way, by peer. Ids grow, so the smallest of a thread's began first.
#[derive(Debug)]
pub(crate) struct Admission {
    total: usize,
    per_peer: usize,
    under_way: HashMap<Id, (Peer, Waits)>,
    all: BTreeSet<(Waits, Id)>,
    by_peer: HashMap<Peer, BTreeSet<(Waits, Id)>>,
}

impl Admission {
    pub(crate) fn new(total: usize, per_peer: usize) -> Self {
        Self {
            total: total.max(1),
            per_peer: per_peer.max(1),
            under_way: HashMap::new(),
            all: BTreeSet::new(),
            by_peer: HashMap::new(),
        }
    }

    /// Takes one more, which waits for us, and names the one that must go for it, and has left: itself, if all wait for
    /// us.
    pub(crate) fn enter(&mut self, peer: Peer, id: Id) -> Option<Id> {
        let place = (Waits::Turn, id);
        let own = self.by_peer.entry(peer).or_default();
        own.insert(place);
        self.all.insert(place);
        self.under_way.insert(id, (peer, Waits::Turn));
        let crowd = if own.len() > self.per_peer {
            &*own
        } else if self.all.len() > self.total {
            &self.all
        } else {
            return None;
        };
        let goes = crowd.first().map(|(waits, first)| if *waits == Waits::Turn { id } else { *first });
        goes.inspect(|id| self.leave(*id))
    }

    /// Notes whom one of them waits for now.
    pub(crate) fn waits(&mut self, id: Id, now: Waits) {
        let Some((peer, before)) = self.under_way.get_mut(&id) else { return };
        let before = std::mem::replace(before, now);
        if before != now {
            let own = self.by_peer.get_mut(peer);
            for places in own.into_iter().chain([&mut self.all]) {
                places.remove(&(before, id));
                places.insert((now, id));
            }
        }
    }

    pub(crate) fn leave(&mut self, id: Id) {
        let Some((peer, waits)) = self.under_way.remove(&id) else { return };
        self.all.remove(&(waits, id));
        if let Some(own) = self.by_peer.get_mut(&peer) {
            own.remove(&(waits, id));
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

    pub(crate) fn len(&self) -> usize {
        self.queued.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(last: u8) -> Peer {
        Peer::new(IpAddr::from([192, 0, 2, last]))
    }

    #[test]
    fn the_peer_with_too_many_loses_the_oldest_that_it_keeps_waiting() {
        let mut admission = Admission::new(10, 3);
        assert_eq!(admission.enter(peer(1), Id(1)), None);
        for id in 2..=4 {
            assert_eq!(admission.enter(peer(2), Id(id)), None);
        }
        admission.waits(Id(2), Waits::Peer);
        admission.waits(Id(3), Waits::Hello);
        assert_eq!(admission.enter(peer(2), Id(5)), Some(Id(3)), "the silent one");
        assert_eq!(admission.enter(peer(2), Id(6)), Some(Id(2)), "then who has said something");
        assert_eq!(admission.enter(peer(2), Id(7)), Some(Id(7)), "all wait for us: no more for now");
        assert_eq!(admission.enter(peer(1), Id(8)), None, "others come in");
    }

    #[test]
    fn with_too_many_in_all_the_oldest_goes() {
        let mut admission = Admission::new(3, 3);
        for id in 1..=3 {
            assert_eq!(admission.enter(peer(1), Id(id)), None);
            admission.waits(Id(id), Waits::Hello);
        }
        admission.waits(Id(1), Waits::Turn);
        assert_eq!(admission.enter(peer(2), Id(4)), Some(Id(2)));
    }

    #[test]
    fn what_left_is_counted_nowhere() {
        let mut admission = Admission::new(3, 3);
        admission.enter(peer(1), Id(1));
        admission.leave(Id(1));
        admission.waits(Id(1), Waits::Peer);
        assert!(admission.all.is_empty() && admission.by_peer.is_empty() && admission.under_way.is_empty());
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
