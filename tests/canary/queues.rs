//! A canary whose accept queue grows beyond its siblings' is taken back; a burst that fills all of them is no reason.

use std::time::Duration;

use reuseportd_wire::status::{Outcome, Status};

use super::{in_force, steps};
use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::load::{Load, spec};
use crate::support::master::Master;
use crate::support::world::{needs_of, world};

/// What waits in the queues of each generation, the latest last.
fn queued(status: &Status) -> Vec<u32> {
    let of = |one: &reuseportd_wire::status::GenerationStatus| {
        let listeners = one.workers.iter().flat_map(|worker| &worker.listeners);
        listeners.filter_map(|listener| listener.accept_queue).sum()
    };
    status.generations.iter().map(of).collect()
}

fn a_slower_canary_is_taken_back(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let mut app = App::test_worker(world, &format!("--mode {mode}")).engine(engine);
        let master = Master::start(world, &app);
        let before = master.serving();
        let load = Load::start(spec(world).rate(400.0).slow(10));
        // It takes 80 a second, and gets 200.
        app.command = test_worker(&format!("--mode {mode} --accept-delay 50"));
        app.upgrade(steps(&["{ share = \"50%\", hold = \"10m\" }"])).write();
        let (code, receipt) = master.failing_upgrade();
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        let reason = receipt.reason.clone().unwrap();
        assert!(reason.contains("accept queues grew") && reason.contains("\"default\""), "{reason}");
        assert!(receipt.steer_back_us.is_some(), "{receipt:#?}");
        assert_eq!(master.serving(), before);
        load.answered(200);
        let report = load.end_lossless();
        assert!(report.generations[&2].answers > 0, "{report}");
        master.stop();
    });
}

#[test]
fn a_slower_canary_is_taken_back_sdk_ebpf() {
    a_slower_canary_is_taken_back("ebpf", "sdk");
}

#[test]
fn a_slower_canary_is_taken_back_unmodified_cbpf() {
    a_slower_canary_is_taken_back("cbpf", "plain");
}

/// Bursts that all queues are full of for a second each, and that no listener has the worse part of.
fn bursts_are_no_reason(engine: &'static str) {
    world(needs_of(engine), |world| {
        let app = App::test_worker(world, "--mode sdk --accept-delay 5").engine(engine);
        let master = Master::start(world, &app);
        app.upgrade(steps(&["{ share = \"50%\", hold = \"6s\" }"])).write();
        // Eight workers take 1600 a second.
        let load = Load::start(spec(world).rate(50.0).burst(1600, Duration::from_millis(1500)));
        let upgrade = master.begin("upgrade --wait --json");
        in_force(&master, 2, 0.5);
        let long = |status: &Status| queued(status).iter().all(|queued| *queued >= 100);
        let status = master.wait_status("queued up", |status| status.generations.len() == 2 && long(status));
        assert_eq!(status.active_generation, Some(1));
        let (code, receipt) = master.receipt(upgrade.finish(2 * PATIENCE));
        assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}");
        load.answered_by(2);
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn bursts_are_no_reason_ebpf() {
    bursts_are_no_reason("ebpf");
}

#[test]
fn bursts_are_no_reason_cbpf() {
    bursts_are_no_reason("cbpf");
}
