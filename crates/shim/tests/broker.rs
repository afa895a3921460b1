//! The way to a broker and back, against a stand-in that answers as it is told: what it says, when it is
//! silent, wrong or gone, in threads and in forked children.
//!
//! One process, one door: so it is one test, in steps.
#![expect(unsafe_code, reason = "sockets and fork by libc, as programs do")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "the stand-in is test code")]

use std::{
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use portcullis_shim::{
    Errno, door, gate,
    hints::Sock,
    judge::{Call, Op, judge},
    own, sys,
};
use portcullis_wire::{
    Addr, Flags, OpCode, Reply, Request,
    frame::{FRAME, MAGIC, VERSION},
    shared::{Entry, Record, Ring, Shape, StatePage, VerdictTable},
};
use zerocopy::IntoBytes;

/// What the stand-in does with the next questions.
const PERMIT: u32 = 0;
const REFUSE: u32 = 1;
const GARBAGE: u32 = 2;
const SILENCE: u32 = 3;
const HANG_UP: u32 = 4;
const STALE: u32 = 5;

/// Memory that the stand-in shares, as its own mappings of it.
struct Shared {
    fds: [OwnedFd; 3],
    page: &'static StatePage,
    table: &'static VerdictTable,
    ring: &'static Ring,
}

fn memory<T>() -> (OwnedFd, &'static T) {
    // SAFETY: a fresh file of this size, mapped for good; these types are valid when all zero.
    unsafe {
        let fd = OwnedFd::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC));
        assert_eq!(libc::ftruncate(fd.as_raw_fd(), i64::try_from(size_of::<T>()).unwrap()), 0);
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let at = libc::mmap(std::ptr::null_mut(), size_of::<T>(), both, libc::MAP_SHARED, fd.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED);
        (fd, &*at.cast())
    }
}

impl Shared {
    fn new() -> Self {
        let (page_fd, page) = memory::<StatePage>();
        let (table_fd, table) = memory::<VerdictTable>();
        let (ring_fd, ring) = memory::<Ring>();
        page.magic.store(MAGIC, SeqCst);
        page.version.store(u32::from(VERSION), SeqCst);
        page.generation.store(1, SeqCst);
        page.lease.store(u64::MAX, SeqCst);
        page.alive.store(1, SeqCst);
        table.clear(1);
        ring.init();
        Self { fds: [page_fd, table_fd, ring_fd], page, table, ring }
    }
}

struct Broker {
    mood: AtomicU32,
    asked: AtomicUsize,
    bells: AtomicUsize,
    opened: AtomicUsize,
    shared: Shared,
}

fn listener(path: &str) -> i32 {
    // SAFETY: all zero is a valid `sockaddr_un`.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = u16::try_from(libc::AF_UNIX).unwrap();
    for (to, from) in address.sun_path.iter_mut().zip(path.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: a live address with its size.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0);
        let size = u32::try_from(size_of::<libc::sockaddr_un>()).unwrap();
        assert_eq!(libc::bind(fd, (&raw const address).cast(), size), 0);
        assert_eq!(libc::listen(fd, 10), 0);
        fd
    }
}

fn receive(fd: i32) -> Option<(Request, Vec<i32>)> {
    let mut bytes = [0u8; FRAME];
    let mut control = [0u64; 32];
    let mut io = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: FRAME };
    // SAFETY: all-zero is a valid `msghdr`; everything it points to is live, and CMSG_* walk what was written.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut io;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        if libc::recvmsg(fd, &raw mut message, 0) != isize::try_from(FRAME).unwrap() {
            return None;
        }
        let mut fds = Vec::new();
        let mut at = libc::CMSG_FIRSTHDR(&raw const message);
        while !at.is_null() {
            if (*at).cmsg_level == libc::SOL_SOCKET && (*at).cmsg_type == libc::SCM_RIGHTS {
                fds.push(libc::CMSG_DATA(at).cast::<i32>().read_unaligned());
            }
            at = libc::CMSG_NXTHDR(&raw const message, at);
        }
        Some((Request::decode(&bytes).unwrap().1, fds))
    }
}

fn send(fd: i32, bytes: &[u8], attach: &[i32]) {
    let mut control = [0u64; 8];
    let mut io = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: as above.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut io;
        message.msg_iovlen = 1;
        if !attach.is_empty() {
            let size = u32::try_from(size_of_val(attach)).unwrap();
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(size) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size) as usize;
            attach.as_ptr().copy_to_nonoverlapping(libc::CMSG_DATA(header).cast(), attach.len());
        }
        libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL);
    }
}

