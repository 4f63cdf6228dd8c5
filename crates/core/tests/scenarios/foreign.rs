//! A server that no master has started, and a first generation that takes over from it, or doesn't.

use crate::shell::{GROUP, Shell};
use crate::{KILLED, SECOND};
use reuseportd_core::{
    CanaryStep, CheckFailure, Command, Engine, Event, Exit, Generation, ListenerId, MasterState, Notice,
    Outcome, Plan, Report, Signal, StopMode, Trigger, WorkerId,
};

/// As a worker; its only listener has the same number.
const SERVER: u32 = 1;

fn plan() -> Plan {
    Plan { canary: vec![CanaryStep { share: 100, hold: SECOND * 10 }], bake: SECOND * 30, ..Shell::plan(1) }
}

/// How far the first generation gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    Launching,
    Canary,
    Baking,
}

const ANYWHERE: [Until; 3] = [Until::Launching, Until::Canary, Until::Baking];

impl Shell {
    /// The server serves, and worker 2 is launched beside it.
    fn taking_over(plan: Plan) -> Shell {
        Shell::taking_over_from(Shell::plan(1), plan)
    }

    fn taking_over_from(server: Plan, plan: Plan) -> Shell {
        let mut shell = Shell::new(Engine::Ebpf);
        shell.listeners = 1;
        let listener = ListenerId(1);
        shell.owners.insert(listener, SERVER);
        shell.members.push(listener);
        let listeners = vec![(GROUP, listener)];
        shell.tell(Event::Foreign { plan: server, server: WorkerId(SERVER), listeners });
        shell.launch(plan, Trigger::Takeover);
        shell
    }

    fn got(until: Until) -> Shell {
        let mut shell = Shell::taking_over(plan());
        if until != Until::Launching {
            shell.ready(2);
        }
        if until == Until::Baking {
            shell.pass(SECOND * 11);
        }
        let expected = match until {
            Until::Launching => MasterState::Launching,
            Until::Canary => MasterState::Canary,
            Until::Baking => MasterState::Baking,
        };
        assert_eq!(shell.master.state(), expected);
        shell
    }

    fn signals_to_server(&self) -> Vec<Signal> {
        let to_server = |command: &Command| match command {
            Command::Signal { worker: WorkerId(SERVER), signal } => Some(*signal),
            _ => None,
        };
        self.said.iter().filter_map(to_server).collect()
    }

    fn is_let_go(&self) -> bool {
        self.has_said(&let_go())
    }

    /// Nobody was sent to the new worker at the end, the server was not touched, and the master ends.
    fn assert_let_go(&mut self) {
        // What the new worker was given it finishes.
        self.pass(SECOND * 5);
        self.drains(2);
        self.exits(2, Exit::Code(0));
        self.pass(SECOND);
        assert_eq!(self.signals_to_server(), []);
        assert!(self.is_let_go() && self.has_said(&Command::Exit { code: 1 }), "{:#?}", self.said);
        let release = Command::Release { listener: ListenerId(SERVER), shutdown: false };
        assert!(self.place(&let_go()) < self.place(&release), "the handle is what it is done through");
        assert!(!self.has_said(&Command::Notify(Notice::Ready)));
        let refuses = |said: &&Command| matches!(said, Command::Steer { ranges, .. } if ranges.is_empty());
        assert_eq!(self.said.iter().find(refuses), None);
    }

    fn launched(&self) -> Vec<Generation> {
        let of = |command: &Command| match command {
            Command::Spawn { generation, .. } => Some(*generation),
            _ => None,
        };
        self.said.iter().filter_map(of).collect()
    }
}

fn let_go() -> Command {
    Command::LetGo { listeners: vec![ListenerId(SERVER)] }
}

#[test]
fn the_server_is_told_to_stop_when_the_first_generation_serves() {
    let mut shell = Shell::got(Until::Baking);
    assert_eq!(shell.signals_to_server(), []);
    assert!(!shell.has_said(&Command::Notify(Notice::Ready)));
    shell.pass(SECOND * 32);
    assert!(shell.has_said(&Command::Notify(Notice::Ready)));
    assert_eq!(shell.signals_to_server(), [Signal::Stop]);
    shell.exits(SERVER, Exit::Unknown);
    shell.pass(SECOND);
    assert!(!shell.is_let_go());
    let receipt = shell.receipt();
    assert_eq!((receipt.from, receipt.to), (Some(Generation(0)), Some(Generation(1))));
    assert_eq!((receipt.trigger, receipt.outcome), (Trigger::Takeover, Outcome::Completed));
    assert_eq!((shell.master.state(), shell.launched()), (MasterState::Steady, vec![Generation(1)]));
}

#[test]
fn it_serves_on_when_the_first_generation_fails() {
    for until in ANYWHERE {
        let mut shell = Shell::got(until);
        shell.exits(2, KILLED);
        shell.assert_let_go();
    }
    let mut shell = Shell::taking_over(Plan { check_interval: Some(SECOND), canary: Vec::new(), ..plan() });
    shell.ready(2);
    shell.tell(Event::Checked { run: 1, failure: Some(CheckFailure::Ended(Exit::Code(1))) });
    shell.assert_let_go();
    let mut shell = Shell::taking_over(Shell::plan(1));
    shell.pass(SECOND * 61);
    shell.assert_let_go();
}

#[test]
fn it_serves_on_when_the_master_is_stopped_before() {
    for until in ANYWHERE {
        for modes in [&[StopMode::Graceful][..], &[StopMode::Graceful; 2], &[StopMode::Fast]] {
            let mut shell = Shell::got(until);
            for mode in modes {
                shell.tell(Event::Stop { mode: *mode, by: None });
            }
            shell.assert_let_go();
        }
    }
}

