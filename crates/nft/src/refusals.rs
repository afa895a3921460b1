//! What the table refused, as the kernel's packet log tells it (linux/netfilter/nfnetlink_log.h).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
};

use crate::{
    netlink::{Attributes, LOG, Netlink, attributes},
    table::{ARRIVING, group},
};

const CONFIGURE: u16 = LOG << 8 | 1;
const PACKET: u16 = LOG << 8;
/// How much of a packet is looked at: addresses and ports.
const SEEN: u32 = 128;
/// So many messages are taken at most, so that whoever sends without end keeps nobody else waiting.
const AT_ONCE: usize = 256;

/// A packet that nobody had granted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// Its IANA protocol number.
    pub protocol: u8,
    /// Who sent it; port 0 where the protocol has none.
    pub source: SocketAddr,
    /// Where it should have gone.
    pub destination: SocketAddr,
    /// It came to a listener of ours.
    pub arrives: bool,
    /// User of the socket that it left from.
    pub uid: Option<u32>,
    /// So many before it were not told: there were too many at once.
    pub missed: u32,
}

/// Hears of them, in the network namespace where it was made.
#[derive(Debug)]
pub struct Refusals {
    netlink: Netlink,
    /// Of which table: another one's may come under the same number.
    table: String,
    /// The kernel's number of what comes next.
    next: u32,
}

impl Refusals {
    /// Of the table of this name.
    ///
    /// # Errors
    /// `EBUSY`: somebody else hears them.
    pub fn of(table: &str) -> io::Result<Self> {
        let (netlink, group) = (Netlink::new()?, group(table));
        let mut bind = Attributes::default();
        bind.bytes(1, &[1]); // NFULA_CFG_CMD, NFULNL_CFG_CMD_BIND
        netlink.ask(CONFIGURE, group, &bind)?;
        let mut ways = Attributes::default();
        let [a, b, c, d] = SEEN.to_be_bytes();
        ways.bytes(2, &[a, b, c, d, 2, 0]); // NFULA_CFG_MODE, NFULNL_COPY_PACKET
        ways.word(5, 1); // NFULA_CFG_QTHRESH: each at once
        ways.bytes(6, &[0, 1]); // NFULA_CFG_FLAGS, NFULNL_CFG_F_SEQ: numbered
        netlink.ask(CONFIGURE, group, &ways)?;
        Ok(Self { netlink, table: table.to_owned(), next: 0 })
    }

    /// Takes what was told, or the oldest of it; never waits.
    pub fn take(&mut self) -> Vec<Refusal> {
        let mut all = Vec::new();
        let (table, next) = (&self.table, &mut self.next);
        for _ in 0..AT_ONCE {
            let told = self.netlink.receive(|kind, body| {
                let body = body.get(4..).filter(|_| kind == PACKET).unwrap_or_default();
                let Some(number) = find(body, 12).and_then(|it| it.try_into().ok()) else { return }; // NFULA_SEQ
                let number = u32::from_be_bytes(number);
                let missed = number.wrapping_sub(*next);
                *next = number.wrapping_add(1);
                all.extend(read(body, table).map(|told| Refusal { missed, ..told }));
            });
            if !matches!(told, Ok(()) | Err(nix::Error::ENOBUFS | nix::Error::EINTR)) {
                break;
            }
        }
        all
    }
}

impl AsFd for Refusals {
    /// Readable when something was refused.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.netlink.as_fd()
    }
}

fn find(body: &[u8], of: u16) -> Option<&[u8]> {
    attributes(body).find_map(|(kind, value)| (kind == of).then_some(value))
}

fn read(body: &[u8], table: &str) -> Option<Refusal> {
    let (protocol, source, destination) = packet(find(body, 9)?)?; // NFULA_PAYLOAD
    let prefix = std::str::from_utf8(find(body, 10)?).ok()?; // NFULA_PREFIX
    let (way, _) = prefix.trim_end_matches('\0').split_once(' ').filter(|(_, of)| *of == table)?;
    Some(Refusal {
        protocol,
        source,
        destination,
        arrives: way == ARRIVING,
        uid: find(body, 11).and_then(|it| it.try_into().ok()).map(u32::from_be_bytes), // NFULA_UID
        missed: 0,
    })
}

/// Protocol and the two addresses.
fn packet(bytes: &[u8]) -> Option<(u8, SocketAddr, SocketAddr)> {
    let v6 =
        |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?).to_canonical());
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?));
    let (protocol, source, destination, after): (u8, IpAddr, IpAddr, usize) = match bytes.first()? >> 4 {
        4 => (*bytes.get(9)?, v4(12)?, v4(16)?, usize::from(bytes.first()? & 0xf) * 4),
        6 => (*bytes.get(6)?, v6(8)?, v6(24)?, 40),
        _ => return None,
    };
    let port = |at: usize| {
        let ports = [6, 17, 33, 132, 136].contains(&protocol); // TCP, UDP, DCCP, SCTP, UDP-Lite
        let two = bytes.get(at..at + 2).filter(|_| ports).and_then(|it| it.try_into().ok());
        two.map_or(0, u16::from_be_bytes)
    };
    let at = |ip, offset| SocketAddr::new(ip, port(after + offset));
    Some((protocol, at(source, 0), at(destination, 2)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_out_of_a_packet() {
        let mut v4 = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 7];
        v4.extend([0x30, 0x39, 0, 53, 0, 8, 0, 0]);
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(packet(&v4), Some((17, at("192.0.2.1:12345"), at("198.51.100.7:53"))));
        v4[9] = 1;
        assert_eq!(packet(&v4), Some((1, at("192.0.2.1:0"), at("198.51.100.7:0"))));
        assert_eq!(packet(&v4[..19]), None);
        assert_eq!(packet(&[0x60; 39]), None);
        assert_eq!(packet(&[]), None);
    }
}
