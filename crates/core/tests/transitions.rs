//! What becomes of every event in every situation a worker and an upgrade can be in, as a table to be reviewed.
//!
//! `REUSEPORTD_TRANSITIONS=write cargo test -p reuseportd-core --test transitions` writes it anew.

mod shell;

use reuseportd_core::{
    Command, Engine, Event, Exit, Found, ListenerId, Notice, Plan, Problem, Readiness, Report, StopMode,
    Ticket, Trigger, Verdict, WorkerId,
};
use shell::{GROUP, Shell};
use std::fmt::Write;
use std::time::Duration;

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/transitions.txt");

/// The worker every event is about: the one whose state gives the situation its name.
type Situation = (&'static str, u32, fn(Engine) -> Shell);

fn situations() -> Vec<Situation> {
    vec![
        ("starting, first generation", 1, |engine| {
            let mut shell = Shell::new(engine);
            shell.upgrade(1, Trigger::Start);
            shell
        }),
        ("starting, beside an old generation", 2, starting),
        ("ready, a sibling is not", 2, |engine| {
            let mut shell = Shell::serving(engine, 1);
            shell.upgrade(2, Trigger::Signal);
            shell.ready(2);
            shell
        }),
        ("serving", 1, |engine| Shell::serving(engine, 1)),
        ("serving beside a sibling", 1, |engine| Shell::serving(engine, 2)),
        ("serving, a new generation starts", 1, starting),
        ("emptying", 1, switched),
        ("stopping", 1, stopping),
        ("draining", 1, |engine| {
            let mut shell = stopping(engine);
            shell.drains(1);
            shell.pass(Duration::from_secs(1));
            shell
        }),
        ("dying, its launch failed", 2, |engine| {
            let mut shell = Shell::serving(engine, 1);
            shell.upgrade(2, Trigger::Signal);
            shell.exits(3, Exit::Code(1));
            shell
        }),
        ("remains", 1, |engine| {
            let mut shell = Shell::serving(engine, 2);
            shell.tell(Event::Exited { worker: WorkerId(1), how: Exit::Code(1), remains: true });
            shell
        }),
        ("gone", 1, |engine| {
            let mut shell = Shell::serving(engine, 2);
            shell.exits(1, Exit::Code(1));
            shell
        }),
        ("asked for answers", 2, |engine| {
            let mut shell = Shell::serving(engine, 1);
            shell.verdict = Verdict::Failed;
            let plan = Plan { readiness: Readiness::Http, passes: 2, ..Shell::plan(1) };
            shell.launch(plan, Trigger::Signal);
            shell.ready(2);
            shell
        }),
        ("emptying, the service stops", 1, |engine| {
            let mut shell = Shell::serving(engine, 1);
            shell.tell(Event::Stop { mode: StopMode::Graceful, by: None });
            shell
        }),
    ]
}

/// The same where the master makes the sockets of seats.
fn situations_at_seats() -> Vec<Situation> {
    vec![
        ("serving at a seat with its socket", 1, |engine| Shell::serving_seats(engine, 2)),
        ("starting, shares the seat's socket", 3, |engine| {
            let mut shell = Shell::serving_seats(engine, 2);
            shell.launch(Shell::plan_of_seats(2), Trigger::Signal);
            shell
        }),
        ("starting, its seat and socket are new", 3, |engine| {
            let mut shell = Shell::serving_seats(engine, 1);
            shell.launch(Shell::plan_of_seats(2), Trigger::Signal);
            shell
        }),
        ("emptying, the seat goes on without it", 1, seat_goes_on),
        ("serving, took the seat over", 2, seat_goes_on),
        ("emptying, its seat is no more", 2, |engine| {
            let mut shell = Shell::serving_seats(engine, 2);
            shell.launch(Shell::plan_of_seats(1), Trigger::Signal);
            shell.seated(3);
            shell
        }),
        ("respawned, the seat's socket waits for it", 2, |engine| {
            let mut shell = Shell::serving_seats(engine, 1);
            shell.exits(1, Exit::Signal(9));
            shell
        }),
    ]
}

fn seat_goes_on(engine: Engine) -> Shell {
    let mut shell = Shell::serving_seats(engine, 1);
    shell.launch(Shell::plan_of_seats(1), Trigger::Signal);
    shell.seated(2);
    shell
}

fn starting(engine: Engine) -> Shell {
    let mut shell = Shell::serving(engine, 1);
    shell.upgrade(1, Trigger::Signal);
    shell
}

fn switched(engine: Engine) -> Shell {
    let mut shell = starting(engine);
    shell.ready(2);
    shell
}

fn stopping(engine: Engine) -> Shell {
    let mut shell = switched(engine);
    shell.pass(Duration::from_secs(1));
    shell
}

fn events(worker: u32) -> Vec<Event> {
    let (id, listener) = (WorkerId(worker), ListenerId(worker));
    let fresh = ListenerId(99);
    vec![
        Event::Upgrade { plan: Shell::plan(1), trigger: Trigger::Signal, by: None },
        Event::Stop { mode: StopMode::Graceful, by: None },
        Event::Stop { mode: StopMode::Fast, by: None },
        Event::SpawnFailed { worker: id, errno: 12 },
        Event::Exited { worker: id, how: Exit::Code(1), remains: false },
        Event::Exited { worker: id, how: Exit::Signal(9), remains: true },
        Event::Remains { worker: id, left: true },
        Event::Ready { worker: id, listeners: vec![(GROUP, fresh)] },
        Event::Ready { worker: id, listeners: Vec::new() },
        Event::Notified { worker: id },
        Event::Extended { worker: id, by: Duration::from_secs(90) },
        Event::Drained { worker: id },
        Event::Taken { listener, count: 1 },
        Event::Found { worker: id, found: Found::All(vec![(GROUP, fresh)]) },
        Event::Found { worker: id, found: Found::NotYet(Problem::NotListening(GROUP)) },
        Event::Found { worker: id, found: Found::Never(Problem::NoReuseport(GROUP)) },
        Event::Proved { worker: id, verdict: Verdict::Waiting },
        Event::Proved { worker: id, verdict: Verdict::Passed },
        Event::Proved { worker: id, verdict: Verdict::Failed },
        Event::Bound { group: GROUP, worker: id, result: Ok(fresh) },
        Event::Bound { group: GROUP, worker: id, result: Err(98) },
        Event::Listening { listener, result: Err(98) },
        Event::Steered { group: GROUP, result: Err(1) },
        Event::Admitted { listener, result: Err(12) },
        Event::Anchored { listener, result: Err(24) },
        Event::Owned { listener, owned: false },
        Event::Counted { connections: vec![(id, 0)] },
        Event::Stuck { worker: id },
        Event::Adopted { lost: Vec::new() },
        Event::Adopted { lost: vec![listener] },
        Event::Deadline,
    ]
}

/// What a master does for itself, in the situations in which that matters.
fn situations_of_its_own() -> Vec<Situation> {
    vec![
        ("serving", 1, |engine| Shell::serving(engine, 1)),
        ("serving, a new generation starts", 1, starting),
        ("serving, a new program is being tried", 1, |engine| asked_to_reexec(engine, None)),
        ("serving, a new program is about to be executed", 1, |engine| asked_to_reexec(engine, Some(true))),
        ("emptying, the service stops while a new program is being tried", 1, |engine| {
            let mut shell = asked_to_reexec(engine, None);
            shell.tell(Event::Stop { mode: StopMode::Graceful, by: None });
            shell
        }),
    ]
}

fn asked_to_reexec(engine: Engine, readable: Option<bool>) -> Shell {
    let mut shell = Shell::serving(engine, 1);
    shell.tell(Event::Reexec { by: Some(Ticket(1)) });
    if let Some(readable) = readable {
        shell.tell(Event::Preflighted { readable });
    }
    shell
}

fn events_of_its_own() -> Vec<Event> {
    vec![
        Event::Reexec { by: Some(Ticket(2)) },
        Event::Preflighted { readable: true },
        Event::Preflighted { readable: false },
        Event::Reexecuted { done: true },
        Event::Reexecuted { done: false },
        Event::KeeperMissing,
        Event::Saved,
        Event::Supervised { every: Some(Duration::from_secs(5)) },
        Event::Stop { mode: StopMode::Fast, by: None },
    ]
}

/// One line: what is commanded, and where that leaves master and worker. Receipts are too long to be read here.
fn row(shell: &mut Shell, worker: u32, event: Event) -> String {
    let mut row = format!("    {}", name(&event));
    shell.said.clear();
    shell.tell(event);
    for command in &shell.said {
        match command {
            Command::Report(Report::Ended(receipt)) => {
                let _ = write!(row, "; Ended({:?}, {:?})", receipt.outcome, receipt.reason);
            }
            Command::Report(report) => {
                let _ = write!(row, "; {report:?}");
            }
            Command::Notify(Notice::Extend(_)) | Command::Observe { .. } => {}
            command => {
                let _ = write!(row, "; {command:?}");
            }
        }
    }
    let status = shell.master.status();
    let of_worker = status.generations.iter().flat_map(|generation| &generation.workers);
    let state = of_worker.filter(|view| view.worker == Some(WorkerId(worker))).find_map(|view| view.state);
    let _ =
        writeln!(row, "\n        => {:?}, {}", status.state, state.map_or("gone".to_owned(), |s| word(&s)));
    row
}

/// The event without its plan.
fn name(event: &Event) -> String {
    match event {
        Event::Upgrade { .. } => "Upgrade".to_owned(),
        event => format!("{event:?}"),
    }
}

/// The state's name without its deadlines.
fn word(state: &impl std::fmt::Debug) -> String {
    let text = format!("{state:?}");
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn table() -> String {
    let mut table =
        String::from("Written by tests/transitions.rs. A change here is a change of behaviour.\n");
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        for (name, worker, prepare) in situations().into_iter().chain(situations_at_seats()) {
            let _ = writeln!(table, "\n{engine:?}, worker {worker} {name}");
            for event in events(worker) {
                table += &row(&mut prepare(engine), worker, event);
            }
        }
    }
    for (name, worker, prepare) in situations_of_its_own() {
        let _ = writeln!(table, "\nThe master itself, worker {worker} {name}");
        for event in events_of_its_own() {
            table += &row(&mut prepare(Engine::Ebpf), worker, event);
        }
    }
    table
}

#[test]
fn every_event_in_every_situation_does_what_the_table_says() {
    let now = table();
    if std::env::var_os("REUSEPORTD_TRANSITIONS").is_some() {
        std::fs::write(TABLE, &now).unwrap();
    }
    let reviewed = std::fs::read_to_string(TABLE).unwrap();
    for (line, (now, reviewed)) in (1..).zip(now.lines().zip(reviewed.lines())) {
        assert_eq!(
            now, reviewed,
            "tests/transitions.txt, line {line} (left: what happens now). If the change is wanted, write the table anew \
             with REUSEPORTD_TRANSITIONS=write and review its diff"
        );
    }
    assert_eq!(now.lines().count(), reviewed.lines().count(), "tests/transitions.txt has another length");
}
