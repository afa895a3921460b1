//! Executables that are links: a process runs a file, and is never called by a link to it.

use std::collections::HashMap;

use crate::{
    diagnostic::{Diagnostic, Diagnostics},
    model::{Atom, Expr, ProcessField},
    parser,
    pattern::{Pattern, Scope},
    policy::Policy,
    source::to_usize,
    syntax::{self, Attribute, Value},
};

/// Most paths that are looked at.
const MOST: usize = 4096;

/// Warns of them; `target` says what a path leads to.
pub(crate) fn links(policy: &Policy, target: impl Fn(&str) -> Option<String>) -> Diagnostics {
    let mut out = Diagnostics::default();
    let mut targets: HashMap<String, Option<String>> = HashMap::new();
    let sets = policy.names.sets.values();
    let exprs = sets.clone().filter_map(|set| Some(&set.value.as_ref()?.expr));
    for expr in exprs.chain(policy.rules.iter().flat_map(|rule| [&rule.from, &rule.to])) {
        expr.atoms(false, &mut |atom, _| {
            let path = executable(atom).filter(|path| !targets.contains_key(path));
            if let Some(path) = path.filter(|_| targets.len() < MOST) {
                let other = target(&path).filter(|found| *found != path);
                targets.insert(path, other);
            }
        });
    }
    targets.retain(|_, other| other.is_some());
    if targets.is_empty() {
        return out;
    }
    sets.for_each(|set| visit(&set.tree, &targets, &mut out));
    let is_link = |atom: &Atom| executable(atom).is_some_and(|path| targets.contains_key(&path));
    let has_link = |expr: &Expr| expr.mentions(is_link);
    for rule in policy.rules.iter().filter(|rule| has_link(&rule.from) || has_link(&rule.to)) {
        let source = policy.sources.get(to_usize(rule.span.file));
        if let Some(parts) = source.and_then(|source| parser::rule_parts(source, rule.span)) {
            parts.ends.iter().for_each(|tree| visit(tree, &targets, &mut out));
        }
    }
    out
}

/// The path that a condition names, if it names one.
fn executable(atom: &Atom) -> Option<String> {
    match atom {
        Atom::Process(ProcessField::Exe | ProcessField::Ancestor, pattern) => {
            String::from_utf8(pattern.literal()?).ok()
        }
        _ => None,
    }
}

fn visit(tree: &syntax::Expr, targets: &HashMap<String, Option<String>>, out: &mut Diagnostics) {
    match tree {
        syntax::Expr::Attributes { process: true, list, .. } => {
            list.iter().for_each(|attribute| warn(attribute, targets, out));
        }
        syntax::Expr::Not(inner, _) => visit(inner, targets, out),
        syntax::Expr::And(list) | syntax::Expr::Or(list) => {
            list.iter().for_each(|tree| visit(tree, targets, out));
        }
        _ => {}
    }
}

fn warn(attribute: &Attribute, targets: &HashMap<String, Option<String>>, out: &mut Diagnostics) {
    let Value::Text(text) = &attribute.value else { return };
    if !matches!(attribute.name.value.as_str(), "exe" | "ancestor") {
        return;
    }
    let pattern = Pattern::new(Scope::Path, &text.value).ok();
    let path = pattern.and_then(|pattern| String::from_utf8(pattern.literal()?).ok());
    if let Some(path) = path
        && let Some(Some(other)) = targets.get(&path)
    {
        let warning = Diagnostic::warning(format!("`{path}` is a link on this host"), text.span);
        out.push(
            warning
                .label(format!("did you mean \"{other}\"?"))
                .help("what runs is a file, so no process is ever called by a link to it"),
        );
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_a_link_on_this_host_is_warned_of() {
        let text = "web = process{exe=\"/bin/link\", user=\"a\"};\n\
                    allow http(web, *) as one;\n\
                    deny ssh(process{ancestor!=\"/bin/link\"}, process{exe=\"/bin/file\"} | process{exe=\"/bin/l*\"});\n";
        let target = |path: &str| match path {
            "/bin/link" => Some("/bin/other".to_owned()),
            "/bin/file" => Some(path.to_owned()),
            other => panic!("`{other}` is no path of an executable"),
        };
        let loaded = crate::load::parse_untested("t.pol", text, None).unwrap().with_links(target);
        assert_eq!(loaded.warnings.len(), 2, "{}", loaded.warnings);
        let said = loaded.warnings.to_string();
        assert!(said.contains("`/bin/link` is a link on this host\n --> t.pol:1:19\n"), "{said}");
        assert!(
            said.contains(" --> t.pol:3:28\n") && said.contains("^^^^^^^^^^^ did you mean \"/bin/other\"?"),
            "{said}"
        );
    }
}
