//! Stock TLS on the other side: `openssl s_client` and `s_server`, let in with a proper certificate and kept
//! out otherwise.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "what fails in a test shall stop it"
)]
mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use common::*;
use portcullis_relay::{Ending, Engine, Event, Failure, Role};

fn files(folder: &Path, domain: &Domain, leaf: &Leaf) {
    fs::write(folder.join("ca.pem"), domain.root.pem()).unwrap();
    fs::write(folder.join("leaf.pem"), &leaf.pem[0]).unwrap();
    fs::write(folder.join("issuer.pem"), &leaf.pem[1]).unwrap();
    fs::write(folder.join("key.pem"), leaf.key.serialize_pem()).unwrap();
}

/// A program of the tests, ended with it.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _status = self.0.wait();
    }
}

fn openssl(folder: &Path, words: &str) -> Program {
    openssl_telling(folder, words, Stdio::null())
}

fn openssl_telling(folder: &Path, words: &str, errors: Stdio) -> Program {
    let child = Command::new("openssl")
        .args(words.split_whitespace())
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .expect("openssl, of the Debian package of that name");
    Program(child)
}

const PROVED: &str = "-cert leaf.pem -cert_chain issuer.pem -key key.pem";

/// Our server, one stock client with `words`: what the engine says of it, and the program's socket.
fn serve(words: &str) -> (Engine, Event, Option<TcpStream>, Program) {
    let folder = tempfile::tempdir().unwrap();
    let domain = Domain::new();
    let leaf = domain.leaf(NAME);
    files(folder.path(), &domain, &leaf);
    let engine = Engine::start(limits(1)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let program = openssl(
        folder.path(),
        &format!("s_client -quiet -connect {to} -CAfile ca.pem -verify_return_error {words}"),
    );
    let (outer, _) = listener.accept().unwrap();
    engine.handshake(outer.into(), Role::Server { side: domain.server(&leaf), mixed: None });
    let event = event(&engine);
    let far = match &event {
        Event::Ready { id, .. } => {
            let (far, inner) = tcp_pair();
            far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            engine.splice(*id, inner.into());
            Some(far)
        }
        _ => None,
    };
    (engine, event, far, program)
}

#[test]
fn a_stock_client_with_a_certificate_is_served() {
    for group in ["X25519", "X25519:P-256"] {
        let (engine, ready, far, mut program) = serve(&format!("{PROVED} -tls1_3 -groups {group}"));
        let Event::Ready { tls: Some(tls), .. } = &ready else { panic!("{ready:?}") };
        assert_eq!(tls.kex, "X25519");
        assert_eq!(tls.certificates.len(), 2);
        let mut far = far.unwrap();
        let (mut input, mut output) = (program.0.stdin.take().unwrap(), program.0.stdout.take().unwrap());
        let sent = noise(5, 300_000);
        input.write_all(&sent).unwrap();
        let mut got = vec![0; sent.len()];
        far.read_exact(&mut got).unwrap();
        assert!(got == sent, "other bytes than were sent");
        far.write_all(&sent).unwrap();
        output.read_exact(&mut got).unwrap();
        assert!(got == sent, "other bytes came back");
        drop(far);
        drop(input);
        assert!(matches!(event(&engine), Event::Closed { .. }));
    }
}

#[test]
fn every_suite_is_spoken() {
    for suite in ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"] {
        let (_engine, ready, far, mut program) = serve(&format!("{PROVED} -ciphersuites {suite}"));
        let Event::Ready { tls: Some(tls), .. } = &ready else { panic!("{ready:?}") };
        assert_eq!(tls.cipher, suite);
        let mut got = [0; 5];
        program.0.stdin.as_mut().unwrap().write_all(b"hello").unwrap();
        far.unwrap().read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
    }
}

#[test]
fn a_stock_client_may_change_keys() {
    // `K` on a line of its own is a KeyUpdate that asks for one in return; `k` asks for none. Not with -quiet.
    let folder = tempfile::tempdir().unwrap();
    let domain = Domain::new();
    let leaf = domain.leaf(NAME);
    files(folder.path(), &domain, &leaf);
    let engine = Engine::start(limits(1)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let mut program =
        openssl_telling(folder.path(), &format!("s_client -connect {to} {PROVED}"), Stdio::piped());
    let (outer, _) = listener.accept().unwrap();
    engine.handshake(outer.into(), Role::Server { side: domain.server(&leaf), mixed: None });
    let Event::Ready { id, .. } = event(&engine) else { panic!("not ready") };
    let (mut far, inner) = tcp_pair();
    far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    engine.splice(id, inner.into());
    let input = program.0.stdin.as_mut().unwrap();
    let mut errors = BufReader::new(program.0.stderr.take().unwrap()).lines().map_while(Result::ok);
    for key in ["K\n", "k\n", "K\n"] {
        // It acts on a line that it reads alone, and says so.
        input.write_all(key.as_bytes()).unwrap();
        assert!(errors.any(|line| line.ends_with("KEYUPDATE")));
        input.write_all(b"more\n").unwrap();
        let mut got = [0; 5];
        far.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"more\n");
        far.write_all(b"back\n").unwrap();
    }
    drop(far);
    let mut output = String::new();
    program.0.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(output.matches("back\n").count(), 3, "{output}");
}

