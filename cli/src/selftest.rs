//! `portcullis selftest`: tries the ways out, live, in a network namespace of its own, twice: under a policy that
//! refuses them, and under one that permits everything, so that each refusal has its control.

mod ways;

use std::{
    fs, io,
    io::Read,
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    os::{fd::AsRawFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
    unistd::geteuid,
};
use serde::Serialize;

use self::ways::{Aim, Proof, WAYS};
use crate::{
    COULD_NOT, Format,
    output::{Ink, Out},
    sys,
};

/// Options of `portcullis selftest`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// How to print the table
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Be the wrapped program that tries: first port, outside process, its descriptor, an inherited one
    #[arg(long, hide = true, num_args = 4)]
    inside: Option<Vec<i32>>,
    /// Be the program that one way becomes: connect to this port
    #[arg(long, hide = true)]
    way: Option<u16>,
}

/// First port; each way has the next. What both policies permit is the one before.
const FIRST: u16 = 7100;
/// Where to look for ports that are free, in a network that others use too.
const RANGES: usize = 40;
/// How long all ways together may take under one policy.
const PATIENCE: Duration = Duration::from_secs(60);

/// What came of one way.
#[derive(Debug, Serialize)]
struct Row {
    way: &'static str,
    /// It got out although the policy refuses it.
    out: bool,
    /// What refused it: `guard`, `shim`, `backstop`; `None` if nothing is on record.
    refused_by: Option<String>,
    /// It works where the policy permits it.
    control: bool,
    /// It should.
    opens: bool,
}

impl Row {
    /// Whether this is as it should be: it did not get out, and that proves something.
    const fn is_held(&self) -> bool {
        !self.out && (self.control || !self.opens)
    }
}

/// Runs the test, or is one of its programs.
pub fn run(args: &Args, out: &mut Out) -> u8 {
    if let Some(port) = args.way {
        let aim = Aim { port, open: 0, outside: 0, flow: -1, made: -1 };
        return u8::from(!ways::raw_connect(&aim));
    }
    if let Some(inside) = &args.inside {
        let [first, outside, flow, made] = *inside.as_slice() else { return COULD_NOT };
        let first = u16::try_from(first).unwrap_or(FIRST);
        let aim = Aim { port: first, open: first.saturating_sub(1), outside, flow, made };
        for way in ways::try_all(first, &aim) {
            out.line(way.to_string());
        }
        return 0;
    }
    match table() {
        Ok(rows) => print(&rows, args.format, out),
        Err(error) => {
            out.note(format!("error: the selftest could not be made: {error}"));
            COULD_NOT
        }
    }
}

fn print(rows: &[Row], format: Format, out: &mut Out) -> u8 {
    let bad = rows.iter().filter(|r| !r.is_held()).count();
    match format {
        Format::Json => rows.iter().for_each(|row| out.json(row)),
        Format::Text => {
            out.line(format!("{:<42} {:<10} {:<10} {}", "WAY OUT", "REFUSED", "BY", "PERMITTED"));
            for row in rows {
                let (word, ink) = match (row.out, row.is_held()) {
                    (true, _) => ("GOT OUT", Ink::Bad),
                    (false, true) => ("held", Ink::Good),
                    (false, false) => ("unproven", Ink::Note),
                };
                let word = out.ink(ink, &format!("{word:<10}"));
                let by = row.refused_by.as_deref().unwrap_or("kernel");
                let control = match (row.control, row.opens) {
                    (true, _) => "works",
                    (false, false) => "closed by design",
                    (false, true) => "does not work",
                };
                out.line(format!("{:<42} {word} {by:<10} {control}", row.way));
            }
            match bad {
                0 => out.line(format!("{} ways tried, all held", rows.len())),
                n => out.line(format!("{} ways tried, {n} not held", rows.len())),
            }
        }
    }
    u8::from(bad > 0)
}

/// Tries everything under both policies.
fn table() -> io::Result<Vec<Row>> {
    let root = geteuid().is_root();
    if root {
        unshare(CloneFlags::CLONE_NEWNET)?;
        sys::loopback_up()?;
        // Packets that come from below carry no route, and loopback addresses on them are martian otherwise.
        for switch in ["route_localnet", "accept_local"] {
            fs::write(format!("/proc/sys/net/ipv4/conf/all/{switch}"), "1")?;
        }
    }
    // An ordinary user stays in the network that there is.
    let width = u16::try_from(WAYS.len()).unwrap_or(0) + 1;
    let ranges = (FIRST..).step_by(width.into()).take(if root { 1 } else { RANGES });
    let free = |first: &u16| (first - 1..first - 1 + width).all(|port| Door::open(port).is_ok());
    let first = ranges.into_iter().find(free).ok_or_else(|| io::Error::other("no free ports"))?;
    let open = first - 1;
    let folder = std::env::temp_dir().join(format!("portcullis-selftest-{}", std::process::id()));
    fs::DirBuilder::new().mode(0o711).create(&folder)?;
    let done = (|| {
        let some = format!("service open = tcp/{open}, udp/{open};\nallow open(*, *);\n");
        let refused = Trial::run(&folder.join("refuse"), &some, first)?;
        let permitted = Trial::run(&folder.join("permit"), "allow *(*, *);\n", first)?;
        let rows = WAYS.iter().enumerate().map(|(n, way)| Row {
            way: way.name,
            out: refused.got_out(n, way.proof),
            refused_by: refused.refused_by.get(n).cloned().flatten(),
            control: permitted.got_out(n, way.proof),
            opens: way.opens.here(root),
        });
        Ok(rows.collect())
    })();
    let _left = fs::remove_dir_all(&folder);
    done
}

