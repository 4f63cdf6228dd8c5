//! Who gets new connections, group by group: bringing the kernel to the target, under either engine's rules.

use crate::command::{Command, Range, Report, Share};
use crate::event::GroupView;
use crate::generation::UpgradeStep;
use crate::group::{After, Group, InForce, Listener, Work};
use crate::id::{Generation, GroupId, ListenerId};
use crate::master::{ANCHOR_PERIOD, Master};
use crate::plan::Engine;
use crate::slots::KeyRange;
use crate::timers::Timer;
use crate::worker::{WorkerKind, WorkerState};
use alloc::vec::Vec;
use core::time::Duration;

/// The pause before the kernel is asked again after it refused, or a worker after it did not answer.
const RETRY: Duration = Duration::from_secs(1);
/// "No space left on device", said by the core itself when the keys of a group do not suffice.
const ENOSPC: i32 = 28;

impl Master {
    /// Points groups at those of these generations that listen there; [`pump`](Master::pump) does the rest. A group
    /// none of them listens in is left alone.
    pub(crate) fn aim(&mut self, target: &[(Generation, u16)]) {
        for (id, group) in &mut self.groups {
            let listens = |generation: &Generation| {
                self.generations.get(generation).is_some_and(|record| record.plan.groups.contains(id))
            };
            let here: Vec<_> = target.iter().filter(|(generation, _)| listens(generation)).copied().collect();
            if !here.is_empty() {
                group.target = here;
                group.is_stale = true;
            }
        }
    }

    /// Points every group at nobody in which this generation does not listen, or all of them.
    pub(crate) fn aim_away(&mut self, except: Option<Generation>) {
        let plan = except.and_then(|generation| self.generations.get(&generation)).map(|record| &record.plan);
        for (id, group) in &mut self.groups {
            if !plan.is_some_and(|plan| plan.groups.contains(id)) {
                group.target.clear();
                group.is_stale = true;
            }
        }
    }

    /// The group's picture of who can be chosen is out of date.
    pub(crate) fn mark_stale(&mut self, group: GroupId) {
        if let Some(group) = self.groups.get_mut(&group) {
            group.is_stale = true;
        }
    }

    /// Begins the next thing that is to be done to a group, if nothing is being done.
    pub(crate) fn pump(&mut self, id: GroupId) {
        while let Some(group) = self.groups.get_mut(&id) {
            if group.work != Work::Idle {
                return;
            }
            if group.is_stale {
                group.is_stale = false;
                match self.engine {
                    Engine::Ebpf => self.steer_keys(id),
                    Engine::Cbpf => self.survey(id, After::Steer),
                    Engine::None => self.let_go(id),
                }
                continue;
            }
            self.begin_settling(id);
            match self.next_leaving(id) {
                Some(listener) => self.begin_release(id, listener),
                None => return,
            }
        }
    }

    /// Listeners of a generation that new connections may be given to.
    pub(crate) fn eligible(&self, group: GroupId, generation: Generation) -> Vec<ListenerId> {
        let serves = |listener: &Listener| {
            self.workers.get(&listener.worker).is_some_and(|worker| worker.state == WorkerState::Serving)
        };
        self.listeners
            .iter()
            .filter(|(_, l)| {
                l.group == group && l.generation == generation && l.listens && !l.leaving && !l.gone
            })
            .filter(|(_, l)| serves(l))
            .map(|(id, _)| *id)
            .collect()
    }

    /// All listeners that the target of a group may choose from.
    pub(crate) fn choosable(&self, id: GroupId) -> Vec<ListenerId> {
        let target = self.groups.get(&id).map(|group| group.target.clone()).unwrap_or_default();
        target.iter().flat_map(|(generation, _)| self.eligible(id, *generation)).collect()
    }

