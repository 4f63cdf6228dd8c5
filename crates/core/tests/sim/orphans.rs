//! Master and keeper are gone: the next master knows no more than which processes were left behind.

use crate::death::FORGOTTEN;
use crate::kernel::{Holder, Stage};
use crate::protocol::Protocol;
use crate::world::{Happening, World};
use reuseportd_core::{
    Engine, Event, Generation, GroupId, ListenerId, Master, Plan, Seat, Trigger, WorkerId,
};

impl World {
    /// The keeper was killed, too: nobody has a handle any more.
    pub(crate) fn lose_keeper(&mut self) {
        self.trace(format_args!("-- so is the keeper"));
        self.journal = self.saved.take().map(|saved| saved.slots()).unwrap_or_default();
        self.upkeep.forget_keeper();
        self.upkeep.tally.orphaned += 1;
        // With its last listener a group's program goes.
        self.oracle.refusing.extend((0..self.groups).map(GroupId));
        self.doom_all();
    }

    /// With its last process, what waits in a socket goes, too.
    fn doom_all(&mut self) {
        self.oracle.doomed.extend(self.kernel.sockets.keys());
    }

    /// The next master finds processes in the journal. What they were told, and said, is not known.
    pub(crate) fn find_orphans(&mut self) {
        self.trace(format_args!("-- the next master finds orphans"));
        self.dead = false;
        self.kernel.is_adopted = true;
        // Some were made while nobody was there.
        self.doom_all();
        self.drop_messages();
        let all: Vec<WorkerId> = self.workers.keys().copied().filter(|id| id.0 < FORGOTTEN).collect();
        for id in all {
            if self.workers[&id].runs {
                self.set(id, |w| (w.told, w.reaped, w.adopted, w.orphan) = (false, false, true, true));
            } else {
                self.forget_process(id);
            }
        }
        self.settle_accounts();
        let living: Vec<WorkerId> = self.workers.iter().filter(|(_, w)| w.runs).map(|(id, _)| *id).collect();
        for socket in self.kernel.sockets.values_mut() {
            socket.known = false;
        }
        self.kernel.groups.values_mut().for_each(|group| group.is_foreign = true);
        self.master = Master::new(self.engine);
        match living.iter().map(|id| self.workers[id].generation).max() {
            Some(generation) => self.take_in(generation, &living),
            None => {
                self.plan = None;
                self.oracle.orphaned(Protocol::new(self.engine), (0..self.groups).map(GroupId));
                self.begin();
                self.upgrade(Trigger::Start);
            }
        }
    }

    fn take_in(&mut self, generation: Generation, living: &[WorkerId]) {
        let workers = u16::try_from(living.len()).unwrap_or(u16::MAX);
        let groups: Vec<GroupId> = (0..self.groups).map(GroupId).collect();
        let datagram_groups = self.kernel.datagram_groups.iter().copied().collect();
        let seated = Plan { workers, groups, datagram_groups, watchdog: None, ..self.draw_plan() };
        let plan = Plan { seat_groups: Vec::new(), ..seated.clone() };
        let mut found = Vec::new();
        for (seat, id) in (0..).map(Seat).zip(living) {
            self.set(*id, |worker| (worker.generation, worker.seat) = (generation, seat));
            found.push((*id, self.handles_of(*id)));
        }
        self.upkeep.tally.orphans += found.len() as u64;
        let is_held =
            |group: &GroupId| found.iter().flat_map(|(_, handles)| handles).any(|(of, _)| of == group);
        let loose = (0..self.groups).map(GroupId).filter(|group| !is_held(group)).collect();
        self.plans.insert(generation, plan.clone());
        let protocol = Protocol::orphaned(self.engine, generation, plan.clone(), living, self.now);
        self.oracle.orphaned(protocol, (0..self.groups).map(GroupId));
        self.oracle.protocol.loose = loose;
        let slots = std::mem::take(&mut self.journal);
        // Of several that came since then, between which another one came and left, nobody can tell the order.
        for (id, known) in &slots {
            let is_new = |listener: &&ListenerId| !known.contains(&u64::from(listener.0));
            let came = self.kernel.group(*id).slots.iter().filter(is_new).count();
            if self.engine == Engine::Cbpf && came > 1 {
                self.oracle.unsure.insert(*id);
            }
        }
        self.tell(Event::Orphans { generation, plan: seated, workers: found, slots });
        self.begin();
        if !self.dead {
            self.upgrade(Trigger::Orphans);
        }
    }

    /// Of what it listens with, as far as that is permitted; a socket that several share is the first one's.
    fn handles_of(&mut self, id: WorkerId) -> Vec<(GroupId, ListenerId)> {
        let mut handles = Vec::new();
        let is_permitted = self.rng.permille(800);
        let is_its = |holders: &std::collections::BTreeSet<Holder>| {
            holders.contains(&Holder::Leader(id)) && !holders.contains(&Holder::Master)
        };
        for (listener, socket) in self.kernel.sockets.iter_mut().filter(|(_, s)| is_its(&s.holders)) {
            if socket.seat.take().is_some() {
                socket.owner = Some(id);
            }
            if socket.stage == Stage::Listening && is_permitted {
                socket.holders.insert(Holder::Master);
                socket.known = true;
                socket.owner = socket.users.first().map_or(socket.owner, |_| Some(id));
                self.oracle.doomed.remove(listener);
                handles.push((socket.group, *listener));
            }
        }
        handles
    }

    fn drop_messages(&mut self) {
        for happening in self.agenda.values() {
            if let Happening::Deliver(event) = happening
                && let Event::Ready { listeners, .. } = &**event
            {
                for (_, listener) in listeners {
                    self.kernel.close(*listener, Holder::Flight, &mut self.rng);
                }
            }
        }
        self.agenda.retain(|_, happening| !matches!(happening, Happening::Deliver(_)));
    }
}
