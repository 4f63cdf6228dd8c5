//! Upgrades that fail: the old generation serves on as if nothing had been, and the reason says what to do.

use std::os::unix::fs::PermissionsExt;

use reuseportd_wire::status::{Outcome, Phase};

use crate::support::app::{App, test_worker};
use crate::support::load::{Load, slow_accepts};
use crate::support::master::Master;
use crate::support::world::{World, needs_of, world};

/// One way to fail: how the config changes, the outcome, and what the reason has to name.
struct Failure {
    sort: &'static str,
    change: fn(&World, &mut App),
    outcome: Outcome,
    names: &'static [&'static str],
}

const LAST_WORDS: &str = "cannot-open-the-database";

fn replaced(app: &mut App, mode: &str, options: &str) {
    app.command = test_worker(&format!("--mode {mode} {options} --print {LAST_WORDS}"));
}

const FAILURES: &[Failure] = &[
    Failure {
        sort: "missing binary",
        change: |_, app| app.command[0] = "/nonexistent/program".into(),
        outcome: Outcome::Refused,
        names: &["/nonexistent/program", "No such file"],
    },
    Failure {
        sort: "binary without permission to execute",
        change: |world, app| {
            let plain = world.path("plain-file");
            std::fs::write(&plain, "#!/bin/sh\n").unwrap();
            std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o644)).unwrap();
            app.command[0] = plain.to_str().unwrap().into();
        },
        outcome: Outcome::Refused,
        names: &["plain-file", "not executable"],
    },
    Failure {
        sort: "exits before it is ready",
        change: |_, app| replaced(app, "plain", "--fail exit-before-ready --code 7"),
        outcome: Outcome::RolledBack,
        names: &["seat", "status 7", LAST_WORDS],
    },
    Failure {
        sort: "exits after it listens",
        change: |_, app| replaced(app, "plain", "--fail exit-after-listen --code 9"),
        outcome: Outcome::RolledBack,
        names: &["seat", "status 9", LAST_WORDS],
    },
    Failure {
        sort: "handover worker that exits when it should serve",
        change: |_, app| replaced(app, "sdk", "--fail exit-before-ready --code 5"),
        outcome: Outcome::RolledBack,
        names: &["seat", "status 5", LAST_WORDS],
    },
    Failure {
        sort: "never ready",
        change: |_, app| {
            replaced(app, "plain", "--fail never-ready");
            // Time enough to say its last words.
            app.upgrade.push("ready_timeout = \"3s\"".into());
        },
        outcome: Outcome::RolledBack,
        names: &["seat", "ready_timeout", LAST_WORDS],
    },
    Failure {
        sort: "listens elsewhere",
        change: |_, app| replaced(app, "plain", "--fail wrong-address"),
        outcome: Outcome::RolledBack,
        names: &["seat", "127.0.0.1:"],
    },
    Failure {
        sort: "without SO_REUSEPORT",
        change: |_, app| replaced(app, "plain", "--fail no-reuseport"),
        outcome: Outcome::RolledBack,
        names: &["seat", "Address"],
    },
];

fn failures_lose_nothing(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let options = format!("--mode {mode} --accept-delay 5");
        let app = App::test_worker(world, &options).engine(engine);
        let master = Master::start(world, &app);
        let load = Load::start(slow_accepts(world));
        let before = master.serving();
        for failure in FAILURES {
            let mut changed = app.clone();
            (failure.change)(world, &mut changed);
            changed.write();
            let (code, receipt) = master.failing_upgrade();
            let told = format!("{}: {receipt:#?}", failure.sort);
            assert_eq!((code, receipt.outcome), (1, failure.outcome), "{told}");
            let reason = receipt.reason.unwrap_or_default();
            for name in failure.names {
                assert!(reason.contains(name), "{name:?} is not in the reason of {told}");
            }
        }
        app.write_invalid();
        let done = master.cli("upgrade --wait");
        assert_eq!(done.code, 2, "{done:#?}");
        assert!(done.stderr.contains("nonsense"), "{done:#?}");
        assert_eq!(master.serving(), before, "the old generation has been touched");
        app.write();
        let receipt = master.upgrade();
        assert_eq!(receipt.from, Some(1));
        assert!(receipt.phases.iter().any(|phase| phase.phase == Phase::Retiring), "{receipt:#?}");
        load.answered_by(receipt.to.expect("a completed upgrade has a new generation"));
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn failures_under_load_unmodified_ebpf() {
    failures_lose_nothing("ebpf", "plain");
}

#[test]
fn failures_under_load_unmodified_cbpf() {
    failures_lose_nothing("cbpf", "plain");
}

#[test]
fn failures_under_load_sdk_ebpf() {
    failures_lose_nothing("ebpf", "sdk");
}

#[test]
fn failures_under_load_sdk_cbpf() {
    failures_lose_nothing("cbpf", "sdk");
}
