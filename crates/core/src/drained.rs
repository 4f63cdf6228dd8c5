//! The end of the way out: those who wait for it are told when listeners are gone, and a generation is forgotten with its
//! last process.

use crate::command::Report;
use crate::generation::{GenerationRecord, GenerationState, Retirement};
use crate::id::{Generation, RetirementId, WorkerId};
use crate::master::Master;
use crate::receipt::Phase;
use crate::timers::Timer;
use crate::worker::WorkerState;
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::time::Duration;

impl Master {
    pub(crate) fn advance_retirements(&mut self) {
        let holders: BTreeSet<WorkerId> = self.listeners.values().map(|listener| listener.worker).collect();
        for (id, worker) in &mut self.workers {
            if matches!(worker.state, WorkerState::Stopping { .. }) && !holders.contains(id) {
                worker.state = WorkerState::Draining;
            }
        }
        let over: Vec<RetirementId> =
            self.retirements.iter().filter(|(_, r)| self.is_over(r)).map(|(id, _)| *id).collect();
        for id in over {
            self.answer_retirement(id);
        }
        let is_leaving = |state| matches!(state, GenerationState::Retiring | GenerationState::Draining);
        let is_gone = |id: &Generation| {
            let has_worker = self.workers.values().any(|worker| worker.generation == *id);
            !has_worker && !self.listeners.values().any(|listener| listener.generation == *id)
        };
        // What is counted last belongs into its receipt; a service that ends can't wait for it.
        let is_counted = |record: &GenerationRecord| record.discarding == 0 || self.stopping.is_some();
        let leaving =
            self.generations.iter().filter(|(id, r)| is_leaving(r.state) && is_counted(r) && is_gone(id));
        for generation in leaving.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.forget_generation(generation);
        }
    }

    /// None of its listeners is left, but for those with flows that go on, and none of its workers can get one.
    fn is_over(&self, retirement: &Retirement) -> bool {
        let is_its = |worker: WorkerId, of: Generation| match retirement.is_whole {
            true => of == retirement.generation,
            false => retirement.workers.contains(&worker),
        };
        let has_flows =
            |worker: WorkerId| !retirement.is_answered && self.waits_for_flows(retirement, worker);
        let mut listeners = self.listeners.values().filter(|l| is_its(l.worker, l.generation));
        let mut workers = self.workers.iter().filter(|(id, worker)| is_its(**id, worker.generation));
        listeners.all(|listener| has_flows(listener.worker))
            && workers.all(|(id, worker)| worker.state.is_ending() || has_flows(*id))
    }

    /// Tells whoever waits; with flows that go on there is still something to be looked after.
    fn answer_retirement(&mut self, id: RetirementId) {
        let workers = &self.workers;
        let Some(retirement) = self.retirements.get_mut(&id) else { return };
        let is_leaving =
            |id: &WorkerId| workers.get(id).is_some_and(|worker| worker.state == WorkerState::Emptying);
        let (is_first, has_flows) = (!retirement.is_answered, retirement.workers.iter().any(is_leaving));
        retirement.is_answered = true;
        let (generation, is_whole) = (retirement.generation, retirement.is_whole);
        let waiting = core::mem::take(&mut retirement.waiting);
        if !has_flows {
            self.retirements.remove(&id);
            self.timers.disarm(Timer::Retire(id));
        }
        self.answer_all(waiting, None);
        if let Some(record) = self.generations.get_mut(&generation).filter(|_| is_whole && is_first) {
            record.state = GenerationState::Draining;
            record.draining_since = Some(self.now);
        }
        self.advance_upgrade();
    }

    fn forget_generation(&mut self, generation: Generation) {
        for group in self.groups.values_mut() {
            group.keys.take_back(generation);
        }
        let Some(record) = self.generations.remove(&generation) else { return };
        self.report(Report::Drained(generation));
        let serial = record.receipt.as_ref().map(|receipt| receipt.serial);
        if let Some(mut receipt) = record.receipt {
            let took = record.draining_since.map_or(Duration::ZERO, |since| self.now.since(since));
            receipt.add_phase(Phase::Draining, took);
            receipt.is_final = true;
            self.report(Report::Ended(receipt));
        }
        for (caller, serial) in record.waiting.into_iter().zip(serial.into_iter().cycle()) {
            self.reply(caller, serial);
        }
        self.advance_launch();
        self.advance_upgrade();
    }
}
