//! Who a grant belongs to, how long it lasts, and what becomes of everything when the broker ends.
//! Needs root and a cgroup v2 hierarchy. Every refusal stands beside its permitted twin.
#![expect(unsafe_code, reason = "raw socket calls, fork and exec")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "what cannot be set up is a failed test"
)]

mod support;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    os::fd::{AsRawFd, FromRawFd},
    time::{Duration, Instant},
};

use portcullis_backstop::{
    Attacher, Backstop, Cause, Cgroup, Holder, Once, Region, load, load_for_another, monotonic, sweep,
};
use portcullis_guard::listener::{Privileges, mark};
use portcullis_types::{Generation, Op, Protocol};
use support::*;

fn to_host(to: SocketAddr) -> Region {
    Region::host(Op::Connect, Protocol::TCP, key(to.ip()), &(to.port()..=to.port()))
}

fn wait(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: our child and a live variable.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    libc::WEXITSTATUS(status)
}

#[test]
fn a_forked_child_has_none_of_its_parents_grants() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let way = || {
        // SAFETY: the child makes system calls only.
        match unsafe { libc::fork() } {
            // SAFETY: ends the child.
            0 => unsafe { libc::_exit(tcp(to)) },
            child => wait(child) << 1 | i32::from(tcp(to) != 0),
        }
    };
    assert_eq!(cage.granted(&[to_host(to)], way), EPERM << 1);
}

#[test]
fn a_thread_has_its_process_grants() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let way = || std::thread::spawn(move || tcp(to)).join().unwrap_or(99);
    assert_eq!(cage.refused(way), EPERM);
    assert_eq!(cage.granted(&[to_host(to)], way), 0);
}

#[test]
fn an_exec_loses_the_grants_and_the_new_image_can_be_granted_its_own() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let (mut ends, mut go) = ([0; 2], [0; 2]);
    // SAFETY: both have room for two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) + libc::pipe(go.as_mut_ptr()) }, 0);
    // bash can connect by itself; it says what came of it, waits, and tries again.
    let script = format!(
        "try() {{ (exec 3<>/dev/tcp/127.0.0.1/{0}) 2>/dev/null && printf y || printf n; }}; \
         one() {{ exec 3<>/dev/tcp/127.0.0.1/{0} && printf y || printf n; }} 2>/dev/null; \
         one >&{1}; read x <&{2}; one >&{1}",
        to.port(),
        ends[1],
        go[0]
    );
    let args = [
        c"bash".as_ptr(),
        c"-c".as_ptr(),
        std::ffi::CString::new(script).unwrap().into_raw(),
        std::ptr::null(),
    ];
    let child = Child::start(&cage.cgroup, move || {
        // SAFETY: a null-terminated array of null-terminated strings.
        unsafe { libc::execv(c"/bin/bash".as_ptr(), args.as_ptr()) };
        98
    });
    let before = cage.backstop.identify(child.pid).unwrap().unwrap();
    cage.backstop.grant(before, &[to_host(to)]).unwrap();
    child.release();
    let mut answer = [0u8];
    // SAFETY: our own end of the pipe.
    let mut said = unsafe { std::fs::File::from_raw_fd(ends[0]) };
    said.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"n", "the old image's grant");
    let after = cage.backstop.identify(child.pid).unwrap().unwrap();
    assert_eq!((before.tgid, before.start), (after.tgid, after.start));
    assert!(after.exec > before.exec);
    cage.backstop.grant(after, &[to_host(to)]).unwrap();
    // SAFETY: our own end of the pipe.
    unsafe { std::fs::File::from_raw_fd(go[1]) }.write_all(b"\n").unwrap();
    said.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"y");
    child.wait();
}

#[test]
fn another_process_that_got_the_same_pid_has_nothing() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let earlier = |backstop: &mut Backstop, holder: Holder| {
        backstop.grant(Holder { start: holder.start - 1, ..holder }, &[to_host(to)]).unwrap();
    };
    assert_eq!(cage.run(|| tcp(to), earlier), EPERM);
    assert_eq!(cage.granted(&[to_host(to)], || tcp(to)), 0);
}

