//! What outlives a broker and is handed to each one that is started: the guards' listeners, the ends of doors,
//! and what brokers have left here for the next.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{AddressFamily, SockFlag, SockType, socketpair},
        stat::fstat,
    },
};
use portcullis_broker::{
    Unsaid,
    guard::link::{Handed, Link, MOST, Narrowing},
};
use portcullis_guard::{
    book,
    listener::{self, Answer},
};

/// See the module.
#[derive(Debug, Default)]
pub struct Handover {
    /// To the broker that runs.
    link: Option<Link>,
    /// Guards' listeners, whether the calls of their trees are made by proxy, and their run's tag if it is narrowed.
    trees: Vec<(OwnedFd, bool, u64)>,
    /// Runs that a policy of their own narrows.
    runs: Vec<Run>,
    last_run: u64,
    /// The book of held calls.
    book: Option<OwnedFd>,
    /// Records that are not on disk yet.
    unsaid: Option<OwnedFd>,
    doors: Vec<Door>,
    /// By a listener's tag.
    filters: HashMap<u64, OwnedFd>,
    watch: Vec<OwnedFd>,
    /// Programs that are stopped until a broker has judged their connections, by tag.
    begun: HashMap<u64, OwnedFd>,
    judged: Vec<u64>,
}

/// A door, as the supervisor keeps it.
#[derive(Debug)]
struct Door {
    ours: OwnedFd,
    /// Of the programs' end.
    inode: u64,
    /// What its run is called.
    label: String,
}

/// A run that is narrowed.
#[derive(Debug)]
struct Run {
    narrowing: Narrowing,
    process: OwnedFd,
    /// It has put its mark under itself.
    marked: bool,
    /// What was told of it and the broker that runs has not answered yet.
    unanswered: usize,
    /// All was answered, and nobody has heard that yet.
    known: bool,
}

impl Handover {
    /// Lets go of the broker that was.
    pub fn end(&mut self) {
        self.hear();
        self.link = None;
    }

    /// Prepares all for a broker that is about to start; the result is its end. `rings` are what those before had no
    /// time for.
    ///
    /// # Errors
    /// As socketpair(2) and sendmsg(2).
    pub fn begin(&mut self, backstop: Option<Handed>, rings: Vec<OwnedFd>) -> io::Result<OwnedFd> {
        self.end();
        self.tidy();
        let (mut ours, theirs) = Link::pair()?;
        let again = |fds: &[OwnedFd]| fds.iter().map(OwnedFd::try_clone).collect::<io::Result<Vec<_>>>();
        let unsaid = match self.unsaid.take() {
            Some(unsaid) => unsaid,
            None => Unsaid::make()?,
        };
        ours.send(Handed::Unsaid(unsaid.try_clone()?));
        self.unsaid = Some(unsaid);
        if let Some(backstop) = backstop {
            ours.send(backstop);
        }
        for ring in rings {
            ours.send(Handed::Ring(ring));
        }
        for run in &mut self.runs {
            ours.send(Handed::Layer(run.narrowing.clone(), run.process.try_clone()?));
            run.unanswered = 1;
        }
        // The broker before has not said by what mark these are known.
        for run in self.runs.iter_mut().filter(|run| run.marked && run.narrowing.mark == 0) {
            ours.send(Handed::Marked(run.narrowing.tag));
            run.unanswered += 1;
        }
        for (tree, by_proxy, run) in &self.trees {
            let listeners = vec![tree.try_clone()?];
            ours.send(Handed::Trees { by_proxy: *by_proxy, run: *run, listeners });
        }
        let book = match self.book.take() {
            Some(book) => book,
            None => book::make()?,
        };
        ours.send(Handed::Book(vec![book.try_clone()?]));
        self.book = Some(book);
        let alike = self.doors.chunk_by(|one, other| one.label == other.label);
        for some in alike.flat_map(|alike| alike.chunks(MOST / 2)) {
            let label = some.first().map_or_else(String::new, |door| door.label.clone());
            let again = |door: &Door| Ok((door.inode, door.ours.try_clone()?));
            let doors = some.iter().map(again).collect::<io::Result<_>>()?;
            ours.send(Handed::Doors { label, doors });
        }
        if !self.watch.is_empty() {
            ours.send(Handed::Watch(again(&self.watch)?));
        }
        let filters: Vec<(u64, &OwnedFd)> = self.filters.iter().map(|(tag, fd)| (*tag, fd)).collect();
        for some in filters.chunks(MOST) {
            let some = some.iter().map(|(tag, fd)| Ok((*tag, fd.try_clone()?))).collect::<io::Result<_>>()?;
            ours.send(Handed::Filters(some));
        }
        for (tag, process) in &self.begun {
            ours.send(Handed::Begun(*tag, process.try_clone()?));
        }
        self.link = Some(ours);
        Ok(theirs)
    }

