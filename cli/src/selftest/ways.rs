//! Ways to the network that do not pass through libc's own functions, as a program that wants out would go.
//! They run inside a wrapped tree, each in a child of its own.
#![expect(unsafe_code, reason = "the point is to make system calls by hand")]

use std::{arch::asm, ffi::CStr, io::Write};

use libc::{c_long, sockaddr_in};

/// What a way needs to know of the outside.
#[derive(Clone, Copy, Debug)]
pub struct Aim {
    /// Port of 127.0.0.1 that stands for this way.
    pub port: u16,
    /// A port that every policy here permits.
    pub open: u16,
    /// An unwrapped process of root's.
    pub outside: i32,
    /// Number of a connected socket in it.
    pub flow: i32,
    /// Number here of a socket that was made there, and not connected.
    pub made: i32,
}

/// What shows that a way got out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Proof {
    /// Something arrived at its port.
    Arrival,
    /// It says so itself.
    Word,
}

/// To whom a way is open if the policy permits everything.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Opens {
    Anybody,
    Root,
    /// Anybody, where the kernel has multipath TCP.
    Multipath,
    /// Anybody, where another thread's own descriptors can be told apart (`PIDFD_THREAD`, Linux 6.9).
    Threads,
    Nobody,
}

impl Opens {
    /// Whether it is here.
    pub fn here(self, root: bool) -> bool {
        match self {
            Self::Anybody => true,
            Self::Root => root,
            Self::Multipath => socket(libc::AF_INET, libc::SOCK_STREAM, 262).is_some(),
            Self::Threads => {
                let me = number(std::process::id().cast_signed());
                call(libc::SYS_pidfd_open, [me, number(libc::O_EXCL), 0, 0, 0, 0]) >= 0
            }
            Self::Nobody => false,
        }
    }
}

/// One way.
pub struct Way {
    pub name: &'static str,
    pub proof: Proof,
    /// To whom it is open if the policy permits everything.
    pub opens: Opens,
    pub go: fn(&Aim) -> bool,
}

const fn way(name: &'static str, go: fn(&Aim) -> bool) -> Way {
    Way { name, proof: Proof::Arrival, opens: Opens::Anybody, go }
}
const fn if_there(opens: Opens, name: &'static str, go: fn(&Aim) -> bool) -> Way {
    Way { name, proof: Proof::Arrival, opens, go }
}
const fn root(name: &'static str, go: fn(&Aim) -> bool) -> Way {
    Way { name, proof: Proof::Arrival, opens: Opens::Root, go }
}
const fn shut(name: &'static str, proof: Proof, go: fn(&Aim) -> bool) -> Way {
    Way { name, proof, opens: Opens::Nobody, go }
}

/// All of them, in the order of the table.
pub const WAYS: &[Way] = &[
    way("libc", through_libc),
    way("libc's syscall function", through_syscall),
    way("libc's connect, looked up", through_dlsym),
    way("libc's sendmmsg", through_sendmmsg),
    way("raw system call", raw_connect),
    way("child of a raw clone", raw_clone),
    way("the dynamic loader as a program", through_loader),
    way("static program", static_program),
    way("cleared environment", cleared_environment),
    way("TCP fast open", fast_open),
    way("TCP fast open by sendmsg", |aim| fast_open_message(aim, libc::SYS_sendmsg)),
    way("TCP fast open by sendmmsg", |aim| fast_open_message(aim, libc::SYS_sendmmsg)),
    way("TCP fast open, connect put off", fast_open_connect),
    way("IPv4 in IPv6", mapped),
    if_there(Opens::Multipath, "multipath TCP", multipath),
    way("UDP sendto", |aim| datagram(aim, Send::To)),
    way("UDP sendmsg", |aim| datagram(aim, Send::Message)),
    way("UDP sendmmsg", |aim| datagram(aim, Send::Messages)),
    way("UDP to an unspecified family", |aim| datagram(aim, Send::Unspecified)),
    way("UDP connect", datagram_connect),
    way("UDP connected elsewhere, then freed", datagram_freed),
    way("UDP connected elsewhere, with an address", datagram_elsewhere),
    way("second thread flips the address", flipped),
    way("second thread flips a message's name", flipped_message),
    way("second thread swaps the descriptor", swapped),
    if_there(Opens::Threads, "thread with descriptors of its own", own_descriptors),
    root("another user", other_user),
    root("another root folder", other_folder),
    way("user and pid namespaces", namespaces),
    way("descriptor passed to a child", passed),
    way("socket made outside, not connected", made_outside),
    root("raw socket", raw_socket),
    root("packet socket", packet_socket),
    shut("call from the shim's page, not asked", Proof::Arrival, from_the_page),
    shut("io_uring", Proof::Arrival, io_uring),
    shut("32-bit call", Proof::Arrival, int80),
    shut("x32 call", Proof::Arrival, x32),
    shut("descriptor taken from outside", Proof::Arrival, stolen),
    shut("ptrace of an outside process", Proof::Word, traced),
    shut("memory of an outside process", Proof::Word, memory_of),
];

