//! Connections and listeners that a program is started with: judged before its first instruction, while the supervisor
//! holds it.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    libc,
    sys::socket::{MsgFlags, Shutdown, getsockopt, recv, shutdown, sockopt},
};
use portcullis_types::{Op, Protocol};
use portcullis_wire::{OpCode, Reply, Request};

use super::{Broker, judge::Call};
use crate::{
    audit::More,
    guard::{link::Handed, target},
    process::ProcessKey,
    sys::{
        diag::state,
        message::Writer,
        pidfd_getfd,
        proc::ProcDir,
        proxy,
        socket::{Facts, attach_filter, is_opening},
    },
};

/// `struct sockaddr` of no family: connect(2) to it dissolves a connection.
const NOWHERE: [u8; 16] = [0; 16];

impl Broker {
    /// Judges what a program holds that has just begun, and tells the supervisor to let it go on. One that nobody may
    /// look into (its file cannot be read, say) is not let go on, and ended when its time is up.
    pub(super) fn judge_outset(&mut self, tag: u64, process: &OwnedFd) {
        if let Some(pid) = target::behind_pidfd(std::process::id().cast_signed(), process.as_raw_fd())
            && let Err(error) = self.judge_held_by(pid, process)
            && target::process_of(pid).is_some()
        {
            let why = format!("the connections that a program begins with cannot be looked at: {error}");
            return self.note("broker", &why, &[("by_pid", More::Number(u64::from(pid.unsigned_abs())))]);
        }
        if let Some(to) = &mut self.handed {
            to.send(Handed::Judged(tag));
        }
    }

    /// One by one, so that they need not all find room here.
    fn judge_held_by(&mut self, pid: i32, process: &OwnedFd) -> io::Result<()> {
        let Some((pid, uid, gid)) = target::process_of(pid) else { return Ok(()) };
        let mut known = None;
        for (number, _) in ProcDir::open(pid)?.all_sockets()? {
            let socket = match pidfd_getfd(process.as_fd(), number) {
                Err(error) if error.raw_os_error() == Some(libc::EBADF) => continue, // closed meanwhile
                socket => socket?,
            };
            let mut facts = Facts::of(socket.as_fd())?;
            let opening = facts.remote.is_none() && is_opening(socket.as_fd());
            if facts.remote.is_none() && facts.protocol == Protocol::TCP {
                // It may have come up just now.
                facts = Facts::of(socket.as_fd())?;
            }
            if opening && facts.remote.is_none() {
                facts.remote = self.goes_to(facts.cookie);
                if facts.remote.is_none() {
                    self.note(
                        "broker",
                        "a connection that a program begins with leads to where cannot be told",
                        &[],
                    );
                    dissolve(&socket);
                }
            }
            let listens = facts.listening && facts.protocol == Protocol::TCP;
            if facts.remote.is_none() && !listens {
                continue;
            }
            let key = *known.get_or_insert_with(|| {
                self.begin_asking(pid);
                let pidfd = process.try_clone().ok();
                pidfd.and_then(|pidfd| self.identify(Writer { pid, uid, gid }, Some(pidfd)))
            });
            let (copy, is_datagram) = (socket.try_clone()?, facts.is_datagram());
            // A listener may be others' as well, and who comes to it is judged at accept in any case.
            if listens {
                if let Some(key) = key {
                    self.take_on(key, number, socket, facts);
                }
            } else if !key.is_some_and(|key| self.may_have(key, number, opening, (socket, facts))) {
                dissolve(&copy);
                if is_datagram {
                    deafen(&copy)?;
                }
            }
        }
        Ok(())
    }

    /// A listener: with the filter of those who may come, if it may be there at all.
    fn take_on(&mut self, key: ProcessKey, number: i32, socket: OwnedFd, facts: Facts) {
        let cookie = facts.cookie;
        let call = Call {
            op: Op::Listen,
            protocol: facts.protocol,
            local: facts.local,
            remote: None,
            socket: Some((socket, facts)),
            number,
            via: "guard",
            association: None,
        };
        let mut reply = Reply::to(&Request::new(OpCode::Judge, 1));
        self.judge(key, &call, &mut reply);
        if let Some(context) = self.context_of(key).filter(|_| reply.errno != 0) {
            self.turned_down.insert(cookie, context);
        }
    }

