//! Sessions: control associations on `related` services, and who belongs to them.
//!
//! A process belongs to a session if it holds the control association's socket now, or if one of
//! its ancestors does, below which its branch was born after the association was there. The kernel
//! is asked each time; what is kept here is only which sockets are controls.

use std::{collections::HashMap, net::SocketAddr, rc::Rc};

use portcullis_types::{Assurance, Lane, Protocol, RuleId};

use super::{Broker, far::FarEnd, judge::Call, layers::rule_in};
use crate::{
    process::{Context, ProcessKey},
    sys::{diag::state, pidfd_getfd, proc::ProcDir, realtime, socket::Facts},
};

/// Clock ticks a second in `/proc` (`USER_HZ`, 100 on all that Linux runs on; proc(5)).
const NANOSECONDS_PER_TICK: u64 = 10_000_000;
/// After how long a permitted flow must be seen by the kernel, or has ended, in nanoseconds.
pub(super) const SETTLED: u64 = 10_000_000_000;
/// Most controls that are remembered.
const MOST: usize = 1 << 16;

/// A control association.
#[derive(Clone, Debug)]
pub(super) struct Control {
    pub(super) cookie: u64,
    pub(super) inode: u64,
    /// Its own end; `None` until the kernel has chosen it (connect).
    pub(super) local: Option<SocketAddr>,
    pub(super) remote: SocketAddr,
    /// When it was there, in clock ticks since boot.
    pub(super) since: u64,
    /// Who accepted or opened it, and by which descriptor.
    pub(super) maker: (ProcessKey, i32),
    /// The rules that make it one, of one policy each.
    pub(super) rules: Vec<RuleId>,
    pub(super) lane: Lane,
    /// It is protected, and this is its number with the key daemon.
    pub(super) association: Option<u64>,
}

impl Control {
    /// The rule of this policy that makes it one.
    pub(super) fn rule_by(&self, layer: u8) -> Option<RuleId> {
        self.rules.iter().copied().find_map(|rule| rule_in(layer, rule))
    }

    /// The association that it is, if that is under TLS.
    pub(super) fn protected(&self) -> Option<u64> {
        self.association.filter(|_| self.lane == Lane::Tls)
    }
}

/// Sessions that a process is in.
#[derive(Clone, Debug)]
pub(super) struct Membership {
    /// The one that the flow in question belongs to.
    pub(super) control: Control,
    /// How many sessions the process is in at once; with more than one, what it opens is open to
    /// the peers of all.
    pub(super) of: usize,
    pub(super) rule: Option<RuleId>,
    pub(super) assurance: Assurance,
}

/// Controls by cookie, and where each was found last: which process had it, as which descriptor.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    all: HashMap<u64, Control>,
    found: HashMap<u64, (ProcessKey, i32)>,
}

impl Sessions {
    fn add(&mut self, control: Control) {
        if self.all.len() < MOST {
            self.all.insert(control.cookie, control);
        }
    }

    pub(super) fn get(&self, cookie: u64) -> Option<&Control> {
        self.all.get(&cookie)
    }

    pub(super) fn forget(&mut self, cookie: u64) {
        self.all.remove(&cookie);
        self.found.remove(&cookie);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    fn cookies(&self) -> Vec<u64> {
        self.all.keys().copied().collect()
    }
}

/// Start of the clock tick that `boot` nanoseconds since boot are in.
pub(super) const fn ticks(boot: u64) -> u64 {
    boot / NANOSECONDS_PER_TICK
}

impl Broker {
    /// Controls of the sessions that a process is in, dead ones left out.
    pub(super) fn sessions_of(&mut self, context: &Context) -> Vec<Control> {
        if self.sessions.is_empty() {
            return Vec::new();
        }
        let mut found = self.all_held_by(context.key).unwrap_or_else(|| self.seek_sessions(context));
        found.retain_mut(|control| self.is_live(control));
        found
    }

    /// All controls there are, if this process still holds each where it was found last: then none is to be sought.
    fn all_held_by(&self, key: ProcessKey) -> Option<Vec<Control>> {
        let at = &self.processes.get(&key)?.at;
        let held = |control: &Control| {
            let (holder, number) = self.sessions.found.get(&control.cookie)?;
            (*holder == key && at.holds(*number, control.inode)).then(|| control.clone())
        };
        self.sessions.all.values().map(held).collect()
    }

    fn seek_sessions(&mut self, context: &Context) -> Vec<Control> {
        let mut found: Vec<Control> = Vec::new();
        let mut born = u64::MAX; // the asker itself needs no birthday
        let branch = std::iter::once(context.key).chain(context.ancestors.iter().map(|a| a.key));
        for key in branch {
            // What its ancestors got later than this branch began is not its own, and need not be looked for.
            if self.sessions.all.values().all(|control| born < control.since) {
                break;
            }
            let held = self.held_by(key);
            for control in self.sessions.all.values() {
                if let Some((number, _)) = held.iter().find(|(_, inode)| *inode == control.inode)
                    && born >= control.since
                    && found.iter().all(|c| c.cookie != control.cookie)
                {
                    self.sessions.found.insert(control.cookie, (key, *number));
                    found.push(control.clone());
                }
            }
            born = key.start;
        }
        found
    }

