//! Generations: a changed policy is loaded, and what goes on already is judged by it.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    rc::Rc,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{Shutdown, shutdown};
use portcullis_policy::{Loaded, Policy};
use portcullis_types::{Assurance, Lane, Op, Protocol};
use portcullis_wire::{Addr, keyd};

use super::{
    Broker, InForce, Source, elapsed,
    flows::Flow,
    judge::Finding,
    now_seconds,
    sessions::{Control, SETTLED},
};
use crate::{
    audit::{Line, More, of},
    decide::Judgement,
    process::{Context, ProcessKey},
    sys::{
        diag::{Found, state},
        pidfd_getfd, pidfd_open,
        proc::ProcDir,
        realtime,
        socket::Facts,
    },
};

/// States of sockets with a far end (net/tcp_states.h): all but `TIME_WAIT`, `CLOSE` and `LISTEN`.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

/// What is looked for in the folders of policies. Not `IN_CREATE`: a file is made empty, and an empty
/// policy refuses everything.
const CHANGES: AddWatchFlags = AddWatchFlags::IN_CLOSE_WRITE.union(AddWatchFlags::IN_MOVED_TO);

/// What a rule's `expires` may be away from now at most when waiting for it.
const LONGEST: Duration = Duration::from_secs(3600);

impl Broker {
    /// Loads the policy for the first time, and begins to watch its folder.
    pub(super) fn load_first(&mut self) {
        if let Err(error) = self.watch_files() {
            self.note("policy", &format!("changes of the policy will not be noticed: {error}"), &[]);
        }
        let began = Instant::now();
        if self.load().is_ok() {
            self.judge_everything_again(began);
        }
        self.flush_log();
    }

    fn watch_files(&mut self) -> nix::Result<()> {
        let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        for folder in self.policy_folders() {
            watch.add_watch(&folder, CHANGES)?;
        }
        if self.lanes.who.is_some() {
            watch.add_watch(&self.state, CHANGES)?;
        }
        self.watch.add(&watch, Source::Files)?;
        self.files = Some(watch);
        Ok(())
    }

    /// The policy's folder, and that of the file it is a link to.
    fn policy_folders(&self) -> HashSet<PathBuf> {
        let folder = |path: &Path| {
            path.parent().map(|p| if p.as_os_str().is_empty() { PathBuf::from(".") } else { p.to_owned() })
        };
        let real = self.policy_path.canonicalize().ok();
        [folder(&self.policy_path), real.as_deref().and_then(folder)].into_iter().flatten().collect()
    }

    /// Files that rules in force stand in: policies and what they include.
    fn rule_files(&self) -> HashSet<PathBuf> {
        let rules = self.policies().flat_map(Policy::rules);
        rules.map(|(_, rule)| PathBuf::from(&*rule.file)).chain(self.layer_files()).collect()
    }

    /// Watches the folders of included files and of the policies of runs too.
    pub(super) fn watch_policies(&self) {
        let Some(watch) = &self.files else { return };
        for folder in self.rule_files().iter().filter_map(|file| file.parent()) {
            // A folder that is watched already stays so; one that cannot be is reloaded by hand.
            let _ = watch.add_watch(folder, CHANGES);
        }
    }

    pub(super) fn take_file_changes(&mut self) {
        let Some(watch) = &self.files else { return };
        let Ok(events) = watch.read_events() else { return };
        let included = self.rule_files();
        let names: Vec<_> = [Some(self.policy_path.clone()), self.policy_path.canonicalize().ok()]
            .into_iter()
            .flatten()
            .chain(included)
            .filter_map(|p| p.file_name().map(ToOwned::to_owned))
            .collect();
        // Included files are `*.pol` beside it; an overflow (no name) may have been any.
        let is_link = self.policy_path.is_symlink(); // a folder of links may be exchanged as a whole
        let listed = |e: &nix::sys::inotify::InotifyEvent| {
            e.name.as_deref().is_none_or(|name| name == super::lanes::MEMBERS)
        };
        if events.iter().any(listed) {
            self.follow_members();
        }
        let concerns = events.iter().any(|e| match &e.name {
            None => true,
            Some(_) if is_link => true,
            Some(name) => names.contains(name) || Path::new(name).extension().is_some_and(|x| x == "pol"),
        });
        if concerns {
            let _ = self.reload(); // the outcome is on record
        }
    }

