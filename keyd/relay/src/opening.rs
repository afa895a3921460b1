//! From an outer socket's first packet to a verdict: sniff, handshake, and between engines the far verdict.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    time::Duration,
};

use rustls::{AlertDescription, Error, pki_types::CertificateDer};

use crate::{
    Established, Failure, Limits, Role, ServerSide,
    flow::Scratch,
    handshake::{Finished, Handshake, Progress},
    hello::{Beginning, beginning},
    record::{Alert, Bad, HEADER, LARGEST, Opened, Records, Whole, whole},
    sides::take_shown,
};

/// An association between `Ready` and the verdict.
pub(crate) struct Waiting {
    /// `None`: plain.
    pub(crate) records: Option<Records>,
    /// What came after the handshake, still sealed.
    pub(crate) rest: Vec<u8>,
    /// Whether the peer waits for our verdict.
    pub(crate) greet: bool,
}

impl Waiting {
    /// Tells the peer why it is refused.
    pub(crate) fn last_words(&mut self, mut outer: &TcpStream, alert: Alert) {
        let mut bytes = Vec::new();
        if let Some(records) = &mut self.records
            && records.alert(alert, &mut bytes).is_ok()
        {
            let _unsent_is_lost = outer.write(&bytes);
        }
    }
}

enum Stage {
    Sniffing(ServerSide),
    Plain,
    Shaking {
        handshake: Box<Handshake>,
        done: bool,
    },
    /// We are the client and the far engine has not said that it took us.
    Confirming(Box<Waiting>, Established),
    Over,
}

pub(crate) struct Opening {
    stage: Stage,
    client: bool,
    received: usize,
    most: usize,
}

/// What a turn led to.
pub(crate) enum Step {
    /// The socket has to say more.
    Wait,
    /// A ClientHello has begun on a mixed port; another turn at once.
    Tls,
    Ready(Box<Waiting>, Option<Established>),
    Failed {
        failure: Failure,
        shown: Vec<CertificateDer<'static>>,
        /// The peer was told, and should be let read it.
        alerted: bool,
    },
}

impl From<Failure> for Step {
    fn from(failure: Failure) -> Self {
        Self::Failed { failure, shown: Vec::new(), alerted: false }
    }
}

impl Failure {
    pub(crate) fn from_connect(error: io::Error) -> Self {
        Self::Connect(error.raw_os_error().unwrap_or_default())
    }
}

impl Opening {
    /// Prepares a role, and says how long its first stage may take.
    pub(crate) fn new(role: Role, limits: &Limits) -> Result<(Self, Duration), Failure> {
        let mut time = limits.handshake_time;
        let mut client = false;
        let stage = match role {
            Role::Client { side, name } => {
                client = true;
                let mut handshake = Handshake::client(&side, name).map_err(Failure::Tls)?;
                handshake.advance().map_err(Failure::Tls)?;
                Stage::Shaking { handshake: Box::new(handshake), done: false }
            }
            Role::Server { side, mixed: Some(wait) } => {
                time = wait;
                Stage::Sniffing(side)
            }
            Role::Server { side, mixed: None } => {
                Stage::Shaking { handshake: Box::new(Handshake::server(side)), done: false }
            }
            Role::Plain => Stage::Plain,
        };
        Ok((Self { stage, client, received: 0, most: limits.handshake_bytes }, time))
    }

    pub(crate) fn is_sniffing(&self) -> bool {
        matches!(self.stage, Stage::Sniffing(_))
    }

    /// Whether the peer has sent a whole ClientHello.
    pub(crate) fn has_heard(&self) -> bool {
        matches!(&self.stage, Stage::Shaking { handshake, .. } if handshake.has_heard())
    }

    /// The time to begin a ClientHello is over.
    pub(crate) fn assume_plain(&mut self) {
        self.stage = Stage::Plain;
    }

