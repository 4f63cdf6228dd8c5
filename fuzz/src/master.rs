//! What fuzz targets ask of the master; a module of it, so that it sees what the master sees.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;

use reuseportd_core::{Engine, Event, Generation, Verdict};
use rustix::fs::{MemfdFlags, memfd_create};

use super::journal as journal_file;
use super::log::ATOMIC_BYTES;
use super::output::Output;
use super::process::{LastLines, printable};
use super::snapshot::{Lines, Snapshot};
use super::{carried, exchange, notifications};
use crate::play;

/// A journal: what is wrong with it is told, and what it says can be acted on.
pub fn journal(text: &[u8]) {
    let path = Path::new("/run/journal");
    if let Err(error) = journal_file::parse(path, text) {
        assert!(!error.to_string().is_empty());
    }
    // Wherever it was written.
    let Ok(journal) = serde_json::from_slice::<journal_file::Journal>(text) else { return };
    let again = serde_json::to_vec(&journal).expect("plain data");
    assert_eq!(
        serde_json::from_slice::<journal_file::Journal>(&again).expect("what was written is read"),
        journal
    );
    for slots in &journal.slots {
        let _ = slots.endpoint();
    }
    let generation = journal.workers.iter().map(|entry| entry.generation).max().unwrap_or(1);
    let count = u16::try_from(journal.workers.len().min(8)).unwrap_or(8);
    let slots = journal.slots.into_iter().map(|slots| slots.cookies).collect();
    play::orphans(Engine::Cbpf, Generation(generation), count, slots);
}

/// A state: it is understood or refused; and a core that is consistent goes on without a panic or an end.
pub fn snapshot(text: &[u8]) {
    let Ok(lines) = Lines::of(text).map_err(|error| assert!(!error.to_string().is_empty())) else { return };
    let _ = lines.head.place.check();
    let understood = lines.try_all();
    let state = text.split(|byte| *byte == b'\n').nth(1).unwrap_or_default();
    match carried::read::<Snapshot>(state, None) {
        Ok(snapshot) => play::go_on(snapshot.core, Event::Adopted { lost: Vec::new() }),
        Err(_) => assert!(understood.is_err(), "all of it is understood, but not the state"),
    }
}

/// What a worker says in `STATUS=`.
#[must_use]
pub fn status(text: &str) -> String {
    notifications::shown(text)
}

thread_local! {
    /// In the place of stdout, where output is passed on to.
    static STDOUT: RefCell<File> = RefCell::new({
        let file = File::from(memfd_create("stdout", MemfdFlags::CLOEXEC).expect("a memfd"));
        rustix::stdio::dup2_stdout(&file).expect("a descriptor");
        file
    });
}

/// What a worker prints, which comes in two pieces; and the same as an answer to a readiness request.
pub fn output(printed: &[u8], cut: usize) {
    let (reader, writer) = Output::pipe().expect("a pipe");
    let mut writer = File::from(writer);
    let mut output = Output::of_worker(reader, 1, 0, 2);
    let mut last = LastLines::default();
    let (first, second) = printed.split_at(cut.min(printed.len()));
    writer.write_all(first).expect("it fits");
    assert!(STDOUT.with(|_| output.pass_on(&mut last)), "the worker lives");
    writer.write_all(second).expect("it fits");
    drop(writer);
    while output.pass_on(&mut last) {}
    let mut passed = Vec::new();
    STDOUT.with_borrow_mut(|file| {
        file.rewind().and_then(|()| file.read_to_end(&mut passed)).expect("memory");
        file.set_len(0).and_then(|()| file.rewind()).expect("memory");
    });
    check_lines(printed, &passed);
    let kept = last.join().unwrap_or_default();
    assert!(!kept.contains(char::is_control) && kept.len() < 50_000, "{kept:?}");
    assert!(!printable(&String::from_utf8_lossy(printed)).contains(char::is_control));
    if exchange::judge(printed) == Verdict::Passed {
        assert!(printed.starts_with(b"HTTP/1.") && printed.get(9) == Some(&b'2'));
    }
}

/// Every line tagged, short enough to be written at once, and nothing else changed.
fn check_lines(printed: &[u8], passed: &[u8]) {
    let mut bare = Vec::new();
    for line in passed.split_inclusive(|byte| *byte == b'\n') {
        assert!(line.len() <= ATOMIC_BYTES, "{}", line.len());
        bare.extend_from_slice(line.strip_prefix(b"[g1 s0 2] ").expect("a tag"));
    }
    let newlines = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == b'\n').count();
    let text = |bytes: &[u8]| bytes.iter().copied().filter(|byte| *byte != b'\n').collect::<Vec<u8>>();
    assert!(newlines(&bare) >= newlines(printed));
    assert_eq!(text(&bare), text(printed));
}
