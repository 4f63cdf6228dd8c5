//! The line that a terminal shows while a client waits: the phase, its time, and the numbers of the last status.

use std::time::Duration;

use reuseportd_wire::status::{GenerationState, GenerationStatus, Phase, Status, WorkerState};

use super::text::{count, escape, milliseconds, share};

/// Characters of a whole bar.
const BAR_WIDTH: usize = 20;

/// What there is to say.
pub(super) struct Moment<'a> {
    /// None before the master has told one.
    pub(super) phase: Option<Phase>,
    /// The master's words for it.
    pub(super) text: &'a str,
    /// Seats ready, of all, as the master told last.
    pub(super) ready: Option<(u32, u32)>,
    pub(super) status: Option<&'a Status>,
    /// Since this phase, or this step of it, began.
    pub(super) lasts: Duration,
}

impl Moment<'_> {
    /// One line, of at most 80 columns unless the master's words are longer.
    pub(super) fn line(&self) -> String {
        // Always tenths, so that the line does not jump.
        let lasts = match self.lasts.as_millis() {
            ms @ 0..60_000 => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
            _ => time(self.lasts),
        };
        let Some(phase) = self.phase else {
            let state = self.status.map(|status| format!(": the master's state is {}", status.state));
            return format!("waiting {lasts}{}", state.unwrap_or_default());
        };
        let detail = self.detail(phase).unwrap_or_else(|| escape(self.text));
        format!("{phase} {lasts}: {detail}")
    }

    fn detail(&self, phase: Phase) -> Option<String> {
        match phase {
            Phase::Launching => {
                // With none to wait for it is about something else, which the master's words tell.
                let is_awaited = |(ready, of): &(u32, u32)| ready < of;
                let (ready, of) = self.newest().map(seats).or(self.ready).filter(is_awaited)?;
                Some(format!("{} {ready} of {of} ready", bar(ready, of)))
            }
            Phase::Canary => {
                let newest = self.newest()?;
                Some(format!("{} for generation {}{}", share(newest.share), newest.generation, self.left()))
            }
            Phase::Baking => {
                let old = self.last(|state| state == GenerationState::Standby)?;
                let connections = count(old.connections, "connection");
                let left = self.left();
                Some(format!("generation {} stands by with {connections}{left}", old.generation))
            }
            Phase::Retiring | Phase::Draining | Phase::RollingBack => {
                let leaves = |state| matches!(state, GenerationState::Retiring | GenerationState::Draining);
                let old = self.last(leaves)?;
                let connections = count(old.connections, "connection");
                let deadline = old.deadline_ms.map(|ms| format!(", deadline in {}", milliseconds(ms)));
                let deadline = deadline.unwrap_or_default();
                Some(format!("{connections} left on generation {}{deadline}", old.generation))
            }
            Phase::Switch | Phase::Stopping => None,
        }
    }

    /// How long it is going to last.
    fn left(&self) -> String {
        let left = self.status.and_then(|status| status.hold_ms);
        left.map(|ms| format!(", {} left", milliseconds(ms))).unwrap_or_default()
    }

    fn newest(&self) -> Option<&GenerationStatus> {
        self.last(|state| matches!(state, GenerationState::Launching | GenerationState::Canary))
    }

    fn last(&self, is_wanted: impl Fn(GenerationState) -> bool) -> Option<&GenerationStatus> {
        self.status?.generations.iter().rfind(|generation| is_wanted(generation.state))
    }
}

fn seats(generation: &GenerationStatus) -> (u32, u32) {
    let is_ready = |state| matches!(state, WorkerState::Ready | WorkerState::Serving);
    let ready = generation.workers.iter().filter(|worker| is_ready(worker.state)).count();
    let number = |count| u32::try_from(count).unwrap_or(u32::MAX);
    (number(ready), number(generation.workers.len()))
}

fn bar(ready: u32, of: u32) -> String {
    let whole = usize::try_from(of.max(1)).unwrap_or(usize::MAX);
    let filled = usize::try_from(ready.min(of)).unwrap_or(0) * BAR_WIDTH / whole;
    "█".repeat(filled) + &"░".repeat(BAR_WIDTH - filled)
}

/// In words.
pub(super) fn time(time: Duration) -> String {
    milliseconds(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}
