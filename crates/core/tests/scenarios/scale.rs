//! More workers, fewer, or another one.

use crate::shell::Shell;
use crate::{KILLED, SECOND, signal, spawn, stop};
use reuseportd_core::{
    Command, Engine, Event, Exit, Generation, ListenerId, Number, Order, Outcome, Plan, Reason, Report, Seat,
    Signal, Ticket, Trigger, WorkerId,
};

impl Shell {
    fn scale(&mut self, to: Number) {
        self.tell(Event::Scale { to, by: Some(Ticket(1)) });
    }

    fn replace(&mut self, seat: u16) {
        self.tell(Event::Replace { seat: Seat(seat), by: Some(Ticket(1)) });
    }

    fn is_done(&self, failure: Option<Reason>) -> bool {
        self.has_said(&Command::ReplyDone { to: Ticket(1), failure })
    }

    fn seats(&self) -> u16 {
        self.master.status().active.map_or(0, |active| self.master.seats(active))
    }
}

#[test]
fn workers_are_added_and_whoever_waits_is_told_when_they_serve() {
    for engine in [Engine::Ebpf, Engine::Cbpf, Engine::None] {
        let mut shell = Shell::serving(engine, 1);
        shell.scale(Number::Exactly(3));
        assert!(shell.has_said(&spawn(2, 1, 1)) && shell.has_said(&spawn(3, 1, 2)), "{engine:?}");
        shell.ready(2);
        assert!(!shell.is_done(None));
        shell.ready(3);
        assert!(shell.is_done(None), "{engine:?}");
        assert_eq!(shell.master.status().scaled, Some((3, 1)));
    }
}

#[test]
fn the_highest_seats_are_removed_without_loss() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving(engine, 4);
        shell.scale(Number::Exactly(2));
        shell.pass(SECOND);
        assert!(shell.has_said(&stop(3)) && shell.has_said(&stop(4)), "{engine:?}");
        assert!(!shell.has_said(&stop(1)) && !shell.has_said(&stop(2)));
        assert!(!shell.is_done(None), "their listeners are still there");
        shell.drains(3);
        shell.drains(4);
        shell.pass(SECOND);
        assert!(shell.is_done(None), "{engine:?}");
        shell.exits(3, Exit::Code(0));
        assert_eq!(shell.seats(), 2);
        assert!(!shell.said.iter().any(|said| matches!(said, Command::Spawn { .. })));
    }
}

#[test]
fn nobody_who_serves_goes_before_somebody_else_does() {
    let mut shell = Shell::serving(Engine::Ebpf, 2);
    shell.exits(1, KILLED);
    shell.scale(Number::Exactly(1));
    shell.pass(SECOND);
    assert!(!shell.has_said(&stop(2)));
    shell.ready(3);
    shell.pass(SECOND);
    assert!(shell.has_said(&stop(2)));
}

#[test]
fn while_an_upgrade_runs_the_number_waits_and_holds_for_what_serves_then() {
    let mut shell = Shell::serving(Engine::Ebpf, 2);
    shell.upgrade(4, Trigger::Command);
    shell.scale(Number::More);
    assert_eq!(shell.seats(), 2);
    shell.all_ready(3..=6);
    shell.pass(SECOND);
    shell.drains(1);
    shell.drains(2);
    shell.pass(SECOND);
    assert!(shell.has_said(&Command::Report(Report::Scaled(Generation(2), 5))), "one more than those four");
    shell.ready(7);
    assert!(shell.is_done(None));
}

#[test]
fn a_number_outlasts_an_upgrade_with_the_same_config_and_no_other() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.scale(Number::Exactly(2));
    shell.ready(2);
    shell.upgrade(1, Trigger::Command);
    assert!(shell.has_said(&spawn(3, 2, 0)) && shell.has_said(&spawn(4, 2, 1)));
    shell.ready(3);
    shell.ready(4);
    shell.pass(SECOND);
    shell.drains(1);
    shell.drains(2);
    assert_eq!(shell.master.status().scaled, Some((2, 1)));
    shell.pass(SECOND);
    shell.launch(Plan { config: 99, ..Shell::plan(1) }, Trigger::Command);
    shell.ready(5);
    shell.pass(SECOND);
    assert_eq!((shell.seats(), shell.master.status().scaled), (1, None));
}

