//! The part of the judge that watches processes, generations, tickets and notices: what may follow what.

use crate::callers::Callers;
use crate::kernel::{Holder, Kernel, Stage};
use crate::life::Life;
use crate::phases::Phases;
use crate::scaling::Scaling;
use crate::workers::Worker;
use reuseportd_core::{
    Command, Engine, Event, Generation, GroupId, ListenerId, Notice, Order, Outcome, Plan, Readiness, Reason,
    Receipt, Report, Seat, Signal, StopMode, Trigger, Verdict, WorkerId,
};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

type Workers = BTreeMap<WorkerId, Worker>;

/// A seat's respawns.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Respawns {
    /// The last announced pause.
    pub(crate) pause: Option<Duration>,
    /// Not before.
    pub(crate) after: u64,
}

#[derive(Clone)]
pub(crate) struct Protocol {
    engine: Engine,
    pub(crate) callers: Callers,
    pub(crate) phases: Phases,
    pub(crate) scaling: Scaling,
    pub(crate) lives: BTreeMap<WorkerId, Life>,
    pub(crate) respawns: BTreeMap<(Generation, Seat), Respawns>,
    pub(crate) plans: BTreeMap<Generation, Plan>,
    pub(crate) active: Option<Generation>,
    /// All that it was ever steered to, or nearly.
    pub(crate) served: BTreeSet<Generation>,
    /// Launched, and its end not told.
    launching: Option<Generation>,
    failed: BTreeSet<Generation>,
    refused_to_steer: BTreeSet<GroupId>,
    /// Sockets of seats that were removed.
    pub(crate) abandoned: BTreeSet<ListenerId>,
    pub(crate) notices: Vec<Notice>,
    pub(crate) stop: Option<(StopMode, u64)>,
    /// The oldest generation on its way out was to end at once, then.
    hurried: Option<u64>,
    /// Where a master found processes, but could get no handle: it can't steer there before the next switch.
    pub(crate) loose: BTreeSet<GroupId>,
    pub(crate) exit: Option<u8>,
    pub(crate) outcomes: BTreeMap<&'static str, u32>,
    ended: BTreeSet<u32>,
    /// The first generation failed, rather than having been stopped.
    pub(crate) first_failed: bool,
}

impl Protocol {
    pub(crate) fn new(engine: Engine) -> Protocol {
        Protocol {
            engine,
            callers: Callers::default(),
            phases: Phases::default(),
            scaling: Scaling::default(),
            lives: BTreeMap::new(),
            respawns: BTreeMap::new(),
            plans: BTreeMap::new(),
            active: None,
            served: BTreeSet::new(),
            launching: None,
            failed: BTreeSet::new(),
            refused_to_steer: BTreeSet::new(),
            abandoned: BTreeSet::new(),
            notices: Vec::new(),
            stop: None,
            hurried: None,
            loose: BTreeSet::new(),
            exit: None,
            outcomes: BTreeMap::new(),
            ended: BTreeSet::new(),
            first_failed: false,
        }
    }

    /// Nothing is known but that these processes serve.
    pub(crate) fn orphaned(
        engine: Engine,
        generation: Generation,
        plan: Plan,
        workers: &[WorkerId],
        now: u64,
    ) -> Protocol {
        let mut protocol = Protocol::new(engine);
        for (seat, worker) in (0..).map(Seat).zip(workers) {
            let life = Life { answered: Some(true), ready: true, ..Life::new(generation, seat, now) };
            protocol.lives.insert(*worker, life);
        }
        protocol.phases.orphaned(generation, plan.clone());
        protocol.scaling.settled(Some(plan.workers));
        protocol.plans.insert(generation, plan);
        protocol.served.insert(generation);
        protocol.active = Some(generation);
        protocol
    }

    pub(crate) fn active(&self) -> Option<Generation> {
        self.active
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stop.is_some()
    }

    /// The service answers on this group: the active generation has it, and nobody wants to stop. As long as another
    /// stands by, its addresses are those that count.
    pub(crate) fn promises(&self, group: GroupId) -> bool {
        let plan = self.phases.standby().or(self.active).and_then(|active| self.plans.get(&active));
        self.stop.is_none() && plan.is_some_and(|plan| plan.groups.contains(&group))
    }

