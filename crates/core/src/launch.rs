//! From the wish for a new generation to the switch: launch, readiness, joining the groups, steering; and the way
//! back when any of it fails.

use crate::command::{Command, Notice, Reason, Report};
use crate::event::{Trigger, Wait};
use crate::generation::{GenerationRecord, GenerationState, Upgrade, UpgradeStep, Wish};
use crate::group::Group;
use crate::id::{Generation, GroupId, Seat, Ticket, WorkerId};
use crate::master::{Master, Stopping};
use crate::plan::{Engine, Plan, Readiness};
use crate::receipt::{Outcome, Phase, PhaseTime, Receipt, ReceiptListener};
use crate::timers::Timer;
use crate::worker::{LOOK_PAUSE, Worker, WorkerState};
use alloc::vec::Vec;
use core::time::Duration;

/// How long a worker that never served may take to end after its stop signal.
const UNPROVEN_GRACE: Duration = Duration::from_secs(2);

impl Master {
    pub(crate) fn on_upgrade(&mut self, plan: Plan, trigger: Trigger, by: Option<(Ticket, Wait)>) {
        let mut wish = Wish { plan, trigger, waiting: by.into_iter().collect() };
        if self.stopping.is_some() {
            return self.refuse(&wish, Reason::Stopped);
        }
        if self.upgrade.is_none() {
            return self.begin_upgrade(wish);
        }
        if let Some(replaced) = self.wish.take() {
            self.report(Report::Superseded(replaced.trigger));
            wish.waiting.splice(0..0, replaced.waiting);
        }
        self.wish = Some(wish);
    }

    fn blank_receipt(&mut self, trigger: Trigger, plan: &Plan, to: Option<Generation>) -> Receipt {
        self.receipt_last += 1;
        Receipt {
            serial: self.receipt_last,
            from: self.active,
            to,
            trigger,
            outcome: Outcome::Completed,
            reason: None,
            started: self.now,
            took: Duration::ZERO,
            phases: Vec::new(),
            listeners: plan.groups.iter().map(|group| ReceiptListener::new(*group)).collect(),
            forced_kills: 0,
            connections_cut: Some(0),
            is_final: false,
        }
    }

    pub(crate) fn refuse(&mut self, wish: &Wish, reason: Reason) {
        let mut receipt = self.blank_receipt(wish.trigger, &wish.plan, None);
        receipt.outcome = Outcome::Refused;
        receipt.reason = Some(reason);
        receipt.is_final = true;
        let serial = receipt.serial;
        self.report(Report::Ended(receipt));
        for (to, _) in &wish.waiting {
            self.push(Command::Reply { to: *to, receipt: Some(serial) });
        }
    }

    fn begin_upgrade(&mut self, wish: Wish) {
        self.generation_last += 1;
        let to = Generation(self.generation_last);
        let receipt = self.blank_receipt(wish.trigger, &wish.plan, Some(to));
        self.open_groups(&wish.plan.groups);
        self.generations.insert(to, GenerationRecord::new(wish.plan));
        self.upgrade = Some(Upgrade {
            from: self.active,
            to,
            step: UpgradeStep::Queued,
            phase_since: self.now,
            receipt,
            waiting: wish.waiting,
        });
        self.note_counters(true);
        self.report(Report::Launching(to, wish.trigger));
        // A reload that is a command of the service manager's own is over when that command is, and its end needs no telling.
        if wish.trigger == Trigger::Signal && self.active.is_some() {
            self.notify(Notice::Reloading);
        }
        if self.must_queue(to) {
            self.report(Report::Queued(to));
        }
    }

    fn must_queue(&self, to: Generation) -> bool {
        let places = self.generations.get(&to).map_or(0, |record| usize::from(record.plan.max_draining));
        self.draining() >= places
    }

    /// As if the deadline of the oldest draining generation had come.
    pub(crate) fn on_hurry(&mut self) {
        let Some(Upgrade { to, step: UpgradeStep::Queued, .. }) = self.upgrade else { return };
        let mut draining = self.generations.iter().filter(|(_, r)| r.state == GenerationState::Draining);
        if let Some(oldest) =
            draining.next().map(|(generation, _)| *generation).filter(|_| self.must_queue(to))
        {
            for worker in self.workers_of(oldest) {
                self.on_kill_deadline(worker);
            }
        }
    }

