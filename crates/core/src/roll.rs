//! Rolling: the new generation takes the old one's seats batch by batch.

use crate::command::Report;
use crate::generation::{GenerationState, Goal, SeatRecord, UpgradeStep};
use crate::id::{Generation, GroupId, Seat, WorkerId};
use crate::master::Master;
use crate::worker::WorkerState;
use alloc::collections::BTreeSet;
use alloc::vec::Vec;

impl Master {
    /// Fills the seats of the next batch, which may be all there are.
    pub(crate) fn launch_batch(&mut self) {
        let Some(upgrade) = self.upgrade.as_ref() else { return };
        let (from, to, first) = (upgrade.from, upgrade.to, upgrade.launched);
        // Of processes that were found nobody knows which could be given up for which.
        let can_roll = self.known_origin(from).is_some();
        let Some(plan) = self.generations.get(&to).map(|record| &record.plan) else { return };
        let batch = plan.batch.filter(|_| can_roll).unwrap_or(plan.workers);
        let (end, timeout) = (first.saturating_add(batch).min(plan.workers), plan.ready_timeout);
        if let Some(upgrade) = self.upgrade.as_mut() {
            upgrade.launched = end;
        }
        self.notify(crate::command::Notice::Extend(timeout));
        for seat in first..end {
            self.spawn(to, Seat(seat));
        }
    }

    /// All that were launched are ready; those of earlier batches serve.
    pub(crate) fn is_launched(&self, to: Generation) -> bool {
        let is_ready = |state| matches!(state, WorkerState::Ready | WorkerState::Serving);
        self.are_filled(to, self.launched(), is_ready)
    }

    /// All that were launched serve.
    pub(crate) fn has_joined(&self, to: Generation) -> bool {
        self.are_filled(to, self.launched(), |state| state == WorkerState::Serving)
    }

    fn launched(&self) -> u16 {
        self.upgrade.as_ref().map_or(0, |upgrade| upgrade.launched)
    }

    /// Each of these first seats has a worker in such a state.
    pub(crate) fn are_filled(
        &self,
        generation: Generation,
        first: u16,
        is_there: impl Fn(WorkerState) -> bool,
    ) -> bool {
        let seats =
            self.generations.get(&generation).map(|record| record.seats.as_slice()).unwrap_or_default();
        seats.iter().take(usize::from(first)).filter(|seat| !seat.is_given_up).all(|seat| {
            seat.worker
                .and_then(|worker| self.workers.get(&worker))
                .is_some_and(|worker| is_there(worker.state))
        })
    }

    /// What the generation is steered to next, and what for.
    pub(crate) fn next_goal(&self) -> (Goal, Vec<(Generation, u16)>) {
        let all = |to| (Goal::All, [(to, 1000)].into());
        let Some(upgrade) = self.upgrade.as_ref() else { return (Goal::All, Vec::new()) };
        let (from, to, launched) = (upgrade.from, upgrade.to, upgrade.launched);
        let Some(from) = from else { return all(to) };
        let seats = |generation| self.generations.get(&generation).map_or(0, |record| record.seats.len());
        if let Some(step) = self.next_share() {
            return (Goal::Share, [(to, step.share), (from, 1000 - step.share.min(1000))].into());
        }
        if usize::from(launched) >= seats(to) {
            return all(to);
        }
        // Every worker that serves after this batch gets the same.
        let left = seats(from) - usize::from(self.given_up(from, launched));
        let share = usize::from(launched) * 1000 / (usize::from(launched) + left).max(1);
        let share = u16::try_from(share).unwrap_or(1000);
        (Goal::Batch, [(to, share), (from, 1000 - share)].into())
    }

    /// So many old seats go with so many new ones. The last one stays until the switch: some addresses may be its alone.
    fn given_up(&self, from: Generation, launched: u16) -> u16 {
        let seats = self.generations.get(&from).map_or(0, |record| record.seats.len());
        launched.min(u16::try_from(seats.saturating_sub(1)).unwrap_or(u16::MAX))
    }

