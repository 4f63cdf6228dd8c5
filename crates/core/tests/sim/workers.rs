//! Workers of every temper: what they do by themselves, and how they answer what is asked of them.

use crate::kernel::{Holder, Stage};
use crate::temper::{StopHow, Temper, Wrong};
use crate::world::{Happening, MS, World};
use reuseportd_core::{
    Event, Exit, Found, Generation, GroupId, ListenerId, Problem, Readiness, Seat, WorkerId,
};
use std::collections::BTreeSet;
use std::time::Duration;

/// What a worker does of its own accord.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    Bind,
    Listen(ListenerId),
    Announce,
    Extend,
    /// A sign of life.
    Feed,
    /// It hangs from here on.
    Mute,
    Crash,
    CloseUnasked,
    Take(ListenerId),
    ChildEnds,
    Exit,
}

#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) generation: Generation,
    born: u64,
    pub(crate) seat: Seat,
    pub(crate) temper: Temper,
    readiness: Readiness,
    /// Where it binds for itself.
    groups: Vec<GroupId>,
    /// Its first process lives.
    pub(crate) runs: bool,
    /// Another process of its group lives.
    pub(crate) child: bool,
    pub(crate) reaped: bool,
    /// The master was told of its end.
    pub(crate) told: bool,
    /// It is no child of the present master.
    pub(crate) adopted: bool,
    /// Nobody reads what it says.
    pub(crate) orphan: bool,
    /// It hangs since then.
    pub(crate) mute: Option<u64>,
    pub(crate) serves: bool,
    /// It has said that it is ready.
    announced: bool,
    /// Told to stop.
    pub(crate) stops: bool,
    pub(crate) drained: bool,
    /// It closed its listeners although nobody asked.
    pub(crate) deserted: bool,
    pub(crate) sockets: Vec<ListenerId>,
    pub(crate) open: BTreeSet<u64>,
    accept_planned: bool,
    /// When its last message arrives: the channel keeps the order.
    said: u64,
}

impl World {
    pub(crate) fn start_worker(
        &mut self,
        id: WorkerId,
        generation: Generation,
        seat: Seat,
        mut temper: Temper,
    ) {
        let plan = &self.plans[&generation];
        let own = |group: &&GroupId| !plan.seat_groups.contains(group);
        let groups: Vec<GroupId> = plan.groups.iter().filter(own).copied().collect();
        if groups.is_empty() {
            temper.wrong = None;
        }
        let worker = Worker {
            generation,
            born: self.now,
            seat,
            temper,
            readiness: plan.readiness,
            groups,
            runs: true,
            child: false,
            reaped: false,
            told: false,
            adopted: false,
            orphan: false,
            mute: None,
            serves: false,
            announced: false,
            stops: false,
            drained: false,
            deserted: false,
            sockets: Vec::new(),
            open: BTreeSet::new(),
            accept_planned: false,
            said: 0,
        };
        self.workers.insert(id, worker);
        self.pass_seat(id);
        self.plan_signs(id);
        self.later(temper.start, Happening::Act(id, Act::Bind));
        for (when, act) in [(temper.crash, Act::Crash), (temper.closes, Act::CloseUnasked)] {
            if let Some(delay) = when {
                self.later(delay, Happening::Act(id, act));
            }
        }
    }

    pub(crate) fn act(&mut self, id: WorkerId, act: Act) {
        let Some(worker) = self.workers.get(&id) else { return };
        if !worker.runs && !matches!(act, Act::ChildEnds) {
            return;
        }
        match act {
            Act::Bind => self.bind_all(id),
            Act::Listen(listener) => {
                let _ = self.kernel.listen(listener);
            }
            Act::Announce => self.announce(id),
            Act::Feed => self.give_sign(id),
            Act::Mute if self.faults => self.hang(id),
            Act::Mute => {}
            Act::Extend => self.say(id, Event::Extended { worker: id, by: Duration::from_millis(500) }),
            Act::Crash if self.faults => {
                let how = [Exit::Code(1), Exit::Code(0), Exit::Signal(9)][self.rng.index(3)];
                self.end_leader(id, how);
            }
            Act::CloseUnasked if self.faults && !worker.stops => {
                self.desert(id);
            }
            Act::Crash | Act::CloseUnasked => {}
            Act::Take(listener) => self.take(id, listener),
            Act::ChildEnds => self.end_child(id),
            Act::Exit => self.end_leader(id, Exit::Code(0)),
        }
    }

