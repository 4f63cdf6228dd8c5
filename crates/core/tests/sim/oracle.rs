//! The judge. It watches every packet, event and command, and knows the promise but not how it is kept.

use crate::flows::Datagrams;
use crate::kernel::{Choice, Kernel, Loss, Program, Socket};
use crate::protocol::Protocol;
use crate::receipts::Receipts;
use crate::strays::Picked;
use crate::workers::Worker;
use reuseportd_core::{
    Command, Engine, Event, Found, Generation, GroupId, ListenerId, Plan, Report, Seat, Time, Trigger,
    WorkerId,
};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

type Workers = BTreeMap<WorkerId, Worker>;

/// What is known of one client's connection until somebody accepts it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Client {
    since: u64,
    /// Who was chosen; it may have been moved since.
    listener: ListenerId,
    /// How long its handshake takes.
    handshake: Duration,
    /// Nothing was promised to it.
    pub(crate) excused: bool,
}

pub(crate) struct Oracle {
    pub(crate) engine: Engine,
    pub(crate) protocol: Protocol,
    pub(crate) clients: BTreeMap<u64, Client>,
    /// The generation that each part of the new connections of a group goes to, as the last program put in force there
    /// says: one of several, as long as they share all the sockets it names.
    pub(crate) steered: BTreeMap<GroupId, Vec<BTreeSet<Generation>>>,
    /// `cbpf`: slots moved and the master could not know yet; `true` once it has looked since.
    pub(crate) disturbed: BTreeMap<GroupId, bool>,
    /// `cbpf`: several moved between two looks; the core has said that it can only guess.
    pub(crate) unsure: BTreeSet<GroupId>,
    /// Losses the core has owned up to.
    admitted: BTreeMap<ListenerId, u32>,
    pub(crate) tally: Tally,
    /// A master that was killed had begun to stop, and the next one does not know it; until it steers.
    pub(crate) refusing: BTreeSet<GroupId>,
    /// No master holds them: where the kernel does not move what waits there, it goes with the last process.
    pub(crate) doomed: BTreeSet<ListenerId>,
    /// Handles that went with a master that was killed, before any other could know of them.
    pub(crate) unsaved: BTreeSet<ListenerId>,
    /// Handles that came too late, and go back at once.
    pub(crate) unwanted: BTreeSet<ListenerId>,
    pub(crate) datagrams: Datagrams,
    receipts: Receipts,
    deadline_handled: bool,
}

/// How often the interesting things happened; a simulation in which they don't proves nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) connections: u64,
    pub(crate) accepted: u64,
    pub(crate) excused: u64,
    pub(crate) counted: u64,
    pub(crate) strays: u64,
    pub(crate) unsure: u64,
    /// Waited in the socket of a seat until its next worker came.
    pub(crate) inherited: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Tally) {
        self.connections += other.connections;
        self.accepted += other.accepted;
        self.excused += other.excused;
        self.counted += other.counted;
        self.strays += other.strays;
        self.unsure += other.unsure;
        self.inherited += other.inherited;
    }
}

impl Oracle {
    pub(crate) fn new(engine: Engine) -> Oracle {
        Oracle {
            engine,
            protocol: Protocol::new(engine),
            clients: BTreeMap::new(),
            steered: BTreeMap::new(),
            disturbed: BTreeMap::new(),
            unsure: BTreeSet::new(),
            admitted: BTreeMap::new(),
            tally: Tally::default(),
            refusing: BTreeSet::new(),
            doomed: BTreeSet::new(),
            unsaved: BTreeSet::new(),
            unwanted: BTreeSet::new(),
            datagrams: Datagrams::default(),
            receipts: Receipts::default(),
            deadline_handled: false,
        }
    }

    pub(crate) fn deadline_due(&mut self) {
        self.deadline_handled = true;
    }

    pub(crate) fn event(&mut self, event: &Event, now: u64) {
        if let Event::Ready { worker, listeners } | Event::Found { worker, found: Found::All(listeners) } =
            event
            && self.protocol.is_over(*worker)
        {
            self.unwanted.extend(listeners.iter().map(|(_, listener)| *listener));
        }
        if let Event::Observed { group, .. } = event {
            self.looked(*group);
        }
        self.receipts.event(event, self.protocol.is_stopping());
        self.protocol.event(event, now);
    }

    pub(crate) fn command(&mut self, command: &Command, now: u64, kernel: &Kernel, workers: &Workers) {
        if let Command::Observe { group } = command
            && let Some(looked) = self.disturbed.get_mut(group)
        {
            *looked = true;
        }
        self.receipts.command(command);
        self.judge_flows(command, now, kernel, workers);
        self.protocol.command(command, now, kernel, workers);
    }

