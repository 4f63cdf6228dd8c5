//! A generation on trial: canary, bake, checks, and the way back.

use crate::shell::{GROUP, Shell};
use crate::{KILLED, SECOND, signal, stop};
use reuseportd_core::{
    Asked, CanaryStep, CheckFailure, Command, Depth, Engine, Event, Exit, Generation, GroupView, ListenerId,
    MasterState, Member, Outcome, Plan, Reason, Report, Seat, Signal, Ticket, Trigger, Wait, WorkerId,
};
use std::time::Duration;

fn step(share: u16) -> CanaryStep {
    CanaryStep { share, hold: SECOND * 10 }
}

fn canary(workers: u16) -> Plan {
    Plan { canary: vec![step(50), step(500)], ..Shell::plan(workers) }
}

fn baking(workers: u16) -> Plan {
    Plan { bake: SECOND * 30, ..Shell::plan(workers) }
}

fn checked(plan: Plan) -> Plan {
    Plan { check_interval: Some(SECOND * 2), ..plan }
}

impl Shell {
    /// One old worker serves, and one new one with this plan.
    fn on_trial(engine: Engine, plan: Plan) -> Shell {
        let mut shell = Shell::serving(engine, 1);
        shell.launch(plan, Trigger::Command);
        shell.ready(2);
        shell
    }

    /// The parts of the new connections that each program so far gave.
    fn weights(&self) -> Vec<Vec<u16>> {
        let of = |command: &Command| match command {
            Command::Steer { ranges, .. } => Some(ranges.iter().map(|range| range.weight).collect()),
            Command::Attach { shares, .. } => Some(shares.iter().map(|share| share.weight).collect()),
            _ => None,
        };
        self.said.iter().filter_map(of).collect()
    }

    /// What the kernel, or a process, is told first.
    fn first_deed(&self) -> &Command {
        let is_deed = |c: &&Command| !matches!(c, Command::Report(_) | Command::Observe { .. });
        self.said.iter().find(is_deed).unwrap_or_else(|| panic!("nothing is done"))
    }

    fn checks(&self) -> Vec<u32> {
        let run = |command: &Command| match command {
            Command::Check { run, .. } => Some(*run),
            _ => None,
        };
        self.said.iter().filter_map(run).collect()
    }

    fn passes(&mut self, run: u32) {
        self.tell(Event::Checked { run, failure: None });
    }

    /// The new worker gets nothing, and the old one serves on.
    fn assert_back(&mut self, reason: Reason) {
        assert_eq!(self.master.status().active, Some(Generation(1)));
        assert_eq!(self.weights().last(), Some(&vec![1000]));
        self.pass(SECOND * 5);
        self.drains(2);
        self.exits(2, Exit::Code(0));
        self.pass(SECOND);
        assert!(!self.has_said(&stop(1)) && !self.has_said(&signal(1, Signal::Stop)));
        assert_eq!(self.master.state(), MasterState::Steady);
        let receipt = self.receipt();
        assert_eq!((receipt.outcome, receipt.reason), (Outcome::RolledBack, Some(reason)));
        assert!(receipt.steer_back.is_some());
    }
}

fn is_steering(command: &Command) -> bool {
    matches!(command, Command::Steer { .. } | Command::Attach { .. })
}

#[test]
fn a_canary_gets_its_share_step_by_step_and_then_all() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::on_trial(engine, canary(1));
        assert_eq!(shell.master.state(), MasterState::Canary);
        shell.pass(SECOND * 9);
        assert_eq!(shell.weights(), [[50, 950]], "{engine:?}");
        shell.pass(SECOND * 2);
        assert_eq!(shell.weights(), [[50, 950], [500, 500]], "{engine:?}");
        assert!(!shell.has_said(&Command::Report(Report::Switched(Generation(2)))));
        shell.pass(SECOND * 12);
        shell.drains(1);
        assert_eq!(shell.weights()[2], [1000], "{engine:?}");
        assert_eq!(shell.receipt().outcome, Outcome::Completed);
    }
}

