//! `portcullis ca`, as it is typed.

#![expect(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

use std::{path::Path, process::Command};

/// Exit status, standard output, standard error.
fn ca(state: &Path, arguments: &[&str]) -> (i32, String, String) {
    let (command, rest) = arguments.split_first().unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_portcullis"))
        .args(["ca", command, "--state"])
        .arg(state)
        .args(rest)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

#[test]
fn a_domain_a_host_and_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let (state, out) = (folder.path().join("ca"), folder.path().join("h1"));
    let out_text = out.to_str().unwrap();
    let (status, said, _) = ca(&state, &["init", "--trust-domain", "example.com"]);
    assert_eq!((status, said.lines().count()), (0, 2), "{said}");
    let (status, _, why) = ca(&state, &["init", "--trust-domain", "example.com"]);
    assert!(status == 2 && why.contains("has a trust domain already: `example.com`"), "{why}");

    let host = [
        "host",
        "h1.example.com",
        "--address",
        "192.0.2.1",
        "--ver",
        "7",
        "--group",
        "ops",
        "--out",
        out_text,
    ];
    let (status, said, _) = ca(&state, &[&host[..], &["--format", "json"]].concat());
    assert!(
        status == 0
            && said.contains(r#""name":"h1.example.com","addresses":["192.0.2.1"],"ver":7,"groups":["ops"]"#)
    );
    for file in ["host.crt", "host.key", "ca.crt", "issuer.crt", "issuer.key", "members.toml"] {
        assert!(out.join(file).exists(), "{file}");
    }
    assert_eq!(ca(&state, &host).0, 2, "enrolled twice");
    for (name, is_below) in [("h2.example.com", true), ("h2.example.org", false), ("h2", false)] {
        let out = folder.path().join(name);
        let (status, _, said) = ca(&state, &["host", name, "--out", out.to_str().unwrap()]);
        assert_eq!((status, said.contains("is not below `example.com`")), (0, !is_below), "{name}: {said}");
    }
    let (_, said, _) = ca(&state, &["show"]);
    assert!(said.contains("h1.example.com") && said.contains("good"), "{said}");

    assert_eq!(ca(&state, &["revoke", "h1.example.com"]).0, 0);
    let (_, said, _) = ca(&state, &["show"]);
    assert!(said.contains("revoked "), "{said}");
    let (status, said, _) = ca(&state, &["renew", "--out", out_text]);
    assert!(status == 0 && said.contains("List of members 6"), "{said}");
    assert!(std::fs::read_to_string(out.join("members.toml")).unwrap().contains("[[revoked]]"));
}

#[test]
fn what_is_no_name_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    for domain in ["Example.com", "", "a/b"] {
        let (status, _, why) = ca(folder.path(), &["init", "--trust-domain", domain]);
        assert!(status == 2 && why.contains("is no trust domain"), "{why}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    assert_eq!(ca(folder.path(), &["show"]).0, 2);
}
