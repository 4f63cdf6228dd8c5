//! The rows, and the file in which readers find them.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use reuseportd_bench::Report;

use super::Fault;
use crate::support::world::repository;

const HEAD: &str = "| fault | when | connections lost of those made | what happens | what is lost, and why |\n|---|---|---|---|---|\n";

/// Between these lines is the table.
const MARKS: [&str; 2] = ["<!-- faults -->\n", "<!-- /faults -->\n"];

/// One file for all tests of this process.
static WRITING: Mutex<()> = Mutex::new(());

impl Fault {
    /// The row without numbers: what has to be the same in each run.
    fn words(&self) -> [&'static str; 4] {
        [self.name, self.when, self.then, if self.lost.is_empty() { "nothing" } else { self.lost }]
    }

    fn row(&self, done: &[(&str, Report)]) -> String {
        let [name, when, then, lost] = self.words();
        let counts: Vec<String> = done
            .iter()
            .map(|(engine, report)| format!("{engine}: {} of {}", report.lost(), report.issued))
            .collect();
        format!("| {name} | {when} | {} | {then} | {lost} |\n", counts.join("; "))
    }
}

/// A row's cells without the numbers.
fn words_of(row: &str) -> Option<[&str; 4]> {
    let mut cells = row.trim().strip_prefix('|')?.strip_suffix('|')?.split('|').map(str::trim);
    let [name, when, _, then, lost] = std::array::from_fn(|_| cells.next().unwrap_or_default());
    Some([name, when, then, lost])
}

/// Notes what came of a fault, and demands that the documented row says so.
pub(super) fn record(fault: &Fault, done: &[(&str, Report)]) {
    assert!(
        fault.words().iter().all(|words| !words.contains(['|', '\n'])),
        "these end a cell: {:?}",
        fault.words()
    );
    let _alone = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let row = fault.row(done);
    fs::create_dir_all(repository("target")).unwrap();
    replace_row(&repository("target/fault-matrix.md"), fault, &row);
    let documented = repository("docs/fault-matrix.md");
    if std::env::var_os("REUSEPORTD_TEST_WRITE").is_some() {
        replace_row(&documented, fault, &row);
    }
    let text = fs::read_to_string(&documented).unwrap_or_default();
    assert!(
        text.lines().filter_map(words_of).any(|words| words == fault.words()),
        "docs/fault-matrix.md has no such row (REUSEPORTD_TEST_WRITE=1 writes it):\n{row}"
    );
}

/// Puts the row into a file's table, in the order of the names, in the place of the one there is.
fn replace_row(path: &Path, fault: &Fault, row: &str) {
    let text = fs::read_to_string(path).unwrap_or_else(|_| format!("{}{HEAD}{}", MARKS[0], MARKS[1]));
    let (before, rest) = text.split_once(MARKS[0]).expect("the table begins with its mark");
    let (table, after) = rest.split_once(MARKS[1]).expect("the table ends with its mark");
    let mut rows: Vec<String> = table.lines().skip(2).map(|line| format!("{line}\n")).collect();
    rows.retain(|other| {
        words_of(other).is_none_or(|[name, when, ..]| (name, when) != (fault.name, fault.when))
    });
    rows.push(row.to_owned());
    rows.sort();
    fs::write(path, format!("{before}{}{HEAD}{}{}{after}", MARKS[0], rows.concat(), MARKS[1])).unwrap();
}

/// A row that no test writes any more would say something that nobody has seen.
#[test]
fn every_documented_row_has_its_test() {
    let sources: String = fs::read_dir(repository("tests/faults"))
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    let text = fs::read_to_string(repository("docs/fault-matrix.md")).unwrap();
    let (_, rest) = text.split_once(MARKS[0]).expect("a table");
    let (table, _) = rest.split_once(MARKS[1]).expect("its end");
    let rows: Vec<[&str; 4]> = table.lines().skip(2).filter_map(words_of).collect();
    assert!(!rows.is_empty(), "no rows");
    for [name, when, ..] in rows {
        let said = |text: &str| sources.contains(&format!("{text:?}"));
        assert!(said(name) && said(when), "no test says {name:?}, {when:?}");
    }
}
