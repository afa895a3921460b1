//! Handshakes of one session resume one another, and nothing else does.
#![allow(clippy::unwrap_used, clippy::panic, reason = "what fails in a test shall stop it")]

mod common;

use std::io::{Read, Write};

use common::{Domain, NAME, event, limits, name, tcp_pair};
use portcullis_relay::{ClientSide, Engine, Event, Role, ServerSide};

/// One association over which a byte goes each way; whether each end says that it was resumed.
fn talk(client: &Engine, server: &Engine, near: &ClientSide, far: &ServerSide) -> (bool, bool) {
    let (one, other) = tcp_pair();
    let near = client.handshake(one.into(), Role::Client { side: near.clone(), name: name() });
    let far = server.handshake(other.into(), Role::Server { side: far.clone(), mixed: None });
    let resumed = |engine: &Engine| match event(engine) {
        Event::Ready { tls: Some(tls), .. } => {
            assert_eq!((tls.certificates.len(), tls.kex.as_str()), (2, "X25519MLKEM768"));
            assert!(tls.exporter.is_some());
            tls.resumed
        }
        other => panic!("{other:?}"),
    };
    let far_resumed = resumed(server);
    let (mut served, inner) = tcp_pair();
    server.splice(far, inner.into());
    let near_resumed = resumed(client);
    let (mut program, inner) = tcp_pair();
    client.splice(near, inner.into());
    program.write_all(b"x").unwrap();
    served.read_exact(&mut [0]).unwrap();
    served.write_all(b"y").unwrap();
    program.read_exact(&mut [0]).unwrap();
    drop((program, served));
    for engine in [client, server] {
        assert!(matches!(event(engine), Event::Closed { .. }));
    }
    (near_resumed, far_resumed)
}

#[test]
fn a_session_is_resumed_and_goes_with_its_last_holder() {
    let domain = Domain::new();
    let leaf = domain.leaf(NAME);
    let (client, server) = (Engine::start(limits(1)).unwrap(), Engine::start(limits(1)).unwrap());
    let (plain_near, plain_far) = (domain.client(&leaf, true), domain.server(&leaf));
    let (near, far) = (plain_near.for_session(), plain_far.for_session());
    assert_eq!(talk(&client, &server, &near, &far), (false, false), "the first");
    for _ in 0..20 {
        assert_eq!(talk(&client, &server, &near, &far), (true, true));
    }
    // Either end alone, another session of the same two processes, and no session: certificates again.
    assert_eq!(talk(&client, &server, &near, &plain_far), (false, false));
    assert_eq!(talk(&client, &server, &near, &plain_far.for_session()), (false, false));
    assert_eq!(talk(&client, &server, &plain_near, &far), (false, false));
    assert_eq!(talk(&client, &server, &plain_near.for_session(), &far), (false, false));
    for _ in 0..3 {
        assert_eq!(talk(&client, &server, &plain_near, &plain_far), (false, false), "the control");
    }
}

#[test]
fn a_ticket_is_good_once() {
    let domain = Domain::new();
    let leaf = domain.leaf(NAME);
    let (client, server) = (Engine::start(limits(1)).unwrap(), Engine::start(limits(1)).unwrap());
    let (near, far) = (domain.client(&leaf, true).for_session(), domain.server(&leaf).for_session());
    talk(&client, &server, &near, &far);
    // A first flight with a ticket, which an eavesdropper repeats.
    let (mut wire, outer) = tcp_pair();
    let opening = client.handshake(outer.into(), Role::Client { side: near, name: name() });
    let mut flight = vec![0; 4096];
    wire.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let length = wire.read(&mut flight).unwrap();
    client.refuse(opening, portcullis_relay::How::Reset);
    let answer = |flight: &[u8]| {
        let (mut eavesdropper, other) = tcp_pair();
        server.handshake(other.into(), Role::Server { side: far.clone(), mixed: None });
        eavesdropper.write_all(flight).unwrap();
        eavesdropper.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        eavesdropper.read_exact(&mut [0]).unwrap();
        eavesdropper.set_read_timeout(Some(std::time::Duration::from_millis(500))).unwrap();
        let mut answer = Vec::new();
        let _until_silent = eavesdropper.read_to_end(&mut answer);
        answer.len()
    };
    let (first, second) = (answer(flight.get(..length).unwrap()), answer(flight.get(..length).unwrap()));
    // With a ticket the answer has neither certificates nor their request.
    assert!(first < second && second > 1500, "{first} {second}");
}
