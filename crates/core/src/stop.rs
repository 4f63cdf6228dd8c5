//! The end of the service.

use crate::command::{Command, Notice, Reason, Signal};
use crate::event::StopMode;
use crate::generation::{GenerationState, UpgradeStep};
use crate::id::{ListenerId, Ticket, WorkerId};
use crate::master::{Master, Stopping};
use crate::timers::Timer;
use crate::worker::WorkerState;
use alloc::vec::Vec;

impl Master {
    pub(crate) fn on_stop(&mut self, mode: StopMode, by: Option<Ticket>) {
        let is_second = self.stopping.is_some();
        let stopping = self.stopping.get_or_insert(Stopping { mode, waiting: Vec::new(), code: 0 });
        stopping.waiting.extend(by);
        // A client that asks again only wants to wait; a signal sent again means it.
        if mode == StopMode::Fast || (is_second && by.is_none()) {
            stopping.mode = StopMode::Fast;
        }
        let is_fast = stopping.mode == StopMode::Fast;
        if !is_second {
            self.notify(Notice::Stopping);
            self.drop_wishes();
            let is_taking_over = self.is_taking_over();
            self.fail_upgrade(Reason::Stopped);
            self.timers.disarm(Timer::Breaker);
            // A foreign server is served back, and nothing else.
            if !is_taking_over {
                self.aim_away(None);
                if let Some(active) = self.active.take() {
                    self.retire(active);
                }
            }
        }
        if is_fast {
            self.kill_all();
        }
    }

    fn kill_all(&mut self) {
        let workers = self.workers.iter().filter(|(_, worker)| !self.is_untouchable(worker.generation));
        for id in workers.map(|(id, _)| *id).collect::<Vec<WorkerId>>() {
            if let Some(worker) = self.workers.get_mut(&id) {
                if !matches!(worker.state, WorkerState::Remains { .. }) {
                    worker.state = WorkerState::Dying;
                }
                self.push(Command::Signal { worker: id, signal: Signal::KillGroup });
            }
        }
    }

    /// With no process left, everything is let go of and every client answered.
    pub(crate) fn advance_stop(&mut self) {
        if self.stopping.is_none() || !self.workers.is_empty() {
            return;
        }
        let listeners: Vec<ListenerId> = self.listeners.keys().copied().collect();
        for listener in listeners {
            self.forget_listener(listener);
        }
        for record in self.generations.values_mut() {
            record.state = GenerationState::Retiring;
        }
        self.advance_retirements();
        // There is nobody left to be steered back to.
        if self.upgrade.as_ref().is_some_and(|upgrade| upgrade.step == UpgradeStep::SteeringBack) {
            self.enter_step(UpgradeStep::RollingBack);
        }
        self.advance_upgrade();
        let Some(stopping) = self.stopping.as_mut() else { return };
        let code = stopping.code;
        for to in core::mem::take(&mut stopping.waiting) {
            self.push(Command::ReplyStopped { to });
        }
        self.end_reexec(false);
        self.push(Command::Exit { code });
        self.is_ended = true;
    }
}
