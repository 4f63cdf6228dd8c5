//! The way out of an old generation: what had begun finishes, queues are emptied, workers are told to stop, listeners
//! leave, open connections end; and what of it could not be had in time is counted.

use crate::command::{Command, Order, Reason, Report, Signal};
use crate::datagram::FLOWS_PAUSE_MAX;
use crate::event::Problem;
use crate::generation::{GenerationState, RetireStep, Retirement};
use crate::group::{Group, Listener};
use crate::id::{Generation, GroupId, ListenerId, RetirementId, Seat, Ticket, WorkerId};
use crate::master::Master;
use crate::plan::{Engine, StopWhen};
use crate::timers::Timer;
use crate::worker::{LOOK_PAUSE, LOOK_PAUSE_MAX, WorkerKind, WorkerState};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::time::Duration;

/// From the switch to the snapshot of half-open handshakes: by then each SYN that was given to an old listener has
/// its entry.
pub(crate) const SNAPSHOT_AFTER: Duration = Duration::from_millis(50);
/// How long a worker that was told to stop may hold its listener; then the socket is shut down through a handle.
const RELEASE_GRACE: Duration = Duration::from_secs(1);

impl Master {
    /// New connections no longer go to this generation: let it finish.
    pub(crate) fn retire(&mut self, generation: Generation) {
        let Some(record) = self.generations.get_mut(&generation) else { return };
        record.state = GenerationState::Retiring;
        for seat in 0..record.plan.workers {
            self.timers.disarm(Timer::Respawn(generation, Seat(seat)));
        }
        let failure = self.stopping.as_ref().map(|_| Reason::Stopped);
        self.answer_seats(generation, failure);
        let leaving: BTreeSet<WorkerId> = self.workers_of(generation).into_iter().collect();
        self.begin_retirement(generation, true, leaving, Vec::new());
    }

    /// The same for some of its workers; those who wait are answered when their listeners are gone.
    pub(crate) fn retire_workers(
        &mut self,
        generation: Generation,
        workers: BTreeSet<WorkerId>,
        waiting: Vec<Ticket>,
    ) {
        self.begin_retirement(generation, false, workers, waiting);
    }

    fn begin_retirement(
        &mut self,
        generation: Generation,
        is_whole: bool,
        workers: BTreeSet<WorkerId>,
        waiting: Vec<Ticket>,
    ) {
        let plan = self.generations.get(&generation).map(|record| &record.plan);
        let kill_at = self.now.after(plan.map_or(Duration::ZERO, |plan| plan.drain_timeout));
        for id in &workers {
            match self.workers.get_mut(id).map(|worker| &mut worker.state) {
                Some(state @ WorkerState::Serving) => {
                    *state = WorkerState::Emptying;
                    self.timers.arm(Timer::Kill(*id), kill_at);
                    self.mark_stale_of(*id);
                }
                // Some of them may be on their way already.
                Some(WorkerState::Emptying | WorkerState::Idling { .. }) | None => {}
                Some(state) if !state.is_ending() => self.end_unproven(*id),
                Some(_) => {}
            }
        }
        // Sockets of seats that nobody has taken over leave with them, like their own.
        for listener in self.listeners.values_mut().filter(|l| workers.contains(&l.worker)) {
            listener.of_seat = false;
        }
        self.give_up_seats(generation);
        self.save();
        let step = if self.engine == Engine::None { RetireStep::Emptying } else { RetireStep::Counting };
        self.retirement_last += 1;
        let id = RetirementId(self.retirement_last);
        let retirement = Retirement {
            generation,
            is_whole,
            workers,
            waiting,
            since: self.now,
            step,
            pause: LOOK_PAUSE,
            looking: BTreeSet::new(),
            is_answered: false,
        };
        self.retirements.insert(id, retirement);
        self.look_at_retirement(id);
    }

    /// Looks at all groups in the kernel; when all have answered, the retirement goes on.
    pub(crate) fn look_at_retirement(&mut self, id: RetirementId) {
        let groups: BTreeSet<GroupId> = self.groups.keys().copied().collect();
        let Some(retirement) = self.retirements.get_mut(&id) else { return };
        retirement.looking.clone_from(&groups);
        if groups.is_empty() {
            return self.go_on_retiring(id);
        }
        for group in groups {
            self.observe(group);
        }
    }

