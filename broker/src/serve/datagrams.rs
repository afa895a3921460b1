//! Datagram sockets: replies to one's own queries pass, and what rules let in; the kernel drops the rest.

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portcullis_policy::{CertificateFact, ListenerScope, Party, Policy, ProcessFact};
use portcullis_types::Protocol;

use super::{
    Broker,
    nets::{SomeNet, common},
    now_seconds,
};
use crate::{
    Mode,
    process::{Context, ProcessKey},
    sys::{
        diag::Found,
        pidfd_getfd, pidfd_open,
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

impl Inbound {
    /// Who may by both.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Anyone, it) | (it, Self::Anyone) => it,
            (Self::Some(one), Self::Some(two)) => Self::Some(both(&one, &two)),
        }
    }
}

/// What lies in both of two lists.
fn both(one: &[(IpNet, u16, u16)], two: &[(IpNet, u16, u16)]) -> Vec<(IpNet, u16, u16)> {
    let nets =
        |all: &[(IpNet, u16, u16)]| all.iter().map(|(net, ..)| SomeNet::from(*net)).collect::<Vec<_>>();
    let (one, two) = (nets(one), nets(two));
    let shared = common(&one, &two);
    shared.into_iter().filter_map(|net| Some((net.prefix()?, 0, u16::MAX))).collect()
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
        let Some(context) = self.context_of(key) else { return false };
        if self.mode_for(&context) == Mode::Audit {
            return false;
        }
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
        let Ok(rulings) = self.rulings(context) else { return Inbound::Some(Vec::new()) };
        let mode = self.mode_for(context);
        let some = rulings.iter().filter(|it| it.mode == mode);
        some.map(|it| self.inbound_by(&it.policy, context, protocol, local))
            .fold(Inbound::Anyone, Inbound::and)
    }

    fn inbound_by(
        &self,
        policy: &Policy,
        context: &Context,
        protocol: Protocol,
        local: Option<SocketAddr>,
    ) -> Inbound {
        let party = Party {
            addr: local.map(|l| l.ip()).or(Some(Ipv4Addr::UNSPECIFIED.into())),
            process: ProcessFact::Known(&context.facts),
            certificate: CertificateFact::None,
        };
        let port = local.map_or(0, |l| l.port());
        match policy.listener(&party, protocol, port, now_seconds()) {
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

    /// After a restart: takes on a socket of a wrapped process. Whom it has sent to is not known any more, so the filter
    /// that it has stays until the next generation.
    pub(super) fn adopt_datagram(&mut self, owner: ProcessKey, number: i32, found: &Found) {
        let datagram = Datagram {
            owner,
            number,
            local: Some(found.local),
            protocol: Protocol::UDP,
            peers: Some(found.remote).filter(|at| at.port() != 0).into_iter().collect(),
            filtered: true,
        };
        self.datagrams.order.push_back(found.cookie);
        self.datagrams.all.insert(found.cookie, datagram);
    }

    /// Exchanges the filters of all sockets after a reload.
    pub(super) fn refit_datagrams(&mut self) {
        let cookies: Vec<u64> = self.datagrams.all.keys().copied().collect();
        for cookie in cookies {
            let Some(datagram) = self.datagrams.all.get(&cookie) else { continue };
            let (owner, number) = (datagram.owner, datagram.number);
            let (protocol, local) = (datagram.protocol, datagram.local);
            let is_it = |socket: &OwnedFd| Facts::of(socket.as_fd()).is_ok_and(|f| f.cookie == cookie);
            let pidfd = match self.processes.get(&owner) {
                Some(process) => process.pidfd.try_clone().ok(),
                None => pidfd_open(owner.pid).ok(),
            };
            let socket = pidfd.and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), number).ok()).filter(is_it);
            // One that has not asked since a broker before was there is looked up.
            let context = self
                .context_of(owner)
                .or_else(|| self.look_up(owner.pid).map(Rc::new))
                .filter(|c| c.key == owner);
            let (Some(socket), Some(context)) = (socket, context) else {
                if !self.processes.contains_key(&owner) {
                    self.datagrams.all.remove(&cookie);
                }
                continue;
            };
            if self.mode_for(&context) == Mode::Audit {
                continue;
            }
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