#[test]
fn a_later_number_takes_the_place_of_one_that_is_not_there_yet() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.scale(Number::Exactly(3));
    shell.tell(Event::Scale { to: Number::Exactly(2), by: Some(Ticket(2)) });
    assert!(shell.is_done(Some(Reason::Overtaken)));
    shell.ready(2);
    shell.exits(3, Exit::Signal(15));
    assert!(shell.has_said(&Command::ReplyDone { to: Ticket(2), failure: None }));
}

#[test]
fn whoever_waits_for_a_number_is_told_when_the_first_generation_fails() {
    let mut shell = Shell::new(Engine::Ebpf);
    shell.upgrade(1, Trigger::Start);
    shell.scale(Number::More);
    shell.exits(1, Exit::Code(1));
    assert!(shell.is_done(Some(Reason::Stopped)) && shell.has_said(&Command::Exit { code: 1 }));
}

#[test]
fn a_seat_gets_another_worker_and_only_then_the_old_one_goes() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving(engine, 2);
        shell.replace(0);
        assert!(shell.has_said(&spawn(3, 1, 0)), "{engine:?}");
        shell.pass(SECOND);
        assert!(!shell.has_said(&stop(1)));
        shell.ready(3);
        assert!(shell.has_said(&Command::Report(Report::SeatReplaced(Generation(1), Seat(0)))));
        shell.pass(SECOND);
        assert!(shell.has_said(&stop(1)) && !shell.is_done(None), "{engine:?}");
        shell.drains(1);
        shell.pass(SECOND);
        assert!(shell.is_done(None) && !shell.has_said(&stop(2)), "{engine:?}");
    }
}

#[test]
fn a_worker_that_can_not_take_the_seat_leaves_the_old_one_there() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.replace(0);
    shell.exits(2, Exit::Code(1));
    assert!(shell.is_done(Some(Reason::Exited(Seat(0), WorkerId(2), Exit::Code(1)))));
    shell.pass(SECOND * 10);
    assert!(!shell.has_said(&stop(1)) && !shell.has_said(&signal(1, Signal::Stop)));
    assert!(!shell.has_said(&spawn(3, 1, 0)));
}

#[test]
fn a_seats_socket_that_waits_for_its_worker_stays_when_another_seat_changes_hands() {
    let mut shell = Shell::serving_seats(Engine::Ebpf, 2);
    shell.exits(2, KILLED);
    shell.exits(3, KILLED);
    shell.replace(0);
    shell.seated(4);
    shell.pass(std::time::Duration::from_millis(50));
    shell.assert_sockets_stay();
}

#[test]
fn no_seat_changes_hands_during_an_upgrade_nor_one_that_is_not_there() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.replace(1);
    assert!(shell.is_done(Some(Reason::NoSuchSeat(Seat(1), 1))));
    shell.upgrade(1, Trigger::Command);
    shell.replace(0);
    assert!(shell.is_done(Some(Reason::Busy)));
    shell.ready(2);
    shell.pass(SECOND);
    shell.drains(1);
    assert_eq!(shell.receipt().outcome, Outcome::Completed);
}

/// The old one leaves with its worker: whoever shared it would have none.
#[test]
fn a_seat_that_comes_back_at_once_gets_a_socket_of_its_own() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        for by_upgrade in [false, true] {
            let mut shell = Shell::serving_seats(engine, 2);
            shell.tell(Event::Scale { to: Number::Exactly(1), by: None });
            shell.said.clear();
            match by_upgrade {
                true => shell.launch(Plan { config: 7, ..Shell::plan_of_seats(2) }, Trigger::Command),
                false => shell.tell(Event::Scale { to: Number::Exactly(2), by: None }),
            }
            let made = |said: &Command| match said {
                Command::Bind { seat, .. } => Some(*seat),
                _ => None,
            };
            let made: Vec<Seat> = shell.said.iter().filter_map(made).collect();
            assert_eq!(made, [Seat(1)], "{engine:?}, by an upgrade: {by_upgrade}");
        }
    }
}

#[test]
fn a_socket_of_somebody_else_that_leaves_moves_a_slot_and_the_kernel_is_told() {
    let mut shell = Shell::new(Engine::Cbpf);
    shell.members.push(ListenerId(90));
    shell.upgrade(2, Trigger::Start);
    shell.ready(1);
    shell.ready(2);
    shell.said.clear();
    shell.members.retain(|member| *member != ListenerId(90));
    // Some look shows it.
    shell.upgrade(3, Trigger::Signal);
    let attached = shell.said.iter().find_map(|command| match command {
        Command::Attach { shares, .. } => {
            Some(shares.iter().map(|share| share.slots.clone()).collect::<Vec<_>>())
        }
        _ => None,
    });
    assert_eq!(attached, Some(vec![vec![0, 1]]));
}

