//! What the daemon may still ask of the kernel once it serves.

use std::collections::BTreeMap;

use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use crate::{KeydError, bpf};

/// System calls without which the daemon, its allocator or its end cannot be.
const CALLS: &[i64] = &[
    // the broker, sockets that came from it, sock_diag
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_connect,
    libc::SYS_shutdown,
    // readiness; lists that came as a file
    libc::SYS_write,
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_clock_gettime,
    // sockets of protected flows
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    // threads
    libc::SYS_clone3,
    libc::SYS_clone,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_mprotect,
    libc::SYS_sched_getaffinity,
    // memory, signals, the end
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Shuts the door: no file, no signal, no abstract socket outside
/// (Landlock, as far as this kernel has it), and only the listed system calls; others fail with `EPERM`.
pub fn enter() -> Result<(), KeydError> {
    no_files().map_err(|e| KeydError::Sandbox(e.to_string()))?;
    let program = calls().map_err(|e| KeydError::Sandbox(e.to_string()))?;
    // For threads too that a library might have started.
    seccompiler::apply_filter_all_threads(&program).map_err(|e| KeydError::Sandbox(e.to_string()))
}

fn no_files() -> Result<(), landlock::RulesetError> {
    let abi = ABI::V6;
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .set_compatibility(CompatLevel::BestEffort)
        .restrict_self()?;
    Ok(())
}

fn calls() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let commands = bpf::COMMANDS.map(i32::cast_unsigned);
    let non_blocking = u32::try_from(libc::FIONBIO).unwrap_or(0);
    // Calls that are good with some values of one argument only.
    let narrow: [(i64, u8, &[u32]); 3] = [
        (libc::SYS_bpf, 0, &commands),
        (libc::SYS_prctl, 0, &[libc::PR_SET_NAME.cast_unsigned()]),
        (libc::SYS_ioctl, 1, &[non_blocking]),
    ];
    for (call, position, values) in narrow {
        let one = |value: &u32| {
            let (width, value) = (SeccompCmpArgLen::Dword, u64::from(*value));
            SeccompRule::new(vec![SeccompCondition::new(position, width, SeccompCmpOp::Eq, value)?])
        };
        rules.insert(call, values.iter().map(one).collect::<Result<_, _>>()?);
    }
    rules.insert(libc::SYS_socket, sockets()?);
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, refuse, SeccompAction::Allow, std::env::consts::ARCH.try_into()?)?;
    filter.try_into()
}

/// Streams, and netlink; no raw sockets of the Internet's families.
fn sockets() -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    const TYPE: u64 = 0xf; // net.h, SOCK_TYPE_MASK
    let (width, stream) = (SeccompCmpArgLen::Dword, u64::from(libc::SOCK_STREAM.cast_unsigned()));
    let family = |family: i32| {
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(family.cast_unsigned()))
    };
    let streams = |of| {
        let kind = SeccompCondition::new(1, width.clone(), SeccompCmpOp::MaskedEq(TYPE), stream)?;
        SeccompRule::new(vec![family(of)?, kind])
    };
    let netlink = SeccompRule::new(vec![family(libc::AF_NETLINK)?])?;
    Ok(vec![streams(libc::AF_INET)?, streams(libc::AF_INET6)?, netlink])
}
