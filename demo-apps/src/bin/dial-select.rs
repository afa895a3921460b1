//! dial-select ADDRESS:PORT: a non-blocking connect that select(2) waits for, and that is called again to ask
//! how it went, as old programs do.

use std::{net::TcpStream, os::fd::AsRawFd, process::ExitCode};

use nix::{
    errno::Errno,
    sys::{
        select::{FdSet, select},
        socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket},
        time::{TimeVal, TimeValLike},
    },
};
use portcullis_demo_apps::{ask, main_of, say};

fn main() -> ExitCode {
    main_of(|arguments| {
        let to = arguments.address()?;
        let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let fd = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK, None)?;
        let peer = SockaddrStorage::from(to);
        match connect(fd.as_raw_fd(), &peer) {
            Ok(()) => {}
            Err(Errno::EINPROGRESS) => {
                let mut ready = FdSet::new();
                use std::os::fd::AsFd;
                ready.insert(fd.as_fd());
                let mut patience = TimeVal::seconds(10);
                if select(None, None, &mut ready, None, &mut patience)? == 0 {
                    return Err(Errno::ETIMEDOUT.into());
                }
                match connect(fd.as_raw_fd(), &peer) {
                    Ok(()) | Err(Errno::EISCONN) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            Err(errno) => return Err(errno.into()),
        }
        let stream = TcpStream::from(fd);
        stream.set_nonblocking(false)?;
        say(&ask(stream, 0)?);
        Ok(())
    })
}
