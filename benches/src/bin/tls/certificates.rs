//! One root, one host, one leaf, as every system wants them: P-256, the chain as on the wire.

use std::{fs, path::Path, sync::Arc};

use portcullis_relay::{ClientSide, ServerSide, provider};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    RootCertStore,
    client::WebPkiServerVerifier,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::Outcome;

/// The name in the leaf, which every client side demands.
pub(crate) const NAME: &str = "h1.example.com";

/// Writes `ca.pem`, `chain.pem`, `key.pem`, and `both.pem` (chain and key).
pub(crate) fn write(folder: &Path) -> Outcome<()> {
    let authority = |name: &str| -> Outcome<CertificateParams> {
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ok(params)
    };
    let root = CertifiedIssuer::self_signed(authority("root")?, KeyPair::generate()?)?;
    let host = CertifiedIssuer::signed_by(authority("host")?, KeyPair::generate()?, &root)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![NAME.to_owned()])?;
    params.distinguished_name.push(rcgen::DnType::CommonName, NAME);
    let leaf = params.signed_by(&key, &host)?;
    let chain = leaf.pem() + &host.pem();
    fs::write(folder.join("ca.pem"), root.pem())?;
    fs::write(folder.join("both.pem"), chain.clone() + &key.serialize_pem())?;
    fs::write(folder.join("chain.pem"), chain)?;
    fs::write(folder.join("key.pem"), key.serialize_pem())?;
    Ok(())
}

fn roots(folder: &Path) -> Outcome<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("ca.pem"))?)?;
    Ok(Arc::new(roots))
}

fn identity(folder: &Path) -> Outcome<Arc<SingleCertAndKey>> {
    let chain = CertificateDer::pem_file_iter(folder.join("chain.pem"))?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(folder.join("key.pem"))?;
    let key = CertifiedKey::new(chain, provider().key_provider.load_private_key(key)?);
    Ok(Arc::new(SingleCertAndKey::from(key)))
}

pub(crate) fn client(folder: &Path) -> Outcome<ClientSide> {
    let verifier = WebPkiServerVerifier::builder_with_provider(roots(folder)?, provider()).build()?;
    Ok(ClientSide::new(verifier, identity(folder)?, true)?)
}

pub(crate) fn server(folder: &Path) -> Outcome<ServerSide> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(folder)?, provider()).build()?;
    Ok(ServerSide::new(verifier, identity(folder)?)?)
}
