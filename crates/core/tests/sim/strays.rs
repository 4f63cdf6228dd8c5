//! The part of the judge that says who may be chosen, and what those may expect that are given to anybody else.

use crate::kernel::{Kernel, Program, Socket, Stage};
use crate::oracle::Oracle;
use crate::workers::Worker;
use reuseportd_core::{Engine, Generation, GroupId, ListenerId, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

type Workers = BTreeMap<WorkerId, Worker>;

/// What a connection given to anybody else than those steered to may expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stray {
    Forbidden,
    /// It happens, but it must be served.
    Served,
    Excused,
}

/// Who was given what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Picked {
    pub(crate) id: u64,
    pub(crate) group: GroupId,
    pub(crate) listener: ListenerId,
    /// By the kernel's own hash.
    pub(crate) hashed: bool,
    pub(crate) now: u64,
}

impl Oracle {
    fn promised(&self, group: GroupId) -> bool {
        let is_loose = self.protocol.loose.contains(&group);
        self.engine != Engine::None && self.protocol.promises(group) && !is_loose
    }

    pub(crate) fn refused(&self, id: u64, group: GroupId, workers: &Workers) {
        // All that the master left alone have ended, or closed their listeners, by themselves.
        let may_serve = |(id, worker): &(&WorkerId, &Worker)| {
            self.is_steered_to(group, worker.generation) && self.protocol.is_left_alone(**id)
        };
        let mut left_alone = workers.iter().filter(may_serve).peekable();
        let is_deserted =
            left_alone.peek().is_some() && left_alone.all(|(_, worker)| !worker.runs || worker.deserted);
        let is_promised = self.promised(group) && !self.refusing.contains(&group) && !is_deserted;
        assert!(!is_promised, "connection {id} to {group:?} was refused");
    }

    /// Whether nothing was promised to what was given to this listener; if something was, it must be the right one.
    pub(crate) fn is_excused(&mut self, picked: Picked, kernel: &Kernel, workers: &Workers) -> bool {
        let Picked { id, group, listener, hashed, now } = picked;
        if !self.promised(group) {
            return true;
        }
        let socket = &kernel.sockets[&listener];
        let of = self.generations(socket, workers);
        // By its own hash the kernel chooses those that leave, too.
        let leaves = hashed && socket.owner.is_some_and(|owner| self.protocol.is_given_up(owner));
        // The generation that serves may have nobody yet that could be named: its workers are the right ones all the same.
        // So are those of its seats, which a program that could not be replaced names for another generation.
        let is_shared = socket.seat.is_some() && self.protocol.steer_failed(group);
        let serves = |of: &Generation| (hashed || is_shared) && self.protocol.active() == Some(*of);
        let is_right = of.iter().any(|of| self.is_steered_to(group, *of) || serves(of));
        if is_right && self.is_ready(socket) && !leaves {
            return false;
        }
        self.tally.strays += 1;
        let stray = self.stray(group, listener, hashed, now, kernel, workers);
        assert!(
            stray != Stray::Forbidden,
            "connection {id} to {group:?} strayed to {listener:?}: {socket:?}"
        );
        stray == Stray::Excused
    }

    /// The worker that bound it, or the last of those that got it with a generation that has served.
    pub(crate) fn last_worker(&self, socket: &Socket, workers: &Workers) -> Option<WorkerId> {
        let has_served = |worker: &WorkerId| self.protocol.has_served(workers[worker].generation);
        let last = socket.users.iter().copied().rfind(has_served);
        if socket.seat.is_some() { last } else { socket.owner }
    }

    /// `cbpf` has its holes: slots that move before the master can know, a program it can't replace, strangers; and,
    /// while the only listener steered to moves, the old ones, which must still accept then.
    fn stray(
        &self,
        group: GroupId,
        listener: ListenerId,
        hashed: bool,
        now: u64,
        kernel: &Kernel,
        workers: &Workers,
    ) -> Stray {
        let socket = &kernel.sockets[&listener];
        let Some(Program::Slots(shares)) = kernel.groups.get(&group).map(|g| &g.program) else {
            // Before a master that found only processes has steered, the kernel chooses among all.
            // So it does when all that served have died without anybody knowing yet.
            // One of whose listeners the master has no handle can't be steered to.
            let is_here = |socket: &Socket| socket.group == group && socket.stage == Stage::Listening;
            let is_reached = |w: &Worker| {
                let mut sockets = w.sockets.iter().map(|id| &kernel.sockets[id]);
                sockets.any(|socket| socket.known && is_here(socket))
            };
            // A program that names a generation of which nobody is there leaves it to the kernel, too.
            let is_named = |generation| match kernel.groups.get(&group).map(|group| &group.program) {
                Some(Program::Ranges(ranges)) => ranges.iter().any(|range| range.generation == generation),
                _ => self.is_steered_to(group, generation),
            };
            let serves = |id: &WorkerId, w: &Worker| {
                let is_chosen = is_named(w.generation) && is_reached(w);
                let stays = !self.protocol.is_given_up(*id);
                w.runs && is_chosen && stays && self.protocol.was_serving(*id, now)
            };
            let is_served = workers.iter().any(|(id, worker)| serves(id, worker));
            return if self.refusing.contains(&group) || (hashed && !is_served) {
                Stray::Excused
            } else {
                Stray::Forbidden
            };
        };
        let last = self.last_worker(socket, workers);
        let Some((id, owner)) = last.map(|id| (id, &workers[&id])) else {
            // A stranger took a slot that the program names, and nobody had.
            let had_hole = kernel.groups.get(&group).is_some_and(|group| group.had_hole);
            let is_blind = had_hole && socket.seat.is_none()
                || self.disturbed.contains_key(&group)
                || self.protocol.steer_failed(group);
            return if hashed || is_blind { Stray::Excused } else { Stray::Forbidden };
        };
        // The listeners of a worker with several of them leave one after the other, and nobody accepts from the rest.
        let is_open = socket.is_owned();
        let has_several = owner.temper.sockets > 1 && !is_open;
        // Whoever is to answer requests before it is ready joins before the master may steer, and so does all that takes
        // datagrams.
        let joins_early = !owner.temper.handover || !self.protocol.is_ready(id);
        let joins_by_itself = (joins_early || kernel.takes_datagrams(group)) && socket.seat.is_none();
        let had_hole = kernel.groups.get(&group).is_some_and(|group| group.had_hole);
        let is_old_program = (self.protocol.steer_failed(group) || had_hole) && joins_by_itself;
        // A socket that takes datagrams can't be shut down: it keeps its slot while any process has it.
        let is_left = self.protocol.has_left(id) && !socket.is_owned_by(id);
        let is_stuck = kernel.takes_datagrams(group) && is_open && is_left;
        if self.disturbed.contains_key(&group) || is_old_program || has_several || is_stuck {
            return Stray::Excused;
        }
        // By processor one may have several places.
        let slots: BTreeSet<u16> = shares.iter().flat_map(|share| share.slots.iter().copied()).collect();
        // From what a failed launch leaves nobody accepts: what falls there is counted.
        let was_unproven = !self.protocol.has_served(owner.generation);
        let waits = is_open || !self.protocol.has_left(id) || was_unproven;
        if hashed && slots.len() <= 1 && waits { Stray::Served } else { Stray::Forbidden }
    }
}
