//! What the master does for itself: re-exec, its keeper, signs of life; and what the judge says about it.

use crate::workers::Act;
use crate::world::{Happening, MS, World};
use reuseportd_core::{Command, Event, Reason, Report, Ticket, WorkerId};
use std::collections::BTreeSet;

/// A keeper that lived so long was a good one.
const LASTING: u64 = 10_000 * MS;

/// The shell's side of it, and the judge's.
#[derive(Default)]
pub(crate) struct Upkeep {
    /// Clients that wait for a re-exec.
    tickets: BTreeSet<Ticket>,
    /// The new program reads the state since then.
    preflight: Option<u64>,
    /// The new program has proven itself, and is to be executed when nothing is left to be done.
    is_proven: bool,
    executes: bool,
    must_save: bool,
    /// How the last re-exec ended.
    done: Option<bool>,
    /// It is there.
    pub(crate) keeper: bool,
    /// Keepers in a row that did not last, and when the last one was started.
    streak: u32,
    started: Option<u64>,
    /// The next one may not be started before; `None`: nobody asked for one.
    not_before: Option<u64>,
    pub(crate) tally: Tally,
}

/// How often the interesting things happened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) images: u64,
    pub(crate) reexecs: u64,
    pub(crate) refused: u64,
    pub(crate) keepers: u64,
    pub(crate) stuck: u64,
    pub(crate) deaths: u64,
    pub(crate) lost_handles: u64,
    pub(crate) orphaned: u64,
    pub(crate) orphans: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Tally) {
        self.images += other.images;
        self.reexecs += other.reexecs;
        self.refused += other.refused;
        self.keepers += other.keepers;
        self.stuck += other.stuck;
        self.deaths += other.deaths;
        self.lost_handles += other.lost_handles;
        self.orphaned += other.orphaned;
        self.orphans += other.orphans;
    }

    /// Whether everything happened.
    pub(crate) fn is_complete(&self) -> bool {
        let Tally { images, reexecs, refused, keepers, stuck, deaths, lost_handles, orphaned, orphans } =
            *self;
        [images, reexecs, refused, keepers, stuck, deaths, lost_handles, orphaned, orphans]
            .iter()
            .all(|n| *n > 0)
    }
}

impl Upkeep {
    pub(crate) fn is_quiet(&self) -> bool {
        self.tickets.is_empty() && self.preflight.is_none() && self.keeper
    }

    /// It was killed together with the master.
    pub(crate) fn forget_keeper(&mut self) {
        (self.keeper, self.streak, self.started, self.not_before) = (false, 0, None, None);
    }

    /// The master is gone, and with it whoever waited for it.
    pub(crate) fn die(&mut self) {
        self.tickets.clear();
        self.preflight = None;
        self.is_proven = false;
        self.executes = false;
        self.must_save = false;
    }

    pub(crate) fn event(&mut self, event: &Event, now: u64) {
        match event {
            Event::Reexec { by } => self.tickets.extend(by),
            Event::Preflighted { readable } => {
                self.preflight = None;
                self.is_proven = *readable;
            }
            Event::Reexecuted { done } => self.done = Some(*done),
            Event::KeeperMissing => {
                self.keeper = false;
                if self.started.is_none_or(|started| now > started + LASTING) {
                    self.streak = 0;
                }
                let pause = if self.streak == 0 { 0 } else { (100 * MS) << (self.streak - 1).min(10) };
                let at = now + pause.min(LASTING);
                self.not_before = Some(self.not_before.map_or(at, |before| before.min(at)));
                self.streak += 1;
            }
            _ => {}
        }
    }

    pub(crate) fn command(&mut self, command: &Command, now: u64) {
        match command {
            Command::Preflight => {
                assert!(self.preflight.is_none(), "a second preflight");
                self.preflight = Some(now);
            }
            Command::EndPreflight => {
                assert!(self.preflight.is_some(), "there is no preflight to be ended");
            }
            Command::Reexec => assert!(std::mem::take(&mut self.is_proven), "unproven"),
            Command::ReplyReexec { to, done } => {
                assert!(self.tickets.remove(to), "{to:?} was answered twice");
                assert!(!done || self.done == Some(true), "{to:?} is told of a re-exec that was none");
            }
            Command::Report(Report::Reexecuted) => self.tally.reexecs += 1,
            Command::Report(Report::ReexecRefused) => self.tally.refused += 1,
            Command::StartKeeper => {
                let not_before = self.not_before.take();
                assert!(not_before.is_some_and(|at| now >= at), "too early: {not_before:?}, {}", self.streak);
                self.started = Some(now);
                self.tally.keepers += 1;
            }
            Command::Exit { .. } => {
                assert!(self.tickets.is_empty(), "never answered: {:?}", self.tickets);
            }
            _ => {}
        }
    }
}

