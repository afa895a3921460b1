//! The table: made and removed by root, filled by whoever may (`CAP_NET_ADMIN`).

use std::{io, net::IpAddr};

use crate::{
    netlink::{APPEND, Batch, CREATE, Netlink, attributes},
    rule::{Base, End, R0, Rule},
};

// enum nf_tables_msg_types
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const DELETE_RULE: u16 = 8;
const NEW_SET: u16 = 9;
const NEW_ELEMENT: u16 = 12;
const DELETE_ELEMENT: u16 = 14;

/// Granted destinations: protocol, port, address (v4 as v4-mapped). Without port and address: whatever is neither
/// TCP nor UDP, and (`RAW`) everything.
const CALLS: &str = "calls";
/// Datagrams that have gone out: as `calls`, and the source port.
const FLOWS: &str = "flows";
/// Granted listeners: their ports.
const LISTENERS: &str = "listeners";
/// The chains of all packets, and where those of held sockets go on.
const HOLDING: [(&str, &str); 2] = [("output", LEAVING), ("input", ARRIVING)];
const LEAVING: &str = "leaving";
pub(crate) const ARRIVING: &str = "arriving";
/// How long a datagram socket may be silent and still be known, in milliseconds.
const SILENCE: u64 = 24 * 3600 * 1000;
/// Most elements of each set.
const MOST: u32 = 1 << 16;

const TCP: u8 = 6;
const UDP: u8 = 17;
const RAW: u8 = 255;
const NFPROTO: u32 = 15;
const L4PROTO: u32 = 16;
/// Flags of a segment: SYN and ACK; the first of a connection has SYN alone.
const SYN_ACK: u8 = 0x12;
const SYN: u8 = 0x02;

/// What may pass.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Pass {
    /// To this port of this address.
    To {
        /// 6 or 17.
        protocol: u8,
        /// Where.
        addr: IpAddr,
        /// Host byte order.
        port: u16,
    },
    /// What is neither TCP nor UDP, wherever it goes.
    Others,
    /// Everything: what leaves by a raw socket cannot be told from the rest.
    Anything,
    /// To the listener at this port of ours.
    Listener(u16),
}

impl Pass {
    fn element(self) -> (&'static str, Vec<u8>) {
        match self {
            Self::To { protocol, addr, port } => {
                let addr = match addr {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => v6,
                };
                let port = port.to_be_bytes().into_iter().chain([0; 2]);
                (CALLS, [protocol, 0, 0, 0].into_iter().chain(port).chain(addr.octets()).collect())
            }
            Self::Others => (CALLS, vec![0; 24]),
            Self::Anything => (CALLS, [&[RAW][..], &[0; 23]].concat()),
            Self::Listener(port) => (LISTENERS, port.to_be_bytes().to_vec()),
        }
    }
}

/// One table, by its name, in the network namespace where this was made.
#[derive(Debug)]
pub struct Table {
    netlink: Netlink,
    name: String,
}

impl Table {
    /// Speaks of the table of this name, which need not be there.
    ///
    /// # Errors
    /// As socket(2).
    pub fn of(name: &str) -> io::Result<Self> {
        Ok(Self { netlink: Netlink::new()?, name: name.to_owned() })
    }

    /// Makes the table, or takes over what an earlier supervisor has left: those whom it held it goes on holding,
    /// while nothing is granted. `enforces`: what is not granted is refused; else only told.
    ///
    /// # Errors
    /// What this kernel lacks.
    pub fn make(&self, enforces: bool) -> io::Result<()> {
        let mut batch = Batch::new();
        batch.add(NEW_TABLE, CREATE, |it| it.text(1, &self.name));
        // As the nft command would show them: inet_proto . inet_service . ipv6_addr (. inet_service).
        let sets = [(CALLS, 0xc348, 24, 0x10), (FLOWS, 0x30_d20d, 28, 0x30), (LISTENERS, 13, 2, 0x10)];
        for (number, (name, kind, length, flags)) in (1..).zip(sets) {
            batch.add(NEW_SET, CREATE, |it| {
                it.text(1, &self.name).text(2, name).word(3, flags).word(4, kind).word(5, length);
                it.nested(9, |size| size.word(1, MOST)).word(10, number);
                if name == FLOWS {
                    it.bytes(11, &SILENCE.to_be_bytes());
                }
                it
            });
        }
        for (name, hook) in [(LEAVING, None), (ARRIVING, None), ("input", Some(1)), ("output", Some(3))] {
            batch.add(NEW_CHAIN, CREATE, |it| {
                it.text(1, &self.name).text(3, name);
                if let Some(hook) = hook {
                    // Before what exchanges addresses (NF_IP_PRI_RAW).
                    it.nested(4, |at| at.word(1, hook).word(2, (-300_i32).cast_unsigned()));
                    it.word(5, 1).text(7, "filter");
                }
                it
            });
        }
        let (from, to) = (self.told(LEAVING), self.told(ARRIVING));
        for (chain, rules) in [(LEAVING, leaving(&from, enforces)), (ARRIVING, arriving(&to, enforces))] {
            batch.add(DELETE_RULE, 0, |it| it.text(1, &self.name).text(2, chain));
            for rule in rules {
                self.append(&mut batch, chain, &rule);
            }
        }
        self.flush(&mut batch);
        self.netlink.commit(batch)
    }

