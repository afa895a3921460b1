//! tls: what a pair of relays costs, beside nginx, HAProxy and stunnel with the same certificates.
//!
//! Each variant is a pair, plain to TLS and TLS to plain, all up at once; they take turns. What is measured
//! is what a client and a server at the plain ends see, and the processor time that the pair itself took.

use std::{
    fs, io,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use portcullis_benches::{median, row};
use portcullis_keyd::{
    identity::{Authority, Enrolment, Host, ProcessFacts, Validity, client_config, server_config},
    relay::{Relay, Role},
};

const TURNS: usize = 5;
/// Bytes of one stream.
const STREAM: u64 = 1 << 30;
const NEW_FOR: Duration = Duration::from_millis(1500);
const CLIENTS: usize = 8;
const PINGS: usize = 3000;
const IDLE: usize = 1000;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["pair", folder, near, far, sink] => pair(Path::new(folder), near, far, sink),
        _ => bench(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            row(&format!("tls: {error}"));
            ExitCode::from(2)
        }
    }
}

fn port(text: &str) -> io::Result<SocketAddr> {
    text.parse().map_err(io::Error::other)
}

fn ready(socket: TcpStream) -> io::Result<OwnedFd> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?;
    Ok(socket.into())
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(0)
}

/// Our pair, in a process of its own: one relay each, with process certificates.
fn pair(folder: &Path, near: &str, far: &str, sink: &str) -> io::Result<()> {
    let host = |name: &str| Host::load(&folder.join(name)).map_err(io::Error::other);
    let (h1, h2) = (host("h1")?, host("h2")?);
    let shown = |host: &Host| {
        let facts = ProcessFacts {
            exe: "/usr/bin/bench".to_owned(),
            sha256: "00".repeat(32),
            user: "u".to_owned(),
            unit: None,
        };
        let name = "bench".parse().map_err(io::Error::other)?;
        host.mint(&name, &facts, Validity::process(now())).map(|made| made.shown).map_err(io::Error::other)
    };
    let (mine, theirs) = (shown(&h1)?, shown(&h2)?);
    let (far_at, sink_at) = (port(far)?, port(sink)?);
    let (near, far) = (TcpListener::bind(near)?, TcpListener::bind(far)?);
    let serve =
        move |listener: TcpListener, to: SocketAddr, role: &dyn Fn() -> io::Result<Role>, out: bool| {
            let relay = Relay::new(1, |_| ())?;
            for id in 0.. {
                let (here, there) = (listener.accept()?.0, TcpStream::connect(to)?);
                let (plain, wire) = if out { (here, there) } else { (there, here) };
                let patience = Duration::from_secs(20);
                relay
                    .start(id, ready(wire)?, role()?, Some(ready(plain)?), patience)
                    .map_err(io::Error::other)?;
            }
            io::Result::Ok(())
        };
    thread::spawn(move || {
        // A verifier for each flow, as the key daemon has it.
        let role = || {
            let (verifier, _) = h2.verifier().map_err(io::Error::other)?.for_one(None);
            Ok(Role::Server(Arc::new(server_config(theirs.clone(), verifier).map_err(io::Error::other)?)))
        };
        serve(far, sink_at, &role, false)
    });
    let role = || {
        let (verifier, _) = h1.verifier().map_err(io::Error::other)?.for_one(None);
        Ok(Role::Client(Arc::new(client_config(mine.clone(), verifier).map_err(io::Error::other)?)))
    };
    serve(near, far_at, &role, true)
}

/// One pair of relays under measurement.
struct Variant {
    name: &'static str,
    at: SocketAddr,
    child: Option<Child>,
    streams: Vec<f64>,
    stream_cpu: Vec<f64>,
    news: Vec<f64>,
    new_cpu: Vec<f64>,
    pings: Vec<f64>,
    idle: f64,
}

