//! Kills at random moments of what carries protected flows, and of what they are carried for; more of them by
//! `cargo xtask torture`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant, SystemTime},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use portcullis_tests::{
    Finished, Host, Net, Running,
    ftp::{self, Daemon},
    trust::Trust,
    until,
};
use serde_json::Value;

const POLICY: &str = "\
inside = x509{name=\"*.example.com\"};
service ftp = tcp/21, related;
allow ftp(inside, inside) with related;
allow tcp/6379(inside, inside);
";

/// How many kills there are unless more are asked for.
const SOME: u32 = 20;
/// Bytes of the file that is fetched.
const SIZE: usize = 300_000;
/// How long a program may say nothing: some calls wait for as long as the network is silent.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is said in lane tls only.
const SECRET: &[u8] = b"secret_words";

/// Fetches a file again and again, the data connection made by either side in turn. One that waits for the server to
/// come does not hear that its control connection has ended.
const FETCH: &str = "import ftplib, sys, time\n\
    wanted, n = open(sys.argv[1], 'rb').read(), 0\n\
    while True:\n    \
        n += 1; print('begins', time.time(), flush=True)\n    \
        try:\n        \
            f = ftplib.FTP('10.77.0.2', timeout=10); f.login(); f.set_pasv(n % 2 == 0)\n        \
            got = bytearray(); f.retrbinary('RETR report.bin', got.extend); f.quit()\n        \
            print('done' if got == wanted else f'odd {len(got)}', flush=True)\n    \
        except (OSError, EOFError, ftplib.Error) as e: print('failed', time.time(), repr(e), flush=True); time.sleep(.05)\n";

/// Writes and reads one key, some times over each connection.
const ASK: &str = "import socket, time\n\
    n = 0\n\
    while True:\n    \
        print('begins', time.time(), flush=True)\n    \
        try:\n        \
            s = socket.create_connection(('10.77.0.2', 6379)); f = s.makefile('rb')\n        \
            for _ in range(20):\n            \
                n += 1; value = b'secret_words_%d' % n\n            \
                s.sendall(b'SET k %s\\r\\nGET k\\r\\n' % value)\n            \
                told = f.readline(), f.readline(), f.readline()\n            \
                if told[2] != value + b'\\r\\n':\n                \
                    if told[2].endswith(b'\\n'): print('odd', told, flush=True)\n                \
                    raise EOFError(told)\n        \
            s.close(); print('done', time.time(), flush=True)\n    \
        except (OSError, EOFError) as e: print('failed', time.time(), repr(e), flush=True); time.sleep(.05)\n";

/// Looks for words on the link, and nowhere else before it is bound; tells where it found one.
const LOOK: &str = "import socket, struct, sys\n\
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)\n\
    s.setsockopt(socket.SOL_SOCKET, 33, 64 << 20); s.bind(('eth0', 3))\n\
    words, n = [bytes.fromhex(w) for w in sys.argv[1:]], 0\n\
    print('looks', flush=True)\n\
    while True:\n    \
        frame = s.recv(65536); n += 1\n    \
        if any(word in frame for word in words): print('found', frame[26:38].hex(), flush=True)\n    \
        lost = n % 1000 == 0 and struct.unpack('II', s.getsockopt(263, 6, 8))[1]\n    \
        if lost: print('missed', lost, flush=True)\n";

/// What is killed.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Victim {
    Keyd,
    Broker,
    Supervisor,
    Program,
}

impl Victim {
    fn any(chance: &mut fastrand::Rng) -> Self {
        match chance.u8(..20) {
            0..8 => Self::Keyd,
            8..15 => Self::Broker,
            15..19 => Self::Program,
            _ => Self::Supervisor,
        }
    }

    const fn daemon(self) -> Option<&'static str> {
        match self {
            Self::Keyd => Some("keyd"),
            Self::Broker => Some("broker"),
            Self::Supervisor => Some("supervise"),
            Self::Program => None,
        }
    }
}

/// A program that is started again whenever it has ended.
struct Kept<'a> {
    host: &'a Host,
    words: Vec<String>,
    /// Or asks.
    serves: bool,
    running: Running,
    heard: Instant,
    /// How often each word began a line.
    said: BTreeMap<String, usize>,
    odd: Vec<String>,
    /// What `run` itself had to say.
    of_run: Vec<String>,
    /// The last that it said.
    last: Option<String>,
}

