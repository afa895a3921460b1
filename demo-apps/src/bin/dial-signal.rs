//! dial-signal ADDRESS:PORT [COUNT]: connects in a loop, and in the handler of a timer's signal besides.
#![expect(unsafe_code, reason = "a signal handler")]

use std::{
    net::{SocketAddr, TcpStream},
    process::ExitCode,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use portcullis_demo_apps::{ask, main_of, say};

static TO: OnceLock<SocketAddr> = OnceLock::new();
static DONE: AtomicUsize = AtomicUsize::new(0);
static FAILED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_alarm(_: i32) {
    // connect(2) is async-signal-safe (signal-safety(7)); so is all that std adds to it here.
    let count = match TO.get().map(TcpStream::connect) {
        Some(Ok(_)) => &DONE,
        _ => &FAILED,
    };
    count.fetch_add(1, Ordering::Relaxed);
}

fn main() -> ExitCode {
    main_of(|arguments| {
        let to = *TO.get_or_init(|| arguments.address().unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0))));
        let action = SigAction::new(SigHandler::Handler(on_alarm), SaFlags::SA_RESTART, SigSet::empty());
        // SAFETY: the handler does what a handler may, see there.
        unsafe { sigaction(Signal::SIGALRM, &action) }?;
        let every = libc::timeval { tv_sec: 0, tv_usec: 500 };
        let timer = libc::itimerval { it_interval: every, it_value: every };
        // SAFETY: setitimer(2) with a readable timer.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
        let mut answers = 0;
        for n in 0..arguments.count() {
            answers += usize::from(ask(TcpStream::connect(to)?, n)? == format!("pong {n}"));
        }
        let none = libc::timeval { tv_sec: 0, tv_usec: 0 };
        let stop = libc::itimerval { it_interval: none, it_value: none };
        // SAFETY: as above.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const stop, std::ptr::null_mut()) };
        let (done, failed) = (DONE.load(Ordering::Relaxed), FAILED.load(Ordering::Relaxed));
        say(&format!("answers={answers} in-handler={} failed={failed}", done > 0));
        Ok(())
    })
}
