//! What policies mean, one sentence each.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use portcullis_policy::{
    CertificateFact, CertificateFacts, Fact, Flow, ListenerScope, Party, Policy, ProcessFact, ProcessFacts,
    Side,
};
use portcullis_types::{Assurance, Lane, Protocol, RuleId, Verdict};

fn policy(text: &str) -> Policy {
    Policy::parse("test.pol", text).unwrap_or_else(|d| panic!("{d}")).policy
}

fn process(exe: &str) -> ProcessFacts {
    ProcessFacts {
        exe: Fact::Known(exe.to_owned()),
        sha256: Fact::Unknown,
        uid: 1000,
        user: "alice".to_owned(),
        groups: vec!["staff".to_owned()],
        unit: None,
        cmdline: exe.to_owned(),
        ancestors: vec![Fact::Known("/usr/bin/bash".to_owned())],
    }
}

fn named(name: &str) -> CertificateFacts {
    CertificateFacts { names: vec![name.to_owned()], ver: Some(20_260_101), ..CertificateFacts::default() }
}

fn at(address: &str) -> Party<'static> {
    Party { addr: Some(address.parse().unwrap()), ..Party::UNKNOWN }
}

fn out<'a>(from: &'a Party<'a>, to: &'a Party<'a>, port: u16) -> Flow<'a> {
    Flow { from, to, protocol: Protocol::TCP, port, now: 0, far: Side::To }
}

const FIGURE_1: &str = include_str!("../../examples/figure-1.pol");

#[test]
fn the_examples_load() {
    policy(FIGURE_1);
    policy(include_str!("../../examples/figure-2.pol"));
    policy(include_str!("../../examples/beyond.pol"));
}

#[test]
fn figure_1_means_what_it_says() {
    let policy = policy(FIGURE_1);
    let (inside, evil) = (named("a.example.com"), named("evil.org"));
    let inside = Party { certificate: CertificateFact::Shown(&inside), ..at("10.0.0.9") };
    let evil = Party { certificate: CertificateFact::Shown(&evil), ..at("203.0.113.1") };
    let decision = policy.evaluate(&out(&inside, &evil, 25));
    assert_eq!((decision.verdict, decision.rule), (Verdict::Permit, Some(RuleId(3))));
    assert_eq!(policy.evaluate(&out(&evil, &inside, 25)).verdict, Verdict::Refuse);
    let clock = at("10.1.2.3");
    let ntp = Flow { protocol: Protocol::UDP, ..out(&clock, &inside, 123) };
    assert_eq!(policy.evaluate(&ntp).rule, Some(RuleId(2)));
}

#[test]
fn a_certificate_that_would_help_is_asked_for() {
    let policy = policy("allow ssh(*, x509{name=\"*.example.com\"}); allow http(*, *);");
    let from = Party { process: ProcessFact::Known(&process("/usr/bin/ssh")), ..at("10.0.0.9") };
    let to = Party { certificate: CertificateFact::Pending, ..at("10.0.0.1") };
    let decision = policy.evaluate(&out(&from, &to, 22));
    assert_eq!((decision.verdict, decision.lane), (Verdict::Protect, Lane::Tls));
    assert_eq!(policy.evaluate(&out(&from, &to, 80)).verdict, Verdict::Permit);
    assert_eq!(policy.evaluate(&out(&from, &at("10.0.0.1"), 22)).verdict, Verdict::Refuse);
    let shown = named("h.example.com");
    let to = Party { certificate: CertificateFact::Shown(&shown), ..to };
    let decision = policy.evaluate(&out(&from, &to, 22));
    assert_eq!((decision.verdict, decision.assurance), (Verdict::Permit, Assurance::Certificate));
}

#[test]
fn a_certificate_that_could_deny_is_asked_for() {
    let policy = policy("allow ssh(*, *); deny ssh(*, x509{name=\"evil.example.com\"});");
    let from = Party { process: ProcessFact::Known(&process("/usr/bin/ssh")), ..at("10.0.0.9") };
    let to = Party { certificate: CertificateFact::Pending, ..at("10.0.0.1") };
    assert_eq!(policy.evaluate(&out(&from, &to, 22)).verdict, Verdict::Protect);
    let evil = named("evil.example.com");
    let to = Party { certificate: CertificateFact::Shown(&evil), ..to };
    assert_eq!(policy.evaluate(&out(&from, &to, 22)).verdict, Verdict::Refuse);
}

