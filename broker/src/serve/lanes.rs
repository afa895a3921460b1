//! Protected flows: what the key daemon is asked, and what is known of each.
//!
//! Outbound: the program's connect(2) is judged, the key daemon begins, and the program is sent to a token.
//! Inbound: a peer proves itself to the front before a listener. Either way [`news`] judges again by what the
//! peer has shown, and only what is admitted then reaches the program.

mod left;
mod members;
mod news;
mod records;

pub(super) use members::FILE as MEMBERS;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    rc::{Rc, Weak},
    time::{Duration, Instant},
};

use portcullis_policy::{CertificateFacts, Fact, Policy};
use portcullis_types::{Assurance, Lane, Op, Protocol, Verdict};
use portcullis_wire::{
    Addr, Flags, Reply, Request,
    keyd::{Open, Places},
};
use serde::{Deserialize, Serialize};

use super::{
    Broker, RuleText,
    far::FarEnd,
    judge::{Call, Finding},
    sessions::{Control, ticks},
};
use crate::{
    Mode,
    audit::LeftOpen,
    control::ProcessRow,
    decide::{Judgement, Papers},
    guard::target::same_network,
    keyd::Who,
    process::{Context, ProcessKey},
    sys::{boottime, pidfd_getfd, realtime, socket::Facts},
};

/// How long an accepted connection may be unknown: the key daemon tells of it when it has delivered it, and may be kept
/// from that.
const HEARD: Duration = Duration::from_secs(2);

/// Most peers that are remembered for further flows: those with a certificate of their own come once only.
const MOST_PEERS: usize = 64;
/// Most associations that are over and whose tokens are remembered.
const MOST_OVER: usize = 256;

/// A peer, as its certificate proves.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) told: Told,
    pub(super) facts: CertificateFacts,
}

/// What the key daemon tells of a peer.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Told {
    pub(super) id: String,
    names: Vec<String>,
    process: Option<String>,
    ver: u64,
    groups: Vec<String>,
    exe: Option<String>,
    sha256: Option<String>,
    user: Option<String>,
    unit: Option<String>,
    pub(super) serial: String,
    pub(super) issuer_serial: String,
    fingerprint: String,
    /// SHA-256 of its public key, by which one session is told from another.
    pub(super) key: String,
    /// Last second of validity.
    pub(super) until: i64,
    /// Last second in which it is believed: clocks differ.
    pub(super) end: i64,
    pub(super) cipher: String,
    pub(super) kex: String,
}

impl Peer {
    fn read(json: &str) -> Option<Self> {
        serde_json::from_str::<Told>(json).ok().map(Self::from)
    }

    /// As the log shows its certificate.
    pub(super) fn certificate(&self) -> String {
        let Told { id, serial, fingerprint, until, .. } = &self.told;
        format!("{id} serial {serial} until {until} sha256 {fingerprint}")
    }
}

