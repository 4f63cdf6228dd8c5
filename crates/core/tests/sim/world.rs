//! The simulated world: one clock, one agenda, and the shell that carries out what the core asks for.

use crate::death::{Saved, sender};
use crate::kernel::{Holder, Kernel, Program, Stage};
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::temper::Temper;
use crate::twin::Twin;
use crate::upkeep::Upkeep;
use crate::workers::{Act, Worker};
use reuseportd_core::{
    Command, Engine, Event, Exit, Generation, GroupId, ListenerId, Master, Order, Plan, Signal, Time,
    WorkerId,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A millisecond in nanoseconds.
pub(crate) const MS: u64 = 1_000_000;

/// What will happen at some point.
#[derive(Clone, Debug)]
pub(crate) enum Happening {
    /// A client connects, and the next one is planned.
    Client,
    /// The last packet of a handshake.
    Handshake(u64),
    /// One turn of a worker's accept loop.
    Accept(WorkerId),
    /// A connection ends.
    Close(WorkerId, u64),
    Act(WorkerId, Act),
    /// A message reaches the master.
    Deliver(Box<Event>),
    /// The master sees that a worker's first process ended.
    Ended(WorkerId, Exit),
    /// Somebody asks the master for something.
    Operator,
    /// A process of somebody else binds the port, or leaves it.
    Stranger,
    /// The next master takes the place of one that was killed.
    Restart,
    /// The keeper ends.
    KeeperEnds,
}

pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) rng: Rng,
    pub(crate) kernel: Kernel,
    pub(crate) workers: BTreeMap<WorkerId, Worker>,
    pub(crate) oracle: Oracle,
    pub(crate) engine: Engine,
    pub(crate) master: Master,
    /// What each generation was launched from.
    pub(crate) plans: BTreeMap<Generation, Plan>,
    /// The latest wish.
    pub(crate) plan: Option<Plan>,
    /// Things go wrong.
    pub(crate) faults: bool,
    /// How many workers of the next launch are bad, per thousand.
    pub(crate) bad: u64,
    /// Of the next launch, per thousand.
    pub(crate) handover: u64,
    /// The slowest pause before an accept.
    pub(crate) accept: u64,
    /// Mean time between clients.
    pub(crate) pace: u64,
    pub(crate) clients: bool,
    pub(crate) groups: u16,
    /// So many different flows come at a time, and others after so long.
    pub(crate) sources: (u64, u64),
    /// How many groups have sockets of seats, per thousand.
    pub(crate) seated: u64,
    pub(crate) strangers: Vec<ListenerId>,
    pub(crate) tickets: u32,
    pub(crate) verbose: bool,
    /// The master is killed so many times in ten thousand steps.
    pub(crate) mortality: u64,
    /// Listeners when the master was killed.
    pub(crate) listened: Vec<ListenerId>,
    /// Nobody is there to handle anything.
    pub(crate) dead: bool,
    /// What the keeper has.
    pub(crate) saved: Option<Saved>,
    /// What it says of the slots, with the keeper gone.
    pub(crate) journal: Vec<(GroupId, Vec<u64>)>,
    /// The image before the last re-exec, which would have gone on in the same way.
    pub(crate) twin: Option<Twin>,
    pub(crate) upkeep: Upkeep,
    /// Asked whether they accept, and not answered yet.
    pub(crate) proving: BTreeSet<WorkerId>,
    /// The master is not scheduled before.
    pub(crate) stalled: u64,
    pub(crate) agenda: BTreeMap<(u64, u64), Happening>,
    sequence: u64,
    pub(crate) inbox: VecDeque<Event>,
}

impl World {
    pub(crate) fn new(seed: u64, engine: Engine, verbose: bool) -> World {
        let mut rng = Rng::new(seed);
        let mut kernel = Kernel::default();
        kernel.migrates_by_hash = rng.permille(200);
        World {
            now: rng.between(1, 1_000_000) * MS,
            rng,
            kernel,
            workers: BTreeMap::new(),
            oracle: Oracle::new(engine),
            engine,
            master: Master::new(engine),
            plans: BTreeMap::new(),
            plan: None,
            faults: true,
            bad: 0,
            handover: 0,
            accept: MS,
            pace: 10 * MS,
            clients: true,
            groups: 1,
            sources: (1, 1),
            seated: 0,
            strangers: Vec::new(),
            tickets: 0,
            verbose,
            mortality: 0,
            listened: Vec::new(),
            dead: false,
            saved: None,
            journal: Vec::new(),
            twin: None,
            upkeep: Upkeep::default(),
            proving: BTreeSet::new(),
            stalled: 0,
            agenda: BTreeMap::new(),
            sequence: 0,
            inbox: VecDeque::new(),
        }
    }

