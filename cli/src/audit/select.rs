//! Which records are wanted.

use std::net::IpAddr;

use jiff::{Timestamp, ToSpan as _, Zoned};

use super::Record;

/// Conditions that all must hold; an absent one holds.
#[derive(Debug, Default)]
pub struct Selection {
    /// Any of these.
    pub verdicts: Vec<&'static str>,
    /// Not before.
    pub since: Option<Timestamp>,
    /// Process id, executable's path or name.
    pub process: Option<String>,
    /// Address, prefix, address and port, or part of a name.
    pub peer: Option<String>,
}

impl Selection {
    /// Whether the record is wanted.
    pub fn takes(&self, record: &Record) -> bool {
        (self.verdicts.is_empty() || self.verdicts.contains(&record.verdict()))
            && self.since.is_none_or(|since| record.time().is_some_and(|t| t >= since))
            && self.process.as_deref().is_none_or(|p| is_process(record, p))
            && self.peer.as_deref().is_none_or(|p| is_peer(record, p))
    }
}

fn is_process(record: &Record, wanted: &str) -> bool {
    record.shown("pid").as_deref() == Some(wanted)
        || record.text("exe") == Some(wanted)
        || record.program() == Some(wanted)
}

fn is_peer(record: &Record, wanted: &str) -> bool {
    if let Some((ip, _)) = record.remote() {
        if let Some((base, bits)) = prefix(wanted) {
            return covers(base, bits, ip);
        }
        if record.text("remote") == Some(wanted) {
            return true;
        }
    }
    record.text("peer").is_some_and(|name| !wanted.is_empty() && name.contains(wanted))
}

fn prefix(text: &str) -> Option<(IpAddr, u8)> {
    let (ip, bits) = text.split_once('/').map_or((text, None), |(ip, bits)| (ip, Some(bits)));
    let ip: IpAddr = ip.parse().ok()?;
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    let bits = bits.map_or(Some(longest), |b| b.parse().ok().filter(|b| *b <= longest))?;
    Some((ip, bits))
}

fn covers(base: IpAddr, bits: u8, ip: IpAddr) -> bool {
    // Compared as 128 bits, v4 as v4-mapped.
    let (base_bits, ip_bits) = (as_v6(base), as_v6(ip));
    let bits = u32::from(bits) + if base.is_ipv4() { 96 } else { 0 };
    let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
    base_bits & mask == ip_bits & mask
}

fn as_v6(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// Reads a peer: whatever is no address may be part of a name, but an address with an impossible prefix is neither.
///
/// # Errors
/// A prefix that is none.
pub fn peer(text: &str) -> Result<String, String> {
    let is_address = |ip: &str| ip.parse::<IpAddr>().is_ok();
    match text.split_once('/') {
        Some((ip, _)) if is_address(ip) && prefix(text).is_none() => Err("no such prefix".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

/// Reads a point in time: a timestamp, a local date, time or both, or how long ago.
///
/// # Errors
/// What is none of these.
pub fn since(text: &str) -> Result<Timestamp, String> {
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    if let Ok(at) = text.parse::<jiff::civil::DateTime>() {
        return at.to_zoned(jiff::tz::TimeZone::system()).map(|z| z.timestamp()).map_err(|e| e.to_string());
    }
    if let Ok(at) = text.parse::<jiff::civil::Time>() {
        let today = Zoned::now().date().to_datetime(at);
        return today
            .to_zoned(jiff::tz::TimeZone::system())
            .map(|z| z.timestamp())
            .map_err(|e| e.to_string());
    }
    let days = match text {
        "today" => Some(0),
        "yesterday" => Some(1),
        _ => None,
    };
    if let Some(days) = days {
        let day = Zoned::now().start_of_day().and_then(|today| today.checked_sub(days.days()));
        return day.map(|z| z.timestamp()).map_err(|e| e.to_string());
    }
    let ago = text.trim_end_matches(" ago");
    let ago: jiff::Span =
        ago.parse().map_err(|_| "neither a time nor a duration such as `10m`".to_string())?;
    Zoned::now().checked_sub(ago.abs()).map(|z| z.timestamp()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record::parse(
            r#"{"seq":1,"time":"2026-01-31T10:00:00.5Z","pid":77,"exe":"/usr/bin/curl",
                "remote":"192.0.2.7:443","peer":"web.example.com","verdict":"refuse"}"#,
        )
        .unwrap()
    }

    #[test]
    fn processes_are_named_by_id_path_or_name() {
        for name in ["77", "/usr/bin/curl", "curl"] {
            assert!(is_process(&record(), name), "{name}");
        }
        for name in ["7", "/bin/curl", "url"] {
            assert!(!is_process(&record(), name), "{name}");
        }
    }

    #[test]
    fn peers_are_named_by_address_prefix_port_or_name() {
        for name in ["192.0.2.7", "192.0.2.0/24", "192.0.2.7:443", "example.com", "0.0.0.0/0"] {
            assert!(is_peer(&record(), name), "{name}");
        }
        for name in ["192.0.2.8", "192.0.3.0/24", "192.0.2.7:44", "example.org", "2001:db8::/32", ""] {
            assert!(!is_peer(&record(), name), "{name}");
        }
    }

    #[test]
    fn times_are_absolute_or_ago() {
        assert_eq!(since("2026-01-31T10:00:00Z").unwrap().as_second(), 1_769_853_600);
        let ago = Timestamp::now().duration_since(since("10m").unwrap());
        assert!((599..=601).contains(&ago.as_secs()), "{ago:?}");
        assert!(since("10 bananas").is_err());
        for form in [
            "2026-01-31",
            "2026-01-31 10:00",
            "2026-01-31T10:00:00",
            "10:00",
            "10:00:30",
            "2h 30m",
            "1 day ago",
            "today",
            "yesterday",
        ] {
            assert!(since(form).is_ok(), "{form}");
        }
        assert_eq!(peer("10.0.0.0/8"), Ok("10.0.0.0/8".to_owned()));
        assert_eq!(peer("spiffe://example.com/host"), Ok("spiffe://example.com/host".to_owned()));
        assert!(peer("10.0.0.0/33").is_err() && peer("::1/x").is_err());
        let of = |since| Selection { since: Some(since), ..Selection::default() };
        assert!(of(since("2026-01-31T10:00:00Z").unwrap()).takes(&record()));
        assert!(!of(since("2026-01-31T10:00:01Z").unwrap()).takes(&record()));
    }
}