    /// Tells the broker of its backstop, before any door or tree.
    pub fn add_backstop(&mut self, backstop: Handed) {
        self.tell(backstop);
    }

    /// Lets the broker serve a tree; one that is just being restarted gets it when it begins.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn add_tree(&mut self, listener: &OwnedFd, by_proxy: bool, run: Option<u64>) -> io::Result<()> {
        let (copy, run) = (listener.try_clone()?, run.unwrap_or(0));
        self.trees.push((listener.try_clone()?, by_proxy, run));
        self.tell(Handed::Trees { by_proxy, run, listeners: vec![copy] });
        Ok(())
    }

    /// Has the broker know a run that a policy of its own narrows; the result is its tag.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn add_run(
        &mut self,
        policy: &Path,
        mode: portcullis_broker::Mode,
        process: &OwnedFd,
    ) -> io::Result<u64> {
        let (copy, process) = (process.try_clone()?, process.try_clone()?);
        self.last_run += 1;
        let tag = self.last_run;
        let narrowing = Narrowing { tag, mark: 0, before: 0, mode, policy: policy.to_owned() };
        let run = Run { narrowing: narrowing.clone(), process, marked: false, unanswered: 1, known: false };
        self.runs.push(run);
        self.tell(Handed::Layer(narrowing, copy));
        Ok(tag)
    }

    /// A run has put its mark under itself.
    pub fn mark_run(&mut self, tag: u64) {
        if let Some(run) = self.runs.iter_mut().find(|run| run.narrowing.tag == tag) {
            (run.marked, run.known) = (true, false);
            run.unanswered += 1;
        }
        self.tell(Handed::Marked(tag));
    }

    /// A run is over, or does not come.
    pub fn end_run(&mut self, tag: u64) {
        self.runs.retain(|run| run.narrowing.tag != tag);
        self.tell(Handed::Unlayered(tag));
    }

    /// Whether the broker has taken what it was last told of a run. `None`: it has not said yet.
    pub fn take_word_of(&mut self, tag: u64) -> Option<bool> {
        match self.runs.iter_mut().find(|run| run.narrowing.tag == tag) {
            Some(run) => std::mem::take(&mut run.known).then_some(true),
            None => Some(false),
        }
    }

    /// Makes a door; the result is the programs' end. Its other end stays here over the broker's restarts, so
    /// that a program needs no path to the broker: it may be in a chroot by then.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn add_door(&mut self, label: &str) -> io::Result<OwnedFd> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let (copy, inode) = (ours.try_clone()?, fstat(&theirs)?.st_ino);
        self.doors.push(Door { ours, inode, label: label.to_owned() });
        self.tell(Handed::Doors { label: label.to_owned(), doors: vec![(inode, copy)] });
        Ok(theirs)
    }

    /// Has the broker judge what a program holds that has just begun.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn add_begun(&mut self, tag: u64, process: OwnedFd) -> io::Result<()> {
        let copy = process.try_clone()?;
        self.begun.insert(tag, process);
        self.tell(Handed::Begun(tag, copy));
        Ok(())
    }

    /// One has ended, whom nobody has judged in time.
    pub fn forget_begun(&mut self, tag: u64) {
        self.begun.remove(&tag);
    }

    /// Those that may go on.
    pub fn take_judged(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.judged)
    }

    fn tell(&mut self, handed: Handed) {
        if let Some(link) = &mut self.link {
            link.send(handed);
        }
    }

    /// What to wait for: word of the broker, and the end of a door's last user.
    pub fn watched(&self) -> impl Iterator<Item = PollFd<'_>> {
        let link = self.link.iter().map(|link| {
            let room = if link.is_behind() { PollFlags::POLLOUT } else { PollFlags::empty() };
            PollFd::new(link.as_fd(), PollFlags::POLLIN | room)
        });
        link.chain(self.doors.iter().map(|door| PollFd::new(door.ours.as_fd(), PollFlags::empty())))
    }

    /// Takes what the broker leaves here, and sends what it had no room for.
    pub fn hear(&mut self) {
        while let Some(link) = &mut self.link {
            link.flush();
            match link.receive() {
                Ok(Some(Handed::Filters(some))) => self.filters.extend(some),
                Ok(Some(Handed::Forget(tag))) => drop(self.filters.remove(&tag)),
                Ok(Some(Handed::Watch(fds))) => self.watch = fds,
                Ok(Some(Handed::Layered { tag, mark, before })) => {
                    if let Some(run) = self.runs.iter_mut().find(|run| run.narrowing.tag == tag) {
                        (run.narrowing.mark, run.narrowing.before) = (mark, before);
                        run.unanswered = run.unanswered.saturating_sub(1);
                        run.known = run.unanswered == 0;
                    }
                }
                Ok(Some(Handed::Unlayered(tag))) => self.runs.retain(|run| run.narrowing.tag != tag),
                Ok(Some(Handed::Judged(tag))) => {
                    self.begun.remove(&tag);
                    self.judged.push(tag);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // It has ended.
                Ok(_) | Err(_) => self.link = None,
            }
        }
    }

    /// Forgets trees that have ended, and doors that nobody has any more.
    pub fn tidy(&mut self) {
        self.trees.retain(|(fd, ..)| !is_over(fd.as_fd()));
        self.doors.retain(|door| !is_over(door.ours.as_fd()));
    }
}

