//! serve ADDRESS:PORT [COUNT] [one|threads|fork|select|epoll|pass]: answers as many connections as said,
//! in one of the ways that servers have always had, and ends.
#![expect(unsafe_code, reason = "fork(2)")]

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    process::ExitCode,
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        select::{FdSet, select},
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
            sendmsg, socketpair,
        },
        wait::waitpid,
    },
    unistd::{ForkResult, fork},
};
use portcullis_demo_apps::{Arguments, answer, main_of, name_of, say};

fn main() -> ExitCode {
    main_of(run)
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let listener = TcpListener::bind(arguments.address()?)?;
    say(&format!("listening on {}", listener.local_addr()?.port()));
    let count = arguments.count();
    match arguments.text(2).unwrap_or("one") {
        "one" => one(&listener, count),
        "threads" => threads(&listener, count),
        "fork" => forks(&listener, count),
        "select" => selects(&listener, count),
        "epoll" => epolls(&listener, count),
        "pass" => passes(&listener, count),
        _ => Err(Errno::EINVAL.into()),
    }
}

fn serve(stream: TcpStream) {
    match answer(&stream).and_then(|asked| Ok((asked, stream.peer_addr()?.ip()))) {
        Ok((asked, from)) => say(&format!("{asked} from {from}")),
        Err(error) => say(&name_of(&error)),
    }
}

fn one(listener: &TcpListener, count: usize) -> io::Result<()> {
    for _ in 0..count {
        serve(listener.accept()?.0);
    }
    Ok(())
}

fn threads(listener: &TcpListener, count: usize) -> io::Result<()> {
    std::thread::scope(|scope| {
        for _ in 0..count {
            let (stream, _) = listener.accept()?;
            scope.spawn(move || serve(stream));
        }
        Ok(())
    })
}

fn forks(listener: &TcpListener, count: usize) -> io::Result<()> {
    for _ in 0..count {
        let (stream, _) = listener.accept()?;
        // SAFETY: this program has one thread.
        match unsafe { fork() }? {
            ForkResult::Child => {
                serve(stream);
                // SAFETY: ends the child without its parent's exit handlers.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                waitpid(child, None)?;
            }
        }
    }
    Ok(())
}

fn selects(listener: &TcpListener, count: usize) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut served = 0;
    while served < count {
        let mut ready = FdSet::new();
        ready.insert(listener.as_fd());
        select(None, &mut ready, None, None, None)?;
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                serve(stream);
                served += 1;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn epolls(listener: &TcpListener, count: usize) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))?;
    let mut served = 0;
    while served < count {
        let mut events = [EpollEvent::empty(); 4];
        epoll.wait(&mut events, EpollTimeout::NONE)?;
        // Edge-triggered: everything that is there must be taken now.
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    serve(stream);
                    served += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// One process accepts, another answers: dovecot's and vsftpd's way.
fn passes(listener: &TcpListener, count: usize) -> io::Result<()> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty())?;
    // SAFETY: this program has one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(ours);
            for _ in 0..count {
                if let Ok(stream) = take(&theirs) {
                    serve(stream);
                }
            }
            // SAFETY: ends the child without its parent's exit handlers.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            for _ in 0..count {
                let (stream, _) = listener.accept()?;
                let fds = [stream.as_raw_fd()];
                let rights = [ControlMessage::ScmRights(&fds)];
                sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)?;
            }
            waitpid(child, None)?;
            Ok(())
        }
    }
}

fn take(from: &OwnedFd) -> io::Result<TcpStream> {
    let mut byte = [0];
    let mut io = [IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!([i32; 1]);
    let message = recvmsg::<()>(from.as_raw_fd(), &mut io, Some(&mut space), MsgFlags::empty())?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(&fd) = fds.first()
        {
            // SAFETY: the kernel made this descriptor for us just now.
            return Ok(unsafe { TcpStream::from_raw_fd(fd) });
        }
    }
    Err(Errno::EBADMSG.into())
}
