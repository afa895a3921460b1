//! What the kernel backstop costs: the same work in a process that is held and in one that is not,
//! interleaved in one run. The ratio is the median over pairs of neighbouring rounds. Needs root.
//!
//! Every permitted call of the held process is on record; the number of records is checked.
#![expect(unsafe_code, reason = "raw socket calls, as a program makes them")]

use std::{
    error::Error,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::{fd::AsRawFd, unix::net::UnixStream},
    process,
    time::{Duration, Instant},
};

use nix::unistd::{ForkResult, fork};
use portcullis_backstop::{Backstop, Cgroup, Region, load};
use portcullis_types::{Op, Protocol, RuleId};

const ROUNDS: usize = 300;

/// One kind of work: how often per round, and what.
struct Work {
    name: &'static str,
    calls: u32,
    /// Records per call in the held process.
    records: u64,
    once: fn(&Ends) -> io::Result<()>,
    /// What the issue asks for.
    goal: f64,
}

struct Ends {
    tcp: SocketAddrV4,
    udp: SocketAddrV4,
    out: UdpSocket,
    echo: TcpStream,
}

const WORKS: [Work; 4] = [
    Work { name: "connect + close", calls: 50, records: 1, once: connect_close, goal: 0.95 },
    Work { name: "sendto with an address", calls: 500, records: 0, once: send_to, goal: 0.99 },
    Work { name: "ping-pong of one byte, TCP", calls: 100, records: 0, once: ping_pong, goal: 0.99 },
    Work { name: "64 KB over TCP", calls: 50, records: 0, once: bulk, goal: 0.99 },
];

fn connect_close(ends: &Ends) -> io::Result<()> {
    let to = libc::sockaddr_in {
        sin_family: 2, // AF_INET
        sin_port: ends.tcp.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*ends.tcp.ip()).to_be() },
        sin_zero: [0; 8],
    };
    let linger = libc::linger { l_onoff: 1, l_linger: 0 }; // no TIME_WAIT, so that ports do not run out
    // SAFETY: a fresh descriptor, a live option and a live address with their sizes.
    let done = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), 8);
        let done = libc::connect(fd, (&raw const to).cast(), 16);
        libc::close(fd);
        done
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn send_to(ends: &Ends) -> io::Result<()> {
    match ends.out.send_to(b"x", ends.udp) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other.map(drop),
    }
}

fn ping_pong(ends: &Ends) -> io::Result<()> {
    let mut byte = [1];
    (&ends.echo).write_all(&byte)?;
    (&ends.echo).read_exact(&mut byte)
}

fn bulk(ends: &Ends) -> io::Result<()> {
    // The far end echoes single bytes only; a first byte of 0 announces a block to be swallowed.
    let block = [0u8; 65536];
    (&ends.echo).write_all(&block)?;
    let mut byte = [0];
    (&ends.echo).read_exact(&mut byte)
}

/// Does what one byte over the pipe names, and answers with the nanoseconds it took.
fn worker(mut orders: UnixStream, ends: &Ends) -> io::Result<()> {
    let mut order = [0];
    while orders.read_exact(&mut order).is_ok() {
        let [index] = order;
        let Some(work) = WORKS.get(usize::from(index)) else { break };
        let begun = Instant::now();
        for _ in 0..work.calls {
            (work.once)(ends)?;
        }
        let took = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        orders.write_all(&took.to_ne_bytes())?;
    }
    Ok(())
}

/// Accepts and closes; echoes on the flows that begin with a byte.
fn serve(listener: &TcpListener, echo: &TcpListener) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while let Ok((flow, _)) = echo.accept() {
                scope.spawn(move || answer(flow));
            }
        });
        while let Ok((flow, _)) = listener.accept() {
            drop(flow);
        }
    });
}

fn answer(mut flow: TcpStream) {
    let mut buffer = vec![0; 65536];
    let mut owed = 0usize;
    while let Ok(got) = flow.read(&mut buffer) {
        let Some(first) = buffer.first().filter(|_| got > 0) else { return };
        if owed == 0 && *first == 1 {
            let _ = flow.write_all(&[1]);
            continue;
        }
        owed = if owed == 0 { 65536 } else { owed };
        owed = owed.saturating_sub(got);
        if owed == 0 {
            let _ = flow.write_all(&[1]);
        }
    }
}

fn start(
    held_by: Option<&Cgroup>,
    tcp: SocketAddrV4,
    udp: SocketAddrV4,
    echo: SocketAddrV4,
) -> io::Result<(u32, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(ours);
            on_core(0)?;
            let mut go = [0];
            let run = || -> io::Result<()> {
                (&theirs).read_exact(&mut go)?;
                let out = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
                out.set_nonblocking(true)?;
                let echo = TcpStream::connect(echo)?;
                echo.set_nodelay(true)?;
                worker(theirs, &Ends { tcp, udp, out, echo })
            };
            let status = match run() {
                Ok(()) => 0,
                Err(error) => {
                    let _ = writeln!(io::stderr(), "worker: {error}");
                    1
                }
            };
            process::exit(status)
        }
        ForkResult::Parent { child } => {
            let pid = child.as_raw().cast_unsigned();
            if let Some(cgroup) = held_by {
                cgroup.enter(pid).map_err(io::Error::other)?;
            }
            Ok((pid, ours))
        }
    }
}

