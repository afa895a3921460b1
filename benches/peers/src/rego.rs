//! Rego: the rules as data, in the index that somebody who knows their shape would write.

use std::collections::BTreeMap;

use regorus::{Engine, Value};
use serde_json::json;

const POLICY: &str = r#"
package site

default allow := false

allow if {
    some group in input.groups
    some rule in data.rules[input.service][group]
    endswith(input.name, rule.end)
    startswith(input.address, rule.net)
}
"#;

/// Microseconds for one decision.
pub fn decision(rules: usize) -> f64 {
    let mut index: BTreeMap<String, BTreeMap<String, Vec<serde_json::Value>>> = BTreeMap::new();
    for n in 0..rules {
        let (group, service, zone, high, low) = crate::rule(n);
        let (end, net) = (format!(".z{zone}.example.com"), format!("10.{high}.{low}."));
        let groups = index.entry(format!("s{service}")).or_default();
        groups.entry(format!("g{group}")).or_default().push(json!({"end": end, "net": net}));
    }
    let mut engine = Engine::new();
    engine.set_rego_v0(false);
    engine
        .add_policy("site.rego".to_owned(), POLICY.replace("package site", "package site\nimport rego.v1"))
        .unwrap();
    engine.add_data_json(&json!({ "rules": index }).to_string()).unwrap();
    // Rule 5 permits it.
    let input = json!({
        "name": "h1.z5.example.com", "groups": ["g5", "staff"], "service": "s5", "address": "10.0.5.9"
    });
    let input = Value::from_json_str(&input.to_string()).unwrap();
    crate::micros(|| {
        engine.set_input(input.clone());
        assert_eq!(engine.eval_rule("data.site.allow".to_owned()).unwrap(), Value::from(true));
    })
}
