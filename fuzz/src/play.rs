//! The core with nobody behind it: whatever is thrown at it, it must neither panic nor go on for ever.

use std::collections::{BTreeMap, VecDeque};
use std::panic;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use reuseportd_core::{
    Command, Depth, Engine, Event, Exit, Found, Generation, GroupId, GroupView, ListenerId, Master, Member,
    Problem, Report, StopMode, Time, Trigger, Verdict, WorkerId,
};

use crate::happening::{self, GROUPS};

/// More commands than this for one event are without end: there are a few dozen workers and listeners.
const COMMANDS_MAX: usize = 4096;
/// Deadlines that are kept in one go.
const DEADLINES_MAX: usize = 64;
/// Events of one story.
const EVENTS_MAX: usize = 400;

/// A core, and what it waits for.
pub(crate) struct Play {
    master: Master,
    now: Time,
    /// Commands that an event answers.
    unanswered: VecDeque<Command>,
    /// What listens in each group.
    members: BTreeMap<GroupId, Vec<ListenerId>>,
    /// The last number a listener got: they are the shell's, and none is given twice.
    last_listener: u32,
    /// Without it the core is only asked not to panic.
    is_checked: bool,
}

/// A story of arbitrary events, and of answers that fit.
///
/// # Errors
/// When it has been told to its end.
pub fn story(of: &mut Unstructured<'_>) -> Result<()> {
    let engine = *of.choose(&[Engine::Ebpf, Engine::Cbpf, Engine::None])?;
    let mut play = Play::new(Master::new(engine), true);
    for _ in 0..EVENTS_MAX {
        if of.is_empty() {
            break;
        }
        match of.int_in_range(0..=15)? {
            // Most of the time the shell does what it is told.
            0..=5 => play.answer(of)?,
            6 => play.answer_all(of)?,
            7 => play.pass(Duration::from_millis(of.int_in_range(0..=2000)?)),
            8 => play.keep_deadline(),
            9 => play.reread(),
            10 => {
                let plan = happening::plan(of, engine)?;
                play.tell(Event::Upgrade { plan, trigger: Trigger::Command, by: happening::caller(of)? });
            }
            _ => {
                let event = happening::event(of, engine, &mut play.last_listener)?;
                play.tell(event);
            }
        }
    }
    Ok(())
}

/// What a master does with a memory that it has read: first this event, then all that follows from it, then a stop.
pub(crate) fn go_on(master: Master, event: Event) {
    if !is_consistent(&master) {
        return;
    }
    let mut play = Play::new(master, false);
    for event in [event, Event::Deadline, Event::Stop { mode: StopMode::Graceful, by: None }] {
        play.tell(event);
        for _ in 0..DEADLINES_MAX {
            let _ = play.answer_all(&mut Unstructured::new(&[]));
            play.keep_deadline();
        }
    }
}

/// What a master does with orphans that a journal names, and an upgrade away from them.
pub(crate) fn orphans(engine: Engine, generation: Generation, count: u16, slots: Vec<Vec<u64>>) {
    let none = &mut Unstructured::new(&[]);
    let Ok(plan) = happening::plan(none, engine) else { return };
    let mut play = Play::new(Master::new(engine), true);
    let workers = (1..=count).map(|n| (WorkerId(n.into()), vec![(GroupId(0), play.fresh())])).collect();
    let slots = (0..GROUPS).map(GroupId).zip(slots).collect();
    let plan = reuseportd_core::Plan { workers: count.max(1), configured: count.max(1), ..plan };
    play.tell(Event::Orphans { generation, plan: plan.clone(), workers, slots });
    play.tell(Event::Upgrade { plan, trigger: Trigger::Orphans, by: None });
    for _ in 0..DEADLINES_MAX {
        let _ = play.answer_all(none);
        play.keep_deadline();
    }
}