    /// The batch serves: as many old workers go.
    pub(crate) fn replace_batch(&mut self, from: Option<Generation>) -> bool {
        self.enter_step(UpgradeStep::Replacing);
        let Some(upgrade) = self.upgrade.as_ref() else { return false };
        let (to, launched) = (upgrade.to, upgrade.launched);
        let Some(from) = from else { return false };
        let given_up = self.given_up(from, launched);
        let Some(record) = self.generations.get_mut(&from) else { return false };
        let (mut old, mut waiting) = (BTreeSet::<WorkerId>::new(), Vec::new());
        for (seat, place) in (0..given_up).zip(&mut record.seats).filter(|(_, place)| !place.is_given_up) {
            place.is_given_up = true;
            waiting.append(&mut place.waiting);
            old.extend(place.worker.take());
            old.extend(place.next.take());
            self.timers.disarm(crate::timers::Timer::Respawn(from, Seat(seat)));
        }
        let of = self.generations.get(&to).map_or(0, |record| record.plan.workers);
        self.report(Report::Rolled(to, launched, of));
        if let Some(upgrade) = self.upgrade.as_mut() {
            upgrade.batches.push(old.clone());
        }
        // The sockets of these seats the new generation has already.
        self.groups.values_mut().filter(|group| group.wants(from)).for_each(|group| group.is_stale = true);
        // Whoever wanted another worker for one of these seats has it.
        self.retire_workers(from, old, waiting);
        true
    }

    /// The old workers of the batch have let go of their listeners.
    pub(crate) fn has_replaced(&self, from: Option<Generation>) -> bool {
        !self.retirements.values().any(|r| Some(r.generation) == from && !r.is_answered)
    }

    /// The next batch is launched as soon as not too many of those before finish connections.
    pub(crate) fn queue_batch(&mut self, to: Generation) -> bool {
        self.enter_step(UpgradeStep::Queued);
        if self.must_queue(to) {
            self.report(Report::Queued(to));
        }
        self.advance_launch();
        true
    }

    /// Batches whose old workers still finish connections, the oldest first.
    pub(crate) fn draining_batches(&self) -> impl Iterator<Item = &BTreeSet<WorkerId>> {
        let batches = self.upgrade.iter().flat_map(|upgrade| &upgrade.batches);
        batches.filter(|batch| batch.iter().any(|id| self.workers.contains_key(id)))
    }

    /// Seats of the generation that have, or had, a worker: from the first to behind the last.
    pub(crate) fn seats_in_use(&self, generation: Generation) -> (u16, u16) {
        let seats = self.generations.get(&generation).map(|r| r.seats.as_slice()).unwrap_or_default();
        let launched = self.upgrade.as_ref().filter(|upgrade| upgrade.to == generation);
        let launched = launched.map_or(u16::MAX, |upgrade| upgrade.launched);
        let is_used = |(seat, place): &(u16, &SeatRecord)| *seat < launched && !place.is_given_up;
        let mut used = (0..).zip(seats).filter(is_used).map(|(seat, _)| seat);
        match used.next() {
            Some(first) => (first, used.last().unwrap_or(first) + 1),
            None => (0, self.generations.get(&generation).map_or(0, |record| record.plan.workers)),
        }
    }

    /// Whether a worker of this generation serves a share of the new connections, or all, and can still be taken back.
    pub(crate) fn is_on_trial(&self, generation: Generation) -> bool {
        let is_open = |step: &UpgradeStep| {
            !matches!(
                step,
                UpgradeStep::Retiring
                    | UpgradeStep::Restoring
                    | UpgradeStep::SteeringBack
                    | UpgradeStep::RollingBack
            )
        };
        self.upgrade.as_ref().is_some_and(|upgrade| upgrade.to == generation && is_open(&upgrade.step))
    }

    /// The generation gets connections from here on.
    pub(crate) fn begin_steering(&mut self, to: Generation) -> bool {
        let (goal, target) = self.next_goal();
        let groups: BTreeSet<GroupId> = self.groups.keys().copied().collect();
        self.enter_step(UpgradeStep::Steering(goal, groups));
        if let Some(record) = self.generations.get_mut(&to).filter(|_| goal != Goal::All) {
            record.state = GenerationState::Canary;
        }
        self.aim(&target);
        self.take_seats(to);
        self.pump_all();
        true
    }
}
