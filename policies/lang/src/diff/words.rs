//! Regions and flows in the language's words.

use std::sync::Arc;

use portcullis_types::Protocol;

use super::{Atoms, Form, pieces, service_ranges};
use crate::{
    check::Example,
    display,
    model::Expr,
    services::{Ports, Service},
    source::to_usize,
};

/// The inverse of [`service_ranges`].
pub(super) fn service_text(ranges: &[(u32, u32)]) -> String {
    let all = Service { any: true, ports: Vec::new() };
    if *ranges == service_ranges(&all) {
        return "*".to_owned();
    }
    let others = pieces::minus(&service_ranges(&all), ranges);
    if others.len() * 4 < ranges.len() {
        return format!("* except {}", service_list(&others));
    }
    service_list(ranges)
}

fn service_list(ranges: &[(u32, u32)]) -> String {
    let mut ports = Vec::new();
    for (low, high) in ranges {
        for protocol in (low >> 16)..=(high >> 16) {
            let Ok(number) = u8::try_from(protocol) else { continue };
            let protocol = Protocol(number);
            let base = u32::from(number) << 16;
            let (from, to) = ((*low).max(base) - base, (*high).min(base | 0xffff) - base);
            let (Ok(low), Ok(high)) = (u16::try_from(from), u16::try_from(to)) else { continue };
            let (low, high) = if protocol.has_ports() { (low, high) } else { (0, u16::MAX) };
            ports.push(Ports { protocol, low, high });
        }
    }
    display::service(&Service { any: false, ports })
}

impl Atoms {
    /// A formula as policy text.
    pub(super) fn text(&self, form: &Form) -> String {
        display::expr(&self.expr(form))
    }

    pub(super) fn expr(&self, form: &Form) -> Expr {
        match form {
            Form::Any => Expr::Any,
            Form::Nothing => Expr::Nothing,
            Form::Atom(n) => self.all.get(to_usize(*n)).map_or(Expr::Nothing, |a| Expr::Atom(Arc::clone(a))),
            Form::Not(inner) => crate::check::not(self.expr(inner)),
            Form::And(list) => crate::check::and(list.iter().map(|f| self.expr(f)).collect()),
            Form::Or(list) => crate::check::or(list.iter().map(|f| self.expr(f)).collect()),
        }
    }
}

pub(super) fn example_service(protocol: Protocol, port: u16) -> String {
    let name = crate::services::protocol_name(protocol);
    if protocol.has_ports() { format!("{name}/{port}") } else { name }
}

/// A party as `policy explain` takes it.
pub(super) fn example_text(example: &Example) -> String {
    let mut parts = Vec::new();
    let text = |name: &str, text: &str| format!("{name}={}", display::quoted(text));
    if let Some(facts) = &example.certificate {
        let mut list: Vec<String> = facts.names.iter().map(|n| text("name", n)).collect();
        list.extend(facts.groups.iter().map(|g| text("group", g)));
        list.extend(facts.ver.map(|v| format!("ver={v}")));
        let others = [
            ("org", &facts.org),
            ("process", &facts.process),
            ("unit", &facts.unit),
            ("user", &facts.user),
            ("issuer", &facts.issuer),
        ];
        list.extend(others.into_iter().filter_map(|(name, value)| value.as_ref().map(|v| text(name, v))));
        parts.push(format!("x509{{{}}}", list.join(", ")));
    }
    if example.has_process {
        let facts = &example.process;
        let mut list = Vec::new();
        if let crate::facts::Fact::Known(exe) = &facts.exe {
            list.push(text("exe", exe));
        }
        if let crate::facts::Fact::Known(sha256) = &facts.sha256
            && *sha256 != [0; 32]
        {
            list.push(format!("sha256=\"{}\"", display::hex(sha256)));
        }
        if !facts.user.is_empty() {
            list.push(text("user", &facts.user));
        }
        if facts.uid != u32::MAX && facts.user.parse() != Ok(facts.uid) {
            list.push(format!("user=\"{}\"", facts.uid));
        }
        list.extend(facts.groups.iter().map(|g| text("group", g)));
        list.extend(facts.unit.as_ref().map(|u| text("unit", u)));
        if !facts.cmdline.is_empty() {
            list.push(text("cmdline", &facts.cmdline));
        }
        for ancestor in &facts.ancestors {
            if let crate::facts::Fact::Known(path) = ancestor {
                list.push(text("ancestor", path));
            }
        }
        parts.push(format!("process{{{}}}", list.join(", ")));
    }
    parts.extend(example.address.map(display::address));
    if parts.is_empty() { "*".to_owned() } else { parts.join(" & ") }
}
