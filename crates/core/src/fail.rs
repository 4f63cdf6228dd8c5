//! The way back of an upgrade that fails: steered back, or restored batch by batch; the old generation serves on.

use crate::command::{Command, Reason, Report};
use crate::generation::{GenerationState, UpgradeStep};
use crate::group::Group;
use crate::id::{Generation, GroupId, Seat, WorkerId};
use crate::master::Master;
use crate::plan::Engine;
use crate::timers::Timer;
use crate::worker::WorkerState;
use alloc::vec::Vec;
use core::time::Duration;

/// How long a worker that never served may take to end after its stop signal.
const UNPROVEN_GRACE: Duration = Duration::from_secs(2);

impl Master {
    /// The upgrade can't go on: what was launched is taken back, and the old generation serves on.
    pub(crate) fn fail_upgrade(&mut self, reason: Reason) {
        let Some(upgrade) = self.upgrade.as_mut() else { return };
        let (from, to) = (upgrade.from, upgrade.to);
        match upgrade.step {
            // Past the switch the old generation may be half gone; on the way back the first reason stands.
            UpgradeStep::Retiring | UpgradeStep::SteeringBack | UpgradeStep::RollingBack => return,
            // There is nothing left to restore for.
            UpgradeStep::Restoring if self.stopping.is_some() => return self.steer_back(),
            UpgradeStep::Restoring => return,
            UpgradeStep::Queued
            | UpgradeStep::Launching
            | UpgradeStep::Joining
            | UpgradeStep::Steering(..)
            | UpgradeStep::Canary
            | UpgradeStep::Baking
            | UpgradeStep::Replacing => {}
        }
        upgrade.receipt.reason = Some(reason);
        let is_chosen = self.is_chosen(to);
        let must_restore = self.has_given_up(from) && self.stopping.is_none();
        if is_chosen && !must_restore {
            self.steer_back();
        }
        self.report(Report::Failing(to, reason));
        if is_chosen {
            self.end_starting(to);
            if must_restore {
                self.restore(from);
            }
            return;
        }
        self.enter_step(UpgradeStep::RollingBack);
        if let Some(record) = self.generations.get_mut(&to) {
            record.state = GenerationState::Retiring;
        }
        self.leave_seats(to);
        self.give_up_seats(to);
        for worker in self.workers_of(to) {
            self.end_unproven(worker);
        }
    }

    /// New connections may have been given to it.
    pub(crate) fn is_chosen(&self, generation: Generation) -> bool {
        let state = self.generations.get(&generation).map(|record| record.state);
        // Of sockets that are steered by nobody it gets its part, too.
        let has_part = matches!(state, Some(GenerationState::Canary | GenerationState::Active));
        has_part || self.groups.values().any(|group| group.wants(generation))
    }

    /// Some of its seats were left to the next generation.
    fn has_given_up(&self, generation: Option<Generation>) -> bool {
        let record = generation.and_then(|generation| self.generations.get(&generation));
        record.is_some_and(|record| record.seats.iter().any(|seat| seat.is_given_up))
    }

    /// Takes new connections back from the new generation, and lets it finish what it got.
    fn steer_back(&mut self) {
        let Some(upgrade) = self.upgrade.as_mut() else { return };
        let (from, to) = (upgrade.from, upgrade.to);
        upgrade.steering_back = Some(self.now);
        self.active = from;
        if let Some(record) = from.and_then(|from| self.generations.get_mut(&from)) {
            record.state = GenerationState::Active;
        }
        if let Some(record) = self.generations.get_mut(&to) {
            record.state = GenerationState::Retiring;
        }
        let target: Vec<(Generation, u16)> = from.into_iter().map(|from| (from, 1000)).collect();
        self.aim(&target);
        self.aim_away(from);
        if let Some(from) = from {
            self.take_seats(from);
        }
        self.give_up_seats(to);
        self.enter_step(UpgradeStep::SteeringBack);
        // First of all: every connection until then is one more in the wrong hands.
        self.pump_all();
        self.end_trial();
    }

    /// Ends workers of the generation that do not serve yet.
    fn end_starting(&mut self, generation: Generation) {
        for worker in self.workers_of(generation) {
            let state = self.workers.get(&worker).map(|worker| worker.state);
            if state.is_some_and(|state| state != WorkerState::Serving && !state.is_ending()) {
                self.end_unproven(worker);
            }
        }
    }

    /// There is no time for a look before the kernel is told.
    pub(crate) fn is_steering_back(&self) -> bool {
        self.upgrade.as_ref().is_some_and(|upgrade| upgrade.step == UpgradeStep::SteeringBack)
    }

    /// The kernel has confirmed it, on all listeners: all the rest can follow.
    pub(crate) fn steered_back(&mut self, to: Generation) -> bool {
        let is_told = self.groups.values().all(Group::is_told);
        let Some(upgrade) = self.upgrade.as_mut().filter(|_| is_told) else { return false };
        let took = upgrade.steering_back.take().map(|since| self.now.since(since));
        upgrade.receipt.steer_back = took.filter(|_| upgrade.from.is_some());
        self.enter_step(UpgradeStep::RollingBack);
        self.report(Report::SteeredBack(to, took.unwrap_or_default()));
        if self.engine == Engine::Cbpf {
            self.groups.values_mut().for_each(|group| group.is_stale = true);
        }
        self.retire(to);
        true
    }

    /// Old workers that were replaced come back first, from the old program: until they serve, the new ones do.
    fn restore(&mut self, from: Option<Generation>) {
        self.enter_step(UpgradeStep::Restoring);
        let Some(from) = from else { return };
        let Some(record) = self.generations.get_mut(&from) else { return };
        let mut seats = Vec::new();
        for (seat, place) in (0..).zip(&mut record.seats) {
            if core::mem::take(&mut place.is_given_up) {
                seats.push(Seat(seat));
            }
        }
        for seat in seats {
            self.respawn(from, seat);
        }
    }

    /// All old workers serve, or will not soon.
    pub(crate) fn has_restored(&self, from: Option<Generation>) -> bool {
        let serves = |state| state == WorkerState::Serving;
        from.is_none_or(|from| self.are_filled(from, u16::MAX, serves))
            || self.timers.is_armed(Timer::Breaker)
    }

    /// The new ones can go.
    pub(crate) fn end_restoring(&mut self) -> bool {
        self.steer_back();
        true
    }

    pub(crate) fn pump_all(&mut self) {
        let groups: Vec<GroupId> = self.groups.keys().copied().collect();
        for group in groups {
            self.pump(group);
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
}
