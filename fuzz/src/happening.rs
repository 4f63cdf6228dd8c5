//! Events, and plans as the config would let them pass.

use std::time::Duration;

use arbitrary::{Result, Unstructured};
use reuseportd_core::{
    Breaker, CanaryStep, CheckFailure, Depth, Engine, Event, Exit, Found, Generation, GroupId, GroupView,
    ListenerId, Member, Number, Plan, Policy, Problem, Readiness, Seat, StopMode, StopWhen, Ticket, Trigger,
    Verdict, Wait, WorkerId,
};

/// Groups that plans name; events name one more.
pub(crate) const GROUPS: u16 = 3;

/// A listener that nobody has heard of.
pub(crate) fn fresh(last: &mut u32) -> ListenerId {
    *last += 1;
    ListenerId(*last)
}

fn worker(of: &mut Unstructured<'_>) -> Result<WorkerId> {
    of.int_in_range(0..=24).map(WorkerId)
}

fn group(of: &mut Unstructured<'_>) -> Result<GroupId> {
    of.int_in_range(0..=GROUPS).map(GroupId)
}

/// One that was heard of, or nearly.
fn listener(of: &mut Unstructured<'_>, last: u32) -> Result<ListenerId> {
    of.int_in_range(0..=last.saturating_add(1)).map(ListenerId)
}

fn ticket(of: &mut Unstructured<'_>) -> Result<Option<Ticket>> {
    let number = of.int_in_range(0..=3)?;
    Ok((number > 0).then_some(Ticket(number)))
}

pub(crate) fn caller(of: &mut Unstructured<'_>) -> Result<Option<(Ticket, Wait)>> {
    let wait = *of.choose(&[Wait::Retired, Wait::Drained])?;
    Ok(ticket(of)?.map(|ticket| (ticket, wait)))
}

fn result(of: &mut Unstructured<'_>) -> Result<core::result::Result<(), i32>> {
    Ok(if of.arbitrary()? { Ok(()) } else { Err(i32::from(of.arbitrary::<u8>()?)) })
}

fn span(of: &mut Unstructured<'_>) -> Result<Duration> {
    let ms = *of.choose(&[0, 1, 50, 999, 60_000, u64::from(u32::MAX)])?;
    Ok(Duration::from_millis(ms))
}

/// Above zero.
fn wait(of: &mut Unstructured<'_>) -> Result<Duration> {
    Ok(span(of)?.max(Duration::from_millis(1)))
}

fn exit(of: &mut Unstructured<'_>) -> Result<Exit> {
    Ok(*of.choose(&[Exit::Code(0), Exit::Code(1), Exit::Signal(9), Exit::Unknown])?)
}

fn problem(of: &mut Unstructured<'_>) -> Result<Problem> {
    let group = group(of)?;
    Ok(*of.choose(&[
        Problem::NotListening(group),
        Problem::WrongAddress(group),
        Problem::NoReuseport(group),
        Problem::NotAccepting,
        Problem::NotHealthy,
        Problem::NotPermitted(group),
        Problem::Failed(3),
    ])?)
}

/// Some of the groups.
fn groups(of: &mut Unstructured<'_>, among: &[GroupId]) -> Result<Vec<GroupId>> {
    let bits: u8 = of.int_in_range(0..=7)?;
    Ok(among
        .iter()
        .enumerate()
        .filter(|(index, _)| bits >> index & 1 == 1)
        .map(|(_, group)| *group)
        .collect())
}

