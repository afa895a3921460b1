//! The systems in the same role: between a client here and a server at the far end of a link, each a process of its own.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use portcullis_benches::net::{Far, beside};

use crate::{
    Outcome,
    certificates::{self, FAR, NAME},
    load::{self, Program, Server},
    process, say,
};

pub(crate) const SYSTEMS: [&str; 5] = [PORTCULLIS, "relay", "nginx", "haproxy", "stunnel"];

/// All of it: a wrapped client and a wrapped server, brokers that judge and put on record, key daemons.
pub(crate) const PORTCULLIS: &str = "portcullis";
/// The relay engine by itself, as between the two ends of one session: each handshake resumes the one before.
pub(crate) const RELAY_RELATED: &str = "relay, related";

/// Where wrapped servers are; each that is started is at the next port, since what an earlier one has left in TIME_WAIT
/// would cost the next one time to find a port of its own.
const ORDINARY: u16 = 7000;
/// The same, of a service with related connections.
const CONTROL: u16 = 7500;
/// Where other systems' server sides are, and the servers behind them.
const MIDDLE: u16 = 8000;
const BEHIND: u16 = 8500;
/// So many are started at most.
const MOST: u16 = 500;
/// Rules in force at both ends, beside those that decide.
const RULES: usize = 1000;

/// A system that is up, between its client and its server; dropping it ends all.
pub(crate) struct Running {
    /// The two sides, where they are ours to start.
    sides: Vec<Child>,
    /// State folders, where a supervisor starts them.
    states: Vec<PathBuf>,
    pub(crate) client: Program,
    server: Program,
}

/// Writes the policy that is in force at both ends.
pub(crate) fn write_policy(folder: &Path) -> Outcome<()> {
    let mut text = format!(
        "service ordinary = tcp/{ORDINARY}-{};\nservice control = tcp/{CONTROL}-{}, related;\n\
         inside = x509{{name=\"*.example.com\"}};\nprogram = process{{exe=\"/**/tls\"}};\n\
         allow ordinary(inside & program, inside & program);\nallow control(inside & program, inside & program);\n",
        CONTROL - 1,
        MIDDLE - 1,
    );
    for n in 0..RULES {
        let (high, low) = (n / 256, n % 256);
        text.push_str(&format!("allow https(*, IPv4{{172.{}.{low}.0/24}});\n", 16 + high));
    }
    Ok(fs::write(folder.join("bench.pol"), text)?)
}

impl Running {
    /// Starts `name` between a client and a server. `control`: of a service with related connections.
    pub(crate) fn start(
        name: &str,
        folder: &Path,
        far: &Far,
        server: Server,
        control: bool,
    ) -> Outcome<Self> {
        static STARTED: AtomicU16 = AtomicU16::new(0);
        let nth = STARTED.fetch_add(1, Ordering::Relaxed) % MOST;
        let me = std::env::current_exe()?;
        let serve = |command: &mut Command, at: SocketAddr| {
            command.arg("serve").arg(server.to_string()).arg(at.to_string());
        };
        if name == PORTCULLIS {
            let to = SocketAddr::from((FAR, nth + if control { CONTROL } else { ORDINARY }));
            let states = [certificates::far(folder), certificates::near(folder)];
            let [mut serves, mut opens] = states.each_ref().map(|state| wrapped(state, folder, &me));
            serve(&mut serves, to);
            let mut server = Program::start(far.carry(&serves))?;
            server.hear()?;
            opens.arg("load").arg(to.to_string());
            let client = Program::start(opens)?;
            let mut running = Self { sides: Vec::new(), states: states.into(), client, server };
            // It runs, so its broker serves.
            running.client.ask::<1>("hello")?;
            return Ok(running);
        }
        let middle = SocketAddr::from((FAR, MIDDLE + nth));
        let behind = SocketAddr::from((Ipv4Addr::LOCALHOST, BEHIND + nth));
        let mut serves = far.command(&me);
        serve(&mut serves, behind);
        let mut server = Program::start(serves)?;
        server.hear()?;
        let entry = load::free(Ipv4Addr::LOCALHOST)?;
        let mut opens = Command::new(&me);
        opens.arg("load").arg(entry.to_string());
        let client = Program::start(opens)?;
        let mut running = Self { sides: Vec::new(), states: Vec::new(), client, server };
        for (role, listen, target) in [("server", middle, behind), ("client", entry, middle)] {
            let mut command = command(name, role, listen, target, folder)?;
            if role == "server" {
                command = far.carry(&command);
            }
            let log = fs::File::create(folder.join(format!("{name}-{role}.log")))?;
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            running.sides.push(command.spawn()?);
            wait_for(listen)?;
        }
        Ok(running)
    }

