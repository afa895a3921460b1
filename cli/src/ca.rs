//! `portcullis ca …`: a local trust domain.

use clap::Subcommand;

use crate::{COULD_NOT, output::Out};

/// What can be done with a trust domain.
#[derive(Subcommand)]
pub enum Command {}

/// Does it; the result is the exit status.
pub fn run(command: Command, _out: &mut Out) -> u8 {
    match command {}
    #[expect(unreachable_code, reason = "nothing is there yet")]
    COULD_NOT
}
