//! A shell with nothing behind it: every command succeeds at once, unless the test says otherwise.

use reuseportd_core::{
    Breaker, Command, Depth, Engine, Event, Exit, Found, GroupId, GroupView, ListenerId, Master, Member,
    Plan, Policy, Problem, Readiness, StopWhen, Time, Trigger, Verdict, WorkerId,
};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// The only group.
pub(crate) const GROUP: GroupId = GroupId(0);
/// The time at which every story begins.
const BEGIN: Duration = Duration::from_secs(1000);

pub(crate) struct Shell {
    pub(crate) master: Master,
    pub(crate) now: Time,
    /// Everything commanded so far.
    pub(crate) said: Vec<Command>,
    /// What waits in every listener when the group is looked at.
    pub(crate) queued: u32,
    /// How long no datagram of a flow has come to any listener.
    pub(crate) quiet: Option<Duration>,
    /// Datagrams that are found in a listener when they are thrown away.
    pub(crate) unread: u32,
    /// Shown instead when the group is looked at.
    pub(crate) shown: Option<GroupView>,
    /// Open connections of every worker.
    pub(crate) open: u32,
    /// The answer to `Steer` and `Attach`.
    pub(crate) steers: Result<(), i32>,
    /// The answer to `Admit`.
    pub(crate) admits: Result<(), i32>,
    /// The answer to `Prove`.
    pub(crate) verdict: Verdict,
    /// The answer to `Anchor`.
    pub(crate) anchors: Result<(), i32>,
    /// `Prove` is answered.
    pub(crate) answers: bool,
    /// `Save` is answered at once.
    pub(crate) keeps: bool,
    /// The master is killed before the answer to these.
    pub(crate) is_unanswered: fn(&Command) -> bool,
    /// Some process holds each socket for ever.
    pub(crate) is_kept: bool,
    /// The sockets of workers do: they are in the group from `bind()` on.
    pub(crate) takes_datagrams: bool,
    pub(crate) members: Vec<ListenerId>,
    /// Who bound each listener, until that worker has closed it.
    pub(crate) owners: BTreeMap<ListenerId, u32>,
    pub(crate) listeners: u32,
}

impl Shell {
    pub(crate) fn new(engine: Engine) -> Shell {
        Shell {
            master: Master::new(engine),
            now: Time(0).after(BEGIN),
            said: Vec::new(),
            queued: 0,
            quiet: None,
            unread: 0,
            shown: None,
            open: 0,
            steers: Ok(()),
            admits: Ok(()),
            verdict: Verdict::Passed,
            anchors: Ok(()),
            answers: true,
            keeps: true,
            is_unanswered: |_| false,
            is_kept: false,
            takes_datagrams: false,
            members: Vec::new(),
            owners: BTreeMap::new(),
            listeners: 0,
        }
    }

    /// A service that serves with so many handover workers, 1 to `workers`.
    pub(crate) fn serving(engine: Engine, workers: u16) -> Shell {
        let mut shell = Shell::new(engine);
        shell.upgrade(workers, Trigger::Start);
        for worker in 1..=u32::from(workers) {
            shell.ready(worker);
        }
        shell.said.clear();
        shell
    }

    /// The same with a socket for each seat, which are the first listeners, 1 to `workers`.
    pub(crate) fn serving_seats(engine: Engine, workers: u16) -> Shell {
        let mut shell = Shell::new(engine);
        shell.launch(Shell::plan_of_seats(workers), Trigger::Start);
        for worker in 1..=u32::from(workers) {
            shell.seated(worker);
        }
        shell.said.clear();
        shell
    }

    pub(crate) fn plan_of_seats(workers: u16) -> Plan {
        Plan { seat_groups: vec![GROUP], ..Shell::plan(workers) }
    }

    pub(crate) fn plan(workers: u16) -> Plan {
        let second = Duration::from_secs(1);
        Plan {
            config: u64::from(workers),
            workers,
            configured: workers,
            batch: None,
            canary: Vec::new(),
            bake: Duration::ZERO,
            check_interval: None,
            groups: vec![GROUP],
            seat_groups: Vec::new(),
            datagram_groups: Vec::new(),
            flow_groups: Vec::new(),
            policy: Policy::Hash,
            passes: 1,
            interval: Duration::from_millis(200),
            readiness: Readiness::Notify,
            ready_timeout: second * 60,
            settle_timeout: second * 2,
            stop_when: StopWhen::Auto,
            idle_timeout: second * 2,
            drain_timeout: second * 60,
            max_draining: 4,
            watchdog: None,
            backoff: Duration::from_millis(100),
            backoff_max: second * 10,
            stable_after: second * 10,
            breaker: Breaker { exits: 3, window: second * 60, cooldown: second * 60 },
        }
    }

