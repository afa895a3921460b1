//! Listening sockets: who may reach them, and what holds the others off.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use portcullis_policy::{CertificateFact, ListenerScope, Party, ProcessFact};
use portcullis_types::{Assurance, Protocol, Verdict};
use portcullis_wire::keyd::{Net, Stranger};

use super::{Broker, now_seconds};
use crate::{
    Mode,
    audit::{Line, More},
    keyd::Filter,
    process::{Context, ProcessKey},
    sys::{diag::Found, pidfd_getfd, pidfd_open, proc::ProcDir, realtime, socket::Facts},
};

/// Who may come.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Scope {
    Nobody,
    Anyone,
    /// By rules, and the peers of these sessions.
    Some {
        nets: Vec<SomeNet>,
        sessions: Vec<u64>,
    },
}

/// A prefix from which somebody may come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct SomeNet(pub(super) IpAddr, pub(super) u8);

/// A listening socket of a wrapped process.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) maker: ProcessKey,
    pub(super) number: i32,
    pub(super) inode: u64,
    pub(super) local: SocketAddr,
    pub(super) scope: Scope,
    pub(super) context: Rc<Context>,
    filter: Option<Filter>,
    /// A filter is under it that cannot be exchanged any more (its handle is lost).
    stuck: bool,
    generation: u64,
}

impl Listener {
    pub(super) const fn is_filtered(&self) -> bool {
        self.filter.is_some()
    }

    pub(super) const fn held_by(&self) -> &'static str {
        match (&self.filter, &self.scope) {
            (Some(_), _) => "kernel-filter",
            (None, _) if self.stuck => "kernel-filter",
            (None, Scope::Anyone) => "native",
            (None, _) => "accept",
        }
    }

    pub(super) fn scope_word(&self) -> &'static str {
        match &self.scope {
            Scope::Nobody => "closed",
            Scope::Anyone => "anyone",
            Scope::Some { nets, .. } if nets.is_empty() => "session",
            Scope::Some { .. } => "addresses",
        }
    }
}

/// What listen(2) may do.
#[derive(Debug)]
pub(super) struct Listening {
    pub(super) scope: Scope,
    pub(super) sessions: Vec<super::sessions::Control>,
    pub(super) reason: Option<String>,
}

impl Broker {
    /// Who may reach a listener of this process, by rules and by the sessions it is in.
    pub(super) fn scope_for(
        &mut self,
        context: &Context,
        protocol: Protocol,
        local: SocketAddr,
    ) -> Listening {
        let Some(force) = self.in_force.clone() else {
            return Listening { scope: Scope::Nobody, sessions: Vec::new(), reason: Some(self.no_policy()) };
        };
        let party = Party {
            addr: Some(local.ip()),
            process: ProcessFact::Known(&context.facts),
            certificate: CertificateFact::None,
        };
        let by_rules = force.policy.listener(&party, protocol, local.port(), now_seconds());
        let mut nets = Vec::new();
        let mut reason = None;
        match by_rules {
            ListenerScope::Anyone => {
                return Listening { scope: Scope::Anyone, sessions: Vec::new(), reason: None };
            }
            ListenerScope::Nobody => reason = Some("no rule lets anyone reach it there".to_owned()),
            ListenerScope::Addresses { v4, v6, certificate, processes } => {
                nets.extend(v4.iter().map(|n| SomeNet(n.network().into(), n.prefix_len())));
                nets.extend(v6.iter().map(|n| SomeNet(n.network().into(), n.prefix_len())));
                if processes {
                    nets.extend(self.own_nets());
                }
                if nets.is_empty() && certificate {
                    reason = Some("needs certificate; lane tls not available".to_owned());
                }
            }
        }
        let sessions = if protocol == Protocol::TCP { self.sessions_of(context) } else { Vec::new() };
        if nets.is_empty() && sessions.is_empty() {
            let reason = reason.or_else(|| Some("no rule lets anyone reach it there".to_owned()));
            return Listening { scope: Scope::Nobody, sessions, reason };
        }
        let cookies = sessions.iter().map(|c| c.cookie).collect();
        Listening { scope: Scope::Some { nets, sessions: cookies }, sessions, reason: None }
    }

    /// Prefixes of this host's own addresses, where a process is at the other end.
    fn own_nets(&self) -> Vec<SomeNet> {
        let loopback =
            [SomeNet([127, 0, 0, 0].into(), 8), SomeNet(std::net::Ipv6Addr::LOCALHOST.into(), 128)];
        let own = self.own.iter().map(|ip| SomeNet(ip, if ip.is_ipv4() { 32 } else { 128 }));
        loopback.into_iter().chain(own).collect()
    }

