//! A new master in the place of one that was killed: what it knows may be a little older than what is.

use crate::command::{Reason, Report};
use crate::event::Trigger;
use crate::generation::{GenerationRecord, GenerationState};
use crate::group::{InForce, Work};
use crate::id::{Generation, GroupId, ListenerId, Seat, WorkerId};
use crate::master::Master;
use crate::plan::{Engine, Plan};
use crate::slots::Slots;
use crate::timers::Timer;
use crate::worker::{Worker, WorkerKind, WorkerState};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;

/// "Bad file descriptor", said by the core itself of a socket that was let go of.
const EBADF: i32 = 9;

impl Master {
    /// This memory was written down by a master that lived on for a while and was then killed. What it did after that
    /// is done again: everything the kernel is told says what shall be, not what shall change.
    pub(crate) fn on_adopted(&mut self, lost: &[ListenerId]) {
        self.forget_callers();
        let is_stopping = self.stopping.is_some();
        for (id, group) in &mut self.groups {
            group.work = Work::Idle;
            group.taking = None;
            // The program goes with the last that listens, and through one that is only bound none can be attached.
            let is_empty = !self.listeners.values().any(|l| l.group == *id && l.listens);
            // Nobody was chosen yet as far as is known: somebody may be by now, and nobody is to be refused meanwhile.
            let is_before_first = group.in_force == InForce::Nothing && group.target.is_empty();
            group.is_stale = !is_before_first || is_stopping;
            group.in_force = if is_empty { InForce::Nothing } else { InForce::Unknown };
            group.is_inherited = true;
            (group.admitting, group.reaching) = (0, BTreeSet::new());
            self.timers.disarm(Timer::Group(*id));
        }
        // Before anything can end it.
        self.check_again();
        for id in lost {
            self.handle_lost(*id);
        }
        match self.engine {
            Engine::Ebpf => self.admit_again(),
            Engine::Cbpf => self.note_joined(),
            Engine::None => {}
        }
        // What is known is kept.
        self.on_saved();
        let workers: Vec<WorkerId> = self.workers.keys().copied().collect();
        self.report(Report::Adopted(workers.len()));
        // What they said meanwhile nobody heard.
        for id in workers {
            self.feed(id);
            self.allow_ready(id);
        }
        self.announce();
    }

    /// Processes that a master left behind of which only this is known. They serve, as one generation, until they are
    /// upgraded away from.
    pub(crate) fn on_orphans(
        &mut self,
        generation: Generation,
        plan: Plan,
        orphans: &[(WorkerId, Vec<(GroupId, ListenerId)>)],
        slots: &[(GroupId, Vec<u64>)],
        trigger: Trigger,
    ) {
        if !self.generations.is_empty() || self.stopping.is_some() {
            return self.report(Report::Bug("orphans of a master that has generations"));
        }
        self.generation_last = self.generation_last.max(generation.0);
        self.open_groups(&plan);
        // Sockets of seats are no more than theirs: the next generation gets its own.
        let mut record =
            GenerationRecord::new(Plan { seat_groups: Vec::new(), configured: plan.workers, ..plan });
        record.state = GenerationState::Active;
        record.is_found = true;
        for ((seat, place), (id, _)) in (0..).zip(&mut record.seats).zip(orphans) {
            place.worker = Some(*id);
            place.filled = self.now;
            let mut worker = Worker::new(generation, Seat(seat), self.now);
            worker.state = WorkerState::Serving;
            worker.kind = Some(WorkerKind::Unmodified);
            self.workers.insert(*id, worker);
            self.worker_last = self.worker_last.max(id.0);
        }
        self.generations.insert(generation, record);
        self.active = Some(generation);
        for (id, listeners) in orphans {
            self.adopt_listeners(*id, listeners, true);
        }
        // That of a seat may be another orphan's, too: it would stay in its slot.
        let is_in_slots = self.engine == Engine::Cbpf;
        self.listeners.values_mut().for_each(|listener| listener.by_shutdown = is_in_slots);
        for (id, group) in &mut self.groups {
            group.has_unseen = !self.listeners.values().any(|listener| listener.group == *id);
        }
        self.aim(&[(generation, 1000)]);
        for (id, cookies) in slots {
            if let Some(group) = self.groups.get_mut(id) {
                group.slots = Slots::of_cookies(cookies);
            }
        }
        // In which order they got their slots nobody knows otherwise.
        if self.engine == Engine::Cbpf {
            let is_known = |group: &GroupId| slots.iter().any(|(of, _)| of == group);
            let unsure: Vec<GroupId> = self.groups.keys().filter(|group| !is_known(group)).copied().collect();
            unsure.into_iter().for_each(|group| self.report(Report::SlotsUnsure(group)));
        }
        self.report(Report::Launching(generation, trigger));
        if trigger == Trigger::Orphans {
            self.report(Report::Adopted(orphans.len()));
            self.announce();
        }
    }

