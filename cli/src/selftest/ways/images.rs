//! Other images, other users, other places.

use std::{ffi::CStr, io::Write};

use super::{
    Aim,
    flows::raw_connect,
    raw::{address, at, call, ended_well, number},
};

pub(super) fn raw_clone(aim: &Aim) -> bool {
    match call(libc::SYS_clone, [number(libc::SIGCHLD), 0, 0, 0, 0, 0]) {
        0 => {
            let done = raw_connect(aim);
            call(libc::SYS_exit_group, [u64::from(!done), 0, 0, 0, 0, 0]);
            done
        }
        pid => ended_well(pid),
    }
}

/// A program of sixty bytes: socket, connect, write, exit.
fn program(port: u16) -> Vec<u8> {
    let to = address(port);
    let mut elf: Vec<u8> = Vec::new();
    let half = |elf: &mut Vec<u8>, n: u16| elf.extend(n.to_le_bytes());
    let wide = |elf: &mut Vec<u8>, n: u64| elf.extend(n.to_le_bytes());
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    half(&mut elf, 2); // ET_EXEC
    half(&mut elf, 62); // EM_X86_64
    elf.extend(1u32.to_le_bytes());
    for n in [0x40_0078, 64, 0] {
        wide(&mut elf, n); // entry, program headers, section headers
    }
    elf.extend(0u32.to_le_bytes());
    for n in [64, 56, 1, 0, 0, 0] {
        half(&mut elf, n);
    }
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, readable and executable
    for n in [0, 0x40_0000, 0x40_0000, 0x100, 0x100, 0x1000] {
        wide(&mut elf, n);
    }
    elf.extend([0xb8, 41, 0, 0, 0, 0xbf, 2, 0, 0, 0, 0xbe, 1, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x05]);
    elf.extend([0x89, 0xc7, 0x48, 0x8d, 0x35, 33, 0, 0, 0, 0xba, 16, 0, 0, 0, 0xb8, 42, 0, 0, 0, 0x0f, 0x05]);
    elf.extend([0xb8, 1, 0, 0, 0, 0xba, 1, 0, 0, 0, 0x0f, 0x05, 0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05]);
    elf.extend([2, 0]);
    elf.extend(to.sin_port.to_ne_bytes());
    elf.extend([127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    elf.resize(0x100, 0);
    elf
}

pub(super) fn static_program(aim: &Aim) -> bool {
    let elf = program(aim.port);
    let file = call(libc::SYS_memfd_create, [c"way".as_ptr() as u64, 0, 0, 0, 0, 0]);
    let Ok(file) = u64::try_from(file) else { return false };
    if call(libc::SYS_write, [file, elf.as_ptr() as u64, elf.len() as u64, 0, 0, 0]) != 0x100 {
        return false;
    }
    let none: [u64; 1] = [0];
    let empty = number(libc::AT_EMPTY_PATH);
    call(
        libc::SYS_execveat,
        [file, c"".as_ptr() as u64, none.as_ptr() as u64, none.as_ptr() as u64, empty, 0],
    ) == 0
}

/// A static program of root's that everybody may run, run by nobody; `give` gives its file privileges.
fn privileged(aim: &Aim, give: impl Fn(&CStr) -> bool) -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    let path = std::env::temp_dir().join(format!("portcullis-way-{}-{}", aim.port, std::process::id()));
    let Ok(name) = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()) else { return false };
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o755)
        .open(&path)
        .and_then(|mut file| file.write_all(&program(aim.port)));
    if written.is_err() {
        return false;
    }
    let given = give(&name);
    let pid = if given { call(libc::SYS_fork, [0; 6]) } else { -1 };
    if pid == 0 {
        let argv: [u64; 2] = [name.as_ptr() as u64, 0];
        call(libc::SYS_setresuid, [65534, 65534, 65534, 0, 0, 0]);
        call(libc::SYS_execve, [argv[0], argv.as_ptr() as u64, argv.as_ptr() as u64 + 8, 0, 0, 0]);
        call(libc::SYS_exit_group, [1, 0, 0, 0, 0, 0]);
    }
    let done = ended_well(pid);
    let _gone = std::fs::remove_file(&path);
    done
}

pub(super) fn set_user_id(aim: &Aim) -> bool {
    privileged(aim, |path| call(libc::SYS_chmod, [path.as_ptr() as u64, 0o4755, 0, 0, 0, 0]) == 0)
}

/// With CAP_NET_RAW, effective at once (`struct vfs_cap_data`, linux/capability.h, version 2).
pub(super) fn file_capabilities(aim: &Aim) -> bool {
    let data: [u32; 5] = [0x0200_0001, 1 << 13, 0, 0, 0];
    let name = c"security.capability".as_ptr() as u64;
    privileged(aim, |path| call(libc::SYS_setxattr, [path.as_ptr() as u64, name, at(&data), 20, 0, 0]) == 0)
}

pub(super) fn cleared_environment(aim: &Aim) -> bool {
    let port = std::ffi::CString::new(aim.port.to_string()).unwrap_or_default();
    let words: [&CStr; 4] = [c"portcullis", c"selftest", c"--way", &port];
    let mut argv: Vec<u64> = words.iter().map(|w| w.as_ptr() as u64).collect();
    argv.push(0);
    let none: [u64; 1] = [0];
    let exe = c"/proc/self/exe".as_ptr() as u64;
    call(libc::SYS_execve, [exe, argv.as_ptr() as u64, none.as_ptr() as u64, 0, 0, 0]) == 0
}

/// ld.so(8) run by name starts this very program, without an environment.
pub(super) fn through_loader(aim: &Aim) -> bool {
    let port = std::ffi::CString::new(aim.port.to_string()).unwrap_or_default();
    let loader = c"/lib64/ld-linux-x86-64.so.2";
    let words: [&CStr; 5] = [loader, c"/proc/self/exe", c"selftest", c"--way", &port];
    let exe = std::env::current_exe()
        .ok()
        .and_then(|e| std::ffi::CString::new(e.into_os_string().into_encoded_bytes()).ok());
    let Some(exe) = exe else { return false };
    let mut argv: Vec<u64> = words.iter().map(|w| w.as_ptr() as u64).collect();
    if let Some(second) = argv.get_mut(1) {
        *second = exe.as_ptr() as u64; // the loader is itself /proc/self/exe by then
    }
    argv.push(0);
    let none: [u64; 1] = [0];
    call(libc::SYS_execve, [loader.as_ptr() as u64, argv.as_ptr() as u64, none.as_ptr() as u64, 0, 0, 0]) == 0
}

pub(super) fn other_user(aim: &Aim) -> bool {
    call(libc::SYS_setresuid, [65534, 65534, 65534, 0, 0, 0]) == 0 && raw_connect(aim)
}

pub(super) fn other_folder(aim: &Aim) -> bool {
    call(libc::SYS_chroot, [c"/proc".as_ptr() as u64, 0, 0, 0, 0, 0]) == 0 && raw_connect(aim)
}

pub(super) fn namespaces(aim: &Aim) -> bool {
    let new = number(libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC);
    call(libc::SYS_unshare, [new, 0, 0, 0, 0, 0]);
    match call(libc::SYS_fork, [0; 6]) {
        0 => {
            let done = raw_connect(aim);
            call(libc::SYS_exit_group, [u64::from(!done), 0, 0, 0, 0, 0]);
            done
        }
        pid => ended_well(pid),
    }
}
