//! Batch by batch.

use crate::shell::Shell;
use crate::{KILLED, SECOND, spawn, stop};
use reuseportd_core::{
    Command, Engine, Event, Exit, Generation, MasterState, Order, Outcome, Plan, Reason, Report, Seat,
    Ticket, Trigger, WorkerId,
};

fn rolling(workers: u16, batch: u16) -> Plan {
    Plan { batch: Some(batch), max_draining: 9, ..Shell::plan(workers) }
}

impl Shell {
    fn spawned(&self, generation: u32) -> usize {
        let is_its = |c: &&Command| matches!(c, Command::Spawn { generation: g, .. } if g.0 == generation);
        self.said.iter().filter(is_its).count()
    }

    pub(crate) fn told_to_stop(&self) -> Vec<u32> {
        let to = |command: &Command| match command {
            Command::Tell { worker, order: Order::Stop } => Some(worker.0),
            _ => None,
        };
        let mut told: Vec<u32> = self.said.iter().filter_map(to).collect();
        told.sort_unstable();
        told
    }

    pub(crate) fn all_ready(&mut self, workers: impl Iterator<Item = u32>) {
        for worker in workers {
            self.ready(worker);
        }
    }

    /// These old workers end as they were told to.
    fn leave(&mut self, workers: impl Iterator<Item = u32>) {
        self.pass(SECOND);
        for worker in workers {
            self.drains(worker);
            self.exits(worker, Exit::Code(0));
        }
        self.pass(SECOND);
    }
}

#[test]
fn eight_workers_are_replaced_three_at_a_time() {
    for engine in [Engine::Ebpf, Engine::Cbpf, Engine::None] {
        let mut shell = Shell::serving(engine, 8);
        shell.launch(rolling(8, 3), Trigger::Command);
        for (batch, rolled, new) in [(1..=3, 3, 9..=11), (4..=6, 6, 12..=14)] {
            assert_eq!(shell.spawned(2), rolled, "{engine:?}");
            new.clone().for_each(|worker| assert!(!shell.told_to_stop().contains(&(worker - 8))));
            shell.all_ready(new);
            let rolled = u16::try_from(rolled).unwrap();
            assert!(shell.has_said(&Command::Report(Report::Rolled(Generation(2), rolled, 8))), "{engine:?}");
            shell.leave(batch);
        }
        assert_eq!(shell.told_to_stop(), [1, 2, 3, 4, 5, 6], "{engine:?}: two are still needed");
        shell.ready(15);
        shell.ready(16);
        shell.leave(7..=8);
        assert_eq!(shell.receipt().outcome, Outcome::Completed, "{engine:?}");
        assert_eq!(shell.told_to_stop(), [1, 2, 3, 4, 5, 6, 7, 8]);
    }
}

#[test]
fn each_worker_gets_the_same_between_two_batches() {
    let mut shell = Shell::serving(Engine::Ebpf, 4);
    shell.launch(rolling(4, 1), Trigger::Command);
    shell.ready(5);
    let weights = shell.said.iter().filter_map(|command| match command {
        Command::Steer { ranges, .. } => Some(ranges.iter().map(|r| (r.weight, r.count)).collect::<Vec<_>>()),
        _ => None,
    });
    assert_eq!(weights.collect::<Vec<_>>().pop(), Some(vec![(250, 1), (750, 3)]));
}

#[test]
fn a_third_batch_that_fails_brings_the_old_workers_back_before_the_new_ones_go() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving(engine, 8);
        shell.launch(rolling(8, 3), Trigger::Command);
        shell.all_ready(9..=11);
        shell.leave(1..=3);
        shell.all_ready(12..=14);
        shell.leave(4..=6);
        shell.said.clear();
        shell.exits(16, Exit::Code(1));
        assert_eq!(shell.master.state(), MasterState::RollingBack);
        let reason = Reason::Exited(Seat(7), WorkerId(16), Exit::Code(1));
        assert!(shell.has_said(&Command::Report(Report::Failing(Generation(2), reason))));
        for (worker, seat) in (17..).zip(0..6) {
            assert!(shell.has_said(&spawn(worker, 1, seat)), "{engine:?}");
        }
        shell.pass(SECOND);
        shell.all_ready(17..=21);
        shell.pass(SECOND);
        assert!(shell.told_to_stop().is_empty(), "{engine:?}: as long as one is missing, the new ones serve");
        shell.ready(22);
        shell.exits(15, Exit::Code(0));
        shell.leave(9..=14);
        assert_eq!(shell.told_to_stop(), [9, 10, 11, 12, 13, 14], "{engine:?}");
        assert_eq!(shell.receipt().outcome, Outcome::RolledBack);
        assert_eq!(shell.master.status().active, Some(Generation(1)));
    }
}

