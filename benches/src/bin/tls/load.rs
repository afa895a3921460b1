//! The programs at the two ends: a client that does what it is told on its standard input, and servers. They know
//! nothing of what is between them, and are the same for every system.

use std::{
    collections::HashMap,
    fmt,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    str::FromStr,
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicUsize, Ordering},
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

use crate::{Outcome, answer};

/// Connections at once in `connections`.
const OPENERS: usize = 8;
/// No measurement waits longer for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// No longer are idle connections opened, so that what is slow does not take all the time there is.
const OPENING: Duration = Duration::from_secs(12);
/// Descriptors that a process may need: two for each connection that is idle.
const DESCRIPTORS: u64 = 1 << 16;

/// What stands at the far end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Server {
    /// Reads a length of eight bytes and then so much, and answers one byte: not every system passes on that
    /// a direction has ended.
    Sink,
    /// Sends back what comes.
    Echo,
    /// The same, on a port that it tells each who comes, as an FTP server tells its data port.
    Data,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sink => "sink",
            Self::Echo => "echo",
            Self::Data => "data",
        })
    }
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = [Self::Sink, Self::Echo, Self::Data].into_iter().find(|it| it.to_string() == text);
        found.ok_or_else(|| format!("no server `{text}`"))
    }
}

/// Lets every process of the bench have as many descriptors as it needs, if that is allowed; how many it may have.
pub(crate) fn raise_limit() -> Outcome<usize> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = most.max(DESCRIPTORS);
    let more = setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted);
    let most = if more.is_ok() { wanted } else { most };
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(usize::try_from(most)?)
}

/// Is a server, until killed.
pub(crate) fn serve(what: &str, at: &str) -> Outcome<()> {
    let what: Server = what.parse()?;
    let listener = listen(at.parse()?)?;
    answer(&format!("{}", listener.local_addr()?.port()))?;
    match what {
        Server::Sink => sink(&listener),
        Server::Echo => echo(&listener)?,
        Server::Data => data(&listener)?,
    }
    Ok(())
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

/// Serves every connection from one thread.
fn echo(listener: &TcpListener) -> io::Result<()> {
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX))?;
    let mut streams: HashMap<u64, TcpStream> = HashMap::new();
    let mut next = 0;
    let mut events = [EpollEvent::empty(); 256];
    let mut room = vec![0; 64 << 10];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE).unwrap_or(0);
        for event in events.iter().take(count) {
            if event.data() == u64::MAX {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, next))?;
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

fn data(listener: &TcpListener) -> Outcome<()> {
    for control in listener.incoming() {
        let mut control = control?;
        let data = listen(SocketAddr::new(control.local_addr()?.ip(), 0))?;
        control.write_all(&data.local_addr()?.port().to_be_bytes())?;
        thread::spawn(move || {
            let _ended = echo(&data);
            drop(control);
        });
    }
    Ok(())
}

/// A listener with a backlog that a burst does not fill.
pub(crate) fn listen(address: SocketAddr) -> Outcome<TcpListener> {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrStorage::from(address))?;
    nix::sys::socket::listen(&socket, Backlog::new(4096)?)?;
    Ok(TcpListener::from(socket))
}

/// A program with the other end of its standard input and output.
pub(crate) struct Program {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Program {
    pub(crate) fn start(mut command: Command) -> Outcome<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (to, from) = child.stdin.take().zip(child.stdout.take()).ok_or("no pipes")?;
        Ok(Self { child, to, from: BufReader::new(from) })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it says next.
    pub(crate) fn hear(&mut self) -> Outcome<Vec<f64>> {
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        let numbers: Result<Vec<f64>, _> = line.split_whitespace().map(str::parse).collect();
        numbers.ok().filter(|it| !it.is_empty()).ok_or_else(|| format!("it said `{}`", line.trim()).into())
    }

    /// Has it do something; the numbers that it came to.
    pub(crate) fn ask<const N: usize>(&mut self, what: &str) -> Outcome<[f64; N]> {
        writeln!(self.to, "{what}")?;
        let said = self.hear()?;
        said.try_into().map_err(|said| format!("`{what}`: it said {said:?}").into())
    }
}

impl Program {
    pub(crate) fn end(&mut self) {
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.end();
    }
}

/// The client: what it has opened, and where it opens more.
struct Client {
    to: SocketAddr,
    opened: AtomicUsize,
    held: Vec<TcpStream>,
}

/// Is the client: obeys its standard input, line by line.
pub(crate) fn obey(to: &str) -> Outcome<()> {
    let mut client = Client { to: to.parse()?, opened: AtomicUsize::new(0), held: Vec::new() };
    for line in io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let (word, number) = (words.next().unwrap_or_default(), words.next().unwrap_or("0"));
        let said = match word {
            "stream" => client.stream(number.parse()?)?,
            "connections" => client.connections(client.to, number.parse()?)?,
            "related" => client.related(number.parse()?)?,
            "pingpong" => client.pingpong(number.parse()?)?,
            "idle" => client.idle(number.parse()?)?,
            "busy" => client.busy(number.parse()?)?,
            "drop" => {
                client.held.clear();
                format!("{}", client.opened.load(Ordering::Relaxed))
            }
            "hello" => "1".to_owned(),
            _ => return Err(format!("what is `{line}`?").into()),
        };
        answer(&said)?;
    }
    Ok(())
}

