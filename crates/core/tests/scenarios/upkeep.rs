//! What the master does for itself: its own program, its keeper, signs of life.

use crate::shell::{GROUP, Shell};
use crate::{SECOND, serve, signal, stop};
use reuseportd_core::{
    Command, Engine, Event, Exit, Generation, ListenerId, Notice, Plan, Reason, Report, Seat, Signal,
    StopMode, Ticket, Trigger, WorkerId,
};
use std::time::Duration;

const MILLISECOND: Duration = Duration::from_millis(1);

fn told(to: u32, done: bool) -> Command {
    Command::ReplyReexec { to: Ticket(to), done }
}

/// A service of so many workers, each with a watchdog of a second.
fn watched(workers: u16) -> Shell {
    let mut shell = Shell::new(Engine::Ebpf);
    shell.launch(Plan { watchdog: Some(SECOND), ..Shell::plan(workers) }, Trigger::Start);
    for worker in 1..=u32::from(workers) {
        shell.ready(worker);
    }
    shell.said.clear();
    shell
}

impl Shell {
    fn alive(&mut self, worker: u32) {
        self.tell(Event::Alive { worker: WorkerId(worker) });
    }

    fn count(&self, command: &Command) -> usize {
        self.said.iter().filter(|said| *said == command).count()
    }
}

#[test]
fn a_program_that_can_read_the_state_is_executed_and_everybody_who_asked_is_told_once() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.tell(Event::Reexec { by: Some(Ticket(1)) });
    shell.tell(Event::Reexec { by: Some(Ticket(2)) });
    assert_eq!(shell.count(&Command::Preflight), 1);
    assert!(!shell.has_said(&Command::Reexec));
    shell.tell(Event::Preflighted { readable: true });
    shell.tell(Event::Reexec { by: Some(Ticket(3)) });
    assert!(shell.has_said(&Command::Reexec) && !shell.has_said(&told(1, true)));
    shell.tell(Event::Reexecuted { done: true });
    shell.tell(Event::Reexecuted { done: true });
    assert_eq!([1, 2, 3].map(|to| shell.count(&told(to, true))), [1, 1, 1]);
}

#[test]
fn a_program_that_can_not_read_the_state_or_hangs_is_not_executed() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.tell(Event::Reexec { by: Some(Ticket(1)) });
    shell.tell(Event::Preflighted { readable: false });
    assert!(shell.has_said(&told(1, false)));
    shell.tell(Event::Reexec { by: Some(Ticket(2)) });
    shell.pass(SECOND * 20);
    assert_eq!(shell.count(&Command::EndPreflight), 1);
    assert!(!shell.has_said(&told(2, false)), "its end is the answer");
    shell.tell(Event::Preflighted { readable: false });
    assert!(shell.has_said(&told(2, false)));
    shell.tell(Event::Preflighted { readable: true });
    assert!(!shell.has_said(&Command::Reexec));
}

#[test]
fn a_service_that_ends_gets_no_new_program_and_leaves_nobody_waiting() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.tell(Event::Reexec { by: Some(Ticket(1)) });
    shell.tell(Event::Stop { mode: StopMode::Graceful, by: None });
    shell.tell(Event::Reexec { by: Some(Ticket(2)) });
    assert!(shell.has_said(&told(2, false)));
    shell.exits(1, Exit::Code(0));
    assert!(shell.place(&told(1, false)) < shell.place(&Command::Exit { code: 0 }));
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.tell(Event::Reexec { by: Some(Ticket(1)) });
    shell.tell(Event::Stop { mode: StopMode::Graceful, by: None });
    shell.tell(Event::Preflighted { readable: true });
    assert!(shell.has_said(&told(1, false)) && !shell.has_said(&Command::Reexec));
}

#[test]
fn a_keeper_is_replaced_at_once_and_one_that_never_lasts_ever_more_seldom() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.tell(Event::KeeperMissing);
    assert_eq!(shell.count(&Command::StartKeeper), 1);
    for attempt in 1..12_u32 {
        shell.tell(Event::KeeperMissing);
        let pause = (MILLISECOND * 100 * 2_u32.pow(attempt - 1)).min(SECOND * 10);
        shell.pass(pause - MILLISECOND);
        assert_eq!(shell.count(&Command::StartKeeper), attempt as usize, "after {pause:?}");
        shell.pass(MILLISECOND);
        assert_eq!(shell.count(&Command::StartKeeper), attempt as usize + 1, "after {pause:?}");
    }
    shell.pass(SECOND * 11);
    shell.said.clear();
    shell.tell(Event::KeeperMissing);
    assert!(shell.has_said(&Command::StartKeeper), "that one was good");
}

#[test]
fn a_worker_without_a_sign_of_life_is_killed_and_replaced() {
    let mut shell = watched(2);
    for _ in 0..3 {
        shell.pass(MILLISECOND * 900);
        shell.alive(1);
        shell.alive(2);
    }
    shell.pass(MILLISECOND * 900);
    shell.alive(2);
    shell.pass(MILLISECOND * 120);
    let stuck = Report::Replaced(WorkerId(1), Reason::Stuck(Seat(0), WorkerId(1)));
    assert!(shell.place(&Command::Report(stuck)) < shell.place(&signal(1, Signal::KillGroup)));
    assert!(!shell.has_said(&signal(2, Signal::KillGroup)));
    shell.exits(1, Exit::Signal(9));
    shell.ready(3);
    assert!(shell.has_said(&serve(3)));
}

