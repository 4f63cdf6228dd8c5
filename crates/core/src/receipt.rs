//! What an upgrade leaves behind: the proof of how it went. Unknown is `None`, never 0.

use crate::command::{Reason, Report};
use crate::event::{GroupView, Trigger};
use crate::generation::Upgrade;
use crate::id::{Generation, GroupId, ListenerId, RetirementId, Time};
use crate::master::Master;
use alloc::vec::Vec;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// How an upgrade ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// New connections go to the new generation.
    Completed,
    /// The old generation serves on.
    RolledBack,
    /// Nothing was begun.
    Refused,
}

/// The phases of an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// The new generation starts beside the old one.
    Launching,
    /// A share of the new connections goes to it.
    Canary,
    /// New connections are moved.
    Steering,
    /// The old generation stands by.
    Baking,
    /// The old generation's listeners are emptied and leave.
    Retiring,
    /// The new generation is taken back.
    RollingBack,
    /// The old generation's workers finish their open connections.
    Draining,
}

/// How long a phase took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// Which.
    pub phase: Phase,
    /// How long.
    pub took: Duration,
}

/// What happened in one group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptListener {
    /// Which group.
    pub group: GroupId,
    /// Connections waiting in old listeners just after the switch.
    pub queued_at_switch: Option<u32>,
    /// Half-open handshakes of the port just after the switch.
    pub half_open_at_switch: Option<u32>,
    /// Half-open handshakes still there when the settle timeout ended the wait for them.
    pub half_open_abandoned: u32,
    /// Connections the steering program migrated during the upgrade.
    pub migrated: Option<u64>,
    /// Failed migrations of the whole network namespace during the upgrade.
    pub migrate_failures: Option<u64>,
    /// Connections the kernel dropped at old listeners, as far as they were still there to be asked.
    pub listen_drops: Option<u32>,
    /// Connections accepted by a worker from another's listener.
    pub leftovers_taken: u32,
    /// Connections that had no one to go to.
    pub leftovers_lost: u32,
}

impl ReceiptListener {
    pub(crate) fn new(group: GroupId) -> ReceiptListener {
        ReceiptListener {
            group,
            queued_at_switch: None,
            half_open_at_switch: None,
            half_open_abandoned: 0,
            migrated: None,
            migrate_failures: None,
            listen_drops: None,
            leftovers_taken: 0,
            leftovers_lost: 0,
        }
    }
}

/// The receipt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Its number; a receipt is reported again under the same number when more is known.
    pub serial: u32,
    /// The generation that served before.
    pub from: Option<Generation>,
    /// The generation that was launched; `None` if none was.
    pub to: Option<Generation>,
    /// Who asked.
    pub trigger: Trigger,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not complete.
    pub reason: Option<Reason>,
    /// When it began.
    pub started: Time,
    /// From its beginning to the end of retiring, or of the rollback.
    pub took: Duration,
    /// In order. A draining phase is added when it ends.
    pub phases: Vec<PhaseTime>,
    /// Per group.
    pub listeners: Vec<ReceiptListener>,
    /// Old workers killed at their deadline.
    pub forced_kills: u32,
    /// Open connections of those; `None` if one could not be counted.
    pub connections_cut: Option<u32>,
    /// From the failure of a generation on trial until no new connection went to it any more.
    #[serde(default)]
    pub steer_back: Option<Duration>,
    /// Checks that passed.
    #[serde(default)]
    pub checks: u32,
    /// All old workers are gone: nothing will be added any more.
    pub is_final: bool,
}

/// Nothing yet, a number, or what can't be known any more.
fn add(sum: &mut Option<u32>, more: Option<u32>) {
    *sum = match (*sum, more) {
        (Some(sum), Some(more)) => Some(sum.saturating_add(more)),
        (None, more) => more,
        (Some(_), None) => None,
    };
}

impl Receipt {
    /// One that is entered several times, as by each batch, is one phase.
    pub(crate) fn add_phase(&mut self, phase: Phase, took: Duration) {
        match self.phases.iter_mut().find(|known| known.phase == phase) {
            Some(known) => known.took += took,
            None => self.phases.push(PhaseTime { phase, took }),
        }
    }
}

