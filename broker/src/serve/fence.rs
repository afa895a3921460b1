//! The backstop's nftables form: what was judged is granted to the table that holds wrapped cgroups, through the key
//! daemon, and what the table refuses is put on record.
//!
//! It knows trees and destinations, not processes: what one may reach, the whole state folder's programs may, until the
//! policy changes. So the guard stays as strict as where it is alone: each call is judged, and made by proxy.

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use portcullis_backstop::cgroup_name;
use portcullis_types::{Op, Protocol, Verdict};
use portcullis_wire::keyd::{Pass, Stopped};

use super::{Broker, judge::Call, word};
use crate::{
    Mode,
    audit::{Line, More},
    guard::target::same_network,
};

/// The table, as far as this broker has filled it.
#[derive(Debug)]
pub(super) struct Fence {
    /// Why it is not BPF.
    why: String,
    granted: HashSet<Pass>,
    /// Ports of granted listeners, by the listener's cookie.
    listeners: HashMap<u64, u16>,
}

impl Fence {
    /// Why it is not BPF.
    pub(super) fn why(&self) -> &str {
        &self.why
    }
}

impl Broker {
    /// The supervisor has made the table. `why`: why it is not BPF.
    pub(super) fn take_fence(&mut self, why: String) {
        self.fence = Some(Fence { why, granted: HashSet::new(), listeners: HashMap::new() });
        self.fill_fence();
    }

    /// Begins to fill it, once there are a table and a key daemon.
    pub(super) fn fill_fence(&mut self) {
        let (Some(_), Some(keyd)) = (&self.fence, &mut self.keyd) else { return };
        let fault = match keyd.table(&cgroup_name(&self.state)) {
            Ok(true) => return,
            Ok(false) => "what the nftables table refuses cannot be put on record".to_owned(),
            Err(error) => format!("the nftables table cannot be filled: {error}"),
        };
        self.note("broker", &fault, &[]);
    }

    /// Lets a call that was judged and permitted pass. If it cannot be granted, the kernel refuses it, on record.
    pub(super) fn fence_call(&mut self, call: &Call, token: Option<SocketAddr>) {
        let facts = call.facts();
        let (cookie, namespace) = facts.map_or((0, 0), |facts| (facts.cookie, facts.namespace));
        let elsewhere = ![0, self.namespace].contains(&namespace);
        match call.op {
            // The table is of this network namespace.
            _ if elsewhere || self.fence.is_none() => {}
            Op::Connect | Op::Send => {
                let Some(at) = token.or(call.remote) else { return };
                let ip = reached(at.ip(), call.local.map(|local| local.ip()));
                self.pass(Pass {
                    ip: mapped(ip),
                    protocol: call.protocol.0,
                    port: at.port(),
                    ..Pass::default()
                });
            }
            Op::Listen => self.fence_listener(cookie, call.local.map_or(0, |local| local.port())),
            Op::Socket => {
                let what = if call.protocol == Protocol::RAW { Pass::ANYTHING } else { Pass::OTHERS };
                self.pass(Pass { what, ..Pass::default() });
            }
            Op::Bind | Op::Accept | Op::Receive => {}
        }
    }

    /// Lets others come to a listener, once its port is known.
    pub(super) fn fence_listener(&mut self, cookie: u64, port: u16) {
        let Some(fence) = self.fence.as_mut().filter(|_| port != 0) else { return };
        fence.listeners.insert(cookie, port);
        self.pass(Pass { what: Pass::LISTENER, port, ..Pass::default() });
    }

    /// A listener has ended.
    pub(super) fn forget_fence_listener(&mut self, cookie: u64) {
        let Some(fence) = &mut self.fence else { return };
        let Some(port) = fence.listeners.remove(&cookie) else { return };
        let shared = fence.listeners.values().any(|other| *other == port);
        let pass = Pass { what: Pass::LISTENER, port, ..Pass::default() };
        if !shared
            && fence.granted.remove(&pass)
            && let Some(keyd) = &mut self.keyd
        {
            let _gone = keyd.pass(&Pass { what: Pass::NO_LISTENER, ..pass });
        }
    }