    fn bind_all(&mut self, id: WorkerId) {
        let worker = &self.workers[&id];
        let (temper, mut groups) = (worker.temper, worker.groups.clone());
        match temper.wrong {
            Some(Wrong::Missing) => {
                groups.pop();
            }
            // Its sockets are where nobody looks.
            Some(Wrong::Address | Wrong::NoReuseport) if !temper.handover => groups.clear(),
            _ => {}
        }
        if temper.child.is_some() {
            self.set(id, |w| w.child = true);
        }
        self.inherit_seat(id);
        let copies = usize::from(temper.sockets);
        let sockets = groups.into_iter().flat_map(|g| std::iter::repeat_n(g, copies)).collect::<Vec<_>>();
        let mut last = 0;
        for group in sockets {
            let listener = self.bind_one(id, group);
            if !temper.handover {
                let delay = self.rng.below(20 * MS);
                last = delay.max(last);
                self.later(delay, Happening::Act(id, Act::Listen(listener)));
            }
        }
        // READY=1 a little before it listens happens too.
        let delay = if self.rng.permille(100) { 0 } else { last + self.rng.between(1, 10 * MS) };
        if self.rng.permille(50) {
            self.later(delay / 2, Happening::Act(id, Act::Extend));
        }
        for _ in 0..temper.announces {
            self.later(delay, Happening::Act(id, Act::Announce));
        }
    }

    fn bind_one(&mut self, id: WorkerId, group: GroupId) -> ListenerId {
        let listener = self.kernel.bind(group, Some(id), Holder::Leader(id));
        if self.workers[&id].child
            && let Some(socket) = self.kernel.sockets.get_mut(&listener)
        {
            socket.holders.insert(Holder::Child(id));
        }
        self.set(id, |w| w.sockets.push(listener));
        listener
    }

    fn announce(&mut self, id: WorkerId) {
        let worker = &self.workers[&id];
        if !worker.temper.handover {
            if worker.readiness == Readiness::Notify {
                self.say(id, Event::Notified { worker: id });
            }
            return;
        }
        // Said again, it brings new sockets: descriptors are never sent twice.
        let own = |s: &&ListenerId| self.kernel.sockets[s].seat.is_none();
        let sockets: Vec<ListenerId> = worker.sockets.iter().filter(own).copied().collect();
        let again = worker.announced;
        let groups = worker.groups.clone();
        self.set(id, |worker| worker.announced = true);
        if again {
            let fresh = groups.into_iter().map(|group| (group, self.bind_one(id, group))).collect();
            self.send_ready(id, fresh);
        } else {
            let all = sockets.iter().map(|s| (self.kernel.sockets[s].group, *s)).collect();
            self.send_ready(id, all);
        }
    }

    fn send_ready(&mut self, id: WorkerId, listeners: Vec<(GroupId, ListenerId)>) {
        // Nobody hears what an orphan says.
        if self.workers[&id].orphan {
            return;
        }
        for (_, listener) in &listeners {
            if let Some(socket) = self.kernel.sockets.get_mut(listener) {
                socket.holders.insert(Holder::Flight);
                socket.known = true;
            }
        }
        self.say(id, Event::Ready { worker: id, listeners });
    }

    /// A message to the master: it arrives a little later, and in order.
    pub(crate) fn say(&mut self, id: WorkerId, event: Event) {
        let at = (self.now + self.rng.below(3 * MS)).max(self.workers[&id].said);
        self.set(id, |w| w.said = at);
        self.at(at, Happening::Deliver(Box::new(event)));
    }

