//! What `status` can say about decisions. Pids, executables and connections are the shell's to add.

use crate::event::Depth;
use crate::generation::GenerationState;
use crate::id::{Generation, GroupId, ListenerId, Seat, Time, WorkerId};
use crate::master::{Master, MasterState};
use crate::receipt::Receipt;
use crate::timers::Timer;
use crate::worker::{WorkerKind, WorkerState};
use alloc::vec::Vec;

/// The whole picture.
#[derive(Clone, Debug, PartialEq)]
pub struct StatusView {
    /// Where the master is.
    pub state: MasterState,
    /// Who gets new connections.
    pub active: Option<Generation>,
    /// Another number of workers than the config says, and that.
    pub scaled: Option<(u16, u16)>,
    /// An upgrade waits for its turn.
    pub upgrade_waits: bool,
    /// The canary step, or the bake, lasts until then at least.
    pub hold_until: Option<Time>,
    /// Oldest first.
    pub generations: Vec<GenerationView>,
}

/// One generation.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationView {
    /// Its number.
    pub generation: Generation,
    /// Where it is.
    pub state: GenerationState,
    /// Its part of new connections, 0 to 1000.
    pub share: u16,
    /// When the first of its workers that are told to end is killed.
    pub deadline: Option<Time>,
    /// By seat.
    pub workers: Vec<WorkerView>,
}

/// One worker, or an empty seat.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerView {
    /// Its place.
    pub seat: Seat,
    /// `None`: the seat waits for a respawn.
    pub worker: Option<WorkerId>,
    /// Where it is.
    pub state: Option<WorkerState>,
    /// Speaks the handover protocol or not, once known.
    pub kind: Option<WorkerKind>,
    /// How often the seat was filled again.
    pub restarts: u32,
    /// When it was spawned.
    pub spawned: Option<Time>,
    /// Its listeners.
    pub listeners: Vec<ListenerView>,
}

/// One listener.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ListenerView {
    /// Which.
    pub listener: ListenerId,
    /// In which group.
    pub group: GroupId,
    /// As of the last look.
    pub depth: Option<Depth>,
}

impl Master {
    /// A picture of everything, for people.
    #[must_use]
    pub fn status(&self) -> StatusView {
        let generations =
            self.generations.keys().map(|generation| self.generation_view(*generation)).collect();
        StatusView {
            state: self.state(),
            active: self.active,
            scaled: self.scaled(),
            upgrade_waits: self.wish.is_some(),
            hold_until: self.timers.at(Timer::Hold),
            generations,
        }
    }

    fn scaled(&self) -> Option<(u16, u16)> {
        let plan = self.active.and_then(|active| self.generations.get(&active)).map(|record| &record.plan)?;
        let workers = self.scaling.as_ref().map_or(plan.workers, |scaling| scaling.workers(plan.workers));
        (workers != plan.configured).then_some((workers, plan.configured))
    }

    /// Seats of a generation; 0 if there is no such generation.
    #[must_use]
    pub fn seats(&self, generation: Generation) -> u16 {
        self.generations.get(&generation).map_or(0, |record| record.plan.workers)
    }

    /// The receipt of the upgrade under way, as far as it is known.
    #[must_use]
    pub fn receipt_so_far(&self) -> Option<Receipt> {
        let receipt = &self.upgrade.as_ref()?.receipt;
        Some(Receipt { took: self.now.since(receipt.started), ..receipt.clone() })
    }

    fn generation_view(&self, generation: Generation) -> GenerationView {
        let record = self.generations.get(&generation);
        let share = self
            .groups
            .values()
            .find_map(|group| group.target.iter().find(|(wanted, _)| *wanted == generation));
        let seats = record.map(|record| record.seats.as_slice()).unwrap_or_default();
        let mut workers: Vec<WorkerView> = Vec::new();
        let launched = self.upgrade.as_ref().filter(|upgrade| upgrade.to == generation);
        let launched = launched.map_or(seats.len(), |upgrade| usize::from(upgrade.launched));
        for (seat, place) in (0..).zip(seats.iter().take(launched)).filter(|(_, place)| !place.is_given_up) {
            workers.push(self.worker_view(Seat(seat), place.worker, place.restarts));
        }
        for id in self.workers_of(generation) {
            if let Some(worker) =
                self.workers.get(&id).filter(|_| !seats.iter().any(|seat| seat.worker == Some(id)))
            {
                workers.push(self.worker_view(worker.seat, Some(id), 0));
            }
        }
        let state = record.map_or(GenerationState::Draining, |record| record.state);
        if matches!(state, GenerationState::Retiring | GenerationState::Draining) {
            workers.retain(|worker| worker.worker.is_some());
        }
        workers.sort_by_key(|worker| worker.seat);
        let deadlines =
            self.workers_of(generation).into_iter().filter_map(|id| self.timers.at(Timer::Kill(id)));
        // Where nothing is steered, all goes to the active one.
        let unsteered = if self.groups.is_empty() && self.active == Some(generation) { 1000 } else { 0 };
        let share = share.map_or(unsteered, |(_, share)| *share);
        GenerationView { generation, state, share, deadline: deadlines.min(), workers }
    }

    fn worker_view(&self, seat: Seat, id: Option<WorkerId>, restarts: u32) -> WorkerView {
        let worker = id.and_then(|id| self.workers.get(&id));
        let of_worker = self.listeners.iter().filter(|(_, listener)| Some(listener.worker) == id);
        WorkerView {
            seat,
            worker: id,
            state: worker.map(|worker| worker.state),
            kind: worker.and_then(|worker| worker.kind),
            restarts,
            spawned: worker.map(|worker| worker.spawned),
            listeners: of_worker
                .map(|(id, l)| ListenerView { listener: *id, group: l.group, depth: l.depth })
                .collect(),
        }
    }
}
