//! What crosses a host's link.

use std::path::PathBuf;

use crate::{Host, Running};

/// Writes every frame behind its length (32 bits, network byte order); none of another link before it is bound.
const CAPTURE: &str = "import socket, struct, sys\n\
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)\n\
    s.bind(('eth0', 3))\n\
    out = open(sys.argv[1], 'wb', buffering=0)\n\
    print('listening', flush=True)\n\
    while True:\n    \
        frame = s.recv(65536)\n    \
        out.write(struct.pack('>I', len(frame)) + frame)\n";

/// A capture that goes on until it is dropped.
#[derive(Debug)]
pub struct Capture {
    file: PathBuf,
    _running: Running,
}

/// What one TCP segment carried.
#[derive(Debug)]
pub struct Segment {
    /// Ports, from and to.
    pub ports: (u16, u16),
    /// Its payload; not empty.
    pub payload: Vec<u8>,
}

impl Segment {
    /// Whether it begins with a TLS ClientHello (RFC 8446, 5.1 and 4).
    #[must_use]
    pub fn is_client_hello(&self) -> bool {
        matches!(self.payload.as_slice(), [22, 3, 1 | 3, _, _, 1, ..])
    }
}

impl Capture {
    /// Begins to listen on the link of a host.
    #[must_use]
    pub fn on(host: &Host) -> Self {
        let file = host.path("wire");
        let words = ["/usr/bin/python3", "-c", CAPTURE, file.to_str().unwrap()];
        let running = Running::start(host.plain(&words));
        running.line("listening");
        Self { file, _running: running }
    }

    /// All TCP payloads over IPv4 so far.
    ///
    /// # Panics
    /// The capture cannot be read.
    #[must_use]
    pub fn segments(&self) -> Vec<Segment> {
        let all = std::fs::read(&self.file).unwrap();
        let (mut rest, mut found) = (all.as_slice(), Vec::new());
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let length = usize::try_from(u32::from_be_bytes(*length)).unwrap();
            let Some(frame) = after.get(..length) else { break };
            rest = &after[length..];
            found.extend(segment(frame));
        }
        found
    }

    /// Whether a text is in any of them.
    #[must_use]
    pub fn has(&self, text: &[u8]) -> bool {
        self.segments().iter().any(|s| s.payload.windows(text.len()).any(|part| part == text))
    }
}

fn segment(frame: &[u8]) -> Option<Segment> {
    let ip = frame.get(14..).filter(|_| frame.get(12..14) == Some(&[8, 0]))?;
    let header = usize::from(ip.first()? & 15) * 4;
    let length = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
    let tcp = ip.get(header..length).filter(|_| ip.get(9) == Some(&6))?;
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let payload = tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?.to_vec();
    (!payload.is_empty()).then_some(Segment { ports: (port(0)?, port(2)?), payload })
}