/// Whether [`Master::check`] finds nothing.
fn is_consistent(master: &Master) -> bool {
    // The fuzzer's own hook ends the process.
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let checked = panic::catch_unwind(panic::AssertUnwindSafe(|| master.check()));
    panic::set_hook(hook);
    checked.is_ok()
}

impl Play {
    fn new(master: Master, is_checked: bool) -> Play {
        Play {
            master,
            now: Time(1_000_000_000_000),
            unanswered: VecDeque::new(),
            members: BTreeMap::new(),
            last_listener: 0,
            is_checked,
        }
    }

    fn fresh(&mut self) -> ListenerId {
        happening::fresh(&mut self.last_listener)
    }

    fn tell(&mut self, event: Event) {
        self.master.handle(event, self.now);
        let mut count = 0;
        while let Some(command) = self.master.next_command() {
            count += 1;
            assert!(count <= COMMANDS_MAX, "no end of commands: {command:?}");
            self.note(command);
        }
        if self.is_checked {
            self.master.check();
        }
        let _ = (self.master.status(), self.master.state(), self.master.slots(), self.master.before());
    }

    fn note(&mut self, command: Command) {
        if let Command::Release { listener, .. } = command {
            self.members.values_mut().for_each(|members| members.retain(|member| *member != listener));
        }
        if let Command::Report(Report::Bug(what)) = command {
            assert!(!what.is_empty());
            return;
        }
        let is_answered = matches!(
            command,
            Command::Spawn { .. }
                | Command::Bind { .. }
                | Command::Find { .. }
                | Command::Prove { .. }
                | Command::Listen { .. }
                | Command::Admit { .. }
                | Command::Steer { .. }
                | Command::Attach { .. }
                | Command::Anchor { .. }
                | Command::Owns { .. }
                | Command::CheckRemains { .. }
                | Command::Discard { .. }
                | Command::Observe { .. }
                | Command::Count { .. }
                | Command::Check { .. }
                | Command::Preflight
                | Command::Reexec
                | Command::Save
                | Command::Tell { .. }
                | Command::Signal { .. }
        );
        if is_answered {
            self.unanswered.push_back(command);
        }
    }

    /// Answers one command, and well unless the story says otherwise.
    fn answer(&mut self, of: &mut Unstructured<'_>) -> Result<()> {
        let last = self.unanswered.len().saturating_sub(1);
        let at = of.int_in_range(0..=last.min(7))?;
        let Some(command) = self.unanswered.remove(at) else { return Ok(()) };
        if let Some(event) = self.answer_to(command, of)? {
            self.tell(event);
        }
        Ok(())
    }

    /// Answers what is unanswered by now, but not what comes of that.
    fn answer_all(&mut self, of: &mut Unstructured<'_>) -> Result<()> {
        for command in std::mem::take(&mut self.unanswered) {
            if let Some(event) = self.answer_to(command, of)? {
                self.tell(event);
            }
        }
        Ok(())
    }

