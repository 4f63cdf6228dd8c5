//! From a started worker to one that can serve: its word, or its listeners, and its place in the groups.

use crate::command::{Command, Order, Reason, Report};
use crate::event::{Found, Problem, Verdict};
use crate::group::{Listener, Settling};
use crate::id::{GroupId, ListenerId, WorkerId};
use crate::master::Master;
use crate::plan::{Engine, Readiness};
use crate::timers::Timer;
use crate::worker::{LOOK_PAUSE, LOOK_PAUSE_MAX, Worker, WorkerKind, WorkerState};
use core::time::Duration;

impl Master {
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
                match readiness {
                    Readiness::Listen if self.engine == Engine::Ebpf => self.prove(id),
                    Readiness::Http => self.prove(id),
                    Readiness::Listen | Readiness::Notify => self.proven(id),
                }
            }
            Found::NotYet(problem) if readiness != Readiness::Notify => self.look_later(id, problem),
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
        // Its listeners need not be looked for any more.
        self.timers.disarm(Timer::Look(id));
        self.push(Command::Prove { worker: id });
    }

    pub(crate) fn on_proved(&mut self, id: WorkerId, verdict: Verdict) {
        let Some(worker) = self.workers.get_mut(&id).filter(|w| w.state == WorkerState::Proving) else {
            return;
        };
        let record = self.generations.get(&worker.generation).map(|record| &record.plan);
        let Some((readiness, passes, interval)) = record.map(|p| (p.readiness, p.passes, p.interval)) else {
            return;
        };
        let again = self.now.after(interval);
        match verdict {
            Verdict::Waiting => self.look_later(id, Problem::NotAccepting),
            Verdict::Passed if readiness != Readiness::Http || worker.passes + 1 >= passes => self.proven(id),
            Verdict::Passed => {
                worker.passes += 1;
                worker.pause = LOOK_PAUSE;
                self.timers.arm(Timer::Look(id), again);
            }
            Verdict::Failed => {
                worker.passes = 0;
                worker.missing = Some(Problem::NotHealthy);
                self.timers.arm(Timer::Look(id), again);
            }
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
            self.refuse_handles(listeners);
            return self.ready_late(id);
        };
        worker.kind = Some(WorkerKind::Handover);
        let (seat, generation) = (worker.seat, worker.generation);
        let groups =
            self.generations.get(&generation).map(|record| record.plan.groups.clone()).unwrap_or_default();
        self.adopt_listeners(id, listeners, false);
        let seat_groups = self.seat_groups(generation);
        let is_missing =
            |group: &&GroupId| !seat_groups.contains(group) && !listeners.iter().any(|(of, _)| of == *group);
        match groups.iter().find(is_missing) {
            Some(group) => {
                self.fail_worker(id, Reason::WrongListeners(seat, id, Problem::NotListening(*group)))
            }
            // Only who serves can answer: it joins the groups, but nobody steers to it.
            None if self.readiness(generation) == Readiness::Http => self.join(id, true),
            None => self.proven(id),
        }
    }

    /// A worker none of whose sockets have to be listened on has all of them from the beginning, and was taken for an
    /// unmodified one until it spoke.
    fn ready_late(&mut self, id: WorkerId) {
        let is_own = |l: &Listener| l.worker == id && !l.of_seat && !self.takes_datagrams(l.group);
        let has_own = self.listeners.values().any(is_own);
        let readiness = self.readiness_of(id);
        let is_mistaken = |worker: &&mut Worker| worker.kind == Some(WorkerKind::Unmodified) && !has_own;
        let Some(worker) = self.workers.get_mut(&id).filter(is_mistaken) else { return };
        worker.kind = Some(WorkerKind::Handover);
        match worker.state {
            WorkerState::Proving if readiness != Readiness::Http => self.proven(id),
            WorkerState::Proving
            | WorkerState::Serving
            | WorkerState::Emptying
            | WorkerState::Idling { .. } => {
                worker.told_serve = true;
                self.push(Command::Tell { worker: id, order: Order::Serve });
            }
            // Told when it joins, or not any more.
            WorkerState::Spawning
            | WorkerState::Starting { .. }
            | WorkerState::Ready
            | WorkerState::Joining { .. }
            | WorkerState::Stopping { .. }
            | WorkerState::Draining
            | WorkerState::Dying
            | WorkerState::Remains { .. } => {}
        }
    }

    pub(crate) fn adopt_listeners(
        &mut self,
        worker: WorkerId,
        listeners: &[(GroupId, ListenerId)],
        listens: bool,
    ) {
        let Some((generation, seat)) = self.workers.get(&worker).map(|w| (w.generation, w.seat)) else {
            return;
        };
        for (group, id) in listeners {
            let listener = Listener {
                group: *group,
                generation,
                worker,
                seat,
                of_seat: false,
                handle: true,
                listens: listens || self.takes_datagrams(*group),
                leaving: false,
                by_shutdown: false,
                key: None,
                settling: Settling::Settled,
                depth: None,
                asked: 0,
                gone: false,
                flows_ended: None,
            };
            self.listeners.insert(*id, listener);
            self.outdate_looks(*group);
        }
    }

    fn refuse_handles(&mut self, listeners: &[(GroupId, ListenerId)]) {
        for (group, listener) in listeners {
            // Found before its worker spoke, or the reverse.
            if self.listeners.get(listener).is_some_and(|known| known.handle) {
                continue;
            }
            self.push(Command::Release { listener: *listener, shutdown: false });
            // Its worker may have closed it already; then it leaves the group here.
            self.outdate_looks(*group);
            self.note_slot(*group);
        }
    }

    /// The worker can serve. A respawn joins as soon as that is kept; a new generation waits until all of it is ready.
    fn proven(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.state = WorkerState::Ready;
        self.timers.disarm(Timer::Ready(id));
        self.timers.disarm(Timer::Look(id));
        self.feed(id);
        self.report(Report::WorkerReady(id));
        self.save();
    }

    /// Has what it bound listened on; then it serves, or shows that it can.
    pub(crate) fn join(&mut self, id: WorkerId, unproven: bool) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.state = WorkerState::Joining { unproven };
        }
        for listener in self.listeners_of(id) {
            let bound = self.listeners.get(&listener).filter(|listener| !listener.listens);
            if let Some(group) = bound.map(|listener| listener.group) {
                self.outdate_looks(group);
                self.push(Command::Listen { listener });
            }
        }
        self.all_listen(id);
    }

    pub(crate) fn on_listening(&mut self, id: ListenerId, result: Result<(), i32>) {
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        let worker = listener.worker;
        listener.listens |= result.is_ok();
        // It has a slot now, which would not go with the handle: it leaves when its worker has ended, like those before it.
        let is_worker_there = self.workers.contains_key(&worker);
        listener.leaving &= result.is_err() || self.engine != Engine::Cbpf || !is_worker_there;
        let group = listener.group;
        self.note_slot(group);
        if self.engine == Engine::Cbpf {
            self.save();
        }
        let Some(record) = self.workers.get(&worker) else { return };
        match (record.state, result) {
            (WorkerState::Joining { .. }, Ok(())) => self.all_listen(worker),
            (WorkerState::Joining { .. }, Err(errno)) => {
                self.fail_worker(worker, Reason::ListenFailed(record.seat, worker, errno));
            }
            (_, _) => {}
        }
    }

    fn all_listen(&mut self, id: WorkerId) {
        if self.listeners.values().any(|listener| listener.worker == id && !listener.listens) {
            return;
        }
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let WorkerState::Joining { unproven } = worker.state else { return };
        let must_tell = worker.kind == Some(WorkerKind::Handover) && !worker.told_serve;
        worker.told_serve |= must_tell;
        worker.state = WorkerState::Serving;
        if must_tell {
            self.push(Command::Tell { worker: id, order: Order::Serve });
        }
        if unproven {
            self.prove(id);
        } else {
            self.joined(id);
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
}

/// Nothing is known yet of its listeners.
fn is_unknown(state: WorkerState) -> bool {
    matches!(state, WorkerState::Spawning | WorkerState::Starting { .. })
}