    pub(crate) fn report(
        &mut self,
        report: &Report,
        now: u64,
        plans: &mut BTreeMap<Generation, Plan>,
        latest: Option<&Plan>,
        kernel: &Kernel,
        workers: &Workers,
    ) {
        if let Report::Launching(generation, trigger) = report {
            // Orphans serve already.
            if self.protocol.active() == Some(*generation) {
                return;
            }
            let Some(plan) = latest else { panic!("{generation:?} is launched, but nobody asked") };
            let mut plan = plan.clone();
            if *trigger == Trigger::Rollback {
                (plan.canary, plan.bake) = (Vec::new(), Duration::ZERO);
            }
            let present = self.protocol.active().map(|active| self.protocol.plans[&active].clone());
            plan.workers = self.protocol.scaling.launching(&plan, present.as_ref());
            plans.insert(*generation, plan);
            self.receipts.launching(self.protocol.active());
        }
        if let Report::Scaled(generation, workers) = report
            && let Some(plan) = plans.get_mut(generation)
        {
            plan.workers = *workers;
        }
        if let Report::SlotsUnsure(group) = report {
            assert!(self.disturbed.contains_key(group), "{group:?}: unsure without a reason");
            self.unsure.insert(*group);
            self.tally.unsure += 1;
        }
        self.receipts.report(report, kernel, workers);
        self.told_of_datagrams(report);
        if let Report::LeftoversLost(listener, count) = report {
            *self.admitted.entry(*listener).or_default() += count;
        }
        if let Report::Switched(generation) = report {
            self.all_steered_to(*generation, plans, kernel, workers);
        }
        if let (Report::SteeredBack(..), Some(active)) = (report, self.protocol.active()) {
            self.all_steered_to(active, plans, kernel, workers);
        }
        self.protocol.report(report, now, plans, kernel);
    }

    /// It has all of the new connections, on each of its addresses.
    fn all_steered_to(
        &mut self,
        generation: Generation,
        plans: &BTreeMap<Generation, Plan>,
        kernel: &Kernel,
        workers: &Workers,
    ) {
        let serves = |id: &WorkerId, worker: &Worker| {
            // As far as the master can know.
            worker.generation == generation && self.protocol.is_serving(*id)
        };
        // With nobody there it stays as it is: somebody has to accept.
        if self.protocol.is_stopping() || !workers.iter().any(|(id, worker)| serves(id, worker)) {
            return;
        }
        for group in &plans[&generation].groups {
            // Slots may have come to mean other listeners, so that no new program was needed.
            self.steered(*group, kernel, workers);
            let parts = self.steered.get(group).map(Vec::as_slice).unwrap_or_default();
            let is_there = self.engine == Engine::None
                || self.unsure.contains(group)
                || self.disturbed.contains_key(group)
                || self.protocol.loose.contains(group)
                // At this address nobody of it is left: where connections go meanwhile is judged one by one.
                || kernel.named(*group).is_empty()
                || (!parts.is_empty() && parts.iter().all(|to| to.contains(&generation)));
            let to = self.steered.insert(*group, vec![BTreeSet::from([generation])]);
            assert!(is_there, "steered to {generation:?}, but {group:?} is steered to {to:?}");
        }
    }

    /// A listener left its group, and not by the master's hand.
    pub(crate) fn left(&mut self, group: GroupId) {
        if self.engine == Engine::Cbpf {
            self.disturbed.insert(group, false);
        }
    }

    /// What came and left between two looks moved others, and nobody can know.
    pub(crate) fn confused(&mut self, groups: BTreeSet<GroupId>) {
        if self.engine == Engine::Cbpf {
            self.unsure.extend(groups);
        }
    }

    /// Another master goes on with an older memory: of the slots it knows what it will see.
    pub(crate) fn adopted(&mut self, mut protocol: Protocol, groups: impl Iterator<Item = GroupId>) {
        protocol.adopted(&self.protocol);
        if self.protocol.is_stopping() && !protocol.is_stopping() {
            self.refusing.extend(self.steered.keys());
        }
        self.protocol = protocol;
        self.receipts.adopted();
        self.forget_untold();
        self.deadline_handled = false;
        if self.engine == Engine::Cbpf {
            self.disturbed.extend(groups.map(|group| (group, false)));
        }
    }

    /// A master that knows nothing but these processes: they are one generation from here on.
    pub(crate) fn orphaned(&mut self, protocol: Protocol, groups: impl Iterator<Item = GroupId>) {
        self.protocol = protocol;
        self.receipts = Receipts::default();
        self.forget_untold();
        self.datagrams.forget_flows();
        self.deadline_handled = false;
        for group in groups {
            self.steered.insert(group, vec![self.protocol.active().into_iter().collect()]);
            self.refusing.insert(group);
            if self.engine == Engine::Cbpf {
                self.disturbed.insert(group, false);
            }
        }
    }