    pub(crate) fn retirements_observed(&mut self, group: GroupId) {
        let mut complete = Vec::new();
        for (id, retirement) in &mut self.retirements {
            if retirement.looking.remove(&group) && retirement.looking.is_empty() {
                complete.push(*id);
            }
        }
        for id in complete {
            self.go_on_retiring(id);
        }
    }

    fn go_on_retiring(&mut self, id: RetirementId) {
        let is_steered = self.groups.values().all(Group::is_told);
        let Some(retirement) = self.retirements.get_mut(&id) else { return };
        let before = retirement.step.clone();
        // As long as the kernel may still choose them, nothing of them has settled.
        if before == RetireStep::Counting && !is_steered {
            retirement.since = self.now;
            self.timers.arm(Timer::Retire(id), self.now.after(LOOK_PAUSE_MAX));
            return;
        }
        let (since, generation) = (retirement.since, retirement.generation);
        let record = self.generations.get(&generation);
        let settle_by = record.map_or(since, |record| since.after(record.plan.settle_timeout));
        let step = match before.clone() {
            RetireStep::Counting => {
                self.note_switch(id);
                // A stop that can't refuse new connections has nothing to wait for: they never end.
                if self.keeps_receiving() { RetireStep::Emptying } else { RetireStep::Pausing }
            }
            RetireStep::Pausing if self.now < since.after(SNAPSHOT_AFTER) => RetireStep::Pausing,
            RetireStep::Pausing => RetireStep::Settling(self.half_open()),
            RetireStep::Settling(begun) => RetireStep::Settling(begun),
            RetireStep::Emptying => RetireStep::Emptying,
        };
        let step = self.settle(generation, step, settle_by);
        let pause = if step == before { None } else { Some(LOOK_PAUSE) };
        let is_emptying = step == RetireStep::Emptying;
        let soon = self.now.after(LOOK_PAUSE);
        let first =
            if step == RetireStep::Pausing { Some(since.after(SNAPSHOT_AFTER).max(soon)) } else { None };
        let Some(retirement) = self.retirements.get_mut(&id) else { return };
        retirement.step = step;
        let longest = if retirement.is_answered { FLOWS_PAUSE_MAX } else { LOOK_PAUSE_MAX };
        retirement.pause = pause.unwrap_or((retirement.pause * 2).min(longest));
        let next = first.unwrap_or(self.now.after(retirement.pause));
        self.timers.arm(Timer::Retire(id), next);
        if is_emptying {
            self.end_flows(id);
            self.empty_workers(id);
        }
    }

    fn half_open(&self) -> BTreeMap<GroupId, BTreeSet<u64>> {
        self.groups.iter().map(|(id, group)| (*id, group.half_open.iter().copied().collect())).collect()
    }

    /// Forgets finished handshakes of the snapshot; with none left, or no time left, the next step begins.
    fn settle(&mut self, generation: Generation, step: RetireStep, settle_by: crate::id::Time) -> RetireStep {
        let RetireStep::Settling(mut begun) = step else { return step };
        let present = self.half_open();
        for (group, handshakes) in &mut begun {
            let present = present.get(group);
            handshakes.retain(|handshake| present.is_some_and(|present| present.contains(handshake)));
        }
        begun.retain(|_, handshakes| !handshakes.is_empty());
        if begun.is_empty() {
            return RetireStep::Emptying;
        }
        if self.now < settle_by {
            return RetireStep::Settling(begun);
        }
        for (group, handshakes) in &begun {
            let abandoned = u32::try_from(handshakes.len()).unwrap_or(u32::MAX);
            if let Some(listener) = self.receipt_listener(generation, *group) {
                listener.half_open_abandoned = abandoned;
            }
        }
        RetireStep::Emptying
    }

