//! One trust domain with two hosts, as `portcullis ca` makes it; every system uses the files of the first.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use portcullis_benches::net::Far;
use portcullis_keyd::identity::{Authority, Enrolment, Host};
use portcullis_relay::{ClientSide, ServerSide};
use rustls::sign::SingleCertAndKey;

use crate::Outcome;

/// Address of the far host.
pub(crate) const FAR: Ipv4Addr = Ipv4Addr::new(10, 76, 0, 2);
/// The name in the leaf, which every client side demands.
pub(crate) const NAME: &str = "h1.example.com";

/// Writes `ca.pem`, `chain.pem`, `key.pem`, and `both.pem` (chain and key), and what keyd needs.
pub(crate) fn write(folder: &Path) -> Outcome<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs().cast_signed();
    let mut authority = Authority::init(&folder.join("authority"), "example.com".parse()?, now)?;
    let at = |address: Ipv4Addr| Enrolment { addresses: vec![address.into()], ..Enrolment::default() };
    authority.enrol(&NAME.parse()?, &at(FAR), folder, now)?;
    let near = near(folder);
    authority.enrol(&"h2.example.com".parse()?, &at(Far::NEAR), &near, now)?;
    authority.publish(folder)?;
    let (chain, key) =
        (fs::read_to_string(folder.join("host.crt"))?, fs::read_to_string(folder.join("host.key"))?);
    fs::copy(folder.join("ca.crt"), folder.join("ca.pem"))?;
    fs::write(folder.join("both.pem"), format!("{chain}{key}"))?;
    fs::write(folder.join("chain.pem"), chain)?;
    fs::write(folder.join("key.pem"), key)?;
    Ok(())
}

/// The folder of the host that opens.
pub(crate) fn near(folder: &Path) -> PathBuf {
    folder.join("near")
}

/// What keyd believes and shows.
fn parts(folder: &Path) -> Outcome<(Arc<portcullis_keyd::identity::Verifier>, Arc<SingleCertAndKey>)> {
    let host = Host::load(folder)?;
    Ok((Arc::new(host.verifier()?), Arc::new(SingleCertAndKey::from(host.shown()))))
}

pub(crate) fn client(folder: &Path) -> Outcome<ClientSide> {
    let (verifier, identity) = parts(folder)?;
    Ok(ClientSide::new(verifier, identity, true)?)
}

pub(crate) fn server(folder: &Path) -> Outcome<ServerSide> {
    let (verifier, identity) = parts(folder)?;
    Ok(ServerSide::new(verifier, identity)?)
}