impl From<Told> for Peer {
    fn from(told: Told) -> Self {
        let facts = CertificateFacts {
            names: told.names.clone(),
            process: told.process.clone(),
            ver: Some(told.ver),
            groups: told.groups.clone(),
            unit: told.unit.clone(),
            user: told.user.clone(),
            exe: told.exe.clone(),
            sha256: told.sha256.as_deref().and_then(unhex),
            ..CertificateFacts::default()
        };
        Self { told, facts }
    }
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (to, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *to = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// A process as the key daemon is told of it ([`portcullis_wire::keyd::PROCESS`]).
#[derive(Serialize)]
struct Named {
    name: String,
    exe: String,
    sha256: String,
    user: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<String>,
    related: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    of: Option<u64>,
}

/// One protected flow.
#[derive(Debug)]
pub(super) struct Association {
    pub(super) context: Rc<Context>,
    pub(super) op: Op,
    /// True addresses.
    pub(super) local: Option<SocketAddr>,
    pub(super) remote: Option<SocketAddr>,
    /// The program's socket, once it has one.
    pub(super) cookie: Option<u64>,
    /// The token by which an accepting program's socket knows its peer.
    inner: Option<SocketAddr>,
    /// The token that an opening program was sent to.
    token: Option<Addr>,
    pub(super) peer: Option<Rc<Peer>>,
    /// It came to a front and speaks plain, as it may there.
    plain: bool,
    pub(super) rule: Option<RuleText>,
    /// The control association that it is related to.
    pub(super) session: Option<u64>,
    /// It becomes a control once it is up.
    control: Option<Control>,
    generation: u64,
    /// Nanoseconds since the epoch.
    since: u64,
    /// Number of its record; 0: it has none yet.
    seq: u64,
    /// It carries data.
    pub(super) up: bool,
    /// It was cut, which is on record.
    cut: bool,
}

impl Association {
    /// Whether its peer has shown who it is, or may speak plain.
    pub(super) const fn is_known(&self) -> bool {
        self.peer.is_some() || self.plain
    }

    /// How it travels, and what proves the far end.
    const fn lane(&self) -> (Lane, Assurance) {
        if self.plain { (Lane::Plain, Assurance::Address) } else { (Lane::Tls, Assurance::Certificate) }
    }
}

/// What a program is told to do instead.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) id: u64,
    pub(super) places: Places,
}

/// All protected flows.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    all: HashMap<u64, Association>,
    by_cookie: HashMap<u64, u64>,
    /// From the token by which a program sees its peer.
    by_inner: HashMap<SocketAddr, u64>,
    /// The last that are over, by their sockets, with their tokens: a program that was told of one may not have got there.
    over: VecDeque<(u64, SocketAddr)>,
    /// Admitted ones whose token was not told yet.
    undelivered: HashSet<u64>,
    /// Listeners behind each front.
    pub(super) fronts: HashMap<u32, Vec<u64>>,
    pub(super) members: members::List,
    /// Who this host is; known for as long as it ever was.
    pub(super) who: Option<Who>,
    flood: records::Flood,
    /// What an earlier broker had begun and nobody has ended yet.
    pub(super) left: LeftOpen,
    /// By what the key daemon told of them.
    peers: HashMap<String, Weak<Peer>>,
    /// While the key daemon tells what an earlier broker had begun.
    pub(super) taking_up: bool,
}

impl Lanes {
    /// What the key daemon tells of a peer, read once for all flows of the same two processes.
    fn told_of(&mut self, json: String) -> Option<Rc<Peer>> {
        if let Some(there) = self.peers.get(&json).and_then(Weak::upgrade) {
            return Some(there);
        }
        let peer = Rc::new(Peer::read(&json)?);
        if self.peers.len() >= MOST_PEERS {
            self.peers.clear();
        }
        self.peers.insert(json, Rc::downgrade(&peer));
        Some(peer)
    }

    pub(super) fn get(&self, id: u64) -> Option<&Association> {
        self.all.get(&id)
    }

    pub(super) fn peer(&self, id: u64) -> Option<Rc<Peer>> {
        self.all.get(&id)?.peer.clone()
    }

    pub(super) fn of_cookie(&self, cookie: u64) -> Option<u64> {
        self.by_cookie.get(&cookie).copied()
    }

    /// Whether this is the token that the program of this socket was told to connect to.
    pub(super) fn is_token_of(&self, cookie: u64, at: SocketAddr) -> bool {
        let one = self.of_cookie(cookie).and_then(|id| self.all.get(&id));
        one.and_then(|one| one.token?.socket_addr()) == Some(at) || self.over.contains(&(cookie, at))
    }

    fn insert(&mut self, id: u64, one: Association) {
        if let Some(cookie) = one.cookie {
            self.by_cookie.insert(cookie, id);
        }
        self.all.insert(id, one);
    }

    fn forget(&mut self, id: u64) -> Option<Association> {
        let one = self.all.remove(&id)?;
        if let (Some(cookie), Some(token)) = (one.cookie, one.token.and_then(|token| token.socket_addr())) {
            self.over.truncate(MOST_OVER - 1);
            self.over.push_front((cookie, token));
        }
        self.undelivered.remove(&id);
        if let Some(cookie) = one.cookie.filter(|cookie| self.by_cookie.get(cookie) == Some(&id)) {
            self.by_cookie.remove(&cookie);
        }
        if let Some(inner) = one.inner {
            self.by_inner.remove(&inner);
        }
        Some(one)
    }

    /// Whether a socket is on a token, by its remote address.
    pub(super) fn is_inner(&self, remote: SocketAddr) -> bool {
        self.who.is_some() && portcullis_wire::is_token(remote.ip())
    }
}

/// Certificates at both ends, as long as they are needed.
#[derive(Debug, Default)]
pub(super) struct OwnPapers {
    mine: Option<CertificateFacts>,
    shown: Option<Rc<Peer>>,
    member: bool,
}

impl OwnPapers {
    pub(super) fn lend(&self) -> Papers<'_> {
        let shown = self.shown.as_ref().map(|peer| &peer.facts);
        Papers { mine: self.mine.as_ref(), shown, member: self.member }
    }
}