    /// Holds the sockets of a cgroup from now on. `level`: how deep it is in the hierarchy, 1 for a child of its root.
    ///
    /// # Errors
    /// `ENOENT`: the table is not there.
    pub fn hold(&self, cgroup: u64, level: u32) -> io::Result<()> {
        let mut batch = Batch::new();
        self.append_hold(&mut batch, cgroup, level);
        self.netlink.commit(batch)
    }

    /// Holds the sockets of these cgroups, as in [`Self::hold`], and of no others any more.
    ///
    /// # Errors
    /// `ENOENT`: the table is not there.
    pub fn hold_only(&self, cgroups: &[(u64, u32)]) -> io::Result<()> {
        let mut batch = Batch::new();
        for (chain, _) in HOLDING {
            batch.add(DELETE_RULE, 0, |it| it.text(1, &self.name).text(2, chain));
        }
        for (cgroup, level) in cgroups {
            self.append_hold(&mut batch, *cgroup, *level);
        }
        self.netlink.commit(batch)
    }

    /// Lets these pass, until [`Self::forget`] or [`Self::clear`].
    ///
    /// # Errors
    /// `ENFILE`: too many. `ENOENT`: the table is not there.
    pub fn grant(&self, pass: Pass) -> io::Result<()> {
        let mut batch = Batch::new();
        self.element(&mut batch, NEW_ELEMENT, pass);
        self.netlink.commit(batch)
    }

    /// Takes one back.
    ///
    /// # Errors
    /// `ENOENT`: it was not granted.
    pub fn forget(&self, pass: Pass) -> io::Result<()> {
        let mut batch = Batch::new();
        self.element(&mut batch, DELETE_ELEMENT, pass);
        self.netlink.commit(batch)
    }

    /// Takes all calls back: nothing new passes. What runs goes on, and listeners are as they were.
    ///
    /// # Errors
    /// `ENOENT`: the table is not there.
    pub fn clear(&self) -> io::Result<()> {
        let mut batch = Batch::new();
        self.flush(&mut batch);
        self.netlink.commit(batch)
    }

    /// Removes the table.
    ///
    /// # Errors
    /// `ENOENT`: it is not there.
    pub fn remove(&self) -> io::Result<()> {
        let mut batch = Batch::new();
        batch.add(DELETE_TABLE, 0, |it| it.text(1, &self.name));
        self.netlink.commit(batch)
    }

    /// Names of all tables of this family.
    ///
    /// # Errors
    /// As the kernel answers.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        self.netlink.tables(|table| {
            let name = attributes(table).find_map(|(kind, value)| (kind == 1).then_some(value));
            let text = name.and_then(|it| std::str::from_utf8(it).ok());
            names.extend(text.map(|it| it.trim_end_matches('\0').to_owned()));
        })?;
        Ok(names)
    }

    /// Ends a rule in telling [`crate::Refusals`], under the number and the name of this table.
    fn told(&self, chain: &'static str) -> impl Fn(Rule) -> Rule {
        let (group, prefix) = (group(&self.name), format!("{chain} {}", self.name));
        move |rule| rule.logged(group, &prefix)
    }

    fn append_hold(&self, batch: &mut Batch, cgroup: u64, level: u32) {
        for (chain, to) in HOLDING {
            self.append(batch, chain, &Rule::default().of_cgroup(cgroup, level).then(End::Jump(to)));
        }
    }

    fn append(&self, batch: &mut Batch, chain: &str, rule: &Rule) {
        batch.add(NEW_RULE, CREATE | APPEND, |it| {
            it.text(1, &self.name).text(2, chain).nested(4, |all| rule.write(all))
        });
    }

    fn flush(&self, batch: &mut Batch) {
        batch.add(DELETE_ELEMENT, 0, |it| it.text(1, &self.name).text(2, CALLS));
    }

    fn element(&self, batch: &mut Batch, kind: u16, pass: Pass) {
        let (set, key) = pass.element();
        batch.add(kind, CREATE, |it| {
            it.text(1, &self.name)
                .text(2, set)
                .nested(3, |all| all.nested(1, |one| one.nested(1, |value| value.bytes(1, &key))))
        });
    }
}

/// Out of a table's name, so that several have their own as a rule: whoever hears looks at the name too.
pub(crate) fn group(name: &str) -> u16 {
    name.bytes().fold(7919, |sum: u16, byte| sum.wrapping_mul(31).wrapping_add(byte.into())) | 1
}

