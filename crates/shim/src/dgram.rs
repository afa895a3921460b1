//! sendto, sendmsg, sendmmsg: every datagram names its peer, so peers that were judged are remembered.
//!
//! A remembered peer is four words in a table that is wiped at fork: the address, the socket's serial
//! number with port and call, and a checksum over them, the policy's generation and the epoch of our
//! credentials. Words of two writers that mix, or of another generation, do not add up: a miss.
#![expect(unsafe_code, reason = "works on the program's memory and makes its calls")]

use core::{mem::MaybeUninit, sync::atomic::Ordering};

use libc::{c_int, c_uint, c_void, mmsghdr, msghdr, sockaddr, socklen_t};
use portcullis_wire::Addr;

use crate::{
    Errno,
    gate::call_cancellable,
    hints::{self, Sock},
    judge::{self, Call, Op, judge},
    own::{self, PEERS},
    peer::Peer,
    shield,
    shield::{fail, returned, returned_int},
    stream,
    sys::{self, arg},
};

/// The words of one peer; `None` if nothing may be remembered now.
fn words(op: Op, sock: Sock, far: &Addr) -> Option<[u64; 4]> {
    let generation = judge::generation()?;
    let epoch = own::own()?.epoch.load(Ordering::Relaxed);
    let key = far.key();
    let [high, low] = [key >> 64, key & u128::from(u64::MAX)].map(|half| u64::try_from(half).unwrap_or(0));
    let what = u64::from(sock.extra) << 32
        | u64::from(far.port) << 16
        | u64::from(far.scope & 0xff) << 8
        | op as u64;
    let sum = mix(high ^ mix(low ^ mix(what ^ mix(generation ^ u64::from(epoch) << 40))));
    Some([high, low, what, sum | 1])
}

/// Finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
const fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

fn place(words: &[u64; 4]) -> Option<&'static [core::sync::atomic::AtomicU64; 4]> {
    let [high, low, what, _] = *words;
    let at = usize::try_from(mix(high ^ low.rotate_left(17) ^ what) >> 40).ok()? % PEERS;
    own::own()?.peers.get(at)
}

/// Notes that this call with this peer was permitted on this socket.
pub fn remember(op: Op, sock: Sock, far: &Addr) {
    if own::borrowed() {
        return;
    }
    if let Some(words) = words(op, sock, far)
        && let Some(place) = place(&words)
    {
        for (to, from) in place.iter().zip(words) {
            to.store(from, Ordering::Relaxed);
        }
    }
}

/// Whether [`remember`] was told so, under the policy in force.
#[must_use]
pub fn remembers(op: Op, sock: Sock, far: &Addr) -> bool {
    let Some(words) = words(op, sock, far) else { return false };
    place(&words).is_some_and(|place| place.iter().zip(words).all(|(a, b)| a.load(Ordering::Relaxed) == b))
}

/// Judges a message to `peer`.
fn judge_message(fd: c_int, peer: &mut Peer, flags: c_int) -> Result<(), Errno> {
    let family = peer.family();
    if family == libc::AF_UNIX {
        return Ok(());
    }
    // What is of another family was judged at socket(2).
    let sock = hints::find(fd).or_else(|| sandboxed(family)).filter(|sock| sock.is_internet());
    let Some(sock) = sock else { return Ok(()) };
    let stream = sock.is_stream() && sock.iana() == 6;
    if stream && flags & libc::MSG_FASTOPEN == 0 {
        return Ok(()); // send(2) on a stream has no use for an address
    }
    let inet = c_int::from(sock.domain) == libc::AF_INET;
    let family = if inet && family == libc::AF_UNSPEC { libc::AF_INET } else { family };
    let Some(remote) = peer.internet_as(family) else { return Ok(()) };
    let op = if stream { Op::Connect } else { Op::Send };
    if op == Op::Send && remembers(op, sock, &remote) {
        return Ok(());
    }
    let mut call = Call::new(op, fd, sock);
    call.remote = remote;
    let permit = judge(&call)?;
    if op == Op::Send {
        stream::watch(fd, sock, &permit);
        remember(op, sock, &remote);
    }
    stream::rewrite(&permit, peer);
    Ok(())
}

fn sandboxed(family: c_int) -> Option<Sock> {
    if own::sandboxed() { Sock::asked(family, libc::SOCK_DGRAM, 0) } else { None }
}

/// sendto(2), and send(2) when `addr` is null.
///
/// # Safety
/// As for sendto(2).
pub unsafe fn sendto(
    fd: c_int,
    buffer: *const c_void,
    size: usize,
    flags: c_int,
    addr: *const sockaddr,
    len: socklen_t,
) -> isize {
    // SAFETY: by this function's contract.
    let mut peer = unsafe { Peer::copy(addr, len) };
    if let Some(peer) = &mut peer
        && let Err(errno) = shield(|| judge_message(fd, peer, flags))
    {
        return fail(errno) as isize;
    }
    let (at, length) = stream::arguments(peer.as_ref(), addr, len);
    let args = [arg(fd), buffer.expose_provenance(), size, arg(flags), at, length];
    // SAFETY: by this function's contract; a copied address outlives the call; no destructors.
    returned(unsafe { call_cancellable(libc::SYS_sendto, &args) })
}

