//! Listening sockets: who may reach them, and what holds the others off.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use portcullis_policy::{CertificateFact, ListenerScope, Party, Policy, ProcessFact};
use portcullis_types::{Assurance, Lane, Op, Protocol, Verdict};
use portcullis_wire::keyd::{Net, Places, Speech, Stranger};

use super::{
    Broker,
    judge::Call,
    layers::Ruling,
    nets::{Nets, SomeNet, common},
    now_seconds,
};
use crate::{
    Mode,
    audit::{Line, More},
    decide::{self, Far},
    keyd::Filter,
    process::{Context, ProcessKey},
    sys::{diag::Found, pidfd_getfd, pidfd_open, proc::ProcDir, realtime, socket::Facts},
};

/// Connections that may wait at a front until they are looked at.
const BACKLOG: u32 = 1024;

/// Why a filter has dropped somebody whom a front would have taken before any filter saw him.
const NO_FRONT: &str = "whoever comes from there is asked for a certificate, and no key daemon was there to ask; \
    dropped unanswered";

/// A front's number as news of its peers tell it.
const fn low(front: u64) -> u32 {
    let [a, b, c, d, ..] = front.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Who may come.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Scope {
    Nobody,
    Anyone,
    /// By rules, and the peers of these sessions.
    Some {
        nets: Vec<SomeNet>,
        sessions: Vec<u64>,
        /// From here others may, by their certificates.
        proven: Vec<SomeNet>,
        /// This host's own addresses, whose processes may by the certificates that they would have.
        own: Vec<SomeNet>,
    },
}

impl Scope {
    /// Whether only peers of sessions may come.
    pub(super) fn is_of_sessions(&self) -> bool {
        matches!(self, Self::Some { nets, proven, own, .. } if [nets, proven, own].iter().all(|some| some.is_empty()))
    }
}

impl Scope {
    /// Who may by both. `peer`: the address of a session's peer.
    fn and(self, other: Self, peer: impl Fn(u64) -> Option<IpAddr>) -> Self {
        let (Self::Some { nets, sessions, proven, own }, two) = (match (self, other) {
            (Self::Nobody, _) | (_, Self::Nobody) => return Self::Nobody,
            (Self::Anyone, it) | (it, Self::Anyone) => return it,
            both => both,
        }) else {
            return Self::Nobody;
        };
        let Self::Some { nets: nets2, sessions: sessions2, proven: proven2, own: own2 } = two else {
            return Self::Nobody;
        };
        // One who must prove who he is for one of them, does so.
        let either = |one: &[SomeNet], two: &[SomeNet]| {
            let mut all = common(one, two);
            all.extend(common(&nets, two));
            all.extend(common(one, &nets2));
            all
        };
        let (proven, own) = (either(&proven, &proven2), either(&own, &own2));
        // A session's peer may by one, and by the other as such or by his address.
        let may = |session: &u64, sessions: &[u64], nets: &[SomeNet]| {
            let comes = |ip| nets.iter().collect::<Nets>().cover(SomeNet::of(ip));
            sessions.contains(session) || peer(*session).is_some_and(comes)
        };
        let mut both: Vec<u64> = sessions.iter().filter(|s| may(s, &sessions2, &nets2)).copied().collect();
        both.extend(sessions2.iter().filter(|s| !sessions.contains(s) && may(s, &[], &nets)));
        let nets = common(&nets, &nets2);
        match nets.is_empty() && both.is_empty() && proven.is_empty() && own.is_empty() {
            true => Self::Nobody,
            false => Self::Some { nets, sessions: both, proven, own },
        }
    }
}

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
    /// The key daemon's front before it, where peers prove who they are.
    pub(super) front: Option<u64>,
    /// Why there is none, if there should be.
    pub(super) unprotected: Option<String>,
    /// A filter is under it that cannot be exchanged any more (its handle is lost).
    stuck: bool,
    generation: u64,
    /// A data port: it was opened for the peers of sessions alone.
    pub(super) data: bool,
}

impl Listener {
    pub(super) const fn is_filtered(&self) -> bool {
        self.filter.is_some()
    }