impl World {
    /// A master begins, or goes on in another's place.
    pub(crate) fn begin(&mut self) {
        let every = self.rng.permille(300).then_some(std::time::Duration::from_millis(500));
        self.tell(Event::Supervised { every });
        if !self.upkeep.keeper {
            self.tell(Event::KeeperMissing);
        }
    }

    pub(crate) fn perform_for_itself(&mut self, command: &Command) {
        match command {
            Command::Preflight => {
                let hangs = self.faults && self.rng.permille(100);
                let readable = !self.faults || self.rng.permille(900);
                if !hangs {
                    let takes = self.rng.below(20 * MS);
                    self.later(takes, Happening::Deliver(Box::new(Event::Preflighted { readable })));
                }
            }
            Command::EndPreflight => {
                let answer = Event::Preflighted { readable: false };
                self.later(MS, Happening::Deliver(Box::new(answer)));
            }
            Command::Check { run, .. } => self.run_check(*run),
            Command::EndCheck { run } => self.end_check(*run),
            Command::Reexec => self.upkeep.executes = true,
            Command::Save => self.upkeep.must_save = true,
            Command::StartKeeper => {
                if self.fault(300).is_err() {
                    return self.answer(Event::KeeperMissing);
                }
                self.upkeep.keeper = true;
                let life = [10, 1000, 15_000][self.rng.index(3)] * MS;
                if self.fault(300).is_err() {
                    self.later(life, Happening::KeeperEnds);
                }
            }
            _ => {}
        }
    }

    /// The keeper ended.
    pub(crate) fn end_keeper(&mut self) {
        self.saved = None;
        self.tell(Event::KeeperMissing);
    }

    /// Nothing is left to be done: now the state may be written down, and the program replaced.
    pub(crate) fn rest_between_turns(&mut self) {
        if std::mem::take(&mut self.upkeep.must_save) {
            if self.upkeep.keeper {
                self.save();
            }
            return self.answer(Event::Saved);
        }
        if self.upkeep.keeper
            && self.plan.is_some()
            && (self.saved.is_none() || (self.mortality > 0 && self.rng.permille(30)))
        {
            self.save();
        }
        if self.upkeep.executes && self.fault(300).is_ok() {
            self.upkeep.executes = false;
            let done = self.fault(200).is_ok();
            if done {
                self.replace_image();
            }
            self.answer(Event::Reexecuted { done });
        } else if self.rng.permille(1) {
            self.replace_image();
        }
    }

    /// Whoever has a watchdog feeds it.
    pub(crate) fn plan_signs(&mut self, id: WorkerId) {
        let worker = &self.workers[&id];
        let Some(hangs) = self.plans[&worker.generation].watchdog.map(|_| worker.temper.hangs) else {
            return;
        };
        self.later(MS, Happening::Act(id, Act::Feed));
        if let Some(delay) = hangs {
            self.later(delay, Happening::Act(id, Act::Mute));
        }
    }

    pub(crate) fn give_sign(&mut self, id: WorkerId) {
        let worker = &self.workers[&id];
        let Some(timeout) = self.plans[&worker.generation].watchdog.filter(|_| worker.mute.is_none()) else {
            return;
        };
        self.say(id, Event::Alive { worker: id });
        let pause = u64::try_from(timeout.as_nanos() / 3).unwrap_or(u64::MAX);
        self.later(pause, Happening::Act(id, Act::Feed));
    }

    /// It serves nobody any more; some notice it themselves.
    pub(crate) fn hang(&mut self, id: WorkerId) {
        let now = self.now;
        self.set(id, |worker| {
            worker.mute = Some(now);
            worker.temper.stop = crate::temper::StopHow::Ignores;
        });
        if self.rng.permille(300) {
            self.say(id, Event::Stuck { worker: id });
        }
    }

    /// Only who hangs is killed for it; but a master that was held up can't tell.
    pub(crate) fn judge_stuck(&mut self, report: &Report) {
        let (Report::Replaced(_, reason) | Report::Failing(_, reason)) = report else { return };
        if let Reason::Stuck(_, id) = reason {
            let hangs = self.workers[id].mute.is_some() || self.now < self.stalled + 50 * MS;
            assert!(hangs, "{id:?} is not stuck: {:?}", self.workers[id]);
            self.upkeep.tally.stuck += 1;
        }
    }
}