#[test]
fn another_user_has_nothing_and_can_be_granted_its_own() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let way = || {
        // SAFETY: takes numbers only.
        if unsafe { libc::setresuid(65534, 65534, 65534) } != 0 { 99 } else { tcp(to) }
    };
    assert_eq!(cage.granted(&[to_host(to)], way), EPERM);
    let for_nobody = |backstop: &mut Backstop, holder: Holder| {
        backstop.grant(Holder { uid: 65534, ..holder }, &[to_host(to)]).unwrap();
    };
    assert_eq!(cage.run(way, for_nobody), 0);
}

#[test]
fn another_network_namespace_is_another_world() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let inside = || {
        // SAFETY: takes numbers only.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 { 99 } else { tcp(to) }
    };
    assert_eq!(cage.granted(&[to_host(to)], inside), EPERM);
    // A socket from before counts as what it is.
    let before = || {
        let fd = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        // SAFETY: takes numbers only.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 { 99 } else { connect(fd, &Sockaddr::new(to)) }
    };
    assert_eq!(cage.granted(&[to_host(to)], before), 0);
}

#[test]
fn the_hierarchy_is_reached_where_it_is_not_mounted() {
    // As ip-netns(8) `exec` does: another /sys, in a mount namespace of its own.
    let done = std::thread::spawn(|| {
        // SAFETY: C strings that outlive the calls; the namespace is this thread's own.
        unsafe {
            assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0);
            let none = std::ptr::null();
            let flags = libc::MS_REC | libc::MS_PRIVATE;
            assert_eq!(libc::mount(none, c"/".as_ptr(), none, flags, none.cast()), 0);
            libc::umount2(c"/sys".as_ptr(), libc::MNT_DETACH);
            let sysfs = c"sysfs".as_ptr();
            assert_eq!(libc::mount(sysfs, c"/sys".as_ptr(), sysfs, 0, none.cast()), 0);
        }
        let name = format!("pcl-test-hidden-{}", std::process::id());
        let cgroup = Cgroup::below(std::process::id(), &name).unwrap();
        let (backstop, attacher) = load().unwrap();
        attacher.attach(&cgroup).unwrap();
        let (_l, to) = listener("127.0.0.1:0");
        let refused = Child::start(&cgroup, || tcp(to)).go();
        drop(backstop);
        assert!(cgroup.remove_if_empty().unwrap());
        refused
    });
    assert_eq!(done.join().unwrap(), EPERM);
}

#[test]
fn a_cgroup_below_is_held_too_and_what_is_outside_is_not() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let below = cage.cgroup.path().join("below");
    std::fs::create_dir(&below).unwrap();
    let inner = Cgroup::open(&below).unwrap();
    let child = Child::start(&inner, || tcp(to));
    assert_eq!(child.go(), EPERM);
    std::fs::remove_dir(&below).unwrap();
    // The limit that SECURITY.md names: the kernel judges by the cgroup in which a socket was made.
    let outside = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
    assert_eq!(cage.refused(|| connect(outside, &Sockaddr::new(to))), 0);
    assert_eq!(tcp(to), 0, "we are outside");
}

#[test]
fn cgroups_that_a_killed_supervisor_has_left_are_swept_up() {
    let cage = Cage::new();
    let made = |name: &str, age: u64| {
        let path = cage.cgroup.path().join(name);
        std::fs::create_dir(&path).unwrap();
        let at = std::time::SystemTime::now() - Duration::from_secs(age);
        std::fs::File::open(&path).unwrap().set_modified(at).unwrap();
        path
    };
    let (left, new) = (made("portcullis-a-1-1", 100), made("portcullis-a-2-1", 0));
    let (used, others) = (made("portcullis-a-3-1", 100), made("portcullis-web", 100));
    let child = Child::start(&Cgroup::open(&used).unwrap(), || 0);
    sweep(cage.cgroup.path());
    assert_eq!([&left, &new, &others, &used].map(|path| path.exists()), [false, true, true, true]);
    child.go();
    for path in [new, others, used] {
        while std::fs::remove_dir(&path).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn what_is_taken_back_is_refused() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    type Change = fn(&mut Backstop, Holder, SocketAddr);
    let cases: [(&str, Change, i32); 6] = [
        ("granted", |_, _, _| {}, 0),
        ("revoked", |b, h, _| b.revoke(h.tgid).unwrap(), EPERM),
        ("replaced", |b, h, _| b.regrant(h, &[]).unwrap(), EPERM),
        ("new generation", |b, _, _| b.set_generation(Generation::FIRST.next()).unwrap(), EPERM),
        ("granted under it", |b, h, to| b.grant(h, &[to_host(to)]).unwrap(), 0),
        ("lease ran out", |b, _, _| b.lease_until(monotonic()).unwrap(), EPERM),
    ];
    for (name, change, expected) in cases {
        let done = cage.run(
            || tcp(to),
            |backstop, holder| {
                backstop.grant(holder, &[to_host(to)]).unwrap();
                change(backstop, holder, to);
            },
        );
        assert_eq!(done, expected, "{name}");
    }
    cage.backstop.lease_until(u64::MAX).unwrap();
    assert_eq!(cage.granted(&[to_host(to)], || tcp(to)), 0, "and the lease renewed");
}

#[test]
fn audit_mode_lets_through_what_it_would_refuse_and_says_so() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    cage.backstop.set_audit(true).unwrap();
    assert_eq!(cage.refused(|| tcp(to)), 0);
    let events = cage.events();
    assert_eq!((events[0].permitted, events[0].cause), (true, Cause::Unknown));
}