/// What the config makes sure of is so here.
pub(crate) fn plan(of: &mut Unstructured<'_>, engine: Engine) -> Result<Plan> {
    let all: Vec<GroupId> = (0..GROUPS).map(GroupId).collect();
    let mut own = groups(of, &all)?;
    if own.is_empty() {
        own.push(GroupId(0));
    }
    let workers = of.int_in_range(1..=4)?;
    let seat_groups = groups(of, &own)?;
    let datagram_groups = groups(of, &own)?;
    let keeps_flows = engine == Engine::Ebpf && of.arbitrary()?;
    let flow = datagram_groups.iter().filter(|group| keeps_flows && !seat_groups.contains(group));
    let flow_groups = flow.map(|group| (*group, Duration::from_secs(2))).collect();
    let steers = engine != Engine::None;
    let may_try = steers && seat_groups.is_empty();
    let (mut batch, mut canary, mut bake) = (None, Vec::new(), Duration::ZERO);
    match of.int_in_range(0..=4)? {
        1 if steers => batch = Some(of.int_in_range(1..=3)?),
        2 if may_try => {
            let hold = wait(of)?;
            canary = vec![CanaryStep { share: 50, hold }, CanaryStep { share: 1000, hold }];
        }
        3 if may_try => bake = wait(of)?,
        _ => {}
    }
    let on_trial = !canary.is_empty() || bake > Duration::ZERO;
    let check_interval = if on_trial && of.arbitrary()? { Some(wait(of)?) } else { None };
    let watchdog = if of.arbitrary()? { Some(Duration::from_millis(100)) } else { None };
    Ok(Plan {
        config: of.int_in_range(0..=2)?,
        workers,
        configured: workers,
        groups: own,
        seat_groups,
        datagram_groups,
        flow_groups,
        policy: if steers { *of.choose(&[Policy::Hash, Policy::Cpu])? } else { Policy::Hash },
        readiness: *of.choose(&[Readiness::Notify, Readiness::Listen, Readiness::Http])?,
        passes: of.int_in_range(1..=2)?,
        interval: wait(of)?,
        ready_timeout: wait(of)?,
        settle_timeout: span(of)?,
        stop_when: *of.choose(&[StopWhen::Auto, StopWhen::Drained, StopWhen::Idle])?,
        idle_timeout: span(of)?,
        drain_timeout: wait(of)?,
        max_draining: of.int_in_range(1..=2)?,
        batch,
        canary,
        bake,
        check_interval,
        watchdog,
        backoff: Duration::from_millis(100),
        backoff_max: wait(of)?.max(Duration::from_millis(100)),
        stable_after: span(of)?,
        breaker: Breaker { exits: of.int_in_range(1..=4)?, window: wait(of)?, cooldown: wait(of)? },
    })
}

/// Anything at all.
pub(crate) fn event(of: &mut Unstructured<'_>, engine: Engine, last: &mut u32) -> Result<Event> {
    match of.int_in_range(0..=2)? {
        0 => wish(of, engine, last),
        1 => of_worker(of, last),
        _ => of_listener(of, *last),
    }
}

fn wish(of: &mut Unstructured<'_>, engine: Engine, last: &mut u32) -> Result<Event> {
    Ok(match of.int_in_range(0..=15)? {
        0 => {
            let triggers = [
                Trigger::Start,
                Trigger::Signal,
                Trigger::Command,
                Trigger::Rollback,
                Trigger::Orphans,
                Trigger::Takeover,
            ];
            Event::Upgrade { plan: plan(of, engine)?, trigger: *of.choose(&triggers)?, by: caller(of)? }
        }
        1 => Event::TakeBack { by: ticket(of)? },
        2 => Event::Hurry,
        3 => Event::Stop { mode: *of.choose(&[StopMode::Graceful, StopMode::Fast])?, by: ticket(of)? },
        4 => {
            let exactly = Number::Exactly(of.int_in_range(0..=6)?);
            Event::Scale { to: *of.choose(&[Number::More, Number::Fewer, exactly])?, by: ticket(of)? }
        }
        5 => Event::Replace { seat: Seat(of.int_in_range(0..=6)?), by: ticket(of)? },
        6 => Event::Reexec { by: ticket(of)? },
        7 => Event::Preflighted { readable: of.arbitrary()? },
        8 => Event::Reexecuted { done: of.arbitrary()? },
        9 => Event::Saved,
        10 => Event::KeeperMissing,
        11 => Event::Supervised { every: if of.arbitrary()? { Some(span(of)?) } else { None } },
        12 => Event::Adopted { lost: vec![listener(of, *last)?, listener(of, *last)?] },
        13 => {
            let found = of.int_in_range(0..=3)?;
            let workers = (1..=found)
                .map(|number| Ok((WorkerId(number), found_listeners(of, last)?)))
                .collect::<Result<Vec<_>>>()?;
            let seats = u16::try_from(found).unwrap_or(1).max(1);
            let plan = Plan { workers: seats, configured: seats, ..plan(of, engine)? };
            let generation = Generation(of.int_in_range(0..=5)?);
            let slots = vec![(group(of)?, vec![of.int_in_range(0..=9)?, of.int_in_range(0..=9)?])];
            Event::Orphans { generation, plan, workers, slots }
        }
        14 => {
            let server = WorkerId(of.int_in_range(1..=3)?);
            let plan = Plan { workers: 1, configured: 1, ..plan(of, engine)? };
            Event::Foreign { plan, server, listeners: found_listeners(of, last)? }
        }
        _ => Event::Deadline,
    })
}