    /// Loads the policy again, and those of runs. A broken one leaves the old in force; its diagnostic is kept and on
    /// record.
    ///
    /// # Errors
    /// The diagnostic of the policy that is in force for all.
    pub(super) fn reload(&mut self) -> Result<u64, String> {
        let began = Instant::now();
        let narrowed = self.load_layers();
        let done = self.load();
        if narrowed
            && done.is_err()
            && let Some(force) = self.in_force.clone()
        {
            let generation = self.next_generation();
            self.in_force = Some(InForce { generation, ..force });
        }
        if narrowed || done.is_ok() {
            self.judge_everything_again(began);
        }
        self.flush_log();
        done
    }

    /// From here on no process uses what it has cached.
    fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.page.generation.store(self.generation, Ordering::Release);
        let keys: Vec<_> = self.processes.keys().copied().collect();
        for key in keys {
            self.drain(key);
        }
        self.generation
    }

    /// Loads the policy that is in force for all.
    fn load(&mut self) -> Result<u64, String> {
        let path = crate::escape::sentence(&self.policy_path.to_string_lossy());
        let loaded = match load(&self.policy_path) {
            Ok(loaded) => loaded,
            Err(text) => {
                let stays = match &self.in_force {
                    Some(force) => format!("generation {} stays in force", force.generation),
                    None => "everything is refused".to_owned(),
                };
                let more = [("policy", More::Text(&path)), ("diagnostic", More::Text(&text))];
                self.note("policy", &format!("the policy cannot be used; {stays}"), &more);
                self.diagnostic = Some(text.clone());
                return Err(text);
            }
        };
        self.diagnostic = None;
        let generation = self.next_generation();
        self.in_force =
            Some(InForce { policy: Rc::new(loaded.policy), generation, since: realtime(), expires: None });
        self.note(
            "policy",
            &format!("generation {generation} is in force"),
            &[("policy", More::Text(&path)), ("warnings", More::Number(loaded.warnings.len() as u64))],
        );
        self.watch_policies();
        Ok(generation)
    }

    /// Notes when the next of all rules ends.
    pub(super) fn note_expiry(&mut self) {
        let now = now_seconds();
        let rules = self.policies().flat_map(Policy::rules);
        let expires = rules.filter_map(|(_, rule)| rule.expires).filter(|end| *end > now).min();
        if let Some(force) = &mut self.in_force {
            force.expires = expires;
        }
    }

    /// After the policy, or what it depends on, has changed.
    pub(super) fn judge_everything_again(&mut self, began: Instant) {
        self.note_expiry();
        self.clear_tables();
        self.cut_what_is_refused(began);
        self.refit_listeners();
        self.refit_datagrams();
        self.flush_log();
    }

    /// When the next rule ends.
    pub(super) fn next_expiry(&self) -> Option<Duration> {
        let expires = self.in_force.as_ref()?.expires?;
        Some(Duration::from_secs(expires.saturating_sub(now_seconds())).min(LONGEST))
    }

    pub(super) fn tend_expiry(&mut self) {
        let due = self.in_force.as_ref().and_then(|f| f.expires).is_some_and(|e| e <= now_seconds());
        if due {
            self.note("policy", "a rule has expired", &[]);
            self.judge_everything_again(Instant::now());
        }
    }

    fn cut_what_is_refused(&mut self, began: Instant) {
        // The kernel goes through all sockets of the host, a hundred thousand closed ones too: not when nobody is there.
        let all = match self.processes.is_empty() && self.flows.len() == 0 {
            true => Vec::new(),
            false => self.diag.all(Protocol::TCP, CONNECTED | 1 << state::LISTEN).unwrap_or_default(),
        };
        let listening: HashSet<u16> =
            all.iter().filter(|f| f.state == state::LISTEN).map(|f| f.local.port()).collect();
        let by_cookie: HashMap<u64, Found> =
            all.iter().filter(|f| f.state != state::LISTEN).map(|f| (f.cookie, *f)).collect();
        self.adopt_flows(&by_cookie, &listening);
        self.flows.sweep(realtime().saturating_sub(SETTLED), |cookie| by_cookie.contains_key(&cookie));
        // Controls first: what is related to one falls with it.
        let mut cookies = self.flows.cookies();
        cookies.sort_by_key(|c| self.sessions.get(*c).is_none());
        self.judge_lanes_again(began);
        for cookie in cookies {
            let Some(mut flow) = self.flows.get(cookie).cloned() else { continue };
            if self.lanes.of_cookie(cookie).is_some() {
                continue;
            }
            let Some(found) = by_cookie.get(&cookie) else { continue };
            (flow.local, flow.remote) = (Some(found.local), Some(found.remote));
            let context = Rc::clone(&flow.context);
            match self.judge_again(&context, &flow) {
                Some(judgement) if self.mode_for(&context) == crate::Mode::Enforce => {
                    let how = self.cut(&context, found);
                    self.record_cut(&flow, cookie, &judgement, how, began);
                    self.session_ended(cookie);
                }
                _ => self.keep(cookie, &flow),
            }
        }
    }

    /// A flow that goes on does so under the generation in force.
    fn keep(&mut self, cookie: u64, flow: &Flow) {
        let generation = self.generation_in_force();
        if let Some(kept) = self.flows.get_mut(cookie) {
            kept.generation = generation;
            (kept.local, kept.remote) = (flow.local, flow.remote);
        }
    }

    /// Takes on connected sockets of served processes that are not known by cookie.
    fn adopt_flows(&mut self, by_cookie: &HashMap<u64, Found>, listening: &HashSet<u16>) {
        let by_inode: HashMap<u64, &Found> = by_cookie.values().map(|f| (f.inode, f)).collect();
        let mut fresh = Vec::new();
        for process in self.processes.values() {
            for (_, inode) in process.at.sockets().unwrap_or_default() {
                if let Some(found) = by_inode.get(&inode)
                    && self.flows.get(found.cookie).is_none()
                    // Of a protected flow, which was not asked about yet.
                    && !self.lanes.is_inner(found.remote)
                {
                    fresh.push((Rc::clone(&process.context), **found));
                }
            }
        }
        for (context, found) in fresh {
            self.flows.open(found.cookie, adopted(context, &found, listening));
        }
    }

    /// Ends a flow now. How, or why not.
    fn cut(&mut self, context: &Context, found: &Found) -> Result<&'static str, String> {
        if let Some(keyd) = &mut self.keyd
            && keyd.destroys()
        {
            let own_family = |a: SocketAddr| match a {
                SocketAddr::V4(v4) if found.v6 => Addr::v6(v4.ip().to_ipv6_mapped(), v4.port(), 0),
                other => Addr::from(other),
            };
            let flow = keyd::Flow {
                cookie: found.cookie,
                protocol: Protocol::TCP.0,
                reserved: [0; 7],
                local: own_family(found.local),
                remote: own_family(found.remote),
            };
            if let Ok(by) = keyd.cut_by_name(&flow) {
                return Ok(cut_word(by));
            }
        }
        let socket = self.socket_of(context.key, found).ok_or("its socket could not be reached")?;
        if let Some(keyd) = &mut self.keyd
            && let Ok(by) = keyd.cut(socket.as_fd())
        {
            return Ok(cut_word(by));
        }
        shutdown(std::os::fd::AsRawFd::as_raw_fd(&socket), Shutdown::Both).map_err(|e| e.to_string())?;
        Ok("shut down")
    }

    /// A socket out of the hands of who holds it.
    fn socket_of(&self, key: ProcessKey, found: &Found) -> Option<OwnedFd> {
        let others = self.processes.keys().copied().filter(|k| *k != key);
        std::iter::once(key).chain(others).find_map(|key| {
            let at = ProcDir::open(key.pid).ok()?;
            let (number, _) = at.sockets().ok()?.into_iter().find(|(_, i)| *i == found.inode)?;
            let socket = pidfd_getfd(pidfd_open(key.pid).ok()?.as_fd(), number).ok()?;
            Facts::of(socket.as_fd()).is_ok_and(|f| f.cookie == found.cookie).then_some(socket)
        })
    }

    fn record_cut(
        &mut self,
        flow: &Flow,
        cookie: u64,
        judgement: &Judgement,
        how: Result<&'static str, String>,
        began: Instant,
    ) {
        let rule = self.rule_text(judgement.rule);
        let why = judgement.reason.as_deref().unwrap_or("refused");
        let reason = match &how {
            Ok(how) => format!("no longer permitted: {why}; {how}"),
            Err(error) => format!("no longer permitted: {why}; it could not be cut: {error}"),
        };
        let mut more = vec![("delay_ms", More::Milliseconds(elapsed(began)))];
        more.extend(of(flow.seq));
        if let Some(rule) = &rule {
            more.push(("rule_at", More::Text(&rule.at)));
        }
        let policy = self.layer_file(judgement.layer);
        more.extend(policy.as_deref().map(|policy| ("policy", More::Text(policy))));
        self.log.push(&Line {
            process: Some(&flow.context),
            session: flow.session,
            protocol: Some(flow.protocol),
            local: flow.local,
            remote: flow.remote,
            assurance: Some(judgement.assurance),
            verdict: Some("refuse"),
            rule: rule.as_ref().map(|r| &*r.text),
            reason: Some(&reason),
            lane: Some(flow.lane),
            association: Some(cookie),
            generation: Some(self.in_force.as_ref().map_or(0, |f| f.generation)),
            more: &more,
            ..Line::bare(realtime(), "cut", "broker")
        });
    }

    /// After a restart: finds what wrapped processes have open, so that sessions go on and the next
    /// generation finds every flow.
    pub(super) fn adopt(&mut self) {
        let Ok(all) = self.diag.all(Protocol::TCP, CONNECTED | 1 << state::LISTEN) else { return };
        let listening: HashSet<u16> =
            all.iter().filter(|f| f.state == state::LISTEN).map(|f| f.local.port()).collect();
        let by_inode: HashMap<u64, Found> =
            all.into_iter().filter(|f| f.inode != 0).map(|f| (f.inode, f)).collect();
        self.take_up_lanes();
        let datagrams = self.diag.all(Protocol::UDP, u32::MAX).unwrap_or_default();
        let datagrams: HashMap<u64, Found> = datagrams.into_iter().map(|f| (f.inode, f)).collect();
        if by_inode.is_empty() && datagrams.is_empty() {
            return;
        }
        let mut listeners = Vec::new();
        for (context, held) in self.members_with_sockets() {
            for (number, inode) in held {
                if let Some(found) = datagrams.get(&inode) {
                    self.adopt_datagram(context.key, number, found);
                }
                let Some(found) = by_inode.get(&inode) else { continue };
                if found.state == state::LISTEN {
                    listeners.push((Rc::clone(&context), number, *found));
                } else if self.flows.get(found.cookie).is_none() && !self.lanes.is_inner(found.remote) {
                    let flow = adopted(Rc::clone(&context), found, &listening);
                    self.adopt_control(&flow, found, number);
                    self.flows.open(found.cookie, flow);
                }
            }
        }
        // Now that it is known which sessions live.
        for (context, number, found) in listeners {
            self.adopt_listener(&context, number, &found);
        }
        self.forget_inherited();
    }

    fn adopt_control(&mut self, flow: &Flow, found: &Found, number: i32) {
        let Finding { judgement, related_by, .. } = self.judge_flow(&flow.context, flow);
        if !(judgement.permitted && judgement.related) {
            return;
        }
        self.add_session(Control {
            cookie: found.cookie,
            inode: found.inode,
            local: Some(found.local),
            remote: found.remote,
            since: flow.context.key.start,
            maker: (flow.context.key, number),
            rules: related_by,
            lane: judgement.lane,
            association: None,
        });
    }
}

/// A policy file, or its diagnostic.
pub(super) fn load(path: &Path) -> Result<Loaded, String> {
    Policy::load(path).map_err(|error| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })
}

const fn cut_word(by: keyd::CutBy) -> &'static str {
    match by {
        keyd::CutBy::Gone => "it had ended",
        keyd::CutBy::Destroy => "destroyed in the kernel",
        keyd::CutBy::Disconnect => "disconnected",
        keyd::CutBy::Shutdown => "shut down",
    }
}

/// A flow of which nothing was known: which side opened it is told by whether its port listens.
fn adopted(context: Rc<Context>, found: &Found, listening: &HashSet<u16>) -> Flow {
    let op = if listening.contains(&found.local.port()) { Op::Accept } else { Op::Connect };
    Flow {
        context,
        op,
        number: -1,
        protocol: Protocol::TCP,
        local: Some(found.local),
        remote: Some(found.remote),
        rule: None,
        session: None,
        lane: Lane::Plain,
        assurance: Assurance::None,
        generation: 0,
        since: realtime(),
        seq: 0,
        met: false,
    }
}
