//! A throw-away cgroup under the backstop, and children in it that make raw calls.
#![expect(unsafe_code, reason = "fork(2) and raw socket calls, as a program without libc would make them")]
#![allow(dead_code, reason = "each test binary uses its part")]

use std::{
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    process,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use libc::{c_int, c_void, sockaddr_in, sockaddr_in6, sockaddr_storage};
use portcullis_backstop::{Attacher, Backstop, Cgroup, Event, Holder, Region, load};

static NEXT: AtomicU32 = AtomicU32::new(0);

pub struct Cage {
    pub backstop: Backstop,
    pub attacher: Attacher,
    pub cgroup: Cgroup,
}

impl Cage {
    pub fn new() -> Self {
        let (backstop, attacher) = load().expect("the backstop loads (tests run as root)");
        let name = format!("pcl-test-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let cgroup = Cgroup::below(process::id(), &name).unwrap();
        attacher.attach(&cgroup).unwrap();
        Self { backstop, attacher, cgroup }
    }

    /// Runs `inside` in a child within the cgroup, after `before` was told who it is. Returns what
    /// `inside` returned.
    pub fn run(
        &mut self,
        inside: impl FnOnce() -> c_int,
        before: impl FnOnce(&mut Backstop, Holder),
    ) -> c_int {
        let child = Child::start(&self.cgroup, inside);
        let holder = self.backstop.identify(child.pid).unwrap().expect("the child waits");
        before(&mut self.backstop, holder);
        child.go()
    }

    /// As `run`, with these regions granted.
    pub fn granted(&mut self, regions: &[Region], inside: impl FnOnce() -> c_int) -> c_int {
        self.run(inside, |backstop, holder| backstop.grant(holder, regions).unwrap())
    }

    pub fn refused(&mut self, inside: impl FnOnce() -> c_int) -> c_int {
        self.run(inside, |_, _| {})
    }

    pub fn events(&mut self) -> Vec<Event> {
        let mut all = Vec::new();
        self.backstop.events.drain(|event| all.push(event));
        all
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        for _ in 0..200 {
            if self.cgroup.remove_if_empty().unwrap_or(true) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

pub struct Child {
    pub pid: u32,
    go: c_int,
}

impl Child {
    pub fn start(cgroup: &Cgroup, inside: impl FnOnce() -> c_int) -> Self {
        let mut go = [0; 2];
        // SAFETY: room for two descriptors.
        assert_eq!(unsafe { libc::pipe2(go.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
        // SAFETY: the child makes only system calls that are async-signal-safe, and ends by _exit.
        match unsafe { libc::fork() } {
            0 => {
                let mut byte = 0u8;
                // SAFETY: reads one byte into a live variable; then the child ends.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::alarm(20);
                    // As after an exec; our copy of the gates would keep the broker alive.
                    for fd in 3..1024 {
                        let flags = libc::fcntl(fd, libc::F_GETFD);
                        if fd != go[0] && flags >= 0 && flags & libc::FD_CLOEXEC != 0 {
                            libc::close(fd);
                        }
                    }
                    if libc::read(go[0], (&raw mut byte).cast(), 1) != 1 {
                        libc::_exit(99);
                    }
                    libc::_exit(inside())
                }
            }
            pid => {
                // SAFETY: our own descriptor.
                unsafe { libc::close(go[0]) };
                let pid = u32::try_from(pid).expect("fork");
                cgroup.enter(pid).unwrap();
                Self { pid, go: go[1] }
            }
        }
    }

    /// Lets it run on, without waiting.
    pub fn release(&self) {
        // SAFETY: writes one byte of a literal.
        assert_eq!(unsafe { libc::write(self.go, b"x".as_ptr().cast(), 1) }, 1);
    }

    pub fn wait(self) -> c_int {
        let mut status = 0;
        // SAFETY: our child, a live variable, our own descriptor.
        unsafe {
            libc::waitpid(self.pid.cast_signed(), &raw mut status, 0);
            libc::close(self.go);
        }
        if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) }
    }

    pub fn go(self) -> c_int {
        self.release();
        self.wait()
    }
}

pub const EPERM: c_int = libc::EPERM;

pub fn errno() -> c_int {
    // SAFETY: always a valid pointer to this thread's errno.
    unsafe { *libc::__errno_location() }
}

/// 0 or the errno.
pub fn outcome(done: i64) -> c_int {
    if done < 0 { errno() } else { 0 }
}

pub struct Sockaddr {
    storage: sockaddr_storage,
    pub len: u32,
}

impl Sockaddr {
    pub fn new(to: SocketAddr) -> Self {
        // SAFETY: all-zero is a valid sockaddr_storage.
        let mut storage: sockaddr_storage = unsafe { std::mem::zeroed() };
        let at = &raw mut storage;
        let len = match to {
            SocketAddr::V4(to) => {
                let it = sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: to.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from(*to.ip()).to_be() },
                    sin_zero: [0; 8],
                };
                // SAFETY: the storage is large and aligned enough for any address.
                unsafe { at.cast::<sockaddr_in>().write(it) };
                size_of::<sockaddr_in>()
            }
            SocketAddr::V6(to) => {
                let it = sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: to.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: to.ip().octets() },
                    sin6_scope_id: to.scope_id(),
                };
                // SAFETY: as above.
                unsafe { at.cast::<sockaddr_in6>().write(it) };
                size_of::<sockaddr_in6>()
            }
        };
        Self { storage, len: len as u32 }
    }

    /// The same bytes under another family number.
    pub fn family(mut self, family: c_int) -> Self {
        self.storage.ss_family = family as u16;
        self
    }

    pub fn ptr(&self) -> *const libc::sockaddr {
        (&raw const self.storage).cast()
    }
}

pub fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    // SAFETY: takes numbers only.
    unsafe { libc::socket(domain, kind, protocol) }
}

pub fn connect(fd: c_int, to: &Sockaddr) -> c_int {
    // SAFETY: the address is live and as long as said.
    outcome(unsafe { libc::connect(fd, to.ptr(), to.len) }.into())
}

pub fn bind(fd: c_int, to: &Sockaddr) -> c_int {
    // SAFETY: the address is live and as long as said.
    outcome(unsafe { libc::bind(fd, to.ptr(), to.len) }.into())
}

pub fn sendto(fd: c_int, flags: c_int, to: &Sockaddr) -> c_int {
    // SAFETY: one byte of a literal; the address is live and as long as said.
    outcome(unsafe { libc::sendto(fd, b"x".as_ptr().cast::<c_void>(), 1, flags, to.ptr(), to.len) } as i64)
}

pub fn domain(to: SocketAddr) -> c_int {
    if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

/// A fresh stream socket, connected.
pub fn tcp(to: SocketAddr) -> c_int {
    let fd = socket(domain(to), libc::SOCK_STREAM, 0);
    let done = connect(fd, &Sockaddr::new(to));
    // SAFETY: our own descriptor.
    unsafe { libc::close(fd) };
    done
}

pub fn key(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

pub fn listener(at: &str) -> (TcpListener, SocketAddr) {
    let it = TcpListener::bind(at).unwrap();
    let addr = it.local_addr().unwrap();
    (it, addr)
}

pub fn receiver(at: &str) -> (UdpSocket, SocketAddr) {
    let it = UdpSocket::bind(at).unwrap();
    it.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let addr = it.local_addr().unwrap();
    (it, addr)
}

pub fn mapped(to: SocketAddr) -> SocketAddr {
    match to {
        SocketAddr::V4(to) => SocketAddr::new(IpAddr::V6(to.ip().to_ipv6_mapped()), to.port()),
        v6 => v6,
    }
}
