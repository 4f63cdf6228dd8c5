//! `WatchdogSec=`: the master gives signs of life; one that hangs is replaced, and its workers are adopted.

use super::unit::Unit;
use super::with_each_systemd;
use crate::support::machine::{Systemd, machine};

with_each_systemd!(a_master_that_hangs_is_followed);

fn a_master_that_hangs_is_followed(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode plain");
        unit.drop_in("[Service]\nWatchdogSec=1");
        unit.succeed("start");
        let micros = |property: &str| unit.property(property).parse::<u64>().unwrap();
        let started = micros("ActiveEnterTimestampMonotonic");
        let alive = |sign: &str| sign.parse::<u64>().unwrap() > started + 3_000_000;
        unit.wait_property("WatchdogTimestampMonotonic", alive);
        assert_eq!(unit.property("NRestarts"), "0", "{}", unit.journal());

        let workers = unit.workers();
        unit.signal_master("SIGSTOP");
        unit.wait_property("NRestarts", |count| count == "1");
        unit.wait_property("ActiveState", |state| state == "active");
        assert!(unit.journal().contains("Watchdog timeout"), "{}", unit.journal());
        assert!(unit.status().master.adopted, "{}", unit.journal());
        assert_eq!(unit.workers(), workers);
        unit.succeed("stop");
        unit.nothing_is_left();
    });
}