    fn answer_to(&mut self, command: Command, of: &mut Unstructured<'_>) -> Result<Option<Event>> {
        // At the end of the story all goes well.
        let fails = of.int_in_range(0..=7)? == 7;
        let result = if fails { Err(22) } else { Ok(()) };
        Ok(Some(match command {
            Command::Spawn { worker, .. } if fails => Event::SpawnFailed { worker, errno: 12 },
            Command::Spawn { worker, .. } => Event::Spawned { worker },
            Command::Bind { group, worker, .. } => {
                let listener = self.fresh();
                if !fails {
                    self.members.entry(group).or_default().push(listener);
                }
                Event::Bound { group, worker, result: result.map(|()| listener) }
            }
            Command::Find { worker } if fails => {
                Event::Found { worker, found: Found::NotYet(Problem::NotAccepting) }
            }
            Command::Find { worker } => {
                let listeners: Vec<_> = (0..GROUPS).map(|group| (GroupId(group), self.fresh())).collect();
                for (group, listener) in &listeners {
                    self.members.entry(*group).or_default().push(*listener);
                }
                Event::Found { worker, found: Found::All(listeners) }
            }
            Command::Prove { worker } => {
                let verdict = if fails { Verdict::Failed } else { Verdict::Passed };
                Event::Proved { worker, verdict }
            }
            Command::Listen { listener } => {
                if let (Some(group), Ok(())) = (self.group_of(listener), result) {
                    self.members.entry(group).or_default().push(listener);
                }
                Event::Listening { listener, result }
            }
            Command::Admit { listener, .. } => Event::Admitted { listener, result },
            Command::Steer { group, .. } | Command::Attach { group, .. } => Event::Steered { group, result },
            Command::Anchor { listener } => Event::Anchored { listener, result },
            Command::Owns { listener, .. } => Event::Owned { listener, owned: fails },
            Command::CheckRemains { worker } => Event::Remains { worker, left: fails },
            Command::Discard { group, generation, .. } => Event::Discarded { group, generation, count: 1 },
            Command::Observe { group } => Event::Observed { group, view: self.view(group, of)? },
            Command::Count { workers } => {
                let open = of.int_in_range(0..=2)?;
                Event::Counted { connections: workers.into_iter().map(|worker| (worker, open)).collect() }
            }
            Command::Check { run, .. } => {
                let failure = fails.then_some(reuseportd_core::CheckFailure::Late);
                Event::Checked { run, failure }
            }
            Command::Preflight => Event::Preflighted { readable: !fails },
            Command::Reexec => Event::Reexecuted { done: !fails },
            Command::Save => Event::Saved,
            // A worker that does not do what it is told.
            Command::Tell { .. } | Command::Signal { .. } if fails => return Ok(None),
            Command::Tell { worker, order: reuseportd_core::Order::Stop } => Event::Drained { worker },
            Command::Signal { worker, .. } => {
                Event::Exited { worker, how: Exit::Code(0), remains: of.int_in_range(0..=7)? == 7 }
            }
            _ => return Ok(None),
        }))
    }

    fn group_of(&self, listener: ListenerId) -> Option<GroupId> {
        let status = self.master.status();
        let workers = status.generations.iter().flat_map(|generation| &generation.workers);
        workers.flat_map(|worker| &worker.listeners).find(|one| one.listener == listener).map(|one| one.group)
    }

    fn view(&self, group: GroupId, of: &mut Unstructured<'_>) -> Result<GroupView> {
        let known = self.members.get(&group).into_iter().flatten();
        let queued = of.int_in_range(0..=3)?;
        let depth =
            Depth { queued, backlog: 128, drops: Some(0), quiet: Some(Duration::from_secs(queued.into())) };
        let mut members: Vec<Member> =
            known.clone().map(|id| Member { cookie: u64::from(id.0), listener: Some(*id) }).collect();
        if of.int_in_range(0..=7)? == 7 {
            members.push(Member { cookie: u64::MAX, listener: None });
        }
        Ok(GroupView {
            members,
            depths: known.map(|id| (*id, depth)).collect(),
            half_open: (0..of.int_in_range(0..=2)?).collect(),
            ..GroupView::default()
        })
    }

    /// So much time passes, and the deadlines in it are kept.
    fn pass(&mut self, time: Duration) {
        let until = self.now.after(time);
        for _ in 0..DEADLINES_MAX {
            let Some(due) = self.master.next_deadline().filter(|due| *due <= until) else { break };
            self.now = due.max(self.now);
            self.tell(Event::Deadline);
        }
        self.now = until.max(self.now);
    }

    /// Waits for the next deadline, however long that is.
    fn keep_deadline(&mut self) {
        let Some(due) = self.master.next_deadline() else { return };
        self.now = due.max(self.now);
        self.tell(Event::Deadline);
    }

    /// The memory is written down and read again.
    fn reread(&mut self) {
        let text = serde_json::to_string(&self.master).expect("plain data");
        self.master = serde_json::from_str(&text).expect("what was written is read");
    }
}
