//! From the launch of a new generation to the end of its upgrade, step by step.

use crate::command::{Command, Notice, Report};
use crate::event::{Trigger, Wait};
use crate::generation::{Caller, GenerationState, Goal, Upgrade, UpgradeStep};
use crate::group::Group;
use crate::id::{Generation, Seat, WorkerId};
use crate::master::{Master, Stopping};
use crate::plan::Readiness;
use crate::receipt::{Outcome, Phase};
use crate::timers::Timer;
use crate::worker::{LOOK_PAUSE, Worker, WorkerState};
use alloc::vec::Vec;
use core::time::Duration;

impl Master {
    pub(crate) fn must_queue(&self, to: Generation) -> bool {
        let places = self.generations.get(&to).map_or(0, |record| usize::from(record.plan.max_draining));
        self.draining() >= places
    }

    /// As if the deadline of the oldest that drain had come.
    pub(crate) fn on_hurry(&mut self) {
        let Some(Upgrade { to, step: UpgradeStep::Queued, .. }) = &self.upgrade else { return };
        if !self.must_queue(*to) {
            return;
        }
        let mut draining = self.generations.iter().filter(|(_, r)| r.state == GenerationState::Draining);
        let oldest = draining.next().map(|(generation, _)| self.workers_of(*generation));
        let batch = || self.draining_batches().next().map(|batch| batch.iter().copied().collect());
        for worker in oldest.or_else(batch).unwrap_or_default() {
            self.on_kill_deadline(worker);
        }
    }

    /// Lets a queued upgrade begin once there is a place.
    pub(crate) fn advance_launch(&mut self) {
        let Some(Upgrade { to, step: UpgradeStep::Queued, .. }) = self.upgrade else { return };
        // A program that could not be replaced may name slots that the sockets of seats would take.
        let is_told = self.groups.values().all(Group::is_told);
        if self.must_queue(to) || !is_told || self.binding().next().is_some() {
            return;
        }
        self.enter_step(UpgradeStep::Launching);
        self.launch_batch();
    }

    pub(crate) fn spawn(&mut self, generation: Generation, seat: Seat) {
        let worker = self.spawn_worker(generation, seat);
        let record = self.generations.get_mut(&generation);
        if let Some(seat) = record.and_then(|record| record.seats.get_mut(usize::from(seat.0))) {
            seat.worker = Some(worker);
            seat.filled = self.now;
        }
    }

    /// A worker for this seat, which is not its worker yet.
    pub(crate) fn spawn_worker(&mut self, generation: Generation, seat: Seat) -> WorkerId {
        self.worker_last += 1;
        let worker = WorkerId(self.worker_last);
        self.workers.insert(worker, Worker::new(generation, seat, self.now));
        self.allow_ready(worker);
        self.bind_seat(generation, seat, worker);
        self.push(Command::Spawn { worker, generation, seat });
        worker
    }

    /// A worker that starts must be ready so long from now.
    pub(crate) fn allow_ready(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get(&id).filter(|worker| worker.state.is_starting()) else { return };
        let plan = self.generations.get(&worker.generation).map(|record| &record.plan);
        let timeout = plan.map_or(Duration::ZERO, |plan| plan.ready_timeout);
        let ready_by = self.now.after(timeout).max(self.timers.at(Timer::Ready(id)).unwrap_or_default());
        self.timers.arm(Timer::Ready(id), ready_by);
    }

    pub(crate) fn on_spawned(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let generation = worker.generation;
        if worker.state != WorkerState::Spawning {
            return self.end_unproven(id);
        }
        worker.state = WorkerState::Starting { notified: false };
        if self.readiness(generation) != Readiness::Notify {
            self.timers.arm(Timer::Look(id), self.now.after(LOOK_PAUSE));
        }
    }

    pub(crate) fn readiness(&self, generation: Generation) -> Readiness {
        self.generations.get(&generation).map_or(Readiness::Notify, |record| record.plan.readiness)
    }