/// A system call without libc.
fn call(nr: c_long, args: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = args;
    let result: i64;
    // SAFETY: `syscall` clobbers rcx and r11 only; the callers pass live memory of the stated lengths.
    unsafe {
        asm!("syscall", inlateout("rax") nr => result, in("rdi") a, in("rsi") b, in("rdx") c,
             in("r10") d, in("r8") e, in("r9") f, out("rcx") _, out("r11") _);
    }
    result
}

fn at<T>(it: &T) -> u64 {
    std::ptr::from_ref(it) as u64
}

fn number(n: i32) -> u64 {
    u64::from(n.cast_unsigned())
}

const LENGTH: u64 = size_of::<sockaddr_in>() as u64;

fn address(port: u16) -> sockaddr_in {
    sockaddr_in {
        sin_family: 2, // AF_INET
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 1]) },
        sin_zero: [0; 8],
    }
}

fn socket(domain: i32, kind: i32, protocol: i32) -> Option<u64> {
    u64::try_from(call(libc::SYS_socket, [number(domain), number(kind), number(protocol), 0, 0, 0])).ok()
}

fn tcp() -> Option<u64> {
    socket(libc::AF_INET, libc::SOCK_STREAM, 0)
}

fn say(fd: u64) -> bool {
    call(libc::SYS_write, [fd, b"x".as_ptr() as u64, 1, 0, 0, 0]) == 1
}

fn connect_by(fd: u64, port: u16) -> bool {
    let to = address(port);
    call(libc::SYS_connect, [fd, at(&to), LENGTH, 0, 0, 0]) == 0 && say(fd)
}

fn through_libc(aim: &Aim) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", aim.port)).and_then(|mut s| s.write_all(b"x")).is_ok()
}

/// A connect that no hook sees; also what [`cleared_environment`] comes to.
pub fn raw_connect(aim: &Aim) -> bool {
    tcp().is_some_and(|fd| connect_by(fd, aim.port))
}

