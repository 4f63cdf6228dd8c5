//! What operators do to upgrades and seats, and the checks that a generation on trial is put to.

use crate::phases::Tally;
use crate::rng::Rng;
use crate::world::{Happening, MS, World};
use reuseportd_core::{
    Before, CanaryStep, CheckFailure, Event, Exit, Number, Reason, Report, Seat, Trigger, Wait,
};
use std::time::Duration;

/// How an upgrade is to go.
#[derive(Default)]
pub(crate) struct Trials {
    pub(crate) batch: Option<u16>,
    pub(crate) canary: Vec<CanaryStep>,
    pub(crate) bake: Duration,
    pub(crate) check_interval: Option<Duration>,
}

impl Trials {
    /// Batches exclude the rest, and so do sockets of seats.
    pub(crate) fn draw(rng: &mut Rng, may_try: bool) -> Trials {
        if rng.permille(300) {
            let batch = u16::try_from(rng.between(1, 3)).ok();
            return Trials { batch, ..Trials::default() };
        }
        if !may_try {
            return Trials::default();
        }
        let mut canary = Vec::new();
        let mut share = 0;
        while rng.permille(400) && share < 900 {
            share += rng.between(1, 400);
            // No time at all is refused when the config is read.
            let hold = Duration::from_millis(rng.below(2500).max(1));
            canary.push(CanaryStep { share: u16::try_from(share.min(1000)).unwrap_or(1), hold });
        }
        let bake = Duration::from_millis(if rng.permille(400) { rng.below(2000) } else { 0 });
        let check_interval = rng.permille(500).then(|| Duration::from_millis(rng.between(50, 800)));
        Trials { batch: None, canary, bake, check_interval }
    }
}

impl World {
    pub(crate) fn tally(&self) -> Tally {
        self.oracle.protocol.phases.tally
    }

    /// As the shell does it: what is under way is taken back, or else the generation before is launched anew.
    pub(crate) fn roll_back(&mut self) {
        let before = if self.rng.permille(100) { Before::Present } else { self.master.before() };
        match before {
            Before::Present => {
                let by = self.rng.permille(700).then(|| self.ticket());
                self.tell(Event::TakeBack { by });
            }
            Before::Past(generation) => {
                let known = &self.plans[&generation];
                let plan = reuseportd_core::Plan { workers: known.configured, ..known.clone() };
                self.plan = Some(plan.clone());
                self.bad = 0;
                let by = self.rng.permille(700).then(|| (self.ticket(), Wait::Retired));
                self.tell(Event::Upgrade { plan, trigger: Trigger::Rollback, by });
            }
            Before::Nothing => {}
        }
    }

    pub(crate) fn scale(&mut self) {
        let to = match self.rng.below(4) {
            0 => Number::More,
            1 => Number::Fewer,
            _ => Number::Exactly(u16::try_from(self.rng.between(1, 5)).unwrap_or(1)),
        };
        let by = self.rng.permille(700).then(|| self.ticket());
        self.tell(Event::Scale { to, by });
    }

    pub(crate) fn replace(&mut self) {
        let seat = Seat(u16::try_from(self.rng.below(4)).unwrap_or(0));
        let by = self.rng.permille(700).then(|| self.ticket());
        self.tell(Event::Replace { seat, by });
    }

    /// Most pass, soon; some don't, or never end.
    pub(crate) fn run_check(&mut self, run: u32) {
        let (takes, failure) = match self.rng.below(20) {
            0 if self.faults => return,
            1 if self.faults => {
                let failure = Some(CheckFailure::NotStarted(12));
                return self.answer(Event::Checked { run, failure });
            }
            2 if self.faults => (self.rng.below(500 * MS), Some(CheckFailure::Ended(Exit::Code(1)))),
            3 => (self.rng.below(3000 * MS), None),
            _ => (self.rng.below(100 * MS), None),
        };
        self.later(takes, Happening::Deliver(Box::new(Event::Checked { run, failure })));
    }

    /// It is killed: nobody hears how it ended.
    pub(crate) fn end_check(&mut self, run: u32) {
        self.agenda.retain(|_, happening| match happening {
            Happening::Deliver(event) => !matches!(**event, Event::Checked { run: of, .. } if of == run),
            _ => true,
        });
    }

    /// Seats are as many as was wished; and whoever is taken back for its queue has a long one.
    pub(crate) fn judge_trial(&mut self, report: &Report) {
        match report {
            Report::Launching(generation, _) => {
                let seats = self.plans[generation].workers;
                assert_eq!(self.master.seats(*generation), seats, "seats of {generation:?}");
            }
            Report::Failing(generation, Reason::QueueGrows(group)) => {
                let socks = self.kernel.sockets.values().filter(|socket| socket.group == *group);
                let of_new =
                    socks.filter(|s| s.owner.is_some_and(|w| self.workers[&w].generation == *generation));
                let longest = of_new.map(|socket| socket.queue.len()).max();
                assert!(longest.is_some_and(|queue| queue >= 8), "the canary's queue is {longest:?}");
            }
            _ => {}
        }
    }
}
