//! What must hold between any two events, as far as it can be seen from inside.

use crate::generation::{GenerationState, UpgradeStep};
use crate::master::Master;
use crate::timers::Timer;
use crate::worker::WorkerState;

impl Master {
    /// Panics if the memory contradicts itself. For tests and simulations.
    ///
    /// # Panics
    /// On the first contradiction.
    pub fn check(&self) {
        self.check_generations();
        self.check_workers();
        self.check_listeners();
        if self.is_ended {
            assert!(self.workers.is_empty() && self.listeners.is_empty(), "ended with something left");
        }
    }

    fn check_generations(&self) {
        let active: alloc::vec::Vec<_> = self
            .generations
            .iter()
            .filter(|(_, r)| r.state == GenerationState::Active)
            .map(|(g, _)| *g)
            .collect();
        assert!(active.len() <= 1, "more than one active generation");
        assert_eq!(active.first().copied(), self.active, "the active generation is another");
        let is_new = |state| matches!(state, GenerationState::Launching | GenerationState::Canary);
        let launching = self.generations.values().filter(|r| is_new(r.state)).count();
        let standing_by = self.generations.values().filter(|r| r.state == GenerationState::Standby).count();
        let is_baking = self.upgrade.as_ref().is_some_and(|upgrade| upgrade.step == UpgradeStep::Baking);
        assert_eq!(standing_by, usize::from(is_baking), "who stands by while nothing bakes, or the reverse");
        assert!(launching <= usize::from(self.upgrade.is_some()), "a generation launches without an upgrade");
        if let Some(upgrade) = &self.upgrade {
            assert!(upgrade.to.0 <= self.generation_last, "a generation from the future");
            if upgrade.step == UpgradeStep::Retiring && self.stopping.is_none() {
                assert_eq!(self.active, Some(upgrade.to), "retiring before the switch");
            }
        } else {
            let waits = self.timers.is_armed(Timer::Wish);
            assert_eq!(self.wish.is_some(), waits, "an upgrade waits for nothing");
        }
    }

    fn check_workers(&self) {
        for (id, worker) in &self.workers {
            let record = self.generations.get(&worker.generation);
            assert!(record.is_some(), "{id:?} of a forgotten generation");
            let starting = worker.state.is_starting();
            assert_eq!(
                starting,
                self.timers.is_armed(Timer::Ready(*id)),
                "{id:?} {:?}: ready timer",
                worker.state
            );
            let bounded = match worker.state {
                WorkerState::Emptying
                | WorkerState::Idling { .. }
                | WorkerState::Stopping { .. }
                | WorkerState::Draining => self.timers.is_armed(Timer::Kill(*id)),
                WorkerState::Remains { .. } => self.timers.is_armed(Timer::Remains(*id)),
                WorkerState::Spawning
                | WorkerState::Starting { .. }
                | WorkerState::Proving
                | WorkerState::Ready
                | WorkerState::Joining { .. }
                | WorkerState::Serving
                | WorkerState::Dying => true,
            };
            assert!(bounded, "{id:?} {:?}: nothing ends it", worker.state);
        }
    }

    fn check_listeners(&self) {
        for (id, listener) in &self.listeners {
            let lives = self.workers.contains_key(&listener.worker);
            let is_vacant = self.waits_for_next(listener);
            assert!(lives || is_vacant || (listener.leaving && listener.handle), "{id:?} belongs to nobody");
            assert!(listener.key.is_none() || listener.listens, "{id:?} chosen before it listens");
        }
        for (id, group) in &self.groups {
            assert!(group.slots.is_consistent(), "{id:?}: a listener in two slots");
            if let Some(listener) = group.taking {
                assert!(self.listeners.contains_key(&listener), "{id:?}: taking from a forgotten listener");
                assert!(self.timers.is_armed(Timer::Group(*id)), "{id:?}: taking for ever");
            }
        }
    }
}