    /// Whether retired listeners still get new connections: the service stops, and the engine can't refuse.
    pub(crate) fn keeps_receiving(&self) -> bool {
        self.engine == Engine::None || (self.stopping.is_some() && self.engine == Engine::Cbpf)
    }

    // ---- each worker on its own -------------------------------------------------------------------------------

    fn empty_workers(&mut self, id: RetirementId) {
        let Some(retirement) = self.retirements.get(&id) else { return };
        let generation = retirement.generation;
        let mut workers: Vec<WorkerId> = retirement.workers.iter().copied().collect();
        // From the highest slot down, so that the slots in use stay together.
        workers.sort_by_key(|worker| core::cmp::Reverse(self.highest_slot(*worker)));
        let strict = self.strict_groups();
        // As long as the kernel's program may name a slot that is no more, connections may fall on any of them, too.
        let mut is_blocked = self.engine == Engine::Cbpf && !self.groups.values().all(Group::is_told);
        // The next master must not take them for those that serve.
        is_blocked |= self.saving;
        // Whoever they gave way to may have ended meanwhile: then connections fall on them again until there is another.
        let is_deserted =
            |(id, group): (&GroupId, &Group)| !group.target.is_empty() && self.choosable(*id).is_empty();
        is_blocked |=
            self.engine != Engine::None && self.stopping.is_none() && self.groups.iter().any(is_deserted);
        // Whichever retirement it is of.
        is_blocked |= self.listeners.values().any(|l| strict.contains(&l.group) && self.is_left_alone(l));
        let mut count = Vec::new();
        for id in workers {
            let Some(state) = self.workers.get(&id).map(|worker| worker.state) else { continue };
            match state {
                WorkerState::Emptying if self.is_empty(id) && self.must_idle(id) => {
                    let until = self.now.after(self.idle_timeout(generation));
                    self.set_state(id, WorkerState::Idling { until });
                    count.push(id);
                }
                WorkerState::Emptying if self.is_empty(id) && !is_blocked => self.tell_stop(id),
                WorkerState::Idling { until } if self.now >= until && !is_blocked && self.is_empty(id) => {
                    self.tell_stop(id)
                }
                WorkerState::Idling { .. } => count.push(id),
                WorkerState::Stopping { told, drained } => self.let_listeners_go(id, told, drained),
                WorkerState::Spawning
                | WorkerState::Starting { .. }
                | WorkerState::Proving
                | WorkerState::Ready
                | WorkerState::Joining { .. }
                | WorkerState::Serving
                | WorkerState::Emptying
                | WorkerState::Draining
                | WorkerState::Dying
                | WorkerState::Remains { .. } => {}
            }
            is_blocked |= !strict.is_empty() && !self.listeners_of(id).is_empty();
        }
        if !count.is_empty() {
            self.push(Command::Count { workers: count });
        }
    }

    /// With one listener left to steer to there is nothing to steer off the mover to: while a slot is released, connections
    /// may fall on any old listener, so all of them but one must still be accepted from.
    fn strict_groups(&self) -> BTreeSet<GroupId> {
        let is_strict = |id: &GroupId| self.choosable(*id).len() < 2;
        let may_be = self.engine == Engine::Cbpf && self.stopping.is_none();
        self.groups.keys().copied().filter(|id| may_be && is_strict(id)).collect()
    }

    /// It is in its group, and its worker does not accept from it any more.
    fn is_left_alone(&self, listener: &Listener) -> bool {
        let state = self.workers.get(&listener.worker).map(|worker| worker.state);
        let is_told = matches!(state, Some(WorkerState::Stopping { .. } | WorkerState::Remains { .. }));
        listener.listens && !listener.gone && (listener.leaving || is_told)
    }

