//! Datagram sockets: replies to one's own queries pass, and what rules let in; the kernel drops the rest.

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portcullis_policy::{CertificateFact, ListenerScope, Party, ProcessFact};
use portcullis_types::Protocol;

use super::{Broker, now_seconds};
use crate::{
    Mode,
    process::{Context, ProcessKey},
    sys::{
        pidfd_getfd,
        socket::{Facts, attach_filter, detach_filter},
    },
    udp_filter::{Heard, PEERS, compile},
};

/// Most sockets that are remembered; the longest unused one goes first.
const MOST: usize = 1 << 16;

/// What is known of one socket.
#[derive(Debug)]
struct Datagram {
    owner: ProcessKey,
    number: i32,
    local: Option<SocketAddr>,
    protocol: Protocol,
    /// Peers that were sent to, the latest last.
    peers: VecDeque<SocketAddr>,
    filtered: bool,
}

/// Sockets by `SO_COOKIE`.
#[derive(Debug, Default)]
pub(super) struct Datagrams {
    all: HashMap<u64, Datagram>,
    order: VecDeque<u64>,
}

impl Datagrams {
    /// Who has a socket, and as which descriptor.
    pub(super) fn maker_of(&self, cookie: u64) -> Option<(ProcessKey, i32)> {
        self.all.get(&cookie).map(|d| (d.owner, d.number))
    }

    /// Whether this socket has sent to that peer, so that the peer may answer.
    pub(super) fn has_asked(&self, cookie: u64, peer: SocketAddr) -> bool {
        self.all.get(&cookie).is_some_and(|d| {
            d.peers
                .iter()
                .any(|asked| asked.port() == peer.port() && (asked.ip() == peer.ip() || is_many(asked.ip())))
        })
    }
}

/// Whether an address stands for many, who answer from their own.
fn is_many(ip: IpAddr) -> bool {
    ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST)
}

/// Who may send to a socket by rules.
enum Inbound {
    Anyone,
    /// Nets; and whether senders on this host are to be judged one by one.
    Some(Vec<(IpNet, u16, u16)>),
}

impl Broker {
    /// Notes that a socket is bound, or sends to `peer`, and puts the filter that follows from it
    /// under the socket. `true`: the kernel lets through nothing but replies, so senders need not be
    /// looked at.
    pub(super) fn fit_datagram(
        &mut self,
        key: ProcessKey,
        number: i32,
        facts: &Facts,
        local: Option<SocketAddr>,
        peer: Option<SocketAddr>,
        socket: BorrowedFd<'_>,
    ) -> bool {
        if self.mode == Mode::Audit {
            return false;
        }
        let Some(context) = self.context_of(key) else { return false };
        if !self.datagrams.all.contains_key(&facts.cookie) {
            while self.datagrams.order.len() >= MOST {
                if let Some(oldest) = self.datagrams.order.pop_front() {
                    self.datagrams.all.remove(&oldest);
                }
            }
            self.datagrams.order.push_back(facts.cookie);
        }
        let inbound = self.inbound(&context, facts.protocol, local);
        let datagram = self.datagrams.all.entry(facts.cookie).or_insert_with(|| Datagram {
            owner: key,
            number,
            local,
            protocol: facts.protocol,
            peers: VecDeque::new(),
            filtered: false,
        });
        (datagram.owner, datagram.number, datagram.local) = (key, number, local);
        if let Some(peer) = peer {
            let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            datagram.peers.retain(|p| *p != peer);
            datagram.peers.push_back(peer);
            while datagram.peers.len() > PEERS {
                datagram.peers.pop_front();
            }
        }
        datagram.fit(inbound, socket)
    }

    fn inbound(&self, context: &Context, protocol: Protocol, local: Option<SocketAddr>) -> Inbound {
        let Some(force) = &self.in_force else { return Inbound::Some(Vec::new()) };
        let party = Party {
            addr: local.map(|l| l.ip()).or(Some(Ipv4Addr::UNSPECIFIED.into())),
            process: ProcessFact::Known(&context.facts),
            certificate: CertificateFact::None,
        };
        let port = local.map_or(0, |l| l.port());
        match force.policy.listener(&party, protocol, port, now_seconds()) {
            ListenerScope::Anyone => Inbound::Anyone,
            ListenerScope::Nobody => Inbound::Some(Vec::new()),
            ListenerScope::Addresses { v4, v6, processes, .. } => {
                let all = |net: IpNet| (net, 0, u16::MAX);
                let mut nets: Vec<_> = v4.into_iter().map(|n| all(n.into())).collect();
                nets.extend(v6.into_iter().map(|n| all(n.into())));
                if processes {
                    // Judged one by one, by who they are.
                    nets.push(all(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8).into()));
                    nets.push(all(Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128).into()));
                    nets.extend(self.own.iter().map(|ip| all(ip.into())));
                }
                Inbound::Some(nets)
            }
        }
    }

    /// Exchanges the filters of all sockets after a reload.
    pub(super) fn refit_datagrams(&mut self) {
        if self.mode == Mode::Audit {
            return;
        }
        let cookies: Vec<u64> = self.datagrams.all.keys().copied().collect();
        for cookie in cookies {
            let Some(datagram) = self.datagrams.all.get(&cookie) else { continue };
            let (owner, number) = (datagram.owner, datagram.number);
            let (protocol, local) = (datagram.protocol, datagram.local);
            let socket = self.processes.get(&owner).and_then(|p| {
                let socket = pidfd_getfd(p.pidfd.as_fd(), number).ok()?;
                Facts::of(socket.as_fd()).is_ok_and(|f| f.cookie == cookie).then_some(socket)
            });
            let (Some(socket), Some(context)) = (socket, self.context_of(owner)) else { continue };
            let inbound = self.inbound(&context, protocol, local);
            if let Some(datagram) = self.datagrams.all.get_mut(&cookie) {
                datagram.fit(inbound, socket.as_fd());
            }
        }
    }

    /// Forgets the sockets of a process that has ended.
    pub(super) fn forget_datagrams(&mut self, key: ProcessKey) {
        self.datagrams.all.retain(|_, d| d.owner != key);
        if self.datagrams.order.len() > 2 * self.datagrams.all.len() + 64 {
            let all = &self.datagrams.all;
            self.datagrams.order.retain(|c| all.contains_key(c));
        }
    }
}

impl Datagram {
    fn fit(&mut self, inbound: Inbound, socket: BorrowedFd<'_>) -> bool {
        let nets = match inbound {
            Inbound::Anyone => {
                if std::mem::take(&mut self.filtered) {
                    detach_filter(socket);
                }
                return false;
            }
            Inbound::Some(nets) => nets,
        };
        let replies_only = nets.is_empty();
        let mut heard = Heard { peers: Vec::with_capacity(self.peers.len()), nets };
        for peer in &self.peers {
            if is_many(peer.ip()) {
                let anyone: IpNet =
                    if peer.is_ipv4() { Ipv4Net::default().into() } else { Ipv6Net::default().into() };
                heard.nets.push((anyone, peer.port(), peer.port()));
            } else {
                heard.peers.push(*peer);
            }
        }
        // What does not fit, or is locked, is looked at by the shim.
        self.filtered = compile(&heard).is_some_and(|program| attach_filter(socket, &program).is_ok());
        self.filtered && replies_only
    }
}
