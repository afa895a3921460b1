//! From a [`Config`] to a running [`Broker`].

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    },
    path::Path,
    sync::atomic::Ordering,
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, FcntlArg, OFlag, fcntl},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket},
    },
    unistd::{fchownat, geteuid, gethostname},
};

use super::{Broker, Source, Watch, datagrams, far, flows, sessions};
use crate::{
    BrokerError, Config, Mode,
    audit::{Log, More},
    keyd::{Keepsake, Keyd},
    process::Inspector,
    settings::Settings,
    sys::{
        diag::{Diag, Endings},
        local::{Changes, Own},
        memory::{Shared, vow},
        message::name_writers,
        privileges::{Spare, broker_user, drop_to, raise_descriptor_limit},
        socket::own_namespace,
    },
};

/// Room for word of ended sockets, in bytes.
const ENDINGS: usize = 8 << 20;

impl Broker {
    /// Makes everything ready, drops privileges, and loads the policy.
    pub(crate) fn start(config: Config) -> Result<Self, BrokerError> {
        check_state(&config.state)?;
        let settings = Settings::read(&config.state)?;
        let audit = config.state.join("audit");
        let owner = geteuid().as_raw();
        let privileged = geteuid().is_root();
        make_audit_folder(&audit, privileged)?;
        let mut signals = SigSet::empty();
        for one in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT] {
            signals.add(one);
        }
        signals.thread_block().map_err(BrokerError::kernel("sigprocmask"))?;
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(BrokerError::kernel("signalfd"))?;
        raise_descriptor_limit();
        let control = match config.control {
            Some(control) => control,
            None => bind_control(&config.state.join("control.sock"))?,
        };
        // Before privileges go: a larger buffer than rmem_max needs them.
        let endings = Endings::open(ENDINGS).ok();
        if privileged {
            let (uid, gid) = broker_user();
            drop_to(uid, gid).map_err(|source| BrokerError::Privileges { uid: uid.as_raw(), source })?;
        }
        name_writers(config.doors.as_fd()).map_err(BrokerError::kernel("SO_PASSCRED"))?;
        let host = gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default();
        let (log, tail) = Log::open(&audit, settings.audit.clone(), &host)
            .map_err(|source| BrokerError::AuditLog { path: audit.clone(), source })?;
        let page: &'static _ =
            Box::leak(Box::new(Shared::new().map_err(BrokerError::kernel("memfd_create"))?));
        let mut broker = Self {
            mode: config.mode,
            state: config.state.clone(),
            policy_path: config.policy.unwrap_or_else(|| config.state.join("policy.pol")),
            settings,
            watch: Watch::new().map_err(BrokerError::kernel("epoll_create"))?,
            doors: config.doors,
            control,
            signals,
            files: None,
            spare: Spare::new().map_err(BrokerError::kernel("open /dev/null"))?,
            log,
            page,
            in_force: None,
            layers: super::layers::Layers::default(),
            generation: tail.generation,
            diagnostic: None,
            inspector: Inspector::default(),
            diag: Diag::open().map_err(BrokerError::kernel("sock_diag"))?,
            endings,
            endings_lost: 0,
            endings_looked_at: None,
            addresses: Changes::open().ok(),
            own: Own::read().map_err(BrokerError::kernel("getifaddrs"))?,
            namespace: own_namespace(),
            processes: HashMap::new(),
            by_pid: HashMap::new(),
            users: HashMap::new(),
            channels: HashMap::new(),
            clients: HashMap::new(),
            busy: HashSet::new(),
            cgroups_looked_at: 0,
            sessions: sessions::Sessions::default(),
            listeners: HashMap::new(),
            turned_down: HashMap::new(),
            datagrams: datagrams::Datagrams::default(),
            flows: flows::Flows::default(),
            holders: far::Holders::default(),
            keyd: None,
            lanes: super::lanes::Lanes::default(),
            keepsake: Keepsake::default(),
            handed: config.handed.map(Into::into),
            left_over: Vec::new(),
            inherited: HashMap::new(),
            guards: super::guard::Guards::default(),
            kernel: None,
            unbacked: None,
            without: config.without,
            nameless: false,
            slow_to_wake: false,
            fence: None,
            coverages: super::coverage::Coverages::default(),
            shimmed: HashSet::new(),
            flushed: 0,
            turned_away: 0,
            stop: false,
            owner,
        };
        broker.page.generation.store(broker.generation, Ordering::Release);
        vow(page).map_err(BrokerError::kernel("robust mutex"))?;
        broker.open_sources()?;
        broker.take_handed();
        if let Some(socket) = config.keyd {
            broker.greet(socket);
        }
        broker.note("broker", "the broker begins", &[("mode", More::Text(mode_word(broker.mode)))]);
        if tail.seq > 0 && !tail.ended {
            let why =
                "the broker before was killed: what processes themselves noted in its last moments is lost";
            broker.note("broker", why, &[]);
            broker.lanes.left = broker.log.left_open();
        }
        if !broker.log.commit() {
            let source = io::Error::other(broker.log.error().unwrap_or("unknown").to_owned());
            return Err(BrokerError::AuditLog { path: audit, source });
        }
        broker.read_members();
        broker.load_first();
        if config.strict
            && let Some(text) = broker.diagnostic.take()
        {
            broker.end();
            return Err(BrokerError::Policy(text));
        }
        broker.record_left_over();
        if !config.fresh {
            broker.renew_keys();
            broker.adopt();
            broker.take_keyd();
        }
        broker.end_all_left();
        broker.serve_left();
        broker.flush_log();
        broker.renew_lease();
        if let Some(ready) = config.ready {
            let _ = fs::File::from(ready).write_all(b"ready\n");
        }
        Ok(broker)
    }

    fn open_sources(&mut self) -> Result<(), BrokerError> {
        let failed = BrokerError::kernel::<Errno>;
        self.watch.add(&self.doors, Source::Doors).map_err(failed("epoll_ctl"))?;
        self.watch.add(&self.control, Source::Control).map_err(failed("epoll_ctl"))?;
        self.watch.add(&self.signals, Source::Signals).map_err(failed("epoll_ctl"))?;
        if let Some(endings) = &self.endings {
            self.watch.add_once(endings, Source::Endings).map_err(failed("epoll_ctl"))?;
        }
        if let Some(handed) = &self.handed {
            self.watch.add(handed, Source::Handed).map_err(failed("epoll_ctl"))?;
        }
        if let Some(addresses) = &self.addresses {
            self.watch.add(addresses, Source::Addresses).map_err(failed("epoll_ctl"))?;
        }
        for fd in [&self.doors, &self.control] {
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(failed("fcntl"))?;
        }
        Ok(())
    }

    /// Says hello to a key daemon.
    fn greet(&mut self, socket: OwnedFd) {
        let met = Keyd::new(socket, &mut self.keepsake).and_then(|keyd| {
            self.watch.add(&keyd, Source::Keyd)?;
            Ok(keyd)
        });
        match met {
            Ok(keyd) => {
                if let Some(who) = keyd.who() {
                    // A host that has keys has the name that its certificates show.
                    self.log.name_host(&who.host);
                    self.lanes.who = Some(who.clone());
                }
                self.keyd = Some(keyd);
                self.leave_keepsake();
                self.fill_fence();
            }
            Err(error) => self.note("broker", &format!("the key daemon does not answer: {error}"), &[]),
        }
    }

    /// Takes reports of strangers and news of protected flows, or leave of the key daemon.
    pub(super) fn take_keyd(&mut self) {
        // Each answer may bring more along.
        loop {
            let Some(keyd) = &mut self.keyd else { return };
            // Whom filters have dropped is told when it is known whose filters they are.
            let taken = keyd.news();
            let strangers = if self.lanes.taking_up { Vec::new() } else { keyd.reports() };
            let stopped = keyd.take_stopped();
            stopped.iter().for_each(|one| self.report_stopped(one));
            match taken {
                Ok(news) => {
                    if news.is_empty() && strangers.is_empty() {
                        return;
                    }
                    strangers.iter().for_each(|stranger| self.report_stranger(stranger));
                    news.into_iter().for_each(|one| self.hear_news(one));
                    // What comes by itself says so by itself.
                    if self.keyd.as_ref().is_some_and(|keyd| !keyd.has_news()) {
                        return;
                    }
                }
                Err(error) => {
                    self.watch.forget(|s| matches!(s, Source::Keyd));
                    self.keyd = None;
                    self.note("broker", &format!("the key daemon has gone: {error}"), &[]);
                    self.lose_lanes("the key daemon has gone");
                    return;
                }
            }
        }
    }
}

