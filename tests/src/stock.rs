//! Stock TLS programs as peers: they show what a host's folder has for them, and check what they are shown.

use std::path::PathBuf;

use crate::{Finished, Host, Running, trust};

/// What a stock server says to who asks for `/page`.
pub const PAGE: &str = "plain words";
/// Where tunnels listen on their own host, and what they take it to.
const NEAR: u16 = 9000;

/// A program.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stock {
    /// `openssl s_client` and `s_server`.
    Openssl,
    /// curl(1); a client only.
    Curl,
    /// stunnel(8).
    Stunnel,
    /// nginx with its stream module.
    Nginx,
    /// Python's ssl module.
    Python,
}

/// Which certificate it shows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Shows {
    /// What `portcullis ca host` wrote.
    Own,
    /// None.
    Nothing,
    /// One that nobody of the trust domain has signed.
    Foreign,
    /// Its own of last year.
    Expired,
    /// Its own, in TLS 1.2.
    InOldTls,
}

/// A stock program's folder, as `portcullis ca host` writes it, with worse certificates beside the good one.
#[derive(Debug)]
pub struct Papers {
    folder: PathBuf,
}

impl Papers {
    /// Gets them for a host of this name that is no member's address.
    ///
    /// # Panics
    /// openssl cannot make one.
    #[must_use]
    pub fn of(trust: &trust::Trust, name: &str, folder: PathBuf) -> Self {
        trust.certificate(name, &[], &folder);
        trust::expired(&folder);
        trust::foreign(&folder);
        Self { folder }
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn ca(&self) -> String {
        self.file("ca.crt")
    }

    /// Certificate and key.
    fn pair(&self, shows: Shows) -> Option<(String, String)> {
        let name = match shows {
            Shows::Own | Shows::InOldTls => "host",
            Shows::Foreign => "foreign",
            Shows::Expired => "expired",
            Shows::Nothing => return None,
        };
        Some((self.file(&format!("{name}.crt")), self.file(&format!("{name}.key"))))
    }
}

/// What a program is told of the certificate that it shows, if it shows one.
fn lines(pair: Option<&(String, String)>, line: impl Fn(&str, &str) -> String) -> String {
    pair.map(|(crt, key)| line(crt, key)).unwrap_or_default()
}

impl Stock {
    /// Asks 10.77.0.2:8080 for `/page` from a host, not wrapped.
    #[must_use]
    pub fn ask(self, from: &Host, papers: &Papers, shows: Shows) -> Finished {
        let (ca, pair, old) = (papers.ca(), papers.pair(shows), shows == Shows::InOldTls);
        match self {
            Self::Openssl => {
                let pair =
                    lines(pair.as_ref(), |crt, key| format!("-cert {crt} -cert_chain {crt} -key {key}"));
                let old = if old { "-tls1_2" } else { "" };
                let line = format!(
                    "printf 'GET /page HTTP/1.0\\r\\n\\r\\n' | timeout 10 openssl s_client -quiet \
                     -verify_return_error -CAfile {ca} {pair} {old} -connect 10.77.0.2:8080"
                );
                Finished::of(&mut from.plain(&["sh", "-c", &line]))
            }
            Self::Curl => {
                let mut words = vec!["curl", "-sS", "--max-time", "10", "--cacert", &ca];
                if let Some((crt, key)) = &pair {
                    words.extend(["--cert", crt, "--key", key]);
                }
                words.extend(if old { &["--tls-max", "1.2"][..] } else { &[] });
                words.push("https://10.77.0.2:8080/page");
                Finished::of(&mut from.plain(&words))
            }
            Self::Python => {
                let mut words = vec!["/usr/bin/python3", "-c", ASK, &ca, if old { "old" } else { "new" }];
                words.extend(pair.iter().flat_map(|(crt, key)| [crt.as_str(), key]));
                Finished::of(&mut from.plain(&words))
            }
            Self::Stunnel | Self::Nginx => {
                let _tunnel = self.tunnel(from, papers, shows, None);
                let near = format!("http://127.0.0.1:{NEAR}/page");
                Finished::of(&mut from.plain(&["curl", "-sS", "--max-time", "10", &near]))
            }
        }
    }

