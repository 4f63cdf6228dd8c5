//! The master is killed, at any step. For a while nobody handles anything; then the next one takes its place, with what
//! the keeper has: a memory that may be somewhat older than what is, and handles.

use crate::kernel::{Holder, Stage};
use crate::protocol::Protocol;
use crate::twin::{read, written};
use crate::world::{Happening, MS, World};
use reuseportd_core::{
    Engine, Event, Exit, Generation, GroupId, ListenerId, Master, Plan, Verdict, WorkerId,
};
use std::collections::{BTreeMap, BTreeSet};

/// Where processes go that nobody knows any more.
pub(crate) const FORGOTTEN: u32 = 1_000_000;

/// What the keeper has.
pub(crate) struct Saved {
    master: Master,
    protocol: Protocol,
    plan: Option<Plan>,
    plans: BTreeMap<Generation, Plan>,
    /// Whether the master was told of its end, and has reaped it.
    workers: BTreeMap<WorkerId, (bool, bool)>,
    handles: BTreeSet<ListenerId>,
    known: BTreeSet<ListenerId>,
    proving: BTreeSet<WorkerId>,
}

impl Saved {
    /// What is in the journal, too. A socket's number is its cookie.
    pub(crate) fn slots(&self) -> Vec<(GroupId, Vec<u64>)> {
        self.master.slots()
    }
}

impl World {
    /// Written down between two turns.
    pub(crate) fn save(&mut self) {
        let held = |holder: Holder| {
            let sockets = self.kernel.sockets.iter();
            sockets.filter(move |(_, s)| s.holders.contains(&holder)).map(|(id, _)| *id)
        };
        let handles = held(Holder::Master).collect();
        let known = self.kernel.sockets.iter().filter(|(_, s)| s.known).map(|(id, _)| *id).collect();
        self.saved = Some(Saved {
            master: self.master.clone(),
            protocol: self.oracle.protocol.clone(),
            plan: self.plan.clone(),
            plans: self.plans.clone(),
            workers: self.workers.iter().map(|(id, w)| (*id, (w.told, w.reaped))).collect(),
            handles,
            known,
            proving: self.proving.clone(),
        });
    }

    /// The dice say that it is killed now.
    pub(crate) fn dies(&mut self) -> bool {
        let mortal = self.faults && self.mortality > 0 && !self.dead && self.saved.is_some();
        mortal && self.oracle.protocol.exit.is_none() && self.rng.below(10_000) < self.mortality
    }

    pub(crate) fn crash(&mut self) {
        self.trace(format_args!("-- the master is killed"));
        self.dead = true;
        self.twin = None;
        self.inbox.clear();
        self.proving.clear();
        self.upkeep.die();
        self.upkeep.tally.deaths += 1;
        // What nobody will read any more.
        self.agenda.retain(|_, happening| match happening {
            Happening::Deliver(event) => {
                !matches!(**event, Event::Preflighted { .. } | Event::Proved { .. } | Event::Checked { .. })
            }
            _ => true,
        });
        if self.rng.permille(200) {
            self.lose_keeper();
        }
        let none = BTreeSet::new();
        let handles = self.saved.as_ref().map_or(&none, |saved| &saved.handles);
        let held = self.kernel.sockets.iter().filter(|(_, s)| s.holders.contains(&Holder::Master));
        let unsaved: Vec<ListenerId> = held.map(|(id, _)| *id).filter(|id| !handles.contains(id)).collect();
        for listener in unsaved {
            self.oracle.unsaved.insert(listener);
            self.kernel.lose(listener, Holder::Master, &mut self.rng);
        }
        // Slots move at once; what was lost is judged by what the next master remembers.
        for group in std::mem::take(&mut self.kernel.left) {
            self.oracle.left(group);
        }
        self.listened = self.kernel.groups.values().flat_map(|group| group.slots.iter().copied()).collect();
        self.stalled = self.now + self.rng.below(2000 * MS);
        self.at(self.stalled, Happening::Restart);
    }