    pub(crate) fn upgrade(&mut self, workers: u16, trigger: Trigger) {
        self.launch(Shell::plan(workers), trigger);
    }

    pub(crate) fn launch(&mut self, plan: Plan, trigger: Trigger) {
        self.tell(Event::Upgrade { plan, trigger, by: None });
    }

    /// The worker says `ready`; its listeners it has from the master.
    pub(crate) fn seated(&mut self, worker: u32) {
        self.tell(Event::Ready { worker: WorkerId(worker), listeners: Vec::new() });
    }

    /// The worker says `ready` with a new bound socket.
    pub(crate) fn ready(&mut self, worker: u32) -> ListenerId {
        self.listeners += 1;
        let listener = ListenerId(self.listeners);
        self.owners.insert(listener, worker);
        if self.takes_datagrams {
            self.members.push(listener);
        }
        self.tell(Event::Ready { worker: WorkerId(worker), listeners: vec![(GROUP, listener)] });
        listener
    }

    /// The worker closes its listeners and says `drained`.
    pub(crate) fn drains(&mut self, worker: u32) {
        self.owners.retain(|_, owner| *owner != worker);
        self.tell(Event::Drained { worker: WorkerId(worker) });
    }

    pub(crate) fn exits(&mut self, worker: u32, how: Exit) {
        self.owners.retain(|_, owner| *owner != worker);
        self.tell(Event::Exited { worker: WorkerId(worker), how, remains: false });
    }

    /// So much time passes, and every deadline in it is kept.
    pub(crate) fn pass(&mut self, time: Duration) {
        let until = self.now.after(time);
        while let Some(due) = self.master.next_deadline().filter(|due| *due <= until) {
            // Nothing happens any more to a master that has ended.
            if matches!(self.said.last(), Some(Command::Exit { .. })) {
                break;
            }
            self.now = due.max(self.now);
            self.tell(Event::Deadline);
        }
        self.now = until;
    }

    pub(crate) fn tell(&mut self, event: Event) {
        let mut inbox = VecDeque::from([event]);
        while let Some(event) = inbox.pop_front() {
            self.master.handle(event, self.now);
            self.master.check();
            while let Some(command) = self.master.next_command() {
                inbox.extend(self.answer(&command));
                self.said.push(command);
            }
        }
    }

    fn answer(&mut self, command: &Command) -> Option<Event> {
        if (self.is_unanswered)(command) {
            return None;
        }
        Some(match *command {
            Command::Spawn { worker, .. } => Event::Spawned { worker },
            Command::Find { worker } => {
                Event::Found { worker, found: Found::NotYet(Problem::NotListening(GROUP)) }
            }
            Command::Prove { worker } if self.answers => Event::Proved { worker, verdict: self.verdict },
            Command::Bind { group, worker, .. } => {
                self.listeners += 1;
                let listener = ListenerId(self.listeners);
                self.members.push(listener);
                self.owners.insert(listener, worker.0);
                Event::Bound { group, worker, result: Ok(listener) }
            }
            Command::Listen { listener } => {
                self.members.push(listener);
                Event::Listening { listener, result: Ok(()) }
            }
            Command::Admit { listener, .. } => Event::Admitted { listener, result: self.admits },
            Command::Steer { group, .. } | Command::Attach { group, .. } => {
                Event::Steered { group, result: self.steers }
            }
            Command::Anchor { listener } => Event::Anchored { listener, result: self.anchors },
            Command::Owns { listener, .. } => {
                Event::Owned { listener, owned: self.owners.contains_key(&listener) }
            }
            Command::Discard { group, generation, .. } => {
                Event::Discarded { group, generation, count: self.unread }
            }
            Command::Save if self.keeps => Event::Saved,
            Command::CheckRemains { worker } => Event::Remains { worker, left: false },
            Command::Observe { group } => Event::Observed { group, view: self.view() },
            Command::Count { ref workers } => {
                Event::Counted { connections: workers.iter().map(|worker| (*worker, self.open)).collect() }
            }
            Command::Release { listener, .. } => {
                self.members.retain(|member| *member != listener || self.is_kept);
                return None;
            }
            _ => return None,
        })
    }

    fn view(&self) -> GroupView {
        if let Some(view) = &self.shown {
            return view.clone();
        }
        let depth = Depth { queued: self.queued, backlog: 4096, drops: Some(0), quiet: self.quiet };
        let member = |id: &ListenerId| Member { cookie: u64::from(id.0), listener: Some(*id) };
        GroupView {
            members: self.members.iter().map(member).collect(),
            depths: self.members.iter().map(|id| (*id, depth)).collect(),
            migrate_failures: Some(0),
            ..GroupView::default()
        }
    }
}
