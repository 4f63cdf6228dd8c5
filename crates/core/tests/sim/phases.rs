//! The part of the judge that watches an upgrade's way: canary, bake, batches, checks, and the way back.

use crate::kernel::{Kernel, Program};
use reuseportd_core::{
    Before, Command, Event, Generation, GroupId, Master, Outcome, Phase, Plan, Receipt, Trigger, WorkerId,
};
use std::collections::{BTreeMap, BTreeSet};

/// No upgrade may take longer than this, whatever happens, as long as there is a master; in nanoseconds.
const LONGEST: u64 = 600_000_000_000;

/// The upgrade under way.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) from: Option<Generation>,
    pub(crate) to: Generation,
    begun: u64,
    pub(crate) phase: Phase,
    /// What went wrong has been told.
    pub(crate) is_failing: bool,
    /// It gets none any more.
    pub(crate) is_back: bool,
    /// It has all of the new connections.
    pub(crate) is_switched: bool,
    /// Steps of the canary that have begun.
    shares: usize,
    /// Seats that the new generation has taken over.
    pub(crate) rolled: u16,
    batches: Vec<Vec<WorkerId>>,
    /// A check has passed in this step.
    is_checked: bool,
}

#[derive(Clone, Default)]
pub(crate) struct Phases {
    pub(crate) way: Option<Way>,
    plans: BTreeMap<Generation, Plan>,
    most: BTreeMap<Generation, u16>,
    /// The check that runs.
    check: Option<u32>,
    previous: Option<Generation>,
    /// Found without a master: what it was started from is not known.
    found: Option<Generation>,
    draining: BTreeSet<Generation>,
    gone: BTreeSet<Generation>,
    pub(crate) tally: Tally,
}

/// How often the interesting things happened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) shares: u64,
    pub(crate) bakes: u64,
    pub(crate) batches: u64,
    pub(crate) steered_back: u64,
    pub(crate) from_bake: u64,
    pub(crate) restored: u64,
    pub(crate) checks: u64,
    pub(crate) failed_checks: u64,
    pub(crate) ended_checks: u64,
    pub(crate) queues: u64,
    pub(crate) taken_back: u64,
    pub(crate) rollbacks: u64,
    pub(crate) scaled: u64,
    pub(crate) replaced: u64,
}

impl Tally {
    fn all(&mut self) -> [&mut u64; 14] {
        let Tally {
            shares,
            bakes,
            batches,
            steered_back,
            from_bake,
            restored,
            checks,
            failed_checks,
            ended_checks,
            queues,
            taken_back,
            rollbacks,
            scaled,
            replaced,
        } = self;
        [
            shares,
            bakes,
            batches,
            steered_back,
            from_bake,
            restored,
            checks,
            failed_checks,
            ended_checks,
            queues,
            taken_back,
            rollbacks,
            scaled,
            replaced,
        ]
    }

    pub(crate) fn add(&mut self, mut other: Tally) {
        self.all().into_iter().zip(other.all()).for_each(|(sum, more)| *sum += *more);
    }

    /// Whether everything happened.
    pub(crate) fn is_complete(mut self) -> bool {
        // A queue that grows takes more luck than this many seeds have: a scenario sees to it.
        self.queues += 1;
        self.all().iter().all(|count| **count > 0)
    }
}

impl Phases {
    /// Another master goes on: nobody will hear of the check.
    pub(crate) fn adopted(&mut self) {
        self.check = None;
    }

    pub(crate) fn orphaned(&mut self, generation: Generation, plan: Plan) {
        self.most.insert(generation, plan.workers);
        self.plans.insert(generation, plan);
        self.found = Some(generation);
    }

    pub(crate) fn launching(&mut self, to: Generation, plan: Plan, from: Option<Generation>, now: u64) {
        self.most.insert(to, plan.workers);
        self.plans.insert(to, plan);
        self.way = Some(Way {
            from,
            to,
            begun: now,
            phase: Phase::Launching,
            is_failing: false,
            is_back: false,
            is_switched: false,
            shares: 0,
            rolled: 0,
            batches: Vec::new(),
            is_checked: false,
        });
    }

    pub(crate) fn scaled(&mut self, generation: Generation, workers: u16) {
        self.tally.scaled += 1;
        if let Some(plan) = self.plans.get_mut(&generation) {
            plan.workers = workers;
        }
        let most = self.most.entry(generation).or_default();
        *most = workers.max(*most);
    }

    /// The old generation stands by: it serves on, and may have all again.
    pub(crate) fn standby(&self) -> Option<Generation> {
        let bakes = |way: &&Way| way.phase == Phase::Baking && !way.is_failing;
        self.way.as_ref().filter(bakes).and_then(|way| way.from)
    }

    pub(crate) fn event(&mut self, event: &Event) {
        if let Event::Checked { run, failure } = event
            && self.check == Some(*run)
        {
            self.check = None;
            self.tally.checks += 1;
            self.tally.failed_checks += u64::from(failure.is_some());
            if let Some(way) = self.way.as_mut() {
                way.is_checked |= failure.is_none();
            }
        }
    }

