//! `policy fmt`.

use std::{fs, io::Write as _, path::Path};

use clap::Args;
use serde::Serialize;

use super::{FINDINGS, Files, FormatArg};
use crate::{COULD_NOT, output::Out};

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    files: Files,
    /// Change nothing; the exit status is 1 if a file would change
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    format: FormatArg,
}

#[derive(Serialize)]
struct Report<'a> {
    file: &'a str,
    changed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// The worst of the files' statuses. What came from standard input goes to standard output.
pub fn run(arguments: &Arguments, out: &mut Out) -> u8 {
    arguments.files.files.iter().map(|path| one(path, arguments, out)).max().unwrap_or(0)
}

fn one(path: &Path, arguments: &Arguments, out: &mut Out) -> u8 {
    let name = super::name_of(path);
    let result = formatted(path, &name);
    if let (true, false, Ok((_, new))) = (super::is_stdin(path), arguments.check, &result) {
        out.text(new);
        return 0;
    }
    let status = match &result {
        Ok((old, new)) if old == new => Ok(false),
        Ok(_) if arguments.check => Ok(true),
        Ok((_, new)) => write(path, new).map(|()| true).map_err(|e| format!("cannot write `{name}`: {e}\n")),
        Err(text) => Err(text.clone()),
    };
    if arguments.format.is_json() {
        let changed = *status.as_ref().unwrap_or(&false);
        out.json(&Report { file: &name, changed, error: status.as_ref().err().cloned() });
    } else {
        match &status {
            Ok(false) => {}
            Ok(true) if arguments.check => {
                out.line(format!("{}: would change", portcullis_policy::escape(&name)))
            }
            Ok(true) => out.line(format!("{}: formatted", portcullis_policy::escape(&name))),
            Err(text) => out.diagnostic(text),
        }
    }
    match status {
        Ok(true) if arguments.check => FINDINGS,
        Ok(_) => 0,
        Err(_) => COULD_NOT,
    }
}

fn formatted(path: &Path, name: &str) -> Result<(String, String), String> {
    let read = if super::is_stdin(path) {
        portcullis_policy::read_input(name, std::io::stdin())
    } else {
        portcullis_policy::read(path)
    };
    let text = read.map_err(|error| match std::error::Error::source(&error) {
        Some(cause) => format!("portcullis: error: {error}: {cause}\n"),
        None => format!("portcullis: error: {error}\n"),
    })?;
    let new = portcullis_policy::format(name, &text).map_err(|d| d.to_string())?;
    Ok((text, new))
}

/// Replaces the file at once, so that a broker that watches it never reads half of it.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let real = fs::canonicalize(path)?;
    let mut beside = real.clone().into_os_string();
    beside.push(format!(".{}.new", std::process::id()));
    let permissions = fs::metadata(&real)?.permissions();
    let done = (|| {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.set_permissions(permissions)?;
        file.sync_all()?;
        fs::rename(&beside, &real)
    })();
    if done.is_err() {
        let _best_effort = fs::remove_file(&beside);
    }
    done
}
