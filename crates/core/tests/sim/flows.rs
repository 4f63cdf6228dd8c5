//! The part of the judge that watches datagrams: each is read or counted, and flows stay where they began.

use crate::datagrams::Dropped;
use crate::kernel::{Choice, Kernel, Program, Socket};
use crate::life::Life;
use crate::oracle::Oracle;
use crate::strays::Picked;
use crate::temper::StopHow;
use crate::workers::Worker;
use reuseportd_core::{Command, Engine, Generation, GroupId, ListenerId, Outcome, Policy, Report, WorkerId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

type Workers = BTreeMap<WorkerId, Worker>;

/// A datagram that nobody has read yet.
#[derive(Clone, Copy, Debug)]
struct Sent {
    #[allow(dead_code, reason = "shown when something is wrong")]
    picked: (GroupId, ListenerId),
    excused: bool,
}

/// Where the last datagram of a flow went.
#[derive(Clone, Copy, Debug)]
struct Seen {
    key: u32,
    worker: WorkerId,
    generation: Generation,
    last: u64,
    /// Since the last look.
    unseen: bool,
}

#[derive(Default)]
pub(crate) struct Datagrams {
    sent: BTreeMap<u64, Sent>,
    flows: BTreeMap<(GroupId, u64), Seen>,
    /// Looks that were asked for and not yet answered: what came meanwhile an answer may not show.
    looks: BTreeMap<GroupId, u32>,
    /// Counted, and to be told.
    untold: BTreeMap<GroupId, u32>,
    pub(crate) tally: Tally,
}

/// How often the interesting things happened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) datagrams: u64,
    pub(crate) read: u64,
    /// Went where the flow began although new ones went elsewhere.
    pub(crate) kept: u64,
    pub(crate) counted: u64,
    pub(crate) excused: u64,
    /// Workers that were told to stop when their flows were idle, and when they had to be.
    pub(crate) idle: u64,
    pub(crate) late: u64,
    /// Upgrades that were complete while flows went on.
    pub(crate) complete: u64,
    /// Programs by processor.
    pub(crate) by_cpu: u64,
}

impl Tally {
    fn all(&mut self) -> [&mut u64; 9] {
        let Tally { datagrams, read, kept, counted, excused, idle, late, complete, by_cpu } = self;
        [datagrams, read, kept, counted, excused, idle, late, complete, by_cpu]
    }

    pub(crate) fn add(&mut self, mut other: Tally) {
        self.all().into_iter().zip(other.all()).for_each(|(sum, more)| *sum += *more);
    }

    /// Whether everything happened.
    pub(crate) fn is_complete(mut self) -> bool {
        self.all().iter().all(|count| **count > 0)
    }
}

impl Datagrams {
    /// A master that knows nothing of them begins anew.
    pub(crate) fn forget_flows(&mut self) {
        self.flows.clear();
        self.looks.clear();
    }
}

impl Oracle {
    /// A datagram arrived, and the kernel chose.
    pub(crate) fn sent(
        &mut self,
        (id, source): (u64, u64),
        group: GroupId,
        choice: Choice,
        now: u64,
        kernel: &Kernel,
        workers: &Workers,
    ) {
        self.datagrams.tally.datagrams += 1;
        let flow = (group, source);
        let seen = self.datagrams.flows.get(&flow).copied();
        let must_stay = seen.filter(|seen| self.must_stay(group, seen, now, kernel, workers));
        let (listener, hashed) = match choice {
            Choice::Refused => return self.refused(id, group, workers),
            Choice::Named(listener) | Choice::Known(listener) => (listener, false),
            Choice::Hashed(listener) => (listener, true),
        };
        let socket = &kernel.sockets[&listener];
        let to = socket.owner.map(|owner| (owner, workers[&owner].generation));
        if let Some(seen) = must_stay {
            let stays = to.is_some_and(|(_, generation)| generation == seen.generation);
            assert!(stays, "datagram {id}: the flow of {seen:?} went to {listener:?}, {to:?}");
        }
        let excused = if let Choice::Known(_) = choice {
            // Those of a master of which nothing is left are known to nobody else.
            let stays = seen.is_none_or(|seen| to.is_some_and(|(_, of)| seen.generation == of));
            assert!(
                stays,
                "datagram {id}: the kernel knows a flow that was {seen:?} at {listener:?}, {to:?}"
            );
            let is_new = to.is_some_and(|(_, of)| self.is_steered_to(group, of));
            self.datagrams.tally.kept += u64::from(!is_new);
            !self.protocol.promises(group)
        } else {
            self.is_excused(Picked { id, group, listener, hashed, now }, kernel, workers)
        };
        self.datagrams.sent.insert(id, Sent { picked: (group, listener), excused });
        let timeout =
            kernel.groups.get(&group).filter(|group| !group.is_foreign).and_then(|group| group.flows.timeout);
        let noted = socket.key.zip(timeout).filter(|_| !hashed);
        if let (Some((key, _)), Some((worker, generation))) = (noted, to) {
            self.datagrams.flows.insert(flow, Seen { key, worker, generation, last: now, unseen: true });
        }
    }

