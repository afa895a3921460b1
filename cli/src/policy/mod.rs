//! `portcullis policy …`: the language's tools.

use clap::Subcommand;

use crate::{COULD_NOT, output::Out};

/// The language's tools.
#[derive(Subcommand)]
pub enum Command {}

/// Runs one of them; the result is the exit status.
pub fn run(command: Command, _out: &mut Out) -> u8 {
    match command {}
    #[expect(unreachable_code, reason = "no tool is there yet")]
    COULD_NOT
}