    /// The processes of both sides, and whether they are key daemons.
    fn family(&self) -> Vec<(u32, bool)> {
        let started = self.sides.iter().flat_map(|side| process::family(side.id())).map(|pid| (pid, false));
        started.chain(self.states.iter().flat_map(|state| process::of_state(state))).collect()
    }

    /// Seconds of processor time: of both sides, and with client and server.
    pub(crate) fn cpu(&self) -> Outcome<(f64, f64)> {
        let mut sides = 0.0;
        for (pid, _) in self.family() {
            sides += process::cpu(pid)?;
        }
        Ok((sides, sides + process::cpu(self.client.pid())? + process::cpu(self.server.pid())?))
    }

    /// KiB of anonymous memory: of both sides, and of their key daemons.
    pub(crate) fn memory(&self) -> Outcome<(f64, f64)> {
        let (mut all, mut keyd) = (0.0, 0.0);
        for (pid, is_keyd) in self.family() {
            let here = process::memory(pid)?;
            all += here;
            keyd += if is_keyd { here } else { 0.0 };
        }
        Ok((all, keyd))
    }

    /// Processes that a supervisor keeps end with the last wrapped program.
    fn wait_for_supervisors(&self) {
        let until = Instant::now() + Duration::from_secs(5);
        while self.states.iter().any(|state| !process::of_state(state).is_empty()) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// `portcullis run` of this program.
fn wrapped(state: &Path, folder: &Path, me: &Path) -> Command {
    let mut command = Command::new(beside("portcullis"));
    command.arg("run").arg("--state").arg(state).arg("--policy").arg(folder.join("bench.pol"));
    command.arg("--").arg(me);
    command
}

impl Drop for Running {
    fn drop(&mut self) {
        self.client.end();
        self.server.end();
        self.wait_for_supervisors();
        for side in &mut self.sides {
            // nginx's master ends its workers on SIGTERM.
            let pid = nix::unistd::Pid::from_raw(side.id().cast_signed());
            let _gone = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let until = Instant::now() + Duration::from_secs(2);
            while matches!(side.try_wait(), Ok(None)) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _gone = side.kill();
            let _status = side.wait();
        }
    }
}

/// Shows what both sides last said.
pub(crate) fn show_logs(name: &str, folder: &Path) {
    for role in ["client", "server"] {
        let text = fs::read_to_string(folder.join(format!("{name}-{role}.log"))).unwrap_or_default();
        for line in text.lines().rev().take(5) {
            say(&format!("{name} {role}: {line}"));
        }
    }
}

fn wait_for(address: SocketAddr) -> Outcome<()> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match TcpStream::connect(address) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > until => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn command(name: &str, role: &str, listen: SocketAddr, to: SocketAddr, folder: &Path) -> Outcome<Command> {
    let at = folder.display();
    let own = folder.join(format!("{name}-{role}"));
    fs::create_dir_all(&own)?;
    let file = own.join("conf");
    let client = role == "client";
    let mut command;
    match name {
        "nginx" => {
            let tls = if client {
                format!(
                    "listen {listen} backlog=4096; proxy_ssl on; proxy_ssl_protocols TLSv1.3;
                     proxy_ssl_certificate {at}/chain.pem; proxy_ssl_certificate_key {at}/key.pem;
                     proxy_ssl_trusted_certificate {at}/ca.pem; proxy_ssl_verify on;
                     proxy_ssl_verify_depth 3; proxy_ssl_name {NAME}; proxy_ssl_server_name on;
                     proxy_ssl_session_reuse off;"
                )
            } else {
                format!(
                    "listen {listen} ssl backlog=4096; ssl_protocols TLSv1.3; ssl_certificate {at}/chain.pem;
                     ssl_certificate_key {at}/key.pem; ssl_client_certificate {at}/ca.pem;
                     ssl_verify_client on; ssl_verify_depth 3; ssl_session_cache off;
                     ssl_session_tickets off; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;"
                )
            };
            let own = own.display();
            let text = format!(
                "load_module /usr/lib/nginx/modules/ngx_stream_module.so; daemon off; pid {own}/pid;
                 worker_processes 2; error_log stderr warn; user root;
                 worker_rlimit_nofile 65536; events {{ worker_connections 32768; }}
                 stream {{ server {{ {tls} proxy_pass {to}; tcp_nodelay on; proxy_timeout 1h; }} }}"
            );
            fs::write(&file, text)?;
            command = Command::new("/usr/sbin/nginx");
            command.arg("-e").arg("stderr").arg("-c").arg(&file);
        }
        "haproxy" => {
            let (bind, server) = if client {
                (
                    String::new(),
                    format!(
                        "ssl crt {at}/both.pem ca-file {at}/ca.pem verify required verifyhost {NAME} sni str({NAME}) no-ssl-reuse ssl-min-ver TLSv1.3"
                    ),
                )
            } else {
                (
                    format!(
                        "ssl crt {at}/both.pem ca-file {at}/ca.pem verify required no-tls-tickets ssl-min-ver TLSv1.3 ciphersuites TLS_AES_128_GCM_SHA256"
                    ),
                    String::new(),
                )
            };
            // It wants two descriptors for each, and some for itself.
            let most = load::raise_limit()? / 2 - 20;
            let text = format!(
                "global\n nbthread 2\n maxconn {most}\n tune.ssl.cachesize 0\n\
                 defaults\n mode tcp\n timeout connect 10s\n timeout client 1h\n timeout server 1h\n\
                 frontend f\n bind {listen} backlog 4096 {bind}\n default_backend b\n\
                 backend b\n server s {to} {server}\n"
            );
            fs::write(&file, text)?;
            command = Command::new("/usr/sbin/haproxy");
            command.arg("-db").arg("-f").arg(&file);
        }
        "stunnel" => {
            let (yes, check, ciphers) = if client {
                ("yes", format!("checkHost = {NAME}\nsni = {NAME}"), "")
            } else {
                ("no", String::new(), "ciphersuites = TLS_AES_128_GCM_SHA256")
            };
            let text = format!(
                "foreground = yes\npid =\ndebug = 3\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n\
                 [s]\nclient = {yes}\naccept = {listen}\nconnect = {to}\ncert = {at}/chain.pem\n\
                 key = {at}/key.pem\nCAfile = {at}/ca.pem\nverifyChain = yes\n{check}\n{ciphers}\n\
                 sslVersionMin = TLSv1.3\noptions = NO_TICKET\nsessionResume = no\nTIMEOUTidle = 3600\n"
            );
            fs::write(&file, text)?;
            command = Command::new("/usr/bin/stunnel4");
            command.arg(&file);
        }
        _ => {
            let role = if name == RELAY_RELATED { format!("related {role}") } else { role.to_owned() };
            command = Command::new(std::env::current_exe()?);
            command.arg("relay").arg(role).arg(listen.to_string()).arg(to.to_string()).arg(folder);
        }
    }
    Ok(command)
}
