//! Both ends of one trust domain.

use std::sync::{Arc, OnceLock};

use portcullis_relay::{ClientSide, ServerSide, provider};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    RootCertStore,
    client::WebPkiServerVerifier,
    pki_types::PrivateKeyDer,
    server::WebPkiClientVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
};

pub fn sides() -> &'static (ClientSide, ServerSide) {
    static SIDES: OnceLock<(ClientSide, ServerSide)> = OnceLock::new();
    SIDES.get_or_init(|| {
        let mut params = CertificateParams::new(vec!["root".to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let chain = vec![params.signed_by(&key, &root).unwrap().der().clone()];
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let key = provider().key_provider.load_private_key(key).unwrap();
        let identity = Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key)));
        let mut roots = RootCertStore::empty();
        roots.add(root.der().clone()).unwrap();
        let roots = Arc::new(roots);
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), provider());
        let client = ClientSide::new(verifier.build().unwrap(), Arc::clone(&identity) as _, true).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
        (client.for_session(), ServerSide::new(verifier.build().unwrap(), identity).unwrap())
    })
}