#[test]
fn a_fact_that_cannot_be_established_fails_closed_both_ways() {
    let policy = policy(
        "allow http(*, *); deny *(process{exe=\"/tmp/**\"}, *); deny ssh(*, *);
        allow ntp(process{exe=\"/usr/sbin/ntpd\"}, *); allow smtp(!process{exe=\"/usr/bin/mail\"}, *);",
    );
    let mut facts = process("/usr/bin/curl");
    let to = at("192.0.2.1");
    let from = Party { process: ProcessFact::Known(&facts), ..Party::UNKNOWN };
    assert_eq!(policy.evaluate(&out(&from, &to, 80)).verdict, Verdict::Permit);
    assert_eq!(policy.evaluate(&out(&from, &to, 25)).verdict, Verdict::Permit);
    facts.exe = Fact::Unknown;
    let from = Party { process: ProcessFact::Known(&facts), ..Party::UNKNOWN };
    assert_eq!(policy.evaluate(&out(&from, &to, 80)).rule, Some(RuleId(1)));
    assert_eq!(policy.evaluate(&out(&from, &to, 25)).verdict, Verdict::Refuse);
}

#[test]
fn a_remote_process_is_invisible_and_refuses_nothing() {
    let policy = policy(
        "allow http(*, *); deny *(*, process{exe=\"/tmp/**\"}); deny *(*, !process{user=\"www-data\"});",
    );
    let from = Party { process: ProcessFact::Known(&process("/usr/bin/curl")), ..Party::UNKNOWN };
    assert_eq!(policy.evaluate(&out(&from, &at("192.0.2.1"), 80)).verdict, Verdict::Permit);
    // What listens on a loopback address is of this host, and should be known.
    assert_eq!(policy.evaluate(&out(&from, &at("127.0.0.1"), 80)).verdict, Verdict::Refuse);
    let nginx = process("/usr/sbin/nginx");
    let nginx = ProcessFacts { user: "www-data".to_owned(), ..nginx };
    let to = Party { process: ProcessFact::Known(&nginx), ..at("127.0.0.1") };
    let decision = policy.evaluate(&out(&from, &to, 80));
    assert_eq!(decision.verdict, Verdict::Permit);
}

#[test]
fn a_mapped_address_is_the_ipv4_address_in_it() {
    let policy = policy("allow http(*, IPv4{192.0.2.0/24});");
    let from = Party::UNKNOWN;
    assert_eq!(policy.evaluate(&out(&from, &at("::ffff:192.0.2.7"), 80)).verdict, Verdict::Permit);
    assert_eq!(policy.evaluate(&out(&from, &at("::ffff:192.0.3.7"), 80)).verdict, Verdict::Refuse);
}

#[test]
fn an_expired_rule_has_no_force() {
    let policy = policy("allow http(*, *) expires 2027-01-31;");
    let (from, to) = (Party::UNKNOWN, at("192.0.2.1"));
    let flow = |now| policy.evaluate(&Flow { now, ..out(&from, &to, 80) }).verdict;
    assert_eq!(flow(1_801_439_999), Verdict::Permit);
    assert_eq!(flow(1_801_440_000), Verdict::Refuse);
}

#[test]
fn the_strongest_lane_decides_wherever_it_stands() {
    let policy = policy("allow http(*, *) using plain; allow http(*, *) using tls; allow http(*, *);");
    let (from, to) = (Party::UNKNOWN, at("192.0.2.1"));
    let decision = policy.evaluate(&out(&from, &to, 80));
    assert_eq!(
        (decision.verdict, decision.lane, decision.rule),
        (Verdict::Protect, Lane::Tls, Some(RuleId(1)))
    );
}

#[test]
fn an_audit_deny_lets_go_on_and_says_so() {
    let policy = policy("allow http(*, *); deny http(*, IPv4{192.0.2.0/24}) audit;");
    let (from, to) = (Party::UNKNOWN, at("192.0.2.1"));
    let decision = policy.evaluate(&out(&from, &to, 80));
    assert_eq!((decision.verdict, decision.observe_only), (Verdict::Permit, true));
    assert_eq!((decision.rule, decision.observed), (Some(RuleId(0)), Some(RuleId(1))));
}

#[test]
fn an_audit_allow_lets_go_on_and_says_so() {
    let (from, to) = (Party::UNKNOWN, at("192.0.2.1"));
    let watched = policy("allow http(*, *) audit;").evaluate(&out(&from, &to, 80));
    assert_eq!(
        (watched.verdict, watched.observe_only, watched.observed),
        (Verdict::Permit, true, Some(RuleId(0)))
    );
    let also =
        policy("allow http(*, *) audit; allow http(*, IPv4{192.0.2.1});").evaluate(&out(&from, &to, 80));
    assert_eq!((also.verdict, also.observe_only, also.rule), (Verdict::Permit, false, Some(RuleId(1))));
}

#[test]
fn a_certificate_vouches_for_its_process() {
    let policy = policy("allow ftp(*, x509{name=\"*.example.com\"} & process{exe=\"/usr/sbin/vsftpd\"});");
    let from = Party { process: ProcessFact::Known(&process("/usr/bin/lftp")), ..Party::UNKNOWN };
    let facts = named("h.example.com");
    let verdict = |certificate: CertificateFact<'_>| {
        policy.evaluate(&out(&from, &Party { certificate, ..at("192.0.2.1") }, 21)).verdict
    };
    assert_eq!(verdict(CertificateFact::None), Verdict::Refuse);
    assert_eq!(verdict(CertificateFact::Pending), Verdict::Protect);
    assert_eq!(verdict(CertificateFact::Shown(&facts)), Verdict::Refuse);
    let right = CertificateFacts { exe: Some("/usr/sbin/vsftpd".to_owned()), ..facts.clone() };
    assert_eq!(verdict(CertificateFact::Shown(&right)), Verdict::Permit);
    let wrong = CertificateFacts { exe: Some("/tmp/vsftpd".to_owned()), ..facts.clone() };
    assert_eq!(verdict(CertificateFact::Shown(&wrong)), Verdict::Refuse);
}

#[test]
fn everyone_is_everyone_known_or_not() {
    let policy = policy("allow ssh(*, *);");
    let facts = named("h.example.com");
    let known = Party { certificate: CertificateFact::Shown(&facts), ..at("192.0.2.1") };
    for (from, to) in [(Party::UNKNOWN, Party::UNKNOWN), (known, Party::UNKNOWN), (Party::UNKNOWN, known)] {
        assert_eq!(policy.evaluate(&out(&from, &to, 22)).verdict, Verdict::Permit);
    }
    assert_eq!(policy.evaluate(&out(&known, &known, 23)).verdict, Verdict::Refuse);
}

#[test]
fn the_assurance_is_the_strongest_proof_by_which_the_rule_holds() {
    let from = Party { process: ProcessFact::Known(&process("/usr/bin/ssh")), ..at("127.0.0.1") };
    let facts = named("h.example.com");
    let server = process("/usr/sbin/sshd");
    let shown = Party { certificate: CertificateFact::Shown(&facts), ..at("192.0.2.1") };
    let here = Party { process: ProcessFact::Known(&server), ..at("127.0.0.1") };
    let proven = |to: &str, party: &Party<'_>| {
        let decision = policy(&format!("allow ssh(*, {to});")).evaluate(&out(&from, party, 22));
        (decision.verdict, decision.assurance)
    };
    let permit = |assurance| (Verdict::Permit, assurance);
    assert_eq!(proven("*", &shown), permit(Assurance::None));
    assert_eq!(proven("IPv4{192.0.2.1}", &shown), permit(Assurance::Address));
    assert_eq!(proven("IPv4{192.0.2.1} & x509{name=\"*\"}", &shown), permit(Assurance::Certificate));
    assert_eq!(proven("IPv4{192.0.2.1} | x509{name=\"evil.org\"}", &shown), permit(Assurance::Address));
    assert_eq!(proven("IPv4{127.0.0.1} & process{exe=\"/usr/sbin/sshd\"}", &here), permit(Assurance::Kernel));
    // What holds by itself proves nothing if the alternative that it belongs to does not hold.
    let half = "IPv4{192.0.2.1} | x509{name=\"h.example.com\", group=\"other\"}";
    assert_eq!(proven(half, &shown), permit(Assurance::Address));
}