impl Client {
    fn open(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(to)?;
        self.opened.fetch_add(1, Ordering::Relaxed);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Sends `size` bytes through one connection; MB/s until the far end has them all.
    fn stream(&self, size: usize) -> Outcome<String> {
        let mut stream = self.open(self.to)?;
        let chunk = vec![0x5a; 1 << 20];
        let began = Instant::now();
        let mut left = size;
        stream.write_all(&(size as u64).to_be_bytes())?;
        while left > 0 {
            let piece = chunk.get(..left.min(chunk.len())).unwrap_or_default();
            stream.write_all(piece)?;
            left -= piece.len();
        }
        stream.read_exact(&mut [0])?;
        let bytes = u32::try_from(size >> 10)?;
        Ok(format!("{}", f64::from(bytes) * 1024.0 / 1e6 / began.elapsed().as_secs_f64()))
    }

    /// Opens, echoes one byte, closes, over and over; how many, and seconds.
    fn connections(&self, to: SocketAddr, seconds: f64) -> Outcome<String> {
        let stop = AtomicBool::new(false);
        let count = AtomicUsize::new(0);
        let began = Instant::now();
        let failed = thread::scope(|scope| {
            let openers: Vec<_> = (0..OPENERS)
                .map(|_| {
                    scope.spawn(|| -> io::Result<()> {
                        while !stop.load(Ordering::Relaxed) {
                            let mut stream = self.open(to)?;
                            stream.write_all(b"x")?;
                            stream.read_exact(&mut [0])?;
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
            None => Ok(format!("{} {}", count.into_inner(), began.elapsed().as_secs_f64())),
        }
    }

    /// The same to the port that a [`Server::Data`] tells, while the connection lives that was told it.
    fn related(&mut self, seconds: f64) -> Outcome<String> {
        if self.held.is_empty() {
            self.held.push(self.open(self.to)?);
            let mut port = [0; 2];
            self.held.last_mut().ok_or("no control connection")?.read_exact(&mut port)?;
            self.to.set_port(u16::from_be_bytes(port));
        }
        self.connections(self.to, seconds)
    }

    /// Median microseconds of a round trip of 64 bytes.
    fn pingpong(&self, rounds: usize) -> Outcome<String> {
        let mut stream = self.open(self.to)?;
        let mut message = [7; 64];
        let mut times = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            let began = Instant::now();
            stream.write_all(&message)?;
            stream.read_exact(&mut message)?;
            times.push(began.elapsed().as_secs_f64() * 1e6);
        }
        Ok(format!("{}", portcullis_benches::median(times)))
    }

    /// Holds `count` connections more, or as many as there is time for, which have carried one byte and then nothing. How
    /// many it holds.
    fn idle(&mut self, count: usize) -> Outcome<String> {
        let share = |at: usize| count * (at + 1) / OPENERS - count * at / OPENERS;
        let until = Instant::now() + OPENING;
        let open = |_| {
            let mut stream = self.open(self.to)?;
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
            Ok(stream)
        };
        let held: Vec<io::Result<Vec<TcpStream>>> = thread::scope(|scope| {
            let some = |at| (0..share(at)).take_while(|_| Instant::now() < until).map(open).collect();
            let openers: Vec<_> = (0..OPENERS).map(|at| scope.spawn(move || some(at))).collect();
            openers.into_iter().filter_map(|opener| opener.join().ok()).collect()
        });
        for held in held {
            self.held.extend(held?);
        }
        thread::sleep(Duration::from_millis(300));
        Ok(format!("{}", self.held.len()))
    }

    /// Echoes 64 KiB in pieces of 4 KiB on `count` connections at once; milliseconds of the slowest piece.
    fn busy(&self, count: usize) -> Outcome<String> {
        let streams: io::Result<Vec<_>> = (0..count).map(|_| self.open(self.to)).collect();
        let begin = Arc::new(Barrier::new(count));
        let threads: Vec<_> = streams?
            .into_iter()
            .map(|mut stream| {
                let begin = Arc::clone(&begin);
                thread::Builder::new().stack_size(64 << 10).spawn(move || -> io::Result<f64> {
                    let mut piece = [3; 4096];
                    let mut slowest = 0.0_f64;
                    begin.wait();
                    for _ in 0..16 {
                        let began = Instant::now();
                        stream.write_all(&piece)?;
                        stream.read_exact(&mut piece)?;
                        slowest = slowest.max(began.elapsed().as_secs_f64());
                    }
                    Ok(slowest)
                })
            })
            .collect::<Result<_, _>>()?;
        let mut slowest = 0.0_f64;
        for thread in threads {
            slowest = slowest.max(thread.join().map_err(|_| "a thread of the load panicked")??);
        }
        Ok(format!("{}", slowest * 1e3))
    }
}

/// An address that nobody listens on.
pub(crate) fn free(at: Ipv4Addr) -> Outcome<SocketAddr> {
    Ok(TcpListener::bind((at, 0))?.local_addr()?)
}