    pub(crate) fn at(&mut self, time: u64, happening: Happening) {
        self.sequence += 1;
        self.agenda.insert((time.max(self.now), self.sequence), happening);
    }

    pub(crate) fn later(&mut self, delay: u64, happening: Happening) {
        self.at(self.now + delay, happening);
    }

    pub(crate) fn trace(&self, what: std::fmt::Arguments<'_>) {
        if self.verbose {
            eprintln!("{:>14.6} {what}", self.now as f64 / 1e9);
        }
    }

    /// The next thing, whichever it is; `false` when nothing will ever happen again.
    pub(crate) fn step(&mut self) -> bool {
        let due = self.master.next_deadline().filter(|_| !self.dead);
        let due = due.map(|due| due.0.max(self.stalled).max(self.now));
        let next = self.agenda.first_key_value().map(|(key, _)| *key);
        match (due, next) {
            (None, None) => return false,
            (Some(due), next) if next.is_none_or(|(time, _)| due <= time) => {
                self.now = due;
                self.oracle.deadline_due();
                self.tell(Event::Deadline);
                // Sometimes the master gets to run late, and then everything that waited comes at once.
                if self.faults && !self.dead && self.rng.permille(5) {
                    self.stalled = self.now + self.rng.between(10, 3000) * MS;
                }
            }
            (_, Some(key)) => {
                self.now = key.0;
                let Some(happening) = self.agenda.remove(&key) else { return false };
                self.happen(happening);
            }
            (Some(_), None) => {}
        }
        self.settle_accounts();
        if self.dies() {
            self.crash();
        }
        true
    }

    fn happen(&mut self, happening: Happening) {
        if (self.dead || self.now < self.stalled)
            && matches!(
                happening,
                Happening::Deliver(_) | Happening::Ended(..) | Happening::Operator | Happening::KeeperEnds
            )
        {
            self.at(self.stalled, happening);
            return;
        }
        match happening {
            Happening::Client => self.next_client(),
            Happening::Handshake(connection) => self.kernel.finish(connection),
            Happening::Accept(worker) => self.accept(worker),
            Happening::Close(worker, connection) => self.close_connection(worker, connection),
            Happening::Act(worker, act) => {
                self.trace(format_args!("  {worker:?} {act:?}"));
                self.act(worker, act);
            }
            Happening::Deliver(event) => self.deliver(*event),
            Happening::Ended(worker, how) => self.tell_end(worker, how),
            Happening::Operator => self.next_operation(),
            Happening::Stranger => self.next_stranger(),
            Happening::Restart => self.restart(),
            Happening::KeeperEnds => self.end_keeper(),
        }
    }

    /// A message of a worker that was reaped meanwhile is lost with its channel.
    fn deliver(&mut self, event: Event) {
        if let Event::Proved { worker, .. } = &event {
            self.proving.remove(worker);
        }
        if let Event::Ready { worker, listeners } = &event {
            let lost = self.workers[worker].reaped || self.workers[worker].orphan;
            for (_, listener) in listeners {
                if !lost && let Some(socket) = self.kernel.sockets.get_mut(listener) {
                    socket.holders.insert(Holder::Master);
                }
                self.kernel.close(*listener, Holder::Flight, &mut self.rng);
            }
        }
        let is_heard = |worker: WorkerId| !self.workers[&worker].reaped && !self.workers[&worker].orphan;
        if sender(&event).is_none_or(is_heard) {
            self.tell(event);
        }
    }

    /// Hands the core an event and carries out all that follows, as the shell does.
    pub(crate) fn tell(&mut self, event: Event) {
        if self.dead {
            return;
        }
        self.inbox.push_back(event);
        while let Some(event) = self.next_event() {
            self.trace(format_args!("{event:?}"));
            self.oracle.event(&event, self.now);
            self.upkeep.event(&event, self.now);
            for command in self.handle(event) {
                self.trace(format_args!("    -> {command:?}"));
                self.oracle.command(&command, self.now, &self.kernel, &self.workers);
                self.upkeep.command(&command, self.now);
                self.perform(command);
                self.settle_accounts();
                if self.dies() {
                    return self.crash();
                }
                // The kernel does not wait for the master: packets arrive between any two commands.
                if self.clients && self.rng.permille(200) {
                    self.connect();
                    self.settle_accounts();
                }
            }
        }
        self.oracle.settled(self.now, self.master.next_deadline(), &self.kernel, &self.workers);
        self.oracle.protocol.phases.settled(&self.master, self.now);
    }

