//! A generation on trial: as a canary with a share of the new connections, or with all of them while the old one stands
//! by. It is watched, and checked; the first sign of trouble takes it back.

use crate::command::{Command, Reason, Report};
use crate::event::CheckFailure;
use crate::generation::{GenerationState, UpgradeStep};
use crate::id::{Generation, GroupId};
use crate::master::Master;
use crate::timers::Timer;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// How long a check may take, unless the pause between two is longer.
const CHECK_LIMIT: Duration = Duration::from_secs(30);
/// How often the canary's accept queues are compared with its siblings'.
const COMPARE_PERIOD: Duration = Duration::from_millis(250);
/// So many times in a row they must have grown to more than the siblings' to be held against it: a burst ends sooner.
const STRIKES: u8 = 4;
/// A queue this short says nothing.
const QUEUE_MIN: u64 = 8;

/// A canary step or a bake.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Trial {
    /// It has lasted long enough.
    is_over: bool,
    /// A check has passed in it.
    is_checked: bool,
    /// The check that runs.
    check: Option<u32>,
    /// Groups of which the look to be compared is still to come.
    looking: BTreeSet<GroupId>,
    /// The canary's queues as of the last look, and how often in a row they were too long.
    queues: BTreeMap<GroupId, (u64, u8)>,
}

impl Master {
    /// The generation has its share: now it has to do well for so long.
    pub(crate) fn begin_trial(&mut self, step: UpgradeStep, hold: Duration) {
        self.enter_step(step);
        let Some(upgrade) = self.upgrade.as_mut() else { return };
        let (to, is_canary) = (upgrade.to, upgrade.step == UpgradeStep::Canary);
        // A check that runs since the step before counts for this one too.
        let check = upgrade.trial.take().and_then(|trial| trial.check);
        upgrade.trial = Some(Trial { check, ..Trial::default() });
        let interval = self.check_interval(to);
        self.timers.arm(Timer::Hold, self.now.after(hold));
        self.notify(crate::command::Notice::Extend(hold + interval.map_or(Duration::ZERO, check_limit)));
        // A bake begins with one, the steps of a canary go by the interval.
        let is_due = !is_canary || !self.timers.is_armed(Timer::Check);
        if interval.is_some() && check.is_none() && is_due {
            self.run_check();
        }
        if is_canary {
            self.timers.arm(Timer::Compare, self.now.after(COMPARE_PERIOD));
        } else {
            self.timers.disarm(Timer::Compare);
        }
        self.save();
    }

    fn check_interval(&self, generation: Generation) -> Option<Duration> {
        self.generations.get(&generation).and_then(|record| record.plan.check_interval)
    }

    fn trial(&mut self) -> Option<&mut Trial> {
        self.upgrade.as_mut()?.trial.as_mut()
    }

    pub(crate) fn on_hold_over(&mut self) {
        if let Some(trial) = self.trial() {
            trial.is_over = true;
        }
    }

    /// Long enough, and with a check passed if there is one to pass.
    pub(crate) fn has_done_well(&mut self) -> bool {
        let Some(upgrade) = self.upgrade.as_ref() else { return false };
        let must_check = self.check_interval(upgrade.to).is_some();
        let Some(trial) = upgrade.trial.as_ref().filter(|trial| trial.is_over) else { return false };
        if trial.check.is_some() {
            return false;
        }
        let is_done = trial.is_checked || !must_check;
        if !is_done {
            self.run_check();
        }
        is_done
    }

    pub(crate) fn run_check(&mut self) {
        self.check_last += 1;
        let run = self.check_last;
        let Some(upgrade) = self.upgrade.as_mut() else { return };
        let generation = upgrade.to;
        // Not while new connections are being moved: the next step begins with one.
        if !matches!(upgrade.step, UpgradeStep::Canary | UpgradeStep::Baking) {
            return;
        }
        let Some(trial) = upgrade.trial.as_mut().filter(|trial| trial.check.is_none()) else { return };
        trial.check = Some(run);
        let limit = self.check_interval(generation).map_or(CHECK_LIMIT, check_limit);
        self.timers.disarm(Timer::Check);
        self.timers.arm(Timer::CheckLimit, self.now.after(limit));
        self.push(Command::Check { run, generation });
    }

    pub(crate) fn on_checked(&mut self, run: u32, failure: Option<CheckFailure>) {
        let Some(upgrade) = self.upgrade.as_mut() else { return };
        let generation = upgrade.to;
        let Some(trial) = upgrade.trial.as_mut().filter(|trial| trial.check == Some(run)) else { return };
        trial.check = None;
        self.timers.disarm(Timer::CheckLimit);
        if let Some(failure) = failure {
            return self.fail_upgrade(Reason::CheckFailed(failure));
        }
        trial.is_checked = true;
        upgrade.receipt.checks += 1;
        if let Some(interval) = self.check_interval(generation) {
            self.timers.arm(Timer::Check, self.now.after(interval));
        }
    }

