//! Everybody outside the service: clients that connect all the time, the operator, and strangers on the same port.

use crate::kernel::{Choice, Holder};
use crate::trial::Trials;
use crate::world::{Happening, MS, World};
use reuseportd_core::{
    Breaker, Engine, Event, GroupId, Plan, Policy, Readiness, Report, StopMode, StopWhen, Ticket, Trigger,
    Wait,
};
use std::time::Duration;

impl World {
    pub(crate) fn next_client(&mut self) {
        let burst = if self.rng.permille(10) { self.rng.between(5, 30) } else { 1 };
        for _ in 0..burst {
            self.connect();
        }
        if self.clients {
            let pause = self.rng.below(2 * self.pace);
            self.later(pause, Happening::Client);
        }
    }

    /// A datagram of one of the flows of this time.
    fn send(&mut self, group: GroupId) {
        let (flows, lasts) = self.sources;
        let source = self.now / lasts * flows + self.rng.below(flows);
        let (datagram, choice) = self.kernel.datagram(group, source, self.now, &mut self.rng);
        self.trace(format_args!("      datagram {datagram} of {source} {group:?} {choice:?}"));
        let (now, kernel, workers) = (self.now, &self.kernel, &self.workers);
        self.oracle.sent((datagram, source), group, choice, now, kernel, workers);
    }

    /// The program forgets flows that were idle for as long as the generation that serves wants it.
    pub(crate) fn remember_flows(&mut self, report: &Report) {
        let generation = match report {
            Report::Switched(generation) => Some(*generation),
            Report::SteeredBack(..) => self.master.status().active,
            _ => None,
        };
        let Some(plan) = generation.map(|generation| &self.plans[&generation]) else { return };
        for group in &plan.groups {
            let own = plan.flow_groups.iter().find(|(of, _)| of == group);
            let timeout = own.and_then(|(_, timeout)| u64::try_from(timeout.as_nanos()).ok());
            self.kernel.group(*group).flows.timeout = timeout;
        }
    }

    /// One SYN; if it is answered, the handshake ends a little later, and sometimes much later.
    pub(crate) fn connect(&mut self) {
        let group = GroupId(u16::try_from(self.rng.below(u64::from(self.groups))).unwrap_or(0));
        if self.kernel.takes_datagrams(group) {
            return self.send(group);
        }
        let (connection, choice) = self.kernel.syn(group, &mut self.rng);
        self.trace(format_args!("      syn {connection} {group:?} {choice:?}"));
        self.oracle.chosen(connection, group, choice, self.now, &self.kernel, &self.workers);
        if choice == Choice::Refused {
            return;
        }
        let takes = match self.rng.below(1000) {
            0..=4 => self.rng.between(1, 4000) * MS,
            5..=100 => self.rng.between(1, 190) * MS,
            _ => self.rng.below(20 * MS),
        };
        self.oracle.handshake(connection, takes);
        self.later(takes, Happening::Handshake(connection));
    }

