//! The FTP story.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Instant,
};

use super::{
    probe::{Port, Seen},
    stage::{DemoError, Host, Stage, finish, inside, own_path, start, wait_for},
    tell::Teller,
    wire,
};
use crate::{
    COULD_NOT, Format,
    audit::Record,
    output::{Ink, Out},
    sys,
};

const POLICY: &str = "\
service ftp = tcp/21, related;
here    = IPv4{10.77.0.1, 10.77.0.2};
inside  = x509{name=\"*.example.com\", ver>20260000} & here;
vsftpd  = process{exe=\"/usr/sbin/vsftpd\"};
lftp    = process{exe=\"/usr/bin/lftp\"};

allow ftp(inside & lftp, inside & vsftpd);
";

/// Bytes of the file that is transferred, and how many of them a second: it takes about two.
const SIZE: usize = 6 << 20;
const RATE: usize = 3 << 20;

/// In every line of the file.
const CONTENT: &str = "minutes of the meeting";
/// What must not be heard on the link.
const SECRETS: [&str; 4] = ["USER ", "RETR", "report.bin", CONTENT];

/// Exit status when the story did not go as it should.
const FINDINGS: u8 = 1;
/// Exit status after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

/// Tells the story; the result is the exit status.
pub fn run(out: &mut Out, format: Format) -> u8 {
    if let Err(error) = sys::notice_interrupts() {
        out.error(&error);
        return COULD_NOT;
    }
    let begun = Instant::now();
    let mut teller = Teller::new(out, format);
    match Story::begin(&mut teller).and_then(Story::play) {
        Ok(()) if teller.close(begun.elapsed().as_secs_f32()) == 0 => 0,
        Ok(()) => FINDINGS,
        Err(DemoError::Interrupted) => INTERRUPTED,
        Err(error) => {
            out.error(&error);
            COULD_NOT
        }
    }
}

struct Story<'s, 'o> {
    tell: &'s mut Teller<'o>,
    client: Host,
    server: Host,
    stranger: Host,
    /// What crosses the link, until it is looked at.
    wire: Option<Child>,
    // Last, so that it is taken down after what plays on it.
    _stage: Stage,
}

/// Who makes the data connection.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Way {
    /// The client connects to a port that the server opens.
    Passive,
    /// The server connects to a port that the client opens.
    Active,
}

impl<'s, 'o> Story<'s, 'o> {
    fn begin(tell: &'s mut Teller<'o>) -> Result<Self, DemoError> {
        for program in ["/usr/sbin/vsftpd", "/usr/bin/lftp"] {
            if !Path::new(program).exists() {
                return Err(DemoError::Missing(program));
            }
        }
        let (stage, hosts) = Stage::set(&["client", "server", "stranger"])?;
        let Ok([client, server, stranger]) = <[Host; 3]>::try_from(hosts) else {
            return Err(DemoError::Late("three hosts were there".into()));
        };
        let mut wire = inside(&stage.switch, &own_path()?);
        wire.args(["demo", "wire"]).args(SECRETS).stdin(Stdio::piped()).stdout(Stdio::piped());
        let wire = Some(start(wire, "the capture")?);
        Ok(Self { tell, client, server, stranger, wire, _stage: stage })
    }

    fn play(mut self) -> Result<(), DemoError> {
        self.scene();
        let line = format!("{CONTENT}: nobody on the way is to read this\n");
        let content: Vec<u8> = line.bytes().cycle().take(SIZE).collect();
        self.enrol()?;
        self.server.write("files/report.bin", &content)?;
        let daemon = self.open_server()?;
        self.transfer(Way::Passive, &content)?;
        self.transfer(Way::Active, &content)?;
        self.look_at_wire()?;
        self.without_certificate()?;
        self.wrong_process()?;
        self.old_enrolment()?;
        self.log()?;
        drop(daemon);
        Ok(())
    }

    fn scene(&mut self) {
        let picture = concat!(
            "\n",
            "     client                server               stranger\n",
            "   10.77.0.1             10.77.0.2             10.77.0.3\n",
            "  ┌───────────┐         ┌───────────┐         ┌───────────┐\n",
            "  │   lftp    │         │  vsftpd   │         │  scanner  │\n",
            "  │  wrapped  │         │  wrapped  │         │           │\n",
            "  └─────┬─────┘         └─────┬─────┘         └─────┬─────┘\n",
            "        └─────────────────────┴─────────────────────┘\n",
            "\n",
        );
        self.tell.open("Portcullis: FTP through closed ports, with unmodified programs", picture);
        self.tell.head("The policy, the same on client and server");
        self.tell.quote(POLICY, Some(Ink::Note));
        self.tell.say("`related`: while a control connection lives, its two ends may open data connections.");
        self.tell.say("No port range, no FTP parser. Everything else is refused.");
        self.tell
            .say("`x509`: both prove who they are, in mutual TLS of which lftp and vsftpd know nothing.");
    }

    /// Gives client and server what they prove themselves with.
    fn enrol(&mut self) -> Result<(), DemoError> {
        self.tell.head("A trust domain, and two hosts in it");
        let authority = self.server.path("authority").display().to_string();
        let hosts = [("client", &self.client, "20260101"), ("server", &self.server, "20260301")];
        let mut lines = vec!["portcullis ca init --trust-domain example.com".to_owned()];
        self.server.portcullis(&["ca", "init", "--trust-domain", "example.com", "--state", &authority])?;
        for (name, host, ver) in hosts {
            let (name, address) = (format!("{name}.example.com"), host.address.to_string());
            let out = host.state().display().to_string();
            let words = ["ca", "host", &name, "--address", &address, "--ver", ver];
            host.portcullis(&[&words[..], &["--out", &out, "--state", &authority]].concat())?;
            lines.push(format!("portcullis {} --out …", words.join(" ")));
        }
        for (_, host, _) in hosts {
            let out = host.state().display().to_string();
            host.portcullis(&["ca", "renew", "--out", &out, "--state", &authority])?;
        }
        lines.iter().for_each(|line| self.tell.shell("anywhere", line));
        Ok(())
    }

    /// What somebody on the link has heard so far.
    fn look_at_wire(&mut self) -> Result<(), DemoError> {
        self.tell.head("Somebody listens on the link all the time");
        let Some(mut wire) = self.wire.take() else { return Ok(()) };
        drop(wire.stdin.take());
        let said = finish(wire, "the capture")?;
        let told = said.lines().last().unwrap_or_default();
        let seen: wire::Seen = serde_json::from_str(told)
            .map_err(|e| DemoError::Program { program: "the capture".into(), said: e.to_string() })?;
        self.tell.shell("link", "(listens)");
        self.tell.check(
            seen.found.is_empty() && seen.segments > 100,
            &format!(
                "{} segments heard; in none a command, a file name or a line of the file",
                seen.segments
            ),
        );
        let control = seen.hellos.iter().filter(|(_, to)| *to == 21).count();
        let data = seen.hellos.len() - control;
        self.tell.check(
            control == 2 && data == 2,
            &format!("{control} control and {data} data connections, each begins with a TLS ClientHello"),
        );
        Ok(())
    }

    /// A program of the client's own host, in plain.
    fn without_certificate(&mut self) -> Result<(), DemoError> {
        self.tell.head("Another program on the client's host, which Portcullis does not hold, wants in");
        self.tell.shell("client", "lftp 10.77.0.2    (not wrapped: it speaks plain)");
        let after = self.server.last()?;
        let script = "set net:max-retries 1; set net:timeout 1; open 10.77.0.2; ls";
        let mut plain = self.client.command(Path::new("/usr/bin/lftp"));
        plain.args(["-c", script]).stderr(Stdio::null());
        let got_in = finish(start(plain, "lftp")?, "lftp").is_ok();
        let refused = self.server.record("it was refused", after, |r| {
            r.is_refusal() && r.remote().is_some_and(|(ip, _)| ip == self.client.address)
        })?;
        self.tell.show(&refused, 0);
        self.tell
            .check(!got_in, "the right address is no proof: without a certificate vsftpd never hears of it");
        Ok(())
    }

    /// The policy asks for newer enrolments than the client's.
    fn old_enrolment(&mut self) -> Result<(), DemoError> {
        self.tell.head("The policy asks for newer enrolments, and the client's is old");
        self.tell.say("inside  = x509{name=\"*.example.com\", ver>20260200} & here;");
        let after = self.server.last()?;
        self.server.write("policy.pol", POLICY.replace("20260000", "20260200"))?;
        let loaded = |r: &Record| r.text("op") == Some("policy");
        self.server.record("the policy is in force", after, loaded)?;
        let script = "set net:max-retries 1; set net:timeout 3; open 10.77.0.2; ls";
        self.tell.shell("client", "portcullis run -- lftp 10.77.0.2");
        let lftp = self.client.wrapped(&["/usr/bin/lftp", "-c", script])?;
        let got_in = finish(start(lftp, "lftp")?, "lftp").is_ok();
        let refused = self.server.record("it was refused", after, |r| {
            r.is_refusal() && r.remote().is_some_and(|(ip, _)| ip == self.client.address)
        })?;
        self.tell.show(&refused, 0);
        let peer = refused.text("peer").unwrap_or_default().to_owned();
        let by_name = peer.contains("client.example.com");
        self.tell
            .check(!got_in && by_name, "refused by what its certificate says, not by where it comes from");
        Ok(())
    }

    fn open_server(&mut self) -> Result<Daemon, DemoError> {
        for host in [&self.client, &self.server] {
            host.write("policy.pol", POLICY)?;
        }
        let empty = self.server.path("empty");
        fs::create_dir_all(&empty).map_err(|source| DemoError::File { path: empty.clone(), source })?;
        let files = self.server.path("files");
        let config = format!(
            "listen=YES\nbackground=NO\nanonymous_enable=YES\nlocal_enable=NO\nanon_root={}\n\
             no_anon_password=YES\nsecure_chroot_dir={}\nanon_max_rate={RATE}\nport_enable=YES\n\
             connect_from_port_20=YES\npasv_enable=YES\nxferlog_enable=NO\n",
            files.display(),
            empty.display(),
        );
        let config = self.server.write("vsftpd.conf", config)?;
        self.tell.head("The server starts");
        self.tell.shell("server", "portcullis run -- vsftpd vsftpd.conf");
        let words = ["/usr/sbin/vsftpd", &config.display().to_string()];
        let daemon = Daemon(start(self.server.wrapped(&words)?, "vsftpd")?);
        let listens = self.server.record("vsftpd listens", 0, |r| r.text("op") == Some("listen"))?;
        self.tell.show(&listens, 0);
        // It is put on record before the kernel does it; what a stranger sees before that is a closed port.
        wait_for("vsftpd listens", || listens_on(daemon.0.id(), 21).then_some(()))?;
        let seen = self.probe(&self.stranger, &self.server, &[21])?;
        self.tell.shell("stranger", "connect 10.77.0.2:21");
        self.seen(&seen, 21);
        Ok(daemon)
    }

    /// One download, and what the stranger gets of it.
    fn transfer(&mut self, way: Way, content: &[u8]) -> Result<(), DemoError> {
        let (title, mode) = match way {
            Way::Passive => ("A passive transfer: the server opens a port for the data", "on"),
            Way::Active => ("An active transfer: the client opens a port for the data", "off"),
        };
        self.tell.head(title);
        let copy = self.client.path("copy.bin");
        let _absent = fs::remove_file(&copy);
        let (opener, who) = match way {
            Way::Passive => (&self.server, "server"),
            Way::Active => (&self.client, "client"),
        };
        let after = opener.last()?;
        let script = format!(
            "set ftp:passive-mode {mode}; set net:max-retries 1; set net:timeout 8; open 10.77.0.2; get report.bin -o {}",
            copy.display()
        );
        let lftp = start(self.client.wrapped(&["/usr/bin/lftp", "-c", &script])?, "lftp")?;
        let port = opener.record(&format!("the {who} opens a data port"), after, is_data_listener)?;
        let number = port.text("local").and_then(|l| l.rsplit(':').next()?.parse().ok());
        let number: u16 = number.ok_or_else(|| DemoError::Late("the data port had a number".into()))?;
        self.tell.shell(
            "client",
            &format!("portcullis run -- lftp -c 'set ftp:passive-mode {mode}; get report.bin'"),
        );
        let opener = if way == Way::Passive { &self.server } else { &self.client };
        let around: Vec<u16> = (number.saturating_sub(100)..=number.saturating_add(100)).collect();
        // The transfer is under way: its file grows.
        wait_for("data arrives", || fs::metadata(&copy).ok().filter(|m| m.len() > 0))?;
        let seen = self.probe(&self.stranger, opener, &around)?;
        let still = fs::metadata(&copy).is_ok_and(|m| usize::try_from(m.len()).is_ok_and(|n| n < SIZE));
        let address = opener.address;
        // A client closes its port as soon as the server has come, and then nobody is there to drop a stranger.
        let caught = match way {
            Way::Passive => Some(opener.record("the stranger is on record", after, |r| {
                r.is_refusal() && r.remote().is_some_and(|(ip, _)| ip == self.stranger.address)
            })?),
            Way::Active => None,
        };
        let taken = opener.record("the data connection is on record", after, |r| {
            r.text("op") == Some("accept") && r.verdict() == "permit" && r.shown("session").is_some()
        })?;
        self.tell.show(&port, 0);
        self.tell.show(&taken, 0);
        self.tell.shell(
            "stranger",
            &format!("scan {address}:{}-{}", around.first().unwrap_or(&0), around.last().unwrap_or(&0)),
        );
        let open = seen.iter().filter(|p| p.seen == Seen::Open).count();
        self.tell.check(
            open == 0 && still,
            &format!("{} ports scanned while the data flowed, {open} open", seen.len()),
        );
        self.seen(&seen, number);
        if let Some(caught) = caught {
            self.tell.show(&caught, 0);
        }
        finish(lftp, "lftp")?;
        let same = fs::read(&copy).is_ok_and(|got| got == content);
        let sums = [self.checksum(&self.server.path("files/report.bin"))?, self.checksum(&copy)?];
        let [sent, got] = &sums;
        self.tell.check(
            same && sent == got,
            &format!("{} MiB arrived; SHA-256 {sent} sent, {got} received", SIZE >> 20),
        );
        let opener = if way == Way::Passive { &self.server } else { &self.client };
        let other = if way == Way::Passive { &self.client } else { &self.server };
        let gone = self.probe(other, opener, &[number])?;
        let closed = gone.first().is_some_and(|p| p.seen != Seen::Open);
        self.tell.check(closed, &format!("after the session, port {number} is closed to everybody"));
        Ok(())
    }

    /// Another program on the server, wrapped like vsftpd.
    fn wrong_process(&mut self) -> Result<(), DemoError> {
        self.tell.head("Another program on the server wants to send the data elsewhere");
        self.tell.shell("server", "portcullis run -- portcullis demo probe 10.77.0.3 80");
        let after = self.server.last()?;
        let own = own_path()?.display().to_string();
        let mut command = self.server.wrapped(&[&own, "demo", "probe", "10.77.0.3", "80"])?;
        command.stdout(Stdio::piped());
        finish(start(command, "the probe")?, "the probe")?;
        let refused = self
            .server
            .record("the call was refused", after, |r| r.is_refusal() && r.text("op") == Some("connect"))?;
        self.tell.show(&refused, 0);
        let number = refused.seq().unwrap_or(0).to_string();
        self.tell.shell("server", &format!("portcullis why {number}"));
        let mut why = Command::new(own_path()?);
        why.args(["why", &number, "--state"])
            .arg(self.server.state())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.tell.quote(&finish(start(why, "portcullis why")?, "portcullis why")?, None);
        self.tell.check(true, "refused before a packet left, and explained");
        Ok(())
    }

    fn log(&mut self) -> Result<(), DemoError> {
        self.tell.head("The server's audit log");
        self.tell.shell("server", "portcullis audit");
        // A scan leaves a line for each port; one stands for all.
        let mut shown: Vec<(Record, u32)> = Vec::new();
        for record in self.server.records()? {
            let from = |r: &Record| r.is_refusal().then(|| r.remote().map(|(ip, _)| ip));
            match shown.last_mut() {
                Some((last, more)) if from(last).is_some() && from(last) == from(&record) => *more += 1,
                _ => shown.push((record, 0)),
            }
        }
        shown.iter().for_each(|(record, more)| self.tell.show(record, *more));
        Ok(())
    }

    fn probe(&self, from: &Host, whom: &Host, ports: &[u16]) -> Result<Vec<Port>, DemoError> {
        let mut command = from.command(&own_path()?);
        command
            .args(["demo", "probe", &whom.address.to_string()])
            .args(ports.iter().map(ToString::to_string));
        command.stdout(Stdio::piped());
        let said = finish(start(command, "the scanner")?, "the scanner")?;
        serde_json::from_str(&said)
            .map_err(|e| DemoError::Program { program: "the scanner".into(), said: e.to_string() })
    }

    fn checksum(&self, path: &Path) -> Result<String, DemoError> {
        let mut command = Command::new("sha256sum");
        command.arg(path).stdout(Stdio::piped()).stderr(Stdio::piped());
        let said = finish(start(command, "sha256sum")?, "sha256sum")?;
        Ok(said.get(..12).unwrap_or_default().to_owned())
    }

    fn seen(&mut self, ports: &[Port], port: u16) {
        let seen = ports.iter().find(|p| p.port == port).map(|p| p.seen);
        let text = match seen {
            Some(Seen::Filtered) => "filtered: not even a SYN-ACK",
            Some(Seen::Closed) => "closed",
            Some(Seen::Open) => "OPEN",
            None => "not tried",
        };
        self.tell.check(
            seen != Some(Seen::Open) && seen.is_some(),
            &format!("port {port} is {text} to the stranger"),
        );
    }
}

/// Whether the record is of a port opened for data.
fn is_data_listener(record: &Record) -> bool {
    record.text("op") == Some("listen")
        && record.verdict() == "permit"
        && record.text("local").is_some_and(|l| !l.ends_with(":21"))
}

/// Whether something listens on this TCP port, in the network namespace of this process (proc_net(5)).
fn listens_on(pid: u32, port: u16) -> bool {
    let (local, listening) = (format!(":{port:04X}"), "0A");
    fs::read_to_string(format!("/proc/{pid}/net/tcp")).is_ok_and(|table| {
        table.lines().any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            fields.next().is_some_and(|at| at.ends_with(&local)) && fields.nth(1) == Some(listening)
        })
    })
}

/// vsftpd, until the story is over.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _buried = self.0.wait();
    }
}
