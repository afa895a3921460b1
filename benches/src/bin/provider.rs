//! What TLS needs of a cryptographic provider, by ring and by aws-lc-rs, taking turns. For docs/adr. And what keyd's
//! certificates cost: to make one, and to verify one, whose host is known or new.

use std::time::{Duration, Instant, SystemTime};

use portcullis_benches::{median, row};
use portcullis_keyd::identity::{Authority, Enrolment, Host, ProcessFacts, Validity};
use rustls::pki_types::UnixTime;

const TURNS: usize = 9;
/// One full TLS record.
const RECORD: usize = 1 << 14;
const SLICE: Duration = Duration::from_millis(60);

type Work = Box<dyn FnMut() -> Option<()>>;

/// Both crates have the same interface, so the same text serves.
macro_rules! works {
    ($provider:ident) => {{
        use $provider::{aead, agreement, rand, signature};
        let mut works: Vec<(&'static str, Work)> = Vec::new();
        for (name, algorithm) in [
            ("AES-128-GCM, 16 KiB", &aead::AES_128_GCM),
            ("AES-256-GCM, 16 KiB", &aead::AES_256_GCM),
            ("ChaCha20-Poly1305, 16 KiB", &aead::CHACHA20_POLY1305),
        ] {
            let key = vec![7; algorithm.key_len()];
            let key = aead::LessSafeKey::new(aead::UnboundKey::new(algorithm, &key).ok()?);
            let mut record = vec![0; RECORD];
            let mut count = 0_u64;
            works.push((
                name,
                Box::new(move || {
                    count += 1;
                    let mut nonce = [0; 12];
                    nonce.get_mut(4..)?.copy_from_slice(&count.to_be_bytes());
                    let nonce = aead::Nonce::assume_unique_for_key(nonce);
                    let tag = key.seal_in_place_separate_tag(nonce, aead::Aad::empty(), &mut record);
                    tag.ok().map(|_| ())
                }),
            ));
        }
        let random = rand::SystemRandom::new();
        let algorithm = &signature::ECDSA_P256_SHA256_ASN1_SIGNING;
        let document = signature::EcdsaKeyPair::generate_pkcs8(algorithm, &random).ok()?;
        let pair = signing!($provider, algorithm, document, random)?;
        let signed = pair.sign(&random, b"message").ok()?;
        let public = signature::KeyPair::public_key(&pair).as_ref().to_vec();
        let verifying = signature::UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_ASN1, public);
        works.push((
            "P-256 sign",
            Box::new({
                let random = rand::SystemRandom::new();
                move || pair.sign(&random, b"message").ok().map(|_| ())
            }),
        ));
        works.push(("P-256 verify", Box::new(move || verifying.verify(b"message", signed.as_ref()).ok())));
        let seed = signature::Ed25519KeyPair::generate_pkcs8(&random).ok()?;
        let pair = signature::Ed25519KeyPair::from_pkcs8(seed.as_ref()).ok()?;
        let signed = pair.sign(b"message");
        let public = signature::KeyPair::public_key(&pair).as_ref().to_vec();
        let verifying = signature::UnparsedPublicKey::new(&signature::ED25519, public);
        works.push((
            "Ed25519 sign",
            Box::new(move || {
                std::hint::black_box(pair.sign(b"message"));
                Some(())
            }),
        ));
        works.push(("Ed25519 verify", Box::new(move || verifying.verify(b"message", signed.as_ref()).ok())));
        works.push((
            "X25519, key and agreement",
            Box::new(move || {
                let own = agreement::EphemeralPrivateKey::generate(&agreement::X25519, &random).ok()?;
                let public = own.compute_public_key().ok()?;
                let peer = agreement::UnparsedPublicKey::new(&agreement::X25519, public.as_ref().to_vec());
                agree!($provider, own, peer)
            }),
        ));
        Some(works)
    }};
}

macro_rules! signing {
    (ring, $algorithm:ident, $document:ident, $random:ident) => {
        ring::signature::EcdsaKeyPair::from_pkcs8($algorithm, $document.as_ref(), &$random).ok()
    };
    (aws_lc_rs, $algorithm:ident, $document:ident, $random:ident) => {
        aws_lc_rs::signature::EcdsaKeyPair::from_pkcs8($algorithm, $document.as_ref()).ok()
    };
}