    /// Goes on as far as the socket allows.
    pub(crate) fn turn(&mut self, outer: &TcpStream, scratch: &mut Scratch) -> Step {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Sniffing(side) => self.sniff(side, outer),
            Stage::Plain => {
                let waiting = Waiting { records: None, rest: Vec::new(), greet: false };
                Step::Ready(Box::new(waiting), None)
            }
            Stage::Shaking { handshake, done } => self.shake(handshake, done, outer, scratch),
            Stage::Confirming(waiting, established) => self.confirm(waiting, established, outer, scratch),
            Stage::Over => Failure::Reset.into(),
        }
    }

    fn sniff(&mut self, side: ServerSide, outer: &TcpStream) -> Step {
        let mut bytes = [0; 3];
        let seen = match outer.peek(&mut bytes) {
            // Its end, before a byte: nothing speaks TLS here.
            Ok(0) => Beginning::Plain,
            Ok(count) => beginning(bytes.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Beginning::Unclear,
            Err(_) => return Failure::Reset.into(),
        };
        match seen {
            Beginning::Tls => {
                self.stage = Stage::Shaking { handshake: Box::new(Handshake::server(side)), done: false };
                Step::Tls
            }
            Beginning::Plain => {
                self.stage = Stage::Plain;
                Step::Tls
            }
            Beginning::Unclear => {
                self.stage = Stage::Sniffing(side);
                Step::Wait
            }
        }
    }

    fn shake(
        &mut self,
        mut handshake: Box<Handshake>,
        mut done: bool,
        mut outer: &TcpStream,
        scratch: &mut Scratch,
    ) -> Step {
        loop {
            while !handshake.outgoing.is_empty() {
                match outer.write(&handshake.outgoing) {
                    Ok(count) => drop(handshake.outgoing.drain(..count)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        self.stage = Stage::Shaking { handshake, done };
                        return Step::Wait;
                    }
                    Err(error) => return self.broken(error).into(),
                }
            }
            if done {
                return self.finish(*handshake, outer, scratch);
            }
            let room = scratch.room();
            match self.read(outer, room) {
                Ok(Some(count)) => handshake.receive(room.get(..count).unwrap_or_default()),
                Ok(None) => {
                    self.stage = Stage::Shaking { handshake, done };
                    return Step::Wait;
                }
                Err(failure) => return failure.into(),
            }
            match handshake.advance() {
                Ok(progress) => done = progress == Progress::Done,
                Err(error) => {
                    let shown = take_shown();
                    let alert = std::mem::take(&mut handshake.outgoing);
                    let alerted = !alert.is_empty() && outer.write(&alert).is_ok();
                    return Step::Failed { failure: Failure::Tls(error), shown, alerted };
                }
            }
        }
    }

    fn finish(&mut self, handshake: Handshake, outer: &TcpStream, scratch: &mut Scratch) -> Step {
        match handshake.finish() {
            Ok(Finished { records, established, rest, confirm }) => {
                let waiting = Waiting { records: Some(records), rest, greet: confirm && !self.client };
                let waiting = Box::new(waiting);
                if confirm && self.client {
                    self.confirm(waiting, established, outer, scratch)
                } else {
                    Step::Ready(waiting, Some(established))
                }
            }
            Err(error) => Failure::Tls(error).into(),
        }
    }

    /// Waits for the empty record by which the far engine says that it spliced.
    fn confirm(
        &mut self,
        mut waiting: Box<Waiting>,
        established: Established,
        outer: &TcpStream,
        scratch: &mut Scratch,
    ) -> Step {
        loop {
            match next(&mut waiting) {
                Err(Bad(alert)) => {
                    waiting.last_words(outer, alert);
                    let failure = Failure::Tls(Error::General(format!("bad record, alert {}", alert as u8)));
                    return Step::Failed { failure, shown: Vec::new(), alerted: true };
                }
                Ok(Some(Opened::Data(0))) => return Step::Ready(waiting, Some(established)),
                Ok(Some(Opened::Fatal(code))) => {
                    return Failure::Tls(Error::AlertReceived(AlertDescription::from(code))).into();
                }
                Ok(Some(Opened::CloseNotify)) => return Failure::Left.into(),
                Ok(Some(Opened::Handled { reply: false })) => {}
                Ok(Some(Opened::Data(_) | Opened::Handled { reply: true })) => {
                    waiting.last_words(outer, Alert::UnexpectedMessage);
                    let failure = Failure::Tls(Error::General("data before the verdict".into()));
                    return Step::Failed { failure, shown: Vec::new(), alerted: true };
                }
                Ok(None) => {
                    let room = scratch.room();
                    match self.read(outer, room) {
                        Ok(Some(count)) => {
                            waiting.rest.extend_from_slice(room.get(..count).unwrap_or_default());
                        }
                        Ok(None) => {
                            self.stage = Stage::Confirming(waiting, established);
                            return Step::Wait;
                        }
                        Err(failure) => return failure.into(),
                    }
                }
            }
        }
    }

    /// `None` when nothing is there now.
    fn read(&mut self, mut outer: &TcpStream, room: &mut [u8]) -> Result<Option<usize>, Failure> {
        match outer.read(room) {
            Ok(0) => Err(Failure::Left),
            Ok(count) => {
                self.received += count;
                if self.received > self.most + LARGEST { Err(Failure::TooMuch) } else { Ok(Some(count)) }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(self.broken(error)),
        }
    }

    /// Until the peer has sent something, a client's failure is that of its connect.
    fn broken(&self, error: io::Error) -> Failure {
        if self.client && self.received == 0 { Failure::from_connect(error) } else { Failure::Reset }
    }
}

/// Opens the next whole record of what came after the handshake.
fn next(waiting: &mut Waiting) -> Result<Option<Opened>, Bad> {
    let Some(records) = &mut waiting.records else { return Err(Bad(Alert::InternalError)) };
    let Whole::Record(header, length) = whole(&waiting.rest)? else { return Ok(None) };
    let end = HEADER + length;
    let payload = waiting.rest.get_mut(HEADER..end).ok_or(Bad(Alert::InternalError))?;
    let opened = records.open(header, payload)?;
    waiting.rest.drain(..end);
    Ok(Some(opened))
}
