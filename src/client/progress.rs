//! How an upgrade gets on, on stderr: live on a terminal, else one line per phase.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use reuseportd_wire::status::Phase;

use super::text::{escape, milliseconds};

/// Shows one phase after the other.
pub(super) struct Progress {
    /// None where nobody watches: then a phase is said once, when it begins.
    bar: Option<ProgressBar>,
    phase: Option<(Phase, Instant)>,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { bar: stderr().is_terminal().then(ProgressBar::new_spinner), phase: None }
    }

    /// What the master says now.
    pub(super) fn show(&mut self, phase: Phase, text: &str) {
        let begins = self.phase.is_none_or(|(last, _)| last != phase);
        let line = format!("{phase}: {}", escape(text));
        if begins {
            self.end_phase();
            self.phase = Some((phase, Instant::now()));
        }
        match &self.bar {
            Some(bar) => {
                if begins {
                    bar.enable_steady_tick(Duration::from_millis(100));
                }
                bar.set_message(line);
            }
            // A closed stderr must not stop the wait for the outcome.
            None if begins => drop(writeln!(stderr(), "{line}")),
            None => {}
        }
    }

    fn end_phase(&mut self) {
        if let (Some(bar), Some((phase, began))) = (&self.bar, self.phase.take()) {
            let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            bar.println(format!("{phase}: {}", milliseconds(ms)));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
