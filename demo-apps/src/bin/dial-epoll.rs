//! dial-epoll ADDRESS:PORT [COUNT] [early|late]: non-blocking connects, all at once, watched by one epoll
//! instance that the sockets join before (early) or after (late) the call.

use std::{
    io,
    net::TcpStream,
    os::fd::{AsRawFd, OwnedFd},
    process::ExitCode,
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{
            AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getsockopt, socket,
            sockopt::SocketError,
        },
    },
};
use portcullis_demo_apps::{Arguments, ask, main_of, name_of, say};

fn main() -> ExitCode {
    main_of(run)
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let to = arguments.address()?;
    let early = arguments.text(2).is_ok_and(|when| when == "early");
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut waiting: Vec<Option<OwnedFd>> = Vec::new();
    let mut failed = None;
    for n in 0..arguments.count() {
        let fd = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?;
        let event = EpollEvent::new(EpollFlags::EPOLLOUT | EpollFlags::EPOLLONESHOT, n as u64);
        // A socket that is not connecting yet reports EPOLLHUP: one-shot and level-triggered, so it is armed
        // anew after connect(2), as event loops do.
        if early {
            epoll.add(&fd, EpollEvent::new(EpollFlags::empty(), n as u64))?;
        }
        match connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(errno) => {
                failed = Some(errno);
                waiting.push(None);
                continue;
            }
        }
        if early {
            epoll.modify(&fd, &mut event.clone())?
        } else {
            epoll.add(&fd, event)?
        }
        waiting.push(Some(fd));
    }
    if let Some(errno) = failed {
        say(&format!("connect {}", name_of(&errno.into())));
    }
    let mut answers = Vec::new();
    while waiting.iter().any(Option::is_some) {
        let mut events = [EpollEvent::empty(); 16];
        let ready = epoll.wait(&mut events, EpollTimeout::from(10_000u16))?;
        if ready == 0 {
            return Err(Errno::ETIMEDOUT.into());
        }
        for event in events.iter().take(ready) {
            let n = usize::try_from(event.data()).unwrap_or(usize::MAX);
            let Some(fd) = waiting.get_mut(n).and_then(Option::take) else { continue };
            match getsockopt(&fd, SocketError)? {
                0 => {
                    let stream = TcpStream::from(fd);
                    stream.set_nonblocking(false)?;
                    answers.push(ask(stream, n)?);
                }
                errno => answers.push(name_of(&io::Error::from_raw_os_error(errno))),
            }
        }
    }
    answers.sort();
    answers.iter().for_each(|answer| say(answer));
    Ok(())
}