    /// The flow is not idle, its worker lives and has not had its time.
    fn must_stay(&self, group: GroupId, seen: &Seen, now: u64, kernel: &Kernel, workers: &Workers) -> bool {
        let Seen { worker, generation, last, .. } = *seen;
        let plan = self.protocol.plans.get(&generation);
        let own = plan.and_then(|plan| plan.flow_groups.iter().find(|(of, _)| *of == group));
        let remembered = kernel.groups.get(&group).and_then(|group| group.flows.timeout);
        let (Some((_, own)), Some(remembered)) = (own, remembered) else { return false };
        let timeout = Duration::from_nanos(remembered).min(*own);
        let is_idle = Duration::from_nanos(now - last) >= timeout;
        let reads = workers.get(&worker).is_some_and(|w| w.runs && !w.deserted);
        let life = self.protocol.lives.get(&worker);
        let serves = life.is_some_and(|life| {
            life.ready && !life.replaced && life.stopped.is_none() && life.exited.is_none()
        });
        let is_late = life.is_none_or(|life| now >= self.flows_until(life));
        let ends = self.protocol.is_stopping() || self.protocol.first_failed;
        !is_idle && reads && serves && !is_late && !ends
    }

    /// Until then at least flows stay with a worker on its way out.
    fn flows_until(&self, life: &Life) -> u64 {
        let drain = self.protocol.plans[&life.generation].drain_timeout;
        let patience = drain - (drain / 2).min(Duration::from_secs(1));
        let patience = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX);
        life.retired.map_or(u64::MAX, |retired| retired + patience)
    }

    /// Nobody is told to stop, or loses its key, while flows go on there.
    pub(crate) fn judge_flows(&mut self, command: &Command, now: u64, kernel: &Kernel, workers: &Workers) {
        let is_its = |socket: &Socket, worker: WorkerId| {
            socket.owner == Some(worker) && kernel.takes_datagrams(socket.group)
        };
        let ended: Vec<(GroupId, u32)> = match command {
            Command::Evict { group, key } => vec![(*group, *key)],
            // Another worker of the seat may have it from now on: what it gets next says whose the flows are.
            Command::Admit { listener, key } => {
                let group = kernel.sockets[listener].group;
                self.datagrams.flows.retain(|(of, _), seen| *of != group || seen.key != *key);
                return;
            }
            Command::Observe { group } => {
                let looks = self.datagrams.looks.entry(*group).or_default();
                *looks += 1;
                if *looks > 1 {
                    return;
                }
                let of_group = self.datagrams.flows.iter_mut().filter(|((of, _), _)| of == group);
                of_group.for_each(|(_, seen)| seen.unseen = false);
                return;
            }
            // Nothing is known of what the last master did last.
            Command::KeepKeys { group, kept } => {
                let is_kept = |of: &GroupId, seen: &Seen| of != group || kept.contains(&seen.key);
                self.datagrams.flows.retain(|(of, _), seen| is_kept(of, seen));
                return;
            }
            Command::Signal { worker, signal: reuseportd_core::Signal::Stop }
            | Command::Tell { worker, order: reuseportd_core::Order::Stop } => {
                let of_worker = kernel.sockets.values().filter(|socket| is_its(socket, *worker));
                of_worker.filter_map(|socket| Some((socket.group, socket.key?))).collect()
            }
            _ => return,
        };
        for ((group, source), seen) in &self.datagrams.flows {
            let is_ended = ended.contains(&(*group, seen.key)) && kernel.takes_datagrams(*group);
            if is_ended {
                let stays = !seen.unseen && self.must_stay(*group, seen, now, kernel, workers);
                assert!(!stays, "{command:?}, but flow {source} goes on there: {seen:?}");
            }
        }
        self.datagrams.flows.retain(|(group, _), seen| !ended.contains(&(*group, seen.key)));
        if let Command::Evict { group, key } = command
            && let Some(flows) = kernel.groups.get(group).map(|group| &group.flows)
            && kernel.takes_datagrams(*group)
            && !self.protocol.is_stopping()
            && flows.timeout.is_some()
        {
            let is_idle =
                flows.timeout.is_some_and(|limit| flows.quiet(*key, now).as_nanos() >= limit.into());
            self.datagrams.tally.idle += u64::from(is_idle);
            self.datagrams.tally.late += u64::from(!is_idle);
        }
    }

    pub(crate) fn looked(&mut self, group: GroupId) {
        let looks = self.datagrams.looks.entry(group).or_default();
        *looks = looks.saturating_sub(1);
    }

    pub(crate) fn read(&mut self, datagram: u64) {
        let was_sent = self.datagrams.sent.remove(&datagram).is_some();
        self.datagrams.tally.read += u64::from(was_sent);
    }

    /// Nobody will read it.
    pub(crate) fn dropped(&mut self, dropped: Dropped, kernel: &Kernel, workers: &Workers) {
        let Dropped { datagram, listener, counted } = dropped;
        let socket = &kernel.sockets[&listener];
        let sent = self.datagrams.sent.remove(&datagram);
        if counted {
            *self.datagrams.untold.entry(socket.group).or_default() += 1;
        }
        let is_known = !self.doomed.contains(&listener) && !self.unsure.contains(&socket.group);
        let is_excused = sent.is_none_or(|sent| sent.excused) || !is_known;
        if is_excused || self.protocol.is_stopping() || self.engine == Engine::None {
            self.datagrams.tally.excused += 1;
            return;
        }
        let last = self.last_worker(socket, workers);
        let was_cut = last.is_none_or(|id| {
            let worker = &workers[&id];
            let is_told = worker.temper.handover && worker.temper.stop == StopHow::Hasty;
            let is_cut = !worker.runs && !self.protocol.has_left(id);
            let is_hasty = matches!(worker.temper.stop, StopHow::AtOnce) && worker.temper.handover;
            // A seat that nobody sat on.
            let is_vacant = socket.seat.is_some() && !self.protocol.is_ready(id);
            // A master of which nothing is left had told it to stop.
            let is_forgotten = worker.orphan && worker.drained && !self.protocol.has_left(id);
            worker.deserted
                || is_forgotten
                || is_cut
                || is_vacant
                || worker.mute.is_some()
                || is_told
                || is_hasty
        });
        assert!(was_cut, "datagram {datagram} in {listener:?} was never read: {sent:?}, {socket:?}");
        assert!(
            counted,
            "datagram {datagram} in {listener:?} was lost and not counted: {sent:?}, {socket:?}"
        );
        self.datagrams.tally.counted += 1;
    }

    pub(crate) fn told_of_datagrams(&mut self, report: &Report) {
        if let Report::Ended(receipt) = report
            && self.protocol.is_new(receipt)
            && receipt.outcome == Outcome::Completed
        {
            let goes_on = |life: &&Life| {
                Some(life.generation) == receipt.from && life.stopped.is_none() && life.exited.is_none()
            };
            let is_there = self.protocol.lives.values().any(|life| goes_on(&life));
            self.datagrams.tally.complete += u64::from(is_there);
        }
        // What was counted is told.
        if let Report::DatagramsLost(group, count) = report {
            let untold = self.datagrams.untold.entry(*group).or_default();
            assert!(*count > 0 && *untold >= *count, "{report:?}, but it was {untold}");
            *untold -= count;
        }
    }

    /// After an event and all that followed from it.
    pub(crate) fn judge_datagrams(&self) {
        // Of the last sockets nobody is told any more.
        if self.protocol.exit.is_some() {
            return;
        }
        let untold = self.datagrams.untold.iter().find(|(_, count)| **count > 0);
        assert!(untold.is_none(), "{untold:?} datagrams were lost and nobody is told");
    }

    /// No way out takes longer than the drain.
    pub(crate) fn judge_patience(&self, now: u64) {
        for (id, life) in &self.protocol.lives {
            let drain = self.protocol.plans[&life.generation].drain_timeout;
            let is_late = |retired| Duration::from_nanos(now - retired) >= drain;
            let lives = life.exited.is_none() && !life.killed && life.answered == Some(true);
            assert!(!lives || !life.retired.is_some_and(is_late), "{id:?} lives on: {life:?}");
        }
    }

    /// Those of the last master that nobody heard of.
    pub(crate) fn forget_untold(&mut self) {
        self.datagrams.untold.clear();
        self.datagrams.looks.clear();
    }

    pub(crate) fn waits_for_ever(&self, datagram: u64) -> bool {
        self.datagrams.sent.get(&datagram).is_some_and(|sent| !sent.excused)
    }

    /// By processor each seat has its own place: its keys, or a slot, which is another's only while it serves nobody.
    pub(crate) fn judge_policy(&mut self, group: GroupId, kernel: &Kernel, workers: &Workers) {
        let is_known = !self.disturbed.contains_key(&group) && !self.unsure.contains(&group);
        let Some(of_group) = kernel.groups.get(&group).filter(|_| is_known) else { return };
        let seat = |listener: &ListenerId| {
            let socket = &kernel.sockets[listener];
            socket.seat.or(socket.owner.map(|owner| workers[&owner].seat)).map(|seat| u32::from(seat.0))
        };
        match &of_group.program {
            Program::Ranges(ranges) => {
                for range in ranges {
                    let is_by_cpu = self.protocol.plans[&range.generation].policy == Policy::Cpu;
                    assert_eq!(range.step > 0, is_by_cpu, "{group:?}: {range:?}");
                    if !is_by_cpu {
                        continue;
                    }
                    self.datagrams.tally.by_cpu += 1;
                    let places = usize::try_from(range.count / range.step).unwrap_or(usize::MAX);
                    assert_eq!(range.count % range.step, 0, "{group:?}: {range:?}");
                    assert!(self.may_have_places(range.generation, places), "{group:?}: {range:?}");
                    let keys = of_group.keys.range(range.base..range.base + range.count);
                    let mut firsts = keys.filter_map(|(key, listener)| {
                        Some(i64::from(seat(listener)?) - i64::from((key - range.base) / range.step))
                    });
                    let first = firsts.next();
                    let is_by_seat = firsts.all(|other| Some(other) == first);
                    assert!(is_by_seat, "{group:?}: {range:?}: not by seats: {:?}", of_group.keys);
                }
            }
            Program::Slots(shares) => {
                for share in shares.iter().filter(|share| share.policy == Policy::Cpu) {
                    self.datagrams.tally.by_cpu += 1;
                    let at = |slot: &u16| of_group.slots.get(usize::from(*slot));
                    let sock = |slot: &u16| at(slot).map(|listener| &kernel.sockets[listener]);
                    let seats: Vec<Option<u32>> = share.slots.iter().map(|s| at(s).and_then(seat)).collect();
                    let of: BTreeSet<Generation> = share
                        .slots
                        .iter()
                        .filter_map(sock)
                        .flat_map(|s| self.generations(s, workers))
                        .collect();
                    let is_complete = of.iter().any(|of| self.may_have_places(*of, seats.len()));
                    assert!(
                        is_complete && is_in_order(&seats, self.protocol.phases.way.is_some()),
                        "{group:?}: {share:?} are those of {seats:?}"
                    );
                }
            }
            Program::Hash => {}
        }
    }

    /// So many seats may have a place in the program: all, or those that a batch leaves, or brings.
    fn may_have_places(&self, generation: Generation, places: usize) -> bool {
        let seats = self.protocol.plans[&generation].workers;
        let Some(way) = self.protocol.phases.way.as_ref() else { return places == usize::from(seats) };
        let of_launched = &self.protocol.plans[&way.to];
        let next = way.rolled.saturating_add(of_launched.batch.unwrap_or(0)).min(of_launched.workers);
        let rolled = |launched: u16| match generation == way.to {
            true => launched,
            false => seats - launched.min(seats - 1),
        };
        [seats, rolled(way.rolled), rolled(next)].iter().any(|may| usize::from(*may) == places)
    }
}

/// Each place is its seat's, counted from some first one, or that of a seat that has another place of its own.
fn is_in_order(seats: &[Option<u32>], by_batches: bool) -> bool {
    let fits = |first: u32| {
        // While batches replace the first seats, those still stand in for the others.
        let stands_in = |seat: &u32| by_batches && *seat < first;
        let own = |(place, seat): (u32, &Option<u32>)| *seat == Some(first + place);
        let placed: Vec<u32> = (0..).zip(seats).filter(|at| own(*at)).filter_map(|(_, seat)| *seat).collect();
        !placed.is_empty() && seats.iter().flatten().all(|seat| placed.contains(seat) || stands_in(seat))
    };
    (0..8).any(fits)
}
