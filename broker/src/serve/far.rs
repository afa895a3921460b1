//! Who is at the other end of a flow that stays on this host.

use std::{
    collections::HashMap,
    fs,
    io::Read,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
};

use portcullis_policy::CertificateFacts;
use portcullis_types::Protocol;

use super::Broker;
use crate::{
    decide::FarProcess,
    process::{Context, ProcessKey},
    sys::{diag::Found, monotonic, proc::ProcDir},
};

/// How long it is remembered who holds a listening socket, in nanoseconds. Each holder is checked
/// at each use; only a new one can be missed meanwhile.
const REMEMBERED: u64 = 1_000_000_000;
/// How many holders of one socket the log names.
pub(super) const SHOWN: usize = 4;
/// Entries after which memory starts anew.
const MOST: usize = 4096;

/// A far end on this host.
#[derive(Debug, Default)]
pub(super) struct FarEnd {
    /// Its socket; `None` if there is none.
    pub(super) found: Option<Found>,
    /// The wrapped processes that hold it.
    pub(super) known: Vec<Rc<Context>>,
    /// Their certificates, in the same order, if this host has keys.
    pub(super) certificates: Vec<CertificateFacts>,
    /// The name of its user, if it is held by none that is wrapped.
    pub(super) user: Option<String>,
}

impl FarEnd {
    /// As the decision wants it.
    pub(super) fn processes(&self) -> Vec<FarProcess<'_>> {
        if !self.known.is_empty() {
            let certificates = self.certificates.iter().map(Some).chain(std::iter::repeat(None));
            return self
                .known
                .iter()
                .zip(certificates)
                .map(|(c, it)| FarProcess::Known(&c.facts, it))
                .collect();
        }
        match (&self.found, &self.user) {
            (Some(found), Some(name)) => vec![FarProcess::User { uid: found.uid, name }],
            _ => Vec::new(),
        }
    }

    /// As the log shows it.
    pub(super) fn shown(&self) -> Option<String> {
        if self.known.is_empty() {
            let name = crate::escape::sentence(self.user.as_ref()?);
            return Some(format!("process{{user=\"{name}\"}} (not wrapped)"));
        }
        let mut names: Vec<String> = self.known.iter().map(|c| c.principal()).collect();
        names.dedup();
        names.truncate(SHOWN);
        Some(names.join(" | "))
    }
}

/// Sockets of a process: descriptor and inode.
pub(super) type Held = Vec<(i32, u64)>;

/// A process that holds a socket.
#[derive(Clone, Copy, Debug)]
struct Holder {
    pid: i32,
    fd: i32,
}

/// Who holds which listening socket, and when that was looked up.
#[derive(Debug, Default)]
pub(super) struct Holders(HashMap<u64, (u64, Vec<Holder>)>);

impl Broker {
    /// The listener (or datagram socket) that a flow to `to` arrives at, and `most` of those who hold it.
    pub(super) fn far_listener(&mut self, protocol: Protocol, to: SocketAddr, most: usize) -> FarEnd {
        let to = loopback_for(to);
        let nobody: IpAddr = match to.ip() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let Some(found) = self.diag.find(protocol, to, SocketAddr::new(nobody, 0)) else {
            return FarEnd::default();
        };
        let made = self.maker_of(found.cookie).filter(|_| most != usize::MAX);
        let known = match made.and_then(|(key, number)| self.holder(key, number, found.inode)) {
            Some(one) => vec![one],
            None => self.holders_of(found.inode, most),
        };
        self.far_end(found, known)
    }

    /// The socket at `remote` that is connected to `local` here.
    /// As for [`Self::far_listener`], `most` of those who hold it.
    pub(super) fn far_client(
        &mut self,
        protocol: Protocol,
        local: SocketAddr,
        remote: SocketAddr,
        most: usize,
    ) -> FarEnd {
        let connected = |f: &Found| f.remote.port() != 0 || protocol != Protocol::TCP;
        let found = self.diag.find(protocol, remote, local).filter(connected);
        let Some(found) = found.filter(|f| f.inode != 0) else {
            // Closed already. The kernel's word on its user is worth nothing then (it says root), so
            // it is whoever asked for just this flow, or nobody knows who.
            let known = found.and_then(|f| self.flows.get(f.cookie)).map(|f| Rc::clone(&f.context));
            let known: Vec<_> = known.or_else(|| self.flows.take_closed(remote, local)).into_iter().collect();
            return FarEnd { found: None, certificates: self.certificates(&known), known, user: None };
        };
        // A wrapped process had to ask before it connected, with this very socket.
        let asked = self.flows.get_mut(found.cookie).map(|f| {
            f.met = true;
            (f.context.key, f.number)
        });
        let asked = asked.or_else(|| self.datagrams.maker_of(found.cookie).filter(|_| most != usize::MAX));
        let known = match asked.map(|(key, number)| self.holder(key, number, found.inode)) {
            Some(Some(one)) => vec![one],
            None if protocol == Protocol::TCP => Vec::new(),
            _ => self.holders_of(found.inode, most),
        };
        self.far_end(found, known)
    }