impl<'a> Kept<'a> {
    fn start(host: &'a Host, words: Vec<String>, serves: bool) -> Self {
        let running = host.start(&words);
        let (heard, said) = (Instant::now(), BTreeMap::new());
        Self { host, words, serves, running, heard, said, odd: Vec::new(), of_run: Vec::new(), last: None }
    }

    /// Hears what it says, and starts it again if it has ended.
    fn tend(&mut self) {
        let said = self.running.said();
        self.take(said);
        if self.running.has_ended() {
            self.restart();
        }
    }

    /// Kills it with its children. Sessions of vsftpd are not of its group; they are known by their words, in which a
    /// folder of this test stands; words without one could be those of another test.
    fn stop(&mut self) {
        let _gone = killpg(Pid::from_raw(self.running.pid()), Signal::SIGKILL);
        let line: Vec<u8> = self.words.iter().flat_map(|word| [word.as_bytes(), &[0]].concat()).collect();
        let folder = self.host.path("").display().to_string();
        let is_known = self.words.iter().any(|word| word.contains(&folder));
        for process in fs::read_dir("/proc").unwrap().flatten().filter(|_| is_known) {
            let pid = process.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(pid) =
                pid.filter(|_| fs::read(process.path().join("cmdline")).is_ok_and(|its| its == line))
            {
                let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        // Its port is free when it has gone.
        let _status = self.running.wait();
        if !self.serves {
            let rest = self.running.rest();
            self.take(rest);
        }
    }

    /// Whether it says anything more: it does not hang.
    fn says_more(&mut self) -> bool {
        let mut heard = || {
            let said = self.running.said();
            let any = !said.is_empty();
            self.take(said);
            any.then_some(())
        };
        heard();
        until(heard).is_some()
    }

    fn restart(&mut self) {
        self.stop();
        self.running = self.host.start(&self.words);
        self.heard = Instant::now();
    }

    fn take(&mut self, said: Vec<String>) {
        for line in said {
            self.heard = Instant::now();
            let word = line.split(' ').next().unwrap_or_default().to_owned();
            self.last = Some(line.clone());
            if word == "odd" || line.contains("Traceback") {
                self.odd.push(line);
            }
            if word == "portcullis:" {
                self.of_run.extend(self.last.clone());
            }
            *self.said.entry(word).or_default() += 1;
        }
    }

    fn count(&self, word: &str) -> usize {
        self.said.get(word).copied().unwrap_or(0)
    }
}

/// Whether each that asks is answered, from now on.
fn all_go_on(programs: &mut [Kept<'_>]) -> bool {
    let before: Vec<_> = programs.iter().map(|kept| kept.count("done")).collect();
    let goes_on = until(|| {
        programs.iter_mut().for_each(Kept::tend);
        let more = |(kept, before): (&Kept<'_>, &usize)| kept.serves || kept.count("done") > *before;
        programs.iter().zip(&before).all(more).then_some(())
    });
    goes_on.is_some()
}

/// Kills one of `victim` on a host, if there is one.
fn strike(victim: Victim, host: &Host, programs: &[Kept<'_>], chance: &mut fastrand::Rng) -> bool {
    let pid = match victim.daemon() {
        Some(name) => host.daemons().into_iter().find(|(_, is)| is == name).map(|(pid, _)| pid),
        None => {
            let theirs: Vec<_> = programs.iter().filter(|kept| kept.host.name == host.name).collect();
            chance.choice(theirs).map(|kept| kept.running.pid())
        }
    };
    pid.is_some_and(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok())
}

/// Kills as often as that; what should not have been is added to `faults`.
fn kill_at_random(
    kills: u32,
    hosts: [&Host; 2],
    programs: &mut [Kept<'_>],
    chance: &mut fastrand::Rng,
    faults: &mut Vec<String>,
) -> BTreeMap<Victim, u32> {
    let mut killed = BTreeMap::new();
    while killed.values().sum::<u32>() < kills && faults.is_empty() {
        std::thread::sleep(Duration::from_millis(chance.u64(50..1200)));
        let (victim, host) = (Victim::any(chance), hosts[usize::from(chance.bool())]);
        if strike(victim, host, programs, chance) {
            *killed.entry(victim).or_default() += 1;
        }
        for kept in &mut *programs {
            kept.tend();
            let hangs = if victim == Victim::Supervisor && kept.host.name == host.name {
                // Nobody serves it any more.
                let hangs = !kept.serves && !kept.says_more();
                kept.restart();
                hangs
            } else {
                !kept.serves && kept.heard.elapsed() > PATIENCE
            };
            if hangs {
                faults.push(format!("hangs: {} {:?}", kept.words[0], kept.said));
            }
        }
    }
    if !all_go_on(programs) {
        faults.push("not all are served again".to_owned());
        faults.extend(programs.iter().map(|kept| format!("{}: {:?}", kept.words[0], kept.last)));
    }
    killed
}

fn python(code: &str, more: &[&str]) -> Vec<String> {
    [&["/usr/bin/python3", "-c", code], more].concat().into_iter().map(String::from).collect()
}

/// Makes two hosts, two servers and two clients in lane tls, and kills at random. What should not have been, and what
/// else there is to tell.
fn torture(kills: u32, seed: u64) -> (Vec<String>, String) {
    let net = Net::new(&["client", "server"]);
    let [client, server] = net.hosts();
    client.policy(POLICY);
    server.policy(POLICY);
    let _trust = Trust::of(&[client, server]);
    let file = client.write("wanted", ftp::content(SIZE)).display().to_string();
    let redis = ["redis-server", "--bind", "10.77.0.2", "--protected-mode", "no", "--save", ""];
    let mut programs = [
        Kept::start(server, Daemon::Vsftpd.command(server, SIZE), true),
        Kept::start(server, redis.map(String::from).to_vec(), true),
        Kept::start(client, python(FETCH, &[&file]), false),
        Kept::start(client, python(ASK, &[]), false),
    ];
    assert!(all_go_on(&mut programs), "it does not begin");
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let words = [SECRET, b"RETR report", &ftp::content(SIZE)[1000..1032]].map(hex);
    let wire = Running::start(client.plain(&python(LOOK, &words.each_ref().map(String::as_str))));
    wire.line("looks");

    let mut faults = Vec::new();
    let mut chance = fastrand::Rng::with_seed(seed);
    let killed = kill_at_random(kills, [client, server], &mut programs, &mut chance, &mut faults);

    faults.extend(wire.said().into_iter().map(|line| format!("on the wire: {line}")));
    // The control: the same words, by nobody's order, on the same link.
    let plain = "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
        s.sendto(bytes.fromhex(sys.argv[1]), ('10.77.0.2', 9))";
    for word in &words {
        Finished::of(&mut client.plain(&python(plain, &[word]))).success();
        wire.line("found");
    }
    programs.iter_mut().for_each(Kept::stop);
    faults.extend(programs.iter().flat_map(|kept| kept.odd.clone()));
    let of_runs = programs.each_ref().map(|kept| kept.of_run.join("\n")).join("\n");
    let [_, _, fetches, asks] = programs.map(|kept| kept.said);
    for host in [client, server] {
        // A run that was killed as it began has left no more than the next one takes away.
        Finished::of(&mut host.run(&["true"])).success();
        faults.extend(left_behind(host));
    }
    let mut told = format!("killed: {killed:?}\nfetches: {fetches:?}\nconnections: {asks:?}\n{of_runs}");
    for host in [client, server] {
        let log = Log::of(host);
        told += &format!("\n{}: {} records", host.name, log.records);
        faults.extend(log.faults.iter().map(|fault| format!("{}: {fault}", host.name)));
        for (port, said) in [(21, &fetches), (6379, &asks)] {
            let of = |counted: &BTreeMap<u64, usize>| counted.get(&port).copied().unwrap_or(0);
            let count = |word: &str| said.get(word).copied().unwrap_or(0);
            let on_record = if host.name == client.name {
                vec![of(&log.asked), of(&log.admitted)]
            } else {
                vec![of(&log.accepted)]
            };
            let steps = [vec![count("begins")], on_record, vec![count("done")]].concat();
            if !steps.is_sorted_by(|a, b| a >= b) {
                faults.push(format!("{}: port {port}: begun, on record, done: {steps:?}", host.name));
            }
        }
    }
    (faults, told)
}

/// What there still is of a host when all its programs have ended, besides its namespace.
fn left_behind(host: &Host) -> Vec<String> {
    let mut found = Vec::new();
    if until(|| host.daemons().is_empty().then_some(())).is_none() {
        found.push(format!("processes: {:?}", host.daemons()));
    }
    let meta = fs::metadata(host.state()).unwrap();
    // As runtime folders and cgroups are named; another folder may have had this inode before.
    let born = meta.created().unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
    let name = format!("{:x}-{:x}-{born:x}", meta.dev(), meta.ino());
    let of_ours = |found: &str| found.trim_start_matches("portcullis-") == name;
    for base in ["/run/portcullis", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"] {
        for entry in fs::read_dir(base).into_iter().flatten().flatten() {
            if of_ours(&entry.file_name().to_string_lossy()) {
                found.push(format!("folder {}", entry.path().display()));
            }
        }
    }
    let sockets = || {
        let listed = host.plain(&["ss", "-Htuxan", "state", "all", "exclude", "time-wait"]).output().unwrap();
        String::from_utf8_lossy(&listed.stdout).into_owned()
    };
    let open = || Some(sockets()).filter(|all| all.is_empty()).map(drop);
    if until(open).is_none() {
        found.push(format!("sockets:\n{}", sockets()));
    }
    found.into_iter().map(|what| format!("left on {}: {what}", host.name)).collect()
}

/// An audit log, counted; flows by the service's port.
#[derive(Default)]
struct Log {
    records: usize,
    /// Asked for by programs of this host.
    asked: BTreeMap<u64, usize>,
    /// Of these, whose far side has proved itself.
    admitted: BTreeMap<u64, usize>,
    /// Arrived, and were taken by programs of this host.
    accepted: BTreeMap<u64, usize>,
    faults: Vec<String>,
}

impl Log {
    fn of(host: &Host) -> Self {
        let records = host.records();
        let mut log = Self { records: records.len(), ..Self::default() };
        let number = |r: &Value, name: &str| r[name].as_u64();
        let port = |r: &Value, name: &str| r[name].as_str()?.rsplit(':').next()?.parse::<u64>().ok();
        let (mut begun, mut ended) = (BTreeSet::new(), BTreeSet::new());
        for (n, record) in (1..).zip(&records) {
            if number(record, "seq") != Some(n) {
                log.faults.push(format!("number {n} is {record}"));
                break;
            }
            let op = record["op"].as_str().unwrap_or_default();
            let kind = match (op, record["verdict"].as_str(), number(record, "of")) {
                ("connect", Some("protect"), None) => Some((&mut log.asked, port(record, "remote"))),
                ("admit", _, Some(_)) => Some((&mut log.admitted, port(record, "remote"))),
                ("accept", Some("permit"), None) if record["lane"] == "tls" => {
                    Some((&mut log.accepted, port(record, "local")))
                }
                _ => None,
            };
            if op != "admit" && kind.is_some() {
                begun.insert(n);
            }
            if let Some((counted, port)) = kind {
                *counted.entry(port.unwrap_or(0)).or_default() += 1;
            }
            let Some(of) = number(record, "of") else { continue };
            if !begun.contains(&of) {
                log.faults.push(format!("of nothing: {record}"));
            }
            if op != "admit" && !ended.insert(of) {
                log.faults.push(format!("a second end: {record}"));
            }
        }
        log.faults.extend(begun.difference(&ended).map(|seq| format!("no end of {seq}")));
        log
    }
}

#[test]
fn nothing_is_lost_whatever_is_killed_at_whatever_moment() {
    let asked = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let kills = asked("PORTCULLIS_KILLS").and_then(|n| u32::try_from(n).ok());
    let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    // As one test among others it is the same each time.
    let seed = asked("PORTCULLIS_SEED").unwrap_or_else(|| if kills.is_some() { clock() } else { 1 });
    let (faults, told) = torture(kills.unwrap_or(SOME), seed);
    #[expect(clippy::print_stderr, reason = "shown by the command, and where the test fails")]
    {
        eprintln!("seed: {seed}\n{told}");
    }
    assert!(faults.is_empty(), "seed {seed}:\n{}", faults.join("\n"));
}
