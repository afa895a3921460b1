//! Entries for fuzzing: each takes any bytes and must return.

use std::net::IpAddr;

use rustls::{Error, pki_types::ServerName};

use crate::{
    ClientSide, ServerSide,
    handshake::{Finished, Handshake, Progress},
    hello,
    record::{HEADER, Records, Whole, whole},
};

/// What begins a connection.
pub fn hello(bytes: &[u8]) {
    let _either = hello::beginning(bytes);
    let _either = hello::offers_confirm(bytes);
}

/// What a peer sends in its handshake, to either end. The first byte says in what pieces; if it is odd, the server
/// has had a good ClientHello before.
pub fn handshake(client: &ClientSide, server: &ServerSide, bytes: &[u8]) -> Result<(), Error> {
    let [piece, bytes @ ..] = bytes else { return Ok(()) };
    let (mut client, mut server) = (begin(client)?, Handshake::server(server.clone()));
    if piece & 1 == 1 {
        server.receive(&std::mem::take(&mut client.outgoing));
        server.advance()?;
    }
    for part in bytes.chunks(usize::from(*piece).max(1)) {
        server.receive(part);
        client.receive(part);
        // The one may go on when the other has failed.
        let (one, other) = (server.advance(), client.advance());
        if one.is_err() && other.is_err() {
            break;
        }
    }
    Ok(())
}

fn begin(side: &ClientSide) -> Result<Handshake, Error> {
    let mut client = Handshake::client(side, ServerName::IpAddress(IpAddr::from([127, 0, 0, 1]).into()))?;
    client.advance()?;
    Ok(client)
}

/// Both ends' records, once their handshake is done.
fn established(client: &ClientSide, server: &ServerSide) -> Result<(Records, Records), Error> {
    let (mut client, mut server) = (begin(client)?, Handshake::server(server.clone()));
    loop {
        server.receive(&std::mem::take(&mut client.outgoing));
        let done = server.advance()? == Progress::Done;
        client.receive(&std::mem::take(&mut server.outgoing));
        client.advance()?;
        if done && client.outgoing.is_empty() {
            let (Finished { records: near, .. }, Finished { records: far, .. }) =
                (client.finish()?, server.finish()?);
            return Ok((near, far));
        }
    }
}

/// What an authenticated peer puts into its records, to a client and to a server: a type, a length, content, and so
/// on; and then the rest as it is, unsealed.
pub fn records(client: &ClientSide, server: &ServerSide, bytes: &[u8]) -> Result<(), Error> {
    let (mut near, mut far) = established(client, server)?;
    let mut rest = bytes;
    while let [kind, length, more @ ..] = rest {
        let (content, after) = more.split_at(usize::from(*length).min(more.len()));
        rest = after;
        let (from, to) = if kind & 0x80 == 0 { (&mut near, &mut far) } else { (&mut far, &mut near) };
        let mut record = Vec::new();
        if from.append((kind & 0x7f).into(), content, &mut record).is_err() || !opened(to, &mut record) {
            return Ok(());
        }
    }
    opened(&mut far, &mut bytes.to_vec());
    Ok(())
}

/// Opens what stands at the start of some bytes; whether it was good.
fn opened(records: &mut Records, bytes: &mut [u8]) -> bool {
    let Ok(Whole::Record(header, length)) = whole(bytes) else { return false };
    bytes.get_mut(HEADER..HEADER + length).is_some_and(|payload| records.open(header, payload).is_ok())
}
