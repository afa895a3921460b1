//! Compiles the BPF programs with clang, which is the one thing here that Rust does not bring.
//!
//! Without clang the build fails and says what to install: a boundary must not be missing by accident.
//! `PORTCULLIS_NO_BACKSTOP=1` builds without it on purpose; loading then fails by name, and `status`
//! shows it.
#![expect(clippy::panic, reason = "how a build script fails")]

use std::{env, fs, path::PathBuf, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=src/bpf");
    println!("cargo::rerun-if-env-changed=PORTCULLIS_NO_BACKSTOP");
    println!("cargo::rerun-if-env-changed=CLANG");
    let object = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("backstop.bpf.o");
    if env::var_os("PORTCULLIS_NO_BACKSTOP").is_some_and(|v| !v.is_empty() && v != "0") {
        println!("cargo::warning=built without the kernel backstop, as PORTCULLIS_NO_BACKSTOP asks");
        if let Err(error) = fs::write(&object, []) {
            panic!("cannot write `{}`: {error}", object.display());
        }
        return;
    }
    let clang = env::var_os("CLANG").unwrap_or_else(|| "clang".into());
    let endian = match env::var("CARGO_CFG_TARGET_ENDIAN").as_deref() {
        Ok("big") => panic!("the backstop's programs assume a little-endian host"),
        _ => "bpfel",
    };
    let done = Command::new(&clang)
        // v3 (kernel 5.12) has the atomic exchange that the record ring needs.
        .args(["-target", endian, "-mcpu=v3", "-O2", "-g", "-Wall", "-Werror"])
        .args(["-fdebug-compilation-dir", ".", "-c", "src/bpf/backstop.bpf.c", "-o"])
        .arg(&object)
        .status();
    match done {
        Ok(status) if status.success() => {}
        Ok(status) => {
            panic!("clang could not compile src/bpf/backstop.bpf.c ({status}; 14 or newer is needed)")
        }
        Err(error) => panic!(
            "cannot run `{}` ({error}), which compiles the kernel backstop.\n\
             Install it:      apt-get install --no-install-recommends clang\n\
             or do without:   PORTCULLIS_NO_BACKSTOP=1 cargo build   (shown by `portcullis status`)",
            clang.display()
        ),
    }
}
