//! The hidden commands under which the supervisor starts broker and key daemon.

use std::{io, path::PathBuf};

use nix::sys::signal::{SigSet, Signal};
use portcullis_types::Without;

use crate::{COULD_NOT, Mode, output::Out, sys};

/// What the supervisor hands to a broker. Descriptors are given by number.
#[derive(clap::Args, Debug)]
pub struct BrokerArgs {
    #[arg(long)]
    state: PathBuf,
    #[arg(long)]
    policy: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t)]
    mode: Mode,
    #[arg(long)]
    doors_fd: i32,
    #[arg(long)]
    control_fd: i32,
    #[arg(long)]
    keyd_fd: Option<i32>,
    #[arg(long)]
    handed_fd: Option<i32>,
    #[arg(long)]
    ready_fd: i32,
    #[arg(long)]
    life_fd: i32,
    #[arg(long)]
    fresh: bool,
    #[arg(long)]
    strict: bool,
    #[arg(long, default_value_t)]
    without: Without,
}

/// What the supervisor hands to a key daemon.
#[derive(clap::Args, Debug)]
pub struct KeydArgs {
    #[arg(long)]
    state: Option<PathBuf>,
    #[arg(long)]
    broker_fd: i32,
    #[arg(long)]
    brokers_fd: i32,
    #[arg(long)]
    ready_fd: i32,
}

impl From<Mode> for portcullis_broker::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Enforce => Self::Enforce,
            Mode::Audit => Self::Audit,
        }
    }
}

/// Is the broker until it is told to end.
pub fn broker(args: BrokerArgs, out: &mut Out) -> u8 {
    let given = [args.doors_fd, args.control_fd, args.ready_fd, args.life_fd];
    let fds: Vec<i32> = given.into_iter().chain(args.keyd_fd).chain(args.handed_fd).collect();
    let alive = inherit(&fds).and_then(|()| sys::adopt(args.life_fd));
    let config = alive.and_then(|life| {
        sys::end_with_writer(&life)?;
        // Open until this process ends, whatever becomes of it.
        std::mem::forget(life);
        Ok(portcullis_broker::Config {
            state: args.state,
            policy: args.policy,
            mode: args.mode.into(),
            doors: sys::adopt(args.doors_fd)?,
            control: Some(sys::adopt(args.control_fd)?),
            keyd: args.keyd_fd.map(sys::adopt).transpose()?,
            handed: args.handed_fd.map(sys::adopt).transpose()?,
            ready: Some(sys::adopt(args.ready_fd)?),
            fresh: args.fresh,
            strict: args.strict,
            without: args.without,
        })
    });
    match config.map(portcullis_broker::run) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => fail(&error, out),
        Err(error) => fail(&error, out),
    }
}

/// Is the key daemon until the broker has gone and the supervisor, who would send another, too.
pub fn keyd(args: &KeydArgs, out: &mut Out) -> u8 {
    let config = inherit(&[args.broker_fd, args.brokers_fd, args.ready_fd]).and_then(|()| {
        let (broker, brokers) = (sys::adopt(args.broker_fd)?, Some(sys::adopt(args.brokers_fd)?));
        let ready = Some(sys::adopt(args.ready_fd)?);
        Ok(portcullis_keyd::Config { broker, brokers, state: args.state.clone(), ready })
    });
    match config.map(portcullis_keyd::run) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => fail(&error, out),
        Err(error) => fail(&error, out),
    }
}

/// Begins with the given descriptors, and deaf to signals, so that no program that is held ends what holds it; the
/// guard keeps the rest away. The alarm is the broker's watchdog.
fn inherit(fds: &[i32]) -> io::Result<()> {
    let mut deaf = SigSet::all();
    deaf.remove(Signal::SIGALRM);
    deaf.thread_set_mask()?;
    sys::close_others(fds);
    fds.iter().copied().try_for_each(sys::close_on_exec)
}

fn fail(error: &dyn std::error::Error, out: &mut Out) -> u8 {
    out.error(error);
    COULD_NOT
}
