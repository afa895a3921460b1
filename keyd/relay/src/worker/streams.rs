//! Associations that go from one thread to another.

use super::{Association, Command, Phase, Worker};
use crate::{Ending, Id, flow::Side};

impl Worker {
    /// An association carries much: the thread that has the fewest such has it from now on.
    pub(super) fn spread(&mut self, id: Id) {
        let to = self.threads.add_stream();
        if to == self.index {
            if let Some(association) = self.associations.get_mut(&id) {
                association.stream = true;
            }
            return;
        }
        let Some(mut association) = self.forget(id) else { return self.threads.end_stream(to) };
        association.stream = true;
        if let Phase::Relaying(flow) = &association.phase {
            // It fails for what is not watched any more.
            let _done = self.epoll.delete(flow.inner());
            let _done = self.epoll.delete(&association.outer);
        }
        self.moved.insert(id, to);
        self.threads.tell(to, Command::Take { id, association: Box::new(association) });
    }

    /// Goes on with what [`Self::spread`] of another thread has given away.
    pub(super) fn take(&mut self, id: Id, mut association: Association) {
        association.queued = false;
        let Phase::Relaying(flow) = &association.phase else { return };
        let watched = self.watch(&association.outer, id, Side::Outer);
        let watched = watched.and_then(|()| self.watch(flow.inner(), id, Side::Inner));
        self.associations.insert(id, association);
        if watched.is_err() {
            return self.close(id, Ending::Fault);
        }
        self.wake(id);
    }
}
