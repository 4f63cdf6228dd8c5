//! Signs of life: those of workers, and the master's own to the service manager.

use crate::command::{Command, Notice, Reason, Report, Signal};
use crate::id::WorkerId;
use crate::master::Master;
use crate::timers::Timer;
use crate::worker::{LOOK_PAUSE, WorkerState};
use core::time::Duration;

impl Master {
    /// The worker lives until this long from now, if its generation has a watchdog and it was ready once.
    pub(crate) fn feed(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.silent = false;
        let plan = self.generations.get(&worker.generation).map(|record| &record.plan);
        let timeout = plan.and_then(|plan| plan.watchdog);
        if let Some(timeout) = timeout.filter(|_| !worker.state.is_starting() && !worker.state.is_ending()) {
            self.timers.arm(Timer::Watchdog(id), self.now.after(timeout));
        }
    }

    /// No sign of life in time. When the master itself was held up, it may wait unread: what waits is read first.
    pub(crate) fn on_silence(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.silent {
            return self.on_stuck(id);
        }
        worker.silent = true;
        self.timers.arm(Timer::Watchdog(id), self.now.after(LOOK_PAUSE));
    }

    /// No sign of life, or the worker itself says that it is stuck. One that was told to end has its deadline anyway.
    pub(crate) fn on_stuck(&mut self, id: WorkerId) {
        self.timers.disarm(Timer::Watchdog(id));
        let Some(worker) = self.workers.get(&id).filter(|worker| !worker.state.is_ending()) else { return };
        let (generation, reason) = (worker.generation, Reason::Stuck(worker.seat, id));
        let has_served = worker.state == WorkerState::Serving;
        if self.is_on_trial(generation) {
            self.fail_upgrade(reason);
            // One that never served is told to end; of one that did nothing can be hoped for any more.
            if !has_served {
                return;
            }
        } else {
            self.report(Report::Replaced(id, reason));
        }
        self.push(Command::Signal { worker: id, signal: Signal::KillGroup });
    }

    /// The service manager wants a sign of life this often, or none at all.
    pub(crate) fn on_supervised(&mut self, every: Option<Duration>) {
        // More often than that nobody can want it; never at all would be to say it for ever.
        self.beat = every.map(|every| every.max(LOOK_PAUSE));
        self.timers.disarm(Timer::Beat);
        self.beat();
    }

    pub(crate) fn beat(&mut self) {
        if let Some(every) = self.beat {
            self.notify(Notice::Alive);
            self.timers.arm(Timer::Beat, self.now.after(every));
        }
    }
}
