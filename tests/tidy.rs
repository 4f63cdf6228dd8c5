//! House rules, as far as a program can check them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::PATIENCE;
use crate::support::master::REUSEPORTD;
use crate::support::process::Running;
use crate::support::world::repository;

/// A source file: its path from the root of the repository, and its text.
struct Source {
    path: String,
    text: String,
}

/// Every Rust file of the project.
fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    for top in ["src", "crates", "examples", "tests", "fuzz/src", "fuzz/fuzz_targets"] {
        collect(&repository(top), &mut paths);
    }
    assert!(paths.len() > 50, "the sources are not where they are looked for");
    let root = repository("");
    let read = |path: PathBuf| Source {
        path: path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned(),
        text: fs::read_to_string(&path).unwrap(),
    };
    paths.into_iter().map(read).collect()
}

fn collect(directory: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

impl Source {
    fn is_test(&self) -> bool {
        self.path.split('/').any(|part| part == "tests" || part == "tests.rs")
    }

    /// This very file names what it forbids.
    fn is_this(&self) -> bool {
        self.path == "tests/tidy.rs"
    }
}

/// Lines that break a rule, with their places.
fn offences(breaks: impl Fn(&Source, &str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| !source.is_this()) {
        for (number, line) in source.text.lines().enumerate().filter(|(_, line)| breaks(source, line)) {
            found.push(format!("{}:{}: {}", source.path, number + 1, line.trim()));
        }
    }
    found
}

/// Whether a word stands in a line, with no letter, digit or underscore beside it.
fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(is_part) && !line[at + word.len()..].starts_with(is_part))
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

#[test]
fn files_are_short() {
    let long = |source: &&Source| !source.is_test() && source.text.lines().count() > 500;
    let found: Vec<String> = sources().iter().filter(long).map(|source| source.path.clone()).collect();
    assert!(found.is_empty(), "longer than 500 lines: {found:?}");
}

#[test]
fn nothing_waits_by_sleeping() {
    // Examples sleep to imitate work. Elsewhere a sleep that is no wait says on its line what it is.
    let found = offences(|source, line| {
        let sleeps = line.contains("sleep(") && !line.contains("//");
        sleeps && !source.path.starts_with("examples/")
    });
    assert!(found.is_empty(), "wait for the thing itself: {found:#?}");
}

#[test]
fn unsafe_code_has_one_address() {
    let found = offences(|source, line| {
        has_word(line, "unsafe") && !is_comment(line) && !source.path.starts_with("crates/sys/")
    });
    let found: Vec<_> = found.into_iter().filter(|line| !line.contains("reason = ")).collect();
    assert!(found.is_empty(), "unsafe outside crates/sys: {found:#?}");
}

#[test]
fn nothing_is_left_for_later() {
    let found = offences(|_, line| ["TODO", "FIXME", "XXX", "HACK"].iter().any(|word| has_word(line, word)));
    assert!(found.is_empty(), "do it or leave it: {found:#?}");
}

#[test]
fn exceptions_have_reasons() {
    for source in sources().iter().filter(|source| !source.is_this()) {
        for (at, _) in source.text.match_indices("[allow(") {
            let end = source.text[at..].find(")]").map_or(source.text.len(), |end| at + end);
            assert!(source.text[at..end].contains("reason"), "{}: an #[allow] without a reason", source.path);
        }
    }
}

#[test]
fn words_are_those_of_the_glossary() {
    let in_names = |line: &str| {
        let name = ["struct ", "enum ", "trait ", "type "].iter().find_map(|kind| line.split_once(kind));
        name.is_some_and(|(_, name)| {
            let name: String = name.chars().take_while(|c| c.is_alphanumeric()).collect();
            ["Manager", "Handler", "Instance", "Epoch", "Slave"].iter().any(|word| name.contains(word))
        })
    };
    let found = offences(|_, line| {
        !is_comment(line) && (in_names(line) || line.contains("fn get_") || has_word(line, "mod util"))
    });
    assert!(found.is_empty(), "another word for the same thing: {found:#?}");
    // In what people read.
    let told = offences(|source, line| {
        let is_told = source.path.starts_with("src/") && !is_comment(line) && line.contains('"');
        is_told
            && ["slave", "master process", "worker instance", "hot reload"]
                .iter()
                .any(|word| line.contains(word))
    });
    assert!(told.is_empty(), "another word for the same thing: {told:#?}");
}

/// What the project says of itself.
fn documents() -> String {
    ["README.md", "ARCHITECTURE.md"].map(|name| fs::read_to_string(repository(name)).expect(name)).join("\n")
}

#[test]
fn every_config_key_is_documented() {
    let schema = fs::read_to_string(repository("src/config/schema.rs")).unwrap();
    let tables = schema.split_once("\ntables! {").expect("the tables of the schema").1;
    let tables = tables.split_once("\n}").unwrap().0;
    let parts = tables.split([',', '{', '}', '\n']).filter_map(|part| part.split_once(": "));
    let keys: Vec<&str> = parts.map(|(key, _)| key.trim()).collect();
    assert!(keys.len() > 50, "{keys:?}");
    let documents = documents();
    let missing: Vec<&&str> = keys.iter().filter(|key| !has_word(&documents, key)).collect();
    assert!(missing.is_empty(), "neither README nor ARCHITECTURE mentions {missing:?}");
}

#[test]
fn every_subcommand_is_documented() {
    let mut command = Command::new(REUSEPORTD);
    command.arg("--help");
    let help = Running::start(command).finish(PATIENCE).stdout;
    let commands =
        help.split_once("Commands:\n").expect("help lists the commands").1.split_once("\n\n").unwrap().0;
    // Longer descriptions go on, further in, on lines of their own.
    let names = commands.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let names: Vec<&str> = names.filter(|name| !name.is_empty()).collect();
    assert!(names.contains(&"upgrade"), "{names:?}");
    let documents = documents();
    let missing: Vec<&&str> =
        names.iter().filter(|name| !documents.contains(&format!("reuseportd {name}"))).collect();
    assert!(missing.is_empty(), "neither README nor ARCHITECTURE shows {missing:?}");
}
