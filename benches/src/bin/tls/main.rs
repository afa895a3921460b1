//! The relay engine by itself, and the real key daemons: a pair of each against stunnel, HAProxy and nginx in the same
//! role. Same certificates, same link between two network namespaces, same run, interleaved. `keyd` has what the others
//! lack: a certificate made for each association at both ends, and a broker's word for it.
//!
//! `tls [stream|connections|related|pingpong|idle|busy]...`, all but `busy` by default. `TLS_ROUNDS` sets how often
//! each is measured (5), `TLS_ONLY` names the systems, as `portcullis,nginx`. `related` is a data connection of a
//! session against a new association, both ours.

mod certificates;
mod keyd;
mod load;
mod process;
mod relay;
mod systems;

use std::{
    collections::BTreeMap,
    error::Error,
    io::{self, Write},
    path::Path,
};

use load::{Backends, Server};
use systems::{Running, SYSTEMS};

pub(crate) type Outcome<T> = Result<T, Box<dyn Error>>;

/// Connections that are busy at once, beside those that are idle, in `busy`.
const BUSY: usize = 1000;
const IDLE: usize = 10_000;

/// The relay engine by itself, and in the key daemon.
const OURS: [&str; 2] = ["portcullis", "keyd"];

/// One number per system and round.
#[derive(Default)]
struct Table(BTreeMap<(&'static str, &'static str), Vec<f64>>);

/// What is measured: name, unit, and whether more is better.
const MEASURES: [(&str, &str, bool); 10] = [
    ("stream", "MB/s", true),
    ("stream cpu", "s/GiB", false),
    ("connections", "1/s", true),
    ("connection cpu", "us", false),
    ("related", "1/s", true),
    ("related cpu", "us", false),
    ("pingpong", "us", false),
    ("pingpong cpu", "us", false),
    ("idle", "KiB", false),
    ("busy slowest", "ms", false),
];

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["relay", role, listen, target, folder] => relay::serve(role, listen, target, Path::new(folder)),
        ["keyd", folder] => keyd::serve(Path::new(folder)),
        words => measure(words),
    }
}

