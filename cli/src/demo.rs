//! `portcullis demo`: what Portcullis does, live, between namespaces of its own.

mod ftp;
mod probe;
mod stage;
mod wire;

use clap::{Args as ClapArgs, Subcommand};

use crate::output::Out;

/// What can be shown.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Unmodified FTP between two hosts, and a stranger who wants the data
    Ftp,
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
        Command::Ftp => ftp::run(out),
        Command::Wire { texts } => wire::run(&texts, out),
        Command::Probe(args) => probe::run(args.address, &args.ports, out),
    }
}
