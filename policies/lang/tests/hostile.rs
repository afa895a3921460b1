//! Policies that mean harm: a clear answer, in bounded time and memory.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::{
    ffi::CString,
    fs,
    os::unix::{ffi::OsStrExt as _, fs::symlink},
    path::Path,
    time::{Duration, Instant},
};

use portcullis_policy::{CertificateFact, CertificateFacts, Flow, LoadError, Party, Policy, Side};
use portcullis_types::{Protocol, Verdict};

/// Far more than any of these takes, even unoptimised on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

fn refused(text: &str) -> String {
    let begun = Instant::now();
    let message = match Policy::parse("hostile.pol", text) {
        Ok(_) => panic!("accepted"),
        Err(errors) => errors.to_string(),
    };
    assert!(begun.elapsed() < LIMIT, "took {:?}", begun.elapsed());
    assert!(message.len() < 1 << 20, "{} bytes of diagnostics", message.len());
    message
}

fn unreadable(path: &Path) -> String {
    match Policy::load(path) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_hundred_megabyte_line_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.pol");
    fs::write(&path, "a".repeat(100 << 20)).unwrap();
    assert!(unreadable(&path).contains("larger than"));
    assert!(refused(&"a".repeat(40 << 20)).contains("larger than"));
}

#[test]
fn a_long_line_full_of_errors_is_told_in_bounded_time() {
    refused(&"@ ".repeat(2 << 20));
    refused(&"allow ssh(a,b);".repeat(200_000));
    refused(&format!("{}allow x(", " ".repeat(8 << 20)));
    refused(&"\"".repeat(1 << 20));
    refused(&"a=b&".repeat(500_000));
}

#[test]
fn a_policy_of_very_many_words_is_read_no_further() {
    for text in ["a=", "allow ssh(a,b);", "allow 1(*,*);", "a=IPv4{1,"] {
        let last = text.rsplit('=').next().unwrap();
        let message =
            refused(&format!("{text}{}", format!("{last}b&").repeat((31 << 20) / (last.len() + 2))));
        assert!(message.contains("at most 4194304 words"), "{message}");
    }
    // Of all files together.
    let folder = tempfile::tempdir().unwrap();
    let part: String = "allow ssh(*, *);\n".repeat(200_000);
    let mut main = String::new();
    for n in 0..4 {
        fs::write(folder.path().join(format!("{n}.pol")), &part).unwrap();
        main += &format!("include \"{n}.pol\";\n");
    }
    fs::write(folder.path().join("main.pol"), main).unwrap();
    assert!(unreadable(&folder.path().join("main.pol")).contains("at most 4194304 words"));
    // The memory that any of this has taken at once (proc_pid_status(5)), of tests that run side by side.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kilobytes: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kilobytes < 1 << 20, "{kilobytes} kB");
}

