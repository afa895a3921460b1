//! `policy check`.

use clap::Args;
use portcullis_policy::{DiagnosticData, Diagnostics, LoadError};
use serde::Serialize;

use super::{FINDINGS, Files, FormatArg};
use crate::{COULD_NOT, output::Out};

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    files: Files,
    /// Warnings alone make the exit status 1
    #[arg(long)]
    deny_warnings: bool,
    #[command(flatten)]
    format: FormatArg,
}

#[derive(Serialize)]
struct Report<'a> {
    file: String,
    ok: bool,
    rules: usize,
    diagnostics: Vec<DiagnosticData<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// The worst of the files' statuses.
pub fn run(arguments: &Arguments, out: &mut Out) -> u8 {
    let check = |path: &std::path::PathBuf| one(path, arguments, out);
    arguments.files.files.iter().map(check).max().unwrap_or(0)
}

fn one(path: &std::path::Path, arguments: &Arguments, out: &mut Out) -> u8 {
    let name = super::name_of(path);
    match super::load_any(path) {
        Ok(loaded) => {
            let loaded = loaded.with_links(target);
            let rules = loaded.policy.rules().count();
            show(&name, Some(rules), &loaded.warnings, arguments, out);
            if arguments.deny_warnings && !loaded.warnings.is_empty() { FINDINGS } else { 0 }
        }
        Err(LoadError::Policy(errors)) => {
            show(&name, None, &errors, arguments, out);
            FINDINGS
        }
        Err(error) => {
            if arguments.format.is_json() {
                let error = Some(full(&error));
                out.json(&Report { file: name, ok: false, rules: 0, diagnostics: Vec::new(), error });
            } else {
                out.error(&error);
            }
            COULD_NOT
        }
    }
}

/// What a path on this host leads to.
fn target(path: &str) -> Option<String> {
    std::fs::canonicalize(path).ok()?.into_os_string().into_string().ok()
}

fn full(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

fn show(name: &str, rules: Option<usize>, found: &Diagnostics, arguments: &Arguments, out: &mut Out) {
    if arguments.format.is_json() {
        let report = Report {
            file: name.to_owned(),
            ok: rules.is_some(),
            rules: rules.unwrap_or(0),
            diagnostics: found.to_data(),
            error: None,
        };
        out.json(&report);
        return;
    }
    if !found.is_empty() {
        out.findings(found);
    }
    let name = portcullis_policy::escape(name);
    let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    match rules {
        Some(0) if found.is_empty() => out.line(format!("{name}: no rules, so everything is refused")),
        Some(rules) if found.is_empty() => {
            out.line(format!("{name}: {}, nothing to say", count(rules, "rule")))
        }
        Some(rules) => {
            out.line(format!("{name}: {}, {}", count(rules, "rule"), count(found.len(), "warning")))
        }
        None => out.line(format!("{name}: {}", count(found.len(), "finding"))),
    }
}
