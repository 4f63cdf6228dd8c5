//! The master: what it remembers, and what becomes of each event.

use crate::command::{Command, Notice, Report};
use crate::event::{Event, StopMode, Trigger};
use crate::generation::{GenerationRecord, GenerationState, Goal, Retirement, Upgrade, UpgradeStep, Wish};
use crate::group::{Group, Listener};
use crate::id::{Generation, GroupId, ListenerId, RetirementId, Ticket, Time, WorkerId};
use crate::keeper::KeeperWatch;
use crate::plan::Engine;
use crate::reexec::Reexec;
use crate::restart::Exits;
use crate::scale::Scaling;
use crate::timers::{Timer, Timers};
use crate::worker::Worker;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// Where the master is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MasterState {
    /// The first generation is launching.
    Starting,
    /// One generation serves and nothing is under way.
    Steady,
    /// A new generation starts.
    Launching,
    /// A share of the new connections goes to it.
    Canary,
    /// They all do, and the old generation stands by.
    Baking,
    /// The old generation's listeners leave.
    Retiring,
    /// The new generation is taken back.
    RollingBack,
    /// The service ends.
    Stopping,
    /// Respawning is suspended by the breaker.
    Degraded,
}

/// A stop that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stopping {
    pub(crate) mode: StopMode,
    pub(crate) waiting: Vec<Ticket>,
    /// Exit code at the end: 1 if the first generation never served.
    pub(crate) code: u8,
}

/// The whole memory of the master as far as decisions need it. Plain data: it can be written down and read again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Master {
    pub(crate) engine: Engine,
    pub(crate) now: Time,
    pub(crate) generations: BTreeMap<Generation, GenerationRecord>,
    pub(crate) workers: BTreeMap<WorkerId, Worker>,
    pub(crate) listeners: BTreeMap<ListenerId, Listener>,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    pub(crate) active: Option<Generation>,
    pub(crate) upgrade: Option<Upgrade>,
    pub(crate) wish: Option<Wish>,
    /// When the last upgrade began.
    #[serde(default)]
    pub(crate) upgrade_begun: Time,
    /// What served before the active generation.
    #[serde(default)]
    pub(crate) previous: Option<Generation>,
    /// A number of workers there are to be, until there are.
    #[serde(default)]
    pub(crate) scaling: Option<Scaling>,
    #[serde(default)]
    pub(crate) retirements: BTreeMap<RetirementId, Retirement>,
    pub(crate) stopping: Option<Stopping>,
    pub(crate) reexec: Option<Reexec>,
    pub(crate) keeper: KeeperWatch,
    /// What has been decided is not in the keeper's hands yet.
    pub(crate) saving: bool,
    /// How often the service manager wants a sign of life.
    pub(crate) beat: Option<Duration>,
    pub(crate) exits: Exits,
    pub(crate) timers: Timers,
    pub(crate) generation_last: u32,
    pub(crate) worker_last: u32,
    pub(crate) receipt_last: u32,
    #[serde(default)]
    pub(crate) retirement_last: u32,
    #[serde(default)]
    pub(crate) check_last: u32,
    pub(crate) is_ended: bool,
    #[serde(skip)]
    pub(crate) commands: VecDeque<Command>,
}

impl Master {
    /// A master without any generation. The first one comes with an [`Event::Upgrade`].
    #[must_use]
    pub fn new(engine: Engine) -> Master {
        Master {
            engine,
            now: Time(0),
            generations: BTreeMap::new(),
            workers: BTreeMap::new(),
            listeners: BTreeMap::new(),
            groups: BTreeMap::new(),
            active: None,
            upgrade: None,
            wish: None,
            upgrade_begun: Time(0),
            previous: None,
            scaling: None,
            retirements: BTreeMap::new(),
            stopping: None,
            reexec: None,
            keeper: KeeperWatch::default(),
            saving: false,
            beat: None,
            exits: Exits::default(),
            timers: Timers::default(),
            generation_last: 0,
            worker_last: 0,
            receipt_last: 0,
            retirement_last: 0,
            check_last: 0,
            is_ended: false,
            commands: VecDeque::new(),
        }
    }

    /// Takes in what happened. Every event is legal at any time; what makes no sense is reported and changes nothing.
    pub fn handle(&mut self, event: Event, now: Time) {
        // A clock that steps back would re-arm deadlines in the past.
        self.now = self.now.max(now);
        if self.is_ended {
            return;
        }
        match event {
            Event::Upgrade { plan, trigger, by } => self.on_upgrade(plan, trigger, by),
            Event::TakeBack { by } => self.on_take_back(by),
            Event::Hurry => self.on_hurry(),
            Event::Scale { to, by } => self.on_scale(to, by),
            Event::Replace { seat, by } => self.on_replace(seat, by),
            Event::Stop { mode, by } => self.on_stop(mode, by),
            Event::Reexec { by } => self.on_reexec(by),
            Event::Preflighted { readable } => self.on_preflighted(readable),
            Event::Reexecuted { done } => self.end_reexec(done),
            Event::Saved => self.on_saved(),
            Event::KeeperMissing => self.on_keeper_missing(),
            Event::Supervised { every } => self.on_supervised(every),
            Event::Adopted { lost } => self.on_adopted(&lost),
            Event::Orphans { generation, plan, workers, slots } => {
                self.on_orphans(generation, plan, &workers, &slots, Trigger::Orphans);
            }
            Event::Foreign { plan, server, listeners } => self.on_foreign(plan, server, listeners),
            Event::Spawned { worker } => self.on_spawned(worker),
            Event::Bound { group, worker, result } => self.on_bound(group, worker, result),
            Event::SpawnFailed { worker, errno } => self.on_spawn_failed(worker, errno),
            Event::Exited { worker, how, remains } => self.on_exited(worker, how, remains),
            Event::Remains { worker, left } => self.on_remains(worker, left),
            Event::Ready { worker, listeners } => self.on_ready(worker, &listeners),
            Event::Notified { worker } => self.on_notified(worker),
            Event::Alive { worker } => self.feed(worker),
            Event::Stuck { worker } => self.on_stuck(worker),
            Event::Extended { worker, by } => self.on_extended(worker, by),
            Event::Drained { worker } => self.on_drained(worker),
            Event::Taken { listener, count } => self.on_taken(listener, count),
            Event::Discarded { group, generation, count } => self.on_discarded(group, generation, count),
            Event::Found { worker, found } => self.on_found(worker, found),
            Event::Proved { worker, verdict } => self.on_proved(worker, verdict),
            Event::Checked { run, failure } => self.on_checked(run, failure),
            Event::Listening { listener, result } => self.on_listening(listener, result),
            Event::Steered { group, result } => self.on_steered(group, result),
            Event::Admitted { listener, result } => self.on_admitted(listener, result),
            Event::Anchored { listener, result } => self.on_anchored(listener, result),
            Event::Owned { listener, owned } => self.on_owned(listener, owned),
            Event::Observed { group, view } => self.on_observed(group, &view),
            Event::Counted { connections } => self.on_counted(&connections),
            Event::Deadline => self.on_deadline(),
        }
        self.advance();
    }

