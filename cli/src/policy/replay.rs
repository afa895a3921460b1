//! Recorded flows, decided by two policies: from audit records to counts.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead as _, BufReader},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use portcullis_policy::{
    CertificateFact, CertificateFacts, Fact, Flow, Party, Policy, ProcessFact, ProcessFacts, Replay,
    Replayed, Side, escape,
};
use portcullis_types::Protocol;
use serde::{Deserialize, Serialize};

use crate::output::Out;

/// What of an audit record a decision needs.
#[derive(Deserialize)]
struct Record {
    #[serde(default)]
    op: String,
    #[serde(default)]
    host: Option<String>,
    #[serde(default)]
    exe: Option<String>,
    #[serde(default)]
    sha256: Option<String>,
    #[serde(default)]
    user: Option<String>,
    #[serde(default)]
    unit: Option<String>,
    #[serde(default)]
    proto: Option<String>,
    #[serde(default)]
    local: Option<String>,
    #[serde(default)]
    remote: Option<String>,
    #[serde(default)]
    peer: Option<String>,
}

/// How often what changes, by process.
#[derive(Debug, Default, Serialize)]
pub struct Summary {
    flows: u64,
    /// Records that are no flow (listen, bind), or not of this form.
    passed_over: u64,
    changes: BTreeMap<String, Counts>,
}

#[derive(Debug, Default, Serialize)]
struct Counts {
    becomes_allowed: u64,
    becomes_refused: u64,
    /// That depends on what is not in the records: groups, command lines, ancestors, most of certificates.
    cannot_be_told: u64,
}

impl Summary {
    /// Whether a recorded flow that was refused is now permitted.
    pub fn widens(&self) -> bool {
        self.changes.values().any(|c| c.becomes_allowed > 0)
    }

    /// Whether there are flows of which it cannot be told.
    pub fn is_doubtful(&self) -> bool {
        self.changes.values().any(|c| c.cannot_be_told > 0)
    }

    /// For people.
    pub fn show(&self, out: &mut Out) {
        out.line(format!("replayed {} flows ({} records passed over)", self.flows, self.passed_over));
        for (process, counts) in &self.changes {
            let (process, allowed, refused) =
                (escape(process), counts.becomes_allowed, counts.becomes_refused);
            let untold = match counts.cannot_be_told {
                0 => String::new(),
                n => format!(", {n} depend on what is not recorded"),
            };
            out.line(format!("    {process}: {allowed} become allowed, {refused} become refused{untold}"));
        }
    }
}

/// Longest record that is read.
const LONGEST: usize = 1 << 20;

/// Decides the flows of audit files by both policies.
///
/// # Errors
/// The file that cannot be read, and why.
pub fn run(files: &[PathBuf], old: &Policy, new: &Policy, now: u64) -> Result<Summary, String> {
    let (mut summary, replay) = (Summary::default(), Replay::new(old, new, now));
    for path in files {
        let failed =
            |error: std::io::Error| format!("cannot read `{}`: {error}", escape(&path.display().to_string()));
        let mut file = BufReader::new(File::open(path).map_err(failed)?);
        let mut line = Vec::new();
        loop {
            line.clear();
            if file.read_until(b'\n', &mut line).map_err(failed)? == 0 {
                break;
            }
            let record =
                (line.len() <= LONGEST).then(|| serde_json::from_slice::<Record>(&line).ok()).flatten();
            let Some((process, replayed)) = record.and_then(|r| decide(&r, &replay, now)) else {
                summary.passed_over += 1;
                continue;
            };
            summary.flows += 1;
            if replayed != Replayed::Same {
                summary.changes.entry(process).or_default().add(replayed);
            }
        }
    }
    Ok(summary)
}

impl Counts {
    const fn add(&mut self, replayed: Replayed) {
        match replayed {
            Replayed::Same => {}
            Replayed::Allowed => self.becomes_allowed += 1,
            Replayed::Refused => self.becomes_refused += 1,
            Replayed::Unknown => self.cannot_be_told += 1,
        }
    }
}

fn decide(record: &Record, replay: &Replay<'_>, now: u64) -> Option<(String, Replayed)> {
    let far = match record.op.as_str() {
        "connect" | "send" => Side::To,
        "accept" | "receive" => Side::From,
        _ => return None,
    };
    let protocol = protocol(record.proto.as_deref()?)?;
    let (local, local_port) = place(record.local.as_deref());
    let (remote, remote_port) = place(record.remote.as_deref());
    remote?;
    let port = if far == Side::To { remote_port } else { local_port };
    let fact =
        |text: &Option<String>| text.clone().filter(|t| !t.is_empty()).map_or(Fact::Unknown, Fact::Known);
    let user = record.user.clone().unwrap_or_default();
    let facts = ProcessFacts {
        exe: fact(&record.exe),
        sha256: record.sha256.as_deref().and_then(hash).map_or(Fact::Unknown, Fact::Known),
        uid: user.parse().unwrap_or(u32::MAX),
        user,
        groups: Vec::new(),
        unit: record.unit.clone(),
        cmdline: String::new(),
        ancestors: Vec::new(),
    };
    let certificate = record.peer.as_deref().and_then(spiffe);
    let own = record
        .host
        .as_ref()
        .map(|host| CertificateFacts { names: vec![host.clone()], ..CertificateFacts::default() });
    let near = Party {
        addr: local,
        process: ProcessFact::Known(&facts),
        certificate: own.as_ref().map_or(CertificateFact::None, CertificateFact::Shown),
    };
    let other = Party {
        addr: remote,
        process: ProcessFact::Unknown,
        certificate: certificate.as_ref().map_or(CertificateFact::None, CertificateFact::Shown),
    };
    let (from, to) = if far == Side::To { (&near, &other) } else { (&other, &near) };
    let flow = Flow { from, to, protocol, port, now, far };
    let process = record.exe.clone().unwrap_or_else(|| "unknown".to_owned());
    Some((process, replay.flow(&flow)))
}

fn protocol(text: &str) -> Option<Protocol> {
    Some(match text {
        "tcp" | "tcp6" => Protocol::TCP,
        "udp" | "udp6" => Protocol::UDP,
        "icmp" => Protocol::ICMP,
        "icmpv6" => Protocol::ICMPV6,
        "sctp" => Protocol::SCTP,
        "udplite" => Protocol::UDPLITE,
        "raw" => Protocol::RAW,
        other => Protocol(other.strip_prefix("ip-").unwrap_or(other).parse().ok()?),
    })
}

fn place(text: Option<&str>) -> (Option<IpAddr>, u16) {
    let Some(text) = text else { return (None, 0) };
    match text.parse::<SocketAddr>() {
        Ok(address) => (Some(address.ip()), address.port()),
        Err(_) => (text.parse().ok(), 0),
    }
}

fn hash(text: &str) -> Option<[u8; 32]> {
    let mut hash = [0; 32];
    for (i, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    (text.len() == 64).then_some(hash)
}

/// `spiffe://DOMAIN/host/HOST/process/NAME`.
fn spiffe(text: &str) -> Option<CertificateFacts> {
    let mut parts = text.strip_prefix("spiffe://")?.split('/').skip(1);
    let (Some("host"), Some(host)) = (parts.next(), parts.next()) else { return None };
    let process = match (parts.next(), parts.next()) {
        (Some("process"), Some(name)) => Some(name.to_owned()),
        _ => None,
    };
    Some(CertificateFacts { names: vec![host.to_owned()], process, ..CertificateFacts::default() })
}