    pub(super) const fn held_by(&self) -> &'static str {
        match (&self.filter, &self.scope) {
            (Some(_), _) if self.front.is_some() => "front",
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
            scope if scope.is_of_sessions() => "session",
            Scope::Some { nets, .. } if nets.is_empty() => "certificates",
            Scope::Some { proven, .. } if !proven.is_empty() => "certificates and addresses",
            Scope::Some { .. } => "addresses",
        }
    }
}

/// What listen(2) may do.
#[derive(Debug)]
pub(super) struct Listening {
    pub(super) scope: Scope,
    pub(super) sessions: Vec<super::sessions::Control>,
    /// Why nobody may come, and by which layer.
    pub(super) reason: Option<(u8, String)>,
    /// The same of a policy that is only watched.
    pub(super) would: Option<(u8, String)>,
}

impl Listening {
    const fn nobody(layer: u8, reason: String) -> Self {
        Self { scope: Scope::Nobody, sessions: Vec::new(), reason: Some((layer, reason)), would: None }
    }
}

const NOBODY: &str = "no rule lets anyone reach it there";

impl Broker {
    /// Who may reach a listener of this process, by rules and by the sessions it is in: by all policies that it is
    /// under.
    pub(super) fn scope_for(
        &mut self,
        context: &Context,
        protocol: Protocol,
        local: SocketAddr,
    ) -> Listening {
        let rulings = match self.rulings(context) {
            Ok(rulings) => rulings,
            Err(why) => return Listening::nobody(0, why),
        };
        let mode = self.mode_for(context);
        let (mut sum, mut would): (Option<Listening>, _) = (None, None);
        for ruling in rulings {
            let one = self.scope_by(&ruling, context, protocol, local);
            if ruling.mode != mode {
                would = would.or(one.reason);
            } else if one.scope == Scope::Nobody {
                return one;
            } else if let Some(before) = sum.take() {
                let peer = |session| self.sessions.get(session).map(|control| control.remote.ip());
                let scope = before.scope.and(one.scope, peer);
                let mut sessions = before.sessions;
                sessions.extend(one.sessions);
                if let Scope::Some { sessions: those, .. } = &scope {
                    sessions.retain(|control| those.contains(&control.cookie));
                }
                sessions.sort_by_key(|control| control.cookie);
                sessions.dedup_by_key(|control| control.cookie);
                let none =
                    || (ruling.layer, "no rule lets anyone reach it there whom the others let".to_owned());
                let reason = (scope == Scope::Nobody).then(none);
                sum = Some(Listening { scope, sessions, reason, would: None });
            } else {
                sum = Some(one);
            }
        }
        let sum = sum.unwrap_or_else(|| Listening::nobody(0, NOBODY.to_owned()));
        Listening { would, ..sum }
    }

    /// The same by one policy.
    fn scope_by(
        &mut self,
        by: &Ruling,
        context: &Context,
        protocol: Protocol,
        local: SocketAddr,
    ) -> Listening {
        let call = self.arriving(protocol, local, None);
        let papers = self.papers(context, &call);
        let party = Party {
            addr: Some(local.ip()),
            process: ProcessFact::Known(&context.facts),
            certificate: papers.lend().mine.map_or(CertificateFact::None, CertificateFact::Shown),
        };
        let by_rules = by.policy.listener(&party, protocol, local.port(), now_seconds());
        let mut nets = Vec::new();
        let mut reason = None;
        let (mut proven, mut own) = (Vec::new(), Vec::new());
        match by_rules {
            ListenerScope::Anyone => {
                return Listening { scope: Scope::Anyone, sessions: Vec::new(), reason: None, would: None };
            }
            ListenerScope::Nobody => reason = Some(NOBODY.to_owned()),
            ListenerScope::Addresses { v4, v6, certificate, proven_v4, proven_v6, processes } => {
                nets.extend(v4.iter().map(|n| SomeNet(n.network().into(), n.prefix_len())));
                nets.extend(v6.iter().map(|n| SomeNet(n.network().into(), n.prefix_len())));
                if processes {
                    nets.extend(self.own_nets());
                } else if certificate && self.lanes.who.is_some() {
                    own = self.own_nets();
                }
                if protocol == Protocol::TCP && self.lanes.who.is_some() {
                    proven.extend(proven_v4.iter().map(|n| SomeNet(n.network().into(), n.prefix_len())));
                    proven.extend(proven_v6.iter().map(|n| SomeNet(n.network().into(), n.prefix_len())));
                }
                if nets.is_empty() && certificate {
                    let why = self.keys_unusable().unwrap_or("this host has no keys");
                    reason = Some(format!("needs certificate; lane tls not available: {why}"));
                }
            }
        }
        let mut sessions = if protocol == Protocol::TCP { self.sessions_of(context) } else { Vec::new() };
        sessions.retain(|control| control.rule_by(by.layer).is_some());
        if nets.is_empty() && sessions.is_empty() && proven.is_empty() && own.is_empty() {
            return Listening::nobody(by.layer, reason.unwrap_or_else(|| NOBODY.to_owned()));
        }
        let cookies = sessions.iter().map(|c| c.cookie).collect();
        let scope = Scope::Some { nets, sessions: cookies, proven, own };
        Listening { scope, sessions, reason: None, would: None }
    }

