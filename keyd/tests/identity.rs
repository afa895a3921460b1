//! A trust domain on disk, what its certificates prove, and who is refused by which reason.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test says what went wrong by panicking")]

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, TcpListener},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use portcullis_keyd::identity::{
    Authority, Enrolment, Host, IdentityError, Members, PROCESS_VALIDITY, ProcessFacts, ProcessIdentity,
    Refusal, Validity, Verifier,
};
use rustls::{
    ServerConfig, ServerConnection,
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    sign::{CertifiedKey, SingleCertAndKey},
};
use tempfile::TempDir;

const NOW: i64 = 1_800_000_000;

struct Domain {
    folder: TempDir,
    authority: Authority,
}

impl Domain {
    fn new(name: &str, now: i64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::init(folder.path(), name.parse().unwrap(), now).unwrap();
        Self { folder, authority }
    }

    fn host(&mut self, name: &str, address: &str, now: i64) -> Host {
        let with = Enrolment {
            addresses: vec![address.parse().unwrap()],
            ver: Some(7),
            groups: Some(vec!["ops".to_owned()]),
        };
        let out = self.folder.path().join(name);
        self.authority.enrol(&name.parse().unwrap(), &with, &out, now).unwrap();
        Host::load(&out).unwrap()
    }
}

fn facts() -> ProcessFacts {
    ProcessFacts {
        exe: "/usr/sbin/vsftpd".to_owned(),
        sha256: "ab".repeat(32),
        user: "ftp".to_owned(),
        unit: Some("vsftpd.service".to_owned()),
    }
}

fn minted(host: &Host, now: i64) -> ProcessIdentity {
    host.mint(&"vsftpd".parse().unwrap(), &facts(), Validity::process(now)).unwrap()
}

fn at(now: i64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(now.unsigned_abs()))
}

fn check(verifier: &Verifier, chain: &[CertificateDer<'_>], now: i64) -> Result<(), Refusal> {
    let server = verifier.check(&chain[0], &chain[1..], true, at(now)).map(drop);
    let client = verifier.check(&chain[0], &chain[1..], false, at(now)).map(drop);
    assert_eq!(server, client);
    server
}

fn unix_now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_secs().cast_signed()
}