    pub(crate) fn command(&mut self, command: &Command) {
        match command {
            Command::Check { run, generation } => {
                assert!(self.check.is_none(), "{command:?} while {:?} runs", self.check);
                let Some(way) = &self.way else { panic!("{command:?} of nothing") };
                let on_trial = matches!(way.phase, Phase::Canary | Phase::Baking) && !way.is_failing;
                assert!(on_trial && way.to == *generation, "{command:?} in {way:?}");
                assert!(self.plans[generation].check_interval.is_some(), "there is nothing to check with");
                self.check = Some(*run);
            }
            Command::EndCheck { run } => {
                assert_eq!(self.check.take(), Some(*run), "it does not run");
                self.tally.ended_checks += 1;
            }
            Command::Spawn { worker: _, generation, .. } => self.must_have_place(*generation),
            Command::Steer { group, ranges } => {
                let parts: Vec<_> = ranges.iter().map(|r| (Some(r.generation), r.weight)).collect();
                self.judge_parts(*group, &parts);
            }
            Command::Attach { group, shares } => {
                let parts: Vec<_> = shares.iter().map(|share| (None, share.weight)).collect();
                self.judge_parts(*group, &parts);
            }
            _ => {}
        }
    }

    /// The parts are what the plan says: a step of the canary, or so much for each worker.
    fn judge_parts(&self, group: GroupId, parts: &[(Option<Generation>, u16)]) {
        let sum: u32 = parts.iter().map(|(_, weight)| u32::from(*weight)).sum();
        assert!(parts.is_empty() || sum == 1000, "{group:?}: {parts:?}");
        let [(first, weight), (second, _)] = parts else {
            return assert!(parts.len() < 2, "{group:?} is parted in {parts:?}");
        };
        let Some(way) = &self.way else { panic!("{group:?} is parted without an upgrade: {parts:?}") };
        let is_its = |part: &Option<Generation>, of| part.is_none() || *part == of;
        assert!(is_its(first, Some(way.to)) && is_its(second, way.from), "{parts:?} in {way:?}");
        assert!(self.shares(way).contains(weight), "{parts:?} in {way:?}: {:?}", self.shares(way));
    }

    /// The parts that the new generation may have at present: the one in force, and the next.
    fn shares(&self, way: &Way) -> Vec<u16> {
        let plan = &self.plans[&way.to];
        let steps = [way.shares.checked_sub(1), Some(way.shares)];
        let of_canary = steps.into_iter().flatten().filter_map(|step| plan.canary.get(step));
        let mut shares: Vec<u16> = of_canary.map(|step| step.share).collect();
        if let (Some(batch), Some(from)) = (plan.batch, way.from) {
            for new in [way.rolled, way.rolled.saturating_add(batch).min(plan.workers)] {
                shares.push(self.rolled_share(from, new));
            }
        }
        shares
    }

    /// As much for each worker. The last old one stays until the switch.
    fn rolled_share(&self, from: Generation, new: u16) -> u16 {
        let (old, new) = (u32::from(self.plans[&from].workers), u32::from(new));
        let left = old.saturating_sub(new).max(1);
        u16::try_from(new * 1000 / (new + left)).unwrap_or(1000)
    }

    /// A new generation, or batch, waits while too many drain.
    fn must_have_place(&self, generation: Generation) {
        let launches = |way: &&Way| way.to == generation && way.phase == Phase::Launching && !way.is_failing;
        let Some(way) = self.way.as_ref().filter(launches) else { return };
        let draining = self.draining.len() + way.batches.iter().filter(|batch| !batch.is_empty()).count();
        let most = usize::from(self.plans[&generation].max_draining);
        assert!(draining < most, "{draining} of {most} drain, and {generation:?} is launched: {way:?}");
    }

    /// A worker's last process is gone.
    pub(crate) fn reaped(&mut self, worker: WorkerId) {
        if let Some(way) = self.way.as_mut() {
            way.batches.iter_mut().for_each(|batch| batch.retain(|id| *id != worker));
        }
    }

    /// The step ends: with a check passed in it, if there is one to pass.
    fn must_be_checked(&mut self) {
        let Some(way) = self.way.as_mut() else { return };
        let must = self.plans[&way.to].check_interval.is_some();
        assert!(!must || way.is_checked, "a step ended unchecked: {way:?}");
        assert!(self.check.is_none(), "a step ended while a check runs: {way:?}");
        way.is_checked = false;
    }

    pub(crate) fn entered(&mut self, generation: Generation, phase: Phase) {
        let Some(way) = self.way.as_mut() else {
            panic!("{phase:?} of {generation:?}, which is not launched")
        };
        assert_eq!(way.to, generation);
        let before = std::mem::replace(&mut way.phase, phase);
        if way.is_failing {
            return;
        }
        let is_checked = matches!(before, Phase::Canary | Phase::Baking) && phase != Phase::RollingBack;
        self.tally.bakes += u64::from(phase == Phase::Baking);
        if is_checked && before != phase {
            self.must_be_checked();
        }
    }