    /// Prefixes of this host's own addresses, where a process is at the other end.
    fn own_nets(&self) -> Vec<SomeNet> {
        let loopback =
            [SomeNet([127, 0, 0, 0].into(), 8), SomeNet(std::net::Ipv6Addr::LOCALHOST.into(), 128)];
        let own = self.own.iter().map(SomeNet::of);
        loopback.into_iter().chain(own).collect()
    }

    /// Whether there are peers that may come in plain and by certificate: they have a moment to begin to prove who
    /// they are.
    fn is_mixed(&self, listener: &Listener) -> bool {
        let Scope::Some { nets, proven, .. } = &listener.scope else { return false };
        let meet = |some: &[SomeNet], others: &[SomeNet]| {
            let some: Nets = some.iter().collect();
            others.iter().any(|net| some.cover(*net))
        };
        self.mode_for(&listener.context) == Mode::Enforce && (meet(nets, proven) || meet(proven, nets))
    }

    /// What somebody may speak who has come to a front for peers of both kinds. `None`: nobody serves there.
    pub(super) fn speech_for(&mut self, front: u32, places: &Places) -> Option<Speech> {
        let behind = self.lanes.fronts.get(&front)?;
        let listener = behind.iter().find_map(|cookie| self.listeners.get(cookie))?;
        let (local, remote) = (places.local.socket_addr()?, places.remote.socket_addr()?);
        let proves = match &listener.scope {
            Scope::Some { proven, .. } => proven.iter().collect::<Nets>().cover(SomeNet::of(remote.ip())),
            Scope::Anyone | Scope::Nobody => true,
        };
        let context = Rc::clone(&listener.context);
        let call = self.arriving(Protocol::TCP, local, Some(remote));
        let judgement = self.consider(&context, &call).judgement;
        let in_plain = judgement.permitted && judgement.verdict == Verdict::Permit;
        Some(match (in_plain, proves) {
            (true, true) => Speech::Either,
            (true, false) => Speech::Plain,
            (false, _) => Speech::Tls,
        })
    }

