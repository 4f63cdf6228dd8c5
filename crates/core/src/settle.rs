//! `cbpf`: what is still half open when a listener leaves its group is reset. So a listener that was chosen leaves only
//! when the handshakes begun before it was steered away from have ended. Under `ebpf` the kernel moves them itself.

use crate::group::Settling;
use crate::id::{GroupId, ListenerId};
use crate::master::Master;
use crate::plan::Engine;
use crate::retire::SNAPSHOT_AFTER;
use crate::timers::Timer;
use crate::worker::WorkerState;
use core::time::Duration;

impl Master {
    /// These listeners are named by the program in force.
    pub(crate) fn note_chosen(&mut self, chosen: &[ListenerId]) {
        for listener in chosen {
            if let Some(listener) = self.listeners.get_mut(listener) {
                listener.settling = Settling::Chosen;
            }
        }
    }

    /// A connection may have been given to any listener of the group.
    pub(crate) fn note_exposed(&mut self, id: GroupId) {
        for listener in self.listeners.values_mut().filter(|l| l.group == id && l.listens) {
            listener.settling = Settling::Chosen;
        }
    }

    /// A master that was killed may have steered to whoever was ready, as far as is known.
    pub(crate) fn note_joined(&mut self) {
        for listener in self.listeners.values_mut().filter(|listener| listener.handle) {
            let state = self.workers.get(&listener.worker).map(|worker| worker.state);
            let may_be_chosen =
                [WorkerState::Ready, WorkerState::Joining { unproven: false }, WorkerState::Serving];
            if state.is_some_and(|state| may_be_chosen.contains(&state)) {
                listener.settling = Settling::Chosen;
            }
        }
    }

    /// Whether it can leave without a handshake being lost that could have been waited for.
    pub(crate) fn is_settled(&self, id: ListenerId) -> bool {
        let Some(listener) = self.listeners.get(&id) else { return true };
        let waits =
            listener.settling != Settling::Settled && listener.listens && listener.handle && !listener.gone;
        self.engine != Engine::Cbpf || self.keeps_receiving() || !waits
    }

    /// The kernel does what is wanted: from here on the wait for begun handshakes counts.
    pub(crate) fn begin_settling(&mut self, id: GroupId) {
        let Some(group) = self.groups.get(&id).filter(|_| self.engine == Engine::Cbpf) else { return };
        if !group.target.is_empty() && !group.has_unseen && self.choosable(id).is_empty() {
            return;
        }
        let look = self.now.after(SNAPSHOT_AFTER);
        let mut begins = false;
        let retires = |worker| self.workers.get(&worker).is_some_and(|worker| worker.state.is_retiring());
        for listener in self.listeners.values_mut().filter(|l| l.group == id && l.listens && l.handle) {
            let is_away = !group.wants(listener.generation) || retires(listener.worker);
            if listener.settling == Settling::Chosen && (listener.leaving || is_away) {
                let plan = self.generations.get(&listener.generation).map(|record| &record.plan);
                let until = self.now.after(plan.map_or(Duration::ZERO, |plan| plan.settle_timeout));
                listener.settling = Settling::Begun { look, until };
                begins = true;
            }
        }
        if begins {
            self.timers.arm_by(Timer::Settle(id), look);
        }
    }

    pub(crate) fn look_at_handshakes(&mut self, id: GroupId) {
        self.observe(id);
        self.timers.arm(Timer::Settle(id), self.now.after(SNAPSHOT_AFTER));
    }

    /// The group was looked at: the first look remembers what is half open, the later ones what of that still is.
    pub(crate) fn handshakes_observed(&mut self, id: GroupId) {
        let Some(group) = self.groups.get(&id) else { return };
        let mut waits = false;
        for listener in self.listeners.values_mut().filter(|l| l.group == id) {
            let (begun, until) = match &listener.settling {
                Settling::Begun { look, until } if self.now >= *look => (group.half_open.clone(), *until),
                Settling::Watched { begun, until } => {
                    let left = begun.iter().filter(|handshake| group.half_open.contains(handshake));
                    (left.copied().collect(), *until)
                }
                Settling::Begun { .. } => {
                    waits = true;
                    continue;
                }
                Settling::Chosen | Settling::Settled => continue,
            };
            let is_over = begun.is_empty() || self.now >= until;
            listener.settling = if is_over { Settling::Settled } else { Settling::Watched { begun, until } };
            waits |= !is_over;
        }
        if !waits {
            self.timers.disarm(Timer::Settle(id));
        }
    }
}
