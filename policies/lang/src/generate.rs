//! Random policies and flows over a small world, so that they meet. For tests.

use std::net::IpAddr;

use portcullis_types::Protocol;

use crate::facts::{CertificateFact, CertificateFacts, Fact, Flow, Party, ProcessFact, ProcessFacts, Side};

/// A stream of random numbers (xorshift64*, Vigna 2016) that its seed fixes.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let n = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(n).unwrap() % sides
    }

    pub(crate) fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len())]
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.roll(100) < percent
    }
}

/// The seed of this run: `PORTCULLIS_SEED`, else another one each time. Printed, to be given back.
pub(crate) fn seed(what: &str) -> u64 {
    use std::io::Write as _;
    let given = std::env::var("PORTCULLIS_SEED").ok().and_then(|s| s.parse().ok());
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = given.unwrap_or(clock.as_secs() << 20 ^ u64::from(clock.subsec_nanos()));
    writeln!(std::io::stderr(), "{what}: PORTCULLIS_SEED={seed}").unwrap();
    seed
}

const NAMES: [&str; 9] = [
    "a.example.com",
    "b.example.com",
    "A.Example.COM",
    "x.sub.example.com",
    "example.com",
    "evil.org",
    "mail1.example.com.",
    "org",
    "",
];
const NAME_PATTERNS: [&str; 12] = [
    "a.example.com",
    "b.example.com",
    "*.example.com",
    "**.example.com",
    "*",
    "**.org",
    "a*",
    "mail*.example.com",
    "*.sub.*.com",
    "Example.com",
    "evil.org.",
    "**",
];
const TEXTS: [&str; 5] = ["ops", "dev", "root", "1000", "nginx.service"];
const TEXT_PATTERNS: [&str; 7] = ["ops", "dev", "root", "1000", "*", "o*s", "*.service"];
const PATHS: [&str; 7] =
    ["/usr/bin/curl", "/usr/bin/lftp", "/usr/sbin/vsftpd", "/tmp/x", "/tmp/a/b", "/curl", ""];
const PATH_PATTERNS: [&str; 9] = [
    "/usr/bin/curl",
    "/usr/bin/*",
    "/usr/**",
    "/tmp/**",
    "/tmp/*",
    "**/curl",
    "*",
    "/usr/*bin/*",
    "/usr/sbin/vsftpd",
];
const V4: [&str; 8] =
    ["10.0.0.1", "10.0.0.2", "10.0.1.1", "10.1.0.0", "127.0.0.1", "192.0.2.7", "0.0.0.0", "255.255.255.255"];
const V6: [&str; 6] = ["2001:db8::1", "2001:db8:1::1", "::1", "::ffff:10.0.0.1", "fe80::1", "::"];
const V4_SETS: [&str; 9] = [
    "10.0.0.0/8",
    "10.0.0.0/24",
    "10.0.0.1",
    "0.0.0.0/0",
    "10.0.0.1, 192.0.2.0/24",
    "10.0.0.1-10.0.1.1",
    "127.0.0.0/8",
    "",
    "255.255.255.255, 0.0.0.0",
];
const V6_SETS: [&str; 5] = ["2001:db8::/32", "2001:db8::1", "::/0", "::1", "fe80::/10, 2001:db8:1::/48"];
const SERVICES: [&str; 12] = [
    "smtp",
    "tcp/20-30",
    "*",
    "tcp",
    "udp/53",
    "domain",
    "ftp",
    "tcp/80, udp",
    "icmp",
    "tcp/65535",
    "tcp/0",
    "http | smtp",
];
const PORTS: [u16; 9] = [0, 19, 20, 21, 25, 30, 53, 80, 65535];
/// Ends of the days that rules expire on, and the seconds beside them.
const TIMES: [u64; 4] = [0, 1_801_439_999, 1_801_440_000, u64::MAX];

pub(crate) fn principal(dice: &mut Dice, depth: usize) -> String {
    match dice.roll(if depth == 0 { 6 } else { 10 }) {
        0 => "*".to_owned(),
        1 | 2 => certificate(dice),
        3 => process(dice),
        4 => format!("IPv4{{{}}}", dice.one(&V4_SETS)),
        5 => format!("IPv6{{{}}}", dice.one(&V6_SETS)),
        6 => format!("!({})", principal(dice, depth - 1)),
        7 => format!("({} | {})", principal(dice, depth - 1), principal(dice, depth - 1)),
        _ => format!("({} & {})", principal(dice, depth - 1), principal(dice, depth - 1)),
    }
}

