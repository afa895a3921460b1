//! What a decision costs, and how little of that is due to the number of rules.
//!
//! Policies of four sizes, made the way large ones grow (services × groups × prefixes, some rules for
//! executables, some denials), take turns on the same flows in short batches. Beside them, in the same
//! run, libwrap's `hosts_ctl` (tcpd's rules, where Debian's libwrap0 is installed) on as many lines, Cedar and Rego
//! (`benches/peers`) on as many policies, and a bare hash table as the floor. Then: reading, checking and compiling a
//! policy, in time of this process on a processor, and what it takes of memory.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::HashMap,
    fmt::Write as _,
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Instant,
};

use portcullis_benches::{libwrap::Libwrap, median, row};
use portcullis_policy::{
    CertificateFact, CertificateFacts, Fact, Flow, Party, Policy, ProcessFact, ProcessFacts, Side,
};
use portcullis_types::{Protocol, Verdict};

/// Counts what is allocated.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[expect(unsafe_code, reason = "an allocator is an unsafe trait; this one only counts")]
// SAFETY: every call goes on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Relaxed);
        let held = HELD.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(held, Relaxed);
        // SAFETY: `layout` is the caller's, for which it vouches to us as it would to the system.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `pointer` came from `alloc` above, so from the system, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A stream of random numbers (xorshift64*, Vigna 2016).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let n = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(n).unwrap_or(0) % sides.max(1)
    }
}

const SERVICES: [&str; 24] = [
    "smtp",
    "http",
    "https",
    "ssh",
    "domain",
    "imaps",
    "ldap",
    "ldaps",
    "ntp",
    "postgresql",
    "mysql",
    "redis",
    "amqp",
    "nfs",
    "rsync",
    "snmp",
    "syslog",
    "kerberos",
    "tcp/8000-8099",
    "tcp/9000-9100",
    "tcp/2000-4000",
    "tcp",
    "submission",
    "sip",
];
const PORTS: [u16; 24] = [
    25, 80, 443, 22, 53, 993, 389, 636, 123, 5432, 3306, 6379, 5672, 2049, 873, 161, 514, 88, 8080, 9090,
    3000, 7777, 587, 5060,
];

/// How many of each thing a policy of so many rules is about.
struct World {
    rules: usize,
    groups: usize,
    zones: usize,
    prefixes: usize,
    daemons: usize,
}

/// What one rule, or one flow, is about.
#[derive(Clone, Copy)]
struct Picked {
    group: usize,
    zone: usize,
    daemon: usize,
    prefix: usize,
    service: usize,
}

impl World {
    fn new(rules: usize) -> Self {
        let root = rules.isqrt();
        Self { rules, groups: root * 2, zones: root / 2 + 2, prefixes: root * 8, daemons: root }
    }

    fn prefix(&self, n: usize) -> (Ipv4Addr, u8) {
        let n = u32::try_from(n % self.prefixes).unwrap_or(0);
        match n % 8 {
            0 => (Ipv4Addr::from(0x0a00_0000 | ((n % 256) << 16)), 16),
            1..=5 => (Ipv4Addr::from(0x0a00_0000 | ((n % 0xffff) << 8)), 24),
            _ => (Ipv4Addr::from(0x0a00_0000 | (n.wrapping_mul(7919) % 0xff_ffff)), 32),
        }
    }

    fn pick(&self, dice: &mut Dice) -> Picked {
        Picked {
            group: dice.roll(self.groups),
            zone: dice.roll(self.zones),
            daemon: dice.roll(self.daemons),
            prefix: dice.roll(self.prefixes),
            service: dice.roll(SERVICES.len()),
        }
    }

    fn rule(&self, dice: &mut Dice, picked: &Picked) -> String {
        let Picked { group, zone, daemon, prefix, service } = *picked;
        let service = SERVICES.get(service).copied().unwrap_or("*");
        let (address, length) = self.prefix(prefix);
        let ver = 20_200_101 + dice.roll(5) * 10_000;
        match dice.roll(20) {
            0..=8 => format!(
                "allow {service}(x509{{name=\"*.z{zone}.example.com\", group=\"g{group}\"}}, IPv4{{{address}/{length}}});"
            ),
            9..=11 => format!(
                "allow {service}(x509{{name=\"h{group}.z{zone}.example.com\", ver>{ver}}}, IPv4{{{address}/{length}}});"
            ),
            12..=15 => format!(
                "allow {service}(process{{exe=\"/usr/sbin/d{daemon}\", user=\"u{group}\"}}, IPv4{{{address}/{length}}});"
            ),
            16 | 17 => format!(
                "allow {service}(x509{{group=\"g{group}\"}} & process{{exe=\"/opt/z{zone}/**\"}}, x509{{name=\"*.z{zone}.example.com\"}});"
            ),
            18 => format!("deny {service}(process{{exe=\"/tmp/**\"}}, IPv4{{{address}/{length}}});"),
            _ => format!("deny {service}(x509{{group=\"g{group}\", ver<20200101}}, *);"),
        }
    }

