//! The backstop's nftables form, as the broker has it filled.

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd},
};

use portcullis_nft::{self as nft, Refusals, Table};
use portcullis_wire::{
    Addr,
    keyd::{Pass, Stopped},
};

/// How the names of our tables begin. Others' are not to be touched, whoever asks.
const PREFIX: &str = "portcullis-";

/// The table that the supervisor has made, in this network namespace.
#[derive(Debug)]
pub struct Fence {
    table: Table,
    refusals: Option<Refusals>,
}

impl Fence {
    /// Fills the table of this name from now on, and takes back what was granted before.
    pub fn of(name: &[u8]) -> io::Result<Self> {
        let name = std::str::from_utf8(name).ok().filter(|name| name.starts_with(PREFIX));
        let name = name.ok_or(io::ErrorKind::InvalidInput)?;
        let table = Table::of(name)?;
        table.clear()?;
        Ok(Self { table, refusals: Refusals::of(name).ok() })
    }

    /// Whether what is refused can be told.
    pub const fn tells(&self) -> bool {
        self.refusals.is_some()
    }

    /// Readable when something was refused.
    pub fn watched(&self) -> Option<BorrowedFd<'_>> {
        self.refusals.as_ref().map(AsFd::as_fd)
    }

    /// Does what one request says. `None`: it says nothing.
    pub fn pass(&self, asked: &Pass) -> Option<io::Result<()>> {
        let addr = IpAddr::V6(Ipv6Addr::from(asked.ip)).to_canonical();
        let to = nft::Pass::To { protocol: asked.protocol, addr, port: asked.port };
        Some(match asked.what {
            Pass::TO => self.table.grant(to),
            Pass::OTHERS => self.table.grant(nft::Pass::Others),
            Pass::ANYTHING => self.table.grant(nft::Pass::Anything),
            Pass::LISTENER => self.table.grant(nft::Pass::Listener(asked.port)),
            Pass::NO_LISTENER => self.table.forget(nft::Pass::Listener(asked.port)),
            Pass::NOTHING => self.clear(),
            _ => return None,
        })
    }

    /// Lets nothing new pass any more.
    pub fn clear(&self) -> io::Result<()> {
        self.table.clear()
    }

    /// What was refused since the last look. `time`: now, in nanoseconds since the Unix epoch.
    pub fn take(&mut self, time: u64) -> Vec<Stopped> {
        let refusals = self.refusals.as_mut().map(Refusals::take).unwrap_or_default();
        let told = |it: nft::Refusal| Stopped {
            time,
            uid: it.uid.unwrap_or(u32::MAX),
            protocol: it.protocol,
            arrives: it.arrives.into(),
            missed: u16::try_from(it.missed).unwrap_or(u16::MAX),
            source: Addr::from(it.source),
            destination: Addr::from(it.destination),
        };
        refusals.into_iter().map(told).collect()
    }
}
