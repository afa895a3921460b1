//! What certificates say beyond names, in two non-critical extensions. Pure.
//!
//! Each holds one UTF8String of JSON, so that `openssl x509 -text` shows it. The object identifiers
//! are in the arc 2.25, which needs no registration (ITU-T X.667).

use serde::{Deserialize, Serialize};

use super::names::HostName;

/// Extension that says what the trust domain knows of a host.
pub const HOST_OID: [u64; 3] = [2, 25, 5_774_036_201_117_853_301];
/// Extension that says what a host knows of its process.
pub const PROCESS_OID: [u64; 3] = [2, 25, 5_774_036_201_117_853_302];
/// Longest content of one extension, in bytes.
const LONGEST: usize = 8192;

/// What the trust domain's root says of a host, in the host's issuing certificate.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Its name.
    pub host: HostName,
    /// Version of its enrolment, which `x509{ver>…}` compares; often a date.
    pub ver: u64,
    /// Groups it is in.
    #[serde(default)]
    pub groups: Vec<String>,
}

/// What a host says of one of its processes.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct ProcessFacts {
    /// Path of the executable as the broker sees it; what is not UTF-8 in it is replaced.
    pub exe: String,
    /// SHA-256 of the executable, in hexadecimal.
    pub sha256: String,
    /// Name of the user, or the number of one without.
    pub user: String,
    /// systemd unit, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
}

/// Why an extension cannot be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("extension is not what it should be")]
pub struct ExtensionError;

/// DER of a UTF8String (X.690, 8.23) with the facts as JSON.
pub fn encode(facts: &impl Serialize) -> Result<Vec<u8>, ExtensionError> {
    const UTF8_STRING: u8 = 0x0c;
    let json = serde_json::to_vec(facts).map_err(|_| ExtensionError)?;
    let mut der = vec![UTF8_STRING];
    match (u8::try_from(json.len()), u16::try_from(json.len())) {
        (Ok(short @ ..0x80), _) => der.push(short),
        (_, Ok(long)) if json.len() <= LONGEST => {
            der.push(0x82);
            der.extend(long.to_be_bytes());
        }
        _ => return Err(ExtensionError),
    }
    der.extend(json);
    Ok(der)
}

/// Reads what [`encode`] writes, and no other form of it.
pub fn decode<T: for<'a> Deserialize<'a>>(der: &[u8]) -> Result<T, ExtensionError> {
    let (length, json) = match der {
        [0x0c, short @ ..0x80, json @ ..] => (usize::from(*short), json),
        [0x0c, 0x82, high, low, json @ ..] => (usize::from(u16::from_be_bytes([*high, *low])), json),
        _ => return Err(ExtensionError),
    };
    if length != json.len() || length > LONGEST {
        return Err(ExtensionError);
    }
    serde_json::from_slice(json).map_err(|_| ExtensionError)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_survive_their_extension_short_and_long() {
        for groups in [vec![], vec!["ops".to_owned(); 100]] {
            let facts = HostFacts { host: "h.example.com".parse().unwrap(), ver: 7, groups };
            assert_eq!(decode::<HostFacts>(&encode(&facts).unwrap()), Ok(facts));
        }
    }

    #[test]
    fn damaged_extensions_are_refused() {
        let good = encode(&HostFacts { host: "h".parse().unwrap(), ver: 1, groups: vec![] }).unwrap();
        assert!(decode::<HostFacts>(&good).is_ok());
        for cut in 0..good.len() {
            assert_eq!(decode::<HostFacts>(&good[..cut]), Err(ExtensionError));
        }
        assert!(decode::<HostFacts>(&[&good[..], b" "].concat()).is_err());
        let too_long = HostFacts { host: "h".parse().unwrap(), ver: 1, groups: vec!["x".repeat(9000)] };
        assert_eq!(encode(&too_long), Err(ExtensionError));
    }
}
