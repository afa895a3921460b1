//! start: what wrapping adds to a program's start, once the broker runs and cold.
//!
//! Three ways to /bin/true: as the child of a wrapped program, which is preloaded and finds the door; by
//! `portcullis run` while another wrapped program keeps the broker up; and by the first run of all, which starts
//! supervisor, key daemon and broker.

use std::{
    fs, io,
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use portcullis_benches::{
    median,
    net::{Far, beside},
    row,
};

const TURNS: usize = 100;
const COLD: usize = 10;
/// Largest size of the shim, in bytes.
const MOST: u64 = 350_000;

fn main() -> ExitCode {
    match bench() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            row(&format!("start: {error}"));
            ExitCode::from(2)
        }
    }
}

/// Milliseconds until a command has ended.
fn timed(command: &mut Command) -> io::Result<f64> {
    let began = Instant::now();
    let status = command.stdin(Stdio::null()).status()?;
    if !status.success() {
        return Err(io::Error::other(format!("{command:?} failed")));
    }
    Ok(began.elapsed().as_secs_f64() * 1000.0)
}

fn command(line: &[String], program: &str) -> Command {
    let mut command = match line.split_first() {
        Some((first, rest)) => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
        None => Command::new(program),
    };
    command.env_remove("LD_PRELOAD");
    command
}

fn bench() -> io::Result<bool> {
    if std::env::args().nth(1).as_deref() == Some("inside") {
        let times = (0..TURNS).map(|_| timed(&mut Command::new("/bin/true"))).collect::<io::Result<_>>()?;
        row(&median(times).to_string());
        return Ok(true);
    }
    let far = Far::new("start")?;
    let policy = far.policy(1000)?;
    let run = far.run(&policy);
    let mut cold = Vec::new();
    for _ in 0..COLD {
        cold.push(timed(&mut command(&run, "/bin/true"))?);
        wait_until_gone(&far)?;
    }
    let mut keeper = command(&run, "/bin/sleep");
    let mut keeper = keeper.arg("600").spawn()?;
    let outcome = warm(&run, &cold);
    let _dead = keeper.kill();
    let _gone = keeper.wait();
    outcome
}

/// The supervisor holds this lock until it has ended.
fn wait_until_gone(far: &Far) -> io::Result<()> {
    let lock = fs::File::open(far.folder.join("state/lock"))?;
    for _ in 0..300 {
        if lock.try_lock_shared().is_ok() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err(io::Error::other("a supervisor does not end"))
}

fn warm(run: &[String], cold: &[f64]) -> io::Result<bool> {
    timed(&mut command(run, "/bin/true"))?;
    let me = std::env::current_exe()?.to_string_lossy().into_owned();
    let (mut raw, mut wrapped) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        raw.push(timed(&mut command(&[], "/bin/true"))?);
        wrapped.push(timed(&mut command(run, "/bin/true"))?);
    }
    let mut inside = command(run, &me);
    let inside = inside.arg("inside").output()?;
    let inside: f64 = String::from_utf8_lossy(&inside.stdout).trim().parse().unwrap_or(f64::NAN);
    let raw = median(raw);
    let (run_adds, shim_adds) = (median(wrapped) - raw, inside - raw);
    let cold_adds = median(cold.to_vec()) - raw;
    let size = fs::metadata(beside("libportcullis_preload.so"))?.len();
    let mut within = true;
    let mut show = |what: &str, value: f64, most: f64, unit: &str| {
        let good = value <= most;
        within &= good;
        row(&format!(
            "{what:34} {value:10.3} {unit} (at most {most}): {}",
            if good { "good" } else { "NOT REACHED" }
        ));
    };
    row(&format!("/bin/true unwrapped {raw:.3} ms"));
    show("a wrapped program's child adds", shim_adds, 3.0, "ms");
    show("portcullis run adds, broker up", run_adds, 3.0, "ms");
    show("portcullis run adds, cold", cold_adds, 30.0, "ms");
    #[expect(clippy::cast_precision_loss, reason = "a file's size is small")]
    show("size of the shim", size as f64, MOST as f64, "bytes");
    Ok(within)
}
