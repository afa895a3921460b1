//! What is asked of sockets beyond reading and writing.

use std::{
    io,
    net::TcpStream,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    libc,
    sys::socket::{MsgFlags, send, setsockopt, sockopt},
};

/// Takes over a TCP socket: it does not block, sends at once, and is reset when this process dies.
pub(crate) fn adopt(socket: OwnedFd) -> io::Result<TcpStream> {
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    reset_on_close(&stream, true)?;
    Ok(stream)
}

/// Writes to a socket; `more` follows at once, so the kernel may wait for it before it sends.
pub(crate) fn write(to: &TcpStream, bytes: &[u8], more: bool) -> io::Result<usize> {
    let more = if more { MsgFlags::from_bits_retain(libc::MSG_MORE) } else { MsgFlags::empty() };
    Ok(send(to.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL | more)?)
}

/// Puts urgent bytes of the program into its stream: TLS has no urgent pointer to carry them apart.
pub(crate) fn keep_urgent_inline(stream: &TcpStream) -> io::Result<()> {
    Ok(setsockopt(stream, sockopt::OobInline, &true)?)
}

/// Has the kernel ask, from a minute of silence on, whether the program's socket is still there.
///
/// A program that has closed leaves a half-closed connection: its kernel forgets it after tcp_fin_timeout (tcp(7)),
/// which nothing tells us, and then answers by RST. Without asking, an association whose peer stays silent as well
/// would be kept for ever.
pub(crate) fn ask_whether_gone(stream: &TcpStream) -> io::Result<()> {
    setsockopt(stream, sockopt::TcpKeepIdle, &60)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &15)?;
    Ok(setsockopt(stream, sockopt::KeepAlive, &true)?)
}

/// Says whether a close, or the end of this process, sends RST (socket(7), SO_LINGER of 0) or FIN.
pub(crate) fn reset_on_close(stream: &TcpStream, reset: bool) -> io::Result<()> {
    let linger = libc::linger { l_onoff: libc::c_int::from(reset), l_linger: 0 };
    Ok(setsockopt(stream, sockopt::Linger, &linger)?)
}
