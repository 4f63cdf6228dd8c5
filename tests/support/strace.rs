//! System calls that the kernel seems to refuse, where it can't be brought to do so otherwise.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};

use rustix::process::Signal;

use super::PATIENCE;
use super::process::{signal, wait};
use super::world::{Need, World};

/// What [`Refused`] can't do without.
pub(crate) const STRACE: Need = Need::Runs("strace", &["--version"]);

/// As long as it lives, calls of a process, not of its children, are answered with an error instead of being made.
#[derive(Debug)]
pub(crate) struct Refused {
    tracer: Child,
    /// Open, so that it can always say something.
    _words: BufReader<ChildStderr>,
    calls: PathBuf,
}

impl Refused {
    /// From the return on, these calls (names with commas) of a process fail. `which` is `-P` and a path, or nothing.
    pub(crate) fn calls(world: &World, pid: u32, names: &str, error: &str, which: &[&str]) -> Refused {
        let calls = world.path("refused-calls");
        let mut tracer = Command::new("strace")
            .args(["-e", &format!("trace={names}"), "-e", &format!("inject={names}:error={error}")])
            .args(which)
            .args(["-p", &pid.to_string(), "-o"])
            .arg(&calls)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut words = BufReader::new(tracer.stderr.take().unwrap());
        let mut line = String::new();
        words.read_line(&mut line).unwrap();
        assert!(line.contains("attached"), "strace: {line}");
        Refused { tracer, _words: words, calls }
    }

    /// The calls are made again; how many were not.
    pub(crate) fn end(mut self) -> usize {
        self.detach();
        fs::read_to_string(&self.calls).unwrap().matches("(INJECTED)").count()
    }

    fn detach(&mut self) {
        signal(self.tracer.id(), Signal::INT);
        let ended = wait(&mut self.tracer, PATIENCE);
        assert!(ended.is_some() || std::thread::panicking(), "strace does not end");
    }
}

impl Drop for Refused {
    fn drop(&mut self) {
        self.detach();
    }
}
