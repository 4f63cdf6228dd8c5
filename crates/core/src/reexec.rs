//! Re-exec: the master's program is replaced in place, once the new one has shown that it can read the state.

use crate::command::{Command, Report};
use crate::id::Ticket;
use crate::master::Master;
use crate::timers::Timer;
use alloc::vec::Vec;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// The new program reads a few kilobytes; one that takes longer hangs.
const PREFLIGHT_TIMEOUT: Duration = Duration::from_secs(10);

/// A re-exec that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reexec {
    /// The new program has proven itself: it is executed now.
    pub(crate) is_proven: bool,
    pub(crate) waiting: Vec<Ticket>,
}

impl Master {
    /// Whatever is under way goes on in the new image: all of it is in the snapshot. Only an end makes it pointless.
    pub(crate) fn on_reexec(&mut self, by: Option<Ticket>) {
        if self.stopping.is_some() {
            self.report(Report::ReexecRefused);
            return self.answer_reexec(by.into_iter().collect(), false);
        }
        if let Some(reexec) = self.reexec.as_mut() {
            return reexec.waiting.extend(by);
        }
        self.reexec = Some(Reexec { is_proven: false, waiting: by.into_iter().collect() });
        self.timers.arm(Timer::Preflight, self.now.after(PREFLIGHT_TIMEOUT));
        self.push(Command::Preflight);
    }

    pub(crate) fn on_preflighted(&mut self, readable: bool) {
        let Some(reexec) = self.reexec.as_mut().filter(|reexec| !reexec.is_proven) else { return };
        self.timers.disarm(Timer::Preflight);
        if readable && self.stopping.is_none() {
            reexec.is_proven = true;
            return self.push(Command::Reexec);
        }
        self.end_reexec(false);
    }

    /// Its end, which is sure to come now, is its answer.
    pub(crate) fn on_preflight_timeout(&mut self) {
        self.push(Command::EndPreflight);
    }

    /// In the new image, or in the old one because there is no new one.
    pub(crate) fn end_reexec(&mut self, done: bool) {
        let Some(reexec) = self.reexec.take() else { return };
        self.timers.disarm(Timer::Preflight);
        self.report(if done { Report::Reexecuted } else { Report::ReexecRefused });
        self.answer_reexec(reexec.waiting, done);
    }

    fn answer_reexec(&mut self, waiting: Vec<Ticket>, done: bool) {
        for to in waiting {
            self.push(Command::ReplyReexec { to, done });
        }
    }
}