    /// What the kernel is to let through. `mixed`: who may come both ways goes to the front.
    fn nets_of(&self, listener: &Listener, mixed: bool) -> Vec<Net> {
        let mut all = match &listener.scope {
            Scope::Nobody => return Vec::new(),
            Scope::Anyone => Net::everyone().to_vec(),
            Scope::Some { nets, sessions, proven, own } => {
                let [in_plain, proving] = [nets, proven].map(|some| some.iter().collect::<Nets>());
                let may_prove = |net: &&SomeNet| mixed && proving.cover(**net);
                let (both, plain): (Vec<SomeNet>, Vec<SomeNet>) = nets.iter().partition(may_prove);
                let mut all: Vec<Net> = plain.iter().chain(own).map(|net| net.passes()).collect();
                // A hole is one who must prove who he is, or may.
                let holes = proven.iter().filter(|net| mixed || !in_plain.cover(**net));
                all.extend(holes.chain(&both).map(|net| net.passes().refused()));
                // What this host sends itself meets no front.
                let both: Nets = both.iter().collect();
                for here in self.own_nets().into_iter().filter(|net| both.cover(*net)) {
                    replace(&mut all, here.passes());
                }
                for control in sessions.iter().filter_map(|c| self.sessions.get(*c)) {
                    let net = SomeNet::of(control.remote.ip()).passes();
                    let net = if control.protected().is_some() { net.refused() } else { net };
                    if !all.contains(&net) {
                        all.push(net);
                    }
                }
                all
            }
        };
        if listener.scope.is_of_sessions() {
            return all; // their peers, and no other member
        }
        for (ip, in_plain) in self.members_for(listener) {
            let net = SomeNet::of(ip).passes();
            replace(&mut all, if in_plain { net } else { net.refused() });
        }
        all
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
    ) -> Result<bool, String> {
        let Some(context) = self.context_of(key) else { return Ok(false) };
        let earlier = self.listeners.remove(&facts.cookie);
        let mut listener = Listener {
            maker: key,
            number,
            inode: facts.inode,
            local,
            data: scope.is_of_sessions(),
            scope,
            context,
            stuck: earlier.as_ref().is_some_and(|l| l.stuck),
            front: earlier.as_ref().and_then(|l| l.front),
            unprotected: None,
            filter: earlier.and_then(|l| l.filter),
            generation: self.generation_in_force(),
        };
        self.fit(facts.cookie, &mut listener, Some(socket));
        // Where nobody can come in plain, a listener without a front would be there for nobody.
        let in_plain = match &listener.scope {
            Scope::Anyone => true,
            Scope::Some { nets, .. } => !nets.is_empty() || !self.needs_front(&listener),
            Scope::Nobody => false,
        };
        if let Some(why) = listener.unprotected.clone().filter(|_| !in_plain) {
            return Err(why);
        }
        let filtered = listener.filter.is_some();
        self.listeners.insert(facts.cookie, listener);
        Ok(filtered)
    }

    /// After a restart: takes on a listener of a wrapped process, with the filter that it has.
    pub(super) fn adopt_listener(&mut self, context: &Rc<Context>, number: i32, found: &Found) {
        if self.mode_for(context) == Mode::Audit || self.listeners.contains_key(&found.cookie) {
            return;
        }
        let listening = self.scope_for(context, Protocol::TCP, found.local);
        let mut listener = Listener {
            maker: context.key,
            number,
            inode: found.inode,
            local: found.local,
            // Of a listener that was permitted, and that nobody may reach any more, the session is over.
            data: listening.scope.is_of_sessions() || listening.scope == Scope::Nobody,
            scope: listening.scope,
            context: Rc::clone(context),
            front: None,
            unprotected: None,
            filter: self.inherited.remove(&found.cookie).map(Filter::from),
            stuck: false,
            generation: self.generation_in_force(),
        };
        self.fit(found.cookie, &mut listener, None);
        self.listeners.insert(found.cookie, listener);
    }