    /// What the kernel is to let through.
    fn nets_of(&self, scope: &Scope) -> Vec<Net> {
        match scope {
            Scope::Nobody => Vec::new(),
            Scope::Anyone => Net::everyone().to_vec(),
            Scope::Some { nets, sessions } => {
                let mut all: Vec<Net> = nets.iter().map(|n| Net::new(n.0, n.1)).collect();
                for control in sessions.iter().filter_map(|c| self.sessions.get(*c)) {
                    let ip = control.remote.ip().to_canonical();
                    let net = Net::new(ip, if ip.is_ipv4() { 32 } else { 128 });
                    if !all.contains(&net) {
                        all.push(net);
                    }
                }
                all
            }
        }
    }

    /// Takes a listener on, and puts a filter under its socket unless anyone may come. The scope is
    /// not [`Scope::Nobody`].
    pub(super) fn add_listener(
        &mut self,
        key: ProcessKey,
        number: i32,
        facts: &Facts,
        local: SocketAddr,
        scope: Scope,
        socket: BorrowedFd<'_>,
    ) -> bool {
        let Some(context) = self.context_of(key) else { return false };
        let earlier = self.listeners.remove(&facts.cookie);
        let mut listener = Listener {
            maker: key,
            number,
            inode: facts.inode,
            local,
            scope,
            context,
            stuck: earlier.as_ref().is_some_and(|l| l.stuck),
            filter: earlier.and_then(|l| l.filter),
            generation: self.generation_in_force(),
        };
        self.fit(facts.cookie, &mut listener, Some(socket));
        let filtered = listener.filter.is_some();
        self.listeners.insert(facts.cookie, listener);
        filtered
    }

    /// After a restart: takes on a listener of a wrapped process, with the filter that it has.
    pub(super) fn adopt_listener(&mut self, context: &Rc<Context>, number: i32, found: &Found) {
        if self.mode == Mode::Audit || self.listeners.contains_key(&found.cookie) {
            return;
        }
        let listening = self.scope_for(context, Protocol::TCP, found.local);
        let mut listener = Listener {
            maker: context.key,
            number,
            inode: found.inode,
            local: found.local,
            scope: listening.scope,
            context: Rc::clone(context),
            filter: self.inherited.remove(&found.cookie).map(Filter::from),
            stuck: false,
            generation: self.generation_in_force(),
        };
        self.fit(found.cookie, &mut listener, None);
        self.listeners.insert(found.cookie, listener);
    }

    /// Puts the listener's scope into the kernel, as far as this host can.
    fn fit(&mut self, cookie: u64, listener: &mut Listener, socket: Option<BorrowedFd<'_>>) {
        let nets = self.nets_of(&listener.scope);
        let Some(keyd) = self.keyd.as_mut().filter(|k| k.filters()) else { return };
        if let Some(filter) = &listener.filter {
            if let Err(error) = keyd.refill(filter, &nets) {
                self.note("broker", &format!("the filter of a listener could not be changed: {error}"), &[]);
            }
            return;
        }
        if listener.scope == Scope::Anyone || listener.stuck {
            return;
        }
        let found: Option<OwnedFd> = match socket {
            Some(_) => None,
            None => fetch(cookie, listener),
        };
        let Some(socket) = socket.or_else(|| found.as_ref().map(AsFd::as_fd)) else { return };
        let Some(keyd) = self.keyd.as_mut() else { return };
        match keyd.filter(socket, cookie, &nets) {
            Ok(filter) => {
                self.leave_filter(cookie, &filter);
                listener.filter = Some(filter);
            }
            Err(error) => {
                listener.stuck = error.raw_os_error() == Some(libc::EALREADY);
                self.note("broker", &format!("a listener could not be filtered: {error}"), &[]);
            }
        }
    }