impl Drop for Variant {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // By request, so that those who have workers end them.
            let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let end = Instant::now() + Duration::from_secs(2);
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < end {
                thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Variant {
    /// Its process and that one's children.
    fn pids(&self) -> Vec<u32> {
        let Some(child) = &self.child else { return Vec::new() };
        let own = child.id();
        let list = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
        list.split_whitespace().filter_map(|pid| pid.parse().ok()).chain([own]).collect()
    }

    /// Processor time so far, in seconds, of threads that have ended too.
    fn cpu(&self) -> f64 {
        const TICKS: f64 = 100.0; // proc_pid_stat(5), sysconf(_SC_CLK_TCK)
        let ticks = |pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let (_, fields) = stat.rsplit_once(')')?;
            Some(
                fields.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum::<f64>(),
            )
        };
        self.pids().into_iter().filter_map(ticks).sum::<f64>() / TICKS
    }

    /// Resident memory, in KiB.
    fn memory(&self) -> f64 {
        let kib = |pid: u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find(|line| line.starts_with("RssAnon:"))?;
            line.split_whitespace().nth(1)?.parse::<f64>().ok()
        };
        self.pids().into_iter().filter_map(kib).sum()
    }

    fn connect(&self, what: u8) -> io::Result<TcpStream> {
        let mut socket = TcpStream::connect(self.at)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        socket.write_all(&[what])?;
        Ok(socket)
    }

    fn stream(&mut self) -> io::Result<()> {
        let mut socket = self.connect(b'S')?;
        let block = vec![0x5a; 256 * 1024];
        let (cpu, begun) = (self.cpu(), Instant::now());
        for _ in 0..STREAM / (256 * 1024) {
            socket.write_all(&block)?;
        }
        let mut count = [0; 8];
        socket.read_exact(&mut count)?;
        let took = begun.elapsed().as_secs_f64();
        if u64::from_le_bytes(count) != STREAM {
            return Err(io::Error::other(format!("{}: bytes are missing", self.name)));
        }
        self.streams.push(1074.0 / took);
        self.stream_cpu.push(self.cpu() - cpu);
        Ok(())
    }

    fn new_connections(&mut self) -> io::Result<()> {
        let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let (cpu, begun) = (self.cpu(), Instant::now());
        thread::scope(|scope| {
            let workers: Vec<_> = (0..CLIENTS)
                .map(|_| {
                    scope.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            let mut socket = self.connect(b'E')?;
                            socket.write_all(b"x")?;
                            socket.read_exact(&mut [0])?;
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                        io::Result::Ok(())
                    })
                })
                .collect();
            thread::sleep(NEW_FOR);
            stop.store(true, Ordering::Relaxed);
            for worker in workers {
                worker.join().map_err(|_| io::Error::other("a client failed"))??;
            }
            io::Result::Ok(())
        })?;
        let done = f64::from(u32::try_from(done.into_inner()).unwrap_or(u32::MAX));
        self.news.push(done / begun.elapsed().as_secs_f64());
        self.new_cpu.push((self.cpu() - cpu) / done * 1e6);
        Ok(())
    }

    fn ping(&mut self) -> io::Result<()> {
        let mut socket = self.connect(b'E')?;
        let mut took = Vec::with_capacity(PINGS);
        for _ in 0..PINGS {
            let begun = Instant::now();
            socket.write_all(&[1; 64])?;
            socket.read_exact(&mut [0; 64])?;
            took.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        self.pings.push(median(took));
        Ok(())
    }

    fn idle(&mut self) -> io::Result<()> {
        let before = self.memory();
        let mut kept = Vec::new();
        for _ in 0..IDLE {
            let mut socket = self.connect(b'E')?;
            socket.write_all(b"x")?;
            socket.read_exact(&mut [0])?;
            kept.push(socket);
        }
        thread::sleep(Duration::from_millis(300));
        self.idle = (self.memory() - before) / f64::from(u16::try_from(IDLE).unwrap_or(1));
        Ok(())
    }
}

/// The far end: streams are counted, all else is echoed.
fn sink() -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let at = listener.local_addr()?;
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let _ = thread::Builder::new().stack_size(512 * 1024).spawn(move || served(socket));
        }
    });
    Ok(at)
}