#[test]
fn after_that_it_is_an_old_generation_like_any_other() {
    let mut shell = Shell::taking_over(Shell::plan(1));
    shell.open = 1;
    shell.ready(2);
    shell.tell(Event::Stop { mode: StopMode::Graceful, by: None });
    shell.pass(SECOND * 5);
    assert_eq!(shell.signals_to_server(), [Signal::Stop]);
    shell.pass(SECOND * 60);
    assert_eq!(shell.signals_to_server()[1..], [Signal::KillGroup]);
    assert!(!shell.is_let_go());
}

#[test]
fn when_it_ends_by_itself_the_first_generation_goes_on() {
    for until in ANYWHERE {
        for remains in [false, true] {
            let mut shell = Shell::got(until);
            shell.owners.remove(&ListenerId(SERVER));
            shell.tell(Event::Exited { worker: WorkerId(SERVER), how: Exit::Unknown, remains });
            if until == Until::Launching {
                assert_eq!(shell.released(), [0; 0], "clients wait");
                shell.ready(2);
            }
            shell.pass(SECOND);
            // What it left may still accept there.
            let release = Command::Release { listener: ListenerId(SERVER), shutdown: true };
            assert!(shell.has_said(&release), "{until:?} {:#?}", shell.said);
            assert_eq!(shell.signals_to_server(), []);
            assert_eq!(shell.launched(), [Generation(1)]);
            assert_eq!(shell.master.state(), MasterState::Steady, "{until:?}");
            assert_eq!(shell.receipt().outcome, Outcome::Completed);
            assert!(shell.has_said(&Command::Notify(Notice::Ready)));
        }
    }
}

#[test]
fn with_both_gone_the_master_ends() {
    let mut shell = Shell::taking_over(Shell::plan(1));
    shell.exits(SERVER, KILLED);
    shell.exits(2, KILLED);
    shell.pass(SECOND);
    assert!(shell.has_said(&Command::Exit { code: 1 }), "{:#?}", shell.said);
    assert_eq!(shell.launched(), [Generation(1)]);
}

/// What is left of it may still accept from its listener.
#[test]
fn what_it_leaves_serves_on_when_the_first_generation_fails_too() {
    let mut shell = Shell::taking_over(Shell::plan(1));
    shell.tell(Event::Exited { worker: WorkerId(SERVER), how: Exit::Unknown, remains: true });
    shell.exits(2, KILLED);
    shell.assert_let_go();
}

#[test]
fn that_it_stops_listening_is_its_own_business() {
    let mut shell = Shell::taking_over(Shell::plan(1));
    shell.owners.remove(&ListenerId(SERVER));
    shell.pass(SECOND * 3);
    assert!(shell.has_said(&Command::Report(Report::ListenerLost(ListenerId(SERVER)))));
    assert_eq!(shell.signals_to_server(), []);
    shell.ready(2);
    shell.pass(SECOND * 3);
    assert_eq!(shell.signals_to_server(), [Signal::Stop]);
}

#[test]
fn a_later_upgrade_that_fails_does_not_save_it() {
    let mut shell = Shell::taking_over(Shell::plan(1));
    shell.open = 1;
    shell.ready(2);
    shell.pass(SECOND * 5);
    shell.owners.remove(&ListenerId(SERVER));
    shell.pass(SECOND);
    shell.upgrade(1, Trigger::Command);
    shell.exits(3, KILLED);
    shell.pass(SECOND * 60);
    assert!(!shell.is_let_go());
    assert_eq!(shell.signals_to_server(), [Signal::Stop, Signal::KillGroup]);
    assert_eq!(shell.master.state(), MasterState::Steady);
}

#[test]
fn a_stop_in_a_later_upgrade_spares_nobody() {
    let mut shell = Shell::taking_over(Shell::plan(1));
    shell.open = 1;
    shell.ready(2);
    shell.pass(SECOND * 5);
    shell.owners.remove(&ListenerId(SERVER));
    shell.pass(SECOND);
    shell.upgrade(1, Trigger::Command);
    shell.tell(Event::Stop { mode: StopMode::Fast, by: None });
    assert_eq!(shell.signals_to_server(), [Signal::Stop, Signal::KillGroup]);
    for worker in [SERVER, 2, 3] {
        shell.exits(worker, KILLED);
    }
    assert!(shell.has_said(&Command::Exit { code: 0 }) && !shell.is_let_go());
}

#[test]
fn the_next_master_goes_on_with_it() {
    for until in ANYWHERE {
        let mut shell = Shell::got(until);
        shell.is_succeeded(&[]);
        assert_eq!(shell.signals_to_server(), []);
        shell.exits(2, KILLED);
        shell.assert_let_go();
    }
}

/// It can't give a sign of life to somebody it does not know.
#[test]
fn it_is_not_watched() {
    let watched = Plan { watchdog: Some(SECOND), ..Shell::plan(1) };
    let mut shell = Shell::taking_over_from(watched, Shell::plan(1));
    shell.is_succeeded(&[]);
    shell.pass(SECOND * 5);
    assert_eq!(shell.signals_to_server(), []);
}

#[test]
fn the_master_after_one_that_let_go_of_it_steers_nothing() {
    let mut shell = Shell::taking_over(Plan { config: 2, workers: 2, configured: 2, ..plan() });
    shell.ready(2);
    shell.ready(3);
    shell.exits(2, KILLED);
    shell.pass(SECOND);
    shell.drains(3);
    shell.pass(SECOND);
    assert!(shell.has_said(&let_go()));
    shell.is_succeeded(&[]);
    shell.pass(SECOND);
    let steers =
        |said: &Command| matches!(said, Command::Steer { .. } | Command::Report(Report::SteerFailed(..)));
    assert!(!shell.said.iter().any(steers), "{:?}", shell.said);
}