/// Loads what a packet names as its destination, and then the port of ours, as the sets have them.
fn far(v6: bool) -> Rule {
    named(v6, 2, [16, 24]).piece(Base::Transport, 0, 2, R0 + 6)
}

/// Loads what a packet names as its source, as the sets have it.
fn near(v6: bool) -> Rule {
    named(v6, 0, [12, 8])
}

fn named(v6: bool, port: u32, [in_v4, in_v6]: [u32; 2]) -> Rule {
    let family = Rule::default().meta(NFPROTO, R0).compared(R0, &[if v6 { 10 } else { 2 }], true);
    let rule = family.meta(L4PROTO, R0).piece(Base::Transport, port, 2, R0 + 1);
    if v6 {
        rule.piece(Base::Network, in_v6, 16, R0 + 2)
    } else {
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        rule.constant(&mapped, R0 + 2).piece(Base::Network, in_v4, 4, R0 + 5)
    }
}

fn of_protocol(protocol: u8) -> Rule {
    Rule::default().meta(L4PROTO, R0).compared(R0, &[protocol], true)
}

/// Whether a segment opens a connection (`opens`), or does not.
fn segment(opens: bool) -> Rule {
    of_protocol(TCP).piece(Base::Transport, 13, 1, R0).masked(R0, SYN_ACK).compared(R0, &[SYN], opens)
}

/// What programs send.
fn leaving(told: &impl Fn(Rule) -> Rule, enforces: bool) -> Vec<Rule> {
    // A connection's first segment was judged.
    let mut rules = vec![segment(false).then(End::Accept)];
    for v6 in [false, true] {
        let udp = || far(v6).compared(R0, &[UDP], true);
        rules.push(udp().in_set(FLOWS, R0).remembered(FLOWS, R0).then(End::Accept));
        rules.push(udp().in_set(CALLS, R0).remembered(FLOWS, R0).then(End::Accept));
        // There is no room to remember it: it passes as long as it is granted.
        rules.push(udp().in_set(CALLS, R0).then(End::Accept));
        rules.push(far(v6).compared(R0, &[TCP], true).in_set(CALLS, R0).then(End::Accept));
    }
    let granted = |rule: Rule, first: u8| {
        let key = rule.constant(&[first, 0, 0, 0], R0).constant(&[0; 16], R0 + 1).constant(&[0; 4], R0 + 5);
        key.in_set(CALLS, R0).then(End::Accept)
    };
    let other = Rule::default().meta(L4PROTO, R0).compared(R0, &[TCP], false).compared(R0, &[UDP], false);
    rules.extend([granted(other, 0), granted(Rule::default(), RAW)]);
    if enforces {
        rules.push(told(of_protocol(TCP)).rejected(true));
        rules.push(told(Rule::default()).rejected(false));
    } else {
        rules.push(told(Rule::default()).then(End::Accept));
    }
    rules
}

/// Who comes to programs: only listeners are looked at, and who meets a program half way (lane tls opens simultaneously).
fn arriving(told: &impl Fn(Rule) -> Rule, enforces: bool) -> Vec<Rule> {
    let granted = segment(true).piece(Base::Transport, 2, 2, R0).in_set(LISTENERS, R0).then(End::Accept);
    let half_way = |v6| segment(true).and(near(v6)).in_set(CALLS, R0).then(End::Accept);
    let other = told(segment(true));
    vec![granted, half_way(false), half_way(true), other.then(if enforces { End::Drop } else { End::Accept })]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Attributes;

    #[test]
    fn an_element_is_what_the_rules_load() {
        let to = |text: &str| Pass::To { protocol: TCP, addr: text.parse().unwrap(), port: 443 };
        let mapped = [6, 0, 0, 0, 1, 0xbb, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1];
        assert_eq!(to("192.0.2.1").element(), (CALLS, mapped.to_vec()));
        assert_eq!(to("::ffff:192.0.2.1").element().1, mapped);
        assert_eq!(to("2001:db8::1").element().1.len(), Pass::Others.element().1.len());
        assert_eq!(Pass::Listener(21).element(), (LISTENERS, vec![0, 21]));
    }

    #[test]
    fn attributes_are_read_as_they_are_written() {
        let mut all = Attributes::default();
        all.text(1, "abc").word(2, 7).nested(3, |it| it.bytes(1, &[9]));
        let read: Vec<_> = attributes(&all.0).collect();
        assert_eq!(read[..2], [(1, &b"abc\0"[..]), (2, &[0, 0, 0, 7])]);
        assert_eq!(attributes(read[2].1).collect::<Vec<_>>(), [(1, &[9][..])]);
        assert_eq!(attributes(&[200, 0, 1, 0]).count(), 0, "cut off");
        assert_eq!(attributes(&[0, 0, 1, 0]).count(), 0, "shorter than itself");
    }
}