#[test]
fn a_single_grant_is_good_for_its_calls_its_socket_and_its_time() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let once = Once {
        cookie: None,
        op: Op::Connect,
        protocol: Protocol::TCP,
        addr: key(to.ip()),
        port: to.port(),
        calls: 2,
        rule: None,
        within: Duration::from_secs(5),
    };
    let four = || (0..4).fold(0, |bits, n| bits | i32::from(tcp(to) == 0) << n);
    let mut grant = |once: Once| cage.run(four, |b, h| b.grant_once(h, &once).unwrap());
    assert_eq!(grant(once), 0b0011);
    assert_eq!(grant(Once { port: to.port() ^ 1, ..once }), 0);
    assert_eq!(grant(Once { within: Duration::ZERO, ..once }), 0);
    assert_eq!(grant(Once { cookie: Some(1), ..once }), 0);
    // Made before, so that its cookie can be granted.
    let child_socket = || {
        // SAFETY: takes numbers only; stops here until it is continued.
        let fd = unsafe { libc::dup2(socket(libc::AF_INET, libc::SOCK_STREAM, 0), 900) };
        // SAFETY: as above.
        unsafe { libc::raise(libc::SIGSTOP) };
        i32::from(tcp(to) == 0) << 1 | i32::from(connect(fd, &Sockaddr::new(to)) == 0)
    };
    let child = Child::start(&cage.cgroup, child_socket);
    child.release();
    let mut status = 0;
    // SAFETY: our child and a live variable; then the numbers of our child and of its descriptor.
    let cookie = unsafe {
        libc::waitpid(child.pid.cast_signed(), &raw mut status, libc::WUNTRACED);
        let pidfd = libc::syscall(libc::SYS_pidfd_open, child.pid, 0);
        let fd = libc::syscall(libc::SYS_pidfd_getfd, pidfd, 900, 0);
        cookie_of(fd as i32)
    };
    let holder = cage.backstop.identify(child.pid).unwrap().unwrap();
    cage.backstop.grant_once(holder, &Once { cookie: Some(cookie), calls: 1, ..once }).unwrap();
    // SAFETY: our child.
    unsafe { libc::kill(child.pid.cast_signed(), libc::SIGCONT) };
    assert_eq!(child.wait(), 0b01, "that socket and no other");
}

fn cookie_of(fd: i32) -> u64 {
    let (mut cookie, mut len) = (0u64, 8u32);
    // SAFETY: eight bytes of a live variable.
    let done = unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_COOKIE, (&raw mut cookie).cast(), &raw mut len)
    };
    assert_eq!(done, 0);
    cookie
}

/// Whether a connect from outside arrives in time.
fn arrives(at: SocketAddr, within: Duration) -> bool {
    std::net::TcpStream::connect_timeout(&at, within).is_ok()
}

