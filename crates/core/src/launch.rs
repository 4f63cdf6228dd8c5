//! From the wish for a new generation to the switch: launch, readiness, joining the groups, steering; and the way
//! back when any of it fails.

use crate::command::{Command, Notice, Order, Reason, Report};
use crate::event::{Found, Problem, Trigger, Wait};
use crate::generation::{GenerationRecord, GenerationState, Upgrade, UpgradeStep, Wish};
use crate::group::{Group, Listener, Settling};
use crate::id::{Generation, GroupId, ListenerId, Seat, Ticket, WorkerId};
use crate::master::{Master, Stopping};
use crate::plan::{Engine, Plan, Readiness};
use crate::receipt::{Outcome, Phase, PhaseTime, Receipt, ReceiptListener};
use crate::timers::Timer;
use crate::worker::{LOOK_PAUSE, LOOK_PAUSE_MAX, Worker, WorkerKind, WorkerState};
use alloc::vec::Vec;
use core::time::Duration;

/// How long a worker that never served may take to end after its stop signal.
const UNPROVEN_GRACE: Duration = Duration::from_secs(2);

/// Nothing is known yet of its listeners.
fn is_unknown(state: WorkerState) -> bool {
    matches!(state, WorkerState::Spawning | WorkerState::Starting { .. })
}

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
        self.report(Report::Launching(to, wish.trigger));
        if self.active.is_some() {
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

    /// Lets a queued upgrade begin once there is a place.
    pub(crate) fn advance_launch(&mut self) {
        let Some(Upgrade { to, step: UpgradeStep::Queued, .. }) = self.upgrade else { return };
        if self.must_queue(to) {
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
        let ready_by = self.now.after(record.plan.ready_timeout);
        self.worker_last += 1;
        let worker = WorkerId(self.worker_last);
        if let Some(seat) = record.seats.get_mut(usize::from(seat.0)) {
            seat.worker = Some(worker);
            seat.filled = self.now;
        }
        self.workers.insert(worker, Worker::new(generation, seat, self.now));
        self.timers.arm(Timer::Ready(worker), ready_by);
        self.push(Command::Spawn { worker, generation, seat });
    }

    pub(crate) fn on_spawned(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let generation = worker.generation;
        if worker.state != WorkerState::Spawning {
            return self.end_unproven(id);
        }
        worker.state = WorkerState::Starting { notified: false };
        if self.readiness(generation) == Readiness::Listen {
            self.timers.arm(Timer::Look(id), self.now.after(LOOK_PAUSE));
        }
    }

    fn readiness(&self, generation: Generation) -> Readiness {
        self.generations.get(&generation).map_or(Readiness::Notify, |record| record.plan.readiness)
    }

    // ---- readiness --------------------------------------------------------------------------------------------

    pub(crate) fn on_notified(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let generation = worker.generation;
        if worker.state == (WorkerState::Starting { notified: false }) {
            worker.state = WorkerState::Starting { notified: true };
            if self.readiness(generation) == Readiness::Notify {
                self.look(id);
            }
        }
    }

    pub(crate) fn on_extended(&mut self, id: WorkerId, by: Duration) {
        if let Some(ready_by) = self.timers.at(Timer::Ready(id)) {
            self.timers.arm(Timer::Ready(id), self.now.after(by).max(ready_by));
        }
    }

    pub(crate) fn look(&mut self, id: WorkerId) {
        match self.workers.get(&id).map(|worker| worker.state) {
            Some(WorkerState::Starting { .. }) => self.push(Command::Find { worker: id }),
            Some(WorkerState::Proving) => self.push(Command::Prove { worker: id }),
            Some(_) | None => {}
        }
    }

    pub(crate) fn on_found(&mut self, id: WorkerId, found: Found) {
        let readiness = self.readiness_of(id);
        let Some(worker) = self.workers.get_mut(&id).filter(|worker| is_unknown(worker.state)) else {
            if let Found::All(listeners) = found {
                self.refuse_handles(&listeners);
            }
            return;
        };
        match found {
            Found::All(listeners) => {
                worker.kind = Some(WorkerKind::Unmodified);
                self.adopt_listeners(id, &listeners, true);
                // Many programs listen long before they can serve. With the other engine nobody can be sent past
                // the listeners in force, so listening has to do.
                if readiness == Readiness::Listen && self.engine == Engine::Ebpf {
                    self.prove(id);
                } else {
                    self.proven(id);
                }
            }
            Found::NotYet(problem) if readiness == Readiness::Listen => self.look_later(id, problem),
            Found::NotYet(problem) | Found::Never(problem) => {
                let seat = worker.seat;
                self.fail_worker(id, Reason::WrongListeners(seat, id, problem));
            }
        }
    }

    fn readiness_of(&self, id: WorkerId) -> Readiness {
        self.workers.get(&id).map_or(Readiness::Notify, |worker| self.readiness(worker.generation))
    }

    fn prove(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.state = WorkerState::Proving;
            worker.pause = LOOK_PAUSE;
        }
        self.push(Command::Prove { worker: id });
    }

    pub(crate) fn on_proved(&mut self, id: WorkerId, accepted: bool) {
        let is_proving = self.workers.get(&id).is_some_and(|worker| worker.state == WorkerState::Proving);
        match (is_proving, accepted) {
            (true, true) => self.proven(id),
            (true, false) => self.look_later(id, Problem::NotAccepting),
            (false, _) => {}
        }
    }

    fn look_later(&mut self, id: WorkerId, problem: Problem) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.missing = Some(problem);
        let pause = worker.pause;
        worker.pause = (pause * 2).min(LOOK_PAUSE_MAX);
        self.timers.arm(Timer::Look(id), self.now.after(pause));
    }

    pub(crate) fn on_ready(&mut self, id: WorkerId, listeners: &[(GroupId, ListenerId)]) {
        let Some(worker) = self.workers.get_mut(&id).filter(|worker| is_unknown(worker.state)) else {
            return self.refuse_handles(listeners);
        };
        worker.kind = Some(WorkerKind::Handover);
        let (seat, generation) = (worker.seat, worker.generation);
        let groups =
            self.generations.get(&generation).map(|record| record.plan.groups.clone()).unwrap_or_default();
        self.adopt_listeners(id, listeners, false);
        match groups.iter().find(|group| !listeners.iter().any(|(of, _)| of == *group)) {
            Some(group) => {
                self.fail_worker(id, Reason::WrongListeners(seat, id, Problem::NotListening(*group)))
            }
            None => self.proven(id),
        }
    }

    fn adopt_listeners(&mut self, worker: WorkerId, listeners: &[(GroupId, ListenerId)], listens: bool) {
        let Some(Worker { generation, seat, .. }) = self.workers.get(&worker) else { return };
        for (group, id) in listeners {
            let listener = Listener {
                group: *group,
                generation: *generation,
                worker,
                seat: *seat,
                handle: true,
                listens,
                leaving: false,
                by_shutdown: false,
                key: None,
                settling: Settling::Settled,
                depth: None,
                asked: 0,
                gone: false,
            };
            self.listeners.insert(*id, listener);
        }
    }

    fn refuse_handles(&mut self, listeners: &[(GroupId, ListenerId)]) {
        for (_, listener) in listeners {
            self.push(Command::Release { listener: *listener, shutdown: false });
        }
    }

    /// The worker can serve. A respawn joins at once; a new generation waits until all of it is ready.
    fn proven(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.state = WorkerState::Ready;
        let generation = worker.generation;
        self.timers.disarm(Timer::Ready(id));
        self.timers.disarm(Timer::Look(id));
        self.report(Report::WorkerReady(id));
        if self.active == Some(generation) {
            self.join(id);
        }
    }

    fn join(&mut self, id: WorkerId) {
        let bound: Vec<ListenerId> = self
            .listeners_of(id)
            .into_iter()
            .filter(|l| self.listeners.get(l).is_some_and(|l| !l.listens))
            .collect();
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.state = if bound.is_empty() { WorkerState::Serving } else { WorkerState::Joining };
        }
        for listener in &bound {
            self.push(Command::Listen { listener: *listener });
        }
        if bound.is_empty() {
            self.joined(id);
        }
    }

    pub(crate) fn on_listening(&mut self, id: ListenerId, result: Result<(), i32>) {
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        let worker = listener.worker;
        listener.listens |= result.is_ok();
        let Some(record) = self.workers.get_mut(&worker).filter(|w| w.state == WorkerState::Joining) else {
            return;
        };
        if let Err(errno) = result {
            let seat = record.seat;
            return self.fail_worker(worker, Reason::ListenFailed(seat, worker, errno));
        }
        if self.listeners.values().all(|l| l.worker != worker || l.listens) {
            record.state = WorkerState::Serving;
            self.push(Command::Tell { worker, order: Order::Serve });
            self.joined(worker);
        }
    }

    fn joined(&mut self, id: WorkerId) {
        for listener in self.listeners_of(id) {
            let Some(Listener { group, generation, .. }) = self.listeners.get(&listener) else { continue };
            let (group, generation) = (*group, *generation);
            if self.groups.get(&group).is_some_and(|group| group.wants(generation)) {
                self.mark_stale(group);
            }
        }
    }

    pub(crate) fn on_ready_timeout(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get(&id).filter(|worker| worker.state.is_starting()) {
            let reason = Reason::NotReady(worker.seat, id, worker.missing);
            self.fail_worker(id, reason);
        }
    }

    // ---- the upgrade's steps ----------------------------------------------------------------------------------

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
                self.all_seats(to, WorkerState::Ready)
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
            self.join(worker);
        }
        true
    }

    fn begin_steering(&mut self, to: Generation) -> bool {
        self.note_counters(true);
        self.enter_step(UpgradeStep::Steering(self.groups.keys().copied().collect()));
        self.aim(&[(to, 1000)]);
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
        self.active = Some(to);
        self.forgive_exits();
        if let Some(record) = self.generations.get_mut(&to) {
            record.state = GenerationState::Active;
        }
        // Addresses that are no more were served until here, in case the upgrade failed.
        self.aim_away(Some(to));
        self.enter_step(UpgradeStep::Retiring);
        if let Some(from) = from {
            self.retire(from);
        }
        true
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
            return self.retire(to);
        }
        if let Some(record) = self.generations.get_mut(&to) {
            record.state = GenerationState::Retiring;
        }
        for worker in self.workers_of(to) {
            self.end_unproven(worker);
        }
    }

    /// Ends a worker that never served: nobody can have been given to it.
    pub(crate) fn end_unproven(&mut self, id: WorkerId) {
        for listener in self.listeners_of(id) {
            if let Some(listener) = self.listeners.get_mut(&listener) {
                listener.leaving = true;
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
        self.after_upgrade(upgrade.from, outcome)
    }

    fn after_upgrade(&mut self, from: Option<Generation>, outcome: Outcome) -> bool {
        if self.stopping.is_some() {
            return false;
        }
        if from.is_none() && outcome == Outcome::RolledBack {
            self.stopping =
                Some(Stopping { mode: crate::event::StopMode::Fast, waiting: Vec::new(), code: 1 });
            self.drop_wish();
            return false;
        }
        self.notify(Notice::Ready);
        if let Some(wish) = self.wish.take() {
            self.begin_upgrade(wish);
            self.advance_launch();
        }
        true
    }
}
