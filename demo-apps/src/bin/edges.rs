//! edges: what careless and hostile programs do, one line of result each: null and short addresses, wrong
//! families, dead descriptors, closing everything, used-up descriptors. No arguments.
#![expect(unsafe_code, reason = "calls libc with bad arguments")]

use std::{
    io, mem,
    net::TcpListener,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    process::ExitCode,
    ptr::{null, null_mut},
};

use libc::{c_int, sockaddr, sockaddr_in, sockaddr_in6, socklen_t};
use portcullis_demo_apps::{main_of, name_of, say};

fn outcome(what: &str, result: c_int) {
    let name = if result < 0 { name_of(&io::Error::last_os_error()) } else { "ok".to_owned() };
    say(&format!("{what}: {name}"));
}

fn to(port: u16) -> sockaddr_in {
    // SAFETY: all-zero is a valid `sockaddr_in`.
    let mut address: sockaddr_in = unsafe { mem::zeroed() };
    address.sin_family = 2; // AF_INET
    address.sin_port = port.to_be();
    address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
    address
}

fn socket(domain: c_int, kind: c_int) -> c_int {
    // SAFETY: no pointers.
    unsafe { libc::socket(domain, kind, 0) }
}

fn main() -> ExitCode {
    main_of(|_| {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        addresses(port);
        families(port);
        descriptors(&listener, port);
        messages(port);
        everything_closed(port);
        Ok(())
    })
}

fn addresses(port: u16) {
    let good = to(port);
    let at = (&raw const good).cast::<sockaddr>();
    let size: socklen_t = 16;
    let fd = socket(libc::AF_INET, libc::SOCK_STREAM);
    // SAFETY: every pointer is null, a live `sockaddr_in`, or on a page that is nobody's, which the kernel
    // answers; no length is beyond what the pointer has, but where the kernel looks at the length first.
    unsafe {
        outcome("connect null", libc::connect(fd, null(), size));
        outcome("connect null of no length", libc::connect(fd, null(), 0));
        outcome("connect to page zero", libc::connect(fd, std::ptr::without_provenance(16), size));
        outcome(
            "connect to nobody's page",
            libc::connect(fd, std::ptr::without_provenance(0x10_0000_0000), size),
        );
        outcome("bind to nobody's page", libc::bind(fd, std::ptr::without_provenance(0x10_0000_0000), size));
        outcome("connect of length 0", libc::connect(fd, at, 0));
        outcome("connect of length 1", libc::connect(fd, at, 1));
        outcome("connect of length 15", libc::connect(fd, at, 15));
        outcome("connect of length 129", libc::connect(fd, at, 129));
        outcome("connect of length -1", libc::connect(fd, at, u32::MAX));
        outcome("bind null", libc::bind(fd, null(), size));
        outcome("bind of length 3", libc::bind(fd, at, 3));
        outcome("listen on nothing", libc::listen(-1, 1));
        outcome("accept on nothing", libc::accept(-1, null_mut(), null_mut()));
        outcome("accept into page zero", libc::accept(fd, std::ptr::without_provenance_mut(3), &mut 16));
        outcome("accept on what does not listen", libc::accept(fd, null_mut(), null_mut()));
        outcome("connect", libc::connect(fd, at, size));
        outcome("connect again", libc::connect(fd, at, size));
        outcome("bind when connected", libc::bind(fd, at, size));
        libc::close(fd);
        outcome("connect when closed", libc::connect(fd, at, size));
        outcome("connect of standard input", libc::connect(0, at, size));
    }
}

fn families(port: u16) {
    let mut odd = to(port);
    let at = |address: &sockaddr_in| std::ptr::from_ref(address).cast::<sockaddr>();
    let stream = socket(libc::AF_INET, libc::SOCK_STREAM);
    let six = socket(libc::AF_INET6, libc::SOCK_STREAM);
    let datagrams = socket(libc::AF_INET, libc::SOCK_DGRAM);
    let local = socket(libc::AF_UNIX, libc::SOCK_STREAM);
    // SAFETY: live addresses with their sizes.
    unsafe {
        outcome("v4 address on a v6 stream", libc::connect(six, at(&odd), 16));
        outcome("v4 address on a unix socket", libc::connect(local, at(&odd), 16));
        let mut wide: sockaddr_in6 = mem::zeroed();
        wide.sin6_family = 10; // AF_INET6
        wide.sin6_port = port.to_be();
        outcome("v6 address on a v4 stream", libc::connect(stream, (&raw const wide).cast(), 28));
        wide.sin6_addr.s6_addr = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 127, 0, 0, 1];
        outcome("v4-mapped address without scope", libc::connect(six, (&raw const wide).cast(), 24));
        odd.sin_family = 99;
        outcome("connect of family 99", libc::connect(stream, at(&odd), 16));
        odd.sin_family = 0; // AF_UNSPEC
        outcome("dissolving what is not connected", libc::connect(stream, at(&odd), 16));
        let text = b"x".as_ptr().cast();
        let sent = |r: isize| c_int::try_from(r).unwrap_or(-1);
        outcome("datagram to an unspecified family", sent(libc::sendto(datagrams, text, 1, 0, at(&odd), 16)));
        odd.sin_family = 2;
        outcome("datagram to a short address", sent(libc::sendto(datagrams, text, 1, 0, at(&odd), 8)));
        outcome("datagram to nobody", sent(libc::sendto(datagrams, text, 1, 0, null(), 0)));
        odd.sin_family = 0;
        odd.sin_addr.s_addr = 0;
        odd.sin_port = 0;
        outcome("bind to an unspecified family", libc::bind(datagrams, at(&odd), 16));
        outcome("a socket of family 99", socket(99, libc::SOCK_STREAM));
        outcome("a socket of type 77", socket(libc::AF_INET, 77));
        for fd in [stream, six, datagrams, local] {
            libc::close(fd);
        }
    }
}