    /// Whether a listener that an image found was refused when that image began.
    pub(super) fn was_turned_down(&self, key: ProcessKey, call: &Call) -> bool {
        let refused = call.facts().and_then(|facts| self.turned_down.get(&facts.cookie));
        let now = self.processes.get(&key).map(|p| &p.context);
        refused
            .zip(now)
            .is_some_and(|(then, now)| (then.key, then.file, &then.facts) == (now.key, now.file, &now.facts))
    }

    /// Where a connection leads that the far side has not answered yet.
    fn goes_to(&mut self, cookie: u64) -> Option<SocketAddr> {
        let begun = !(1 << state::CLOSE | 1 << state::LISTEN);
        let all = self.diag.all(Protocol::TCP, begun).ok()?;
        all.into_iter().find(|found| found.cookie == cookie).map(|found| found.remote)
    }

    fn may_have(
        &mut self,
        key: ProcessKey,
        number: i32,
        opening: bool,
        (socket, facts): (OwnedFd, Facts),
    ) -> bool {
        let mut call = Call {
            op: if facts.protocol == Protocol::TCP && !opening { Op::Accept } else { Op::Connect },
            protocol: facts.protocol,
            local: facts.local,
            remote: facts.remote,
            socket: Some((socket, facts)),
            number,
            via: "guard",
            association: None,
        };
        self.see_through(&mut call);
        if call.op == Op::Accept && self.was_opened_here(&call) {
            call.op = Op::Connect;
        }
        let mut reply = Reply::to(&Request::new(OpCode::Judge, 1));
        self.judge(key, &call, &mut reply);
        reply.errno == 0
    }
}

/// Ends a connection, also what waits in its queue; whoever reads there finds the end of the file.
fn dissolve(socket: &OwnedFd) {
    let (_of_a_kind_that_cannot, _) = proxy::connect(socket.as_fd(), &NOWHERE);
    // That it was reset is for the far side.
    let _error = getsockopt(socket, sockopt::SocketError);
    let _not_connected_any_more = shutdown(socket.as_raw_fd(), Shutdown::Both);
}

/// A socket for datagrams is bound as before: has it hear nothing any more, nor what waits in its queue.
fn deafen(socket: &OwnedFd) -> io::Result<()> {
    let nothing = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 }; // BPF_RET
    attach_filter(socket.as_fd(), &[nothing])?;
    while recv(socket.as_raw_fd(), &mut [], MsgFlags::MSG_DONTWAIT).is_ok() {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream, UdpSocket},
    };

    use super::*;

    #[test]
    fn a_dissolved_connection_gives_nothing_and_takes_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut near, _) = listener.accept().unwrap();
        (&far).write_all(b"queued").unwrap();
        dissolve(&near.try_clone().unwrap().into());
        assert_eq!(near.read(&mut [0; 9]).unwrap(), 0);
        assert!(near.write(b"x").is_err());
        assert!((&far).read(&mut [0; 9]).is_err(), "it was reset");
    }

    #[test]
    fn a_dissolved_datagram_socket_has_no_peer() {
        let [near, far] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        near.connect(far.local_addr().unwrap()).unwrap();
        dissolve(&near.try_clone().unwrap().into());
        assert!(near.send(b"x").is_err());
    }

    #[test]
    fn a_datagram_socket_that_was_refused_hears_neither_what_waits_nor_what_comes() {
        let [near, far] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let send = || far.send_to(b"x", near.local_addr().unwrap()).unwrap();
        near.set_nonblocking(true).unwrap();
        send();
        assert_eq!(near.recv(&mut [0; 9]).unwrap(), 1, "the control");
        send();
        deafen(&near.try_clone().unwrap().into()).unwrap();
        send();
        assert!(near.recv(&mut [0; 9]).is_err());
    }
}