#[test]
fn a_canary_that_crashes_gets_nothing_more_and_the_kernel_is_told_first() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::on_trial(engine, checked(canary(2)));
        shell.ready(3);
        shell.said.clear();
        shell.exits(3, KILLED);
        assert!(is_steering(shell.first_deed()), "{engine:?}: {:?}", shell.first_deed());
        shell.pass(SECOND);
        shell.exits(3, KILLED);
        shell.assert_back(Reason::Crashed(Seat(1), WorkerId(3), KILLED));
    }
}

#[test]
fn a_crash_in_the_bake_steers_back_before_anything_else_and_launches_nobody() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::on_trial(engine, checked(baking(1)));
        assert_eq!(shell.master.state(), MasterState::Baking);
        assert_eq!(shell.weights(), [[1000]]);
        shell.pass(SECOND * 5);
        assert!(!shell.has_said(&stop(1)), "it stands by");
        shell.said.clear();
        shell.exits(2, KILLED);
        assert!(is_steering(shell.first_deed()), "{engine:?}: {:?}", shell.first_deed());
        let spawned = shell.said.iter().any(|said| matches!(said, Command::Spawn { .. }));
        assert!(!spawned, "the old worker is there");
        shell.pass(SECOND);
        assert_eq!(shell.master.status().active, Some(Generation(1)));
        assert_eq!(shell.receipt().reason, Some(Reason::Crashed(Seat(0), WorkerId(2), KILLED)));
    }
}

#[test]
fn a_bake_that_goes_well_ends_with_the_old_generations_retirement() {
    let mut shell = Shell::on_trial(Engine::Ebpf, baking(1));
    shell.pass(SECOND * 29);
    assert!(!shell.has_said(&stop(1)));
    shell.pass(SECOND * 3);
    assert!(shell.has_said(&stop(1)));
    shell.drains(1);
    assert_eq!(shell.receipt().outcome, Outcome::Completed);
}

#[test]
fn a_worker_of_the_generation_that_stands_by_is_launched_again_when_it_crashes() {
    let mut shell = Shell::on_trial(Engine::Ebpf, baking(1));
    shell.exits(1, KILLED);
    assert!(shell.has_said(&crate::spawn(3, 1, 0)));
    assert_eq!(shell.master.state(), MasterState::Baking);
}

#[test]
fn a_step_does_not_end_before_a_check_has_passed_in_it() {
    let mut shell = Shell::on_trial(Engine::Ebpf, checked(canary(1)));
    assert_eq!(shell.checks(), [1], "at its beginning");
    shell.pass(SECOND * 20);
    assert_eq!((shell.checks().len(), shell.weights().len()), (1, 1), "one at a time, and no step without");
    shell.passes(1);
    assert_eq!(shell.weights().len(), 2);
    shell.pass(SECOND * 3);
    assert_eq!(shell.checks(), [1, 2], "again after the interval");
    shell.passes(2);
    shell.pass(SECOND * 3);
    shell.passes(3);
    shell.pass(SECOND * 30);
    shell.passes(4);
    shell.pass(SECOND * 2);
    shell.drains(1);
    let receipt = shell.receipt();
    assert_eq!((receipt.outcome, receipt.checks), (Outcome::Completed, 4));
}

#[test]
fn a_check_that_fails_takes_the_canary_back() {
    let failed = CheckFailure::Ended(Exit::Code(1));
    for failure in [failed, CheckFailure::NotStarted(2)] {
        let mut shell = Shell::on_trial(Engine::Cbpf, checked(canary(1)));
        shell.tell(Event::Checked { run: 1, failure: Some(failure) });
        shell.assert_back(Reason::CheckFailed(failure));
    }
}

