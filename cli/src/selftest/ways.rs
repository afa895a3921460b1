//! Ways to the network that do not pass through libc's own functions, as a program that wants out would go.
//! They run inside a wrapped tree, each in a child of its own.

mod doors;
mod flows;
mod images;
mod races;
mod raw;

pub use self::flows::raw_connect;
use self::raw::{call, ended_well, number, socket};

/// What a way needs to know of the outside.
#[derive(Clone, Copy, Debug)]
pub struct Aim {
    /// Port of 127.0.0.1 that stands for this way.
    pub port: u16,
    /// A port that every policy here permits.
    pub open: u16,
    /// An unwrapped process of root's.
    pub outside: i32,
    /// Number of a connected socket in it.
    pub flow: i32,
    /// Number here of a socket that was made there, and not connected.
    pub made: i32,
}

/// What shows that a way got out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Proof {
    /// Something arrived at its port.
    Arrival,
    /// It says so itself.
    Word,
}

/// To whom a way is open if the policy permits everything.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Opens {
    Anybody,
    Root,
    /// Anybody, where the kernel has multipath TCP.
    Multipath,
    /// Anybody, where another thread's own descriptors can be told apart (`PIDFD_THREAD`, Linux 6.9).
    Threads,
    Nobody,
}

impl Opens {
    /// Whether it is here.
    pub fn here(self, root: bool) -> bool {
        match self {
            Self::Anybody => true,
            Self::Root => root,
            Self::Multipath => socket(libc::AF_INET, libc::SOCK_STREAM, 262).is_some(),
            Self::Threads => {
                let me = number(std::process::id().cast_signed());
                call(libc::SYS_pidfd_open, [me, number(libc::O_EXCL), 0, 0, 0, 0]) >= 0
            }
            Self::Nobody => false,
        }
    }
}

/// One way.
pub struct Way {
    pub name: &'static str,
    pub proof: Proof,
    /// To whom it is open if the policy permits everything.
    pub opens: Opens,
    pub go: fn(&Aim) -> bool,
}

const fn way(name: &'static str, go: fn(&Aim) -> bool) -> Way {
    Way { name, proof: Proof::Arrival, opens: Opens::Anybody, go }
}
const fn if_there(opens: Opens, name: &'static str, go: fn(&Aim) -> bool) -> Way {
    Way { name, proof: Proof::Arrival, opens, go }
}
const fn root(name: &'static str, go: fn(&Aim) -> bool) -> Way {
    Way { name, proof: Proof::Arrival, opens: Opens::Root, go }
}
const fn shut(name: &'static str, proof: Proof, go: fn(&Aim) -> bool) -> Way {
    Way { name, proof, opens: Opens::Nobody, go }
}

/// All of them, in the order of the table.
pub const WAYS: &[Way] = &[
    way("libc", flows::through_libc),
    way("libc's syscall function", flows::through_syscall),
    way("libc's connect, looked up", flows::through_dlsym),
    way("libc's sendmmsg", flows::through_sendmmsg),
    way("raw system call", flows::raw_connect),
    way("child of a raw clone", images::raw_clone),
    way("the dynamic loader as a program", images::through_loader),
    way("static program", images::static_program),
    way("cleared environment", images::cleared_environment),
    way("TCP fast open", flows::fast_open),
    way("TCP fast open by sendmsg", |aim| flows::fast_open_message(aim, libc::SYS_sendmsg)),
    way("TCP fast open by sendmmsg", |aim| flows::fast_open_message(aim, libc::SYS_sendmmsg)),
    way("TCP fast open, connect put off", flows::fast_open_connect),
    way("IPv4 in IPv6", flows::mapped),
    if_there(Opens::Multipath, "multipath TCP", flows::multipath),
    way("UDP sendto", |aim| flows::datagram(aim, flows::Send::To)),
    way("UDP sendmsg", |aim| flows::datagram(aim, flows::Send::Message)),
    way("UDP sendmmsg", |aim| flows::datagram(aim, flows::Send::Messages)),
    way("UDP to an unspecified family", |aim| flows::datagram(aim, flows::Send::Unspecified)),
    way("UDP connect", flows::datagram_connect),
    way("UDP connected elsewhere, then freed", flows::datagram_freed),
    way("UDP connected elsewhere, with an address", flows::datagram_elsewhere),
    way("second thread flips the address", races::flipped),
    way("second thread flips a message's name", races::flipped_message),
    way("second thread swaps the descriptor", races::swapped),
    if_there(Opens::Threads, "thread with descriptors of its own", races::own_descriptors),
    root("another user", images::other_user),
    root("setuid program", images::set_user_id),
    root("program with file capabilities", images::file_capabilities),
    root("another root folder", images::other_folder),
    way("user and pid namespaces", images::namespaces),
    way("descriptor passed to a child", doors::passed),
    way("socket made outside, not connected", doors::made_outside),
    root("raw socket", flows::raw_socket),
    root("packet socket", flows::packet_socket),
    shut("call from the shim's page, not asked", Proof::Arrival, doors::from_the_page),
    shut("io_uring", Proof::Arrival, doors::io_uring),
    shut("32-bit call", Proof::Arrival, doors::int80),
    shut("x32 call", Proof::Arrival, doors::x32),
    shut("descriptor taken from outside", Proof::Arrival, doors::stolen),
    shut("ptrace of an outside process", Proof::Word, doors::traced),
    shut("memory of an outside process", Proof::Word, doors::memory_of),
];

/// Tries every way, each in a child; prints the numbers of those that say they got out.
pub fn try_all(first: u16, aim: &Aim) -> Vec<usize> {
    let mut said = Vec::new();
    for ((n, way), port) in WAYS.iter().enumerate().zip(first..) {
        let aim = Aim { port, ..*aim };
        match call(libc::SYS_fork, [0; 6]) {
            0 => {
                call(libc::SYS_alarm, [10, 0, 0, 0, 0, 0]);
                let done = (way.go)(&aim);
                call(libc::SYS_exit_group, [u64::from(!done), 0, 0, 0, 0, 0]);
            }
            pid => {
                if ended_well(pid) {
                    said.push(n);
                }
            }
        }
    }
    said
}