    pub(crate) fn failing(&mut self) {
        let Some(way) = self.way.as_mut() else { panic!("nothing can fail") };
        assert!(!std::mem::replace(&mut way.is_failing, true), "failed twice");
        self.tally.from_bake += u64::from(way.phase == Phase::Baking);
    }

    /// The new generation has the part that the plan says, on each address that both have.
    pub(crate) fn shared(
        &mut self,
        to: Generation,
        share: u16,
        kernel: &Kernel,
        skip: impl Fn(GroupId) -> bool,
    ) {
        self.tally.shares += 1;
        let Some(way) = self.way.as_mut() else { panic!("a share without an upgrade") };
        let step = self.plans[&to].canary.get(way.shares).map(|step| step.share);
        assert_eq!(step, Some(share), "not the next step: {way:?}");
        way.shares += 1;
        if way.shares > 1 {
            self.must_be_checked();
        }
        self.judge_in_force(share, kernel, skip);
    }

    fn judge_in_force(&self, share: u16, kernel: &Kernel, skip: impl Fn(GroupId) -> bool) {
        let Some(Way { from: Some(from), to, .. }) = self.way.as_ref() else { return };
        let both = self.plans[to].groups.iter().filter(|group| self.plans[from].groups.contains(group));
        for group in both.copied().filter(|group| !skip(*group)) {
            let parts = match kernel.groups.get(&group).map(|group| &group.program) {
                Some(Program::Ranges(ranges)) => ranges.iter().map(|r| r.weight).collect::<Vec<_>>(),
                Some(Program::Slots(shares)) => shares.iter().map(|s| s.weight).collect(),
                Some(Program::Hash) | None => continue,
            };
            // Alone it has all: nobody of the other serves.
            assert!(parts == [share, 1000 - share] || parts == [1000], "{group:?}: {parts:?}, not {share}");
        }
    }

    /// So many seats are the new generation's: these workers go.
    pub(crate) fn rolled(
        &mut self,
        launched: u16,
        old: Vec<WorkerId>,
        kernel: &Kernel,
        skip: impl Fn(GroupId) -> bool,
    ) {
        self.tally.batches += 1;
        let Some(way) = self.way.as_mut() else { panic!("a batch without an upgrade") };
        let Plan { batch, workers, .. } = self.plans[&way.to];
        let next = batch.map_or(workers, |batch| way.rolled.saturating_add(batch).min(workers));
        assert_eq!(launched, next, "not the next batch: {way:?}");
        way.rolled = launched;
        way.batches.push(old);
        if let Some(from) = way.from {
            self.judge_in_force(self.rolled_share(from, launched), kernel, skip);
        }
    }

    pub(crate) fn ended(&mut self, receipt: &Receipt) {
        if receipt.to.is_none() {
            return;
        }
        let Some(way) = self.way.take() else { panic!("an end without a beginning: {receipt:?}") };
        assert!(self.check.is_none(), "a check runs on: {way:?}");
        self.tally.restored += u64::from(way.rolled > 0 && receipt.outcome == Outcome::RolledBack);
        let is_rollback = receipt.trigger == Trigger::Rollback && receipt.outcome == Outcome::Completed;
        self.tally.rollbacks += u64::from(is_rollback);
        if receipt.outcome == Outcome::Completed {
            self.previous = way.from.filter(|from| Some(*from) != self.found);
            self.draining.extend(way.from);
        } else if !self.gone.contains(&way.to) {
            self.draining.insert(way.to);
        }
    }

    /// So many seats it ever had.
    pub(crate) fn most_seats(&self, generation: Generation) -> u16 {
        self.most.get(&generation).copied().unwrap_or_default()
    }

    pub(crate) fn is_found(&self, generation: Generation) -> bool {
        self.found == Some(generation)
    }

    pub(crate) fn drained(&mut self, generation: Generation) {
        self.draining.remove(&generation);
        self.gone.insert(generation);
    }

    /// After an event and all that followed.
    pub(crate) fn settled(&self, master: &Master, now: u64) {
        let before = match &self.way {
            Some(way) if way.from.is_some() && !(way.is_switched && way.phase == Phase::Retiring) => {
                Before::Present
            }
            Some(way) => self.known(way.from),
            None => self.known(self.previous),
        };
        assert_eq!(master.before(), before, "{:?}", self.way);
        if let Before::Past(generation) = before {
            assert!(master.remembers(generation), "{generation:?} is forgotten");
        }
        let is_long = self.way.as_ref().is_some_and(|way| now > way.begun + LONGEST);
        assert!(!is_long, "it never ends: {:?}", self.way);
    }

    fn known(&self, generation: Option<Generation>) -> Before {
        generation.filter(|id| Some(*id) != self.found).map_or(Before::Nothing, Before::Past)
    }
}