    /// Generations that use the socket of a seat: the one that serves, and the one that is launched.
    pub(crate) fn using(&self, group: GroupId, seat: Seat) -> BTreeSet<Generation> {
        // Of a seat that was removed it is used until nobody is steered to it.
        let had = |generation: &Generation| self.phases.most_seats(*generation) > seat.0;
        let uses =
            |generation: &Generation| had(generation) && self.plans[generation].seat_groups.contains(&group);
        let standby = self.phases.standby();
        self.active.into_iter().chain(self.launching).chain(standby).filter(uses).collect()
    }

    /// The socket of a seat of the generation that serves stays, until the service ends, or the seat is another's.
    pub(crate) fn keeps(&self, group: GroupId, seat: Seat) -> bool {
        let is_given_up = self.phases.way.as_ref().is_some_and(|way| seat.0 < way.rolled);
        let is_its = self.active.is_some_and(|active| has_seat(&self.plans[&active], group, seat));
        self.promises(group) && is_its && !is_given_up
    }

    /// The generation serves, or has served, or was about to.
    pub(crate) fn has_served(&self, generation: Generation) -> bool {
        self.served.contains(&generation)
    }

    pub(crate) fn is_ready(&self, worker: WorkerId) -> bool {
        self.lives.get(&worker).is_some_and(|life| life.ready)
    }

    pub(crate) fn is_serving(&self, worker: WorkerId) -> bool {
        self.lives
            .get(&worker)
            .is_some_and(|life| life.ready && life.exited.is_none() && life.stopped.is_none())
    }

    /// Nothing it could still say would be of use.
    pub(crate) fn is_over(&self, worker: WorkerId) -> bool {
        self.lives.get(&worker).is_none_or(|l| l.ready || l.stopped.is_some() || l.exited.is_some())
    }

    /// It does, and not only since this moment.
    pub(crate) fn was_serving(&self, worker: WorkerId, now: u64) -> bool {
        self.is_serving(worker) && self.lives.get(&worker).is_some_and(|life| life.ready_since < now)
    }

    pub(crate) fn has_exited(&self, worker: WorkerId) -> bool {
        self.lives.get(&worker).is_some_and(|life| life.exited.is_some())
    }

    /// It was told to stop, and stopped; not because it was taken for one that serves nobody.
    pub(crate) fn has_left(&self, worker: WorkerId) -> bool {
        self.lives.get(&worker).is_some_and(|life| life.stopped.is_some() && !life.killed && !life.replaced)
    }

    pub(crate) fn steer_failed(&self, group: GroupId) -> bool {
        self.refused_to_steer.contains(&group)
    }

    /// The shortest wait for half-open handshakes of any generation so far.
    pub(crate) fn settle_min(&self) -> Duration {
        self.plans.values().map(|plan| plan.settle_timeout).min().unwrap_or_default()
    }

    pub(crate) fn is_quiet(&self) -> bool {
        let is_reloading = self.notices.last() == Some(&Notice::Reloading);
        self.callers.is_quiet() && self.launching.is_none() && !is_reloading
    }

    pub(crate) fn event(&mut self, event: &Event, now: u64) {
        self.callers.event(event);
        self.phases.event(event);
        let waits = self.launching.is_some() || self.serves_found();
        let serves = self.active.map(|active| (active, self.plans[&active].workers));
        self.scaling.event(event, waits, self.launching.is_some(), self.stop.is_some(), serves);
        if let Event::Exited { worker, .. } | Event::SpawnFailed { worker, .. } = event {
            self.vacate(*worker);
        }
        match event {
            Event::Stop { mode, .. } => {
                let fast = *mode == StopMode::Fast || self.stop.is_some();
                let since = self.stop.map_or(now, |(_, since)| since);
                self.stop = Some((if fast { StopMode::Fast } else { StopMode::Graceful }, since));
            }
            Event::Hurry => self.hurried = Some(now),
            Event::Spawned { worker } => self.answered(*worker, true),
            Event::SpawnFailed { worker, .. } => self.answered(*worker, false),
            Event::Exited { worker, .. } => {
                if let Some(life) = self.lives.get_mut(worker) {
                    life.exited = Some(now);
                }
            }
            Event::Proved { worker, verdict } if *verdict != Verdict::Waiting => {
                if let Some(life) = self.lives.get_mut(worker) {
                    life.passes = if *verdict == Verdict::Passed { life.passes + 1 } else { 0 };
                    life.asked = Some(now);
                }
            }
            Event::Steered { group, result } => {
                if result.is_ok() {
                    self.refused_to_steer.remove(group);
                } else {
                    self.refused_to_steer.insert(*group);
                }
            }
            _ => {}
        }
    }