    /// A plan of small numbers, so that everything happens within seconds.
    pub(crate) fn draw_plan(&mut self) -> Plan {
        let (seated, rng) = (self.seated, &mut self.rng);
        let mut groups: Vec<GroupId> = (0..self.groups).map(GroupId).collect();
        if groups.len() > 1 && rng.permille(300) {
            groups.remove(rng.index(groups.len()));
        }
        let millis = |low, high, rng: &mut crate::rng::Rng| Duration::from_millis(rng.between(low, high));
        // Mostly all of them are of one kind, and a kind seldom changes.
        let seated = if rng.permille(100) { 500 } else { seated };
        let seat_groups: Vec<GroupId> = groups.iter().copied().filter(|_| rng.permille(seated)).collect();
        let workers = u16::try_from(rng.between(1, 4)).unwrap_or(1);
        let is_kept = |group: &&GroupId| {
            let keeps = self.engine == Engine::Ebpf && !seat_groups.contains(group);
            keeps && self.kernel.takes_datagrams(**group)
        };
        let own: Vec<GroupId> = groups.iter().filter(is_kept).copied().collect();
        let has_affinity = rng.permille(700);
        let timeout = millis(100, 1500, rng);
        let flow_groups = own.into_iter().filter(|_| has_affinity).map(|group| (group, timeout)).collect();
        let datagram_groups =
            groups.iter().filter(|group| self.kernel.takes_datagrams(**group)).copied().collect();
        let policy = if rng.permille(250) { Policy::Cpu } else { Policy::Hash };
        let Trials { batch, canary, bake, check_interval } = Trials::draw(rng, seat_groups.is_empty());
        Plan {
            config: rng.next(),
            workers,
            configured: workers,
            batch,
            canary,
            bake,
            check_interval,
            groups,
            seat_groups,
            datagram_groups,
            flow_groups,
            policy,
            passes: u16::try_from(rng.between(1, 3)).unwrap_or(1),
            interval: millis(10, 60, rng),
            readiness: [Readiness::Notify, Readiness::Listen, Readiness::Http][rng.index(3)],
            ready_timeout: millis(500, 3000, rng),
            settle_timeout: millis(200, 1000, rng),
            stop_when: [StopWhen::Auto, StopWhen::Drained, StopWhen::Idle][rng.index(3)],
            idle_timeout: millis(50, 1000, rng),
            drain_timeout: millis(2000, 5000, rng),
            max_draining: u16::try_from(rng.between(1, 3)).unwrap_or(1),
            watchdog: rng.permille(300).then(|| millis(300, 1500, rng)),
            backoff: millis(50, 200, rng),
            backoff_max: millis(400, 2000, rng),
            stable_after: millis(1000, 3000, rng),
            breaker: Breaker {
                exits: u16::try_from(rng.between(3, 10)).unwrap_or(3),
                window: Duration::from_secs(5),
                cooldown: Duration::from_secs(3),
            },
        }
    }

    /// A ticket for a client that waits.
    pub(crate) fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    /// Launches what the dice say, good or bad.
    pub(crate) fn upgrade(&mut self, trigger: Trigger) {
        // Often only the program is another.
        let plan = match self.plan.clone().filter(|_| self.rng.permille(300)) {
            Some(plan) => plan,
            None => self.draw_plan(),
        };
        self.bad = [0, 0, 100, 400, 1000][self.rng.index(5)];
        self.handover = [0, 0, 1000, 1000, 500][self.rng.index(5)];
        let by = (trigger == Trigger::Command)
            .then(|| (self.ticket(), if self.rng.permille(500) { Wait::Retired } else { Wait::Drained }));
        self.plan = Some(plan.clone());
        self.tell(Event::Upgrade { plan, trigger, by });
        if self.rng.permille(100) {
            self.tell(Event::Hurry);
        }
    }

    pub(crate) fn next_operation(&mut self) {
        if !self.faults {
            return;
        }
        match self.rng.below(70) {
            0 => self.stop(StopMode::Graceful),
            1 => self.stop(StopMode::Fast),
            2..=6 => {
                let by = self.rng.permille(700).then(|| self.ticket());
                self.tell(Event::Reexec { by });
            }
            7..=24 => self.upgrade(Trigger::Signal),
            25..=44 => self.upgrade(Trigger::Command),
            45..=49 => self.roll_back(),
            50..=59 => self.scale(),
            _ => self.replace(),
        }
        // Several at once, in the middle of another, or with time between.
        let pause = [0, 20, 500, 3000, 6000][self.rng.index(5)] * MS;
        let pause = self.rng.below(pause + 1);
        self.later(pause, Happening::Operator);
    }

    pub(crate) fn stop(&mut self, mode: StopMode) {
        let by = self.rng.permille(500).then(|| self.ticket());
        self.tell(Event::Stop { mode, by });
    }

    pub(crate) fn next_stranger(&mut self) {
        if let Some(listener) = self.strangers.pop() {
            self.kernel.close(listener, Holder::Stranger, &mut self.rng);
        } else if self.faults {
            let group = GroupId(u16::try_from(self.rng.below(u64::from(self.groups))).unwrap_or(0));
            let listener = self.kernel.bind(group, None, Holder::Stranger);
            if self.kernel.listen(listener).is_ok() {
                self.strangers.push(listener);
            }
        }
        if self.faults {
            let pause = self.rng.between(100, 8000) * MS;
            self.later(pause, Happening::Stranger);
        }
    }
}
