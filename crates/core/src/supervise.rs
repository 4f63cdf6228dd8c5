//! Ends of workers that should serve, and what follows: their seats are filled again, but not for ever.

use crate::command::{Command, Reason, Report, Signal};
use crate::event::Exit;
use crate::generation::SeatRecord;
use crate::id::{Generation, Seat, WorkerId};
use crate::master::Master;
use crate::timers::Timer;
use crate::worker::{LOOK_PAUSE, LOOK_PAUSE_MAX, WorkerState};
use alloc::vec::Vec;
use core::time::Duration;

/// How long the remains of a crashed worker may take after SIGTERM.
const REMAINS_GRACE: Duration = Duration::from_secs(1);

impl Master {
    pub(crate) fn on_exited(&mut self, id: WorkerId, how: Exit, remains: bool) {
        let Some(worker) = self.workers.get(&id) else { return };
        let (was, generation) = (worker.state, worker.generation);
        // What a foreign server leaves is not ours to end.
        let remains = remains && !self.is_untouchable(generation);
        if let WorkerState::Remains { .. } = was {
            return self.report(Report::Bug("a worker ended twice"));
        }
        self.report(Report::WorkerExited { worker: id, how, asked: was.is_ending() });
        self.timers.disarm(Timer::Ready(id));
        self.timers.disarm(Timer::Look(id));
        if remains {
            self.end_remains(id, was.is_ending());
        } else {
            self.forget_worker(id);
        }
        self.vacate(id, was, how);
        if self.is_foreign(generation) {
            self.foreign_ended();
        }
        if !remains {
            // Last: until then the shell knows whose end it was, and what its last words were.
            self.push(Command::Reap { worker: id });
        }
    }

