//! What is sent through a pair, and what receives it.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
    },
};

use portcullis_benches::net::Far;

use crate::{Outcome, keyd::Broker};

/// Connections at once in `connections`.
const OPENERS: usize = 8;
/// No measurement waits longer for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What stands behind a pair.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Server {
    /// Reads a length of eight bytes and then so much, and answers one byte: not every system passes on that
    /// a direction has ended.
    Sink,
    /// Sends back what comes.
    Echo,
}

/// Servers behind the pairs, as threads of this process, at the far end.
pub(crate) struct Backends {
    pub(crate) far: Far,
}

/// Where a pair is entered.
#[derive(Clone)]
pub(crate) enum Entry {
    /// In plain.
    Plain(SocketAddr),
    /// As a wrapped program does; what belongs to a control association names it.
    Keyd(Arc<Broker>, SocketAddr, Option<u64>),
}

impl Backends {
    pub(crate) fn start() -> Outcome<Self> {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        Ok(Self { far: Far::new("tls")? })
    }

    /// Does something in the far network namespace.
    pub(crate) fn at_far<T: Send>(&self, act: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
        let namespace = self.far.namespace()?;
        let done = thread::scope(|scope| {
            let there = scope.spawn(move || -> Result<T, String> {
                nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)
                    .map_err(|e| e.to_string())?;
                act().map_err(|e| e.to_string())
            });
            there.join().map_err(|_| "a thread at the far end panicked".to_owned())?
        });
        Ok(done?)
    }

    /// Starts a server; the result is its listener.
    pub(crate) fn serve(&self, what: Server, at: Ipv4Addr) -> Outcome<TcpListener> {
        let listener = self.at_far(move || listen(SocketAddr::new(at.into(), 0)))?;
        let serves = listener.try_clone()?;
        thread::spawn(move || match what {
            Server::Sink => sink(&serves),
            Server::Echo => echo(&serves).unwrap_or_default(),
        });
        Ok(listener)
    }
}

fn sink(listener: &TcpListener) {
    for mut stream in listener.incoming().flatten() {
        thread::spawn(move || {
            let mut room = vec![0; 1 << 20];
            let mut size = [0; 8];
            if stream.read_exact(&mut size).is_err() {
                return;
            }
            let mut left = u64::from_be_bytes(size);
            while left > 0 {
                match stream.read(&mut room) {
                    Ok(count) if count > 0 => left = left.saturating_sub(count as u64),
                    _ => return,
                }
            }
            let _gone = stream.write_all(b"!");
        });
    }
}

/// How many descriptors a process may have.
pub(crate) fn descriptors() -> Outcome<usize> {
    Ok(usize::try_from(getrlimit(Resource::RLIMIT_NOFILE)?.0)?)
}

/// Serves every connection from one thread.
fn echo(listener: &TcpListener) -> Option<()> {
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
    let epoll = Epoll::new(EpollCreateFlags::empty()).ok()?;
    epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX)).ok()?;
    let mut streams: std::collections::HashMap<u64, TcpStream> = std::collections::HashMap::new();
    let mut next = 0;
    let mut events = [EpollEvent::empty(); 256];
    let mut room = vec![0; 64 << 10];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE).unwrap_or(0);
        for event in events.iter().take(count) {
            if event.data() == u64::MAX {
                let (stream, _) = listener.accept().ok()?;
                stream.set_nodelay(true).ok()?;
                epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, next)).ok()?;
                streams.insert(next, stream);
                next += 1;
            } else if let Some(stream) = streams.get_mut(&event.data()) {
                let done = match stream.read(&mut room) {
                    Ok(0) | Err(_) => true,
                    Ok(count) => stream.write_all(room.get(..count).unwrap_or_default()).is_err(),
                };
                if done {
                    streams.remove(&event.data());
                }
            }
        }
    }
}

/// A listener with a backlog that a burst does not fill.
pub(crate) fn listen(address: SocketAddr) -> Outcome<TcpListener> {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrStorage::from(address))?;
    nix::sys::socket::listen(&socket, Backlog::new(4096)?)?;
    Ok(TcpListener::from(socket))
}