#[test]
fn a_minted_certificate_proves_process_host_and_facts() {
    let mut domain = Domain::new("example.com", NOW);
    let host = domain.host("h1.example.com", "192.0.2.1", NOW);
    let made = minted(&host, NOW);
    let chain = &made.shown.cert;
    let peer = host.verifier().unwrap().check(&chain[0], &chain[1..], true, at(NOW)).unwrap();
    assert_eq!(peer.id.to_string(), "spiffe://example.com/host/h1.example.com/process/vsftpd");
    assert_eq!(peer.id, made.id);
    assert_eq!((peer.host.ver, peer.host.groups.as_slice()), (7, ["ops".to_owned()].as_slice()));
    assert_eq!(peer.process, Some(facts()));
    assert_eq!(peer.names, ["h1.example.com"]);
    assert_eq!(peer.addresses, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    assert_eq!((peer.serial.as_str(), peer.until), (made.serial.as_str(), NOW + PROCESS_VALIDITY));
}

#[test]
fn time_is_kept_with_a_minutes_grace() {
    let mut domain = Domain::new("example.com", NOW);
    let host = domain.host("h1", "192.0.2.1", NOW);
    let (made, verifier) = (minted(&host, NOW), host.verifier().unwrap());
    let chain = &made.shown.cert;
    let end = NOW + PROCESS_VALIDITY;
    assert_eq!(check(&verifier, chain, end + 59), Ok(()));
    assert_eq!(check(&verifier, chain, end + 62), Err(Refusal::Expired));
    assert_eq!(check(&verifier, chain, NOW - 300 - 59), Ok(()));
    assert_eq!(check(&verifier, chain, NOW - 300 - 62), Err(Refusal::NotYetValid));
    // No process outlives what its host signs with.
    let last = NOW + 365 * 24 * 3600;
    assert_eq!(minted(&host, last - 100).validity.until, last);
}

#[test]
fn a_known_leaf_is_judged_as_an_unknown_one() {
    let mut domain = Domain::new("example.com", NOW);
    let host = domain.host("h1", "192.0.2.1", NOW);
    let chain = minted(&host, NOW).shown.cert.clone();
    let known = host.verifier().unwrap();
    assert_eq!(check(&known, &chain, NOW), Ok(()));
    let end = NOW + PROCESS_VALIDITY;
    for owner in [None, Some("h1"), Some("h2")] {
        for now in [NOW, NOW - 400, NOW - 300, end + 30, end + 90] {
            let owner = owner.map(|name| name.parse().unwrap());
            let unknown = host.verifier().unwrap().expecting(owner.clone());
            assert_eq!(check(&known.expecting(owner), &chain, now), check(&unknown, &chain, now));
        }
    }
    // One bit of it is another certificate.
    let leaf = chain[0].to_vec();
    for byte in (0..leaf.len()).step_by(7) {
        let mut spoilt = leaf.clone();
        spoilt[byte] ^= 1;
        let spoilt = CertificateDer::from(spoilt);
        assert!(
            [true, false]
                .map(|server| known.check(&spoilt, &chain[1..], server, at(NOW)))
                .iter()
                .all(Result::is_err)
        );
    }
}

#[test]
fn a_session_is_with_the_certificate_that_it_began_with() {
    use rustls::client::danger::ServerCertVerifier;
    let mut domain = Domain::new("example.com", NOW);
    let host = domain.host("h1", "192.0.2.1", NOW);
    let (first, second) = (minted(&host, NOW), minted(&host, NOW));
    let (verifier, seen) = host.verifier().unwrap().for_one(None);
    let shown = |made: &ProcessIdentity, now| {
        let (chain, name) = (&made.shown.cert, "h1".try_into().unwrap());
        verifier.verify_server_cert(&chain[0], &chain[1..], &name, &[], at(now)).map(drop)
    };
    assert_eq!(shown(&first, NOW), Ok(()));
    assert_eq!(shown(&first, NOW + 60), Ok(()), "again");
    let other = shown(&second, NOW).unwrap_err().to_string();
    assert!(other.contains("OtherSession"), "{other}");
    assert_eq!(seen.verdict().unwrap().as_ref().unwrap().serial, first.serial);
    assert!(shown(&first, NOW + PROCESS_VALIDITY + 62).is_err());
}

#[test]
fn a_stranger_to_the_domain_is_refused() {
    let mut ours = Domain::new("example.com", NOW);
    let mut theirs = Domain::new("other.example", NOW);
    let (host, other) = (ours.host("h1", "192.0.2.1", NOW), theirs.host("h1", "192.0.2.1", NOW));
    let chain = &minted(&other, NOW).shown.cert;
    assert_eq!(check(&host.verifier().unwrap(), chain, NOW), Err(Refusal::UnknownIssuer));
    assert_eq!(check(&other.verifier().unwrap(), chain, NOW), Ok(()), "the control");
    let mut imitated = Domain::new("example.com", NOW);
    let chain = &minted(&imitated.host("h1", "192.0.2.1", NOW), NOW).shown.cert;
    assert!(matches!(check(&host.verifier().unwrap(), chain, NOW), Err(Refusal::Chain(_))), "same names");
    let chain = &minted(&other, NOW).shown.cert;
    // Without the issuing certificate there is no path.
    assert_eq!(check(&other.verifier().unwrap(), &chain[..1], NOW), Err(Refusal::UnknownIssuer));
}

#[test]
fn revocation_takes_one_process_one_host_and_nothing_else() {
    let mut domain = Domain::new("example.com", NOW);
    let (one, two) = (domain.host("h1", "192.0.2.1", NOW), domain.host("h2", "192.0.2.2", NOW));
    let (a, b, c) = (minted(&one, NOW), minted(&one, NOW), minted(&two, NOW));
    let folder = domain.folder.path().join("h2");
    let verdicts = |host: &Host| {
        let verifier = host.verifier().unwrap();
        [&a, &b, &c].map(|made| check(&verifier, &made.shown.cert, NOW).is_ok())
    };
    let mut h2 = Host::load(&folder).unwrap();
    assert_eq!(verdicts(&h2), [true, true, true]);

    domain.authority.revoke_serial(&a.serial.to_uppercase(), NOW).unwrap();
    domain.authority.publish(&folder).unwrap();
    assert_eq!(verdicts(&h2), [true, true, true], "not read yet");
    assert!(h2.refresh(&folder.join("members.toml")).unwrap());
    assert_eq!(verdicts(&h2), [false, true, true]);

    domain.authority.revoke_host(&"h1".parse().unwrap(), NOW).unwrap();
    domain.authority.publish(&folder).unwrap();
    h2.refresh(&folder.join("members.toml")).unwrap();
    assert_eq!(verdicts(&h2), [false, false, true]);
    let refusal = check(&h2.verifier().unwrap(), &b.shown.cert, NOW).unwrap_err();
    assert!(matches!(refusal, Refusal::Revoked { host, .. } if host.as_str() == "h1"));
    assert!(h2.members().owner("192.0.2.1".parse().unwrap()).is_some(), "its address stays protected");

    // Enrolled again it is believed again; what it had before is not.
    let again = domain.host("h1", "192.0.2.1", NOW);
    assert!(check(&again.verifier().unwrap(), &minted(&again, NOW).shown.cert, NOW).is_ok());
    assert!(check(&again.verifier().unwrap(), &b.shown.cert, NOW).is_err());
}

#[test]
fn another_members_certificate_at_a_members_address_is_refused() {
    let mut domain = Domain::new("example.com", NOW);
    let (one, _) = (domain.host("h1", "192.0.2.1", NOW), domain.host("h2", "192.0.2.2", NOW));
    let one = (Host::load(&domain.folder.path().join("h2")).unwrap(), minted(&one, NOW));
    let (h2, chain) = (one.0, one.1.shown.cert.clone());
    let expecting = |address: &str| {
        let owner = h2.members().owner(address.parse().unwrap()).map(|member| member.name.clone());
        check(&h2.verifier().unwrap().expecting(owner), &chain, NOW)
    };
    assert_eq!(expecting("192.0.2.1"), Ok(()));
    assert_eq!(expecting("::ffff:192.0.2.1"), Ok(()));
    assert_eq!(expecting("192.0.2.99"), Ok(()), "nobody's address");
    assert!(matches!(expecting("192.0.2.2"), Err(Refusal::OtherMember { .. })));
}

/// What a host's stolen issuing key can make with a stock tool.
mod forged {
    use super::*;
    use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};

    fn leaf(folder: &Path, change: impl FnOnce(&mut CertificateParams)) -> Vec<CertificateDer<'static>> {
        let pem = fs::read_to_string(folder.join("issuer.crt")).unwrap();
        let key = KeyPair::from_pem(&fs::read_to_string(folder.join("issuer.key")).unwrap()).unwrap();
        let issuing = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let issuer = Issuer::from_ca_cert_der(&issuing, &key).unwrap();
        let host = CertificateDer::from_pem_file(folder.join("host.crt")).unwrap();
        // As an honest one, extension included.
        let (_, honest) = x509_parser::parse_x509_certificate(&host).unwrap();
        let oid = x509_parser::der_parser::Oid::from(&[2, 25, 5_774_036_201_117_853_301]).unwrap();
        let content = honest.get_extension_unique(&oid).unwrap().unwrap().value.to_vec();
        let mut params = CertificateParams::default();
        params.not_before = time::OffsetDateTime::from_unix_timestamp(NOW - 60).unwrap();
        params.not_after = time::OffsetDateTime::from_unix_timestamp(NOW + 60).unwrap();
        params.is_ca = IsCa::ExplicitNoCa;
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![
            uri("spiffe://example.com/host/h1/process/p"),
            SanType::DnsName("h1".try_into().unwrap()),
            SanType::IpAddress("192.0.2.1".parse().unwrap()),
        ];
        params.custom_extensions =
            vec![rcgen::CustomExtension::from_oid_content(&[2, 25, 5_774_036_201_117_853_301], content)];
        change(&mut params);
        let made = params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap();
        vec![made.der().clone(), issuing]
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    #[test]
    fn a_host_speaks_only_for_itself() {
        let mut domain = Domain::new("example.com", NOW);
        let host = domain.host("h1", "192.0.2.1", NOW);
        let folder = domain.folder.path().join("h1");
        let verifier = host.verifier().unwrap();
        let verdict = |change: fn(&mut CertificateParams)| check(&verifier, &leaf(&folder, change), NOW);
        assert_eq!(verdict(|_| ()), Ok(()), "the control");
        assert!(matches!(
            verdict(|p| p.subject_alt_names[0] = uri("spiffe://example.com/host/h2/process/p")),
            Err(Refusal::OtherHost { .. })
        ));
        assert!(matches!(
            verdict(|p| p.subject_alt_names[0] = uri("spiffe://evil.org/host/h1/process/p")),
            Err(Refusal::OtherDomain(_))
        ));
        for outside in [
            SanType::DnsName("h2".try_into().unwrap()),
            SanType::IpAddress("192.0.2.2".parse().unwrap()),
            SanType::IpAddress("2001:db8::1".parse().unwrap()),
        ] {
            let chain = leaf(&folder, |p| p.subject_alt_names.push(outside.clone()));
            assert!(matches!(check(&verifier, &chain, NOW), Err(Refusal::Chain(_))), "{outside:?}");
        }
        assert!(matches!(
            verdict(|p| p.subject_alt_names.push(uri("spiffe://example.com/host/h1"))),
            Err(Refusal::NoSpiffeId(_))
        ));
        assert!(matches!(verdict(|p| drop(p.subject_alt_names.remove(0))), Err(Refusal::NoSpiffeId(_))));
        assert!(matches!(verdict(|p| drop(p.subject_alt_names.remove(1))), Err(Refusal::Nameless(_))));
        assert!(matches!(verdict(|p| p.custom_extensions.clear()), Err(Refusal::NotFromAHost)));
        assert!(matches!(
            verdict(|p| p.custom_extensions = vec![rcgen::CustomExtension::from_oid_content(
                &[2, 25, 5_774_036_201_117_853_301],
                b"\x0c\x1b{\"host\":\"h1\",\"ver\":99999999}".to_vec(),
            )]),
            Err(Refusal::Unreadable | Refusal::OtherHost { .. })
        ));
        // A signing certificate under the host's: path length 0.
        assert!(check(&verifier, &under_another_issuer(&folder), NOW).is_err());
    }

    fn under_another_issuer(folder: &Path) -> Vec<CertificateDer<'static>> {
        let key = KeyPair::generate().unwrap();
        let middle = leaf(folder, |p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
        let pem = fs::read_to_string(folder.join("issuer.key")).unwrap();
        let issuer_key = KeyPair::from_pem(&pem).unwrap();
        let issuer = Issuer::from_ca_cert_der(&middle[1], &issuer_key).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let middle_made = params.signed_by(&key, &issuer).unwrap();
        let middle_issuer = Issuer::from_params(&params, &key);
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names =
            vec![uri("spiffe://example.com/host/h1"), SanType::DnsName("h1".try_into().unwrap())];
        let made = leaf.signed_by(&KeyPair::generate().unwrap(), &middle_issuer).unwrap();
        vec![made.der().clone(), middle_made.der().clone(), middle[1].clone()]
    }
}

