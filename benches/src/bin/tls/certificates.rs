//! One trust domain with two hosts, as `portcullis ca` makes it; every system uses the files of the far one.

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use portcullis_benches::net::Far;
use portcullis_keyd::identity::{Authority, Enrolment, Host};
use portcullis_relay::{ClientSide, ServerSide};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::Outcome;

/// Address of the far host.
pub(crate) const FAR: Ipv4Addr = Ipv4Addr::new(10, 76, 0, 2);
/// The name in the leaf, which every client side demands.
pub(crate) const NAME: &str = "h1.example.com";

/// Writes `ca.pem`, `chain.pem`, `key.pem`, and `both.pem` (chain and key), and the state folders of two hosts.
pub(crate) fn write(folder: &Path) -> Outcome<()> {
    // Daemons that give up root go on reading what is in it.
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs().cast_signed();
    let mut authority = Authority::init(&folder.join("authority"), "example.com".parse()?, now)?;
    let at = |address: Ipv4Addr| Enrolment { addresses: vec![address.into()], ..Enrolment::default() };
    let (near, far) = (near(folder), far(folder));
    authority.enrol(&NAME.parse()?, &at(FAR), &far, now)?;
    authority.enrol(&"h2.example.com".parse()?, &at(Far::NEAR), &near, now)?;
    authority.publish(&far)?;
    let (chain, key) = (fs::read_to_string(far.join("host.crt"))?, fs::read_to_string(far.join("host.key"))?);
    fs::copy(far.join("ca.crt"), folder.join("ca.pem"))?;
    fs::write(folder.join("both.pem"), format!("{chain}{key}"))?;
    fs::write(folder.join("chain.pem"), chain)?;
    fs::write(folder.join("key.pem"), key)?;
    Ok(())
}

/// State folder of the host that opens.
pub(crate) fn near(folder: &Path) -> PathBuf {
    folder.join("near")
}

/// State folder of the host that accepts.
pub(crate) fn far(folder: &Path) -> PathBuf {
    folder.join("far")
}

/// What keyd believes, and what every system shows here.
fn parts(folder: &Path) -> Outcome<(Arc<portcullis_keyd::identity::Verifier>, Arc<SingleCertAndKey>)> {
    let verifier = Host::load(&far(folder))?.verifier()?;
    let chain: Vec<_> = CertificateDer::pem_file_iter(folder.join("chain.pem"))?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(folder.join("key.pem"))?;
    let shown = CertifiedKey::from_der(chain, key, &portcullis_relay::provider())?;
    Ok((Arc::new(verifier), Arc::new(SingleCertAndKey::from(shown))))
}

pub(crate) fn client(folder: &Path) -> Outcome<ClientSide> {
    let (verifier, identity) = parts(folder)?;
    Ok(ClientSide::new(verifier, identity, true)?)
}

pub(crate) fn server(folder: &Path) -> Outcome<ServerSide> {
    let (verifier, identity) = parts(folder)?;
    Ok(ServerSide::new(verifier, identity)?)
}