fn measure(words: &[&str]) -> Outcome<()> {
    let rounds = std::env::var("TLS_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let only = std::env::var("TLS_ONLY").unwrap_or_default();
    let wanted = |name: &str| match words {
        [] | ["all"] => name != "busy",
        words => words.contains(&name),
    };
    let folder = tempfile::tempdir()?;
    certificates::write(folder.path())?;
    let backends = Backends::start()?;
    let mut table = Table::default();
    let names: Vec<&'static str> = SYSTEMS
        .iter()
        .copied()
        .filter(|name| only.is_empty() || only.split(',').any(|one| one == *name))
        .collect();
    for round in 0..rounds {
        // Each round begins with another system, so that none is always first.
        for at in 0..names.len() {
            let Some(name) = names.get((at + round) % names.len()).copied() else { continue };
            say(&format!("round {} of {rounds}: {name}", round + 1));
            one(name, folder.path(), &backends, &wanted, &mut table)
                .inspect_err(|_| systems::show_logs(name, folder.path()))?;
        }
    }
    table.print(&names)
}

fn one(
    name: &'static str,
    folder: &Path,
    backends: &Backends,
    wanted: &dyn Fn(&str) -> bool,
    table: &mut Table,
) -> Outcome<()> {
    let mut note = |what: &'static str, value: f64| table.0.entry((what, name)).or_default().push(value);
    if wanted("stream") {
        let pair = Running::start(name, folder, backends, Server::Sink)?;
        load::stream(&pair.entry, 64 << 20)?;
        let before = pair.cpu()?;
        let (bytes, seconds) = load::stream(&pair.entry, 1 << 30)?;
        note("stream", bytes / seconds / 1e6);
        note("stream cpu", (pair.cpu()? - before) / (bytes / f64::from(1 << 30)));
    }
    if wanted("connections") {
        let pair = Running::start(name, folder, backends, Server::Echo)?;
        load::connections(&pair.entry, 0.2)?;
        let before = pair.cpu()?;
        let (count, seconds) = load::connections(&pair.entry, 2.0)?;
        note("connections", count / seconds);
        note("connection cpu", (pair.cpu()? - before) / count * 1e6);
    }
    let related = match name {
        "portcullis" => Some(systems::RELATED),
        "keyd" => Some(systems::KEYD_RELATED),
        _ => None,
    };
    if let Some(related) = related.filter(|_| wanted("related")) {
        let pair = Running::start(related, folder, backends, Server::Echo)?;
        load::connections(&pair.entry, 0.2)?;
        let before = pair.cpu()?;
        let (count, seconds) = load::connections(&pair.entry, 2.0)?;
        note("related", count / seconds);
        note("related cpu", (pair.cpu()? - before) / count * 1e6);
    }
    if wanted("pingpong") {
        let pair = Running::start(name, folder, backends, Server::Echo)?;
        load::pingpong(&pair.entry, 500)?;
        let before = pair.cpu()?;
        note("pingpong", load::pingpong(&pair.entry, 20_000)?);
        note("pingpong cpu", (pair.cpu()? - before) / 20_000.0 * 1e6);
    }
    if wanted("idle") {
        let pair = Running::start(name, folder, backends, Server::Echo)?;
        let _warm = load::idle(&pair.entry, 50)?;
        let before = pair.memory()?;
        let held = load::idle(&pair.entry, 1000)?;
        note("idle", (pair.memory()? - before) / 1000.0);
        drop(held);
    }
    if wanted("busy") {
        let pair = Running::start(name, folder, backends, Server::Echo)?;
        // Two descriptors each, in every process.
        let room = load::descriptors()? / 2;
        let idle = load::idle(&pair.entry, room.saturating_sub(BUSY + 100).min(IDLE))?;
        say(&format!("{name}: {} idle", idle.len()));
        note("busy slowest", load::busy(&pair.entry, BUSY)?);
        drop(idle);
    }
    Ok(())
}

impl Table {
    fn median(&self, what: &'static str, name: &'static str) -> Option<f64> {
        let mut values = self.0.get(&(what, name))?.clone();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }

    fn print(&self, names: &[&'static str]) -> Outcome<()> {
        let mut out = io::stdout().lock();
        write!(out, "\n{:22}", "median")?;
        for name in names {
            write!(out, "{name:>12}")?;
        }
        writeln!(out, "   portcullis : nginx, : best, keyd : nginx, : best")?;
        for (what, unit, more_is_better) in MEASURES {
            let values: Vec<Option<f64>> = names.iter().map(|name| self.median(what, name)).collect();
            if values.iter().all(Option::is_none) {
                continue;
            }
            write!(out, "{:22}", format!("{what}, {unit}"))?;
            for value in &values {
                match value {
                    Some(value) if *value < 10.0 => write!(out, "{value:>12.2}")?,
                    Some(value) => write!(out, "{value:>12.0}")?,
                    None => write!(out, "{:>12}", "-")?,
                }
            }
            let others = names.iter().filter(|name| !OURS.contains(name));
            let others = others.filter_map(|name| self.median(what, name));
            let best = others.reduce(if more_is_better { f64::max } else { f64::min });
            let pairs =
                OURS.into_iter().flat_map(|one| [self.median(what, "nginx"), best].map(|it| (one, it)));
            for (one, against) in pairs {
                match (self.median(what, one), against) {
                    (Some(ours), Some(against)) => write!(out, "   {:6.2}", ours / against)?,
                    _ => write!(out, "        -")?,
                }
            }
            writeln!(out)?;
        }
        for name in OURS {
            let (related, new) = (self.median("related cpu", name), self.median("connection cpu", name));
            if let Some((related, new)) = related.zip(new) {
                writeln!(
                    out,
                    "{name}: a related connection costs {:.2} of a new association",
                    related / new
                )?;
            }
        }
        Ok(())
    }
}

pub(crate) fn say(text: &str) {
    let _gone = writeln!(io::stderr(), "{text}");
}
