//! One short story per sentence an operator would say.

mod datagram;
mod foreign;
mod roll;
mod scale;
#[path = "../shell/mod.rs"]
mod shell;
mod takeover;
mod trial;
mod upkeep;

use reuseportd_core::{
    Command, Engine, Event, Exit, Generation, ListenerId, MasterState, Notice, Order, Outcome, Plan,
    Readiness, Reason, Receipt, Report, Seat, Signal, StopMode, Ticket, Trigger, Verdict, WorkerId,
};
use shell::{GROUP, Shell};
use std::time::Duration;

const KILLED: Exit = Exit::Signal(9);
const SECOND: Duration = Duration::from_secs(1);

fn signal(worker: u32, signal: Signal) -> Command {
    Command::Signal { worker: WorkerId(worker), signal }
}

fn stop(worker: u32) -> Command {
    Command::Tell { worker: WorkerId(worker), order: Order::Stop }
}

fn serve(worker: u32) -> Command {
    Command::Tell { worker: WorkerId(worker), order: Order::Serve }
}

fn spawn(worker: u32, generation: u32, seat: u16) -> Command {
    Command::Spawn { worker: WorkerId(worker), generation: Generation(generation), seat: Seat(seat) }
}

fn release(listener: u32) -> Command {
    Command::Release { listener: ListenerId(listener), shutdown: true }
}

impl Shell {
    fn has_said(&self, command: &Command) -> bool {
        self.said.contains(command)
    }

    /// Where in all that was said this came first.
    fn place(&self, command: &Command) -> usize {
        let place = self.said.iter().position(|said| said == command);
        place.unwrap_or_else(|| panic!("{command:?} was never said, but {:#?}", self.said))
    }

    fn steered_to(&self, generation: u32) -> usize {
        let to = |command: &Command| match command {
            Command::Steer { ranges, .. } => {
                ranges.iter().any(|range| range.generation == Generation(generation))
            }
            _ => false,
        };
        self.said.iter().position(to).unwrap_or_else(|| panic!("never steered to {generation}"))
    }

    /// The slots of each program so far.
    fn attached(&self) -> Vec<Vec<u16>> {
        let slots = |command: &Command| match command {
            Command::Attach { shares, .. } => Some(shares[0].slots.clone()),
            _ => None,
        };
        self.said.iter().filter_map(slots).collect()
    }

    fn released(&self) -> Vec<u32> {
        let listener = |command: &Command| match command {
            Command::Release { listener, .. } => Some(listener.0),
            _ => None,
        };
        self.said.iter().filter_map(listener).collect()
    }

    /// No socket was made, and none was let go of.
    fn assert_sockets_stay(&self) {
        assert!(!self.said.iter().any(|said| matches!(said, Command::Bind { .. })));
        assert!(self.released().is_empty());
    }

    fn receipt(&self) -> &Receipt {
        let mut receipts = self.said.iter().filter_map(|command| match command {
            Command::Report(Report::Ended(receipt)) => Some(receipt),
            _ => None,
        });
        receipts.next_back().unwrap_or_else(|| panic!("no upgrade has ended"))
    }

    /// Nothing was said to the first `old` workers, nothing of theirs was let go of, and they serve on.
    fn assert_untouched(&self, old: u32) {
        for command in &self.said {
            let touches = match command {
                Command::Signal { worker, .. } | Command::Tell { worker, .. } => worker.0 <= old,
                Command::Release { listener, .. } => listener.0 <= old,
                Command::Steer { .. } | Command::Attach { .. } => true,
                _ => false,
            };
            assert!(!touches, "{command:?}");
        }
        assert_eq!(self.master.state(), MasterState::Steady);
        assert_eq!(self.receipt().outcome, Outcome::RolledBack);
    }
}

#[test]
fn the_service_is_ready_only_when_every_worker_serves() {
    let mut shell = Shell::new(Engine::Ebpf);
    shell.upgrade(2, Trigger::Start);
    shell.ready(1);
    assert!(!shell.has_said(&Command::Notify(Notice::Ready)));
    assert!(!shell.said.iter().any(|command| matches!(command, Command::Listen { .. })));
    shell.ready(2);
    assert!(shell.steered_to(1) < shell.place(&Command::Notify(Notice::Ready)));
    assert_eq!(shell.master.state(), MasterState::Steady);
}

