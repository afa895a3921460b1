//! From what is known of one call to what becomes of it. Pure: equal arguments give equal answers.
//!
//! It does not matter how the question arrived (shim, later the guard), nor what is done about the
//! answer; see the modules of [`crate::broker`] for both.

use std::net::IpAddr;

use ipnet::IpNet;
use portcullis_policy::{
    CertificateFact, CertificateFacts, Decision, Effect, Flow, Party, Policy, ProcessFact, ProcessFacts,
    Region, Side,
};
use portcullis_types::{Assurance, Lane, Op, Protocol, RuleId, Verdict};

/// The process at the far end, if that is on this host.
#[derive(Clone, Copy, Debug)]
pub enum FarProcess<'a> {
    /// A wrapped process, and the certificate that this host would give it, if it has keys. Nothing is encrypted
    /// between two processes of one host, and the one broker knows both ends better than a handshake could tell it.
    Known(&'a ProcessFacts, Option<&'a CertificateFacts>),
    /// Another, by the user its socket belongs to.
    User {
        /// Numeric.
        uid: u32,
        /// Name.
        name: &'a str,
    },
}

impl<'a> FarProcess<'a> {
    const fn facts(self) -> (ProcessFact<'a>, CertificateFact<'a>) {
        match self {
            Self::Known(facts, Some(certificate)) => {
                (ProcessFact::Known(facts), CertificateFact::Shown(certificate))
            }
            Self::Known(facts, None) => (ProcessFact::Known(facts), CertificateFact::None),
            Self::User { uid, name } => (ProcessFact::UserOnly { uid, user: name }, CertificateFact::None),
        }
    }
}

/// The far end.
#[derive(Clone, Copy, Debug)]
pub enum Far<'a> {
    /// On another host (or in another network namespace).
    Remote,
    /// On this host: whoever holds the socket there; nobody, if there is none.
    Local(&'a [FarProcess<'a>]),
}

/// What is known of certificates at the two ends.
#[derive(Clone, Copy, Debug)]
pub struct Papers<'a> {
    /// This host's, with the judged process in it; `None` if the host has no keys.
    pub mine: Option<&'a CertificateFacts>,
    /// What the far end has shown.
    pub shown: Option<&'a CertificateFacts>,
    /// The far address is a member's of the trust domain: flows with it are protected.
    pub member: bool,
}

impl<'a> Papers<'a> {
    /// A host without keys.
    pub const NONE: Self = Self { mine: None, shown: None, member: false };

    const fn near(&self) -> CertificateFact<'a> {
        match self.mine {
            Some(facts) => CertificateFact::Shown(facts),
            None => CertificateFact::None,
        }
    }
}

/// One flow to judge.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The judged process opens the flow.
    pub outbound: bool,
    /// Protocol.
    pub protocol: Protocol,
    /// Service port: the remote one if outbound, else the local one; 0 without ports.
    pub port: u16,
    /// Seconds since the epoch.
    pub now: u64,
    /// The judged process.
    pub me: &'a ProcessFacts,
    /// Its address on this flow, if known.
    pub near: Option<IpAddr>,
    /// The far address.
    pub far_addr: Option<IpAddr>,
    /// The far end.
    pub far: Far<'a>,
    /// Certificates.
    pub papers: Papers<'a>,
}

/// What becomes of it.
#[derive(Clone, Debug)]
pub struct Judgement {
    /// It may go on.
    pub permitted: bool,
    /// What the policy said.
    pub verdict: Verdict,
    /// The rule that decided.
    pub rule: Option<RuleId>,
    /// The layer whose policy decided; 0 is the policy that is in force for all.
    pub layer: u8,
    /// How it travels.
    pub lane: Lane,
    /// What proves the far side.
    pub assurance: Assurance,
    /// It opens related channels.
    pub related: bool,
    /// A `deny` decided, which nothing overrules.
    pub denied: bool,
    /// Permitted, but to be recorded as would-refuse because of this rule.
    pub observed: Option<RuleId>,
    /// Why it is refused, in plain words.
    pub reason: Option<String>,
    /// How far around the same holds. `None` if it must be asked again each time.
    pub region: Option<Region>,
}

impl Judgement {
    /// A refusal for a reason outside the policy.
    #[must_use]
    pub fn refusal(reason: impl Into<String>) -> Self {
        Self {
            permitted: false,
            verdict: Verdict::Refuse,
            rule: None,
            layer: 0,
            lane: Lane::Plain,
            assurance: Assurance::None,
            related: false,
            denied: false,
            observed: None,
            reason: Some(reason.into()),
            region: None,
        }
    }
}

