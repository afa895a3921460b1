//! FTP daemons and clients as Debian has them, set up for one test.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use crate::{Host, Running, built};

/// The whole policy under which all of them work.
pub const POLICY: &str = "\
service ftp = tcp/21, related;
clients = IPv4{10.77.0.1} | IPv6{fd77::1};
servers = IPv4{10.77.0.2} | IPv6{fd77::2};
allow ftp(clients, servers);
";

/// Name of the file that is there to be fetched.
pub const FILE: &str = "report.bin";

/// A daemon.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Daemon {
    /// Its privileged parent makes the data sockets.
    Vsftpd,
    /// Its session process makes them.
    Proftpd,
    /// A privilege separation helper makes them.
    PureFtpd,
    /// One process per session, under inetd.
    Inetutils,
    /// One process for all sessions.
    Pyftpdlib,
}

/// A client.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Client {
    /// lftp(1).
    Lftp,
    /// curl(1).
    Curl,
    /// tnftp(1).
    Tnftp,
    /// ftplib of Python.
    Ftplib,
}

/// How the data connection comes about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mode {
    /// RFC 2428.
    Epsv,
    /// RFC 959.
    Pasv,
    /// RFC 2428.
    Eprt,
    /// RFC 959.
    Port,
}

impl Mode {
    /// Whether the server opens the port.
    #[must_use]
    pub const fn is_passive(self) -> bool {
        matches!(self, Self::Epsv | Self::Pasv)
    }
}

/// Bytes that no other file has.
#[must_use]
pub fn content(size: usize) -> Vec<u8> {
    (0..size).map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect()
}

impl Daemon {
    /// Whether it serves IPv6 as well, as set up here.
    #[must_use]
    pub const fn has_ipv6(self) -> bool {
        !matches!(self, Self::Inetutils)
    }

    /// Writes what it needs into the host's folder; the result is its command line. It serves `size` bytes
    /// as [`FILE`] to anybody.
    #[must_use]
    pub fn command(self, host: &Host, size: usize) -> Vec<String> {
        let file = host.write(&format!("files/{FILE}"), content(size));
        let files = file.parent().unwrap().to_owned();
        let words: Vec<String> = match self {
            Self::Vsftpd => vsftpd(host, &files),
            Self::Proftpd => proftpd(host, &files),
            Self::PureFtpd => {
                let pure = built::unpacked("pure-ftpd/usr/sbin/pure-ftpd").display().to_string();
                let mut words = vec![pure, "-S".into(), "21".into(), "-e".into(), "-H".into(), "-g".into()];
                words.push(host.path("pure.pid").display().to_string());
                at_home_of_ftp(&files, &words)
            }
            Self::Inetutils => {
                let ftpd = built::unpacked("inetutils-ftpd/usr/sbin/ftpd");
                let line = format!("21 stream tcp nowait root {} ftpd -A -q\n", ftpd.display());
                let config = host.write("inetd.conf", line).display().to_string();
                let words = ["inetutils-inetd", "-d", "--pidfile", "/dev/null", &config].map(Into::into);
                at_home_of_ftp(&files, &words)
            }
            Self::Pyftpdlib => {
                let script = host.write("server.py", PYFTPDLIB);
                ["/usr/bin/python3".into(), script.display().to_string(), files.display().to_string()].into()
            }
        };
        words
    }
}

const PYFTPDLIB: &str = r#"
import sys
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer
authorizer = DummyAuthorizer()
authorizer.add_anonymous(sys.argv[1])
class Handler(FTPHandler):
    pass
Handler.authorizer = authorizer
FTPServer(("::", 21), Handler).serve_forever()
"#;