#[test]
fn a_host_without_addresses_may_name_none() {
    let mut domain = Domain::new("example.com", NOW);
    let out = domain.folder.path().join("h1");
    domain.authority.enrol(&"h1".parse().unwrap(), &Enrolment::default(), &out, NOW).unwrap();
    let host = Host::load(&out).unwrap();
    assert_eq!(host.facts().ver, 20_270_115, "the day of enrolment");
    assert_eq!(check(&host.verifier().unwrap(), &minted(&host, NOW).shown.cert, NOW), Ok(()));
}

#[test]
fn enrolment_keeps_its_rules() {
    let mut domain = Domain::new("example.com", NOW);
    let _h1 = domain.host("h1", "192.0.2.1", NOW);
    let out = domain.folder.path().join("x");
    let (h1, h2) = ("h1".parse().unwrap(), "h2".parse().unwrap());
    let with = Enrolment { addresses: vec!["::ffff:192.0.2.1".parse().unwrap()], ..Enrolment::default() };
    let a = &mut domain.authority;
    assert!(matches!(a.enrol(&h1, &with, &out, NOW), Err(IdentityError::Enrolled(_))));
    assert!(matches!(a.enrol(&h2, &with, &out, NOW), Err(IdentityError::AddressTaken { .. })));
    assert!(matches!(a.renew(&h2, &with, &out, NOW), Err(IdentityError::NotEnrolled(_))));
    assert!(matches!(a.revoke_host(&h2, NOW), Err(IdentityError::NotEnrolled(_))));
    assert!(matches!(a.revoke_serial("no serial", NOW), Err(IdentityError::NoSerial(_))));
    let entry = a.renew(&h1, &Enrolment { ver: Some(9), ..Enrolment::default() }, &out, NOW).unwrap();
    assert_eq!((entry.ver, entry.groups, entry.serials.len()), (9, vec!["ops".to_owned()], 4));
    assert_eq!(Host::load(&out).unwrap().facts().ver, 9);
    let state = domain.folder.path();
    let again = Authority::init(state, "other".parse().unwrap(), NOW);
    assert!(matches!(again, Err(IdentityError::Exists { .. })));
}