/// Refuses what a tree is held in, while no broker is there.
pub fn refuse(tree: &OwnedFd) {
    while let Ok(call) = listener::receive(tree.as_fd()) {
        let errno = if i64::from(call.nr) == libc::SYS_connect { libc::ECONNREFUSED } else { libc::EACCES };
        let _interrupted = listener::answer(tree.as_fd(), call.id, Answer::Fail(errno));
        let mut one = [PollFd::new(tree.as_fd(), PollFlags::POLLIN)];
        let _none = poll(&mut one, PollTimeout::ZERO);
        if one.first().and_then(PollFd::revents) != Some(PollFlags::POLLIN) {
            return;
        }
    }
}

/// Whether nobody is at the other end.
fn is_over(fd: BorrowedFd<'_>) -> bool {
    let mut one = [PollFd::new(fd, PollFlags::empty())];
    matches!(poll(&mut one, PollTimeout::ZERO), Ok(n) if n > 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn a_run_begins_when_the_broker_that_runs_knows_its_mark() {
        let mut handover = Handover::default();
        let process: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        let told = |broker: &Link| {
            let others = |it: &Handed| !matches!(it, Handed::Book(_) | Handed::Unsaid(_));
            std::iter::from_fn(|| broker.receive().ok().flatten()).find(others)
        };
        let mut first = Link::from(handover.begin(None, Vec::new()).unwrap());
        let tag =
            handover.add_run(Path::new("/own.pol"), portcullis_broker::Mode::Enforce, &process).unwrap();
        assert!(matches!(told(&first), Some(Handed::Layer(..))));
        first.send(Handed::Layered { tag, mark: 0, before: 7 });
        handover.hear();
        assert_eq!((handover.take_word_of(tag), handover.take_word_of(tag)), (Some(true), None));
        handover.mark_run(tag);
        drop(first); // has read that, or has not
        let mut second = Link::from(handover.begin(None, Vec::new()).unwrap());
        let Some(Handed::Layer(narrowing, _)) = told(&second) else { panic!("the layer comes first") };
        assert_eq!((narrowing.mark, narrowing.before), (0, 7));
        assert!(matches!(told(&second), Some(Handed::Marked(marked)) if marked == tag));
        second.send(Handed::Layered { tag, mark: 0, before: 7 });
        handover.hear();
        assert_eq!(handover.take_word_of(tag), None, "by what mark it is not known yet");
        second.send(Handed::Layered { tag, mark: 9, before: 7 });
        handover.hear();
        assert_eq!(handover.take_word_of(tag), Some(true));
        let third = Link::from(handover.begin(None, Vec::new()).unwrap());
        assert!(matches!(told(&third), Some(Handed::Layer(narrowing, _)) if narrowing.mark == 9));
        assert!(told(&third).is_none(), "it is known");
    }
}