    /// Finds every listener's scope anew (new generation, new addresses) and puts it into the kernel.
    pub(super) fn refit_listeners(&mut self) {
        let cookies: Vec<u64> = self.listeners.keys().copied().collect();
        let generation = self.generation_in_force();
        for cookie in cookies {
            let Some(mut listener) = self.listeners.remove(&cookie) else { continue };
            let context = Rc::clone(&listener.context);
            let fresh = self.scope_for(&context, Protocol::TCP, listener.local);
            let gone = fresh.scope == Scope::Nobody && listener.scope != Scope::Nobody;
            if fresh.scope != listener.scope || listener.generation != generation {
                listener.scope = fresh.scope;
                listener.generation = generation;
                self.fit(cookie, &mut listener, None);
            }
            if gone {
                let reason = fresh.reason.unwrap_or_default();
                let held = format!("{reason}; the listener is closed to newcomers");
                self.log.push(&Line {
                    process: Some(&context),
                    protocol: Some(Protocol::TCP),
                    local: Some(listener.local),
                    verdict: Some("refuse"),
                    reason: Some(&held),
                    association: Some(cookie),
                    generation: Some(generation),
                    ..Line::bare(realtime(), "listen", "broker")
                });
            }
            self.listeners.insert(cookie, listener);
        }
    }

    /// Closes the listeners that a session opened to newcomers.
    pub(super) fn close_listeners_of(&mut self, session: u64) {
        let concerned: Vec<u64> = self
            .listeners
            .iter()
            .filter(|(_, l)| matches!(&l.scope, Scope::Some { sessions, .. } if sessions.contains(&session)))
            .map(|(c, _)| *c)
            .collect();
        for cookie in concerned {
            let Some(mut listener) = self.listeners.remove(&cookie) else { continue };
            if let Scope::Some { nets, sessions } = &mut listener.scope {
                sessions.retain(|s| *s != session);
                if nets.is_empty() && sessions.is_empty() {
                    listener.scope = Scope::Nobody;
                }
            }
            self.fit(cookie, &mut listener, None);
            self.listeners.insert(cookie, listener);
        }
    }

    /// Puts somebody on record whom a filter dropped.
    pub(super) fn report_stranger(&mut self, stranger: &Stranger) {
        let listener = self.listeners.get(&stranger.tag);
        let context = listener.map(|l| Rc::clone(&l.context));
        let scope = listener.map(|l| l.scope.clone());
        let generation = self.generation_in_force();
        if stranger.missed > 0 {
            let reason =
                format!("{} more attempts were dropped by filters, too many to report each", stranger.missed);
            self.note("accept", &reason, &[("missed", More::Number(stranger.missed))]);
        }
        if stranger.time == 0 {
            return;
        }
        let remote = stranger.source.socket_addr();
        let protocol = Protocol(stranger.protocol);
        let reason = match &scope {
            Some(Scope::Some { nets, .. }) if nets.is_empty() => {
                "only the peer of the session that opened this port may come; dropped unanswered"
            }
            Some(Scope::Nobody) => {
                "the session that opened this port has ended, or no rule permits it any more; dropped unanswered"
            }
            _ => "no rule permits it from this address; dropped unanswered",
        };
        let allow = match (&context, remote) {
            (Some(context), Some(remote)) => {
                self.suggest_inbound(context, protocol, stranger.destination.port, remote.ip())
            }
            _ => None,
        };
        let mut more = Vec::new();
        if let Some(allow) = &allow {
            more.push(("allow", More::Text(allow)));
        }
        let seq = self.log.push(&Line {
            process: context.as_deref(),
            protocol: Some(protocol),
            local: stranger.destination.socket_addr(),
            remote,
            assurance: Some(Assurance::Address),
            verdict: Some(super::word(Verdict::Refuse)),
            reason: Some(reason),
            association: (stranger.tag != 0).then_some(stranger.tag),
            generation: Some(generation),
            more: &more,
            ..Line::bare(stranger.time, "accept", "filter")
        });
        self.last_refusal = Some(seq);
    }
}

/// Takes a listener's socket out of the process that made it, or out of a descendant's hands.
fn fetch(cookie: u64, listener: &Listener) -> Option<OwnedFd> {
    let is_it = |socket: &OwnedFd| Facts::of(socket.as_fd()).is_ok_and(|f| f.cookie == cookie);
    // Whoever has the number by now: it is the socket that counts.
    let pidfd = pidfd_open(listener.maker.pid).ok()?;
    let direct = pidfd_getfd(pidfd.as_fd(), listener.number).ok().filter(&is_it);
    direct.or_else(|| {
        let at = ProcDir::open(listener.maker.pid).ok()?;
        let (number, _) = at.sockets().ok()?.into_iter().find(|(_, i)| *i == listener.inode)?;
        pidfd_getfd(pidfd.as_fd(), number).ok().filter(&is_it)
    })
}
