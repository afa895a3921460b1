//! Gives up what root has and the key daemon does not need.
#![expect(unsafe_code, reason = "capset(2) and prctl(2) have no safe form in nix")]

use std::io;

use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};
use portcullis_types::account;

use crate::KeydError;

/// User that the daemon runs as if it exists.
const USER: &str = "portcullis-keyd";
/// Else this one, from systemd's dynamic range (systemd.exec(5), DynamicUser).
const UID: u32 = 61991;

// linux/capability.h
const CAP_NET_BIND_SERVICE: u32 = 10;
const CAP_NET_ADMIN: u32 = 12;
const CAP_NET_RAW: u32 = 13;
const CAP_BPF: u32 = 39;
/// What stays.
const KEPT: [u32; 4] = [CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF];

fn step(step: &'static str, result: io::Result<()>) -> Result<(), KeydError> {
    result.map_err(|source| KeydError::Privileges { step, source })
}

fn prctl(option: libc::c_int, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: none of the options used here takes a pointer.
    let done = unsafe { libc::prctl(option, value, 0, 0, 0) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Becomes the daemon's own user if root, keeps [`KEPT`] at most, and lets nobody who is not
/// root trace it or read its memory (also not by a core file).
pub fn drop() -> Result<(), KeydError> {
    if geteuid().is_root() {
        let passwd = std::fs::read("/etc/passwd").unwrap_or_default();
        let (uid, gid) = account(&passwd, USER).unwrap_or((UID, UID));
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        for capability in 0..64 {
            // Beyond the kernel's last one this fails with EINVAL; so does nothing else.
            let _ = prctl(libc::PR_CAPBSET_DROP, capability);
        }
        step("keep capabilities over the change of user", prctl(libc::PR_SET_KEEPCAPS, 1))?;
        // In a user namespace that maps one id, groups cannot be dropped, and there is no second user.
        if setgroups(&[]).is_ok() {
            step("change the group", setresgid(gid, gid, gid).map_err(Into::into)).or_else(unmapped)?;
            step("change the user", setresuid(uid, uid, uid).map_err(Into::into)).or_else(unmapped)?;
        }
    }
    step("set capabilities", keep())?;
    step("forbid new privileges", prctl(libc::PR_SET_NO_NEW_PRIVS, 1))?;
    step("become untraceable", prctl(libc::PR_SET_DUMPABLE, 0))
}

/// A uid that does not exist in this user namespace is EINVAL: then the daemon stays who it is.
fn unmapped(e: KeydError) -> Result<(), KeydError> {
    match &e {
        KeydError::Privileges { source, .. } if source.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        _ => Err(e),
    }
}

/// Keeps those of [`KEPT`] that are there.
fn keep() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: capget(2) of this version writes one header and two `Data`.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, &raw mut data) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for (word, data) in (0..).zip(&mut data) {
        let kept = KEPT.iter().filter(|cap| **cap / 32 == word).fold(0, |mask, cap| mask | 1 << (cap % 32));
        let kept = kept & data.permitted;
        *data = Data { effective: kept, permitted: kept, inheritable: 0 };
    }
    // SAFETY: capset(2) of this version reads one header and two `Data`.
    if unsafe { libc::syscall(libc::SYS_capset, &raw mut header, &raw const data) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