fn vsftpd(host: &Host, files: &Path) -> Vec<String> {
    let empty = host.path("empty");
    fs::create_dir_all(&empty).unwrap();
    let config = format!(
        "listen=NO\nlisten_ipv6=YES\nbackground=NO\nanonymous_enable=YES\nlocal_enable=NO\nno_anon_password=YES\n\
         anon_root={}\nsecure_chroot_dir={}\nconnect_from_port_20=YES\nxferlog_enable=NO\n",
        files.display(),
        empty.display(),
    );
    let config = host.write("vsftpd.conf", config);
    vec!["/usr/sbin/vsftpd".into(), config.display().to_string()]
}

fn proftpd(host: &Host, files: &Path) -> Vec<String> {
    let program = built::unpacked("proftpd-core/usr/sbin/proftpd");
    let modules = built::unpacked("proftpd-core/usr/lib/proftpd");
    let folder = host.path("");
    let config = format!(
        "ServerName test\nServerType standalone\nDefaultServer on\nPort 21\nUseIPv6 on\nUser nobody\n\
         Group nogroup\nModulePath {}\nScoreboardFile {2}scoreboard\nPidFile {2}proftpd.pid\n\
         DelayTable none\nSystemLog none\nWtmpLog off\nRequireValidShell off\nUseFtpUsers off\nAuthPAM off\n\
         <Anonymous {1}>\nUser nobody\nGroup nogroup\nUserAlias anonymous nobody\nUserAlias ftp nobody\n\
         AnonRequirePassword off\n</Anonymous>\n",
        modules.display(),
        files.display(),
        folder.display(),
    );
    let config = host.write("proftpd.conf", config);
    vec![program.display().to_string(), "--nodaemon".into(), "--config".into(), config.display().to_string()]
}

/// Some daemons serve the home of user `ftp` to anonymous users and nothing else: it gets our files, in a
/// mount namespace of the daemon's own.
fn at_home_of_ftp(files: &Path, words: &[String]) -> Vec<String> {
    let script = "home=$(getent passwd ftp | cut -d: -f6) && mkdir -p \"$home\" && mount --bind \"$0\" \"$home\" && exec \"$@\"";
    let mut whole: Vec<String> = ["unshare", "--mount", "sh", "-c", script].map(Into::into).into();
    whole.push(files.display().to_string());
    whole.extend_from_slice(words);
    whole
}

impl Client {
    /// All modes this client knows.
    #[must_use]
    pub const fn modes(self) -> &'static [Mode] {
        match self {
            // lftp speaks the old commands over IPv4 unless told otherwise, and EPRT only over IPv6.
            Self::Lftp => &[Mode::Epsv, Mode::Pasv, Mode::Port],
            Self::Curl => &[Mode::Epsv, Mode::Pasv, Mode::Eprt, Mode::Port],
            Self::Tnftp => &[Mode::Epsv, Mode::Pasv, Mode::Eprt, Mode::Port],
            Self::Ftplib => &[Mode::Pasv, Mode::Port],
        }
    }

    /// Its command line for fetching [`FILE`] from an address to `to`.
    #[must_use]
    pub fn fetch(self, host: &Host, from: &str, mode: Mode, to: &Path) -> Vec<String> {
        let to = to.display().to_string();
        let yes = |is: bool| if is { "yes" } else { "no" };
        match self {
            Self::Lftp => {
                let script = format!(
                    "set net:max-retries 1; set net:timeout 10; set ftp:passive-mode {}; set ftp:prefer-epsv {}; \
                     open {from}; get {FILE} -o {to}",
                    yes(mode.is_passive()),
                    yes(mode == Mode::Epsv),
                );
                vec!["lftp".into(), "--norc".into(), "-c".into(), script]
            }
            Self::Curl => {
                let mut words: Vec<String> =
                    ["curl", "-sS", "--max-time", "30", "-o", &to].map(Into::into).into();
                let how: &[&str] = match mode {
                    Mode::Epsv => &[],
                    Mode::Pasv => &["--disable-epsv"],
                    Mode::Eprt => &["--ftp-port", "-"],
                    Mode::Port => &["--ftp-port", "-", "--disable-eprt"],
                };
                words.extend(how.iter().map(|w| (*w).to_owned()));
                words.push(format!("ftp://{from}/{FILE}"));
                words
            }
            Self::Tnftp => {
                let rc = if matches!(mode, Mode::Epsv | Mode::Eprt) { "epsv4 on" } else { "epsv4 off" };
                host.write(
                    "home/.netrc",
                    format!("default login anonymous password x\nmacdef init\n{rc}\n\n"),
                );
                fs::set_permissions(host.path("home/.netrc"), fs::Permissions::from_mode(0o600)).unwrap();
                let way = if mode.is_passive() { "-p" } else { "-A" };
                let home = format!("HOME={}", host.path("home").display());
                ["env", &home, "tnftp", way, "-V", "-q", "20", "-o", &to, &format!("ftp://{from}/{FILE}")]
                    .map(Into::into)
                    .into()
            }
            Self::Ftplib => {
                let script = "import ftplib, sys\n\
                    f = ftplib.FTP(sys.argv[1], timeout=20)\n\
                    f.login()\n\
                    f.set_pasv(sys.argv[2] == 'yes')\n\
                    f.retrbinary('RETR ' + sys.argv[3], open(sys.argv[4], 'wb').write)\n\
                    f.quit()\n";
                ["/usr/bin/python3", "-c", script, from, yes(mode.is_passive()), FILE, &to]
                    .map(Into::into)
                    .into()
            }
        }
    }
}

