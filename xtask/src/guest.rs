//! Tests on an older kernel: User-Mode Linux 6.1 of Debian's, which shares this machine's files and boots in seconds.
//! It has no BTF, so no backstop; no Landlock rules for the network; no `SO_PASSPIDFD`; and it has Yama.
//!
//! Cargo runs each test program by [`enter`] (its `runner`), so what is built here runs there.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, PermissionsExt},
    },
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    say,
    steps::{Outcome, root},
};

/// Memory of the guest, and how long one test program may take there, in seconds.
const MEMORY: &str = "mem=2G";
const PATIENCE: &str = "1500";

/// Makes the machine ready, and becomes the test. `W` is a folder on the host, `ROOT` the workspace.
const INIT: &str = r#"export PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts; mount -t tmpfs shm /dev/shm
ln -sf /proc/self/fd /dev/fd
mount -t cgroup2 cgroup2 /sys/fs/cgroup; mount -t bpf bpf /sys/fs/bpf
hostname guest; ip link set lo up
mkdir -p /run/modules/lib; ln -s /usr/lib/uml/modules /run/modules/lib/modules
printf '#!/bin/sh\nexec /sbin/modprobe -d /run/modules "$@"\n' >/run/modprobe; chmod +x /run/modprobe
echo /run/modprobe >/proc/sys/kernel/modprobe; /run/modprobe -a bridge veth
# Files that users of the guest make have to be theirs: not on the host's own file system.
mkdir /run/root /run/host; mount --bind "$ROOT" /run/root; mount --bind "$W" /run/host
mount -t tmpfs -o mode=1777 tmpfs /tmp; mkdir -p "$ROOT"; mount --bind /run/root "$ROOT"
cd "$HERE"; bash /run/host/command </dev/null >/run/host/out 2>&1; echo $? >/run/host/status
echo 1 >/proc/sys/kernel/sysrq; echo o >/proc/sysrq-trigger; sleep 10
"#;

/// Runs a program in the guest, and shows what it says; its status is ours.
pub(crate) fn enter(words: &[OsString]) -> Outcome {
    let folder = std::env::temp_dir().join(format!("portcullis-guest-{}", std::process::id()));
    DirBuilder::new().mode(0o755).create(&folder)?;
    let done = boot(&folder, words);
    let _left = fs::remove_dir_all(&folder);
    done
}

fn boot(folder: &Path, words: &[OsString]) -> Outcome {
    let mut command = Vec::new();
    for word in words {
        command.extend(quoted(word.as_bytes()));
        command.push(b' ');
    }
    fs::write(folder.join("command"), command)?;
    let variables =
        [("W", folder.to_owned()), ("ROOT", root().to_owned()), ("HERE", std::env::current_dir()?)];
    let mut init = String::from("#!/bin/bash\n").into_bytes();
    for (name, value) in variables {
        init.extend(format!("export {name}=").into_bytes());
        init.extend(quoted(value.as_os_str().as_bytes()));
        init.push(b'\n');
    }
    for name in ["PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN", "CARGO"] {
        if let Some(value) = std::env::var_os(name) {
            init.extend(format!("export {name}=").into_bytes());
            init.extend(quoted(value.as_bytes()));
            init.push(b'\n');
        }
    }
    init.extend(b"export PORTCULLIS_BUILT=1 RUST_BACKTRACE=0\n");
    init.extend(INIT.as_bytes());
    let start = folder.join("init");
    fs::write(&start, init)?;
    fs::set_permissions(&start, fs::Permissions::from_mode(0o755))?;
    let console = fs::File::create(folder.join("console"))?;
    let status = Command::new("timeout")
        .args(["--kill-after=5", PATIENCE, "linux.uml", MEMORY, "root=/dev/root", "rootfstype=hostfs"])
        .args(["rootflags=/", "rw", "quiet", "con=null", "con0=null,fd:1", "ssl=null"])
        .arg(assigned("init=", &start))
        .arg(assigned("uml_dir=", folder))
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console)
        .status()?;
    let said = fs::read_to_string(folder.join("out")).unwrap_or_default();
    say(&said);
    match fs::read_to_string(folder.join("status")).as_deref().map(str::trim) {
        Ok("0") => Ok(()),
        Ok(other) => Err(io::Error::other(format!("the test ended in the guest with status {other}"))),
        Err(_) => {
            say(&fs::read_to_string(folder.join("console")).unwrap_or_default());
            Err(io::Error::other(format!("the guest did not come to an end: {status}")))
        }
    }
}

fn assigned(name: &str, path: &Path) -> OsString {
    let mut word = OsString::from(name);
    word.push(path);
    word
}

/// One word, for a shell.
fn quoted(word: &[u8]) -> Vec<u8> {
    let mut all = vec![b'\''];
    for byte in word {
        match byte {
            b'\'' => all.extend(b"'\\''"),
            other => all.push(*other),
        }
    }
    all.push(b'\'');
    all
}
