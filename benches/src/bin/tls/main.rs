//! Lane tls beside nginx, HAProxy and stunnel in the same role: same certificates, same client and server, same link
//! between two network namespaces, same run, interleaved.
//!
//! `portcullis` is all of it: client and server run unchanged under `portcullis run`, with shim, guard, a policy of a
//! thousand rules, a verdict for each call, its record, and process certificates. `relay` is a pair of its relay engine
//! alone, in the role of the others.
//!
//! `tls [stream|connections|related|pingpong|idle|busy]...`, all by default. `TLS_ROUNDS` sets how often each is measured
//! (5, as far as there is time: [`BUDGET`]; `busy` once), `TLS_ONLY` names the systems, as `portcullis,nginx`. `cpu` is what a system's own processes use, `cpu with ends`
//! that and client and server, the shim in them included. `control` is a new association of a service with related
//! connections, for which both ends make a certificate of its own; `related` is a data connection of one. `idle` is
//! anonymous memory of both sides, brokers and supervisors included; `idle keyd` of key daemons alone.

mod certificates;
mod load;
mod process;
mod relay;
mod systems;

use std::{
    collections::BTreeMap,
    error::Error,
    io::{self, Write},
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use load::Server;
use portcullis_benches::{
    median,
    net::{Far, records},
};
use systems::{PORTCULLIS, RELAY_RELATED, Running, SYSTEMS};

pub(crate) type Outcome<T> = Result<T, Box<dyn Error>>;

/// Connections that are busy at once, beside those that are idle, in `busy`.
const BUSY: usize = 1000;
const IDLE: usize = 10_000;
/// No round begins that would end later, if it took as long as the longest before it. What is left is for `busy`.
const BUDGET: Duration = Duration::from_secs(180);

const RELAY: &str = "relay";
const NGINX: &str = "nginx";
const PEERS: [&str; 3] = [NGINX, "haproxy", "stunnel"];

/// Numbers per measure and system, one of each round.
#[derive(Default)]
struct Table(BTreeMap<(&'static str, &'static str), Vec<f64>>);

/// What is measured, and its unit.
const MEASURES: [(&str, &str); 20] = [
    ("stream", "MB/s"),
    ("stream cpu", "s/GiB"),
    ("stream cpu with ends", "s/GiB"),
    ("connections", "1/s"),
    ("connection cpu", "us"),
    ("connection cpu with ends", "us"),
    ("control", "1/s"),
    ("control cpu", "us"),
    ("control cpu with ends", "us"),
    ("related", "1/s"),
    ("related cpu", "us"),
    ("related cpu with ends", "us"),
    ("pingpong", "us"),
    ("pingpong cpu", "us"),
    ("pingpong cpu with ends", "us"),
    ("idle", "KiB"),
    ("idle keyd", "KiB"),
    ("busy, idle beside it", ""),
    ("busy slowest", "ms"),
    ("busy cpu", "ms"),
];

/// What is to be compared with.
enum Against {
    Nginx,
    BestPeer,
    /// Another measure of the same system.
    Own(&'static str),
    Number,
}

/// What is aimed at: a measure, against what, at least (or at most) so much of it.
const GOALS: [(&str, Against, bool, f64); 8] = [
    ("stream", Against::Nginx, true, 1.4),
    ("stream cpu", Against::Nginx, false, 0.65),
    ("connections", Against::BestPeer, true, 2.2),
    ("control", Against::BestPeer, true, 2.2),
    ("related cpu", Against::Own("control cpu"), false, 0.6),
    ("pingpong", Against::Nginx, false, 1.0),
    ("idle", Against::Number, false, 12.0),
    ("busy slowest", Against::Nginx, false, 1.0),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["relay", role, listen, target, folder] => {
            relay::serve(role, listen, target, Path::new(folder)).map(|()| true)
        }
        ["serve", what, at] => load::serve(what, at).map(|()| true),
        ["load", to] => load::obey(to).map(|()| true),
        words => measure(words),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("tls: {error}"));
            ExitCode::from(2)
        }
    }
}