/// A session that says which port was opened for its data, and goes on when told to: there, or at the port it is
/// told.
const SESSION: &str = "import ftplib, socket, sys\n\
    f = ftplib.FTP('10.77.0.2', timeout=20)\n\
    f.login()\n\
    f.voidcmd('TYPE I')\n\
    if sys.argv[1] == 'passive':\n    \
        host, port = f.makepasv()\n\
    else:\n    \
        s = f.makeport(); port = s.getsockname()[1]\n\
    print('port', port, flush=True)\n\
    port = int(sys.stdin.readline().strip() or port)\n\
    if sys.argv[1] == 'passive':\n    \
        s = socket.create_connection((host, port)); f.sendcmd('RETR report.bin')\n\
    else:\n    \
        f.sendcmd('RETR report.bin'); s = s.accept()[0]\n\
    got = b''\n\
    while True:\n    \
        part = s.recv(65536)\n    \
        if not part: break\n    \
        got += part\n\
    open(sys.argv[2], 'wb').write(got)\n\
    s.close(); f.voidresp(); f.quit()\n";

/// See [`SESSION`].
#[derive(Debug)]
pub struct Session<'a> {
    client: &'a Host,
    /// The client.
    pub running: Running,
    /// The port that one side opened for the data; nobody has come to it yet.
    pub port: u16,
}

impl<'a> Session<'a> {
    /// Logs in at 10.77.0.2 and has a data port opened, `passive` or `active`.
    #[must_use]
    pub fn begin(client: &'a Host, way: &str) -> Self {
        Self::by(client, way, |words| client.start(words))
    }

    /// The same by a client that is not wrapped.
    #[must_use]
    pub fn begin_plain(client: &'a Host, way: &str) -> Self {
        Self::by(client, way, |words| Running::start(client.plain(words)))
    }

    fn by(client: &'a Host, way: &str, start: impl FnOnce(&[&str]) -> Running) -> Self {
        let to = client.path("got").display().to_string();
        let running = start(&["/usr/bin/python3", "-c", SESSION, way, &to]);
        let port = running.line("port ").trim_start_matches("port ").parse().unwrap();
        Self { client, running, port }
    }

    /// Transfers the file; it must arrive whole.
    ///
    /// # Panics
    /// It does not.
    pub fn finish(mut self, size: usize) {
        self.running.say("\n");
        assert_eq!(self.running.wait(), 0, "{}", self.running.line("Error"));
        assert!(std::fs::read(self.client.path("got")).unwrap() == content(size), "the content differs");
    }
}
