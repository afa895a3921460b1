//! The systems in the same role: a client side, and at the far end of a link a server side, each a process of its own.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    Outcome,
    certificates::{self, FAR, NAME},
    keyd::Broker,
    load::{self, Backends, Entry, Server},
    process, say,
};

pub(crate) const SYSTEMS: [&str; 5] = ["portcullis", "keyd", "nginx", "haproxy", "stunnel"];

/// The real key daemons, a certificate for each association and a broker's word included.
const KEYD: &str = "keyd";
/// The same, data connections of one control association.
pub(crate) const KEYD_RELATED: &str = "keyd, related";
/// Ours, as between the two ends of one session: each handshake resumes the one before.
pub(crate) const RELATED: &str = "portcullis, related";

/// A pair that is up; dropping it ends it.
pub(crate) struct Running {
    sides: Vec<Child>,
    /// Where connections enter.
    pub(crate) entry: Entry,
    /// What they belong to.
    control: Option<TcpStream>,
}

impl Running {
    /// Starts both sides of `name` in front of a server.
    pub(crate) fn start(name: &str, folder: &Path, backends: &Backends, server: Server) -> Outcome<Self> {
        if name == KEYD || name == KEYD_RELATED {
            return Self::start_keyd(folder, backends, server, name == KEYD_RELATED);
        }
        let backend = backends.serve(server, Ipv4Addr::LOCALHOST)?.local_addr()?;
        let (entry, middle) = (free(Ipv4Addr::LOCALHOST)?, backends.at_far(|| free(FAR))?);
        let mut running = Self { sides: Vec::new(), entry: Entry::Plain(entry), control: None };
        for (role, listen, target) in [("server", middle, backend), ("client", entry, middle)] {
            let mut command = command(name, role, listen, target, folder)?;
            if role == "server" {
                command = backends.far.carry(&command);
            }
            let log = fs::File::create(folder.join(format!("{name}-{role}.log")))?;
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            running.sides.push(command.spawn()?);
            wait_for(listen)?;
        }
        Ok(running)
    }

    /// The daemons themselves: the program at each end has no more to do with them than a wrapped one has.
    fn start_keyd(folder: &Path, backends: &Backends, server: Server, related: bool) -> Outcome<Self> {
        let me = std::env::current_exe()?;
        let listener = backends.serve(server, FAR)?;
        let entry = Entry::Plain(listener.local_addr()?);
        let mut running = Self { sides: Vec::new(), entry, control: None };
        let (far, protects) = Broker::start(backends.far.command(&me), folder)?;
        running.sides.push(far);
        protects.protect(&listener, None)?;
        let (near, opens) = Broker::start(Command::new(&me), &certificates::near(folder))?;
        running.sides.push(near);
        running.entry = Entry::Keyd(opens.clone(), listener.local_addr()?, None);
        if related {
            let mut control = load::open(&running.entry)?;
            control.write_all(b"x")?;
            control.read_exact(&mut [0])?;
            let data = backends.serve(server, FAR)?;
            protects.protect(&data, Some(protects.admitted()))?;
            running.entry = Entry::Keyd(opens.clone(), data.local_addr()?, Some(opens.admitted()));
            running.control = Some(control);
        }
        Ok(running)
    }

    fn family(&self) -> Vec<u32> {
        self.sides.iter().flat_map(|side| process::family(side.id())).collect()
    }

    /// Seconds of processor time, both sides.
    pub(crate) fn cpu(&self) -> Outcome<f64> {
        let mut total = 0.0;
        for pid in self.family() {
            total += process::cpu(pid)?;
        }
        Ok(total)
    }

    /// KiB of anonymous memory, both sides.
    pub(crate) fn memory(&self) -> Outcome<f64> {
        let mut total = 0.0;
        for pid in self.family() {
            total += process::memory(pid)?;
        }
        Ok(total)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.control.take());
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

/// An address that nobody listens on.
fn free(at: Ipv4Addr) -> Outcome<SocketAddr> {
    Ok(TcpListener::bind((at, 0))?.local_addr()?)
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
                 events {{ worker_connections 16384; }}
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
            let text = format!(
                "global\n nbthread 2\n maxconn 9000\n tune.ssl.cachesize 0\n\
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
            let role = if name == RELATED { format!("related {role}") } else { role.to_owned() };
            command = Command::new(std::env::current_exe()?);
            command.arg("relay").arg(role).arg(listen.to_string()).arg(to.to_string()).arg(folder);
        }
    }
    Ok(command)
}