#[test]
fn very_many_failing_tests_take_no_memory_each_for_the_whole_text() {
    let refused = "refuse smtp(IPv4{192.0.2.1}, IPv4{192.0.2.2});";
    let tests = (0..20_000).map(|n| format!("test \"{n}\" {{\n    {refused}\n}}\n"));
    let text = format!("allow smtp(*, *);\n{}", tests.collect::<String>());
    let policy = Policy::load_input_untested("t.pol", text.as_bytes()).unwrap().policy;
    let resident = || {
        let pages = fs::read_to_string("/proc/self/statm").unwrap();
        pages.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let before = resident();
    let outcomes = policy.run_tests();
    // A copy of the places of its lines for each would be 4.8 GB.
    let took = resident().saturating_sub(before);
    assert!(took < 1_000_000_000, "{took}");
    assert!(outcomes.len() == 20_000 && outcomes.iter().all(|outcome| !outcome.passed()));
}

#[test]
fn deep_nesting_is_an_error() {
    assert!(refused(&format!("a = {}*{};", "(".repeat(100_000), ")".repeat(100_000))).contains("deep"));
    assert!(refused(&format!("a = {}*;", "!".repeat(100_000))).contains("in a row"));
    let chain: String = (0..100_000).map(|i| format!("a{i} = a{};\n", i + 1)).collect();
    assert!(refused(&chain).contains("deep"));
    let services: String = (0..10_000).map(|i| format!("service s{i} = s{};\n", i + 1)).collect();
    assert!(refused(&services).contains("deep"));
}

#[test]
fn sets_that_grow_without_end_are_errors() {
    let doubling: String = (0..60)
        .map(|i| format!("a{i} = (a{0} & x509{{ver={i}}}) | (a{0} & x509{{ver>{i}}});\n", i + 1))
        .collect();
    assert!(refused(&format!("{doubling}a60 = *;")).contains("written out"));
}

#[test]
fn products_of_choices_are_bounded() {
    let choice =
        |field: &str| (0..200).map(|i| format!("x509{{{field}=\"v{i}\"}}")).collect::<Vec<_>>().join(" | ");
    let all: Vec<String> =
        ["group", "org", "unit", "user"].iter().map(|f| format!("({})", choice(f))).collect();
    let begun = Instant::now();
    let loaded = Policy::parse("product.pol", &format!("allow ssh({}, *);", all.join(" & ")))
        .unwrap_or_else(|e| panic!("{e}"));
    assert!(begun.elapsed() < LIMIT);
    drop(loaded);
}

#[test]
fn glob_bombs_match_in_linear_time() {
    let bomb = "*a".repeat(120);
    let text = format!("allow ssh(process{{exe=\"/{bomb}b\", cmdline=\"{bomb}b\"}}, *);");
    let policy = Policy::parse("bomb.pol", &text).unwrap_or_else(|e| panic!("{e}")).policy;
    let long = "a".repeat(4000);
    let from = format!("process{{exe=\"/{long}\", cmdline=\"{long}\"}}");
    let begun = Instant::now();
    // The command line is longer than a pattern may be.
    assert!(policy.explain_words(&from, "*", "ssh", 0).is_err());
    let short = "a".repeat(250);
    let from = format!("process{{exe=\"/{short}\", cmdline=\"{short}\"}}");
    policy.explain_words(&from, "*", "ssh", 0).unwrap_or_else(|e| panic!("{e}"));
    assert!(begun.elapsed() < LIMIT);
}

#[test]
fn diff_of_pattern_bombs_is_bounded() {
    let rule = |n: usize| format!("allow ssh(x509{{name=\"*a*b*c*{n}*\", name!=\"*x*{n}*y*z*\"}}, *);\n");
    let policy = |text: String| Policy::parse("bomb.pol", &text).unwrap_or_else(|e| panic!("{e}")).policy;
    let (old, new) = (policy((0..30).map(rule).collect()), policy((15..45).map(rule).collect()));
    let begun = Instant::now();
    let _told = portcullis_policy::diff(&old, &new, 0);
    assert!(begun.elapsed() < 4 * LIMIT, "took {:?}", begun.elapsed());
}

#[test]
fn devices_pipes_and_folders_are_no_policies() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe.pol");
    let name = CString::new(pipe.as_os_str().as_bytes()).unwrap();
    nix::unistd::mkfifo(name.as_c_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [pipe.as_path(), Path::new("/dev/zero"), Path::new("/dev/tty"), folder.path()] {
        assert!(unreadable(path).contains("no regular file"), "{}", path.display());
    }
    let main = folder.path().join("main.pol");
    fs::write(&main, "include \"pipe.pol\";\ninclude \"../../../../../../dev/zero\";\n").unwrap();
    assert_eq!(unreadable(&main).matches("no regular file").count(), 2);
}

#[test]
fn a_cycle_by_way_of_a_symbolic_link_is_found() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.pol"), "include \"b.pol\";\n").unwrap();
    symlink("a.pol", folder.path().join("b.pol")).unwrap();
    assert!(unreadable(&folder.path().join("a.pol")).contains("includes itself"));
    symlink("loop.pol", folder.path().join("loop.pol")).unwrap();
    assert!(matches!(Policy::load(&folder.path().join("loop.pol")), Err(LoadError::Read { .. })));
}

