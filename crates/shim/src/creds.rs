//! Changed credentials and namespaces, and sandboxes.

use portcullis_wire::{OpCode, Request};

use crate::{channel, own, shield};

/// After a call that changed who this process is (setuid, setns, chroot …): what it was permitted is
/// forgotten here and by the broker.
pub fn changed() {
    if own::borrowed() {
        return;
    }
    let _ = shield(|| {
        let table = own::suspend();
        // A process that has not asked anything has nothing to be forgotten.
        if channel::used() && channel::ask(&mut Request::new(OpCode::Changed, 0), -1).is_ok() {
            own::resume(table);
        }
        Ok(())
    });
}

/// Around a call that puts the program into a sandbox (prctl with `PR_SET_SECCOMP`, seccomp). Beforehand the
/// channel and the memory are got, since afterwards no call but the program's own may be made.
pub fn entering_sandbox(enter: impl FnOnce() -> i64) -> i64 {
    let was = own::sandboxed();
    if !was && !own::borrowed() {
        let _ = shield(|| {
            let _ = channel::ask(&mut Request::new(OpCode::Changed, 0), -1);
            channel::prepare();
            Ok(())
        });
    }
    let result = enter();
    if result == 0 && !own::borrowed() {
        own::set_sandboxed(true);
    }
    result
}

/// At the process's end: what is in the ring is written before it goes.
pub fn flush() {
    let _ = shield(|| {
        if own::ring().is_some_and(|ring| !ring.is_empty()) {
            let _ = channel::ask(&mut Request::new(OpCode::Flush, 0), -1);
        }
        Ok(())
    });
}
