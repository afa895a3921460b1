//! `portcullis audit`: the log, for people and for programs.

mod log;
mod record;
mod select;

use clap::{Args as ClapArgs, ValueEnum};
use portcullis_broker::control::Request;

use self::select::Selection;
pub use self::{
    log::{Entry, Log},
    record::Record,
};
use crate::{
    COULD_NOT, Format, StateArg,
    control::{self, AskError},
    output::Out,
    place::Place,
};

/// Options of `portcullis audit`.
#[derive(ClapArgs, Debug)]
pub struct Args {
    /// Go on printing records as they are written
    #[arg(long, short)]
    follow: bool,
    /// Only records with this verdict; may be repeated
    #[arg(long, value_enum)]
    verdict: Vec<Verdict>,
    /// Only records since this time: `2026-01-31T10:00:00Z`, a local date, time or both (`2026-01-31`, `10:00`),
    /// `today`, `yesterday`, or a duration such as `10m` or `2h`
    #[arg(long, value_name = "TIME", value_parser = select::since)]
    since: Option<jiff::Timestamp>,
    /// Only records of this process: its id, or its executable's path or name
    #[arg(long, value_name = "P")]
    process: Option<String>,
    /// Only records with this peer: an address, a prefix, `address:port`, or a part of the peer's name
    #[arg(long, value_name = "A", value_parser = select::peer)]
    peer: Option<String>,
    /// How records are printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[command(flatten)]
    state: StateArg,
}

/// Verdicts, as the log spells them.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Verdict {
    Permit,
    Protect,
    Refuse,
    WouldRefuse,
}

impl Verdict {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Permit => "permit",
            Self::Protect => "protect",
            Self::Refuse => "refuse",
            Self::WouldRefuse => "would-refuse",
        }
    }
}

/// Prints the log; the result is the exit status.
pub fn run(args: Args, out: &mut Out) -> u8 {
    match print(args, out) {
        Ok(()) => 0,
        Err(error) => {
            out.error(&error);
            COULD_NOT
        }
    }
}

fn print(args: Args, out: &mut Out) -> Result<(), AskError> {
    let place = Place::find(args.state.state.as_deref())?;
    // What programs did without asking is in their rings until somebody wants to know.
    control::ask(&place, &Request::Flush)?;
    let selection = Selection {
        verdicts: args.verdict.iter().map(|v| v.as_str()).collect(),
        since: args.since,
        process: args.process,
        peer: args.peer,
    };
    let mut log = Log::open(&place)?;
    let mut last = None;
    loop {
        while let Some(entry) = log.next()? {
            match entry {
                Entry::Record(record) => {
                    note_gap(last, &record, out);
                    last = record.seq();
                    if selection.takes(&record) {
                        show(&record, args.format, out);
                    }
                }
                Entry::Broken { file, line } => {
                    out.note(format!("line {line} of `{}` is no record", file.display()));
                }
            }
        }
        if !args.follow {
            return Ok(());
        }
        log.wait()?;
    }
}

/// Records are numbered without gaps, so a gap is a loss, and is shown.
fn note_gap(last: Option<u64>, record: &Record, out: &mut Out) {
    if let (Some(last), Some(seq)) = (last, record.seq())
        && seq > last + 1
    {
        out.note(format!("records {} to {} are missing", last + 1, seq - 1));
    }
}

fn show(record: &Record, format: Format, out: &mut Out) {
    match format {
        Format::Json => out.line(record.as_written()),
        Format::Text => {
            let line = record.line(out);
            out.line(line);
        }
    }
}