fn served(mut socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let mut what = [0];
    socket.read_exact(&mut what)?;
    let mut buffer = vec![0; if what == [b'S'] { 256 * 1024 } else { 64 }];
    let mut count = 0_u64;
    loop {
        let got = socket.read(&mut buffer)?;
        count += got as u64;
        match (got, what) {
            (0, _) => return Ok(()),
            // Not at its end: nginx would not pass that on.
            (_, [b'S']) if count >= STREAM => return socket.write_all(&count.to_le_bytes()),
            (_, [b'S']) => {}
            _ => socket.write_all(buffer.get(..got).unwrap_or_default())?,
        }
    }
}

/// Where a daemon's files are, and what it is to connect.
struct Place {
    folder: PathBuf,
    near: SocketAddr,
    far: SocketAddr,
    sink: SocketAddr,
}

impl Place {
    fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// Writes a configuration; `@h1/…` is a file, and NEAR, FAR and SINK are addresses.
    fn config(&self, name: &str, text: &str) -> io::Result<String> {
        let text = text
            .replace('@', &format!("{}/", self.folder.display()))
            .replace("NEAR", &self.near.to_string())
            .replace("FAR", &self.far.to_string())
            .replace("SINK", &self.sink.to_string());
        fs::write(self.folder.join(name), text)?;
        Ok(self.file(name))
    }
}

const NGINX: &str = "\
daemon off; master_process on; worker_processes 2; pid @nginx.pid; error_log stderr crit;
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
events { worker_connections 8000; }
stream {
  server { listen NEAR backlog=4096; proxy_pass FAR; tcp_nodelay on; proxy_buffer_size 64k;
    proxy_ssl on; proxy_ssl_protocols TLSv1.3; proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
    proxy_ssl_certificate @h1/host.crt; proxy_ssl_certificate_key @h1/host.key;
    proxy_ssl_trusted_certificate @h1/ca.crt; proxy_ssl_verify on; proxy_ssl_verify_depth 2;
    proxy_ssl_name h2; proxy_ssl_session_reuse off; }
  server { listen FAR ssl backlog=4096; proxy_pass SINK; tcp_nodelay on; proxy_buffer_size 64k;
    ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
    ssl_certificate @h2/host.crt; ssl_certificate_key @h2/host.key;
    ssl_client_certificate @h2/ca.crt; ssl_verify_client on; ssl_verify_depth 2;
    ssl_session_tickets off; ssl_session_cache off; }
}
";

const HAPROXY: &str = "\
global
  nbthread 2
  maxconn 4000
  ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
  ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
  mode tcp
  timeout connect 9s
  timeout client 99s
  timeout server 99s
listen near
  bind NEAR backlog 4096
  server far FAR ssl verify required ca-file @h1/ca.crt crt @h1.pem verifyhost h2 ssl-min-ver TLSv1.3 no-ssl-reuse
listen far
  bind FAR backlog 4096 ssl crt @h2.pem ca-file @h2/ca.crt verify required ssl-min-ver TLSv1.3 no-tls-tickets
  server sink SINK
";

const STUNNEL: &str = "\
foreground = yes
pid =
debug = 0
sslVersion = TLSv1.3
ciphersuites = TLS_AES_128_GCM_SHA256
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[near]
client = yes
accept = NEAR
connect = FAR
cert = @h1/host.crt
key = @h1/host.key
CAfile = @h1/ca.crt
verifyChain = yes
[far]
accept = FAR
connect = SINK
cert = @h2/host.crt
key = @h2/host.key
CAfile = @h2/ca.crt
verifyChain = yes
requireCert = yes
";

fn bench() -> io::Result<()> {
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?.1;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, limit, limit)?;
    let folder = std::env::temp_dir().join(format!("portcullis-bench-tls-{}", std::process::id()));
    let result = measure(&folder);
    let _ = fs::remove_dir_all(&folder);
    result
}

