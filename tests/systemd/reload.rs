//! `systemctl reload`.

use std::fs;
use std::time::Duration;

use reuseportd_wire::status::Outcome;

use super::crash::followed;
use super::unit::Unit;
use super::with_each_systemd;
use crate::support::PATIENCE;
use crate::support::machine::{Machine, Systemd, machine};
use crate::support::world::{World, repository};

with_each_systemd!(reload_upgrades_or_fails, reload_by_signal);

fn reload_upgrades_or_fails(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode plain");
        unit.succeed("start");
        unit.succeed("reload");
        assert_eq!((unit.receipt().from, unit.receipt().to), (Some(1), Some(2)));
        let before = unit.workers();

        unit.configure("--mode plain --fail exit-before-ready --code 7 --print no-database", &[]);
        assert_ne!(unit.systemctl("reload").code, 0, "{}", unit.journal());
        unchanged(&unit, &["status 7", "no-database"]);
        assert_eq!(unit.receipt().outcome, Outcome::RolledBack);

        machine.write("/etc/reuseportd/web.toml", "[nonsense]\n");
        assert_ne!(unit.systemctl("reload").code, 0, "{}", unit.journal());
        unchanged(&unit, &["nonsense"]);
        assert!(unit.journal().contains("nonsense"), "{}", unit.journal());

        unit.configure("--mode plain", &[]);
        assert_eq!(unit.workers(), before);
        unit.succeed("reload");
        assert!(unit.workers().is_disjoint(&before));
        assert_eq!(unit.property("NRestarts"), "0");
    });
}

/// The unit is as it was, and says why.
pub(super) fn unchanged(unit: &Unit<'_>, reasons: &[&str]) {
    assert_eq!(unit.property("ActiveState"), "active");
    let text = unit.property("StatusText");
    for reason in reasons {
        assert!(text.contains(reason), "{reason:?} is not in {text:?}\n{}", unit.journal());
    }
    assert!(unit.answers());
}

fn reload_by_signal(systemd: Systemd) {
    machine(systemd, true, |world, machine| match systemd {
        Systemd::V252 => the_type_is_not_known(world, machine),
        Systemd::V257 => reload_waits_by_itself(world, machine),
    });
}

pub(super) fn notify_reload() -> String {
    fs::read_to_string(repository("deploy/notify-reload.conf")).unwrap()
}

fn reload_waits_by_itself(world: &World, machine: &Machine) {
    let unit = Unit::new(world, machine, "--mode plain --ready-delay 1000");
    unit.drop_in(&notify_reload());
    unit.succeed("start");
    let took = unit.succeed("reload");
    assert!(took >= Duration::from_secs(1), "{took:?}");
    assert_eq!(unit.status().active_generation, Some(2));
    assert_eq!(unit.property("StatusText"), "generation 2 serves");
    // An upgrade that is rolled back is a reload like any other.
    unit.configure("--mode plain --fail exit-before-ready --code 7", &[]);
    unit.succeed("reload");
    unchanged(&unit, &["status 7"]);
    assert_eq!(unit.status().active_generation, Some(2));
    // A master that dies meanwhile is followed.
    unit.configure("--mode plain --ready-delay 3000", &[]);
    let reload = unit.begin("reload");
    unit.wait_property("StatusText", |text| text.starts_with("launching"));
    followed(&unit, 1);
    assert_ne!(reload.finish(PATIENCE).code, 0, "{}", unit.journal());
}

fn the_type_is_not_known(world: &World, machine: &Machine) {
    let unit = Unit::new(world, machine, "--mode plain");
    unit.drop_in(&notify_reload());
    unit.succeed("start");
    assert_eq!(unit.property("Type"), "notify");
    assert_ne!(unit.systemctl("reload").code, 0);
    assert_eq!(unit.status().active_generation, Some(1));
}