/// With its old program the kernel would take the new socket, in the last slot, for one that serves. Seeds 2406 and 3448.
#[test]
fn by_slot_no_seat_gets_a_socket_before_the_kernel_knows_its_slots() {
    let mut shell = Shell::serving_seats(Engine::Cbpf, 2);
    shell.steers = Err(12);
    shell.exits(1, KILLED);
    shell.scale(Number::Exactly(3));
    assert!(shell.has_said(&spawn(3, 1, 0)), "this seat has its socket");
    shell.pass(SECOND * 3);
    shell.assert_sockets_stay();
    assert!(!shell.has_said(&spawn(4, 1, 2)));
    shell.steers = Ok(());
    shell.pass(SECOND * 2);
    assert!(shell.said.iter().any(|said| matches!(said, Command::Bind { seat: Seat(2), .. })));
    shell.seated(3);
    shell.seated(4);
    assert!(shell.is_done(None));
}

/// Seed 18181.
#[test]
fn a_socket_that_a_failed_launch_made_for_a_seat_is_that_of_the_old_generations_seat() {
    let mut shell = Shell::serving_seats(Engine::Cbpf, 2);
    shell.steers = Err(12);
    shell.exits(1, KILLED);
    shell.scale(Number::Exactly(3));
    shell.launch(Plan { config: 7, ..Shell::plan_of_seats(3) }, Trigger::Command);
    shell.steers = Ok(());
    shell.pass(SECOND * 2);
    assert!(shell.place(&spawn(6, 2, 2)) < shell.place(&spawn(7, 1, 2)), "both sit on it");
    shell.said.clear();
    for worker in [6, 5, 4] {
        shell.exits(worker, Exit::Code(1));
    }
    shell.seated(3);
    shell.seated(7);
    shell.pass(SECOND);
    assert_eq!(shell.receipt().outcome, Outcome::RolledBack);
    shell.assert_sockets_stay();
}

/// Seed 16078.
#[test]
fn a_respawn_and_a_launch_at_once_make_one_socket_for_a_seat() {
    let mut shell = Shell::serving_seats(Engine::Cbpf, 2);
    shell.exits(2, KILLED);
    // Its worker had shut the socket down.
    shell.members.retain(|listener| listener.0 != 2);
    shell.exits(3, KILLED);
    for config in [7, 8] {
        shell.launch(Plan { config, ..Shell::plan_of_seats(2) }, Trigger::Command);
    }
    shell.exits(4, Exit::Code(1));
    shell.exits(5, Exit::Code(1));
    shell.now = shell.now.after(SECOND * 2);
    shell.tell(Event::Deadline);
    assert!(shell.has_said(&spawn(6, 1, 1)) && shell.has_said(&spawn(8, 3, 1)));
    let made = shell.said.iter().filter(|said| matches!(said, Command::Bind { .. }));
    assert_eq!(made.count(), 1);
}

/// While a slot is left, connections may fall on any of the others. Seeds 1986 and 7246.
#[test]
fn by_slot_with_one_who_serves_the_others_go_one_after_the_other_whatever_they_go_for() {
    let mut shell = Shell::serving(Engine::Cbpf, 3);
    shell.replace(0);
    shell.scale(Number::Exactly(1));
    shell.ready(4);
    for leaving in [3, 2, 1] {
        shell.said.clear();
        shell.pass(SECOND);
        assert_eq!(shell.told_to_stop(), [leaving]);
        shell.drains(leaving);
    }
    shell.pass(SECOND);
    assert!(shell.is_done(None));
}

/// Seed 10668.
#[test]
fn by_slot_with_one_who_serves_nobody_is_told_to_stop_before_a_dead_workers_slot_is_left() {
    let mut shell = Shell::serving(Engine::Cbpf, 1);
    shell.upgrade(2, Trigger::Signal);
    shell.ready(2);
    shell.ready(3);
    shell.exits(3, KILLED);
    shell.queued = 1;
    shell.pass(SECOND);
    let take = Command::Tell { worker: WorkerId(2), order: Order::Take(ListenerId(3)) };
    assert!(shell.has_said(&take) && shell.told_to_stop().is_empty());
    shell.queued = 0;
    shell.tell(Event::Taken { listener: ListenerId(3), count: 1 });
    shell.pass(SECOND);
    assert_eq!((shell.released(), shell.told_to_stop()), (vec![3], vec![1]));
}