#[test]
fn a_check_that_takes_too_long_has_failed_and_is_ended() {
    let mut shell = Shell::on_trial(Engine::Ebpf, checked(baking(1)));
    shell.pass(SECOND * 29);
    assert!(!shell.has_said(&Command::EndCheck { run: 1 }));
    shell.pass(SECOND * 2);
    assert!(shell.has_said(&Command::EndCheck { run: 1 }));
    shell.assert_back(Reason::CheckFailed(CheckFailure::Late));
}

#[test]
fn a_silent_canary_is_killed_and_taken_back() {
    let mut shell = Shell::on_trial(Engine::Ebpf, Plan { watchdog: Some(SECOND), ..canary(1) });
    shell.pass(SECOND * 2);
    assert!(shell.has_said(&signal(2, Signal::KillGroup)));
    shell.assert_back(Reason::Stuck(Seat(0), WorkerId(2)));
}

#[test]
fn whoever_wants_it_back_gets_it_back_until_the_old_generation_has_begun_to_leave() {
    type Stage = (&'static str, fn() -> Shell);
    let stages: [Stage; 3] = [
        ("launching", || {
            let mut shell = Shell::serving(Engine::Ebpf, 1);
            shell.upgrade(1, Trigger::Command);
            shell
        }),
        ("canary", || Shell::on_trial(Engine::Ebpf, canary(1))),
        ("bake", || Shell::on_trial(Engine::Ebpf, baking(1))),
    ];
    for (stage, begin) in stages {
        let mut shell = begin();
        shell.tell(Event::TakeBack { by: Some(Ticket(1)) });
        shell.pass(SECOND * 2);
        shell.drains(2);
        shell.exits(2, Exit::Code(0));
        shell.pass(SECOND);
        assert_eq!(shell.receipt().reason, Some(Reason::TakenBack), "{stage}");
        let receipt = shell.receipt().serial;
        assert!(shell.has_said(&Command::Reply { to: Ticket(1), receipt, asked: Asked::Back }), "{stage}");
        assert!(!shell.has_said(&stop(1)) && !shell.has_said(&signal(1, Signal::Stop)), "{stage}");
    }
    let mut shell = Shell::on_trial(Engine::Ebpf, Shell::plan(1));
    shell.tell(Event::TakeBack { by: Some(Ticket(1)) });
    assert!(shell.has_said(&Command::ReplyDone { to: Ticket(1), failure: Some(Reason::TooLate) }));
}

/// Every look shows so much in the queues of the old and the new worker.
fn queues(shell: &mut Shell, depths: [u32; 2]) {
    let depth = |queued| Depth { queued, backlog: 4096, drops: Some(0), quiet: None };
    let view = GroupView {
        members: [1, 2].map(|n| Member { cookie: n.into(), listener: Some(ListenerId(n)) }).into(),
        depths: [1, 2].map(ListenerId).into_iter().zip(depths.map(depth)).collect(),
        ..GroupView::default()
    };
    shell.shown = Some(view);
    shell.pass(Duration::from_millis(250));
}

#[test]
fn a_canary_whose_queue_grows_is_taken_back_and_a_burst_is_not_held_against_it() {
    let mut shell = Shell::on_trial(Engine::Ebpf, canary(1));
    for queued in [20, 40, 60, 0, 20, 40, 60, 5] {
        queues(&mut shell, [0, queued]);
    }
    for _ in 0..8 {
        queues(&mut shell, [30, 50]);
    }
    assert_eq!(shell.master.state(), MasterState::Canary, "it ended, or the sibling has it, too");
    for queued in [20, 40, 60, 80, 80] {
        queues(&mut shell, [1, queued]);
    }
    shell.shown = None;
    shell.assert_back(Reason::QueueGrows(GROUP));
}

#[test]
fn another_master_goes_on_with_the_canary_and_the_bake_and_checks_anew() {
    for engine in [Engine::Ebpf, Engine::Cbpf] {
        let mut shell = Shell::on_trial(engine, checked(canary(1)));
        shell.pass(SECOND);
        shell.is_succeeded(&[]);
        assert_eq!(shell.weights().last(), Some(&vec![50, 950]), "{engine:?}");
        assert_eq!(shell.checks(), [2]);
        shell.passes(1);
        shell.pass(SECOND * 15);
        assert_eq!(shell.master.state(), MasterState::Canary, "the answer of another master's check");
        shell.passes(2);
        assert_eq!(shell.weights().last(), Some(&vec![500, 500]), "{engine:?}");

        let mut shell = Shell::on_trial(engine, baking(1));
        shell.is_succeeded(&[]);
        assert_eq!(shell.master.state(), MasterState::Baking);
        shell.exits(2, KILLED);
        assert_eq!(shell.master.status().active, Some(Generation(1)), "{engine:?}");
    }
}

#[test]
fn fifty_wishes_become_few_upgrades_and_the_last_one_wins() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    for ticket in 1..=50 {
        let plan = Plan { config: u64::from(ticket), workers: 1, ..Shell::plan(1) };
        let by = Some((Ticket(ticket), Wait::Retired));
        shell.tell(Event::Upgrade { plan, trigger: Trigger::Command, by });
        shell.pass(Duration::from_millis(10));
    }
    for worker in 2..=3 {
        shell.ready(worker);
        shell.pass(SECOND * 2);
        shell.drains(worker - 1);
        shell.pass(SECOND);
    }
    assert_eq!(shell.master.status().active, Some(Generation(3)));
    let answers = |ticket| {
        let to = |said: &&Command| matches!(said, Command::Reply { to, .. } if *to == Ticket(ticket));
        let asked = shell.said.iter().filter(to).map(|said| match said {
            Command::Reply { receipt, asked, .. } => (*receipt, *asked),
            _ => unreachable!(),
        });
        asked.collect::<Vec<_>>()
    };
    assert_eq!(answers(1), [(2, Asked::This)]);
    assert!((2..50).all(|ticket| answers(ticket) == [(3, Asked::Earlier)]));
    assert_eq!(answers(50), [(3, Asked::This)]);
}