    fn policy(&self) -> (String, Vec<Picked>) {
        let mut dice = Dice(0x5eed ^ self.rules as u64);
        let mut text = String::from("deny *(process{exe=\"/tmp/**\"}, *);\n");
        let mut all = Vec::new();
        for _ in 1..self.rules {
            let picked = self.pick(&mut dice);
            let _infallible = writeln!(text, "{}", self.rule(&mut dice, &picked));
            all.push(picked);
        }
        (text, all)
    }
}

/// The facts of one flow.
struct Facts {
    process: ProcessFacts,
    own: CertificateFacts,
    theirs: Option<CertificateFacts>,
    from: IpAddr,
    to: IpAddr,
    port: u16,
}

impl World {
    /// Facts that some rule is about, three times in four; else any.
    fn facts(&self, dice: &mut Dice, rules: &[Picked]) -> Facts {
        let any = self.pick(dice);
        let Picked { group, zone, daemon, prefix, service } = match rules.get(dice.roll(rules.len())) {
            Some(picked) if dice.roll(4) > 0 => *picked,
            _ => any,
        };
        let exe = match dice.roll(20) {
            0 => format!("/tmp/build{daemon}"),
            1..=8 => format!("/opt/z{zone}/bin/tool{daemon}"),
            _ => format!("/usr/sbin/d{daemon}"),
        };
        let certificate = |dice: &mut Dice| CertificateFacts {
            names: vec![format!("h{group}.z{zone}.example.com")],
            ver: Some(20_240_101),
            groups: vec![format!("g{group}"), format!("g{}", dice.roll(self.groups)), "staff".to_owned()],
            org: Some("Example".to_owned()),
            ..CertificateFacts::default()
        };
        let (prefix, length) = self.prefix(prefix);
        let host = u32::try_from(dice.roll(1 << (32 - u32::from(length)))).unwrap_or(0);
        let theirs = (dice.roll(2) == 0).then(|| certificate(dice));
        Facts {
            process: ProcessFacts {
                exe: Fact::Known(exe),
                sha256: Fact::Known([7; 32]),
                uid: 1000,
                user: format!("u{group}"),
                groups: vec!["daemon".to_owned(), "ssl-cert".to_owned()],
                unit: Some(format!("d{daemon}.service")),
                cmdline: format!("d{daemon} --foreground"),
                ancestors: vec![Fact::Known("/usr/lib/systemd/systemd".to_owned())],
            },
            own: certificate(dice),
            theirs,
            from: IpAddr::V4(Ipv4Addr::from(0x0a01_0203)),
            to: IpAddr::V4(Ipv4Addr::from(u32::from(prefix) | host)),
            port: PORTS.get(service).copied().unwrap_or(0),
        }
    }
}

/// Reads all there is of a flow's facts.
fn touch(facts: &Facts) {
    let sum = |text: &String| text.bytes().map(usize::from).sum::<usize>();
    let certificate = |c: &CertificateFacts| {
        c.names.iter().map(sum).sum::<usize>()
            + c.groups.iter().map(sum).sum::<usize>()
            + c.org.as_ref().map_or(0, sum)
    };
    let exe = if let Fact::Known(exe) = &facts.process.exe { sum(exe) } else { 0 };
    black_box(
        exe + sum(&facts.process.user)
            + certificate(&facts.own)
            + facts.theirs.as_ref().map_or(0, certificate),
    );
}

/// A number below [`FLOWS`], the small ones more often: its logarithm is spread evenly.
fn zipf(dice: &mut Dice) -> usize {
    let even = dice.roll(1 << 24) as f64 / f64::from(1 << 24);
    let number = (even * (FLOWS as f64 + 1.0).ln()).exp() - 1.0;
    (0..FLOWS).take_while(|n| *n as f64 + 1.0 <= number).count().min(FLOWS - 1)
}

/// Flows in one batch; a batch is timed as a whole.
const BATCH: usize = 16;
const FLOWS: usize = 4096;

