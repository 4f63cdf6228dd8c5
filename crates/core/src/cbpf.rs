//! `cbpf`: sockets named by slot. Listeners leave one at a time, each only with nothing left in it, and steered off the
//! one that moves into its slot.

use crate::command::{Command, Order, Share};
use crate::group::{After, Group, InForce, Listener, Work};
use crate::id::{Generation, GroupId, ListenerId};
use crate::master::Master;
use crate::plan::{Engine, Policy};
use crate::steer::RETRY;
use crate::timers::Timer;
use crate::worker::{Worker, WorkerKind};
use alloc::vec::Vec;

impl Master {
    /// The slots new connections should be given to, without those of `except`.
    fn shares(&self, id: GroupId, except: Option<ListenerId>) -> Vec<Share> {
        let Some(group) = self.groups.get(&id) else { return Vec::new() };
        let steerable = self.steerable(id);
        let mut shares = Vec::new();
        for (generation, weight) in &group.target {
            let is_its = |l: &ListenerId| self.listeners.get(l).is_some_and(|l| l.generation == *generation);
            let mut slots: Vec<u16> = steerable
                .iter()
                .filter(|listener| is_its(listener) && Some(**listener) != except)
                .filter_map(|listener| group.slots.of(*listener))
                .collect();
            slots.sort_unstable();
            let policy = self.generations.get(generation).map(|r| r.plan.policy).unwrap_or_default();
            if policy == Policy::Cpu {
                slots = self.by_seat(id, *generation, &slots);
            }
            if !slots.is_empty() {
                shares.push(Share { weight: *weight, slots, policy });
            }
        }
        // Alone it gets all there is.
        if let [share] = shares.as_mut_slice() {
            share.weight = 1000;
        }
        shares
    }

    /// One of these slots for each seat of a generation: its own, or where it has none another one's.
    fn by_seat(&self, id: GroupId, generation: Generation, slots: &[u16]) -> Vec<u16> {
        let Some(group) = self.groups.get(&id) else { return Vec::new() };
        let seat_of = |slot: &u16| {
            let is_there = |(id, _): &(&ListenerId, &Listener)| group.slots.of(**id) == Some(*slot);
            self.listeners.iter().find(is_there).map(|(_, listener)| listener.seat)
        };
        let seated: Vec<_> = slots.iter().filter_map(|slot| Some((seat_of(slot)?, *slot))).collect();
        let (first, end) = self.seats_in_use(generation);
        let slot_of = |seat: u16| {
            let own = seated.iter().find(|(of, _)| of.0 == seat).map(|(_, slot)| *slot);
            own.or_else(|| slots.get(usize::from(seat) % slots.len().max(1)).copied())
        };
        (first..end).filter_map(slot_of).collect()
    }

    /// With nobody to choose, the program in force stays: clients wait in a dead worker's queue for the next one.
    pub(crate) fn attach(&mut self, id: GroupId, shares: Vec<Share>, after: After) -> bool {
        let wanted = InForce::Shares(shares.clone());
        let differs = self.groups.get(&id).is_some_and(|group| group.in_force != wanted);
        if shares.is_empty() || !differs {
            return false;
        }
        let is_named = |listener: &ListenerId| {
            let slot = self.groups.get(&id).and_then(|group| group.slots.of(*listener));
            slot.is_some_and(|slot| shares.iter().any(|share| share.slots.contains(&slot)))
        };
        let named: Vec<ListenerId> = self.steerable(id).into_iter().filter(is_named).collect();
        self.note_chosen(&named);
        self.put_in_force(id, wanted, after);
        self.push(Command::Attach { group: id, shares });
        true
    }

    pub(crate) fn steer_slots(&mut self, id: GroupId) {
        let shares = self.shares(id, None);
        if !self.attach(id, shares, After::Steer) {
            self.work(id, Work::Idle);
        }
    }