/// All ways under one policy.
struct Trial {
    arrived: Vec<bool>,
    said: Vec<usize>,
    refused_by: Vec<Option<String>>,
}

impl Trial {
    fn got_out(&self, way: usize, proof: Proof) -> bool {
        match proof {
            Proof::Arrival => self.arrived.get(way).copied().unwrap_or(true),
            Proof::Word => self.said.contains(&way),
        }
    }

    fn run(state: &Path, policy: &str, first: u16) -> io::Result<Self> {
        fs::DirBuilder::new().mode(0o711).create(state)?;
        let file = state.join("policy.pol");
        fs::write(&file, policy)?;
        let ports: Vec<u16> = (first..).take(WAYS.len()).collect();
        let mut doors = ports.iter().map(|port| Door::open(*port)).collect::<io::Result<Vec<_>>>()?;
        let mut open = Door::open(first - 1)?;
        // A flow of ours that somebody may want to take.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let ours = TcpStream::connect(port.local_addr()?)?;
        let (mut far, _) = port.accept()?;
        far.set_nonblocking(true)?;
        let exe = std::env::current_exe()?;
        let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None)?;
        let numbers =
            [i32::from(first), std::process::id().cast_signed(), ours.as_raw_fd(), made.as_raw_fd()];
        let mut child = Command::new(&exe)
            .arg("run")
            .args([
                "--policy".as_ref(),
                file.as_os_str(),
                "--state".as_ref(),
                state.as_os_str(),
                "--".as_ref(),
            ])
            .arg(&exe)
            .args(["selftest", "--inside"])
            .args(numbers.map(|n| n.to_string()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            open.look();
            doors.iter_mut().for_each(Door::look);
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                child.kill()?;
                child.wait()?;
                return Err(io::Error::other("the ways were not tried in time"));
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        if !status.success() {
            return Err(io::Error::other(format!("the wrapped program ended with {status}")));
        }
        let mut text = String::new();
        if let Some(mut stdout) = child.stdout.take() {
            stdout.read_to_string(&mut text)?;
        }
        std::thread::sleep(Duration::from_millis(50)); // what is under way on loopback
        doors.iter_mut().for_each(Door::look);
        let taken = far.read(&mut [0; 1]).is_ok_and(|n| n > 0);
        let stolen = WAYS.iter().position(|w| w.name == "descriptor taken from outside");
        let arrived =
            doors.iter().enumerate().map(|(n, d)| d.reached || (taken && Some(n) == stolen)).collect();
        wait_for_end(state, deadline);
        let refused_by = ports.iter().map(|port| on_record(state, *port)).collect();
        Ok(Self { arrived, said: text.lines().filter_map(|l| l.parse().ok()).collect(), refused_by })
    }
}

/// What a way leads to.
struct Door {
    tcp: TcpListener,
    udp: UdpSocket,
    reached: bool,
}

impl Door {
    fn open(port: u16) -> io::Result<Self> {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, port))?;
        tcp.set_nonblocking(true)?;
        udp.set_nonblocking(true)?;
        Ok(Self { tcp, udp, reached: false })
    }

    fn look(&mut self) {
        while self.tcp.accept().is_ok() {
            self.reached = true;
        }
        while self.udp.recv(&mut [0; 64]).is_ok() {
            self.reached = true;
        }
    }
}

/// Waits until the broker has written its last record.
fn wait_for_end(state: &Path, deadline: Instant) {
    let ended = || records(state).any(|r| r.get("reason").is_some_and(|w| w == "the broker ends"));
    while !ended() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn records(state: &Path) -> impl Iterator<Item = serde_json::Value> {
    let files: Vec<PathBuf> = fs::read_dir(state.join("audit"))
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "jsonl"))
        .collect();
    let text: Vec<String> = files.iter().filter_map(|path| fs::read_to_string(path).ok()).collect();
    let lines: Vec<String> = text.iter().flat_map(|t| t.lines().map(str::to_owned)).collect();
    lines.into_iter().filter_map(|line| serde_json::from_str(&line).ok())
}

/// What refused a call to this port, as the audit log has it.
fn on_record(state: &Path, port: u16) -> Option<String> {
    let far = format!("127.0.0.1:{port}");
    records(state).find_map(|r| {
        let refused = r.get("verdict")? == "refuse" && r.get("remote")?.as_str()? == far;
        refused.then(|| r.get("via").and_then(|v| v.as_str()).map(str::to_owned))?
    })
}