impl Master {
    /// The receipt of the upgrade that replaces this generation, or that this one comes with and fails.
    pub(crate) fn receipt_of(&mut self, generation: Generation) -> Option<&mut Receipt> {
        // What it loses after the switch because all ends is not the upgrade's doing.
        let ends = self.stopping.is_some();
        let is_its = |upgrade: &Upgrade| {
            let counts = !ends || upgrade.receipt.reason.is_some();
            upgrade.from == Some(generation) || (upgrade.to == generation && counts)
        };
        match &mut self.upgrade {
            Some(upgrade) if is_its(upgrade) => Some(&mut upgrade.receipt),
            Some(_) | None => self.generations.get_mut(&generation)?.receipt.as_mut(),
        }
    }

    pub(crate) fn receipt_listener(
        &mut self,
        generation: Generation,
        group: GroupId,
    ) -> Option<&mut ReceiptListener> {
        self.receipt_of(generation)?.listeners.iter_mut().find(|listener| listener.group == group)
    }

    /// The first look after these workers were steered away from.
    pub(crate) fn note_switch(&mut self, id: RetirementId) {
        let Some(retirement) = self.retirements.get(&id) else { return };
        let (generation, workers) = (retirement.generation, retirement.workers.clone());
        let groups: Vec<GroupId> = self.groups.keys().copied().collect();
        for group in groups {
            let of_old = self
                .listeners
                .values()
                .filter(|l| l.group == group && workers.contains(&l.worker) && !l.gone);
            let depths: Vec<_> = of_old.map(|listener| listener.depth).collect();
            // Of datagrams neither is there: what waits is known in bytes only.
            let is_counted = !self.takes_datagrams(group);
            let queued = depths.iter().map(|depth| depth.map(|depth| depth.queued)).sum::<Option<u32>>();
            let drops = depths.iter().map(|depth| depth.and_then(|depth| depth.drops)).sum::<Option<u32>>();
            let half_open =
                self.groups.get(&group).map(|group| u32::try_from(group.half_open.len()).unwrap_or(u32::MAX));
            if let Some(listener) = self.receipt_listener(generation, group) {
                // Of several batches each has its own switch.
                add(&mut listener.queued_at_switch, queued.filter(|_| is_counted));
                add(&mut listener.half_open_at_switch, half_open.filter(|_| is_counted));
                add(&mut listener.listen_drops, drops);
            }
        }
    }

    /// The first look at a group in an upgrade: from there its counters count.
    pub(crate) fn note_first_look(&mut self, id: GroupId, view: &GroupView) {
        let listeners = self.upgrade.iter_mut().flat_map(|upgrade| &mut upgrade.receipt.listeners);
        for listener in listeners.filter(|l| l.group == id && l.migrate_failures.is_none()) {
            listener.migrated = view.migrated;
            listener.migrate_failures = view.migrate_failures;
        }
    }

    /// What the counters have become since.
    pub(crate) fn note_counters(&mut self) {
        let Some(upgrade) = self.upgrade.as_mut() else { return };
        let since = |end: Option<u64>, start: Option<u64>| Some(end?.saturating_sub(start?));
        for listener in &mut upgrade.receipt.listeners {
            let Some(group) = self.groups.get(&listener.group) else { continue };
            // The program's own counter began with the group at 0; the namespace's is older than the master.
            listener.migrated = since(group.migrated, listener.migrated.or(Some(0)));
            listener.migrate_failures = since(group.migrate_failures, listener.migrate_failures);
        }
    }

    pub(crate) fn note_leftovers(&mut self, id: ListenerId, taken: u32, lost: u32) {
        let Some((group, generation)) = self.listeners.get(&id).map(|l| (l.group, l.generation)) else {
            return;
        };
        if let Some(listener) = self.receipt_listener(generation, group) {
            listener.leftovers_taken = listener.leftovers_taken.saturating_add(taken);
            listener.leftovers_lost = listener.leftovers_lost.saturating_add(lost);
        }
        if taken > 0 {
            self.report(Report::LeftoversTaken(id, taken));
        }
        if lost > 0 {
            self.report(Report::LeftoversLost(id, lost));
        }
    }
}