#[test]
fn a_listener_that_nobody_granted_cannot_be_reached() {
    let mut cage = Cage::new();
    let (moment, long) = (Duration::from_millis(300), Duration::from_secs(20));
    for at in ["127.0.0.1:0", "[::1]:0"] {
        let (_, addr) = listener(at);
        let child = Child::start(&cage.cgroup, || {
            let fd = socket(domain(addr), libc::SOCK_STREAM, 0);
            let bound = bind(fd, &Sockaddr::new(addr));
            // SAFETY: takes numbers only.
            unsafe { libc::listen(fd, 8) };
            // SAFETY: as above; it stays so until it is killed.
            unsafe { libc::raise(libc::SIGSTOP) };
            bound
        });
        let holder = cage.backstop.identify(child.pid).unwrap().unwrap();
        cage.backstop.grant(holder, &[Region::everything(Op::Bind, Protocol::TCP)]).unwrap();
        child.release();
        let mut status = 0;
        // SAFETY: our child and a live variable.
        unsafe { libc::waitpid(child.pid.cast_signed(), &raw mut status, libc::WUNTRACED) };
        cage.events();
        let begun = Instant::now();
        assert!(!arrives(addr, moment), "{addr}");
        let events = cage.events();
        let most = 1 + begun.elapsed().as_secs() as usize;
        assert!((1..=most).contains(&events.len()), "one record for one second: {events:?}");
        let event = events[0];
        assert_eq!((event.cause, event.port, event.addr), (Cause::NotAListener, addr.port(), key(addr.ip())));
        cage.backstop.grant_listener(event.cookie).unwrap();
        assert!(arrives(addr, long), "{addr}");
        cage.backstop.revoke_listener(event.cookie).unwrap();
        assert!(!arrives(addr, moment), "{addr}");
        // SAFETY: our child.
        unsafe { libc::kill(child.pid.cast_signed(), libc::SIGKILL) };
        child.wait();
    }
}

#[test]
fn when_the_broker_ends_established_flows_go_on_and_nothing_new_passes() {
    let (backstop, attacher) = load().unwrap();
    let cgroup = Cgroup::below(std::process::id(), &format!("pcl-test-end-{}", std::process::id())).unwrap();
    attacher.attach(&cgroup).unwrap();
    let (accepting, to) = listener("127.0.0.1:0");
    let mut backstop = Some(backstop);
    let child = Child::start(&cgroup, || {
        let fd = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        if connect(fd, &Sockaddr::new(to)) != 0 {
            return 1;
        }
        let mut byte = 0u8;
        loop {
            // SAFETY: one byte each way of live variables.
            unsafe {
                if libc::read(fd, (&raw mut byte).cast(), 1) != 1 {
                    return 2;
                }
                byte = match byte {
                    b'q' => return 0,
                    _ if tcp(to) == 0 => b'y',
                    _ => b'n',
                };
                libc::write(fd, (&raw const byte).cast(), 1);
            }
        }
    });
    let holder = backstop.as_mut().unwrap().identify(child.pid).unwrap().unwrap();
    backstop.as_mut().unwrap().grant(holder, &[to_host(to)]).unwrap();
    child.release();
    let (mut flow, _) = accepting.accept().unwrap();
    flow.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut ask = || {
        let mut byte = [b'?'];
        flow.write_all(&byte).unwrap();
        flow.read_exact(&mut byte).unwrap();
        byte[0]
    };
    assert_eq!(ask(), b'y');
    drop(backstop.take());
    // The array is emptied by a kernel worker.
    let refused_after = (0..5000).find(|_| {
        std::thread::sleep(Duration::from_millis(1));
        ask() == b'n'
    });
    assert!(refused_after.is_some(), "still permitted after {refused_after:?} ms");
    assert_eq!(ask(), b'n', "and the established flow goes on");
    // Another broker comes and takes over; what was granted is not remembered.
    let (mut next, attacher) = load().unwrap();
    attacher.attach(&cgroup).unwrap();
    assert!(Attacher::missing(&cgroup).unwrap().is_empty());
    assert_eq!(ask(), b'n');
    next.grant(holder, &[to_host(to)]).unwrap();
    assert_eq!(ask(), b'y');
    attacher.attach(&cgroup).unwrap();
    assert_eq!(ask(), b'y', "attaching twice does no harm");
    flow.write_all(b"q").unwrap();
    assert_eq!(child.wait(), 0);
    assert!(cgroup.remove_if_empty().unwrap());
}