#[test]
fn a_list_of_members_that_the_root_did_not_sign_is_refused_and_an_old_one_not_taken() {
    let mut domain = Domain::new("example.com", NOW);
    let mut host = domain.host("h1", "192.0.2.1", NOW);
    let folder = domain.folder.path().join("h1");
    let path = folder.join("members.toml");
    let root = CertificateDer::from_pem_file(folder.join("ca.crt")).unwrap();
    let old = fs::read_to_string(&path).unwrap();
    assert!(Members::load(&path, &root).is_ok());
    let _h2 = domain.host("h2", "192.0.2.2", NOW);
    domain.authority.publish(&folder).unwrap();
    assert!(host.refresh(&path).unwrap());
    let good = fs::read_to_string(&path).unwrap();
    for bad in [
        good.replace("192.0.2.2", "192.0.2.3"),
        good.replace("# signed: 3", "# signed: 4"),
        good.rsplit_once("# signed").unwrap().0.to_owned(),
        format!("{good}\n[[revoked]]\n"),
        String::new(),
    ] {
        fs::write(&path, bad).unwrap();
        assert!(matches!(host.refresh(&path), Err(IdentityError::Unsigned)));
        assert_eq!(host.members().members.len(), 2, "the one in force stays");
    }
    fs::write(&path, old).unwrap();
    assert!(!host.refresh(&path).unwrap());
    assert_eq!(host.members().members.len(), 2);
}

