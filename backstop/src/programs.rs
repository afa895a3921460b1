//! Loading the programs, and putting them on cgroups.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::LazyLock,
};

use crate::{Backstop, Cgroup, error::BackstopError, object::Loaded, sys};

/// One program on a cgroup.
struct Hook {
    name: &'static str,
    /// The program that it calls while the broker lives.
    judge: &'static str,
    /// The program array that leads there.
    gate: &'static str,
    /// `enum bpf_attach_type`
    kind: u32,
}

const fn hook(name: &'static str, judge: &'static str, gate: &'static str, kind: u32) -> Hook {
    Hook { name, judge, gate, kind }
}

const HOOKS: [Hook; 9] = [
    hook("ingress", "judge_ingress", "gate_ingress", 0),
    hook("egress", "judge_egress", "gate_egress", EGRESS),
    hook("sock_create", "judge_sock_create", "gate_sock_create", 2),
    hook("bind4", "judge_bind4", "gate_bind4", 8),
    hook("bind6", "judge_bind6", "gate_bind6", 9),
    hook("connect4", "judge_connect4", "gate_connect4", 10),
    hook("connect6", "judge_connect6", "gate_connect6", 11),
    hook("sendmsg4", "judge_sendmsg4", "gate_sendmsg4", 14),
    hook("sendmsg6", "judge_sendmsg6", "gate_sendmsg6", 15),
];

/// `BPF_CGROUP_INET_EGRESS`
const EGRESS: u32 = 1;

impl Hook {
    /// Whether there is anything for it to do. What looks at each packet is paid for by each.
    fn is_needed(&self) -> bool {
        self.kind != EGRESS || *KNOWS_MOBILITY
    }
}

/// Whether IPv6 packets can have a source route here: the kernel says so of a socket that sends nothing.
static KNOWS_MOBILITY: LazyLock<bool> = LazyLock::new(|| {
    // struct rt2_hdr (linux/ipv6.h): type 2, one segment left, by way of nowhere.
    let mut route = [0; 24];
    [route[1], route[2], route[3]] = [2, 2, 1];
    sys::takes_ipv6_route(&route)
});

/// Descriptors of an [`Attacher`].
const ATTACHER_FDS: usize = HOOKS.len();
/// Maps of a [`Backstop`], in the order in which they are handed over, before gates and iterator.
const MAPS: [&str; 7] = ["control", "asleep", "stats", "processes", "grants", "singles", "listeners"];
/// Descriptors of a [`Backstop`]: maps, ring, gates, iterator.
const BACKSTOP_FDS: usize = MAPS.len() + 1 + HOOKS.len() + 1;

static OBJECT: LazyLock<&[u8]> =
    LazyLock::new(|| aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/backstop.bpf.o")));

/// Loads programs and maps into the kernel. Needs `CAP_BPF`, `CAP_PERFMON` and `CAP_NET_ADMIN`.
///
/// What is returned is two halves: who keeps the [`Backstop`] may grant, and its death refuses
/// everything new; who keeps the [`Attacher`] may put more cgroups under it.
///
/// # Errors
/// [`BackstopError`]; nothing stays loaded then.
pub fn load() -> Result<(Backstop, Attacher), BackstopError> {
    let (descriptors, attacher) = load_for_another()?;
    Ok((Backstop::from_descriptors(descriptors)?, attacher))
}

/// As [`load`], for a process that must not load them itself: the descriptors, in this order, make a
/// [`Backstop`] there. In the kernel's eyes the broker ends when their last copy is closed, so the
/// loader drops its own once they are sent.
///
/// # Errors
/// [`BackstopError`]; nothing stays loaded then.
pub fn load_for_another() -> Result<(Vec<OwnedFd>, Attacher), BackstopError> {
    if OBJECT.is_empty() {
        return Err(BackstopError::NotBuiltIn);
    }
    let hook_of = |program: &str| {
        HOOKS.iter().find(|hook| [hook.name, hook.judge].contains(&program)).map(|hook| hook.kind)
    };
    let mut loaded = Loaded::new(&OBJECT, hook_of)?;
    let mut attached = Vec::with_capacity(ATTACHER_FDS);
    let mut parts = Vec::with_capacity(BACKSTOP_FDS);
    for name in MAPS.into_iter().chain(["events"]) {
        parts.push(loaded.map(name)?);
    }
    for hook in &HOOKS {
        let (judge, gate) = (loaded.program(hook.judge)?, loaded.map(hook.gate)?);
        sys::update(gate.as_fd(), &[0; 4], &judge.as_raw_fd().to_ne_bytes())
            .map_err(|source| BackstopError::Attach { what: "set", hook: hook.gate, source })?;
        parts.push(gate);
        attached.push(loaded.program(hook.name)?);
    }
    parts.push(loaded.program("identify")?);
    Ok((parts, Attacher { programs: attached }))
}

/// Of the descriptors that [`load_for_another`] gives, the map of granted listeners.
#[must_use]
pub fn listeners_of(descriptors: &[OwnedFd]) -> Option<BorrowedFd<'_>> {
    let at = MAPS.iter().position(|name| *name == "listeners")?;
    descriptors.get(at).map(AsFd::as_fd)
}

