//! serve-udp ADDRESS:PORT [COUNT]: answers as many datagrams as said, and ends.

use std::{net::UdpSocket, process::ExitCode};

use portcullis_demo_apps::{main_of, say};

fn main() -> ExitCode {
    main_of(|arguments| {
        let socket = UdpSocket::bind(arguments.address()?)?;
        say(&format!("listening on {}", socket.local_addr()?.port()));
        for _ in 0..arguments.count() {
            let mut asked = [0; 100];
            let (length, from) = socket.recv_from(&mut asked)?;
            let text = String::from_utf8_lossy(asked.get(..length).unwrap_or_default()).into_owned();
            socket.send_to(text.replace("ping", "pong").as_bytes(), from)?;
            say(&format!("{text} from {}", from.ip()));
        }
        Ok(())
    })
}
