//! More workers, fewer, or another one: seats of the generation that serves come, go, or change hands.

use crate::command::{Command, Reason, Report};
use crate::event::Number;
use crate::generation::SeatRecord;
use crate::group::Group;
use crate::id::{Generation, Seat, Ticket, WorkerId};
use crate::master::Master;
use crate::timers::Timer;
use crate::worker::{Worker, WorkerState};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The most workers a generation may have.
const WORKERS_MAX: u16 = 1024;

/// A number of workers that was asked for, until there are so many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Scaling {
    to: Target,
    pub(crate) waiting: Vec<Ticket>,
}

/// How many: so many, or so many more than whichever generation serves when that can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Target {
    Exactly(u16),
    More(i32),
}

impl Scaling {
    /// With so many at present.
    pub(crate) fn workers(&self, present: u16) -> u16 {
        let workers = match self.to {
            Target::Exactly(workers) => workers,
            Target::More(more) => {
                u16::try_from(i32::from(present).saturating_add(more).max(0)).unwrap_or(WORKERS_MAX)
            }
        };
        workers.clamp(1, WORKERS_MAX)
    }

    /// These will be there instead.
    pub(crate) fn settle(&mut self, workers: u16) {
        self.to = Target::Exactly(workers);
    }
}

impl Master {
    pub(crate) fn on_scale(&mut self, to: Number, by: Option<Ticket>) {
        if self.stopping.is_some() {
            return self.answer_all(by.into_iter().collect(), Some(Reason::Stopped));
        }
        let earlier = self.scaling.take();
        let asked = earlier.as_ref().map(|scaling| scaling.to);
        let add = |more| match asked.unwrap_or(Target::More(0)) {
            Target::Exactly(workers) => {
                let workers = i32::from(workers).saturating_add(more).max(1);
                Target::Exactly(u16::try_from(workers).unwrap_or(WORKERS_MAX))
            }
            Target::More(before) => Target::More(before.saturating_add(more)),
        };
        let to = match to {
            Number::Exactly(workers) => Target::Exactly(workers),
            Number::More => add(1),
            Number::Fewer => add(-1),
        };
        let mut waiting = earlier.map(|scaling| scaling.waiting).unwrap_or_default();
        if asked != Some(to) {
            self.answer_all(core::mem::take(&mut waiting), Some(Reason::Overtaken));
        }
        waiting.extend(by);
        self.scaling = Some(Scaling { to, waiting });
    }

    /// Takes the number as far as it goes: not while an upgrade decides who serves, or before one away from processes that
    /// were found, of which nobody knows which could go.
    pub(crate) fn advance_scaling(&mut self) {
        let active = self.known_origin(self.active);
        let Some(active) = active.filter(|_| self.upgrade.is_none() && self.stopping.is_none()) else {
            return;
        };
        let Some(record) = self.generations.get_mut(&active) else { return };
        let present = record.plan.workers;
        let Some(scaling) = self.scaling.as_mut() else { return };
        let workers = scaling.workers(present);
        scaling.settle(workers);
        let kept = record.seats.iter().take(usize::from(workers)).filter_map(|place| place.worker);
        let serves = |worker| self.workers.get(&worker).is_some_and(|w| w.state == WorkerState::Serving);
        // Whoever serves goes only when somebody else does.
        if workers < present && !kept.into_iter().any(serves) {
            return;
        }
        record.plan.workers = workers;
        if workers != present {
            self.report(Report::Scaled(active, workers));
            // The next master is to know how many there shall be.
            self.save();
        }
        if workers < present {
            let waiting = self.scaling.take().map(|scaling| scaling.waiting).unwrap_or_default();
            return self.remove_seats(active, workers, waiting);
        }
        if let Some(record) = self.generations.get_mut(&active) {
            record.seats.resize_with(usize::from(workers), SeatRecord::default);
        }
        for seat in present..workers {
            self.respawn(active, Seat(seat));
        }
        let is_told = self.groups.values().all(Group::is_told);
        if is_told && self.are_filled(active, workers, |state| state == WorkerState::Serving) {
            let waiting = self.scaling.take().map(|scaling| scaling.waiting).unwrap_or_default();
            self.answer_all(waiting, None);
        }
    }

