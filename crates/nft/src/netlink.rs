//! Netlink as nftables and its log speak it: attributes in attributes, and batches that are done whole or not at all.
//! Sources: linux/netlink.h, linux/netfilter/nfnetlink.h.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
    },
};

const ERROR: u16 = 2; // NLMSG_ERROR
const DONE: u16 = 3; // NLMSG_DONE
const REQUEST: u16 = 1; // NLM_F_REQUEST
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
/// `NLM_F_CREATE`.
pub const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`.
pub const APPEND: u16 = 0x800;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NESTED: u16 = 0x8000;
const HEADER: usize = 16 + 4;

/// Subsystem of nftables.
pub const TABLES: u16 = 10;
/// Subsystem of the packet log.
pub const LOG: u16 = 4;

/// Attributes of one message, or of one attribute.
#[derive(Debug, Default)]
pub struct Attributes(pub Vec<u8>);

impl Attributes {
    /// Bytes as they are.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// A number, in network byte order.
    pub fn word(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// A text, with its NUL.
    pub fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let ended: Vec<u8> = value.bytes().chain([0]).collect();
        self.bytes(kind, &ended)
    }

    /// Attributes.
    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self) -> &mut Self) -> &mut Self {
        let mut inner = Self::default();
        fill(&mut inner);
        self.bytes(kind | NESTED, &inner.0)
    }
}

/// Walks through attributes: kind and value of each.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & !NESTED;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn message(out: &mut Vec<u8>, kind: u16, flags: u16, seq: u32, family: u8, resource: u16, body: &[u8]) {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend((flags | REQUEST).to_ne_bytes());
    out.extend(seq.to_ne_bytes());
    out.extend([0; 4]);
    out.extend([family, 0]);
    out.extend(resource.to_be_bytes());
    out.extend(body);
}

/// Changes to tables that take place together.
#[derive(Debug)]
pub struct Batch {
    bytes: Vec<u8>,
    changes: u32,
}

impl Batch {
    /// Nothing yet.
    pub fn new() -> Self {
        let mut bytes = Vec::new();
        message(&mut bytes, BATCH_BEGIN, 0, 0, 0, TABLES, &[]);
        Self { bytes, changes: 0 }
    }

    /// One more, of the family `inet`.
    pub fn add(
        &mut self,
        kind: u16,
        flags: u16,
        fill: impl FnOnce(&mut Attributes) -> &mut Attributes,
    ) -> &mut Self {
        const INET: u8 = 1; // NFPROTO_INET
        let mut body = Attributes::default();
        fill(&mut body);
        self.changes += 1;
        message(&mut self.bytes, TABLES << 8 | kind, flags | ACK, self.changes, INET, 0, &body.0);
        self
    }
}

/// A socket to the packet filter of the network namespace that it was made in.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

impl Netlink {
    /// Opens it.
    pub fn new() -> io::Result<Self> {
        let kind = (SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter);
        let fd = socket(AddressFamily::Netlink, kind.0, kind.1, kind.2)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self(fd))
    }

    /// Makes the changes of a batch, or none of them.
    ///
    /// # Errors
    /// The first change's that cannot be made.
    pub fn commit(&self, mut batch: Batch) -> io::Result<()> {
        message(&mut batch.bytes, BATCH_END, 0, batch.changes + 1, 0, TABLES, &[]);
        self.request(&batch.bytes, batch.changes)
    }

    /// One request of a subsystem.
    ///
    /// # Errors
    /// As the kernel answers.
    pub fn ask(&self, kind: u16, resource: u16, body: &Attributes) -> io::Result<()> {
        let mut bytes = Vec::new();
        message(&mut bytes, kind, ACK, 1, 0, resource, &body.0);
        self.request(&bytes, 1)
    }

    fn request(&self, bytes: &[u8], answers: u32) -> io::Result<()> {
        send(self.0.as_raw_fd(), bytes, MsgFlags::empty())?;
        let (mut heard, mut failed) = (0, None);
        // The kernel has answered when send(2) returns (net/netlink/af_netlink.c, netlink_unicast_kernel).
        while heard < answers {
            let done = self.receive(|kind, body| {
                if kind == ERROR {
                    heard += 1;
                    failed = failed.or(errno(body));
                }
            });
            match done {
                Ok(()) => {}
                // A batch that cannot be begun has one answer.
                Err(Errno::EAGAIN) if failed.is_some() => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        failed.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    /// The attributes of all tables of the family `inet`, one by one.
    ///
    /// # Errors
    /// As the kernel answers.
    pub fn tables(&self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        const GET: u16 = 1; // NFT_MSG_GETTABLE
        let mut bytes = Vec::new();
        message(&mut bytes, TABLES << 8 | GET, DUMP, 1, 1, 0, &[]);
        send(self.0.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let (mut done, mut failed) = (false, None);
        while !done {
            self.receive(|kind, body| match kind {
                ERROR => (done, failed) = (true, errno(body)),
                DONE => done = true,
                _ => each(body.get(4..).unwrap_or_default()),
            })?;
        }
        failed.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    /// Takes what has arrived: kind and body of each message. Never waits.
    ///
    /// # Errors
    /// `EAGAIN`: nothing is there.
    pub fn receive(&self, mut each: impl FnMut(u16, &[u8])) -> Result<(), Errno> {
        let mut room = [0; 16 << 10];
        let length = recv(self.0.as_raw_fd(), &mut room, MsgFlags::MSG_DONTWAIT)?;
        let mut bytes = room.get(..length).unwrap_or_default();
        let word = |bytes: &[u8], at: usize| {
            bytes.get(at..at + 4).and_then(|it| it.try_into().ok()).map(u32::from_ne_bytes)
        };
        while let (Some(length), Some(kind)) = (word(bytes, 0), word(bytes, 4)) {
            let length = usize::try_from(length).unwrap_or(0).max(16);
            let kind = kind & 0xffff;
            each(u16::try_from(kind).unwrap_or(0), bytes.get(16..length).unwrap_or_default());
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(())
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The errno in an answer; `None`: it was done.
fn errno(body: &[u8]) -> Option<i32> {
    let raw = i32::from_ne_bytes(body.get(..4)?.try_into().ok()?);
    (raw != 0).then_some(-raw)
}
