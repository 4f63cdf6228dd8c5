//! `WatchdogSec=`: the master gives signs of life; one that hangs is replaced, and its workers are adopted.

use super::unit::Unit;
use super::with_each_systemd;
use crate::support::machine::{Systemd, machine};

with_each_systemd!(a_master_that_hangs_is_followed);

fn a_master_that_hangs_is_followed(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode plain");
        unit.drop_in("[Service]\nWatchdogSec=3");
        unit.succeed("start");
        alive_for_a_while(&unit);
        let done = unit.cli("reexec");
        assert_eq!(done.code, 0, "{done:#?}");
        assert_eq!(unit.status().master.reexecs, 1);
        alive_for_a_while(&unit);

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

/// For longer than the timeout.
fn alive_for_a_while(unit: &Unit<'_>) {
    let sign = |text: &str| text.parse::<u64>().expect("microseconds");
    let now = sign(&unit.property("WatchdogTimestampMonotonic"));
    unit.wait_property("WatchdogTimestampMonotonic", |text| sign(text) > now + 4_500_000);
    assert_eq!(unit.property("NRestarts"), "0", "{}", unit.journal());
}
