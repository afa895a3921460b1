//! Names in a trust domain: who may be called what, and SPIFFE IDs. Pure.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Why a text is no name.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Not a trust domain (SPIFFE-ID, 2.1).
    #[error("`{0}` is no trust domain: 1 to 255 of a-z 0-9 . - _")]
    TrustDomain(String),
    /// Not a host name.
    #[error("`{0}` is no host name: labels of a-z 0-9 - with dots between, 253 at most")]
    Host(String),
    /// Not a process name.
    #[error("`{0}` is no process name: 1 to 64 of A-Z a-z 0-9 . - _, beginning with none of . and -")]
    Process(String),
    /// Not a SPIFFE ID of ours.
    #[error("`{0}` is none of `spiffe://DOMAIN/host/HOST` and `spiffe://DOMAIN/host/HOST/process/NAME`")]
    SpiffeId(String),
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $error:ident, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                let valid: fn(&str) -> bool = $valid;
                if valid(&text) { Ok(Self(text)) } else { Err(NameError::$error(text)) }
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                text.to_owned().try_into()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// Name of a trust domain, all of whose certificates have one root.
    TrustDomain, TrustDomain,
    |text| (1..=255).contains(&text.len())
        && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'))
}

name! {
    /// DNS name of a host, in lower case (RFC 1123, 2.1).
    HostName, Host,
    |text| text.len() <= 253
        && text.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

name! {
    /// Name that the policy gives to a process.
    ProcessName, Process,
    |text| (1..=64).contains(&text.len())
        && text.bytes().all(|b| matches!(b, b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'))
        && !text.starts_with(['.', '-'])
}

/// Who a certificate says its holder is: a host, or a process on it.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct SpiffeId {
    /// The trust domain.
    pub domain: TrustDomain,
    /// The host.
    pub host: HostName,
    /// The process; `None` for the host itself.
    pub process: Option<ProcessName>,
}

impl FromStr for SpiffeId {
    type Err = NameError;
    /// Reads the two forms of path that exist here; any other is refused.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let wrong = || NameError::SpiffeId(text.to_owned());
        let mut parts = text.strip_prefix("spiffe://").ok_or_else(wrong)?.split('/');
        let domain = parts.next().ok_or_else(wrong)?.parse()?;
        if parts.next() != Some("host") {
            return Err(wrong());
        }
        let host = parts.next().ok_or_else(wrong)?.parse()?;
        let process = match (parts.next(), parts.next(), parts.next()) {
            (None, _, _) => None,
            (Some("process"), Some(name), None) => Some(name.parse()?),
            _ => return Err(wrong()),
        };
        Ok(Self { domain, host, process })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/host/{}", self.domain, self.host)?;
        self.process.as_ref().map_or(Ok(()), |name| write!(f, "/process/{name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_their_text() {
        for text in ["spiffe://example.com/host/h1.example.com", "spiffe://d/host/h/process/vsftpd"] {
            assert_eq!(text.parse::<SpiffeId>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_ids_are_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://d",
            "spiffe://d/host",
            "spiffe://d/host/",
            "spiffe://d/host/h/",
            "spiffe://d/host/h/process",
            "spiffe://d/host/h/process/",
            "spiffe://d/host/h/process/p/q",
            "spiffe://d/host/h/process/../x",
            "spiffe://d/host/H",
            "spiffe://d/user/h",
            "spiffe://d:1/host/h",
            "https://d/host/h",
            "spiffe://d/host/h%2e",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }
}
