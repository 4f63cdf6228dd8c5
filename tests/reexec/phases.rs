//! A re-exec in every phase: what is under way goes on, and its deadlines are the old ones.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use reuseportd_wire::status::{GenerationState, MasterState, Outcome, Phase, Status, WorkerState};
use rustix::process::Signal;

use super::{reexec, reexec_until_answered};
use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::client::{self, answer};
use crate::support::master::Master;
use crate::support::process::kill;
use crate::support::world::{World, world};

/// What is written as "3s" below, in milliseconds: long enough to be seen under way on a loaded machine.
const WHILE: u64 = 3000;

/// Milliseconds that are left to a worker that never served when it is told to stop.
const GRACE: u64 = 2000;

/// A connection that is accepted, and keeps its worker busy.
fn open(world: &World, master: &Master) -> TcpStream {
    let client = client::open(world);
    master.wait_status("accepted", |status| status.generations[0].connections == Some(1));
    client
}

fn has_generation(status: &Status, state: GenerationState) -> bool {
    status.generations.iter().any(|one| one.state == state)
}

fn has_worker(status: &Status, state: WorkerState) -> bool {
    status.generations.iter().flat_map(|one| &one.workers).any(|worker| worker.state == state)
}

#[test]
fn while_launching() {
    world(&[], |world| {
        for mode in ["sdk", "plain"] {
            let mut app = App::test_worker(world, &format!("--mode {mode}")).workers(2);
            let master = Master::start(world, &app);
            app.command = test_worker(&format!("--mode {mode} --ready-delay 3000"));
            app.write();
            let upgrade = master.begin("upgrade --wait --json");
            master.wait_status("launching", |status| has_worker(status, WorkerState::Starting));
            let (code, receipt) = master.receipt(reexec_until_answered(&master, upgrade));
            assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}");
            assert_eq!((receipt.from, receipt.to), (Some(1), Some(2)));
            master.stop();
        }
    });
}

#[test]
fn while_launching_what_never_gets_ready() {
    world(&[], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(2);
        let master = Master::start(world, &app);
        let before = master.serving();
        app.command = test_worker("--mode plain --fail never-ready --print no-such-database");
        app.upgrade("ready_timeout = \"3s\"").write();
        let upgrade = master.begin("upgrade --wait --json");
        master.wait_status("launching", |status| has_worker(status, WorkerState::Starting));
        let (code, receipt) = master.receipt(reexec_until_answered(&master, upgrade));
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        assert!(receipt.duration_ms >= WHILE, "{receipt:#?}");
        let reason = receipt.reason.unwrap_or_default();
        assert!(reason.contains("ready_timeout") && reason.contains("no-such-database"), "{reason}");
        assert_eq!(master.serving(), before);
        master.stop();
    });
}

#[test]
fn while_retiring() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain").workers(1);
        let app = app.upgrade("stop_when = \"idle\"").upgrade("idle_timeout = \"3s\"");
        let master = Master::start(world, &app);
        let client = open(world, &master);
        let upgrade = master.begin("upgrade --wait --json");
        master.wait_status("retiring", |status| has_generation(status, GenerationState::Retiring));
        let (code, receipt) = master.receipt(reexec_until_answered(&master, upgrade));
        assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}");
        let retiring = receipt.phases.iter().find(|one| one.phase == Phase::Retiring).map(|one| one.ms);
        assert!(retiring.is_some_and(|ms| ms >= WHILE - 100), "{receipt:#?}");
        assert!(answer(client).contains("generation=1"));
        master.stop();
    });
}

#[test]
fn while_draining() {
    world(&[], |world| {
        for mode in ["sdk", "plain"] {
            let app = App::test_worker(world, &format!("--mode {mode}")).workers(1);
            let app = app.upgrade("idle_timeout = \"1ms\"");
            let master = Master::start(world, &app.clone().upgrade("drain_timeout = \"3s\""));
            let client = open(world, &master);
            // The next generation has all the time its connections need.
            app.write();
            let upgrade = master.begin("upgrade --wait=drained --json");
            master.wait_status("draining", |status| has_generation(status, GenerationState::Draining));
            let (code, receipt) = master.receipt(reexec_until_answered(&master, upgrade));
            assert_eq!((code, receipt.outcome, receipt.forced_kills), (0, Outcome::Completed, 1));
            drop(client);

            // What ends by itself is seen by the next image.
            let client = open_of_second(world, &master);
            let upgrade = master.begin("upgrade --wait=drained --json");
            master.wait_status("draining", |status| has_generation(status, GenerationState::Draining));
            reexec(&master);
            assert!(answer(client).contains("generation=2"));
            let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
            assert_eq!((code, receipt.outcome, receipt.forced_kills), (0, Outcome::Completed, 0));
            master.stop();
        }
    });
}

