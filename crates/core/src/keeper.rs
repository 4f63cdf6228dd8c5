//! The keeper: a process that holds descriptors and snapshot for the next master. It must always be there.

use crate::command::Command;
use crate::generation::GenerationRecord;
use crate::id::Time;
use crate::master::Master;
use crate::timers::Timer;
use crate::worker::WorkerState;
use alloc::vec::Vec;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// The pause before the second attempt in a row; doubles.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Attempts to have a keeper.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeeperWatch {
    started: Time,
    /// The pause before the next one.
    pause: Duration,
}

impl Master {
    /// Asks for the state to be kept before anything is done that a master with an older memory would undo: before a new
    /// worker may be chosen, and before one that was chosen is told to stop.
    pub(crate) fn save(&mut self) {
        if !self.saving {
            self.saving = true;
            self.push(Command::Save);
        }
    }

    pub(crate) fn on_saved(&mut self) {
        self.saving = false;
        let serves = |generation| self.generations.get(&generation).is_some_and(GenerationRecord::serves);
        let ready =
            self.workers.iter().filter(|(_, w)| w.state == WorkerState::Ready && serves(w.generation));
        for (id, generation, seat) in ready.map(|(id, w)| (*id, w.generation, w.seat)).collect::<Vec<_>>() {
            self.take_seat(generation, seat);
            self.join(id, false);
        }
    }

    /// There is none: replaced at once, unless the last one has just been started.
    pub(crate) fn on_keeper_missing(&mut self) {
        if self.now.since(self.keeper.started) > PAUSE_MAX {
            self.keeper.pause = Duration::ZERO;
        }
        let pause = self.keeper.pause;
        self.keeper.pause = (pause * 2).clamp(PAUSE, PAUSE_MAX);
        self.timers.arm_by(Timer::Keeper, self.now.after(pause));
        if pause.is_zero() {
            self.start_keeper();
        }
    }

    pub(crate) fn start_keeper(&mut self) {
        self.timers.disarm(Timer::Keeper);
        self.keeper.started = self.now;
        self.push(Command::StartKeeper);
    }
}