    /// Lets a queued upgrade begin once there is a place.
    pub(crate) fn advance_launch(&mut self) {
        let Some(Upgrade { to, step: UpgradeStep::Queued, .. }) = self.upgrade else { return };
        // A program that could not be replaced may name slots that the sockets of seats would take.
        if self.must_queue(to) || !self.groups.values().all(Group::is_told) {
            return;
        }
        self.enter_step(UpgradeStep::Launching);
        let plan = self.generations.get(&to).map(|record| record.plan.clone());
        let Some(plan) = plan else { return };
        self.notify(Notice::Extend(plan.ready_timeout));
        for seat in 0..plan.workers {
            self.spawn(to, Seat(seat));
        }
    }

    pub(crate) fn spawn(&mut self, generation: Generation, seat: Seat) {
        let Some(record) = self.generations.get_mut(&generation) else { return };
        self.worker_last += 1;
        let worker = WorkerId(self.worker_last);
        if let Some(seat) = record.seats.get_mut(usize::from(seat.0)) {
            seat.worker = Some(worker);
            seat.filled = self.now;
        }
        self.workers.insert(worker, Worker::new(generation, seat, self.now));
        self.allow_ready(worker);
        self.bind_seat(generation, seat, worker);
        self.push(Command::Spawn { worker, generation, seat });
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
            UpgradeStep::Queued | UpgradeStep::Launching => Phase::Launching,
            UpgradeStep::Joining | UpgradeStep::Steering(_) => Phase::Steering,
            UpgradeStep::Retiring => Phase::Retiring,
            UpgradeStep::RollingBack => Phase::RollingBack,
        }
    }

    fn enter_step(&mut self, step: UpgradeStep) {
        let Some(upgrade) = self.upgrade.as_mut() else { return };
        let (before, after, to) = (Self::phase(&upgrade.step), Self::phase(&step), upgrade.to);
        let begins = upgrade.step == UpgradeStep::Queued;
        if before != after {
            upgrade
                .receipt
                .phases
                .push(PhaseTime { phase: before, took: self.now.since(upgrade.phase_since) });
            upgrade.phase_since = self.now;
        }
        upgrade.step = step;
        if before != after || begins {
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
                    && self.all_seats(to, WorkerState::Ready)
                    && self.groups.values().all(Group::is_told)
                    && self.begin_joining(to)
            }
            UpgradeStep::Joining => self.all_seats(to, WorkerState::Serving) && self.begin_steering(to),
            UpgradeStep::Steering(_) => self.is_steered() && self.switched(from, to),
            UpgradeStep::Retiring => self.has_retired(from) && self.finish_upgrade(Outcome::Completed),
            UpgradeStep::RollingBack => {
                self.has_retired(Some(to)) && self.finish_upgrade(Outcome::RolledBack)
            }
        }
    }

    fn all_seats(&self, generation: Generation, state: WorkerState) -> bool {
        let seats =
            self.generations.get(&generation).map(|record| record.seats.as_slice()).unwrap_or_default();
        seats.iter().all(|seat| {
            seat.worker
                .and_then(|worker| self.workers.get(&worker))
                .is_some_and(|worker| worker.state == state)
        })
    }

    fn begin_joining(&mut self, to: Generation) -> bool {
        self.enter_step(UpgradeStep::Joining);
        for worker in self.workers_of(to) {
            self.join(worker, false);
        }
        true
    }

    fn begin_steering(&mut self, to: Generation) -> bool {
        self.enter_step(UpgradeStep::Steering(self.groups.keys().copied().collect()));
        self.aim(&[(to, 1000)]);
        self.take_seats(to);
        let groups: Vec<GroupId> = self.groups.keys().copied().collect();
        for group in groups {
            self.pump(group);
        }
        true
    }

    fn is_steered(&mut self) -> bool {
        let groups = &self.groups;
        match self.upgrade.as_mut().map(|upgrade| &mut upgrade.step) {
            Some(UpgradeStep::Steering(waiting)) => {
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
        self.groups.values_mut().for_each(|group| group.has_unseen = false);
        if let Some(record) = self.generations.get_mut(&to) {
            record.state = GenerationState::Active;
        }
        // Addresses that are no more were served until here, in case the upgrade failed.
        self.aim_away(Some(to));
        self.enter_step(UpgradeStep::Retiring);
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

    /// The upgrade can't go on: what was launched is taken back, and the old generation serves on.
    pub(crate) fn fail_upgrade(&mut self, reason: Reason) {
        let Some(upgrade) = self.upgrade.as_mut() else { return };
        let (from, to) = (upgrade.from, upgrade.to);
        let was_steering = match upgrade.step {
            UpgradeStep::Queued | UpgradeStep::Launching | UpgradeStep::Joining => false,
            UpgradeStep::Steering(_) => true,
            // Past the switch the old generation may be half gone; in a rollback the first reason stands.
            UpgradeStep::Retiring | UpgradeStep::RollingBack => return,
        };
        upgrade.receipt.reason = Some(reason);
        self.report(Report::Failing(to, reason));
        self.enter_step(UpgradeStep::RollingBack);
        if was_steering {
            // Some groups may already have been steered: take them back, and let the new generation serve what it got.
            let target: Vec<(Generation, u16)> = from.into_iter().map(|from| (from, 1000)).collect();
            self.aim(&target);
            self.aim_away(from);
            if let Some(from) = from {
                self.take_seats(from);
            }
            return self.retire(to);
        }
        if let Some(record) = self.generations.get_mut(&to) {
            record.state = GenerationState::Retiring;
        }
        self.give_up_seats(to);
        for worker in self.workers_of(to) {
            self.end_unproven(worker);
        }
    }

    /// Ends a worker that never served: nobody can have been given to it.
    pub(crate) fn end_unproven(&mut self, id: WorkerId) {
        for listener in self.listeners_of(id) {
            let is_kept = self.listeners.get(&listener).is_some_and(|listener| self.waits_for_next(listener));
            // Under `cbpf` one that listens leaves when its worker has ended: before, its slot would not go with the handle.
            if let Some(listener) = self.listeners.get_mut(&listener).filter(|_| !is_kept) {
                listener.leaving |= !listener.listens || self.engine != Engine::Cbpf;
            }
        }
        self.timers.disarm(Timer::Ready(id));
        self.timers.disarm(Timer::Look(id));
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let is_there = worker.state != WorkerState::Spawning;
        if let WorkerState::Remains { .. } = worker.state {
            return;
        }
        worker.state = WorkerState::Dying;
        if is_there {
            self.push(Command::Signal { worker: id, signal: crate::command::Signal::Stop });
            self.timers.arm_by(Timer::Kill(id), self.now.after(UNPROVEN_GRACE));
        }
    }

    fn finish_upgrade(&mut self, outcome: Outcome) -> bool {
        self.note_counters(false);
        let Some(mut upgrade) = self.upgrade.take() else { return false };
        let receipt = &mut upgrade.receipt;
        let last = PhaseTime { phase: Self::phase(&upgrade.step), took: self.now.since(upgrade.phase_since) };
        receipt.phases.push(last);
        receipt.outcome = outcome;
        receipt.took = self.now.since(receipt.started);
        let serial = receipt.serial;
        let old = upgrade.from.filter(|_| outcome == Outcome::Completed);
        let old = old.and_then(|old| self.generations.get_mut(&old));
        receipt.is_final = old.is_none();
        let receipt = upgrade.receipt.clone();
        let mut done: Vec<Ticket> = Vec::new();
        match old {
            Some(old) => {
                old.receipt = Some(receipt.clone());
                for (ticket, wait) in upgrade.waiting {
                    let list = if wait == Wait::Drained { &mut old.waiting } else { &mut done };
                    list.push(ticket);
                }
            }
            None => done.extend(upgrade.waiting.iter().map(|(ticket, _)| *ticket)),
        }
        self.report(Report::Ended(receipt));
        for to in done {
            self.push(Command::Reply { to, receipt: Some(serial) });
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
            self.drop_wish();
            return false;
        }
        if is_told {
            self.notify(Notice::Ready);
        }
        if let Some(wish) = self.wish.take() {
            self.begin_upgrade(wish);
            self.advance_launch();
        }
        true
    }
}
