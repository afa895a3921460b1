//! What may be asked, what is answered, and how sure the answer is.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a program is about to do, as the audit log names it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Op {
    /// Open a flow: connect(2), or a stream's sendto(2) with MSG_FASTOPEN.
    Connect = 1,
    /// Take a local address: bind(2).
    Bind = 2,
    /// Become reachable: listen(2).
    Listen = 3,
    /// Take an arrived flow: accept(2), or a socket that was connected before wrapping began.
    Accept = 4,
    /// Send a datagram to a peer that this socket has not sent to before.
    Send = 5,
    /// Receive a datagram from a peer that this socket has not heard from before.
    Receive = 6,
    /// Create a socket that carries traffic without any of the above (raw, packet).
    Socket = 7,
}

impl Op {
    /// Whether the local process is the side that opens the flow (`FROM` of a rule).
    #[must_use]
    pub const fn is_outbound(self) -> bool {
        matches!(self, Self::Connect | Self::Send | Self::Socket)
    }
}

impl TryFrom<u8> for Op {
    type Error = u8;
    fn try_from(raw: u8) -> Result<Self, u8> {
        Ok(match raw {
            1 => Self::Connect,
            2 => Self::Bind,
            3 => Self::Listen,
            4 => Self::Accept,
            5 => Self::Send,
            6 => Self::Receive,
            7 => Self::Socket,
            other => return Err(other),
        })
    }
}

/// Outcome for one request.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The call goes on as it is.
    Permit,
    /// The call fails with a natural errno.
    Refuse,
    /// The flow goes on once an association protects it.
    Protect,
}

/// How a permitted flow travels.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Lane {
    /// The program's own socket, native.
    #[default]
    Plain = 0,
    /// Mutual TLS 1.3 by the key daemon.
    Tls = 1,
    /// TLS records by the kernel.
    Ktls = 2,
    /// Encapsulating Security Payload (RFC 4303) by a per-socket SPD entry.
    Ipsec = 3,
}

impl Lane {
    /// Whether hosts have it: what asks for one that none has is refused.
    #[must_use]
    pub const fn is_available(self) -> bool {
        matches!(self, Self::Plain | Self::Tls)
    }
}

impl TryFrom<u8> for Lane {
    type Error = u8;
    fn try_from(raw: u8) -> Result<Self, u8> {
        Ok(match raw {
            0 => Self::Plain,
            1 => Self::Tls,
            2 => Self::Ktls,
            3 => Self::Ipsec,
            other => return Err(other),
        })
    }
}

/// What proves that the far side is who the rule says; ordered from weak to strong.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Assurance {
    /// Nothing: the rule asked for nothing about the far side.
    #[default]
    None = 0,
    /// The far side's source or destination address.
    Address = 1,
    /// This host's kernel: both ends are processes here.
    Kernel = 2,
    /// A certificate and the possession of its key.
    Certificate = 3,
}

impl TryFrom<u8> for Assurance {
    type Error = u8;
    fn try_from(raw: u8) -> Result<Self, u8> {
        Ok(match raw {
            0 => Self::None,
            1 => Self::Address,
            2 => Self::Kernel,
            3 => Self::Certificate,
            other => return Err(other),
        })
    }
}

macro_rules! display_as_audited {
    ($($type:ident { $($variant:ident => $text:literal),+ $(,)? })+) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text),+ })
            }
        }
    )+};
}

display_as_audited! {
    Op { Connect => "connect", Bind => "bind", Listen => "listen", Accept => "accept", Send => "send",
         Receive => "receive", Socket => "socket" }
    Verdict { Permit => "permit", Refuse => "refuse", Protect => "protect" }
    Lane { Plain => "plain", Tls => "tls", Ktls => "ktls", Ipsec => "ipsec" }
    Assurance { None => "none", Address => "address", Kernel => "kernel", Certificate => "certificate" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_op_survives_its_number() {
        for raw in 0..=u8::MAX {
            if let Ok(op) = Op::try_from(raw) {
                assert_eq!(op as u8, raw);
            }
        }
        assert_eq!(Op::try_from(0), Err(0));
    }
}