#[test]
fn a_worker_that_says_itself_that_it_is_stuck_is_killed_at_once() {
    let mut shell = watched(1);
    shell.tell(Event::Stuck { worker: WorkerId(1) });
    assert!(shell.has_said(&signal(1, Signal::KillGroup)));
}

#[test]
fn a_master_that_was_held_up_reads_what_waits_before_it_kills_anybody() {
    let mut shell = watched(2);
    shell.now = shell.now.after(SECOND * 5);
    shell.tell(Event::Deadline);
    shell.alive(1);
    shell.alive(2);
    shell.pass(MILLISECOND * 500);
    assert!(!shell.has_said(&signal(1, Signal::KillGroup)) && !shell.has_said(&signal(2, Signal::KillGroup)));
}

#[test]
fn a_stuck_worker_ends_a_launch() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.launch(Plan { watchdog: Some(SECOND), ..Shell::plan(2) }, Trigger::Signal);
    shell.ready(2);
    shell.pass(SECOND * 2);
    let reason = Reason::Stuck(Seat(0), WorkerId(2));
    assert!(shell.has_said(&Command::Report(Report::Failing(Generation(2), reason))));
    assert!(!shell.has_said(&stop(1)));
}

#[test]
fn one_that_was_told_to_stop_may_be_silent_until_its_deadline() {
    let mut shell = watched(1);
    shell.upgrade(1, Trigger::Signal);
    shell.ready(2);
    shell.pass(MILLISECOND * 900);
    assert!(shell.has_said(&stop(1)));
    shell.pass(SECOND * 5);
    assert!(!shell.has_said(&signal(1, Signal::KillGroup)));
}

#[test]
fn the_service_manager_gets_its_signs_of_life_and_never_without_a_pause() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.tell(Event::Supervised { every: Some(SECOND) });
    shell.pass(MILLISECOND * 3500);
    assert_eq!(shell.count(&Command::Notify(Notice::Alive)), 4);
    shell.tell(Event::Supervised { every: Some(Duration::ZERO) });
    shell.tell(Event::Deadline);
    assert!(shell.master.next_deadline().is_some_and(|due| due > shell.now));
    shell.tell(Event::Supervised { every: None });
    shell.said.clear();
    shell.pass(SECOND * 60);
    assert!(!shell.has_said(&Command::Notify(Notice::Alive)));
}

/// Worker 1 of 3 has died with something in its queue, which a sibling is asked to accept.
#[test]
fn a_group_is_steered_while_leftovers_are_taken() {
    let mut shell = Shell::serving(Engine::Cbpf, 3);
    shell.queued = 3;
    shell.exits(1, Exit::Signal(9));
    assert_eq!(shell.attached().last(), Some(&vec![1, 2]));
    shell.exits(2, Exit::Signal(9));
    assert_eq!(shell.attached().last(), Some(&vec![2]), "{GROUP:?}: at once");
    assert!(shell.released().is_empty());
}

#[test]
fn orphans_are_no_news_to_a_master_that_has_workers() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    let workers = vec![(WorkerId(1), Vec::new())];
    let plan = Shell::plan(1);
    shell.tell(Event::Orphans { generation: Generation(9), plan, workers, slots: Vec::new() });
    assert!(shell.said.iter().any(|said| matches!(said, Command::Report(Report::Bug(_)))));
    assert_eq!(shell.master.status().active, Some(Generation(1)), "nothing has changed");
}

#[test]
fn counts_that_a_worker_makes_up_end_at_the_largest_number() {
    let mut shell = Shell::serving(Engine::Cbpf, 1);
    shell.upgrade(1, Trigger::Signal);
    shell.ready(2);
    for _ in 0..2 {
        let (group, generation, count) = (GROUP, Generation(1), u32::MAX);
        shell.tell(Event::Discarded { group, generation, count });
    }
    shell.queued = 1;
    shell.exits(1, Exit::Signal(9));
    for _ in 0..2 {
        shell.tell(Event::Taken { listener: ListenerId(1), count: u32::MAX });
        shell.pass(SECOND);
    }
    shell.queued = 0;
    shell.pass(SECOND * 10);
    let counted = &shell.receipt().listeners[0];
    assert_eq!((counted.leftovers_lost, counted.leftovers_taken), (u32::MAX, u32::MAX));
}

#[test]
fn a_socket_that_no_seat_asked_for_is_let_go_of() {
    let mut shell = Shell::serving(Engine::Ebpf, 2);
    let listener = ListenerId(9);
    shell.tell(Event::Bound { group: GROUP, worker: WorkerId(1), result: Ok(listener) });
    assert!(shell.has_said(&Command::Release { listener, shutdown: false }));
    shell.exits(1, Exit::Signal(9));
}

#[test]
fn connections_cut_end_at_the_largest_number() {
    let mut shell = Shell::serving(Engine::Ebpf, 2);
    shell.open = u32::MAX;
    shell.upgrade(2, Trigger::Signal);
    for worker in 3..=4 {
        shell.ready(worker);
    }
    shell.pass(SECOND * 120);
    for worker in 1..=2 {
        shell.exits(worker, Exit::Signal(9));
    }
    assert_eq!(shell.receipt().connections_cut, Some(u32::MAX));
}
