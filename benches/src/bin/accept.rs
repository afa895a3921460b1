//! accept: what a permitted accept(2) from another host costs: rate of connections served one after the other.
//!
//! The servers take turns; one client at the far end connects to whichever has it.

use std::{
    ffi::CString,
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Command, ExitCode},
    time::Instant,
};

use portcullis_benches::{
    libwrap::Libwrap,
    net::Far,
    row,
    turns::{Turn, answer},
};

const BATCH: usize = 200;
const TURNS: usize = 60;
const RULES: usize = 1000;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["server", port] => server(port, None).map(|()| true),
        ["libwrap", port] => libwrap(port).map(|()| true),
        ["client", ports @ ..] => client(ports).map(|()| true),
        _ => bench(),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            row(&format!("accept: {error}"));
            ExitCode::from(2)
        }
    }
}

/// As a server that tcpd's library is linked into: each connection is looked up after accept.
fn libwrap(port: &str) -> io::Result<()> {
    let libwrap = Libwrap::new().ok_or_else(|| io::Error::other("not installed (libwrap0)"))?;
    libwrap.load(RULES, "bench: 10.76.0.0/255.255.255.0\n")?;
    server(port, Some(&libwrap))
}

/// Waits until a connection has arrived, and then takes the time of accept alone.
fn server(port: &str, libwrap: Option<&Libwrap>) -> io::Result<()> {
    let port = port.parse().map_err(io::Error::other)?;
    let listener = TcpListener::bind(SocketAddr::from((Far::NEAR, port)))?;
    use std::os::fd::AsFd;
    answer(|_| {
        let mut ready = [nix::poll::PollFd::new(listener.as_fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut ready, nix::poll::PollTimeout::NONE)?;
        let began = Instant::now();
        let (stream, from) = listener.accept()?;
        if let Some(libwrap) = libwrap {
            let address = CString::new(from.ip().to_string())?;
            if !libwrap.permits(c"bench", &address) {
                return Err(io::Error::other("libwrap refused it"));
            }
        }
        let took = began.elapsed();
        drop(stream);
        #[expect(clippy::cast_precision_loss, reason = "nanoseconds of one call")]
        Ok(took.as_nanos() as f64)
    })
}

/// At the far end, one thread per server: keeps a few connections waiting in its backlog.
fn client(ports: &[&str]) -> io::Result<()> {
    std::thread::scope(|scope| {
        for port in ports {
            let port: u16 = port.parse().map_err(io::Error::other)?;
            scope.spawn(move || {
                loop {
                    match TcpStream::connect(SocketAddr::from((Far::NEAR, port))) {
                        // Returns when the server has closed, so few wait at a time.
                        Ok(stream) => drop(stream.peek(&mut [0])),
                        Err(_) => std::thread::sleep(std::time::Duration::from_millis(5)),
                    }
                }
            });
        }
        Ok(())
    })
}

fn bench() -> io::Result<bool> {
    let mut far = Far::new("accept")?;
    let policy = far.policy(RULES)?;
    let me = std::env::current_exe()?;
    let mut pushing = far.command(&me);
    pushing.args(["client", "7001", "7002", "7003"]);
    far.serve(pushing)?;
    let plain = |port: &str| {
        let mut command = Command::new(&me);
        command.args(["server", port]);
        command
    };
    let run = far.run(&policy);
    let Some((first, rest)) = run.split_first() else { return Err(io::Error::other("no command")) };
    let mut wrapped = Command::new(first);
    wrapped.args(rest).arg(&me).args(["server", "7002"]);
    let mut raw = Turn::start("raw", plain("7001"))?;
    let mut wrapped = Turn::start("portcullis", wrapped)?;
    let mut linked = Command::new(&me);
    linked.args(["libwrap", "7003"]);
    let mut linked =
        Turn::start("libwrap", linked).inspect_err(|error| row(&format!("libwrap: {error}"))).ok();
    for turn in 0..TURNS {
        let (one, other) = if turn % 2 == 0 { (&mut raw, &mut wrapped) } else { (&mut wrapped, &mut raw) };
        one.take(BATCH)?;
        other.take(BATCH)?;
        if let Some(linked) = &mut linked {
            linked.take(BATCH)?;
        }
    }
    for turn in [&raw, &wrapped].into_iter().chain(&linked) {
        let ratio = turn.ratio(&raw);
        row(&format!("{:12} {:8.2} us  {:9.0} /s  {ratio:.3} of raw", turn.name, turn.micros(), turn.rate()));
    }
    let (more, ratio, calls) = (wrapped.micros() - raw.micros(), wrapped.ratio(&raw), wrapped.rounds);
    let good = ratio >= 0.93 && more <= 1.0;
    let word = |good| if good { "good" } else { "NOT REACHED" };
    row(&format!("{more:+.2} us (at most 1), {ratio:.3} of raw (at least 0.93): {}", word(good)));
    [raw, wrapped].into_iter().chain(linked).for_each(Turn::end);
    let count = || far.records(&["\"op\":\"accept\"", "\"verdict\":\"permit\""]);
    for _ in 0..50 {
        if count() >= calls {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(40));
    }
    let records = count();
    row(&format!("{calls} calls, {records} records: {}", word(records == calls)));
    Ok(good && records == calls)
}