fn measure(words: &[&str]) -> Outcome<bool> {
    let rounds = std::env::var("TLS_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let only = std::env::var("TLS_ONLY").unwrap_or_default();
    let wanted = |name: &str| words.is_empty() || words.contains(&name);
    // Two descriptors each, in every process.
    let room = load::raise_limit()? / 2;
    let folder = tempfile::tempdir()?;
    certificates::write(folder.path())?;
    systems::write_policy(folder.path())?;
    let far = Far::new("tls")?;
    let idle = room.saturating_sub(BUSY + 100).min(IDLE);
    let mut bench = Bench { folder: folder.path(), far: &far, table: Table::default(), calls: 0, idle };
    let names: Vec<&'static str> = SYSTEMS
        .iter()
        .copied()
        .filter(|name| only.is_empty() || only.split(',').any(|one| one == *name))
        .collect();
    let (began, mut longest) = (Instant::now(), Duration::ZERO);
    for round in 0..rounds {
        let begins = Instant::now();
        if round > 0 && began.elapsed() + longest > BUDGET {
            say(&format!("no time for more than {round} rounds"));
            break;
        }
        // Each round begins with another system, so that none is always first.
        for at in 0..names.len() {
            let Some(name) = names.get((at + round) % names.len()).copied() else { continue };
            say(&format!("round {} of {rounds}: {name}", round + 1));
            bench.one(name, &wanted).inspect_err(|_| systems::show_logs(name, folder.path()))?;
        }
        longest = longest.max(begins.elapsed());
    }
    // At last, as it leaves thousands of sockets in TIME_WAIT, past which others would have to look for a free port.
    for name in names.iter().copied().filter(|_| wanted("busy")) {
        say(&format!("busy: {name}"));
        bench.busy(name).inspect_err(|_| systems::show_logs(name, folder.path()))?;
    }
    let on_record = !names.contains(&PORTCULLIS) || bench.is_on_record()?;
    Ok(bench.table.print(&names)? & on_record)
}

struct Bench<'a> {
    folder: &'a Path,
    far: &'a Far,
    table: Table,
    /// What wrapped clients have opened.
    calls: usize,
    /// How many may be idle at once.
    idle: usize,
}

impl Bench<'_> {
    fn start(&self, name: &str, server: Server, control: bool) -> Outcome<Running> {
        Running::start(name, self.folder, self.far, server, control)
    }

    /// Ends a system, and counts what was opened through it.
    fn end(&mut self, name: &str, mut running: Running) -> Outcome<()> {
        let [opened] = running.client.ask("drop")?;
        // What is over is told by the far end, too.
        std::thread::sleep(Duration::from_millis(100));
        if name == PORTCULLIS {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
            let opened = opened as usize;
            self.calls += opened;
        }
        Ok(())
    }

    /// Has the client do something, and notes what processors did meanwhile, `per` of it.
    fn timed<const N: usize>(
        &mut self,
        (measure, cpu, with_ends): (&'static str, &'static str, &'static str),
        name: &'static str,
        running: &mut Running,
        what: &str,
        result: impl FnOnce([f64; N]) -> (f64, f64),
    ) -> Outcome<()> {
        let before = running.cpu()?;
        let said = running.client.ask(what)?;
        let after = running.cpu()?;
        let (value, per) = result(said);
        self.table.note(measure, name, value);
        self.table.note(cpu, name, (after.0 - before.0) / per);
        self.table.note(with_ends, name, (after.1 - before.1) / per);
        Ok(())
    }

    fn one(&mut self, name: &'static str, wanted: &dyn Fn(&str) -> bool) -> Outcome<()> {
        if wanted("stream") {
            let mut pair = self.start(name, Server::Sink, false)?;
            pair.client.ask::<1>(&format!("stream {}", 64 << 20))?;
            let measures = ("stream", "stream cpu", "stream cpu with ends");
            self.timed(measures, name, &mut pair, &format!("stream {}", 1 << 30), |[rate]| (rate, 1.0))?;
            self.end(name, pair)?;
        }
        if wanted("idle") {
            // Memory is counted before anything else has used some.
            let mut pair = self.start(name, Server::Echo, false)?;
            let [few] = pair.client.ask("idle 50")?;
            let before = pair.memory()?;
            let [many] = pair.client.ask("idle 1000")?;
            let after = pair.memory()?;
            self.table.note("idle", name, (after.0 - before.0) / (many - few));
            if name == PORTCULLIS {
                self.table.note("idle keyd", name, (after.1 - before.1) / (many - few));
            }
            self.end(name, pair)?;
        }
        let per_micro = |[count, seconds]: [f64; 2]| (count / seconds, count / 1e6);
        if wanted("connections") || wanted("pingpong") {
            let mut pair = self.start(name, Server::Echo, false)?;
            if wanted("connections") {
                pair.client.ask::<2>("connections 0.3")?;
                let measures = ("connections", "connection cpu", "connection cpu with ends");
                self.timed(measures, name, &mut pair, "connections 2", per_micro)?;
            }
            if wanted("pingpong") {
                pair.client.ask::<1>("pingpong 500")?;
                let measures = ("pingpong", "pingpong cpu", "pingpong cpu with ends");
                self.timed(measures, name, &mut pair, "pingpong 10000", |[median]| (median, 0.01))?;
            }
            self.end(name, pair)?;
        }
        if wanted("related") && !PEERS.contains(&name) {
            let mut pair = self.start(name, Server::Echo, true)?;
            pair.client.ask::<2>("connections 0.3")?;
            let measures = ("control", "control cpu", "control cpu with ends");
            self.timed(measures, name, &mut pair, "connections 2", per_micro)?;
            self.end(name, pair)?;
            let (system, server, opens) = match name {
                RELAY => (RELAY_RELATED, Server::Echo, "connections"),
                _ => (name, Server::Data, "related"),
            };
            let mut pair = self.start(system, server, true)?;
            pair.client.ask::<2>(&format!("{opens} 0.3"))?;
            let measures = ("related", "related cpu", "related cpu with ends");
            self.timed(measures, name, &mut pair, &format!("{opens} 2"), per_micro)?;
            self.end(name, pair)?;
        }
        Ok(())
    }

    /// Whether many that do nothing, and many that have something, keep one another waiting.
    fn busy(&mut self, name: &'static str) -> Outcome<()> {
        let mut pair = self.start(name, Server::Echo, false)?;
        let [idle] = pair.client.ask(&format!("idle {}", self.idle))?;
        self.table.note("busy, idle beside it", name, idle);
        let before = pair.cpu()?;
        let [slowest] = pair.client.ask(&format!("busy {BUSY}"))?;
        self.table.note("busy slowest", name, slowest);
        self.table.note("busy cpu", name, (pair.cpu()?.0 - before.0) * 1e3);
        self.end(name, pair)
    }

    /// Whether each call is on record at both ends, from its beginning to its end, and once.
    fn is_on_record(&self) -> Outcome<bool> {
        let (near, far) = (certificates::near(self.folder), certificates::far(self.folder));
        let wanted = [
            ("connects, protected", &near, ["\"op\":\"connect\"", "\"verdict\":\"protect\""]),
            ("admitted", &near, ["\"op\":\"admit\"", "\"verdict\":\"permit\""]),
            ("closed", &near, ["\"op\":\"close\"", "\"lane\":\"tls\""]),
            ("accepts", &far, ["\"op\":\"accept\"", "\"verdict\":\"permit\""]),
            ("closed there", &far, ["\"op\":\"close\"", "\"lane\":\"tls\""]),
        ];
        let until = Instant::now() + Duration::from_secs(5);
        let count = || wanted.each_ref().map(|(_, state, needles)| records(state, needles));
        let mut found = count();
        while found.iter().any(|n| *n < self.calls) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(100));
            found = count();
        }
        let mut out = io::stdout().lock();
        for ((name, ..), found) in wanted.iter().zip(found) {
            writeln!(out, "{} calls, {found} records: {name}: {}", self.calls, word(found == self.calls))?;
        }
        Ok(found.iter().all(|n| *n == self.calls))
    }
}