    fn answered(&mut self, worker: WorkerId, well: bool) {
        if let Some(life) = self.lives.get_mut(&worker) {
            life.answered = Some(well);
        }
    }

    pub(crate) fn command(&mut self, command: &Command, now: u64, kernel: &Kernel, workers: &Workers) {
        assert!(self.exit.is_none(), "{command:?} after the end");
        self.callers.command(command, self.serving());
        self.phases.command(command);
        match command {
            Command::Spawn { worker, generation, seat } => self.spawn(*worker, *generation, *seat, now),
            Command::Signal { worker, signal } => self.signal(*worker, *signal, now),
            Command::Reap { worker } => {
                let life = self.life(*worker);
                assert!(life.exited.is_some() && !life.reaped, "reaped out of turn: {life:?}");
                assert!(!workers[worker].child, "{worker:?} was reaped before its remains were gone");
                life.reaped = true;
                self.phases.reaped(*worker);
            }
            Command::Tell { worker, order } => self.told(*worker, *order, now, kernel, workers),
            Command::Prove { worker } => self.prove(*worker, now),
            Command::Find { worker } | Command::CheckRemains { worker } => {
                let life = self.life(*worker);
                assert!(!life.reaped, "{command:?} of somebody forgotten");
            }
            Command::Listen { listener } => {
                self.judge_listening(*listener, kernel);
                let socket = &kernel.sockets[listener];
                assert!(
                    holds(kernel, *listener) && (socket.stage == Stage::Bound || kernel.is_adopted),
                    "{command:?} of {socket:?}"
                );
            }
            Command::Admit { listener, .. } => {
                assert!(holds(kernel, *listener), "{command:?} without a handle")
            }
            Command::Release { listener, shutdown } => self.release(*listener, *shutdown, kernel),
            Command::Steer { .. } => assert_eq!(self.engine, Engine::Ebpf),
            Command::Attach { shares, .. } => assert!(self.engine == Engine::Cbpf && !shares.is_empty()),
            Command::Notify(notice) => self.notice(*notice),
            Command::Exit { code } => self.exits(*code),
            Command::Bind { group, generation, seat, .. } => {
                assert!(has_seat(&self.plans[generation], *group, *seat), "{command:?} is in no plan");
                let before = kernel.of_seat(*group, *seat).filter(|_| self.keeps(*group, *seat));
                let before = before.filter(|before| !self.abandoned.contains(before));
                assert!(before.is_none(), "{command:?}, but there is {before:?}");
            }
            Command::Evict { .. }
            | Command::KeepKeys { .. }
            | Command::Discard { .. }
            | Command::LetGo { .. }
            | Command::Anchor { .. }
            | Command::Owns { .. }
            | Command::Observe { .. }
            | Command::Count { .. }
            | Command::Reply { .. }
            | Command::ReplyDone { .. }
            | Command::ReplyStopped { .. }
            | Command::ReplyReexec { .. }
            | Command::Check { .. }
            | Command::EndCheck { .. }
            | Command::Save
            | Command::Preflight
            | Command::EndPreflight
            | Command::Reexec
            | Command::StartKeeper
            | Command::Report(_) => {}
        }
    }

    fn prove(&mut self, worker: WorkerId, now: u64) {
        let life = *self.life(worker);
        assert!(!life.reaped && !life.ready, "to prove {worker:?} makes no sense: {life:?}");
        let interval = self.plans[&life.generation].interval;
        let is_early = life.asked.is_some_and(|asked| Duration::from_nanos(now - asked) < interval);
        assert!(!is_early, "{worker:?} was asked again within {interval:?}");
    }

    fn proven(&mut self, worker: WorkerId, now: u64) {
        let life = *self.life(worker);
        let plan = &self.plans[&life.generation];
        let suffices = plan.readiness != Readiness::Http || life.passes >= plan.passes;
        assert!(suffices, "{worker:?} is ready without having answered {} times: {life:?}", plan.passes);
        let life = self.life(worker);
        (life.ready, life.ready_since) = (true, now);
    }

    fn life(&mut self, worker: WorkerId) -> &mut Life {
        let Some(life) = self.lives.get_mut(&worker) else { panic!("{worker:?} was never spawned") };
        life
    }