fn certificate(dice: &mut Dice) -> String {
    let mut list = Vec::new();
    for _ in 0..=dice.roll(2) {
        let op = if dice.chance(20) { "!=" } else { "=" };
        list.push(match dice.roll(6) {
            0..=2 => format!("name{op}\"{}\"", dice.one(&NAME_PATTERNS)),
            3 => format!("ver{}{}", dice.one(&["=", "!=", "<", "<=", ">", ">="]), dice.roll(4)),
            4 => format!("group{op}\"{}\"", dice.one(&TEXT_PATTERNS)),
            _ => format!(
                "{}{op}\"{}\"",
                dice.one(&["org", "process", "unit", "user", "issuer"]),
                dice.one(&TEXT_PATTERNS)
            ),
        });
    }
    format!("x509{{{}}}", list.join(", "))
}

fn process(dice: &mut Dice) -> String {
    let mut list = Vec::new();
    for _ in 0..=dice.roll(2) {
        let op = if dice.chance(20) { "!=" } else { "=" };
        list.push(match dice.roll(6) {
            0..=2 => format!("exe{op}\"{}\"", dice.one(&PATH_PATTERNS)),
            3 => format!("sha256{op}\"{}\"", dice.one(&["0", "1"]).repeat(64)),
            4 => format!("ancestor{op}\"{}\"", dice.one(&PATH_PATTERNS)),
            _ => format!(
                "{}{op}\"{}\"",
                dice.one(&["user", "group", "unit", "cmdline"]),
                dice.one(&TEXT_PATTERNS)
            ),
        });
    }
    format!("process{{{}}}", list.join(", "))
}

pub(crate) fn rule(dice: &mut Dice) -> String {
    let deny = dice.chance(30);
    let mut options = String::new();
    if !deny && dice.chance(25) {
        options += dice.one(&[" using plain", " using tls", " using ktls", " using ipsec", " with related"]);
    }
    if dice.chance(12) {
        options += " expires 2027-01-31";
    }
    if dice.chance(12) {
        options += " audit";
    }
    let effect = if deny { "deny" } else { "allow" };
    let (service, from, to) = (dice.one(&SERVICES), principal(dice, 2), principal(dice, 2));
    format!("{effect} {service}({from}, {to}){options};\n")
}

pub(crate) fn policy(dice: &mut Dice) -> String {
    (0..dice.roll(14)).map(|_| rule(dice)).collect()
}

/// The facts that a flow refers to.
pub(crate) struct World {
    certificates: [CertificateFacts; 2],
    processes: [ProcessFacts; 2],
    addresses: [Option<IpAddr>; 2],
    kinds: [(usize, usize); 2],
}

fn text(dice: &mut Dice) -> Option<String> {
    dice.chance(50).then(|| dice.one(&TEXTS).to_owned())
}

fn path(dice: &mut Dice) -> Fact<String> {
    if dice.chance(15) { Fact::Unknown } else { Fact::Known(dice.one(&PATHS).to_owned()) }
}

fn facts(dice: &mut Dice) -> CertificateFacts {
    CertificateFacts {
        names: (0..dice.roll(3)).map(|_| dice.one(&NAMES).to_owned()).collect(),
        process: text(dice),
        ver: dice.chance(80).then(|| u64::try_from(dice.roll(4)).unwrap()),
        groups: (0..dice.roll(3)).map(|_| dice.one(&TEXTS).to_owned()).collect(),
        org: text(dice),
        unit: text(dice),
        user: text(dice),
        issuer: text(dice),
        exe: dice.chance(50).then(|| dice.one(&PATHS).to_owned()),
        sha256: dice.chance(50).then(|| [dice.one(&[0x00, 0x11]); 32]),
    }
}

fn process_facts(dice: &mut Dice) -> ProcessFacts {
    ProcessFacts {
        exe: path(dice),
        sha256: if dice.chance(20) { Fact::Unknown } else { Fact::Known([dice.one(&[0x00, 0x11]); 32]) },
        uid: dice.one(&[0, 1000, 1001]),
        user: dice.one(&["root", "1000", "dev", ""]).to_owned(),
        groups: (0..dice.roll(3)).map(|_| dice.one(&TEXTS).to_owned()).collect(),
        unit: text(dice),
        cmdline: dice.one(&TEXTS).to_owned(),
        ancestors: (0..dice.roll(3)).map(|_| path(dice)).collect(),
    }
}