#[test]
fn an_upgrade_moves_new_connections_before_the_old_workers_are_told_to_stop() {
    let mut shell = Shell::serving(Engine::Ebpf, 2);
    shell.upgrade(2, Trigger::Signal);
    shell.ready(3);
    shell.ready(4);
    shell.pass(Duration::from_secs(1));
    assert!(shell.place(&Command::Notify(Notice::Reloading)) < shell.place(&spawn(3, 2, 0)));
    assert!(shell.steered_to(2) < shell.place(&stop(1)));
    assert!(!shell.has_said(&release(1)), "it has not said that it is drained");
    shell.drains(1);
    shell.drains(2);
    assert!(shell.place(&release(1)) < shell.place(&Command::Notify(Notice::Ready)));
    assert_eq!(shell.receipt().outcome, Outcome::Completed);
    shell.exits(1, Exit::Code(0));
    shell.exits(2, Exit::Code(0));
    assert!(shell.has_said(&Command::Report(Report::Drained(Generation(1)))));
}

#[test]
fn the_old_worker_stays_while_the_only_new_one_is_gone() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving(engine, 1);
        shell.upgrade(1, Trigger::Signal);
        shell.ready(2);
        shell.exits(2, KILLED);
        shell.pass(Duration::from_secs(2));
        assert!(!shell.has_said(&stop(1)), "{engine:?}");
        shell.ready(3);
        shell.pass(Duration::from_secs(2));
        assert!(shell.has_said(&stop(1)), "{engine:?}");
    }
}

#[test]
fn a_new_worker_that_exits_leaves_the_old_ones_alone() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.upgrade(2, Trigger::Signal);
    shell.ready(2);
    shell.exits(3, Exit::Code(1));
    assert!(shell.has_said(&signal(2, Signal::Stop)));
    shell.exits(2, Exit::Signal(15));
    shell.assert_untouched(1);
    assert_eq!(shell.receipt().reason, Some(Reason::Exited(Seat(1), WorkerId(3), Exit::Code(1))));
}

#[test]
fn a_new_worker_that_is_never_ready_is_given_up_after_its_time() {
    let mut shell = Shell::serving(Engine::Cbpf, 1);
    shell.upgrade(1, Trigger::Signal);
    shell.pass(Duration::from_secs(59));
    assert!(!shell.has_said(&signal(2, Signal::Stop)));
    shell.pass(Duration::from_secs(2));
    assert!(shell.has_said(&signal(2, Signal::Stop)));
    shell.pass(Duration::from_secs(3));
    assert!(shell.has_said(&signal(2, Signal::KillGroup)), "it does not listen to that either");
    shell.exits(2, KILLED);
    shell.assert_untouched(1);
    assert_eq!(shell.receipt().reason, Some(Reason::NotReady(Seat(0), WorkerId(2), None)));
}

#[test]
fn a_program_that_cannot_be_started_leaves_the_old_one_alone() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell
        .master
        .handle(Event::Upgrade { plan: Shell::plan(1), trigger: Trigger::Signal, by: None }, shell.now);
    while shell.master.next_command().is_some() {}
    shell.tell(Event::SpawnFailed { worker: WorkerId(2), errno: 2 });
    shell.assert_untouched(1);
    assert_eq!(shell.receipt().reason, Some(Reason::SpawnFailed(Seat(0), WorkerId(2), 2)));
}

#[test]
fn a_kernel_that_refuses_to_steer_leaves_the_old_workers_serving() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.upgrade(1, Trigger::Signal);
    shell.steers = Err(1);
    shell.ready(2);
    shell.steers = Ok(());
    shell.pass(Duration::from_secs(5));
    assert!(!shell.has_said(&stop(1)));
    shell.drains(2);
    shell.exits(2, Exit::Code(0));
    assert_eq!(shell.master.state(), MasterState::Steady);
    assert_eq!(shell.receipt().reason, Some(Reason::SteerFailed(GROUP, 1)));
    assert_eq!(shell.master.status().active, Some(Generation(1)));
}