#[test]
fn a_lane_asks_for_protection_but_within_one_host() {
    let policy = policy("allow ssh(*, *) using tls;");
    let from = Party { process: ProcessFact::Known(&process("/usr/bin/ssh")), ..at("127.0.0.1") };
    let server = process("/usr/sbin/sshd");
    let here = Party { process: ProcessFact::Known(&server), ..at("127.0.0.1") };
    let lane = |party: &Party<'_>| {
        let decision = policy.evaluate(&out(&from, party, 22));
        (decision.verdict, decision.lane)
    };
    assert_eq!(lane(&at("192.0.2.1")), (Verdict::Protect, Lane::Tls));
    assert_eq!(lane(&here), (Verdict::Permit, Lane::Plain));
}

#[test]
fn a_listener_is_open_to_whom_rules_name() {
    let local = Party { process: ProcessFact::Known(&process("/usr/sbin/nginx")), ..at("0.0.0.0") };
    let scope = |text: &str| policy(text).listener(&local, Protocol::TCP, 80, 0);
    assert_eq!(scope("allow http(*, *);"), ListenerScope::Anyone);
    assert_eq!(scope("allow smtp(*, *);"), ListenerScope::Nobody);
    assert_eq!(scope("allow http(*, process{exe=\"/usr/sbin/apache2\"});"), ListenerScope::Nobody);
    let some = |v4: &[&str], certificate, processes| ListenerScope::Addresses {
        v4: v4.iter().map(|n| n.parse().unwrap()).collect(),
        v6: Vec::new(),
        certificate,
        proven_v4: if certificate { vec!["0.0.0.0/0".parse().unwrap()] } else { Vec::new() },
        proven_v6: if certificate { vec!["::/0".parse().unwrap()] } else { Vec::new() },
        processes,
    };
    assert_eq!(scope("allow http(IPv4{10.0.0.0/8}, *);"), some(&["10.0.0.0/8"], false, false));
    assert_eq!(
        scope("allow http(IPv4{10.0.0.0/8}, IPv4{192.0.2.1}); deny http(IPv4{10.128.0.0/9}, *);"),
        some(&["10.0.0.0/9"], false, false)
    );
    assert_eq!(scope("allow http(x509{name=\"*\"}, *);"), some(&[], true, false));
    assert_eq!(scope("allow http(process{user=\"www-data\"}, *);"), some(&[], true, true));
    assert_eq!(scope("allow http(*, *); deny http(*, *);"), ListenerScope::Nobody);
    // Who is denied for want of a certificate may come with one.
    let refusing = "allow http(*, *); allow http(x509{name=\"*\"}, *); deny http(!x509{name=\"*\"}, *);";
    assert_eq!(scope(refusing), some(&[], true, false));
    // From where a certificate could help.
    let near = scope("allow http(x509{name=\"*\"} & IPv4{10.0.0.0/8}, *); deny http(IPv4{10.128.0.0/9}, *);");
    let ListenerScope::Addresses { v4, proven_v4, proven_v6, .. } = near else { panic!("{near:?}") };
    assert_eq!((v4.len(), proven_v6.len()), (0, 0));
    assert_eq!(proven_v4, ["10.0.0.0/9".parse().unwrap()]);
}

#[test]
fn a_process_is_called_by_the_first_set_that_asks_for_something_of_it() {
    let policy = policy(
        "here = IPv4{192.0.2.1};\n\
         web = front;\n\
         front = x509{name=\"*.example.com\"} & process{exe=\"/usr/sbin/nginx\"};\n\
         a = process{exe=\"/usr/sbin/*\"};\n",
    );
    assert_eq!(policy.name_of(&process("/usr/sbin/nginx")), Some("web"));
    assert_eq!(policy.name_of(&process("/usr/sbin/vsftpd")), Some("a"));
    assert_eq!(policy.name_of(&process("/usr/bin/curl")), None);
}