impl Broker {
    fn serve(self: &Arc<Self>, doors: i32) {
        let me = Arc::clone(self);
        std::thread::spawn(move || {
            loop {
                // SAFETY: no address is asked for.
                let door = unsafe { libc::accept(doors, std::ptr::null_mut(), std::ptr::null_mut()) };
                if door < 0 {
                    return;
                }
                let me = Arc::clone(&me);
                std::thread::spawn(move || {
                    while let Some((request, fds)) = receive(door) {
                        assert_eq!(request.opcode, OpCode::Open as u16);
                        me.opened.fetch_add(1, SeqCst);
                        let mut reply = Reply::to(&request);
                        reply.seq = 0;
                        send(fds[0], reply.as_bytes(), &[]);
                        let me = Arc::clone(&me);
                        std::thread::spawn(move || me.channel(fds[0]));
                    }
                });
            }
        });
    }

    fn channel(&self, fd: i32) {
        while let Some((request, fds)) = receive(fd) {
            fds.iter().for_each(|&fd| sys::close(fd));
            if request.opcode == OpCode::Doorbell as u16 {
                self.bells.fetch_add(1, SeqCst);
                continue;
            }
            self.asked.fetch_add(1, SeqCst);
            let mut reply = Reply::to(&request);
            match self.mood.load(SeqCst) {
                REFUSE => reply.errno = libc::EPERM,
                GARBAGE => {
                    send(fd, b"PCL1 and so on", &[]);
                    continue;
                }
                SILENCE => continue,
                HANG_UP => break,
                STALE => {
                    let mut old = reply;
                    old.seq = request.seq.wrapping_sub(1);
                    old.errno = libc::EPERM;
                    send(fd, old.as_bytes(), &[]);
                }
                _ => {}
            }
            let memory = Flags(request.flags).has(Flags::WANT_MEMORY);
            let all = self.shared.fds.each_ref().map(AsRawFd::as_raw_fd);
            reply.flags |= if memory { Flags::MEMORY } else { 0 };
            send(fd, reply.as_bytes(), if memory { &all } else { &[] });
        }
        sys::close(fd);
    }
}

fn call(address: [u8; 4]) -> Call {
    let sock = Sock::asked(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
    let mut call = Call::new(Op::Connect, 0, sock);
    call.remote = Addr::v4(address.into(), 21);
    call
}

/// Exit status of a child that does this.
fn in_child(what: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child makes raw system calls and ends.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::_exit(i32::from(!what()));
        }
        let mut status = 0;
        libc::waitpid(child, &raw mut status, 0);
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }
}