    /// Puts the listener's scope into the kernel, as far as this host can.
    fn fit(&mut self, cookie: u64, listener: &mut Listener, socket: Option<BorrowedFd<'_>>) {
        let (protects, mixed) = (self.needs_front(listener), self.is_mixed(listener));
        let nets = self.nets_of(listener, mixed);
        let Some(keyd) = self.keyd.as_mut().filter(|k| k.filters()) else {
            if protects {
                listener.unprotected = Some("the key daemon is away".to_owned());
            }
            return;
        };
        if let Some(filter) = &listener.filter {
            if let Err(error) = keyd.refill(filter, &nets) {
                self.note("broker", &format!("the filter of a listener could not be changed: {error}"), &[]);
            }
            self.fit_front(cookie, listener, socket, protects, mixed);
            return self.fit_plain(listener, mixed);
        }
        if (listener.scope == Scope::Anyone && !protects) || listener.stuck {
            if protects {
                listener.unprotected = Some("its filter is another's".to_owned());
            }
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
                self.fit_front(cookie, listener, Some(socket), protects, mixed);
                self.fit_plain(listener, mixed);
            }
            Err(error) => {
                listener.stuck = error.raw_os_error() == Some(libc::EALREADY);
                listener.unprotected = protects.then(|| error.to_string());
                self.note("broker", &format!("a listener could not be filtered: {error}"), &[]);
            }
        }
    }

    /// Where no front can stand, who may come both ways comes in plain.
    fn fit_plain(&mut self, listener: &Listener, mixed: bool) {
        if !mixed || listener.unprotected.is_none() {
            return;
        }
        let nets = self.nets_of(listener, false);
        if let (Some(keyd), Some(filter)) = (&mut self.keyd, &listener.filter)
            && let Err(error) = keyd.refill(filter, &nets)
        {
            self.note("broker", &format!("the filter of a listener could not be changed: {error}"), &[]);
        }
    }

    /// A call that would arrive at a listener.
    const fn arriving(&self, protocol: Protocol, local: SocketAddr, remote: Option<SocketAddr>) -> Call {
        let (local, op) = (Some(local), Op::Accept);
        Call { op, protocol, local, remote, socket: None, number: -1, via: "broker", association: None }
    }

    /// Members' addresses, other than this host's, and whether a rule lets each come to a listener in plain.
    fn members_for(&self, listener: &Listener) -> Vec<(IpAddr, bool)> {
        let (Ok(rulings), Some(_)) = (self.rulings(&listener.context), &self.lanes.who) else {
            return Vec::new();
        };
        let mode = self.mode_for(&listener.context);
        let others = self.lanes.members.addresses().filter(|ip| !self.own.has(*ip));
        let judged = others.map(|ip| {
            let call = self.arriving(Protocol::TCP, listener.local, Some(SocketAddr::new(ip, 0)));
            let papers = self.papers(&listener.context, &call);
            let (context, papers) = (&listener.context, papers.lend());
            let in_plain = |policy: &Policy| {
                let question = self.question(policy, context, &call, false, Far::Remote, papers);
                let judgement = decide::judge(policy, &question);
                judgement.permitted && judgement.lane == Lane::Plain
            };
            (ip, rulings.iter().filter(|it| it.mode == mode).all(|it| in_plain(&it.policy)))
        });
        judged.collect()
    }

    /// Whether somebody could come to a listener by proving who he is.
    fn needs_front(&self, listener: &Listener) -> bool {
        let protected = |cookie: &u64| self.sessions.get(*cookie).is_some_and(|c| c.protected().is_some());
        self.lanes.who.is_some()
            && self.mode_for(&listener.context) == Mode::Enforce
            && match &listener.scope {
                Scope::Nobody => false,
                Scope::Some { proven, .. } if !proven.is_empty() => true,
                Scope::Some { nets, sessions, .. } => {
                    sessions.iter().any(protected)
                        || (!nets.is_empty() && self.has_protected_members(listener))
                }
                Scope::Anyone => self.has_protected_members(listener),
            }
    }

    fn has_protected_members(&self, listener: &Listener) -> bool {
        self.members_for(listener).iter().any(|(_, in_plain)| !in_plain)
    }

    /// Has the key daemon stand before a listener, or not any more.
    fn fit_front(
        &mut self,
        cookie: u64,
        listener: &mut Listener,
        socket: Option<BorrowedFd<'_>>,
        protects: bool,
        mixed: bool,
    ) {
        if !protects {
            let front = listener.front.take();
            listener.unprotected = None;
            return self.leave_front(cookie, front);
        }
        let of = match &listener.scope {
            Scope::Some { sessions, .. } if listener.scope.is_of_sessions() => {
                sessions.iter().find_map(|c| self.sessions.get(*c)?.protected())
            }
            _ => None,
        };
        let port = listener.local.port();
        let rulings = self.rulings(&listener.context).unwrap_or_default();
        let related = rulings.iter().any(|it| it.policy.is_related(Protocol::TCP, port));
        let process = self.named(&listener.context, related, of);
        let found = if socket.is_none() { fetch(cookie, listener) } else { None };
        let socket = socket.or_else(|| found.as_ref().map(AsFd::as_fd));
        let (Some(process), Some(socket), Some(filter), Some(keyd)) =
            (process, socket, &listener.filter, &mut self.keyd)
        else {
            listener.unprotected = Some("its socket could not be taken".to_owned());
            return;
        };
        match keyd.serve(socket, filter, BACKLOG, &process, mixed) {
            Ok(front) => {
                (listener.front, listener.unprotected) = (Some(front), None);
                let behind = self.lanes.fronts.entry(low(front)).or_default();
                if !behind.contains(&cookie) {
                    behind.push(cookie);
                }
            }
            Err(error) => {
                let why = match error.raw_os_error() {
                    Some(libc::EXDEV) => super::lanes::OTHER_NAMESPACE.to_owned(),
                    Some(libc::EOPNOTSUPP) => "it is bound to an interface".to_owned(),
                    Some(libc::EPROTONOSUPPORT) => "it is not TCP alone".to_owned(),
                    _ => format!("the key daemon says: {error}"),
                };
                self.note("broker", &format!("a listener cannot be protected: {why}"), &[]);
                listener.unprotected = Some(why);
            }
        }
    }

    /// A listener needs its front no more; others may share it.
    pub(super) fn leave_front(&mut self, cookie: u64, front: Option<u64>) {
        let Some(front) = front else { return };
        let Some(behind) = self.lanes.fronts.get_mut(&low(front)) else { return };
        behind.retain(|other| *other != cookie);
        if behind.is_empty() {
            self.lanes.fronts.remove(&low(front));
            if let Some(keyd) = &mut self.keyd {
                let _ = keyd.release(front); // it knows of the socket's end itself
            }
        }
    }

    /// Puts on record that a program may not listen, because nobody could come.
    pub(super) fn record_unprotected(
        &mut self,
        context: &Context,
        local: SocketAddr,
        cookie: u64,
        why: &str,
    ) {
        let reason = format!("cannot be protected: {why}");
        self.log.push(&Line {
            process: Some(context),
            protocol: Some(Protocol::TCP),
            local: Some(local),
            verdict: Some(super::word(Verdict::Refuse)),
            reason: Some(&reason),
            association: Some(cookie),
            lane: Some(Lane::Tls),
            generation: Some(self.generation_in_force()),
            ..Line::bare(realtime(), "listen", "broker")
        });
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
                let (_, reason) = fresh.reason.unwrap_or_default();
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
            if let Scope::Some { nets, sessions, proven, own } = &mut listener.scope {
                sessions.retain(|s| *s != session);
                if nets.is_empty() && sessions.is_empty() && proven.is_empty() && own.is_empty() {
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
        let unproven = |proven: &[SomeNet]| {
            let ip = remote.filter(|_| protocol == Protocol::TCP).map(|at| at.ip());
            let proves = |ip| proven.iter().collect::<Nets>().cover(SomeNet::of(ip));
            ip.is_some_and(|ip| self.lanes.members.has(ip) || proves(ip))
        };
        let reason = match &scope {
            Some(Scope::Some { proven, nets, .. })
                if (!proven.is_empty() || !nets.is_empty()) && unproven(proven) =>
            {
                NO_FRONT
            }
            Some(Scope::Anyone) => NO_FRONT,
            Some(scope) if scope.is_of_sessions() => {
                "only the peer of the session that opened this port may come; dropped unanswered"
            }
            Some(Scope::Nobody) => {
                "the session that opened this port has ended, or no rule permits it any more; dropped unanswered"
            }
            _ => "no rule permits it from this address; dropped unanswered",
        };
        let layer = context.as_ref().map_or(0, |context| {
            let call = stranger.destination.socket_addr().map(|at| self.arriving(protocol, at, remote));
            call.map_or(0, |call| self.consider(context, &call).judgement.layer)
        });
        let allow = match (&context, remote) {
            (Some(context), Some(remote)) => {
                self.suggest_inbound(context, layer, protocol, stranger.destination.port, remote.ip())
            }
            _ => None,
        };
        let policy = self.layer_file(layer);
        let mut more = Vec::new();
        more.extend(policy.as_deref().map(|policy| ("policy", More::Text(policy))));
        if let Some(allow) = &allow {
            more.push(("allow", More::Text(allow)));
        }
        self.log.push(&Line {
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
    }
}

/// Has a list say this of a prefix, and nothing else.
fn replace(all: &mut Vec<Net>, net: Net) {
    all.retain(|other| (other.ip, other.family, other.bits) != (net.ip, net.family, net.bits));
    all.push(net);
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
