//! Words of the control socket, `STATE/control.sock` (`SOCK_STREAM`).
//!
//! A client writes one JSON object and a newline, and reads one JSON object and a newline; it may
//! go on with the next. Root and the owner of the state folder are answered, others are cut off.
//!
//! ```text
//! {"request":"flush"}
//! {"ok":{"flush":17}}      or      {"error":"not a request: …"}
//! ```

use serde::{Deserialize, Serialize};

use crate::Mode;

/// What may be asked.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// Take in every ring and write what is in it; the answer comes when it is in the log.
    Flush,
    /// The processes that are served.
    Ps,
    /// How the broker is.
    Status,
    /// Load the policy again (as SIGHUP does); the answer says whether it took.
    Reload,
    /// Write what is in the rings and end.
    Shutdown,
}

/// What comes back: exactly one of the two.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Response {
    /// It was done; here is the answer.
    Ok(Answer),
    /// It was not, and why.
    Error(String),
}

/// An answer, named after its request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// Everything is in the log up to this number.
    Flush(u64),
    /// One per served process.
    Ps(Vec<ProcessRow>),
    /// See [`Status`].
    Status(Box<Status>),
    /// The generation now in force.
    Reload(u64),
    /// The number of the last record.
    Shutdown(u64),
}

/// One served process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ProcessRow {
    /// What its run is called (`run --name`), as it came: a label, which proves nothing.
    #[serde(default)]
    pub name: Option<String>,
    /// Process id as the broker sees it.
    pub pid: i32,
    /// Start time, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start: u64,
    /// Executable as the broker sees it, escaped; `null` if it cannot vouch for it.
    pub exe: Option<String>,
    /// SHA-256 of the executable, hex.
    pub sha256: Option<String>,
    /// Effective user id.
    pub uid: u32,
    /// Its name, or the number as text.
    pub user: String,
    /// systemd unit, or cgroup.
    pub unit: Option<String>,
    /// Command line, bounded and escaped.
    pub cmdline: String,
    /// What holds it: `shim`, `guard`, `backstop`, and `filter` if a listening socket of its has one.
    pub held_by: Vec<String>,
    /// The same, one by one, with what does not hold it.
    #[serde(default)]
    pub coverage: Vec<Hold>,
    /// Policies of runs that narrow what it may, beside the one for all.
    #[serde(default)]
    pub narrowed_by: Vec<String>,
    /// Since when the broker knows it, RFC 3339; `null` if it has not asked anything yet.
    pub since: Option<String>,
    /// Live associations that are known.
    pub associations: Vec<AssociationRow>,
    /// Listening sockets.
    pub listeners: Vec<ListenerRow>,
    /// Permitted and refused calls so far.
    pub permitted: u64,
    /// See `permitted`.
    pub refused: u64,
}

/// Whether one of the four holds a process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Hold {
    /// `shim`, `guard`, `backstop`, `filter`.
    pub by: String,
    /// Whether it does.
    pub holds: bool,
    /// Since when, RFC 3339: since the process began, or since it was first seen to be otherwise than before.
    pub since: String,
    /// Why it does not.
    pub why: Option<String>,
    /// Of a backstop that holds: `bpf` or `nftables`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<String>,
}

/// One of the four, over all processes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Covered {
    /// `shim`, `guard`, `backstop`, `filter`.
    pub by: String,
    /// How many it holds.
    pub processes: usize,
    /// Those that it does not hold.
    pub missing: Vec<Uncovered>,
    /// Of the backstop, if it holds any: `bpf` or `nftables`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<String>,
}

/// Processes that something does not hold, for one reason.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Uncovered {
    /// Why.
    pub why: String,
    /// How many.
    pub processes: usize,
}