    /// The phase a step belongs to.
    fn phase(step: &UpgradeStep) -> Phase {
        match step {
            UpgradeStep::Queued | UpgradeStep::Launching | UpgradeStep::Joining => Phase::Launching,
            UpgradeStep::Canary | UpgradeStep::Steering(Goal::Share, _) => Phase::Canary,
            UpgradeStep::Steering(Goal::Batch | Goal::All, _) => Phase::Steering,
            UpgradeStep::Baking => Phase::Baking,
            UpgradeStep::Replacing | UpgradeStep::Retiring => Phase::Retiring,
            UpgradeStep::Restoring | UpgradeStep::SteeringBack | UpgradeStep::RollingBack => {
                Phase::RollingBack
            }
        }
    }

    pub(crate) fn enter_step(&mut self, step: UpgradeStep) {
        let Some(upgrade) = self.upgrade.as_mut() else { return };
        let (before, after, to) = (Self::phase(&upgrade.step), Self::phase(&step), upgrade.to);
        let begins = upgrade.step == UpgradeStep::Queued && upgrade.launched == 0;
        if before != after {
            upgrade.receipt.add_phase(before, self.now.since(upgrade.phase_since));
            upgrade.phase_since = self.now;
        }
        let is_urgent = step == UpgradeStep::SteeringBack;
        upgrade.step = step;
        // That it is told comes after that it is done.
        if (before != after || begins) && !is_urgent {
            self.report(Report::Entered(to, after));
        }
    }

    /// Takes the upgrade as far as it goes.
    pub(crate) fn advance_upgrade(&mut self) {
        while self.advance_step() {}
    }

    fn advance_step(&mut self) -> bool {
        let Some(upgrade) = self.upgrade.as_ref() else { return false };
        let (from, to) = (upgrade.from, upgrade.to);
        match upgrade.step {
            UpgradeStep::Queued => false,
            // A program that could not be replaced may name slots that the joining listeners would take.
            UpgradeStep::Launching => {
                !self.saving
                    && self.is_launched(to)
                    && self.groups.values().all(Group::is_told)
                    && self.begin_joining(to)
            }
            // Whoever may be chosen is to be retired, if it fails, by the next master, too.
            UpgradeStep::Joining => !self.saving && self.has_joined(to) && self.begin_steering(to),
            UpgradeStep::Steering(goal, _) => {
                self.is_steered()
                    && match goal {
                        Goal::Share => self.begin_share(),
                        Goal::Batch => self.replace_batch(from),
                        Goal::All => self.switched(from, to),
                    }
            }
            UpgradeStep::Canary => self.has_done_well() && self.begin_steering(to),
            UpgradeStep::Baking => self.has_done_well() && self.leave(from, to),
            UpgradeStep::Replacing => self.has_replaced(from) && self.queue_batch(to),
            UpgradeStep::Restoring => self.has_restored(from) && self.end_restoring(),
            UpgradeStep::Retiring => self.has_retired(from) && self.finish_upgrade(Outcome::Completed),
            UpgradeStep::SteeringBack => self.steered_back(to),
            UpgradeStep::RollingBack => {
                self.has_retired(Some(to)) && self.finish_upgrade(Outcome::RolledBack)
            }
        }
    }

    fn begin_joining(&mut self, to: Generation) -> bool {
        self.enter_step(UpgradeStep::Joining);
        for worker in self.workers_of(to) {
            if self.workers.get(&worker).is_some_and(|worker| worker.state == WorkerState::Ready) {
                self.join(worker, false);
            }
        }
        self.save();
        true
    }

    fn is_steered(&mut self) -> bool {
        let groups = &self.groups;
        match self.upgrade.as_mut().map(|upgrade| &mut upgrade.step) {
            Some(UpgradeStep::Steering(_, waiting)) => {
                waiting.retain(|group| groups.get(group).is_some_and(|group| !group.is_steered()));
                waiting.is_empty()
            }
            _ => false,
        }
    }

