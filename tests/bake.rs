//! Bakes: the old generation stands by, gets nothing, and has everything again at once when the new one fails.

mod carried;

use reuseportd_wire::status::{GenerationState, GenerationStatus, MasterState, Outcome, Status, WorkerState};
use rustix::process::Signal;

use crate::canary::{pids_of, steps};
use crate::crash::{one_at_a_time, queues_of_twenty};
use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::gate::Gate;
use crate::support::load::{Load, slow_accepts, spec};
use crate::support::master::Master;
use crate::support::process::signal;
use crate::support::world::{needs_of, world};

fn generation(status: &Status, number: u32) -> &GenerationStatus {
    let found = status.generations.iter().find(|one| one.generation == number);
    found.unwrap_or_else(|| panic!("no generation {number}: {status:#?}"))
}

/// Waits for the bake of generation 2, in which generation 1 stands by with all that it has.
fn baking(master: &Master, before: &[u32]) -> Status {
    let status = master.wait_status("baking", |status| status.state == MasterState::Baking);
    let (old, new) = (generation(&status, 1), generation(&status, 2));
    assert_eq!((old.state, new.state), (GenerationState::Standby, GenerationState::Active), "{status:#?}");
    assert!(old.share.abs() < 1e-9 && (new.share - 1.0).abs() < 1e-9, "{status:#?}");
    assert_eq!((status.active_generation, pids_of(&status, 1)), (Some(2), before.to_vec()), "{status:#?}");
    assert!(old.workers.iter().all(|worker| worker.state == WorkerState::Serving), "{status:#?}");
    status
}

/// Kills one of those that stand by, once it has nothing in its hands, and waits for the next one on its seat.
fn kill_a_standby(master: &Master) -> Vec<u32> {
    // The queues are looked at first: what is accepted after that is counted as a connection.
    let is_idle = |one: &GenerationStatus| {
        let mut listeners = one.workers.iter().flat_map(|worker| &worker.listeners);
        listeners.all(|listener| listener.accept_queue == Some(0)) && one.connections == Some(0)
    };
    let status = master.wait_status("idle", |status| is_idle(generation(status, 1)));
    let killed = pids_of(&status, 1)[2];
    signal(killed, Signal::KILL);
    let respawned = |status: &Status| {
        let worker = &generation(status, 1).workers[2];
        worker.restarts == 1 && worker.state == WorkerState::Serving && worker.pid != Some(killed)
    };
    let status = master.wait_status("respawned", respawned);
    assert_eq!(status.state, MasterState::Baking, "{status:#?}");
    assert_eq!(generation(&status, 1).state, GenerationState::Standby, "{status:#?}");
    let pids = pids_of(&status, 1);
    assert_eq!(pids.len(), 4);
    pids
}

fn who_stands_by_gets_nothing(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let gate = Gate::new(world);
        let app = App::test_worker(world, &format!("--mode {mode} --accept-delay 5")).engine(engine);
        let master = Master::start(world, &gate.guards(app.upgrade("bake = \"1s\""), "10m"));
        let load = Load::start(slow_accepts(world));
        let before = master.serving();
        let upgrade = master.begin("upgrade --wait=drained --json");
        baking(&master, &before);
        // From here on an answer of the old generation is a stray.
        load.answered_by(2);
        load.answered(500);
        kill_a_standby(&master);
        load.answered(500);
        gate.answer(1, 0);
        let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
        assert_eq!(
            (code, receipt.outcome, receipt.checks_passed),
            (0, Outcome::Completed, 1),
            "{receipt:#?}"
        );
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn who_stands_by_gets_nothing_sdk_ebpf() {
    who_stands_by_gets_nothing("ebpf", "sdk");
}

#[test]
fn who_stands_by_gets_nothing_unmodified_ebpf() {
    who_stands_by_gets_nothing("ebpf", "plain");
}

#[test]
fn who_stands_by_gets_nothing_sdk_cbpf() {
    who_stands_by_gets_nothing("cbpf", "sdk");
}

#[test]
fn who_stands_by_gets_nothing_unmodified_cbpf() {
    who_stands_by_gets_nothing("cbpf", "plain");
}

fn every_seat_is_back_after_a_failure(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = one_at_a_time(world, mode, engine).upgrade("bake = \"10m\"");
        let master = Master::start(world, &app);
        let load = Load::start(queues_of_twenty(world));
        let before = master.serving();
        let upgrade = master.begin("upgrade --wait --json");
        let status = baking(&master, &before);
        let standby = kill_a_standby(&master);
        signal(pids_of(&status, 2)[0], Signal::KILL);
        let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        assert_eq!(master.serving(), standby, "the old generation has been touched");
        // All that is begun from here on is the old generation's, and each of its seats has a part.
        let later = load.beside(spec(world).rate(200.0).limit(400)).join();
        assert_eq!(
            (later.lost(), later.generations.keys().copied().collect::<Vec<_>>()),
            (0, vec![1]),
            "{later}"
        );
        let seats: Vec<u32> = later.generations[&1].seats.keys().copied().collect();
        assert_eq!(seats, [0, 1, 2, 3], "{later}");
        let report = load.end();
        assert!(report.lost() <= 1 + master.counted_losses(), "{report}\n{}", master.log());
        master.stop();
    });
}

