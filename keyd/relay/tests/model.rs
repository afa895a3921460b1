//! Random splits, half-closes and resets against a model of what two programs may see of each other.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "what fails in a test shall stop it"
)]
mod common;

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
    sync::OnceLock,
    thread::JoinHandle,
};

use common::*;
use nix::{
    libc::linger,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt},
};
use portcullis_relay::{Ending, Engine, Event, Id, Role};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    /// One end writes so many bytes.
    Write(usize, usize),
    /// One end reads so many bytes, or what is under way.
    Read(usize, usize),
    /// One end shuts its direction.
    Shut(usize),
    /// One end resets; nothing follows.
    Reset(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let size = prop_oneof![1usize..10, 1usize..2000, 16_000usize..17_000, 1usize..150_000];
    let step = prop_oneof![
        8 => (0usize..2, size.clone()).prop_map(|(end, size)| Step::Write(end, size)),
        6 => (0usize..2, size).prop_map(|(end, size)| Step::Read(end, size)),
        1 => (0usize..2).prop_map(Step::Shut),
        1 => (0usize..2).prop_map(Step::Reset),
    ];
    prop::collection::vec(step, 1..40)
}

/// What is under way from one end to the other.
#[derive(Default)]
struct Way {
    sent: VecDeque<u8>,
    shut: bool,
}

/// No more than this waits unread, so that a write never waits for a read.
const UNREAD: usize = 300_000;

/// Passes the TLS bytes on in pieces, so that records are cut everywhere; a reset arrives as one.
fn chop(one: TcpStream, other: TcpStream, sizes: Vec<usize>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut room = vec![0; 70_000];
        let mut sizes = sizes.iter().cycle();
        let mut open = [true, true];
        while open != [false, false] {
            let interest = |open| if open { PollFlags::POLLIN } else { PollFlags::empty() };
            let mut ready =
                [PollFd::new(one.as_fd(), interest(open[0])), PollFd::new(other.as_fd(), interest(open[1]))];
            poll(&mut ready, PollTimeout::NONE).unwrap();
            let signs = ready.map(|ready| ready.revents().unwrap());
            for (end, (from, to)) in [(&one, &other), (&other, &one)].into_iter().enumerate() {
                // With an error pending, what came before it is still passed on.
                let passed = if open[end] && !signs[end].is_empty() {
                    pass(from, to, &mut room[..*sizes.next().unwrap()])
                } else {
                    Ok(usize::from(!signs[end].contains(PollFlags::POLLERR)))
                };
                match passed {
                    Ok(0) if open[end] => open[end] = false,
                    Ok(count) if count > 0 => {}
                    _ => {
                        reset(from);
                        reset(to);
                        return;
                    }
                }
            }
        }
    })
}

fn pass(mut from: &TcpStream, mut to: &TcpStream, room: &mut [u8]) -> std::io::Result<usize> {
    let count = from.read(room)?;
    if count == 0 {
        to.shutdown(Shutdown::Write)?;
    }
    to.write_all(&room[..count])?;
    Ok(count)
}

/// Makes the next close a reset.
fn reset(socket: &TcpStream) {
    setsockopt(socket, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 }).unwrap();
}

struct Engines {
    client: Engine,
    server: Engine,
    sides: (portcullis_relay::ClientSide, portcullis_relay::ServerSide),
}

/// One pair of engines for all cases, since they must serve any number of associations anyway.
fn engines() -> &'static Engines {
    static ENGINES: OnceLock<Engines> = OnceLock::new();
    ENGINES.get_or_init(|| {
        let domain = Domain::new();
        let leaf = domain.leaf(NAME);
        Engines {
            client: Engine::start(limits(2)).unwrap(),
            server: Engine::start(limits(2)).unwrap(),
            sides: (domain.client(&leaf, true), domain.server(&leaf)),
        }
    })
}