#[test]
fn a_crashed_workers_queue_goes_to_its_sibling_and_its_seat_is_filled_at_once() {
    let mut shell = Shell::serving(Engine::Cbpf, 2);
    shell.queued = 3;
    shell.exits(1, KILLED);
    assert!(shell.has_said(&spawn(3, 1, 0)));
    let take = Command::Tell { worker: WorkerId(2), order: Order::Take(ListenerId(1)) };
    assert!(!shell.has_said(&take), "handshakes that had begun end first");
    shell.pass(Duration::from_millis(500));
    assert!(shell.has_said(&take) && !shell.said.iter().any(|said| matches!(said, Command::Release { .. })));
    shell.queued = 0;
    shell.tell(Event::Taken { listener: ListenerId(1), count: 3 });
    assert!(shell.has_said(&Command::Report(Report::LeftoversTaken(ListenerId(1), 3))));
    assert!(shell.said.iter().any(|said| matches!(said, Command::Release { .. })));
}

#[test]
fn clients_wait_when_the_last_worker_is_killed() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving(engine, 1);
        shell.exits(1, KILLED);
        shell.pass(Duration::from_secs(30));
        assert!(!shell.said.iter().any(|said| matches!(said, Command::Release { .. })), "{engine:?}");
        shell.ready(2);
        shell.pass(Duration::from_secs(1));
        assert!(shell.said.iter().any(|said| matches!(said, Command::Release { .. })), "{engine:?}");
    }
}

#[test]
fn a_worker_that_crashes_again_and_again_is_respawned_slower_and_slower_and_then_not() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.exits(1, KILLED);
    assert!(shell.has_said(&spawn(2, 1, 0)), "at once the first time");
    shell.exits(2, KILLED);
    assert!(!shell.has_said(&spawn(3, 1, 0)));
    shell.pass(Duration::from_millis(100));
    assert!(shell.has_said(&spawn(3, 1, 0)));
    shell.exits(3, KILLED);
    assert_eq!(shell.master.state(), MasterState::Degraded);
    shell.pass(Duration::from_secs(59));
    assert!(!shell.has_said(&spawn(4, 1, 0)));
    shell.pass(Duration::from_secs(2));
    assert!(shell.has_said(&Command::Report(Report::BreakerClosed)));
    assert!(shell.has_said(&spawn(4, 1, 0)));
    assert_eq!(shell.master.state(), MasterState::Steady);
}

#[test]
fn what_is_still_open_at_the_drain_deadline_is_cut_and_counted() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.open = 7;
    shell.upgrade(1, Trigger::Signal);
    shell.ready(2);
    shell.pass(Duration::from_secs(1));
    shell.drains(1);
    shell.pass(Duration::from_secs(58));
    assert!(!shell.has_said(&signal(1, Signal::KillGroup)));
    shell.pass(Duration::from_secs(2));
    assert!(shell.has_said(&signal(1, Signal::KillGroup)));
    shell.exits(1, KILLED);
    let receipt = shell.receipt();
    assert_eq!((receipt.forced_kills, receipt.connections_cut, receipt.is_final), (1, Some(7), true));
}

#[test]
fn a_stop_refuses_new_connections_lets_the_begun_ones_finish_and_leaves_nobody() {
    let mut shell = Shell::serving(Engine::Ebpf, 2);
    shell.tell(Event::Stop { mode: StopMode::Graceful, by: Some(Ticket(1)) });
    let refuse = Command::Steer { group: GROUP, ranges: Vec::new() };
    shell.pass(Duration::from_secs(1));
    assert!(shell.place(&Command::Notify(Notice::Stopping)) < shell.place(&stop(1)));
    assert!(shell.place(&refuse) < shell.place(&stop(2)));
    shell.exits(1, Exit::Code(0));
    assert!(!shell.has_said(&Command::Exit { code: 0 }));
    shell.exits(2, Exit::Code(0));
    let reply = Command::ReplyStopped { to: Ticket(1) };
    assert!(shell.place(&reply) < shell.place(&Command::Exit { code: 0 }));
}

#[test]
fn a_fast_stop_kills_at_once() {
    let mut shell = Shell::serving(Engine::Cbpf, 1);
    shell.tell(Event::Stop { mode: StopMode::Fast, by: None });
    assert!(shell.has_said(&signal(1, Signal::KillGroup)));
    shell.exits(1, KILLED);
    assert!(shell.has_said(&Command::Exit { code: 0 }));
}

