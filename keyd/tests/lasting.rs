//! What outlives a broker, and what ends with the key daemon.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test says what went wrong by panicking")]

#[cfg(test)]
mod common;

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
    time::Duration,
};

use common::{
    Daemon,
    world::{FAR, World, far, over, over_of, result, shown},
};
use nix::sched::{CloneFlags, setns};
use portcullis_wire::keyd::{Kind, Over, Places};

/// A world whose far daemon is led from broker to broker.
fn lasting() -> (World, OwnedFd) {
    let mut world = World::new();
    setns(&world.far_net, CloneFlags::CLONE_NEWNET).unwrap();
    let (far, leads) = Daemon::lasting(&world.folder.path().join("h2"));
    setns(&world.near_net, CloneFlags::CLONE_NEWNET).unwrap();
    world.far = far;
    (world, leads)
}

fn says(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"still here").unwrap();
    let mut got = [0; 10];
    to.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"still here");
}

/// Reports until there are no more.
fn told(daemon: &mut Daemon) -> Vec<(Kind, u64, String)> {
    daemon.ask(Kind::List, 0, 0, &[], &[]).unwrap();
    while daemon.receive(Duration::from_millis(200)).is_some() {}
    let told = daemon.reports.drain(..);
    let text = |kind, rest: &[u8]| {
        let head = size_of::<Places>() + if kind == Kind::Over { size_of::<Over>() } else { 0 };
        String::from_utf8_lossy(&rest[head..]).into_owned()
    };
    told.map(|(kind, head, rest)| (kind, head.tag, text(kind, &rest))).collect()
}

#[test]
fn running_flows_outlive_their_broker_and_nothing_new_begins() {
    let (mut world, leads) = lasting();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let (mut one, mut one_served) = world.pair(&listener);
    let (two, two_served) = world.pair(&listener);
    // One more waits for the broker's word, which does not come.
    let (waits, waiting, _) = world.client(far(2121));
    let (_, _) = shown(&mut world.far);
    world.far.bereave();
    assert_eq!(result(&waiting), libc::ECONNREFUSED);
    assert_ne!(over_of(&mut world.near, waits).0, 0);
    says(&mut one, &mut one_served);
    says(&mut one_served, &mut one);
    // Nobody comes in, and it shows at once.
    let (late, refused, _) = world.client(far(2121));
    assert_eq!(result(&refused), libc::ECONNREFUSED);
    over_of(&mut world.near, late);
    // One ends meanwhile.
    drop((two, two_served));
    assert_eq!(over(&mut world.near).0, 0);

    world.far.lead(&leads);
    // The end of the second one may be heard of a moment later.
    let mut all = told(&mut world.far);
    for _ in 0..50 {
        if all.len() < 4 {
            all.extend(told(&mut world.far).into_iter().filter(|(kind, ..)| *kind == Kind::Over));
        }
    }
    let of = |wanted: Kind| all.iter().filter(move |(kind, ..)| *kind == wanted);
    let (live, over): (Vec<_>, Vec<_>) = (of(Kind::Live).collect(), of(Kind::Over).collect());
    assert_eq!((live.len(), over.len()), (2, 2), "{all:?}");
    let (waited, ended): (Vec<&_>, Vec<&_>) =
        over.into_iter().partition(|it| live.iter().all(|one| one.1 != it.1));
    assert_eq!(waited[0].2, "there is no broker", "who waited in vain");
    assert_eq!(ended[0].2, "closed by both ends");
    let lasts = live.iter().find(|it| it.1 != ended[0].1).unwrap().1;
    for (_, _, text) in live {
        assert!(text.contains(r#""peer":{"id":"spiffe://example.com/host/h1/process/x""#), "{text}");
        assert!(text.contains(r#""process":{"name":"x""#) && text.contains(r#""since":"#), "{text}");
    }
    assert_eq!(told(&mut world.far).len(), 1, "what has ended is told once");
    // The new broker rules: it ends what ran, and lets others in.
    says(&mut one, &mut one_served);
    let ended = world.far.ask(Kind::Refuse, lasts, 0, &[], &[]).unwrap();
    assert_eq!(ended.head.errno, 0);
    assert_eq!(one_served.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (mut three, mut three_served) = world.pair(&listener);
    says(&mut three, &mut three_served);
}

#[test]
fn without_anybody_to_send_another_broker_the_flows_end() {
    let (mut world, leads) = lasting();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let (mut client, mut served) = world.pair(&listener);
    world.far.bereave();
    says(&mut client, &mut served);
    drop(leads);
    for end in [&mut client, &mut served] {
        assert_eq!(end.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    let World { far, near_net: _near, .. } = world;
    assert_eq!(far.ended(), 0);
}

#[test]
fn a_killed_key_daemon_ends_its_flows_and_opens_nothing() {
    let (mut world, _leads) = lasting();
    let (_, listener) = world.listener(&format!("{FAR}:2121"));
    let (mut client, mut served) = world.pair(&listener);
    says(&mut client, &mut served);
    nix::sys::signal::kill(world.far.pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    for end in [&mut client, &mut served] {
        assert_eq!(end.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    // The port is not the program's in plain: its filter lets nobody through.
    let plain = TcpStream::connect_timeout(&far(2121), Duration::from_millis(300)).unwrap_err().kind();
    assert!(matches!(plain, ErrorKind::TimedOut | ErrorKind::ConnectionRefused), "{plain:?}");
    let open = world.on_far(|| TcpListener::bind((FAR, 2122)).unwrap());
    TcpStream::connect(far(2122)).unwrap();
    drop(open);
}