    fn remove_seats(&mut self, generation: Generation, kept: u16, waiting: Vec<Ticket>) {
        let Some(record) = self.generations.get_mut(&generation) else { return };
        let removed = record.seats.split_off(usize::from(kept).min(record.seats.len()));
        let mut workers: BTreeSet<WorkerId> = BTreeSet::new();
        for (seat, place) in (kept..).zip(removed) {
            self.timers.disarm(Timer::Respawn(generation, Seat(seat)));
            workers.extend(place.worker.into_iter().chain(place.next));
            self.answer_all(place.waiting, Some(Reason::Overtaken));
        }
        self.retire_workers(generation, workers, waiting);
    }

    /// Why the worker of this seat can't be replaced now.
    #[must_use]
    pub fn keeps_worker(&self, seat: Seat) -> Option<Reason> {
        let seats = self.active.map_or(0, |active| self.seats(active));
        match () {
            () if self.stopping.is_some() => Some(Reason::Stopped),
            () if self.upgrade.is_some() => Some(Reason::Busy),
            () if seat.0 >= seats => Some(Reason::NoSuchSeat(seat, seats)),
            () => None,
        }
    }

    pub(crate) fn on_replace(&mut self, seat: Seat, by: Option<Ticket>) {
        let waiting: Vec<Ticket> = by.into_iter().collect();
        if let Some(reason) = self.keeps_worker(seat) {
            return self.answer_all(waiting, Some(reason));
        }
        let Some(active) = self.active else { return };
        let record = self.generations.get_mut(&active);
        let Some(place) = record.and_then(|record| record.seats.get_mut(usize::from(seat.0))) else { return };
        place.waiting.extend(waiting);
        if place.next.is_none() {
            self.timers.disarm(Timer::Respawn(active, seat));
            let worker = self.spawn_worker(active, seat);
            if let Some(record) = self.generations.get_mut(&active)
                && let Some(place) = record.seats.get_mut(usize::from(seat.0))
            {
                place.next = Some(worker);
            }
        }
    }

    /// Next workers that serve take the places of the present ones.
    pub(crate) fn advance_seats(&mut self) {
        let Some(active) = self.active else { return };
        let serves = |workers: &alloc::collections::BTreeMap<WorkerId, Worker>, id: WorkerId| {
            workers.get(&id).is_some_and(|worker| worker.state == WorkerState::Serving)
        };
        let Some(record) = self.generations.get_mut(&active) else { return };
        let (mut replaced, mut done) = (Vec::new(), Vec::new());
        for (seat, place) in (0..).zip(&mut record.seats) {
            if let Some(next) = place.next.filter(|next| serves(&self.workers, *next)) {
                let old = place.worker.replace(next);
                place.next = None;
                place.filled = self.workers.get(&next).map_or(self.now, |next| next.spawned);
                replaced.push((Seat(seat), old, core::mem::take(&mut place.waiting)));
            } else if place.next.is_none() && place.worker.is_some_and(|worker| serves(&self.workers, worker))
            {
                // The present worker ended, and what was to be the next one took its place.
                done.append(&mut place.waiting);
            }
        }
        self.answer_all(done, None);
        for (seat, old, waiting) in replaced {
            self.report(Report::SeatReplaced(active, seat));
            self.take_seat(active, seat);
            self.retire_workers(active, old.into_iter().collect(), waiting);
        }
    }

    /// Who waits for a worker that will not come is told why.
    pub(crate) fn seat_failed(&mut self, generation: Generation, seat: Seat, reason: Reason) {
        let record = self.generations.get_mut(&generation);
        if let Some(place) = record.and_then(|record| record.seats.get_mut(usize::from(seat.0))) {
            let waiting = core::mem::take(&mut place.waiting);
            self.answer_all(waiting, Some(reason));
        }
        if self.active == Some(generation) && self.upgrade.is_none() {
            let waiting = self.scaling.as_mut().map(|scaling| core::mem::take(&mut scaling.waiting));
            self.answer_all(waiting.unwrap_or_default(), Some(reason));
        }
    }

    /// Who waits for something of this generation is told that it will not be, or that it is so by other means.
    pub(crate) fn answer_seats(&mut self, generation: Generation, failure: Option<Reason>) {
        let Some(record) = self.generations.get_mut(&generation) else { return };
        let mut waiting = Vec::new();
        for place in &mut record.seats {
            waiting.append(&mut place.waiting);
        }
        self.answer_all(waiting, failure);
    }

    pub(crate) fn answer_all(&mut self, waiting: Vec<Ticket>, failure: Option<Reason>) {
        for to in waiting {
            self.push(Command::ReplyDone { to, failure });
        }
    }
}
