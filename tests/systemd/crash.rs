//! The master is killed: its workers serve on, systemd starts the next one, and that one adopts them.

use std::time::Duration;

use reuseportd_bench::Spec;
use reuseportd_wire::status::MasterState;

use super::unit::Unit;
use super::with_each_systemd;
use crate::support::PATIENCE;
use crate::support::load::{Load, spec};
use crate::support::machine::{Systemd, machine};
use crate::support::world::World;

with_each_systemd!(
    a_killed_master_is_followed_ebpf,
    a_killed_master_is_followed_cbpf,
    stop_leaves_nothing_of_a_killed_master,
    stop_before_the_next_master,
    control_loses,
);

fn load(world: &World) -> Spec {
    spec(world).rate(200.0).burst(60, Duration::from_millis(300)).slow(10)
}

/// Of a worker whose queue is hardly ever empty under this load.
const BUSY: &str = "--mode plain --accept-delay 3";

fn a_killed_master_is_followed_ebpf(systemd: Systemd) {
    followed_under_load(systemd, true, 5);
}

fn a_killed_master_is_followed_cbpf(systemd: Systemd) {
    followed_under_load(systemd, false, 2);
}

/// Kills the master so many times, the last time in the middle of an upgrade.
fn followed_under_load(systemd: Systemd, bpf: bool, times: u32) {
    machine(systemd, bpf, |world, machine| {
        let unit = Unit::new(world, machine, BUSY);
        unit.succeed("start");
        let load = Load::start(load(world));
        for restarts in 1..times {
            let (workers, last) = (unit.workers(), unit.status().active_generation);
            followed(&unit, restarts);
            assert_eq!(unit.workers(), workers, "{}", unit.journal());
            unit.succeed("reload");
            let next = unit.status().active_generation;
            assert_eq!(next, last.map(|last| last + 1));
            load.answered_by(next.unwrap());
        }
        unit.configure(&format!("{BUSY} --ready-delay 3000"), &[]);
        let upgrade = unit.begin("reload");
        unit.wait_property("StatusText", |text| text.starts_with("launching"));
        followed(&unit, times);
        assert_ne!(upgrade.finish(PATIENCE).code, 0, "the client's master was killed");
        unit.wait_status("steady", |status| status.state == MasterState::Steady);
        unit.succeed("reload");
        load.answered_by(unit.status().active_generation.unwrap());
        load.end_lossless();
        assert_eq!(unit.property("NRestarts"), times.to_string());
        unit.succeed("stop");
        unit.nothing_is_left();
    });
}

/// Kills the master, and waits until the next one has adopted what it left.
pub(super) fn followed(unit: &Unit<'_>, restarts: u32) {
    let killed = unit.property("MainPID");
    unit.signal_master("SIGKILL");
    unit.wait_property("NRestarts", |count| count == restarts.to_string());
    unit.wait_property("ActiveState", |state| state == "active");
    let status = unit.status();
    assert_ne!(status.master.pid.to_string(), killed);
    assert!(status.master.adopted, "{status:#?}\n{}", unit.journal());
}

fn stop_leaves_nothing_of_a_killed_master(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, BUSY);
        unit.succeed("start");
        followed(&unit, 1);
        unit.succeed("stop");
        unit.nothing_is_left();

        // Killed while it stops: there will be no next one.
        unit.succeed("start");
        unit.signal_master("SIGSTOP");
        let stop = unit.begin("stop");
        unit.wait_property("SubState", |state| state.starts_with("stop-") || state == "dead");
        let _ = unit.systemctl("kill --kill-whom=main --signal=SIGKILL");
        stop.finish(PATIENCE);
        unit.nothing_is_left();
    });
}

/// Between a crash and the restart systemd runs nothing on a stop: that is the operator's to end.
fn stop_before_the_next_master(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, BUSY);
        unit.drop_in("[Service]\nRestartSec=1h");
        unit.succeed("start");
        unit.signal_master("SIGKILL");
        unit.wait_property("SubState", |state| state == "auto-restart");
        unit.succeed("stop");
        let done = unit.cli("stop --left-behind");
        assert_eq!(done.code, 0, "{done:#?}");
        unit.nothing_is_left();
    });
}

/// What the same load loses when the workers are killed with their master.
fn control_loses(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, BUSY);
        unit.drop_in("[Service]\nKillMode=mixed");
        unit.succeed("start");
        let load = Load::start(load(world));
        unit.signal_master("SIGKILL");
        unit.wait_property("NRestarts", |count| count == "1");
        unit.wait_property("ActiveState", |state| state == "active");
        load.answered(50);
        let report = load.end();
        assert!(report.lost() > 0, "this load would not show a loss: {report}");
    });
}