#[test]
fn questions_reach_the_broker_and_every_kind_of_silence_is_a_refusal() {
    let path = format!("{}/pct-shim-{}", std::env::temp_dir().display(), std::process::id());
    let doors = listener(&path);
    let broker = Arc::new(Broker {
        mood: AtomicU32::new(PERMIT),
        asked: AtomicUsize::new(0),
        bells: AtomicUsize::new(0),
        opened: AtomicUsize::new(0),
        shared: Shared::new(),
    });
    broker.serve(doors);
    gate::install();
    assert!(gate::installed());
    own::install();
    assert_eq!(judge(&call([10, 0, 0, 1])).unwrap_err(), Errno(libc::ECONNREFUSED), "no door yet");
    // SAFETY: no arguments.
    let me = unsafe { libc::getuid() };
    door::find(Some(format!("{path}:{me}").as_bytes()), None);
    let ask = |address| judge(&call(address)).map(|_| ());
    let set = |mood| broker.mood.store(mood, SeqCst);
    let asked = || broker.asked.load(SeqCst);

    // Permits and refusals; one channel serves them all.
    assert_eq!(ask([10, 0, 0, 1]), Ok(()));
    set(REFUSE);
    assert_eq!(ask([10, 0, 0, 1]), Err(Errno(libc::EPERM)));
    set(STALE);
    assert_eq!(ask([10, 0, 0, 1]), Ok(()), "an answer to an abandoned question is skipped");
    assert_eq!((asked(), broker.opened.load(SeqCst)), (3, 1));

    // The table answers, and says so in the ring; the bell rings when the reader sleeps.
    set(REFUSE);
    let shape = Shape { call: Op::Connect as u8, protocol: 6, prefix: 96 + 24 };
    let addr = Addr::v4([10, 9, 9, 0].into(), 0).key();
    let entry = Entry { shape, addr, port_low: 21, port_high: 21, rule: 4, assurance: 1, noted: false };
    assert!(broker.shared.table.insert(&entry));
    let before = asked();
    for last in 0..10 {
        assert_eq!(ask([10, 9, 9, last]), Ok(()));
    }
    assert_eq!(asked(), before);
    let mut taken = 0;
    let records: Vec<Record> = std::iter::from_fn(|| broker.shared.ring.pop(&mut taken)).collect();
    assert_eq!(records.len(), 10);
    assert!(records.iter().all(|r| r.rule == 4 && r.generation == 1 && r.remote.port == 21 && r.time != 0));
    while broker.bells.load(SeqCst) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(broker.bells.load(SeqCst), 1);

    // What the kernel puts on record, the shim does not.
    let addr = Addr::v4([10, 9, 8, 0].into(), 0).key();
    assert!(broker.shared.table.insert(&Entry { addr, noted: true, ..entry }));
    assert_eq!(ask([10, 9, 8, 1]), Ok(()));
    assert_eq!((asked(), broker.shared.ring.pop(&mut taken)), (before, None));

    // A page that does not vouch, and a region of another generation, do not permit.
    broker.shared.page.lease.store(0, SeqCst);
    assert_eq!(ask([10, 9, 9, 1]), Err(Errno(libc::EPERM)));
    broker.shared.page.lease.store(u64::MAX, SeqCst);
    broker.shared.page.generation.store(2, SeqCst);
    assert_eq!(ask([10, 9, 9, 1]), Err(Errno(libc::EPERM)));
    broker.shared.page.generation.store(1, SeqCst);
    assert_eq!(ask([10, 9, 9, 1]), Ok(()));

    // A full ring is no way past the record: then the broker is asked.
    while broker.shared.ring.push(&Record::default()) != portcullis_wire::shared::Pushed::Full {}
    assert_eq!(ask([10, 9, 9, 1]), Err(Errno(libc::EPERM)));
    while broker.shared.ring.pop(&mut taken).is_some() {}

    // A child has no verdicts, no ring and no channel of its parent's, and opens one of its own.
    set(REFUSE);
    let opened = broker.opened.load(SeqCst);
    assert!(in_child(|| own::shared().is_none() && judge(&call([10, 9, 9, 1])).is_err()));
    assert_eq!(broker.opened.load(SeqCst), opened + 1);
    assert_eq!(ask([10, 9, 9, 1]), Ok(()), "the parent still has its own");

    // Threads do not wait for one another, and each gets the answer to its own question.
    set(PERMIT);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope
                .spawn(|| (0..200).for_each(|_| assert_eq!(judge(&call([10, 0, 0, 1])).map(|_| ()), Ok(()))));
        }
    });

    // Hung up: asked once more on a new channel, then refused. Garbage is refused at once.
    set(HANG_UP);
    let before = asked();
    assert_eq!(ask([10, 0, 0, 1]), Err(Errno(libc::ECONNREFUSED)));
    assert!(asked() > before);
    set(GARBAGE);
    assert_eq!(ask([10, 0, 0, 1]), Err(Errno(libc::ECONNREFUSED)));
    set(PERMIT);
    assert_eq!(ask([10, 0, 0, 1]), Ok(()), "it answers again");

    // Our number was closed behind our back and is somebody's file now: nothing is written there.
    let [a, b] = sys::pair().unwrap();
    let hidden: Vec<i32> = door::hidden().collect();
    assert!(!hidden.is_empty());
    for &fd in &hidden {
        // SAFETY: no pointers.
        unsafe { sys::call(libc::SYS_dup2, [sys::arg(b), sys::arg(fd), 0, 0, 0, 0]) };
    }
    assert_eq!(ask([10, 0, 0, 1]), Ok(()), "by way of the path");
    let mut byte = [0u8; 1];
    // SAFETY: one byte of room.
    let got = unsafe { libc::recv(a, byte.as_mut_ptr().cast(), 1, libc::MSG_DONTWAIT) };
    assert_eq!((got, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EAGAIN)));

    // A broker that is silent is waited for, but not for long.
    set(SILENCE);
    let began = Instant::now();
    assert_eq!(ask([10, 0, 0, 1]), Err(Errno(libc::ECONNREFUSED)));
    assert!((4..30).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    let _gone = std::fs::remove_file(path);
}