/// What the program gets to see for a refused call.
///
/// `EACCES` where Linux gives it for a local firewall's sake (connect(2): "connection request failed
/// because of a local firewall rule"), `EPERM` where netfilter does (send(2)) or where privilege is
/// missing (socket(2)), `ECONNABORTED` for a flow that ended before it could be accepted (accept(2)).
#[must_use]
pub const fn errno(op: Op) -> i32 {
    match op {
        Op::Connect | Op::Bind | Op::Listen => libc::EACCES,
        Op::Accept => libc::ECONNABORTED,
        Op::Send | Op::Receive | Op::Socket => libc::EPERM,
    }
}

/// Judges one flow.
#[must_use]
pub fn judge(policy: &Policy, question: &Question<'_>) -> Judgement {
    match question.far {
        Far::Remote => remote(policy, question),
        Far::Local([]) => settle(
            policy,
            question,
            local(policy, question, ProcessFact::Unknown, CertificateFact::None),
            false,
        ),
        Far::Local(holders) => {
            // Whoever of them takes the flow: one that is denied spoils it for all, since the kernel
            // chooses; one that is permitted suffices, since accept is judged again.
            let mut best: Option<Judgement> = None;
            for holder in holders {
                let (process, certificate) = holder.facts();
                let user_only = matches!(holder, FarProcess::User { .. });
                let one = settle(policy, question, local(policy, question, process, certificate), user_only);
                if one.denied {
                    return one;
                }
                if best.as_ref().is_none_or(|b| !b.permitted && one.permitted) {
                    best = Some(one);
                }
            }
            best.unwrap_or_else(|| Judgement::refusal("nobody is there"))
        }
    }
}

fn flow<'a>(question: &Question<'a>, near: &'a Party<'a>, far: &'a Party<'a>) -> Flow<'a> {
    let (from, to, side) = if question.outbound { (near, far, Side::To) } else { (far, near, Side::From) };
    Flow { from, to, protocol: question.protocol, port: question.port, now: question.now, far: side }
}

fn near<'a>(question: &Question<'a>) -> Party<'a> {
    Party {
        addr: question.near,
        process: ProcessFact::Known(question.me),
        certificate: question.papers.near(),
    }
}

fn local(
    policy: &Policy,
    question: &Question<'_>,
    process: ProcessFact<'_>,
    certificate: CertificateFact<'_>,
) -> Decision {
    let (near, far) = (near(question), Party { addr: question.far_addr, process, certificate });
    policy.evaluate(&flow(question, &near, &far))
}

fn remote(policy: &Policy, question: &Question<'_>) -> Judgement {
    let near = near(question);
    let far = |certificate| Party { addr: question.far_addr, process: ProcessFact::Unknown, certificate };
    if let Some(facts) = question.papers.shown {
        let shown = far(CertificateFact::Shown(facts));
        return settle(policy, question, policy.evaluate(&flow(question, &near, &shown)), false);
    }
    let pending = far(CertificateFact::Pending);
    let tcp = question.protocol == Protocol::TCP;
    if tcp && question.papers.member {
        let asked = policy.evaluate(&flow(question, &near, &pending));
        let in_plain = asked.rule.and_then(|id| policy.get(id)).is_some_and(|r| r.lane == Some(Lane::Plain));
        if asked.permits() && !in_plain {
            return protect(question, &asked);
        }
    }
    let plain = far(CertificateFact::None);
    let (decision, region) = policy.evaluate_region(&flow(question, &near, &plain));
    if tcp && decision.verdict == Verdict::Protect {
        return protect(question, &decision);
    }
    let mut judgement = settle(policy, question, decision, false);
    if judgement.permitted
        && !judgement.related
        && judgement.observed.is_none()
        && question.far_addr.is_some()
    {
        judgement.region = Some(region);
    }
    if !judgement.permitted && judgement.rule.is_none() && tcp {
        let asked = policy.evaluate(&flow(question, &near, &pending));
        if asked.verdict == Verdict::Protect {
            return protect(question, &asked);
        }
    }
    judgement
}