    /// What is to be done next. Drain it to `None` before the next [`handle`](Master::handle).
    pub fn next_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// When [`Event::Deadline`] is due; `None` if nothing is waited for.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.timers.next()
    }

    /// Does everything that has become possible, until nothing more is.
    fn advance(&mut self) {
        self.advance_launch();
        self.advance_scaling();
        self.advance_seats();
        self.pump_all();
        // A group that had to be steered first may turn out to have nobody to be steered to.
        self.advance_launch();
        self.advance_scaling();
        self.advance_upgrade();
        self.advance_retirements();
        self.advance_stop();
        self.keep_watching();
    }

    fn on_deadline(&mut self) {
        while let Some(timer) = self.timers.take_due(self.now) {
            match timer {
                Timer::Ready(worker) => self.on_ready_timeout(worker),
                Timer::Look(worker) => self.look(worker),
                Timer::Kill(worker) => self.on_kill_deadline(worker),
                Timer::Remains(worker) => self.look_at_remains(worker),
                Timer::Respawn(generation, seat) => self.respawn(generation, seat),
                Timer::Breaker => self.close_breaker(),
                Timer::Retire(retirement) => self.look_at_retirement(retirement),
                Timer::Group(group) => self.retry_group(group),
                Timer::Settle(group) => self.look_at_handshakes(group),
                Timer::Watch => self.watch(),
                Timer::Watchdog(worker) => self.on_silence(worker),
                Timer::Beat => self.beat(),
                Timer::Preflight => self.on_preflight_timeout(),
                Timer::Keeper => self.start_keeper(),
                Timer::Wish => self.begin_wish(),
                Timer::Hold => self.on_hold_over(),
                Timer::Check => self.run_check(),
                Timer::CheckLimit => self.on_check_late(),
                Timer::Compare => self.look_at_queues(),
            }
        }
    }

    /// Whether an upgrade is under way, or waits.
    #[must_use]
    pub fn has_upgrade(&self) -> bool {
        self.upgrade.is_some() || self.wish.is_some()
    }

    /// Where the master is, as `status` says it.
    #[must_use]
    pub fn state(&self) -> MasterState {
        if self.stopping.is_some() {
            return MasterState::Stopping;
        }
        match self.upgrade.as_ref().map(|upgrade| (&upgrade.step, upgrade.from)) {
            Some((UpgradeStep::RollingBack | UpgradeStep::SteeringBack | UpgradeStep::Restoring, _)) => {
                MasterState::RollingBack
            }
            Some((UpgradeStep::Retiring | UpgradeStep::Replacing, _)) => MasterState::Retiring,
            Some((UpgradeStep::Baking, _)) => MasterState::Baking,
            Some((UpgradeStep::Canary | UpgradeStep::Steering(Goal::Share, _), _)) => MasterState::Canary,
            Some((_, None)) => MasterState::Starting,
            Some((
                UpgradeStep::Queued
                | UpgradeStep::Launching
                | UpgradeStep::Joining
                | UpgradeStep::Steering(..),
                Some(_),
            )) => MasterState::Launching,
            None if self.timers.is_armed(Timer::Breaker) => MasterState::Degraded,
            None if self.active.is_none() => MasterState::Starting,
            None => MasterState::Steady,
        }
    }

    pub(crate) fn push(&mut self, command: Command) {
        self.commands.push_back(command);
    }

    pub(crate) fn report(&mut self, report: Report) {
        self.push(Command::Report(report));
    }

    pub(crate) fn notify(&mut self, notice: Notice) {
        self.push(Command::Notify(notice));
    }

    /// Workers of a generation, by seat and age.
    pub(crate) fn workers_of(&self, generation: Generation) -> Vec<WorkerId> {
        self.workers.iter().filter(|(_, worker)| worker.generation == generation).map(|(id, _)| *id).collect()
    }

    /// Listeners of a worker.
    pub(crate) fn listeners_of(&self, worker: WorkerId) -> Vec<ListenerId> {
        self.listeners.iter().filter(|(_, listener)| listener.worker == worker).map(|(id, _)| *id).collect()
    }

    /// Old generations, and batches of one, whose workers are still finishing their connections.
    pub(crate) fn draining(&self) -> usize {
        let of_generations =
            self.generations.values().filter(|record| record.state == GenerationState::Draining).count();
        of_generations + self.draining_batches().count()
    }
}
