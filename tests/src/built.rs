//! The programs under test.

use std::{
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicU16, Ordering},
    },
};

/// Folder of the built programs; they are built here unless `cargo xtask test` says that it has done so.
///
/// Cargo knows no dependency of a test on a program or a preloaded library of another package, so a test
/// that trusted what lies there would run against yesterday's.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let folder = test.parent().and_then(Path::parent).unwrap().to_owned();
        if std::env::var_os("PORTCULLIS_BUILT").is_none() {
            let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            build.args(["build", "--quiet", "-p", "portcullis", "-p", "portcullis-preload"]);
            build.args(["-p", "portcullis-demo-apps"]).current_dir(env!("CARGO_MANIFEST_DIR"));
            // Where this test lies, whatever a relative CARGO_TARGET_DIR means from here.
            build.arg("--target-dir").arg(folder.parent().unwrap());
            if folder.file_name().is_some_and(|name| name == "release") {
                build.arg("--release");
            }
            assert!(build.status().unwrap().success(), "cannot build what is to be tested");
        }
        folder
    })
}

/// The `portcullis` command.
pub fn portcullis() -> PathBuf {
    program("portcullis")
}

/// A program of this workspace.
///
/// # Panics
/// It was not built.
pub fn program(name: &str) -> PathBuf {
    let path = folder().join(name);
    assert!(path.exists(), "`{}` is missing; run `cargo xtask test`", path.display());
    path
}

/// Copies a program that will be run.
///
/// By another process: while this one had the copy open for writing, a child that another test's thread starts would
/// inherit that, and nobody can run a file that is open for writing.
///
/// # Panics
/// It cannot be copied.
pub fn copy(from: &Path, to: &Path) {
    assert!(
        Command::new("cp").arg("--preserve=mode").arg(from).arg(to).status().unwrap().success(),
        "cannot copy to {}",
        to.display()
    );
}

/// A port that nobody uses and nobody is given by chance: one below those that the kernel gives
/// (`ip_local_port_range`), and another one for each caller.
///
/// # Panics
/// There is none.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 20_000 + u16::try_from(std::process::id() % 1000).unwrap() * 10;
    loop {
        let port = first + NEXT.fetch_add(1, Ordering::Relaxed) % 2000;
        let free = |at: &str| TcpListener::bind((at, port)).is_ok() && UdpSocket::bind((at, port)).is_ok();
        if free("127.0.0.1") && free("::1") {
            return port;
        }
    }
}

/// A file of a Debian package that is unpacked, not installed, because it conflicts with another.
///
/// # Panics
/// It was not unpacked.
pub fn unpacked(path: &str) -> PathBuf {
    let path = folder().parent().unwrap().join("daemons").join(path);
    assert!(path.exists(), "`{}` is missing; run `cargo xtask setup`", path.display());
    path
}
