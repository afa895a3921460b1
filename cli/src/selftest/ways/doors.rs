//! Other doors of the kernel, and other processes.
#![expect(unsafe_code, reason = "the point is to make system calls by hand")]

use std::arch::asm;

use libc::{c_long, sockaddr_in};

use super::{
    Aim, WAYS,
    raw::{LENGTH, address, at, call, connect_by, ended_well, number, say, tcp},
};

/// Jumps into the page whose calls the guard's filter lets pass, having asked nobody.
pub(super) fn from_the_page(aim: &Aim) -> bool {
    use portcullis_wire::gate::{CODE, PAGE, SIZE};
    let Some(fd) = tcp() else { return false };
    let to = address(aim.port);
    // SAFETY: maps the page where nothing is yet (else this fails, and the shim's is there); its code is
    // `syscall; ret`, entered by a call with the stack as it must be.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let page = std::ptr::with_exposed_provenance_mut::<libc::c_void>(usize::try_from(PAGE).unwrap_or(0));
        if libc::mmap(page, SIZE, protection, flags, -1, 0) == page {
            page.cast::<[u8; CODE.len()]>().write(CODE);
        }
        let result: i64;
        asm!("call {page}", page = in(reg) PAGE, inlateout("rax") libc::SYS_connect => result, in("rdi") fd,
             in("rsi") at(&to), in("rdx") LENGTH, out("rcx") _, out("r11") _);
        result == 0 && say(fd)
    }
}

/// One `IORING_OP_CONNECT`; offsets are linux/io_uring.h's.
pub(super) fn io_uring(aim: &Aim) -> bool {
    let Some(fd) = tcp() else { return false };
    let to = address(aim.port);
    let mut params = [0u32; 30];
    let ring = call(libc::SYS_io_uring_setup, [2, params.as_mut_ptr() as u64, 0, 0, 0, 0]);
    let Ok(ring) = i32::try_from(ring) else { return false };
    if ring < 0 {
        return false;
    }
    let (Some(tail), Some(array)) = (params.get(11), params.get(16)) else { return false };
    // SAFETY: the mappings are at least as long as the kernel's offsets into them; one entry is filled
    // before it is announced, and the address outlives the call.
    unsafe {
        let map = |length: usize, offset: i64| {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, ring, offset)
        };
        let (queue, entries) = (map(8192, 0), map(4096, 0x1000_0000));
        if queue == libc::MAP_FAILED || entries == libc::MAP_FAILED {
            return false;
        }
        entries.cast::<u8>().write(16); // IORING_OP_CONNECT
        entries.byte_add(4).cast::<u32>().write(u32::try_from(fd).unwrap_or(0));
        entries.byte_add(8).cast::<u64>().write(LENGTH);
        entries.byte_add(16).cast::<u64>().write(at(&to));
        queue.byte_add(*array as usize).cast::<u32>().write(0);
        queue.byte_add(*tail as usize).cast::<u32>().write_volatile(1);
    }
    call(libc::SYS_io_uring_enter, [number(ring), 1, 1, 1, 0, 0]) == 1 && say(fd)
}

pub(super) fn int80(aim: &Aim) -> bool {
    let Some(fd) = tcp() else { return false };
    let to = address(aim.port);
    // SAFETY: a fresh page below 4 GB gets a copy of the address; rbx is put back as it was.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let page = libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0);
        if page == libc::MAP_FAILED {
            return false;
        }
        page.cast::<sockaddr_in>().write(to);
        let mut result: i64 = 362; // connect
        asm!("xchg rbx, {fd}", "int 0x80", "xchg rbx, {fd}", fd = inout(reg) fd => _, inout("rax") result,
             in("rcx") page, in("rdx") LENGTH, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
        result == 0 && say(fd)
    }
}

pub(super) fn x32(aim: &Aim) -> bool {
    const X32: c_long = 0x4000_0000;
    let to = address(aim.port);
    tcp().is_some_and(|fd| call(X32 | libc::SYS_connect, [fd, at(&to), LENGTH, 0, 0, 0]) == 0 && say(fd))
}

/// One process makes the socket, another, to which it is passed over a unix socket, connects it.
pub(super) fn passed(aim: &Aim) -> bool {
    use nix::sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
        socketpair,
    };
    use std::{
        io::{IoSlice, IoSliceMut},
        os::fd::AsRawFd,
    };
    let Ok((here, there)) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::empty())
    else {
        return false;
    };
    let pid = call(libc::SYS_fork, [0; 6]);
    if pid == 0 {
        let mut byte = [0];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut parts = [IoSliceMut::new(&mut byte)];
        let got = recvmsg::<()>(there.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty());
        let fd = got.ok().and_then(|m| {
            m.cmsgs().ok()?.find_map(|c| match c {
                ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                _ => None,
            })
        });
        let done = fd.is_some_and(|fd| connect_by(number(fd), aim.port));
        call(libc::SYS_exit_group, [u64::from(!done), 0, 0, 0, 0, 0]);
    }
    if let Some(fd) = tcp().and_then(|fd| i32::try_from(fd).ok()) {
        let rights = [fd];
        let message = [ControlMessage::ScmRights(&rights)];
        let _sent = sendmsg::<()>(here.as_raw_fd(), &[IoSlice::new(b"x")], &message, MsgFlags::empty(), None);
    }
    ended_well(pid)
}

pub(super) fn made_outside(aim: &Aim) -> bool {
    connect_by(number(aim.made), aim.port)
}

fn outside(aim: &Aim) -> Option<u64> {
    u64::try_from(call(libc::SYS_pidfd_open, [number(aim.outside), 0, 0, 0, 0, 0])).ok()
}

pub(super) fn stolen(aim: &Aim) -> bool {
    let Some(pidfd) = outside(aim) else { return false };
    let fd = call(libc::SYS_pidfd_getfd, [pidfd, number(aim.flow), 0, 0, 0, 0]);
    u64::try_from(fd).is_ok_and(say)
}

pub(super) fn traced(aim: &Aim) -> bool {
    const SEIZE: u64 = 0x4206; // PTRACE_SEIZE: attaches without stopping
    call(libc::SYS_ptrace, [SEIZE, number(aim.outside), 0, 0, 0, 0]) == 0
}

pub(super) fn memory_of(aim: &Aim) -> bool {
    let (mut byte, anywhere) = (0u8, at(&WAYS));
    let here: [u64; 2] = [std::ptr::from_mut(&mut byte) as u64, 1];
    let there: [u64; 2] = [anywhere, 1];
    let args = [number(aim.outside), here.as_ptr() as u64, 1, there.as_ptr() as u64, 1, 0];
    // That there is nothing at this address in the other process is beside the point.
    let got = call(libc::SYS_process_vm_readv, args);
    got == 1 || got == -i64::from(libc::EFAULT)
}
