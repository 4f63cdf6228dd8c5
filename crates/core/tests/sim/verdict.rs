//! What the judge says between two events, and in the end.

use crate::kernel::{Holder, Kernel, Socket, Stage};
use crate::oracle::Oracle;
use crate::workers::Worker;
use reuseportd_core::{Engine, GroupId, ListenerId, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

type Workers = BTreeMap<WorkerId, Worker>;

impl Oracle {
    /// Nobody is steered to a worker known to be gone, as long as somebody else serves that could be steered to.
    pub(crate) fn judge_named(&self, group: GroupId, kernel: &Kernel, workers: &Workers) {
        if self.disturbed.contains_key(&group) || self.protocol.steer_failed(group) {
            return;
        }
        let named = kernel.named(group);
        let is_dead = |worker: WorkerId| self.protocol.has_exited(worker) || !self.protocol.is_ready(worker);
        let dead = |l: &ListenerId| kernel.sockets[l].workers().all(is_dead);
        let is_its = |worker: WorkerId| {
            let of = workers[&worker].generation;
            let may_be = self.protocol.has_served(of) && !self.protocol.is_given_up(worker);
            self.is_steered_to(group, of) && may_be && self.protocol.is_serving(worker)
        };
        let serves = kernel.sockets.values().any(|socket| {
            let listens = socket.known && socket.stage == Stage::Listening;
            socket.group == group && listens && socket.workers().any(is_its)
        });
        let gone: Vec<&ListenerId> = named.iter().filter(|l| dead(l)).collect();
        assert!(gone.is_empty() || !serves, "{group:?} is steered to listeners of ended workers: {gone:?}");
    }

    /// While seats change hands, or are given back, as many workers can be chosen as serve before and after; unless some
    /// have ended unasked.
    pub(crate) fn judge_capacity(&self, group: GroupId, kernel: &Kernel, workers: &Workers) {
        let Some(way) = self.protocol.phases.way.as_ref() else { return };
        let Some(from) = way.from.filter(|_| self.protocol.plans[&way.to].batch.is_some()) else { return };
        // Of orphans some may be out of reach.
        if self.protocol.phases.is_found(from) || way.is_back || way.is_switched {
            return;
        }
        // A seat's socket is whoever's has the seat, though others could accept from it, too.
        if way.is_failing && self.protocol.plans[&from].seat_groups.contains(&group) {
            return;
        }
        let plans = [from, way.to].map(|generation| &self.protocol.plans[&generation]);
        let is_clear = !self.disturbed.contains_key(&group) && !self.protocol.is_unclear(group);
        if !is_clear || self.refusing.contains(&group) || !plans.iter().all(|p| p.groups.contains(&group)) {
            return;
        }
        let works = |id: &WorkerId| workers[id].runs && !workers[id].deserted;
        let serves = |id: &WorkerId| works(id) && self.protocol.is_serving(*id);
        let chosen = kernel.named(group);
        let chosen: BTreeSet<WorkerId> =
            chosen.iter().filter_map(|id| kernel.sockets[id].workers().filter(serves).last()).collect();
        let serving = chosen.len();
        let wanted = usize::from(plans[0].workers.min(plans[1].workers));
        let missing = self.protocol.vacant_seats(from, way.to, works);
        assert!(serving + missing >= wanted, "{group:?}: {chosen:?} of {wanted}, {missing} ended: {way:?}");
    }

    /// A handle that is not needed: at rest there is none.
    pub(crate) fn spare_handle(&self, kernel: &Kernel, workers: &Workers) -> Option<ListenerId> {
        let active = self.protocol.active();
        let mut anchored = BTreeSet::new();
        for (listener, socket) in &kernel.sockets {
            if !socket.holders.contains(&Holder::Master) {
                continue;
            }
            // Those of seats are counted elsewhere.
            if socket.seat.is_some() {
                continue;
            }
            let owner = socket.owner.map(|owner| (&workers[&owner], owner));
            let serves = owner.is_some_and(|(worker, id)| {
                worker.runs && Some(worker.generation) == active && self.protocol.is_ready(id)
            });
            let is_anchor = self.engine == Engine::Ebpf
                && !kernel.takes_datagrams(socket.group)
                && owner.is_some_and(|(worker, _)| !worker.temper.handover);
            if !serves || (is_anchor && !anchored.insert(socket.group)) {
                return Some(*listener);
            }
        }
        None
    }

    /// A socket that takes datagrams, of a worker that serves: at rest each is held, or what waits there could not be counted.
    pub(crate) fn missing_handle(&self, kernel: &Kernel, workers: &Workers) -> Option<ListenerId> {
        // Nobody wants the sockets that one brings that is ready twice.
        let serves = |socket: &Socket| {
            let owner = socket.owner.filter(|owner| workers[owner].temper.announces < 2);
            owner.is_some_and(|owner| self.protocol.is_serving(owner))
        };
        let is_needed = |socket: &Socket| {
            kernel.takes_datagrams(socket.group) && socket.is_owned() && socket.known && serves(socket)
        };
        let is_held = |socket: &Socket| socket.holders.contains(&Holder::Master);
        let mut sockets = kernel.sockets.iter().filter(|_| self.engine != Engine::None);
        sockets.find(|(_, socket)| is_needed(socket) && !is_held(socket)).map(|(id, _)| *id)
    }

    /// Nobody may be waiting at the end, unless for an orphan that accepts nothing, whose successors all failed.
    pub(crate) fn judge_end(&self, kernel: &Kernel, workers: &Workers) {
        for (connection, listener) in &kernel.waiting {
            let excused = self.clients.get(connection).is_none_or(|client| client.excused);
            let excused = excused && !self.waits_for_ever(*connection);
            let socket = &kernel.sockets[listener];
            // One that was never told to serve does not, and the next master can't know.
            let hangs =
                |id: WorkerId| workers[&id].orphan && (workers[&id].mute.is_some() || !workers[&id].serves);
            let excused = excused || socket.workers().any(hangs);
            assert!(excused, "connection {connection} waits for ever in {listener:?}: {socket:?}");
        }
    }
}
