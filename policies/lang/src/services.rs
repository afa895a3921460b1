//! Services: sets of protocols and ports, and the names that IANA and Debian give them.

use std::{collections::HashMap, sync::LazyLock};

use portcullis_types::Protocol;

/// One run of ports of one protocol; `protocol` alone if the protocol has no ports.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Ports {
    pub(crate) protocol: Protocol,
    pub(crate) low: u16,
    pub(crate) high: u16,
}

/// What a rule is for.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Service {
    /// `*`: every protocol and port.
    pub(crate) any: bool,
    /// Sorted, disjoint, not touching; empty with `any`.
    pub(crate) ports: Vec<Ports>,
}

impl Service {
    pub(crate) fn new(any: bool, mut ports: Vec<Ports>) -> Self {
        if any {
            return Self { any, ports: Vec::new() };
        }
        ports.sort_unstable();
        let mut merged: Vec<Ports> = Vec::with_capacity(ports.len());
        for next in ports {
            match merged.last_mut() {
                Some(last) if last.protocol == next.protocol && next.low <= last.high.saturating_add(1) => {
                    last.high = last.high.max(next.high);
                }
                _ => merged.push(next),
            }
        }
        Self { any, ports: merged }
    }

    pub(crate) fn contains(&self, protocol: Protocol, port: u16) -> bool {
        let port = if protocol.has_ports() { port } else { 0 };
        self.any || self.ports.iter().any(|p| p.protocol == protocol && (p.low..=p.high).contains(&port))
    }

    /// Whether there is a flow that both are for.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let meets = |a: &Ports, b: &Ports| a.protocol == b.protocol && a.low <= b.high && b.low <= a.high;
        match (self.any, other.any) {
            (true, true) => true,
            (true, false) => !other.ports.is_empty(),
            (false, true) => !self.ports.is_empty(),
            _ => self.ports.iter().any(|a| other.ports.iter().any(|b| meets(a, b))),
        }
    }

    /// Whether every flow of the other is one of this.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        let within = |b: &Ports| {
            self.ports.iter().any(|a| a.protocol == b.protocol && a.low <= b.low && b.high <= a.high)
        };
        self.any || (!other.any && other.ports.iter().all(within))
    }
}

/// A protocol by its name in the IANA "Protocol Numbers" registry.
pub(crate) fn protocol(name: &str) -> Option<Protocol> {
    Some(match name {
        "tcp" => Protocol::TCP,
        "udp" => Protocol::UDP,
        "sctp" => Protocol::SCTP,
        "udplite" => Protocol::UDPLITE,
        "icmp" => Protocol::ICMP,
        "icmpv6" => Protocol::ICMPV6,
        "raw" => Protocol::RAW,
        "igmp" => Protocol(2),
        "dccp" => Protocol(33),
        "gre" => Protocol(47),
        "esp" => Protocol(50),
        "ah" => Protocol(51),
        "ospf" => Protocol(89),
        "vrrp" => Protocol(112),
        _ => {
            let number = name.strip_prefix("ip-")?;
            return number.parse().ok().map(Protocol);
        }
    })
}

/// A protocol as policy text: the inverse of [`protocol`].
pub(crate) fn protocol_name(protocol: Protocol) -> String {
    match protocol.0 {
        2 => "igmp".to_owned(),
        33 => "dccp".to_owned(),
        47 => "gre".to_owned(),
        50 => "esp".to_owned(),
        51 => "ah".to_owned(),
        89 => "ospf".to_owned(),
        112 => "vrrp".to_owned(),
        _ => protocol.to_string(),
    }
}

static TABLE: LazyLock<HashMap<&'static str, Vec<Ports>>> = LazyLock::new(|| {
    let mut table: HashMap<&str, Vec<Ports>> = HashMap::new();
    for line in include_str!("services.txt").lines().filter(|l| !l.starts_with('#')) {
        let mut words = line.split_whitespace();
        let Some((protocol, port)) = words.next().and_then(|w| w.split_once('/')) else { continue };
        let (Some(protocol), Ok(port)) = (self::protocol(protocol), port.parse()) else { continue };
        for name in words {
            table.entry(name).or_default().push(Ports { protocol, low: port, high: port });
        }
    }
    table
});

/// All other names of the registry, one on each line, sorted: too many to be put in a table when nearly
/// all are never asked for.
const REGISTRY: &str = include_str!("iana.txt");

/// The ports that a service name stands for.
pub(crate) fn iana(name: &str) -> Option<Vec<Ports>> {
    TABLE.get(name).cloned().or_else(|| registered(name))
}

fn registered(name: &str) -> Option<Vec<Ports>> {
    let mut rest = REGISTRY;
    while !rest.is_empty() {
        let (first, second) = rest.split_at_checked(rest.len() / 2)?;
        // The line in which the middle is.
        let start = first.rfind('\n').map_or(0, |n| n + 1);
        let end = second.find('\n').map_or(rest.len(), |n| first.len() + n + 1);
        let (found, ports) = rest.get(start..end)?.trim_end().split_once(' ')?;
        match name.cmp(found) {
            std::cmp::Ordering::Equal => return ports.split(' ').map(range).collect(),
            std::cmp::Ordering::Less => rest = rest.get(..start)?,
            std::cmp::Ordering::Greater => rest = rest.get(end..)?,
        }
    }
    None
}