    /// Processes the worker started go with it; those of a worker that was told to stop may finish as it might have.
    fn end_remains(&mut self, id: WorkerId, asked: bool) {
        let deadline = self.timers.at(Timer::Kill(id)).filter(|_| asked);
        self.timers.disarm(Timer::Kill(id));
        let until = deadline.unwrap_or(self.now.after(REMAINS_GRACE));
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.state = WorkerState::Remains { until };
            worker.pause = LOOK_PAUSE;
        }
        self.push(Command::Signal { worker: id, signal: Signal::TerminateGroup });
        self.timers.arm(Timer::Remains(id), self.now.after(LOOK_PAUSE));
        for listener in self.listeners_of(id) {
            if let Some(group) = self.listeners.get(&listener).map(|listener| listener.group) {
                self.mark_stale(group);
            }
        }
    }

    pub(crate) fn look_at_remains(&mut self, id: WorkerId) {
        self.push(Command::CheckRemains { worker: id });
        self.timers.arm(Timer::Remains(id), self.now.after(LOOK_PAUSE_MAX));
    }

    pub(crate) fn on_remains(&mut self, id: WorkerId, left: bool) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let WorkerState::Remains { until } = worker.state else { return };
        if !left {
            self.push(Command::Reap { worker: id });
            return self.forget_worker(id);
        }
        let pause = worker.pause;
        worker.pause = (pause * 2).min(LOOK_PAUSE_MAX);
        if self.now >= until {
            self.push(Command::Signal { worker: id, signal: Signal::KillGroup });
        }
        self.timers.arm(Timer::Remains(id), self.now.after(pause));
    }

    /// No process of the worker is left. Of its listeners only those live on that the master holds a handle of.
    fn forget_worker(&mut self, id: WorkerId) {
        let timers = [Timer::Kill, Timer::Remains, Timer::Ready, Timer::Look, Timer::Watchdog];
        for timer in timers.map(|timer| timer(id)) {
            self.timers.disarm(timer);
        }
        if let Some(worker) = self.workers.get(&id) {
            self.leave_seats(worker.generation);
        }
        for listener in self.listeners_of(id) {
            let is_kept = self.listeners.get(&listener).is_some_and(|listener| self.waits_for_next(listener));
            let Some(record) = self.listeners.get_mut(&listener) else { continue };
            let group = record.group;
            record.leaving = !is_kept;
            if !record.handle {
                self.forget_listener(listener);
            }
            self.mark_stale(group);
        }
        self.workers.remove(&id);
    }

    /// The seat is empty. What that means depends on what the generation was about.
    fn vacate(&mut self, id: WorkerId, was: WorkerState, how: Exit) {
        self.look_at_leaving(id, was);
        let Some((generation, seat)) = self.seat_of(id) else { return };
        let is_next = self.empty_seat(generation, seat, id);
        let has_served = was == WorkerState::Serving;
        let reason = if has_served { Reason::Crashed(seat, id, how) } else { Reason::Exited(seat, id, how) };
        if self.is_on_trial(generation) {
            return self.fail_upgrade(reason);
        }
        if was.is_starting() || is_next {
            self.seat_failed(generation, seat, reason);
        }
        if !is_next {
            self.refill(generation, seat);
        }
    }

    /// Its worker has gone, or the one that was to take its place; whether it was that.
    fn empty_seat(&mut self, generation: Generation, seat: Seat, id: WorkerId) -> bool {
        let record = self.generations.get_mut(&generation);
        let Some(place) = record.and_then(|record| record.seats.get_mut(usize::from(seat.0))) else {
            return false;
        };
        if place.worker == Some(id) {
            // The one that is on its way needs no other beside it.
            place.worker = place.next.take();
            // How long the one that ended ran decides about the pause before another.
            if let Some(next) = place.worker.and_then(|next| self.workers.get(&next)) {
                place.filled = next.spawned;
            }
        } else {
            place.next = None;
            return true;
        }
        false
    }

    /// The worker's retirement may go on.
    fn look_at_leaving(&mut self, id: WorkerId, was: WorkerState) {
        let pause = if was == WorkerState::Dying { LOOK_PAUSE } else { Duration::ZERO };
        let at = self.now.after(pause);
        for (retirement, _) in self.retirements.iter().filter(|(_, r)| r.workers.contains(&id)) {
            self.timers.arm_by(Timer::Retire(*retirement), at);
        }
    }

    fn seat_of(&self, id: WorkerId) -> Option<(Generation, Seat)> {
        self.generations.iter().find_map(|(generation, record)| {
            let seat = record.seats.iter().position(|seat| [seat.worker, seat.next].contains(&Some(id)))?;
            Some((*generation, Seat(u16::try_from(seat).ok()?)))
        })
    }

    fn refill(&mut self, generation: Generation, seat: Seat) {
        if self.stopping.is_some() || self.is_foreign(generation) {
            return;
        }
        let now = self.now;
        let Some(record) = self.generations.get_mut(&generation).filter(|record| record.serves()) else {
            return;
        };
        let Some(place) = record.seats.get_mut(usize::from(seat.0)).filter(|place| place.is_vacant()) else {
            return;
        };
        place.restarts += 1;
        let pause = place.backoff.after_exit(now.since(place.filled), &record.plan);
        let breaker = record.plan.breaker;
        if self.exits.note(now, &breaker) && !self.timers.is_armed(Timer::Breaker) {
            self.timers.arm(Timer::Breaker, now.after(breaker.cooldown));
            self.report(Report::BreakerOpened(breaker.cooldown));
        }
        if self.timers.is_armed(Timer::Breaker) {
            return;
        }
        self.report(Report::Respawning(generation, seat, pause));
        if pause.is_zero() {
            self.respawn(generation, seat);
        } else {
            self.timers.arm(Timer::Respawn(generation, seat), now.after(pause));
        }
    }

    pub(crate) fn respawn(&mut self, generation: Generation, seat: Seat) {
        let record = self.generations.get(&generation).filter(|record| record.serves());
        let place = record.and_then(|record| record.seats.get(usize::from(seat.0)));
        if !place.is_some_and(SeatRecord::is_vacant) || self.timers.is_armed(Timer::Breaker) {
            return;
        }
        if self.may_not_bind(generation, seat) {
            return self.timers.arm(Timer::Respawn(generation, seat), self.now.after(LOOK_PAUSE));
        }
        self.spawn(generation, seat);
    }

    /// A new generation is another program: the exits of the old one are not held against it.
    pub(crate) fn forgive_exits(&mut self) {
        self.exits.clear();
        if self.timers.is_armed(Timer::Breaker) {
            self.timers.disarm(Timer::Breaker);
            self.report(Report::BreakerClosed);
        }
    }

    pub(crate) fn close_breaker(&mut self) {
        self.exits.clear();
        self.report(Report::BreakerClosed);
        let serving = self.generations.iter().filter(|(_, record)| record.serves());
        let seats: Vec<(Generation, u16)> = serving.map(|(id, record)| (*id, record.plan.workers)).collect();
        for (generation, seats) in seats {
            (0..seats).for_each(|seat| self.respawn(generation, Seat(seat)));
        }
    }

    pub(crate) fn on_spawn_failed(&mut self, id: WorkerId, errno: i32) {
        let Some(worker) = self.workers.get(&id) else { return };
        // Asked for and not there yet; or meanwhile not wanted any more.
        let is_pending = matches!(worker.state, WorkerState::Spawning | WorkerState::Dying);
        let has_own = self.listeners.values().any(|listener| listener.worker == id && !listener.of_seat);
        if !is_pending || has_own {
            return self.report(Report::Bug("a worker that runs could not be started"));
        }
        self.forget_worker(id);
        let Some((generation, seat)) = self.seat_of(id) else { return };
        let is_next = self.empty_seat(generation, seat, id);
        let reason = Reason::SpawnFailed(seat, id, errno);
        if self.is_on_trial(generation) {
            return self.fail_upgrade(reason);
        }
        self.report(Report::Replaced(id, reason));
        self.seat_failed(generation, seat, reason);
        if !is_next {
            self.refill(generation, seat);
        }
    }

    /// A worker is not what it should be: that ends a launch, and a respawn is ended and tried again.
    pub(crate) fn fail_worker(&mut self, id: WorkerId, reason: Reason) {
        let Some((generation, seat)) = self.workers.get(&id).map(|w| (w.generation, w.seat)) else { return };
        if self.is_on_trial(generation) {
            return self.fail_upgrade(reason);
        }
        self.report(Report::Replaced(id, reason));
        self.seat_failed(generation, seat, reason);
        self.end_unproven(id);
    }
}
