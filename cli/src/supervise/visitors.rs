//! Runs that have connected and not yet become their programs: what they expect, what they get, and what will hold them.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::unistd::{Pid, geteuid};
use portcullis_broker::guard::{link::LONGEST_PATH, target};
use portcullis_types::Lack;

use super::{Args, Supervisor, Tree, parts::Health};
use crate::{
    Mode,
    link::{Answer, Hold, Link, Say},
    sys,
};

/// One of them.
pub struct Visitor {
    link: Link,
    hello: Option<Hello>,
    welcomed: bool,
    /// The process, and what there is to hold it.
    enclosed: Option<(OwnedFd, Hold)>,
    /// Its tag, if a policy of its own narrows it.
    run: Option<u64>,
    /// It has its mark and all else, and waits for the broker to know that.
    waits: bool,
}

/// What it expects.
struct Hello {
    policy: Option<PathBuf>,
    mode: Option<Mode>,
    nested: bool,
    process: Option<OwnedFd>,
    name: Option<String>,
}

/// A policy of its own, beside the one that is in force for all.
#[derive(Debug, Eq, PartialEq)]
struct Narrower {
    policy: PathBuf,
    mode: Mode,
}

/// What a supervisor has to offer.
#[derive(Clone, Copy)]
struct Terms<'a> {
    args: &'a Args,
    is_service: bool,
    has_backstop: bool,
}

const NOT_TAKEN: &str = "it cannot narrow what this run may (it serves too many policies, or is not told by the kernel \
    whose tree is whose)";

impl Visitor {
    pub const fn new(link: Link) -> Self {
        Self { link, hello: None, welcomed: false, enclosed: None, run: None, waits: false }
    }
}

impl AsFd for Visitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

