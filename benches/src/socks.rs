//! A SOCKS 5 proxy (RFC 1928), the least that proxychains4 and torsocks need: one connection after the other.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
};

/// Serves until killed.
///
/// # Errors
/// The port is taken.
pub fn serve(port: u16) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    loop {
        let (client, _) = listener.accept()?;
        let _gone = pass_on(client);
    }
}

fn pass_on(mut client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let [_, methods] = take(&mut client)?;
    let mut offered = vec![0; usize::from(methods)];
    client.read_exact(&mut offered)?;
    let method = if offered.contains(&0) { 0 } else { 2 };
    client.write_all(&[5, method])?;
    if method == 2 {
        // RFC 1929: version, user, password.
        let [_, user] = take(&mut client)?;
        client.read_exact(&mut vec![0; usize::from(user)])?;
        let [password] = take(&mut client)?;
        client.read_exact(&mut vec![0; usize::from(password)])?;
        client.write_all(&[1, 0])?;
    }
    let [_, command, _, kind] = take(&mut client)?;
    let ip = match (command, kind) {
        (1, 1) => Some(Ipv4Addr::from(take::<4>(&mut client)?)),
        // A name: torsocks writes addresses so.
        (1, 3) => {
            let [length] = take(&mut client)?;
            let mut name = vec![0; usize::from(length)];
            client.read_exact(&mut name)?;
            String::from_utf8_lossy(&name).parse().ok()
        }
        _ => None,
    };
    let Some(ip) = ip else { return client.write_all(&[5, 7, 0, 1, 0, 0, 0, 0, 0, 0]) };
    let to = SocketAddr::from((ip, u16::from_be_bytes(take(&mut client)?)));
    let far = TcpStream::connect(to)?;
    client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
    // Nothing is carried: connect is what is measured.
    let _end = client.read(&mut [0])?;
    drop(far);
    Ok(())
}

fn take<const N: usize>(from: &mut TcpStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}