    /// A program was put in force.
    pub(crate) fn steered(&mut self, group: GroupId, kernel: &Kernel, workers: &Workers) {
        if kernel.groups.get(&group).is_some_and(|g| g.program != Program::Hash && !g.is_foreign) {
            self.refusing.remove(&group);
        }
        if self.unsure.contains(&group) || kernel.groups.get(&group).is_some_and(|group| group.is_foreign) {
            return;
        }
        match self.disturbed.get(&group) {
            Some(true) => self.disturbed.remove(&group),
            Some(false) => return,
            None => None,
        };
        let mut parts = Vec::new();
        for (whose, named) in kernel.parts(group) {
            let mut to: Option<BTreeSet<Generation>> = None;
            for listener in &named {
                let socket = &kernel.sockets[listener];
                let of = self.generations(socket, workers);
                assert!(
                    !of.is_empty(),
                    "{group:?} is steered to {listener:?}, which is nobody's: {socket:?}"
                );
                assert!(self.is_ready(socket), "{group:?} is steered to {listener:?}, not ready: {socket:?}");
                to = Some(to.map_or(of.clone(), |to| &to & &of));
            }
            let is_its = |to: &BTreeSet<Generation>| whose.is_none_or(|whose| to.contains(&whose));
            assert!(to.as_ref().is_none_or(is_its), "{group:?}: {named:?} of {whose:?} are those of {to:?}");
            parts.extend(to);
        }
        // With nobody named, it stays clear whose the connections were.
        if !parts.is_empty() {
            assert!(parts.iter().all(|to| !to.is_empty()), "{group:?}: one part for several generations");
            self.steered.insert(group, parts);
        }
        if let Some(Program::Slots(shares)) = kernel.groups.get(&group).map(|g| &g.program) {
            let slots: BTreeSet<u16> = shares.iter().flat_map(|s| s.slots.iter().copied()).collect();
            assert_eq!(slots.len(), kernel.named(group).len(), "{group:?}: a slot in {shares:?} is nobody's");
        }
    }

    /// Whose it is. Nobody's is a stranger, or the socket of a seat that is no more.
    pub(crate) fn generations(&self, socket: &Socket, workers: &Workers) -> BTreeSet<Generation> {
        match socket.seat {
            Some(seat) => self.protocol.using(socket.group, seat),
            None => socket.owner.iter().map(|owner| workers[owner].generation).collect(),
        }
    }

    pub(crate) fn is_ready(&self, socket: &Socket) -> bool {
        socket.workers().any(|worker| self.protocol.is_ready(worker))
    }

    pub(crate) fn is_steered_to(&self, group: GroupId, generation: Generation) -> bool {
        self.steered.get(&group).is_some_and(|parts| parts.iter().any(|to| to.contains(&generation)))
    }

    /// A SYN arrived, and the kernel chose.
    pub(crate) fn chosen(
        &mut self,
        connection: u64,
        group: GroupId,
        choice: Choice,
        now: u64,
        kernel: &Kernel,
        workers: &Workers,
    ) {
        self.tally.connections += 1;
        let (listener, hashed) = match choice {
            Choice::Refused => return self.refused(connection, group, workers),
            Choice::Named(listener) | Choice::Known(listener) => (listener, false),
            Choice::Hashed(listener) => (listener, true),
        };
        let picked = Picked { id: connection, group, listener, hashed, now };
        let excused = self.is_excused(picked, kernel, workers);
        self.clients.insert(connection, Client { since: now, listener, handshake: Duration::ZERO, excused });
    }

    /// The client will need so long for its last packet.
    pub(crate) fn handshake(&mut self, connection: u64, takes: u64) {
        if let Some(client) = self.clients.get_mut(&connection) {
            client.handshake = Duration::from_nanos(takes);
        }
    }

    pub(crate) fn accepted(&mut self, connection: u64) {
        self.tally.accepted += 1;
        self.clients.remove(&connection);
    }

    /// Whoever was born so late was not there when it came.
    pub(crate) fn accepted_at_seat(&mut self, connection: u64, born: u64) {
        let waited = self.clients.get(&connection).is_some_and(|client| client.since < born);
        self.tally.inherited += u64::from(waited);
    }

