//! What comes from the broker before, and what is left for the next one.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
};

use portcullis_backstop::left_over;

use super::{Broker, Source, channels::Named};
use crate::{
    guard::link::Handed,
    keyd::{Filter, Keepsake},
    sys::message::name_writers,
};

impl Broker {
    /// Takes what the supervisor hands over.
    pub(super) fn take_handed(&mut self) {
        while let Some(from) = &self.handed {
            match from.receive() {
                Ok(Some(Handed::Backstop(descriptors))) => self.take_backstop(descriptors),
                Ok(Some(Handed::Unbacked(why))) => self.unbacked = Some(why),
                Ok(Some(Handed::Fenced(why))) => self.take_fence(why),
                Ok(Some(Handed::Unsaid(memory))) => {
                    if let Err(error) = self.log.keep_in(memory.as_fd()) {
                        self.note(
                            "broker",
                            &format!("records cannot be kept for another broker: {error}"),
                            &[],
                        );
                    }
                }
                Ok(Some(Handed::Ring(ring))) => self.left_over.extend(left_over(ring).unwrap_or_default()),
                Ok(Some(Handed::Layer(narrowing, process))) => self.expect_run(&narrowing, process),
                Ok(Some(Handed::Marked(tag))) => self.mark_run(tag),
                Ok(Some(Handed::Unlayered(tag))) => self.forget_run(tag),
                Ok(Some(Handed::Trees { by_proxy, run, listeners })) => {
                    listeners.into_iter().for_each(|it| self.add_guard(it, by_proxy, run));
                }
                Ok(Some(Handed::Book(book))) => book.iter().for_each(|it| self.take_book(it)),
                Ok(Some(Handed::Doors { label, doors })) => {
                    let label = Some(Rc::from(label)).filter(|label: &Rc<str>| !label.is_empty());
                    doors.into_iter().for_each(|(inode, end)| self.add_door(end, inode, label.clone()));
                }
                Ok(Some(Handed::Filters(some))) => self.inherited.extend(some),
                Ok(Some(Handed::Watch(kept))) => self.keepsake = Keepsake::from(kept),
                Ok(Some(Handed::Begun(tag, process))) => self.judge_outset(tag, &process),
                Ok(Some(Handed::Forget(_) | Handed::Judged(_) | Handed::Layered { .. })) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(None) | Err(_) => {
                    self.watch.forget(|s| matches!(s, Source::Handed));
                    self.handed = None;
                }
            }
        }
    }

    /// A door whose other end the supervisor has given to a program.
    fn add_door(&mut self, socket: OwnedFd, inode: u64, label: Option<Rc<str>>) {
        let _ = name_writers(socket.as_fd());
        let owner = self.owner;
        let added = self.add_channel(socket, true, owner);
        if let Some(channel) = added.and_then(|id| self.channels.get_mut(&id)) {
            channel.run = label.map(|label| Named { label, door: inode });
        }
    }

    /// Sends what there was no room for.
    pub(super) fn flush_handed(&mut self) {
        if let Some(to) = &mut self.handed {
            to.flush();
        }
    }

    /// Leaves with the supervisor what the next key daemon's filters go on reporting to.
    pub(super) fn leave_keepsake(&mut self) {
        if let (Some(to), Ok(copy)) = (&mut self.handed, self.keepsake.copy())
            && !copy.is_empty()
        {
            to.send(Handed::Watch(copy));
        }
    }

    /// Leaves with the supervisor what exchanges the list of a listener's filter: the filter is locked, and
    /// outlives this broker.
    pub(super) fn leave_filter(&mut self, cookie: u64, filter: &Filter) {
        if let (Some(to), Ok(copy)) = (&mut self.handed, filter.copy()) {
            to.send(Handed::Filters(vec![(cookie, copy)]));
        }
    }

    /// A listener with a filter is no more.
    pub(super) fn forget_filter(&mut self, cookie: u64) {
        if let Some(to) = &mut self.handed {
            to.send(Handed::Forget(cookie));
        }
    }

    /// Of what the broker before has left, forgets what belongs to no listener that lives.
    pub(super) fn forget_inherited(&mut self) {
        for cookie in std::mem::take(&mut self.inherited).into_keys() {
            self.forget_filter(cookie);
        }
    }
}