    /// Looking for an unmodified worker's listeners, as the shell does it.
    pub(crate) fn find(&mut self, id: WorkerId) -> Found {
        let Some(worker) = self.workers.get(&id) else { return Found::NotYet(Problem::Failed(3)) };
        if !worker.runs {
            return Found::NotYet(Problem::Failed(3));
        }
        match (worker.temper.wrong.filter(|_| !worker.temper.handover), worker.groups.first()) {
            (Some(Wrong::Address), Some(first)) => return Found::NotYet(Problem::WrongAddress(*first)),
            (Some(Wrong::NoReuseport), Some(first)) => return Found::Never(Problem::NoReuseport(*first)),
            _ => {}
        }
        let mut found = Vec::new();
        for group in &worker.groups {
            let here = worker.sockets.iter().filter(|s| {
                let socket = &self.kernel.sockets[s];
                socket.group == *group && socket.stage == Stage::Listening && socket.is_owned()
            });
            let before = found.len();
            found.extend(here.map(|s| (*group, *s)));
            if found.len() == before {
                return Found::NotYet(Problem::NotListening(*group));
            }
        }
        for (_, listener) in &found {
            if let Some(socket) = self.kernel.sockets.get_mut(listener) {
                socket.holders.insert(Holder::Master);
                socket.known = true;
            }
        }
        Found::All(found)
    }

    /// `serve`, or the moment an unmodified worker listens: from here on it accepts.
    pub(crate) fn serve(&mut self, id: WorkerId) {
        self.set(id, |w| w.serves = true);
        self.plan_accept(id);
    }

    /// Whoever accepts where something new waits wakes up.
    pub(crate) fn wake(&mut self) {
        for listener in std::mem::take(&mut self.kernel.woken) {
            let socket = &self.kernel.sockets[&listener];
            let workers: Vec<WorkerId> = socket.workers().collect();
            if socket.owner.is_some() || socket.seat.is_some() {
                workers.into_iter().for_each(|worker| self.plan_accept(worker));
            } else if let Some(connection) = self.kernel.accept(listener) {
                // Strangers serve too, in their way.
                self.oracle.accepted(connection);
                self.oracle.read(connection);
            }
        }
    }

    pub(crate) fn plan_accept(&mut self, id: WorkerId) {
        let delay = self.rng.below(self.workers[&id].temper.accept + 1);
        let worker = &self.workers[&id];
        let awake = worker.temper.sleeps.filter(|_| self.faults).map_or(0, |sleeps| worker.born + sleeps);
        let delay = delay.max(awake.saturating_sub(self.now));
        if worker.runs
            && worker.mute.is_none()
            && !worker.accept_planned
            && (worker.serves || !worker.temper.handover)
        {
            self.set(id, |w| w.accept_planned = true);
            self.later(delay, Happening::Accept(id));
        }
    }

    /// One turn of a worker's accept loop.
    pub(crate) fn accept(&mut self, id: WorkerId) {
        self.set(id, |w| w.accept_planned = false);
        let Some(worker) = self.workers.get(&id) else { return };
        if !worker.runs || worker.mute.is_some() {
            return;
        }
        let mine: Vec<ListenerId> = worker
            .sockets
            .iter()
            .copied()
            .filter(|s| self.kernel.sockets[s].holders.contains(&Holder::Leader(id)))
            .collect();
        for listener in mine {
            if let Some(connection) = self.kernel.accept(listener) {
                let socket = &self.kernel.sockets[&listener];
                if self.kernel.takes_datagrams(socket.group) {
                    self.oracle.read(connection);
                    return self.plan_accept(id);
                }
                if socket.seat.is_some() {
                    self.oracle.accepted_at_seat(connection, self.workers[&id].born);
                }
                self.serve_connection(id, connection);
                self.plan_accept(id);
                return;
            }
        }
        if worker.stops {
            self.finish_stop(id);
        }
    }

    fn serve_connection(&mut self, id: WorkerId, connection: u64) {
        self.oracle.accepted(connection);
        self.set(id, |w| {
            w.open.insert(connection);
        });
        let long = self.rng.permille(20);
        let lasts = self.rng.below(if long { 6000 * MS } else { 60 * MS });
        self.later(lasts, Happening::Close(id, connection));
    }

    pub(crate) fn close_connection(&mut self, id: WorkerId, connection: u64) {
        self.set(id, |w| {
            w.open.remove(&connection);
        });
        self.leave_if_done(id);
    }

