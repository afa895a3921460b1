//! Sessions: what one association and those that are related to it show, and whom they believe.

use std::{
    io,
    sync::{Arc, OnceLock},
};

use portcullis_relay::{ClientSide, ServerSide};
use rustls::sign::SingleCertAndKey;

use crate::identity::{HostName, ProcessIdentity, Seen, Verifier};

/// One certificate of ours, and the one peer certificate that goes with it: related associations have both from the
/// association that they belong to, whichever end opens them, and go on from its handshake by ticket.
pub(super) struct Bond {
    /// Serial number of our certificate, in hexadecimal.
    pub(super) serial: String,
    /// Whom the first handshake has shown.
    pub(super) seen: Seen,
    identity: Arc<SingleCertAndKey>,
    verifier: Arc<Verifier>,
    /// Kept with their tickets, where others may follow.
    client: Option<OnceLock<ClientSide>>,
    server: OnceLock<ServerSide>,
}

impl Bond {
    /// For one association to a peer whose address is that member's. `related`: others may follow.
    pub(super) fn new(
        identity: ProcessIdentity,
        verifier: &Verifier,
        owner: Option<HostName>,
        related: bool,
    ) -> Arc<Self> {
        let (verifier, seen) = verifier.for_one(owner);
        Arc::new(Self {
            serial: identity.serial,
            seen,
            identity: Arc::new(SingleCertAndKey::from(identity.shown)),
            verifier: Arc::new(verifier),
            client: related.then(OnceLock::new),
            server: OnceLock::new(),
        })
    }

    /// Whether others may follow.
    pub(super) const fn is_related(&self) -> bool {
        self.client.is_some()
    }

    /// For a handshake that we open. `confirm`: the peer's key daemon says when its own broker has admitted us; a
    /// stock TLS server does not. It is the same for all of one bond.
    pub(super) fn client(&self, confirm: bool) -> io::Result<ClientSide> {
        if let Some(side) = self.client.as_ref().and_then(OnceLock::get) {
            return Ok(side.clone());
        }
        let (verifier, identity) = (self.verifier.clone(), self.identity.clone());
        let side = ClientSide::new(verifier, identity, confirm).map_err(io::Error::other)?;
        Ok(match &self.client {
            Some(kept) => kept.get_or_init(|| side.for_session()).clone(),
            None => side,
        })
    }

    /// For a handshake that the peer opens.
    pub(super) fn server(&self) -> io::Result<ServerSide> {
        if let Some(side) = self.server.get() {
            return Ok(side.clone());
        }
        let (verifier, identity) = (self.verifier.clone(), self.identity.clone());
        let side = ServerSide::new(verifier, identity).map_err(io::Error::other)?;
        Ok(if self.is_related() { self.server.get_or_init(|| side.for_session()).clone() } else { side })
    }
}