/// Of the same descriptors, the ring of records: whoever keeps it can read what their owner had no time for
/// ([`crate::left_over`]).
#[must_use]
pub fn events_of(descriptors: &[OwnedFd]) -> Option<BorrowedFd<'_>> {
    descriptors.get(MAPS.len()).map(AsFd::as_fd)
}

pub(crate) fn in_map(map: &'static str) -> impl FnOnce(aya::maps::MapError) -> BackstopError {
    move |source| BackstopError::Map { map, source }
}

/// One set of descriptors, taken apart.
pub(crate) struct Parts {
    /// As [`MAPS`] has them.
    pub maps: [OwnedFd; MAPS.len()],
    pub events: OwnedFd,
    pub gates: Vec<OwnedFd>,
    pub identify: OwnedFd,
}

impl Parts {
    pub fn new(fds: Vec<OwnedFd>) -> Result<Self, BackstopError> {
        let found = fds.len();
        let wrong = || BackstopError::HandedOver { found, wanted: BACKSTOP_FDS };
        if found != BACKSTOP_FDS {
            return Err(wrong());
        }
        let mut fds = fds.into_iter();
        let maps: Vec<_> = fds.by_ref().take(MAPS.len()).collect();
        let maps = maps.try_into().map_err(|_| wrong())?;
        let events = fds.next().ok_or_else(wrong)?;
        let gates: Vec<_> = fds.by_ref().take(HOOKS.len()).collect();
        Ok(Self { maps, events, gates, identify: fds.next().ok_or_else(wrong)? })
    }
}

/// Puts the loaded programs on cgroups. Needs `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct Attacher {
    programs: Vec<OwnedFd>,
}

impl Attacher {
    /// Puts every program that this kernel needs on the cgroup, for as long as the cgroup exists, and then takes off
    /// what an earlier broker left there; so at no moment is there nothing.
    ///
    /// # Errors
    /// [`BackstopError::Attach`]. The cgroup may then be held in part: no process should enter it.
    pub fn attach(&self, cgroup: &Cgroup) -> Result<(), BackstopError> {
        self.put_on(cgroup, Hook::is_needed)
    }

    /// As [`Self::attach`], with those as well that another kernel would need.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn attach_all(&self, cgroup: &Cgroup) -> Result<(), BackstopError> {
        self.put_on(cgroup, |_| true)
    }

    fn put_on(&self, cgroup: &Cgroup, is_wanted: impl Fn(&Hook) -> bool) -> Result<(), BackstopError> {
        for (hook, program) in HOOKS.iter().zip(&self.programs).filter(|(hook, _)| is_wanted(hook)) {
            let failed = |what| move |source| BackstopError::Attach { what, hook: hook.name, source };
            let before = sys::attached(cgroup.as_fd(), hook.kind).map_err(failed("look for"))?;
            match sys::attach(cgroup.as_fd(), program.as_fd(), hook.kind) {
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) && before.len() == 1 => {
                    // This very program is there already.
                    sys::detach(cgroup.as_fd(), program.as_fd(), hook.kind).map_err(failed("replace"))?;
                    sys::attach(cgroup.as_fd(), program.as_fd(), hook.kind).map_err(failed("attach"))?;
                    continue;
                }
                done => done.map_err(failed("attach"))?,
            }
            for id in before {
                let old = match sys::program(id) {
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                    other => other.map_err(failed("replace"))?,
                };
                sys::detach(cgroup.as_fd(), old.as_fd(), hook.kind).map_err(failed("replace"))?;
            }
        }
        Ok(())
    }

    /// Which of the programs are not on the cgroup: something took them off.
    ///
    /// # Errors
    /// [`BackstopError::Attach`].
    pub fn missing(cgroup: &Cgroup) -> Result<Vec<&'static str>, BackstopError> {
        let mut missing = Vec::new();
        for hook in HOOKS.iter().filter(|hook| hook.is_needed()) {
            let there = sys::attached(cgroup.as_fd(), hook.kind).map_err(|source| BackstopError::Attach {
                what: "look for",
                hook: hook.name,
                source,
            })?;
            if there.is_empty() {
                missing.push(hook.name);
            }
        }
        Ok(missing)
    }

    /// For handing over to another process of ours.
    #[must_use]
    pub fn into_descriptors(self) -> Vec<OwnedFd> {
        self.programs
    }

    /// What [`Self::into_descriptors`] gave in another process.
    ///
    /// # Errors
    /// [`BackstopError::HandedOver`].
    pub fn from_descriptors(programs: Vec<OwnedFd>) -> Result<Self, BackstopError> {
        match programs.len() {
            ATTACHER_FDS => Ok(Self { programs }),
            found => Err(BackstopError::HandedOver { found, wanted: ATTACHER_FDS }),
        }
    }
}