    fn set_state(&mut self, id: WorkerId, state: WorkerState) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.state = state;
        }
    }

    fn highest_slot(&self, worker: WorkerId) -> Option<u16> {
        let slot = |listener: &ListenerId| {
            let group = self.listeners.get(listener).and_then(|l| self.groups.get(&l.group))?;
            group.slots.of(*listener)
        };
        self.listeners_of(worker).iter().filter_map(slot).max()
    }

    /// Nothing waits in its listeners, or the worker itself sees to that.
    fn is_empty(&self, id: WorkerId) -> bool {
        let is_handover =
            self.workers.get(&id).is_some_and(|worker| worker.kind == Some(WorkerKind::Handover));
        if !self.listeners_of(id).iter().all(|listener| self.is_settled(*listener)) {
            return false;
        }
        let may_come = |l: &Listener| l.worker == id && self.may_still_come(l);
        if self.listeners.values().any(may_come) {
            return false;
        }
        let waits = |id: &ListenerId| {
            self.listeners.get(id).is_some_and(|l| !l.gone && l.depth.is_none_or(|depth| depth.queued > 0))
        };
        is_handover || self.keeps_receiving() || !self.listeners_of(id).iter().any(waits)
    }

    fn must_idle(&self, id: WorkerId) -> bool {
        let Some(worker) = self.workers.get(&id) else { return false };
        let stop_when = self.generations.get(&worker.generation).map(|record| record.plan.stop_when);
        match stop_when {
            Some(StopWhen::Idle) => true,
            Some(StopWhen::Auto) => {
                worker.kind == Some(WorkerKind::Unmodified) && self.engine != Engine::None
            }
            Some(StopWhen::Drained) | None => false,
        }
    }

    fn idle_timeout(&self, generation: Generation) -> Duration {
        self.generations.get(&generation).map_or(Duration::ZERO, |record| record.plan.idle_timeout)
    }

    fn tell_stop(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.state = WorkerState::Stopping { told: self.now, drained: false };
        let kind = worker.kind;
        self.push(match kind {
            Some(WorkerKind::Handover) => Command::Tell { worker: id, order: Order::Stop },
            Some(WorkerKind::Unmodified) | None => Command::Signal { worker: id, signal: Signal::Stop },
        });
        self.look_soon(id);
    }

    /// The worker's retirement goes on with the next look: not long from now.
    fn look_soon(&mut self, id: WorkerId) {
        let soon = self.now.after(LOOK_PAUSE);
        for (retirement, record) in self.retirements.iter_mut().filter(|(_, r)| r.workers.contains(&id)) {
            record.pause = LOOK_PAUSE;
            self.timers.arm_by(Timer::Retire(*retirement), soon);
        }
    }

    /// A worker that was told to stop: its listeners leave when it has let go of them, or has had its time.
    fn let_listeners_go(&mut self, id: WorkerId, told: crate::id::Time, drained: bool) {
        let is_handover =
            self.workers.get(&id).is_some_and(|worker| worker.kind == Some(WorkerKind::Handover));
        // Shutting a listener down moves its queue under `ebpf` and resets it under `cbpf`: there it must be empty.
        let is_patient = self.engine == Engine::Cbpf && is_handover && !drained;
        let datagrams: Vec<GroupId> =
            self.groups.iter().filter(|(_, group)| group.is_datagram).map(|(id, _)| *id).collect();
        let is_late = self.now >= told.after(RELEASE_GRACE) && !is_patient;
        for listener in self.listeners_of(id) {
            let Some(record) = self.listeners.get_mut(&listener).filter(|record| !record.leaving) else {
                continue;
            };
            // One that takes datagrams can't be shut down: it keeps its slot as long as somebody has it, and what waits
            // there would be thrown away.
            let waits = record.depth.is_none_or(|depth| depth.queued > 0);
            let is_stuck = datagrams.contains(&record.group) && (waits || self.engine == Engine::Cbpf);
            if record.gone {
                record.leaving = true;
            } else if is_late && record.handle && !is_stuck {
                record.by_shutdown = true;
                record.leaving = true;
            } else if is_late && !record.handle {
                self.push(Command::Anchor { listener });
            } else if record.handle {
                self.push(Command::Owns { listener, worker: id });
            }
        }
    }

    pub(crate) fn on_owned(&mut self, id: ListenerId, owned: bool) {
        let Some(listener) = self.listeners.get(&id).filter(|l| !owned && !l.leaving) else { return };
        // The socket of a seat waits for the seat's next worker.
        let is_kept = self.waits_for_next(listener);
        let (group, worker) = (listener.group, listener.worker);
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        match self.workers.get(&worker).map(|worker| worker.state) {
            // A process that is ending shows no descriptors any more while it still holds the socket: only a shutdown
            // takes it out of the group for certain.
            Some(WorkerState::Stopping { .. }) => {
                listener.leaving = true;
                listener.by_shutdown = true;
            }
            Some(state @ (WorkerState::Serving | WorkerState::Emptying | WorkerState::Idling { .. })) => {
                listener.leaving = !is_kept;
                listener.by_shutdown = true;
                self.report(Report::ListenerLost(id));
                self.mark_stale(group);
                // Whether it was closed or shut down.
                self.observe(group);
                if state == WorkerState::Serving {
                    self.replace_deserter(worker, group);
                }
            }
            Some(_) | None => {}
        }
    }

    /// A worker that closed its listener although nobody asked serves nobody, and would for ever.
    pub(crate) fn replace_deserter(&mut self, id: WorkerId, group: GroupId) {
        let generation = self.workers.get(&id).map(|worker| worker.generation);
        // What it listens with is its own business until another serves.
        if generation.is_some_and(|generation| self.is_untouchable(generation)) {
            return;
        }
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.state = WorkerState::Dying;
        let (generation, seat) = (worker.generation, worker.seat);
        let reason = Reason::WrongListeners(seat, id, Problem::NotListening(group));
        let plan = self.generations.get(&generation).map(|record| &record.plan);
        let kill_at = self.now.after(plan.map_or(Duration::ZERO, |plan| plan.drain_timeout));
        self.timers.arm(Timer::Kill(id), kill_at);
        for listener in self.listeners_of(id) {
            if let Some(group) = self.listeners.get(&listener).map(|listener| listener.group) {
                self.mark_stale(group);
            }
        }
        if self.is_on_trial(generation) {
            self.fail_upgrade(reason);
        } else {
            self.report(Report::Replaced(id, reason));
        }
        self.push(Command::Signal { worker: id, signal: Signal::Stop });
    }

    pub(crate) fn on_drained(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if let WorkerState::Stopping { told, drained: false } = worker.state {
            worker.state = WorkerState::Stopping { told: self.now, drained: true };
            self.let_listeners_go(id, told, true);
            return;
        }
        // Unasked, as by a SIGTERM that was not ours: nobody accepts there any more.
        for listener in self.listeners_of(id) {
            self.on_owned(listener, false);
        }
    }

    pub(crate) fn on_counted(&mut self, connections: &[(WorkerId, u32)]) {
        let mut idle = BTreeSet::new();
        for (id, open) in connections {
            let Some(worker) = self.workers.get_mut(id) else { continue };
            let generation = worker.generation;
            if worker.cut_uncounted {
                worker.cut_uncounted = false;
                self.report(Report::Killed(*id, Some(*open)));
                if let Some(receipt) = self.receipt_of(generation) {
                    receipt.forced_kills += 1;
                    receipt.connections_cut = receipt.connections_cut.map(|cut| cut.saturating_add(*open));
                }
            } else if let (0, WorkerState::Idling { until }) = (open, &mut worker.state)
                && *until > self.now
            {
                *until = self.now;
                idle.insert(*id);
            }
        }
        let is_idle = |retirement: &Retirement| retirement.workers.iter().any(|id| idle.contains(id));
        let retirements: Vec<RetirementId> =
            self.retirements.iter().filter(|(_, r)| is_idle(r)).map(|(id, _)| *id).collect();
        for retirement in retirements {
            self.empty_workers(retirement);
        }
    }

    /// The end of a worker's patience: whatever it still has open is cut, and counted.
    pub(crate) fn on_kill_deadline(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        // What is left of an ended worker is only killed: its process has been counted, and is still to be reaped.
        if !matches!(worker.state, WorkerState::Dying | WorkerState::Remains { .. }) {
            worker.state = WorkerState::Dying;
            worker.cut_uncounted = true;
            self.push(Command::Count { workers: [id].into() });
        }
        self.push(Command::Signal { worker: id, signal: Signal::KillGroup });
    }
}
