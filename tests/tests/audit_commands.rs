//! `audit`, `why`, `ps` and `status` without a broker: what the files say, safe for a terminal.

use insta::assert_snapshot;
use portcullis_tests::{Finished, Host};

/// Three files as rotation leaves them, with a refusal, a hostile name, a closed flow, a gap and a torn line.
fn host() -> Host {
    let host = Host::here();
    let lines = [
        (
            "00000000000000000001",
            r#"{"seq":1,"time":"2026-01-31T10:00:00.5Z","host":"h","pid":70,"start":1,"exe":"/usr/sbin/vsftpd","user":"root","op":"listen","proto":"tcp","local":"0.0.0.0:21","verdict":"permit","rule":"allow ftp(clients, servers)","rule_at":"p.pol:5","reason":null,"generation":1,"via":"shim"}
{"seq":2,"time":"2026-01-31T10:00:01Z","host":"h","pid":71,"start":2,"exe":"/usr/bin/curl","user":"www-data","parents":["/bin/sh"],"op":"connect","proto":"tcp","local":null,"remote":"192.0.2.7:443","verdict":"refuse","rule":null,"reason":"no rule permits it","allow":"allow tcp/443(process{exe=\"/usr/bin/curl\"}, IPv4{192.0.2.7});","generation":1,"via":"shim"}
"#,
        ),
        (
            "00000000000000000003",
            "{\"seq\":3,\"time\":\"2026-01-31T10:00:02Z\",\"pid\":72,\"exe\":\"/tmp/\\u001b[2J\\u202egpj\",\"user\":\"x\",\"op\":\"accept\",\
             \"proto\":\"tcp\",\"local\":\"10.0.0.1:21\",\"remote\":\"[2001:db8::1]:5\",\"peer\":\"web.example.com\",\
             \"assurance\":\"address\",\"verdict\":\"would-refuse\",\"rule\":\"deny *(*, *)\",\"rule_at\":\"p.pol:9\",\
             \"reason\":\"a deny rule refuses it\",\"via\":\"guard\"}\n{\"seq\":4,\"ti\n",
        ),
        (
            "00000000000000000007",
            r#"{"seq":7,"time":"2026-01-31T11:00:00Z","pid":70,"exe":"/usr/sbin/vsftpd","user":"root","op":"close","proto":"tcp","local":"10.0.0.1:21","remote":"10.0.0.2:5","verdict":"permit","bytes_in":10,"bytes_out":2000,"duration":1.5,"via":"broker"}
"#,
        ),
    ];
    for (name, text) in lines {
        host.write(&format!("state/audit/{name}.jsonl"), text);
    }
    host
}

/// What a command says, with this host's paths taken out.
fn said(host: &Host, words: &[&str]) -> String {
    let done: Finished = host.portcullis(words);
    done.to_string().replace(host.path("").to_str().unwrap(), "/HOST/")
}

