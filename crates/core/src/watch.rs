//! Workers that close or shut down a listener unasked, and live on: nobody would answer there. The master's own handle, or
//! a sibling's listener, hides that from everybody else.

use crate::command::Command;
use crate::id::{GroupId, ListenerId, WorkerId};
use crate::master::Master;
use crate::plan::Engine;
use crate::timers::Timer;
use crate::worker::{WorkerKind, WorkerState};
use alloc::vec::Vec;
use core::time::Duration;

/// How often is looked whether workers still have their listeners.
pub(crate) const WATCH_PERIOD: Duration = Duration::from_secs(1);

impl Master {
    /// The listeners of serving workers that would not say so. A handover worker says `drained`.
    fn watched(&self) -> Vec<(ListenerId, WorkerId)> {
        let is_silent = |worker: WorkerId| {
            let worker = self.workers.get(&worker).filter(|worker| worker.state == WorkerState::Serving);
            worker.is_some_and(|worker| worker.kind == Some(WorkerKind::Unmodified))
        };
        let steers = self.engine != Engine::None;
        let watched =
            self.listeners.iter().filter(|(_, l)| steers && l.listens && !l.leaving && is_silent(l.worker));
        watched.map(|(id, listener)| (*id, listener.worker)).collect()
    }

    pub(crate) fn watch(&mut self) {
        for (listener, worker) in self.watched() {
            self.push(Command::Owns { listener, worker });
        }
        // An anchor that could not be had, or has gone, is asked for again.
        let is_held = |id: &ListenerId| self.listeners.get(id).is_some_and(|l| l.handle && !l.leaving);
        let adrift = self.groups.iter().filter(|(_, group)| !group.anchor.as_ref().is_some_and(is_held));
        for group in adrift.map(|(id, _)| *id).collect::<Vec<GroupId>>() {
            self.keep_anchor(group);
        }
    }

    /// After each event: whoever begins to serve, in whatever way, is watched from then on.
    pub(crate) fn keep_watching(&mut self) {
        if !self.timers.is_armed(Timer::Watch) && !self.watched().is_empty() {
            self.timers.arm(Timer::Watch, self.now.after(WATCH_PERIOD));
        }
    }
}
