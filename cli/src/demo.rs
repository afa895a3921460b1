//! `portcullis demo`: what Portcullis does, live, between namespaces of its own.

mod ftp;
mod probe;
mod stage;
mod tell;
mod wire;

use clap::{Args as ClapArgs, Subcommand};

use crate::{Format, output::Out};

/// What can be shown.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Unmodified FTP between two hosts, and a stranger who wants the data
    Ftp {
        /// How the story is told
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    #[command(hide = true)]
    Probe(ProbeArgs),
    #[command(hide = true)]
    Wire {
        /// Texts that are looked for.
        texts: Vec<String>,
    },
}

/// What the stranger tries.
#[derive(ClapArgs, Debug)]
pub struct ProbeArgs {
    /// Whose ports.
    address: std::net::IpAddr,
    /// Which.
    ports: Vec<u16>,
}

/// Shows it; the result is the exit status.
pub fn run(command: Command, out: &mut Out) -> u8 {
    match command {
        Command::Ftp { format } => ftp::run(out, format),
        Command::Wire { texts } => wire::run(&texts, out),
        Command::Probe(args) => probe::run(args.address, &args.ports, out),
    }
}
