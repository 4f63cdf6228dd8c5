//! Who gets new connections, group by group: bringing the kernel to the target, under either engine's rules.

use crate::command::{Command, Report};
use crate::event::GroupView;
use crate::generation::UpgradeStep;
use crate::group::{After, Group, InForce, Listener, Settling, Work};
use crate::id::{Generation, GroupId, ListenerId, WorkerId};
use crate::master::Master;
use crate::plan::{Engine, Plan};
use crate::timers::Timer;
use crate::worker::WorkerState;
use alloc::vec::Vec;
use core::time::Duration;

/// The pause before the kernel is asked again after it refused, or a worker after it did not answer.
pub(crate) const RETRY: Duration = Duration::from_secs(1);

impl Master {
    /// Points groups at those of these generations that listen there; [`pump`](Master::pump) does the rest. A group
    /// none of them listens in is left alone.
    pub(crate) fn aim(&mut self, target: &[(Generation, u16)]) {
        for (id, group) in &mut self.groups {
            let listens = |generation: &Generation| {
                self.generations.get(generation).is_some_and(|record| record.plan.groups.contains(id))
            };
            let mut here: Vec<_> =
                target.iter().filter(|(generation, _)| listens(generation)).copied().collect();
            // Alone it gets all there is.
            if let [(_, weight)] = here.as_mut_slice() {
                *weight = 1000;
            }
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

    /// Who can be chosen in the worker's groups has changed.
    pub(crate) fn mark_stale_of(&mut self, worker: WorkerId) {
        for listener in self.listeners_of(worker) {
            let Some(l) = self.listeners.get(&listener) else { continue };
            let (group, generation) = (l.group, l.generation);
            if self.groups.get(&group).is_some_and(|group| group.wants(generation)) {
                self.mark_stale(group);
            }
        }
    }

    /// Begins the next thing that is to be done to a group, if nothing is being done.
    pub(crate) fn pump(&mut self, id: GroupId) {
        while let Some(group) = self.groups.get_mut(&id) {
            if group.work != Work::Idle {
                return;
            }
            // A master that does not know that an address was given up would still promise it.
            if group.is_stale && group.target.is_empty() && self.saving {
                return;
            }
            if group.is_stale {
                group.is_stale = false;
                match self.engine {
                    Engine::Ebpf => self.steer_keys(id),
                    // Who has which slot is looked up afterwards, unless that of somebody who serves is not known at all.
                    Engine::Cbpf if self.is_steering_back() && self.knows_slots(id) => self.steer_slots(id),
                    Engine::Cbpf => self.survey(id, After::Steer),
                    Engine::None => self.let_go(id),
                }
                continue;
            }
            let is_taking = group.taking.is_some();
            self.begin_settling(id);
            if is_taking {
                return;
            }
            // Of slots that several sockets left since the state was kept the next master could not know who has them.
            if self.engine == Engine::Cbpf && self.saving {
                return;
            }
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

    /// Those, or under `cbpf`, if nobody serves, listeners of ended workers that the master holds: clients wait there.
    pub(crate) fn steerable(&self, id: GroupId) -> Vec<ListenerId> {
        let choosable = self.choosable(id);
        let Some(group) = self.groups.get(&id).filter(|_| choosable.is_empty()) else { return choosable };
        // One that was not chosen before its worker ended was perhaps never ready.
        let is_held = |l: &Listener| {
            let is_there = l.listens && l.handle && !l.gone;
            // While the kernel chose among all, one whose worker still starts may have been chosen too.
            let starts = self.workers.get(&l.worker).is_some_and(|worker| worker.state.is_starting());
            let is_its = l.group == id && group.wants(l.generation) && !starts;
            is_its && is_there && l.settling != Settling::Settled
        };
        self.listeners.iter().filter(|(_, l)| is_held(l)).map(|(id, _)| *id).collect()
    }

    fn knows_slots(&self, id: GroupId) -> bool {
        let has_slot = |listener: &ListenerId| {
            self.groups.get(&id).is_some_and(|group| group.slots.of(*listener).is_some())
        };
        self.choosable(id).iter().all(has_slot)
    }

    pub(crate) fn work(&mut self, id: GroupId, work: Work) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.work = work;
        }
    }

    pub(crate) fn survey(&mut self, id: GroupId, after: After) {
        self.work(id, Work::Surveying(after));
        // Decided by this look, not by one asked for earlier in the same breath.
        self.outdate_looks(id);
        self.observe(id);
    }

    pub(crate) fn observe(&mut self, id: GroupId) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.looks += 1;
            self.push(Command::Observe { group: id });
        }
    }

