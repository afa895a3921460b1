//! A network of hosts, each a network namespace.

use std::{
    io::Write,
    process::{Command, Stdio},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::host::Host;

/// First part of every namespace's name.
const PREFIX: &str = "pct";

/// Hosts on one link: the first has 10.77.0.1 and fd77::1, the second 10.77.0.2 and fd77::2, and so on.
#[derive(Debug)]
pub struct Net {
    hosts: Vec<Host>,
    namespaces: Vec<String>,
}

impl Net {
    /// A client and a server, both under `policy`, and a stranger without one.
    ///
    /// # Panics
    /// As [`Net::new`].
    #[must_use]
    pub fn client_server_stranger(policy: &str) -> Self {
        let net = Self::new(&["client", "server", "stranger"]);
        let [client, server, _] = net.hosts();
        client.policy(policy);
        server.policy(policy);
        net
    }

    /// Makes namespaces, one per name, joined by a bridge in another. Needs root.
    ///
    /// # Panics
    /// The kernel forbids it.
    #[must_use]
    pub fn new(names: &[&str]) -> Self {
        static SWEPT: Once = Once::new();
        SWEPT.call_once(sweep);
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("{PREFIX}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let space = |name: &str| format!("{id}-{name}");
        let switch = space("switch");
        let mut net = Self { hosts: Vec::new(), namespaces: vec![switch.clone()] };
        let mut first = format!("netns add {switch}\n");
        let mut inner = "link add name sw0 type bridge\nlink set sw0 up\n".to_owned();
        for (n, name) in (1..).zip(names) {
            let host = space(name);
            first += &format!("netns add {host}\n");
            inner += &format!("link add p{n} type veth peer name eth0 netns {host}\n");
            inner += &format!("link set p{n} master sw0 up\n");
            net.namespaces.push(host);
        }
        batch(None, &first);
        batch(Some(&switch), &inner);
        for (n, name) in (1u8..).zip(names) {
            let host = space(name);
            let address = format!("10.77.0.{n}");
            batch(
                Some(&host),
                &format!(
                    "link set lo up\naddr add {address}/24 dev eth0\naddr add fd77::{n}/64 dev eth0 nodad\nlink set eth0 up\n"
                ),
            );
            net.hosts.push(Host::in_namespace(name, &host, address.parse().unwrap()));
        }
        net
    }

    /// The hosts, in the order of their names.
    #[must_use]
    pub fn hosts<const N: usize>(&self) -> [&Host; N] {
        let all: Vec<&Host> = self.hosts.iter().collect();
        all.try_into().expect("as many hosts as names")
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.namespaces.iter().for_each(|name| remove(name));
    }
}

/// Runs `ip` commands, in a namespace.
fn batch(namespace: Option<&str>, commands: &str) {
    let mut ip = Command::new("ip");
    if let Some(name) = namespace {
        ip.args(["-n", name]);
    }
    let mut child = ip.args(["-batch", "-"]).stdin(Stdio::piped()).spawn().expect("iproute2 is installed");
    child.stdin.take().unwrap().write_all(commands.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "ip failed (are you root?):\n{commands}");
}

/// Ends every process in a namespace, and removes it.
fn remove(namespace: &str) {
    // A process may have forked while the list was made.
    for _ in 0..50 {
        let listed = Command::new("ip").args(["netns", "pids", namespace]).output();
        let pids = listed.map(|l| String::from_utf8_lossy(&l.stdout).into_owned()).unwrap_or_default();
        let pids: Vec<i32> = pids.lines().filter_map(|l| l.trim().parse().ok()).collect();
        if pids.is_empty() {
            break;
        }
        for pid in pids {
            let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let _absent = Command::new("ip").args(["netns", "delete", namespace]).stderr(Stdio::null()).status();
}

/// Removes what earlier, killed test runs have left.
fn sweep() {
    let listed = Command::new("ip").args(["netns", "list"]).output().expect("iproute2 is installed");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for name in listed.lines().filter_map(|l| l.split_whitespace().next()) {
        let mut parts = name.split('-');
        if parts.next() == Some(PREFIX)
            && let Some(pid) = parts.next().and_then(|p| p.parse().ok())
            && kill(Pid::from_raw(pid), None).is_err()
        {
            remove(name);
        }
    }
}