/// The flow may go on once the far end has proved itself, and is then judged by what it has shown.
fn protect(question: &Question<'_>, decision: &Decision) -> Judgement {
    let lane = if decision.lane == Lane::Plain { Lane::Tls } else { decision.lane };
    let reason = match (lane, question.papers.mine) {
        (Lane::Tls, Some(_)) => None,
        (Lane::Tls, None) => Some(
            "needs certificate; lane tls not available: no keys of this host are in use (see `portcullis ca host`)",
        ),
        _ => Some("needs certificate, by a lane that is not there yet: plain and tls are"),
    };
    Judgement {
        permitted: reason.is_none(),
        verdict: Verdict::Protect,
        rule: decision.rule,
        layer: 0,
        lane,
        assurance: Assurance::Certificate,
        related: decision.related,
        denied: false,
        observed: decision.observed.filter(|_| decision.observe_only),
        reason: reason.map(str::to_owned),
        region: None,
    }
}

fn settle(policy: &Policy, question: &Question<'_>, decision: Decision, user_only: bool) -> Judgement {
    let by_rule = decision.rule.and_then(|id| policy.get(id));
    let denied = decision.verdict == Verdict::Refuse && by_rule.is_some_and(|r| r.effect == Effect::Deny);
    let far = if question.outbound { "to" } else { "from" };
    let here = matches!(question.far, Far::Local(_));
    let certified = here && decision.assurance == Assurance::Certificate;
    let reason = match decision.verdict {
        Verdict::Permit if certified => {
            Some("by the certificate that this host gives its process at the far end".to_owned())
        }
        Verdict::Permit => None,
        Verdict::Protect => Some(format!("needs certificate; lane {} not available", decision.lane)),
        Verdict::Refuse if denied => Some("a rule denies it".to_owned()),
        Verdict::Refuse if user_only => Some(format!(
            "no rule permits it {far} a process of this host that is not wrapped, so that only its user is known"
        )),
        Verdict::Refuse => Some(match question.far {
            Far::Local(&[]) if question.outbound => {
                "no rule permits it, and nobody listens there".to_owned()
            }
            Far::Local(&[]) => {
                "no rule permits it; which process of this host it came from is not known, as that has closed already"
                    .to_owned()
            }
            _ => "no rule permits it".to_owned(),
        }),
    };
    // On lanes other than plain a permit is one without a handshake, unless one has been.
    let shown = question.papers.shown.is_some();
    let lane = match decision.lane {
        _ if here => Lane::Plain,
        Lane::Plain if shown => Lane::Tls,
        lane => lane,
    };
    let can = lane == Lane::Plain || (shown && lane == Lane::Tls);
    let permitted = decision.verdict == Verdict::Permit && can;
    let reason = if decision.verdict == Verdict::Permit && !can {
        Some(format!("lane {lane} not available"))
    } else {
        reason
    };
    Judgement {
        permitted,
        verdict: decision.verdict,
        rule: decision.rule,
        layer: 0,
        lane,
        assurance: match decision.assurance {
            _ if shown => Assurance::Certificate,
            Assurance::Certificate if here => Assurance::Kernel,
            assurance => assurance,
        },
        related: decision.related,
        denied,
        observed: decision.observed.filter(|_| decision.observe_only),
        reason,
        region: None,
    }
}

/// The smallest rule that would permit exactly this flow, if one can.
#[must_use]
pub fn suggest(policy: &Policy, question: &Question<'_>) -> Option<String> {
    let near = near(question);
    let shown = question.papers.shown.map_or(CertificateFact::None, CertificateFact::Shown);
    let (process, certificate) = match question.far {
        Far::Local([first, ..]) => first.facts(),
        Far::Local([]) | Far::Remote => (ProcessFact::Unknown, shown),
    };
    let far = Party { addr: question.far_addr, process, certificate };
    policy.explain(&flow(question, &near, &far)).permit_with
}

/// What is left of `region` around `far` when `holes` are not to be in it, as a prefix length over
/// 128-bit addresses in which IPv4 is mapped ([`portcullis_wire::Addr::key`]). `None`: nothing, `far` is in
/// a hole itself.
///
/// A prefix that must shrink does so in steps of four, so that tables hold few distinct lengths.
#[must_use]
pub fn around(region: &Region, far: IpAddr, holes: impl IntoIterator<Item = IpNet>) -> Option<u8> {
    let far = far.to_canonical();
    let mut length = match region.prefix {
        IpNet::V4(net) => 96 + net.prefix_len(),
        IpNet::V6(net) => net.prefix_len(),
    };
    let mapped = IpNet::V6(ipnet::Ipv6Net::new_assert(std::net::Ipv4Addr::UNSPECIFIED.to_ipv6_mapped(), 96));
    let mapped = far.is_ipv6().then_some(mapped);
    for hole in holes.into_iter().chain(mapped) {
        let (at, bits) = match hole {
            IpNet::V4(net) => (key(IpAddr::V4(net.network())), 96 + net.prefix_len()),
            IpNet::V6(net) => (key(IpAddr::V6(net.network())), net.prefix_len()),
        };
        let common = u8::try_from((key(far) ^ at).leading_zeros()).unwrap_or(128);
        if common >= bits {
            return None;
        }
        if common >= length {
            length = (common + 1).next_multiple_of(4).min(128);
        }
    }
    Some(length)
}

