//! dial-signal ADDRESS:PORT [COUNT]: connects in a loop, and in the handler of a signal that arrives meanwhile.
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
        let mut answers = 0;
        for (n, delay) in (0..arguments.count()).zip([20, 60, 150, 400, 900].into_iter().cycle()) {
            // One signal for each round, at ever another moment of it: a timer that went on by itself
            // could leave no time for anything but its handler.
            let none = libc::timeval { tv_sec: 0, tv_usec: 0 };
            let soon = libc::timeval { tv_sec: 0, tv_usec: delay };
            let timer = libc::itimerval { it_interval: none, it_value: soon };
            // SAFETY: setitimer(2) with a readable timer.
            unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
            answers += usize::from(ask(TcpStream::connect(to)?, n)? == format!("pong {n}"));
        }
        let (done, failed) = (DONE.load(Ordering::Relaxed), FAILED.load(Ordering::Relaxed));
        say(&format!("answers={answers} in-handler={} failed={failed}", done > 0));
        Ok(())
    })
}
