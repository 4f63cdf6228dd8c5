//! Upgrades that succeed, under load: nothing is lost, whatever the engine and the kind of worker.

use std::time::Duration;

use crate::support::app::App;
use crate::support::load::{Load, slow_accepts, spec};
use crate::support::master::Master;
use crate::support::rounds;
use crate::support::world::{World, needs_of, world};
use reuseportd_bench::Spec;

/// Upgrades under a load by `kind` workers, and the same load on the naive control, which must lose.
fn upgrades_lose_nothing(
    engine: &'static str,
    mode: &str,
    load: impl Fn(&World) -> Spec + Sync,
    accept_delay: u32,
) {
    world(needs_of(engine), |world| {
        let app =
            App::test_worker(world, &format!("--mode {mode} --accept-delay {accept_delay}")).engine(engine);
        let master = Master::start(world, &app);
        let load_running = Load::start(load(world));
        let upgrades = rounds(5, 20);
        for generation in 2..=upgrades + 1 {
            master.hup();
            load_running.answered_by(generation);
        }
        load_running.answered(100);
        let report = load_running.end_lossless();
        assert_eq!(report.generations.len(), upgrades as usize + 1, "{report}");
        master.stop();
        control_loses(world, load(world), accept_delay);
    });
}

/// Steering off, and workers that drop their queues when they are told to stop: the load must show it.
pub(crate) fn control_loses(world: &World, spec: Spec, accept_delay: u32) {
    let options = format!("--mode naive --accept-delay {accept_delay}");
    let app = App::test_worker(world, &options).engine("none").upgrade("stop_when = \"drained\"");
    let master =
        Master::start(world, &app.upgrade("drain_timeout = \"1s\"").upgrade("settle_timeout = \"100ms\""));
    let load = Load::start(spec);
    for _ in 0..2 {
        master.hup();
        load.answered(100);
    }
    let report = load.end();
    assert!(report.lost() > 0, "the load shows nothing, the naive control loses nothing either: {report}");
    master.stop();
}

#[test]
fn sdk_workers_with_slow_accepts_ebpf() {
    upgrades_lose_nothing("ebpf", "sdk", slow_accepts, 5);
}

#[test]
fn sdk_workers_with_slow_accepts_cbpf() {
    upgrades_lose_nothing("cbpf", "sdk", slow_accepts, 5);
}

#[test]
fn unmodified_workers_with_slow_accepts_ebpf() {
    upgrades_lose_nothing("ebpf", "plain", slow_accepts, 5);
}

#[test]
fn unmodified_workers_with_slow_accepts_cbpf() {
    upgrades_lose_nothing("cbpf", "plain", slow_accepts, 5);
}

/// Many fast connections, bursts and slow clients.
fn fast(world: &World) -> Spec {
    spec(world).rate(f64::from(rounds(1000, 2000))).burst(150, Duration::from_millis(300)).slow(20)
}

#[test]
fn many_fast_connections_sdk_ebpf() {
    upgrades_lose_nothing("ebpf", "sdk", fast, 0);
}

#[test]
fn many_fast_connections_unmodified_cbpf() {
    upgrades_lose_nothing("cbpf", "plain", fast, 0);
}

#[test]
fn many_fast_connections_sdk_cbpf() {
    upgrades_lose_nothing("cbpf", "sdk", fast, 0);
}

#[test]
fn many_fast_connections_unmodified_ebpf() {
    upgrades_lose_nothing("ebpf", "plain", fast, 0);
}