fn descriptors(listener: &TcpListener, port: u16) {
    let good = to(port);
    let at = (&raw const good).cast::<sockaddr>();
    // SAFETY: live addresses with their sizes; descriptors of this program's own.
    unsafe {
        // A copy is the same socket; the number of a closed one may come back as another kind.
        let first = socket(libc::AF_INET, libc::SOCK_STREAM);
        let copy = libc::dup(first);
        libc::close(first);
        outcome("connect of a copy", libc::connect(copy, at, 16));
        let datagrams = socket(libc::AF_INET, libc::SOCK_DGRAM);
        libc::dup2(datagrams, copy);
        outcome("connect of what replaced it", libc::connect(copy, at, 16));
        libc::close(copy);
        libc::close(datagrams);

        let mut from: sockaddr_in = mem::zeroed();
        let mut room: socklen_t = 4;
        let fd = libc::accept(listener.as_raw_fd(), (&raw mut from).cast(), &raw mut room);
        say(&format!(
            "accept into little room: {} {room} {} {}",
            fd >= 0,
            from.sin_family,
            from.sin_addr.s_addr
        ));
        libc::close(fd);

        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        let few = libc::rlimit { rlim_cur: 64, ..limit };
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const few);
        let last = socket(libc::AF_INET, libc::SOCK_STREAM);
        let mut all = Vec::new();
        while let fd @ 0.. = libc::dup(0) {
            all.push(OwnedFd::from_raw_fd(fd));
        }
        outcome("connect when descriptors are used up", libc::connect(last, at, 16));
        outcome(
            "accept when descriptors are used up",
            libc::accept(listener.as_raw_fd(), null_mut(), null_mut()),
        );
        drop(all);
        libc::close(last);
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
}

fn messages(port: u16) {
    let mut good = to(port);
    let fd = socket(libc::AF_INET, libc::SOCK_DGRAM);
    let mut byte = *b"x";
    let mut io = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: all-zero is a valid `msghdr`; it then points to live memory.
    unsafe {
        let mut message: libc::msghdr = mem::zeroed();
        message.msg_iov = &raw mut io;
        message.msg_iovlen = 1;
        let int = |r: isize| c_int::try_from(r).unwrap_or(-1);
        outcome("sendmsg to nobody", int(libc::sendmsg(fd, &raw const message, 0)));
        message.msg_name = (&raw mut good).cast();
        message.msg_namelen = 16;
        outcome("sendmsg", int(libc::sendmsg(fd, &raw const message, 0)));
        message.msg_namelen = 5;
        outcome("sendmsg to a short address", int(libc::sendmsg(fd, &raw const message, 0)));
        outcome("sendmsg of nothing", int(libc::sendmsg(fd, null(), 0)));
        outcome("sendmmsg of nothing", libc::sendmmsg(fd, null_mut(), 0, 0));
        outcome("recvmsg of nothing", int(libc::recvmsg(fd, null_mut(), libc::MSG_DONTWAIT)));
        libc::close(fd);
    }
}

/// Closes whatever there is from 3 on, in the three ways there are, and connects all the same.
fn everything_closed(port: u16) {
    let good = to(port);
    let at = (&raw const good).cast::<sockaddr>();
    let dial = |what: &str| {
        let fd = socket(libc::AF_INET, libc::SOCK_STREAM);
        // SAFETY: a live address with its size.
        outcome(what, unsafe { libc::connect(fd, at, 16) });
    };
    // SAFETY: descriptors only; the listener is beyond use from here on, but a copy of it stays at 3.
    unsafe {
        let listener = (3..20).find(|&fd| {
            let mut on: c_int = 0;
            let mut size: socklen_t = 4;
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, (&raw mut on).cast(), &raw mut size)
                == 0
                && on != 0
        });
        if let Some(listener) = listener.filter(|&fd| fd != 3) {
            libc::dup2(listener, 3);
        }
        for fd in 4..2000 {
            libc::close(fd);
        }
        dial("connect after a loop of close");
        libc::close_range(4, u32::MAX, 0);
        dial("connect after close_range");
        for fd in 890..910 {
            libc::dup2(0, fd);
        }
        dial("connect after dup2 over all around 900");
        for fd in 4..2000 {
            libc::syscall(libc::SYS_close, fd);
        }
        dial("connect after a loop of system calls");
        outcome("is 900 open", libc::fcntl(900, libc::F_GETFD));
    }
}
