//! connect: what a permitted connect(2) to another host costs, one after the other: connect and close.
//!
//! `known`: one destination again and again. `new`: another address each time. Peers from Debian, where they
//! are installed, only for the first: preloaded libraries that lead each connect(2) through a proxy on this host.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    path::Path,
    process::{Child, Command, ExitCode},
    time::Instant,
};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket, sockopt::Linger,
};
use portcullis_benches::{
    net::Far,
    row, socks,
    turns::{Turn, answer},
};

const PORT: u16 = 7;
/// Where the peers' proxy listens, on this host.
const PROXY: u16 = 7009;
const BATCH: usize = 200;
const TURNS: usize = 60;
const RULES: usize = 1000;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["server"] => server(),
        ["client", kind] => client(kind),
        ["socks"] => socks::serve(PROXY).map(|()| true),
        _ => bench(),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            row(&format!("connect: {error}"));
            ExitCode::from(2)
        }
    }
}

fn server() -> io::Result<bool> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    loop {
        drop(listener.accept());
    }
}

fn client(kind: &str) -> io::Result<bool> {
    let new = kind == "new";
    answer(|n| {
        let [_, _, high, low] = u32::try_from(n % 60_000).unwrap_or(0).to_be_bytes();
        let ip = if new { Ipv4Addr::new(10, 77, low, high) } else { Ipv4Addr::new(10, 77, 1, 1) };
        let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // Leaves no TIME_WAIT behind, which would use up the ports.
        setsockopt(&fd, Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        let to = SockaddrStorage::from(SocketAddr::from((ip, PORT)));
        let began = Instant::now();
        connect(fd.as_raw_fd(), &to)?;
        let took = began.elapsed();
        drop(fd);
        #[expect(clippy::cast_precision_loss, reason = "nanoseconds of one call")]
        Ok(took.as_nanos() as f64)
    })?;
    Ok(true)
}

fn variant(prefix: &[String], kind: &str) -> io::Result<Command> {
    let me = std::env::current_exe()?.to_string_lossy().into_owned();
    let mut words = prefix.to_vec();
    words.extend([me, "client".to_owned(), kind.to_owned()]);
    let Some((first, rest)) = words.split_first() else { return Err(io::Error::other("no command")) };
    let mut command = Command::new(first);
    command.args(rest);
    Ok(command)
}

fn bench() -> io::Result<bool> {
    let mut far = Far::new("connect")?;
    let mut serve = far.command(&std::env::current_exe()?);
    serve.arg("server");
    far.serve(serve)?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    let policy = far.policy(RULES)?;
    let run = far.run(&policy);
    let mut within = true;
    let proxy = Proxy::start()?;
    row(&format!("connect and close, {RULES} rules, {TURNS} turns of {BATCH}"));
    for (kind, least, most) in [("known", 0.93, Some(1.0)), ("new", 0.75, None)] {
        let mut raw = Turn::start("raw", variant(&[], kind)?)?;
        let mut wrapped = Turn::start("portcullis", variant(&run, kind)?)?;
        let mut peers = if kind == "known" { peers(&far, &proxy)? } else { Vec::new() };
        for turn in 0..TURNS {
            // Who goes first changes, so that neither always finds warm caches.
            let (one, other) =
                if turn % 2 == 0 { (&mut raw, &mut wrapped) } else { (&mut wrapped, &mut raw) };
            one.take(BATCH)?;
            other.take(BATCH)?;
            for peer in &mut peers {
                peer.take(BATCH)?;
            }
        }
        for turn in [&raw, &wrapped].into_iter().chain(&peers) {
            row(&format!(
                "{kind:6} {:12} {:8.2} us  {:9.0} /s  {:.3} of raw",
                turn.name,
                turn.micros(),
                turn.rate(),
                turn.ratio(&raw)
            ));
        }
        let more = wrapped.micros() - raw.micros();
        let ratio = wrapped.ratio(&raw);
        let good = ratio >= least && most.is_none_or(|most| more <= most);
        row(&format!("{kind:6} {more:+.2} us, {ratio:.3} of raw (at least {least}): {}", word(good)));
        within &= good;
        let calls = wrapped.rounds;
        let before = if kind == "known" { 0 } else { BATCH * TURNS + 50 };
        [raw, wrapped].into_iter().chain(peers).for_each(Turn::end);
        let records =
            settled(|| far.records(&["\"op\":\"connect\"", "\"verdict\":\"permit\""]), before + calls);
        let good = records == before + calls;
        row(&format!("{kind:6} {} calls, {} records: {}", calls, records.saturating_sub(before), word(good)));
        within &= good;
    }
    Ok(within)
}

/// A count that may still grow for a moment.
fn settled(count: impl Fn() -> usize, expected: usize) -> usize {
    for _ in 0..50 {
        if count() >= expected {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(40));
    }
    count()
}

const fn word(good: bool) -> &'static str {
    if good { "good" } else { "NOT REACHED" }
}

/// The proxy that the peers use; it ends with this.
struct Proxy(Child);

impl Proxy {
    fn start() -> io::Result<Self> {
        let started = Command::new(std::env::current_exe()?).arg("socks").spawn().map(Self)?;
        for _ in 0..100 {
            if TcpStream::connect((Ipv4Addr::LOCALHOST, PROXY)).is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Ok(started)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _dead = self.0.kill();
        let _gone = self.0.wait();
    }
}

fn peers(far: &Far, _proxy: &Proxy) -> io::Result<Vec<Turn>> {
    let config = |name: &str, text: String| {
        let path = far.folder.join(name);
        std::fs::write(&path, text)?;
        io::Result::Ok(path)
    };
    let chains = config(
        "proxychains.conf",
        format!("strict_chain\nquiet_mode\n[ProxyList]\nsocks5 127.0.0.1 {PROXY}\n"),
    )?;
    let tor = config("torsocks.conf", format!("TorAddress 127.0.0.1\nTorPort {PROXY}\n"))?;
    let commands = [
        (
            "proxychains4",
            vec!["proxychains4".to_owned(), "-q".into(), "-f".into(), chains.display().to_string()],
        ),
        ("torsocks", vec!["env".into(), format!("TORSOCKS_CONF_FILE={}", tor.display()), "torsocks".into()]),
    ];
    let mut turns = Vec::new();
    for (name, words) in commands {
        if !Path::new("/usr/bin").join(name).exists() {
            row(&format!("{name}: not installed"));
            continue;
        }
        match variant(&words, "known").and_then(|command| Turn::start(name, command)) {
            Ok(turn) => turns.push(turn),
            Err(error) => row(&format!("{name}: {error}")),
        }
    }
    Ok(turns)
}