fn parties(facts: &Facts) -> (Party<'_>, Party<'_>) {
    let from = Party {
        addr: Some(facts.from),
        process: ProcessFact::Known(&facts.process),
        certificate: CertificateFact::Shown(&facts.own),
    };
    let to = Party {
        addr: Some(facts.to),
        process: ProcessFact::Unknown,
        certificate: facts.theirs.as_ref().map_or(CertificateFact::None, CertificateFact::Shown),
    };
    (from, to)
}

fn decide(policy: &Policy, from: &Party<'_>, to: &Party<'_>, port: u16) -> Verdict {
    let flow = Flow { from, to, protocol: Protocol::TCP, port, now: 1_790_000_000, far: Side::To };
    policy.evaluate(&flow).verdict
}

struct Subject {
    rules: usize,
    policy: Policy,
    facts: Vec<Facts>,
    load_ms: f64,
    peak: usize,
    held: usize,
    /// Nanoseconds per decision, by batch: of flows whose like were decided just before, and of flows
    /// met after everything else on the machine had its turn.
    warm: Vec<f64>,
    cold: Vec<f64>,
}

impl Subject {
    fn new(rules: usize) -> Option<Self> {
        let world = World::new(rules);
        let (text, picked) = world.policy();
        let before = HELD.load(Relaxed);
        PEAK.store(before, Relaxed);
        let begun = worked();
        let loaded = Policy::parse("bench.pol", &text);
        let load_ms = (worked() - begun) * 1e3;
        let policy = loaded.ok()?.policy;
        let (peak, held) = (PEAK.load(Relaxed) - before, HELD.load(Relaxed) - before);
        let mut dice = Dice(0xf10e5);
        let facts = (0..FLOWS).map(|_| world.facts(&mut dice, &picked)).collect();
        Some(Self { rules, policy, facts, load_ms, peak, held, warm: Vec::new(), cold: Vec::new() })
    }

    /// One batch, twice.
    fn turn(&mut self, dice: &mut Dice) {
        // As traffic is (Zipf's law): the n-th most frequent flow comes 1/n as often as the first.
        let usual: Vec<usize> = (0..BATCH).map(|_| zipf(dice)).collect();
        let ns = self.batch(&usual);
        self.cold.push(ns);
        let ns = self.batch(&usual);
        self.warm.push(ns);
    }

    fn batch(&self, numbers: &[usize]) -> f64 {
        let batch: Vec<&Facts> = numbers.iter().filter_map(|n| self.facts.get(*n)).collect();
        let parties: Vec<_> = batch.iter().map(|f| (parties(f), f.port)).collect();
        // The broker has only just gathered what it asks about, so that is in the cache; the policy,
        // with all the others taking turns, is not.
        batch.iter().for_each(|f| touch(f));
        let begun = Instant::now();
        for ((from, to), port) in &parties {
            black_box(decide(&self.policy, from, to, *port));
        }
        begun.elapsed().as_secs_f64() * 1e9 / BATCH as f64
    }

    /// How many of the flows are permitted, and whether deciding them allocates.
    fn census(&self) -> (usize, usize) {
        let before = CALLS.load(Relaxed);
        let permitted = self.facts.iter().filter(|f| {
            let (from, to) = parties(f);
            decide(&self.policy, &from, &to, f.port) != Verdict::Refuse
        });
        let permitted = permitted.count();
        (permitted, CALLS.load(Relaxed) - before)
    }
}

/// Seconds that this process has had of a processor: what else runs on the machine does not count.
fn worked() -> f64 {
    let time = nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID.now();
    time.map_or(0.0, |time| std::time::Duration::from(time).as_secs_f64())
}