fn measure(folder: &Path) -> io::Result<()> {
    let domain = "example.com".parse().map_err(io::Error::other)?;
    let mut authority = Authority::init(folder, domain, now()).map_err(io::Error::other)?;
    for name in ["h1", "h2"] {
        let host = name.parse().map_err(io::Error::other)?;
        let out = folder.join(name);
        authority.enrol(&host, &Enrolment::default(), &out, now()).map_err(io::Error::other)?;
        let pem = [fs::read(out.join("host.crt"))?, fs::read(out.join("host.key"))?].concat();
        fs::write(folder.join(format!("{name}.pem")), pem)?;
    }
    let sink = sink()?;
    let mut variants = vec![variant("direct", sink, None)];
    for name in ["portcullis", "nginx", "haproxy", "stunnel"] {
        let place = Place { folder: folder.to_owned(), near: free_port()?, far: free_port()?, sink };
        let Some(mut command) = command(name, &place)? else { continue };
        match command.stdin(Stdio::null()).stdout(Stdio::null()).spawn() {
            Ok(child) => variants.push(variant(name, place.near, Some(child))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => row(&format!("{name} is not installed")),
            Err(e) => return Err(e),
        }
    }
    for one in &mut variants {
        let name = one.name;
        let end = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(one.at).is_err() && Instant::now() < end {
            thread::sleep(Duration::from_millis(50));
        }
        one.ping().map_err(|e| io::Error::other(format!("{name}: {e}")))?;
        one.pings.clear();
    }
    for _ in 0..TURNS {
        each(&mut variants, "stream", Variant::stream)?;
        each(&mut variants, "new connections", Variant::new_connections)?;
        each(&mut variants, "ping-pong", Variant::ping)?;
    }
    each(&mut variants, "idle", Variant::idle)?;
    table(&variants);
    Ok(())
}

fn each(variants: &mut [Variant], what: &str, act: fn(&mut Variant) -> io::Result<()>) -> io::Result<()> {
    variants
        .iter_mut()
        .try_for_each(|one| act(one).map_err(|e| io::Error::other(format!("{}, {what}: {e}", one.name))))
}

/// A port that nobody has just now.
fn free_port() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

fn variant(name: &'static str, at: SocketAddr, child: Option<Child>) -> Variant {
    let (streams, stream_cpu, news, new_cpu, pings) = (vec![], vec![], vec![], vec![], vec![]);
    Variant { name, at, child, streams, stream_cpu, news, new_cpu, pings, idle: 0.0 }
}

fn command(name: &str, place: &Place) -> io::Result<Option<Command>> {
    let mut command;
    match name {
        "portcullis" => {
            command = Command::new(std::env::current_exe()?);
            command.arg("pair").arg(&place.folder);
            command.args([place.near, place.far, place.sink].map(|at| at.to_string()));
        }
        "nginx" => {
            command = Command::new("nginx");
            command.args(["-p", &place.file(""), "-c", &place.config("nginx.conf", NGINX)?]);
        }
        "haproxy" => {
            command = Command::new("haproxy");
            command.args(["-q", "-db", "-f", &place.config("haproxy.cfg", HAPROXY)?]);
        }
        "stunnel" => {
            command = Command::new("stunnel4");
            command.arg(place.config("stunnel.conf", STUNNEL)?);
        }
        _ => return Ok(None),
    }
    Ok(Some(command))
}

fn table(variants: &[Variant]) {
    row("                stream     CPU      new     CPU   ping-pong      idle");
    row("                  MB/s   s/GiB      1/s      µs          µs   KiB/conn");
    for one in variants {
        row(&format!(
            "{:<12} {:>9.0} {:>7.2} {:>8.0} {:>7.0} {:>11.1} {:>10.1}",
            one.name,
            median(one.streams.clone()),
            median(one.stream_cpu.clone()),
            median(one.news.clone()),
            median(one.new_cpu.clone()),
            median(one.pings.clone()),
            one.idle,
        ));
    }
    let find = |name: &str| variants.iter().find(|one| one.name == name);
    let (Some(ours), Some(nginx)) = (find("portcullis"), find("nginx")) else { return };
    let m = |values: &[f64]| median(values.to_vec());
    let best_new = variants
        .iter()
        .filter(|one| one.child.is_some() && one.name != "portcullis")
        .map(|one| m(&one.news))
        .fold(0.0, f64::max);
    row(&format!(
        "against nginx: stream {:.2}, CPU {:.2}, ping-pong {:.2}; new connections against the best peer {:.2}",
        m(&ours.streams) / m(&nginx.streams),
        m(&ours.stream_cpu) / m(&nginx.stream_cpu),
        m(&ours.pings) / m(&nginx.pings),
        m(&ours.news) / best_new,
    ));
}