#[test]
fn both_halves_work_in_other_hands() {
    let (descriptors, attacher) = load_for_another().unwrap();
    let cgroup = Cgroup::below(std::process::id(), &format!("pcl-test-hand-{}", std::process::id())).unwrap();
    let attacher = Attacher::from_descriptors(attacher.into_descriptors()).unwrap();
    attacher.attach(&cgroup).unwrap();
    let mut backstop = Backstop::from_descriptors(descriptors).unwrap();
    let (_l, to) = listener("127.0.0.1:0");
    let child = Child::start(&cgroup, || tcp(to));
    let holder = backstop.identify(child.pid).unwrap().unwrap();
    backstop.grant(holder, &[to_host(to)]).unwrap();
    assert_eq!(child.go(), 0);
    assert_eq!(Child::start(&cgroup, || tcp(to)).go(), EPERM);
    assert!(Backstop::from_descriptors(Vec::new()).is_err());
    assert!(cgroup.remove_if_empty().unwrap());
}

#[test]
fn datagrams_to_one_peer_are_one_flow_until_the_generation_changes() {
    let mut cage = Cage::new();
    let (_in, to) = receiver("127.0.0.1:0");
    let (_other_in, other) = receiver("127.0.0.1:0");
    let child = Child::start(&cage.cgroup, || {
        let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        let send = |to| i32::from(sendto(fd, 0, &Sockaddr::new(to)) == 0);
        let before = send(to) | send(to) << 1 | send(other) << 2;
        // SAFETY: stops here until it is continued.
        unsafe { libc::raise(libc::SIGSTOP) };
        before | send(to) << 3
    });
    let holder = cage.backstop.identify(child.pid).unwrap().unwrap();
    cage.backstop.grant(holder, &[Region { op: Op::Send, protocol: Protocol::UDP, ..to_host(to) }]).unwrap();
    child.release();
    let mut status = 0;
    // SAFETY: our child and a live variable.
    unsafe { libc::waitpid(child.pid.cast_signed(), &raw mut status, libc::WUNTRACED) };
    assert_eq!(cage.events().iter().map(|e| e.permitted).collect::<Vec<_>>(), [true, false]);
    cage.backstop.set_generation(Generation::FIRST.next()).unwrap();
    // SAFETY: our child.
    unsafe { libc::kill(child.pid.cast_signed(), libc::SIGCONT) };
    assert_eq!(child.wait(), 0b0011);
}

#[test]
fn a_full_ring_refuses_and_counts_and_loses_no_record() {
    let mut cage = Cage::new();
    let (accepting, to) = listener("127.0.0.1:0");
    let (_udp, udp) = receiver("127.0.0.1:0");
    let _ = accepting;
    const CALLS: i32 = 50_000; // more than 4 MB of records
    let (mut ends, datagrams) = ([0; 2], Region { protocol: Protocol::UDP, ..to_host(udp) });
    // SAFETY: room for two descriptors.
    unsafe { libc::pipe(ends.as_mut_ptr()) };
    let child = Child::start(&cage.cgroup, || {
        let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        let mut sent = 0i32;
        for _ in 0..CALLS {
            sent += i32::from(connect(fd, &Sockaddr::new(udp)) != EPERM);
        }
        // SAFETY: four bytes of a live variable.
        unsafe { libc::write(ends[1], (&raw const sent).cast(), 4) };
        0
    });
    let holder = cage.backstop.identify(child.pid).unwrap().unwrap();
    cage.backstop.grant(holder, &[datagrams]).unwrap();
    assert_eq!(child.go(), 0);
    let mut sent = [0; 4];
    // SAFETY: our own end of the pipe.
    unsafe { std::fs::File::from_raw_fd(ends[0]) }.read_exact(&mut sent).unwrap();
    let sent = i32::from_ne_bytes(sent);
    assert!(sent > 10_000 && sent < CALLS, "{sent}");
    let stats = cage.backstop.stats().unwrap();
    assert_eq!((stats.granted, stats.unrecorded), (sent as u64, (CALLS - sent) as u64));
    assert_eq!(cage.events().len(), sent as usize);
    assert_eq!(cage.granted(&[to_host(to)], || tcp(to)), 0, "and there is room again");
}

#[test]
fn a_program_that_is_refused_all_the_time_leaves_room_for_others() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let (_udp, udp) = receiver("127.0.0.1:0");
    let flood = || {
        let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        (0..60_000).filter(|_| connect(fd, &Sockaddr::new(udp)) != EPERM).count() as i32
    };
    assert_eq!(cage.refused(flood), 0, "none passed");
    assert!(cage.backstop.stats().unwrap().unrecorded > 10_000);
    assert_eq!(cage.granted(&[to_host(to)], || tcp(to)), 0, "another's call is served and on record");
    let stats = cage.backstop.stats().unwrap();
    assert_eq!(cage.events().len() as u64, stats.granted + stats.refused);
}