/// One live association.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct AssociationRow {
    /// As in the audit log.
    pub association: String,
    /// As in the audit log, if it belongs to a session.
    pub session: Option<String>,
    /// `tcp`, `udp` …
    pub proto: String,
    /// `address:port`.
    pub local: Option<String>,
    /// `address:port`.
    pub remote: Option<String>,
    /// The rule that permits it.
    pub rule: Option<String>,
    /// `plain`, `tls` …
    pub lane: String,
    /// `none`, `address`, `kernel`, `certificate`.
    pub assurance: String,
    /// Generation that admitted it.
    pub generation: u64,
    /// Since when, RFC 3339.
    #[serde(default)]
    pub since: String,
    /// Whom the peer of a protected flow has proved to be.
    #[serde(default)]
    pub peer: Option<String>,
    /// What a protected flow is encrypted with.
    #[serde(default)]
    pub cipher: Option<String>,
    /// How its keys were agreed on.
    #[serde(default)]
    pub kex: Option<String>,
    /// Bytes received so far; `null` for what is not TCP.
    #[serde(default)]
    pub bytes_in: Option<u64>,
    /// Bytes sent so far.
    #[serde(default)]
    pub bytes_out: Option<u64>,
    /// How long it has been there, in seconds.
    #[serde(default)]
    pub duration: f64,
}

/// One listening socket.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ListenerRow {
    /// `address:port`.
    pub local: String,
    /// `anyone`, `addresses`, `session`, `closed`.
    pub scope: String,
    /// `kernel-filter`: others get no SYN-ACK; `front`: as that, and some must prove who they are first; `accept`: a
    /// stranger is closed at accept; `native`: anyone may come.
    pub held_by: String,
    /// Why nobody can prove who he is there, if somebody should: all such are refused.
    #[serde(default)]
    pub unprotected: Option<String>,
}

/// How the broker is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// Broker's process id.
    pub pid: i32,
    /// Its user id.
    pub uid: u32,
    /// Enforce or audit.
    pub mode: Mode,
    /// The policy file.
    pub policy: String,
    /// Generation in force; 0 if none is, and everything is refused.
    pub generation: u64,
    /// Since when that generation is in force, RFC 3339.
    pub loaded: Option<String>,
    /// Why the file as it is now is not in force: the diagnostic, as `policy check` prints it.
    pub diagnostic: Option<String>,
    /// What runs have brought along.
    #[serde(default)]
    pub layers: Vec<LayerRow>,
    /// Processes of the trees, whether they have asked anything or not.
    pub processes: usize,
    /// Open channels and doors.
    pub channels: usize,
    /// Live associations that are known.
    pub associations: usize,
    /// Number of the last audit record.
    pub audit_seq: u64,
    /// Records that could not be written; each loss is in the log too, once it can be.
    pub audit_lost: u64,
    /// Why the log cannot be written now, if so; new flows are refused meanwhile.
    pub audit_error: Option<String>,
    /// Closings that the kernel reported faster than they could be taken in.
    pub closings_lost: u64,
    /// Whether a key daemon answers.
    pub keyd: bool,
    /// How many processes are held by what, and why others are not.
    #[serde(default)]
    pub coverage: Vec<Covered>,
    /// What is not held here, one sentence each.
    pub gaps: Vec<String>,
}

/// The policy of runs, which narrows what their trees may.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LayerRow {
    /// Its file.
    pub policy: String,
    /// Enforce or audit.
    pub mode: Mode,
    /// How many runs are under it.
    pub runs: usize,
    /// Whether there is one in force; else everything is refused to them.
    pub in_force: bool,
    /// Why the file as it is now is not in force.
    pub diagnostic: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_as_documented() {
        let flush: Request = serde_json::from_str(r#"{"request":"flush"}"#).unwrap();
        assert_eq!(flush, Request::Flush);
        assert!(serde_json::from_str::<Request>(r#"{"request":"rm"}"#).is_err());
        let answer = serde_json::to_string(&Response::Ok(Answer::Flush(3))).unwrap();
        assert_eq!(answer, r#"{"ok":{"flush":3}}"#);
    }
}
