//! Every error and warning is shown: by a file of the corpus, by a test, or here.
#![allow(
    clippy::unwrap_used,
    clippy::string_slice,
    clippy::indexing_slicing,
    reason = "a test that cannot go on has failed"
)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use portcullis_policy::Policy;

/// All files below a folder whose names end so.
fn files(folder: &Path, end: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let here = files.into_iter().filter(|path| path.to_str().unwrap().ends_with(end));
    here.chain(folders.iter().flat_map(|folder| self::files(folder, end))).collect()
}

fn texts(folder: &Path, end: &str) -> String {
    files(folder, end).iter().map(|path| fs::read_to_string(path).unwrap()).collect()
}

/// The messages in a source text: of each its longest piece that is the same every time.
fn messages(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    for call in
        ["Diagnostic::error(", "Diagnostic::warning(", "let message = ", "let mut message = ", "refuse("]
    {
        for after in source.split(call).skip(1) {
            let after = after.trim_start().trim_start_matches("format!(").trim_start();
            let Some(literal) = after.strip_prefix('"') else { continue };
            let end =
                literal.find("\",").into_iter().chain(literal.find("\")")).chain(literal.find("\".")).min();
            let text =
                literal[..end.unwrap()].replace("{{", "\u{1}").replace("}}", "\u{2}").replace("\\\\", "\\");
            let pieces = text.split('{').map(|piece| piece.split_once('}').map_or(piece, |(_, rest)| rest));
            let longest = pieces.max_by_key(|piece| piece.len()).unwrap();
            found.push(longest.replace('\u{1}', "{").replace('\u{2}', "}").trim().to_owned());
        }
    }
    found
}

#[test]
fn every_message_is_shown_by_something() {
    let lang = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut shown = texts(&lang.join("../corpus"), ".txt") + &texts(&lang.join("tests"), "hostile.rs");
    let mut all = Vec::new();
    for path in files(&lang.join("src"), ".rs") {
        let source = fs::read_to_string(path).unwrap();
        let (code, tests) = source.split_once("#[cfg(test)]\nmod ").unwrap_or((&source, ""));
        all.extend(messages(code));
        shown += tests;
    }
    shown += &Policy::parse("t.pol", "include \"other.pol\";").unwrap_err().to_string();
    shown += &Policy::parse("t.pol", &"a ".repeat(4 << 20)).unwrap_err().to_string();
    shown += &Policy::parse("t.pol", &" ".repeat((32 << 20) + 1)).unwrap_err().to_string();
    let policy = Policy::parse("t.pol", "allow ssh(*, *);").unwrap().policy;
    shown += &policy.explain_words("*", "*", "related", 0).unwrap_err().to_string();
    assert!(all.len() > 80, "{}", all.len());
    // A policy has no NUL, which is said first.
    let never = ["a pattern has no NUL", "a file name has no NUL"];
    let is_shown = |message: &&String| shown.contains(*message) || never.contains(&message.as_str());
    let unshown: Vec<_> = all.iter().filter(|message| !is_shown(message)).collect();
    assert!(unshown.is_empty(), "{unshown:#?}");
}