/// The word of a mode, as on the command line.
pub(super) const fn mode_word(mode: Mode) -> &'static str {
    match mode {
        Mode::Enforce => "enforce",
        Mode::Audit => "audit",
    }
}

/// The folder must be there, ours, and closed to other writers.
fn check_state(state: &Path) -> Result<(), BrokerError> {
    let failed = |source| BrokerError::StateFolder { path: state.to_owned(), source };
    let about = fs::metadata(state).map_err(failed)?;
    if !about.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    let expected = geteuid().as_raw();
    if about.uid() != expected {
        return Err(BrokerError::ForeignState { path: state.to_owned(), owner: about.uid(), expected });
    }
    let mode = about.permissions().mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(BrokerError::LooseState { path: state.to_owned(), mode });
    }
    Ok(())
}

/// Makes the folder of the log, and gives it to the broker's user with all that is in it.
fn make_audit_folder(audit: &Path, privileged: bool) -> Result<(), BrokerError> {
    let failed = |source| BrokerError::AuditLog { path: audit.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o750).create(audit).map_err(failed)?;
    if !fs::symlink_metadata(audit).map_err(failed)?.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    if privileged {
        let (uid, gid) = broker_user();
        let give = |path: &Path| {
            fchownat(AT_FDCWD, path, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_err(io::Error::from)
        };
        give(audit).map_err(failed)?;
        for entry in fs::read_dir(audit).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.metadata().map_err(failed)?.is_file() {
                give(&entry.path()).map_err(failed)?;
            }
        }
    }
    Ok(())
}

fn bind_control(path: &Path) -> Result<OwnedFd, BrokerError> {
    let make = || -> io::Result<OwnedFd> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let made = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(made.as_raw_fd(), &UnixAddr::new(path)?)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listen(&made, Backlog::MAXCONN)?;
        Ok(made)
    };
    make().map_err(BrokerError::kernel("control socket"))
}
