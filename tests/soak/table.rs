//! The figures: shown, judged, and written down.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::sample::{COLUMNS, Sample};
use crate::support::world::repository;

/// Upgrades after which there is as much of everything as there will ever be: so many receipts are kept, those of
/// upgrades that failed among them.
const WARM_UP: u32 = 40;

/// Samples of one run.
pub(super) struct Table {
    engine: &'static str,
    upgrades: u32,
    first: Option<Sample>,
    grown: Vec<String>,
    text: String,
}

impl Table {
    pub(super) fn new(engine: &'static str, upgrades: u32) -> Table {
        let names: Vec<&str> = COLUMNS.iter().map(|column| column.0).collect();
        let head = format!("| upgrades | re-execs | connections | lost | {} |\n", names.join(" | "));
        let text = format!("{head}|{}\n", "---:|".repeat(names.len() + 4));
        eprint!("{engine}:\n{text}");
        Table { engine, upgrades, first: None, grown: Vec::new(), text }
    }

    /// What all others are compared with.
    pub(super) fn first(&self) -> Option<&Sample> {
        self.first.as_ref()
    }

    pub(super) fn add(&mut self, upgrades: u32, reexecs: u32, made: u64, lost: u64, sample: Sample) {
        let numbers: Vec<String> = sample.0.iter().map(u64::to_string).collect();
        let row = format!("| {upgrades} | {reexecs} | {made} | {lost} | {} |\n", numbers.join(" | "));
        eprint!("{row}");
        self.text += &row;
        let grown = self.first.as_ref().map(|first| sample.grown(first)).unwrap_or_default();
        self.grown.extend(grown.into_iter().map(|what| format!("after {upgrades} upgrades {what}")));
        if upgrades >= WARM_UP {
            self.first.get_or_insert(sample);
        }
    }

    /// Demands that nothing has grown, and writes the figures down if it is told to.
    pub(super) fn finish(self) {
        assert!(self.grown.is_empty(), "{}\n{}", self.grown.join("\n"), self.text);
        if std::env::var_os("REUSEPORTD_TEST_WRITE").is_some() {
            write_down(&format!("## {} upgrades, {}\n", self.upgrades, self.engine), &self.section());
        }
    }

    fn section(&self) -> String {
        let mut text = format!("\n{}\n", surroundings());
        writeln!(text, "\n{}", self.text).unwrap();
        text
    }
}

/// On what machine, when, and of which program.
fn surroundings() -> String {
    let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let after = |text: &str, key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("?").to_owned();
        line.trim_start_matches([' ', '\t', ':']).to_owned()
    };
    let cpus = file("/proc/cpuinfo");
    let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let git = |words: &[&str]| {
        let output = Command::new("git").args(words).current_dir(repository("")).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    };
    let changed = if git(&["status", "--porcelain", "src", "crates"]).is_empty() { "" } else { ", changed" };
    // Of `target/release` or `target/debug`.
    let program = super::program();
    let build = program.parent().and_then(Path::file_name).unwrap_or_default().display();
    format!(
        "{count} × {}, {} of memory, Linux {}; {}; commit {}{changed}, {build} build.",
        after(&cpus, "model name"),
        after(&file("/proc/meminfo"), "MemTotal"),
        file("/proc/sys/kernel/osrelease").trim(),
        jiff::Timestamp::now().strftime("%Y-%m-%d"),
        git(&["rev-parse", "--short", "HEAD"]),
    )
}

/// Puts a section in the place of the one with this heading, or at the end.
fn write_down(heading: &str, section: &str) {
    let path = repository("docs/soak.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(heading).unwrap_or((&text, ""));
    let after = rest.find("\n## ").map_or("", |at| &rest[at..]);
    let before = before.trim_end();
    fs::write(&path, format!("{before}\n\n{heading}{}\n{after}", section.trim_end())).unwrap();
}
