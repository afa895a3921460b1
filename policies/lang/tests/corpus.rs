//! The corpus: what LANGUAGE.md says, as files. `PORTCULLIS_BLESS=1` writes what is expected anew.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use portcullis_policy::Policy;

fn policies() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Policy files of a folder and below, sorted.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|e| e == "pol") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Holds a text against the file beside a policy; an empty one needs no file.
fn expect(path: &Path, text: &str) {
    let beside = path.with_extension("txt");
    let folder = format!("{}/", path.parent().unwrap().display());
    let text = text.replace(&folder, "");
    let text = text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
    if std::env::var_os("PORTCULLIS_BLESS").is_some() {
        if text.is_empty() {
            let _absent = fs::remove_file(&beside);
        } else {
            fs::write(&beside, text + "\n").unwrap();
        }
        return;
    }
    let expected = fs::read_to_string(&beside).unwrap_or_default();
    assert_eq!(text.trim_end(), expected.trim_end(), "{}", path.display());
}

#[test]
fn accepted_files_load_and_their_tests_pass() {
    for path in files(&policies().join("corpus/accept")) {
        let loaded = Policy::load(&path).unwrap_or_else(|e| panic!("{e}"));
        expect(&path, &loaded.warnings.to_string());
    }
}

#[test]
fn rejected_files_are_rejected_with_what_stands_beside_them() {
    for path in files(&policies().join("corpus/reject")) {
        match Policy::load(&path) {
            Ok(_) => panic!("{} is accepted", path.display()),
            Err(error) => expect(&path, &error.to_string()),
        }
    }
}

#[test]
fn every_corpus_file_is_named_in_the_language_manual_and_every_name_exists() {
    let manual = fs::read_to_string(policies().join("LANGUAGE.md")).unwrap();
    let source = |file: &str| fs::read_to_string(policies().join("lang").join(file)).unwrap();
    let (meaning, differential) = (source("tests/meaning.rs"), source("src/differential.rs"));
    let (links, hostile) = (source("src/warn/links.rs"), source("tests/hostile.rs"));
    for folder in ["accept", "reject"] {
        let base = policies().join("corpus").join(folder);
        for path in fs::read_dir(&base)
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.extension().is_some_and(|e| e == "pol"))
        {
            let name = format!("{folder}/{}", path.file_stem().unwrap().to_str().unwrap());
            assert!(manual.contains(&format!("`{name}`")), "{name} is not in LANGUAGE.md");
        }
    }
    for word in manual.split('`').skip(1).step_by(2) {
        if word.starts_with("accept/") || word.starts_with("reject/") {
            assert!(policies().join("corpus").join(format!("{word}.pol")).exists(), "no corpus file {word}");
        } else if let Some(name) = word.strip_prefix("meaning::") {
            assert!(meaning.contains(&format!("fn {name}()")), "no test {name}");
        } else if let Some(name) = word.strip_prefix("differential::") {
            assert!(differential.contains(&format!("fn {name}()")), "no test {name}");
        } else if let Some(name) = word.strip_prefix("links::") {
            assert!(links.contains(&format!("fn {name}()")), "no test {name}");
        } else if let Some(name) = word.strip_prefix("hostile::") {
            assert!(hostile.contains(&format!("fn {name}()")), "no test {name}");
        }
    }
}

/// Each item of a list, and each paragraph that is in none, of the sections about the language.
#[test]
fn each_statement_of_the_language_manual_names_what_shows_it() {
    let manual = fs::read_to_string(policies().join("LANGUAGE.md")).unwrap();
    let sections = manual.split("\n## ").skip(1).filter(|s| !s.starts_with("For programs"));
    let mut bare = Vec::new();
    for section in sections {
        let (heading, text) = section.split_once('\n').unwrap();
        for statement in text.split("\n\n").flat_map(|paragraph| paragraph.split("\n- ")) {
            // Neither a table nor the grammar.
            let is_prose =
                !statement.trim().is_empty() && !statement.trim_start_matches('\n').starts_with(['|', ' ']);
            let shown = ["accept/", "reject/", "meaning::", "differential::", "links::"]
                .iter()
                .any(|w| statement.contains(w));
            // A paragraph that ends with a colon introduces what follows.
            if is_prose && !shown && !statement.trim_end().ends_with(':') {
                bare.push(format!("{heading}: {statement}"));
            }
        }
    }
    assert!(bare.is_empty(), "nothing shows\n{}", bare.join("\n"));
}

#[test]
fn the_examples_are_formatted_and_pass() {
    for path in files(&policies().join("examples")) {
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(portcullis_policy::format("example", &text).unwrap(), text, "{}", path.display());
        Policy::load(&path).unwrap_or_else(|e| panic!("{e}"));
    }
}