fn key(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use portcullis_policy::Fact;

    use super::*;

    fn process(exe: &str, user: &str) -> ProcessFacts {
        ProcessFacts {
            exe: Fact::Known(exe.to_owned()),
            sha256: Fact::Unknown,
            uid: 33,
            user: user.to_owned(),
            groups: vec![],
            unit: None,
            cmdline: String::new(),
            ancestors: vec![],
        }
    }

    fn policy(text: &str) -> Policy {
        Policy::parse("t.pol", text).unwrap().policy
    }

    fn ask<'a>(me: &'a ProcessFacts, outbound: bool, far: &str, port: u16, end: Far<'a>) -> Question<'a> {
        Question {
            outbound,
            protocol: Protocol::TCP,
            port,
            now: 0,
            me,
            near: None,
            far_addr: Some(far.parse().unwrap()),
            far: end,
            papers: Papers::NONE,
        }
    }

    #[test]
    fn only_the_named_process_reaches_a_local_service() {
        let policy = policy(
            "allow tcp/6379(process{exe=\"/usr/sbin/nginx\", user=\"www-data\"}, process{exe=\"/usr/bin/redis-server\"});",
        );
        let (nginx, root) = (process("/usr/sbin/nginx", "www-data"), process("/usr/sbin/nginx", "root"));
        let redis = process("/usr/bin/redis-server", "redis");
        let there = [FarProcess::Known(&redis, None)];
        let out = |me, end| judge(&policy, &ask(me, true, "127.0.0.1", 6379, end));
        let good = out(&nginx, Far::Local(&there));
        assert!(good.permitted && good.region.is_none());
        assert_eq!(good.assurance, Assurance::Kernel);
        assert!(!out(&root, Far::Local(&there)).permitted);
        assert!(!out(&nginx, Far::Local(&[])).permitted);
        let user = [FarProcess::User { uid: 33, name: "redis" }];
        let refused = out(&nginx, Far::Local(&user));
        assert!(!refused.permitted && refused.reason.unwrap().contains("not wrapped"));
        let from = [FarProcess::Known(&nginx, None)];
        assert!(judge(&policy, &ask(&redis, false, "127.0.0.1", 6379, Far::Local(&from))).permitted);
    }

    #[test]
    fn of_several_holders_one_permitted_suffices_and_one_denied_spoils_it() {
        let policy =
            policy("allow tcp/80(*, process{user=\"www-data\"}); deny tcp/80(*, process{exe=\"/tmp/**\"});");
        let me = process("/usr/bin/curl", "u");
        let (master, worker) = (process("/usr/sbin/nginx", "root"), process("/usr/sbin/nginx", "www-data"));
        let evil = process("/tmp/x", "root");
        let (m, w, e) = (
            FarProcess::Known(&master, None),
            FarProcess::Known(&worker, None),
            FarProcess::Known(&evil, None),
        );
        let out = |holders: &[_]| judge(&policy, &ask(&me, true, "127.0.0.1", 80, Far::Local(holders)));
        assert!(out(&[m, w]).permitted);
        assert!(!out(&[m]).permitted);
        assert!(out(&[w, e]).denied);
    }

    #[test]
    fn a_process_of_this_host_is_who_the_host_would_certify() {
        let policy = policy(
            "allow tcp/80(*, x509{name=\"*.example.com\"}) using tls; deny tcp/80(*, x509{ver<5});\
             allow tcp/81(x509{name=\"*.example.com\"}, *);",
        );
        let (me, there) = (process("/usr/bin/curl", "u"), process("/usr/sbin/nginx", "www-data"));
        let names = vec!["a.example.com".to_owned()];
        let certificate =
            |ver| CertificateFacts { names: names.clone(), ver: Some(ver), ..Default::default() };
        let (new, old) = (certificate(5), certificate(4));
        let to = |certificate| {
            let far = [FarProcess::Known(&there, certificate)];
            judge(&policy, &ask(&me, true, "127.0.0.1", 80, Far::Local(&far)))
        };
        let good = to(Some(&new));
        assert!(good.permitted && good.reason.unwrap().contains("certificate"));
        assert_eq!((good.lane, good.assurance), (Lane::Plain, Assurance::Kernel));
        assert!(!to(None).permitted, "a host without keys certifies nobody");
        assert!(to(Some(&old)).denied);
        let from = [FarProcess::Known(&there, Some(&new))];
        assert!(judge(&policy, &ask(&me, false, "127.0.0.1", 81, Far::Local(&from))).permitted);
        let unwrapped = [FarProcess::User { uid: 33, name: "u" }];
        assert!(!judge(&policy, &ask(&me, false, "127.0.0.1", 81, Far::Local(&unwrapped))).permitted);
    }

    #[test]
    fn who_needs_a_certificate_is_told_so() {
        let policy = policy("allow tcp/80(*, x509{name=\"*.example.com\"}); allow tcp/81(*, *) using tls;");
        let me = process("/usr/bin/curl", "u");
        for port in [80, 81] {
            let refused = judge(&policy, &ask(&me, true, "192.0.2.1", port, Far::Remote));
            assert!(!refused.permitted && refused.rule.is_some(), "{port}");
            assert!(refused.reason.unwrap().contains("lane tls not available"));
        }
    }

    #[test]
    fn between_members_all_is_protected_unless_the_rule_says_plain() {
        let policy = policy(
            "allow tcp/80(*, *); allow tcp/81(*, *) using plain; allow tcp/82(*, x509{ver>5}) related;\
             allow tcp/83(*, x509{name=\"*.example.com\"}) using ipsec;",
        );
        let me = process("/usr/bin/curl", "u");
        let own = CertificateFacts { names: vec!["a.example.com".to_owned()], ..CertificateFacts::default() };
        let with = |port, member, shown| {
            let papers = Papers { mine: Some(&own), shown, member };
            judge(&policy, &Question { papers, ..ask(&me, true, "192.0.2.1", port, Far::Remote) })
        };
        let lane = |port, member| {
            let it = with(port, member, None);
            (it.permitted, it.verdict, it.lane)
        };
        assert_eq!(lane(80, true), (true, Verdict::Protect, Lane::Tls));
        assert_eq!(lane(80, false), (true, Verdict::Permit, Lane::Plain));
        assert_eq!(lane(81, true), (true, Verdict::Permit, Lane::Plain));
        assert_eq!(lane(82, false), (true, Verdict::Protect, Lane::Tls));
        assert!(!lane(83, true).0, "a lane that is not there is a refusal");
        assert!(!lane(84, true).0);
        // And again, by what was shown.
        let old = CertificateFacts { ver: Some(5), ..own.clone() };
        let new = CertificateFacts { ver: Some(6), ..own.clone() };
        assert!(!with(82, true, Some(&old)).permitted);
        let admitted = with(82, true, Some(&new));
        assert!(admitted.permitted && admitted.related);
        assert_eq!((admitted.lane, admitted.assurance), (Lane::Tls, Assurance::Certificate));
        assert!(with(80, true, Some(&old)).permitted);
    }

    #[test]
    fn regions_keep_clear_of_holes() {
        let region = Region { prefix: "0.0.0.0/0".parse().unwrap(), ports: 1..=9 };
        let holes = || ["127.0.0.0/8", "10.0.0.1/32"].map(|n| n.parse::<IpNet>().unwrap());
        for far in ["10.0.0.2", "10.0.0.0", "10.0.1.1", "126.0.0.1", "192.0.2.1", "128.0.0.1"] {
            let far: IpAddr = far.parse().unwrap();
            let length = around(&region, far, holes()).unwrap();
            let IpAddr::V4(v4) = far else { unreachable!() };
            let net = ipnet::Ipv4Net::new(v4, length - 96).unwrap().trunc();
            assert!(
                holes().iter().all(|h| !h.contains(&IpNet::V4(net)) && !IpNet::V4(net).contains(h)),
                "{net}"
            );
        }
        assert_eq!(around(&region, "127.0.0.9".parse().unwrap(), holes()), None);
        let all = Region { prefix: "::/0".parse().unwrap(), ports: 1..=9 };
        let length = around(&all, "2001:db8::1".parse().unwrap(), []).unwrap();
        assert!(length > 0, "IPv4 is not in it");
    }
}