    /// Releases a listener, the survey being fresh: leftovers first, then steering off the listener that will move.
    pub(crate) fn release_slot(&mut self, id: GroupId, leaving: ListenerId) {
        // Who is to be chosen has changed since it was decided: that comes first.
        let is_stale = self.groups.get(&id).is_some_and(|group| group.is_stale);
        let Some(listener) = self.listeners.get(&leaving).filter(|_| !is_stale) else {
            return self.work(id, Work::Idle);
        };
        let has_queue = !listener.gone && !self.takes_datagrams(id);
        let queued = listener.depth.filter(|_| has_queue).map_or(0, |depth| depth.queued);
        if queued > 0 && self.leave_to_sibling(id, leaving) {
            return;
        }
        let moves_on = |group: &Group| group.migrates_by_hash && !group.slots.is_last(leaving);
        if queued > 0 && !self.groups.get(&id).is_some_and(moves_on) {
            self.note_leftovers(leaving, 0, queued);
        }
        let mover = self.groups.get(&id).and_then(|group| group.slots.mover(leaving));
        if mover.is_some_and(|mover| self.steerable(id).contains(&mover)) {
            let shares = self.shares(id, mover);
            let is_exposed = shares.is_empty();
            if self.attach(id, shares, After::Release(leaving)) {
                return;
            }
            // Until the kernel is told the mover's new slot, it chooses among all.
            if is_exposed {
                self.note_exposed(id);
            }
        }
        self.release_now(id, leaving);
    }

    /// Asks a handover worker to accept what waits in a listener nobody accepts from.
    fn leave_to_sibling(&mut self, id: GroupId, leaving: ListenerId) -> bool {
        const ATTEMPTS: u8 = 3;
        let is_handover = |listener: &ListenerId| {
            let worker = self.listeners.get(listener).and_then(|l| self.workers.get(&l.worker));
            worker.is_some_and(|worker| worker.kind == Some(WorkerKind::Handover))
        };
        let siblings: Vec<ListenerId> = self.choosable(id).into_iter().filter(is_handover).collect();
        let Some(listener) = self.listeners.get_mut(&leaving).filter(|listener| listener.asked < ATTEMPTS)
        else {
            return false;
        };
        // Another one each time, in case the first does not answer.
        let Some(sibling) = siblings.get(usize::from(listener.asked) % siblings.len().max(1)) else {
            return false;
        };
        listener.asked += 1;
        // The sibling holds it too, and perhaps for longer than it should.
        listener.by_shutdown = true;
        let Some(worker) = self.listeners.get(sibling).map(|sibling| sibling.worker) else { return false };
        if let Some(group) = self.groups.get_mut(&id) {
            (group.work, group.taking) = (Work::Idle, Some(leaving));
        }
        self.timers.arm(Timer::Group(id), self.now.after(RETRY));
        self.push(Command::Tell { worker, order: Order::Take(leaving) });
        true
    }

    /// An unmodified worker that starts may begin to listen at any moment: just before a listener leaves it would be the one
    /// that moves, just after it the last, and nothing would tell the one from the other.
    pub(crate) fn may_be_joined(&self, id: GroupId) -> bool {
        // What takes datagrams joins by `bind()`, which all workers call for themselves.
        let is_handover = |generation| {
            let mut of_it = self.workers.values().filter(|worker| worker.generation == generation);
            !self.takes_datagrams(id) && of_it.any(|worker| worker.kind == Some(WorkerKind::Handover))
        };
        let may_join = |worker: &Worker| {
            let plan = self.generations.get(&worker.generation).map(|record| &record.plan);
            let listens_there = plan.is_some_and(|plan| plan.groups.contains(&id));
            listens_there && worker.state.is_starting() && !is_handover(worker.generation)
        };
        self.engine == Engine::Cbpf && self.workers.values().any(may_join)
    }

    pub(crate) fn release_now(&mut self, id: GroupId, leaving: ListenerId) {
        if self.may_be_joined(id) {
            self.mark_stale(id);
            return self.work(id, Work::Idle);
        }
        self.forget_listener(leaving);
        self.outdate_looks(id);
        self.save();
        let is_datagram = self.takes_datagrams(id);
        if let Some(group) = self.groups.get_mut(&id) {
            // It can't be shut down: whoever still has it keeps it in its slot.
            if is_datagram {
                group.released = group.slots.cookie_of(leaving);
                return self.survey(id, After::Steer);
            }
            group.before = group.slots.cookie_of(leaving).map(|cookie| (group.slots.clone(), cookie));
            group.slots.remove(leaving);
            group.work = Work::Idle;
        }
        // At once, without another look: until the kernel is told, its program may name a slot that is no more.
        self.steer_slots(id);
    }

    pub(crate) fn on_taken(&mut self, listener: ListenerId, count: u32) {
        let Some(group) = self.listeners.get(&listener).map(|listener| listener.group) else { return };
        self.note_leftovers(listener, count, 0);
        if let Some(group) = self.groups.get_mut(&group) {
            group.taking = group.taking.filter(|taking| *taking != listener);
        }
    }
}