/// Reads and judges the address of one message; gives the message to send instead. `None`: it cannot be read, which is
/// the kernel's to answer.
///
/// # Safety
/// As for sendmsg(2).
unsafe fn planned(
    fd: c_int,
    message: *const msghdr,
    flags: c_int,
    peer: &mut Option<Peer>,
) -> Result<Option<msghdr>, Errno> {
    if !sys::readable(message.cast(), size_of::<msghdr>()) {
        return Ok(None);
    }
    // SAFETY: the kernel has just read there. Read once.
    let mut copy = unsafe { message.read_unaligned() };
    // What is longer than an address the kernel cuts, but for what it reads as a negative number.
    let length = copy.msg_namelen.cast_signed();
    let length = if length > LONGEST { LONGEST } else { length }.cast_unsigned();
    // SAFETY: as for sendmsg(2).
    *peer = unsafe { Peer::copy(copy.msg_name.cast_const().cast(), length) };
    if let Some(peer) = peer {
        shield(|| judge_message(fd, peer, flags))?;
        copy.msg_name = core::ptr::with_exposed_provenance_mut(peer.as_arg());
        copy.msg_namelen = socklen_t::try_from(peer.len()).unwrap_or(0);
    }
    Ok(Some(copy))
}

/// sendmsg(2).
///
/// # Safety
/// As for sendmsg(2).
pub unsafe fn sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> isize {
    let mut peer = None;
    let copy;
    let mut at = message;
    // SAFETY: by this function's contract.
    match unsafe { planned(fd, message, flags, &mut peer) } {
        Ok(Some(plan)) => {
            copy = plan;
            at = &raw const copy;
        }
        Ok(None) => {}
        Err(errno) => return fail(errno) as isize,
    }
    let args = [arg(fd), at.expose_provenance(), arg(flags), 0, 0, 0];
    // SAFETY: by this function's contract; the copies outlive the call; no destructors.
    returned(unsafe { call_cancellable(libc::SYS_sendmsg, &args) })
}

/// Longest address that the kernel takes (`sizeof(struct sockaddr_storage)`, socket(7)).
const LONGEST: c_int = 128;
/// Messages that are judged and sent together.
const BATCH: usize = 16;

/// sendmmsg(2). As in the kernel, a refusal after the first message shows as fewer messages sent.
///
/// # Safety
/// As for sendmmsg(2).
pub unsafe fn sendmmsg(fd: c_int, vector: *mut mmsghdr, count: c_uint, flags: c_int) -> c_int {
    let passes = hints::find(fd).is_none_or(|sock| !sock.is_internet());
    if passes {
        let args = [arg(fd), vector.expose_provenance(), arg(count.cast_signed()), arg(flags), 0, 0];
        // SAFETY: by this function's contract; no destructors.
        return returned_int(unsafe { call_cancellable(libc::SYS_sendmmsg, &args) });
    }
    let count = usize::try_from(count).unwrap_or(0).min(1024); // UIO_MAXIOV, as the kernel has it
    let mut done = 0;
    while done < count {
        let mut peers = [None; BATCH];
        let mut batch = [const { MaybeUninit::<mmsghdr>::uninit() }; BATCH];
        let mut ready = 0;
        let mut refused = None;
        for ((slot, peer), i) in batch.iter_mut().zip(&mut peers).zip(done..count) {
            // SAFETY: by this function's contract.
            match unsafe { planned(fd, vector.wrapping_add(i).cast(), flags, peer) } {
                Ok(Some(msg_hdr)) => {
                    slot.write(mmsghdr { msg_hdr, msg_len: 0 });
                    ready += 1;
                }
                Ok(None) => {
                    refused = Some(Errno(libc::EFAULT));
                    break;
                }
                Err(errno) => {
                    refused = Some(errno);
                    break;
                }
            }
        }
        if ready == 0 {
            return match refused {
                Some(errno) if done == 0 => fail(errno),
                _ => c_int::try_from(done).unwrap_or(0),
            };
        }
        let args = [arg(fd), batch.as_mut_ptr().expose_provenance(), ready, arg(flags), 0, 0];
        // SAFETY: the first `ready` of the batch are written; the peers outlive the call; no destructors.
        let sent = unsafe { call_cancellable(libc::SYS_sendmmsg, &args) };
        let Ok(sent) = usize::try_from(sent) else {
            return if done == 0 { returned_int(sent) } else { c_int::try_from(done).unwrap_or(0) };
        };
        let sent = sent.min(ready);
        let is_writable = |i| sys::writable(vector.wrapping_add(i).cast(), size_of::<mmsghdr>());
        // A batch lies in two pages at most.
        let all = is_writable(done) && is_writable((done + sent).saturating_sub(1));
        for (slot, i) in batch.iter().zip(done..done + sent) {
            if !all && !is_writable(i) {
                return if i == 0 { fail(Errno(libc::EFAULT)) } else { c_int::try_from(i).unwrap_or(0) };
            }
            // SAFETY: `slot` is one of those written above; the kernel has just been at the other.
            unsafe { (*vector.add(i)).msg_len = slot.assume_init_ref().msg_len };
        }
        done += sent;
        if sent < ready || refused.is_some() {
            break;
        }
    }
    c_int::try_from(done).unwrap_or(0)
}