#[test]
fn a_wish_that_had_to_wait_lets_others_join_it() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    shell.pass(SECOND * 2);
    for _ in 0..2 {
        shell.launch(Shell::plan(1), Trigger::Command);
    }
    shell.ready(2);
    shell.pass(Duration::from_millis(200));
    shell.drains(1);
    shell.pass(Duration::from_millis(200));
    let status = shell.master.status();
    assert_eq!((status.state, status.upgrade_waits), (MasterState::Steady, true));
    shell.launch(Shell::plan(3), Trigger::Command);
    let begins = Command::Report(Report::Launching(Generation(3), Trigger::Command));
    assert!(!shell.has_said(&begins));
    shell.pass(SECOND);
    assert!(shell.has_said(&begins));
    assert_eq!(shell.master.seats(Generation(3)), 3, "the latest");
}

#[test]
fn a_wish_during_an_upgrade_is_remembered_once_and_everybody_is_answered() {
    let mut shell = Shell::serving(Engine::Ebpf, 1);
    for ticket in 1..=3 {
        let by = Some((Ticket(ticket), Wait::Retired));
        shell.tell(Event::Upgrade { plan: Shell::plan(1), trigger: Trigger::Command, by });
    }
    assert!(shell.has_said(&Command::Report(Report::Superseded(Trigger::Command))));
    for worker in 2..=3 {
        shell.ready(worker);
        shell.pass(SECOND);
        shell.drains(worker - 1);
    }
    let answered = |ticket| {
        shell
            .said
            .iter()
            .filter(|said| matches!(said, Command::Reply { to, .. } if *to == Ticket(ticket)))
            .count()
    };
    assert_eq!([1, 2, 3].map(answered), [1, 1, 1]);
    assert_eq!(shell.master.status().active, Some(Generation(3)), "not four");
}
