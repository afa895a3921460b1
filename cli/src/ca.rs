//! `portcullis ca …`: a local trust domain.

use std::{net::IpAddr, path::PathBuf};

use clap::Subcommand;
use jiff::Timestamp;
use portcullis_keyd::identity::{
    Authority, Enrolment, HostEntry, HostName, IdentityError, Overview, TrustDomain,
};
use serde::Serialize;

use crate::{
    COULD_NOT, Format, StateArg,
    output::{Ink, Out},
    place::{PlaceError, name_state},
};

/// What can be done with a trust domain.
#[derive(Subcommand)]
pub enum Command {
    /// Make a trust domain: its root key stays in the state folder
    Init {
        /// Name of the trust domain, such as example.com
        #[arg(long, value_name = "DOMAIN")]
        trust_domain: TrustDomain,
        #[command(flatten)]
        common: Common,
    },
    /// Enrol a host and write the folder that makes a machine this host
    Host {
        /// DNS name of the host
        name: HostName,
        #[command(flatten)]
        with: With,
        /// Folder to write, which is the host's state folder
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        #[command(flatten)]
        common: Common,
    },
    /// Show the trust domain, its hosts and what is revoked
    Show {
        #[command(flatten)]
        common: Common,
    },
    /// Give a host new certificates; without a name, only the newest list of members
    Renew {
        /// DNS name of the host
        name: Option<HostName>,
        #[command(flatten)]
        with: With,
        /// Folder to write, which is the host's state folder
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        #[command(flatten)]
        common: Common,
    },
    /// Stop believing a host, or one certificate; hosts learn of it by `ca renew --out`
    Revoke {
        /// DNS name of the host
        #[arg(required_unless_present = "serial", conflicts_with = "serial")]
        name: Option<HostName>,
        /// Serial number of one certificate, in hexadecimal
        #[arg(long, value_name = "HEX")]
        serial: Option<String>,
        #[command(flatten)]
        common: Common,
    },
}

/// Options of every `ca` command.
#[derive(clap::Args)]
pub struct Common {
    /// How the result is printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[command(flatten)]
    state: StateArg,
}

/// What a host's certificates say; what is not given stays as it was.
#[derive(clap::Args)]
pub struct With {
    /// An address of the host (may be repeated) [default: as before]
    #[arg(long, value_name = "IP", requires = "name")]
    address: Vec<IpAddr>,
    /// Version of the enrolment, which policies compare [default: as before; at first the day, as 20260131]
    #[arg(long, value_name = "N", requires = "name")]
    ver: Option<u64>,
    /// A group that the host is in (may be repeated) [default: as before]
    #[arg(long, value_name = "G", requires = "name")]
    group: Vec<String>,
}

impl From<With> for Enrolment {
    fn from(with: With) -> Self {
        let groups = (!with.group.is_empty()).then_some(with.group);
        Self { addresses: with.address, ver: with.ver, groups }
    }
}

