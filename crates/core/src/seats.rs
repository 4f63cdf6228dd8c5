//! Sockets that belong to seats: the master makes them, and hands each to the seat's workers one after the other. So no
//! process's end loses what waits in them.

use crate::command::{Command, Reason};
use crate::generation::GenerationRecord;
use crate::group::{Group, Listener, Settling};
use crate::id::{Generation, GroupId, ListenerId, Seat, WorkerId};
use crate::master::Master;
use crate::plan::Engine;
use crate::worker::{Worker, WorkerState};
use alloc::vec::Vec;

/// No worker has this number.
const NOBODY: WorkerId = WorkerId(0);

impl Master {
    /// Has the sockets made that this seat lacks.
    pub(crate) fn bind_seat(&mut self, generation: Generation, seat: Seat, worker: WorkerId) {
        for group in self.lacking(generation, seat).collect::<Vec<_>>() {
            self.outdate_looks(group);
            self.push(Command::Bind { group, worker, generation, seat });
        }
    }

    /// A socket that the seat lacks must not be made now: one was asked for already; or it would take the last slot, which a
    /// program names that the kernel could not be told to replace yet.
    pub(crate) fn may_not_bind(&self, generation: Generation, seat: Seat) -> bool {
        let is_told = |group: &GroupId| self.groups.get(group).is_none_or(Group::is_told);
        let lacking: Vec<GroupId> = self.lacking(generation, seat).collect();
        let is_asked = || self.binding().any(|asked| asked == seat);
        let is_unclear = || self.engine == Engine::Cbpf && !lacking.iter().all(is_told);
        !lacking.is_empty() && (is_asked() || is_unclear())
    }

    /// Seats whose sockets were asked for and are not there yet.
    pub(crate) fn binding(&self) -> impl Iterator<Item = Seat> {
        let spawning = self.workers.values().filter(|worker| worker.state == WorkerState::Spawning);
        let lacks = |worker: &&Worker| self.lacking(worker.generation, worker.seat).next().is_some();
        spawning.filter(lacks).map(|worker| worker.seat)
    }

    fn lacking(&self, generation: Generation, seat: Seat) -> impl Iterator<Item = GroupId> {
        let groups = self.seat_groups(generation).into_iter();
        groups.filter(move |group| self.seat_listener(*group, seat).is_none())
    }

    /// The groups of a generation whose sockets the master makes.
    pub(crate) fn seat_groups(&self, generation: Generation) -> Vec<GroupId> {
        self.generations.get(&generation).map(|record| record.plan.seat_groups.clone()).unwrap_or_default()
    }

    fn seat_listener(&self, group: GroupId, seat: Seat) -> Option<ListenerId> {
        let is_it = |l: &Listener| l.of_seat && !l.leaving && l.group == group && l.seat == seat;
        self.listeners.iter().find(|(_, listener)| is_it(listener)).map(|(id, _)| *id)
    }

    pub(crate) fn on_bound(&mut self, group: GroupId, worker: WorkerId, result: Result<ListenerId, i32>) {
        let known = self.workers.get(&worker).map(|worker| (worker.generation, worker.seat, worker.state));
        match (known, result) {
            (Some((generation, seat, state)), Ok(id)) if self.seat_groups(generation).contains(&group) => {
                let listener = Listener {
                    group,
                    generation,
                    worker,
                    seat,
                    of_seat: true,
                    handle: true,
                    listens: true,
                    leaving: false,
                    // Workers of several generations had it, and what they left behind may hold it still.
                    by_shutdown: true,
                    key: None,
                    settling: Settling::Settled,
                    depth: None,
                    asked: 0,
                    gone: false,
                    flows_ended: None,
                };
                self.listeners.insert(id, listener);
                self.note_slot(group);
                if state.is_ending() {
                    self.leave_seats(generation);
                }
            }
            (Some((_, seat, state)), Err(errno)) if !state.is_ending() => {
                self.fail_worker(worker, Reason::BindFailed(seat, group, errno))
            }
            // Nobody is left to sit on it, or nobody asked for it.
            (_, Ok(id)) => self.push(Command::Release { listener: id, shutdown: false }),
            (_, Err(_)) => {}
        }
    }

    /// From now on the seat's sockets are its present worker's, or wait for the next one, where the generation is wanted.
    pub(crate) fn take_seat(&mut self, generation: Generation, seat: Seat) {
        let record = self.generations.get(&generation);
        let place = record.and_then(|record| record.seats.get(usize::from(seat.0)));
        let worker = place.and_then(|place| place.worker).unwrap_or(NOBODY);
        for group in self.seat_groups(generation) {
            let wanted = self.seat_listener(group, seat).filter(|_| self.is_wanted(group, generation));
            let Some(id) = wanted else { continue };
            let Some(listener) = self.listeners.get_mut(&id) else { continue };
            listener.worker = worker;
            listener.generation = generation;
            self.mark_stale(group);
        }
    }

    /// All seats of the generation take their sockets.
    pub(crate) fn take_seats(&mut self, generation: Generation) {
        let (first, end) = self.seats_in_use(generation);
        for seat in first..end {
            self.take_seat(generation, Seat(seat));
        }
    }

    /// What was made for a launch that has failed may be what a seat of the generation that serves lacked, and its next
    /// worker has it, too.
    pub(crate) fn leave_seats(&mut self, generation: Generation) {
        let is_launched = self.upgrade.as_ref().is_some_and(|upgrade| upgrade.to == generation);
        if let Some(active) = self.active.filter(|_| is_launched && !self.is_chosen(generation)) {
            self.take_seats(active);
        }
    }

    /// It belongs to a seat, and without a worker it waits for the seat's next one.
    pub(crate) fn waits_for_next(&self, listener: &Listener) -> bool {
        let generation = listener.generation;
        let record = self.generations.get(&generation);
        let place = record.and_then(|record| record.seats.get(usize::from(listener.seat.0)));
        // The generation serves, or is about to, and with this seat.
        listener.of_seat
            && place.is_some_and(|place| !place.is_given_up)
            && (record.is_some_and(GenerationRecord::serves) || self.is_wanted(listener.group, generation))
    }

    fn is_wanted(&self, group: GroupId, generation: Generation) -> bool {
        self.groups.get(&group).is_some_and(|group| group.wants(generation))
    }

    /// Sockets of seats nobody sits on any more, and nobody will.
    pub(crate) fn give_up_seats(&mut self, generation: Generation) {
        let of_nobody =
            |l: &Listener| l.of_seat && l.generation == generation && !self.workers.contains_key(&l.worker);
        let given_up = self.listeners.iter().filter(|(_, l)| of_nobody(l) && !self.waits_for_next(l));
        for listener in given_up.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.listeners.get_mut(&listener).into_iter().for_each(|listener| listener.leaving = true);
        }
    }
}
