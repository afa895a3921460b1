//! Entries for fuzzing: each takes any bytes and must return.

use crate::{identity, server};

/// What a broker sends.
pub fn request(bytes: &[u8]) {
    server::read_any(bytes);
}

/// What certificates, their extensions and names hold, whoever signed them.
///
/// # Panics
/// If what was read is not what would be written.
pub fn certificate(bytes: &[u8]) {
    identity::read_any(bytes);
}

#[cfg(test)]
mod tests {
    use portcullis_wire::keyd::{Head, Kind};
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;
    use identity::{Authority, Enrolment};

    /// A host's certificate, and what it signs with, in DER.
    fn real() -> Vec<Vec<u8>> {
        use rustls::pki_types::{CertificateDer, pem::PemObject};
        let folder = tempfile::tempdir().unwrap();
        let mut authority = Authority::init(folder.path(), "d".parse().unwrap(), 1_800_000_000).unwrap();
        let out = folder.path().join("h");
        authority.enrol(&"h".parse().unwrap(), &Enrolment::default(), &out, 1_800_000_000).unwrap();
        let all = CertificateDer::pem_file_iter(out.join("host.crt")).unwrap();
        all.map(|one| one.unwrap().to_vec()).collect()
    }

    #[test]
    fn spoilt_certificates_are_no_panic() {
        let all = real();
        let spoil = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>());
        let cases = prop::collection::vec(spoil, 1..5);
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(2000));
        runner
            .run(&(any::<prop::sample::Index>(), cases), |(which, spoils)| {
                let mut der = which.get(&all).clone();
                for (at, cut, value) in spoils {
                    let at = at.index(der.len());
                    der[at] ^= value;
                    if value % 16 == 0 {
                        der.truncate(1 + cut.index(der.len()));
                    }
                }
                certificate(&der);
                Ok(())
            })
            .unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn arbitrary_requests_are_no_panic(
            kind in 0_usize..Kind::ALL.len(),
            count in prop_oneof![0_u32..40, any::<u32>()],
            flags in 0_u32..8,
            rest in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let head = Head { count, flags, ..Head::new(Kind::ALL[kind], 1) };
            request(&[head.as_bytes(), &rest].concat());
            request(&rest);
        }

        #[test]
        fn what_looks_like_names_and_facts_is_read_or_refused(
            text in "(spiffe://)?[a-z/.%A-Z0-9_-]{0,40}(/host/[a-zA-Z.-]{0,20})?(/process/[a-zA-Z.-]{0,20})?",
            json in r#"\{"(host|exe|ver)":"?[a-z0-9]{0,5}"?,"(ver|sha256|groups)":("?[0-9]{0,5}"?|\[\])(,"user":"u")?\}"#,
        ) {
            certificate(text.as_bytes());
            let length = u8::try_from(json.len()).unwrap_or(0x7f);
            certificate(&[&[0x0c, length], json.as_bytes()].concat());
        }
    }
}