/// Why a command could not be done.
#[derive(Debug, thiserror::Error)]
enum CaError {
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Does it; the result is the exit status.
pub fn run(command: Command, out: &mut Out) -> u8 {
    match perform(command, out) {
        Ok(()) => 0,
        Err(error) => {
            out.error(&error);
            COULD_NOT
        }
    }
}

fn perform(command: Command, out: &mut Out) -> Result<(), CaError> {
    let now = Timestamp::now().as_second();
    match command {
        Command::Init { trust_domain, common } => {
            let state = name_state(common.state.state.as_deref())?;
            let made = Authority::init(&state, trust_domain, now)?.overview()?;
            say(out, common.format, &made, |out| {
                out.line(format!("Trust domain {} in {}", made.domain, state.join("ca").display()));
                out.line(format!("Root certificate SHA-256 {}", made.root));
            });
        }
        Command::Host { name, with, out: folder, common } => {
            let mut authority = open(&common)?;
            let entry = authority.enrol(&name, &with.into(), &folder, now)?;
            let domain = authority.overview()?.domain;
            if !name.as_str().ends_with(&format!(".{domain}")) {
                let wider = format!("x509{{name=\"*.{domain}\"}}");
                out.note(format!(
                    "note: `{name}` is not below `{domain}`: rules such as {wider} do not mean it"
                ));
            }
            say(out, common.format, &entry, |out| written(out, &entry, &folder));
        }
        Command::Renew { name: Some(name), with, out: folder, common } => {
            let entry = open(&common)?.renew(&name, &with.into(), &folder, now)?;
            say(out, common.format, &entry, |out| written(out, &entry, &folder));
        }
        Command::Renew { name: None, with: _, out: folder, common } => {
            let authority = open(&common)?;
            authority.publish(&folder)?;
            let number = authority.overview()?.number;
            say(out, common.format, &serde_json::json!({ "number": number }), |out| {
                out.line(format!("List of members {number} written to {}", folder.display()));
            });
        }
        Command::Show { common } => {
            let overview = open(&common)?.overview()?;
            say(out, common.format, &overview, |out| show(out, &overview));
        }
        Command::Revoke { name, serial, common } => {
            let mut authority = open(&common)?;
            let mut revoked = Vec::new();
            if let Some(name) = name {
                revoked.extend(authority.revoke_host(&name, now)?);
            }
            if let Some(serial) = serial {
                revoked.push(authority.revoke_serial(&serial, now)?);
            }
            say(out, common.format, &serde_json::json!({ "revoked": revoked }), |out| {
                for serial in &revoked {
                    out.line(format!("Revoked {serial}"));
                }
                out.line(
                    "Hosts learn of it when their list of members is renewed: portcullis ca renew --out DIR",
                );
            });
        }
    }
    Ok(())
}

fn open(common: &Common) -> Result<Authority, CaError> {
    Ok(Authority::open(&name_state(common.state.state.as_deref())?)?)
}

fn say(out: &mut Out, format: Format, value: &impl Serialize, text: impl FnOnce(&mut Out)) {
    match format {
        Format::Json => out.json(value),
        Format::Text => text(out),
    }
}

fn day(second: i64) -> String {
    Timestamp::from_second(second)
        .map_or_else(|_| second.to_string(), |at| at.strftime("%Y-%m-%d").to_string())
}

fn written(out: &mut Out, entry: &HostEntry, folder: &std::path::Path) {
    out.line(format!(
        "Host {} (ver {}) until {} in {}",
        entry.name,
        entry.ver,
        day(entry.until),
        folder.display()
    ));
    out.line("Keep issuer.key and host.key there secret; other hosts learn of it by: portcullis ca renew --out DIR");
}

fn show(out: &mut Out, overview: &Overview) {
    out.line(format!("Trust domain {} until {}", overview.domain, day(overview.until)));
    out.line(format!("Root certificate SHA-256 {}", overview.root));
    out.line(format!("List of members {}, {} revoked serials", overview.number, overview.revoked.len()));
    if overview.hosts.is_empty() {
        return;
    }
    out.line("");
    let head = format!("{:<32} {:>10} {:<10} {:<8} ADDRESSES, GROUPS", "HOST", "VER", "UNTIL", "STATE");
    out.line(out.ink(Ink::Strong, &head));
    for host in &overview.hosts {
        let (ink, state) = if host.revoked { (Ink::Bad, "revoked") } else { (Ink::Good, "good") };
        let addresses: Vec<_> = host.addresses.iter().map(ToString::to_string).collect();
        out.line(format!(
            "{:<32} {:>10} {:<10} {} {} {}",
            host.name.as_str(),
            host.ver,
            day(host.until),
            out.ink(ink, &format!("{state:<8}")),
            addresses.join(" "),
            crate::output::escape(&host.groups.join(" ")),
        ));
    }
}
