//! `systemctl stop` leaves nothing, whatever has happened to the master.

use std::net::TcpStream;

use super::unit::Unit;
use super::with_each_systemd;
use crate::support::machine::{Systemd, machine};

with_each_systemd!(stop_leaves_nothing, stop_of_a_master_that_hangs_leaves_nothing);

fn stop_leaves_nothing(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode plain");
        unit.succeed("start");
        assert!(unit.processes().len() >= 3, "master and workers: {:?}", unit.processes());
        unit.succeed("stop");
        assert_eq!(unit.property("Result"), "success", "{}", unit.journal());
        unit.nothing_is_left();

        unit.succeed("start");
        let before = unit.processes();
        unit.succeed("restart");
        assert!(unit.processes().is_disjoint(&before), "{}", unit.journal());
        unit.succeed("stop");
        unit.nothing_is_left();
    });
}

fn stop_of_a_master_that_hangs_leaves_nothing(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode plain");
        unit.drop_in("[Service]\nTimeoutStopSec=5");
        unit.succeed("start");
        // systemd continues what it tells to stop, so it has to be stopped again: with this connection open it waits.
        let open = TcpStream::connect(world.address).unwrap();
        unit.succeed("stop --no-block");
        unit.wait_property("SubState", |state| state == "stop-sigterm");
        unit.signal_master("SIGSTOP");
        unit.wait_property("ActiveState", |state| state == "failed");
        assert_eq!(unit.property("Result"), "timeout", "{}", unit.journal());
        unit.nothing_is_left();
        drop(open);
    });
}