macro_rules! agree {
    (ring, $own:ident, $peer:ident) => {
        ring::agreement::agree_ephemeral($own, &$peer, |_| ()).ok()
    };
    (aws_lc_rs, $own:ident, $peer:ident) => {
        aws_lc_rs::agreement::agree_ephemeral($own, &$peer, (), |_| Ok(())).ok()
    };
}

fn by_ring() -> Option<Vec<(&'static str, Work)>> {
    works!(ring)
}

fn by_aws_lc() -> Option<Vec<(&'static str, Work)>> {
    let mut works: Vec<(&'static str, Work)> = works!(aws_lc_rs)?;
    works.push((
        "ML-KEM-768, key, to and fro",
        Box::new(|| {
            let own = aws_lc_rs::kem::DecapsulationKey::generate(&aws_lc_rs::kem::ML_KEM_768).ok()?;
            let (sealed, _) = own.encapsulation_key().ok()?.encapsulate().ok()?;
            own.decapsulate(sealed).ok().map(|_| ())
        }),
    ));
    Some(works)
}

fn by_keyd() -> Option<Vec<(&'static str, Work)>> {
    let folder = tempfile::tempdir().ok()?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    let seconds = now.cast_signed();
    let mut authority = Authority::init(folder.path(), "example.com".parse().ok()?, seconds).ok()?;
    let out = folder.path().join("h");
    authority.enrol(&"h.example.com".parse().ok()?, &Enrolment::default(), &out, seconds).ok()?;
    let host = Host::load(&out).ok()?;
    let (known, new) = (host.verifier().ok()?, Host::load(&out).ok()?);
    let facts =
        ProcessFacts { exe: "/usr/bin/x".into(), sha256: "00".repeat(32), user: "u".into(), unit: None };
    let make = move || host.mint(&"x".parse().ok()?, &facts, Validity::process(seconds)).ok();
    let chain = make()?.shown.cert.clone();
    let again = chain.clone();
    let at = UnixTime::since_unix_epoch(Duration::from_secs(now));
    Some(vec![
        ("process certificate, made", Box::new(move || make().map(drop))),
        (
            "peer's certificate, host known",
            Box::new(move || {
                let (leaf, others) = chain.split_first()?;
                known.check(leaf, others, true, at).ok().map(drop)
            }),
        ),
        (
            "peer's certificate, host new",
            Box::new(move || {
                let (leaf, others) = again.split_first()?;
                new.verifier().ok()?.check(leaf, others, true, at).ok().map(drop)
            }),
        ),
    ])
}

/// Microseconds of one call.
fn time(work: &mut Work) -> Option<f64> {
    let began = Instant::now();
    let mut count = 0_u32;
    while began.elapsed() < SLICE {
        for _ in 0..8 {
            work()?;
            count += 1;
        }
    }
    Some(began.elapsed().as_secs_f64() * 1e6 / f64::from(count))
}

fn bench() -> Option<()> {
    let (mut ring, mut aws) = (by_ring()?, by_aws_lc()?);
    row(&format!("{:32}{:>10}{:>12}{:>8}", "microseconds, median", "ring", "aws-lc-rs", "ratio"));
    for (index, (name, of_aws)) in aws.iter_mut().enumerate() {
        let (mut theirs, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            ours.push(time(of_aws)?);
            if let Some((_, of_ring)) = ring.get_mut(index) {
                theirs.push(time(of_ring)?);
            }
        }
        let ours = median(ours);
        if theirs.is_empty() {
            row(&format!("{name:32}{:>10}{ours:>12.2}", "-"));
        } else {
            let theirs = median(theirs);
            row(&format!("{name:32}{theirs:>10.2}{ours:>12.2}{:>8.2}", theirs / ours));
        }
    }
    for (name, mut work) in by_keyd()? {
        let times: Option<Vec<f64>> = (0..TURNS).map(|_| time(&mut work)).collect();
        row(&format!("{name:32}{:>10}{:>12.2}", "-", median(times?)));
    }
    Some(())
}

fn main() -> std::process::ExitCode {
    if bench().is_some() { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::from(2) }
}