#[test]
fn a_sleeping_reader_is_woken_once_and_an_awake_one_not_at_all() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let region = [to_host(to)];
    // Of poll and epoll, only epoll tells a wake-up from finding something at the end of the time.
    let woken = |cage: &mut Cage| {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
        // SAFETY: takes numbers, then a live event.
        let set = unsafe {
            let set = libc::epoll_create1(libc::EPOLL_CLOEXEC);
            libc::epoll_ctl(set, libc::EPOLL_CTL_ADD, cage.backstop.events.as_raw_fd(), &raw mut event);
            set
        };
        assert_eq!(cage.granted(&region, || tcp(to)), 0);
        // SAFETY: room for one event; our own descriptor.
        let woken = unsafe {
            let woken = libc::epoll_wait(set, &raw mut event, 1, 500) == 1;
            libc::close(set);
            woken
        };
        assert_eq!(cage.events().len(), 1);
        woken
    };
    assert!(woken(&mut cage), "it starts asleep");
    assert!(!woken(&mut cage), "awake: it looks by itself");
    cage.backstop.events.sleep().unwrap();
    assert!(woken(&mut cage));
}

#[test]
fn a_thousand_processes_can_be_granted_and_forgotten() {
    let mut cage = Cage::new();
    let (_l, to) = listener("127.0.0.1:0");
    let child = Child::start(&cage.cgroup, || tcp(to));
    let holder = cage.backstop.identify(child.pid).unwrap().unwrap();
    for n in 0..1000 {
        let other = Holder { tgid: 5_000_000 + n, ..holder };
        cage.backstop.grant(other, &[to_host(to), Region::everything(Op::Bind, Protocol::TCP)]).unwrap();
    }
    cage.backstop.grant(holder, &[to_host(to)]).unwrap();
    assert_eq!(cage.backstop.processes().count(), 1001);
    for n in 0..1000 {
        cage.backstop.revoke(5_000_000 + n).unwrap();
    }
    assert_eq!(cage.backstop.processes().count(), 1);
    assert_eq!(child.go(), 0);
    assert!(TcpListener::bind("127.0.0.1:0").is_ok());
}

#[derive(Clone, Copy)]
enum Filter {
    /// One of ours.
    Mark,
    /// A program's own that permits all, with these flags.
    Own(libc::c_ulong),
}

/// `cat` under filters that permit all.
fn marked(filters: &'static [Filter]) -> std::process::Child {
    let mark = move || {
        for filter in filters {
            let Filter::Own(flags) = *filter else {
                mark(Privileges::Kept)?;
                continue;
            };
            let mut all = libc::sock_filter { code: 6, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
            let program = libc::sock_fprog { len: 1, filter: &raw mut all };
            let mode = libc::SECCOMP_SET_MODE_FILTER;
            // SAFETY: seccomp(2) reads the program, which outlives the call.
            if unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    let mut command = std::process::Command::new("/bin/sh");
    command.args(["-c", "cat; true"]).stdin(std::process::Stdio::piped());
    // SAFETY: the closure makes system calls only.
    unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, mark) };
    command.spawn().unwrap()
}

#[test]
fn marks_are_told_and_so_is_that_they_are_buried() {
    let mut cage = Cage::new();
    let mut marks = |filters| {
        let mut child = marked(filters);
        let told = cage.backstop.marks(child.id()).unwrap();
        drop(child.stdin.take());
        child.wait().unwrap();
        told
    };
    const PLAIN: Filter = Filter::Own(0);
    const LOGS: Filter = Filter::Own(libc::SECCOMP_FILTER_FLAG_LOG);
    assert_eq!(marks(&[PLAIN, LOGS]).unwrap(), [0; 0], "somebody else's filters");
    let two = marks(&[Filter::Mark, LOGS, Filter::Mark, PLAIN]).unwrap();
    assert!(two.len() == 2 && two[0] != two[1]);
    assert_eq!(marks(&[Filter::Mark; 32]).unwrap().len(), 32);
    assert_eq!(marks(&[PLAIN; 33]), None, "a mark may lie below them");
    assert_eq!(cage.backstop.marks(u32::MAX >> 1).unwrap(), None);
}