/// `tcp/25` or `tcp/6000-6063`.
fn range(word: &str) -> Option<Ports> {
    let (protocol, ports) = word.split_once('/')?;
    let (low, high) = ports.split_once('-').unwrap_or((ports, ports));
    Some(Ports { protocol: self::protocol(protocol)?, low: low.parse().ok()?, high: high.parse().ok()? })
}

/// The names that people use.
pub(crate) fn names<'a>() -> impl Iterator<Item = &'a str> {
    TABLE.keys().map(|name| -> &'a str { name })
}

/// The names that hardly anybody uses.
pub(crate) fn rare_names<'a>() -> impl Iterator<Item = &'a str> {
    REGISTRY.lines().filter_map(|line| Some(line.split_once(' ')?.0))
}

/// What people call a service that IANA calls otherwise.
pub(crate) fn common_name(name: &str) -> Option<&'static str> {
    Some(match name {
        "dns" => "domain",
        "syslogd" => "syslog",
        "pop" => "pop3",
        "samba" | "smb" | "cifs" => "microsoft-ds",
        "portmap" => "sunrpc",
        "mail" => "smtp",
        "web" => "http",
        "dhcp" => "bootps",
        _ => return None,
    })
}

/// The first name of each port; names that stand for one port only.
static PORTS: LazyLock<HashMap<(u8, u16), &'static str>> = LazyLock::new(|| {
    let mut ports = HashMap::new();
    for line in include_str!("services.txt").lines().filter(|l| !l.starts_with('#')) {
        let mut words = line.split_whitespace();
        let Some((protocol, port)) = words.next().and_then(|w| w.split_once('/')) else { continue };
        let (Some(protocol), Ok(port)) = (self::protocol(protocol), port.parse::<u16>()) else { continue };
        if let Some(name) = words.next().filter(|n| iana(n).is_some_and(|list| list.len() == 1)) {
            ports.entry((protocol.0, port)).or_insert(name);
        }
    }
    ports
});

/// A port as people name it: `smtp` for tcp/25, else `tcp/8123`.
pub(crate) fn display(protocol: Protocol, port: u16) -> String {
    match PORTS.get(&(protocol.0, port)) {
        Some(name) => (*name).to_owned(),
        None if protocol.has_ports() => format!("{}/{port}", protocol_name(protocol)),
        None => protocol_name(protocol),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_figure_1_are_known() {
        assert_eq!(iana("smtp").unwrap(), [Ports { protocol: Protocol::TCP, low: 25, high: 25 }]);
        assert_eq!(iana("ntp").unwrap(), [Ports { protocol: Protocol::UDP, low: 123, high: 123 }]);
        assert_eq!(iana("domain").unwrap().len(), 2);
    }

    /// Debian's list gives each of these another port too.
    #[test]
    fn a_name_of_ianas_means_no_port_that_iana_does_not_give_it() {
        for (name, protocol, port) in [
            ("syslog", Protocol::UDP, 514),
            ("kerberos-iv", Protocol::UDP, 750),
            ("dicom", Protocol::TCP, 11112),
            ("icpv2", Protocol::UDP, 3130),
        ] {
            assert_eq!(iana(name).unwrap(), [Ports { protocol, low: port, high: port }], "{name}");
        }
        assert!(iana("icp").unwrap().iter().all(|ports| (ports.low, ports.high) == (1112, 1112)));
        assert_eq!(display(Protocol::TCP, 514), "shell");
    }

    #[test]
    fn every_name_of_the_registry_is_found_and_can_be_written() {
        let sorted: Vec<&str> = rare_names().collect();
        assert!(sorted.is_sorted() && sorted.len() > 6000);
        let all: Vec<&str> = sorted.into_iter().chain(names()).collect();
        for name in &all {
            assert!(iana(name).is_some_and(|ports| !ports.is_empty()), "{name}");
        }
        let read = crate::Policy::parse("t.pol", &format!("allow {}(*, *);", all.join(", ")));
        assert!(read.is_ok());
        assert_eq!(iana("ircu").unwrap(), [Ports { protocol: Protocol::TCP, low: 6665, high: 6669 }]);
        for unknown in ["", "!", "zzzzzz", "smtp ", "1", "x1"] {
            assert_eq!(iana(unknown), None);
        }
    }

    #[test]
    fn touching_ranges_become_one() {
        let p = |low, high| Ports { protocol: Protocol::TCP, low, high };
        let service = Service::new(false, vec![p(3, 4), p(1, 2), p(4, 9)]);
        assert_eq!(service.ports, [p(1, 9)]);
        assert!(service.covers(&Service::new(false, vec![p(2, 8)])));
    }

    #[test]
    fn a_protocol_without_ports_ignores_the_port() {
        let icmp = Service::new(false, vec![Ports { protocol: Protocol::ICMP, low: 0, high: u16::MAX }]);
        assert!(icmp.contains(Protocol::ICMP, 0));
        assert!(icmp.contains(Protocol::ICMP, 8));
    }
}
