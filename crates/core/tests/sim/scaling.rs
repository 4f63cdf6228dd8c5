//! The part of the judge that counts seats: how many there shall be, and whose turn on them it is.

use crate::kernel::Kernel;
use crate::life::Life;
use crate::phases::Way;
use crate::protocol::Protocol;
use reuseportd_core::{Event, Generation, Number, Phase, Plan, Reason, Report, Seat, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// A number that was wished while an upgrade ran.
#[derive(Clone, Copy, Default)]
struct Later {
    exactly: Option<u16>,
    more: Option<i32>,
    /// With so many the generation is launched.
    launched: Option<u16>,
}

impl Later {
    fn wish(&mut self, number: Number) {
        let more = self.more.unwrap_or_default();
        match (number, self.exactly) {
            (Number::Exactly(wanted), _) => self.exactly = Some(wanted),
            (_, Some(wanted)) => self.exactly = Some(apply(number, wanted)),
            (Number::More, None) => self.more = Some(more + 1),
            (Number::Fewer, None) => self.more = Some(more - 1),
        }
    }

    /// Where this many would be otherwise.
    fn from(self, present: u16) -> u16 {
        let more = i32::from(self.launched.unwrap_or(present)) + self.more.unwrap_or_default();
        self.exactly.unwrap_or(u16::try_from(more.clamp(1, 1024)).unwrap_or(1))
    }
}

/// Wishes for a number of workers.
#[derive(Clone, Default)]
pub(crate) struct Scaling {
    /// So many there shall be in the generation that serves.
    wanted: u16,
    /// What was wished while an upgrade ran.
    later: Later,
    /// Another worker was asked for.
    replacing: BTreeSet<(Generation, Seat)>,
    /// The one that is to take the seat.
    next: BTreeMap<(Generation, Seat), WorkerId>,
}

fn apply(number: Number, present: u16) -> u16 {
    match number {
        Number::Exactly(wanted) => wanted.clamp(1, 1024),
        Number::More => (present + 1).min(1024),
        Number::Fewer => present.saturating_sub(1).max(1),
    }
}

impl Scaling {
    pub(crate) fn event(
        &mut self,
        event: &Event,
        waits: bool,
        upgrades: bool,
        stops: bool,
        active: Option<(Generation, u16)>,
    ) {
        match (event, active) {
            (Event::Scale { .. } | Event::Replace { .. }, _) if stops => {}
            (Event::Scale { to, .. }, _) if waits => self.later.wish(*to),
            (Event::Scale { to, .. }, Some(_)) => self.wanted = apply(*to, self.wanted),
            (Event::Replace { seat, .. }, Some((active, seats)))
                if !upgrades && seat.0 < seats && !self.next.contains_key(&(active, *seat)) =>
            {
                self.replacing.insert((active, *seat));
            }
            (Event::Exited { worker, .. } | Event::SpawnFailed { worker, .. }, _) => {
                self.next.retain(|_, next| next != worker);
            }
            _ => {}
        }
    }

    /// Its worker has ended: the one that was to take the seat has it.
    fn vacated(&mut self, generation: Generation, seat: Seat) {
        self.next.remove(&(generation, seat));
    }

    /// So many seats the next generation has.
    pub(crate) fn launching(&mut self, plan: &Plan, present: Option<&Plan>) -> u16 {
        let later = std::mem::take(&mut self.later);
        if present.is_none_or(|present| present.config != plan.config) {
            return plan.workers;
        }
        self.wanted = later.from(self.wanted);
        // What was wished is so many from here on.
        self.later.exactly = later.exactly.or(later.more.map(|_| self.wanted));
        self.later.launched = Some(self.wanted);
        self.wanted
    }

    /// An upgrade has ended, and this many seats serve, if that can be changed.
    pub(crate) fn settled(&mut self, workers: Option<u16>) {
        if let Some(workers) = workers {
            self.wanted = std::mem::take(&mut self.later).from(workers);
        }
        self.replacing.clear();
    }

    pub(crate) fn wanted(&self) -> u16 {
        self.wanted
    }

    /// Whether this worker was asked for beside the seat's present one.
    pub(crate) fn takes_place(&mut self, generation: Generation, seat: Seat, worker: WorkerId) -> bool {
        let is_next = self.replacing.remove(&(generation, seat));
        if is_next {
            self.next.insert((generation, seat), worker);
        }
        is_next
    }
}

impl Protocol {
    /// So many workers of the generation that serves, do.
    pub(crate) fn serving(&self) -> u16 {
        let serves = |life: &&Life| {
            Some(life.generation) == self.active()
                && life.ready
                && !life.given_up
                && (!life.replaced || life.killed)
                && life.exited.is_none()
                && life.stopped.is_none()
        };
        u16::try_from(self.lives.values().filter(serves).count()).unwrap_or(u16::MAX)
    }

    pub(crate) fn vacate(&mut self, worker: WorkerId) {
        let had_seat = self.lives.get(&worker).filter(|life| !life.given_up);
        if let Some(life) = had_seat.copied() {
            self.scaling.vacated(life.generation, life.seat);
        }
    }

    /// It has served, and was not told to end.
    pub(crate) fn is_left_alone(&self, worker: WorkerId) -> bool {
        let is_its = |life: &Life| life.ready && life.stopped.is_none() && !life.given_up && !life.killed;
        self.lives.get(&worker).is_some_and(is_its)
    }

    /// It goes, though its generation stays.
    pub(crate) fn is_given_up(&self, worker: WorkerId) -> bool {
        self.lives.get(&worker).is_some_and(|life| life.given_up)
    }

    /// Seats of an upgrade by batches that should have somebody who serves, and have not.
    pub(crate) fn vacant_seats(
        &self,
        from: Generation,
        to: Generation,
        works: impl Fn(&WorkerId) -> bool,
    ) -> usize {
        let (rolled, is_failing) =
            self.phases.way.as_ref().map_or((0, false), |way| (way.rolled, way.is_failing));
        let is_filled = |generation, seat: u16| {
            let sits =
                |life: &Life| life.generation == generation && life.seat == Seat(seat) && !life.given_up;
            self.lives
                .iter()
                .any(|(id, life)| sits(life) && self.is_serving(*id) && works(id) && !life.replaced)
        };
        // An old worker was back, and had its part again, but ended.
        let is_lost = |seat: u16| {
            let had_part = |life: &Life| life.generation == from && life.seat == Seat(seat) && life.ready;
            let was_back = self.lives.values().any(|life| had_part(life) && !life.given_up);
            was_back && !is_filled(from, seat)
        };
        // When the last batch had joined, but steering to it failed, its new workers have the part until the old are back.
        let is_lost_too = |seat: u16| {
            let had_part = |life: &Life| life.generation == to && life.seat == Seat(seat) && life.ready;
            is_failing && self.lives.values().any(had_part) && !is_filled(to, seat)
        };
        let new = (0..rolled).filter(|seat| !is_filled(to, *seat) || is_lost(*seat)).count();
        let old = self.plans[&from].workers;
        new + (rolled.min(old - 1)..old).filter(|seat| !is_filled(from, *seat) || is_lost_too(*seat)).count()
    }

    /// The way out of these workers begins, unless they are on it.
    fn retire(&mut self, generation: Generation, now: u64, is_it: impl Fn(&Life) -> bool) {
        for life in self.lives.values_mut().filter(|life| life.generation == generation && is_it(life)) {
            life.retired.get_or_insert(now);
        }
    }

    fn give_up(&mut self, generation: Generation, is_it: impl Fn(Seat) -> bool) -> Vec<WorkerId> {
        let its = |life: &Life| life.generation == generation && is_it(life.seat) && !life.given_up;
        let mut given_up = Vec::new();
        for (id, life) in self.lives.iter_mut().filter(|(_, life)| its(life)) {
            life.given_up = true;
            // What is left of one that had ended before is nobody of the batch.
            let is_there = life.exited.is_none() && life.answered != Some(false);
            given_up.extend(is_there.then_some(*id));
        }
        given_up
    }

    /// What an upgrade, or the operator, makes of seats.
    pub(crate) fn trial(&mut self, report: &Report, now: u64, kernel: &Kernel) {
        let skip = |group| self.is_unclear(group);
        match report {
            Report::Entered(generation, phase) => {
                self.phases.entered(*generation, *phase);
                if matches!(phase, Phase::Canary | Phase::Steering) {
                    self.served(*generation);
                }
                let leaves = |way: &&Way| way.is_switched && *phase == Phase::Retiring;
                let is_switched = self.phases.way.as_ref().filter(leaves);
                if let Some(from) = is_switched.and_then(|way| way.from) {
                    self.retire(from, now, |_| true);
                }
            }
            Report::Failing(_, reason) => self.fails(*reason),
            Report::Shared(generation, share) => {
                let unclear: BTreeSet<_> = kernel.groups.keys().copied().filter(|g| skip(*g)).collect();
                self.phases.shared(*generation, *share, kernel, |group| unclear.contains(&group));
            }
            Report::Rolled(_, launched, _) => {
                let unclear: BTreeSet<_> = kernel.groups.keys().copied().filter(|g| skip(*g)).collect();
                let from = self.phases.way.as_ref().and_then(|way| way.from);
                let gone = from.map_or(0, |from| launched.min(&(self.plans[&from].workers - 1)).to_owned());
                let old = from.map(|from| self.give_up(from, |seat| seat.0 < gone)).unwrap_or_default();
                from.into_iter().for_each(|from| self.retire(from, now, |life| life.given_up));
                self.phases.rolled(*launched, old, kernel, |group| unclear.contains(&group));
            }
            Report::SteeredBack(generation, _) => {
                self.retire(*generation, now, |_| true);
                self.phases.tally.steered_back += 1;
                self.phases.way.iter_mut().for_each(|way| way.is_back = true);
            }
            Report::Scaled(generation, workers) => {
                self.phases.scaled(*generation, *workers);
                if let Some(plan) = self.plans.get_mut(generation) {
                    plan.workers = *workers;
                }
                let (generation, workers) = (*generation, *workers);
                self.give_up(generation, |seat| seat.0 >= workers);
                self.retire(generation, now, |life| life.given_up);
                self.forget_respawns(generation, |seat| seat.0 >= workers);
                self.abandon(kernel, workers);
                self.scaling.next.retain(|(of, seat), _| *of != generation || seat.0 < workers);
            }
            Report::SeatReplaced(generation, seat) => {
                self.phases.tally.replaced += 1;
                let next = self.scaling.next.remove(&(*generation, *seat));
                let Some(next) = next else { panic!("{report:?}, but nobody asked for it") };
                assert!(self.is_serving(next), "{report:?} by {next:?}, which does not serve");
                self.give_up(*generation, |of| of == *seat);
                if let Some(life) = self.lives.get_mut(&next) {
                    life.given_up = false;
                }
                self.retire(*generation, now, |life| life.given_up);
            }
            Report::Drained(generation) => self.phases.drained(*generation),
            Report::Ended(receipt) if self.is_new(receipt) => {
                self.phases.ended(receipt);
                // Those of seats that are no more leave with their workers, whenever that may be.
                self.abandon_others(kernel);
            }
            _ => {}
        }
    }

    fn fails(&mut self, reason: Reason) {
        // Whoever stood by serves again.
        let standby = self.phases.standby();
        self.phases.failing();
        self.back_to(standby);
        self.phases.tally.taken_back += u64::from(reason == Reason::TakenBack);
        self.phases.tally.queues += u64::from(matches!(reason, Reason::QueueGrows(_)));
        let way = self.phases.way.as_ref().map(|way| (way.from, way.rolled));
        if let Some((Some(from), rolled)) = way {
            self.forget_respawns(from, |seat| seat.0 < rolled);
        }
        if let Reason::Stuck(_, worker) | Reason::WrongListeners(_, worker, _) = reason
            && let Some(life) = self.lives.get_mut(&worker)
        {
            life.replaced = true;
        }
    }
}
