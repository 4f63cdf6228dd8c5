//! A server that no master has started serves as the generation before the first, number 0. It is never started again.
//! As long as the first can be taken back nothing is done to it, and then it is left as it was found.

use crate::command::Command;
use crate::event::{StopMode, Trigger};
use crate::generation::{GenerationState, Goal, Upgrade, UpgradeStep};
use crate::id::{Generation, GroupId, ListenerId, WorkerId};
use crate::master::{Master, Stopping};
use crate::plan::Plan;
use alloc::vec::Vec;

/// Its number.
const FOREIGN: Generation = Generation(0);

impl Master {
    pub(crate) fn on_foreign(&mut self, plan: Plan, server: WorkerId, listeners: Vec<(GroupId, ListenerId)>) {
        // It knows of no watchdog.
        let plan = Plan { watchdog: None, ..plan };
        self.on_orphans(FOREIGN, plan, &[(server, listeners)], &[], Trigger::Takeover);
    }

    /// Whether the generation is such a server.
    pub(crate) fn is_foreign(&self, generation: Generation) -> bool {
        generation == FOREIGN
    }

    /// A foreign server may still have to serve on: it must not be touched.
    pub(crate) fn is_taking_over(&self) -> bool {
        let can_return = |upgrade: &Upgrade| {
            upgrade.receipt.trigger == Trigger::Takeover && upgrade.step != UpgradeStep::Retiring
        };
        self.generations.contains_key(&FOREIGN) && self.upgrade.as_ref().is_some_and(can_return)
    }

    /// It must not be touched, and this is it.
    pub(crate) fn is_untouchable(&self, generation: Generation) -> bool {
        self.is_foreign(generation) && self.is_taking_over()
    }

    /// It has ended by itself. Its listeners are kept as long as nobody else serves; there is no way back to it.
    pub(crate) fn foreign_ended(&mut self) {
        let Some(upgrade) = self.upgrade.as_mut().filter(|upgrade| upgrade.from == Some(FOREIGN)) else {
            return;
        };
        if upgrade.step == UpgradeStep::Retiring {
            return;
        }
        upgrade.from = None;
        let (to, step) = (upgrade.to, upgrade.step.clone());
        if self.active == Some(FOREIGN) {
            self.active = None;
        }
        if let Some(record) = self.generations.get_mut(&FOREIGN) {
            record.state = GenerationState::Retiring;
        }
        // Other processes of it may hold them still, and would be given nothing there.
        self.listeners.values_mut().filter(|l| l.generation == FOREIGN).for_each(|l| l.by_shutdown = true);
        match step {
            UpgradeStep::Canary | UpgradeStep::Steering(Goal::Share, _) => {
                self.end_trial();
                self.begin_steering(to);
            }
            UpgradeStep::Baking => drop(self.leave(None, to)),
            UpgradeStep::Queued
            | UpgradeStep::Launching
            | UpgradeStep::Joining
            | UpgradeStep::Steering(..)
            | UpgradeStep::Replacing
            | UpgradeStep::Retiring
            | UpgradeStep::Restoring
            | UpgradeStep::SteeringBack
            | UpgradeStep::RollingBack => {}
        }
    }

    /// The first generation has been taken back: the server serves on without a master, and the master ends when the
    /// last of its own workers has. `false` if there is no such server.
    pub(crate) fn let_foreign_go(&mut self) -> bool {
        if self.generations.remove(&FOREIGN).is_none() {
            return false;
        }
        let of_it = self.listeners.iter().filter(|(_, listener)| listener.generation == FOREIGN);
        let listeners: Vec<ListenerId> = of_it.map(|(id, _)| *id).collect();
        self.push(Command::LetGo { listeners: listeners.clone() });
        for id in listeners {
            if let Some(listener) = self.listeners.get_mut(&id) {
                listener.by_shutdown = false;
            }
            self.forget_listener(id);
        }
        for worker in self.workers_of(FOREIGN) {
            self.workers.remove(&worker);
            self.push(Command::Reap { worker });
        }
        for group in self.groups.values_mut() {
            group.target.clear();
            group.keys.take_back(FOREIGN);
        }
        self.active = None;
        self.drop_wishes();
        let stopping =
            self.stopping.get_or_insert(Stopping { mode: StopMode::Graceful, waiting: Vec::new(), code: 1 });
        stopping.code = 1;
        true
    }
}