    pub(crate) fn on_check_late(&mut self) {
        self.fail_upgrade(Reason::CheckFailed(CheckFailure::Late));
    }

    /// A check whose end a killed master would have seen is run again.
    pub(crate) fn check_again(&mut self) {
        if self.trial().is_some_and(|trial| trial.check.take().is_some()) {
            self.run_check();
        }
    }

    /// It is over, one way or the other.
    pub(crate) fn end_trial(&mut self) {
        for timer in [Timer::Hold, Timer::Check, Timer::CheckLimit, Timer::Compare] {
            self.timers.disarm(timer);
        }
        let trial = self.upgrade.as_mut().and_then(|upgrade| upgrade.trial.take());
        if let Some(run) = trial.and_then(|trial| trial.check) {
            self.push(Command::EndCheck { run });
        }
    }

    // ---- a canary's queues ------------------------------------------------------------------------------------

    pub(crate) fn look_at_queues(&mut self) {
        let groups: Vec<GroupId> = self.groups.keys().copied().collect();
        let Some(trial) = self.trial() else { return };
        trial.looking = groups.iter().copied().collect();
        for group in groups {
            self.observe(group);
        }
        self.timers.arm(Timer::Compare, self.now.after(COMPARE_PERIOD));
    }

    /// Listeners of the group were just looked at.
    pub(crate) fn compare_queues(&mut self, group: GroupId) {
        let Some(upgrade) = self.upgrade.as_ref().filter(|upgrade| upgrade.step == UpgradeStep::Canary)
        else {
            return;
        };
        let (Some(from), to) = (upgrade.from, upgrade.to) else { return };
        let (new, old) = (self.queue_of(group, to), self.queue_of(group, from));
        let Some(trial) = self.trial() else { return };
        if !trial.looking.remove(&group) {
            return;
        }
        let (Some(new), Some(old)) = (new, old) else { return };
        let (before, strikes) = trial.queues.get(&group).copied().unwrap_or_default();
        let is_longer = new >= QUEUE_MIN && new > 2 * old && new >= before;
        let strikes = if is_longer { strikes + 1 } else { 0 };
        trial.queues.insert(group, (new, strikes));
        if strikes >= STRIKES {
            self.fail_upgrade(Reason::QueueGrows(group));
        }
    }

    /// What waits in a listener of the generation on average; `None` if it has none there.
    fn queue_of(&self, group: GroupId, generation: Generation) -> Option<u64> {
        let listeners = self.eligible(group, generation);
        // Bytes of datagrams say nothing of how many wait.
        if self.takes_datagrams(group) {
            return None;
        }
        let depths = listeners.iter().filter_map(|id| self.listeners.get(id)?.depth);
        let queued: u64 = depths.map(|depth| u64::from(depth.queued)).sum();
        queued.checked_div(u64::try_from(listeners.len()).ok()?)
    }

    // ---- bake -------------------------------------------------------------------------------------------------

    /// New connections go to the new generation; the old one stays as it is.
    pub(crate) fn begin_baking(&mut self, from: Generation, bake: Duration) {
        if let Some(record) = self.generations.get_mut(&from) {
            record.state = GenerationState::Standby;
        }
        self.begin_trial(UpgradeStep::Baking, bake);
    }

    /// The share that the next step of the canary gives, and how long it is held; `None` after the last.
    pub(crate) fn next_share(&self) -> Option<crate::plan::CanaryStep> {
        let upgrade = self.upgrade.as_ref()?;
        let canary = &self.generations.get(&upgrade.to)?.plan.canary;
        canary.get(usize::from(upgrade.shares)).copied().filter(|_| self.can_go_back())
    }

    /// The old generation can be steered back to: there is one, and each of its listeners is known.
    pub(crate) fn can_go_back(&self) -> bool {
        let has_old = self.upgrade.as_ref().is_some_and(|upgrade| upgrade.from.is_some());
        has_old && !self.groups.values().any(|group| group.has_unseen)
    }

    pub(crate) fn begin_share(&mut self) -> bool {
        let Some(step) = self.next_share() else { return false };
        let Some(upgrade) = self.upgrade.as_mut() else { return false };
        upgrade.shares += 1;
        let to = upgrade.to;
        self.report(Report::Shared(to, step.share));
        self.begin_trial(UpgradeStep::Canary, step.hold);
        true
    }
}

fn check_limit(interval: Duration) -> Duration {
    interval.max(CHECK_LIMIT)
}
