//! `ebpf`: sockets named by key. A listener is never chosen before it is under a key, switching is one write, and what a
//! closing listener leaves is moved by the kernel.

use crate::command::{Command, Range};
use crate::generation::GenerationState;
use crate::group::{After, InForce, Listener, Work};
use crate::id::{Generation, GroupId, ListenerId};
use crate::master::Master;
use crate::plan::{Engine, Policy};
use crate::slots::{KeyRange, Keys};
use crate::timers::Timer;
use crate::watch::WATCH_PERIOD;
use crate::worker::{WorkerKind, WorkerState};
use alloc::vec::Vec;

/// "No space left on device", said by the core itself when the keys of a group do not suffice.
const ENOSPC: i32 = 28;

impl Master {
    /// Puts all that may be chosen under keys first; with every key confirmed, one write makes the difference.
    pub(crate) fn steer_keys(&mut self, id: GroupId) {
        let target = self.groups.get(&id).map(|group| group.target.clone()).unwrap_or_default();
        let mut ranges = Vec::new();
        for (generation, weight) in &target {
            let Some(keys) = self.admit_all(id, *generation) else {
                self.refused(id, ENOSPC);
                return;
            };
            let (first, end) = self.seats_in_use(*generation);
            let policy = self.generations.get(generation).map(|r| r.plan.policy).unwrap_or_default();
            ranges.push(Range {
                generation: *generation,
                weight: *weight,
                base: keys.base + u32::from(first) * keys.stride,
                count: u32::from(end - first) * keys.stride,
                step: if policy == Policy::Cpu { keys.stride } else { 0 },
            });
        }
        // The way back is to be one write, too.
        let on_standby = self.generations.iter().filter(|(_, r)| r.state == GenerationState::Standby);
        for generation in on_standby.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.admit_all(id, generation);
        }
        let Some(group) = self.groups.get_mut(&id) else { return };
        if group.admitting > 0 {
            group.work = Work::Admitting;
            return;
        }
        let wanted = InForce::Ranges(ranges.clone());
        // A program is attached through one that listens, and names them.
        let is_there = |listener: &Listener| listener.group == id && listener.listens;
        let is_empty = target.is_empty() || !self.listeners.values().any(is_there);
        let is_new = group.in_force != wanted && !(is_empty && group.in_force == InForce::Nothing);
        if is_new {
            self.put_in_force(id, wanted, After::Steer);
            self.push(Command::Steer { group: id, ranges });
        } else {
            self.tidy_keys(id);
        }
    }

    /// Puts all listeners of a generation that serve under its keys; `None` if there are not enough of them.
    fn admit_all(&mut self, id: GroupId, generation: Generation) -> Option<KeyRange> {
        let eligible = self.eligible(id, generation);
        let keys = self.keys_for(id, generation, &eligible)?;
        for listener in eligible {
            self.admit(listener, keys);
        }
        Some(keys)
    }

    /// The kernel does what is wanted: whatever that makes superfluous goes.
    pub(crate) fn tidy_keys(&mut self, id: GroupId) {
        if self.engine == Engine::Ebpf {
            self.keep_keys(id);
            self.evict_dead(id);
        }
        self.keep_anchor(id);
    }

    pub(crate) fn put_in_force(&mut self, id: GroupId, wanted: InForce, after: After) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.in_force = wanted;
            group.work = Work::Steering(after);
        }
    }

    /// The generation's keys, given out when it is first steered to: by then its listeners are known.
    fn keys_for(&mut self, id: GroupId, generation: Generation, eligible: &[ListenerId]) -> Option<KeyRange> {
        let plan = &self.generations.get(&generation)?.plan;
        let seats = u32::from(plan.workers);
        if plan.seat_groups.contains(&id) {
            return Keys::of_seats(generation, seats);
        }
        let mut stride = 1;
        for listener in eligible {
            let worker = self.listeners.get(listener)?.worker;
            let of_worker =
                eligible.iter().filter(|l| self.listeners.get(l).is_some_and(|l| l.worker == worker)).count();
            stride = stride.max(u32::try_from(of_worker).ok()?);
        }
        let keys = &mut self.groups.get_mut(&id)?.keys;
        let keys = keys.of(generation).or_else(|| keys.give(generation, seats, stride))?;
        (seats * keys.stride <= keys.count).then_some(keys)
    }

    /// Puts a listener under a key of its seat. A dead predecessor's key is taken over, which ends its being chosen.
    fn admit(&mut self, id: ListenerId, keys: KeyRange) {
        let Some(listener) = self.listeners.get(&id).filter(|listener| listener.key.is_none()) else {
            return;
        };
        if !listener.handle {
            return self.reach(id);
        }
        let (group, first) = (listener.group, keys.base + u32::from(listener.seat.0) * keys.stride);
        let mut of_seat = first..first + keys.stride;
        let is_free = |key: &u32| {
            let holds = |l: &Listener| l.group == group && l.key == Some(*key) && !l.leaving && !l.gone;
            !self.listeners.values().any(|l| holds(l) && self.is_accepted_from(l) && !self.retires(l))
        };
        // A respawn with more listeners than its seat has keys keeps the surplus unchosen, which loses nothing.
        let Some(key) = of_seat.find(is_free) else { return };
        if let Some(listener) = self.listeners.get_mut(&id) {
            listener.key = Some(key);
        }
        if let Some(group) = self.groups.get_mut(&group) {
            group.admitting += 1;
        }
        self.push(Command::Admit { listener: id, key });
    }

    /// A master that was killed may have taken out of the array what is under a key as far as is known: all that is to be
    /// chosen is put there once more.
    pub(crate) fn admit_again(&mut self) {
        for (id, group) in &mut self.groups {
            let serves = |l: &Listener| {
                self.workers.get(&l.worker).is_some_and(|worker| worker.state == WorkerState::Serving)
            };
            let is_its = |l: &Listener| l.group == *id && l.handle && !l.leaving && serves(l);
            for (listener, l) in self.listeners.iter().filter(|(_, l)| is_its(l)) {
                let Some(key) = l.key else { continue };
                group.admitting += 1;
                self.commands.push_back(Command::Admit { listener: *listener, key });
            }
        }
    }

    /// A master that was killed had let go of its handle, and that it was under a key is not known: it is taken again, to be
    /// admitted by it.
    fn reach(&mut self, id: ListenerId) {
        let Some(listener) = self.listeners.get(&id) else { return };
        let group = listener.group;
        let is_needed = self.is_its_own(id) && !self.is_surplus(group, listener);
        let Some(of) = self.groups.get_mut(&group).filter(|_| is_needed) else { return };
        if of.reaching.insert(id) {
            of.admitting += 1;
            self.push(Command::Anchor { listener: id });
        }
    }

    /// Takes what another master put there later than this memory is out of the array, now that it is not chosen; unless
    /// it is all that can be: it may be the very listener that is to have the key.
    fn keep_keys(&mut self, id: GroupId) {
        let has_key = self.has_key(id);
        let Some(group) = self.groups.get_mut(&id) else { return };
        if (has_key || group.target.is_empty()) && core::mem::take(&mut group.is_inherited) {
            let of_group = self.listeners.values().filter(|listener| listener.group == id);
            let kept = of_group.filter_map(|listener| listener.key).collect();
            self.push(Command::KeepKeys { group: id, kept });
        }
    }

    /// Somebody can be chosen, and is under a key.
    fn has_key(&self, id: GroupId) -> bool {
        let is_under_key = |id: &ListenerId| self.listeners.get(id).is_some_and(|l| l.key.is_some());
        self.choosable(id).iter().any(is_under_key)
    }

    /// Takes listeners that nobody accepts from, or shall get any more, out of the array, as long as somebody else can be chosen.
    fn evict_dead(&mut self, id: GroupId) {
        if !self.has_key(id) {
            return;
        }
        let Some(group) = self.groups.get(&id) else { return };
        // Of a generation that is not chosen at all the keys may stay.
        let is_away = |l: &Listener| group.wants(l.generation) && self.retires(l) && !self.has_flows(l);
        let dead = |l: &Listener| l.group == id && (l.leaving || !self.is_accepted_from(l) || is_away(l));
        let dead: Vec<ListenerId> =
            self.listeners.iter().filter(|(_, l)| dead(l)).map(|(id, _)| *id).collect();
        dead.into_iter().for_each(|listener| self.evict(listener));
    }

    /// Takes a listener out of the array, unless another is on its way to its key.
    pub(crate) fn evict(&mut self, id: ListenerId) {
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        let (group, Some(key)) = (listener.group, listener.key.take()) else { return };
        if !self.listeners.values().any(|l| l.group == group && l.key == Some(key)) {
            self.push(Command::Evict { group, key });
        }
    }

    /// Its worker is on its way out.
    pub(crate) fn retires(&self, listener: &Listener) -> bool {
        self.workers.get(&listener.worker).is_some_and(|worker| worker.state.is_retiring())
    }

    /// Its worker lives. The socket of a seat may be back with one that is still starting.
    fn is_accepted_from(&self, listener: &Listener) -> bool {
        match self.workers.get(&listener.worker).map(|worker| worker.state) {
            None | Some(WorkerState::Remains { .. }) => false,
            Some(state) => !listener.of_seat || !state.is_starting(),
        }
    }

    /// Keeps exactly one handle per group of unmodified workers: with none the group could get empty and refuse,
    /// with more a dead worker's queue would wait for the master instead of being migrated by the kernel at once.
    pub(crate) fn keep_anchor(&mut self, id: GroupId) {
        if self.engine != Engine::Ebpf || self.takes_datagrams(id) {
            return;
        }
        let choosable: Vec<ListenerId> =
            self.choosable(id).into_iter().filter(|listener| self.is_its_own(*listener)).collect();
        let Some(group) = self.groups.get_mut(&id) else { return };
        let has_handle = |l: &ListenerId| self.listeners.get(l).is_some_and(|l| l.handle);
        let kept = group.anchor.filter(|anchor| choosable.contains(anchor));
        match kept.or_else(|| choosable.iter().copied().find(has_handle)) {
            Some(anchor) => group.anchor = Some(anchor),
            None => {
                let candidate = choosable.first().copied();
                if let (None, Some(listener)) = (group.anchoring, candidate) {
                    group.anchoring = candidate;
                    self.push(Command::Anchor { listener });
                    // It may fail.
                    self.timers.arm_by(Timer::Watch, self.now.after(WATCH_PERIOD));
                }
                return;
            }
        }
        let anchor = group.anchor;
        let serves = |l: &Listener| {
            self.workers.get(&l.worker).is_some_and(|worker| worker.state == WorkerState::Serving)
        };
        let is_spare = |listener: &ListenerId, l: &Listener| {
            // Without a key it may still need one: then the handle is what it is admitted by.
            let needs_none = l.key.is_some() || self.is_surplus(id, l);
            l.handle && l.listens && !l.leaving && serves(l) && needs_none && Some(*listener) != anchor
        };
        let of_group = self.listeners.iter().filter(|(_, l)| l.group == id);
        let spare: Vec<ListenerId> = of_group.filter(|(id, l)| is_spare(id, l)).map(|(id, _)| *id).collect();
        for listener in spare.into_iter().filter(|listener| self.is_its_own(*listener)).collect::<Vec<_>>() {
            self.drop_handle(listener);
        }
    }

    /// All keys of its seat are those of other listeners of its worker.
    fn is_surplus(&self, id: GroupId, listener: &Listener) -> bool {
        let keys = self.groups.get(&id).and_then(|group| group.keys.of(listener.generation));
        let has_key = |l: &&Listener| l.group == id && l.worker == listener.worker && l.key.is_some();
        let taken = self.listeners.values().filter(has_key).count();
        keys.is_some_and(|keys| u32::try_from(taken).is_ok_and(|taken| taken >= keys.stride))
    }

    /// An unmodified worker made it.
    fn is_its_own(&self, id: ListenerId) -> bool {
        let listener = self.listeners.get(&id).filter(|listener| !listener.of_seat);
        let worker = listener.and_then(|listener| self.workers.get(&listener.worker));
        worker.is_some_and(|worker| worker.kind == Some(WorkerKind::Unmodified))
    }

    pub(crate) fn drop_handle(&mut self, id: ListenerId) {
        if let Some(listener) = self.listeners.get_mut(&id).filter(|listener| listener.handle) {
            listener.handle = false;
            self.push(Command::Release { listener: id, shutdown: false });
        }
    }

    pub(crate) fn on_admitted(&mut self, id: ListenerId, result: Result<(), i32>) {
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        let group = listener.group;
        if result.is_err() {
            listener.key = None;
        }
        let key = listener.key;
        // Only now the dead predecessor's is its own no more.
        let others = self.listeners.iter_mut().filter(|(other, l)| **other != id && l.group == group);
        others.filter(|(_, l)| key.is_some() && l.key == key).for_each(|(_, l)| l.key = None);
        self.admitted(group, result);
    }

    /// One listener fewer to wait for; with none left, the group is steered.
    fn admitted(&mut self, id: GroupId, result: Result<(), i32>) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.admitting = group.admitting.saturating_sub(1);
        group.admit_failed = group.admit_failed.or(result.err());
        if group.admitting > 0 || group.work != Work::Admitting {
            return;
        }
        group.work = Work::Idle;
        match group.admit_failed.take() {
            Some(errno) => self.refused(id, errno),
            None => self.steer_keys(id),
        }
    }

    pub(crate) fn on_anchored(&mut self, id: ListenerId, result: Result<(), i32>) {
        let Some(listener) = self.listeners.get_mut(&id) else {
            // Its worker ended meanwhile and the listener was forgotten; the handle must not be.
            if result.is_ok() {
                self.push(Command::Release { listener: id, shutdown: false });
            }
            self.forget_anchoring(id);
            let mut groups = self.groups.iter_mut();
            let group = groups.find_map(|(of, group)| group.reaching.remove(&id).then_some(*of));
            return group.into_iter().for_each(|group| self.admitted(group, Ok(())));
        };
        let (group, worker) = (listener.group, listener.worker);
        listener.handle |= result.is_ok();
        self.forget_anchoring(id);
        if let Some(of) = self.groups.get_mut(&group)
            && of.reaching.remove(&id)
        {
            if result.is_err() {
                self.push(Command::Owns { listener: id, worker });
            }
            return self.admitted(group, result);
        }
        if result.is_ok() {
            self.keep_anchor(group);
        }
    }

    fn forget_anchoring(&mut self, id: ListenerId) {
        for group in self.groups.values_mut().filter(|group| group.anchoring == Some(id)) {
            group.anchoring = None;
        }
    }
}
