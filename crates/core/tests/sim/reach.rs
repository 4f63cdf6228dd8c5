//! The part of the judge that watches who is listened on too early, and who is never reached.

use crate::kernel::{Kernel, Program, Socket, Stage};
use crate::oracle::Oracle;
use crate::protocol::Protocol;
use crate::workers::Worker;
use reuseportd_core::{Engine, ListenerId, Phase, Readiness, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

type Workers = BTreeMap<WorkerId, Worker>;

impl Protocol {
    /// Nothing of a launch is listened on before all of it is ready; who is to answer requests first has to listen.
    pub(crate) fn judge_listening(&self, listener: ListenerId, kernel: &Kernel) {
        let owner = kernel.sockets[&listener].owner.and_then(|owner| self.lives.get(&owner));
        let launched =
            self.phases.way.as_ref().filter(|way| way.phase == Phase::Launching && !way.is_failing);
        let (Some(owner), Some(way)) = (owner, launched) else { return };
        if owner.generation != way.to || self.plans[&way.to].readiness == Readiness::Http {
            return;
        }
        let is_awaited = |(_, life): &(&WorkerId, &crate::life::Life)| {
            life.generation == way.to && life.exited.is_none() && life.answered == Some(true) && !life.ready
        };
        let awaited = self.lives.iter().find(is_awaited);
        assert!(awaited.is_none(), "{listener:?} is listened on before this one is ready: {awaited:?}");
    }
}

impl Oracle {
    /// A worker that serves, and is never chosen although it listens; at rest there is none.
    pub(crate) fn unreached(&self, kernel: &Kernel, workers: &Workers) -> Option<WorkerId> {
        let active = self.protocol.active();
        let serves = |id: &WorkerId| {
            let worker = &workers[id];
            let is_its = worker.runs && !worker.deserted && Some(worker.generation) == active;
            is_its && worker.temper.announces < 2 && self.protocol.is_serving(*id)
        };
        for (group, of_group) in &kernel.groups {
            let is_clear = !self.disturbed.contains_key(group) && !self.unsure.contains(group);
            let is_steered = self.engine != Engine::None && of_group.program != Program::Hash;
            if !is_clear || !is_steered || self.protocol.is_unclear(*group) || !self.protocol.promises(*group)
            {
                continue;
            }
            let listens =
                |socket: &&Socket| socket.group == *group && socket.known && socket.stage == Stage::Listening;
            let named = kernel.named(*group);
            let reached: BTreeSet<WorkerId> =
                named.iter().flat_map(|listener| kernel.sockets[listener].workers()).collect();
            let there = kernel.sockets.values().filter(listens).filter_map(|socket| socket.owner);
            let unreached = there.filter(serves).find(|worker| !reached.contains(worker));
            if unreached.is_some() {
                return unreached;
            }
        }
        None
    }
}