fn ending(engine: &Engine, wanted: Id) -> Ending {
    loop {
        match event(engine) {
            Event::Closed { id, ending, .. } if id == wanted => return ending,
            // A case that failed before, when proptest looks for a smaller one.
            Event::Closed { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

fn ready(engine: &Engine, wanted: Id) {
    loop {
        match event(engine) {
            Event::Ready { id, .. } if id == wanted => return,
            Event::Closed { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

fn run(steps: &[Step], sizes: &[usize], chopped: bool) {
    let Engines { client, server, sides } = engines();
    let (one, other, chopper) = if chopped {
        let ((one, a), (b, other)) = (tcp_pair(), tcp_pair());
        (one, other, Some(chop(a, b, sizes.to_vec())))
    } else {
        let (one, other) = tcp_pair();
        (one, other, None)
    };
    let client_id = client.handshake(one.into(), Role::Client { side: sides.0.clone(), name: name() });
    let server_id = server.handshake(other.into(), Role::Server { side: sides.1.clone(), mixed: None });
    let (far, inner) = tcp_pair();
    ready(server, server_id);
    server.splice(server_id, inner.into());
    ready(client, client_id);
    let (near, inner) = tcp_pair();
    client.splice(client_id, inner.into());

    let mut ends = [Some(near), Some(far)];
    for end in ends.iter().flatten() {
        end.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        end.set_write_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    }
    let mut ways = [Way::default(), Way::default()];
    let mut fill = noise(9, 1 << 20).into_iter().cycle();
    let mut gone = None;
    for step in steps {
        match *step {
            Step::Write(end, size) if !ways[end].shut && ways[end].sent.len() + size < UNREAD => {
                let bytes: Vec<u8> = fill.by_ref().take(size).collect();
                ends[end].as_mut().unwrap().write_all(&bytes).unwrap();
                ways[end].sent.extend(bytes);
            }
            Step::Read(end, size) => {
                let way = &mut ways[1 - end];
                let mut bytes = vec![0; size.min(way.sent.len())];
                ends[end].as_mut().unwrap().read_exact(&mut bytes).unwrap();
                assert!(way.sent.drain(..bytes.len()).eq(bytes), "other bytes than were sent");
            }
            Step::Shut(end) if !ways[end].shut => {
                ends[end].as_ref().unwrap().shutdown(Shutdown::Write).unwrap();
                ways[end].shut = true;
            }
            Step::Reset(end) => {
                // When both have shut theirs, there may be nobody left to tell.
                if ways[0].shut && ways[1].shut {
                    continue;
                }
                let socket = ends[end].take().unwrap();
                reset(&socket);
                gone = Some(end);
                break;
            }
            Step::Write(..) | Step::Shut(_) => {}
        }
    }
    if let Some(end) = gone {
        // The other end reads a prefix of what was sent, then the reset; an end only where one was sent.
        let (mut socket, way) = (ends[1 - end].take().unwrap(), &mut ways[end]);
        let mut bytes = Vec::new();
        let read = socket.read_to_end(&mut bytes).map_err(|error| error.kind());
        assert!(way.sent.iter().zip(&bytes).all(|(sent, got)| sent == got), "other bytes than were sent");
        assert!(bytes.len() <= way.sent.len());
        match read {
            Ok(_) => assert!(way.shut, "a reset was shown as an end"),
            Err(kind) => assert_eq!(kind, ErrorKind::ConnectionReset),
        }
        assert_ne!(ending(client, client_id), Ending::Complete);
        assert_ne!(ending(server, server_id), Ending::Complete);
    } else {
        for (end, way) in ends.iter().zip(&ways) {
            if !way.shut {
                end.as_ref().unwrap().shutdown(Shutdown::Write).unwrap();
            }
        }
        let threads = ends.map(|end| receive_all(end.unwrap()));
        for (thread, way) in threads.into_iter().zip(ways.iter().rev()) {
            let bytes = thread.join().unwrap().unwrap();
            assert!(way.sent.iter().eq(&bytes), "other bytes than were sent at the end");
        }
        assert_eq!(ending(client, client_id), Ending::Complete);
        assert_eq!(ending(server, server_id), Ending::Complete);
    }
    if let Some(chopper) = chopper {
        chopper.join().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn two_programs_see_of_each_other_what_the_model_says(
        steps in steps(),
        sizes in prop::collection::vec(prop_oneof![1usize..40, 1usize..3000, 1usize..70_000], 1..20),
        chopped in any::<bool>(),
    ) {
        run(&steps, &sizes, chopped);
    }
}