    /// The group has changed: a look that was asked for before, and is not answered yet, shows how it was.
    pub(crate) fn outdate_looks(&mut self, id: GroupId) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.looks_outdated = group.looks;
        }
    }

    /// A socket came or went unasked: who has which slot can be told as long as only one has.
    pub(crate) fn note_slot(&mut self, id: GroupId) {
        let is_seen = |group: &Group| group.looks > group.looks_outdated;
        if self.engine == Engine::Cbpf && !self.groups.get(&id).is_some_and(is_seen) {
            self.observe(id);
        }
    }

    /// Without steering the master holds nothing back.
    fn let_go(&mut self, id: GroupId) {
        let is_there = |l: &Listener| l.handle && l.listens && !l.leaving && !l.of_seat && !self.retires(l);
        let of_group = self.listeners.iter().filter(|(_, l)| l.group == id && is_there(l));
        for listener in of_group.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.drop_handle(listener);
        }
    }

    /// A listener that can leave now: one that was never chosen at any time, others as long as somebody serves.
    fn next_leaving(&self, id: GroupId) -> Option<ListenerId> {
        let group = self.groups.get(&id).filter(|_| !self.may_be_joined(id))?;
        // Under `ebpf` one that is held, too: processes end before the master knows, and with the last of them and no
        // handle the group would be gone.
        let is_held = |l: &ListenerId| self.listeners.get(l).is_some_and(|l| l.handle);
        let serves = |l: &ListenerId| self.engine != Engine::Ebpf || is_held(l);
        let is_exempt = group.target.is_empty() || group.has_unseen;
        let someone_serves = is_exempt || self.choosable(id).iter().any(serves);
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
            if self.takes_datagrams(listener.group) {
                let (group, generation) = (listener.group, listener.generation);
                self.push(Command::Discard { listener: id, group, generation });
                if let Some(record) = self.generations.get_mut(&generation) {
                    record.discarding += 1;
                }
            }
            self.push(Command::Release { listener: id, shutdown: listener.by_shutdown });
        }
        if let Some(group) = self.groups.get_mut(&listener.group) {
            group.anchor = group.anchor.filter(|anchor| *anchor != id);
            group.taking = group.taking.filter(|taking| *taking != id);
            // The program goes with the last of its group.
            if !self.listeners.values().any(|other| other.group == listener.group) {
                group.in_force = InForce::Nothing;
            }
        }
    }

    pub(crate) fn on_steered(&mut self, id: GroupId, result: Result<(), i32>) {
        let Some(work) = self.groups.get(&id).map(|group| group.work) else { return };
        match (work, result) {
            (Work::Steering(After::Steer), Ok(())) => {
                self.work(id, Work::Idle);
                self.tidy_keys(id);
            }
            (Work::Steering(After::Release(leaving)), Ok(())) => self.release_now(id, leaving),
            (Work::Steering(_), Err(errno)) => self.refused(id, errno),
            (Work::Idle | Work::Admitting | Work::Surveying(_) | Work::Refused, Ok(()) | Err(_)) => {}
        }
    }

    /// The kernel refused: that ends an upgrade that is steering; otherwise it is tried again.
    pub(crate) fn refused(&mut self, id: GroupId, errno: i32) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.in_force = InForce::Unknown;
            group.work = Work::Refused;
        }
        self.report(Report::SteerFailed(id, errno));
        self.timers.arm(Timer::Group(id), self.now.after(RETRY));
        let is_steering = |step: &UpgradeStep| matches!(step, UpgradeStep::Steering(..));
        if self.upgrade.as_ref().is_some_and(|upgrade| is_steering(&upgrade.step)) {
            self.retry_group(id);
            self.fail_upgrade(crate::command::Reason::SteerFailed(id, errno));
        }
    }

    pub(crate) fn retry_group(&mut self, id: GroupId) {
        self.timers.disarm(Timer::Group(id));
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.taking = None;
        match group.work {
            Work::Refused => {
                group.work = Work::Idle;
                group.is_stale = true;
            }
            Work::Idle | Work::Admitting | Work::Surveying(_) | Work::Steering(_) => {}
        }
    }

    pub(crate) fn on_observed(&mut self, id: GroupId, view: &GroupView) {
        self.note_first_look(id, view);
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.half_open.clone_from(&view.half_open);
        group.migrated = view.migrated.or(group.migrated);
        group.migrate_failures = view.migrate_failures;
        group.migrates_by_hash = view.migrates_by_hash;
        group.looks = group.looks.saturating_sub(1);
        if group.looks_outdated > 0 {
            group.looks_outdated -= 1;
            if group.looks == 0 && matches!(group.work, Work::Surveying(_)) {
                self.observe(id);
            }
            return self.retirements_observed(id);
        }
        let before = group.slots.clone();
        if let Some(released) = group.released.take() {
            group.slots.note_left(released, &view.members);
        }
        let mut is_sure = group.slots.sync(&view.members);
        if let Some((slots, left)) = group.before.take() {
            is_sure &= group.slots.is_longer(&slots.also_without(left, &view.members));
        }
        // A socket left that nobody watched: the program may name slots by which others are meant now, or nobody.
        group.is_stale |= self.engine == Engine::Cbpf && !group.slots.is_longer(&before);
        for (listener, depth) in &view.depths {
            if let Some(listener) = self.listeners.get_mut(listener) {
                listener.depth = Some(*depth);
            }
        }
        for (listener, record) in self.listeners.iter_mut().filter(|(_, l)| l.group == id && l.listens) {
            record.gone = !view.members.iter().any(|member| member.listener == Some(*listener));
            // A worker shut down the socket of its seat: the next one gets another.
            record.leaving |= record.gone && record.of_seat;
        }
        if !is_sure && self.engine == Engine::Cbpf {
            self.report(Report::SlotsUnsure(id));
        }
        match self.groups.get(&id).map(|group| group.work) {
            Some(Work::Surveying(After::Steer)) => self.steer_slots(id),
            Some(Work::Surveying(After::Release(leaving))) => self.release_slot(id, leaving),
            Some(Work::Idle | Work::Admitting | Work::Steering(_) | Work::Refused) | None => {}
        }
        self.handshakes_observed(id);
        self.compare_queues(id);
        self.retirements_observed(id);
    }

    /// Makes sure there is a record of each group a plan names.
    pub(crate) fn open_groups(&mut self, plan: &Plan) {
        for id in &plan.groups {
            let group = self.groups.entry(*id).or_insert_with(Group::new);
            group.is_datagram = plan.datagram_groups.contains(id);
        }
    }
}
