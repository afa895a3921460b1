//! `policy query`.

use std::path::PathBuf;

use clap::Args;
use portcullis_policy::{Policy, Question, Reach, Rule, escape};
use serde::Serialize;

use super::{FINDINGS, FormatArg, RuleData, cite};
use crate::{COULD_NOT, output::Out};

const EXAMPLES: &str = r#"Who can reach smtp on h1?      --to 'x509{name="h1.example.com"}' --service smtp
What may this process reach?   --from 'process{exe="/usr/bin/curl"}'
Which rules mention 10.1.2.3?  --mentions 10.1.2.3"#;

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Policy file; `-` is standard input
    file: PathBuf,
    /// Who opens, and what it does not say is not so; without it, everyone who may is listed
    #[arg(long, value_name = "PRINCIPAL")]
    from: Option<String>,
    /// Who accepts, likewise; without it, everyone who may be reached is listed
    #[arg(long, value_name = "PRINCIPAL")]
    to: Option<String>,
    /// What for
    #[arg(long, value_name = "SERVICE")]
    service: Option<String>,
    /// List the rules that name a set, a service, a text or an address, be it through other sets
    #[arg(long, value_name = "WORD", conflicts_with_all = ["from", "to", "service"])]
    mentions: Option<String>,
    #[command(flatten)]
    format: FormatArg,
}

#[derive(Serialize)]
struct Line<'a> {
    service: &'a str,
    from: &'a str,
    to: &'a str,
    rule: RuleData<'a>,
    except: Vec<RuleData<'a>>,
}

/// 0 if there is an answer, 1 if nothing is found, 2 could not.
pub fn run(arguments: &Arguments, out: &mut Out) -> u8 {
    let policy = match super::load(&arguments.file, out) {
        Ok(loaded) => loaded.policy,
        Err(status) => return status,
    };
    if let Some(word) = &arguments.mentions {
        let found = policy.mentions(word);
        for (id, rule) in found.iter().filter_map(|id| Some((*id, policy.get(*id)?))) {
            if arguments.format.is_json() {
                out.json(&RuleData::new(id, rule));
            } else {
                out.line(cite(rule));
            }
        }
        return answered(!found.is_empty(), "no rule names that", arguments, out);
    }
    let question = Question {
        from: arguments.from.as_deref(),
        to: arguments.to.as_deref(),
        service: arguments.service.as_deref(),
    };
    match policy.reach(&question, super::now()) {
        Ok(found) => {
            for reach in &found {
                show(&policy, reach, arguments, out);
            }
            let nothing = "no rule permits that; what --from and --to do not say of a party is not so";
            answered(!found.is_empty(), nothing, arguments, out)
        }
        Err(errors) => {
            out.diagnostics(&errors);
            COULD_NOT
        }
    }
}

/// The exit status; people are told that there is nothing, rather than shown nothing.
fn answered(found: bool, nothing: &str, arguments: &Arguments, out: &mut Out) -> u8 {
    if found {
        return 0;
    }
    if !arguments.format.is_json() {
        out.note(nothing);
    }
    FINDINGS
}

fn show(policy: &Policy, reach: &Reach, arguments: &Arguments, out: &mut Out) {
    let Some(rule) = policy.get(reach.rule) else { return };
    let except: Vec<(_, &Rule)> =
        reach.except.iter().filter_map(|id| Some((*id, policy.get(*id)?))).collect();
    if arguments.format.is_json() {
        out.json(&Line {
            service: &reach.service,
            from: &reach.from,
            to: &reach.to,
            rule: RuleData::new(reach.rule, rule),
            except: except.iter().map(|(id, rule)| RuleData::new(*id, rule)).collect(),
        });
        return;
    }
    out.line(format!("{}({}, {})", escape(&reach.service), escape(&reach.from), escape(&reach.to)));
    out.line(format!("  by     {}", cite(rule)));
    for (_, deny) in except {
        out.line(format!("  except {}", cite(deny)));
    }
}