#[test]
fn a_stock_client_is_kept_out() {
    for (words, why) in [
        ("-tls1_3", "no certificate"),
        (&format!("{PROVED} -tls1_2"), "TLS 1.2"),
        (&format!("{PROVED} -groups P-384"), "no common group"),
        (&format!("{PROVED} -ciphersuites TLS_AES_128_CCM_SHA256"), "no common suite"),
    ] {
        let (_engine, failed, far, mut program) = serve(words);
        assert!(matches!(&failed, Event::Failed { failure: Failure::Tls(_), .. }), "{why}: {failed:?}");
        assert!(far.is_none());
        // Told by an alert, it ends by itself and says so.
        assert!(!program.0.wait().unwrap().success(), "{why}");
    }
}

#[test]
fn a_certificate_of_another_domain_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Domain::new(), Domain::new());
    let stranger = theirs.leaf(NAME);
    files(folder.path(), &theirs, &stranger);
    let engine = Engine::start(limits(1)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let _program = openssl(folder.path(), &format!("s_client -quiet -connect {to} {PROVED}"));
    let (outer, _) = listener.accept().unwrap();
    engine.handshake(outer.into(), Role::Server { side: ours.server(&ours.leaf(NAME)), mixed: None });
    let Event::Failed { shown, .. } = event(&engine) else { panic!("let in") };
    assert_eq!(shown.first(), stranger.chain.first());
}

/// A port that nobody uses now, and that the kernel gives nobody by chance.
fn free() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + u16::try_from(std::process::id() % 1000).unwrap() * 10;
    loop {
        let at = SocketAddr::from(([127, 0, 0, 1], first + NEXT.fetch_add(1, Ordering::Relaxed) % 100));
        if TcpListener::bind(at).is_ok() {
            return at;
        }
    }
}

fn connect(to: SocketAddr) -> TcpStream {
    for _ in 0..1000 {
        if let Ok(stream) = TcpStream::connect(to) {
            return stream;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("nobody listens");
}

#[test]
fn a_stock_server_is_served_tickets_and_all() {
    let folder = tempfile::tempdir().unwrap();
    let domain = Domain::new();
    let leaf = domain.leaf(NAME);
    files(folder.path(), &domain, &leaf);
    let port = free();
    let mut program = openssl(
        folder.path(),
        &format!(
            "s_server -quiet -accept {port} {PROVED} -CAfile ca.pem -Verify 3 -verify_return_error -naccept 1"
        ),
    );
    let engine = Engine::start(limits(1)).unwrap();
    let side = domain.client(&leaf, true);
    engine.handshake(connect(port).into(), Role::Client { side, name: name() });
    let ready = event(&engine);
    let Event::Ready { id, tls: Some(tls) } = ready else { panic!("{ready:?}") };
    assert_eq!(tls.certificates, leaf.chain);
    let (mut near, inner) = tcp_pair();
    near.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    engine.splice(id, inner.into());
    let sent = noise(6, 300_000);
    near.write_all(&sent).unwrap();
    let mut got = vec![0; sent.len()];
    program.0.stdout.as_mut().unwrap().read_exact(&mut got).unwrap();
    assert!(got == sent, "other bytes than were sent");
    program.0.stdin.as_mut().unwrap().write_all(b"answer").unwrap();
    let mut got = [0; 6];
    near.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"answer");
}

#[test]
fn a_stock_server_of_tls_1_2_or_another_domain_is_refused() {
    for (words, domain_of_server) in [("-tls1_2", 0), ("", 1)] {
        let folder = tempfile::tempdir().unwrap();
        let domains = [Domain::new(), Domain::new()];
        let leaf = domains[domain_of_server].leaf(NAME);
        files(folder.path(), &domains[domain_of_server], &leaf);
        let port = free();
        let _program = openssl(folder.path(), &format!("s_server -quiet -accept {port} {PROVED} {words}"));
        let engine = Engine::start(limits(1)).unwrap();
        let side = domains[0].client(&domains[0].leaf(NAME), true);
        engine.handshake(connect(port).into(), Role::Client { side, name: name() });
        let failed = event(&engine);
        let Event::Failed { failure: Failure::Tls(_), shown, .. } = failed else { panic!("{failed:?}") };
        assert_eq!(shown.is_empty(), domain_of_server == 0);
    }
}

#[test]
fn a_stream_without_close_notify_is_a_reset_to_the_program() {
    // s_client killed: its kernel sends FIN, and TLS says nothing.
    let (engine, _, far, mut program) = serve(PROVED);
    let mut far = far.unwrap();
    program.0.stdin.as_mut().unwrap().write_all(b"half a").unwrap();
    let mut got = [0; 6];
    far.read_exact(&mut got).unwrap();
    program.0.kill().unwrap();
    let error = far.read(&mut got).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(matches!(event(&engine), Event::Closed { ending: Ending::Truncated, .. }));
}