/// New listeners, in some groups or in one that is not known.
fn found_listeners(of: &mut Unstructured<'_>, last: &mut u32) -> Result<Vec<(GroupId, ListenerId)>> {
    let all: Vec<GroupId> = (0..GROUPS).map(GroupId).collect();
    let mut found = match of.int_in_range(0..=2)? {
        0 => groups(of, &all)?,
        1 => vec![group(of)?, group(of)?],
        _ => all,
    };
    Ok(found.drain(..).map(|group| (group, fresh(last))).collect())
}

fn of_worker(of: &mut Unstructured<'_>, last: &mut u32) -> Result<Event> {
    let worker = worker(of)?;
    Ok(match of.int_in_range(0..=14)? {
        0 => Event::Spawned { worker },
        1 => Event::SpawnFailed { worker, errno: 12 },
        2 => Event::Exited { worker, how: exit(of)?, remains: of.arbitrary()? },
        3 | 4 => Event::Ready { worker, listeners: found_listeners(of, last)? },
        5 => Event::Notified { worker },
        6 => Event::Alive { worker },
        7 => Event::Stuck { worker },
        8 => Event::Extended { worker, by: if of.arbitrary()? { span(of)? } else { Duration::MAX } },
        9 => Event::Drained { worker },
        10 => Event::Found { worker, found: Found::All(found_listeners(of, last)?) },
        11 => {
            let problem = problem(of)?;
            let found = if of.arbitrary()? { Found::NotYet(problem) } else { Found::Never(problem) };
            Event::Found { worker, found }
        }
        12 => {
            let verdict = *of.choose(&[Verdict::Passed, Verdict::Waiting, Verdict::Failed])?;
            Event::Proved { worker, verdict }
        }
        13 => Event::Remains { worker, left: of.arbitrary()? },
        _ => {
            let result = result(of)?.map(|()| fresh(last));
            Event::Bound { group: group(of)?, worker, result }
        }
    })
}

fn of_listener(of: &mut Unstructured<'_>, last: u32) -> Result<Event> {
    let listener = listener(of, last)?;
    Ok(match of.int_in_range(0..=10)? {
        0 => Event::Taken { listener, count: of.arbitrary()? },
        1 => Event::Listening { listener, result: result(of)? },
        2 => Event::Admitted { listener, result: result(of)? },
        3 => Event::Anchored { listener, result: result(of)? },
        4 => Event::Owned { listener, owned: of.arbitrary()? },
        5 => Event::Steered { group: group(of)?, result: result(of)? },
        6 => {
            let generation = Generation(of.int_in_range(0..=5)?);
            Event::Discarded { group: group(of)?, generation, count: of.arbitrary()? }
        }
        7 => {
            let failure = if of.arbitrary()? { Some(CheckFailure::Ended(exit(of)?)) } else { None };
            Event::Checked { run: of.int_in_range(0..=4)?, failure }
        }
        8 => Event::Counted { connections: vec![(worker(of)?, of.arbitrary()?), (worker(of)?, 0)] },
        _ => Event::Observed { group: group(of)?, view: view(of, last)? },
    })
}

/// What no kernel would show, too.
fn view(of: &mut Unstructured<'_>, last: u32) -> Result<GroupView> {
    let mut view = GroupView {
        half_open: (0..of.int_in_range(0..=3)?).collect(),
        migrated: if of.arbitrary()? { Some(of.arbitrary()?) } else { None },
        migrate_failures: if of.arbitrary()? { Some(of.arbitrary()?) } else { None },
        migrates_by_hash: of.arbitrary()?,
        ..GroupView::default()
    };
    for _ in 0..of.int_in_range(0..=6)? {
        let id = listener(of, last)?;
        let is_known = of.int_in_range(0..=7)? < 7;
        view.members.push(Member { cookie: u64::from(id.0), listener: is_known.then_some(id) });
        let quiet = if of.arbitrary()? { Some(span(of)?) } else { None };
        view.depths.push((id, Depth { queued: of.int_in_range(0..=3)?, backlog: 4, drops: None, quiet }));
    }
    Ok(view)
}