#[test]
fn loose_keys_are_refused() {
    let mut domain = Domain::new("example.com", NOW);
    let _host = domain.host("h1", "192.0.2.1", NOW);
    let folder = domain.folder.path().join("h1");
    for name in ["issuer.key", "host.key"] {
        let path = folder.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Host::load(&folder), Err(IdentityError::LooseKey { .. })), "{name}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(Host::load(&folder).is_ok());
    }
    fs::set_permissions(domain.folder.path().join("ca/root.key"), fs::Permissions::from_mode(0o660)).unwrap();
    assert!(matches!(Authority::open(domain.folder.path()), Err(IdentityError::LooseKey { .. })));
}

/// A server as the relay makes it.
fn server_config(shown: Arc<CertifiedKey>, verifier: Verifier) -> ServerConfig {
    ServerConfig::builder_with_provider(portcullis_relay::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)))
}

/// One request to a rustls server by a stock client; what the client said on stderr and stdout.
fn openssl_s_client(server: Arc<rustls::ServerConfig>, arguments: &[&str]) -> (bool, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let served = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut tls = ServerConnection::new(server).unwrap();
        let mut stream = rustls::Stream::new(&mut tls, &mut socket);
        let mut line = [0; 5];
        let ok = stream.read_exact(&mut line).is_ok() && stream.write_all(b"world\n").is_ok();
        tls.send_close_notify();
        let _ = tls.write_tls(&mut socket);
        ok
    });
    let mut child = Command::new("openssl")
        .args(["s_client", "-connect", &to])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let _ = stdin.write_all(b"hello");
    let ok = served.join().unwrap();
    drop(stdin);
    let out = child.wait_with_output().unwrap();
    (ok, String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
}

#[test]
fn stock_openssl_gets_in_with_the_hosts_files_and_not_without() {
    let now = unix_now();
    let mut domain = Domain::new("example.com", now);
    let (_, two) = (domain.host("h1.example.com", "127.0.0.1", now), domain.host("h2", "192.0.2.2", now));
    let server = Arc::new(server_config(minted(&two, now).shown, two.verifier().unwrap()));
    let folder = domain.folder.path().join("h1.example.com");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (crt, key, ca) = (path("host.crt"), path("host.key"), path("ca.crt"));
    let proper = ["-cert", &crt, "-cert_chain", &crt, "-key", &key, "-CAfile", &ca, "-verify_return_error"];
    let (ok, said) = openssl_s_client(server.clone(), &proper);
    assert!(ok && said.contains("Verify return code: 0 (ok)") && said.contains("world"), "{said}");
    let (ok, _) = openssl_s_client(server.clone(), &["-CAfile", &ca]);
    assert!(!ok, "without a certificate");
    let (ok, said) = openssl_s_client(server.clone(), &[&proper[..], &["-tls1_2"]].concat());
    assert!(!ok && said.contains("alert"), "TLS 1.2: {said}");
    let stranger = folder.join("stranger");
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            "/CN=h1",
        ])
        .args([
            "-keyout",
            &format!("{}.key", stranger.display()),
            "-out",
            &format!("{}.crt", stranger.display()),
        ])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    let (crt, key) = (path("stranger.crt"), path("stranger.key"));
    let (ok, _) = openssl_s_client(server, &["-cert", &crt, "-key", &key, "-CAfile", &ca]);
    assert!(!ok, "a certificate of its own");

    let verify = |file: &str| {
        let verify = ["verify", "-x509_strict", "-CAfile", &ca, "-untrusted", file, file];
        Command::new("openssl").args(verify).output().unwrap()
    };
    let out = verify(&path("host.crt"));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}