    /// A connection was reset that nobody had accepted.
    pub(crate) fn lost(&mut self, loss: Loss, now: u64, kernel: &Kernel, workers: &Workers) {
        let Some(client) = self.clients.remove(&loss.connection) else { return };
        let socket = &kernel.sockets[&loss.listener];
        if self.doomed.contains(&loss.listener) || self.unsure.contains(&socket.group) {
            self.tally.excused += 1;
            return;
        }
        // A seat may have been removed, and be back without a socket so far; and one that a master had just made is unknown
        // to the next.
        let is_nobodys =
            self.protocol.abandoned.contains(&loss.listener) || self.unsaved.contains(&loss.listener);
        let is_its = |seat: &Seat| !is_nobodys && kernel.is_latest(loss.listener, *seat);
        if let Some(seat) = socket.seat.filter(is_its) {
            assert!(!self.protocol.keeps(socket.group, seat), "{loss:?} from {seat:?}: {socket:?}");
        }
        if client.excused || self.protocol.is_stopping() || self.engine == Engine::None {
            self.tally.excused += 1;
            return;
        }
        // What a handshake may take after the switch is bounded, where the kernel does not move it.
        let age = Duration::from_nanos(now - client.since);
        // Nobody may be left where the last master could get no handle, either.
        let is_removed = !self.protocol.promises(socket.group) || self.protocol.loose.contains(&socket.group);
        if client.handshake >= self.protocol.settle_min() && (self.engine == Engine::Cbpf || is_removed) {
            self.tally.excused += 1;
            return;
        }
        let last = self.last_worker(socket, workers);
        let owner = last.map(|owner| &workers[&owner]);
        // The seat had no worker when it was given up.
        let is_vacant = socket.seat.is_some() && last.is_some_and(|last| !self.protocol.is_ready(last));
        // Before the first program the kernel moves nothing, and of what a worker closes unasked only the kernel could.
        let is_plain = kernel.groups.get(&socket.group).is_none_or(|group| group.program == Program::Hash);
        if self.engine == Engine::Ebpf && is_plain && owner.is_some_and(|worker| worker.deserted) {
            self.tally.excused += 1;
            return;
        }
        // At an address that is no more nobody is left to go to if a worker drops what it has.
        if self.engine == Engine::Ebpf
            && is_removed
            && (is_vacant
                || client.listener != loss.listener
                || owner.is_some_and(|worker| worker.deserted || !worker.drained))
        {
            self.tally.excused += 1;
            return;
        }
        // Unmodified workers are told to stop only when nothing waits; the others are trusted to empty their queues.
        let was_cut = |id: WorkerId, worker: &Worker| {
            let is_told = worker.temper.handover && !worker.temper.is_orderly();
            let is_hasty = worker.drained && (is_told || worker.orphan);
            let is_cut = !worker.runs && (is_told || !self.protocol.has_left(id));
            worker.deserted || is_vacant || is_hasty || is_cut
        };
        if self.engine == Engine::Cbpf
            && last.is_some_and(|id| was_cut(id, &workers[&id]))
            && (is_removed || !self.has_taker(socket.group, kernel, workers))
            && let Some(count) = self.admitted.get_mut(&loss.listener)
            && *count > 0
        {
            *count -= 1;
            self.tally.counted += 1;
            return;
        }
        let place = if loss.half_open { "half open" } else { "queued" };
        let Loss { connection, listener, .. } = loss;
        panic!(
            "connection {connection}, {place} in {listener:?}, was lost: {client:?}, age {age:?}, {socket:?}"
        );
    }

    /// Somebody could have taken leftovers, and nobody would have refused.
    fn has_taker(&self, group: GroupId, kernel: &Kernel, workers: &Workers) -> bool {
        // One that binds nothing itself is taken for an unmodified one until it speaks.
        let is_known = |worker: &Worker| worker.sockets.iter().any(|id| kernel.sockets[id].seat.is_none());
        let serves = |id: &WorkerId, worker: &Worker| {
            worker.temper.handover
                && is_known(worker)
                && !worker.orphan
                // That it speaks it may have said to a master that did not live to note it.
                && !worker.adopted
                && !worker.deserted
                && worker.serves
                && worker.runs
                && self.is_steered_to(group, worker.generation)
                && self.protocol.is_serving(*id)
                && !self.protocol.is_given_up(*id)
        };
        let mut takers = workers.iter().filter(|(id, worker)| serves(id, worker)).peekable();
        takers.peek().is_some() && takers.all(|(_, worker)| worker.temper.takes)
    }

    /// After an event and all that followed from it.
    pub(crate) fn settled(&mut self, now: u64, due: Option<Time>, kernel: &Kernel, workers: &Workers) {
        if std::mem::take(&mut self.deadline_handled) {
            assert!(due.is_none_or(|due| due.0 > now), "the deadline was handled and is still due");
            self.judge_patience(now);
        }
        self.judge_datagrams();
        if self.engine != Engine::None && !self.protocol.is_stopping() {
            for group in kernel.groups.keys().filter(|group| self.protocol.promises(**group)) {
                self.judge_named(*group, kernel, workers);
                self.judge_capacity(*group, kernel, workers);
            }
        }
    }
}