    fn take(&mut self, id: WorkerId, listener: ListenerId) {
        let mut count = 0;
        while let Some(connection) = self.kernel.accept(listener) {
            self.serve_connection(id, connection);
            count += 1;
        }
        self.kernel.close(listener, Holder::Taker(id), &mut self.rng);
        self.say(id, Event::Taken { listener, count });
    }

    /// `stop` on the channel, or the stop signal.
    pub(crate) fn told_to_stop(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if !worker.runs || worker.stops {
            return;
        }
        worker.stops = worker.temper.stop != StopHow::Ignores;
        let handover = worker.temper.handover;
        match worker.temper.stop {
            StopHow::Ignores => {}
            StopHow::AtOnce => self.end_leader(id, Exit::Signal(15)),
            StopHow::Orderly | StopHow::Hangs if handover => {
                self.later(0, Happening::Accept(id));
            }
            StopHow::Orderly | StopHow::Hangs | StopHow::Hasty => self.finish_stop(id),
        }
    }

    /// Nothing waits any more (or it does not care): the listeners are closed.
    fn finish_stop(&mut self, id: WorkerId) {
        let worker = &self.workers[&id];
        if worker.drained {
            return;
        }
        let handover = worker.temper.handover;
        self.set(id, |w| w.drained = true);
        self.close_listeners(id);
        if handover {
            self.say(id, Event::Drained { worker: id });
        }
        self.leave_if_done(id);
    }

    fn leave_if_done(&mut self, id: WorkerId) {
        let worker = &self.workers[&id];
        if worker.runs && worker.drained && worker.open.is_empty() && worker.temper.stop != StopHow::Hangs {
            let delay = self.rng.below(5 * MS);
            self.later(delay, Happening::Act(id, Act::Exit));
        }
    }

    fn close_listeners(&mut self, id: WorkerId) {
        for listener in self.workers[&id].sockets.clone() {
            self.close_listener(id, listener);
        }
    }

    pub(crate) fn close_listener(&mut self, id: WorkerId, listener: ListenerId) {
        self.kernel.close(listener, Holder::Leader(id), &mut self.rng);
        // A child that inherited it may keep it.
        if self.workers[&id].temper.child == Some(false) {
            self.kernel.close(listener, Holder::Child(id), &mut self.rng);
        }
    }

    pub(crate) fn end_leader(&mut self, id: WorkerId, how: Exit) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if !worker.runs {
            return;
        }
        worker.runs = false;
        worker.open.clear();
        self.kernel.forget(Holder::Leader(id), &mut self.rng);
        self.kernel.forget(Holder::Taker(id), &mut self.rng);
        let delay = self.rng.below(3 * MS);
        self.later(delay, Happening::Ended(id, how));
    }

    pub(crate) fn end_child(&mut self, id: WorkerId) {
        self.set(id, |w| w.child = false);
        self.kernel.forget(Holder::Child(id), &mut self.rng);
    }

    /// TERM to the process group.
    pub(crate) fn terminate_group(&mut self, id: WorkerId) {
        self.told_to_stop(id);
        let worker = &self.workers[&id];
        if worker.child && worker.temper.child == Some(false) {
            let delay = self.rng.below(30 * MS);
            self.later(delay, Happening::Act(id, Act::ChildEnds));
        }
    }

    /// KILL to the process group.
    pub(crate) fn kill_group(&mut self, id: WorkerId) {
        self.end_child(id);
        self.end_leader(id, Exit::Signal(9));
    }

    pub(crate) fn set(&mut self, id: WorkerId, change: impl FnOnce(&mut Worker)) {
        if let Some(worker) = self.workers.get_mut(&id) {
            change(worker);
        }
    }

    /// `take` arrives at a worker.
    pub(crate) fn told_to_take(&mut self, id: WorkerId, listener: ListenerId) {
        let worker = &self.workers[&id];
        if !worker.runs {
            return;
        }
        if let Some(socket) = self.kernel.sockets.get_mut(&listener) {
            socket.holders.insert(Holder::Taker(id));
        }
        if worker.temper.takes {
            let delay = self.rng.below(10 * MS);
            self.later(delay, Happening::Act(id, Act::Take(listener)));
        }
    }
}