fn open_of_second(world: &World, master: &Master) -> TcpStream {
    master.wait_status("drained", |status| status.generations.len() == 1);
    open(world, master)
}

#[test]
fn while_rolling_back() {
    world(&[], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(2);
        let master = Master::start(world, &app);
        let before = master.serving();
        // It catches SIGTERM, once it has come so far, and does nothing about it.
        app.command = test_worker("--mode plain --fail never-ready");
        app.upgrade("ready_timeout = \"3s\"").write();
        let upgrade = master.begin("upgrade --wait --json");
        master.wait_status("rolling back", |status| status.state == MasterState::RollingBack);
        let (code, receipt) = master.receipt(reexec_until_answered(&master, upgrade));
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        assert!(receipt.duration_ms >= WHILE + GRACE, "{receipt:#?}");
        assert_eq!(master.serving(), before);
        master.stop();
    });
}

/// Re-executes until the status is as wanted: at least so long after `since`.
fn reexec_until(master: &Master, since: Instant, wanted: impl Fn(&Status) -> bool) {
    while !wanted(&master.status()) {
        assert!(since.elapsed() < PATIENCE, "{:#?}\n{}", master.status(), master.log());
        reexec(master);
    }
    assert!(since.elapsed() >= Duration::from_millis(WHILE), "{:?}\n{}", since.elapsed(), master.log());
    assert!(master.status().master.reexecs > 0);
}

#[test]
fn while_a_seat_waits_to_be_filled() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain").workers(1).restart("backoff = \"3s\"");
        let master = Master::start(world, &app);
        let first = master.serving()[0];
        kill([first]);
        let again = |status: &Status, restarts| {
            let worker = &status.generations[0].workers[0];
            worker.state == WorkerState::Serving && worker.restarts == restarts
        };
        master.wait_status("filled again", |status| again(status, 1));
        let (killed, second) = (Instant::now(), master.serving()[0]);
        kill([second]);
        master.wait_status("in backoff", |status| has_worker(status, WorkerState::Backoff));
        reexec_until(&master, killed, |status| again(status, 2));
        master.stop();
    });
}

#[test]
fn while_the_breaker_is_open() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain").workers(1);
        let app = app.restart("breaker = { exits = 1, window = \"1m\", cooldown = \"3s\" }");
        let master = Master::start(world, &app);
        let (killed, worker) = (Instant::now(), master.serving()[0]);
        kill([worker]);
        let before = master.wait_status("degraded", |status| status.state == MasterState::Degraded);
        reexec(&master);
        let after = master.status();
        assert!(after.state_reason.is_some(), "{after:#?}");
        assert_eq!((after.state, after.state_reason), (MasterState::Degraded, before.state_reason));
        reexec_until(&master, killed, |status| status.state == MasterState::Steady);
        assert_eq!(master.serving().len(), 1);
        master.stop();
    });
}

#[test]
fn while_stopping_there_is_none() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain").workers(1).upgrade("stop_when = \"drained\"");
        let master = Master::start(world, &app);
        let client = open(world, &master);
        let stop = master.begin("stop --wait");
        master.wait_status("stopping", |status| status.state == MasterState::Stopping);
        for _ in 0..3 {
            let refused = master.cli("reexec");
            assert_eq!(refused.code, 1, "{refused:#?}");
            assert!(refused.stderr.contains("the service is stopping"), "{refused:#?}");
            master.signal(Signal::USR2);
        }
        assert_eq!(master.status().master.reexecs, 0);
        assert!(answer(client).contains("generation=1"));
        assert_eq!(stop.finish(PATIENCE).code, 0);
        master.ended(0);
    });
}