fn order(to: &mut UnixStream, work: u8) -> io::Result<u64> {
    to.write_all(&[work])?;
    let mut took = [0; 8];
    to.read_exact(&mut took)?;
    Ok(u64::from_ne_bytes(took))
}

/// Client and server each keep to one core, so that the scheduler's choices are not what is measured.
fn on_core(core: usize) -> io::Result<()> {
    let cores = std::thread::available_parallelism()?.get();
    let mut set = nix::sched::CpuSet::new();
    set.set(core % cores)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?;
    Ok(())
}

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

fn v4(addr: SocketAddr) -> Result<SocketAddrV4, Box<dyn Error>> {
    match addr {
        SocketAddr::V4(addr) => Ok(addr),
        SocketAddr::V6(_) => Err("bound to v6".into()),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    // SAFETY: takes numbers only. A server that is not scheduled for a moment must not drop a SYN.
    unsafe { libc::listen(listener.as_raw_fd(), 4096) };
    let echo = TcpListener::bind("127.0.0.1:0")?;
    let swallow = UdpSocket::bind("127.0.0.1:0")?;
    let (tcp, udp, echo_at) =
        (v4(listener.local_addr()?)?, v4(swallow.local_addr()?)?, v4(echo.local_addr()?)?);
    // SAFETY: this process has one thread.
    let server = match unsafe { fork() }? {
        ForkResult::Child => {
            on_core(1)?;
            serve(&listener, &echo);
            process::exit(0)
        }
        ForkResult::Parent { child } => child,
    };
    let (raw_pid, mut raw) = start(None, tcp, udp, echo_at)?;
    let (mut backstop, attacher) = load()?;
    let cgroup = Cgroup::below(process::id(), &format!("pcl-bench-{}", process::id()))?;
    attacher.attach(&cgroup)?;
    let (held_pid, mut held) = start(Some(&cgroup), tcp, udp, echo_at)?;
    let done = measure(&mut backstop, (held_pid, &mut held), &mut raw, [tcp, udp, echo_at]);
    drop((raw, held));
    for pid in [raw_pid, held_pid] {
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid.cast_signed()), None);
    }
    let _ = nix::sys::signal::kill(server, nix::sys::signal::Signal::SIGKILL);
    let _ = nix::sys::wait::waitpid(server, None);
    cgroup.remove_if_empty()?;
    done
}

fn measure(
    backstop: &mut Backstop,
    (pid, held): (u32, &mut UnixStream),
    raw: &mut UnixStream,
    [tcp, udp, echo]: [SocketAddrV4; 3],
) -> Result<(), Box<dyn Error>> {
    let holder = backstop.identify(pid)?.ok_or("the worker ended")?;
    let region = |op, protocol, to: SocketAddrV4| Region {
        rule: Some(RuleId(1)),
        prefix: 96 + 24,
        ..Region::host(op, protocol, to.ip().to_ipv6_mapped().to_bits(), &(to.port()..=to.port()))
    };
    backstop.grant(
        holder,
        &[
            region(Op::Connect, Protocol::TCP, tcp),
            region(Op::Connect, Protocol::TCP, echo),
            region(Op::Send, Protocol::UDP, udp),
            Region::everything(Op::Bind, Protocol::UDP),
        ],
    )?;
    held.write_all(b"g")?;
    raw.write_all(b"g")?;
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{:<28} {:>9} {:>9} {:>7} {:>6} {:>9}",
        "", "raw µs", "held µs", "ratio", "goal", "records"
    )?;
    let mut failed = false;
    for (index, work) in (0u8..).zip(&WORKS) {
        let (mut free, mut under) = (Vec::new(), Vec::new());
        let mut records = 0u64;
        order(held, index)?;
        backstop.events.drain(|_| {});
        for round in 0..ROUNDS + 2 {
            // Alternating order, so that neither profits from going second.
            let (a, b) = if round % 2 == 0 {
                let a = order(raw, index)?;
                (a, order(held, index)?)
            } else {
                let b = order(held, index)?;
                (order(raw, index)?, b)
            };
            // What the broker does every few milliseconds.
            records += backstop.events.drain(|_| {}) as u64;
            if round >= 2 {
                free.push(a);
                under.push(b);
            }
        }
        std::thread::sleep(Duration::from_millis(1));
        let mut pairs: Vec<u64> =
            free.iter().zip(&under).map(|(a, b)| a.saturating_mul(1_000_000) / b.max(&1)).collect();
        let ratio = median(&mut pairs) as f64 / 1e6;
        let calls = u64::from(work.calls);
        let wanted = work.records * calls * (ROUNDS as u64 + 2);
        let (free, under) = (median(&mut free) as f64, median(&mut under) as f64);
        let each = 1000.0 * f64::from(work.calls);
        let goal = if work.goal > 0.0 { format!("{:.2}", work.goal) } else { "-".into() };
        let complete = if records == wanted { "complete" } else { "WRONG" };
        failed |= records != wanted;
        writeln!(
            out,
            "{:<28} {:>9.2} {:>9.2} {ratio:>7.3} {goal:>6} {records:>9} {complete}",
            work.name,
            free / each,
            under / each
        )?;
    }
    let stats = backstop.stats()?;
    if failed || stats.unrecorded > 0 {
        return Err(format!("records do not match calls: {stats:?}").into());
    }
    Ok(())
}