#[test]
fn a_second_signal_turns_a_stop_into_a_fast_one() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.tell(Event::Stop { mode: StopMode::Graceful, by: None });
    assert!(!shell.has_said(&signal(1, Signal::KillGroup)));
    shell.tell(Event::Stop { mode: StopMode::Graceful, by: None });
    assert!(shell.has_said(&signal(1, Signal::KillGroup)));
}

#[test]
fn a_service_whose_first_generation_fails_ends_with_1() {
    let mut shell = Shell::new(Engine::Ebpf);
    shell.upgrade(1, Trigger::Start);
    shell.exits(1, Exit::Code(3));
    assert_eq!(shell.receipt().reason, Some(Reason::Exited(Seat(0), WorkerId(1), Exit::Code(3))));
    assert!(shell.has_said(&Command::Exit { code: 1 }));
}

#[test]
fn slots_are_released_from_the_highest_down_and_steered_off_the_one_that_moves() {
    let mut shell = Shell::serving(Engine::Cbpf, 2);
    shell.upgrade(2, Trigger::Signal);
    shell.ready(3);
    shell.ready(4);
    shell.pass(Duration::from_secs(1));
    shell.said.clear();
    shell.drains(1);
    shell.drains(2);
    shell.pass(Duration::from_secs(1));
    // The listeners joined in the order of workers: 1 and 2 hold slots 0 and 1, 3 and 4 hold 2 and 3.
    let steps: Vec<String> = shell.said.iter().filter_map(step).collect();
    let expected =
        ["attach [1, 2]", "release 1", "attach [0, 2]", "attach [2]", "release 2", "attach [0, 1]"];
    assert_eq!(steps.len(), expected.len(), "{steps:?}");
}

#[test]
fn a_seats_socket_is_made_once_and_goes_on_through_an_upgrade_and_a_crash() {
    for engine in [Engine::Ebpf, Engine::Cbpf, Engine::None] {
        let mut shell = Shell::serving_seats(engine, 2);
        shell.launch(Shell::plan_of_seats(2), Trigger::Signal);
        shell.seated(3);
        assert!(!shell.has_said(&stop(1)), "{engine:?}: not before both are ready");
        shell.seated(4);
        shell.pass(Duration::from_secs(1));
        assert!(shell.has_said(&stop(1)) && shell.has_said(&stop(2)), "{engine:?}");
        shell.drains(1);
        shell.drains(2);
        assert_eq!(shell.receipt().outcome, Outcome::Completed);
        shell.exits(3, KILLED);
        shell.seated(5);
        shell.pass(Duration::from_secs(5));
        assert!(shell.has_said(&serve(5)), "{engine:?}");
        shell.assert_sockets_stay();
    }
}

#[test]
fn a_respawned_worker_does_not_take_the_seat_back_while_the_next_generation_is_steered_to() {
    let mut shell = Shell::serving_seats(Engine::Cbpf, 1);
    shell.exits(1, KILLED);
    shell.launch(Shell::plan_of_seats(1), Trigger::Signal);
    // The kernel has not answered yet when the old seat's next worker becomes ready.
    shell.master.handle(Event::Ready { worker: WorkerId(3), listeners: Vec::new() }, shell.now);
    shell.seated(2);
    assert_eq!(shell.master.status().active, Some(Generation(2)));
    shell.pass(Duration::from_secs(1));
    shell.drains(2);
    shell.exits(2, Exit::Code(0));
    assert_eq!(shell.receipt().outcome, Outcome::Completed);
    shell.assert_sockets_stay();
}

#[test]
fn an_empty_seat_gets_its_socket_back_when_the_switch_fails() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving_seats(engine, 2);
        shell.exits(1, KILLED);
        shell.exits(3, KILLED);
        shell.launch(Shell::plan_of_seats(2), Trigger::Signal);
        shell.seated(4);
        shell.steers = Err(1);
        shell.seated(5);
        shell.steers = Ok(());
        assert_eq!(shell.master.state(), MasterState::RollingBack, "{engine:?}");
        shell.pass(Duration::from_secs(5));
        for worker in [4, 5] {
            shell.drains(worker);
            shell.exits(worker, Exit::Code(0));
        }
        shell.seated(6);
        shell.pass(Duration::from_secs(5));
        assert_eq!(shell.receipt().outcome, Outcome::RolledBack, "{engine:?}");
        shell.assert_sockets_stay();
    }
}