    /// The next one, or what is only done when there is none.
    fn next_event(&mut self) -> Option<Event> {
        if self.inbox.is_empty() && self.oracle.protocol.exit.is_none() {
            self.rest_between_turns();
        }
        self.inbox.pop_front()
    }

    /// Hands the core an event.
    fn handle(&mut self, event: Event) -> Vec<Command> {
        self.turn_twin(&event);
        self.master.handle(event, Time(self.now));
        self.master.check();
        let commands: Vec<Command> = std::iter::from_fn(|| self.master.next_command()).collect();
        self.compare_twin(&commands);
        commands
    }

    /// Losses are judged as soon as they happen, and whoever was woken wakes.
    pub(crate) fn settle_accounts(&mut self) {
        self.wake();
        for group in std::mem::take(&mut self.kernel.left) {
            self.oracle.left(group);
        }
        self.oracle.confused(std::mem::take(&mut self.kernel.confused));
        for loss in std::mem::take(&mut self.kernel.losses) {
            self.oracle.lost(loss, self.now, &self.kernel, &self.workers);
        }
        for dropped in std::mem::take(&mut self.kernel.dropped) {
            self.oracle.dropped(dropped, &self.kernel, &self.workers);
        }
    }

    pub(crate) fn answer(&mut self, event: Event) {
        self.inbox.push_back(event);
    }

    /// A fault so many times in a thousand, as an errno.
    pub(crate) fn fault(&mut self, permille: u64) -> Result<(), i32> {
        if self.faults && self.rng.permille(permille) { Err(12) } else { Ok(()) }
    }

    fn try_to_start(&mut self, worker: WorkerId, generation: Generation, seat: reuseportd_core::Seat) {
        let bad = if self.faults { self.bad } else { 0 };
        let handover = self.rng.permille(self.handover);
        let mut temper = Temper::draw(&mut self.rng, handover, bad, self.accept);
        // Some look well, and let their queues grow when they get connections.
        if self.faults && !self.plans[&generation].canary.is_empty() && self.rng.permille(90) {
            temper.sleeps = Some(2500 * MS);
        }
        match self.fault(bad / 20) {
            Ok(()) => {
                self.start_worker(worker, generation, seat, temper);
                self.answer(Event::Spawned { worker });
            }
            Err(errno) => self.answer(Event::SpawnFailed { worker, errno }),
        }
    }

    fn perform(&mut self, command: Command) {
        match command {
            Command::Spawn { worker, generation, seat } => self.try_to_start(worker, generation, seat),
            Command::Signal { worker, signal } => match signal {
                Signal::Stop => self.told_to_stop(worker),
                Signal::TerminateGroup => self.terminate_group(worker),
                Signal::KillGroup => self.kill_group(worker),
            },
            Command::Reap { worker } => self.set(worker, |w| w.reaped = true),
            Command::Tell { worker, order } => match order {
                Order::Serve => self.serve(worker),
                Order::Stop => self.told_to_stop(worker),
                Order::Take(listener) => self.told_to_take(worker, listener),
            },
            Command::Prove { worker } => {
                self.try_out(worker);
            }
            Command::CheckRemains { worker } => {
                let left = self.workers[&worker].child;
                self.answer(Event::Remains { worker, left });
            }
            Command::Count { workers } => {
                let open = |w: &WorkerId| u32::try_from(self.workers[w].open.len()).unwrap_or(u32::MAX);
                let connections = workers.iter().map(|w| (*w, open(w))).collect();
                self.answer(Event::Counted { connections });
            }
            Command::Find { .. }
            | Command::Listen { .. }
            | Command::Admit { .. }
            | Command::Evict { .. }
            | Command::KeepKeys { .. }
            | Command::LetGo { .. }
            | Command::Steer { .. }
            | Command::Attach { .. }
            | Command::Anchor { .. }
            | Command::Owns { .. }
            | Command::Release { .. }
            | Command::Discard { .. }
            | Command::Observe { .. } => self.perform_on_sockets(command),
            Command::Report(report) => {
                let latest = self.plan.as_ref();
                self.oracle.report(&report, self.now, &mut self.plans, latest, &self.kernel, &self.workers);
                self.remember_flows(&report);
                self.judge_stuck(&report);
                self.judge_trial(&report);
            }
            Command::Bind { group, worker, seat, .. } => {
                let result = self.bind_seat(group, seat);
                self.answer(Event::Bound { group, worker, result });
            }
            Command::Notify(_)
            | Command::Reply { .. }
            | Command::ReplyDone { .. }
            | Command::ReplyStopped { .. }
            | Command::ReplyReexec { .. }
            | Command::Exit { .. } => {}
            Command::Check { .. }
            | Command::EndCheck { .. }
            | Command::Save
            | Command::Preflight
            | Command::EndPreflight
            | Command::Reexec
            | Command::StartKeeper => {
                self.perform_for_itself(&command);
            }
        }
    }