    /// The sockets of each group in the order of their slots, for a next master.
    #[must_use]
    pub fn slots(&self) -> Vec<(GroupId, Vec<u64>)> {
        self.groups.iter().map(|(id, group)| (*id, group.slots.cookies())).collect()
    }

    /// The service manager has started this master, and waits.
    fn announce(&mut self) {
        if self.active.is_some() && !self.is_taking_over() {
            self.notify(crate::command::Notice::Ready);
        }
    }

    /// Clients went with the old master.
    fn forget_callers(&mut self) {
        self.generations.values_mut().for_each(|record| record.waiting.clear());
        self.generations.values_mut().for_each(|record| record.discarding = 0);
        let places = self.generations.values_mut().flat_map(|record| &mut record.seats);
        let waiting = places.map(|place| &mut place.waiting);
        let waiting = waiting.chain(self.retirements.values_mut().map(|retirement| &mut retirement.waiting));
        let waiting = waiting.chain(self.scaling.as_mut().map(|scaling| &mut scaling.waiting));
        waiting.chain(self.stopping.as_mut().map(|stopping| &mut stopping.waiting)).for_each(Vec::clear);
        let wish = self.wish.as_mut().map(|wish| &mut wish.waiting);
        let upgrade = self.upgrade.as_mut().map(|upgrade| &mut upgrade.waiting);
        wish.into_iter().chain(upgrade).for_each(Vec::clear);
        self.reexec = None;
        self.timers.disarm(Timer::Preflight);
    }

    /// The old master had let go of it already: of a spare handle, or because the listener was to leave.
    fn handle_lost(&mut self, id: ListenerId) {
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        listener.handle = false;
        let Some(listener) = self.listeners.get(&id) else { return };
        let (owner, listens) = (listener.worker, listener.listens);
        let worker = self.workers.get(&owner);
        let is_spare = match self.engine {
            Engine::Ebpf => {
                let is_held = listener.of_seat || self.takes_datagrams(listener.group);
                !is_held && worker.is_some_and(|w| w.kind == Some(WorkerKind::Unmodified))
            }
            Engine::Cbpf => false,
            Engine::None => !listener.of_seat && worker.is_some() && listens,
        };
        if is_spare {
            return;
        }
        let (group, worker) = (listener.group, worker.map(|worker| (worker.seat, worker.state)));
        self.forget_listener(id);
        match worker {
            // What it has bound can't be listened on any more; nor can it serve on the socket of a seat, or one that takes
            // datagrams, that nobody else would hold.
            Some((seat, state)) if !listens || state.is_starting() || state == WorkerState::Ready => {
                self.fail_worker(owner, Reason::ListenFailed(seat, owner, EBADF));
            }
            Some((_, WorkerState::Serving)) => self.replace_deserter(owner, group),
            Some(_) | None => {}
        }
    }
}