impl Supervisor {
    /// Takes what visitors say; one that has said all, or nonsense, is gone.
    pub(super) fn hear(&mut self, spoke: &[bool]) {
        let visitors = std::mem::take(&mut self.visitors);
        for (i, mut visitor) in visitors.into_iter().enumerate() {
            if !spoke.get(i).copied().unwrap_or(false) {
                self.visitors.push(visitor);
                continue;
            }
            match visitor.link.receive::<Say>() {
                Ok(Some((Say::Hello { policy, mode, nested, name }, fds))) if visitor.hello.is_none() => {
                    let process = fds.into_iter().next();
                    visitor.hello = Some(Hello { policy, mode, nested, process, name });
                    self.visitors.push(visitor);
                }
                Ok(Some((Say::Enclose, fds))) if visitor.welcomed && visitor.enclosed.is_none() => {
                    let Some(pidfd) = fds.into_iter().next() else { continue };
                    let answer = match self.enclose(&pidfd, &visitor) {
                        Ok(hold) => {
                            visitor.enclosed = Some((pidfd, hold));
                            Answer::Enclosed(hold)
                        }
                        Err(error) => Answer::Failed(error.to_string()),
                    };
                    if visitor.link.send(&answer, &[]).is_ok() {
                        self.visitors.push(visitor);
                    }
                }
                Ok(Some((Say::Tree { guarded, listener, connected }, fds))) if visitor.welcomed => {
                    match self.take_tree(&visitor, guarded, listener, connected, fds) {
                        Ok(()) if visitor.run.is_some() => self.begin_to_wait(visitor),
                        Ok(()) => drop(visitor.link.send(&Answer::Watched, &[])),
                        Err(why) => {
                            drop(visitor.link.send(&Answer::Failed(why), &[]));
                            if let Some(run) = visitor.run {
                                self.parts.handover.end_run(run);
                            }
                        }
                    }
                }
                Ok(Some((Say::Narrowed, _))) if visitor.welcomed && visitor.run.is_some() => {
                    self.begin_to_wait(visitor);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.visitors.push(visitor),
                // It ended, or does not keep to the order: closing is the answer.
                _ => {
                    self.used = true;
                    if let Some(run) = visitor.run.filter(|_| !visitor.waits) {
                        self.parts.handover.end_run(run);
                    }
                }
            }
        }
    }

    /// A run that is narrowed begins when the broker knows by what its tree is known.
    fn begin_to_wait(&mut self, mut visitor: Visitor) {
        if let Some(run) = visitor.run {
            self.parts.handover.mark_run(run);
        }
        visitor.waits = true;
        self.visitors.push(visitor);
    }

    fn take_tree(
        &mut self,
        visitor: &Visitor,
        guarded: bool,
        listener: Option<i32>,
        connected: bool,
        fds: Vec<OwnedFd>,
    ) -> Result<(), String> {
        if connected {
            self.expect(visitor).map_err(|error| {
                format!("the connections that the program begins with cannot be judged: {error}")
            })?;
        }
        let taken = listener.and_then(|n| self.take_listener(visitor, n));
        // Without marks the guard's listener is what tells whose tree is whose.
        if visitor.run.is_some() && taken.is_none() && !self.parts.backing.is_there() {
            return Err(NOT_TAKEN.to_owned());
        }
        let watched = taken.or_else(|| fds.into_iter().next()).ok_or("it gives nothing to watch it by")?;
        // Where the first process stands for the tree, the broker finds out when nobody is under the mark any more.
        self.trees.push(Tree { watched, guarded, run: visitor.run.filter(|_| guarded) });
        self.used = true;
        Ok(())
    }

    /// Puts a process under the backstop, if there is one.
    fn enclose(&mut self, pidfd: &OwnedFd, visitor: &Visitor) -> io::Result<Hold> {
        let pid = behind(pidfd)?.as_raw().cast_unsigned();
        // The backstop refuses nothing while all is only watched; what is enforced for one tree the guard holds alone.
        let alone = self.args.mode == Mode::Audit && visitor.run.is_some();
        if !alone && self.parts.backing.enclose(pid).map_err(io::Error::other)? {
            return Ok(Hold::Backstop);
        }
        // Whoever makes calls for it must be able to take its descriptors; whether it has this one is no matter.
        let barred = sys::pidfd_getfd(pidfd, 0).is_err_and(|e| e.raw_os_error() == Some(libc::EPERM));
        let locked = !self.args.without.has(Lack::Landlock);
        Ok(if barred { Hold::Nothing } else { Hold::Proxy { locked } })
    }

    /// Has a process stopped when it has become its program, so that its connections are judged. Where nobody may act
    /// for it, the shim alone judges them.
    fn expect(&mut self, visitor: &Visitor) -> io::Result<()> {
        match &visitor.enclosed {
            Some((_, Hold::Nothing)) => Ok(()),
            Some((process, _)) => Ok(self.outset.expect(behind(process)?, process.try_clone()?)?),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Takes the guard's listener out of a process that sends nothing any more, and lets the broker serve it.
    fn take_listener(&mut self, visitor: &Visitor, number: i32) -> Option<OwnedFd> {
        let (process, hold) = visitor.enclosed.as_ref()?;
        let listener = sys::pidfd_getfd(process, number).ok()?;
        self.parts.handover.add_tree(&listener, matches!(hold, Hold::Proxy { .. }), visitor.run).ok()?;
        Some(listener)
    }

    /// Answers those who wait for the broker, once it is known how it is.
    pub(super) fn answer_visitors(&mut self) {
        let visitors = std::mem::take(&mut self.visitors);
        for mut visitor in visitors {
            if visitor.waits {
                let word = visitor.run.and_then(|run| self.parts.handover.take_word_of(run));
                match word {
                    None => self.visitors.push(visitor),
                    Some(true) => drop(visitor.link.send(&Answer::Watched, &[])),
                    Some(false) => drop(visitor.link.send(&Answer::Failed(NOT_TAKEN.to_owned()), &[])),
                }
                continue;
            }
            let mut door = None;
            if let Some(answer) = self.welcome(&mut visitor, &mut door) {
                let attached: Vec<i32> = door.iter().map(AsRawFd::as_raw_fd).collect();
                visitor.welcomed = true;
                // A visitor that has gone is noticed at the next turn.
                let _gone = visitor.link.send(&answer, &attached);
            }
            self.visitors.push(visitor);
        }
    }

    /// The answer to a visitor's hello, with the `door` that goes with it. `None`: not yet.
    fn welcome(&mut self, visitor: &mut Visitor, door: &mut Option<OwnedFd>) -> Option<Answer> {
        let hello = visitor.hello.as_ref().filter(|_| !visitor.welcomed)?;
        let terms = Terms {
            args: &self.args,
            is_service: self.is_service(),
            has_backstop: self.parts.backing.is_there(),
        };
        let narrower = match agree(terms, hello) {
            Ok(narrower) => narrower,
            Err(why) => return Some(Answer::Conflict(why)),
        };
        match self.parts.health() {
            Health::Starting => return None,
            Health::Failed(why) => return Some(Answer::Failed(why.clone())),
            Health::Serving => {}
        }
        if let Some(narrower) = &narrower {
            let Some(run) = visitor.run else {
                let Some(process) = &hello.process else {
                    return Some(Answer::Failed("it does not say who it is".to_owned()));
                };
                let mode = narrower.mode.into();
                return match self.parts.handover.add_run(&narrower.policy, mode, process) {
                    Ok(run) => {
                        visitor.run = Some(run);
                        None
                    }
                    Err(error) => Some(Answer::Failed(error.to_string())),
                };
            };
            if !self.parts.handover.take_word_of(run)? {
                return Some(Answer::Failed(NOT_TAKEN.to_owned()));
            }
        }
        Some(match self.parts.handover.add_door(hello.name.as_deref().unwrap_or_default()) {
            Ok(end) => {
                *door = Some(end);
                Answer::Welcome {
                    broker: self.place.broker_socket(),
                    // The supervisor has called listen(2), and keeps the socket over the broker's restarts.
                    uid: geteuid().as_raw(),
                    shim: self.shim.clone(),
                    narrowed: narrower.is_some(),
                }
            }
            Err(error) => Answer::Failed(format!("no door: {error}")),
        })
    }
}

/// The process that a pidfd is of.
fn behind(pidfd: &OwnedFd) -> io::Result<Pid> {
    let found = target::behind_pidfd(std::process::id().cast_signed(), pidfd.as_raw_fd());
    found.map(Pid::from_raw).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// What a run expects beside what is in force, or why it cannot have that. Under a service a run may have a policy and
/// a mode of its own, as far as that makes things narrower.
fn agree(terms: Terms<'_>, hello: &Hello) -> Result<Option<Narrower>, String> {
    let Terms { args, is_service, has_backstop } = terms;
    let state = args.state.display();
    let read = |path: &Path| fs::read(path).ok();
    let own = hello.policy.as_deref().filter(|policy| {
        let same = || read(policy).zip(read(&args.policy)).is_some_and(|(one, two)| one == two);
        *policy != args.policy && (is_service || !same())
    });
    let other_mode = hello.mode.filter(|mode| *mode != args.mode);
    let narrower = match (own, other_mode) {
        (None, None) => return Ok(None),
        (None, Some(mode)) if !is_service || mode == Mode::Audit => {
            return Err(format!(
                "a broker in mode `{}` serves state folder `{state}`, so this run cannot have mode `{}`; \
                 give another --state or leave --mode out",
                args.mode.as_str(),
                mode.as_str()
            ));
        }
        (Some(policy), _) if !is_service => {
            return Err(format!(
                "a broker with policy `{}` serves state folder `{state}`, so this run cannot have policy `{}`; \
                 give another --state or leave --policy out",
                args.policy.display(),
                policy.display()
            ));
        }
        (None, Some(mode)) => Narrower { policy: args.policy.clone(), mode },
        (Some(policy), _) => Narrower { policy: policy.to_owned(), mode: hello.mode.unwrap_or_default() },
    };
    if narrower.policy.as_os_str().as_bytes().len() > LONGEST_PATH {
        return Err(format!("the path of policy `{}` is too long", narrower.policy.display()));
    }
    if hello.nested && !has_backstop {
        return Err(format!(
            "within another run of state folder `{state}` a policy or mode of its own needs the backstop, which is not there; \
             give them to the outer run"
        ));
    }
    if hello.nested && args.mode == Mode::Audit {
        return Err(format!(
            "the service of state folder `{state}` only watches, so nothing holds a tree within another; \
             give policy and mode to the outer run"
        ));
    }
    Ok(Some(narrower))
}