/// A program of sixty bytes: socket, connect, write, exit.
fn static_program(aim: &Aim) -> bool {
    let to = address(aim.port);
    let mut elf: Vec<u8> = Vec::new();
    let half = |elf: &mut Vec<u8>, n: u16| elf.extend(n.to_le_bytes());
    let wide = |elf: &mut Vec<u8>, n: u64| elf.extend(n.to_le_bytes());
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    half(&mut elf, 2); // ET_EXEC
    half(&mut elf, 62); // EM_X86_64
    elf.extend(1u32.to_le_bytes());
    for n in [0x40_0078, 64, 0] {
        wide(&mut elf, n); // entry, program headers, section headers
    }
    elf.extend(0u32.to_le_bytes());
    for n in [64, 56, 1, 0, 0, 0] {
        half(&mut elf, n);
    }
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, readable and executable
    for n in [0, 0x40_0000, 0x40_0000, 0x100, 0x100, 0x1000] {
        wide(&mut elf, n);
    }
    elf.extend([0xb8, 41, 0, 0, 0, 0xbf, 2, 0, 0, 0, 0xbe, 1, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x05]);
    elf.extend([0x89, 0xc7, 0x48, 0x8d, 0x35, 33, 0, 0, 0, 0xba, 16, 0, 0, 0, 0xb8, 42, 0, 0, 0, 0x0f, 0x05]);
    elf.extend([0xb8, 1, 0, 0, 0, 0xba, 1, 0, 0, 0, 0x0f, 0x05, 0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05]);
    elf.extend([2, 0]);
    elf.extend(to.sin_port.to_ne_bytes());
    elf.extend([127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    elf.resize(0x100, 0);
    let file = call(libc::SYS_memfd_create, [c"way".as_ptr() as u64, 0, 0, 0, 0, 0]);
    let Ok(file) = u64::try_from(file) else { return false };
    if call(libc::SYS_write, [file, elf.as_ptr() as u64, elf.len() as u64, 0, 0, 0]) != 0x100 {
        return false;
    }
    let none: [u64; 1] = [0];
    let empty = number(libc::AT_EMPTY_PATH);
    call(
        libc::SYS_execveat,
        [file, c"".as_ptr() as u64, none.as_ptr() as u64, none.as_ptr() as u64, empty, 0],
    ) == 0
}

fn cleared_environment(aim: &Aim) -> bool {
    let port = std::ffi::CString::new(aim.port.to_string()).unwrap_or_default();
    let words: [&CStr; 4] = [c"portcullis", c"selftest", c"--way", &port];
    let mut argv: Vec<u64> = words.iter().map(|w| w.as_ptr() as u64).collect();
    argv.push(0);
    let none: [u64; 1] = [0];
    let exe = c"/proc/self/exe".as_ptr() as u64;
    call(libc::SYS_execve, [exe, argv.as_ptr() as u64, none.as_ptr() as u64, 0, 0, 0]) == 0
}

/// Jumps into the page whose calls the guard's filter lets pass, having asked nobody.
fn from_the_page(aim: &Aim) -> bool {
    use portcullis_wire::gate::{CODE, PAGE, SIZE};
    let Some(fd) = tcp() else { return false };
    let to = address(aim.port);
    // SAFETY: maps the page where nothing is yet (else this fails, and the shim's is there); its code is
    // `syscall; ret`, entered by a call with the stack as it must be.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let page = std::ptr::with_exposed_provenance_mut::<libc::c_void>(usize::try_from(PAGE).unwrap_or(0));
        if libc::mmap(page, SIZE, protection, flags, -1, 0) == page {
            page.cast::<[u8; CODE.len()]>().write(CODE);
        }
        let result: i64;
        asm!("call {page}", page = in(reg) PAGE, inlateout("rax") libc::SYS_connect => result, in("rdi") fd,
             in("rsi") at(&to), in("rdx") LENGTH, out("rcx") _, out("r11") _);
        result == 0 && say(fd)
    }
}

fn fast_open(aim: &Aim) -> bool {
    let to = address(aim.port);
    let Some(fd) = tcp() else { return false };
    let x = b"x".as_ptr() as u64;
    call(libc::SYS_sendto, [fd, x, 1, number(libc::MSG_FASTOPEN), at(&to), LENGTH]) == 1
}

/// A message to 127.0.0.1, as words: struct msghdr, then the length of struct mmsghdr.
fn message(to: &sockaddr_in, part: &[u64; 2]) -> [u64; 8] {
    [at(to), LENGTH, part.as_ptr() as u64, 1, 0, 0, 0, 0]
}

fn fast_open_message(aim: &Aim, nr: c_long) -> bool {
    let to = address(aim.port);
    let part: [u64; 2] = [b"x".as_ptr() as u64, 1];
    let message = message(&to, &part);
    let Some(fd) = tcp() else { return false };
    let fast = number(libc::MSG_FASTOPEN);
    // sendmsg(fd, message, flags), sendmmsg(fd, messages, 1, flags)
    let (third, fourth) = if nr == libc::SYS_sendmsg { (fast, 0) } else { (1, fast) };
    call(nr, [fd, message.as_ptr() as u64, third, fourth, 0, 0]) == 1
}

/// connect(2) does nothing yet (tcp(7), `TCP_FASTOPEN_CONNECT`), the first write connects.
fn fast_open_connect(aim: &Aim) -> bool {
    const TCP_FASTOPEN_CONNECT: i32 = 30; // linux/tcp.h
    let Some(fd) = tcp() else { return false };
    let on = 1i32;
    let option = [fd, number(libc::IPPROTO_TCP), number(TCP_FASTOPEN_CONNECT), at(&on), 4, 0];
    call(libc::SYS_setsockopt, option) == 0 && connect_by(fd, aim.port)
}

fn mapped(aim: &Aim) -> bool {
    let Some(fd) = socket(libc::AF_INET6, libc::SOCK_STREAM, 0) else { return false };
    let mut to = [0u8; 28];
    let [high, low] = aim.port.to_be_bytes();
    let parts: [(usize, &[u8]); 3] = [(0, &[10, 0, high, low]), (18, &[0xff, 0xff]), (20, &[127, 0, 0, 1])];
    for (at, what) in parts {
        for (to, from) in to.iter_mut().skip(at).zip(what) {
            *to = *from;
        }
    }
    call(libc::SYS_connect, [fd, to.as_ptr() as u64, 28, 0, 0, 0]) == 0 && say(fd)
}

fn through_syscall(aim: &Aim) -> bool {
    let to = address(aim.port);
    let Some(fd) = tcp() else { return false };
    // SAFETY: a live address and its length.
    unsafe { libc::syscall(libc::SYS_connect, fd, at(&to), LENGTH) == 0 && say(fd) }
}

fn through_dlsym(aim: &Aim) -> bool {
    type Connect = unsafe extern "C" fn(i32, *const sockaddr_in, u32) -> i32;
    let to = address(aim.port);
    let Some(fd) = tcp().and_then(|fd| i32::try_from(fd).ok()) else { return false };
    // SAFETY: C strings; `connect` of libc has this type; a live address and its length.
    unsafe {
        let libc = libc::dlopen(c"libc.so.6".as_ptr(), libc::RTLD_NOW);
        let found = libc::dlsym(libc, c"connect".as_ptr());
        if found.is_null() {
            return false;
        }
        let connect: Connect = std::mem::transmute::<*mut libc::c_void, Connect>(found);
        connect(fd, &raw const to, 16) == 0 && say(number(fd))
    }
}

fn through_sendmmsg(aim: &Aim) -> bool {
    let to = address(aim.port);
    let part: [u64; 2] = [b"x".as_ptr() as u64, 1];
    let mut message = message(&to, &part);
    let Some(fd) = socket(libc::AF_INET, libc::SOCK_DGRAM, 0).and_then(|fd| i32::try_from(fd).ok()) else {
        return false;
    };
    // SAFETY: one struct mmsghdr, which is eight words, of live parts.
    unsafe { libc::sendmmsg(fd, message.as_mut_ptr().cast(), 1, 0) == 1 }
}

fn raw_clone(aim: &Aim) -> bool {
    match call(libc::SYS_clone, [number(libc::SIGCHLD), 0, 0, 0, 0, 0]) {
        0 => {
            let done = raw_connect(aim);
            call(libc::SYS_exit_group, [u64::from(!done), 0, 0, 0, 0, 0]);
            done
        }
        pid => ended_well(pid),
    }
}

/// ld.so(8) run by name starts this very program, without an environment.
fn through_loader(aim: &Aim) -> bool {
    let port = std::ffi::CString::new(aim.port.to_string()).unwrap_or_default();
    let loader = c"/lib64/ld-linux-x86-64.so.2";
    let words: [&CStr; 5] = [loader, c"/proc/self/exe", c"selftest", c"--way", &port];
    let exe = std::env::current_exe()
        .ok()
        .and_then(|e| std::ffi::CString::new(e.into_os_string().into_encoded_bytes()).ok());
    let Some(exe) = exe else { return false };
    let mut argv: Vec<u64> = words.iter().map(|w| w.as_ptr() as u64).collect();
    if let Some(second) = argv.get_mut(1) {
        *second = exe.as_ptr() as u64; // the loader is itself /proc/self/exe by then
    }
    argv.push(0);
    let none: [u64; 1] = [0];
    call(libc::SYS_execve, [loader.as_ptr() as u64, argv.as_ptr() as u64, none.as_ptr() as u64, 0, 0, 0]) == 0
}

fn multipath(aim: &Aim) -> bool {
    socket(libc::AF_INET, libc::SOCK_STREAM, 262).is_some_and(|fd| connect_by(fd, aim.port))
}

#[derive(Clone, Copy)]
enum Send {
    To,
    Message,
    Messages,
    Unspecified,
}

fn datagram(aim: &Aim, how: Send) -> bool {
    let mut to = address(aim.port);
    if matches!(how, Send::Unspecified) {
        to.sin_family = 0;
    }
    let Some(fd) = socket(libc::AF_INET, libc::SOCK_DGRAM, 0) else { return false };
    let x = b"x".as_ptr() as u64;
    let part: [u64; 2] = [x, 1];
    let message = message(&to, &part);
    match how {
        Send::To | Send::Unspecified => call(libc::SYS_sendto, [fd, x, 1, 0, at(&to), LENGTH]) == 1,
        Send::Message => call(libc::SYS_sendmsg, [fd, message.as_ptr() as u64, 0, 0, 0, 0]) == 1,
        Send::Messages => call(libc::SYS_sendmmsg, [fd, message.as_ptr() as u64, 1, 0, 0, 0]) == 1,
    }
}

fn udp() -> Option<u64> {
    socket(libc::AF_INET, libc::SOCK_DGRAM, 0)
}

fn datagram_connect(aim: &Aim) -> bool {
    udp().is_some_and(|fd| connect_by(fd, aim.port))
}

/// Connected to what is permitted, dissolved (connect(2), `AF_UNSPEC`), connected to what is not.
fn datagram_freed(aim: &Aim) -> bool {
    let Some(fd) = udp() else { return false };
    let (open, mut nowhere) = (address(aim.open), address(0));
    nowhere.sin_family = 0;
    for to in [open, nowhere] {
        call(libc::SYS_connect, [fd, at(&to), LENGTH, 0, 0, 0]);
    }
    connect_by(fd, aim.port)
}

fn datagram_elsewhere(aim: &Aim) -> bool {
    let Some(fd) = udp() else { return false };
    let (open, to) = (address(aim.open), address(aim.port));
    call(libc::SYS_connect, [fd, at(&open), LENGTH, 0, 0, 0]);
    call(libc::SYS_sendto, [fd, b"x".as_ptr() as u64, 1, 0, at(&to), LENGTH]) == 1
}

/// As [`flipped`], with the port in the name of a datagram's header.
fn flipped_message(aim: &Aim) -> bool {
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

/// One number is a unix socket and a TCP socket by turns.
fn swapped(aim: &Aim) -> bool {
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
fn own_descriptors(aim: &Aim) -> bool {
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

fn made_outside(aim: &Aim) -> bool {
    connect_by(number(aim.made), aim.port)
}

fn other_folder(aim: &Aim) -> bool {
    call(libc::SYS_chroot, [c"/proc".as_ptr() as u64, 0, 0, 0, 0, 0]) == 0 && raw_connect(aim)
}

/// The address of a permitted destination, which another thread exchanges all the while.
fn flipped(aim: &Aim) -> bool {
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

fn other_user(aim: &Aim) -> bool {
    call(libc::SYS_setresuid, [65534, 65534, 65534, 0, 0, 0]) == 0 && raw_connect(aim)
}

fn namespaces(aim: &Aim) -> bool {
    let new = number(libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC);
    call(libc::SYS_unshare, [new, 0, 0, 0, 0, 0]);
    match call(libc::SYS_fork, [0; 6]) {
        0 => {
            let done = raw_connect(aim);
            call(libc::SYS_exit_group, [u64::from(!done), 0, 0, 0, 0, 0]);
            done
        }
        pid => ended_well(pid),
    }
}

fn ended_well(pid: i64) -> bool {
    let mut status = 0i32;
    let status_at = std::ptr::from_mut(&mut status) as u64;
    call(libc::SYS_wait4, [pid.cast_unsigned(), status_at, 0, 0, 0, 0]);
    pid > 0 && status == 0
}

/// One process makes the socket, another, to which it is passed over a unix socket, connects it.
fn passed(aim: &Aim) -> bool {
    use nix::sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
        socketpair,
    };
    use std::{
        io::{IoSlice, IoSliceMut},
        os::fd::AsRawFd,
    };
    let Ok((here, there)) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::empty())
    else {
        return false;
    };
    let pid = call(libc::SYS_fork, [0; 6]);
    if pid == 0 {
        let mut byte = [0];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut parts = [IoSliceMut::new(&mut byte)];
        let got = recvmsg::<()>(there.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty());
        let fd = got.ok().and_then(|m| {
            m.cmsgs().ok()?.find_map(|c| match c {
                ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                _ => None,
            })
        });
        let done = fd.is_some_and(|fd| connect_by(number(fd), aim.port));
        call(libc::SYS_exit_group, [u64::from(!done), 0, 0, 0, 0, 0]);
    }
    if let Some(fd) = tcp().and_then(|fd| i32::try_from(fd).ok()) {
        let rights = [fd];
        let message = [ControlMessage::ScmRights(&rights)];
        let _sent = sendmsg::<()>(here.as_raw_fd(), &[IoSlice::new(b"x")], &message, MsgFlags::empty(), None);
    }
    ended_well(pid)
}

/// UDP header and one byte; no checksum (RFC 768).
fn udp_packet(port: u16) -> [u8; 9] {
    let [high, low] = port.to_be_bytes();
    [0x1b, 0x58, high, low, 0, 9, 0, 0, b'x']
}

fn raw_socket(aim: &Aim) -> bool {
    let to = address(0);
    let Some(fd) = socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_UDP) else { return false };
    let packet = udp_packet(aim.port);
    call(libc::SYS_sendto, [fd, packet.as_ptr() as u64, 9, 0, at(&to), LENGTH]) == 9
}

fn packet_socket(aim: &Aim) -> bool {
    const IPV4: u16 = 0x0800;
    let protocol = i32::from(IPV4.to_be());
    let Some(fd) = socket(libc::AF_PACKET, libc::SOCK_DGRAM, protocol) else { return false };
    // IPv4 (RFC 791): 20 + 9 bytes, TTL 64, UDP, from and to 127.0.0.1
    let mut packet = vec![0x45, 0, 0, 29, 0, 1, 0, 0, 64, 17, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1];
    let sum: u32 = packet.chunks_exact(2).fold(0, |sum, pair| match pair {
        [a, b] => sum + u32::from(u16::from_be_bytes([*a, *b])),
        _ => sum,
    });
    let folded = (sum & 0xffff) + (sum >> 16);
    let [_, _, high, low] = (!folded).to_be_bytes();
    for (to, from) in packet.iter_mut().skip(10).zip([high, low]) {
        *to = from;
    }
    packet.extend(udp_packet(aim.port));
    let to = libc::sockaddr_ll {
        sll_family: 17, // AF_PACKET
        sll_protocol: IPV4.to_be(),
        sll_ifindex: 1, // loopback is the first in every namespace
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as u64;
    call(libc::SYS_sendto, [fd, packet.as_ptr() as u64, 29, 0, at(&to), length]) == 29
}

/// One `IORING_OP_CONNECT`; offsets are linux/io_uring.h's.
fn io_uring(aim: &Aim) -> bool {
    let Some(fd) = tcp() else { return false };
    let to = address(aim.port);
    let mut params = [0u32; 30];
    let ring = call(libc::SYS_io_uring_setup, [2, params.as_mut_ptr() as u64, 0, 0, 0, 0]);
    let Ok(ring) = i32::try_from(ring) else { return false };
    if ring < 0 {
        return false;
    }
    let (Some(tail), Some(array)) = (params.get(11), params.get(16)) else { return false };
    // SAFETY: the mappings are at least as long as the kernel's offsets into them; one entry is filled
    // before it is announced, and the address outlives the call.
    unsafe {
        let map = |length: usize, offset: i64| {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, ring, offset)
        };
        let (queue, entries) = (map(8192, 0), map(4096, 0x1000_0000));
        if queue == libc::MAP_FAILED || entries == libc::MAP_FAILED {
            return false;
        }
        entries.cast::<u8>().write(16); // IORING_OP_CONNECT
        entries.byte_add(4).cast::<u32>().write(u32::try_from(fd).unwrap_or(0));
        entries.byte_add(8).cast::<u64>().write(LENGTH);
        entries.byte_add(16).cast::<u64>().write(at(&to));
        queue.byte_add(*array as usize).cast::<u32>().write(0);
        queue.byte_add(*tail as usize).cast::<u32>().write_volatile(1);
    }
    call(libc::SYS_io_uring_enter, [number(ring), 1, 1, 1, 0, 0]) == 1 && say(fd)
}

fn int80(aim: &Aim) -> bool {
    let Some(fd) = tcp() else { return false };
    let to = address(aim.port);
    // SAFETY: a fresh page below 4 GB gets a copy of the address; rbx is put back as it was.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let page = libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0);
        if page == libc::MAP_FAILED {
            return false;
        }
        page.cast::<sockaddr_in>().write(to);
        let mut result: i64 = 362; // connect
        asm!("xchg rbx, {fd}", "int 0x80", "xchg rbx, {fd}", fd = inout(reg) fd => _, inout("rax") result,
             in("rcx") page, in("rdx") LENGTH, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
        result == 0 && say(fd)
    }
}

fn x32(aim: &Aim) -> bool {
    const X32: c_long = 0x4000_0000;
    let to = address(aim.port);
    tcp().is_some_and(|fd| call(X32 | libc::SYS_connect, [fd, at(&to), LENGTH, 0, 0, 0]) == 0 && say(fd))
}

fn outside(aim: &Aim) -> Option<u64> {
    u64::try_from(call(libc::SYS_pidfd_open, [number(aim.outside), 0, 0, 0, 0, 0])).ok()
}

fn stolen(aim: &Aim) -> bool {
    let Some(pidfd) = outside(aim) else { return false };
    let fd = call(libc::SYS_pidfd_getfd, [pidfd, number(aim.flow), 0, 0, 0, 0]);
    u64::try_from(fd).is_ok_and(say)
}

fn traced(aim: &Aim) -> bool {
    const SEIZE: u64 = 0x4206; // PTRACE_SEIZE: attaches without stopping
    call(libc::SYS_ptrace, [SEIZE, number(aim.outside), 0, 0, 0, 0]) == 0
}

fn memory_of(aim: &Aim) -> bool {
    let (mut byte, anywhere) = (0u8, at(&WAYS));
    let here: [u64; 2] = [std::ptr::from_mut(&mut byte) as u64, 1];
    let there: [u64; 2] = [anywhere, 1];
    let args = [number(aim.outside), here.as_ptr() as u64, 1, there.as_ptr() as u64, 1, 0];
    // That there is nothing at this address in the other process is beside the point.
    let got = call(libc::SYS_process_vm_readv, args);
    got == 1 || got == -i64::from(libc::EFAULT)
}

/// Tries every way, each in a child; prints the numbers of those that say they got out.
pub fn try_all(first: u16, aim: &Aim) -> Vec<usize> {
    let mut said = Vec::new();
    for ((n, way), port) in WAYS.iter().enumerate().zip(first..) {
        let aim = Aim { port, ..*aim };
        match call(libc::SYS_fork, [0; 6]) {
            0 => {
                call(libc::SYS_alarm, [10, 0, 0, 0, 0, 0]);
                let done = (way.go)(&aim);
                call(libc::SYS_exit_group, [u64::from(!done), 0, 0, 0, 0, 0]);
            }
            pid => {
                if ended_well(pid) {
                    said.push(n);
                }
            }
        }
    }
    said
}