    fn spawn(&mut self, worker: WorkerId, generation: Generation, seat: Seat, now: u64) {
        assert!(self.lives.keys().next_back().is_none_or(|last| *last < worker), "{worker:?} is not new");
        assert!(self.stop.is_none(), "{worker:?} is spawned although the service ends");
        assert!(seat.0 < self.plans[&generation].workers, "{seat:?} of {generation:?} does not exist");
        let wanted = [self.active, self.launching, self.phases.standby()].contains(&Some(generation));
        let is_failing = self.phases.way.as_ref().is_some_and(|way| way.is_failing && way.to == generation);
        assert!(!is_failing, "{worker:?} is spawned although {generation:?} has failed");
        assert!(
            wanted && !self.failed.contains(&generation),
            "{generation:?} is spawned although it is over"
        );
        let is_next = self.scaling.takes_place(generation, seat, worker);
        let lives = |life: &Life| life.exited.is_none() && life.answered != Some(false) && !life.given_up;
        let twin = self.lives.values().find(|l| l.generation == generation && l.seat == seat && lives(l));
        assert!(twin.is_none() || is_next, "{seat:?} of {generation:?} is taken by {twin:?}");
        if let Some(respawns) = self.respawns.get(&(generation, seat)).filter(|_| !is_next) {
            assert!(
                now >= respawns.after,
                "{seat:?} of {generation:?} was respawned before its pause was over"
            );
        }
        self.lives.insert(worker, Life::new(generation, seat, now));
    }

    /// A worker of the generation that serves is left alone, unless the service ends or it broke by itself.
    fn may_end(&self, life: &Life) -> bool {
        let on_trial = self.launching.filter(|_| self.phases.way.as_ref().is_some_and(|way| !way.is_failing));
        let serves = [self.active, on_trial, self.phases.standby()].contains(&Some(life.generation));
        let is_its_fault = life.exited.is_some() || life.replaced || !life.ready;
        self.stop.is_some() || !serves || life.given_up || is_its_fault
    }

    fn signal(&mut self, worker: WorkerId, signal: Signal, now: u64) {
        let life = *self.life(worker);
        assert!(!life.reaped && life.answered == Some(true), "{signal:?} to nobody: {life:?}");
        assert!(self.may_end(&life), "{signal:?} to {worker:?}, which serves: {life:?}");
        if signal == Signal::KillGroup && life.exited.is_none() {
            let fast = matches!(self.stop, Some((StopMode::Fast, _)));
            let unproven = !life.ready || self.failed.contains(&life.generation) || life.replaced;
            let told = life.stopped.is_some() || self.hurried == Some(now) || self.past_drain(&life, now);
            assert!(fast || unproven || told, "{worker:?} was killed without being told: {life:?}");
        }
        self.life(worker).killed |= signal == Signal::KillGroup;
        if signal == Signal::Stop {
            assert!(life.exited.is_none(), "{worker:?} has ended already");
            self.life(worker).stopped.get_or_insert(now);
        }
    }

    fn past_drain(&self, life: &Life, now: u64) -> bool {
        Duration::from_nanos(now - life.spawned) >= self.plans[&life.generation].drain_timeout
    }

    fn told(&mut self, worker: WorkerId, order: Order, now: u64, kernel: &Kernel, workers: &Workers) {
        let life = *self.life(worker);
        assert!(!life.reaped, "{order:?} to somebody forgotten");
        assert!(workers[&worker].temper.handover, "{order:?} to {worker:?}, which does not listen to orders");
        match order {
            Order::Serve => {}
            Order::Stop => {
                assert!(self.may_end(&life), "{worker:?} serves and was told to stop: {life:?}");
                self.life(worker).stopped.get_or_insert(now);
            }
            Order::Take(listener) => {
                assert!(holds(kernel, listener), "leftovers without a handle: {listener:?}")
            }
        }
    }

