//! The programs under test.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
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

/// A file of a Debian package that is unpacked, not installed, because it conflicts with another.
///
/// # Panics
/// It was not unpacked.
pub fn unpacked(path: &str) -> PathBuf {
    let path = folder().parent().unwrap().join("daemons").join(path);
    assert!(path.exists(), "`{}` is missing; run `cargo xtask setup`", path.display());
    path
}