    /// Takes back all that may go out.
    pub(super) fn clear_fence(&mut self) {
        let Some(fence) = &mut self.fence else { return };
        fence.granted.retain(|pass| pass.what == Pass::LISTENER);
        let cleared =
            self.keyd.as_mut().map(|keyd| keyd.pass(&Pass { what: Pass::NOTHING, ..Pass::default() }));
        if let Some(Err(error)) = cleared {
            self.note("broker", &format!("the nftables table cannot be emptied: {error}"), &[]);
        }
    }

    fn pass(&mut self, pass: Pass) {
        let Some(fence) = &mut self.fence else { return };
        if fence.granted.contains(&pass) {
            return;
        }
        let Some(keyd) = &mut self.keyd else { return };
        let mut done = keyd.pass(&pass);
        if done.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::ENFILE)) {
            // Whoever is on the way stays so; the rest is granted again when it is asked for.
            let _full = keyd.pass(&Pass { what: Pass::NOTHING, ..Pass::default() });
            fence.granted.retain(|pass| pass.what == Pass::LISTENER);
            done = keyd.pass(&pass);
        }
        if done.is_ok() {
            fence.granted.insert(pass);
        }
    }

    /// Whether the table holds what a process sends.
    pub(super) fn fenced(&self, pid: i32) -> bool {
        self.fence.is_some() && self.in_cgroup(pid) && same_network(pid)
    }

    /// Puts on record what the table refused.
    pub(super) fn report_stopped(&mut self, stopped: &Stopped) {
        let arrives = stopped.arrives != 0;
        let (source, destination) = (stopped.source.socket_addr(), stopped.destination.socket_addr());
        let (local, remote) = if arrives { (destination, source) } else { (source, destination) };
        let op = match Protocol(stopped.protocol) {
            _ if arrives => "listen",
            Protocol::TCP => "connect",
            _ => "send",
        };
        let refused = self.mode == Mode::Enforce;
        let mut more = Vec::with_capacity(2);
        if stopped.uid != u32::MAX {
            more.push(("by_uid", More::Number(stopped.uid.into())));
        }
        if stopped.missed > 0 {
            more.push(("missed", More::Number(stopped.missed.into())));
        }
        let reason = if arrives {
            "nobody granted this listener"
        } else {
            "nobody granted this destination to a program of this state folder"
        };
        self.log.push(&Line {
            protocol: Some(Protocol(stopped.protocol)),
            local,
            remote,
            verdict: Some(if refused { word(Verdict::Refuse) } else { "would-refuse" }),
            reason: Some(reason),
            generation: Some(self.generation_in_force()),
            more: &more,
            ..Line::bare(stopped.time, op, "backstop")
        });
    }

    /// Whether a process is in a cgroup that a backstop of this state folder holds.
    pub(super) fn in_cgroup(&self, pid: i32) -> bool {
        let name = cgroup_name(&self.state);
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let path = groups.lines().find_map(|l| l.strip_prefix("0::")).unwrap_or_default();
        path.split('/').any(|part| part == name)
    }
}

/// The address that packets have, where a program names the unspecified one: its own, which without bind(2) is loopback's.
fn reached(named: IpAddr, own: Option<IpAddr>) -> IpAddr {
    let own = own.filter(|own| !own.is_unspecified());
    match named.to_canonical() {
        IpAddr::V4(ip) if ip.is_unspecified() => own.unwrap_or(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => own.unwrap_or(Ipv6Addr::LOCALHOST.into()),
        other => other,
    }
}

fn mapped(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unspecified_address_is_where_packets_go() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(reached(ip("0.0.0.0"), None), ip("127.0.0.1"));
        assert_eq!(reached(ip("::"), Some(ip("::"))), ip("::1"));
        assert_eq!(reached(ip("0.0.0.0"), Some(ip("192.0.2.7"))), ip("192.0.2.7"));
        assert_eq!(reached(ip("::ffff:198.51.100.1"), Some(ip("192.0.2.7"))), ip("198.51.100.1"));
        assert_eq!(mapped(ip("192.0.2.1"))[10..], [0xff, 0xff, 192, 0, 2, 1]);
    }
}