#[test]
fn every_seat_is_back_after_a_failure_sdk_ebpf() {
    every_seat_is_back_after_a_failure("ebpf", "sdk");
}

#[test]
fn every_seat_is_back_after_a_failure_unmodified_cbpf() {
    every_seat_is_back_after_a_failure("cbpf", "plain");
}

/// Whatever it is at: the client of the rollback has what it wanted, that of the upgrade has not.
fn rollback_takes_it_back(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = App::test_worker(world, &format!("--mode {mode} --accept-delay 5")).engine(engine);
        let master = Master::start(world, &app);
        let load = Load::start(slow_accepts(world));
        let before = master.serving();
        let canary = steps(&["{ share = \"20%\", hold = \"10m\" }"]);
        for (phase, line, fails) in [
            (MasterState::Launching, "ready_timeout = \"10m\"", "--fail never-ready"),
            (MasterState::Canary, &canary, ""),
            (MasterState::Baking, "bake = \"10m\"", ""),
        ] {
            let mut next = app.clone().upgrade(line);
            next.command = test_worker(&format!("--mode {mode} --accept-delay 5 {fails}"));
            next.write();
            let upgrade = master.begin("upgrade --wait");
            master.wait_status("so far", |status| status.state == phase);
            let steered = phase != MasterState::Launching;
            if steered {
                load.answered(100);
            }
            let rollback = master.cli("rollback --wait");
            let upgrade = upgrade.finish(PATIENCE);
            let told = format!("{phase}: {rollback:#?} {upgrade:#?}\n{}", master.log());
            assert_eq!((rollback.code, upgrade.code), (0, 1), "{told}");
            for said in [&rollback.stdout, &upgrade.stderr] {
                assert!(said.contains("it was taken back (`reuseportd rollback`)"), "{told}");
            }
            let status = master.status();
            let receipt = status.last_upgrade.clone().unwrap();
            assert_eq!(
                (receipt.outcome, receipt.steer_back_us.is_some()),
                (Outcome::RolledBack, steered),
                "{told}"
            );
            assert_eq!((status.state, master.serving()), (MasterState::Steady, before.clone()), "{told}");
        }
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn rollback_takes_it_back_sdk_ebpf() {
    rollback_takes_it_back("ebpf", "sdk");
}

#[test]
fn rollback_takes_it_back_unmodified_cbpf() {
    rollback_takes_it_back("cbpf", "plain");
}

/// Each step asks for its own time, and a little more.
#[test]
fn the_service_manager_is_asked_for_as_much_time() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain").workers(1);
        let app = app.upgrade(steps(&["{ share = \"1%\", hold = \"100ms\" }"])).upgrade("bake = \"2h\"");
        let master = Master::start(world, &app);
        let (mark, upgrade) = (master.upstream.mark(), master.begin("upgrade --wait"));
        for usec in ["5100000", "7205000000"] {
            let told = master.upstream.wait(mark, &format!("EXTEND_TIMEOUT_USEC={usec}"), PATIENCE);
            assert!(told.is_some(), "{usec} is not in {:#?}", master.upstream.told());
        }
        assert_eq!(master.cli("rollback --wait").code, 0);
        assert_eq!(upgrade.finish(PATIENCE).code, 1);
        master.stop();
    });
}