    fn switched(&mut self, from: Option<Generation>, to: Generation) -> bool {
        self.report(Report::Switched(to));
        self.save();
        self.active = Some(to);
        self.forgive_exits();
        let can_go_back = self.can_go_back();
        self.groups.values_mut().for_each(|group| group.has_unseen = false);
        let record = self.generations.get_mut(&to);
        let bake = record.map_or(Duration::ZERO, |record| {
            record.state = GenerationState::Active;
            record.plan.bake
        });
        match from.filter(|_| can_go_back && !bake.is_zero()) {
            Some(from) => self.begin_baking(from, bake),
            None => drop(self.leave(from, to)),
        }
        true
    }

    /// There is no way back from here on: the old generation goes.
    pub(crate) fn leave(&mut self, from: Option<Generation>, to: Generation) -> bool {
        self.end_trial();
        // Addresses that are no more were served until here, in case the upgrade failed.
        self.aim_away(Some(to));
        self.enter_step(UpgradeStep::Retiring);
        // Until here the start could still fail.
        if self.upgrade.as_ref().is_some_and(|upgrade| upgrade.receipt.trigger == Trigger::Takeover) {
            self.notify(Notice::Ready);
        }
        if let Some(from) = from {
            self.extend(from);
            self.retire(from);
        }
        true
    }

    /// The service manager is to wait as long as the way out of this generation may take.
    pub(crate) fn extend(&mut self, generation: Generation) {
        if let Some(plan) = self.generations.get(&generation).map(|record| &record.plan) {
            let by = plan.drain_timeout;
            self.notify(Notice::Extend(by));
        }
    }

    /// No listener of the generation is left.
    fn has_retired(&self, generation: Option<Generation>) -> bool {
        let record = generation.and_then(|generation| self.generations.get(&generation));
        record.is_none_or(|record| record.state == GenerationState::Draining)
    }

    fn finish_upgrade(&mut self, outcome: Outcome) -> bool {
        self.note_counters();
        let Some(mut upgrade) = self.upgrade.take() else { return false };
        let receipt = &mut upgrade.receipt;
        receipt.add_phase(Self::phase(&upgrade.step), self.now.since(upgrade.phase_since));
        receipt.outcome = outcome;
        receipt.took = self.now.since(receipt.started);
        let serial = receipt.serial;
        if outcome == Outcome::Completed {
            self.previous = self.known_origin(upgrade.from);
        }
        let old = upgrade.from.filter(|_| outcome == Outcome::Completed);
        let old = old.and_then(|old| self.generations.get_mut(&old));
        receipt.is_final = old.is_none();
        let receipt = upgrade.receipt.clone();
        let mut done: Vec<Caller> = Vec::new();
        match old {
            Some(old) => {
                old.receipt = Some(receipt.clone());
                for caller in upgrade.waiting {
                    let list = if caller.wait == Wait::Drained { &mut old.waiting } else { &mut done };
                    list.push(caller);
                }
            }
            None => done = upgrade.waiting,
        }
        self.report(Report::Ended(receipt));
        for caller in done {
            self.reply(caller, serial);
        }
        let is_takeover = upgrade.receipt.trigger == Trigger::Takeover;
        if is_takeover && outcome == Outcome::RolledBack && self.let_foreign_go() {
            return false;
        }
        let is_told = upgrade.from.is_none() || upgrade.receipt.trigger == Trigger::Signal;
        self.after_upgrade(upgrade.from, outcome, is_told)
    }

    fn after_upgrade(&mut self, from: Option<Generation>, outcome: Outcome, is_told: bool) -> bool {
        if self.stopping.is_some() {
            return false;
        }
        if from.is_none() && outcome == Outcome::RolledBack {
            self.stopping =
                Some(Stopping { mode: crate::event::StopMode::Fast, waiting: Vec::new(), code: 1 });
            self.drop_wishes();
            return false;
        }
        if is_told {
            self.notify(Notice::Ready);
        }
        self.begin_wish();
        self.advance_scaling();
        true
    }
}