    /// Descriptors and inodes of the sockets that a process holds; none if it is gone or may not be looked at.
    fn held_by(&self, key: ProcessKey) -> Vec<(i32, u64)> {
        // What is known was opened when it was there, and leads nowhere once it is gone.
        self.processes
            .get(&key)
            .map_or_else(|| sockets_of(key), |known| known.at.sockets().unwrap_or_default())
    }

    /// Whether a control is established still; finds out its own address on the way.
    fn is_live(&mut self, control: &mut Control) -> bool {
        if let Some(id) = control.association {
            return self.lanes.get(id).is_some_and(|one| one.up || one.is_known());
        }
        let local = match control.local {
            Some(local) => local,
            None => {
                let Some(local) = self.local_end(control) else { return false };
                control.local = Some(local);
                if let Some(kept) = self.sessions.all.get_mut(&control.cookie) {
                    kept.local = Some(local);
                }
                local
            }
        };
        self.diag
            .find(Protocol::TCP, local, control.remote)
            .is_some_and(|f| f.cookie == control.cookie && f.state == state::ESTABLISHED)
    }

    fn local_end(&mut self, control: &Control) -> Option<SocketAddr> {
        let (key, number) = control.maker;
        let direct = self.processes.get(&key).and_then(|p| {
            let socket = pidfd_getfd(std::os::fd::AsFd::as_fd(&p.pidfd), number).ok()?;
            let facts = Facts::of(std::os::fd::AsFd::as_fd(&socket)).ok()?;
            (facts.cookie == control.cookie).then_some(facts.local).flatten()
        });
        direct.or_else(|| {
            let all = self.diag.all(Protocol::TCP, 1 << state::ESTABLISHED).ok()?;
            all.into_iter().find(|f| f.cookie == control.cookie).map(|f| f.local)
        })
    }

    /// The session by which one policy lets a process exchange a related flow with `remote`, if it is in one.
    pub(super) fn related(
        &mut self,
        layer: u8,
        context: &Context,
        call: &Call,
        remote: SocketAddr,
        far: Option<&FarEnd>,
    ) -> Option<Membership> {
        let mine = self.sessions_of(context);
        let ip = remote.ip().to_canonical();
        let of = mine.len();
        for control in mine {
            let rule = control.rule_by(layer);
            if rule.is_none() || control.remote.ip().to_canonical() != ip {
                continue;
            }
            if !self.is_same_session(&control, call, far) {
                continue;
            }
            if control.protected().is_some() {
                return Some(Membership { control, of, rule, assurance: Assurance::Certificate });
            }
            let Some(far) = far else {
                return Some(Membership { control, of, rule, assurance: Assurance::Address });
            };
            if self.is_far_session(&control, far) {
                return Some(Membership { control, of, rule, assurance: Assurance::Kernel });
            }
        }
        None
    }

    /// Whether a far end on this host belongs to the session at the control's other end.
    fn is_far_session(&mut self, control: &Control, far: &FarEnd) -> bool {
        let Some(local) = control.local else { return false };
        let Some(other) = self.diag.find(Protocol::TCP, control.remote, local) else { return false };
        if far.known.is_empty() {
            // Not wrapped: known by its user only, at both ends of the comparison.
            return far.found.is_some_and(|f| f.uid == other.uid);
        }
        far.known.iter().any(|context| {
            let holds = |key, inode| self.held_by(key).iter().any(|(_, held)| *held == inode);
            holds(context.key, other.inode)
                || self.sessions.all.get(&other.cookie).is_some_and(|c| {
                    let mut born = context.key.start;
                    context.ancestors.iter().any(|a| {
                        let in_it = born >= c.since && holds(a.key, c.inode);
                        born = a.key.start;
                        in_it
                    })
                })
        })
    }

    /// Notes a control association.
    pub(super) fn add_session(&mut self, control: Control) {
        self.sessions.add(control);
    }

    /// Closes what a control association opened.
    pub(super) fn session_ended(&mut self, cookie: u64) {
        if self.sessions.get(cookie).is_some() {
            self.sessions.forget(cookie);
            self.close_listeners_of(cookie);
        }
    }

    /// Looks which flows and controls have ended, after word of some was lost.
    pub(super) fn sweep(&mut self) {
        let Ok(all) = self.diag.all(Protocol::TCP, u32::MAX) else { return };
        let there: std::collections::HashSet<u64> = all.iter().map(|f| f.cookie).collect();
        self.flows.sweep(realtime().saturating_sub(SETTLED), |cookie| there.contains(&cookie));
        for cookie in self.sessions.cookies() {
            if !there.contains(&cookie) {
                self.session_ended(cookie);
            }
        }
    }

    /// Name of a session as records and `ps` show it.
    pub(super) fn context_of(&self, key: ProcessKey) -> Option<Rc<Context>> {
        self.processes.get(&key).map(|p| Rc::clone(&p.context))
    }
}

/// The same of one that has not asked yet.
fn sockets_of(key: ProcessKey) -> Vec<(i32, u64)> {
    let Ok(at) = ProcDir::open(key.pid) else { return Vec::new() };
    let held = at.sockets().unwrap_or_default();
    // Only now: if the folder is still this process's, it was all along.
    if at.birth().is_ok_and(|b| b.start == key.start) { held } else { Vec::new() }
}
