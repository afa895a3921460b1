//! Cedar: one policy for each rule.

use std::fmt::Write as _;

use cedar_policy::{Authorizer, Context, Decision, Entities, PolicySet, Request};

/// Microseconds for one decision.
pub fn decision(rules: usize) -> f64 {
    let mut text = String::new();
    for n in 0..rules {
        let (group, service, zone, high, low) = crate::rule(n);
        writeln!(
            text,
            "permit(principal in Group::\"g{group}\", action == Action::\"s{service}\", resource) when {{
                principal.name like \"*.z{zone}.example.com\"
                    && resource.address.isInRange(ip(\"10.{high}.{low}.0/24\")) }};"
        )
        .unwrap();
    }
    let policies: PolicySet = text.parse().unwrap();
    // Rule 5 permits it.
    let entities = r#"[
        {"uid": {"type": "Host", "id": "h"}, "attrs": {"name": "h1.z5.example.com"},
            "parents": [{"type": "Group", "id": "g5"}, {"type": "Group", "id": "staff"}]},
        {"uid": {"type": "Place", "id": "p"}, "parents": [],
            "attrs": {"address": {"__extn": {"fn": "ip", "arg": "10.0.5.9"}}}}]"#;
    let entities = Entities::from_json_str(entities, None).unwrap();
    let (host, action, place) = (r#"Host::"h""#, r#"Action::"s5""#, r#"Place::"p""#);
    let (host, action, place) = (host.parse().unwrap(), action.parse().unwrap(), place.parse().unwrap());
    let request = Request::new(host, action, place, Context::empty(), None).unwrap();
    let authorizer = Authorizer::new();
    crate::micros(|| {
        let answer = authorizer.is_authorized(&request, &policies, &entities);
        assert_eq!(answer.decision(), Decision::Allow);
    })
}