    fn perform_on_sockets(&mut self, command: Command) {
        match command {
            Command::Find { worker } => {
                let found = self.find(worker);
                self.answer(Event::Found { worker, found });
            }
            Command::Listen { listener } => {
                // To listen once more can't fail.
                let is_new = self.kernel.sockets[&listener].stage == Stage::Bound;
                let fault = self.fault(if is_new { 10 } else { 0 });
                let result = fault.and_then(|()| self.kernel.listen(listener));
                self.answer(Event::Listening { listener, result });
            }
            Command::Admit { listener, key } => {
                let group = self.kernel.sockets[&listener].group;
                let owner = self.kernel.sockets[&listener].owner.map(|owner| self.workers[&owner].generation);
                let result = self.fault(10).and_then(|()| self.kernel.admit(listener, key));
                if let Some(generation) = owner.filter(|_| result.is_ok()) {
                    self.kernel.own(group, key, generation);
                }
                // The program in force may name this key already.
                self.oracle.steered(group, &self.kernel, &self.workers);
                self.answer(Event::Admitted { listener, result });
            }
            Command::LetGo { .. } => unreachable!("no foreign server here"),
            Command::KeepKeys { group, kept } => self.kernel.keep_keys(group, &kept),
            Command::Evict { group, key } => self.kernel.evict(group, key),
            Command::Steer { group, ranges } => self.put_in_force(group, Program::Ranges(ranges)),
            Command::Attach { group, shares } => self.put_in_force(group, Program::Slots(shares)),
            Command::Anchor { listener } => {
                let result = self.fault(20).and_then(|()| self.anchor(listener));
                self.answer(Event::Anchored { listener, result });
            }
            Command::Owns { listener, worker } => {
                let owned = self.kernel.sockets[&listener].is_owned_by(worker);
                self.answer(Event::Owned { listener, owned });
            }
            Command::Discard { listener, group, generation } => {
                let count = self.kernel.discard(listener);
                self.settle_accounts();
                self.answer(Event::Discarded { group, generation, count });
            }
            Command::Release { listener, shutdown } => {
                if shutdown {
                    self.kernel.shutdown(listener, &mut self.rng);
                }
                self.kernel.close(listener, Holder::Master, &mut self.rng);
                let socket = &self.kernel.sockets[&listener];
                if self.oracle.unwanted.remove(&listener) && socket.stage == Stage::Gone {
                    self.kernel.left.insert(socket.group);
                }
            }
            Command::Observe { group } => {
                let view = self.kernel.observe(group, self.now);
                self.kernel.note_seen(group);
                let slots = self.kernel.groups.get(&group).map(|group| &group.slots);
                self.trace(format_args!("      slots of {group:?}: {slots:?}"));
                self.answer(Event::Observed { group, view });
            }
            _ => {}
        }
    }

    fn put_in_force(&mut self, group: GroupId, program: Program) {
        let mut result = self.fault(20);
        // A program is attached through a member of the group.
        if self.kernel.group(group).slots.is_empty() {
            result = Err(2);
        }
        if result.is_ok() {
            self.kernel.put_in_force(group, program);
            self.oracle.steered(group, &self.kernel, &self.workers);
            self.oracle.judge_policy(group, &self.kernel, &self.workers);
        }
        self.answer(Event::Steered { group, result });
    }

    fn anchor(&mut self, listener: ListenerId) -> Result<(), i32> {
        let Some(socket) = self.kernel.sockets.get_mut(&listener) else { return Err(9) };
        if socket.stage == Stage::Gone || !socket.is_owned() {
            return Err(9);
        }
        socket.holders.insert(Holder::Master);
        Ok(())
    }
}