#[test]
fn a_new_worker_that_crashes_while_others_are_still_launched_ends_it_too() {
    let mut shell = Shell::serving(Engine::Ebpf, 2);
    shell.launch(rolling(2, 1), Trigger::Command);
    shell.ready(3);
    shell.leave(1..=1);
    shell.exits(3, KILLED);
    let reason = Reason::Crashed(Seat(0), WorkerId(3), KILLED);
    assert!(shell.has_said(&Command::Report(Report::Failing(Generation(2), reason))));
    assert!(shell.has_said(&spawn(5, 1, 0)));
}

#[test]
fn the_next_batch_waits_while_too_many_finish_connections() {
    let mut shell = Shell::serving(Engine::Ebpf, 3);
    shell.launch(Plan { max_draining: 1, ..rolling(3, 1) }, Trigger::Command);
    shell.ready(4);
    shell.pass(SECOND);
    shell.drains(1);
    shell.pass(SECOND);
    assert_eq!(shell.spawned(2), 1, "its connections are still open");
    assert!(shell.has_said(&Command::Report(Report::Queued(Generation(2)))));
    shell.exits(1, Exit::Code(0));
    assert_eq!(shell.spawned(2), 2);
}

#[test]
fn an_address_that_is_given_up_is_served_until_the_switch_however_many_come() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.launch(rolling(3, 1), Trigger::Command);
    for worker in 2..=3 {
        shell.ready(worker);
        shell.pass(SECOND);
        assert!(!shell.has_said(&stop(1)), "the last of the old ones");
    }
    shell.ready(4);
    shell.leave(1..=1);
    assert_eq!(shell.receipt().outcome, Outcome::Completed);
}

#[test]
fn another_master_goes_on_in_the_middle_of_it() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::serving(engine, 2);
        shell.launch(rolling(2, 1), Trigger::Command);
        shell.ready(3);
        shell.leave(1..=1);
        shell.is_succeeded(&[1]);
        shell.ready(4);
        shell.leave(2..=2);
        assert_eq!(shell.receipt().outcome, Outcome::Completed, "{engine:?}");
    }
}

#[test]
fn it_can_be_taken_back_between_two_batches() {
    let mut shell = Shell::serving(Engine::Ebpf, 2);
    shell.launch(rolling(2, 1), Trigger::Command);
    shell.ready(3);
    shell.leave(1..=1);
    shell.tell(Event::TakeBack { by: Some(Ticket(1)) });
    shell.ready(5);
    shell.exits(4, Exit::Code(0));
    shell.leave(3..=3);
    assert_eq!(shell.receipt().reason, Some(Reason::TakenBack));
    assert!(!shell.has_said(&stop(2)));
}

#[test]
fn a_restored_worker_whose_slot_nobody_has_seen_yet_has_its_part_at_once() {
    let mut shell = Shell::serving(Engine::Cbpf, 2);
    shell.launch(rolling(2, 1), Trigger::Command);
    shell.ready(3);
    shell.leave(1..=1);
    shell.exits(4, Exit::Code(1));
    shell.said.clear();
    shell.listens(5);
    let attached = shell.said.iter().find_map(|command| match command {
        Command::Attach { shares, .. } => {
            Some(shares.iter().map(|share| share.slots.clone()).collect::<Vec<_>>())
        }
        _ => None,
    });
    assert_eq!(attached, Some(vec![vec![1, 2]]));
}