/// What other engines take, as lines: from the program that `cargo xtask bench policy` has built.
fn peers() -> Option<String> {
    let output = Command::new(std::env::var_os("PORTCULLIS_PEERS")?).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Microseconds for one decision of libwrap's at the end of a file of so many lines.
fn libwrap_takes(libwrap: &Libwrap, lines: usize) -> Option<f64> {
    libwrap.load(lines, "").ok()?;
    let mut turns = Vec::new();
    for _ in 0..200 {
        let begun = Instant::now();
        black_box(libwrap.permits(c"none", c"192.0.2.1"));
        turns.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    Some(median(turns))
}

/// Compares two policies of which every `share`th rule differs.
fn compare(rules: usize, share: usize) {
    let world = World::new(rules);
    let (old, _) = world.policy();
    let mut dice = Dice(99);
    let mut new = String::new();
    for (n, line) in old.lines().enumerate() {
        let picked = world.pick(&mut dice);
        let line = if n % share == 0 { world.rule(&mut dice, &picked) } else { line.to_owned() };
        let _infallible = writeln!(new, "{line}");
    }
    let parse = |text: &str| Policy::parse("bench.pol", text).ok().map(|l| l.policy);
    let (Some(old), Some(new)) = (parse(&old), parse(&new)) else { return };
    let begun = worked();
    let diff = portcullis_policy::diff(&old, &new, 0);
    let seconds = worked() - begun;
    let changed = rules / share;
    let (regions, exact) = (diff.changes.len(), diff.exact);
    row(&format!(
        "diff of two policies of {rules} rules, {changed} changed: {seconds:.2} s, {regions} regions, exact: {exact}"
    ));
    diff.limits.iter().for_each(|limit| row(&format!("    {limit}")));
}

/// Says what was wanted, and whether it holds.
fn judge(subjects: &[Subject]) {
    let find = |rules| subjects.iter().find(|s| s.rules == rules);
    let (Some(small), Some(medium), Some(large)) = (find(100), find(1_000), find(100_000)) else { return };
    let ns = |subject: &Subject| median(subject.warm.clone());
    let say = |what: &str, value: f64, most: f64| {
        let word = if value <= most { "good" } else { "NOT REACHED" };
        row(&format!("{what:<48} {value:>8.2} (at most {most}): {word}"));
    };
    say("a decision at 100 rules, ns", ns(small), 150.0);
    say("a decision at 100,000 rules, by that", ns(large) / ns(small), 1.3);
    say("a decision at 100,000 rules, by 150 ns", ns(large) / 150.0, 1.3);
    say("reading and checking 1,000 rules, ms", medium.load_ms, 30.0);
    say("reading, checking, compiling 100,000 rules, ms", large.load_ms, 1_000.0);
    say("memory for that, MB", large.peak as f64 / 1e6, 200.0);
}

fn main() {
    let only = std::env::args().nth(1).and_then(|n| n.parse().ok());
    let sizes = only.map_or_else(|| vec![100, 1_000, 10_000, 100_000], |n| vec![n]);
    let mut subjects: Vec<Subject> = sizes.into_iter().filter_map(Subject::new).collect();
    let floor: HashMap<String, u32> =
        (0..1000).map(|n| (format!("h{n}.z{}.example.com", n % 32), n)).collect();
    let keys: Vec<String> = (0..BATCH).map(|n| format!("h{n}.z{}.example.com", n % 32)).collect();
    let mut hashed = Vec::new();
    let mut dice = Dice(7);
    for _ in 0..6000 {
        for subject in &mut subjects {
            subject.turn(&mut dice);
        }
        let begun = Instant::now();
        for key in &keys {
            black_box(floor.get(key));
        }
        hashed.push(begun.elapsed().as_secs_f64() * 1e9 / BATCH as f64);
    }
    row(
        "rules     ns/decision   vs 100      cold ns   vs 100   permitted   allocations      load ms   peak MB   held MB",
    );
    let mut base = (0.0, 0.0);
    for subject in &subjects {
        let (ns, cold) = (median(subject.warm.clone()), median(subject.cold.clone()));
        if base.0 == 0.0 {
            base = (ns, cold);
        }
        let (permitted, calls) = subject.census();
        let mb = |bytes: usize| bytes as f64 / 1e6;
        row(&format!(
            "{:<9} {ns:>11.1} {:>8.2} {cold:>12.1} {:>8.2} {:>10.1}% {calls:>13} {:>12.1} {:>9.1} {:>9.1}",
            subject.rules,
            ns / base.0,
            cold / base.1,
            permitted as f64 * 100.0 / FLOWS as f64,
            subject.load_ms,
            mb(subject.peak),
            mb(subject.held),
        ));
    }
    judge(&subjects);
    row(&format!("bare hash of a name: {:.1} ns", median(hashed)));
    match Libwrap::new() {
        Some(libwrap) => {
            for lines in [100, 1_000, 10_000] {
                let took = libwrap_takes(&libwrap, lines)
                    .map_or_else(|| "failed".to_owned(), |us| format!("{us:.1} µs"));
                row(&format!("libwrap hosts_ctl, {lines} lines: {took}"));
            }
        }
        None => row("libwrap: not installed (libwrap0)"),
    }
    row(peers().as_deref().map_or("cedar, rego: `cargo xtask bench policy` builds them", str::trim_end));
    for share in [100, 1] {
        compare(10_000, share);
    }
}