#[test]
fn the_queue_of_a_seat_waits_for_its_next_worker_and_others_get_the_new_connections() {
    let mut shell = Shell::serving_seats(Engine::Cbpf, 2);
    shell.queued = 3;
    shell.exits(1, KILLED);
    shell.exits(3, KILLED);
    assert!(!shell.has_said(&spawn(4, 1, 0)), "not at once the second time");
    assert_eq!(shell.attached().last(), Some(&vec![1]));
    shell.pass(Duration::from_secs(1));
    assert!(shell.has_said(&spawn(4, 1, 0)));
    shell.seated(4);
    assert_eq!(shell.attached().last(), Some(&vec![0, 1]));
    let taken = shell.said.iter().any(|said| matches!(said, Command::Tell { order: Order::Take(_), .. }));
    assert!(!taken, "nobody but the seat's own worker takes it");
    shell.assert_sockets_stay();
}

#[test]
fn clients_of_a_seat_wait_when_the_last_worker_is_killed() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving_seats(engine, 1);
        shell.queued = 3;
        for worker in 1..=3 {
            shell.exits(worker, KILLED);
            shell.pass(Duration::from_secs(1));
        }
        assert_eq!(shell.master.state(), MasterState::Degraded);
        shell.pass(Duration::from_secs(70));
        shell.seated(4);
        assert!(shell.has_said(&serve(4)));
        shell.assert_sockets_stay();
    }
}

#[test]
fn removed_seats_are_emptied_by_their_last_worker_and_let_go_of() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving_seats(engine, 3);
        shell.launch(Shell::plan_of_seats(1), Trigger::Signal);
        shell.seated(4);
        shell.pass(Duration::from_secs(1));
        shell.assert_sockets_stay();
        for worker in 1..=3 {
            shell.drains(worker);
        }
        shell.pass(Duration::from_secs(1));
        let mut released = shell.released();
        released.sort_unstable();
        assert_eq!(released, [2, 3], "{engine:?}");
        assert_eq!(shell.receipt().outcome, Outcome::Completed);
    }
}

#[test]
fn a_failed_launch_with_more_seats_leaves_no_socket_behind() {
    for engine in [Engine::Ebpf, Engine::Cbpf, Engine::None] {
        let mut shell = Shell::serving_seats(engine, 1);
        shell.launch(Shell::plan_of_seats(3), Trigger::Signal);
        shell.seated(2);
        shell.seated(3);
        shell.exits(4, Exit::Code(1));
        shell.exits(2, Exit::Signal(15));
        shell.exits(3, Exit::Signal(15));
        let mut released = shell.released();
        released.sort_unstable();
        assert_eq!(released, [2, 3], "{engine:?}: the first seat's is the old worker's, too");
        assert_eq!(shell.receipt().outcome, Outcome::RolledBack);
        assert_eq!(shell.master.state(), MasterState::Steady);
        assert!(!shell.has_said(&stop(1)) && !shell.has_said(&signal(1, Signal::Stop)));
    }
}

#[test]
fn a_worker_is_ready_when_it_has_answered_so_many_times_in_a_row() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.verdict = Verdict::Failed;
    let plan = Plan { readiness: Readiness::Http, passes: 3, ..Shell::plan(1) };
    shell.launch(plan, Trigger::Signal);
    shell.ready(2);
    assert!(shell.has_said(&serve(2)), "it can't answer before it serves");
    let interval = Duration::from_millis(200);
    for (verdict, ready) in [(true, false), (true, false), (false, false), (true, false), (true, false)] {
        shell.verdict = if verdict { Verdict::Passed } else { Verdict::Failed };
        shell.pass(interval);
        assert_eq!(shell.has_said(&Command::Report(Report::WorkerReady(WorkerId(2)))), ready);
    }
    assert!(!shell.said.iter().any(|said| matches!(said, Command::Steer { .. } | Command::Admit { .. })));
    shell.verdict = Verdict::Passed;
    shell.pass(interval);
    assert!(shell.place(&Command::Report(Report::WorkerReady(WorkerId(2)))) < shell.steered_to(2));
}

fn step(command: &Command) -> Option<String> {
    match command {
        Command::Attach { shares, .. } => Some(format!("attach {:?}", shares[0].slots)),
        Command::Release { listener, .. } => Some(format!("release {}", listener.0)),
        _ => None,
    }
}