impl Broker {
    /// What is known of certificates at the two ends of a call.
    pub(super) fn papers(&self, context: &Context, call: &Call) -> OwnPapers {
        // What a process is called on the wire is not a run's own affair.
        let (Some(who), Some(force)) = (&self.lanes.who, &self.in_force) else { return OwnPapers::default() };
        OwnPapers {
            mine: Some(certificate(who, &force.policy, context)),
            shown: call.association.and_then(|id| self.lanes.peer(id)),
            member: call.remote.is_some_and(|at| self.lanes.members.has(at.ip()) && !self.own.has(at.ip())),
        }
    }

    /// What this host would certify of its processes; nothing, if it has no keys.
    pub(super) fn certificates(&self, of: &[Rc<Context>]) -> Vec<CertificateFacts> {
        let (Some(who), Some(force)) = (&self.lanes.who, &self.in_force) else { return Vec::new() };
        of.iter().map(|context| certificate(who, &force.policy, context)).collect()
    }

    /// Why nothing is protected here, though the host has keys.
    pub(super) fn keys_unusable(&self) -> Option<&'static str> {
        let unusable = self.lanes.who.is_none() && self.state.join("host.crt").exists();
        unusable.then_some(if self.owner == 0 {
            "no key daemon serves with this host's keys"
        } else {
            "this host's keys are used by a key daemon that root has started, and by no other"
        })
    }

    /// Where lane tls cannot be what it should be for those who are there, one sentence each.
    pub(super) fn unprotected(&self, rows: &[ProcessRow]) -> Vec<String> {
        if self.lanes.who.is_none() {
            return Vec::new();
        }
        let elsewhere = rows.iter().filter(|row| !same_network(row.pid)).count();
        let gap = format!(
            "{elsewhere} {} in another network namespace than the key daemon: what is opened or served there cannot be \
             protected, and is refused where it must be",
            if elsewhere == 1 { "process is" } else { "processes are" }
        );
        let listeners = rows.iter().flat_map(|row| &row.listeners);
        let refused = listeners.filter_map(|listener| {
            let why = listener.unprotected.as_ref()?;
            Some(format!("who must prove who he is at {} is refused: {why}", listener.local))
        });
        (elsewhere > 0).then_some(gap).into_iter().chain(refused).collect()
    }

    /// Has a flow protected that a program is about to open, if that is the verdict. What cannot be is refused.
    pub(super) fn protect(&mut self, context: &Rc<Context>, call: &Call, finding: &mut Finding) {
        let judgement = &finding.judgement;
        if judgement.verdict != Verdict::Protect || !judgement.permitted || call.op != Op::Connect {
            return;
        }
        if self.mode_for(context) == Mode::Audit {
            // No listener of such a host stands behind a front: what is only watched goes as it went before.
            let judgement = &mut finding.judgement;
            (judgement.verdict, judgement.lane) = (Verdict::Permit, Lane::Plain);
            judgement.assurance = Assurance::None;
            judgement.reason =
                Some("audit mode: it goes in plain; enforced, it would be protected".to_owned());
            return;
        }
        let refuse = |finding: &mut Finding, why: &str| {
            let rule = finding.judgement.rule;
            finding.judgement =
                Judgement { rule, ..Judgement::refusal(format!("cannot be protected: {why}")) };
        };
        let (Some((socket, facts)), Some(remote)) = (&call.socket, call.remote) else {
            return refuse(finding, "its socket could not be taken");
        };
        if let Some(earlier) = self.lanes.of_cookie(facts.cookie) {
            let same = self.lanes.get(earlier).filter(|one| one.remote == Some(remote) && !one.cut);
            if let Some(token) = same.and_then(|one| one.token) {
                // It asks how it went, which the kernel knows.
                let places = Places { inner_remote: token, ..Places::default() };
                finding.opened = Some(Opened { id: earlier, places });
                return;
            }
            self.end_association(earlier);
        }
        if facts.remote.is_some() {
            return refuse(finding, "its socket is connected already, in plain or to what is over");
        }
        let session = finding.session.as_ref().and_then(|control| control.association);
        let Some(process) = self.named(context, judgement.related, session) else {
            return refuse(finding, "this host has no keys");
        };
        let local = call.local.map_or(Addr::NONE, |at| own_family(at, facts));
        let ask = Open { remote: Addr::from(remote), local, patience: 0, reserved: 0 };
        let Some(keyd) = &mut self.keyd else { return refuse(finding, "the key daemon is away") };
        let (id, places) = match keyd.open(socket.as_fd(), &ask, &process) {
            Ok(opened) => opened,
            Err(error) => match error.raw_os_error() {
                Some(libc::EXDEV) => return refuse(finding, OTHER_NAMESPACE),
                Some(libc::EPROTONOSUPPORT) => return refuse(finding, "it is not TCP alone"),
                Some(libc::EBUSY) => return refuse(finding, "a filter of its own is under its socket"),
                Some(libc::ENOENT) if session.is_some() => return refuse(finding, "its session has ended"),
                Some(
                    errno @ (libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EADDRNOTAVAIL | libc::EADDRINUSE),
                ) => {
                    // As connect(2) itself would say.
                    finding.judgement.reason = Some(error.to_string());
                    finding.errno = Some(errno);
                    return;
                }
                _ => return refuse(finding, &format!("the key daemon says: {error}")),
            },
        };
        let control = judgement.related.then(|| Control {
            cookie: facts.cookie,
            inode: facts.inode,
            local: None,
            remote,
            since: ticks(boottime()),
            maker: (context.key, call.number),
            rules: finding.related_by.clone(),
            lane: judgement.lane,
            association: Some(id),
        });
        self.lanes.insert(
            id,
            Association {
                context: Rc::clone(context),
                op: Op::Connect,
                local: places.local.socket_addr(),
                remote: Some(remote),
                cookie: Some(facts.cookie),
                inner: None,
                token: Some(places.inner_remote),
                peer: None,
                plain: false,
                rule: self.rule_text(judgement.rule),
                session: finding.session.as_ref().map(|c| c.cookie),
                control,
                generation: self.generation_in_force(),
                since: realtime(),
                seq: 0,
                up: false,
                cut: false,
            },
        );
        finding.opened = Some(Opened { id, places });
    }

    /// A process as the key daemon is told of it: a JSON object. `None`: this host has no keys.
    pub(super) fn named(&self, context: &Context, related: bool, of: Option<u64>) -> Option<String> {
        let (who, force) = (self.lanes.who.as_ref()?, self.in_force.as_ref()?);
        let CertificateFacts { process, exe, sha256: _, user, unit, .. } =
            certificate(who, &force.policy, context);
        let named = Named {
            name: process.unwrap_or_default(),
            exe: exe.unwrap_or_else(|| "?".to_owned()),
            sha256: context.sha256().unwrap_or_default(),
            user: user.unwrap_or_default(),
            unit,
            related: related && of.is_none(),
            of,
        };
        serde_json::to_string(&named).ok()
    }

    /// Puts true addresses in the place of tokens, and finds the association that an accepted socket is of.
    pub(super) fn see_through(&mut self, call: &mut Call) {
        if call.op != Op::Accept || call.protocol != Protocol::TCP {
            return;
        }
        let Some(inner) = call.remote else { return };
        if !self.lanes.by_inner.contains_key(&inner) && portcullis_wire::is_token(inner.ip()) {
            self.listen_for(inner);
        }
        let Some(id) = self.lanes.by_inner.get(&inner).copied() else { return };
        let Some(one) = self.lanes.get(id) else { return };
        (call.local, call.remote, call.association) = (one.local, one.remote, Some(id));
    }

    /// Hears the key daemon out about a connection that it has just delivered, whose token it is about to tell. Whoever
    /// else comes from such an address is nobody's peer.
    fn listen_for(&mut self, inner: SocketAddr) {
        let end = Instant::now() + HEARD;
        while !self.lanes.undelivered.is_empty() && !self.lanes.by_inner.contains_key(&inner) {
            let left = end.saturating_duration_since(Instant::now());
            let more = self.keyd.as_mut().is_some_and(|keyd| keyd.wait(left));
            if !more {
                return;
            }
            self.take_keyd();
        }
    }

    /// What follows from an accepted protected flow: it is this process's now.
    pub(super) fn taken(
        &mut self,
        id: u64,
        context: &Rc<Context>,
        facts: &Facts,
        finding: &Finding,
        seq: u64,
    ) {
        let rule = self.rule_text(finding.judgement.rule);
        let generation = self.generation_in_force();
        let Some(one) = self.lanes.all.get_mut(&id) else { return };
        one.context = Rc::clone(context);
        (one.rule, one.seq, one.generation) = (rule, seq, generation);
        one.session = finding.session.as_ref().map(|c| c.cookie).or(one.session);
        one.cookie = Some(facts.cookie);
        self.lanes.by_cookie.insert(facts.cookie, id);
    }

    /// The record of an opened flow has this number.
    pub(super) fn put_on_record(&mut self, id: u64, seq: u64) {
        if let Some(one) = self.lanes.all.get_mut(&id) {
            one.seq = seq;
        }
    }

    /// Ends a flow whose call is not permitted after all, or was replaced by another.
    pub(super) fn end_association(&mut self, id: u64) {
        if let Some(keyd) = &mut self.keyd {
            // If it is over, its end is on its way.
            let _ = keyd.refuse(id, libc::ECONNABORTED);
        }
    }

    /// Answers what the true names of a socket are.
    pub(super) fn name_frame(
        &mut self,
        key: ProcessKey,
        request: &Request,
        attached: Option<OwnedFd>,
        reply: &mut Reply,
    ) {
        (reply.local, reply.remote) = (request.local, request.remote);
        let attached = attached.or_else(|| {
            let process = self.processes.get(&key).filter(|_| request.fd >= 0)?;
            pidfd_getfd(process.pidfd.as_fd(), request.fd).ok()
        });
        let Some(facts) = attached.and_then(|fd| Facts::of(fd.as_fd()).ok()) else { return };
        let by_inner = || self.lanes.by_inner.get(&facts.remote?).copied();
        let known = self.lanes.of_cookie(facts.cookie).or_else(by_inner).and_then(|id| self.lanes.get(id));
        let told = known.map_or((facts.local, facts.remote), |one| (one.local, one.remote));
        let name = |at: Option<SocketAddr>| at.map_or(Addr::NONE, |at| own_family(at, &facts));
        (reply.local, reply.remote) = (name(told.0), name(told.1));
    }

    /// Fills in what a program is to do, or believe, instead.
    pub(super) fn rewrite(&self, call: &Call, finding: &Finding, reply: &mut Reply) {
        let to = match (&finding.opened, &call.socket, call.association) {
            (Some(opened), ..) => opened.places.inner_remote,
            (None, Some((_, facts)), Some(_)) => match call.remote {
                Some(remote) => own_family(remote, facts),
                None => return,
            },
            (None, None, Some(_)) => call.remote.map_or(Addr::NONE, Addr::from),
            _ => return,
        };
        reply.rewrite = to;
        reply.flags |= Flags::REWRITE;
    }

    /// The session by which a peer that has shown a certificate may exchange a related flow: its key is that of
    /// the control association's peer.
    pub(super) fn is_same_session(&self, control: &Control, call: &Call, far: Option<&FarEnd>) -> bool {
        let Some(association) = control.protected() else {
            return call.association.and_then(|id| self.lanes.peer(id)).is_none();
        };
        if far.is_some() {
            return false;
        }
        let key = |id: u64| self.lanes.peer(id).map(|peer| peer.told.key.clone());
        match (call.association.and_then(key), key(association)) {
            (Some(shown), Some(known)) => shown == known,
            // It has shown nothing yet: who opens will see; who came in plain has nothing to show.
            (None, known) => call.op == Op::Connect && call.association.is_none() && known.is_some(),
            (Some(_), None) => false,
        }
    }
}

