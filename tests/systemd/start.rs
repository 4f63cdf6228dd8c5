//! `systemctl start`.

use std::time::Duration;

use super::unit::Unit;
use super::with_each_systemd;
use crate::support::machine::{Systemd, machine};

with_each_systemd!(
    start_waits_until_the_service_serves,
    a_long_start_gets_the_time_it_needs,
    a_start_that_fails_is_told
);

fn start_waits_until_the_service_serves(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode plain --ready-delay 1000");
        assert!(unit.succeed("start") >= Duration::from_secs(1));
        assert!(unit.answers(), "{}", unit.journal());
        assert_eq!(unit.property("ActiveState"), "active");
        assert_eq!(unit.property("StatusText"), "generation 1 serves");
        let master = unit.status().master.pid;
        assert_eq!(unit.property("MainPID"), master.to_string());
    });
}

fn a_long_start_gets_the_time_it_needs(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode plain --ready-delay 6000");
        unit.drop_in("[Service]\nTimeoutStartSec=5");
        assert!(unit.succeed("start") >= Duration::from_secs(6));
        let took = unit.succeed("reload");
        assert!(took >= Duration::from_secs(6), "{took:?}");
        assert_eq!(unit.status().active_generation, Some(2));
        assert_eq!(unit.property("NRestarts"), "0");
    });
}

fn a_start_that_fails_is_told(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode plain --fail exit-before-ready --code 7");
        assert_ne!(unit.systemctl("start").code, 0);
        assert!(unit.journal().contains("status 7"), "{}", unit.journal());
        // Without anybody's doing, as soon as the cause is mended.
        unit.configure("--mode plain", &[]);
        unit.wait_property("ActiveState", |state| state == "active");
        unit.succeed("stop");
        unit.nothing_is_left();
    });
}
