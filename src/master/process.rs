//! One worker's process: its pidfd, its channel, what it says.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use serde::{Deserialize, Serialize};

use reuseportd_core::{Exit, Generation, Seat, Time};
use reuseportd_sys::pidfd;

use super::carried::{Carried, Pidfd, if_held};
use super::output::Output;

/// Lines kept for the reason of a failure.
const LINES_KEPT: usize = 10;
/// Longest line kept, in bytes.
const LINE_BYTES_KEPT: usize = 300;

/// A worker's process, from its spawn until it is reaped.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) generation: Generation,
    pub(super) seat: Seat,
    pub(super) pid: i32,
    /// When it started, in clock ticks since boot: with the pid this names one process for good.
    pub(super) start_time: u64,
    pub(super) pidfd: Carried<Pidfd>,
    /// It was started by this master, in this image or an earlier one.
    pub(super) is_child: bool,
    /// It was there before any master, in a process group that may be another's.
    #[serde(default)]
    pub(super) shares_group: bool,
    /// The end has been seen; the pidfd stays readable until the process is reaped.
    pub(super) is_ended: bool,
    pub(super) started: Time,
    /// The handover channel, until the worker closes its end.
    #[serde(with = "if_held")]
    pub(super) channel: Option<Carried<OwnedFd>>,
    pub(super) output: Option<Output>,
    /// Text of STATUS=.
    pub(super) status: Option<String>,
    /// What was wrong with its listeners, in words.
    pub(super) detail: Option<String>,
    pub(super) last_lines: LastLines,
}

impl Process {
    /// How it ended, if it has; a child stays a zombie until it is reaped.
    pub(super) fn peek_exit(&self) -> io::Result<Option<Exit>> {
        let pidfd = self.pidfd.as_fd();
        let how = match self.is_child {
            true => pidfd::peek_exit(pidfd)?,
            false if !pidfd::has_ended(pidfd)? => return Ok(None),
            false => match pidfd::exit_of_stranger(pidfd)? {
                None => return Ok(Some(Exit::Unknown)),
                how => how,
            },
        };
        Ok(how.map(|how| match how {
            pidfd::Exit::Code(code) => Exit::Code(code),
            pidfd::Exit::Signal { number, .. } => Exit::Signal(number),
        }))
    }
}

/// The last lines a worker printed. Of a stack trace the frames go first, for what it is about may stand before them.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub(super) struct LastLines(VecDeque<String>);

impl LastLines {
    /// Keeps a line, cut to a sensible length and freed of control characters.
    pub(super) fn push(&mut self, line: &[u8]) {
        let cut = line.get(..LINE_BYTES_KEPT).unwrap_or(line);
        if self.0.len() == LINES_KEPT {
            // Indented; of a tab `printable` has made `\t`.
            let is_frame = |line: &String| line.starts_with([' ', '\\']);
            self.0.remove(self.0.iter().position(is_frame).unwrap_or(0));
        }
        self.0.push_back(printable(&String::from_utf8_lossy(cut)));
    }

    /// All of them, one after the other.
    pub(super) fn join(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.0.iter().map(String::as_str).collect::<Vec<_>>().join(" | "))
    }
}

/// Text of a foreign process for a log or a terminal: control characters become visible, so that they act on nothing.
pub(super) fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_few_short_and_harmless() {
        let mut lines = LastLines::default();
        for n in 0..20 {
            lines.push(format!("line {n} \x1b[31m{}", "x".repeat(1000)).as_bytes());
        }
        let text = lines.join().unwrap();
        assert!(!text.contains("line 9 ") && text.starts_with("line 10 \\u{1b}[31mxx"), "{text}");
        assert!(text.len() < LINES_KEPT * (LINE_BYTES_KEPT + 20));
    }

    #[test]
    fn the_head_of_a_stack_trace_is_kept() {
        for indent in ["    ", "\t"] {
            let mut lines = LastLines::default();
            lines.push(b"SyntaxError: unexpected end");
            for n in 0..20 {
                lines.push(format!("{indent}at frame {n}").as_bytes());
            }
            let text = lines.join().unwrap();
            assert!(text.starts_with("SyntaxError") && text.ends_with("at frame 19"), "{text}");
        }
    }
}
