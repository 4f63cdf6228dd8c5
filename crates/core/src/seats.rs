//! Sockets that belong to seats: the master makes them, and hands each to the seat's workers one after the other. So no
//! process's end loses what waits in them.

use crate::command::{Command, Reason};
use crate::group::{Listener, Settling};
use crate::id::{Generation, GroupId, ListenerId, Seat, WorkerId};
use crate::master::Master;
use alloc::vec::Vec;

impl Master {
    /// Has the sockets made that this seat lacks.
    pub(crate) fn bind_seat(&mut self, generation: Generation, seat: Seat, worker: WorkerId) {
        for group in self.seat_groups(generation) {
            if self.seat_listener(group, seat).is_none() {
                self.push(Command::Bind { group, worker, generation, seat });
            }
        }
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
            (Some((generation, seat, state)), Ok(id)) => {
                let listener = Listener {
                    group,
                    generation,
                    worker,
                    seat,
                    of_seat: true,
                    handle: true,
                    listens: true,
                    // Of the generation that serves it waits for the next worker.
                    leaving: state.is_ending() && self.active != Some(generation),
                    by_shutdown: false,
                    key: None,
                    settling: Settling::Settled,
                    depth: None,
                    asked: 0,
                    gone: false,
                };
                self.listeners.insert(id, listener);
                self.outdate_looks(group);
            }
            (Some((_, seat, state)), Err(errno)) if !state.is_ending() => {
                self.fail_worker(worker, Reason::BindFailed(seat, group, errno))
            }
            (None, Ok(id)) => self.push(Command::Release { listener: id, shutdown: false }),
            (_, Err(_)) => {}
        }
    }

    /// From now on the seat's sockets are this worker's: what it had before it leaves behind goes its own way.
    pub(crate) fn take_seat(&mut self, worker: WorkerId) {
        let Some((generation, seat)) = self.workers.get(&worker).map(|w| (w.generation, w.seat)) else {
            return;
        };
        for group in self.seat_groups(generation) {
            let Some(id) = self.seat_listener(group, seat) else { continue };
            let Some(listener) = self.listeners.get_mut(&id) else { continue };
            listener.worker = worker;
            listener.generation = generation;
            self.mark_stale(group);
        }
    }

    /// Every worker of the generation takes its seat's sockets.
    pub(crate) fn take_seats(&mut self, generation: Generation) {
        for worker in self.workers_of(generation) {
            self.take_seat(worker);
        }
    }

    /// Sockets of seats nobody sits on any more, and nobody will.
    pub(crate) fn give_up_seats(&mut self, generation: Generation) {
        let workers = &self.workers;
        for listener in self.listeners.values_mut().filter(|l| l.of_seat && l.generation == generation) {
            listener.leaving |= !workers.contains_key(&listener.worker);
        }
    }
}