    /// A listener of a worker that serves stays, whatever happens to the master's handle.
    fn release(&mut self, listener: ListenerId, shutdown: bool, kernel: &Kernel) {
        assert!(holds(kernel, listener), "a handle of {listener:?} is dropped that is not there");
        let socket = &kernel.sockets[&listener];
        if let Some(seat) = socket.seat {
            // The next generation may have had one made that the seat lacks.
            let of_launched = |user: &WorkerId| {
                self.lives.get(user).is_none_or(|life| life.generation > self.active.unwrap_or(Generation(0)))
            };
            let is_its = !socket.users.iter().all(of_launched);
            // Its last worker has emptied it on its way out.
            let is_left = socket.users.last().and_then(|user| self.lives.get(user));
            let is_left = is_left.is_some_and(|life| life.stopped.is_some());
            // One before the seat's present one.
            let is_past = kernel.of_seat(socket.group, seat) != Some(listener);
            let is_left = is_left || is_past || self.abandoned.contains(&listener);
            let is_kept = is_its && !is_left && self.keeps(socket.group, seat);
            assert!(!is_kept, "the socket of {seat:?} was released: {socket:?}");
        }
        if let Some(owner) = socket.owner
            && socket.is_owned()
            // Orphans share what was the socket of a seat; it is the first one's.
            && socket.users.is_empty()
            && shutdown
        {
            let life = *self.life(owner);
            assert!(self.may_end(&life), "{listener:?} of {owner:?} was shut down, which serves");
        }
    }

    pub(crate) fn report(
        &mut self,
        report: &Report,
        now: u64,
        plans: &BTreeMap<Generation, Plan>,
        kernel: &Kernel,
    ) {
        let seats = self.active.map_or(0, |active| self.plans[&active].workers);
        self.callers.report(report, seats);
        self.trial(report, now, kernel);
        match report {
            Report::Launching(generation, _) => {
                assert!(self.launching.is_none(), "{generation:?} beside {:?}", self.launching);
                assert!(self.plans.keys().next_back().is_none_or(|last| last < generation));
                self.plans.insert(*generation, plans[generation].clone());
                self.launching = Some(*generation);
                self.phases.launching(*generation, plans[generation].clone(), self.active, now);
            }
            Report::WorkerReady(worker) => self.proven(*worker, now),
            Report::Replaced(worker, _) => self.life(*worker).replaced = true,
            Report::SteerFailed(group, _) => {
                self.refused_to_steer.insert(*group);
            }
            Report::Switched(generation) => {
                assert_eq!(self.launching, Some(*generation));
                let seats = self.plans[generation].workers;
                for seat in 0..seats {
                    let filled = |l: &Life| l.generation == *generation && l.seat == Seat(seat) && l.ready;
                    assert!(self.lives.values().any(filled), "switched without {:?}", Seat(seat));
                }
                self.active = Some(*generation);
                self.loose.clear();
                self.phases.way.iter_mut().for_each(|way| way.is_switched = true);
            }
            Report::Ended(receipt) => self.ended(receipt),
            Report::Respawning(generation, seat, pause) => self.respawning(*generation, *seat, *pause, now),
            Report::Bug(what) => panic!("the core reports a bug: {what}"),
            _ => {}
        }
    }

    /// Its end was not told before.
    pub(crate) fn is_new(&self, receipt: &Receipt) -> bool {
        !self.ended.contains(&receipt.serial)
    }

    fn ended(&mut self, receipt: &Receipt) {
        if !self.ended.insert(receipt.serial) {
            return;
        }
        let name = match receipt.outcome {
            Outcome::Completed => "completed",
            Outcome::RolledBack => "rolled back",
            Outcome::Refused => "refused",
        };
        *self.outcomes.entry(name).or_default() += 1;
        let Some(to) = receipt.to else { return };
        let workers = self.active.map_or(0, |active| self.plans[&active].workers);
        let workers = if self.serves_found() { None } else { Some(workers) };
        self.scaling.settled(workers);
        assert_eq!(self.launching.take(), Some(to), "an end without a beginning");
        match receipt.outcome {
            Outcome::Completed => assert_eq!(self.active, Some(to), "completed without a switch"),
            Outcome::RolledBack | Outcome::Refused => {
                assert_ne!(self.active, Some(to), "rolled back after the switch");
                assert!(receipt.reason.is_some(), "failed without a reason");
                self.failed.insert(to);
            }
        }
        let first = receipt.trigger == Trigger::Start;
        self.first_failed |= first && receipt.reason.is_some_and(|reason| reason != Reason::Stopped);
        assert_eq!(first, receipt.from.is_none(), "from nowhere: {receipt:?}");
    }
}

fn has_seat(plan: &Plan, group: GroupId, seat: Seat) -> bool {
    plan.seat_groups.contains(&group) && seat.0 < plan.workers
}

fn holds(kernel: &Kernel, listener: ListenerId) -> bool {
    kernel.sockets[&listener].holders.contains(&Holder::Master)
}