    /// The next master goes on with what the keeper has.
    pub(crate) fn restart(&mut self) {
        let Some(saved) = self.saved.take() else { return self.find_orphans() };
        self.trace(format_args!("-- the next master"));
        self.dead = false;
        self.kernel.is_adopted = true;
        let fresh: Vec<WorkerId> = self.workers.keys().copied().collect();
        for id in fresh.into_iter().filter(|id| id.0 < FORGOTTEN && !saved.workers.contains_key(id)) {
            self.forget_process(id);
        }
        self.slots_get_lost(&saved.known);
        self.settle_accounts();
        for (id, (told, reaped)) in &saved.workers {
            let (told, reaped) = (*told, *reaped);
            self.set(*id, |worker| (worker.told, worker.reaped, worker.adopted) = (told, reaped, true));
        }
        for (id, socket) in &mut self.kernel.sockets {
            socket.known = saved.known.contains(id) || socket.holders.contains(&Holder::Flight);
        }
        self.master = read(&written(&saved.master));
        self.plan.clone_from(&saved.plan);
        self.plans.clone_from(&saved.plans);
        self.oracle.adopted(saved.protocol.clone(), (0..self.groups).map(GroupId));
        let is_held = |id: &ListenerId| self.kernel.sockets[id].holders.contains(&Holder::Master);
        let lost: Vec<ListenerId> = saved.handles.iter().copied().filter(|id| !is_held(id)).collect();
        self.upkeep.tally.lost_handles += lost.len() as u64;
        let proving = saved.proving.clone();
        self.saved = Some(saved);
        self.tell(Event::Adopted { lost });
        self.begin();
        let ended = self.workers.iter().filter(|(_, worker)| !worker.runs && !worker.told);
        for id in ended.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.tell_end(id, Exit::Unknown);
        }
        for worker in proving {
            self.tell(Event::Proved { worker, verdict: Verdict::Waiting });
        }
    }

    /// The master sees that a worker's first process ended, once.
    pub(crate) fn tell_end(&mut self, id: WorkerId, how: Exit) {
        let (told, adopted, remains) =
            self.workers.get(&id).map_or((true, false, false), |w| (w.told, w.adopted, w.child));
        if self.dead || told {
            return;
        }
        self.set(id, |worker| worker.told = true);
        let how = if adopted && self.rng.permille(500) { Exit::Unknown } else { how };
        self.tell(Event::Exited { worker: id, how, remains });
    }

    /// What listened when the master died, and left before the next one could know of it, moved slots unseen.
    fn slots_get_lost(&mut self, known: &BTreeSet<ListenerId>) {
        for listener in std::mem::take(&mut self.listened) {
            let socket = &self.kernel.sockets[&listener];
            if self.engine == Engine::Cbpf && socket.stage == Stage::Gone && !known.contains(&listener) {
                self.oracle.unsure.insert(socket.group);
            }
        }
    }

    /// A process of which the keeper's memory knows nothing is killed, and its number given out again.
    pub(crate) fn forget_process(&mut self, id: WorkerId) {
        self.trace(format_args!("  {id:?} is unknown"));
        let forgotten = WorkerId(FORGOTTEN + u32::try_from(self.workers.len()).unwrap_or(0));
        self.set(id, |w| (w.runs, w.child, w.told, w.reaped) = (false, false, true, true));
        let agenda = std::mem::take(&mut self.agenda);
        for (at, happening) in agenda {
            if happening.worker() != Some(id) {
                self.agenda.insert(at, happening);
            } else if let Happening::Deliver(event) = happening
                && let Event::Ready { listeners, .. } = *event
            {
                for (_, listener) in listeners {
                    self.kernel.close(listener, Holder::Flight, &mut self.rng);
                }
            }
        }
        for holder in [Holder::Leader(id), Holder::Child(id), Holder::Taker(id)] {
            self.kernel.forget(holder, &mut self.rng);
        }
        self.settle_accounts();
        let Some(worker) = self.workers.remove(&id) else { return };
        self.workers.insert(forgotten, worker);
        for socket in self.kernel.sockets.values_mut() {
            let users = socket.users.iter_mut().chain(&mut socket.owner);
            users.filter(|user| **user == id).for_each(|user| *user = forgotten);
            // It may have shared the socket.
            let heir = socket.holders.iter().find_map(|holder| match holder {
                Holder::Leader(id) => Some(*id),
                _ => None,
            });
            if socket.owner == Some(forgotten)
                && let Some(heir) = heir
            {
                socket.owner = Some(heir);
            }
        }
    }
}

impl Happening {
    /// Whom it is about.
    fn worker(&self) -> Option<WorkerId> {
        match self {
            Happening::Accept(id)
            | Happening::Close(id, _)
            | Happening::Act(id, _)
            | Happening::Ended(id, _) => Some(*id),
            Happening::Deliver(event) => sender(event),
            Happening::Client
            | Happening::Handshake(_)
            | Happening::Operator
            | Happening::Stranger
            | Happening::Restart
            | Happening::KeeperEnds => None,
        }
    }
}

/// Who said it.
pub(crate) fn sender(event: &Event) -> Option<WorkerId> {
    match event {
        Event::Ready { worker, .. }
        | Event::Notified { worker }
        | Event::Alive { worker }
        | Event::Stuck { worker }
        | Event::Extended { worker, .. }
        | Event::Drained { worker }
        | Event::Proved { worker, .. } => Some(*worker),
        _ => None,
    }
}