pub(super) const OTHER_NAMESPACE: &str = "the program is in another network namespace than the key daemon";

/// This host's certificate as it is for a process.
fn certificate(who: &Who, policy: &Policy, context: &Context) -> CertificateFacts {
    let known = |fact: &Fact<String>| match fact {
        Fact::Known(text) => Some(text.clone()),
        Fact::Unknown => None,
    };
    CertificateFacts {
        names: vec![who.host.clone()],
        process: Some(policy.name_of(&context.facts).unwrap_or(UNNAMED).to_owned()),
        ver: Some(who.ver),
        groups: who.groups.clone(),
        unit: context.facts.unit.clone(),
        user: Some(context.facts.user.clone()),
        exe: known(&context.facts.exe),
        sha256: match &context.facts.sha256 {
            Fact::Known(hash) => Some(*hash),
            Fact::Unknown => None,
        },
        ..CertificateFacts::default()
    }
}

/// The name of a process that the policy does not call anything.
const UNNAMED: &str = "unnamed";

/// An address in the family of a socket.
fn own_family(at: SocketAddr, facts: &Facts) -> Addr {
    match at {
        SocketAddr::V4(v4) if facts.domain == libc::AF_INET6 => {
            Addr::v6(v4.ip().to_ipv6_mapped(), v4.port(), 0)
        }
        other => Addr::from(other),
    }
}