    /// Serves [`PAGE`] at port 8080 of a host, not wrapped, until the result is dropped.
    ///
    /// # Panics
    /// It does not listen, or cannot serve.
    #[must_use]
    pub fn serve(self, on: &Host, papers: &Papers, shows: Shows) -> Vec<Running> {
        let (ca, pair, old) = (papers.ca(), papers.pair(shows), shows == Shows::InOldTls);
        let (crt, key) = pair.expect("a TLS server shows a certificate");
        on.write("site/page", PAGE);
        let site = on.path("site");
        let running = match self {
            Self::Curl => panic!("curl is no server"),
            Self::Openssl => {
                let old = if old { "-tls1_2" } else { "" };
                let line = format!(
                    "cd {} && exec openssl s_server -accept {}:8080 -cert {crt} -cert_chain {crt} -key {key} \
                     -CAfile {ca} -Verify 3 -verify_return_error -WWW {old}",
                    site.display(),
                    on.address
                );
                vec![Running::start(on.plain(&["sh", "-c", &line]))]
            }
            Self::Python => {
                let (at, site) = (on.address.to_string(), site.display().to_string());
                let old = if old { "old" } else { "new" };
                let words = ["/usr/bin/python3", "-c", SERVE, &at, &site, &ca, old, &crt, &key];
                vec![Running::start(on.plain(&words))]
            }
            Self::Stunnel | Self::Nginx => {
                let site = site.display().to_string();
                let words = ["/usr/bin/python3", "-m", "http.server", "9000", "--bind", "127.0.0.1"];
                let web = Running::start(on.plain(&[&words[..], &["--directory", &site]].concat()));
                on.wait_for_port(NEAR);
                vec![web, self.tunnel(on, papers, shows, Some(on))]
            }
        };
        on.wait_for_port(8080);
        running
    }

    /// Between TLS at port 8080 (of `server`, else of 10.77.0.2) and plain at [`NEAR`] of `on`.
    fn tunnel(self, on: &Host, papers: &Papers, shows: Shows, server: Option<&Host>) -> Running {
        let (ca, pair, old) = (papers.ca(), papers.pair(shows), shows == Shows::InOldTls);
        let near = format!("127.0.0.1:{NEAR}");
        let far = server.map_or("10.77.0.2:8080".to_owned(), |host| format!("{}:8080", host.address));
        let (from, to) = if server.is_some() { (&far, &near) } else { (&near, &far) };
        let words = if self == Self::Stunnel {
            let client = if server.is_some() { "no\nrequireCert = yes" } else { "yes\ncheckIP = 10.77.0.2" };
            let pair = lines(pair.as_ref(), |crt, key| format!("cert = {crt}\nkey = {key}\n"));
            let old = if old { "sslVersionMax = TLSv1.2\n" } else { "" };
            let text = format!(
                "foreground = yes\npid =\nsyslog = no\n[tunnel]\naccept = {from}\nconnect = {to}\nclient = {client}\n\
                 CAfile = {ca}\nverifyChain = yes\n{pair}{old}"
            );
            vec!["stunnel4".to_owned(), on.write("stunnel.conf", text).display().to_string()]
        } else {
            let versions = if old { "TLSv1.2" } else { "TLSv1.3" };
            let side = if server.is_some() { "ssl" } else { "proxy_ssl" };
            let pair = lines(pair.as_ref(), |crt, key| {
                format!("{side}_certificate {crt}; {side}_certificate_key {key};")
            });
            let verify = if server.is_some() {
                format!("ssl_verify_client on; ssl_verify_depth 3; ssl_client_certificate {ca};")
            } else {
                format!(
                    "proxy_ssl on; proxy_ssl_verify on; proxy_ssl_verify_depth 3; \
                     proxy_ssl_name server.example.com; proxy_ssl_trusted_certificate {ca};"
                )
            };
            let listen = if server.is_some() { "ssl" } else { "" };
            let text = format!(
                "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\nuser root; daemon off; master_process off;\n\
                 pid {0}; error_log stderr;\nevents {{}}\nstream {{ server {{ listen {from} {listen}; proxy_pass {to};\n\
                 {side}_protocols {versions}; {pair} {verify} }} }}\n",
                on.path("nginx.pid").display(),
            );
            let config = on.write("tunnel.conf", text).display().to_string();
            vec!["/usr/sbin/nginx".to_owned(), "-c".to_owned(), config]
        };
        let running = Running::start(on.plain(&words));
        on.wait_for_port(if server.is_some() { 8080 } else { NEAR });
        running
    }
}

/// Arguments: file of roots, `old` or `new`, and certificate and key if it shows any.
const ASK: &str = "import http.client, ssl, sys\n\
    ca, how, *pair = sys.argv[1:]\n\
    c = ssl.create_default_context(cafile=ca)\n\
    if pair: c.load_cert_chain(*pair)\n\
    if how == 'old': c.maximum_version = ssl.TLSVersion.TLSv1_2\n\
    h = http.client.HTTPSConnection('10.77.0.2', 8080, timeout=10, context=c)\n\
    h.request('GET', '/page')\n\
    print(h.getresponse().read().decode())\n";

/// Arguments: address, folder, file of roots, `old` or `new`, certificate, key.
const SERVE: &str = "import functools, http.server, ssl, sys\n\
    at, site, ca, how, crt, key = sys.argv[1:]\n\
    c = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)\n\
    c.verify_mode = ssl.CERT_REQUIRED\n\
    c.load_cert_chain(crt, key)\n\
    if how == 'old': c.maximum_version = ssl.TLSVersion.TLSv1_2\n\
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)\n\
    s = http.server.ThreadingHTTPServer((at, 8080), handler)\n\
    s.socket = c.wrap_socket(s.socket, server_side=True)\n\
    s.serve_forever()\n";
