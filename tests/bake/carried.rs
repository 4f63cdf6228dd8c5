//! A canary and a bake outlive their master: its program is replaced, or it is killed and the next one goes on with them.

use std::time::Duration;

use reuseportd_wire::status::{MasterState, Outcome, Status};

use crate::canary::{pids_of, steps};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::gate::Gate;
use crate::support::load::{Load, slow_accepts};
use crate::support::master::Master;
use crate::support::process::wait_gone;
use crate::support::world::{World, needs_of, world};

const HOLD: Duration = Duration::from_secs(3);

/// What is left of the hold.
fn left(status: &Status) -> Duration {
    Duration::from_millis(status.hold_ms.unwrap_or_default())
}

/// Waits until half of the step has passed: had it begun anew after that, it would show.
fn halfway(master: &Master, phase: MasterState) -> Status {
    master.wait_status("halfway", |status| {
        status.state == phase && status.hold_ms.is_some() && left(status) < HOLD / 2
    })
}

/// The same upgrade, the same workers, and the step's time has gone on.
fn goes_on(before: &Status, after: &Status) {
    assert_eq!(
        (after.state, after.active_generation),
        (before.state, before.active_generation),
        "{after:#?}"
    );
    for (before, after) in before.generations.iter().zip(&after.generations) {
        assert_eq!((after.generation, after.state), (before.generation, before.state));
        assert!((after.share - before.share).abs() < 1e-9, "{before:#?} {after:#?}");
    }
    for of in before.generations.iter().map(|one| one.generation) {
        assert_eq!(pids_of(after, of), pids_of(before, of));
    }
    assert!(left(after) <= left(before), "the step has begun anew: {before:#?} {after:#?}");
}

fn trial(world: &World, engine: &'static str, mode: &str, phase: MasterState) -> App {
    let app = App::test_worker(world, &format!("--mode {mode} --accept-delay 5")).engine(engine);
    match phase {
        MasterState::Canary => app.upgrade(steps(&["{ share = \"30%\", hold = \"3s\" }"])),
        _ => app.upgrade("bake = \"3s\""),
    }
}

fn outlives_its_master(engine: &'static str, mode: &str, phase: MasterState) {
    world(needs_of(engine), |world| {
        let gate = Gate::new(world);
        let mut master = Master::start(world, &gate.guards(trial(world, engine, mode, phase), "10m"));
        let load = Load::start(slow_accepts(world));

        let upgrade = master.begin("upgrade --wait=drained --json");
        let before = halfway(&master, phase);
        let done = master.cli("reexec");
        assert_eq!(done.code, 0, "{done:#?}\n{}", master.log());
        let after = master.status();
        assert_eq!(after.master.reexecs, 1);
        goes_on(&before, &after);
        load.answered(100);
        // The check that ran all the while is the one that counts.
        gate.answer(1, 0);
        let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
        assert_eq!(
            (code, receipt.outcome, receipt.checks_passed),
            (0, Outcome::Completed, 1),
            "{receipt:#?}"
        );
        assert_eq!(gate.runs().len(), 1, "{:#?}\n{}", gate.runs(), master.log());
        load.answered_by(2);

        assert_eq!(master.cli("upgrade").code, 0);
        let before = halfway(&master, phase);
        let of_the_killed = gate.begun(&master, 2);
        master.kill();
        load.answered(100);
        master.restart();
        let after = master.wait_adopted();
        goes_on(&before, &after);
        // How that check ends the next master can't know: it has ended it, and asks again.
        gate.begun(&master, 3);
        wait_gone(of_the_killed.number("PID"), PATIENCE);
        gate.answer(1, 0);
        let status = master.wait_status("steady", |status| status.state == MasterState::Steady);
        let receipt = status.last_upgrade.expect("it went to its end");
        assert_eq!((receipt.outcome, receipt.to), (Outcome::Completed, Some(3)), "{receipt:#?}");
        assert_eq!((status.active_generation, receipt.checks_passed), (Some(3), 1), "{receipt:#?}");
        load.answered_by(3);
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn a_canary_outlives_its_master_sdk_ebpf() {
    outlives_its_master("ebpf", "sdk", MasterState::Canary);
}

#[test]
fn a_canary_outlives_its_master_unmodified_cbpf() {
    outlives_its_master("cbpf", "plain", MasterState::Canary);
}

#[test]
fn a_bake_outlives_its_master_unmodified_ebpf() {
    outlives_its_master("ebpf", "plain", MasterState::Baking);
}

#[test]
fn a_bake_outlives_its_master_sdk_cbpf() {
    outlives_its_master("cbpf", "sdk", MasterState::Baking);
}
