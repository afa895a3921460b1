//! Cedar, deciding over rules of the same kind. Optional, as it takes minutes to build.

use std::fmt::Write as _;

/// Microseconds for one decision among so many rules, if Cedar is built in.
#[must_use]
pub fn micros(rules: usize) -> Option<f64> {
    let mut text = String::new();
    for n in 0..rules {
        let (group, service, zone, high, low) = (n % 97, n % 24, n % 13, n / 256 % 256, n % 256);
        let _infallible = writeln!(
            text,
            "permit(principal in Group::\"g{group}\", action == Action::\"s{service}\", resource) when {{
                principal.name like \"*.z{zone}.example.com\"
                    && resource.address.isInRange(ip(\"10.{high}.{low}.0/24\")) }};"
        );
    }
    decide(&text)
}

#[cfg(feature = "peers")]
fn decide(text: &str) -> Option<f64> {
    use cedar_policy::{Authorizer, Context, Entities, PolicySet, Request};
    let policies: PolicySet = text.parse().ok()?;
    let entities = r#"[
        {"uid": {"type": "Host", "id": "h"}, "attrs": {"name": "h1.z3.example.com"},
            "parents": [{"type": "Group", "id": "g5"}, {"type": "Group", "id": "staff"}]},
        {"uid": {"type": "Place", "id": "p"}, "parents": [],
            "attrs": {"address": {"__extn": {"fn": "ip", "arg": "10.0.7.9"}}}}]"#;
    let entities = Entities::from_json_str(entities, None).ok()?;
    let (host, action, place) = (r#"Host::"h""#, r#"Action::"s5""#, r#"Place::"p""#);
    let (host, action, place) = (host.parse().ok()?, action.parse().ok()?, place.parse().ok()?);
    let request = Request::new(host, action, place, Context::empty(), None).ok()?;
    let authorizer = Authorizer::new();
    let turn = |_| {
        let begun = std::time::Instant::now();
        std::hint::black_box(authorizer.is_authorized(&request, &policies, &entities));
        begun.elapsed().as_secs_f64() * 1e6
    };
    Some(crate::median((0..50).map(turn).collect()))
}

#[cfg(not(feature = "peers"))]
const fn decide(_text: &str) -> Option<f64> {
    None
}
