//! Canary and bake take longer than systemd would wait: it is told, waits, and can say what goes on.

use reuseportd_wire::status::{MasterState, Outcome};

use super::reload::{notify_reload, unchanged};
use super::unit::Unit;
use super::with_each_systemd;
use crate::support::PATIENCE;
use crate::support::machine::{Systemd, machine};

with_each_systemd!(a_reload_lasts_as_long_as_the_trial, a_trial_by_signal, a_failing_bake_fails_the_reload);

/// Longer than TIMEOUT, and than the time asked for by the launch before.
const TRIAL: [(&str, &str); 3] = [
    ("[upgrade]", "ready_timeout = \"8s\""),
    ("[upgrade]", "canary = [{ share = \"50%\", hold = \"7s\" }]"),
    ("[upgrade]", "bake = \"8s\""),
];
const TIMEOUT: &str = "[Service]\nTimeoutStartSec=5";

/// What goes on, in systemd's words.
fn is_told(unit: &Unit<'_>) {
    unit.wait_property("StatusText", |text| text == "canary: generation 2 gets 50 % of the new connections");
    unit.wait_property("StatusText", |text| text == "baking: generation 2 serves, the old one stands by");
}

/// It is over, and the service was there all the time.
fn completed(unit: &Unit<'_>) {
    let status = unit.wait_status("steady", |status| status.state == MasterState::Steady);
    assert_eq!(status.active_generation, Some(2), "{}", unit.journal());
    assert_eq!(unit.receipt().outcome, Outcome::Completed);
    unit.wait_property("ActiveState", |state| state == "active");
    assert_eq!(unit.property("NRestarts"), "0", "{}", unit.journal());
    let journal = unit.journal();
    assert!(!journal.contains("timed out"), "{journal}");
}

fn a_reload_lasts_as_long_as_the_trial(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode plain");
        unit.configure("--mode plain", &TRIAL);
        unit.drop_in(TIMEOUT);
        unit.succeed("start");
        let reload = unit.begin("reload");
        is_told(&unit);
        let done = reload.finish(PATIENCE);
        assert_eq!(done.code, 0, "{done:#?}\n{}", unit.journal());
        completed(&unit);
    });
}

/// SIGHUP: by `systemctl reload` itself where systemd knows how, which waits then.
fn a_trial_by_signal(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode plain");
        unit.configure("--mode plain", &TRIAL);
        let waits = systemd == Systemd::V257;
        unit.drop_in(&if waits { notify_reload().replace("[Service]", TIMEOUT) } else { TIMEOUT.to_owned() });
        unit.succeed("start");
        let reload = unit.begin(if waits { "reload" } else { "kill --kill-whom=main --signal=SIGHUP" });
        is_told(&unit);
        assert_eq!(unit.property("ActiveState"), "reloading", "{}", unit.journal());
        let done = reload.finish(PATIENCE);
        assert_eq!(done.code, 0, "{done:#?}\n{}", unit.journal());
        completed(&unit);
    });
}

fn a_failing_bake_fails_the_reload(systemd: Systemd) {
    machine(systemd, true, |world, machine| {
        let unit = Unit::new(world, machine, "--mode plain");
        unit.succeed("start");
        let before = unit.workers();
        unit.configure("--mode plain --print no-database", &[("[upgrade]", "bake = \"10m\"")]);
        let reload = unit.begin("reload");
        unit.wait_property("StatusText", |text| text.starts_with("baking: "));
        let new = unit.workers();
        assert!(new.is_disjoint(&before), "{new:?} {before:?}");
        machine.tell(&format!("kill -KILL {}", new.first().unwrap()));
        assert_ne!(reload.finish(PATIENCE).code, 0, "{}", unit.journal());
        unchanged(&unit, &["upgrade rolled back: ", "SIGKILL while it was on trial", "no-database"]);
        assert_eq!((unit.receipt().outcome, unit.workers()), (Outcome::RolledBack, before));
        assert!(unit.receipt().steer_back_us.is_some());
        assert_eq!(unit.property("NRestarts"), "0");
    });
}