    fn far_end(&mut self, found: Found, known: Vec<Rc<Context>>) -> FarEnd {
        let user = known.is_empty().then(|| self.inspector.user(found.uid));
        FarEnd { found: Some(found), certificates: self.certificates(&known), known, user }
    }

    /// Who made a socket that others send to, and by which descriptor.
    fn maker_of(&self, cookie: u64) -> Option<(ProcessKey, i32)> {
        let listener = self.listeners.get(&cookie).map(|l| (l.maker, l.number));
        listener.or_else(|| self.datagrams.maker_of(cookie))
    }

    /// A process, if it still has a socket, most likely as this descriptor.
    fn holder(&mut self, key: ProcessKey, number: i32, inode: u64) -> Option<Rc<Context>> {
        if !self.refresh(key, false) {
            return None;
        }
        let process = self.processes.get(&key)?;
        let anywhere = |at: &ProcDir| at.sockets().is_ok_and(|all| all.iter().any(|(_, i)| *i == inode));
        let holds = process.at.holds(number, inode) || anywhere(&process.at);
        holds.then(|| Rc::clone(&process.context))
    }

    /// The wrapped processes that hold a socket now, `most` of them.
    pub(super) fn holders_of(&mut self, inode: u64, most: usize) -> Vec<Rc<Context>> {
        if inode == 0 {
            return Vec::new();
        }
        let now = monotonic();
        let remembered = self.holders.0.get(&inode).filter(|(at, _)| now.saturating_sub(*at) < REMEMBERED);
        if let Some((_, held)) = remembered {
            let held = held.clone();
            let known = self.known_holders(&held, inode, most);
            // Where it makes no difference who is there, it need not be sought whether somebody has joined them.
            let enough = most != usize::MAX && !held.is_empty();
            if enough || !known.is_empty() {
                return known;
            }
        }
        let held = scan(inode);
        let known = self.known_holders(&held, inode, most);
        if self.holders.0.len() >= MOST {
            self.holders.0.clear();
        }
        self.holders.0.insert(inode, (now, held));
        known
    }

    /// What is known of those that hold a socket still and are wrapped, `most` of them.
    fn known_holders(&mut self, held: &[Holder], inode: u64, most: usize) -> Vec<Rc<Context>> {
        held.iter()
            .filter(|h| ProcDir::open(h.pid).is_ok_and(|at| at.holds(h.fd, inode)))
            .filter_map(|h| {
                let wrapped = self.by_pid.contains_key(&h.pid) || is_wrapped(h.pid);
                wrapped.then(|| self.known_holder(h.pid, inode))?
            })
            .take(most)
            .collect()
    }

    /// What is known of a wrapped process that holds a socket.
    fn known_holder(&mut self, pid: i32, inode: u64) -> Option<Rc<Context>> {
        if let Some(key) = self.by_pid.get(&pid).copied()
            && self.refresh(key, false)
        {
            return self.processes.get(&key).map(|p| Rc::clone(&p.context));
        }
        // A child that has not asked anything itself yet.
        let at = ProcDir::open(pid).ok()?;
        let context = self.look_up(pid)?;
        at.sockets().ok()?.iter().any(|(_, i)| *i == inode).then(|| Rc::new(context))
    }
}

/// Whether the shim is in a process, as far as its mappings tell. What a process could pretend by
/// this it would only be told the truth about: its facts are the kernel's in any case.
pub(super) fn is_wrapped(pid: i32) -> bool {
    let mut maps = String::new();
    let read =
        fs::File::open(format!("/proc/{pid}/maps")).and_then(|f| f.take(1 << 22).read_to_string(&mut maps));
    read.is_ok()
        && maps
            .lines()
            .filter_map(|l| l.split_once('/'))
            .any(|(_, path)| path.contains("libportcullis_preload"))
}

/// All processes that hold a socket, with their descriptor.
fn scan(inode: u64) -> Vec<Holder> {
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = all.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| {
        let held = ProcDir::open(pid).ok()?.sockets().ok()?;
        held.into_iter().find(|(_, i)| *i == inode).map(|(fd, _)| Holder { pid, fd })
    })
    .collect()
}

/// Where a flow to an unspecified address goes (connect(2) takes it for loopback).
pub(super) fn loopback_for(to: SocketAddr) -> SocketAddr {
    match to.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), to.port()),
        IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::new(Ipv6Addr::LOCALHOST.into(), to.port()),
        _ => to,
    }
}