const fn word(good: bool) -> &'static str {
    if good { "good" } else { "NOT REACHED" }
}

impl Table {
    fn note(&mut self, measure: &'static str, name: &'static str, value: f64) {
        self.0.entry((measure, name)).or_default().push(value);
    }

    fn median(&self, measure: &'static str, name: &'static str) -> Option<f64> {
        self.0.get(&(measure, name)).cloned().map(median)
    }

    /// What a goal of one system is compared with.
    fn against(&self, measure: &'static str, name: &'static str, what: &Against, most: bool) -> Option<f64> {
        match what {
            Against::Nginx => self.median(measure, NGINX),
            // Others have no certificate of a process, and nothing related: a connection is a connection.
            Against::BestPeer => {
                let peers = PEERS.iter().filter_map(|peer| self.median("connections", peer));
                peers.reduce(if most { f64::max } else { f64::min })
            }
            Against::Own(other) => self.median(other, name),
            Against::Number => Some(1.0),
        }
    }

    /// Whether all goals were reached.
    fn print(&self, names: &[&'static str]) -> Outcome<bool> {
        let mut out = io::stdout().lock();
        write!(out, "\n{:32}", "median")?;
        for name in names {
            write!(out, "{name:>12}")?;
        }
        writeln!(out)?;
        for (measure, unit) in MEASURES {
            let values: Vec<Option<f64>> = names.iter().map(|name| self.median(measure, name)).collect();
            if values.iter().all(Option::is_none) {
                continue;
            }
            write!(out, "{:32}", format!("{measure}, {unit}"))?;
            for value in &values {
                match value {
                    Some(value) if *value < 10.0 => write!(out, "{value:>12.2}")?,
                    Some(value) => write!(out, "{value:>12.0}")?,
                    None => write!(out, "{:>12}", "-")?,
                }
            }
            writeln!(out)?;
        }
        let mut all = true;
        for (measure, what, at_least, goal) in &GOALS {
            for name in [PORTCULLIS, RELAY] {
                let against = self.against(measure, name, what, *at_least);
                let Some((ours, against)) = self.median(measure, name).zip(against) else { continue };
                let ratio = ours / against;
                let good = if *at_least { ratio >= *goal } else { ratio <= *goal };
                let of = match what {
                    Against::Nginx => " of nginx",
                    Against::BestPeer => " of the best peer",
                    Against::Own(other) => &format!(" of {other}"),
                    Against::Number => "",
                };
                let bound = if *at_least { "least" } else { "most" };
                writeln!(out, "{name}: {measure}, {ratio:.2}{of} (at {bound} {goal}): {}", word(good))?;
                all &= good;
            }
        }
        Ok(all)
    }
}

/// Tells the bench, from a process of its own.
pub(crate) fn answer(text: &str) -> Outcome<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

pub(crate) fn say(text: &str) {
    let _gone = writeln!(io::stderr(), "{text}");
}
