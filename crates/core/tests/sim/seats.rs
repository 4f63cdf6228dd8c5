//! Sockets of seats in the simulated world: made by the master, passed to one worker after the other.

use crate::kernel::{Holder, Kernel, Socket, Stage};
use crate::world::{Happening, MS, World};
use reuseportd_core::{Event, GroupId, ListenerId, Seat, Verdict, WorkerId};

impl Kernel {
    /// The latest socket of a seat that the master holds.
    pub(crate) fn of_seat(&self, group: GroupId, seat: Seat) -> Option<ListenerId> {
        let is_it = |socket: &Socket| {
            socket.group == group && socket.seat == Some(seat) && socket.holders.contains(&Holder::Master)
        };
        self.sockets.iter().rev().find(|(_, socket)| is_it(socket)).map(|(id, _)| *id)
    }

    /// Nothing was made for this seat after this.
    pub(crate) fn is_latest(&self, listener: ListenerId, seat: Seat) -> bool {
        let group = self.sockets[&listener].group;
        let mut later = self.sockets.range(listener..).skip(1);
        !later.any(|(_, socket)| socket.group == group && socket.seat == Some(seat))
    }
}

impl World {
    /// Makes the socket of a seat, listening.
    pub(crate) fn bind_seat(&mut self, group: GroupId, seat: Seat) -> Result<ListenerId, i32> {
        self.fault(self.bad / 20 + 5)?;
        let listener = self.kernel.bind(group, None, Holder::Master);
        if let Some(socket) = self.kernel.sockets.get_mut(&listener) {
            socket.seat = Some(seat);
            socket.known = true;
        }
        self.kernel.listen(listener)?;
        Ok(listener)
    }

    /// A process is born with the sockets of its seat.
    pub(crate) fn pass_seat(&mut self, id: WorkerId) {
        for listener in self.seat_of(id) {
            if let Some(socket) = self.kernel.sockets.get_mut(&listener) {
                socket.holders.insert(Holder::Leader(id));
                socket.users.push(id);
            }
        }
    }

    fn seat_of(&self, id: WorkerId) -> Vec<ListenerId> {
        let worker = &self.workers[&id];
        let groups = &self.plans[&worker.generation].seat_groups;
        groups.iter().filter_map(|group| self.kernel.of_seat(*group, worker.seat)).collect()
    }

    /// It finds them, and what waits there.
    pub(crate) fn inherit_seat(&mut self, id: WorkerId) {
        // Where nobody knows any more whose seat it is, too.
        let held = |socket: &Socket| socket.users.contains(&id) && socket.is_owned_by(id);
        let sockets = self.kernel.sockets.iter_mut().filter(|(_, socket)| held(socket));
        let Some(worker) = self.workers.get_mut(&id) else { return };
        for (listener, socket) in sockets {
            worker.sockets.push(*listener);
            if worker.child {
                socket.holders.insert(Holder::Child(id));
            }
        }
        self.plan_accept(id);
    }

    /// It closes what it bound itself, although nobody asked; if all did, nothing could be promised.
    pub(crate) fn desert(&mut self, id: WorkerId) {
        let own = |listener: &ListenerId| self.kernel.sockets[listener].seat.is_none();
        let sockets: Vec<ListenerId> = self.workers[&id].sockets.iter().copied().filter(own).collect();
        let generation = self.workers[&id].generation;
        let is_other = |listener: &ListenerId| {
            let owner = self.kernel.sockets[listener].owner.filter(|owner| *owner != id);
            let owner = owner.map(|owner| &self.workers[&owner]);
            owner.is_some_and(|other| other.generation == generation && other.runs && !other.deserted)
        };
        let is_last = |own: &ListenerId| {
            let group = self.kernel.sockets[own].group;
            !self.kernel.groups.get(&group).is_some_and(|group| group.slots.iter().any(is_other))
        };
        if sockets.iter().any(is_last) {
            return;
        }
        for listener in &sockets {
            self.close_listener(id, *listener);
        }
        self.set(id, |worker| worker.deserted = !sockets.is_empty());
    }

    /// Connects to it, and sees at once or somewhat later what becomes of it.
    pub(crate) fn try_out(&mut self, worker: WorkerId) {
        let event = Event::Proved { worker, verdict: self.prove(worker) };
        if self.rng.permille(300) {
            self.proving.insert(worker);
            let takes = self.rng.below(20 * MS);
            self.later(takes, Happening::Deliver(Box::new(event)));
        } else {
            self.answer(event);
        }
    }

    /// Programs that load for a while have their listeners long before they accept, or answer.
    fn prove(&mut self, id: WorkerId) -> Verdict {
        let worker = &self.workers[&id];
        let (runs, healthy) = (worker.runs, worker.temper.healthy);
        let serves = worker.serves || !worker.temper.handover;
        let asks = self.plans[&worker.generation].readiness == reuseportd_core::Readiness::Http;
        match self.rng.below(10) {
            _ if !runs || !serves => Verdict::Waiting,
            _ if asks && !healthy => Verdict::Failed,
            0 | 1 => Verdict::Waiting,
            2 if asks => Verdict::Failed,
            _ => Verdict::Passed,
        }
    }

    /// The seat has exactly one socket in each of its groups, and nobody else has one.
    pub(crate) fn seats_are_odd(&self) -> Option<String> {
        let active = self.oracle.protocol.active()?;
        let plan = &self.plans[&active];
        let held = |socket: &&Socket| socket.seat.is_some() && socket.holders.contains(&Holder::Master);
        let count = self.kernel.sockets.values().filter(held).count();
        for group in &plan.seat_groups {
            for seat in (0..plan.workers).map(Seat) {
                let listens = |id: &ListenerId| self.kernel.sockets[id].stage == Stage::Listening;
                if self.kernel.of_seat(*group, seat).filter(listens).is_none() {
                    return Some(format!("{seat:?} has no socket in {group:?}"));
                }
            }
        }
        let wanted = plan.seat_groups.len() * usize::from(plan.workers);
        (count != wanted).then(|| format!("{count} sockets of seats instead of {wanted}"))
    }
}
