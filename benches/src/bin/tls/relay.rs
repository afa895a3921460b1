//! The relay engine by itself, one side of a pair in a process of its own: the engine and the least of an owner.

use std::{
    collections::HashMap,
    io::ErrorKind,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket},
};
use portcullis_relay::{ClientSide, Engine, Event, How, Id, Limits, Role, ServerSide};
use rustls::pki_types::ServerName;

use crate::{Outcome, certificates, say};

enum Part {
    Client(ClientSide, ServerName<'static>),
    Server(ServerSide),
}

/// Serves until killed.
pub(crate) fn serve(role: &str, listen: &str, target: &str, folder: &Path) -> Outcome<()> {
    let target: SocketAddr = target.parse()?;
    let listener = crate::load::listen(listen.parse()?)?;
    listener.set_nonblocking(true)?;
    let name = || ServerName::try_from(certificates::NAME);
    let part = match role {
        "client" => Part::Client(certificates::client(folder)?, name()?),
        "related client" => Part::Client(certificates::client(folder)?.for_session(), name()?),
        "related server" => Part::Server(certificates::server(folder)?.for_session()),
        _ => Part::Server(certificates::server(folder)?),
    };
    let engine = Engine::start(Limits::default())?;
    let mut inner: HashMap<Id, TcpStream> = HashMap::new();
    loop {
        let mut ready = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(engine.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut ready, PollTimeout::NONE)?;
        while let Some(event) = engine.next_event() {
            match event {
                Event::Ready { id, .. } => match &part {
                    Part::Client(..) => {
                        if let Some(inner) = inner.remove(&id) {
                            engine.splice(id, inner.into());
                        }
                    }
                    Part::Server(_) => match TcpStream::connect(target) {
                        Ok(inner) => engine.splice(id, inner.into()),
                        Err(_) => engine.refuse(id, How::Denied),
                    },
                },
                Event::Failed { id, failure, .. } => {
                    say(&format!("{role}: {failure}"));
                    inner.remove(&id);
                }
                _ => {}
            }
        }
        accept(&listener, &engine, &part, target, &mut inner)?;
    }
}

fn accept(
    listener: &TcpListener,
    engine: &Engine,
    part: &Part,
    target: SocketAddr,
    inner: &mut HashMap<Id, TcpStream>,
) -> Outcome<()> {
    loop {
        let accepted = match listener.accept() {
            Ok((accepted, _)) => accepted,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match part {
            Part::Client(side, name) => {
                let role = Role::Client { side: side.clone(), name: name.clone() };
                inner.insert(engine.handshake(connecting(target)?, role), accepted);
            }
            Part::Server(side) => {
                engine.handshake(accepted.into(), Role::Server { side: side.clone(), mixed: None });
            }
        }
    }
}

/// A socket on its way to `target`.
fn connecting(target: SocketAddr) -> Outcome<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(target)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}
