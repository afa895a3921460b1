//! The language's tools as a contract: exit statuses, and what goes to which stream.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Exit status, standard output, standard error.
fn policy(arguments: &[&str]) -> (i32, String, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_portcullis")).arg("policy").args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// The same, with a policy on standard input.
fn piped(arguments: &[&str], text: &str) -> (i32, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_portcullis"))
        .arg("policy")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn file(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("policies").join(path).display().to_string()
}

/// A file of this test's own.
fn written(name: &str, text: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn the_figures_pass_check() {
    for figure in ["examples/figure-1.pol", "examples/figure-2.pol", "examples/beyond.pol"] {
        let (status, _, stderr) = policy(&["check", &file(figure)]);
        assert_eq!((status, stderr.as_str()), (0, ""));
    }
}

#[test]
fn warnings_alone_are_findings_only_when_asked() {
    let file = file("corpus/accept/warnings.pol");
    assert_eq!(policy(&["check", &file]).0, 0);
    assert_eq!(policy(&["check", "--deny-warnings", &file]).0, 1);
}

#[test]
fn errors_are_findings_and_what_cannot_be_read_is_not() {
    let (status, stdout, _) = policy(&["check", &file("corpus/reject/unknown-attribute.pol")]);
    assert_eq!(status, 1);
    assert!(stdout.contains("^^^^ did you mean `exe`?"));
    let (status, stdout, stderr) = policy(&["check", "/nonexistent.pol"]);
    assert_eq!((status, stdout.as_str()), (2, ""));
    assert!(stderr.contains("cannot read policy"));
    let (status, stdout, _) =
        policy(&["check", "--format", "json", &file("corpus/reject/unknown-attribute.pol")]);
    assert_eq!(status, 1);
    assert!(stdout.contains("\"line\":1,\"column\":15") && stdout.contains("did you mean `exe`?"));
}

#[test]
fn explain_names_the_rule_and_its_line() {
    let figure = file("examples/figure-1.pol");
    let ask = |from: &str, to: &str, service: &str, format: &str| {
        policy(&["explain", &figure, "--from", from, "--to", to, "--service", service, "--format", format])
    };
    let (status, stdout, _) =
        ask("x509{name=\"a.example.com\", ver=20260101}", "IPv4{10.0.0.1}", "smtp", "text");
    assert_eq!(status, 0);
    assert!(
        stdout.starts_with("permit smtp\n") && stdout.contains("figure-1.pol:8: allow *(inside_net, *);")
    );
    let (status, stdout, _) = ask("x509{name=\"evil.org\"}", "x509{name=\"h1.example.com\"}", "smtp", "text");
    assert_eq!(status, 1);
    assert!(stdout.starts_with("refuse smtp\n") && stdout.contains("nearest rules that do not match"));
    assert!(stdout.contains("allow smtp(x509{name=\"evil.org\"}, x509{name=\"h1.example.com\"});"));
    let (status, stdout, _) = ask("x509{name=\"evil.org\"}", "*", "smtp", "json");
    assert_eq!(status, 1);
    assert!(stdout.contains("\"verdict\":\"refuse\"") && stdout.contains("\"rule\":null"));
    assert_eq!(ask("x509{nam=\"a\"}", "*", "smtp", "text").0, 2);
    assert_eq!(ask("*", "*", "smpt", "text").0, 2);
}

#[test]
fn explain_says_that_no_host_has_a_lane() {
    let file = written("lane.pol", "allow smtp(*, IPv4{192.0.2.1}) using ipsec;\n");
    let flow = ["--from", "*", "--to", "IPv4{192.0.2.1}", "--service", "smtp"];
    let (status, stdout, _) = policy(&[&["explain", file.to_str().unwrap()][..], &flow].concat());
    assert_eq!(status, 0, "the policy permits it");
    assert!(
        stdout.ends_with("  but no host has the lane ipsec yet, so each refuses this flow\n"),
        "{stdout}"
    );
    let file = written("lane-tls.pol", "allow smtp(*, IPv4{192.0.2.1}) using tls;\n");
    let (_, stdout, _) = policy(&[&["explain", file.to_str().unwrap()][..], &flow].concat());
    assert!(!stdout.contains("  but "), "{stdout}");
}

/// What a tool shows on a terminal.
fn on_a_terminal(arguments: &[&str], no_color: Option<&str>) -> String {
    let pty = nix::pty::openpty(None, None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
    command.arg("policy").args(arguments).stdout(end()).stderr(end()).env_remove("NO_COLOR");
    command.envs(no_color.map(|value| ("NO_COLOR", value)));
    let mut child = command.spawn().unwrap();
    drop((pty.slave, command));
    let (mut shown, mut terminal) = (Vec::new(), std::fs::File::from(pty.master));
    // A terminal that nobody writes to any more gives EIO.
    let _end = terminal.read_to_end(&mut shown);
    child.wait().unwrap();
    String::from_utf8(shown).unwrap().replace("\r\n", "\n")
}

#[test]
fn diagnostics_have_colours_on_a_terminal_only() {
    let broken = file("corpus/reject/defined-twice.pol");
    let flow = ["--from", "*", "--to", "*", "--service", "smtp"];
    // One shows it as its result, the other on standard error.
    for arguments in [vec!["check", &broken], [&["explain", broken.as_str()][..], &flow].concat()] {
        let (_, stdout, stderr) = policy(&arguments);
        let plain = stdout + &stderr;
        assert!(plain.contains("error: ") && !plain.contains('\u{1b}'), "{plain}");
        assert_eq!(on_a_terminal(&arguments, Some("1")), plain);
        let coloured = on_a_terminal(&arguments, None);
        assert!(coloured.contains("\u{1b}[31merror\u{1b}[0m"), "{coloured}");
        assert_eq!(coloured, on_a_terminal(&arguments, Some("")), "empty is as if it were not there");
    }
}

#[test]
fn failing_tests_are_findings() {
    let (status, stdout, _) = policy(&["test", &file("corpus/reject/failing-test.pol")]);
    assert_eq!(status, 1);
    assert!(stdout.contains("test \"mail\" … FAILED") && stdout.contains("0 passed; 1 failed"));
    assert_eq!(policy(&["test", &file("examples/beyond.pol")]).0, 0);
    assert_eq!(policy(&["test", &file("corpus/reject/nul.pol")]).0, 2);
}

#[test]
fn fmt_checks_writes_and_leaves_alone() {
    let path = written("untidy.pol", "allow   ssh( *,* ) ;\n");
    let path = path.to_str().unwrap();
    assert_eq!(policy(&["fmt", "--check", path]).0, 1);
    assert_eq!(policy(&["fmt", path]).0, 0);
    assert_eq!(std::fs::read_to_string(path).unwrap(), "allow ssh(*, *);\n");
    assert_eq!(policy(&["fmt", "--check", path]).0, 0);
    assert_eq!(policy(&["fmt", "--check", &file("corpus/reject/one-end.pol")]).0, 2);
}

#[test]
fn diff_tells_flows_and_is_silent_about_words() {
    let old = file("examples/figure-1.pol");
    let reworded = written(
        "reworded.pol",
        "allow tcp/25(*, gw); gw = x509{name=\"mailgw.example.com\"}; in = x509{name=\"*.example.com\"};
         allow *(in, *); allow smtp(gw, in); allow udp/123(IPv4{10.1.2.3/32}, in);",
    );
    let (status, stdout, _) = policy(&["diff", "--no-widening", &old, reworded.to_str().unwrap()]);
    assert_eq!((status, stdout.as_str()), (0, ""));
    let wider = written(
        "wider.pol",
        &(std::fs::read_to_string(&old).unwrap() + "allow ssh(*, x509{name=\"a.example.com\"});\n"),
    );
    let wider = wider.to_str().unwrap();
    let (status, stdout, _) = policy(&["diff", &old, wider]);
    assert_eq!(status, 0);
    assert!(
        stdout.contains("+ becomes allowed: ssh(")
            && stdout.contains("before refuse")
            && stdout.contains("now    permit")
    );
    assert_eq!(policy(&["diff", "--no-widening", &old, wider]).0, 1);
    assert_eq!(policy(&["diff", "--no-widening", wider, &old]).0, 0);
    assert_eq!(policy(&["diff", &old, "/nonexistent.pol"]).0, 2);
}

#[test]
fn replay_counts_recorded_flows_by_process() {
    let old = written("old.pol", "allow http(process{exe=\"/usr/bin/curl\"}, *);\n");
    let new = written("new.pol", "allow http(process{exe=\"/usr/bin/wget\"}, *);\n");
    let audit = written(
        "audit.jsonl",
        "{\"op\":\"connect\",\"exe\":\"/usr/bin/curl\",\"user\":\"a\",\"proto\":\"tcp\",\"local\":\"10.0.0.1:4000\",\"remote\":\"192.0.2.1:80\"}\n\
         {\"op\":\"connect\",\"exe\":\"/usr/bin/curl\",\"user\":\"a\",\"proto\":\"tcp\",\"local\":\"10.0.0.1:4001\",\"remote\":\"192.0.2.2:80\"}\n\
         {\"op\":\"listen\",\"exe\":\"/usr/bin/nc\"}\nrubbish\n",
    );
    let (status, stdout, _) = policy(&[
        "diff",
        old.to_str().unwrap(),
        new.to_str().unwrap(),
        "--format",
        "json",
        "--replay",
        audit.to_str().unwrap(),
    ]);
    assert_eq!(status, 0);
    assert!(stdout.contains("\"flows\":2,\"passed_over\":2"), "{stdout}");
    assert!(
        stdout
            .contains("\"/usr/bin/curl\":{\"becomes_allowed\":0,\"becomes_refused\":2,\"cannot_be_told\":0}"),
        "{stdout}"
    );
}

#[test]
fn replay_says_what_depends_on_facts_that_no_record_has() {
    let old = written("told-old.pol", "allow http(x509{name=\"h.example.com\"}, *);\n");
    let audit = written(
        "told.jsonl",
        "{\"op\":\"connect\",\"host\":\"h.example.com\",\"exe\":\"/usr/bin/curl\",\"user\":\"a\",\"proto\":\"tcp\",\"local\":\"10.0.0.1:4000\",\"remote\":\"192.0.2.1:80\"}\n",
    );
    let replay = |new: &str| {
        let new = written("told-new.pol", new);
        let paths = [&old, &new, &audit].map(|p| p.to_str().unwrap());
        let [old, new, audit] = paths;
        policy(&["diff", old, new, "--replay", audit])
    };
    // The host's name is recorded, groups are not, and an address settles it either way.
    let (status, stdout, _) = replay("allow http(x509{name=\"g.example.com\"}, *);\n");
    assert_eq!(status, 0);
    assert!(stdout.contains("/usr/bin/curl: 0 become allowed, 1 become refused\n"), "{stdout}");
    let (_, stdout, _) = replay("allow http(process{group=\"staff\"}, *);\n");
    assert!(stdout.contains("0 become refused, 1 depend on what is not recorded"), "{stdout}");
    let (_, stdout, _) = replay("allow http(process{group=\"staff\"}, IPv4{192.0.2.2});\n");
    assert!(stdout.contains("1 become refused\n"), "{stdout}");
    let (_, stdout, _) =
        replay("allow http(x509{name=\"h.example.com\"}, *);\nallow ssh(process{group=\"staff\"}, *);\n");
    assert!(stdout.contains("replayed 1 flows (0 records passed over)\n") && !stdout.contains("curl:"));
}

#[test]
fn query_lists_who_may_reach_what() {
    let figure = file("examples/figure-1.pol");
    let (status, stdout, _) =
        policy(&["query", &figure, "--to", "x509{name=\"h1.example.com\"}", "--service", "smtp"]);
    assert_eq!(status, 0);
    assert!(stdout.contains("smtp(x509{name=\"mailgw.example.com\"}, x509{name=\"h1.example.com\"})"));
    let (status, stdout, _) = policy(&["query", &figure, "--mentions", "10.1.2.3"]);
    assert_eq!((status, stdout.lines().count()), (0, 1));
    let (status, stdout, stderr) = policy(&["query", &figure, "--mentions", "nothing"]);
    assert_eq!((status, stdout.as_str(), stderr.as_str()), (1, "", "portcullis: no rule names that\n"));
    let (status, stdout, stderr) =
        policy(&["query", &figure, "--from", "process{exe=\"/bin/a\"}", "--service", "telnet"]);
    assert_eq!((status, stdout.as_str()), (1, ""));
    assert!(stderr.contains("no rule permits that"), "{stderr}");
}

/// What a command prints, with the folder of the corpus taken out.
fn printed(arguments: &[&str]) -> String {
    let (_, stdout, _) = policy(arguments);
    stdout.replace(&file(""), "")
}

#[test]
fn each_tool_prints_what_it_always_printed() {
    let figure = file("examples/figure-1.pol");
    let flow = ["--from", "x509{name=\"mailgw.example.com\"}", "--to", "x509{name=\"h1.example.com\"}"];
    assert_eq!(
        printed(&[&["explain", &figure, "--service", "smtp"][..], &flow].concat()),
        "permit smtp\n  rule examples/figure-1.pol:6: allow smtp(mail_gw, inside_net);\n  \
         why  this rule allows it, and none denies it\n"
    );
    assert_eq!(
        printed(&["query", &figure, "--mentions", "time_server"]),
        "examples/figure-1.pol:7: allow ntp(time_server, inside_net);\n"
    );
    assert_eq!(
        printed(&["query", &figure, "--to", "x509{name=\"h1.example.com\"}", "--service", "ntp"]),
        "ntp(IPv4{10.1.2.3}, x509{name=\"h1.example.com\"})\n  \
         by     examples/figure-1.pol:7: allow ntp(time_server, inside_net);\n\
         ntp(x509{name=\"*.example.com\"}, x509{name=\"h1.example.com\"})\n  \
         by     examples/figure-1.pol:8: allow *(inside_net, *);\n"
    );
    let narrower = written("narrower.pol", "allow ntp(IPv4{10.1.2.0/30}, x509{name=\"*.example.com\"});\n");
    let wider = written("wider-still.pol", "allow ntp(IPv4{10.1.2.0/29}, x509{name=\"*.example.com\"});\n");
    let (narrower, wider) = (narrower.to_str().unwrap(), wider.to_str().unwrap());
    let told = printed(&["diff", narrower, wider]).replace(wider, "new.pol");
    assert_eq!(
        told,
        "+ becomes allowed: ntp(IPv4{10.1.2.4/30}, x509{name=\"*.example.com\"})\n    \
         for example --from 'IPv4{10.1.2.5}' --to 'x509{name=\"host.example.com\"} & IPv4{192.0.2.1}' --service udp/123\n    \
         before refuse as no rule allows it\n    \
         now    permit by new.pol:1: allow ntp(IPv4{10.1.2.0/29}, x509{name=\"*.example.com\"});\n"
    );
}

#[test]
fn a_dash_is_standard_input_for_every_tool() {
    let text = "allow   smtp(*, x509{name=\"a.example.com\"});\n";
    let tidy = "allow smtp(*, x509{name=\"a.example.com\"});\n";
    assert_eq!(piped(&["check", "-"], text).1, "<stdin>: 1 rule, nothing to say\n");
    assert_eq!(piped(&["fmt", "-"], text), (0, tidy.to_owned(), String::new()));
    assert_eq!(piped(&["fmt", "--check", "-"], text).0, 1);
    assert_eq!(piped(&["fmt", "--check", "-"], tidy).0, 0);
    assert_eq!(piped(&["test", "-"], "test \"no\" { allow ssh(*, *); }\n").0, 1);
    let flow = ["--from", "*", "--to", "x509{name=\"a.example.com\"}"];
    assert_eq!(piped(&[&["explain", "-", "--service", "smtp"][..], &flow].concat(), text).0, 0);
    assert_eq!(piped(&[&["query", "-"][..], &flow].concat(), text).0, 0);
    let same = written("tidy.pol", tidy);
    assert_eq!(piped(&["diff", "-", same.to_str().unwrap()], text), (0, String::new(), String::new()));
    let (status, stdout, _) = piped(&["check", "-"], "include \"a.pol\";\n");
    assert!(status == 1 && stdout.contains(" --> <stdin>:1:9"), "{stdout}");
}

#[test]
fn a_set_that_is_used_as_one_party_is_shown_in_the_policy() {
    let figure = file("examples/figure-1.pol");
    let (status, _, stderr) =
        policy(&["explain", &figure, "--from", "mail_gw", "--to", "inside_net", "--service", "smtp"]);
    assert_eq!(status, 2);
    assert!(
        stderr.contains("`inside_net` describes more than one party\n --> --to:1:1")
            && stderr.contains("figure-1.pol:1:25\n"),
        "{stderr}"
    );
}

#[test]
fn what_cannot_be_written_is_not_done() {
    let figure = file("examples/figure-1.pol");
    let write_to = |path: &str| {
        let to = std::fs::File::options().write(true).open(path).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
        command.args(["policy", "check", &figure]).stdout(to).output().unwrap().status.code()
    };
    assert_eq!((write_to("/dev/full"), write_to("/dev/null")), (Some(2), Some(0)));
}

#[test]
fn every_part_of_a_service_is_explained_by_its_ports() {
    let path = written("parts.pol", "allow tcp/20-30(*, *); allow ntp(*, *);\n");
    let path = path.to_str().unwrap();
    let heads = |service: &str| {
        let (_, stdout, _) = policy(&["explain", path, "--from", "*", "--to", "*", "--service", service]);
        let is_head = |line: &&str| !line.starts_with(' ');
        stdout.lines().filter(is_head).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(heads("tcp/25-40"), ["permit tcp/25-30", "refuse tcp/31-40"]);
    // What would permit it is said of all of these ports.
    let (_, stdout, _) = policy(&["explain", path, "--from", "*", "--to", "*", "--service", "tcp/31-40"]);
    assert!(
        stdout.contains("and this is tcp/31-40") && stdout.contains("\n    allow tcp/31-40(*, *);\n"),
        "{stdout}"
    );
    assert_eq!(
        heads("*"),
        [
            "refuse tcp/0-19",
            "permit tcp/20-30",
            "refuse tcp/31-65535",
            "refuse udp/0-122",
            "permit ntp",
            "refuse udp/124-65535"
        ]
    );
}

/// The names of all members of JSON values, one value for each line.
fn members(text: &str) -> BTreeSet<String> {
    fn add(value: &serde_json::Value, found: &mut BTreeSet<String>) {
        match value {
            serde_json::Value::Object(map) => map.iter().for_each(|(name, value)| {
                // The members of this one are processes.
                if !name.starts_with('/') {
                    found.insert(name.clone());
                }
                add(value, found);
            }),
            serde_json::Value::Array(list) => list.iter().for_each(|value| add(value, found)),
            _ => {}
        }
    }
    let mut found = BTreeSet::new();
    text.lines().for_each(|line| add(&serde_json::from_str(line).unwrap(), &mut found));
    found
}

#[test]
fn the_members_of_json_are_those_in_the_manual() {
    let manual = std::fs::read_to_string(file("LANGUAGE.md")).unwrap();
    let (_, section) = manual.split_once("## For programs").unwrap();
    let named: BTreeSet<String> =
        section.split('`').skip(1).step_by(2).map(|word| word.trim_end_matches('?').to_owned()).collect();
    let old =
        written("json-old.pol", "allow smtp(x509{group=\"a\"}, *) using ipsec as mail because \"mail\";\n");
    let new = written(
        "json-new.pol",
        "deny smtp(x509{group=\"b\"}, *); allow smtp(x509{group=\"a\"}, *); allow ssh(*, *);
         allow ssh(*, *);\n",
    );
    let audit = written(
        "json.jsonl",
        "{\"op\":\"connect\",\"exe\":\"/bin/a\",\"user\":\"a\",\"proto\":\"tcp\",\"local\":\"10.0.0.1:4000\",\"remote\":\"192.0.2.1:22\"}\n",
    );
    // So many rules overlap a new one that it is given whole, less what they are about.
    let narrow =
        |n| format!("allow smtp(x509{{group=\"g{n}\", name=\"*.z{n}.org\"}}, IPv4{{10.0.{n}.0/24}});\n");
    let many: String = (0..100).map(narrow).collect();
    let wide = written("json-wide.pol", &(many.clone() + "allow smtp(x509{name=\"*.org\"}, *);\n"));
    let many = written("json-many.pol", &many);
    let [old, new, audit, many, wide] = [&old, &new, &audit, &many, &wide].map(|path| path.to_str().unwrap());
    let reject = file("corpus/reject/failing-test.pol");
    let parties = ["--from", "x509{group=\"a\"}", "--to", "*"];
    let told = [
        policy(&["check", new, &file("corpus/reject/defined-twice.pol"), "/nonexistent", "--format", "json"]),
        policy(&["check", &file("corpus/reject/columns.pol"), "--format", "json"]),
        policy(&["fmt", "--check", new, "/nonexistent", "--format", "json"]),
        policy(&["test", &reject, "--format", "json"]),
        policy(&[&["explain", old, "--service", "smtp, http", "--format", "json"][..], &parties].concat()),
        policy(&["query", new, "--format", "json"]),
        policy(&["diff", old, new, "--replay", audit, "--format", "json"]),
        policy(&["diff", many, wide, "--format", "json"]),
    ];
    let printed: BTreeSet<String> = told.iter().flat_map(|(_, stdout, _)| members(stdout)).collect();
    let unnamed: Vec<_> = printed.difference(&named).collect();
    assert!(unnamed.is_empty(), "not in the manual: {unnamed:?}");
    // All else that stands there in such letters is no member.
    let others = ["", "--format json", "--mentions", "allowed", "refused", "warning"];
    let tools = ["check", "fmt", "test", "explain", "query", "diff"];
    let unprinted: Vec<_> = named
        .difference(&printed)
        .filter(|name| !others.contains(&name.as_str()) && !tools.contains(&name.as_str()))
        .collect();
    assert!(unprinted.is_empty(), "never printed: {unprinted:?}");
}
