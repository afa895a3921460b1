//! dial ADDRESS:PORT [COUNT]: connects as often as said, one after the other, and prints the answers.

use std::{net::TcpStream, process::ExitCode};

use portcullis_demo_apps::{ask, main_of, say};

fn main() -> ExitCode {
    main_of(|arguments| {
        let to = arguments.address()?;
        for n in 0..arguments.count() {
            let stream = TcpStream::connect(to)?;
            let names = stream.peer_addr()? == to && stream.local_addr()?.port() != 0;
            say(&format!("{} names={names}", ask(stream, n)?));
        }
        Ok(())
    })
}