#[test]
fn audit_prints_one_line_for_each_record() {
    assert_snapshot!(said(&host(), &["audit"]), @r"
    exit 0
         1 01-31 10:00:00.500 permit       listen  tcp  vsftpd[70] 0.0.0.0:21  allow ftp(clients, servers)
         2 01-31 10:00:01.000 refuse       connect tcp  curl[71] -> 192.0.2.7:443  no rule permits it
         3 01-31 10:00:02.000 would-refuse accept  tcp  \u{1b}[2J\u{202e}gpj[72] [2001:db8::1]:5 -> 10.0.0.1:21 (web.example.com)  a deny rule refuses it assurance=address via=guard
         7 01-31 11:00:00.000 permit       close   tcp  vsftpd[70] 10.0.0.1:21 -> 10.0.0.2:5  bytes_in=10 bytes_out=2000 duration=1.5
    ---- on standard error ----
    portcullis: line 2 of `/HOST/state/audit/00000000000000000003.jsonl` is no record
    portcullis: records 4 to 6 are missing
    ");
}

#[test]
fn audit_selects() {
    let host = host();
    let seqs = |words: &[&str]| {
        let mut all = vec!["audit", "--format", "json"];
        all.extend(words);
        let printed = host.portcullis(&all).success();
        printed
            .lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["seq"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(seqs(&[]), [1, 2, 3, 7]);
    assert_eq!(seqs(&["--verdict", "refuse"]), [2]);
    assert_eq!(seqs(&["--verdict", "refuse", "--verdict", "would-refuse"]), [2, 3]);
    assert_eq!(seqs(&["--since", "2026-01-31T10:00:02Z"]), [3, 7]);
    assert_eq!(seqs(&["--since", "1m"]), [0; 0]);
    assert_eq!(seqs(&["--process", "vsftpd"]), [1, 7]);
    assert_eq!(seqs(&["--process", "71"]), [2]);
    assert_eq!(seqs(&["--peer", "192.0.2.0/24"]), [2]);
    assert_eq!(seqs(&["--peer", "example.com"]), [3]);
    assert_eq!(seqs(&["--process", "vsftpd", "--verdict", "refuse"]), [0; 0]);
}

#[test]
fn audit_follows_what_is_written_and_rotated() {
    let host = host();
    let state = host.state();
    let program = portcullis_tests::built::portcullis();
    let words = [
        program.to_str().unwrap(),
        "audit",
        "--follow",
        "--format",
        "json",
        "--state",
        state.to_str().unwrap(),
    ];
    let follower = portcullis_tests::Running::start(host.plain(&words));
    follower.line("\"seq\":7");
    let newest = host.state().join("audit/00000000000000000007.jsonl");
    let mut file = std::fs::File::options().append(true).open(newest).unwrap();
    std::io::Write::write_all(&mut file, b"{\"seq\":8,").unwrap();
    std::io::Write::write_all(&mut file, b"\"op\":\"a\"}\n").unwrap();
    assert_eq!(follower.line("\"seq\":8"), "{\"seq\":8,\"op\":\"a\"}");
    host.write("state/audit/00000000000000000009.jsonl", "{\"seq\":9}\n");
    follower.line("\"seq\":9");
}

#[test]
fn why_explains_the_last_refusal() {
    assert_snapshot!(said(&host(), &["why", "--last"]), @r"
    exit 0
         3 01-31 10:00:02.000 would-refuse accept  tcp  \u{1b}[2J\u{202e}gpj[72] [2001:db8::1]:5 -> 10.0.0.1:21 (web.example.com)  a deny rule refuses it assurance=address via=guard

    Who: /tmp/\u{1b}[2J\u{202e}gpj, process 72, user x.
    What: [2001:db8::1]:5 wanted to connect to it at 10.0.0.1:21 over tcp.
    Rule: deny *(*, *), at p.pol:9.
    A deny rule refuses it.
    It went on all the same, as `audit` asks: `--mode audit`, or the word in the rule.
    ");
}

#[test]
fn why_explains_a_record_by_its_number() {
    assert_snapshot!(said(&host(), &["why", "2"]), @r#"
    exit 0
         2 01-31 10:00:01.000 refuse       connect tcp  curl[71] -> 192.0.2.7:443  no rule permits it

    Who: /usr/bin/curl, process 71, user www-data, started by /bin/sh.
    What: it wanted to connect to 192.0.2.7:443 over tcp.
    No rule permits it.

    This rule would allow it, and nothing else:

        allow tcp/443(process{exe="/usr/bin/curl"}, IPv4{192.0.2.7});
    "#);
}

#[test]
fn why_explains_for_programs() {
    assert_snapshot!(said(&host(), &["why", "2", "--format", "json"]), @r#"
    exit 0
    {"record":{"allow":"allow tcp/443(process{exe=\"/usr/bin/curl\"}, IPv4{192.0.2.7});","exe":"/usr/bin/curl","generation":1,"host":"h","local":null,"op":"connect","parents":["/bin/sh"],"pid":71,"proto":"tcp","reason":"no rule permits it","remote":"192.0.2.7:443","rule":null,"seq":2,"start":2,"time":"2026-01-31T10:00:01Z","user":"www-data","verdict":"refuse","via":"shim"},"because":["Who: /usr/bin/curl, process 71, user www-data, started by /bin/sh.","What: it wanted to connect to 192.0.2.7:443 over tcp.","No rule permits it."],"allow":"allow tcp/443(process{exe=\"/usr/bin/curl\"}, IPv4{192.0.2.7});"}
    "#);
}

#[test]
fn why_has_nothing_to_explain() {
    assert_snapshot!(said(&host(), &["why", "99"]), @r"
    exit 2
    ---- on standard error ----
    portcullis: error: no record 99 is in the audit log of `/HOST/state`
    ");
    assert_snapshot!(said(&Host::here(), &["why"]), @r"
    exit 2
    ---- on standard error ----
    portcullis: error: no refusal is in the audit log of `/HOST/state`
    ");
}

#[test]
fn status_and_ps_say_that_nothing_runs() {
    let host = Host::here();
    assert_snapshot!(said(&host, &["status"]), @r"
    exit 0
    state        /HOST/state
    broker       not running; it starts with the first `portcullis run`
    ");
    assert_snapshot!(said(&host, &["ps"]), @r"
    exit 0
        PID  NAME       USER       HELD BY                    PERMITTED REFUSED  COMMAND
    ");
    assert_snapshot!(said(&host, &["ps", "--format", "json"]), @r"
    exit 0
    []
    ");
}

#[test]
fn an_absent_state_folder_is_named() {
    let host = Host::here();
    std::fs::remove_dir(host.state()).unwrap();
    assert_snapshot!(said(&host, &["audit"]), @r"
    exit 2
    ---- on standard error ----
    portcullis: error: cannot use state folder `/HOST/state`: No such file or directory (os error 2)
    ");
}

#[test]
fn wrong_options_are_explained() {
    assert_snapshot!(said(&host(), &["audit", "--since", "tomorrow"]), @r"
    exit 2
    ---- on standard error ----
    error: invalid value 'tomorrow' for '--since <TIME>': neither a time nor a duration such as `10m`

    For more information, try '--help'.
    ");
}
