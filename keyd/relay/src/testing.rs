//! For the unit tests: a trust domain, and a handshake between two ends in memory.

use std::{io::Read, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    RootCertStore, ServerConnection,
    client::WebPkiServerVerifier,
    pki_types::{PrivateKeyDer, ServerName},
    server::WebPkiClientVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::{
    ClientSide, ServerSide,
    handshake::{Finished, Handshake, Progress},
    provider,
};

/// Both sides of one trust domain whose leaf is for `localhost`.
pub(crate) fn sides(confirm: bool) -> (ClientSide, ServerSide) {
    let mut params = CertificateParams::new(vec!["root".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let chain = vec![params.signed_by(&key, &root).unwrap().der().clone()];
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let key = provider().key_provider.load_private_key(key).unwrap();
    let identity = Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key)));
    let mut roots = RootCertStore::empty();
    roots.add(root.der().clone()).unwrap();
    let roots = Arc::new(roots);
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), provider());
    let client = ClientSide::new(verifier.build().unwrap(), Arc::clone(&identity) as _, confirm).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
    (client, ServerSide::new(verifier.build().unwrap(), identity).unwrap())
}

pub(crate) fn ends(confirm: bool) -> (Handshake, Handshake) {
    let (client, server) = sides(confirm);
    let mut client = Handshake::client(&client, ServerName::try_from("localhost").unwrap()).unwrap();
    client.advance().unwrap();
    (client, Handshake::server(server))
}

/// Passes bytes both ways, `piece` at a time, until both are done.
pub(crate) fn shake(mut client: Handshake, mut server: Handshake, piece: usize) -> (Finished, Finished) {
    let mut done = (false, false);
    for _ in 0..10 {
        for part in std::mem::take(&mut client.outgoing).chunks(piece) {
            server.receive(part);
            done.1 = server.advance().unwrap() == Progress::Done;
        }
        for part in std::mem::take(&mut server.outgoing).chunks(piece) {
            client.receive(part);
            done.0 = client.advance().unwrap() == Progress::Done;
        }
        if done == (true, true) && client.outgoing.is_empty() {
            return (client.finish().unwrap(), server.finish().unwrap());
        }
    }
    panic!("the handshake does not end");
}

/// A client of ours and a server of rustls's, which have shaken hands.
pub(crate) fn with_rustls() -> (Finished, ServerConnection) {
    let (client, server) = sides(false);
    let mut ours = Handshake::client(&client, ServerName::try_from("localhost").unwrap()).unwrap();
    ours.advance().unwrap();
    let mut theirs = ServerConnection::new(server.config(false)).unwrap();
    loop {
        let flight = std::mem::take(&mut ours.outgoing);
        theirs.read_tls(&mut flight.as_slice().take(1 << 16)).unwrap();
        theirs.process_new_packets().unwrap();
        if !theirs.is_handshaking() {
            break;
        }
        let mut answer = Vec::new();
        while theirs.wants_write() {
            theirs.write_tls(&mut answer).unwrap();
        }
        ours.receive(&answer);
        assert_eq!(ours.advance(), Ok(Progress::Done));
    }
    (ours.finish().unwrap(), theirs)
}
