//! Processes that take turns: each reads a number of rounds from its standard input, does them, and writes
//! what they took.

use std::{
    io::{self, BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Instant,
};

use crate::median;

/// One variant.
#[derive(Debug)]
pub struct Turn {
    /// What the table calls it.
    pub name: String,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    /// Median nanoseconds of each batch.
    medians: Vec<f64>,
    /// Rounds per second of each batch.
    rates: Vec<f64>,
    /// Rounds done.
    pub rounds: usize,
}

impl Turn {
    /// Starts a variant and lets it warm up.
    ///
    /// # Errors
    /// It cannot be started, or does not answer.
    pub fn start(name: &str, mut command: Command) -> io::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("no pipes"));
        };
        let from = BufReader::new(from);
        let mut turn = Self {
            name: name.to_owned(),
            child,
            to,
            from,
            medians: Vec::new(),
            rates: Vec::new(),
            rounds: 0,
        };
        turn.take(50)?;
        turn.medians.clear();
        turn.rates.clear();
        Ok(turn)
    }

    /// Lets it do one batch.
    ///
    /// # Errors
    /// It has ended.
    pub fn take(&mut self, rounds: usize) -> io::Result<()> {
        writeln!(self.to, "{rounds}")?;
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        let mut words = line.split_whitespace().filter_map(|word| word.parse::<f64>().ok());
        let (Some(median), Some(rate)) = (words.next(), words.next()) else {
            return Err(io::Error::other(format!("{} said `{}`", self.name, line.trim_end())));
        };
        self.medians.push(median);
        self.rates.push(rate);
        self.rounds += rounds;
        Ok(())
    }

    /// Median of the batches' medians, in microseconds.
    #[must_use]
    pub fn micros(&self) -> f64 {
        median(self.medians.clone()) / 1000.0
    }

    /// Median of the batches' rates, per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        median(self.rates.clone())
    }

    /// Median, over the batches, of this one's rate by that of `other` in the same turn.
    #[must_use]
    pub fn ratio(&self, other: &Self) -> f64 {
        median(self.rates.iter().zip(&other.rates).map(|(mine, its)| mine / its).collect())
    }

    /// Ends it.
    pub fn end(mut self) {
        drop(self.to);
        let _gone = self.child.wait();
    }
}

/// The other side of [`Turn`]: does `round` as often as asked, until standard input ends. `round` gives the
/// nanoseconds that count for the median; the rate is of all that it does.
///
/// # Errors
/// Those of `round`.
pub fn answer(mut round: impl FnMut(usize) -> io::Result<f64>) -> io::Result<()> {
    let mut done = 0;
    for line in io::stdin().lock().lines() {
        let Ok(rounds) = line?.trim().parse::<usize>() else { break };
        let mut times = Vec::with_capacity(rounds);
        let began = Instant::now();
        for _ in 0..rounds {
            times.push(round(done)?);
            done += 1;
        }
        #[expect(clippy::cast_precision_loss, reason = "a count of rounds is small")]
        let rate = rounds as f64 / began.elapsed().as_secs_f64();
        let mut out = io::stdout().lock();
        writeln!(out, "{} {rate}", median(times))?;
        out.flush()?;
    }
    Ok(())
}