impl World {
    pub(crate) fn new(dice: &mut Dice) -> Self {
        let mut address = || match dice.roll(8) {
            0 => None,
            1 | 2 => Some(dice.one(&V6).parse().unwrap()),
            _ => Some(dice.one(&V4).parse().unwrap()),
        };
        let addresses = [address(), address()];
        Self {
            certificates: [facts(dice), facts(dice)],
            processes: [process_facts(dice), process_facts(dice)],
            addresses,
            kinds: [(dice.roll(6), dice.roll(5)), (dice.roll(6), dice.roll(5))],
        }
    }

    pub(crate) fn certificate(&self, side: usize) -> &CertificateFacts {
        &self.certificates[side]
    }

    pub(crate) fn party(&self, side: usize) -> Party<'_> {
        let (process, certificate) = self.kinds[side];
        Party {
            addr: self.addresses[side],
            process: match process {
                0..=2 => ProcessFact::Known(&self.processes[side]),
                3 => {
                    ProcessFact::UserOnly { uid: self.processes[side].uid, user: &self.processes[side].user }
                }
                _ => ProcessFact::Unknown,
            },
            certificate: match certificate {
                0 => CertificateFact::None,
                1 | 2 => CertificateFact::Pending,
                _ => CertificateFact::Shown(&self.certificates[side]),
            },
        }
    }
}

pub(crate) fn flow<'a>(dice: &mut Dice, from: &'a Party<'a>, to: &'a Party<'a>) -> Flow<'a> {
    Flow {
        from,
        to,
        protocol: dice.one(&[Protocol::TCP, Protocol::TCP, Protocol::UDP, Protocol::ICMP, Protocol::RAW]),
        port: dice.one(&PORTS),
        now: dice.one(&TIMES),
        far: dice.one(&[Side::From, Side::To]),
    }
}

/// An address of the world, or one beside it.
pub(crate) fn address(dice: &mut Dice) -> IpAddr {
    if dice.chance(30) { dice.one(&V6).parse().unwrap() } else { dice.one(&V4).parse().unwrap() }
}

/// A party of which everything is known.
pub(crate) fn example(dice: &mut Dice) -> crate::check::Example {
    let mut process = process_facts(dice);
    let known = |fact: &mut Fact<String>| {
        if *fact == Fact::Unknown {
            *fact = Fact::Known("/usr/bin/curl".to_owned());
        }
    };
    known(&mut process.exe);
    process.ancestors.iter_mut().for_each(known);
    if process.sha256 == Fact::Unknown {
        process.sha256 = Fact::Known([0x11; 32]);
    }
    let address = match address(dice) {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4),
        v4 @ IpAddr::V4(_) => v4,
    };
    crate::check::Example {
        address: Some(address),
        certificate: dice.chance(70).then(|| facts(dice)),
        process,
        has_process: dice.chance(70),
    }
}

/// Everybody in a world so small that all its flows can be looked at.
pub(crate) fn everybody() -> Vec<crate::check::Example> {
    let named = |name: &str, group: &str, ver| CertificateFacts {
        names: vec![name.to_owned()],
        groups: vec![group.to_owned()],
        ver: Some(ver),
        ..CertificateFacts::default()
    };
    let certificates =
        [None, Some(named("a.example.com", "ops", 1)), Some(named("x.sub.example.com", "dev", 3))];
    let addresses = ["10.0.0.1", "192.0.2.7", "2001:db8::1"];
    let mut all = Vec::new();
    for certificate in &certificates {
        for address in addresses {
            for exe in [None, Some("/usr/bin/curl"), Some("/tmp/a/b")] {
                let mut one = crate::check::Example { address: address.parse().ok(), ..Default::default() };
                one.certificate.clone_from(certificate);
                one.has_process = exe.is_some();
                one.process.exe = Fact::Known(exe.unwrap_or_default().to_owned());
                all.push(one);
            }
        }
    }
    all
}

/// Protocols and ports of that world.
pub(crate) const SERVED: [(Protocol, u16); 3] =
    [(Protocol::TCP, 25), (Protocol::UDP, 53), (Protocol::ICMP, 0)];

pub(crate) fn port(dice: &mut Dice) -> (Protocol, u16) {
    let protocol = dice.one(&[Protocol::TCP, Protocol::TCP, Protocol::UDP, Protocol::ICMP, Protocol::RAW]);
    (protocol, if protocol.has_ports() { dice.one(&PORTS) } else { 0 })
}