#[test]
fn too_many_files_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let mut main = String::new();
    for i in 0..300 {
        fs::write(folder.path().join(format!("f{i}.pol")), "").unwrap();
        main += &format!("include \"f{i}.pol\";\n");
        fs::write(folder.path().join(format!("d{i}.pol")), format!("include \"d{}.pol\";\n", i + 1)).unwrap();
    }
    fs::write(folder.path().join("main.pol"), main).unwrap();
    assert!(unreadable(&folder.path().join("main.pol")).contains("at most 256 files"));
    assert!(unreadable(&folder.path().join("d0.pol")).contains("16 deep"));
}

#[test]
fn bytes_that_are_no_text_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("latin.pol");
    fs::write(&path, b"# fine\nallow ssh(x509{name=\"caf\xe9\"}, *);\n").unwrap();
    let message = unreadable(&path);
    assert!(message.contains("not UTF-8") && message.contains("line 2"), "{message}");
    assert!(refused("allow ssh(*, *);\0").contains("NUL"));
}

#[test]
fn nothing_in_a_policy_moves_the_cursor() {
    let message = refused("allow \u{1b}[2Jssh(\"\u{1b}]0;x\u{7}\", \u{202e}*);\r\n");
    assert!(
        !message.contains('\u{1b}') && !message.contains('\u{7}') && !message.contains('\u{202e}'),
        "{message}"
    );
}

/// More groups than the index takes in, so that each rule is asked; of them 20,000.
#[test]
fn a_party_that_is_very_many_principals_is_decided_in_bounded_time() {
    let mut text = String::from("deny tcp/7(x509{group=\"g299\"}, *);\n");
    for n in 0..20_000 {
        text += &format!("allow tcp/{}(x509{{group=\"g{}\"}}, *);\n", n % 100, n % 200);
    }
    let policy = Policy::parse("many.pol", &text).unwrap().policy;
    let decide = |groups: u32, port: u16| {
        let groups = (0..groups).map(|n| format!("g{n}")).collect();
        let certificate = CertificateFacts { groups, ..CertificateFacts::default() };
        let from = Party { certificate: CertificateFact::Shown(&certificate), ..Party::UNKNOWN };
        let flow =
            Flow { from: &from, to: &Party::UNKNOWN, protocol: Protocol::TCP, port, now: 0, far: Side::To };
        policy.evaluate(&flow).verdict
    };
    let begun = Instant::now();
    for _ in 0..20 {
        assert_eq!((decide(300, 99), decide(300, 7)), (Verdict::Permit, Verdict::Refuse));
        assert_eq!(decide(300, 100), Verdict::Refuse);
    }
    assert!(begun.elapsed() < LIMIT, "took {:?}", begun.elapsed());
    // Of a party that is few, the same.
    assert_eq!(
        (decide(100, 99), decide(9, 99), decide(100, 7)),
        (Verdict::Permit, Verdict::Refuse, Verdict::Permit)
    );
}

#[test]
fn what_broke_fuzzers_once_is_held_on_to() {
    use portcullis_policy::fuzzing;
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("corpus");
    for folder in ["accept", "reject"] {
        for entry in fs::read_dir(corpus.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let Ok(bytes) = fs::read(&path) else { continue };
            fuzzing::parse(&bytes);
            fuzzing::compile(&bytes);
            fuzzing::diff(&[bytes.get(bytes.len() / 2..).unwrap(), b"\0", &bytes].concat());
            for cut in [bytes.len() / 3, bytes.len() / 2] {
                fuzzing::parse(bytes.get(cut..).unwrap());
                fuzzing::parse(bytes.get(..cut).unwrap());
            }
            let place = tempfile::tempdir().unwrap();
            fuzzing::include(place.path(), &bytes);
        }
    }
}
