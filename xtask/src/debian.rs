//! Debian packages that tests and demo wrap. Nothing is ever started as a service.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    say,
    steps::{Outcome, run, target},
};

/// What the demo wraps and shows.
pub(crate) const DEMO: &[&str] = &["clang", "iproute2", "vsftpd", "lftp"];

/// What the tests wrap.
pub(crate) const TESTS: &[&str] = &[
    "clang", // compiles the backstop's programs
    "iproute2",
    "procps",
    "vsftpd",
    "lftp",
    "curl",
    "tnftp",
    "inetutils-inetd",
    "ipsvd",
    "python3",
    "python3-pyftpdlib",
    "netcat-openbsd",
    "nginx-light",
    "openssl",
    "libnginx-mod-stream",
    "stunnel4",
    "redis-server",
    "redis-tools",
    "memcached",
    "mosquitto",
    "mosquitto-clients",
    "postgresql",
    "openssh-server",
    "openssh-client",
    "dovecot-imapd",
    // static programs: a shell, one of Go, and a compiler
    "busybox-static",
    "certinfo",
    "musl-tools",
    "exim4-daemon-light",
    // libraries of the daemons below
    "libacl1",
    "libhiredis0.14",
    "libidn2-0",
    "libmemcached11",
    "libmemcachedutil2",
    "libncursesw6",
    "libpcre2-posix3",
    "libsodium23",
    "libwrap0",
];

/// A kernel that is a program, and what loads its modules.
pub(crate) const GUEST: &[&str] = &["user-mode-linux", "kmod"];

/// What the benches compare with.
pub(crate) const BENCH: &[&str] = &[
    "clang", // compiles the backstop's programs
    "iproute2",
    "proxychains4",
    "torsocks",
    "tcpd",
    "nginx-light",
    "libnginx-mod-stream",
    "haproxy",
    "stunnel4",
];

/// FTP daemons that Debian does not let live beside vsftpd (`Conflicts: ftp-server`): unpacked into the
/// target folder instead of installed.
const UNPACKED: &[&str] = &["proftpd-core", "pure-ftpd", "inetutils-ftpd"];

/// Tells dpkg's maintainer scripts to start nothing (invoke-rc.d(8)).
const POLICY_RC: &str = "/usr/sbin/policy-rc.d";

/// Installs what is missing, as root; otherwise says which line would.
pub(crate) fn install(packages: &[&str]) -> Outcome {
    let missing: Vec<&str> = packages.iter().copied().filter(|name| !is_installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root()? {
        let line = format!("sudo apt-get install --no-install-recommends {}", missing.join(" "));
        return Err(io::Error::other(format!("missing Debian packages; install them with:\n\n    {line}\n")));
    }
    say(&format!("installing {}", missing.join(" ")));
    let ours = !Path::new(POLICY_RC).exists();
    if ours {
        fs::write(POLICY_RC, "#!/bin/sh\nexit 101\n")?;
        fs::set_permissions(POLICY_RC, fs::Permissions::from_mode(0o755))?;
    }
    let installed = apt(&["update", "--quiet"]).and_then(|()| {
        let mut arguments = vec!["install", "--yes", "--quiet", "--no-install-recommends"];
        arguments.extend(&missing);
        apt(&arguments)
    });
    if ours {
        fs::remove_file(POLICY_RC)?;
    }
    installed
}

/// Unpacks the daemons that cannot be installed.
pub(crate) fn unpack_daemons() -> Outcome {
    let to = target().join("daemons");
    for name in UNPACKED {
        let folder = to.join(name);
        if folder.exists() {
            continue;
        }
        let download = to.join("download");
        fs::create_dir_all(&download)?;
        run(apt_command(&["download", "--quiet", name]).current_dir(&download))?;
        let package = package_file(&download, name)?;
        // Complete or absent: unpacked aside, then renamed.
        let aside = to.join(format!("{name}.part"));
        run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(&aside))?;
        fs::rename(aside, folder)?;
    }
    Ok(())
}

fn package_file(folder: &Path, name: &str) -> io::Result<PathBuf> {
    let start = format!("{name}_");
    fs::read_dir(folder)?
        .filter_map(Result::ok)
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&start))
        .map(|entry| entry.path())
        .ok_or_else(|| io::Error::other(format!("apt-get download left no {name} package")))
}

fn apt_command(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("RUNLEVEL", "1")
        .stdin(Stdio::null());
    command
}

fn apt(arguments: &[&str]) -> Outcome {
    run(apt_command(arguments).stdout(Stdio::null()))
}

fn is_installed(package: &str) -> bool {
    let asked =
        Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", package]).output();
    asked.is_ok_and(|answer| answer.stdout == b"installed")
}

/// Whether this is root, as the kernel says.
fn is_root() -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata("/proc/self")?.uid() == 0)
}