pub(crate) fn open(to: &Entry) -> Outcome<TcpStream> {
    let stream = match to {
        Entry::Plain(address) => TcpStream::connect(address)?,
        Entry::Keyd(broker, address, control) => broker.open(*address, *control)?,
    };
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends `size` bytes through one connection; bytes and seconds until the far end has them all.
pub(crate) fn stream(to: &Entry, size: usize) -> Outcome<(f64, f64)> {
    let mut stream = open(to)?;
    let chunk = vec![0x5a; 1 << 20];
    let began = Instant::now();
    let mut sent = 0;
    stream.write_all(&(size as u64).to_be_bytes())?;
    while sent < size {
        stream.write_all(&chunk)?;
        sent += chunk.len();
    }
    stream.read_exact(&mut [0])?;
    let bytes = u32::try_from(sent >> 10)?;
    Ok((f64::from(bytes) * 1024.0, began.elapsed().as_secs_f64()))
}

/// Opens, echoes one byte, closes, over and over; how many, and seconds.
pub(crate) fn connections(to: &Entry, seconds: f64) -> Outcome<(f64, f64)> {
    let stop = AtomicBool::new(false);
    let count = AtomicU32::new(0);
    let began = Instant::now();
    let failed = thread::scope(|scope| {
        let openers: Vec<_> = (0..OPENERS)
            .map(|_| {
                scope.spawn(|| -> Result<(), String> {
                    while !stop.load(Ordering::Relaxed) {
                        let mut stream = open(to).map_err(|e| e.to_string())?;
                        stream.write_all(b"x").map_err(|e| e.to_string())?;
                        stream.read_exact(&mut [0]).map_err(|e| e.to_string())?;
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        thread::sleep(Duration::from_secs_f64(seconds));
        stop.store(true, Ordering::Relaxed);
        openers.into_iter().filter_map(|opener| opener.join().ok()).find_map(Result::err)
    });
    match failed {
        Some(error) => Err(error.into()),
        None => Ok((f64::from(count.into_inner()), began.elapsed().as_secs_f64())),
    }
}

/// Median microseconds of a round trip of 64 bytes.
pub(crate) fn pingpong(to: &Entry, rounds: usize) -> Outcome<f64> {
    let mut stream = open(to)?;
    let mut message = [7; 64];
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let began = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    Ok(times.get(rounds / 2).map_or(0.0, |time| time.as_secs_f64() * 1e6))
}

/// Opens `count` connections that have carried one byte and then nothing.
pub(crate) fn idle(to: &Entry, count: usize) -> Outcome<Vec<TcpStream>> {
    let mut held = Vec::with_capacity(count);
    for _ in 0..count {
        let mut stream = open(to)?;
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
        held.push(stream);
    }
    thread::sleep(Duration::from_millis(200));
    Ok(held)
}

/// Echoes 64 KiB in pieces of 4 KiB on `count` connections at once; milliseconds of the slowest piece.
pub(crate) fn busy(to: &Entry, count: usize) -> Outcome<f64> {
    let mut streams = Vec::with_capacity(count);
    for _ in 0..count {
        streams.push(open(to)?);
    }
    let begin = Arc::new(Barrier::new(count));
    let threads: Vec<_> = streams
        .into_iter()
        .map(|mut stream| {
            let begin = Arc::clone(&begin);
            thread::Builder::new().stack_size(64 << 10).spawn(move || -> io::Result<Duration> {
                let mut piece = [3; 4096];
                let mut slowest = Duration::ZERO;
                begin.wait();
                for _ in 0..16 {
                    let began = Instant::now();
                    stream.write_all(&piece)?;
                    stream.read_exact(&mut piece)?;
                    slowest = slowest.max(began.elapsed());
                }
                Ok(slowest)
            })
        })
        .collect::<Result<_, _>>()?;
    let mut slowest = Duration::ZERO;
    for thread in threads {
        slowest = slowest.max(thread.join().map_err(|_| "a thread of the load panicked")??);
    }
    Ok(slowest.as_secs_f64() * 1e3)
}
