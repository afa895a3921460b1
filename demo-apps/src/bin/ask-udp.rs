//! ask-udp ADDRESS:PORT [COUNT] [to|connected|many]: sends datagrams and prints the answers: with an address
//! on each (sendto), on a connected socket (send), or all in one call (sendmmsg).

use std::{
    io::{self, IoSlice},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    process::ExitCode,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg},
};
use portcullis_demo_apps::{Arguments, main_of, say};

fn main() -> ExitCode {
    main_of(run)
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let (to, count) = (arguments.address()?, arguments.count());
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    match arguments.text(2).unwrap_or("to") {
        "to" => {
            for n in 0..count {
                socket.send_to(format!("ping {n}").as_bytes(), to)?;
                let mut answer = [0; 100];
                let (length, from) = socket.recv_from(&mut answer)?;
                let text = String::from_utf8_lossy(answer.get(..length).unwrap_or_default());
                say(&format!("{text} from={}", from == to));
            }
        }
        "connected" => {
            socket.connect(to)?;
            for n in 0..count {
                socket.send(format!("ping {n}").as_bytes())?;
                say(&received(&socket)?);
            }
        }
        "many" => {
            let texts: Vec<String> = (0..count).map(|n| format!("ping {n}")).collect();
            let slices: Vec<[IoSlice<'_>; 1]> = texts.iter().map(|t| [IoSlice::new(t.as_bytes())]).collect();
            let peers: Vec<Option<SockaddrStorage>> = texts.iter().map(|_| Some(to.into())).collect();
            let mut headers = MultiHeaders::preallocate(count, None);
            let sent =
                sendmmsg(socket.as_raw_fd(), &mut headers, &slices, &peers, [], MsgFlags::empty())?.count();
            say(&format!("sent {sent}"));
            let mut answers = (0..sent).map(|_| received(&socket)).collect::<io::Result<Vec<_>>>()?;
            answers.sort();
            answers.iter().for_each(|answer| say(answer));
        }
        _ => return Err(Errno::EINVAL.into()),
    }
    Ok(())
}

fn received(socket: &UdpSocket) -> io::Result<String> {
    let mut answer = [0; 100];
    let length = socket.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).into_owned())
}