    fn work(&mut self, id: GroupId, work: Work) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.work = work;
        }
    }

    fn survey(&mut self, id: GroupId, after: After) {
        self.work(id, Work::Surveying(after));
        self.push(Command::Observe { group: id });
    }

    // ---- ebpf -------------------------------------------------------------------------------------------------

    fn steer_keys(&mut self, id: GroupId) {
        let target = self.groups.get(&id).map(|group| group.target.clone()).unwrap_or_default();
        let mut ranges = Vec::new();
        for (generation, weight) in &target {
            let eligible = self.eligible(id, *generation);
            let Some(keys) = self.keys_for(id, *generation, &eligible) else {
                self.refused(id, ENOSPC);
                return;
            };
            for listener in eligible {
                self.admit(listener, keys);
            }
            ranges.push(Range {
                generation: *generation,
                weight: *weight,
                base: keys.base,
                count: keys.count,
            });
        }
        let wanted = InForce::Ranges(ranges.clone());
        if target.is_empty() && self.groups.get(&id).is_none_or(|group| group.in_force == InForce::Nothing) {
            return;
        }
        if self.groups.get(&id).is_some_and(|group| group.in_force != wanted) {
            self.put_in_force(id, wanted, After::Steer);
            self.push(Command::Steer { group: id, ranges });
        }
        self.evict_dead(id);
        self.keep_anchor(id);
    }

    fn put_in_force(&mut self, id: GroupId, wanted: InForce, after: After) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.in_force = wanted;
            group.work = Work::Steering(after);
        }
    }

    /// The generation's keys, given out when it is first steered to: by then its listeners are known.
    fn keys_for(&mut self, id: GroupId, generation: Generation, eligible: &[ListenerId]) -> Option<KeyRange> {
        let seats = u32::from(self.generations.get(&generation)?.plan.workers);
        let mut stride = 1;
        for listener in eligible {
            let worker = self.listeners.get(listener)?.worker;
            let of_worker =
                eligible.iter().filter(|l| self.listeners.get(l).is_some_and(|l| l.worker == worker)).count();
            stride = stride.max(u32::try_from(of_worker).ok()?);
        }
        let keys = &mut self.groups.get_mut(&id)?.keys;
        keys.of(generation).or_else(|| keys.give(generation, seats, stride))
    }

    /// Puts a listener under a key of its seat. A dead predecessor's key is taken over, which ends its being chosen.
    fn admit(&mut self, id: ListenerId, keys: KeyRange) {
        let Some(listener) = self.listeners.get(&id).filter(|listener| listener.key.is_none()) else {
            return;
        };
        let (group, first) = (listener.group, keys.base + u32::from(listener.seat.0) * keys.stride);
        let mut of_seat = first..first + keys.stride;
        let is_free = |key: &u32| {
            !self.listeners.values().any(|l| l.group == group && l.key == Some(*key) && !l.leaving && !l.gone)
        };
        // A respawn with more listeners than its seat has keys keeps the surplus unchosen, which loses nothing.
        let Some(key) = of_seat.find(is_free) else { return };
        for other in self.listeners.values_mut().filter(|l| l.group == group && l.key == Some(key)) {
            other.key = None;
        }
        if let Some(listener) = self.listeners.get_mut(&id) {
            listener.key = Some(key);
        }
        self.push(Command::Admit { listener: id, key });
    }

    /// Takes listeners that nobody accepts from out of the array, as long as somebody else can be chosen.
    fn evict_dead(&mut self, id: GroupId) {
        if self.choosable(id).is_empty() {
            return;
        }
        let workers = &self.workers;
        let lives = |l: &Listener| {
            workers.get(&l.worker).is_some_and(|w| !matches!(w.state, WorkerState::Remains { .. }))
        };
        let mut evicted = Vec::new();
        for listener in self.listeners.values_mut().filter(|l| l.group == id && (l.leaving || !lives(l))) {
            evicted.extend(listener.key.take());
        }
        for key in evicted {
            self.push(Command::Evict { group: id, key });
        }
    }

    /// Keeps exactly one handle per group of unmodified workers: with none the group could get empty and refuse,
    /// with more a dead worker's queue would wait for the master instead of being migrated by the kernel at once.
    pub(crate) fn keep_anchor(&mut self, id: GroupId) {
        if self.engine != Engine::Ebpf {
            return;
        }
        let choosable: Vec<ListenerId> =
            self.choosable(id).into_iter().filter(|listener| self.is_unmodified(*listener)).collect();
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
                }
                return;
            }
        }
        let anchor = group.anchor;
        if !self.timers.is_armed(Timer::Anchors) {
            self.timers.arm(Timer::Anchors, self.now.after(ANCHOR_PERIOD));
        }
        let is_spare =
            |id: &ListenerId, l: &Listener| l.handle && l.key.is_some() && !l.leaving && Some(*id) != anchor;
        let of_group = self.listeners.iter().filter(|(_, l)| l.group == id);
        let spare: Vec<ListenerId> = of_group.filter(|(id, l)| is_spare(id, l)).map(|(id, _)| *id).collect();
        for listener in spare.into_iter().filter(|listener| self.is_unmodified(*listener)).collect::<Vec<_>>()
        {
            self.drop_handle(listener);
        }
    }

    fn is_unmodified(&self, id: ListenerId) -> bool {
        let worker = self.listeners.get(&id).and_then(|listener| self.workers.get(&listener.worker));
        worker.is_some_and(|worker| worker.kind == Some(WorkerKind::Unmodified))
    }

    fn drop_handle(&mut self, id: ListenerId) {
        if let Some(listener) = self.listeners.get_mut(&id).filter(|listener| listener.handle) {
            listener.handle = false;
            self.push(Command::Release { listener: id, shutdown: false });
        }
    }

    pub(crate) fn on_admitted(&mut self, id: ListenerId, result: Result<(), i32>) {
        let Err(errno) = result else { return };
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        listener.key = None;
        let id = listener.group;
        let Some(group) = self.groups.get_mut(&id) else { return };
        match group.work {
            Work::Steering(_) => group.admit_failed = Some(errno),
            Work::Idle => self.refused(id, errno),
            Work::Surveying(_) | Work::Taking(_) | Work::Refused => {}
        }
    }

    pub(crate) fn on_anchored(&mut self, id: ListenerId, result: Result<(), i32>) {
        let Some(listener) = self.listeners.get_mut(&id) else {
            // Its worker ended meanwhile and the listener was forgotten; the handle must not be.
            if result.is_ok() {
                self.push(Command::Release { listener: id, shutdown: false });
            }
            return self.forget_anchoring(id);
        };
        let group = listener.group;
        listener.handle |= result.is_ok();
        self.forget_anchoring(id);
        if result.is_ok() {
            self.keep_anchor(group);
        }
    }

    fn forget_anchoring(&mut self, id: ListenerId) {
        for group in self.groups.values_mut().filter(|group| group.anchoring == Some(id)) {
            group.anchoring = None;
        }
    }

    /// A worker that closes its listener unasked leaves an anchor nobody accepts from: seen within a second.
    pub(crate) fn look_at_anchors(&mut self) {
        let groups: Vec<(GroupId, Option<ListenerId>)> =
            self.groups.iter().map(|(id, g)| (*id, g.anchor)).collect();
        for (group, anchor) in groups {
            match anchor.filter(|anchor| self.listeners.get(anchor).is_some_and(|l| l.handle && !l.leaving)) {
                Some(listener) => self.push(Command::Owns { listener }),
                None => self.keep_anchor(group),
            }
        }
        if self.groups.values().any(|group| group.anchor.is_some()) {
            self.timers.arm(Timer::Anchors, self.now.after(ANCHOR_PERIOD));
        }
    }

    // ---- cbpf -------------------------------------------------------------------------------------------------

    /// The slots new connections should be given to, without those of `except`.
    fn shares(&self, id: GroupId, except: Option<ListenerId>) -> Vec<Share> {
        let Some(group) = self.groups.get(&id) else { return Vec::new() };
        let mut shares = Vec::new();
        for (generation, weight) in &group.target {
            let mut slots: Vec<u16> = self
                .eligible(id, *generation)
                .into_iter()
                .filter(|listener| Some(*listener) != except)
                .filter_map(|listener| group.slots.of(listener))
                .collect();
            slots.sort_unstable();
            if !slots.is_empty() {
                shares.push(Share { weight: *weight, slots });
            }
        }
        shares
    }

    /// With nobody to choose, the program in force stays: clients wait in a dead worker's queue for the next one.
    fn attach(&mut self, id: GroupId, shares: Vec<Share>, after: After) -> bool {
        let wanted = InForce::Shares(shares.clone());
        let differs = self.groups.get(&id).is_some_and(|group| group.in_force != wanted);
        if shares.is_empty() || !differs {
            return false;
        }
        let is_named = |listener: &ListenerId| {
            let slot = self.groups.get(&id).and_then(|group| group.slots.of(*listener));
            slot.is_some_and(|slot| shares.iter().any(|share| share.slots.contains(&slot)))
        };
        let named: Vec<ListenerId> = self.choosable(id).into_iter().filter(is_named).collect();
        self.note_chosen(&named);
        self.put_in_force(id, wanted, after);
        self.push(Command::Attach { group: id, shares });
        true
    }

    fn steer_slots(&mut self, id: GroupId) {
        let shares = self.shares(id, None);
        if !self.attach(id, shares, After::Steer) {
            self.work(id, Work::Idle);
        }
    }

    /// Releases a listener, the survey being fresh: leftovers first, then steering off the listener that will move.
    fn release_slot(&mut self, id: GroupId, leaving: ListenerId) {
        let Some(listener) = self.listeners.get(&leaving) else { return self.work(id, Work::Idle) };
        let queued = if listener.gone { 0 } else { listener.depth.map_or(0, |depth| depth.queued) };
        if queued > 0 && self.leave_to_sibling(id, leaving) {
            return;
        }
        let moves_on = |group: &Group| group.migrates_by_hash && !group.slots.is_last(leaving);
        if queued > 0 && !self.groups.get(&id).is_some_and(moves_on) {
            self.note_leftovers(leaving, 0, queued);
        }
        let mover = self.groups.get(&id).and_then(|group| group.slots.mover(leaving));
        if mover.is_some_and(|mover| self.choosable(id).contains(&mover)) {
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
        let Some(worker) = self.listeners.get(sibling).map(|sibling| sibling.worker) else { return false };
        self.work(id, Work::Taking(leaving));
        self.timers.arm(Timer::Group(id), self.now.after(RETRY));
        self.push(Command::Tell { worker, order: crate::command::Order::Take(leaving) });
        true
    }

    fn release_now(&mut self, id: GroupId, leaving: ListenerId) {
        self.forget_listener(leaving);
        if let Some(group) = self.groups.get_mut(&id) {
            group.slots.remove(leaving);
            group.work = Work::Idle;
        }
        // At once, without another look: until the kernel is told, its program may name a slot that is no more.
        self.steer_slots(id);
    }

    pub(crate) fn on_taken(&mut self, listener: ListenerId, count: u32) {
        let Some(group) = self.listeners.get(&listener).map(|listener| listener.group) else { return };
        self.note_leftovers(listener, count, 0);
        if self.groups.get(&group).is_some_and(|group| group.work == Work::Taking(listener)) {
            self.timers.disarm(Timer::Group(group));
            self.survey(group, After::Release(listener));
        }
    }

    // ---- both -------------------------------------------------------------------------------------------------

    /// Without steering the master holds nothing back.
    fn let_go(&mut self, id: GroupId) {
        let of_group =
            self.listeners.iter().filter(|(_, l)| l.group == id && l.handle && l.listens && !l.leaving);
        for listener in of_group.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.drop_handle(listener);
        }
    }

    /// A listener that can leave now: one that was never chosen at any time, others as long as somebody serves.
    fn next_leaving(&self, id: GroupId) -> Option<ListenerId> {
        let group = self.groups.get(&id)?;
        let someone_serves = group.target.is_empty() || !self.choosable(id).is_empty();
        let leaving = self
            .listeners
            .iter()
            .filter(|(listener, l)| l.group == id && l.leaving && self.is_settled(**listener));
        let can_leave = leaving
            .filter(|(_, l)| someone_serves || !l.listens || !group.wants(l.generation) && l.key.is_none());
        can_leave.map(|(id, _)| *id).max_by_key(|listener| group.slots.of(*listener))
    }

    fn begin_release(&mut self, id: GroupId, leaving: ListenerId) {
        let Some(listener) = self.listeners.get(&leaving) else { return };
        if self.engine == Engine::Cbpf && listener.listens && listener.handle {
            self.survey(id, After::Release(leaving));
        } else {
            self.forget_listener(leaving);
        }
    }

    /// Drops the handle, if there is one, and the record.
    pub(crate) fn forget_listener(&mut self, id: ListenerId) {
        let Some(listener) = self.listeners.remove(&id) else { return };
        if listener.handle {
            self.push(Command::Release { listener: id, shutdown: listener.by_shutdown });
        }
        if let Some(group) = self.groups.get_mut(&listener.group) {
            group.anchor = group.anchor.filter(|anchor| *anchor != id);
            // The program goes with the last of its group.
            if !self.listeners.values().any(|other| other.group == listener.group) {
                group.in_force = InForce::Nothing;
            }
        }
    }

    pub(crate) fn on_steered(&mut self, id: GroupId, result: Result<(), i32>) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let admitted = group.admit_failed.take().map_or(Ok(()), Err);
        match (group.work, result.and(admitted)) {
            (Work::Steering(After::Steer), Ok(())) => self.work(id, Work::Idle),
            (Work::Steering(After::Release(leaving)), Ok(())) => self.release_now(id, leaving),
            (Work::Steering(_), Err(errno)) => self.refused(id, errno),
            (Work::Idle | Work::Surveying(_) | Work::Taking(_) | Work::Refused, Ok(()) | Err(_)) => {}
        }
    }

    /// The kernel refused: that ends an upgrade that is steering; otherwise it is tried again.
    fn refused(&mut self, id: GroupId, errno: i32) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.in_force = InForce::Unknown;
            group.work = Work::Refused;
        }
        self.report(Report::SteerFailed(id, errno));
        self.timers.arm(Timer::Group(id), self.now.after(RETRY));
        let is_steering = |step: &UpgradeStep| matches!(step, UpgradeStep::Steering(_));
        if self.upgrade.as_ref().is_some_and(|upgrade| is_steering(&upgrade.step)) {
            self.retry_group(id);
            self.fail_upgrade(crate::command::Reason::SteerFailed(id, errno));
        }
    }

    pub(crate) fn retry_group(&mut self, id: GroupId) {
        self.timers.disarm(Timer::Group(id));
        let Some(group) = self.groups.get_mut(&id) else { return };
        match group.work {
            Work::Taking(listener) => self.survey(id, After::Release(listener)),
            Work::Refused => {
                group.work = Work::Idle;
                group.is_stale = true;
            }
            Work::Idle | Work::Surveying(_) | Work::Steering(_) => {}
        }
    }

    pub(crate) fn on_observed(&mut self, id: GroupId, view: &GroupView) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.half_open.clone_from(&view.half_open);
        group.migrated = view.migrated.or(group.migrated);
        group.migrate_failures = view.migrate_failures;
        group.migrates_by_hash = view.migrates_by_hash;
        let is_sure = group.slots.sync(&view.members);
        for (listener, depth) in &view.depths {
            if let Some(listener) = self.listeners.get_mut(listener) {
                listener.depth = Some(*depth);
            }
        }
        for (listener, record) in self.listeners.iter_mut().filter(|(_, l)| l.group == id && l.listens) {
            record.gone = !view.members.iter().any(|member| member.listener == Some(*listener));
        }
        if !is_sure && self.engine == Engine::Cbpf {
            self.report(Report::SlotsUnsure(id));
        }
        match self.groups.get(&id).map(|group| group.work) {
            Some(Work::Surveying(After::Steer)) => self.steer_slots(id),
            Some(Work::Surveying(After::Release(leaving))) => self.release_slot(id, leaving),
            Some(Work::Idle | Work::Steering(_) | Work::Taking(_) | Work::Refused) | None => {}
        }
        self.handshakes_observed(id);
        self.retirements_observed(id);
    }

    /// Makes sure there is a record of each group a plan names.
    pub(crate) fn open_groups(&mut self, groups: &[GroupId]) {
        for group in groups {
            self.groups.entry(*group).or_insert_with(Group::new);
        }
    }
}
